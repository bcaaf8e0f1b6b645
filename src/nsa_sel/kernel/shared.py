"""Kernels for neighbouring queries that share tiles of KV: those that share, and the rows of those that do not.

`_sel_shared` computes query tiles: TQ queries times their heads are the rows of every product, and each KV tile in the
list of the coverage index is read once. `_sel_rest` computes, row by row as `_sel_fwd` does, the query tiles that
are better left alone.
Source: docs/kernel.md, "Shared tiles".
"""

# No `from __future__ import annotations` here: Triton 3.0 and 3.1 read the annotations as objects.
import triton
import triton.language as tl

from .forward import SIZE_ARGS, STRIDE_ARGS, attend_row
from .merge import LN_2
from .shared_tiles import (
    attend_shared,
    count_tokens,
    has_nan,
    load_rows,
    load_spans_of_queries,
    mask_partial,
    only_span,
    query_tile_at,
    row_at,
    selected_once,
    store_rows,
)
from .tiles import scores

SHARED_POINTERS = ("q", "k", "v", "ranges", "out", "lse", "tiles", "who", "count")
SHARED_TENSORS = [*(f"{name}_ptr" for name in SHARED_POINTERS), "k_desc", "v_desc"]


@triton.jit
def share_tile(
    b, first_query, g, query_tile, n_whole, n_partial, tile, who,
    q_ptr, k_ptr, v_ptr, ranges_ptr, out_ptr, lse_ptr, tiles_ptr, who_ptr, count_ptr, k_desc, v_desc,
    scale_log2, S, G, S_kv, n_spans, capacity,
    stride_qb, stride_qs, stride_qg, stride_qh,
    stride_kb, stride_kg, stride_kt,
    stride_vb, stride_vg, stride_vt,
    stride_rb, stride_rs, stride_rg, stride_rn,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, VIEW: tl.constexpr,
    COLUMNS: tl.constexpr, TQ: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_T: tl.constexpr, TMA: tl.constexpr,
    BLOCK_N: tl.constexpr, UNROLL: tl.constexpr, PARTIAL_STAGES: tl.constexpr,
):  # fmt: skip
    """Compute a query tile that shares; tile, who: the first of its list, and who selects from it.

    What only some queries select must not reach the others, and a weight of zero does not keep NaN or an infinity out.
    But then, and only then, can the product of a row that selects none of those be NaN, and what is NaN once stays it.
    So a query tile with any NaN in its result does not share after all, which count_ptr then says, and its rows are
    computed one by one. So are those of one in which a query selects a key more than three times.
    """
    tiles_at = tiles_ptr + query_tile * capacity
    who_at = who_ptr + query_tile * capacity
    ROWS: tl.constexpr = TQ * HEADS
    s_q = (first_query + tl.arange(0, TQ)).to(tl.int64)
    spans_at = ranges_ptr + b * stride_rb + s_q * stride_rs + g * stride_rg
    start, end = load_spans_of_queries(spans_at, stride_rn.to(tl.int64), s_q < S, n_spans, S_kv, BLOCK_N)
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
    every_token = offs_t < BLOCK_T
    k_tiles = k_desc if TMA else k_row
    v_tiles = v_desc if TMA else v_row
    spoilt = 0
    n_left = 0
    TOGETHER: tl.constexpr = PARTIAL_STAGES == 0
    n_first = n_whole
    if TOGETHER:
        n_first += n_partial
        if n_whole == 0:
            tile = tl.load(tiles_at + (capacity - 1))
            who = tl.load(who_at + (capacity - 1))
    for i in range(0, n_first):
        following = i + 1  # a step ahead, so that no load of K and V waits for it
        if TOGETHER:
            following = tl.where(following < n_whole, following, tl.maximum(capacity - 2 - (i - n_whole), 0))
        next_tile = tl.load(tiles_at + following)
        next_who = tl.load(who_at + following)
        chosen = ((who >> query) & 1) != 0
        token = tile * BLOCK_T
        at = desc_row + token
        tokens = token + offs_t
        if TOGETHER:
            tokens = tl.minimum(tokens, S_kv - 1)
        at_k = at if TMA else tokens * step_k
        s_tile = scores(q0, q1, q2, q3, k_tiles, at_k, col_k, every_token, D, BLOCK_D, TMA, False)
        if TOGETHER:
            s_tile, left = mask_partial(s_tile, i >= n_whole, start, end, token, HEADS, BLOCK_T)
            n_left += left
        acc0, acc1, acc2, acc3, m_i, l_i = attend_shared(
            s_tile, acc0, acc1, acc2, acc3, m_i, l_i, scale_log2, v_tiles, at if TMA else tokens * step_v, col_v,
            chosen, None, None, DV, BLOCK_DV, BLOCK_T, TMA,
        )  # fmt: skip
        tile = next_tile
        who = next_who

    if not TOGETHER:
        tile = tl.load(tiles_at + (capacity - 1))
        for i in tl.range(0, n_partial, num_stages=PARTIAL_STAGES):
            next_tile = tl.load(tiles_at + (capacity - 1 - tl.minimum(i + 1, n_partial - 1)))
            token = tile * BLOCK_T
            at = desc_row + token
            tokens = tl.minimum(token + offs_t, S_kv - 1)
            selects, left = selected_once(start, end, token, HEADS, BLOCK_T)
            n_left += left
            at_k = at if TMA else tokens * step_k
            s_tile = scores(q0, q1, q2, q3, k_tiles, at_k, col_k, every_token, D, BLOCK_D, TMA, False)
            acc0, acc1, acc2, acc3, m_i, l_i = attend_shared(
                s_tile, acc0, acc1, acc2, acc3, m_i, l_i, scale_log2, v_tiles, at if TMA else tokens * step_v, col_v,
                None, selects, None, DV, BLOCK_DV, BLOCK_T, TMA,
            )  # fmt: skip
            tile = next_tile
    if n_left > 0:
        row_ptr = ranges_ptr + b * stride_rb + s * stride_rs + g * stride_rg
        for i in tl.range(0, n_partial, num_stages=1):
            token = tl.load(tiles_at + (capacity - 1 - i)) * BLOCK_T
            _, _, most = only_span(start, end, token, HEADS, BLOCK_T)
            if most > 1:
                at = desc_row + token
                tokens = tl.minimum(token + offs_t, S_kv - 1)
                times, more = count_tokens(
                    row_ptr, stride_rn.to(tl.int64), mask_row, token, n_spans, S_kv, BLOCK_T, UNROLL
                )
                spoilt |= tl.max((more != 0).to(tl.int32))
                at_k = at if TMA else tokens * step_k
                s_tile = scores(q0, q1, q2, q3, k_tiles, at_k, col_k, every_token, D, BLOCK_D, TMA, False)
                acc0, acc1, acc2, acc3, m_i, l_i = attend_shared(
                    s_tile, acc0, acc1, acc2, acc3, m_i, l_i, scale_log2, v_tiles,
                    at if TMA else tokens * step_v, col_v, None, times > 0, times, DV, BLOCK_DV, BLOCK_T, TMA,
                )  # fmt: skip

    spoilt |= has_nan(acc0)
    if DV > BLOCK_DV:
        spoilt |= has_nan(acc1)
    if DV > 2 * BLOCK_DV:
        spoilt |= has_nan(acc2)
    if DV > 3 * BLOCK_DV:
        spoilt |= has_nan(acc3)
    if spoilt != 0:
        tl.store(count_ptr + 2 * query_tile, -1)
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


