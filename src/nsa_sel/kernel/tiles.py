"""Device code that the selection kernel is made of: reading spans and tiles, and one step of the online softmax."""

# No `from __future__ import annotations` here: Triton 3.0 and 3.1 read the annotations as objects.
import triton
import triton.language as tl


@triton.jit
def load_spans(row_ptr, stride_rn, offs_n, n_spans, S_kv, WIDE: tl.constexpr):
    """Load the starts and ends of the spans offs_n clamped to [0, S_kv]; those past n_spans are empty.

    WIDE: as int64, since a row's tokens may not be countable in int32.
    """
    mask_n = offs_n < n_spans
    at = row_ptr + offs_n * stride_rn
    start = tl.load(at, mask=mask_n, other=0)
    end = tl.load(at + 1, mask=mask_n, other=0)
    start = tl.minimum(tl.maximum(start, 0), S_kv).to(tl.int64 if WIDE else tl.int32)
    end = tl.minimum(tl.maximum(end, 0), S_kv).to(tl.int64 if WIDE else tl.int32)
    return start, tl.maximum(start, end)


# Triton's interpreter multiplies the raw bits of bf16 operands: there, and only there, dots run on operands in fp32.
INTERPRETED = tl.constexpr(not isinstance(load_spans, triton.runtime.JITFunction))


@triton.jit
def dot(a, b, acc):
    """Multiply on tensor cores with fp32 sums; fp32 operands are not rounded to tf32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_tile(
    ptr,
    desc,
    desc_row,
    tokens,
    stride_t,
    mask_l,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SKIP: tl.constexpr,
    CLEAN: tl.constexpr,
):
    """Load columns [C·BLOCK, (C+1)·BLOCK) of a tile, zeros outside WIDTH: the tokens, or through desc a run of them.

    SKIP: tokens outside mask_l are not read and give zeros. CLEAN: what a descriptor brings of them becomes zeros.
    """
    if desc is not None:
        tile = desc.load([desc_row, C * BLOCK])
        return tl.where(mask_l[:, None], tile, 0.0) if CLEAN else tile
    offs = C * BLOCK + tl.arange(0, BLOCK)
    at = (ptr + offs[None, :]) + (tokens * stride_t)[:, None]  # in this order addresses cost least
    if SKIP:
        if (C + 1) * BLOCK > WIDTH:
            return tl.load(at, mask=mask_l[:, None] & (offs < WIDTH)[None, :], other=0.0)
        else:
            return tl.load(at, mask=mask_l[:, None], other=0.0)
    else:
        if (C + 1) * BLOCK > WIDTH:
            return tl.load(at, mask=(offs < WIDTH)[None, :], other=0.0)
        else:
            return tl.load(at)


@triton.jit
def load_q(
    at, stride_qh, C: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Load columns [C·BLOCK_D, (C+1)·BLOCK_D) of the row's heads, [BLOCK_H, BLOCK_D]; zeros outside H and D."""
    offs_h = tl.arange(0, BLOCK_H)
    offs_d = C * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (offs_h < H)[:, None] & (offs_d < D)[None, :]
    return tl.load(at + offs_h[:, None] * stride_qh + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def attend(
    q0,
    q1,
    q2,
    q3,
    acc0,
    acc1,
    acc2,
    acc3,
    m_i,
    l_i,
    scale_log2,
    k_ptr,
    v_ptr,
    k_desc,
    v_desc,
    desc_row,
    tokens,
    stride_kt,
    stride_vt,
    mask_l,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr,
    SKIP: tl.constexpr,
):
    """Take one tile of tokens into the online softmax, or if MASKED those in mask_l. SKIP: as `load_tile` says.

    l_i: each head's sum of weights, or [heads, tokens] still to be summed, which spares the warps a meeting a tile.
    """
    zero = tl.zeros([q0.shape[0], tokens.shape[0]], tl.float32)
    k0 = load_tile(k_ptr, k_desc, desc_row, tokens, stride_kt, mask_l, 0, D, BLOCK_D, SKIP, False)
    s = dot(q0, tl.trans(k0), zero)
    if D > BLOCK_D:
        k1 = load_tile(k_ptr, k_desc, desc_row, tokens, stride_kt, mask_l, 1, D, BLOCK_D, SKIP, False)
        s += dot(q1, tl.trans(k1), zero)
    if D > 2 * BLOCK_D:
        k2 = load_tile(k_ptr, k_desc, desc_row, tokens, stride_kt, mask_l, 2, D, BLOCK_D, SKIP, False)
        s += dot(q2, tl.trans(k2), zero)
    if D > 3 * BLOCK_D:
        k3 = load_tile(k_ptr, k_desc, desc_row, tokens, stride_kt, mask_l, 3, D, BLOCK_D, SKIP, False)
        s += dot(q3, tl.trans(k3), zero)
    s = s * scale_log2
    if MASKED:
        s = tl.where(mask_l[None, :], s, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(s, 1))
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # logits of -inf are legal: exp2(-inf - -inf) would be NaN
    alpha = tl.exp2(m_i - shift)
    p = tl.exp2(s - shift[:, None])
    l_i = l_i * alpha[:, None] + p if len(l_i.shape) == 2 else l_i * alpha + tl.sum(p, 1)
    # A weight of zero times NaN is NaN: V must be zero outside mask_l, or a token's of this row.
    v0 = load_tile(v_ptr, v_desc, desc_row, tokens, stride_vt, mask_l, 0, DV, BLOCK_DV, SKIP, MASKED)
    p = p.to(v0.dtype)
    acc0 = dot(p, v0, acc0 * alpha[:, None])
    if DV > BLOCK_DV:
        v1 = load_tile(v_ptr, v_desc, desc_row, tokens, stride_vt, mask_l, 1, DV, BLOCK_DV, SKIP, MASKED)
        acc1 = dot(p, v1, acc1 * alpha[:, None])
    if DV > 2 * BLOCK_DV:
        v2 = load_tile(v_ptr, v_desc, desc_row, tokens, stride_vt, mask_l, 2, DV, BLOCK_DV, SKIP, MASKED)
        acc2 = dot(p, v2, acc2 * alpha[:, None])
    if DV > 3 * BLOCK_DV:
        v3 = load_tile(v_ptr, v_desc, desc_row, tokens, stride_vt, mask_l, 3, DV, BLOCK_DV, SKIP, MASKED)
        acc3 = dot(p, v3, acc3 * alpha[:, None])
    return acc0, acc1, acc2, acc3, m_new, l_i
