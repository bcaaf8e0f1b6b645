"""The backward pass of the keys: one program sums dK and dV of a KV tile over the rows that select from it.

Tokens are the rows of every product, the heads of several queries its columns. A tile that many rows select is cut into
chunks: each leaves its sums in fp32, and `_sel_bwd_merge` adds them in the order of their numbers.
Source: docs/kernel.md, "Backward pass".
"""

# No `from __future__ import annotations` here: Triton 3.0 and 3.1 read the annotations as objects.
import triton
import triton.language as tl

from .backward_index import KINDS
from .backward_products import add_batch, clear_rows, load_both_ends, load_chunks, rows_not_finite, store_tokens
from .forward import STRIDE_ARGS
from .shared_tiles import only_span
from .tiles import load_spans

KEY_POINTERS = (
    "q",
    "k",
    "v",
    "ranges",
    "dout",
    "stat",
    "dk",
    "dv",
    "part",
    "count",
    "first",
    "chunks",
    "slot",
)
# Spans of a batch's rows that are looked at at once. Where a batch may have more there are no plain visits: in flight
# they would take more registers and shared memory than there are, and batches of many rows are few.
MOST_SPANS = tl.constexpr(512)
KEY_TENSORS = [f"{name}_ptr" for name in (*KEY_POINTERS, "n_slots", "rows", "jobs")]


