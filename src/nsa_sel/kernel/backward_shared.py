"""The backward pass of query tiles: the gradient of q where neighbouring queries read each tile of KV once.

TQ queries times their heads are the rows of every product, and the tiles are those of the coverage index, as in the
shared kernel of the forward. The rows of query tiles that do not share are left to `_sel_bwd_rows`.
Source: docs/kernel.md, "Backward pass".
"""

# No `from __future__ import annotations` here: Triton 3.0 and 3.1 read the annotations as objects.
import triton
import triton.language as tl

from .backward_products import load_chunks
from .backward_rows import LOG2_E, ROW_POINTERS, take_tile
from .forward import STRIDE_ARGS
from .shared_tiles import (
    count_tokens,
    has_nan,
    load_rows,
    load_spans_of_queries,
    only_span,
    query_tile_at,
    selected_once,
    store_rows,
)

DQ_POINTERS = (*ROW_POINTERS[:-1], "tiles", "who", "count")
DQ_TENSORS = [*(f"{name}_ptr" for name in DQ_POINTERS), "k_desc", "v_desc"]


@triton.jit
def dot_of_chunk(x, out_ptr, at, live, C: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Sum each row's products of chunk C of dO with the same chunk of the result, in fp32."""
    return tl.sum(x.to(tl.float32) * load_rows(out_ptr, at, live, C, DV, BLOCK_DV).to(tl.float32), 1)


@triton.jit
def rows_times_zero(x0, x1, x2, x3, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Sum each row, times zero: NaN where it holds NaN or an infinity."""
    zero = tl.sum(x0.to(tl.float32) * 0.0, 1)
    if WIDTH > BLOCK:
        zero += tl.sum(x1.to(tl.float32) * 0.0, 1)
    if WIDTH > 2 * BLOCK:
        zero += tl.sum(x2.to(tl.float32) * 0.0, 1)
    if WIDTH > 3 * BLOCK:
        zero += tl.sum(x3.to(tl.float32) * 0.0, 1)
    return zero


@triton.jit(do_not_specialize=["S", "G", "S_kv", "n_spans", "capacity", *STRIDE_ARGS])
def _sel_bwd_shared(
    q_ptr, k_ptr, v_ptr, ranges_ptr, out_ptr, dout_ptr, lse_ptr, dlse_ptr, stat_ptr, finite_ptr, dq_ptr,
    tiles_ptr, who_ptr, count_ptr, k_desc, v_desc,
    scale: tl.float32, scale_log2: tl.float32, S: tl.int32, G: tl.int32, S_kv: tl.int32, n_spans: tl.int32,
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
    """Compute what `_sel_bwd_rows` does, for a query tile that shares: program i the i-th.

    Row q · HEADS + h of a product is head h of query q. tiles, who, count: as `_cover` writes them; the rest as
    `_sel_bwd_rows` takes it. A row that does not select a tile has an infinite LSE there, so that its weights are zero
    at no cost per score. Zero weights do not keep NaN or an infinity of a key out of the others' sums, but what comes
    in so is NaN, and stays it. So a query tile with any NaN in its result, or with a query that selects a key more than
    three times, does not share after all: count says so, and its rows are computed one by one.
    """
    b, first_query, g, query_tile = query_tile_at(tl.program_id(0), tl.num_programs(0) // G, S, G, TQ)
    n_whole = tl.load(count_ptr + 2 * query_tile)
    if n_whole < 0:
        return
    n_partial = tl.load(count_ptr + 2 * query_tile + 1)
    tiles_at = tiles_ptr + query_tile * capacity
    who_at = who_ptr + query_tile * capacity
    tile = tl.load(tiles_at)
    who = tl.load(who_at)
    ROWS: tl.constexpr = TQ * HEADS
    s_q = (first_query + tl.arange(0, TQ)).to(tl.int64)
    spans_at = ranges_ptr + b * stride_rb + s_q * stride_rs + g * stride_rg
    start, end = load_spans_of_queries(spans_at, stride_rn.to(tl.int64), s_q < S, n_spans, S_kv, BLOCK_N)
    offs_row = tl.arange(0, ROWS)
    query = offs_row // HEADS
    h = offs_row % HEADS
    s = (first_query + query).to(tl.int64)
    live = (h < H) & (s < S)
    row = ((b * S + s) * G + g) * H + h

    do0, do1, do2, do3 = load_chunks(dout_ptr, row * DV, live, DV, BLOCK_DV)
    minus_delta = -dot_of_chunk(do0, out_ptr, row * DV, live, 0, DV, BLOCK_DV)
    if DV > BLOCK_DV:
        minus_delta -= dot_of_chunk(do1, out_ptr, row * DV, live, 1, DV, BLOCK_DV)
    if DV > 2 * BLOCK_DV:
        minus_delta -= dot_of_chunk(do2, out_ptr, row * DV, live, 2, DV, BLOCK_DV)
    if DV > 3 * BLOCK_DV:
        minus_delta -= dot_of_chunk(do3, out_ptr, row * DV, live, 3, DV, BLOCK_DV)
    if dlse_ptr is not None:
        minus_delta += tl.load(dlse_ptr + row, mask=live, other=0.0)
    lse2 = tl.load(lse_ptr + row, mask=live, other=float("-inf")) * LOG2_E
    lse2 = tl.where(lse2 == float("-inf"), float("inf"), lse2)
    tl.store(stat_ptr + row * 2, lse2, mask=live)
    tl.store(stat_ptr + row * 2 + 1, minus_delta, mask=live)
    q_at = (b * stride_qb + s * stride_qs + g * stride_qg + h.to(tl.int64) * stride_qh) * UNIT
    q0, q1, q2, q3 = load_chunks(q_ptr, q_at, live, D, BLOCK_D)
    zero = minus_delta * 0.0 + rows_times_zero(q0, q1, q2, q3, D, BLOCK_D)
    tl.store(finite_ptr + (b * S + s_q) * G + g, tl.sum(tl.reshape(zero, [TQ, HEADS]), 1), mask=s_q < S)
    dq0 = tl.zeros([ROWS, BLOCK_D], tl.float32)
    dq1 = dq0
    dq2 = dq0
    dq3 = dq0

    offs_t = tl.arange(0, BLOCK_T)
    every = offs_t < BLOCK_T
    k_row = k_ptr + (b * stride_kb + g * stride_kg) * (stride_kt.to(tl.int64) * UNIT if VIEW else UNIT)
    v_row = v_ptr + (b * stride_vb + g * stride_vg) * UNIT
    desc_row = (b * stride_kb + g * stride_kg).to(tl.int32) if VIEW else (b * G + g).to(tl.int32) * S_kv
    col_k = None
    col_v = None
    if COLUMNS:
        k_row = k_ptr + (b * stride_kb * stride_kt + g * stride_kg) * UNIT
        desc_row = (b * stride_kb).to(tl.int32)
        col_k = (g * stride_kg * UNIT).to(tl.int32)
        col_v = (g * stride_vg * UNIT).to(tl.int32)
    step_k = stride_kt.to(tl.int64 if WIDE else tl.int32) * UNIT
    step_v = stride_vt.to(tl.int64 if WIDE else tl.int32) * UNIT
    for i in range(0, n_whole):
        next_tile = tl.load(tiles_at + i + 1)  # a step ahead, so that no load of K and V waits for it
        next_who = tl.load(who_at + i + 1)
        lse_here = tl.where(((who >> query) & 1) != 0, lse2, float("inf"))
        token = tile * BLOCK_T
        at = desc_row + token
        tokens = token + offs_t
        dq0, dq1, dq2, dq3 = take_tile(
            q0, q1, q2, q3, do0, do1, do2, do3, dq0, dq1, dq2, dq3, lse_here, minus_delta, scale_log2,
            k_desc if TMA else k_row, v_desc if TMA else v_row,
            at if TMA else tokens * step_k, at if TMA else tokens * step_v, col_k, col_v, every, None, None,
            D, DV, BLOCK_D, BLOCK_DV, TMA,
        )  # fmt: skip
        tile = next_tile
        who = next_who

    # Of a partial tile a query mostly has one span. Where it has more, the tile is left for a loop of its own.
    spoilt = 0
    n_left = 0
    tile = tl.load(tiles_at + (capacity - 1))
    for i in tl.range(0, n_partial, num_stages=PARTIAL_STAGES):
        next_tile = tl.load(tiles_at + (capacity - 1 - tl.minimum(i + 1, n_partial - 1)))
        token = tile * BLOCK_T
        at = desc_row + token
        tokens = tl.minimum(token + offs_t, S_kv - 1)
        selects, left = selected_once(start, end, token, HEADS, BLOCK_T)
        n_left += left
        dq0, dq1, dq2, dq3 = take_tile(
            q0, q1, q2, q3, do0, do1, do2, do3, dq0, dq1, dq2, dq3, lse2, minus_delta, scale_log2,
            k_desc if TMA else k_row, v_desc if TMA else v_row,
            at if TMA else tokens * step_k, at if TMA else tokens * step_v, col_k, col_v, every, selects, None,
            D, DV, BLOCK_D, BLOCK_DV, TMA,
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
                times, more = count_tokens(row_ptr, stride_rn.to(tl.int64), live, token, n_spans, S_kv, BLOCK_T, UNROLL)
                spoilt |= tl.max((more != 0).to(tl.int32))
                dq0, dq1, dq2, dq3 = take_tile(
                    q0, q1, q2, q3, do0, do1, do2, do3, dq0, dq1, dq2, dq3, lse2, minus_delta, scale_log2,
                    k_desc if TMA else k_row, v_desc if TMA else v_row,
                    at if TMA else tokens * step_k, at if TMA else tokens * step_v, col_k, col_v,
                    every, times > 0, times,
                    D, DV, BLOCK_D, BLOCK_DV, TMA,
                )  # fmt: skip

    spoilt |= has_nan(dq0)
    if D > BLOCK_D:
        spoilt |= has_nan(dq1)
    if D > 2 * BLOCK_D:
        spoilt |= has_nan(dq2)
    if D > 3 * BLOCK_D:
        spoilt |= has_nan(dq3)
    if spoilt != 0:
        tl.store(count_ptr + 2 * query_tile, -1)
    else:
        factor = tl.zeros([ROWS], tl.float32) + scale
        store_rows(dq_ptr, row * D, live, dq0, factor, 0, D, BLOCK_D)
        if D > BLOCK_D:
            store_rows(dq_ptr, row * D, live, dq1, factor, 1, D, BLOCK_D)
        if D > 2 * BLOCK_D:
            store_rows(dq_ptr, row * D, live, dq2, factor, 2, D, BLOCK_D)
        if D > 3 * BLOCK_D:
            store_rows(dq_ptr, row * D, live, dq3, factor, 3, D, BLOCK_D)
