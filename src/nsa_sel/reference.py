"""Three implementations of the operation that need no Triton: the float64 oracle and the two SDPA forms.

All take q [B, S, G, H, D], k [B, G, S_kv, D], v [B, G, S_kv, Dv], ranges int32 or int64 [B, S, G, n_spans, 2] and
return [B, S, G, H, Dv] in q's dtype, except the oracle (float64). `scale` defaults to 1/sqrt(D). See spans.py for what
a range means. The SDPA forms are differentiable, backward and forward, and under torch.func. Autocast does not change
them. With return_lse=True they return the pair (result, natural-log LSE, fp32 [B, S, G, H], -inf for an empty row).
Source: NSA (arXiv 2502.11089), section 3.3.2.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import modes, spans
from .errors import UnsupportedError

MAX_SDPA_BATCH = 65535  # CUDA's limit on the grid dimension in which SDPA's kernels put the batch
# SDPA's memory-efficient kernel reads a mask from the wrong place where it has more keys, or where offsets in it need
# more than 31 bits.
MAX_MASK_KEYS, MAX_MASK = 65536, 2**31 - 1
# Before torch 2.6, which can order SDPA's kernels, cuDNN's is not the first, and torch.compile cannot trace a choice.
CUDNN_MAY_BE_FIRST = hasattr(torch._C, "_set_sdp_priority_order")
OTHER_KERNELS = {
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
}


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
        keys = torch.cat([k[b, g, part] for part in inside]).double()
        values = torch.cat([v[b, g, part] for part in inside]).double()
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
    return_lse: bool = False,
) -> Any:
    """Gather each row's K and V, then call SDPA with the row's heads as the query positions of one KV head.

    So K and V are read once, not H times. `min_len`, `max_len`: the shortest and the longest row's L; with both there
    is no device sync, without both one reads them. Equal: no padding and no mask. Otherwise rows are padded to max_len
    and masked. Unselected K and V, NaN included, reach neither the result nor a gradient. dK and dV are summed in fp32.

    Raises: UnsupportedError where a length is missing and cannot be read: ranges without values, or under vmap.
    """
    if modes.autocasts(q.device):
        with torch.autocast(q.device.type, enabled=False):
            return packed_sdpa(q, k, v, ranges, scale=scale, min_len=min_len, max_len=max_len, return_lse=return_lse)
    B, S, G, H, D = q.shape
    S_kv, Dv = k.shape[2], v.shape[3]
    if min_len is None or max_len is None:
        min_len, max_len = length_bounds(ranges, S_kv)
    if max_len == 0 or S_kv == 0 or q.numel() == 0:
        return _zeros(q, k, v, return_lse)
    ragged = min_len != max_len
    index, valid = spans.token_index(ranges, S_kv, max_len, ragged=ragged)
    q_rows = aligned(q.transpose(1, 2).reshape(B * G * S, H, D))
    k_rows = _gather(k, index).view(B * G * S, max_len, D)
    v_rows = _gather(v, index).view(B * G * S, max_len, Dv)
    mask = valid.transpose(1, 2).reshape(B * G * S, max_len) if ragged else None
    if min_len < 1 and mask is not None and modes.needs_derivative(q, k, v):
        # The token that stands for an empty row's may hold NaN: masked behind SDPA it would still reach the gradients.
        empty = ~mask.any(-1)[:, None, None]
        q_rows, k_rows, v_rows = (torch.where(empty, 0.0, x) for x in (q_rows, k_rows, v_rows))
    out = sdpa_rows(q_rows, k_rows, v_rows, mask, scale=scale, may_be_empty=min_len < 1)
    out = out.view(B, G, S, H, Dv).transpose(1, 2).contiguous()
    if not return_lse:
        return out
    lse = _lse(q_rows, k_rows, None if mask is None else mask[:, None].float().log(), scale)
    return out, lse.view(B, G, S, H).transpose(1, 2).contiguous()


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
    if valid is None or not may_be_empty:
        return _attend(q, k, v, None if valid is None else valid[:, None], scale)
    empty = ~valid.any(-1)
    mask = valid | empty[:, None]  # SDPA gives NaN for a row that may see nothing
    return torch.where(empty[:, None, None], 0.0, _attend(q, k, v, mask[:, None], scale))


def masked_sdpa(
    q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, *, scale: float | None = None, return_lse: bool = False
) -> Any:
    """Attend over all of S_kv in fp32 with the bias log(how often the row selects the key): no gather.

    Independent of the packing code, needs B·G·S·H·S_kv fp32 values of memory, three times that beyond MAX_MASK_KEYS
    keys. A NaN or infinity anywhere in K or V reaches the result and the gradients, selected or not.
    """
    if modes.autocasts(q.device):
        with torch.autocast(q.device.type, enabled=False):
            return masked_sdpa(q, k, v, ranges, scale=scale, return_lse=return_lse)
    B, S, G, H, D = q.shape
    S_kv, Dv = k.shape[2], v.shape[3]
    if S_kv == 0 or q.numel() == 0:
        return _zeros(q, k, v, return_lse)
    starts, ends = spans.clamp(ranges, S_kv)
    edges = torch.zeros(B, S, G, S_kv + 1, dtype=torch.int32, device=q.device)
    one = torch.ones((), dtype=torch.int32, device=q.device).expand(starts.shape)
    count = edges.scatter_add(-1, starts, one).scatter_add(-1, ends, -one).cumsum(-1)[..., :S_kv]
    empty = (count == 0).all(-1)  # [B, S, G]
    bias = torch.where(empty[..., None], 0.0, count.float().log())  # [B, S, G, S_kv], -inf where not selected
    bias = bias.transpose(1, 2)[:, :, :, None].expand(B, G, S, H, S_kv).reshape(B * G, S * H, S_kv)
    heads = aligned(q.float().transpose(1, 2).reshape(B * G, S * H, D))
    keys, values = (aligned(x.float().reshape(B * G, S_kv, -1)) for x in (k, v))
    out = _attend(heads, keys, values, bias, scale).view(B, G, S, H, Dv).transpose(1, 2)
    out = torch.where(empty[..., None, None], 0.0, out).to(q.dtype)
    if not return_lse:
        return out
    lse = _lse(heads, keys, bias, scale).view(B, G, S, H).transpose(1, 2)
    return out, torch.where(empty[..., None], -torch.inf, lse)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Call SDPA with one KV head per batch entry: q [N, M, D], k [N, T, D], v [N, T, Dv], mask [N, 1 or M, T] or None.

    Where a derivative other than the plain backward is wanted, in its composite form, the only one with rules for all.
    """
    if q.shape[0] > MAX_SDPA_BATCH:
        parts = [slice(at, at + MAX_SDPA_BATCH) for at in range(0, q.shape[0], MAX_SDPA_BATCH)]
        return torch.cat([_attend(q[p], k[p], v[p], None if mask is None else mask[p], scale) for p in parts])
    wide = (
        mask is not None
        and mask.shape[1] > 1
        and (mask.shape[2] > MAX_MASK_KEYS or mask.shape[1] * mask.shape[2] > MAX_MASK)
    )
    kernels: Any = contextlib.nullcontext()
    if wide or modes.transformed():
        kernels = sdpa_kernel(SDPBackend.MATH)
    elif _cudnn_is_wrong(q, k, v):
        # Of the others the caller, or the kill switch, may have forbidden some; a compiler cannot ask.
        compiling = torch.compiler.is_compiling()
        if others := [kernel for kernel, is_allowed in OTHER_KERNELS.items() if compiling or is_allowed()]:
            kernels = sdpa_kernel(others)
    with kernels:
        attn_mask = None if mask is None else mask[:, None]
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=attn_mask, scale=scale)
    return out[:, 0]


