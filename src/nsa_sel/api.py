"""The public functions, and what they promise."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from . import arguments, dispatch, ops
from .config import SelConfig, config_for_call
from .routing import Route


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
    return_lse: return the pair (result, natural-log LSE of every row and head, fp32 [B, S, G, H], -inf where L = 0).
    The three numbers may be of any type, a 0-d CPU tensor too. Autocast does not change the operation. What else
    PyTorch may do around a call: docs/modes.md.

    Raises:
        ValueError, TypeError: a bad argument, named, with what it is and what is expected; ConfigError for a toggle.
        UnsupportedError: the backend asked for by name cannot run this call, and why. A kernel that cannot be compiled
            or started is such a reason; "auto" warns of it once (RuntimeWarning) and takes its fallback.
        torch.cuda.OutOfMemoryError: packing needs more memory than there is; the message names the size.
    Source: NSA (arXiv 2502.11089), section 3.3.2.
    """
    if is_compiling():
        return ops.traced(q, k, v, ranges, scale, backend, config, min_len, max_len, validate, return_lse)
    result = dispatch.run(q, k, v, ranges, scale, backend, config, min_len, max_len, validate, return_lse)
    if result is NotImplemented:
        return ops.dispatched(q, k, v, ranges, scale, backend, config, min_len, max_len, validate, return_lse)
    return result


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
    _, min_len, max_len = arguments.numbers(None, min_len, max_len)
    arguments.check(q, k, v, ranges, min_len, max_len)
    chosen = dispatch.route(q, k, v, ranges, backend, config_for_call(config), max_len)
    return dispatch.with_sharing(chosen, q, k, v, ranges, backend, min_len, max_len)
