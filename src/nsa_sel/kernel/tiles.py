"""Device code that reads spans and tiles, and one step of the online softmax."""

# No `from __future__ import annotations` here: Triton 3.0 and 3.1 read the annotations as objects.
import triton
import triton.language as tl


@triton.jit
def load_spans(row_ptr, stride_rn, offs_n, n_spans, S_kv, WIDE: tl.constexpr):
    """Load the starts and ends of the spans offs_n, clamped to [0, S_kv]; those past n_spans are empty.

    WIDE: as int64, because a row's tokens may not be countable in int32.
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
    src, at, col, mask_l, C: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TMA: tl.constexpr,
    SKIP: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    """Load columns [C·BLOCK, (C+1)·BLOCK) of a tile of K or V, with zeros outside WIDTH.

    src, at: a row's pointer and each token's offset from it; with TMA a descriptor and the tile's first row in it.
    col: with TMA the descriptor's column at which the group's begin; None: it has no others.
    SKIP: pointers outside mask_l are not read, and give zeros. CLEAN: so does what a descriptor brings from there.
    """
    offs = C * BLOCK + tl.arange(0, BLOCK)
    if TMA:
        if col is None:
            tile = src.load([at, C * BLOCK])
        else:
            tile = src.load([at, col + C * BLOCK])
            if (C + 1) * BLOCK > WIDTH:  # what lies there is another group's
                tile = tl.where((offs < WIDTH)[None, :], tile, 0.0)
        if CLEAN:
            tile = tl.where(mask_l[:, None], tile, 0.0)
    else:
        ptrs = (src + offs[None, :]) + at[:, None]  # addresses cost least when added in this order
        PADDED: tl.constexpr = (C + 1) * BLOCK > WIDTH
        if SKIP and PADDED:
            tile = tl.load(ptrs, mask=mask_l[:, None] & (offs < WIDTH)[None, :], other=0.0)
        elif SKIP:
            tile = tl.load(ptrs, mask=mask_l[:, None], other=0.0)
        elif PADDED:
            tile = tl.load(ptrs, mask=(offs < WIDTH)[None, :], other=0.0)
        else:
            tile = tl.load(ptrs)
    return tile


@triton.jit
def load_heads(
    q_row, stride_qh, C: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Load columns [C·BLOCK_D, (C+1)·BLOCK_D) of the row's heads, [BLOCK_H, BLOCK_D], with zeros outside H and D."""
    offs_h = tl.arange(0, BLOCK_H)
    offs_d = C * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (offs_h < H)[:, None] & (offs_d < D)[None, :]
    return tl.load(q_row + offs_h[:, None] * stride_qh + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def load_q(q_row, stride_qh, H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load the row's heads in four chunks of columns; those past D repeat the first and are not used."""
    q0 = load_heads(q_row, stride_qh, 0, H, D, BLOCK_H, BLOCK_D)
    q1 = q0
    q2 = q0
    q3 = q0
    if D > BLOCK_D:
        q1 = load_heads(q_row, stride_qh, 1, H, D, BLOCK_H, BLOCK_D)
    if D > 2 * BLOCK_D:
        q2 = load_heads(q_row, stride_qh, 2, H, D, BLOCK_H, BLOCK_D)
    if D > 3 * BLOCK_D:
        q3 = load_heads(q_row, stride_qh, 3, H, D, BLOCK_H, BLOCK_D)
    return q0, q1, q2, q3


@triton.jit
def scores(
    q0, q1, q2, q3, k, at, col, mask_l,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """Multiply the row's heads with a tile of keys: fp32 [heads, tokens], chunk by chunk of D."""
    zero = tl.zeros([q0.shape[0], mask_l.shape[0]], tl.float32)
    s = dot(q0, tl.trans(load_tile(k, at, col, mask_l, 0, D, BLOCK_D, TMA, SKIP, False)), zero)
    if D > BLOCK_D:
        s += dot(q1, tl.trans(load_tile(k, at, col, mask_l, 1, D, BLOCK_D, TMA, SKIP, False)), zero)
    if D > 2 * BLOCK_D:
        s += dot(q2, tl.trans(load_tile(k, at, col, mask_l, 2, D, BLOCK_D, TMA, SKIP, False)), zero)
    if D > 3 * BLOCK_D:
        s += dot(q3, tl.trans(load_tile(k, at, col, mask_l, 3, D, BLOCK_D, TMA, SKIP, False)), zero)
    return s


@triton.jit
def attend(
    q0, q1, q2, q3, acc0, acc1, acc2, acc3, m_i, l_i, scale_log2, k, v, at_k, at_v, col_k, col_v, mask_l,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    TMA: tl.constexpr, MASKED: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """Take one tile of tokens into the online softmax; if MASKED, only those in mask_l.

    k, v, at_k, at_v, col_k, col_v, TMA, SKIP: as `load_tile` takes them. m_i: each head's largest score so far. l_i:
    the softmax denominator, [heads], or [heads, tokens] where the sum over tokens is left to the end of the row, which
    spares a reduction across warps per tile.
    """
    s = scores(q0, q1, q2, q3, k, at_k, col_k, mask_l, D, BLOCK_D, TMA, SKIP) * scale_log2
    if MASKED:
        s = tl.where(mask_l[None, :], s, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(s, 1))
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # scores of -inf are legal: exp2(-inf - -inf) would be NaN
    alpha = tl.exp2(m_i - shift)
    p = tl.exp2(s - shift[:, None])
    l_i = l_i * alpha[:, None] + p if len(l_i.shape) == 2 else l_i * alpha + tl.sum(p, 1)
    # A weight of zero times NaN is NaN: outside mask_l, V must be zero or a token of this row.
    v0 = load_tile(v, at_v, col_v, mask_l, 0, DV, BLOCK_DV, TMA, SKIP, MASKED)
    p = p.to(v0.dtype)
    acc0 = dot(p, v0, acc0 * alpha[:, None])
    if DV > BLOCK_DV:
        v1 = load_tile(v, at_v, col_v, mask_l, 1, DV, BLOCK_DV, TMA, SKIP, MASKED)
        acc1 = dot(p, v1, acc1 * alpha[:, None])
    if DV > 2 * BLOCK_DV:
        v2 = load_tile(v, at_v, col_v, mask_l, 2, DV, BLOCK_DV, TMA, SKIP, MASKED)
        acc2 = dot(p, v2, acc2 * alpha[:, None])
    if DV > 3 * BLOCK_DV:
        v3 = load_tile(v, at_v, col_v, mask_l, 3, DV, BLOCK_DV, TMA, SKIP, MASKED)
        acc3 = dot(p, v3, acc3 * alpha[:, None])
    return acc0, acc1, acc2, acc3, m_new, l_i
