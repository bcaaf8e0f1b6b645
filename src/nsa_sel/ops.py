"""The operation under torch.compile: one opaque custom op that runs the eager entry, with a fake implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import dispatch, reference
from .errors import UnsupportedError

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor ranges, float? scale, str backend, SymInt? min_len, SymInt? max_len, "
    "bool? validate, bool return_lse) -> (Tensor, Tensor)"
)


# In the namespace of this package: a copy of it under another name registers an operation of its own.
@torch.library.custom_op(f"{__package__}::selection_attention", mutates_args=(), schema=SCHEMA)
def _selection_attention(q, k, v, ranges, scale, backend, min_len, max_len, validate, return_lse):  # type: ignore[no-untyped-def]
    result = dispatch.run(q, k, v, ranges, scale, backend, None, min_len, max_len, validate, return_lse)
    return result if return_lse else (result, q.new_empty(0, dtype=torch.float32))


@_selection_attention.register_fake
def _(q, k, v, ranges, scale, backend, min_len, max_len, validate, return_lse):  # type: ignore[no-untyped-def]
    lse_shape = q.shape[:4] if return_lse else (0,)
    return q.new_empty(*q.shape[:4], v.shape[3]), q.new_empty(lse_shape, dtype=torch.float32)


def traced(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    scale: float | None,
    backend: str,
    config: Any,
    min_len: int | None,
    max_len: int | None,
    validate: bool | None,
    return_lse: bool,
) -> Any:
    """Trace one call of `api.selection_attention`: the custom op, or the reference itself where a gradient is needed.

    Raises: ValueError for a config argument; UnsupportedError for backend="triton" with a gradient.
    """
    if config is not None:
        raise ValueError(
            "config: value is not None, expected None under torch.compile: set the toggles before the process starts"
        )
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        if backend == "triton":
            raise UnsupportedError("backend: value is 'triton', which cannot run this call: gradients needed")
        if backend == "masked_sdpa":
            return reference.masked_sdpa(q, k, v, ranges, scale=scale)
        return reference.packed_sdpa(q, k, v, ranges, scale=scale, min_len=min_len, max_len=max_len)
    out, lse = _selection_attention(q, k, v, ranges, scale, backend, min_len, max_len, validate, return_lse)
    return (out, lse) if return_lse else out


@torch.library.custom_op(f"{__package__}::record", mutates_args=(), schema="(Tensor q) -> ()")
def refuse_record(q):  # type: ignore[no-untyped-def]
    """Refuse to be traced: an exception of the caller's own would be a graph break, and eager code would record."""
    raise UnsupportedError("nsa_sel.record: cannot run under torch.compile; record from the eager model")


@refuse_record.register_fake
def _(q):  # type: ignore[no-untyped-def]
    raise UnsupportedError("nsa_sel.record: cannot run under torch.compile; record from the eager model")