def _cudnn_is_wrong(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Tell whether cuDNN might compute gradients: with a mask, or a single query, NaN where a row's LSE is below -88.

    From torch 2.11 on its kernel is SDPA's first choice on Hopper.
    """
    half_on_gpu = q.device.type == "cuda" and q.element_size() == 2
    allowed = torch.compiler.is_compiling() or torch.backends.cuda.cudnn_sdp_enabled()  # a caller may have chosen
    return allowed and CUDNN_MAY_BE_FIRST and half_on_gpu and modes.needs_derivative(q, k, v)


def _lse(q: Tensor, k: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """Return the natural-log LSE of the scores plus bias, fp32 [N, M]: SDPA has no public call that returns it.

    q [N, M, D], k [N, T, D], bias [N, 1 or M, T]. A row that may see nothing gives -inf, and no gradient.
    """
    scores = q.float() @ k.float().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is None:
        return scores.logsumexp(-1)
    empty = (bias == -torch.inf).all(-1, keepdim=True)
    lse = (scores + torch.where(empty, 0.0, bias)).logsumexp(-1)
    return torch.where(empty[..., 0], -torch.inf, lse)


def aligned(x: Tensor) -> Tensor:
    """Return x, copied if its strides or its pointer are such that SDPA's masked kernel refuses it."""
    x = x.contiguous()
    readable = not torch.compiler.is_compiling() and modes.eager(x)
    return x.clone() if readable and x.data_ptr() % 16 else x


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Take tokens [B, S, G, L] of x [B, G, S_kv, D]: [B, G, S, L, D].

    The backward pass sums in the dtype that is gathered from: fp32, rounded once.
    """
    B, S, G, L = index.shape
    flat = index.transpose(1, 2).reshape(B, G, S * L, 1).expand(-1, -1, -1, x.shape[3])
    if x.element_size() == 2 and modes.needs_derivative(x):
        return x.float().gather(2, flat).to(x.dtype).view(B, G, S, L, x.shape[3])
    return x.gather(2, flat).view(B, G, S, L, x.shape[3])


def length_bounds(ranges: Tensor, S_kv: int) -> tuple[int, int]:
    """Read the shortest and the longest row's L with one device sync; (0, 0) without rows.

    Raises: UnsupportedError where the ranges have no values to read.
    """
    L = spans.lengths(ranges, S_kv)
    if L.numel() == 0:
        return 0, 0
    if modes.tracing():
        raise UnsupportedError(f"max_len: {_NO_LENGTHS}: a trace is recorded")
    try:
        shortest, longest = torch.stack(torch.aminmax(L)).tolist()
    except (RuntimeError, NotImplementedError) as error:
        raise UnsupportedError(f"max_len: {_NO_LENGTHS}: {error}") from error
    if isinstance(longest, torch.SymInt):
        raise UnsupportedError(f"max_len: {_NO_LENGTHS}: they are symbols")
    return shortest, longest


_NO_LENGTHS = "value is None, expected min_len and max_len where the ranges cannot be read"


def _zeros(q: Tensor, k: Tensor, v: Tensor, return_lse: bool) -> Any:
    """Return what empty rows give, still attached to the graph of q, k and v."""
    out = q.new_zeros(*q.shape[:4], v.shape[3])
    if modes.needs_derivative(q, k, v):
        out = out + 0 * (q[..., :0].sum() + k[..., :0].sum() + v[..., :0].sum())
    return (out, q.new_full(q.shape[:4], -torch.inf, dtype=torch.float32)) if return_lse else out
