"""The launch of a call that no tuned table knows: which variant, tile, split, warps and stages, and by which rule."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .call import Call, Gpu
from .launch_config import LaunchConfig, chunk_width, next_power_of_2, padded_heads, shared_memory

MAX_SPLITS = 64  # one program merges them all
FILL = 0  # splits that a rule leaves to `_splits`


@dataclass(frozen=True)
class Choice:
    """Hold a launch and why it is this one.

    rule: what decided, in words. wanted: the rule's launch before it was made to fit into shared memory. filled: the
    rule leaves the number of parts to `_splits`.
    """

    launch: LaunchConfig
    rule: str
    wanted: LaunchConfig
    filled: bool = False

    @property
    def reason(self) -> str:
        """Return why in one line."""
        return self.rule if self.launch == self.wanted else f"{self.rule}; made to fit from {self.wanted}"

    @property
    def by_field(self) -> dict[str, str]:
        """Return what decided each field of the launch, by its name."""
        found = dict.fromkeys(vars(self.launch), self.rule)
        found |= dict.fromkeys(("block_d", "block_dv"), "the power of two that pads least in at most 4 chunks")
        if not self.launch.max_registers:
            found["max_registers"] = "no rule asks for a limit"
        if self.filled:
            found["splits"] = "parts of enough tokens to pay for the merge, until programs fill the GPU"
        changed = [name for name, value in vars(self.launch).items() if value != getattr(self.wanted, name)]
        return found | {name: f"{getattr(self.wanted, name)}, made to fit into shared memory" for name in changed}


def choose(call: Call, gpu: Gpu) -> LaunchConfig:
    """Choose the launch of a call on a GPU."""
    return decide(call, gpu).launch


def decide(call: Call, gpu: Gpu) -> Choice:
    """Choose the launch of a call on a GPU, and say by which rule."""
    N, max_len, n_spans, sm_count = max(call.N, 1), call.max_len, call.n_spans, gpu.sm_count
    H, D, Dv = call.H, call.D, call.Dv
    has_tma, has_clusters = gpu.has_tma and call.fits_tma, gpu.has_clusters
    block_d, block_dv = chunk_width(D), chunk_width(Dv)
    row_warps = padded_heads(H) // 16  # warps that one tile of heads can keep busy without sharing its rows
    rows_per_sm = N / sm_count
    mean_span = max_len / max(n_spans, 1)

    def config(
        rule: str,
        load: str,
        block_l: int,
        num_warps: int,
        num_stages: int,
        splits: int = 1,
        registers: int = 0,
        cluster: int = 1,
    ) -> Choice:
        parts = splits or _splits(N, max_len, sm_count)
        wanted = LaunchConfig(load, block_l, block_d, block_dv, num_warps, num_stages, parts, registers, cluster)
        return Choice(_fit(wanted, call, gpu.shared_bytes), rule, wanted, splits == FILL)

    # Tiles of fp32 that come by TMA would pass through shared memory twice.
    tiles = "tma" if has_tma and call.element_bytes == 2 else "whole"
    if n_spans > 64:  # a program holds all its row's spans in registers
        load, block_l, num_stages = ("gather", 16, 2) if mean_span < 64 else (tiles, 64, 3)
        num_warps = 8 if n_spans > 256 else 4
        if has_clusters and load == "tma" and sm_count >= 32 * N:
            splits, rule = _every_processor(N, sm_count), "few rows of more than 64 long spans: parts on every SM"
            return config(rule, load, 64, num_warps, num_warps // 4 + 2, splits, 0, 8 if max_len <= 256 * splits else 2)
        rule = f"more than 64 {'short' if mean_span < 64 else 'long'} spans: warps that hold them in registers"
        return config(rule, load, block_l, num_warps, num_stages, FILL)
    if call.element_bytes == 4:
        return config("fp32: products without tensor cores, from shared memory", "gather", 32, 4, 2, FILL)
    if row_warps > 1 or D + Dv > 384:
        rule = "more than 16 heads, or D + Dv above 384: registers for tiles of 64 alone"
        return config(rule, "gather" if mean_span < 64 else tiles, 64, 4, 2, FILL)
    if call.shared_kv and n_spans > 1 and mean_span >= 32 and rows_per_sm >= 4:
        rule = "prefill of blocks: rows share K and V in L2, one warp per program"
        if not has_tma:
            return config(rule, "whole", 32, 1, 2)
        if D + Dv <= 256:
            return config(rule, "tma", 64, 1, 2, registers=232)
        return config(f"{rule}, wide rows", "tma", 32, 1, 2, registers=152)
    if has_clusters and has_tma and (n_spans > 1 or call.one_length):
        clustered = _clustered(N, max_len, n_spans, D + Dv, sm_count)
        if clustered is not None:
            return config(*clustered)
    if n_spans == 1 and call.one_length and has_tma and max_len > 32 and D + Dv <= 256:
        large = config(*_one_span(N, max_len, D + Dv, sm_count))
        if (
            large.launch.load == "gather" or max_len % large.launch.block_l == 0
        ):  # most of these tiles leave their rest to small ones
            return large
    if n_spans == 1 and not call.one_length and has_tma and 128 < D + Dv <= 256:
        unequal = _unequal(N, max_len, sm_count, has_clusters)
        if unequal is not None:
            return config(*unequal)
    some_spans = 1 < n_spans <= 8
    if max_len <= 16:
        return config("rows of up to 16 tokens: one tile", "gather", 16, 1 if rows_per_sm >= 1 or some_spans else 2, 2)
    if max_len <= 32:
        if rows_per_sm >= 4:
            return config("many rows of up to 32 tokens: small programs", "gather", 16, 1, 2)
        return config("rows of up to 32 tokens: one tile", "gather", 32, 2, 2 if some_spans else 3)
    # Few spans of unknown lengths leave much of a row outside whole tiles; many long ones are a selection's blocks.
    # A block of 64 that ends at the context may be shorter: the mean of more than 8 blocks may fall to 57.
    whole = mean_span >= (56 if n_spans > 8 else 64) and ((n_spans == 1 and has_tma) or n_spans > 8)
    if rows_per_sm >= 4 and not whole:
        return config("many rows, not in whole tiles: small programs", "gather", 16, 1, 3)
    if rows_per_sm >= 4 and max_len <= 256:
        if D + Dv > 192:
            return config("many wide rows of up to 256 tokens", "gather", 64, 4, 2)
        return config("many rows of up to 256 tokens: small programs", "gather", 16, 1, 3)
    if some_spans and D + Dv > 128 and (rows_per_sm >= 1 or max_len <= 64):
        return config("2 to 8 spans, and rows for every SM or short ones: two warps", "gather", 64, 2, 3)
    if D + Dv <= 128:
        if max_len <= 64:
            return config("narrow rows of up to 64 tokens: one tile", "gather", 64, 2, 2)
        if max_len <= 256 and rows_per_sm >= 1:
            if max_len <= 128:
                return config("narrow rows of up to 128 tokens: one tile", "gather", 128, 4, 2)
            return config("narrow rows of up to 256 tokens", "gather", 64, 2, 3)
        return config("narrow rows: tiles of 128", "gather", 128, 4, 2 if rows_per_sm >= 4 else 3, FILL)
    if whole and max_len > 64:
        many = rows_per_sm > 3 if D + Dv > 192 else rows_per_sm >= 4  # more programs than find a place with 3 stages
        stages = 2 if many or (rows_per_sm >= 1 and max_len <= 256) else 3
        return config("long spans: whole tiles", tiles, 64, 4 if Dv > 64 else 2, stages, FILL)
    if rows_per_sm < 1 and max_len >= 128:
        large = config("fewer rows than SMs, not in whole tiles: tiles of 128", "gather", 128, 4, 3, FILL)
        if large.launch.block_l == 64 and large.launch.splits > 1:
            # The compiler for sm_86 and 89 gives these 96 registers, and spills.
            launch, wanted = (replace(each, max_registers=160) for each in (large.launch, large.wanted))
            return replace(large, launch=launch, wanted=wanted)
        return large
    return config("no rule for more: tiles of 64", "gather", 64, 4, 2 if max_len <= 64 else 3)


def _one_span(N: int, max_len: int, width: int, sm_count: int) -> tuple[str, str, int, int, int, int]:
    """Choose the arguments of `config` for rows of one span and length, D + Dv = width <= 256, with TMA."""
    rows_per_sm = N / sm_count
    if rows_per_sm >= 4:  # small programs
        if width <= 192 and max_len <= 256:
            return "many short rows of one length: small programs", "gather", 16, 1, 3, 1
        rule = "many rows of one span and length: two warps"
        return (rule, "tma", 128, 2, 2, 1) if width <= 192 else (rule, "tma", 64, 4 if max_len <= 64 else 2, 2, 1)
    if max_len <= 64:
        rule = "rows of one span and length, up to 64 tokens: one tile"
        if width <= 128:
            return rule, "gather", 64, 2, 2, 1
        return (rule, "tma", 64, 2, 2, 1) if rows_per_sm >= 1 else (rule, "gather", 64, 4, 2, 1)
    if rows_per_sm >= 1:
        return "rows of one span and length for every SM: tiles of 128", "tma", 128, 2, 2, 1
    # One program a multiprocessor, or less: large tiles, and parts only where the merge costs less than they gain.
    splits = 1
    if max_len > 256 and sm_count >= 4 * N:
        splits = min(max_len // 128, sm_count // N, MAX_SPLITS)
    elif max_len >= 1024 and width <= 192:
        splits = min(4, 2 * sm_count // N)
    elif max_len > 1024:
        splits = max(1, sm_count // N)
    part, rule = -(-max_len // splits), "few rows of one span and length: large tiles, parts where the merge costs less"
    return (rule, "tma", 128 if part <= 128 else 256, 4, 2, splits) if part <= 256 else (rule, "tma", 128, 4, 3, splits)


def _unequal(N: int, max_len: int, sm_count: int, has_clusters: bool) -> tuple | None:
    """Choose the arguments of `config` for rows of one span and of different, or unknown, lengths, with TMA.

    None: as rows of one length. Where the longest rows decide, they are split more than filling the GPU would ask for.
    """
    rows_per_sm = N / sm_count
    if rows_per_sm >= 4:
        if max_len <= 256:
            return None
        rule = "many rows of unequal lengths: the longest decide"
        return (rule, "gather", 64, 4, 3) if max_len <= 1024 else (rule, "tma", 64, 4, 3)
    if max_len <= 256:
        return ("rows of unequal lengths up to 256", "gather", 64, 4, 3) if max_len > 32 else None
    few, rule = rows_per_sm <= 1 / 8, "rows of unequal lengths: split for the longest, as clusters"
    if has_clusters and max_len > 1024:
        return (rule, "tma", 64, 4, 3, 8, 0, 8) if few else (rule, "tma", 64, 4, 3, 4, 0, 4)
    if has_clusters and rows_per_sm <= 1 / 2:
        return (rule, "tma", 128, 4, 2, 4, 0, 4) if few else (rule, "tma", 128, 4, 3, 2, 0, 2)
    return None


def _clustered(
    N: int, max_len: int, n_spans: int, width: int, sm_count: int
) -> tuple[str, str, int, int, int, int, int, int] | None:
    """Choose the arguments of `config` for few rows whose parts merge as clusters; None where that gains nothing.

    Up to 8 programs form a cluster on any card. Clusters of 8 need multiprocessors with room for two programs; pairs
    always fit. Splitting pays once a part has at least one tile. Where every multiprocessor streams many tiles, pairs
    occupy more multiprocessors than clusters of 8 and are faster. width: D + Dv.
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
        rule = "few rows of one span: parts merge as clusters"
        if not quarter:
            return (rule, "tma", 128, 4, 3, 2, 0, 2) if max_len >= (1024 if width <= 192 else 2048) else None
        if few:
            splits, every = cluster * groups, _every_processor(N, sm_count)
            if sm_count // 16 % N == 0:  # one cluster of 8 for about 16 multiprocessors: more read no faster
                return rule, "tma", 128, 4, 4 if max_len >= 1024 * splits else 3, splits, 0, cluster
            if max_len >= 1024 * every:
                return "few long rows of one span: pairs on every SM", "tma", 128, 4, 4, every, 0, 2
            return rule, "tma", 128, 4, 3, splits, 0, cluster
        if width <= 128 and per_sm <= 512:
            return rule, "tma", 128, 4, 2, cluster, 0, cluster
        if per_sm > 128:
            return None
        return (rule, "tma", 256, 4, 2, 4, 0, 4) if max_len == 1024 else (rule, "tma", 128, 4, 2, cluster, 0, cluster)
    stages = 3 if rows_per_sm <= 1 / 8 else 2
    if n_spans > 8 and max_len >= 56 * n_spans:  # a selection's blocks of 64, or longer spans
        rule = "few rows of blocks: parts merge as clusters"
        if not quarter:
            return (rule, "tma", 64, 4, 3, 2, 0, 2) if max_len >= 1024 else None
        if few and max_len >= 4096:
            splits = min(8 * (max_len // 2048), _every_processor(N, sm_count))
            return rule, "tma", 64, 4, 3, splits, 0, 8 if max_len <= 256 * splits else 2
        return (rule, "tma", 64, 4, stages, cluster, 0, cluster) if max_len < 1024 * cluster else None
    rule = "few rows of several spans: gathered parts merge as clusters"
    if not quarter:
        if max_len >= 1024:
            return rule, "gather", 128, 4, 3, 2, 0, 2
        return (rule, "gather", 64, 4, 3, 2, 0, 2) if max_len >= 512 and width > 192 else None
    if per_sm > 128 or max_len < 256 or (max_len < 512 and stages == 2):
        return None
    return rule, "gather", 64, 4, stages, cluster * groups, 0, cluster


def _every_processor(N: int, sm_count: int) -> int:
    """Return how many parts a row has, a multiple of 8, so that few rows occupy every multiprocessor once."""
    return min(sm_count // (8 * N) * 8, MAX_SPLITS)


def _splits(N: int, max_len: int, sm_count: int) -> int:
    """Split rows until the programs fill the GPU, as long as each part keeps enough tokens to pay for the merge."""
    tokens = 128 if sm_count >= N * 16 else 256 if sm_count >= N * 4 else 512
    return max(1, min(sm_count // N, max_len // tokens, MAX_SPLITS))


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
