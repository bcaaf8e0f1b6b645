"""Kernels for neighbouring queries that share tiles of KV: those that share, and the rows of those that do not.

`_sel_shared` computes one query tile: TQ queries times their heads are the rows of every product, and each KV tile in
the list of the coverage index is read once. `_sel_rest` computes, row by row as `_sel_fwd` does, the query tiles that
are better left alone.
Source: docs/kernel.md, "Shared tiles".
"""

# No `from __future__ import annotations` here: Triton 3.0 and 3.1 read the annotations as objects.
import triton
import triton.language as tl

from .coverage import bits_between
from .forward import SIZE_ARGS, STRIDE_ARGS, attend_row
from .merge import LN_2
from .tiles import dot, load_spans, load_tile, scores

LOG2_3 = tl.constexpr(1.584962500721156)
SHARED_POINTERS = ("q", "k", "v", "ranges", "out", "lse", "tiles", "who", "count", "rest", "n_rest")
SHARED_TENSORS = [*(f"{name}_ptr" for name in SHARED_POINTERS), "k_desc", "v_desc"]


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
def count_tokens(row_ptr, stride_rn, live, first_token, n_spans, S_kv, WORDS: tl.constexpr, UNROLL: tl.constexpr):
    """Count how many spans of each row hold the tokens from first_token on, 32 tokens to a word: three [ROWS, WORDS].

    In binary: a bit of the first is 1, of the second 2, of the third more than 3. Rows that are not `live` have none.
    """
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
    return ones, twos, more


@triton.jit
def each_bit(words, BITS: tl.constexpr):
    """Return the lowest BITS of each word as values of their own: [ROWS, WORDS] gives [ROWS, WORDS · BITS]."""
    bits = (words[:, :, None] >> tl.arange(0, BITS)[None, None, :]) & 1
    return tl.reshape(bits, [words.shape[0], words.shape[1] * BITS])


