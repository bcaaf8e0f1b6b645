"""The kernel where a gradient is needed: one custom op for the result, one for the gradients, and their rules."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import parts, reference, routing
from .config import SelConfig, get_config
from .errors import KernelFailed, UnsupportedError

NAMESPACE = __package__  # a copy of the package under another name registers operations of its own
FORWARD = (
    "(Tensor q, Tensor k, Tensor v, Tensor ranges, float? scale, SymInt? min_len, SymInt? max_len, str backend) "
    "-> (Tensor, Tensor)"
)
BACKWARD = (
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor ranges, Tensor out, Tensor lse, float? scale, "
    "SymInt? max_len, bool of_q, bool of_kv) -> (Tensor, Tensor, Tensor)"
)
# Device, dtype and widths whose kernel failed, and why: "auto" leaves them alone.
failures: dict[tuple, str] = {}
_plans: dict[tuple, tuple[SelConfig, Any]] = {}  # of both directions, each with the toggles that held


@torch.library.custom_op(f"{NAMESPACE}::triton_attention", mutates_args=(), schema=FORWARD)
def attention(q, k, v, ranges, scale, min_len, max_len, backend):  # type: ignore[no-untyped-def]
    """Run the kernel, and return the result and its LSE; differentiable backward, once.

    backend: what the caller asked for; with "auto" an SDPA form takes over where the backward pass of the kernel cannot
    be used.
    """
    from .kernel.launch_config import MAX_SPANS
    from .kernel.shared_launch import plan_for

    tensors = q, k, v, ranges
    if ranges.shape[3] > MAX_SPANS:
        _refuse(*tensors)
        return parts.run_in_parts(*tensors, scale, max_len)
    plan = _plan(plan_for, tensors, scale, min_len, max_len)
    lse = torch.empty(q.shape[:4], dtype=torch.float32, device=q.device)
    return plan.run(*tensors, None, lse), lse


@attention.register_fake
def _(q, k, v, ranges, scale, min_len, max_len, backend):  # type: ignore[no-untyped-def]
    return q.new_empty(*q.shape[:4], v.shape[3]), q.new_empty(q.shape[:4], dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::triton_attention_backward", mutates_args=(), schema=BACKWARD)
def gradients(dout, dlse, q, k, v, ranges, out, lse, scale, max_len, of_q, of_kv):  # type: ignore[no-untyped-def]
    """Return dq, dk and dv; those that are not asked for are empty."""
    from .kernel.backward_launch import BackwardPlan
    from .kernel.backward_tensors import Saved

    plan = _plan(BackwardPlan, (q, k, v, ranges), scale, None, max_len)
    dlse = None if dlse is None else dlse.contiguous()
    results = plan.run(Saved(q, k, v, ranges, out, lse, dout.contiguous(), dlse), of_q, of_kv)
    return tuple(q.new_empty(0) if x is None else x for x in results)


@gradients.register_fake
def _(dout, dlse, q, k, v, ranges, out, lse, scale, max_len, of_q, of_kv):  # type: ignore[no-untyped-def]
    wanted = zip((q, k, v), (of_q, of_kv, of_kv), strict=True)
    return tuple(x.new_empty(x.shape if asked else (0,)) for x, asked in wanted)


def _plan(make: Any, tensors: tuple[Tensor, ...], scale: float | None, min_len: int | None, max_len: int | None) -> Any:
    """Return the plan that `make` makes for these tensors, kept for later calls of the same sizes and toggles."""
    from .kernel.kv import MAX_KEPT, remember

    aligned = not any(x.data_ptr() % 16 for x in tensors[1:3])
    layout = tuple((x.shape, x.stride(), x.dtype, x.device) for x in tensors)
    key = make, layout, aligned, scale, min_len, max_len
    known = _plans.get(key)
    if known is None or known[0] is not get_config():
        _refuse(*tensors)
        known = remember(_plans, key, (get_config(), make(*tensors, scale, min_len, max_len)), MAX_KEPT)
    return known[1]


def _refuse(*tensors: Tensor) -> None:
    """Raise UnsupportedError where the kernel may not or cannot run: a traced call was routed when it was traced."""
    from .kernel import backward_launch, launch

    routing.decide(
        "triton",
        config=get_config(),
        gpu_name=None,
        max_len=0,
        needs_grad=False,
        unsupported=launch.unsupported_reason(*tensors) or backward_launch.unsupported_backward(tensors[0], tensors[2]),
    )


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ranges, *ctx.numbers, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, ranges, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, ranges, out, lse = ctx.saved_tensors
    scale, _, max_len = ctx.numbers
    of_q, of_k, of_v = ctx.needs_input_grad[:3]
    dout = torch.zeros_like(out) if dout is None else dout
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
        if ctx.backend == "triton":
            raise UnsupportedError(
                "backend: value is 'triton', which cannot run this call: second derivatives needed "
                "(create_graph=True), and the Triton kernel has the plain backward pass only"
            )
        return _by_sdpa(ctx, dout, dlse)
    try:
        found = gradients(dout, dlse, q, k, v, ranges, out, lse, scale, max_len, of_q, of_k or of_v)
    except KernelFailed as error:
        if ctx.backend != "auto":
            raise
        failures[kind(q, v)] = str(error)
        warnings.warn(f"nsa_sel: packed_sdpa runs in place of Triton: {error}", RuntimeWarning, stacklevel=2)
        return _by_sdpa(ctx, dout, dlse)
    kept = (x if wanted else None for x, wanted in zip(found, (of_q, of_k, of_v), strict=True))
    return *kept, None, None, None, None, None


def _by_sdpa(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return what `_backward` does, by packed SDPA, which runs again; differentiable if grad mode is on."""
    create_graph = torch.is_grad_enabled()
    q, k, v, ranges, _, _ = ctx.saved_tensors
    scale, min_len, max_len = ctx.numbers
    wanted = ctx.needs_input_grad[:3]
    inputs = [x if create_graph else x.detach().requires_grad_(y) for x, y in zip((q, k, v), wanted, strict=True)]
    # Of SDPA's backends the composite one alone has second derivatives.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH) if create_graph else contextlib.nullcontext():
        lengths = {"min_len": min_len, "max_len": max_len}
        q, k, v = inputs
        results = reference.packed_sdpa(q, k, v, ranges, scale=scale, **lengths, return_lse=True)
        if dlse is None:
            results, upstream = results[:1], (dout,)
        else:
            upstream = (dout, dlse)  # type: ignore[assignment]
        asked = [x for x, y in zip(inputs, wanted, strict=True) if y]
        found = iter(torch.autograd.grad(results, asked, upstream, create_graph=create_graph, allow_unused=True))
    return *(next(found) if y else None for y in wanted), None, None, None, None, None


attention.register_autograd(_backward, setup_context=_save)


def kind(q: Tensor, v: Tensor) -> tuple:
    """Return by what a kernel that failed is known. As text: the sizes that a tracer gives have no hash."""
    return q.device, q.dtype, str((*q.shape[3:], v.shape[3]))
