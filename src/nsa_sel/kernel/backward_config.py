"""The launches of a backward pass, and by which rules they are chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace

from . import shared_config
from .call import Call, Gpu
from .launch_config import SMALLEST_SHARED_BYTES, LaunchConfig, chunk_width, next_power_of_2, padded_heads, padded_width
from .shared_config import SharedLaunch

# Jobs of the keys' pass beyond one per KV tile: so many for each multiprocessor can be filled with chunks of popular
# tiles. Each takes room for a tile's sums in fp32. On an H200 (prefill of 4,096 queries, H=16, products of 32 columns)
# 16 take 601 us and 8 take 629 us of the keys' pass, and 25 us more of the merge.
SLOTS_PER_SM = 16
NARROWEST = 64  # columns of a chunk: D and Dv have at most four
# Visits per KV tile from which on a query tile shares, where the forward's may: a row costs more here than there, so
# that sharing pays earlier. On an H200 1.5 to 2.5 took up to 17 % more for random selections, and as much for local.
DQ_BREAK_EVEN = 1.2
LEAST_BATCHES = 8  # of queries per chunk: writing and merging its sums costs about as much as one. Not measured.


@dataclass(frozen=True)
class BackwardLaunch:
    """Name every choice of a backward pass.

    row: of the rows' pass: load "whole" or "tma", no splits. block_t: tokens of a KV tile.
    rows: columns of the keys' products, the queries of a batch times padded heads. num_warps, num_stages: of the keys'
    pass. slots: chunks of popular tiles that there is room for. shared: of the rows whose query tiles share KV tiles;
    None: none do.
    """

    row: LaunchConfig
    block_t: int
    rows: int
    num_warps: int
    num_stages: int
    slots: int
    shared: SharedLaunch | None = None

    def __str__(self) -> str:
        return (
            f"backward {self.row}, keys BT{self.block_t} R{self.rows} w{self.num_warps} s{self.num_stages} "
            f"x{self.slots}{f', {self.shared}' if self.shared else ''}"
        )

    def queries(self, H: int) -> int:
        """Return the queries of a batch."""
        return self.rows // next_power_of_2(H)

    def problem(self, H: int) -> str | None:
        """Say what is expected in place of a launch that would compute these heads wrongly, or not at all."""
        if self.row.load == "gather" or self.row.splits > 1:
            return "rows in whole tiles and whole chunks, without splits"
        if any(n < 16 or n & (n - 1) for n in (self.block_t, self.rows)) or self.rows < next_power_of_2(H):
            return "tiles and rows that are powers of two from 16 on, and rows for all heads"
        if self.num_warps not in (1, 2, 4, 8, 16) or self.num_stages < 1 or self.slots < 1:
            return "num_warps that is a power of two up to 16, a stage or more, and a slot or more"
        return None

    def key_constants(self, H: int) -> dict[str, int]:
        """Return the compile-time arguments of `_sel_bwd_keys` that follow from the launch, by name."""
        return {"HEADS": next_power_of_2(H), "QUERIES": self.queries(H), "BLOCK_T": self.block_t}


def choose(call: Call, gpu: Gpu) -> BackwardLaunch:
    """Choose the launches of a backward pass.

    Where `wgmma` is used they are the fastest of a sweep on an H200 (bf16, D = Dv = 128, H of 4 and 16, 16 blocks of
    64), elsewhere chosen by registers and shared memory alone.
    """
    block_d, block_dv = chunk_width(call.D), chunk_width(call.Dv)
    columns = padded_width(call.D, block_d) + padded_width(call.Dv, block_dv)
    mean_span = call.max_len / max(call.n_spans, 1)
    tma = gpu.has_tma and call.fits_tma and call.element_bytes == 2
    short = 16 if mean_span < 32 else 32 if mean_span < 64 else 64  # a tile larger than the spans is never whole
    heads = padded_heads(call.H)
    if call.element_bytes == 4:  # products of fp32 take their operands from shared memory, and many registers
        row = LaunchConfig("whole", 16, block_d, block_dv, 4, 1)
        launch = BackwardLaunch(row, min(short, 32), max(16, next_power_of_2(call.H)), 8, 1, 0)
    else:
        large = heads > 16 or columns > 256
        wide_products = tma and gpu.shared_bytes > SMALLEST_SHARED_BYTES  # four warps make one, from shared memory
        row = LaunchConfig("whole", min(short, 32 if large else 64), block_d, block_dv, 4, 2)
        if tma:  # as in the forward: one warp per program, where its registers hold the row and its spans
            many = large or call.n_spans > 64
            row = replace(row, load="tma", block_l=min(short, 32 if many else 64), num_warps=4 if many else 1)
        warps, rows, stages = (4, 32, 4) if wide_products and columns <= 256 else (8, 64, 2)
        rows = max(rows, next_power_of_2(call.H))
        launch = BackwardLaunch(row, min(short, 32 if columns > 384 else 64), rows, warps, stages, 0)
    return _fit(replace(launch, slots=SLOTS_PER_SM * gpu.sm_count), call, gpu.shared_bytes)


def shared_default(call: Call, gpu: Gpu, row: LaunchConfig) -> SharedLaunch:
    """Return a launch of the rows that share: the forward's tiles, with the stages and tokens that fit beside dO."""
    launch = shared_config.default(call, gpu, DQ_BREAK_EVEN)
    tma = launch.tma and row.load == "tma"
    wide_products = tma and gpu.shared_bytes > SMALLEST_SHARED_BYTES
    warps, rows = 4 if wide_products else 8, max(launch.rows, next_power_of_2(call.H))
    launch = replace(launch, rows=rows, num_warps=warps, num_stages=min(launch.num_stages, 2), tma=tma)
    if padded_width(call.D, launch.block_d) > 128:  # sums and weights of 64 tokens take more registers than there are
        launch = replace(launch, block_t=min(launch.block_t, 32))
    while dq_shared_bytes(launch, call) > gpu.shared_bytes and (launch.num_stages > 1 or launch.block_t > 16):
        if launch.num_stages > 1:
            launch = replace(launch, num_stages=launch.num_stages - 1)
        else:
            launch = replace(launch, block_t=launch.block_t // 2)
    return launch


def fits(call: Call, gpu: Gpu) -> bool:
    """Tell whether a backward pass of these sizes has room: fp32 of many heads and wide rows has not everywhere."""
    return key_shared_bytes(choose(call, gpu), call) <= gpu.shared_bytes


def _fit(launch: BackwardLaunch, call: Call, limit: int) -> BackwardLaunch:
    """Take fewer stages, queries, tokens, then narrower chunks, until both passes fit into `limit` bytes."""
    heads = max(16, next_power_of_2(call.H))
    while key_shared_bytes(launch, call) > limit:
        if launch.num_stages > 1:
            launch = replace(launch, num_stages=launch.num_stages - 1)
        elif launch.rows > heads:
            launch = replace(launch, rows=launch.rows // 2)
        elif launch.block_t > 16:
            launch = replace(launch, block_t=launch.block_t // 2)
        elif max(launch.row.block_d, launch.row.block_dv) > NARROWEST:
            narrow = {name: min(getattr(launch.row, name), NARROWEST) for name in ("block_d", "block_dv")}
            launch = replace(launch, row=replace(launch.row, **narrow))
        else:
            break
    while row_shared_bytes(launch.row, call) > limit and launch.row.block_l > 16:
        launch = replace(launch, row=replace(launch.row, block_l=launch.row.block_l // 2))
    return launch


def key_shared_bytes(launch: BackwardLaunch, call: Call) -> int:
    """Estimate the shared memory of the keys' pass in bytes: K and V, q and dO in flight, one more chunk, weights."""
    block_d, block_dv = launch.row.block_d, launch.row.block_dv
    columns = padded_width(call.D, block_d) + padded_width(call.Dv, block_dv)
    tiles = (launch.block_t + launch.rows * launch.num_stages) * columns + launch.rows * max(block_d, block_dv)
    return tiles * call.element_bytes + launch.block_t * launch.rows * 4


def dq_shared_bytes(launch: SharedLaunch, call: Call) -> int:
    """Estimate the shared memory of the rows that share, in bytes: q and dO, K and V in flight, weights."""
    columns = padded_width(call.D, launch.block_d) + padded_width(call.Dv, launch.block_dv)
    tiles = (launch.rows + launch.block_t * launch.num_stages) * columns
    return tiles * call.element_bytes + launch.rows * launch.block_t * 4


def row_shared_bytes(row: LaunchConfig, call: Call) -> int:
    """Estimate the shared memory of the rows' pass in bytes: q and dO as operands, K and V in flight."""
    heads = padded_heads(call.H)
    columns = padded_width(call.D, row.block_d) + padded_width(call.Dv, row.block_dv)
    return (heads * max(row.block_d, row.block_dv) * 2 + row.block_l * columns * row.num_stages) * call.element_bytes
