"""Which launches a sweep tries for a case, and which it leaves out and why.

Source: docs/kernel.md, "Where the launch comes from".
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace

from ...kernel.call import Call, Gpu
from ...kernel.launch_config import (
    LOADS,
    MAX_CHUNKS,
    LaunchConfig,
    chunk_width,
    padded_heads,
    padded_width,
    shared_memory,
    span_bucket,
)
from ...kernel.shared_config import SharedLaunch
from ...kernel.tuned_table import Key
from ..suite.cases import ELEMENT_BYTES, Case
from ..suite.distributions import law_of

WHOLE_LOADS = ("whole", "tma")  # these take whole tiles of a span
BLOCK_L = (16, 32, 64, 128, 256)
CHUNKS = (32, 64, 128)  # BLOCK_D and BLOCK_DV
WARPS = (1, 2, 4, 8)
STAGES = (1, 2, 3)
# Programs per row, and how many of them merge as a cluster.
SPLITS = tuple((n, c) for n in (1, 2, 4, 8, 16, 32, 64) for c in dict.fromkeys((1, 2, min(n, 8))) if c <= n)
MORE_STAGES = 4  # tried around the best
MAX_REGISTERS = (96, 144, 168, 216)  # likewise
# Reasons that estimate; beside the others these leave hardly a launch for wide rows, many heads or short rows.
SPILLS = "more registers than a thread has"
LONG_TILES = "tiles more than twice as long as a row"
IDLE = "too few splits to fill a sixteenth of the GPU"
REGISTERS = 280  # a thread has 255, but the estimate is too high by that much


@dataclass(frozen=True)
class Variant:
    """Name what to compile: all that a row's kernel is specialised on, or the kernels of a call that shares tiles.

    S: 1, or 2 for any more. n_spans: the most spans per row that it can take. shared: how queries share tiles; then
    n_spans and S_kv are the call's, and launch is that of the other rows.
    """

    dtype: str
    S: int
    H: int
    D: int
    Dv: int
    n_spans: int
    launch: LaunchConfig
    shared: SharedLaunch | None = None
    S_kv: int = 256


def variant(case: Case, launch: LaunchConfig) -> Variant:
    """Return the kernel that a case needs for a launch; several launches may need the same one."""
    n_spans = span_bucket(case.n_spans)
    return Variant(case.dtype, min(case.S, 2), case.H, case.D, case.Dv, n_spans, launch.with_fewest_parts())


def call_of(case: Case) -> Call:
    """Return the case's call as launches are chosen by it, with the hints that the suite gives."""
    size, longest = ELEMENT_BYTES[case.dtype], case.longest
    return Call(case.N, case.H, case.D, case.Dv, case.n_spans, longest, case.S > 1, size, one_length=case.one_length)


def key(case: Case, gpu: Gpu) -> Key:
    """Return the key under which the run time looks a case's call up."""
    return Key.of(call_of(case), gpu)


