"""Three implementations of the operation that need no Triton: the float64 oracle and the two SDPA forms.

All take q [B, S, G, H, D], k [B, G, S_kv, D], v [B, G, S_kv, Dv], ranges int32 or int64 [B, S, G, n_spans, 2] and
return [B, S, G, H, Dv] in q's dtype, except the oracle (float64). `scale` defaults to 1/sqrt(D). See spans.py for what
a range means.
Source: NSA (arXiv 2502.11089), section 3.3.2.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from . import spans

MAX_SDPA_BATCH = 65535  # CUDA's limit on the grid dimension in which SDPA's kernels put the batch


def oracle(
    q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, *, scale: float | None = None, rows: Tensor | None = None
) -> Tensor:
    """Compute the operation in float64, row by row, straight from its definition.

    Shares no code with the other implementations. Slow by intent: one sync, then a Python loop over rows.
    `rows`: int64 [R] flat row numbers (b·S + s)·G + g; then only these are computed and the result is [R, H, Dv].
    """
    B, S, G, H, D = q.shape
    S_kv, Dv = k.shape[2], v.shape[3]
    scale = D**-0.5 if scale is None else scale
    wanted = range(B * S * G) if rows is None else rows.tolist()
    out = torch.zeros(len(wanted), H, Dv, dtype=torch.float64, device=q.device)
    picked = ranges.flatten(0, 2)
    spans_of = (picked if rows is None else picked[rows]).tolist()
    for i, row in enumerate(wanted):
        b, s, g = row // (S * G), row // G % S, row % G
        inside = [slice(max(start, 0), min(end, S_kv)) for start, end in spans_of[i] if min(end, S_kv) > max(start, 0)]
        if not inside:
            continue
        keys = torch.cat([k[b, g, part].double() for part in inside])
        values = torch.cat([v[b, g, part].double() for part in inside])
        logits = q[b, s, g].double() @ keys.T * scale
        weights = torch.exp(logits - logits.amax(-1, keepdim=True))
        out[i] = weights @ values / weights.sum(-1, keepdim=True)
    return out.view(B, S, G, H, Dv) if rows is None else out


def packed_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    *,
    scale: float | None = None,
    min_len: int | None = None,
    max_len: int | None = None,
) -> Tensor:
    """Gather each row's K and V, then call SDPA with the row's heads as the query positions of one KV head.

    So K and V are read once, not H times. `min_len`, `max_len`: the shortest and the longest row's L; with both there
    is no device sync, without both one reads them. Equal: no padding and no mask. Otherwise rows are padded to max_len
    and masked. Differentiable. Unselected K and V, NaN included, do not reach the result.
    """
    B, S, G, H, D = q.shape
    S_kv, Dv = k.shape[2], v.shape[3]
    if min_len is None or max_len is None:
        min_len, max_len = length_bounds(ranges, S_kv)
    if max_len == 0 or S_kv == 0 or q.numel() == 0:
        return _zeros(q, k, v)
    ragged = min_len != max_len
    index, valid = spans.token_index(ranges, S_kv, max_len, ragged=ragged)
    q_rows = aligned(q.transpose(1, 2).reshape(B * G * S, H, D))
    k_rows = _gather(k, index).view(B * G * S, max_len, D)
    v_rows = _gather(v, index).view(B * G * S, max_len, Dv)
    mask = valid.transpose(1, 2).reshape(B * G * S, max_len) if ragged else None
    out = sdpa_rows(q_rows, k_rows, v_rows, mask, scale=scale, may_be_empty=min_len < 1)
    return out.view(B, G, S, H, Dv).transpose(1, 2).contiguous()


def gather_rows(k: Tensor, v: Tensor, ranges: Tensor, max_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pack every row's K and V: [N, max_len, D], [N, max_len, Dv], and which tokens are real, bool [N, max_len].

    N = B·S·G; rows are in (b, s, g) order. The packing step of `packed_sdpa`; S_kv and max_len must be at least 1.
    """
    index, valid = spans.token_index(ranges, k.shape[2], max_len)
    packed = [_gather(x, index).transpose(1, 2).reshape(-1, max_len, x.shape[3]) for x in (k, v)]
    return packed[0], packed[1], valid.reshape(-1, max_len)