@triton.jit(do_not_specialize=["S", "G", "S_kv", "n_spans", "slots", "capacity", *STRIDE_ARGS])
def _sel_bwd_keys(
    q_ptr, k_ptr, v_ptr, ranges_ptr, dout_ptr, stat_ptr, dk_ptr, dv_ptr, part_ptr,
    count_ptr, first_ptr, chunks_ptr, slot_ptr, n_slots_ptr, rows_ptr, jobs_ptr,
    scale: tl.float32, scale_log2: tl.float32, S: tl.int32, G: tl.int32, S_kv: tl.int32, n_spans: tl.int32,
    slots: tl.int32, capacity: tl.int64,
    stride_qb, stride_qs, stride_qg, stride_qh,
    stride_kb, stride_kg, stride_kt,
    stride_vb, stride_vg, stride_vt,
    stride_rb, stride_rs, stride_rg, stride_rn,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, UNIT: tl.constexpr, VIEW: tl.constexpr, COLUMNS: tl.constexpr,
    WIDE_Q: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sum dK and dV of a KV tile, or one chunk of it: programs 0 to slots − 1 are chunks, the others tiles in order.

    Column j · HEADS + h of a product is head h of the batch's query j; HEADS: H padded to a power of two. dk, dv:
    contiguous [B, G, S_kv, ·]. part_ptr fp32 [slots, BLOCK_T, D + DV]. The index is that of backward_index.py.

    Sums over rows would carry a NaN or infinity of one row's q or dO, times its zero weights, into tokens that it does
    not select. Of a whole tile a row selects every token, and a plain visit is of a row that is finite; among the other
    visits such rows are left out of the sums, and the tokens that they select become NaN. WIDE_Q: offsets in q or dO
    from the first row of (b, g) take 64 bits.
    """
    step: tl.constexpr = tl.int64 if WIDE_Q else tl.int32
    ROWS: tl.constexpr = HEADS * QUERIES
    tiles = tl.cdiv(S_kv, BLOCK_T)
    groups = (tl.num_programs(0) - slots) // tiles
    slot = tl.program_id(0)
    is_chunk = slot < slots
    is_there = slot < tl.load(n_slots_ptr)
    idx = slot - slots
    idx = idx % groups * tiles + idx // groups  # in causal prefill the first tiles have most rows: they start first
    idx = tl.where(is_chunk, tl.load(jobs_ptr + slot, mask=is_chunk & is_there, other=0), idx)
    n_chunks = tl.load(chunks_ptr + idx)
    if is_chunk != (n_chunks > 1) or is_chunk & (is_there == 0):
        return
    chunk = tl.where(is_chunk, slot - tl.load(slot_ptr + idx), 0)
    bg = (idx // tiles).to(tl.int64)
    b = bg // G
    g = bg % G
    n_whole = tl.load(count_ptr + KINDS * idx)
    n_plain = n_whole + tl.load(count_ptr + KINDS * idx + 1)
    n_all = n_plain + tl.load(count_ptr + KINDS * idx + 2)
    size = tl.cdiv(n_all, n_chunks)
    lo = chunk * size
    hi = tl.minimum(lo + size, n_all)
    first = tl.load(first_ptr + idx)
    list_ptr = rows_ptr + first
    room = tl.minimum(tl.maximum(capacity - first, 0), n_all).to(tl.int32)

    token = (idx % tiles) * BLOCK_T
    here = tl.arange(0, BLOCK_T)
    offs_t = token + here
    mask_t = offs_t < S_kv
    k_row = k_ptr + (b * stride_kb + g * stride_kg) * (stride_kt.to(tl.int64) * UNIT if VIEW else UNIT)
    v_row = v_ptr + (b * stride_vb + g * stride_vg) * UNIT
    if COLUMNS:
        k_row = k_ptr + (b * stride_kb * stride_kt + g * stride_kg) * UNIT
    k0, k1, k2, k3 = load_chunks(k_row, offs_t * (stride_kt.to(tl.int64) * UNIT), mask_t, D, BLOCK_D)
    v0, v1, v2, v3 = load_chunks(v_row, offs_t * (stride_vt.to(tl.int64) * UNIT), mask_t, DV, BLOCK_DV)
    dk0 = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    dk1 = dk0
    dk2 = dk0
    dk3 = dk0
    dv0 = tl.zeros([BLOCK_T, BLOCK_DV], tl.float32)
    dv1 = dv0
    dv2 = dv0
    dv3 = dv0

    offs_row = tl.arange(0, ROWS)
    query = offs_row // HEADS
    h = (offs_row % HEADS).to(step)
    step_qs = stride_qs.to(step) * UNIT
    step_qh = stride_qh.to(step) * UNIT
    q_row = q_ptr + (b * stride_qb + g * stride_qg) * UNIT
    first_row = (b * S * G + g) * H
    dout_ptr += first_row * DV
    stat_ptr += first_row * 2
    both = tl.arange(0, 2)[None, :]
    stop = tl.minimum(hi, n_whole)
    last = tl.minimum(stop, room)
    next_s = tl.load(list_ptr + lo + query, mask=lo + query < last, other=-1)
    for i in range(lo, stop, QUERIES):
        s = next_s.to(step)
        at = i + QUERIES + query
        next_s = tl.load(list_ptr + at, mask=at < last, other=-1)  # a step ahead: no load of q and dO waits for it
        live = (s >= 0) & (h < H)
        row = s * (G * H) + h
        q0, q1, q2, q3 = load_chunks(q_row, s * step_qs + h * step_qh, live, D, BLOCK_D)
        do0, do1, do2, do3 = load_chunks(dout_ptr, row * DV, live, DV, BLOCK_DV)
        stat = tl.load(stat_ptr + row[:, None] * 2 + both, mask=live[:, None], other=0.0)
        dk0, dk1, dk2, dk3, dv0, dv1, dv2, dv3 = add_batch(
            k0, k1, k2, k3, v0, v1, v2, v3, dk0, dk1, dk2, dk3, dv0, dv1, dv2, dv3,
            q0, q1, q2, q3, do0, do1, do2, do3, stat, scale_log2, None, None, D, DV, BLOCK_D, BLOCK_DV,
        )  # fmt: skip

    # Part of the tile, as one span: every causal query's own block.
    row_ptr = ranges_ptr + b * stride_rb + g * stride_rg
    number = tl.arange(0, QUERIES)
    if QUERIES * BLOCK_N <= MOST_SPANS:
        begin = tl.maximum(lo, n_whole)
        stop = tl.minimum(hi, n_plain)
        last = tl.minimum(stop, room)
        next_s = tl.load(list_ptr + begin + query, mask=begin + query < last, other=-1)
        next_q = tl.load(list_ptr + begin + number, mask=begin + number < last, other=-1)
        for i in range(begin, stop, QUERIES):
            s = next_s.to(step)
            of_query = next_q.to(tl.int64)
            at = i + QUERIES + query
            next_s = tl.load(list_ptr + at, mask=at < last, other=-1)
            at = i + QUERIES + number
            next_q = tl.load(list_ptr + at, mask=at < last, other=-1)
            start, end = load_both_ends(
                row_ptr + of_query * stride_rs, stride_rn.to(tl.int64), of_query >= 0, n_spans, S_kv, BLOCK_N
            )
            after, until, _ = only_span(start, end, token, HEADS, BLOCK_T)
            live = (s >= 0) & (h < H)
            row = s * (G * H) + h
            q0, q1, q2, q3 = load_chunks(q_row, s * step_qs + h * step_qh, live, D, BLOCK_D)
            do0, do1, do2, do3 = load_chunks(dout_ptr, row * DV, live, DV, BLOCK_DV)
            stat = tl.load(stat_ptr + row[:, None] * 2 + both, mask=live[:, None], other=0.0)
            selected = (here[:, None] >= after[None, :]) & (here[:, None] < until[None, :])
            dk0, dk1, dk2, dk3, dv0, dv1, dv2, dv3 = add_batch(
                k0, k1, k2, k3, v0, v1, v2, v3, dk0, dk1, dk2, dk3, dv0, dv1, dv2, dv3,
                q0, q1, q2, q3, do0, do1, do2, do3, stat, scale_log2, selected, None, D, DV, BLOCK_D, BLOCK_DV,
            )  # fmt: skip

    last = tl.minimum(hi, room)
    spoilt = tl.zeros([BLOCK_T], tl.int32)
    for i in tl.range(tl.maximum(lo, n_plain), hi, QUERIES, num_stages=1):
        at = i + number
        s = tl.load(list_ptr + at, mask=at < last, other=-1).to(tl.int64)
        times = tl.zeros([BLOCK_T, QUERIES], tl.int32)  # how often a query selects a token
        for n in range(0, n_spans):
            at_n = tl.where(s >= 0, n, n_spans)
            start, end = load_spans(row_ptr + s * stride_rs, stride_rn.to(tl.int64), at_n, n_spans, S_kv, False)
            times += ((offs_t[:, None] >= start[None, :]) & (offs_t[:, None] < end[None, :])).to(tl.int32)
        weight = tl.broadcast_to(times[:, :, None], [BLOCK_T, QUERIES, HEADS])
        weight = tl.reshape(weight, [BLOCK_T, ROWS]).to(tl.float32)
        at = i + query
        s = tl.load(list_ptr + at, mask=at < last, other=-1).to(step)
        live = (s >= 0) & (h < H)
        row = s * (G * H) + h
        q0, q1, q2, q3 = load_chunks(q_row, s * step_qs + h * step_qh, live, D, BLOCK_D)
        do0, do1, do2, do3 = load_chunks(dout_ptr, row * DV, live, DV, BLOCK_DV)
        stat = tl.load(stat_ptr + row[:, None] * 2 + both, mask=live[:, None], other=0.0)
        bad = rows_not_finite(q0, q1, q2, q3, D, BLOCK_D) | rows_not_finite(do0, do1, do2, do3, DV, BLOCK_DV)
        q0, q1, q2, q3 = clear_rows(q0, q1, q2, q3, bad)
        do0, do1, do2, do3 = clear_rows(do0, do1, do2, do3, bad)
        spoilt |= tl.max(tl.where(weight > 0, bad[None, :], 0), 1)
        selected = (weight > 0) & (live & (bad == 0))[None, :]
        dk0, dk1, dk2, dk3, dv0, dv1, dv2, dv3 = add_batch(
            k0, k1, k2, k3, v0, v1, v2, v3, dk0, dk1, dk2, dk3, dv0, dv1, dv2, dv3,
            q0, q1, q2, q3, do0, do1, do2, do3, stat, scale_log2, selected, weight, D, DV, BLOCK_D, BLOCK_DV,
        )  # fmt: skip

    # Factors that are NaN where a row that is not finite selects a token.
    of_v = tl.where(spoilt != 0, float("nan"), 1.0)[:, None]
    of_k = of_v * tl.where(is_chunk, 1.0, scale)
    if is_chunk:
        part_at = part_ptr + slot.to(tl.int64) * (BLOCK_T * (D + DV))
        store_tokens(part_at, dk0, dk1, dk2, dk3, here, mask_t, of_k, D + DV, D, BLOCK_D)
        store_tokens(part_at + D, dv0, dv1, dv2, dv3, here, mask_t, of_v, D + DV, DV, BLOCK_DV)
    else:
        store_tokens(dk_ptr + bg * S_kv * D, dk0, dk1, dk2, dk3, offs_t, mask_t, of_k, D, D, BLOCK_D)
        store_tokens(dv_ptr + bg * S_kv * DV, dv0, dv1, dv2, dv3, offs_t, mask_t, of_v, DV, DV, BLOCK_DV)


@triton.jit(do_not_specialize=["S_kv"])
def _sel_bwd_merge(
    part_ptr, chunks_ptr, slot_ptr, dk_ptr, dv_ptr, scale: tl.float32, S_kv: tl.int32,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the chunks of a KV tile in order: program (idx, BLOCK columns of dk, then of dv)."""
    tiles = tl.cdiv(S_kv, BLOCK_T)
    idx = tl.program_id(0)
    n_chunks = tl.load(chunks_ptr + idx)
    if n_chunks == 1:
        return
    K_BLOCKS: tl.constexpr = (D + BLOCK - 1) // BLOCK
    of_k = tl.program_id(1) < K_BLOCKS
    first = tl.where(of_k, tl.program_id(1), tl.program_id(1) - K_BLOCKS) * BLOCK
    width = tl.where(of_k, D, DV)
    here = tl.arange(0, BLOCK_T)
    offs = first + tl.arange(0, BLOCK)
    offs_t = idx % tiles * BLOCK_T + here
    mask = (offs_t < S_kv)[:, None] & (offs < width)[None, :]
    at = tl.load(slot_ptr + idx).to(tl.int64) * (BLOCK_T * (D + DV)) + tl.where(of_k, 0, D)
    at += here[:, None] * (D + DV) + offs[None, :]
    acc = tl.zeros([BLOCK_T, BLOCK], tl.float32)
    for _ in range(0, n_chunks):
        acc += tl.load(part_ptr + at, mask=mask, other=0.0)
        at += BLOCK_T * (D + DV)
    at = ((idx // tiles).to(tl.int64) * S_kv + offs_t)[:, None] * width + offs[None, :]
    if of_k:
        tl.store(dk_ptr + at, (acc * scale).to(dk_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(dv_ptr + at, acc.to(dv_ptr.dtype.element_ty), mask=mask)
