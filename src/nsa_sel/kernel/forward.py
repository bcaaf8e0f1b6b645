"""Device code of the selection kernel: one program computes one row, or one of `splits` parts of a row.

A program reads its row's spans, then walks its tokens in tiles of BLOCK_L with an online softmax in fp32. With LOAD =
"gather" the tokens are packed position by position and each has its own address; a last tile that is not full reads
the row's last token again, without weight. Otherwise *whole* tiles lie inside one span: one address and no mask,
through a TMA descriptor with LOAD = "tma". What they leave of each span is read in masked tiles of TAIL_L; one that
comes through a descriptor reaches beyond its span, and a NaN there is kept out.
Source: NSA (arXiv 2502.11089), section 3.4; online softmax after FlashAttention (arXiv 2205.14135).
"""

# No `from __future__ import annotations` here: Triton 3.0 and 3.1 read the annotations as objects.
import triton
import triton.language as tl

from .tiles import attend, load_q, load_spans

TENSOR_ARGS = [
    "q_ptr",
    "k_ptr",
    "v_ptr",
    "ranges_ptr",
    "out_ptr",
    "lse_ptr",
    "part_ptr",
    "count_ptr",
    "k_desc",
    "v_desc",
]
SIZE_ARGS = ["S", "G", "S_kv", "n_spans", "splits"]
STRIDE_ARGS = [
    f"stride_{tensor}{axis}"
    for tensor, axes in (("q", "bsgh"), ("k", "bgt"), ("v", "bgt"), ("r", "bsgn"))
    for axis in axes
]


LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _store_out(
    out_ptr,
    acc,
    denom,
    C: tl.constexpr,
    H: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Write columns [C·BLOCK_DV, (C+1)·BLOCK_DV) of one row of the result."""
    offs_h = tl.arange(0, BLOCK_H)
    offs_v = C * BLOCK_DV + tl.arange(0, BLOCK_DV)
    mask = (offs_h < H)[:, None] & (offs_v < DV)[None, :]
    at = out_ptr + offs_h[:, None] * DV + offs_v[None, :]
    tl.store(at, (acc * (1.0 / denom)[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _part_acc(part_ptr, C: tl.constexpr, DV_PAD: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Address columns [C·BLOCK_DV, …) of a part's unnormalised result, fp32 [H, DV_PAD]."""
    return part_ptr + tl.arange(0, BLOCK_H)[:, None] * DV_PAD + (C * BLOCK_DV + tl.arange(0, BLOCK_DV))[None, :]


@triton.jit
def _merge(
    parts_ptr,
    stride_part,
    n_parts,
    offs_v,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_H: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Merge columns offs_v of the parts of one row, UNROLL at a time; returns the result and its LSE of base 2.

    A part is acc [H, WIDTH], m [H], l [H]. No load depends on another, so that all of a round are in flight together.
    """
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    mask = mask_h[:, None] & (offs_v < WIDTH)[None, :]
    offs = offs_h[:, None] * WIDTH + offs_v[None, :]
    m_i = tl.full([BLOCK_H], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, offs_v.shape[0]], tl.float32)
    for first in range(0, n_parts, UNROLL):
        m_new = m_i
        for i in tl.static_range(UNROLL):
            m_at = parts_ptr + (first + i) * stride_part + H * WIDTH + offs_h
            m_part = tl.load(m_at, mask=mask_h & (first + i < n_parts), other=float("-inf"), cache_modifier=".cg")
            m_new = tl.maximum(m_new, m_part)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m_i - shift)
        acc = acc * alpha[:, None]
        l_i = l_i * alpha
        m_i = m_new
        for i in tl.static_range(UNROLL):
            part_ptr = parts_ptr + (first + i) * stride_part
            m_at = part_ptr + H * WIDTH + offs_h
            there = first + i < n_parts
            m_part = tl.load(m_at, mask=mask_h & there, other=float("-inf"), cache_modifier=".cg")
            l_part = tl.load(m_at + H, mask=mask_h & there, other=0.0, cache_modifier=".cg")
            part = tl.load(part_ptr + offs, mask=mask & there, other=0.0, cache_modifier=".cg")
            beta = tl.exp2(m_part - shift)
            acc += part * beta[:, None]
            l_i += l_part * beta
    denom = tl.where(l_i == 0, 1.0, l_i)  # a row without tokens gives zeros
    return acc * (1.0 / denom)[:, None], m_i + tl.log2(denom)


@triton.jit
def _store_merged(
    out_ptr, lse_ptr, out, lse, offs_v, WITH_LSE, H: tl.constexpr, DV: tl.constexpr, BLOCK_H: tl.constexpr
):
    """Write columns offs_v of one row of the result, and its LSE (of base 2) if WITH_LSE."""
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    mask = mask_h[:, None] & (offs_v < DV)[None, :]
    tl.store(out_ptr + offs_h[:, None] * DV + offs_v[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
    if lse_ptr is not None:
        tl.store(lse_ptr + offs_h, lse * LN_2, mask=mask_h & WITH_LSE)


@triton.jit
def _cluster_sync(x):
    """Wait for every program of the cluster, so that each sees what the others have written; returns x."""
    return tl.inline_asm_elementwise(
        "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; mov.b32 $0, $1;",
        "=r,r,~{memory}",
        [x],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=SIZE_ARGS + STRIDE_ARGS)
def _sel_fwd(
    q_ptr,
    k_ptr,
    v_ptr,
    ranges_ptr,
    out_ptr,
    lse_ptr,
    part_ptr,
    count_ptr,
    k_desc,
    v_desc,
    scale_log2: tl.float32,
    S: tl.int32,
    G: tl.int32,
    S_kv: tl.int32,
    n_spans: tl.int32,
    splits: tl.int32,
    stride_qb,
    stride_qs,
    stride_qg,
    stride_qh,
    stride_kb,
    stride_kg,
    stride_kt,
    stride_vb,
    stride_vg,
    stride_vt,
    stride_rb,
    stride_rs,
    stride_rg,
    stride_rn,
    H: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UNROLL: tl.constexpr,
    SPLIT: tl.constexpr,
    CLUSTER: tl.constexpr,
    LOAD: tl.constexpr,
    TAIL_L: tl.constexpr,
    TAIL_STAGES: tl.constexpr,
    LATE_SUM: tl.constexpr,
):
    """Compute the selection attention of row (b, s, g): program (b·S + s, g, part of the row).

    Strides of q, k and v come divided by UNIT, so that the compiler knows what divides them. QUERIES: S > 1.
    WIDE: places in a row, or offsets from its first token, take 64 bits. LOAD: "gather", "whole", "tma" as the module
    says; the parts of a row are runs of tiles. LATE_SUM: weights are summed over the threads once, after the loop.
    SPLIT (splits > 1): each part leaves its sums in part_ptr, and the last to arrive, by the counter count_ptr[row]
    that it sets back to zero, merges them in a fixed order. CLUSTER > 1: runs of so many parts are thread-block
    clusters; each of their programs merges BLOCK_M columns of its cluster, and where a row has more clusters the last
    of those columns to arrive, by count_ptr[row · CLUSTER + rank], merges the clusters' results.
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
    out_row = (b * S + s) * G + g

    q_row = q_ptr + (b * stride_qb + s * stride_qs + g * stride_qg) * UNIT
    q0 = load_q(q_row, stride_qh.to(tl.int64) * UNIT, 0, H, D, BLOCK_H, BLOCK_D)
    q1 = q0
    q2 = q0
    q3 = q0
    if D > BLOCK_D:
        q1 = load_q(q_row, stride_qh.to(tl.int64) * UNIT, 1, H, D, BLOCK_H, BLOCK_D)
    if D > 2 * BLOCK_D:
        q2 = load_q(q_row, stride_qh.to(tl.int64) * UNIT, 2, H, D, BLOCK_H, BLOCK_D)
    if D > 3 * BLOCK_D:
        q3 = load_q(q_row, stride_qh.to(tl.int64) * UNIT, 3, H, D, BLOCK_H, BLOCK_D)

    m_i = tl.full([BLOCK_H], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_H], tl.float32)
    acc0 = tl.zeros([BLOCK_H, BLOCK_DV], tl.float32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    offs_l = tl.arange(0, BLOCK_L)
    row_ptr = ranges_ptr + b * stride_rb + s * stride_rs + g * stride_rg
    k_row = k_ptr + (b * stride_kb + g * stride_kg) * UNIT
    v_row = v_ptr + (b * stride_vb + g * stride_vg) * UNIT
    step_k = stride_kt.to(tl.int64 if WIDE else tl.int32) * UNIT
    step_v = stride_vt.to(tl.int64 if WIDE else tl.int32) * UNIT
    if LATE_SUM:
        l_i = tl.zeros([BLOCK_H, BLOCK_L], tl.float32)
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
        # Token = place + first + the gaps of the spans passed; gap j: from the end of span j to the start of j + 1.
        n_tokens = end - start
        if BLOCK_N > 1:
            gap = next_start - end
            stop = tl.cumsum(n_tokens, 0)  # where span j stops in the packed row
            n_tokens = tl.sum(n_tokens)
        # The last token once more costs less than masks on every load, but for many such tokens.
        SKIP: tl.constexpr = BLOCK_N == 1 and BLOCK_L >= 64
        hi = tl.cdiv(n_tokens, BLOCK_L)
        if SPLIT:
            share = tl.cdiv(hi, splits)
            lo = split * share
            hi = tl.minimum(lo + share, hi)
        for t in range(lo, hi):
            place = t * BLOCK_L + offs_l
            there = place < n_tokens
            if not SKIP:
                place = tl.minimum(place, n_tokens - 1)
            token = first + place
            if BLOCK_N > 1:
                token += tl.sum(tl.where(stop[:, None] <= place[None, :], gap[:, None], 0), axis=0)
            acc0, acc1, acc2, acc3, m_i, l_i = attend(
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
                k_row,
                v_row,
                None,
                None,
                0,
                token,
                step_k,
                step_v,
                there,
                D,
                DV,
                BLOCK_D,
                BLOCK_DV,
                True,
                SKIP,
            )
    else:
        # Likewise for whole tiles, a gap reaching from the last of span j to the first of j + 1. Then the rests.
        n_tiles = (end - start) // BLOCK_L
        rest = start + n_tiles * BLOCK_L
        n_rests = tl.cdiv(end - rest, TAIL_L)
        if BLOCK_N > 1:
            gap = next_start - rest
            stop = tl.cumsum(n_tiles, 0)
            n_tiles = tl.sum(n_tiles)
            rest_stop = tl.cumsum(n_rests, 0)
            first_rest = rest_stop - n_rests
            n_rests = tl.sum(n_rests)
        hi = n_tiles + n_rests
        if SPLIT:
            share = tl.cdiv(hi, splits)
            lo = split * share
            hi = tl.minimum(lo + share, hi)
        desc_row = (b * G + g).to(tl.int32) * S_kv
        for t in range(lo, tl.minimum(hi, n_tiles)):
            token = first + t * BLOCK_L
            if BLOCK_N > 1:
                token += tl.sum(tl.where(stop <= t, gap, 0))
            acc0, acc1, acc2, acc3, m_i, l_i = attend(
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
                k_row,
                v_row,
                k_desc,
                v_desc,
                (desc_row + token).to(tl.int32),
                token + offs_l,
                step_k,
                step_v,
                offs_l < BLOCK_L,
                D,
                DV,
                BLOCK_D,
                BLOCK_DV,
                False,
                False,
            )
        rest_k = k_desc if TAIL_L == BLOCK_L else None
        rest_v = v_desc if TAIL_L == BLOCK_L else None
        for t in tl.range(tl.maximum(lo, n_tiles) - n_tiles, hi - n_tiles, num_stages=TAIL_STAGES):
            token = rest + t * TAIL_L
            rest_end = end
            if BLOCK_N > 1:
                here = (first_rest <= t) & (t < rest_stop)
                token = tl.sum(tl.where(here, rest + (t - first_rest) * TAIL_L, 0))
                rest_end = tl.sum(tl.where(here, end, 0))
            tokens = token + tl.arange(0, TAIL_L)
            there = tokens < rest_end
            acc0, acc1, acc2, acc3, m_i, l_i = attend(
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
                k_row,
                v_row,
                rest_k,
                rest_v,
                (desc_row + token).to(tl.int32),
                tl.minimum(tokens, rest_end - 1),
                step_k,
                step_v,
                there,
                D,
                DV,
                BLOCK_D,
                BLOCK_DV,
                True,
                False,
            )
    if LATE_SUM:
        l_i = tl.sum(l_i, 1)

    offs_h = tl.arange(0, BLOCK_H)
    out_at = out_ptr + out_row * (H * DV)
    if lse_ptr is not None:
        lse_ptr += out_row * H
    if not SPLIT:
        denom = tl.where(l_i == 0, 1.0, l_i)  # a row without tokens gives zeros
        _store_out(out_at, acc0, denom, 0, H, DV, BLOCK_H, BLOCK_DV)
        if DV > BLOCK_DV:
            _store_out(out_at, acc1, denom, 1, H, DV, BLOCK_H, BLOCK_DV)
        if DV > 2 * BLOCK_DV:
            _store_out(out_at, acc2, denom, 2, H, DV, BLOCK_H, BLOCK_DV)
        if DV > 3 * BLOCK_DV:
            _store_out(out_at, acc3, denom, 3, H, DV, BLOCK_H, BLOCK_DV)
        if lse_ptr is not None:
            tl.store(lse_ptr + offs_h, (m_i + tl.log2(denom)) * LN_2, mask=offs_h < H)
    else:
        DV_PAD: tl.constexpr = (DV + BLOCK_DV - 1) // BLOCK_DV * BLOCK_DV
        RESULT: tl.constexpr = H * (BLOCK_M + 2) if CLUSTER > 1 else 0
        PART: tl.constexpr = H * (DV_PAD + 2) + RESULT  # acc [H, DV_PAD], m [H], l [H]; a cluster's [H, BLOCK_M]
        parts_at = part_ptr + out_row * splits * PART
        mine = parts_at + split * PART
        mask_h = offs_h < H
        tl.store(_part_acc(mine, 0, DV_PAD, BLOCK_H, BLOCK_DV), acc0, mask=mask_h[:, None])
        if DV > BLOCK_DV:
            tl.store(_part_acc(mine, 1, DV_PAD, BLOCK_H, BLOCK_DV), acc1, mask=mask_h[:, None])
        if DV > 2 * BLOCK_DV:
            tl.store(_part_acc(mine, 2, DV_PAD, BLOCK_H, BLOCK_DV), acc2, mask=mask_h[:, None])
        if DV > 3 * BLOCK_DV:
            tl.store(_part_acc(mine, 3, DV_PAD, BLOCK_H, BLOCK_DV), acc3, mask=mask_h[:, None])
        tl.store(mine + H * DV_PAD + offs_h, m_i, mask=mask_h)
        tl.store(mine + H * (DV_PAD + 1) + offs_h, l_i, mask=mask_h)
        offs_m = tl.arange(0, BLOCK_M)
        if CLUSTER == 1:
            tl.debug_barrier()  # every thread's part is written before one of them says so
            if tl.atomic_add(count_ptr + out_row, 1, sem="acq_rel") == splits - 1:
                tl.store(count_ptr + out_row, 0)
                for column in range(0, DV, BLOCK_M):
                    offs_v = column + offs_m
                    out, lse = _merge(parts_at, PART, splits, offs_v, H, DV_PAD, BLOCK_H, UNROLL)
                    _store_merged(out_at, lse_ptr, out, lse, offs_v, column == 0, H, DV, BLOCK_H)
        else:
            rank = _cluster_sync(rank)
            offs_v = rank * BLOCK_M + offs_m
            first_at = parts_at + (split - rank) * PART
            out, lse = _merge(first_at, PART, CLUSTER, offs_v, H, DV_PAD, BLOCK_H, CLUSTER)
            if splits == CLUSTER:
                _store_merged(out_at, lse_ptr, out, lse, offs_v, rank == 0, H, DV, BLOCK_H)
            else:  # the result of a cluster is a part like any other, with l = 1 where it has tokens
                result_at = mine + H * (DV_PAD + 2)
                tl.store(result_at + offs_h[:, None] * BLOCK_M + offs_m[None, :], out, mask=mask_h[:, None])
                tl.store(result_at + H * BLOCK_M + offs_h, lse, mask=mask_h)
                tl.store(result_at + H * (BLOCK_M + 1) + offs_h, tl.where(lse == float("-inf"), 0.0, 1.0), mask=mask_h)
                tl.debug_barrier()
                count_at = count_ptr + out_row * CLUSTER + rank
                if tl.atomic_add(count_at, 1, sem="acq_rel") == splits // CLUSTER - 1:
                    tl.store(count_at, 0)
                    first_at = parts_at + rank * PART + H * (DV_PAD + 2)
                    n_results = splits // CLUSTER
                    out, lse = _merge(first_at, CLUSTER * PART, n_results, offs_m, H, BLOCK_M, BLOCK_H, UNROLL)
                    _store_merged(out_at, lse_ptr, out, lse, offs_v, rank == 0, H, DV, BLOCK_H)
