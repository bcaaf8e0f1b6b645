"""The launch decision: which variant, tile, split, warps and stages a call runs with. Pure Python, no GPU needed."""

from __future__ import annotations

from dataclasses import dataclass, replace

MAX_HEADS = 64
MAX_WIDTH = 256  # of D and Dv
SPAN_BUCKETS = (1, 8, 16, 64, 256, 1024)  # spans a row that a kernel is compiled for: few, so that few are compiled
MAX_SPANS = SPAN_BUCKETS[-1]
MAX_GROUPS = 65535  # CUDA's limit on the second grid dimension
MAX_CHUNKS = 4  # column chunks of D or Dv that the kernel can hold
SMALLEST_SHARED_BYTES = 101_376  # what a program may use on sm_86, 89 and 120
MAX_SPLITS = 64  # one program merges them all
MERGE_UNROLL = 8  # parts that the merge loads together
MERGE_REGISTERS = 128  # of each thread, that hold them


@dataclass(frozen=True)
class LaunchConfig:
    """Name every compile-time choice of one launch.

    load: "gather" (every token has its own address), "whole" (tiles inside a span through pointers) or "tma" (those
    tiles through TMA descriptors). block_l: tokens a tile; block_d, block_dv: columns a chunk of D and Dv. splits:
    programs a row. max_registers: a thread's limit, 0 = none. cluster: programs of a row that merge as a thread-block
    cluster, dividing splits; 1: the last to arrive merges all.
    """

    load: str
    block_l: int
    block_d: int
    block_dv: int
    num_warps: int
    num_stages: int
    splits: int = 1
    max_registers: int = 0
    cluster: int = 1

    def __str__(self) -> str:
        more = f" r{self.max_registers}" if self.max_registers else ""
        more += f" cluster{self.cluster}" if self.cluster > 1 else ""
        return (
            f"{self.load} BL{self.block_l} BD{self.block_d} BDV{self.block_dv} "
            f"w{self.num_warps} s{self.num_stages} split{self.splits}{more}"
        )

    def with_fewest_parts(self) -> LaunchConfig:
        """Return the launch of fewest parts that runs the same kernel: their number is a run-time argument."""
        return replace(self, splits=min(self.splits, max(2, self.cluster)))

    def part_floats(self, H: int, Dv: int) -> int:
        """Return how many fp32 values each part of a row leaves in the workspace."""
        own = H * (padded_width(Dv, self.block_dv) + 2)
        return own + H * (self._merge(H, Dv)[0] + 2) if self.cluster > 1 else own

    @property
    def counters(self) -> int:
        """Return how many counters a row needs: none where its parts are one cluster, which meets at a barrier."""
        return 0 if self.splits == self.cluster else self.cluster

    def _merge(self, H: int, Dv: int) -> tuple[int, int]:
        """Return how many columns of the result a program merges at a time, and how many parts of them it loads."""
        values = MERGE_REGISTERS * 32 * self.num_warps // padded_heads(H)
        columns = next_power_of_2(-(-Dv // self.cluster))
        if self.cluster == 1:
            columns = max(16, min(self.block_dv, values // MERGE_UNROLL))
        return columns, min(max(values // columns, 1), 2 * MERGE_UNROLL if self.cluster > 1 else MERGE_UNROLL)

    def _rest(self) -> tuple[int, int]:
        """Return tokens a tile and stages of the loop over what whole tiles leave of a span."""
        if self.num_warps < 4 or self.block_l > 32 * self.num_warps:  # a masked tile as large takes many registers
            return 16, 2 if self.num_warps == 1 else 1
        return self.block_l, 1 if self.load == "tma" else 2

    def constants(self, H: int, Dv: int, n_spans: int) -> tuple:
        """Return the kernel's compile-time arguments from BLOCK_H to LATE_SUM."""
        block_n = next(n for n in SPAN_BUCKETS if n_spans <= n)
        return (
            padded_heads(H),
            self.block_d,
            self.block_dv,
            self.block_l,
            block_n,
            *self._merge(H, Dv),
            self.splits > 1,
            self.cluster,
            self.load,
            *self._rest(),
            # Where few warps share a tile the sums of each thread would take too many registers.
            self.num_warps >= 4 and padded_heads(H) * self.block_l <= 512 * self.num_warps,
        )


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n (1 for n < 1)."""
    return 1 << max(n - 1, 0).bit_length()


def padded_heads(H: int) -> int:
    """Return the heads that a tile has: the least that a product can take, and a power of two."""
    return max(16, next_power_of_2(H))


def chunk_width(width: int) -> int:
    """Return the power of two that covers D or Dv in at most MAX_CHUNKS chunks: least padding, then widest."""
    candidates = [c for c in (256, 128, 64, 32, 16) if c * MAX_CHUNKS >= width and c < 2 * width]
    return min(candidates, key=lambda c: (-(-width // c) * c, -c))


def padded_width(width: int, block: int) -> int:
    """Return the columns of D or Dv with those that its last chunk adds."""
    return -(-width // block) * block


def shared_memory(config: LaunchConfig, H: int, D: int, Dv: int, element_bytes: int) -> int:
    """Estimate a program's shared memory in bytes: the tiles in flight, the exchange of scores and of the result.

    Products of fp32 run without tensor cores and take all their operands from there: q and the weights too.
    """
    k_columns, v_columns = padded_width(D, config.block_d), padded_width(Dv, config.block_dv)
    block_h = padded_heads(H)
    if config.num_stages > 1:
        columns = (config.num_stages - 1) * (k_columns + v_columns)
    elif element_bytes == 4 and config.load != "gather":
        columns = k_columns + v_columns
    else:  # without a pipeline K and V pass through shared memory one after the other
        columns = max(k_columns, v_columns)
    tiles = columns * config.block_l * element_bytes
    exchange = block_h * (config.block_l + config.block_dv) * 4
    operands = block_h * (config.block_l + k_columns) * 4 + 256 if element_bytes == 4 else 0
    return tiles + max(exchange, operands)


def choose(
    *,
    N: int,
    H: int,
    D: int,
    Dv: int,
    n_spans: int,
    max_len: int,
    shared_kv: bool,
    element_bytes: int,
    sm_count: int,
    shared_bytes: int,
    has_tma: bool,
    has_clusters: bool = False,
    one_length: bool = False,
) -> LaunchConfig:
    """Choose the launch for N rows of at most max_len tokens on a GPU with sm_count multiprocessors.

    shared_kv: several rows of a group attend to the same K and V (S > 1). element_bytes: 2 or 4. shared_bytes: what a
    program may use. has_clusters: programs can merge as a thread-block cluster. one_length: every row has max_len
    tokens.
    """
    N = max(N, 1)
    block_d, block_dv = chunk_width(D), chunk_width(Dv)
    row_warps = padded_heads(H) // 16  # warps that one tile of heads can keep busy without sharing its rows
    rows_per_sm = N / sm_count
    mean_span = max_len / max(n_spans, 1)

    def config(
        load: str, block_l: int, num_warps: int, num_stages: int, splits: int = 1, registers: int = 0, cluster: int = 1
    ) -> LaunchConfig:
        chosen = LaunchConfig(load, block_l, block_d, block_dv, num_warps, num_stages, splits, registers, cluster)
        return _fit(chosen, H, D, Dv, element_bytes, shared_bytes)

    tiles = "tma" if has_tma and element_bytes == 2 else "whole"  # fp32 tiles by TMA pass through shared memory twice
    if n_spans > 64:  # a program holds all its row's spans in registers
        load, block_l, num_stages = ("gather", 16, 2) if mean_span < 64 else (tiles, 64, 3)
        num_warps = 8 if n_spans > 256 else 4
        if has_clusters and load == "tma" and sm_count >= 32 * N:
            splits = _every_processor(N, sm_count)
            return config(load, 64, num_warps, num_warps // 4 + 2, splits, 0, 8 if max_len <= 256 * splits else 2)
        return config(load, block_l, num_warps, num_stages, _splits(N, max_len, sm_count))
    if element_bytes == 4:
        return config("gather", 32, 4, 2, _splits(N, max_len, sm_count))
    if row_warps > 1 or D + Dv > 384:
        return config("gather" if mean_span < 64 else tiles, 64, 4, 2, _splits(N, max_len, sm_count))
    if shared_kv and n_spans > 1 and mean_span >= 32 and rows_per_sm >= 4:
        if not has_tma:
            return config("whole", 32, 1, 2)
        return config("tma", 64, 1, 2, registers=232) if D + Dv <= 256 else config("tma", 32, 1, 2, registers=152)
    if has_clusters and has_tma and (n_spans > 1 or one_length):
        clustered = _clustered(N, max_len, n_spans, D + Dv, sm_count)
        if clustered is not None:
            return config(*clustered)
    if n_spans == 1 and one_length and has_tma and max_len > 32 and D + Dv <= 256:
        large = config(*_one_span(N, max_len, D + Dv, sm_count))
        if large.load == "gather" or max_len % large.block_l == 0:  # most of these tiles leave their rest to small ones
            return large
    if n_spans == 1 and not one_length and has_tma and 128 < D + Dv <= 256:
        unequal = _unequal(N, max_len, sm_count, has_clusters)
        if unequal is not None:
            return config(*unequal)
    some_spans = 1 < n_spans <= 8
    if max_len <= 16:
        return config("gather", 16, 1 if rows_per_sm >= 1 or some_spans else 2, 2)
    if max_len <= 32:
        return config("gather", 32, 2, 2 if some_spans else 3) if rows_per_sm < 4 else config("gather", 16, 1, 2)
    # Few spans of unknown lengths leave much of a row outside whole tiles; many long ones are a selection's blocks.
    # A block of 64 that ends at the context may be shorter, so that the mean of more than 8 may fall to 57.
    whole = mean_span >= (56 if n_spans > 8 else 64) and ((n_spans == 1 and has_tma) or n_spans > 8)
    if rows_per_sm >= 4 and not whole:
        return config("gather", 16, 1, 3)
    if rows_per_sm >= 4 and max_len <= 256:
        return config("gather", 64, 4, 2) if D + Dv > 192 else config("gather", 16, 1, 3)
    if some_spans and D + Dv > 128 and (rows_per_sm >= 1 or max_len <= 64):
        return config("gather", 64, 2, 3)
    splits = _splits(N, max_len, sm_count)
    if D + Dv <= 128:
        if max_len <= 64:
            return config("gather", 64, 2, 2)
        if max_len <= 256 and rows_per_sm >= 1:
            return config("gather", 128, 4, 2) if max_len <= 128 else config("gather", 64, 2, 3)
        return config("gather", 128, 4, 2 if rows_per_sm >= 4 else 3, splits)
    if whole and max_len > 64:
        many = rows_per_sm > 3 if D + Dv > 192 else rows_per_sm >= 4  # more programs than find a place with 3 stages
        stages = 2 if many or (rows_per_sm >= 1 and max_len <= 256) else 3
        return config(tiles, 64, 4 if Dv > 64 else 2, stages, splits)
    if rows_per_sm < 1 and max_len >= 128:
        large = config("gather", 128, 4, 3, splits)
        if large.block_l == 64 and splits > 1:  # the compiler for sm_86 and 89 gives these 96 registers, and spills
            return replace(large, max_registers=160)
        return large
    return config("gather", 64, 4, 2 if max_len <= 64 else 3)


def _one_span(N: int, max_len: int, width: int, sm_count: int) -> tuple[str, int, int, int, int]:
    """Choose load, tile, warps, stages and splits for rows of one span and length, D + Dv = width <= 256, with TMA."""
    rows_per_sm = N / sm_count
    if rows_per_sm >= 4:  # small programs
        if width <= 192 and max_len <= 256:
            return "gather", 16, 1, 3, 1
        return ("tma", 128, 2, 2, 1) if width <= 192 else ("tma", 64, 4 if max_len <= 64 else 2, 2, 1)
    if max_len <= 64:
        if width <= 128:
            return "gather", 64, 2, 2, 1
        return ("tma", 64, 2, 2, 1) if rows_per_sm >= 1 else ("gather", 64, 4, 2, 1)
    if rows_per_sm >= 1:
        return "tma", 128, 2, 2, 1
    # One program a multiprocessor, or less: large tiles, and parts only where the merge costs less than they gain.
    splits = 1
    if max_len > 256 and sm_count >= 4 * N:
        splits = min(max_len // 128, sm_count // N, MAX_SPLITS)
    elif max_len >= 1024 and width <= 192:
        splits = min(4, 2 * sm_count // N)
    elif max_len > 1024:
        splits = max(1, sm_count // N)
    part = -(-max_len // splits)
    return ("tma", 128 if part <= 128 else 256, 4, 2, splits) if part <= 256 else ("tma", 128, 4, 3, splits)


def _unequal(N: int, max_len: int, sm_count: int, has_clusters: bool) -> tuple | None:
    """Choose the arguments of `config` for rows of one span and of different, or unknown, lengths, with TMA.

    None: as rows of one length. Where the longest rows decide, they are split more than filling the GPU would ask for.
    """
    rows_per_sm = N / sm_count
    if rows_per_sm >= 4:
        if max_len <= 256:
            return None
        return ("gather", 64, 4, 3) if max_len <= 1024 else ("tma", 64, 4, 3)
    if max_len <= 256:
        return ("gather", 64, 4, 3) if max_len > 32 else None
    few = rows_per_sm <= 1 / 8
    if has_clusters and max_len > 1024:
        return ("tma", 64, 4, 3, 8, 0, 8) if few else ("tma", 64, 4, 3, 4, 0, 4)
    if has_clusters and rows_per_sm <= 1 / 2:
        return ("tma", 128, 4, 2, 4, 0, 4) if few else ("tma", 128, 4, 3, 2, 0, 2)
    return None


def _clustered(
    N: int, max_len: int, n_spans: int, width: int, sm_count: int
) -> tuple[str, int, int, int, int, int, int] | None:
    """Choose the arguments of `config` for few rows whose parts merge as clusters; None where that gains nothing.

    Clusters of 8 are what every GPU that has clusters can place, if an idle multiprocessor has room for two programs;
    of 2, always. A cluster's merge pays from parts of one tile on; where every multiprocessor streams many tiles, the
    larger of those that clusters cannot place are better. width: D + Dv.
    """
    rows_per_sm = N / sm_count
    if rows_per_sm > 1 / 2:
        return None
    few, quarter = rows_per_sm <= 1 / 16, rows_per_sm <= 1 / 4
    per_sm = N * max_len / sm_count
    tile = 128 if n_spans == 1 else 64
    cluster = min(8, next_power_of_2(-(-max_len // tile)))
    groups = max(1, min(max_len // 1024, sm_count // (16 * N))) if few and max_len >= 4096 else 1
    if n_spans == 1:
        if max_len <= 256 or max_len % 128:
            return None
        if not quarter:
            return ("tma", 128, 4, 3, 2, 0, 2) if max_len >= (1024 if width <= 192 else 2048) else None
        if few:
            splits, every = cluster * groups, _every_processor(N, sm_count)
            if sm_count // 16 % N == 0:  # one cluster of 8 for about 16 multiprocessors: more read no faster
                return "tma", 128, 4, 4 if max_len >= 1024 * splits else 3, splits, 0, cluster
            if max_len >= 1024 * every:
                return "tma", 128, 4, 4, every, 0, 2
            return "tma", 128, 4, 3, splits, 0, cluster
        if width <= 128 and per_sm <= 512:
            return "tma", 128, 4, 2, cluster, 0, cluster
        if per_sm > 128:
            return None
        return ("tma", 256, 4, 2, 4, 0, 4) if max_len == 1024 else ("tma", 128, 4, 2, cluster, 0, cluster)
    stages = 3 if rows_per_sm <= 1 / 8 else 2
    if n_spans > 8 and max_len >= 56 * n_spans:  # a selection's blocks of 64, or longer spans
        if not quarter:
            return ("tma", 64, 4, 3, 2, 0, 2) if max_len >= 1024 else None
        if few and max_len >= 4096:
            splits = min(8 * (max_len // 2048), _every_processor(N, sm_count))
            return "tma", 64, 4, 3, splits, 0, 8 if max_len <= 256 * splits else 2
        return ("tma", 64, 4, stages, cluster, 0, cluster) if max_len < 1024 * cluster else None
    if not quarter:
        if max_len >= 1024:
            return "gather", 128, 4, 3, 2, 0, 2
        return ("gather", 64, 4, 3, 2, 0, 2) if max_len >= 512 and width > 192 else None
    if per_sm > 128 or max_len < 256 or (max_len < 512 and stages == 2):
        return None
    return "gather", 64, 4, stages, cluster * groups, 0, cluster


def _every_processor(N: int, sm_count: int) -> int:
    """Return how many parts a row has, a multiple of 8, so that few rows occupy every multiprocessor once."""
    return min(sm_count // (8 * N) * 8, MAX_SPLITS)


def _splits(N: int, max_len: int, sm_count: int) -> int:
    """Split rows until the programs fill the GPU, as long as each part keeps enough tokens to pay for the merge."""
    tokens = 128 if sm_count >= N * 16 else 256 if sm_count >= N * 4 else 512
    return max(1, min(sm_count // N, max_len // tokens, MAX_SPLITS))


def _fit(config: LaunchConfig, H: int, D: int, Dv: int, element_bytes: int, limit: int) -> LaunchConfig:
    """Take tokens a tile, then stages, then whole tiles from a configuration until it fits into `limit` bytes."""
    while shared_memory(config, H, D, Dv, element_bytes) > limit:
        if config.block_l > 64 or (config.num_stages <= 2 and config.block_l > 16):
            config = replace(config, block_l=config.block_l // 2)
        elif config.num_stages > 1:
            config = replace(config, num_stages=config.num_stages - 1)
        else:
            config = replace(config, load="gather")
    return config


def candidate_configs(
    H: int, D: int, Dv: int, *, element_bytes: int = 2, shared: int = SMALLEST_SHARED_BYTES, has_tma: bool = True
) -> list[LaunchConfig]:
    """List every launch that a sweep may try for these widths and that fits into `shared` bytes of shared memory."""
    every = [
        LaunchConfig(load, block_l, chunk_width(D), chunk_width(Dv), warps, stages, splits)
        for load in ("gather", "whole", "tma")
        for block_l in (16, 32, 64, 128)
        for warps in (1, 2, 4, 8)
        for stages in (1, 2, 3, 4)
        for splits in (1, 2, 4, 8, 16, 32)
    ]
    return [c for c in every if shared_memory(c, H, D, Dv, element_bytes) <= shared and (has_tma or c.load != "tma")]
