"""Attention over disjoint parts of the same rows, merged by their LSE."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two results of the same queries over disjoint keys into the result over both, and its LSE.

    out_a, out_b [..., Dv] of one dtype, lse_a, lse_b [...] natural-log; where an LSE is -inf the part is empty and its
    result is not looked at, and where both are the merged row is empty: zeros and -inf. Computed in fp32; the result
    has the dtype of out_a, the LSE is fp32. Differentiable.

    Raises: TypeError, ValueError for shapes or dtypes that do not fit out_a.
    Source: the merge of online softmax, FlashAttention (arXiv 2205.14135).
    """
    for name, x, expected, owner in (
        ("lse_a", lse_a, out_a.shape[:-1], "out_a without its last dimension"),
        ("out_b", out_b, out_a.shape, "out_a"),
        ("lse_b", lse_b, out_a.shape[:-1], "out_a without its last dimension"),
    ):
        if x.shape != expected:
            raise ValueError(f"{name}: shape is {tuple(x.shape)}, expected {tuple(expected)} as {owner}")
    if out_b.dtype != out_a.dtype:
        raise TypeError(f"out_b: dtype is {out_b.dtype}, expected {out_a.dtype} as out_a")
    lse_a, lse_b = lse_a.float(), lse_b.float()
    largest = torch.maximum(lse_a, lse_b).detach()
    shift = torch.where(largest == -torch.inf, 0.0, largest)
    weight_a, weight_b = (lse_a - shift).exp(), (lse_b - shift).exp()
    total = weight_a + weight_b
    empty = total == 0
    denom = torch.where(empty, 1.0, total)
    part_a, part_b = (
        torch.where(weight[..., None] == 0, 0.0, out.float()) * (weight / denom)[..., None]
        for out, weight in ((out_a, weight_a), (out_b, weight_b))
    )
    return (part_a + part_b).to(out_a.dtype), torch.where(empty, -torch.inf, shift + denom.log())


def run_in_parts(
    q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, scale: float | None, max_len: int | None
) -> tuple[Tensor, Tensor]:
    """Run the kernel on rows of more spans than it takes, part after part, and merge: the result and its LSE.

    The parts' results are fp32, so that the merged one is rounded once.
    """
    from .kernel.launch import Plan
    from .kernel.launch_config import MAX_SPANS

    merged = None
    for part in ranges.split(MAX_SPANS, dim=3):
        out = torch.empty((*q.shape[:4], v.shape[3]), dtype=torch.float32, device=q.device)
        lse = torch.empty(q.shape[:4], dtype=torch.float32, device=q.device)
        Plan(q, k, v, part, scale, None, max_len).run(q, k, v, part, out, lse)
        merged = (out, lse) if merged is None else merge(*merged, out, lse)
    assert merged is not None
    return merged[0].to(q.dtype), merged[1]
