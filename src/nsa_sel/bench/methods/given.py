"""A user's kernel made ready for a case: it is only called, so that nothing but its result can be judged.

Source: docs/your-kernel.md.
"""

from __future__ import annotations

import functools
import os
import traceback
from typing import Any

from torch import Tensor

from ..suite.kernels import UNSUPPORTED, UserKernel
from .contender import CaseState, NotTimed, Prepared, WrongResult, as_rows, packed_as_inputs

NEEDS_A_GPU = ("triton", "torch.cuda")  # what raises where a kernel for GPUs gets tensors of the CPU


def prepare(state: CaseState, kernel: UserKernel, core: bool) -> Prepared:
    """Return the kernel ready for timing, not yet checked. core: it gets rows packed beforehand, of one span each.

    Raises:
        NotTimed: it declares that it cannot do this, or needs a GPU and there is none.
        WrongResult: it returns something else than a tensor of the result's shape, or changes its arguments.
        Exception: whatever the kernel itself raises.
    """
    if state.device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        raise NotTimed("no GPU, and TRITON_INTERPRET=1: the interpreter is not timed")
    x = packed_as_inputs(state) if core else state.inputs
    if (reason := kernel.unsupported(x.q, x.k, x.v, x.ranges)) is not None:
        raise NotTimed(UNSUPPORTED + reason)
    call = kernel.ready(x.q, x.k, x.v, x.ranges, min_len=x.min_len, max_len=x.max_len)
    arguments = {"q": x.q, "k": x.k, "v": x.v, "ranges": x.ranges}
    versions = {name: tensor._version for name, tensor in arguments.items()}
    try:
        out = call()
    except Exception as error:
        if state.device == "cpu" and _needs_a_gpu(error):
            raise NotTimed("no GPU") from error
        raise
    repro = "\n" + _repro(state, kernel, core) if kernel.spec else ""
    if fault := _fault(out, (*x.q.shape[:4], x.v.shape[3])):
        raise WrongResult(f"{state.case.id}: {kernel.name} {fault}{repro}")
    if changed := [name for name, tensor in arguments.items() if tensor._version != versions[name]]:
        raise WrongResult(f"{state.case.id}: {kernel.name} changes its argument {changed[0]}")
    details: dict[str, str | float] = {}
    if kernel.spec:
        details = {"config": kernel.about, "kernel": kernel.spec, "takes": kernel.takes}
    return Prepared(call, functools.partial(as_rows, state.case), details, repro=repro)


def _fault(out: Any, shape: tuple[int, ...]) -> str:
    """Return why this is no result at all; "" if it is one."""
    if not isinstance(out, Tensor):
        return f"returns {type(out).__name__}, expected a tensor {shape}"
    return "" if out.shape == shape else f"returns a tensor {tuple(out.shape)}, expected {shape}"


def _needs_a_gpu(error: Exception) -> bool:
    """Tell whether an error came from Triton's or CUDA's own code."""
    names = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(f"{name}.".startswith(f"{package}.") for name in names for package in NEEDS_A_GPU)


def _repro(state: CaseState, kernel: UserKernel, core: bool) -> str:
    """Return lines that run when pasted in the working directory, and end in the gate's verdict."""
    timer = "DeviceTimer" if state.device == "cuda" else "WallTimer"
    takes = [kernel.takes] if kernel.block_size else []
    lines = [
        'import sys; sys.path[:0] = ["", "src"]',
        f"from nsa_sel.bench.methods.contender import CaseState{', packed_as_inputs' if core else ''}",
        "from nsa_sel.bench.suite import gate, kernels",
        f"from nsa_sel.bench.suite.cases import Case{', Recorded' if state.case.recorded else ''}",
        f"from nsa_sel.bench.timer.timing import {timer}",
        f"(kernel,) = kernels.parse(['{kernel.spec}={kernel.name}'], {takes})",
        f"state = CaseState({state.case!r}, {timer}())",
        f"x = {'packed_as_inputs(state)' if core else 'state.inputs'}",
        "rows, oracle, packed = state.expected",
        "out = kernel(x.q, x.k, x.v, x.ranges, min_len=x.min_len, max_len=x.max_len)",
        "verdict = gate.check(out.flatten(0, 2)[rows], oracle, packed, dtype=x.q.dtype)",
        "assert verdict.ok, verdict.message",
    ]
    return "\n".join(lines)
