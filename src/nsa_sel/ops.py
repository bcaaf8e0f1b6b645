"""The operation where PyTorch's dispatcher is involved: one custom op that runs the eager entry, and its rules."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from . import arguments, dispatch, modes, reference, sharded, training
from .errors import UnsupportedError

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor ranges, float? scale, str backend, SymInt? min_len, SymInt? max_len, "
    "bool? validate, bool return_lse) -> (Tensor, Tensor)"
)


# In the namespace of this package: a copy of it under another name registers an operation of its own.
@torch.library.custom_op(f"{__package__}::selection_attention", mutates_args=(), schema=SCHEMA)
def _selection_attention(q, k, v, ranges, scale, backend, min_len, max_len, validate, return_lse):  # type: ignore[no-untyped-def]
    result = dispatch.run(q, k, v, ranges, scale, backend, None, min_len, max_len, validate, return_lse)
    if result is NotImplemented:  # of a subclass with memory of its own, or traced: here the dispatcher has been passed
        result = dispatch.run_anew(q, k, v, ranges, (scale, min_len, max_len), backend, None, validate, return_lse)
    return result if return_lse else (result, q.new_empty(0, dtype=torch.float32))


@_selection_attention.register_fake
def _(q, k, v, ranges, scale, backend, min_len, max_len, validate, return_lse):  # type: ignore[no-untyped-def]
    lse_shape = q.shape[:4] if return_lse else (0,)
    return q.new_empty(*q.shape[:4], v.shape[3]), q.new_empty(lse_shape, dtype=torch.float32)


def _vmap(info, in_dims, q, k, v, ranges, *options):  # type: ignore[no-untyped-def]
    """Run a batch of calls as one: along S where they share K and V, which are then not copied, else along B."""
    along = 1 if in_dims[1] is None and in_dims[2] is None else 0

    def folded(x: Tensor, dim: int | None) -> Tensor:
        """Lay the batch's dimension, which is `dim`, before the dimension `along`, and make one of the two."""
        x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.movedim(0, along).flatten(along, along + 1)

    def unfolded(x: Tensor) -> Tensor:
        return x.unflatten(along, (info.batch_size, x.shape[along] // info.batch_size))

    if along == 0:
        k, v = folded(k, in_dims[1]), folded(v, in_dims[2])
    out, lse = _selection_attention(folded(q, in_dims[0]), k, v, folded(ranges, in_dims[3]), *options)
    return_lse = options[-1]
    return (unfolded(out), unfolded(lse) if return_lse else lse), (along, along if return_lse else None)


if hasattr(torch.library, "register_vmap"):  # torch 2.5; before, vmap runs one call after another
    torch.library.register_vmap(_selection_attention, _vmap)


def dispatched(
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
    """Run one call of `api.selection_attention` so that subclasses, modes, transforms and tracers see it.

    They see a custom op, or, where a derivative is needed that the kernel does not give, an SDPA form's operations.

    Raises: TypeError for a tensor subclass that has no rule for the operation; ValueError for a config argument.
    """
    scale, min_len, max_len = numbers = arguments.numbers(scale, min_len, max_len)
    if modes.tracing():
        with warnings.catch_warnings():  # a trace holds for its sizes, which torch.jit.trace warns of one by one
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            return _seen(q, k, v, ranges, numbers, backend, config, validate, return_lse)
    arguments.check(q, k, v, ranges, min_len, max_len)
    if sharded.is_sharded(q, k, v, ranges):

        def call(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor) -> Any:
            run = dispatch.run if modes.eager(q, k, v, ranges) else dispatched
            return run(q, k, v, ranges, scale, backend, config, min_len, max_len, validate, return_lse)

        return sharded.run_on_shards(call, q, k, v, ranges)
    try:
        return _seen(q, k, v, ranges, numbers, backend, config, validate, return_lse)
    except (NotImplementedError, TypeError) as error:
        for name, x in (("q", q), ("k", k), ("v", v), ("ranges", ranges)):
            if type(x) not in modes.PLAIN:
                raise TypeError(
                    f"{name}: type is {type(x).__name__}, expected torch.Tensor or a subclass that runs "
                    f"{_selection_attention._qualname}: {error}"
                ) from error
        raise


def _seen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    numbers: tuple[float | None, int | None, int | None],
    backend: str,
    config: Any,
    validate: bool | None,
    return_lse: bool,
) -> Any:
    """Run the custom op, or, where a derivative is needed, what `dispatch` chooses."""
    if modes.needs_derivative(q, k, v):
        return dispatch.run_anew(q, k, v, ranges, numbers, backend, config, validate, return_lse)
    _refuse(config)
    scale, min_len, max_len = numbers
    out, lse = _selection_attention(q, k, v, ranges, scale, backend, min_len, max_len, validate, return_lse)
    return (out, lse) if return_lse else out


def _refuse(config: Any) -> None:
    if config is not None:
        raise ValueError(
            "config: value is not None, expected None under torch.compile, and where a tensor subclass, a mode or a "
            "transform sees the operation: set the toggles before the process starts"
        )


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
    """Trace one call of `api.selection_attention`: a custom op, or the reference itself where its gradient is needed.

    Raises: ValueError for a config argument.
    """
    _refuse(config)
    scale, min_len, max_len = arguments.numbers(scale, min_len, max_len)
    if sharded.is_sharded(q, k, v, ranges):

        def call(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor) -> Any:
            return traced(q, k, v, ranges, scale, backend, config, min_len, max_len, validate, return_lse)

        return sharded.run_on_shards(call, q, k, v, ranges)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        if backend == "triton" or (backend == "auto" and _auto_trains(q, k, v, max_len)):
            out, lse = training.attention(q, k, v, ranges, scale, min_len, max_len, backend)
            return (out, lse) if return_lse else out
        if backend == "masked_sdpa":
            return reference.masked_sdpa(q, k, v, ranges, scale=scale, return_lse=return_lse)
        lengths = {"min_len": min_len, "max_len": max_len}
        return reference.packed_sdpa(q, k, v, ranges, scale=scale, **lengths, return_lse=return_lse)
    out, lse = _selection_attention(q, k, v, ranges, scale, backend, min_len, max_len, validate, return_lse)
    return (out, lse) if return_lse else out


def _auto_trains(q: Tensor, k: Tensor, v: Tensor, max_len: int | None) -> bool:
    """Tell whether "auto" takes the kernel for a traced call that needs a gradient: as in eager code, given max_len."""
    from .kernel import launch

    threshold = dispatch.training_min_len(q.device.type, q.device.index)
    if threshold is None or max_len is None or max_len < threshold:
        return False
    if q.dtype == torch.float32 and q.shape[3] > 32:  # may need too much shared memory, which a trace does not ask
        return False
    return launch.unsupported_sizes(q, k, v) is None


@torch.library.custom_op(f"{__package__}::record", mutates_args=(), schema="(Tensor q) -> ()")
def refuse_record(q):  # type: ignore[no-untyped-def]
    """Refuse to be traced: an exception of the caller's own would be a graph break, and eager code would record."""
    raise UnsupportedError("nsa_sel.record: cannot run under torch.compile; record from the eager model")


@refuse_record.register_fake
def _(q):  # type: ignore[no-untyped-def]
    raise UnsupportedError("nsa_sel.record: cannot run under torch.compile; record from the eager model")
