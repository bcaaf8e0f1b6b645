"""The selection kernel: one program computes one row, or one of `splits` parts of a row.

A row's tokens are numbered 0 to L-1 in packed order, span after span. A program reads its row's spans, then walks its
tokens in tiles of BLOCK_L with an online softmax in fp32.

With LOAD = "gather" every token of a tile has its own address: packed position p lies in KV at p + the start of span 0
+ the gaps between the spans before it, where a gap reaches from the end of one span to the start of the next. With the
other loads *whole* tiles lie inside one span and need one address and no mask, read through pointers ("whole") or a TMA
descriptor ("tma"). What they leave of each span, its tail, is read in masked tiles of TAIL_L.
Source: docs/kernel.md; NSA (arXiv 2502.11089), section 3.4; online softmax after FlashAttention (arXiv 2205.14135).
"""

# No `from __future__ import annotations` here: Triton 3.0 and 3.1 read the annotations as objects.
import triton
import triton.language as tl

from .merge import merge_by_cluster, merge_by_last, store_part, store_row
from .tiles import attend, load_q, load_spans

# Tensors stand first in the signature: the direct launch passes their addresses, and everything else as it was.
POINTERS = ("q", "k", "v", "ranges", "out", "lse", "part", "count")
TENSOR_ARGS = [*(f"{name}_ptr" for name in POINTERS), "k_desc", "v_desc"]
SIZE_ARGS = ["S", "G", "S_kv", "n_spans", "splits"]
STRIDE_ARGS = [
    f"stride_{tensor}{axis}"
    for tensor, axes in (("q", "bsgh"), ("k", "bgt"), ("v", "bgt"), ("r", "bsgn"))
    for axis in axes
]