@triton.jit
def attend_shared(
    q0, q1, q2, q3, acc0, acc1, acc2, acc3, m_i, l_i, scale_log2, k, v, at_k, at_v, col_k, col_v, chosen, bias,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_T: tl.constexpr,
    TMA: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Take one KV tile into the online softmax of a query tile; scale_log2 is positive.

    Of a whole tile the rows `chosen` take every token, the others none: for them the maximum that is subtracted from
    the scores is infinite, which costs nothing per score. Of a partial tile each row takes each token with log2 of how
    often its query selects it, `bias`, -inf for never.
    """
    every_token = tl.arange(0, BLOCK_T) < BLOCK_T
    s = scores(q0, q1, q2, q3, k, at_k, col_k, every_token, D, BLOCK_D, TMA, False)
    if PARTIAL:
        s = tl.where(bias == float("-inf"), float("-inf"), s * scale_log2 + bias)
        m_new = tl.maximum(m_i, tl.max(s, 1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m_i - shift)
        p = tl.exp2(s - shift[:, None])
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


@triton.jit(do_not_specialize=["S", "G", "S_kv", "n_spans", "capacity", *STRIDE_ARGS])
def _sel_shared(
    q_ptr, k_ptr, v_ptr, ranges_ptr, out_ptr, lse_ptr, tiles_ptr, who_ptr, count_ptr, rest_ptr, n_rest_ptr,
    k_desc, v_desc,
    scale_log2: tl.float32, S: tl.int32, G: tl.int32, S_kv: tl.int32, n_spans: tl.int32, capacity: tl.int32,
    stride_qb, stride_qs, stride_qg, stride_qh,
    stride_kb, stride_kg, stride_kt,
    stride_vb, stride_vg, stride_vt,
    stride_rb, stride_rs, stride_rg, stride_rn,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, VIEW: tl.constexpr,
    COLUMNS: tl.constexpr, TQ: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_T: tl.constexpr, TMA: tl.constexpr,
    UNROLL: tl.constexpr, PARTIAL_STAGES: tl.constexpr,
):  # fmt: skip
    """Compute query tile (b, s // TQ, g), if it shares: program (b · query tiles + s // TQ, g).

    Row q · HEADS + h of a product is head h of query q; HEADS: H padded to a power of two. Strides, UNIT, WIDE, VIEW
    and COLUMNS as `_sel_fwd` takes them; tiles, who, count and rest as `_cover` writes them.

    What only some queries select must not reach the others, and a weight of zero does not keep NaN or an infinity out.
    But then, and only then, can the product of a row that selects none of those be NaN, and what is NaN once stays it.
    So a query tile with any NaN in its result is appended to rest_ptr, and its rows are computed one by one. So is one
    in which a query selects a key more than three times.
    """
    query_tiles = tl.cdiv(S, TQ)
    first_query = (query_tiles - 1 - tl.program_id(0) % query_tiles) * TQ
    b = (tl.program_id(0) // query_tiles).to(tl.int64)
    g = tl.program_id(1).to(tl.int64)
    query_tile = (b * query_tiles + first_query // TQ) * G + g
    n_whole = tl.load(count_ptr + 2 * query_tile)
    n_partial = tl.load(count_ptr + 2 * query_tile + 1)
    if n_whole < 0:
        return
    ROWS: tl.constexpr = TQ * HEADS
    offs_row = tl.arange(0, ROWS)
    query = offs_row // HEADS
    h = offs_row % HEADS
    s = (first_query + query).to(tl.int64)
    mask_row = (h < H) & (s < S)
    q_at = (b * stride_qb + s * stride_qs + g * stride_qg + h.to(tl.int64) * stride_qh) * UNIT
    q0 = load_rows(q_ptr, q_at, mask_row, 0, D, BLOCK_D)
    q1 = q0
    q2 = q0
    q3 = q0
    if D > BLOCK_D:
        q1 = load_rows(q_ptr, q_at, mask_row, 1, D, BLOCK_D)
    if D > 2 * BLOCK_D:
        q2 = load_rows(q_ptr, q_at, mask_row, 2, D, BLOCK_D)
    if D > 3 * BLOCK_D:
        q3 = load_rows(q_ptr, q_at, mask_row, 3, D, BLOCK_D)
    m_i = tl.full([ROWS], float("-inf"), tl.float32)
    l_i = tl.zeros([ROWS], tl.float32)
    acc0 = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0

    offs_t = tl.arange(0, BLOCK_T)
    k_row = k_ptr + (b * stride_kb + g * stride_kg) * (stride_kt.to(tl.int64) * UNIT if VIEW else UNIT)
    v_row = v_ptr + (b * stride_vb + g * stride_vg) * UNIT
    col_k = None
    col_v = None
    if COLUMNS:
        k_row = k_ptr + (b * stride_kb * stride_kt + g * stride_kg) * UNIT
        col_k = (g * stride_kg * UNIT).to(tl.int32)
        col_v = (g * stride_vg * UNIT).to(tl.int32)
    step_k = stride_kt.to(tl.int64 if WIDE else tl.int32) * UNIT
    step_v = stride_vt.to(tl.int64 if WIDE else tl.int32) * UNIT
    desc_row = (b * stride_kb + g * stride_kg).to(tl.int32) if VIEW else (b * G + g).to(tl.int32) * S_kv
    if COLUMNS:
        desc_row = (b * stride_kb).to(tl.int32)
    tiles_at = tiles_ptr + query_tile * capacity
    who_at = who_ptr + query_tile * capacity
    tile = tl.load(tiles_at)
    who = tl.load(who_at)
    for i in range(0, n_whole):
        next_tile = tl.load(tiles_at + i + 1)  # a step ahead, so that no load of K and V waits for it
        next_who = tl.load(who_at + i + 1)
        chosen = ((who >> query) & 1) != 0
        token = tile * BLOCK_T
        at = desc_row + token
        tokens = token + offs_t
        acc0, acc1, acc2, acc3, m_i, l_i = attend_shared(
            q0, q1, q2, q3, acc0, acc1, acc2, acc3, m_i, l_i, scale_log2,
            k_desc if TMA else k_row, v_desc if TMA else v_row,
            at if TMA else tokens * step_k, at if TMA else tokens * step_v, col_k, col_v, chosen, None,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_T, TMA, False,
        )  # fmt: skip
        tile = next_tile
        who = next_who

    row_ptr = ranges_ptr + b * stride_rb + s * stride_rs + g * stride_rg
    WORDS: tl.constexpr = (BLOCK_T + 31) // 32
    spoilt = 0
    for i in tl.range(0, n_partial, num_stages=PARTIAL_STAGES):
        token = tl.load(tiles_at + (capacity - 1 - i)) * BLOCK_T
        at = desc_row + token
        tokens = token + offs_t
        ones, twos, more = count_tokens(row_ptr, stride_rn.to(tl.int64), mask_row, token, n_spans, S_kv, WORDS, UNROLL)
        spoilt |= tl.max((more != 0).to(tl.int32))
        once = each_bit(ones, BLOCK_T // WORDS) != 0
        twice = each_bit(twos, BLOCK_T // WORDS) != 0
        bias = tl.where(twice, tl.where(once, LOG2_3, 1.0), tl.where(once, 0.0, float("-inf")))
        tokens = tl.minimum(tokens, S_kv - 1)
        acc0, acc1, acc2, acc3, m_i, l_i = attend_shared(
            q0, q1, q2, q3, acc0, acc1, acc2, acc3, m_i, l_i, scale_log2,
            k_desc if TMA else k_row, v_desc if TMA else v_row,
            at if TMA else tokens * step_k, at if TMA else tokens * step_v, col_k, col_v, None, bias,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_T, TMA, True,
        )  # fmt: skip

    spoilt |= has_nan(acc0)
    if DV > BLOCK_DV:
        spoilt |= has_nan(acc1)
    if DV > 2 * BLOCK_DV:
        spoilt |= has_nan(acc2)
    if DV > 3 * BLOCK_DV:
        spoilt |= has_nan(acc3)
    if spoilt != 0:
        tl.store(rest_ptr + tl.atomic_add(n_rest_ptr, 1), query_tile.to(tl.int32))
    else:
        denom = tl.where(l_i == 0, 1.0, l_i)  # a row without tokens gives zeros
        out_row = ((b * S + s) * G + g) * H + h
        factor = 1.0 / denom
        store_rows(out_ptr, out_row * DV, mask_row, acc0, factor, 0, DV, BLOCK_DV)
        if DV > BLOCK_DV:
            store_rows(out_ptr, out_row * DV, mask_row, acc1, factor, 1, DV, BLOCK_DV)
        if DV > 2 * BLOCK_DV:
            store_rows(out_ptr, out_row * DV, mask_row, acc2, factor, 2, DV, BLOCK_DV)
        if DV > 3 * BLOCK_DV:
            store_rows(out_ptr, out_row * DV, mask_row, acc3, factor, 3, DV, BLOCK_DV)
        if lse_ptr is not None:
            tl.store(lse_ptr + out_row, (m_i + tl.log2(denom)) * LN_2, mask=mask_row)


@triton.jit(do_not_specialize=SIZE_ARGS + STRIDE_ARGS)
def _sel_rest(
    q_ptr, k_ptr, v_ptr, ranges_ptr, out_ptr, lse_ptr, rest_ptr, n_rest_ptr, k_desc, v_desc,
    scale_log2: tl.float32, S: tl.int32, G: tl.int32, S_kv: tl.int32, n_spans: tl.int32, splits: tl.int32,
    stride_qb, stride_qs, stride_qg, stride_qh,
    stride_kb, stride_kg, stride_kt,
    stride_vb, stride_vg, stride_vt,
    stride_rb, stride_rs, stride_rg, stride_rn,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, QUERIES: tl.constexpr, VIEW: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
    LOAD: tl.constexpr, COLUMNS: tl.constexpr, TAIL_L: tl.constexpr, TAIL_STAGES: tl.constexpr, LATE_SUM: tl.constexpr,
    SPLIT: tl.constexpr, CLUSTER: tl.constexpr, BLOCK_M: tl.constexpr, UNROLL: tl.constexpr, TQ: tl.constexpr,
):  # fmt: skip
    """Compute the rows of the query tiles in rest_ptr: program i takes row i, i + programs and so on.

    The grid is sized for every row, and where most query tiles share, few of its programs find one: so there are fewer
    programs than rows. The other arguments are those of `_sel_fwd`, without splits.
    """
    query_tiles = tl.cdiv(S, TQ)
    n_rows = tl.load(n_rest_ptr) * TQ
    for i in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        query_tile = tl.load(rest_ptr + i // TQ).to(tl.int64)
        g = query_tile % G
        s = query_tile // G % query_tiles * TQ + i % TQ
        b = query_tile // G // query_tiles
        if s < S:
            attend_row(
                b, s, g, 0, 0,
                q_ptr, k_ptr, v_ptr, ranges_ptr, out_ptr, lse_ptr, None, None, k_desc, v_desc,
                scale_log2, S, G, S_kv, n_spans, splits,
                stride_qb, stride_qs, stride_qg, stride_qh,
                stride_kb, stride_kg, stride_kt,
                stride_vb, stride_vg, stride_vt,
                stride_rb, stride_rs, stride_rg, stride_rn,
                H, D, DV, UNIT, WIDE, VIEW, BLOCK_H, BLOCK_D, BLOCK_DV, BLOCK_L, BLOCK_N,
                LOAD, COLUMNS, TAIL_L, TAIL_STAGES, LATE_SUM, SPLIT, CLUSTER, BLOCK_M, UNROLL,
            )  # fmt: skip
