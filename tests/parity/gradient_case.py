"""The gradients of one call: float64 ones through autograd of the oracle, the kernel's, and the gate between them.

Imports of the kernel stay inside functions: conftest.py must choose between GPU and interpreter first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsa_sel import reference

from .parity_case import Case, fail, hints, tensors

# In units of the dtype's eps: the relative L2 error of a whole gradient (bf16: 3e-3), and what a row is allowed of its
# own size and that of its terms. Each rounding gives about 0.29; rows of the tests come to 0.3.
BATCH, ROW = 3e-3 / torch.finfo(torch.bfloat16).eps, 0.5
# In fp32 no term is rounded, but sums of products are, as often as they have terms.
SUMS = {torch.float32: 32}


@dataclass(frozen=True)
class Upstream:
    """Hold the gradients that come in: of the result, and of the LSE or None."""

    dout: Tensor
    dlse: Tensor | None


def upstream(case: Case, q: Tensor, v: Tensor, with_lse: bool = True) -> Upstream:
    """Draw them ~ N(0, 1), by the seed of the case."""
    torch.manual_seed(case.seed + 1)
    dout = torch.randn(*q.shape[:4], v.shape[3]).to(q.dtype).to(q.device)
    dlse = torch.randn(*q.shape[:4]).to(q.device)
    return Upstream(dout, dlse if with_lse else None)


def exact(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, up: Upstream, scale: float | None = None) -> list[Tensor]:
    """Return dq, dk and dv in float64, by autograd of the oracle and of the definition of the LSE."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = reference.oracle(*leaves, ranges, scale=scale)
    loss = (out * up.dout.double()).sum()
    if up.dlse is not None:
        loss = loss + (lse_of(leaves[0], leaves[1], ranges, scale) * up.dlse.double()).sum()
    if not loss.requires_grad:  # no row selects anything
        return [torch.zeros_like(x) for x in leaves]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def lse_of(q: Tensor, k: Tensor, ranges: Tensor, scale: float | None) -> Tensor:
    """Return the natural LSE of every row; zero in place of -inf where a row is empty."""
    found = []
    for b, s, g in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).view(-1, 3).tolist():
        tokens = [t for start, end in ranges[b, s, g].tolist() for t in range(max(start, 0), min(end, k.shape[2]))]
        scores = q[b, s, g] @ k[b, g, tokens].T * (q.shape[-1] ** -0.5 if scale is None else scale)
        found.append(scores.logsumexp(-1) if tokens else torch.zeros(q.shape[3], dtype=q.dtype, device=q.device))
    return torch.stack(found).view(q.shape[:4])


def noise(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, up: Upstream, scale: float | None = None) -> list[Tensor]:
    """Return per row of dq, dk and dv how much the roundings of its terms add up to, in units of eps.

    A row of a gradient is a sum whose terms may cancel: what rounding them costs depends on the terms. In float64, each
    term's weight is rounded, independently of the others, and δ is as exact as the rounded result that it is made of.
    """
    q, k, v, dout = (x.double() for x in (q, k, v, up.dout))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tokens = torch.arange(k.shape[2], device=q.device)
    times = ((ranges[..., :1] <= tokens) & (tokens < ranges[..., 1:])).sum(3).double()[:, :, :, None]  # [B, S, G, 1, T]
    scores = torch.einsum("bsghd,bgtd->bsght", q, k) * scale
    largest = torch.where(times > 0, scores, -torch.inf).amax(-1, keepdim=True).clamp(min=-1e30)
    p = torch.where(times > 0, (scores - largest).exp() * times, 0.0)
    p = p / p.sum(-1, keepdim=True).clamp(min=1e-300)
    out = torch.einsum("bsght,bgtd->bsghd", p, v)
    delta = (out * dout).sum(-1, keepdim=True)
    of_delta = (out * dout).square().sum(-1, keepdim=True)
    gained = delta if up.dlse is None else delta - up.dlse.double()[..., None]
    ds = p * (torch.einsum("bsghd,bgtd->bsght", dout, v) - gained)
    squared = ds.square() + p.square() * of_delta
    of_q = torch.einsum("bsght,bgt->bsgh", squared, k.square().sum(-1)) * scale**2
    of_k = torch.einsum("bsght,bsgh->bgt", squared, q.square().sum(-1)) * scale**2
    of_v = torch.einsum("bsght,bsgh->bgt", p.square(), dout.square().sum(-1))
    return [x.sqrt() for x in (of_q, of_k, of_v)]


def run(
    q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, up: Upstream, case: Case, launch: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward and the backward kernels; launch: a BackwardLaunch to force."""
    from nsa_sel.kernel.backward_launch import BackwardPlan
    from nsa_sel.kernel.backward_tensors import Saved
    from nsa_sel.kernel.launch import Plan

    of_call = hints(case, ranges)
    lengths = of_call.get("min_len"), of_call.get("max_len")
    lse = torch.empty(q.shape[:4], device=q.device)
    out = Plan(q, k, v, ranges, case.scale, *lengths).run(q, k, v, ranges, None, lse)
    plan = BackwardPlan(q, k, v, ranges, case.scale, *lengths, launch)
    found = plan.run(Saved(q, k, v, ranges, out, lse, up.dout, up.dlse), True, True)
    assert all(x is not None for x in found)
    return found  # type: ignore[return-value]


def judge(case: Case, got: Any, want: list[Tensor], allowed: list[Tensor], whole: bool = False) -> float:
    """Put gradients through the gate: every row of them, and, if `whole`, each as a whole. Fails the test.

    Of few short rows a whole is as good as its rows: their sums cancel. Returns the largest error of a row, in units of
    eps times its own size and its terms'.
    """
    eps = torch.finfo(case.dtype).eps * SUMS.get(case.dtype, 1)
    worst = 0.0
    for name, mine, exactly, terms in zip(("dq", "dk", "dv"), got, want, allowed, strict=True):
        assert mine.dtype == case.dtype and mine.shape == exactly.shape and mine.is_contiguous(), name
        if not mine.isfinite().all():
            fail(case, f"{name}: {int((~mine.isfinite()).sum())} values are not finite")
        error = mine.double() - exactly
        relative = float(error.norm() / exactly.norm().clamp(min=1e-30))
        rows = error.norm(dim=-1) / (eps * (exactly.norm(dim=-1) + terms) + 1e-30)
        row = float(rows.max()) if rows.numel() else 0.0
        worst = max(worst, row)
        if row > ROW or (whole and relative > BATCH * eps):
            at = [int(i) for i in torch.unravel_index(rows.argmax(), rows.shape)]
            fail(case, f"{name}: relative L2 error {relative:.1e}; row {at} is off by {row:.2f} eps of its terms")
    return worst


def check(case: Case, launch: Any = None, with_lse: bool = True, whole: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Run a case and put its gradients through the gate. Returns them."""
    q, k, v, ranges = tensors(case)
    up = upstream(case, q, v, with_lse)
    got = run(q, k, v, ranges, up, case, launch)
    judge(case, got, exact(q, k, v, ranges, up, case.scale), noise(q, k, v, ranges, up, case.scale), whole)
    return got
