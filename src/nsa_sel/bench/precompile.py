"""Compile the kernels of a run on all CPU cores before the first is timed: one after another, hundreds take minutes.

They land in Triton's disk cache, where the run finds them. A kernel that fails here is compiled again, and its error
reported, by its benchmark.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

from ..kernel import launch, shared_launch
from ..kernel.launch_config import span_bucket
from ..kernel.shared_config import row_of
from .methods.fused import Packing, packing_of
from .suite.cases import TRITON_METHODS, Case
from .suite.inputs import TORCH_DTYPES, Inputs
from .tune import workers
from .tune.log import Progress
from .tune.space import Variant

LIMIT_S = 150.0  # for all of them
CACHED_S = 0.25  # a kernel that is ready sooner was not compiled
PROBES = 4


def compile_kernels(pairs: Iterable[tuple[Case, str]], progress: Progress, part: tuple[int, int] = (0, 1)) -> str:
    """Compile what these (case, method) pairs launch on the GPU, and say in a sentence what was done.

    part: (i, n) for the i-th of n parts, where n processes compile together.
    """
    begin = time.perf_counter()
    variants = distinct(pairs, "cuda")[part[0] :: part[1]]
    torch.cuda.empty_cache()
    if len(variants) <= PROBES:
        return f"{len(variants)} kernels to compile"
    seconds_to_build(variants[0])  # starts the driver's side, which takes its own time
    probes = variants[1 :: max(1, len(variants) // PROBES)][:PROBES]
    if all(seconds is not None and seconds < CACHED_S for seconds in map(seconds_to_build, probes)):
        return f"{len(variants)} kernels, compiled before"
    processes = min(workers.workers(), len(variants))
    progress.start("kernels compiled", len(variants))
    try:
        failed = len(workers.compile_all(variants, progress.step, total_s=LIMIT_S))
    except TimeoutError:
        return f"{len(variants)} kernels were not compiled in {LIMIT_S:.0f} s: the run compiles what is missing"
    took = f"in {time.perf_counter() - begin:.0f} s by {processes} processes"
    return f"{len(variants) - failed} of {len(variants)} kernels compiled {took}"


def distinct(pairs: Iterable[tuple[Case, str]], device: str) -> list[Variant | Packing]:
    """Return every kernel that these (case, method) pairs launch, once."""
    found: dict[Variant | Packing, None] = {}
    for case, method in pairs:
        if method == "packed_sdpa_fused":
            found[packing_of(case, torch.device(device))] = None
        if method not in TRITON_METHODS:
            continue
        core = method == "triton_core"
        x = blank(case, core, device)
        if launch.unsupported_reason(x.q, x.k, x.v, x.ranges) is None:
            found[_variant(case, x)] = None
    return list(found)


def _variant(case: Case, x: Inputs) -> Variant:
    """Return what a call compiles."""
    config = launch.launch_for(x.q, x.k, x.v, x.ranges, min_len=x.min_len, max_len=x.max_len)
    S, n_spans = min(x.q.shape[1], 2), x.ranges.shape[3]
    row = case.dtype, S, case.H, case.D, case.Dv
    shared = shared_launch.eligible(x.q, x.k, x.v, x.ranges, None, x.min_len, x.max_len)
    if shared is None:
        return Variant(*row, span_bucket(n_spans), config.with_fewest_parts())
    return Variant(*row, n_spans, row_of(config), shared, x.k.shape[2])


def blank(case: Case, core: bool, device: str) -> Inputs:
    """Return tensors of the shapes that the method gets, not filled, with ranges that select nothing."""
    dtype = TORCH_DTYPES[case.dtype]
    B, S, G, S_kv, n_spans = case.B, case.S, case.G, case.S_kv, case.n_spans
    if core:
        B, S, G, S_kv, n_spans = case.N, 1, 1, case.longest, 1
    q = torch.empty(B, S, G, case.H, case.D, dtype=dtype, device=device)
    k = torch.empty(B, G, S_kv, case.D, dtype=dtype, device=device)
    v = torch.empty(B, G, S_kv, case.Dv, dtype=dtype, device=device)
    shortest = case.longest if case.one_length else 0
    return Inputs(q, k, v, torch.zeros(B, S, G, n_spans, 2, dtype=torch.int32, device=device), shortest, case.longest)


def seconds_to_build(kernel: Variant | Packing) -> float | None:
    """Build a kernel in this process and return the seconds that it took; None if it cannot be built."""
    try:
        begin = time.perf_counter()
        workers.build(kernel)
        return time.perf_counter() - begin
    except Exception:  # its benchmark will say why
        return None