def longest_span(case: Case) -> int:
    """Return the most tokens that a span of the case may have."""
    if case.block:
        return case.block
    return -(-case.longest // case.n_spans) if law_of(case.layout) in ("many", "equal", "ragged") else case.L


def grid(D: int, Dv: int, every_chunk: bool = False) -> Iterator[LaunchConfig]:
    """Yield the launches of the first round: the widest chunks of D and Dv that waste nothing, or every chunk."""
    chunks = [(chunk_width(D), chunk_width(Dv))]
    if every_chunk:
        chunks = list(dict.fromkeys([*chunks, *itertools.product(CHUNKS, CHUNKS)]))
    for load, block_l, (block_d, block_dv), warps, stages, (splits, cluster) in itertools.product(
        LOADS, BLOCK_L, chunks, WARPS, STAGES, SPLITS
    ):
        yield LaunchConfig(load, block_l, block_d, block_dv, warps, stages, splits, cluster=cluster)


def around(launch: LaunchConfig) -> Iterator[LaunchConfig]:
    """Yield the launches that differ from a good one by narrower chunks, one stage more, or a limit on registers."""
    for block_d, block_dv in itertools.product(CHUNKS, CHUNKS):
        yield replace(launch, block_d=block_d, block_dv=block_dv)
    yield replace(launch, num_stages=MORE_STAGES)
    for registers in MAX_REGISTERS:
        if registers * 32 * launch.num_warps <= 65_536:
            yield replace(launch, max_registers=registers)


def unfit(launch: LaunchConfig, case: Case, gpu: Gpu, but: Container[str] = ()) -> str | None:
    """Say why a launch cannot run a case on a GPU, or is sure to be slower than another; None if it is worth timing.

    but: reasons that do not count.
    """
    return next((reason for reason, applies in RULES.items() if reason not in but and applies(launch, case, gpu)), None)


def registers(launch: LaunchConfig, case: Case) -> int:
    """Estimate a thread's registers: result, q, scores in fp32 and rounded, a 64-bit address for each 16 bytes loaded.

    Against the compiler's own figures for sm_90, H=8, D=Dv=128: it spills from an estimate of about 270 on.
    """
    block_h = padded_heads(case.H)
    size = ELEMENT_BYTES[case.dtype]
    width_d, width_dv = padded_width(case.D, launch.block_d), padded_width(case.Dv, launch.block_dv)
    result = block_h * width_dv
    scores = block_h * launch.block_l * (4 + size) // 4
    addresses = 0 if launch.load in WHOLE_LOADS else 2 * launch.block_l * (width_d + width_dv) * size // 16
    q = 16 * width_d * size // 4 // 32  # warps divide the tokens, each needs the q of its 16 heads
    return q + (result + scores + addresses) // (32 * launch.num_warps)


def _too_much_shared(launch: LaunchConfig, case: Case, gpu: Gpu, programs: int = 1) -> bool:
    size = ELEMENT_BYTES[case.dtype]
    return programs * shared_memory(launch, case.H, case.D, case.Dv, size) > gpu.shared_bytes


def _idle(launch: LaunchConfig, case: Case, gpu: Gpu) -> bool:
    """Tell whether less than a sixteenth of the SMs would have a program, though the row could be split further."""
    return 16 * case.N * launch.splits < gpu.sm_count and 2 * launch.splits * launch.block_l <= case.L


Rule = Callable[[LaunchConfig, Case, Gpu], bool]
# The first that applies is the one that is counted.
RULES: dict[str, Rule] = {
    f"more than {MAX_CHUNKS} chunks of D or Dv": lambda c, case, gpu: c.chunks(case.D, case.Dv) > MAX_CHUNKS,
    "chunks at least twice as wide as D or Dv": lambda c, case, gpu: (
        c.block_d >= 2 * case.D or c.block_dv >= 2 * case.Dv
    ),
    "a loop without pipeline of more than 32 heads, of which ptxas 12.8 may make wrong code": lambda c, case, gpu: (
        c.num_stages == 1 and case.H > 32 and gpu.has_tma
    ),
    "no TMA on this GPU": lambda c, case, gpu: c.load == "tma" and not gpu.has_tma,
    "no clusters on this GPU": lambda c, case, gpu: c.cluster > 1 and not gpu.has_clusters,
    "clusters that leave idle multiprocessors no room for a second program": lambda c, case, gpu: (
        c.cluster > 2 and 2 * case.N * c.splits > gpu.sm_count and _too_much_shared(c, case, gpu, programs=2)
    ),
    "more shared memory than a program may use": _too_much_shared,
    SPILLS: lambda c, case, gpu: registers(c, case) > REGISTERS,
    "eight warps where four hold the spans of a row": lambda c, case, gpu: c.num_warps == 8 and case.n_spans <= 256,
    "tiles longer than any span, so that none is whole": lambda c, case, gpu: (
        c.load in WHOLE_LOADS and c.block_l > longest_span(case)
    ),
    LONG_TILES: lambda c, case, gpu: c.block_l > max(16, 2 * case.L),
    "more splits than tiles": lambda c, case, gpu: c.splits > 1 and c.splits * c.block_l > case.L,
    "splits beyond four programs a multiprocessor": lambda c, case, gpu: (
        c.splits > 1 and case.N * c.splits > 4 * gpu.sm_count
    ),
    IDLE: _idle,
}