def sdpa_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None = None,
    *,
    scale: float | None = None,
    may_be_empty: bool = True,
) -> Tensor:
    """Call SDPA on packed rows: q [N, H, D], k [N, L, D], v [N, L, Dv] → [N, H, Dv].

    `valid` bool [N, L] masks padding; None: no padding, hence no mask, and flash attention may serve the call. A row
    with no real token gives zeros; `may_be_empty=False` promises that there is none.
    """
    if q.shape[0] > MAX_SDPA_BATCH:
        parts = [slice(at, at + MAX_SDPA_BATCH) for at in range(0, q.shape[0], MAX_SDPA_BATCH)]
        masks = [None if valid is None else valid[p] for p in parts]
        call = functools.partial(sdpa_rows, scale=scale, may_be_empty=may_be_empty)
        return torch.cat([call(q[p], k[p], v[p], m) for p, m in zip(parts, masks, strict=True)])
    if valid is None or not may_be_empty:
        mask = None if valid is None else valid[:, None, None]
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=mask, scale=scale)[:, 0]
    empty = ~valid.any(-1)
    mask = (valid | empty[:, None])[:, None, None]  # SDPA gives NaN for a row that may see nothing
    out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=mask, scale=scale)[:, 0]
    return torch.where(empty[:, None, None], 0.0, out)


def masked_sdpa(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, *, scale: float | None = None) -> Tensor:
    """Attend over all of S_kv in fp32 with the bias log(how often the row selects the key): no gather.

    Independent of the packing code, differentiable, needs B·G·S·H·S_kv fp32 values of memory. A NaN or infinity
    anywhere in K or V reaches the result, selected or not.
    """
    B, S, G, H, D = q.shape
    S_kv, Dv = k.shape[2], v.shape[3]
    if S_kv == 0 or q.numel() == 0:
        return _zeros(q, k, v)
    starts, ends = spans.clamp(ranges, S_kv)
    edges = torch.zeros(B, S, G, S_kv + 1, dtype=torch.int32, device=q.device)
    one = torch.ones((), dtype=torch.int32, device=q.device).expand(starts.shape)
    count = edges.scatter_add(-1, starts, one).scatter_add(-1, ends, -one).cumsum(-1)[..., :S_kv]
    empty = (count == 0).all(-1)  # [B, S, G]
    bias = torch.where(empty[..., None], 0.0, count.float().log())  # [B, S, G, S_kv], -inf where not selected
    bias = bias.transpose(1, 2)[:, :, :, None].expand(B, G, S, H, S_kv).reshape(B, G, S * H, S_kv)
    heads = q.float().transpose(1, 2).reshape(B, G, S * H, D)
    heads, k, v = aligned(heads), aligned(k.float()), aligned(v.float())
    out = F.scaled_dot_product_attention(heads, k, v, attn_mask=bias, scale=scale)
    out = out.view(B, G, S, H, Dv).transpose(1, 2)
    return torch.where(empty[..., None, None], 0.0, out).to(q.dtype)


def aligned(x: Tensor) -> Tensor:
    """Return x, copied if its strides or its pointer are such that SDPA's masked kernel refuses it."""
    x = x.contiguous()
    return x if torch.compiler.is_compiling() or x.data_ptr() % 16 == 0 else x.clone()


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Take tokens [B, S, G, L] of x [B, G, S_kv, D]: [B, G, S, L, D]."""
    B, S, G, L = index.shape
    flat = index.transpose(1, 2).reshape(B, G, S * L, 1).expand(-1, -1, -1, x.shape[3])
    return x.gather(2, flat).view(B, G, S, L, x.shape[3])


def length_bounds(ranges: Tensor, S_kv: int) -> tuple[int, int]:
    """Read the shortest and the longest row's L with one device sync; (0, 0) without rows."""
    L = spans.lengths(ranges, S_kv)
    if L.numel() == 0:
        return 0, 0
    shortest, longest = torch.stack(torch.aminmax(L)).tolist()
    return shortest, longest


def _zeros(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return zeros in the shape of the result, still attached to the graph of q, k and v."""
    out = q.new_zeros(*q.shape[:4], v.shape[3])
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out = out + 0 * (q[..., :0].sum() + k[..., :0].sum() + v[..., :0].sum())
    return out
