"""Device code of query tiles: their order and rows, the spans in a tile of KV, and one step of the online softmax."""

# No `from __future__ import annotations` here: Triton 3.0 and 3.1 read the annotations as objects.
import triton
import triton.language as tl

from .coverage import bits_between
from .tiles import dot, load_spans, load_tile


@triton.jit
def query_tile_at(i, tiles_of_group, S, G, TQ: tl.constexpr):
    """Return b, first query, g and number of the query tile that is the i-th in order: group by group, last first.

    Causal rows grow with s, so that the longest come first.
    """
    query_tiles = tl.cdiv(S, TQ)
    t = query_tiles - 1 - i % query_tiles
    b = (i % tiles_of_group // query_tiles).to(tl.int64)
    g = (i // tiles_of_group).to(tl.int64)
    return b, t * TQ, g, (b * query_tiles + t) * G + g


@triton.jit
def row_at(i, g, S, G, TQ: tl.constexpr):
    """Return b and s of the row of group g that is the i-th in order, the last of each sequence first, and its query
    tile."""
    b = (i // S).to(tl.int64)
    s = S - 1 - i % S
    return b, s.to(tl.int64), (b * tl.cdiv(S, TQ) + s // TQ) * G + g


@triton.jit
def load_rows(q_ptr, offs_row, mask_row, C: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load columns [C·BLOCK_D, (C+1)·BLOCK_D) of a query tile's rows, with zeros outside mask_row and D."""
    offs_d = C * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = mask_row[:, None] & (offs_d < D)[None, :]
    return tl.load(q_ptr + offs_row[:, None] + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(out_ptr, offs_row, mask_row, acc, factor, C: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Write columns [C·BLOCK_DV, (C+1)·BLOCK_DV) of a query tile's rows of the result, factor · acc."""
    offs_v = C * BLOCK_DV + tl.arange(0, BLOCK_DV)
    mask = mask_row[:, None] & (offs_v < DV)[None, :]
    tl.store(out_ptr + offs_row[:, None] + offs_v[None, :], (acc * factor[:, None]).to(out_ptr.dtype.element_ty), mask)


@triton.jit
def has_nan(acc):
    """Tell whether any value of a block is NaN, as 0 or 1."""
    return tl.max((acc != acc).to(tl.int32))


@triton.jit
def load_spans_of_queries(row_ptr, stride_rn, live, n_spans, S_kv, BLOCK_N: tl.constexpr):
    """Load the starts and ends of all spans of each query: two [queries, BLOCK_N]; queries not `live` have none."""
    n = tl.where(live[:, None], tl.arange(0, BLOCK_N)[None, :], n_spans)
    return load_spans(row_ptr[:, None], stride_rn, n, n_spans, S_kv, False)


@triton.jit
def only_span(start, end, first_token, HEADS: tl.constexpr, BLOCK_T: tl.constexpr):
    """Return the span that each query has among the BLOCK_T tokens from first_token on, if none has two.

    start, end: [queries, spans]. Returns the span's start and end, counted from first_token, for each head of each
    query, and how many spans the query with the most has there.
    """
    lo = tl.minimum(tl.maximum(start - first_token, 0), BLOCK_T)
    hi = tl.minimum(tl.maximum(end - first_token, 0), BLOCK_T)
    inside = lo < hi
    first = of_heads(tl.sum(tl.where(inside, lo, 0), 1), HEADS)
    last = of_heads(tl.sum(tl.where(inside, hi, 0), 1), HEADS)
    return first, last, tl.max(tl.sum(inside.to(tl.int32), 1))


@triton.jit
def selected_once(start, end, first_token, HEADS: tl.constexpr, BLOCK_T: tl.constexpr):
    """Return which of the BLOCK_T tokens from first_token on each row selects, [ROWS, BLOCK_T], and 0.

    If a query has several spans there, nobody selects any, and the second result is 1: the tile is left.
    """
    first, last, most = only_span(start, end, first_token, HEADS, BLOCK_T)
    left = (most > 1).to(tl.int32)
    last = tl.where(left != 0, 0, last)
    offs_t = tl.arange(0, BLOCK_T)
    return (offs_t[None, :] >= first[:, None]) & (offs_t[None, :] < last[:, None]), left


@triton.jit
def mask_partial(s, partial, start, end, first_token, HEADS: tl.constexpr, BLOCK_T: tl.constexpr):
    """Return the scores of a tile, and of a partial one only those that `selected_once` says; and 1 if it is left."""
    left = 0
    if partial:
        selects, left = selected_once(start, end, first_token, HEADS, BLOCK_T)
        s = tl.where(selects, s, float("-inf"))
    return s, left


@triton.jit
def of_heads(x, HEADS: tl.constexpr):
    """Repeat each query's value for its heads: [queries] gives [queries · HEADS]."""
    return tl.reshape(tl.broadcast_to(x[:, None], [x.shape[0], HEADS]), [x.shape[0] * HEADS])


@triton.jit
def count_tokens(row_ptr, stride_rn, live, first_token, n_spans, S_kv, BLOCK_T: tl.constexpr, UNROLL: tl.constexpr):
    """Count how many spans of each row hold each of the BLOCK_T tokens from first_token on: [ROWS, BLOCK_T].

    They are counted up to three; a bit of the second result, 32 tokens to a word, says that more spans hold the token.
    Rows that are not `live` have no spans.
    """
    WORDS: tl.constexpr = (BLOCK_T + 31) // 32
    ones = tl.zeros([row_ptr.shape[0], WORDS], tl.int32)
    twos = ones
    more = ones
    word = tl.arange(0, WORDS)[None, :]
    for first_span in range(0, n_spans, UNROLL):
        for i in tl.static_range(UNROLL):  # loads that do not depend on one another are in flight together
            n = tl.where(live, first_span + i, n_spans)
            start, end = load_spans(row_ptr, stride_rn, n, n_spans, S_kv, False)
            held = bits_between((start - first_token)[:, None], (end - first_token)[:, None], word)
            carry = ones & held
            ones ^= held
            more |= twos & carry
            twos ^= carry
    return each_bit(ones, BLOCK_T // WORDS) + 2 * each_bit(twos, BLOCK_T // WORDS), more


@triton.jit
def each_bit(words, BITS: tl.constexpr):
    """Return the lowest BITS of each word as values of their own: [ROWS, WORDS] gives [ROWS, WORDS · BITS]."""
    bits = (words[:, :, None] >> tl.arange(0, BITS)[None, None, :]) & 1
    return tl.reshape(bits, [words.shape[0], words.shape[1] * BITS])


@triton.jit
def attend_shared(
    s, acc0, acc1, acc2, acc3, m_i, l_i, scale_log2, v, at_v, col_v, chosen, selects, times,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_T: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Take one KV tile, of which a query tile has the scores s, into its online softmax; scale_log2 is positive.

    Of a tile with `chosen` the rows chosen take every token with a finite score, the others none: for them the maximum
    that is subtracted from the scores is infinite, which costs nothing per score. Of one without, each row takes the
    tokens that it `selects`, [ROWS, BLOCK_T], each as many `times`, or once where that is None.
    """
    every_token = tl.arange(0, BLOCK_T) < BLOCK_T
    if chosen is None:
        s = tl.where(selects, s * scale_log2, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m_i - shift)
        p = tl.exp2(s - shift[:, None])
        if times is not None:
            p *= times.to(tl.float32)
    else:
        m_new = tl.where(chosen, tl.maximum(m_i, tl.max(s, 1) * scale_log2), m_i)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m_i - shift)
        shift = tl.where(chosen, shift, float("inf"))
        p = tl.exp2(s * scale_log2 - shift[:, None])
    l_i = l_i * alpha + tl.sum(p, 1)
    v0 = load_tile(v, at_v, col_v, every_token, 0, DV, BLOCK_DV, TMA, False, False)
    p = p.to(v0.dtype)
    acc0 = dot(p, v0, acc0 * alpha[:, None])
    if DV > BLOCK_DV:
        v1 = load_tile(v, at_v, col_v, every_token, 1, DV, BLOCK_DV, TMA, False, False)
        acc1 = dot(p, v1, acc1 * alpha[:, None])
    if DV > 2 * BLOCK_DV:
        v2 = load_tile(v, at_v, col_v, every_token, 2, DV, BLOCK_DV, TMA, False, False)
        acc2 = dot(p, v2, acc2 * alpha[:, None])
    if DV > 3 * BLOCK_DV:
        v3 = load_tile(v, at_v, col_v, every_token, 3, DV, BLOCK_DV, TMA, False, False)
        acc3 = dot(p, v3, acc3 * alpha[:, None])
    return acc0, acc1, acc2, acc3, m_new, l_i
