"""The launch of a call that no tuned table knows: which variant, tile, split, warps and stages, and by which rule.

The tile comes from the first rule of a ladder that applies, the parts of a row from one formula. Most limits stand
between points that were measured on an H200, and are round. What each rule is worth: docs/kernel.md, "The rules".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from .call import Call, Gpu
from .launch_config import LaunchConfig, chunk_width, padded_heads, padded_width, shared_memory

MAX_SPLITS = 64  # one program merges them all


@dataclass(frozen=True)
class Choice:
    """Hold a launch and why it is this one.

    rule: what decided the tile, in words. parts: likewise its parts. wanted: the launch before it was made to fit into
    shared memory.
    """

    launch: LaunchConfig
    rule: str
    parts: str
    wanted: LaunchConfig

    @property
    def reason(self) -> str:
        """Return why in one line."""
        return self.rule if self.launch == self.wanted else f"{self.rule}; made to fit from {self.wanted}"

    @property
    def by_field(self) -> dict[str, str]:
        """Return what decided each field of the launch, by its name."""
        found = dict.fromkeys(vars(self.launch), self.rule)
        found |= dict.fromkeys(("block_d", "block_dv"), "the power of two that pads least in at most 4 chunks")
        found |= dict.fromkeys(("splits", "cluster"), self.parts)
        if not self.launch.max_registers:
            found["max_registers"] = "no rule asks for a limit"
        changed = [name for name, value in vars(self.launch).items() if value != getattr(self.wanted, name)]
        return found | {name: f"{getattr(self.wanted, name)}, made to fit into shared memory" for name in changed}


class Tile(NamedTuple):
    """Name how tokens are loaded, how many at a time, and by how many warps; max_registers: as in `LaunchConfig`."""

    load: str
    block_l: int
    num_warps: int
    num_stages: int
    max_registers: int = 0


def choose(call: Call, gpu: Gpu) -> LaunchConfig:
    """Choose the launch of a call on a GPU."""
    return decide(call, gpu).launch


def decide(call: Call, gpu: Gpu) -> Choice:
    """Choose the launch of a call on a GPU, and say by which rule."""
    call = replace(call, N=max(call.N, 1), n_spans=max(call.n_spans, 1))
    splits, cluster, parts = _parts(call, gpu)
    rule, tile = next((rule, tile) for applies, rule, tile in _tiles(call, gpu, splits, cluster) if applies)
    limit = gpu.shared_bytes
    if cluster > 2 and 2 * call.N * splits > gpu.sm_count:
        # Not every group of multiprocessors is a multiple of a cluster: two programs must find a place on one.
        limit //= 2
        if cluster == 8 and call.N * splits > gpu.sm_count and call.max_len < 2048:
            tile = tile._replace(num_stages=min(tile.num_stages, 2))
    (load, block_l, warps, stages, registers), widths = tile, (chunk_width(call.D), chunk_width(call.Dv))
    wanted = LaunchConfig(load, block_l, *widths, warps, stages, splits, registers, cluster)
    launch = _fit(wanted, call, limit)
    of_64 = (launch.load, launch.block_l, warps, launch.num_stages) == ("gather", 64, 4, 3)
    if not gpu.has_clusters and splits > 1 and of_64 and call.H <= 32:
        # The compiler for sm_80, 86 and 89 gives these 96 or 168 registers, and spills.
        launch, wanted = (replace(each, max_registers=160) for each in (launch, wanted))
    return Choice(launch, rule, parts, wanted)


def _tiles(call: Call, gpu: Gpu, splits: int, cluster: int) -> Iterator[tuple[bool, str, Tile]]:
    """Yield rules: whether one applies, what for, and its tile. The first that applies decides."""
    length, n, heads, rows_per_sm = call.max_len, call.n_spans, padded_heads(call.H), call.N / gpu.sm_count
    d, dv = (padded_width(width, chunk_width(width)) for width in (call.D, call.Dv))
    width, held = d + dv, heads * (d + 2 * dv)  # registers hold the result in fp32, and q in 16 bits
    measured = gpu.has_clusters  # on an H200; what was learnt there last does not change other GPUs
    span, few, many, light = length / n, rows_per_sm < 1, rows_per_sm >= 3, heads == 16
    # An SM has room for 32 programs: where more wait, it is no longer the longest rows that decide.
    unequal = n == 1 and not call.one_length and rows_per_sm < 32
    # A small program is one warp where its threads hold the row's result and q; four warps share `wgmma`.
    enough = many and (heads < 64 or rows_per_sm >= 8 or not measured)  # few small programs leave an SM idle
    one_warp = light or (enough and n <= 256 and held <= (12_288 if heads == 32 else 6144))
    warps = 1 if one_warp else 2 if heads == 32 and many else 4
    # Tiles of fp32 that come by TMA would pass through shared memory twice; `wgmma` is fed by gathers.
    tma = gpu.has_tma and call.fits_tma and call.element_bytes == 2 and (heads < 64 or one_warp)
    whole = "tma" if tma else "whole"
    long = width <= 384 and span >= (32 if n <= 128 else 16)  # wider tiles of 32 do not fit into a warp's registers
    # Where rows are unequal most have far shorter spans than the longest row, and few columns make TMA slow.
    broken = 1 < n <= 64 and span < 256 and not (call.one_length or call.shared_kv)
    gathered = measured and (broken or (n <= 8 and width <= 96))
    blocks = many and one_warp and long and (call.shared_kv or (n > 8 and tma)) and not gathered
    even = n == 1 and call.one_length and tma
    large = even and length % 128 == 0  # what is left of tiles is read in small ones

    yield n > 256, "more than 256 spans: 8 warps", Tile("gather", 16, 8, 2) if span < 64 else Tile(whole, 64, 8, 3)
    yield call.element_bytes == 4, "fp32: products without tensor cores", Tile("gather", 16 if n > 64 else 32, 4, 2)
    yield length <= 16, "rows of up to 16 tokens: one tile", Tile("gather", 16, warps, 2)
    rule = "blocks of many rows: one warp streams whole tiles"
    yield blocks and tma and span >= 64 and heads * width <= 4096, f"{rule} of 64", Tile("tma", 64, 1, 2, 232)
    yield blocks, f"{rule} of 32", Tile(whole, 32, 1, 2, 152 if tma and 256 < width <= 320 else 0)
    few_blocks = n > 8 and span >= 56 and not (many or gathered)
    yield few_blocks and heads < 64, "blocks of few rows: whole tiles", Tile(whole, 64, 4, 3)
    yield n > 128, "more than 128 short spans: 4 warps", Tile("gather", 32, 4, 2)
    yield n > 64 and not (many and held <= 6144), "65 to 128 spans: 4 warps", Tile("gather", 64 if light else 32, 4, 2)
    small = (length <= 32 or 64 < length < 128 or (many and width > 192)) if measured else length < 128
    yield warps == 4 and heads == 64 and small, "more than 32 heads, short or wide rows", Tile("gather", 32, 4, 2)
    yield warps == 4 and heads == 64, "more than 32 heads: 4 warps", Tile("gather", 64, 4, 3 if width <= 128 else 2)
    yield length <= 32 and many, "many rows of up to 32 tokens: small programs", Tile("gather", 16, warps, 2)
    yield length <= 32, "rows of up to 32 tokens: one tile", Tile("gather", 32, 2, 2 if measured and 1 < n <= 8 else 3)
    rule = "rows of unequal lengths, many heads or narrow: two warps"
    yield unequal and many and length > 128 and (not light or width <= 128), rule, Tile("gather", 64, 2, 3)
    yield unequal and not many and not few and not light, f"{rule}, few rows", Tile("gather", 32, 2, 3)
    rule = "rows of unequal lengths: the longest decide"
    yield unequal and length > 256 and width <= 128, f"{rule}, narrow ones", Tile("gather", 128, 4, 3)
    in_parts = measured and length <= 1024 and rows_per_sm <= 1 / 2
    tile = Tile("tma", 128, 4, 2 if rows_per_sm <= 1 / 8 else 3) if in_parts else Tile("tma", 64, 4, 3)
    yield unequal and tma and length > (1024 if many else 256), f"{rule}, long ones", tile
    stages = 2 if measured and many and length <= 256 else 3
    yield unequal and length > 64 and (length > 256 or width > 192), rule, Tile("gather", 64, 4, stages)
    yield even and many and length % 64 == 0 and width > 192, "many wide rows of one length", Tile("tma", 64, 2, 2)
    one_tile = measured and even and not (few or many) and length == 64 and width > 128
    for_every_sm = one_tile or (large and not few and (length > 256 or not many))
    yield for_every_sm, "rows of one length for every SM", Tile("tma", min(length, 128), 2, 2)
    yield many and not light, "many rows, many heads", Tile("gather", 32 if n <= 32 and heads == 32 else 16, warps, 3)
    yield many, "many rows: small programs of one warp", Tile("gather", 16, 1, 3)
    narrow = length > 384 or 64 < length <= 128 if measured else length > 256
    tile = Tile("gather", 128, 4, 3 if length > 128 else 2)
    yield not few and width <= 128 and narrow, "rows for every SM, narrow: large tiles", tile
    two_warps = n > 1 or (tma and (held <= 8192 or not measured))
    yield not few, "rows for every SM", Tile("gather", 64, 2 if two_warps else 4, 3)
    yield length <= 64, "few rows of one tile", Tile("gather", 64, 2, 3) if n > 1 else Tile("gather", 64, 4, 2)
    part = length // splits if measured and cluster == 1 else length
    yield large and light and part <= 256, "few rows of one length: a tile each", Tile("tma", part, 4, 2)
    stages = 2 if measured and 1 / 16 < rows_per_sm <= 1 / 4 else 3
    yield large and light, "few rows of one length", Tile("tma", 128, 4, stages)
    yield cluster <= 2 and light and n <= 8, "few rows without large clusters: large tiles", Tile("gather", 128, 4, 3)
    yield True, "few rows: parts", Tile("gather", 64, 4, 3)


def _parts(call: Call, gpu: Gpu) -> tuple[int, int, str]:
    """Return splits and cluster of a call, and why: parts that fill the GPU, if they save more than their merge costs.

    A cluster merges in about the time that a program needs for 64 tokens, the last of many programs in twice that.
    """
    length, rows_per_sm = call.max_len, call.N / gpu.sm_count
    if not (gpu.has_clusters and call.fits_tma):
        part = 128 if rows_per_sm <= 1 / 16 else 256 if rows_per_sm <= 1 / 4 else 512
        part *= 2 if gpu.has_tma and call.n_spans == 1 and call.one_length else 1  # in large tiles
        why = f"parts of {part} tokens or more, until programs fill the GPU: the last to arrive merges"
        return max(1, min(gpu.sm_count // call.N, length // part, MAX_SPLITS)), 1, why
    longest = call.n_spans == 1 and not call.one_length  # few rows, if any, are as long as the longest
    # Rows in large tiles by TMA: one program streams what an SM can read, and a part is a tile at least.
    large = call.n_spans == 1 and call.one_length and call.H <= 16 and length % 128 == 0 and call.element_bytes == 2
    late = large and call.D + call.Dv > 192 and rows_per_sm > 1 / 4
    if longest and length > 256 and rows_per_sm <= 4 and (length > 1024 or rows_per_sm <= 1 / 2 or call.H > 16):
        splits = (8 if rows_per_sm <= 1 / 8 else 4) // (1 if length > 1024 and rows_per_sm <= 3 else 2)
        why = "rows of unequal lengths are split for the longest, as clusters"
    elif rows_per_sm > 1 or length < max(512 if large else 256, (4096 if late else 2048) * rows_per_sm):
        return 1, 1, "one part: a merge would cost more than it saves"
    elif large and 512 < length <= 1024 and 1 / 8 < rows_per_sm <= 1 / 4 and call.D + call.Dv > 128:
        return length // 256, 1, "parts of a tile of 256 tokens, one a multiprocessor: the last to arrive merges"
    else:
        most = 8 if rows_per_sm <= 1 / 4 else 4 if rows_per_sm <= 1 / 2 and length >= 2048 else 2
        tile = 128 if large else 64
        splits = min(most, 1 << round(math.log2(length / tile)))
        why = f"parts of about {tile} tokens or more, until two programs a multiprocessor: a cluster merges"
    room = gpu.sm_count // (8 * call.N), gpu.sm_count // (4 * call.N)  # clusters of a row: by 1 and by 2 programs an SM
    clusters = min(max(room[0], min(room[1], 2)), max(length // 2048, length // (512 * call.N)), MAX_SPLITS // 8)
    if splits == 8 and clusters > 1:
        # Where each multiprocessor streams many tiles, pairs occupy more of them than clusters of 8 do.
        return 8 * clusters, 2 if length >= 8192 * clusters else 8, "few long rows: parts on every multiprocessor"
    return splits, splits, why


def _fit(config: LaunchConfig, call: Call, limit: int) -> LaunchConfig:
    """Shorten the tiles, then the pipeline, then give up whole tiles, until a launch fits into `limit` bytes."""
    while shared_memory(config, call.H, call.D, call.Dv, call.element_bytes) > limit:
        if config.block_l > 64 or (config.num_stages <= 2 and config.block_l > 16):
            config = replace(config, block_l=config.block_l // 2)
        elif config.num_stages > 1:
            config = replace(config, num_stages=config.num_stages - 1)
        else:
            config = replace(config, load="gather")
    return config