@triton.jit
def attend_row(
    b, s, g, split, rank,
    q_ptr, k_ptr, v_ptr, ranges_ptr, out_ptr, lse_ptr, part_ptr, count_ptr, k_desc, v_desc,
    scale_log2, S, G, S_kv, n_spans, splits,
    stride_qb, stride_qs, stride_qg, stride_qh,
    stride_kb, stride_kg, stride_kt,
    stride_vb, stride_vg, stride_vt,
    stride_rb, stride_rs, stride_rg, stride_rn,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,                                        # shape
    UNIT: tl.constexpr, WIDE: tl.constexpr, VIEW: tl.constexpr,                                # what may be assumed
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
    LOAD: tl.constexpr, COLUMNS: tl.constexpr, TAIL_L: tl.constexpr, TAIL_STAGES: tl.constexpr, LATE_SUM: tl.constexpr,
    SPLIT: tl.constexpr, CLUSTER: tl.constexpr, BLOCK_M: tl.constexpr, UNROLL: tl.constexpr,   # merge
):  # fmt: skip
    """Compute the selection attention of row (b, s, g), or one part of it; the rest as `_sel_fwd` takes it."""
    out_row = (b * S + s) * G + g

    q_row = q_ptr + (b * stride_qb + s * stride_qs + g * stride_qg) * UNIT
    q0, q1, q2, q3 = load_q(q_row, stride_qh.to(tl.int64) * UNIT, H, D, BLOCK_H, BLOCK_D)
    m_i = tl.full([BLOCK_H], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_H], tl.float32)
    if LATE_SUM:
        l_i = tl.zeros([BLOCK_H, BLOCK_L], tl.float32)
    acc0 = tl.zeros([BLOCK_H, BLOCK_DV], tl.float32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0

    offs_l = tl.arange(0, BLOCK_L)
    row_ptr = ranges_ptr + b * stride_rb + s * stride_rs + g * stride_rg
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
    offs_n = 0
    if BLOCK_N > 1:
        offs_n = tl.arange(0, BLOCK_N)
    start, end = load_spans(row_ptr, stride_rn.to(tl.int64), offs_n, n_spans, S_kv, WIDE)
    first = start
    if BLOCK_N > 1:
        first, _ = load_spans(row_ptr, stride_rn.to(tl.int64), 0, n_spans, S_kv, WIDE)
        next_start, _ = load_spans(row_ptr, stride_rn.to(tl.int64), offs_n + 1, n_spans, S_kv, WIDE)
    lo = 0
    if LOAD == "gather":
        n_tokens = end - start
        if BLOCK_N > 1:
            gap = next_start - end
            span_end = tl.cumsum(n_tokens, 0)  # the packed position behind each span
            n_tokens = tl.sum(n_tokens)
        # Beyond the row's end its last token is loaded again, with weight 0, which costs less than a mask on each load.
        # In tiles of 64 and more of one span many lanes would load it: there they are masked.
        SKIP: tl.constexpr = BLOCK_N == 1 and BLOCK_L >= 64
        hi = tl.cdiv(n_tokens, BLOCK_L)
        if SPLIT:
            share = tl.cdiv(hi, splits)
            lo = split * share
            hi = tl.minimum(lo + share, hi)
        for t in range(lo, hi):
            position = t * BLOCK_L + offs_l
            mask_l = position < n_tokens
            if not SKIP:
                position = tl.minimum(position, n_tokens - 1)
            token = first + position
            if BLOCK_N > 1:
                token += tl.sum(tl.where(span_end[:, None] <= position[None, :], gap[:, None], 0), axis=0)
            acc0, acc1, acc2, acc3, m_i, l_i = attend(
                q0, q1, q2, q3, acc0, acc1, acc2, acc3, m_i, l_i, scale_log2,
                k_row, v_row, token * step_k, token * step_v, None, None, mask_l,
                D, DV, BLOCK_D, BLOCK_DV, False, True, SKIP,
            )  # fmt: skip
    else:
        # Whole tiles are numbered span after span, as tokens are; the tails follow them, likewise.
        n_tiles = (end - start) // BLOCK_L
        tail = start + n_tiles * BLOCK_L
        n_tails = tl.cdiv(end - tail, TAIL_L)
        if BLOCK_N > 1:
            gap = next_start - tail
            tiles_end = tl.cumsum(n_tiles, 0)
            n_tiles = tl.sum(n_tiles)
            tails_end = tl.cumsum(n_tails, 0)
            first_tail = tails_end - n_tails
            n_tails = tl.sum(n_tails)
        hi = n_tiles + n_tails
        if SPLIT:
            share = tl.cdiv(hi, splits)
            lo = split * share
            hi = tl.minimum(lo + share, hi)
        TMA: tl.constexpr = LOAD == "tma"
        TAIL_TMA: tl.constexpr = TMA and TAIL_L == BLOCK_L
        desc_row = (b * stride_kb + g * stride_kg).to(tl.int32) if VIEW else (b * G + g).to(tl.int32) * S_kv
        if COLUMNS:
            desc_row = (b * stride_kb).to(tl.int32)
        for t in range(lo, tl.minimum(hi, n_tiles)):
            token = first + t * BLOCK_L
            if BLOCK_N > 1:
                token += tl.sum(tl.where(tiles_end <= t, gap, 0))
            tokens = token + offs_l
            at = (desc_row + token).to(tl.int32)
            acc0, acc1, acc2, acc3, m_i, l_i = attend(
                q0, q1, q2, q3, acc0, acc1, acc2, acc3, m_i, l_i, scale_log2,
                k_desc if TMA else k_row, v_desc if TMA else v_row,
                at if TMA else tokens * step_k, at if TMA else tokens * step_v, col_k, col_v, offs_l < BLOCK_L,
                D, DV, BLOCK_D, BLOCK_DV, TMA, False, False,
            )  # fmt: skip
        for t in tl.range(tl.maximum(lo, n_tiles) - n_tiles, hi - n_tiles, num_stages=TAIL_STAGES):
            token = tail + t * TAIL_L
            tail_end = end
            if BLOCK_N > 1:
                here = (first_tail <= t) & (t < tails_end)
                token = tl.sum(tl.where(here, tail + (t - first_tail) * TAIL_L, 0))
                tail_end = tl.sum(tl.where(here, end, 0))
            tokens = token + tl.arange(0, TAIL_L)
            mask_l = tokens < tail_end
            at = (desc_row + token).to(tl.int32)  # a descriptor's tile reaches beyond the span: attend clears the rest
            tokens = tl.minimum(tokens, tail_end - 1)
            acc0, acc1, acc2, acc3, m_i, l_i = attend(
                q0, q1, q2, q3, acc0, acc1, acc2, acc3, m_i, l_i, scale_log2,
                k_desc if TAIL_TMA else k_row, v_desc if TAIL_TMA else v_row,
                at if TAIL_TMA else tokens * step_k, at if TAIL_TMA else tokens * step_v, col_k, col_v, mask_l,
                D, DV, BLOCK_D, BLOCK_DV, TAIL_TMA, True, False,
            )  # fmt: skip
    if LATE_SUM:
        l_i = tl.sum(l_i, 1)

    out_at = out_ptr + out_row * (H * DV)
    if lse_ptr is not None:
        lse_ptr += out_row * H
    if not SPLIT:
        store_row(out_at, lse_ptr, acc0, acc1, acc2, acc3, m_i, l_i, H, DV, BLOCK_H, BLOCK_DV)
    else:
        DV_PAD: tl.constexpr = (DV + BLOCK_DV - 1) // BLOCK_DV * BLOCK_DV
        RESULT: tl.constexpr = H * (BLOCK_M + 2) if CLUSTER > 1 else 0
        PART: tl.constexpr = H * (DV_PAD + 2) + RESULT
        parts_at = part_ptr + out_row * splits * PART
        store_part(parts_at + split * PART, acc0, acc1, acc2, acc3, m_i, l_i, H, DV, DV_PAD, BLOCK_H, BLOCK_DV)
        if CLUSTER == 1:
            merge_by_last(
                out_at, lse_ptr, parts_at, count_ptr + out_row, splits, H, DV, DV_PAD, PART, BLOCK_H, BLOCK_M, UNROLL
            )
        else:
            merge_by_cluster(
                out_at, lse_ptr, parts_at, count_ptr + out_row * CLUSTER, split, rank, splits,
                H, DV, DV_PAD, PART, BLOCK_H, BLOCK_M, UNROLL, CLUSTER,
            )  # fmt: skip


@triton.jit(do_not_specialize=SIZE_ARGS + STRIDE_ARGS)
def _sel_fwd(
    q_ptr, k_ptr, v_ptr, ranges_ptr, out_ptr, lse_ptr, part_ptr, count_ptr, k_desc, v_desc,
    scale_log2: tl.float32, S: tl.int32, G: tl.int32, S_kv: tl.int32, n_spans: tl.int32, splits: tl.int32,
    stride_qb, stride_qs, stride_qg, stride_qh,
    stride_kb, stride_kg, stride_kt,
    stride_vb, stride_vg, stride_vt,
    stride_rb, stride_rs, stride_rg, stride_rn,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,                                        # shape
    UNIT: tl.constexpr, WIDE: tl.constexpr, QUERIES: tl.constexpr, VIEW: tl.constexpr,         # what may be assumed
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
    LOAD: tl.constexpr, COLUMNS: tl.constexpr, TAIL_L: tl.constexpr, TAIL_STAGES: tl.constexpr, LATE_SUM: tl.constexpr,
    SPLIT: tl.constexpr, CLUSTER: tl.constexpr, BLOCK_M: tl.constexpr, UNROLL: tl.constexpr,   # merge
):  # fmt: skip
    """Compute the selection attention of row (b, s, g): program (b·S + s, g, part of the row).

    Strides of q, k and v come divided by UNIT, so that the compiler knows what divides them. VIEW: K and V are parts of
    a larger cache, of which the descriptors see all; stride_kb and stride_kg count its tokens instead. COLUMNS:
    they are, and the groups of a token lie side by side in its row, so that stride_kg counts elements. QUERIES: S > 1.
    WIDE: positions in a row, or offsets from its first token, take 64 bits. The parts of a row are runs of its tiles.
    LATE_SUM: weights are summed over the threads once, after the loop. SPLIT (splits > 1): each part leaves its sums in
    part_ptr, and the last to arrive merges them, by the counter count_ptr[row]. CLUSTER > 1: runs of so many parts are
    thread-block clusters, whose programs merge BLOCK_M columns each; counters are count_ptr[row · CLUSTER + rank].
    """
    row = tl.program_id(0) // CLUSTER
    s = 0
    b = row.to(tl.int64)
    if QUERIES:  # a division that decode and packed rows do without
        s = (S - 1 - row % S).to(tl.int64)  # causal rows grow with s: the longest start first
        b = (row // S).to(tl.int64)
    g = tl.program_id(1).to(tl.int64)
    rank = tl.program_id(0) % CLUSTER
    split = tl.program_id(2) * CLUSTER + rank
    attend_row(
        b, s, g, split, rank,
        q_ptr, k_ptr, v_ptr, ranges_ptr, out_ptr, lse_ptr, part_ptr, count_ptr, k_desc, v_desc,
        scale_log2, S, G, S_kv, n_spans, splits,
        stride_qb, stride_qs, stride_qg, stride_qh,
        stride_kb, stride_kg, stride_kt,
        stride_vb, stride_vg, stride_vt,
        stride_rb, stride_rs, stride_rg, stride_rn,
        H, D, DV, UNIT, WIDE, VIEW, BLOCK_H, BLOCK_D, BLOCK_DV, BLOCK_L, BLOCK_N,
        LOAD, COLUMNS, TAIL_L, TAIL_STAGES, LATE_SUM, SPLIT, CLUSTER, BLOCK_M, UNROLL,
    )  # fmt: skip
