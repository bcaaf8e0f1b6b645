"""The forward and backward pass of a case as one timed call each, and the check of its gradients.

Source: docs/measuring.md, "Training".
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import selection_attention, spans
from ...errors import KernelFailed, UnsupportedError
from ..suite.inputs import Inputs
from . import contender
from .contender import CaseState, NotTimed, Prepared, WrongResult

ROWS_AT_A_TIME = 64  # in float64, with their keys and values
# Relative L2 error of the gradients of one query's heads and of one token, in units of the dtype's eps. Packed SDPA
# takes 8 of them: it rounds its weights in fewer places, but the gradient of each packed row.
MOST_ERROR = 16.0


def prepare(state: CaseState, method: str) -> Prepared:
    """Return one pass of a method ready for timing: `case.name` says which.

    "forward" is that of training, which keeps what the backward pass needs. Dense SDPA does other work, the whole
    context: its forward pass is checked as a peer's is, and its gradients are not.

    Raises: NotTimed where the method cannot run; WrongResult if the kernel did not.
    """
    case, x = state.case, state.inputs
    leaves = [t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v)]
    generator = torch.Generator(x.q.device).manual_seed(case.seed + 1)
    form = functools.partial(_dense, case.H) if method == "dense" else _operation(x, method)
    upstream_shape = (case.B, case.G * case.H, case.S, case.Dv) if method == "dense" else (*x.q.shape[:4], case.Dv)
    upstream = torch.randn(upstream_shape, generator=generator, device=x.q.device, dtype=x.q.dtype)
    details: dict[str, str | float] = {"pass": case.name}
    details |= {"peer": f"torch {torch.__version__}"} if method == "dense" else {"sdpa_backend": "default"}

    def forward() -> Tensor:
        with torch.enable_grad():
            return form(*leaves)

    def both() -> Any:
        return torch.autograd.grad(forward(), leaves, upstream)

    try:
        once = forward()
    except KernelFailed:
        raise
    except UnsupportedError as error:
        raise NotTimed(str(error)) from error

    def backward() -> Any:
        return torch.autograd.grad(once, leaves, upstream, retain_graph=True)

    call = {"forward": forward, "backward": backward, "both": both}[case.name]
    details |= _peak(state, call)
    if method == "dense":
        return Prepared(call, _nothing, details, verify=lambda found: 0.0)
    if case.name == "forward":
        return Prepared(call, functools.partial(contender.as_rows, case), details)
    return Prepared(call, _nothing, details, verify=functools.partial(verify, case.id, x, upstream))


def _nothing(found: Any) -> Any:
    return found


def _operation(x: Inputs, backend: str) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return selection_attention(q, k, v, x.ranges, backend=backend, min_len=x.min_len, max_len=x.max_len)

    return run


def _dense(H: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = q.permute(0, 2, 3, 1, 4).flatten(1, 2)
    return F.scaled_dot_product_attention(heads, k, v, is_causal=True, enable_gqa=H > 1)


def _peak(state: CaseState, call: Callable[[], Any]) -> dict[str, float]:
    """Return the device memory that one call takes at its peak, beyond what was there, in bytes; nothing on the CPU."""
    if state.device == "cpu":
        return {}
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return {"peak_bytes": float(torch.cuda.max_memory_allocated() - before)}


def verify(case_id: str, x: Inputs, upstream: Tensor, found: tuple[Tensor, Tensor, Tensor]) -> float:
    """Compare the gradients of a query and of a token of the last group with float64; return the largest error.

    The token is the first that the query selects.

    Raises: WrongResult.
    """
    b, g, s = x.q.shape[0] - 1, x.q.shape[2] - 1, x.q.shape[1] - 1
    of_group = replace(x, q=x.q[b, :, g], k=x.k[b, g], v=x.v[b, g], ranges=x.ranges[b, :, g])
    token = int(of_group.ranges[s].min(0).values[0])
    dq, dk, dv = exact(of_group, upstream[b, :, g], s, token)
    got = found[0][b, s, g], found[1][b, g, token], found[2][b, g, token]
    errors = [float((mine.double() - want).norm() / want.norm()) for mine, want in zip(got, (dq, dk, dv), strict=True)]
    most = MOST_ERROR * torch.finfo(x.q.dtype).eps
    if not max(errors) <= most:
        shown = ", ".join(f"{name} {error:.1e}" for name, error in zip(("dq", "dk", "dv"), errors, strict=True))
        raise WrongResult(f"{case_id}: relative error of query {s} and token {token}: {shown}, expected {most:.1e}")
    return max(errors)


def exact(x: Inputs, upstream: Tensor, s: int, token: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return in float64 dq of query s, and dk and dv of a token: x, upstream of one group, q [S, H, D], k [S_kv, D].

    From the definition: each row that selects the token is computed from its own keys and values.
    """
    S, _, D = x.q.shape
    selects = ((x.ranges[..., 0] <= token) & (token < x.ranges[..., 1])).any(-1)
    rows = torch.cat((torch.tensor([s], device=x.q.device), selects.nonzero().flatten()))
    dq = x.q.new_zeros(x.q.shape[1:], dtype=torch.float64)
    dk, dv = x.k.new_zeros(D, dtype=torch.float64), x.v.new_zeros(x.v.shape[1], dtype=torch.float64)
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        part = rows[start : start + ROWS_AT_A_TIME]
        index, valid = spans.token_index(x.ranges[part][:, None, None], len(x.k), x.max_len)
        index, valid = index[:, 0, 0], valid[:, 0, 0]
        q, k, v, up = (t.double() for t in (x.q[part], x.k[index], x.v[index], upstream[part]))
        scores = torch.einsum("nhd,nld->nhl", q, k) * D**-0.5
        p = scores.masked_fill(~valid[:, None], -torch.inf).softmax(-1)
        dp = torch.einsum("nhe,nle->nhl", up, v)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * D**-0.5
        if start == 0:
            dq, first = ds[0] @ k[0], 1
        else:
            first = 0
        here = ((index == token) & valid).double()[first:]
        dk += torch.einsum("nhl,nl,nhd->d", ds[first:], here, q[first:])
        dv += torch.einsum("nhl,nl,nhe->e", p[first:], here, up[first:])
    return dq, dk, dv
