"""How long the host takes to plan a call that it has not seen: launch, grid and arguments.

    python -m nsa_sel.bench.checks.planning

On a GPU a whole new call is timed too, of a kernel that is compiled: check, route, plan and the public launch. Without
one the plans are of tensors without memory, for the launches of an H200. Source: docs/kernel.md, "Why this launch".
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from unittest import mock

import torch
from torch import Tensor

from ... import selection_attention
from ..command_line import Parser
from ..suite import cases
from ..suite.cases import Case
from ..suite.inputs import TORCH_DTYPES
from .variants import ARCHITECTURES

LIMIT_US = 150.0
TIMES = 1000
CASES = (
    cases.rows_case("bf16", "many", 8, 128, 128, 512, 64),
    cases.decode_case("bf16", "many", 16, 128, 128, 1024, 1, 8192),
    cases.prefill_case("bf16", "many", 16, 192, 128, 1024, 4096, 4),
)


def plan_us(case: Case, device: str) -> float:
    """Return the median time of a `Plan` in µs; device: "cuda", or "meta" for tensors without memory."""
    from ...kernel import launch  # needs Triton

    tensors, hints = _tensors(case, device), (case.L if case.one_length else 1, case.L)
    stand_in = mock.patch.object(launch, "gpu_of", lambda device: ARCHITECTURES[90][1])
    if device == "cuda":
        return _median_us(lambda i: launch.Plan(*tensors, None, *hints))
    with stand_in:
        return _median_us(lambda i: launch.Plan(*tensors, None, *hints))


def new_call_us(case: Case) -> float:
    """Return the median host time in µs of a call with a scale that no earlier call had, hence with a plan of its own.

    Nothing is selected, so that the device keeps up with the host.
    """
    tensors = _tensors(case, "cuda")

    def call(i: int) -> Tensor:
        return selection_attention(*tensors, backend="triton", scale=0.1 + i * 1e-6, min_len=0, max_len=case.L)

    torch.cuda.synchronize()
    return _median_us(call)


def _tensors(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = TORCH_DTYPES[case.dtype]
    q = torch.zeros(case.B, case.S, case.G, case.H, case.D, dtype=dtype, device=device)
    k, v = (torch.zeros(case.B, case.G, case.S_kv, width, dtype=dtype, device=device) for width in (case.D, case.Dv))
    return q, k, v, torch.zeros(case.B, case.S, case.G, case.n_spans, 2, dtype=torch.int32, device=device)


def _median_us(call: Callable[[int], object]) -> float:
    times = []
    for i in range(TIMES):
        begin = time.perf_counter()
        call(i)
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e6


def main(argv: Sequence[str] | None = None) -> int:
    """Print the times; 0, or 1 if a plan takes longer than LIMIT_US."""
    command = f"python -m {__package__}.planning"
    Parser(command, description=__doc__, examples=command).parse_args(argv)
    on_gpu = torch.cuda.is_available()
    plans = {case: plan_us(case, "cuda" if on_gpu else "meta") for case in CASES}
    for case, us in plans.items():
        more = f", a new call {new_call_us(case):.1f} µs" if on_gpu else ""
        print(f"{case.id}: a plan {us:.1f} µs{more}")
    print(f"median of {TIMES}, host time; a plan may take {LIMIT_US:.0f} µs")
    return 1 if max(plans.values()) > LIMIT_US else 0


if __name__ == "__main__":
    sys.exit(main())
