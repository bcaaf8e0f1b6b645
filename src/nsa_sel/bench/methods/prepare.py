"""The methods made ready for a case: what each one calls, and in which context.

Source: docs/measuring.md, "Scopes".
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ... import selection_attention
from ...errors import KernelFailed, UnsupportedError
from ..saved.speedups import EVERY_SDPA_FORM, PEER_METHODS, kernel_of, scope
from ..suite.cases import TRAINING, TRITON_METHODS
from ..suite.inputs import Inputs, memory_estimate
from ..suite.kernels import UserKernel
from . import compiled, given, peers, sharing, training
from .contender import CaseState, NotTimed, Prepared, WrongResult, as_rows, packed_as_inputs, within


def prepare(state: CaseState, method: str, kernels: Mapping[str, UserKernel] | None = None) -> Prepared:
    """Return the method ready for timing, not yet checked.

    kernels: those that were given, by name; one of the name "triton" runs in place of this package's own.

    Raises:
        NotTimed: it cannot run here; the message says why.
        WrongResult: a given kernel returns something else than a result, or changes its arguments.
    """
    if method in TRITON_METHODS and state.device == "cpu":
        raise NotTimed("no GPU")
    if state.case.family == TRAINING and method not in (kernels or {}):
        return training.prepare(state, method)
    if scope(method) == "core" or method in EVERY_SDPA_FORM:
        state.require(memory_estimate(state.case))  # of packed rows, which the others do without
    if (kernel := (kernels or {}).get(kernel_of(method))) is not None:
        return given.prepare(state, kernel, core=scope(method) == "core")
    if method in TRITON_METHODS:
        return _triton(state, method == "triton_core")
    if method in PEER_METHODS:
        return peers.prepare(state, method)
    rows = functools.partial(as_rows, state.case)
    if method == "sdpa_core":
        return Prepared(state.core_call, rows, {"sdpa_backend": state.core_backend}, within(state.core_backend))
    if method == "packed_sdpa":
        call = _operation(state.inputs, "packed_sdpa")
        return Prepared(call, rows, {"sdpa_backend": state.sdpa_backend}, within(state.sdpa_backend))
    if method not in ("packed_sdpa_fused", "packed_sdpa_compiled"):
        raise ValueError(f"method: value is {method!r}, expected one of {', '.join(state.case.methods)}")
    if state.device == "cpu":
        raise NotTimed("no GPU")
    if method == "packed_sdpa_fused":
        return Prepared(_fused(state.inputs), rows, {"sdpa_backend": state.core_backend}, within(state.core_backend))
    guard = within(state.sdpa_backend)
    try:
        with guard():
            build = compiled.choose(state.case, state.inputs, state.sdpa_backend, state.timer)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # the compiler may fail in any way; the other methods go on
        reason = f"torch.compile failed: {type(error).__name__}: {str(error).strip()}"
        raise NotTimed(" ".join(reason.split())[:300]) from error
    return Prepared(build.call, rows, {"sdpa_backend": state.sdpa_backend, **build.details}, guard)


def _triton(state: CaseState, core: bool) -> Prepared:
    x = packed_as_inputs(state) if core else state.inputs
    from ...kernel import choice, device, launch  # needs Triton

    if (reason := launch.unsupported_reason(x.q, x.k, x.v, x.ranges)) is not None:
        raise NotTimed(reason)
    call = _operation(x, "triton")
    before = launch.launch_count()
    try:
        call()
    except KernelFailed:  # a kernel that does not compile is a failure, not a case to skip
        raise
    except UnsupportedError as error:  # a toggle forbids it
        raise NotTimed(str(error)) from error
    if launch.launch_count() == before:
        raise WrongResult(f"{state.case.id}: the kernel did not run")
    planned = device.call_of(x.q, x.k, x.v, x.ranges, min_len=x.min_len, max_len=x.max_len)
    why = choice.explain(planned, device.gpu_of(x.q.device))
    details: dict[str, str | float] = {"config": str(why.launch), "config_reason": str(why)}
    after = functools.partial(sharing.figures, state) if x.q.shape[1] > 1 else dict
    return Prepared(call, functools.partial(as_rows, state.case), details, after=after)


def _fused(x: Inputs) -> Callable[[], Tensor]:
    from .fused import packed_sdpa_fused  # needs Triton

    return functools.partial(packed_sdpa_fused, x.q, x.k, x.v, x.ranges, min_len=x.min_len, max_len=x.max_len)


def _operation(x: Inputs, backend: str) -> Callable[[], Tensor]:
    return functools.partial(
        selection_attention, x.q, x.k, x.v, x.ranges, backend=backend, min_len=x.min_len, max_len=x.max_len
    )
