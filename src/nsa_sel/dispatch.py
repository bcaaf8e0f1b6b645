"""One eager call: a known plan, or check the arguments, choose the backend, and run it."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, is_grad_enabled
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import arguments, modes, parts, reference, routing, spans, training
from .config import SelConfig, config_for_call, get_config
from .errors import KernelFailed, UnsupportedError
from .routing import Route

if TYPE_CHECKING:  # Triton is imported by the first call that asks for the kernel
    from .kernel.kv import Lie, Placed
    from .kernel.launch import Plan

# Calls that were checked and routed to Triton, each with the toggles that held. A plan serves K and V of many lengths;
# the few others of a call serve those where another kernel or launch is due.
_plans: dict[tuple, tuple[SelConfig, list[Plan]]] = {}


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    scale: float | None,
    backend: str,
    config: SelConfig | None,
    min_len: int | None,
    max_len: int | None,
    validate: bool | None,
    return_lse: bool,
) -> Any:
    """Run one eager call. Arguments, result and errors as of `api.selection_attention`.

    Returns NotImplemented where PyTorch's dispatcher must see the operation first; see `modes.eager`.
    """
    # The key of a plan: types, shapes, strides, dtypes and devices of the four tensors, and the arguments that it
    # depends on. Where K and V lie is compared with the plan's, which may serve another S_kv and other strides too, so
    # that a context may grow, in a buffer or by torch.cat. Pointer alignment is looked at when the plan runs.
    key = known = None
    if config is None and not validate:
        try:
            if not is_grad_enabled() or not (q.requires_grad or k.requires_grad or v.requires_grad):
                lie = (k.shape, v.shape, k_stride := k.stride(), v_stride := v.stride())
                key = (
                    q.__class__, k.__class__, v.__class__, ranges.__class__,
                    q.shape, ranges.shape, q.stride(), k_stride[2], v_stride[2], ranges.stride(),
                    q.dtype, k.dtype, v.dtype, ranges.dtype, q.device, k.device, v.device, ranges.device,
                    scale, backend, min_len, max_len, validate,
                )  # fmt: skip
                known = _plans.get(key)
        # No tensor, no number: `check` and `numbers` say which.
        except (AttributeError, IndexError, TypeError, RuntimeError):
            key = None
    if known is not None and known[0] is get_config() and modes.none_on():
        plan = known[1][0]
        last = plan.places.last
        plan, placed = (plan, last) if lie == last.lie else _serving(known[1], lie)
        if placed is not None:
            try:
                if not return_lse:
                    return plan.run(q, k, v, ranges, None, None, placed)
                return _with_lse(plan, q, k, v, ranges, placed)
            except KernelFailed:  # other pointers, another alignment, another kernel
                if backend != "auto":
                    raise
                _plans.pop(key, None)  # type: ignore[arg-type]

    if not modes.eager(q, k, v, ranges):
        return NotImplemented
    given = scale, min_len, max_len
    numbers = arguments.numbers(*given)
    if key is not None and any(type(new) is not type(old) for new, old in zip(numbers, given, strict=True)):
        return run(q, k, v, ranges, numbers[0], backend, config, *numbers[1:], validate, return_lse)
    return run_anew(q, k, v, ranges, numbers, backend, config, validate, return_lse, key)


def run_anew(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    numbers: tuple[float | None, int | None, int | None],
    backend: str,
    config: SelConfig | None,
    validate: bool | None,
    return_lse: bool,
    key: tuple | None = None,
) -> Any:
    """Check a call, choose its backend and run it. numbers: scale, min_len, max_len. key: of the plan to keep."""
    scale, min_len, max_len = numbers
    config = config_for_call(config)
    arguments.check(q, k, v, ranges, min_len, max_len)
    if config.sel_validate if validate is None else validate:
        spans.validate(ranges, k.shape[2], min_len, max_len)
        key = None
    if backend == "auto" and max_len is None and not modes.needs_derivative(q, k, v):
        key = None  # the route depends on what the ranges hold
        if q.numel():
            min_len, max_len = reference.length_bounds(ranges, k.shape[2])
    chosen = route(q, k, v, ranges, backend, config, max_len).backend
    if chosen == "triton":
        try:
            if modes.needs_derivative(q, k, v):
                out, lse = training.attention(q, k, v, ranges, scale, min_len, max_len, backend)
                return (out, lse) if return_lse else out
            return _run_triton(q, k, v, ranges, scale, config, min_len, max_len, return_lse, key)
        except KernelFailed as error:
            if backend != "auto":
                raise
            training.failures[training.kind(q, v)] = str(error)
            chosen = routing.fallback(config)
            warnings.warn(f"nsa_sel: {chosen} runs in place of Triton: {error}", RuntimeWarning, stacklevel=3)
    if chosen == "packed_sdpa" and (min_len is None or max_len is None):
        try:
            min_len, max_len = reference.length_bounds(ranges, k.shape[2])
        except UnsupportedError:
            if backend != "auto":
                raise
            chosen = "masked_sdpa"  # it needs no lengths
    return _run_sdpa(chosen, q, k, v, ranges, scale, config, min_len, max_len, return_lse)


def _run_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    scale: float | None,
    config: SelConfig,
    min_len: int | None,
    max_len: int | None,
    return_lse: bool,
    key: tuple | None,
) -> Any:
    """Plan the call, run it, and keep the plan where a key is given."""
    from .kernel.kv import MAX_KEPT, remember
    from .kernel.launch_config import MAX_SPANS
    from .kernel.shared_launch import plan_for

    if ranges.shape[3] > MAX_SPANS:
        out, lse = parts.run_in_parts(q, k, v, ranges, scale, max_len)
        return (out, lse) if return_lse else out
    plan = plan_for(q, k, v, ranges, scale, min_len, max_len)
    result = _with_lse(plan, q, k, v, ranges) if return_lse else plan.run(q, k, v, ranges)
    if key is not None:
        known = _plans.get(key)
        others = known[1] if known is not None and known[0] is config else []
        remember(_plans, key, (config, [*others, plan]), MAX_KEPT)
    return result


def _serving(plans: list[Plan], lie: Lie) -> tuple[Plan, Placed | None]:
    """Return the plan that serves K and V that lie so, and what it passes; None if none does, or they do not agree."""
    for plan in plans:
        if (placed := plan.places.find(lie)) is not None:
            return plan, placed
    return plans[0], None


def _with_lse(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, placed: Placed | None = None
) -> tuple[Tensor, Tensor]:
    lse = torch.empty(q.shape[:4], dtype=torch.float32, device=q.device)
    return plan.run(q, k, v, ranges, None, lse, placed), lse


def _run_sdpa(
    chosen: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    scale: float | None,
    config: SelConfig,
    min_len: int | None,
    max_len: int | None,
    return_lse: bool,
) -> Any:
    """Run one of the two SDPA forms; with the kill switch on, without SDPA's flash and cuDNN backends."""
    backends = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends) if config.force_parity else contextlib.nullcontext():
        if chosen == "masked_sdpa":
            return reference.masked_sdpa(q, k, v, ranges, scale=scale, return_lse=return_lse)
        lengths = {"min_len": min_len, "max_len": max_len}
        try:
            return reference.packed_sdpa(q, k, v, ranges, scale=scale, **lengths, return_lse=return_lse)
        except torch.cuda.OutOfMemoryError as error:
            raise torch.cuda.OutOfMemoryError(f"{_packing_size(q, k, v, ranges, max_len)}. {error}") from error


