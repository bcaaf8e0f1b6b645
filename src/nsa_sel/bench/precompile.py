"""Compile the kernels of a run on all CPU cores before the first is timed: one after another, hundreds take minutes.

They land in Triton's disk cache, where the run finds them. What fails here is compiled again, and reported, by its
benchmark.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterable

import torch

from nsa_sel import selection_attention
from nsa_sel.bench.cases import TRITON_METHODS, Case
from nsa_sel.bench.inputs import TORCH_DTYPES, Inputs, memory_estimate, ragged_lengths
from nsa_sel.kernel import launch

LIMIT_S = 150.0  # for all of them; a worker that died is waited for in vain
CACHED_S = 0.25  # a kernel that is ready sooner was not compiled
PROBES = 4
MOST_WORKERS = 16  # each holds a context of half a gigabyte on the GPU

Job = tuple[Case, bool]  # with packed rows (core) or without


def compile_kernels(pairs: Iterable[tuple[Case, str]]) -> str:
    """Compile what these (case, method) pairs launch on the GPU, and say in a sentence what was done."""
    begin = time.perf_counter()
    jobs = distinct(pairs, "cuda")
    torch.cuda.empty_cache()
    if len(jobs) <= PROBES:
        return f"{len(jobs)} kernels to compile"
    compile_one(jobs[0])  # starts the driver's side, which takes its own time
    probes = jobs[1 :: max(1, len(jobs) // PROBES)][:PROBES]
    if all(seconds is not None and seconds < CACHED_S for seconds in map(compile_one, probes)):
        return f"{len(jobs)} kernels, compiled before"
    workers = min(len(os.sched_getaffinity(0)), MOST_WORKERS, len(jobs))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        try:
            failed = pool.map_async(compile_one, jobs, chunksize=1).get(LIMIT_S).count(None)
        except multiprocessing.TimeoutError:
            return f"{len(jobs)} kernels were not compiled in {LIMIT_S:.0f} s: the run compiles what is missing"
    took = f"in {time.perf_counter() - begin:.0f} s by {workers} processes"
    return f"{len(jobs) - failed} of {len(jobs)} kernels compiled {took}"


def distinct(pairs: Iterable[tuple[Case, str]], device: str) -> list[Job]:
    """Return one job, the one with the least memory, for each kernel that these (case, method) pairs launch."""
    smallest: dict[tuple[object, ...], Job] = {}
    for case, method in pairs:
        if method not in TRITON_METHODS:
            continue
        core = method == "triton_core"
        x = blank(case, core, device)
        if launch.unsupported_reason(x.q, x.k, x.v, x.ranges) is not None:
            continue
        config = launch.launch_for(x.q, x.k, x.v, x.ranges, min_len=x.min_len, max_len=x.max_len)
        constants = tuple(config.constants(case.H, case.Dv, x.ranges.shape[3]).values())
        kernel = case.dtype, case.H, case.D, case.Dv, x.q.shape[1] > 1, config, constants
        if kernel not in smallest or memory_estimate(case) < memory_estimate(smallest[kernel][0]):
            smallest[kernel] = case, core
    return list(smallest.values())


def blank(case: Case, core: bool, device: str) -> Inputs:
    """Return tensors of the shapes that the method gets, not filled, with ranges that select nothing."""
    dtype = TORCH_DTYPES[case.dtype]
    longest = max(ragged_lengths(case)) if case.family == "ragged" else case.L
    B, S, G, S_kv, n_spans = case.B, case.S, case.G, case.S_kv, case.n_spans
    if core:
        B, S, G, S_kv, n_spans = case.N, 1, 1, longest, 1
    q = torch.empty(B, S, G, case.H, case.D, dtype=dtype, device=device)
    k = torch.empty(B, G, S_kv, case.D, dtype=dtype, device=device)
    v = torch.empty(B, G, S_kv, case.Dv, dtype=dtype, device=device)
    shortest = 0 if case.family == "ragged" else longest
    return Inputs(q, k, v, torch.zeros(B, S, G, n_spans, 2, dtype=torch.int32, device=device), shortest, longest)


def compile_one(job: Job) -> float | None:
    """Run a job once on the GPU and return the seconds; None if it cannot be run."""
    try:
        x = blank(*job, "cuda")
        begin = time.perf_counter()
        selection_attention(x.q, x.k, x.v, x.ranges, backend="triton", min_len=x.min_len, max_len=x.max_len)
        torch.cuda.synchronize()
        return time.perf_counter() - begin
    except Exception:  # its benchmark will say why
        return None
