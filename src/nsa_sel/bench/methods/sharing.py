"""What shared tiles do in a timed call, found after its timing: who shares, and what both kernels alone take.

Source: docs/kernel.md, "Shared tiles".
"""

from __future__ import annotations

import functools
import statistics
from dataclasses import replace
from typing import TYPE_CHECKING

from ..suite.cases import SHARED
from . import contender
from .contender import CaseState, Prepared, as_rows

if TYPE_CHECKING:  # Triton is imported where a kernel runs
    from ...kernel.launch import Plan


def figures(state: CaseState) -> dict[str, float | None]:
    """Return entries of extra_info for prefill.

    shared: the share of query tiles that share; None: no call of these sizes does. In cases of SHARED also what decides
    about it: union, KV tiles that a query tile selects, on average; rows_us, tiles_us: device times of the row kernel
    and of the other where all share.

    Raises:
        WrongResult: of one of the two kernels.
    """
    from ...kernel import device, launch, shared_config
    from ...kernel.shared_launch import SharedPlan, plan_for

    case, x = state.case, state.inputs
    tensors = x.q, x.k, x.v, x.ranges
    chosen = plan_for(*tensors, None, x.min_len, x.max_len)
    shared = chosen.found(*tensors).share if isinstance(chosen, SharedPlan) else None
    if case.family != SHARED:
        return {"shared": shared}
    rows = launch.Plan(*tensors, None, x.min_len, x.max_len)
    if isinstance(chosen, SharedPlan):
        always = replace(chosen.shared, break_even=0.0)
    else:
        call = device.call_of(*tensors, min_len=x.min_len, max_len=x.max_len)
        always = shared_config.default(call, device.gpu_of(x.q.device), 0.0)
        always = replace(always, tma=always.tma and rows.tma)
    every = SharedPlan(*tensors, None, x.min_len, x.max_len, always)
    return {
        "shared": shared,
        "union": every.found(*tensors).listed,
        "rows_us": _device_us(state, rows),
        "tiles_us": _device_us(state, every),
    }


def _device_us(state: CaseState, plan: Plan) -> float:
    """Return a plan's device time, its result having been checked."""
    x = state.inputs
    call = functools.partial(plan.run, x.q, x.k, x.v, x.ranges)
    contender.check(state, Prepared(call, functools.partial(as_rows, state.case)))
    return statistics.median(state.timer.samples(call)) * 1e6
