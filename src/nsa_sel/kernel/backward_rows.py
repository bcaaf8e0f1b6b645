"""The backward pass of the rows: what the keys' pass needs of each, and the gradient of q.

One program per row walks the row's tokens as the forward does with whole tiles: weights come from the LSE that the
forward saved, so that no maximum is needed and no sum is rescaled.
Source: docs/kernel.md, "Backward pass"; FlashAttention-2 (arXiv 2307.08691), section 3.1.2.
"""

# No `from __future__ import annotations` here: Triton 3.0 and 3.1 read the annotations as objects.
import triton
import triton.language as tl

from .forward import SIZE_ARGS, STRIDE_ARGS
from .tiles import dot, load_heads, load_q, load_spans, load_tile, scores

LOG2_E = tl.constexpr(1.4426950408889634)
ROW_POINTERS = ("q", "k", "v", "ranges", "out", "dout", "lse", "dlse", "stat", "finite", "dq", "count")
ROW_TENSORS = [*(f"{name}_ptr" for name in ROW_POINTERS), "k_desc", "v_desc"]


@triton.jit
def dot_of_rows(
    a, out_row, C: tl.constexpr, H: tl.constexpr, DV: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum each head's products of a chunk of dO with the same chunk of the result, in fp32."""
    return tl.sum(a.to(tl.float32) * load_heads(out_row, DV, C, H, DV, BLOCK_H, BLOCK).to(tl.float32), 1)


@triton.jit
def times_zero(x):
    """Sum each head's row, times zero: NaN where it holds NaN or an infinity."""
    return tl.sum(x.to(tl.float32) * 0.0, 1)


@triton.jit
def take_tile(
    q0, q1, q2, q3, do0, do1, do2, do3, dq0, dq1, dq2, dq3, lse2, minus_delta, scale_log2,
    k, v, at_k, at_v, col_k, col_v, mask_l, selects, times,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Add what one tile of tokens gives to dq / scale. Arguments as `attend`'s.

    selects: which tokens each row of q takes; None: all. times: how often; None: once. What K holds where a row does
    not select it must be finite: a weight of zero times NaN is NaN.
    """
    # V comes first: K is read for both of its products without a wait in between, so that neither is held in registers.
    dp = scores(do0, do1, do2, do3, v, at_v, col_v, mask_l, DV, BLOCK_DV, TMA, False)
    zero = tl.zeros([q0.shape[0], mask_l.shape[0]], tl.float32)
    k0 = load_tile(k, at_k, col_k, mask_l, 0, D, BLOCK_D, TMA, False, False)
    k1 = k0
    k2 = k0
    k3 = k0
    s = dot(q0, tl.trans(k0), zero)
    if D > BLOCK_D:
        k1 = load_tile(k, at_k, col_k, mask_l, 1, D, BLOCK_D, TMA, False, False)
        s = dot(q1, tl.trans(k1), s)
    if D > 2 * BLOCK_D:
        k2 = load_tile(k, at_k, col_k, mask_l, 2, D, BLOCK_D, TMA, False, False)
        s = dot(q2, tl.trans(k2), s)
    if D > 3 * BLOCK_D:
        k3 = load_tile(k, at_k, col_k, mask_l, 3, D, BLOCK_D, TMA, False, False)
        s = dot(q3, tl.trans(k3), s)
    p = tl.exp2(s * scale_log2 - lse2[:, None])
    ds = p * (dp + minus_delta[:, None])
    if times is not None:
        ds *= times.to(tl.float32)
    if selects is not None:
        ds = tl.where(selects, ds, 0.0)
    ds = ds.to(k0.dtype)
    dq0 = dot(ds, k0, dq0)
    if D > BLOCK_D:
        dq1 = dot(ds, k1, dq1)
    if D > 2 * BLOCK_D:
        dq2 = dot(ds, k2, dq2)
    if D > 3 * BLOCK_D:
        dq3 = dot(ds, k3, dq3)
    return dq0, dq1, dq2, dq3


@triton.jit
def store_heads(
    ptr, acc, factor, C: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Write columns [C·BLOCK_D, (C+1)·BLOCK_D) of a row's heads, factor · acc."""
    offs_h = tl.arange(0, BLOCK_H)
    offs_d = C * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (offs_h < H)[:, None] & (offs_d < D)[None, :]
    tl.store(ptr + offs_h[:, None] * D + offs_d[None, :], (acc * factor).to(ptr.dtype.element_ty), mask)


@triton.jit
def take_row(
    b, s, g,
    q_ptr, k_ptr, v_ptr, ranges_ptr, out_ptr, dout_ptr, lse_ptr, dlse_ptr, stat_ptr, finite_ptr, dq_ptr,
    k_desc, v_desc,
    scale, scale_log2, S, G, S_kv, n_spans,
    stride_qb, stride_qs, stride_qg, stride_qh,
    stride_kb, stride_kg, stride_kt,
    stride_vb, stride_vg, stride_vt,
    stride_rb, stride_rs, stride_rg, stride_rn,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, VIEW: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
    TMA: tl.constexpr, COLUMNS: tl.constexpr, TAIL_L: tl.constexpr, TAIL_STAGES: tl.constexpr,
):  # fmt: skip
    """Compute one row, as `_sel_bwd_rows` says."""
    row = (b * S + s) * G + g
    offs_h = tl.arange(0, BLOCK_H)
    do_row = dout_ptr + row * (H * DV)
    out_row = out_ptr + row * (H * DV)
    do0, do1, do2, do3 = load_q(do_row, DV, H, DV, BLOCK_H, BLOCK_DV)
    delta = dot_of_rows(do0, out_row, 0, H, DV, BLOCK_H, BLOCK_DV)
    if DV > BLOCK_DV:
        delta += dot_of_rows(do1, out_row, 1, H, DV, BLOCK_H, BLOCK_DV)
    if DV > 2 * BLOCK_DV:
        delta += dot_of_rows(do2, out_row, 2, H, DV, BLOCK_H, BLOCK_DV)
    if DV > 3 * BLOCK_DV:
        delta += dot_of_rows(do3, out_row, 3, H, DV, BLOCK_H, BLOCK_DV)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row * H + offs_h, mask=offs_h < H, other=0.0)
    lse2 = tl.load(lse_ptr + row * H + offs_h, mask=offs_h < H, other=float("-inf")) * LOG2_E
    lse2 = tl.where(lse2 == float("-inf"), float("inf"), lse2)
    stat_at = stat_ptr + (row * H + offs_h) * 2
    tl.store(stat_at, lse2, mask=offs_h < H)
    tl.store(stat_at + 1, -delta, mask=offs_h < H)
    q_row = q_ptr + (b * stride_qb + s * stride_qs + g * stride_qg) * UNIT
    q0, q1, q2, q3 = load_q(q_row, stride_qh.to(tl.int64) * UNIT, H, D, BLOCK_H, BLOCK_D)
    zero = tl.where(offs_h < H, delta, 0.0) * 0.0 + times_zero(q0)
    if D > BLOCK_D:
        zero += times_zero(q1)
    if D > 2 * BLOCK_D:
        zero += times_zero(q2)
    if D > 3 * BLOCK_D:
        zero += times_zero(q3)
    tl.store(finite_ptr + row, tl.sum(zero))
    if dq_ptr is not None:
        dq0 = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
        dq1 = dq0
        dq2 = dq0
        dq3 = dq0
        row_ptr = ranges_ptr + b * stride_rb + s * stride_rs + g * stride_rg
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

        # Whole tiles are numbered span after span; the tails follow them, likewise.
        offs_l = tl.arange(0, BLOCK_L)
        offs_n = tl.arange(0, BLOCK_N)
        start, end = load_spans(row_ptr, stride_rn.to(tl.int64), offs_n, n_spans, S_kv, WIDE)
        n_tiles = (end - start) // BLOCK_L
        tail = start + n_tiles * BLOCK_L
        n_tails = tl.cdiv(end - tail, TAIL_L)
        tiles_end = tl.cumsum(n_tiles, 0)
        first_tile = tiles_end - n_tiles
        tails_end = tl.cumsum(n_tails, 0)
        first_tail = tails_end - n_tails
        for t in range(0, tl.sum(n_tiles)):
            here = (first_tile <= t) & (t < tiles_end)
            token = tl.sum(tl.where(here, start + (t - first_tile) * BLOCK_L, 0))
            tokens = token + offs_l
            at = (desc_row + token).to(tl.int32)
            dq0, dq1, dq2, dq3 = take_tile(
                q0, q1, q2, q3, do0, do1, do2, do3, dq0, dq1, dq2, dq3, lse2, -delta, scale_log2,
                k_desc if TMA else k_row, v_desc if TMA else v_row,
                at if TMA else tokens * step_k, at if TMA else tokens * step_v, col_k, col_v,
                offs_l < BLOCK_L, None, None,
                D, DV, BLOCK_D, BLOCK_DV, TMA,
            )  # fmt: skip
        for t in tl.range(0, tl.sum(n_tails), num_stages=TAIL_STAGES):
            here = (first_tail <= t) & (t < tails_end)
            token = tl.sum(tl.where(here, tail + (t - first_tail) * TAIL_L, 0))
            tail_end = tl.sum(tl.where(here, end, 0))
            tokens = token + tl.arange(0, TAIL_L)
            mask_l = tokens < tail_end
            tokens = tl.minimum(tokens, tail_end - 1)
            dq0, dq1, dq2, dq3 = take_tile(
                q0, q1, q2, q3, do0, do1, do2, do3, dq0, dq1, dq2, dq3, lse2, -delta, scale_log2,
                k_row, v_row, tokens * step_k, tokens * step_v, None, None, mask_l, mask_l[None, :], None,
                D, DV, BLOCK_D, BLOCK_DV, False,
            )  # fmt: skip

        dq_row = dq_ptr + row * (H * D)
        store_heads(dq_row, dq0, scale, 0, H, D, BLOCK_H, BLOCK_D)
        if D > BLOCK_D:
            store_heads(dq_row, dq1, scale, 1, H, D, BLOCK_H, BLOCK_D)
        if D > 2 * BLOCK_D:
            store_heads(dq_row, dq2, scale, 2, H, D, BLOCK_H, BLOCK_D)
        if D > 3 * BLOCK_D:
            store_heads(dq_row, dq3, scale, 3, H, D, BLOCK_H, BLOCK_D)


@triton.jit(do_not_specialize=SIZE_ARGS + STRIDE_ARGS)
def _sel_bwd_rows(
    q_ptr, k_ptr, v_ptr, ranges_ptr, out_ptr, dout_ptr, lse_ptr, dlse_ptr, stat_ptr, finite_ptr, dq_ptr, count_ptr,
    k_desc, v_desc,
    scale: tl.float32, scale_log2: tl.float32, S: tl.int32, G: tl.int32, S_kv: tl.int32, n_spans: tl.int32,
    stride_qb, stride_qs, stride_qg, stride_qh,
    stride_kb, stride_kg, stride_kt,
    stride_vb, stride_vg, stride_vt,
    stride_rb, stride_rs, stride_rg, stride_rn,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, VIEW: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
    TMA: tl.constexpr, COLUMNS: tl.constexpr, TAIL_L: tl.constexpr, TAIL_STAGES: tl.constexpr, TQ: tl.constexpr,
    EACH: tl.constexpr,
):  # fmt: skip
    """Compute what the keys' pass needs of each row (b, s, g), and its dq if dq_ptr is given.

    out, dout, dq: contiguous [B, S, G, H, ·]; lse, dlse: fp32 [B, S, G, H]; δ = rowsum(dO ∘ O) − dLSE. stat, fp32
    [B, S, G, H, 2]: the base-2 LSE, +inf where the LSE is -inf, so that weights there are zero, and -δ. finite, fp32
    [B, S, G]: 0 if q, dO and δ of all heads are finite, else NaN. The rest as `_sel_fwd` takes it.
    Program (b·S + s, g); or, with count_ptr as `_cover` writes it, one for every EACH rows of the query tiles of TQ,
    which leaves alone those that share. So few, since programs cost time even where they have nothing to do.
    """
    programs = tl.cdiv(S, TQ) * (TQ // EACH)  # of a sequence
    first = (programs - 1 - tl.program_id(0) % programs) * EACH  # causal rows grow with s: the longest start first
    b = (tl.program_id(0) // programs).to(tl.int64)
    g = tl.program_id(1).to(tl.int64)
    if count_ptr is None:
        take_row(
            b, first.to(tl.int64), g,
            q_ptr, k_ptr, v_ptr, ranges_ptr, out_ptr, dout_ptr, lse_ptr, dlse_ptr, stat_ptr, finite_ptr, dq_ptr,
            k_desc, v_desc, scale, scale_log2, S, G, S_kv, n_spans,
            stride_qb, stride_qs, stride_qg, stride_qh,
            stride_kb, stride_kg, stride_kt,
            stride_vb, stride_vg, stride_vt,
            stride_rb, stride_rs, stride_rg, stride_rn,
            H, D, DV, UNIT, WIDE, VIEW, BLOCK_H, BLOCK_D, BLOCK_DV, BLOCK_L, BLOCK_N, TMA, COLUMNS, TAIL_L, TAIL_STAGES,
        )  # fmt: skip
    else:
        n_whole = tl.load(count_ptr + 2 * ((b * tl.cdiv(S, TQ) + first // TQ) * G + g))
        if n_whole < 0:
            for i in range(0, tl.minimum(EACH, S - first)):
                take_row(
                    b, (first + i).to(tl.int64), g,
                    q_ptr, k_ptr, v_ptr, ranges_ptr, out_ptr, dout_ptr, lse_ptr, dlse_ptr, stat_ptr, finite_ptr, dq_ptr,
                    k_desc, v_desc, scale, scale_log2, S, G, S_kv, n_spans,
                    stride_qb, stride_qs, stride_qg, stride_qh,
                    stride_kb, stride_kg, stride_kt,
                    stride_vb, stride_vg, stride_vt,
                    stride_rb, stride_rs, stride_rg, stride_rn,
                    H, D, DV, UNIT, WIDE, VIEW, BLOCK_H, BLOCK_D, BLOCK_DV, BLOCK_L, BLOCK_N,
                    TMA, COLUMNS, TAIL_L, TAIL_STAGES,
                )  # fmt: skip