def _packing_size(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, max_len: int | None) -> str:
    N = q.shape[0] * q.shape[1] * q.shape[2]
    L = reference.length_bounds(ranges, k.shape[2])[1] if max_len is None else max_len
    size = N * L * (q.shape[4] + v.shape[3]) * q.element_size()
    index = N * L * 8
    return f"packed_sdpa: packing {N} rows of {L} tokens takes {size / 1e9:.2f} GB, their index {index / 1e9:.2f} GB"


def route(
    q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, backend: str, config: SelConfig, max_len: int | None
) -> Route:
    """Say which backend runs a checked call, and why."""
    on_gpu = q.device.type == "cuda"
    needs_grad = modes.needs_derivative(q, k, v)
    transformed = modes.transformed() or modes.tracing()
    unsupported = None
    if backend == "triton" or (backend == "auto" and on_gpu):
        unsupported = _unsupported(q, k, v, ranges)
    if needs_grad and not transformed and unsupported is None and backend in ("auto", "triton"):
        unsupported = _unsupported_backward(q, v) if backend == "triton" or on_gpu else None
    if backend == "auto" and on_gpu:
        unsupported = unsupported or training.failures.get(training.kind(q, v))
    return routing.decide(
        backend,
        config=config,
        gpu_name=torch.cuda.get_device_name(q.device) if on_gpu else None,
        max_len=(lambda: reference.length_bounds(ranges, k.shape[2])[1]) if max_len is None else max_len,
        needs_grad=needs_grad,
        unsupported=unsupported,
        transformed=transformed,
    )


def training_min_len(device_type: str, index: int | None) -> int | None:
    """Return the L from which "auto" trains with the kernel on a device, None for never: a constant of a trace."""
    if device_type != "cuda":
        return None
    config, name = get_config(), torch.cuda.get_device_name(index)
    longest = {"max_len": 2**31, "needs_grad": True, "unsupported": None}
    found = routing.decide("auto", config=config, gpu_name=name, **longest)  # type: ignore[arg-type]
    return config.min_len_for(name, training=True) if found.backend == "triton" else None


# What torch.compiler.assume_constant_result sets; that imports Triton, whose interpreter must be chosen before.
training_min_len._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _unsupported_backward(q: Tensor, v: Tensor) -> str | None:
    from .kernel import backward_launch

    return backward_launch.unsupported_backward(q, v)


def with_sharing(
    chosen: Route,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    backend: str,
    min_len: int | None,
    max_len: int | None,
) -> Route:
    """Say also whether queries of a checked and routed call may share tiles."""
    if chosen.backend != "triton":
        return chosen
    from .kernel.shared_launch import eligible

    if backend == "auto" and max_len is None and q.numel():  # as the call itself then does
        min_len, max_len = reference.length_bounds(ranges, k.shape[2])
    return replace(chosen, shares=eligible(q, k, v, ranges, None, min_len, max_len) is not None)


def _unsupported(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor) -> str | None:
    try:
        from .kernel import launch
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return launch.unsupported_reason(q, k, v, ranges)