@triton.jit(do_not_specialize=["n_tiles", "S", "G", "S_kv", "n_spans", "capacity", *STRIDE_ARGS])
def _sel_shared(
    q_ptr, k_ptr, v_ptr, ranges_ptr, out_ptr, lse_ptr, tiles_ptr, who_ptr, count_ptr, k_desc, v_desc,
    scale_log2: tl.float32, n_tiles: tl.int32, S: tl.int32, G: tl.int32, S_kv: tl.int32, n_spans: tl.int32,
    capacity: tl.int32,
    stride_qb, stride_qs, stride_qg, stride_qh,
    stride_kb, stride_kg, stride_kt,
    stride_vb, stride_vg, stride_vt,
    stride_rb, stride_rs, stride_rg, stride_rn,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, VIEW: tl.constexpr,
    COLUMNS: tl.constexpr, TQ: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_T: tl.constexpr, TMA: tl.constexpr,
    BLOCK_N: tl.constexpr, UNROLL: tl.constexpr, PARTIAL_STAGES: tl.constexpr,
):  # fmt: skip
    """Compute the query tile that is the i-th of n_tiles, if it shares: program i.

    Row q · HEADS + h of a product is head h of query q; HEADS: H padded to a power of two. Strides, UNIT, WIDE, VIEW
    and COLUMNS as `_sel_fwd` takes them; tiles, who and count as `_cover` writes them.
    """
    b, first_query, g, query_tile = query_tile_at(tl.program_id(0), n_tiles // G, S, G, TQ)
    n_whole = tl.load(count_ptr + 2 * query_tile)
    n_partial = tl.load(count_ptr + 2 * query_tile + 1)
    tile = tl.load(tiles_ptr + query_tile * capacity)
    who = tl.load(who_ptr + query_tile * capacity)
    if n_whole < 0:
        return
    share_tile(
        b, first_query, g, query_tile, n_whole, n_partial, tile, who,
        q_ptr, k_ptr, v_ptr, ranges_ptr, out_ptr, lse_ptr, tiles_ptr, who_ptr, count_ptr, k_desc, v_desc,
        scale_log2, S, G, S_kv, n_spans, capacity,
        stride_qb, stride_qs, stride_qg, stride_qh,
        stride_kb, stride_kg, stride_kt,
        stride_vb, stride_vg, stride_vt,
        stride_rb, stride_rs, stride_rg, stride_rn,
        H, D, DV, UNIT, WIDE, VIEW, COLUMNS, TQ, HEADS, BLOCK_D, BLOCK_DV, BLOCK_T, TMA, BLOCK_N, UNROLL,
        PARTIAL_STAGES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows", *SIZE_ARGS, *STRIDE_ARGS])
def _sel_rest(
    q_ptr, k_ptr, v_ptr, ranges_ptr, out_ptr, lse_ptr, count_ptr, k_desc, v_desc,
    n_rows: tl.int32, scale_log2: tl.float32, S: tl.int32, G: tl.int32, S_kv: tl.int32, n_spans: tl.int32,
    splits: tl.int32,
    stride_qb, stride_qs, stride_qg, stride_qh,
    stride_kb, stride_kg, stride_kt,
    stride_vb, stride_vg, stride_vt,
    stride_rb, stride_rs, stride_rg, stride_rn,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, QUERIES: tl.constexpr, VIEW: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
    LOAD: tl.constexpr, COLUMNS: tl.constexpr, TAIL_L: tl.constexpr, TAIL_STAGES: tl.constexpr, LATE_SUM: tl.constexpr,
    SPLIT: tl.constexpr, CLUSTER: tl.constexpr, BLOCK_M: tl.constexpr, UNROLL: tl.constexpr,
    TQ: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Compute those of each group's n_rows rows whose query tile does not share.

    Program (i, g) takes rows i, i + programs and so on of group g. These are up to ROWS, a power of two, from all over
    the sequence: where few query tiles do not share, their rows lie in different programs. All of one group: programs
    that run at the same time then read the K and V of one group, as in `_sel_fwd`, for L2's sake. The other arguments
    are those of `_sel_fwd`, without splits.
    """
    g = tl.program_id(1).to(tl.int64)
    step = tl.num_programs(0)
    each = tl.program_id(0) + tl.arange(0, ROWS) * step
    _, _, of_each = row_at(each, g, S, G, TQ)
    if tl.min(tl.load(count_ptr + 2 * of_each, mask=each < n_rows, other=0)) < 0:
        for i in range(tl.program_id(0), n_rows, step):
            b, s, query_tile = row_at(i, g, S, G, TQ)
            if tl.load(count_ptr + 2 * query_tile) < 0:
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
