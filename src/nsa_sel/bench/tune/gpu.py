"""What a sweep does on the GPU: check a launch against the oracle, and time it with the suite's timer."""

from __future__ import annotations

import functools
import gc

import torch

from ...kernel import device, tuned_table
from ...kernel.call import Gpu
from ...kernel.launch import Plan, forward, launch_for, unsupported_reason
from ...kernel.launch_config import LaunchConfig
from ..methods.contender import CaseState, NotTimed, WrongResult
from ..suite import gate
from ..suite.cases import Case
from ..suite.inputs import TORCH_DTYPES
from ..timer.timing import DeviceTimer
from . import workers

WARM_UP_ROUNDS = 2000  # of an idle GPU's clocks: half a second


def find() -> Gpu | str:
    """Return the GPU that torch uses, or one sentence that says why nothing can be tuned here."""
    if not torch.cuda.is_available():
        return "torch finds no GPU here, and the CPU's interpreter is never timed"
    if device.INTERPRETED:
        return "TRITON_INTERPRET is set, and the interpreter is never timed"
    reason = unsupported_reason(*_empty(1, 1, 1, 8, 128, 128, 1, 64, torch.bfloat16))
    if reason is not None:
        return reason
    return device.gpu_of(torch.device("cuda", torch.cuda.current_device()))


class GpuSweepDevice:
    """Do what a sweep needs of the GPU, for one case at a time."""

    def __init__(self) -> None:
        self.timer = DeviceTimer()
        self.timer.samples(torch.cuda.current_stream, rounds=WARM_UP_ROUNDS, warmup=0)
        self.timer.count_cycles()  # again, now that the clocks are up
        self.state: CaseState | None = None

    def untuned(self, case: Case) -> LaunchConfig:
        """Return what runs without a table. Shapes and strides decide it, so the tensors are not filled."""
        self.state = None
        dtype = TORCH_DTYPES[case.dtype]
        tensors = _empty(case.B, case.S, case.G, case.H, case.D, case.Dv, case.n_spans, case.S_kv, dtype)
        with tuned_table.ignored():
            return launch_for(*tensors, min_len=case.L if case.one_length else 0, max_len=case.longest)

    def open(self, case: Case) -> None:
        """Make the case's tensors, the oracle's rows and packed SDPA's; free those of the case before.

        Raises: NotTimed with the size if memory does not suffice.
        """
        self.state = None
        gc.collect()  # tensors may hang on the traceback of a launch that failed
        try:
            self.state = CaseState(case, self.timer)
            assert self.state.expected  # computed here once, and not while the first launch is checked
        except torch.cuda.OutOfMemoryError as error:
            self.state = None
            raise NotTimed(workers.one_line(error)) from None

    def check(self, launch: LaunchConfig) -> None:
        """Run the launch into a poisoned result and judge the fixed rows.

        Raises: WrongResult, or whatever the compiler, the launcher or the driver raises.
        """
        assert self.state is not None
        case, x = self.state.case, self.state.inputs
        out = torch.full((*x.q.shape[:4], case.Dv), float("nan"), dtype=x.q.dtype, device=x.q.device)
        forward(x.q, x.k, x.v, x.ranges, min_len=x.min_len, max_len=x.max_len, out=out, launch=launch)
        rows, oracle, packed = self.state.expected
        found = out.view(case.N, case.H, case.Dv)
        result = gate.check(found[rows], oracle, packed, dtype=x.q.dtype)
        if not result.ok:
            raise WrongResult(result.message)
        if not bool(out.isfinite().all()):
            raise WrongResult("elements that are not finite, or were never written")

    def samples(self, launch: LaunchConfig, rounds: int, warmup: int) -> list[float]:
        """Return device times in µs, each with cold L2."""
        assert self.state is not None
        x = self.state.inputs
        plan = Plan(x.q, x.k, x.v, x.ranges, None, x.min_len, x.max_len, launch)
        call = functools.partial(plan.run, x.q, x.k, x.v, x.ranges)
        return [seconds * 1e6 for seconds in self.timer.samples(call, rounds, warmup)]

    def alive(self) -> bool:
        """Tell whether the GPU still answers; after an illegal access only a new process can use it."""
        return workers.device_answers()


def _empty(
    B: int, S: int, G: int, H: int, D: int, Dv: int, n_spans: int, S_kv: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    q = torch.empty(B, S, G, H, D, dtype=dtype, device="cuda")
    k = torch.empty(B, G, S_kv, D, dtype=dtype, device="cuda")
    v = torch.empty(B, G, S_kv, Dv, dtype=dtype, device="cuda")
    return q, k, v, torch.empty(B, S, G, n_spans, 2, dtype=torch.int32, device="cuda")
