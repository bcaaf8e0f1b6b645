"""One eager call: a known plan, or check the arguments, choose the backend, and run it."""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import reference, routing, spans
from .config import SelConfig, config_for_call, get_config
from .errors import KernelFailed, UnsupportedError
from .routing import Route

if TYPE_CHECKING:  # Triton is imported by the first call that asks for the kernel
    from .kernel.launch import Plan

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Calls that were checked and routed to Triton, each with the toggles that held. A plan serves K and V of many lengths;
# the few others of a call serve those where another kernel or launch is due.
_plans: dict[tuple, tuple[SelConfig, list[Plan]]] = {}
_failures: dict[tuple, str] = {}  # device, dtype and widths whose kernel failed, and why: "auto" leaves them alone


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
    """Run one eager call. Arguments, result and errors as of `api.selection_attention`."""
    # The key of a plan: shapes, strides, dtypes and devices of the four tensors, and the arguments that it depends on.
    # The shapes of K and V are compared with the plan's, which may serve another S_kv too, so that a context may grow.
    # Pointer alignment is looked at when the plan runs.
    key = None
    if config is None and not validate:
        try:
            if not torch.is_grad_enabled() or not (q.requires_grad or k.requires_grad or v.requires_grad):
                key = (
                    q.shape, ranges.shape, q.stride(), k.stride(), v.stride(), ranges.stride(),
                    q.dtype, k.dtype, v.dtype, ranges.dtype, q.device, k.device, v.device, ranges.device,
                    scale, backend, min_len, max_len, validate,
                )  # fmt: skip
        except AttributeError:
            pass  # not a tensor: `check` says which
    if key is not None:
        known = _plans.get(key)
        if known is not None and known[0] is get_config():
            first, kv_shapes = known[1][0], (k.shape, v.shape)
            plan = first if kv_shapes == first.kv_seen else _serving(known[1], kv_shapes)
            if plan is not None:
                try:
                    if not return_lse:
                        return plan.run(q, k, v, ranges, None, None, kv_shapes[0][2])
                    return _with_lse(plan, q, k, v, ranges)
                except KernelFailed:  # other pointers, another alignment, another kernel
                    if backend != "auto":
                        raise
                    _plans.pop(key, None)

    config = config_for_call(config)
    check(q, k, v, ranges, min_len, max_len)
    if config.sel_validate if validate is None else validate:
        spans.validate(ranges, k.shape[2], min_len, max_len)
        key = None
    if backend == "auto" and max_len is None:
        key = None  # the route depends on what the ranges hold
        if q.numel():
            min_len, max_len = reference.length_bounds(ranges, k.shape[2])
    chosen = route(q, k, v, ranges, backend, config, max_len).backend
    if chosen == "triton":
        try:
            return _run_triton(q, k, v, ranges, scale, config, min_len, max_len, return_lse, key)
        except KernelFailed as error:
            if backend != "auto":
                raise
            _failures[_kind(q, v)] = str(error)
            chosen = routing.fallback(config)
            warnings.warn(f"nsa_sel: {chosen} runs in place of Triton: {error}", RuntimeWarning, stacklevel=3)
    if return_lse:
        raise UnsupportedError(f"return_lse: value is True, expected False with {chosen}, which does not compute it")
    return _run_sdpa(chosen, q, k, v, ranges, scale, config, min_len, max_len)


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
    from .kernel.launch import Plan, remember

    plan = Plan(q, k, v, ranges, scale, min_len, max_len)
    result = _with_lse(plan, q, k, v, ranges) if return_lse else plan.run(q, k, v, ranges)
    if key is not None:
        known = _plans.get(key)
        others = known[1] if known is not None and known[0] is config else []
        remember(_plans, key, (config, [*others, plan]))
    return result


def _serving(plans: list[Plan], kv_shapes: tuple) -> Plan | None:
    """Return the plan that serves K and V of these shapes; None if none does, or if they do not agree."""
    for plan in plans:
        if plan.serves(kv_shapes):
            return plan
    return None


def _with_lse(plan: Plan, q: Tensor, k: Tensor, v: Tensor, ranges: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.empty(q.shape[:4], dtype=torch.float32, device=q.device)
    return plan.run(q, k, v, ranges, None, lse), lse


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
) -> Tensor:
    """Run one of the two SDPA forms; with the kill switch on, without SDPA's flash and cuDNN backends."""
    backends = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends) if config.force_parity else contextlib.nullcontext():
        if chosen == "masked_sdpa":
            return reference.masked_sdpa(q, k, v, ranges, scale=scale)
        try:
            return reference.packed_sdpa(q, k, v, ranges, scale=scale, min_len=min_len, max_len=max_len)
        except torch.cuda.OutOfMemoryError as error:
            raise torch.cuda.OutOfMemoryError(f"{_packing_size(q, k, v, ranges, max_len)}. {error}") from error


def _kind(q: Tensor, v: Tensor) -> tuple:
    return q.device, q.dtype, q.shape[3:], v.shape[3]


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
    unsupported = None
    if backend == "triton" or (backend == "auto" and on_gpu):
        unsupported = _unsupported(q, k, v, ranges)
    if backend == "auto" and on_gpu:
        unsupported = unsupported or _failures.get(_kind(q, v))
    return routing.decide(
        backend,
        config=config,
        gpu_name=torch.cuda.get_device_name(q.device) if on_gpu else None,
        max_len=(lambda: reference.length_bounds(ranges, k.shape[2])[1]) if max_len is None else max_len,
        needs_grad=torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
        unsupported=unsupported,
    )


def _unsupported(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor) -> str | None:
    try:
        from .kernel import launch
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return launch.unsupported_reason(q, k, v, ranges)


def check(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, min_len: int | None, max_len: int | None) -> None:
    """Raise for the first argument that does not fit the others."""
    for name, x, rank in (("q", q, 5), ("k", k, 4), ("v", v, 4), ("ranges", ranges, 5)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: type is {type(x).__name__}, expected torch.Tensor")
        if x.dim() != rank:
            raise ValueError(f"{name}: rank is {x.dim()}, expected {rank}")
    B, S, G, H, D = q.shape
    S_kv, Dv = k.shape[2], v.shape[3]
    if q.dtype not in DTYPES:
        raise TypeError(f"q: dtype is {q.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: dtype is {x.dtype}, expected {q.dtype} as q")
    if ranges.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ranges: dtype is {ranges.dtype}, expected torch.int32 or torch.int64")
    for name, x in (("k", k), ("v", v), ("ranges", ranges)):
        if x.device != q.device:
            raise ValueError(f"{name}: device is {x.device}, expected {q.device} as q")
    for name, x, expected in (
        ("k", k, (B, G, S_kv, D)),
        ("v", v, (B, G, S_kv, Dv)),
        ("ranges", ranges, (B, S, G, ranges.shape[3], 2)),
    ):
        if tuple(x.shape) != expected:
            raise ValueError(f"{name}: shape is {tuple(x.shape)}, expected {expected}")
    if min(H, D, Dv) == 0:
        raise ValueError(f"q: shape is {tuple(q.shape)}, expected H, D and Dv of at least 1")
    for name, x in (("q", q), ("k", k), ("v", v), ("ranges", ranges)):
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name}: stride is {x.stride()}, expected a contiguous last dimension")
    for name, hint in (("min_len", min_len), ("max_len", max_len)):
        if hint is not None and hint < 0:
            raise ValueError(f"{name}: value is {hint}, expected at least 0")
    if min_len is not None and max_len is not None and min_len > max_len:
        raise ValueError(f"min_len: value is {min_len}, expected at most max_len, which is {max_len}")
