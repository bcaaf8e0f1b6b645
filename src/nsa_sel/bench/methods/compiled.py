"""Packed SDPA under `torch.compile`: one dynamic build per static shape, and a static one where that is faster.

Source: docs/measuring.md, "Scopes".
"""

from __future__ import annotations

import statistics
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import reference
from ..suite.cases import Case
from ..suite.inputs import Inputs
from ..timer.timing import DeviceTimer, WallTimer

# A static build takes seconds, so it is tried in one typical case per layout.
STATIC_TRIED = {(256, 256, "few"), (256, 256, "many")}  # (L, N, layout) of `rows`
STATIC_MUST_WIN = 1.05
RECOMPILES = 64  # beyond it torch.compile would run eager, or raise with fullgraph
MOST_FAILURES = 2  # of one build: each takes the compiler seconds, and the build would be tried in dozens of cases

_builds: dict[tuple[object, ...], Callable[..., Tensor]] = {}
_failures: dict[tuple[object, ...], list[str]] = {}


@dataclass(frozen=True)
class Build:
    """Hold the call that is timed, and what it is, for extra_info."""

    call: Callable[[], Tensor]
    details: dict[str, str | float]


def choose(case: Case, x: Inputs, sdpa_backend: str, timer: DeviceTimer | WallTimer) -> Build:
    """Return the build to time: dynamic in N, L and S_kv, or static where that was tried and is over 5 % faster.

    Must be called, and its call be timed, inside the SDPA backend's context: the backend is chosen while tracing.

    Raises: whatever the compiler raises; `fullgraph` makes it raise rather than fall back to eager.
    """
    failed = _failures.setdefault(_shape(case, sdpa_backend), [])
    if len(failed) >= MOST_FAILURES:
        raise RuntimeError(f"failed before: {failed[0]}")
    call = _build(case, x, sdpa_backend, dynamic=True)
    try:
        call()
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        failed.append(f"{type(error).__name__}: {error}")
        raise
    if case.family != "rows" or (case.L, case.N, case.layout) not in STATIC_TRIED:
        return Build(call, {"compile_mode": "dynamic"})
    try:
        static = _build(case, x, sdpa_backend, dynamic=False)
        static()
    except Exception as error:  # seen for small L; the dynamic build is taken
        return Build(call, {"compile_mode": "dynamic", "static_build": f"failed: {type(error).__name__}"})
    dynamic_s, static_s = (statistics.median(timer.samples(each, rounds=20)) for each in (call, static))
    gain = dynamic_s / static_s
    if gain > STATIC_MUST_WIN:
        return Build(static, {"compile_mode": "static", "static_gain": gain})
    return Build(call, {"compile_mode": "dynamic", "static_gain": gain})


def _build(case: Case, x: Inputs, sdpa_backend: str, dynamic: bool) -> Callable[[], Tensor]:
    """Bind the compiled function to the inputs; compile it at its first call for this static shape."""
    shape = _shape(case, sdpa_backend)
    key = shape if dynamic else (*shape, case.N, case.L, case.S_kv)
    if key not in _builds:
        _raise_limits()
        _builds[key] = torch.compile(_body_of_its_own(len(_builds)), fullgraph=True, dynamic=None if dynamic else False)
    # L reaches the function as the size of a tensor: a plain integer would be taken for a constant at the first build.
    length = torch.empty(x.max_len, dtype=torch.int8, device=x.q.device)
    q, k, v, ranges = (t.detach() for t in (x.q, x.k, x.v, x.ranges))
    if dynamic:
        free = [(q, 0), (k, 0), (v, 0), (ranges, 0), (k, 2), (v, 2), (length, 0)]
        for tensor, dim in free:
            if tensor.shape[dim] > 1:  # sizes 0 and 1 are always static
                torch._dynamo.mark_dynamic(tensor, dim)
    function = _builds[key]
    return lambda: function(q, k, v, ranges, length)


def _shape(case: Case, sdpa_backend: str) -> tuple[object, ...]:
    """Return what a dynamic build is static in."""
    return (case.H, case.D, case.Dv, case.dtype, case.S, case.G, case.n_spans, case.B == 1, sdpa_backend)


def _body(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, length: Tensor) -> Tensor:
    return reference.packed_sdpa(q, k, v, ranges, min_len=length.shape[0], max_len=length.shape[0])


def _body_of_its_own(number: int) -> Callable[..., Tensor]:
    """Copy `_body` with code of its own: builds are kept, and recompilations counted, by code object."""
    code = _body.__code__.replace(co_name=f"packed_sdpa_{number}")
    return types.FunctionType(code, _body.__globals__, code.co_name)


def _raise_limits() -> None:
    config = torch._dynamo.config
    for name in ("recompile_limit", "cache_size_limit"):
        if hasattr(config, name):
            setattr(config, name, RECOMPILES)
