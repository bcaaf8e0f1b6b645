"""The public entry: check the arguments, route, run."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import reference, routing, spans
from .config import SelConfig, config_for_call, get_config
from .errors import KernelFailed, UnsupportedError
from .routing import Route

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Calls that were checked and routed to Triton, with the toggles that held: see kernel/launch.py.
_plans: dict[tuple, Any] = {}
_failures: dict[tuple, str] = {}  # device, dtype and widths whose kernel failed, and why: "auto" leaves them alone


def selection_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
    config: SelConfig | None = None,
    min_len: int | None = None,
    max_len: int | None = None,
    validate: bool | None = None,
    return_lse: bool = False,
) -> Any:
    """Attend from every row to the concatenation of its selected spans: softmax(q·kᵀ·scale)·v.

    q [B, S, G, H, D], k [B, G, S_kv, D], v [B, G, S_kv, Dv] in fp16, bf16 or fp32, any strides but a contiguous last
    dimension. ranges int32 or int64 [B, S, G, n_spans, 2]: half-open token spans, clamped to [0, S_kv]; see spans.py.
    Returns [B, S, G, H, Dv], contiguous, in q's dtype; softmax and sums are fp32. A row without tokens gives zeros.
    The same input gives the same bits on the same device and versions. K and V that are not selected have no influence,
    NaN included; a selected value that is infinite gives an infinity or NaN.

    scale: 1/sqrt(D) if None. backend: "auto" routes (see `choose_route`); "triton", "packed_sdpa" and "masked_sdpa" run
    or raise. min_len, max_len: the shortest and the longest row's L in tokens; with both no device sync happens.
    validate: check ranges and hints, at the cost of a sync; None: as the toggle NSA_SEL_VALIDATE says.
    return_lse: return the pair (result, natural-log LSE of every row and head, fp32 [B, S, G, H], -inf where L = 0);
    only the Triton kernel computes it.

    Raises:
        ValueError, TypeError: a bad argument, named, with what it is and what is expected; ConfigError for a toggle.
        UnsupportedError: the backend asked for by name cannot run this call, and why. A kernel that cannot be compiled
            or started is such a reason; "auto" warns of it once (RuntimeWarning) and takes its fallback.
        torch.cuda.OutOfMemoryError: packing needs more memory than there is; the message names the size.
    Source: NSA (arXiv 2502.11089), section 3.3.2.
    """
    if torch.compiler.is_compiling():
        from . import ops

        return ops.traced(q, k, v, ranges, scale, backend, config, min_len, max_len, validate, return_lse)
    key = None
    if config is None and not validate:
        try:
            if not torch.is_grad_enabled() or not (q.requires_grad or k.requires_grad or v.requires_grad):
                key = (
                    q.shape, k.shape, v.shape, ranges.shape, q.stride(), k.stride(), v.stride(), ranges.stride(),
                    q.dtype, k.dtype, v.dtype, ranges.dtype, q.device, k.device, v.device, ranges.device,
                    scale, backend, min_len, max_len, return_lse,
                )  # fmt: skip
        except AttributeError:
            pass  # not a tensor: _check says which
    if key is not None:
        known = _plans.get(key)
        if known is not None and known[0] is get_config():
            try:
                return known[1].run(q, k, v, ranges, None, None)
            except KernelFailed:  # other pointers, another alignment, another kernel
                if backend != "auto":
                    raise
                _plans.pop(key, None)

    config = config_for_call(config)
    _check(q, k, v, ranges, min_len, max_len)
    if config.sel_validate if validate is None else validate:
        spans.validate(ranges, k.shape[2], min_len, max_len)
        key = None
    hinted = max_len is not None
    if backend == "auto" and max_len is None and q.numel():
        min_len, max_len = reference.length_bounds(ranges, k.shape[2])
    chosen = _route(q, k, v, ranges, backend, config, max_len).backend
    if chosen == "triton":
        from .kernel import launch

        try:
            if return_lse:
                lse = torch.empty(q.shape[:4], dtype=torch.float32, device=q.device)
                return launch.forward(q, k, v, ranges, scale=scale, min_len=min_len, max_len=max_len, lse=lse), lse
            plan = launch.Plan(q, k, v, ranges, scale, min_len, max_len)
            out = plan.run(q, k, v, ranges, None, None)
            if key is not None and (hinted or backend == "triton"):
                launch.remember(_plans, key, (config, plan))
            return out
        except KernelFailed as error:
            if backend != "auto":
                raise
            _failures[_kind(q, v)] = str(error)
            chosen = routing.fallback(config)
            warnings.warn(f"nsa_sel: {chosen} runs in place of Triton: {error}", RuntimeWarning, stacklevel=2)
    if return_lse:
        raise UnsupportedError(f"return_lse: value is True, expected False with {chosen}, which does not compute it")
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


def choose_route(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    *,
    backend: str = "auto",
    config: SelConfig | None = None,
    min_len: int | None = None,
    max_len: int | None = None,
) -> Route:
    """Say which backend `selection_attention` would run for this call, and why in one sentence. Arguments as there.

    Raises: as `selection_attention`.
    """
    _check(q, k, v, ranges, min_len, max_len)
    return _route(q, k, v, ranges, backend, config_for_call(config), max_len)


def _route(
    q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, backend: str, config: SelConfig, max_len: int | None
) -> Route:
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


def _check(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, min_len: int | None, max_len: int | None) -> None:
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
