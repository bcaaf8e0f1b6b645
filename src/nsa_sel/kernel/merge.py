"""Device code that writes a row's result: whole, or as parts that are merged by the last to arrive or by a cluster.

A part is acc [H, DV_PAD], m [H], l [H] in fp32: the unnormalised result, the largest score and the denominator. Where
a row has several clusters, each program of a cluster leaves its columns of the merged result, [H, BLOCK_M + 2], behind
its own part. PART counts the floats of all that.
"""

# No `from __future__ import annotations` here: Triton 3.0 and 3.1 read the annotations as objects.
import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def store_columns(
    out_row, acc, denom, C: tl.constexpr, H: tl.constexpr, DV: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Write columns [C·BLOCK_DV, (C+1)·BLOCK_DV) of one row of the result."""
    offs_h = tl.arange(0, BLOCK_H)
    offs_v = C * BLOCK_DV + tl.arange(0, BLOCK_DV)
    mask = (offs_h < H)[:, None] & (offs_v < DV)[None, :]
    at = out_row + offs_h[:, None] * DV + offs_v[None, :]
    tl.store(at, (acc * (1.0 / denom)[:, None]).to(out_row.dtype.element_ty), mask=mask)


@triton.jit
def store_row(
    out_row, lse_row, acc0, acc1, acc2, acc3, m_i, l_i, H: tl.constexpr, DV: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Write a row that one program has computed, and its LSE if lse_row is given."""
    denom = tl.where(l_i == 0, 1.0, l_i)  # a row without tokens gives zeros
    store_columns(out_row, acc0, denom, 0, H, DV, BLOCK_H, BLOCK_DV)
    if DV > BLOCK_DV:
        store_columns(out_row, acc1, denom, 1, H, DV, BLOCK_H, BLOCK_DV)
    if DV > 2 * BLOCK_DV:
        store_columns(out_row, acc2, denom, 2, H, DV, BLOCK_H, BLOCK_DV)
    if DV > 3 * BLOCK_DV:
        store_columns(out_row, acc3, denom, 3, H, DV, BLOCK_H, BLOCK_DV)
    if lse_row is not None:
        offs_h = tl.arange(0, BLOCK_H)
        tl.store(lse_row + offs_h, (m_i + tl.log2(denom)) * LN_2, mask=offs_h < H)


@triton.jit
def part_columns(part_ptr, C: tl.constexpr, DV_PAD: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Return the addresses of columns [C·BLOCK_DV, (C+1)·BLOCK_DV) of a part's acc."""
    return part_ptr + tl.arange(0, BLOCK_H)[:, None] * DV_PAD + (C * BLOCK_DV + tl.arange(0, BLOCK_DV))[None, :]


@triton.jit
def store_part(
    part_ptr, acc0, acc1, acc2, acc3, m_i, l_i, H: tl.constexpr, DV: tl.constexpr,
    DV_PAD: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Write what one program knows of a row that is split over several."""
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    tl.store(part_columns(part_ptr, 0, DV_PAD, BLOCK_H, BLOCK_DV), acc0, mask=mask_h[:, None])
    if DV > BLOCK_DV:
        tl.store(part_columns(part_ptr, 1, DV_PAD, BLOCK_H, BLOCK_DV), acc1, mask=mask_h[:, None])
    if DV > 2 * BLOCK_DV:
        tl.store(part_columns(part_ptr, 2, DV_PAD, BLOCK_H, BLOCK_DV), acc2, mask=mask_h[:, None])
    if DV > 3 * BLOCK_DV:
        tl.store(part_columns(part_ptr, 3, DV_PAD, BLOCK_H, BLOCK_DV), acc3, mask=mask_h[:, None])
    tl.store(part_ptr + H * DV_PAD + offs_h, m_i, mask=mask_h)
    tl.store(part_ptr + H * (DV_PAD + 1) + offs_h, l_i, mask=mask_h)


@triton.jit
def merge_parts(
    parts_ptr, stride_part, n_parts, offs_v, H: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_H: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Merge columns offs_v of parts acc [H, WIDTH], m [H], l [H]; return the result and its LSE of base 2.

    UNROLL parts are taken at a time, and no load depends on another, so that all of them are in flight together.
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
        # Compared as blocks: of a scalar's comparison Triton's interpreter makes a mask of integers, which 3.9 refuses.
        for i in tl.static_range(UNROLL):
            m_at = parts_ptr + (first + i) * stride_part + H * WIDTH + offs_h
            mask_part = mask_h & (tl.full([BLOCK_H], first + i, tl.int32) < n_parts)
            m_part = tl.load(m_at, mask=mask_part, other=float("-inf"), cache_modifier=".cg")
            m_new = tl.maximum(m_new, m_part)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m_i - shift)
        acc = acc * alpha[:, None]
        l_i = l_i * alpha
        m_i = m_new
        for i in tl.static_range(UNROLL):
            part_ptr = parts_ptr + (first + i) * stride_part
            m_at = part_ptr + H * WIDTH + offs_h
            mask_part = mask_h & (tl.full([BLOCK_H], first + i, tl.int32) < n_parts)
            m_part = tl.load(m_at, mask=mask_part, other=float("-inf"), cache_modifier=".cg")
            l_part = tl.load(m_at + H, mask=mask_part, other=0.0, cache_modifier=".cg")
            part = tl.load(part_ptr + offs, mask=mask & mask_part[:, None], other=0.0, cache_modifier=".cg")
            beta = tl.exp2(m_part - shift)
            acc += part * beta[:, None]
            l_i += l_part * beta
    denom = tl.where(l_i == 0, 1.0, l_i)  # a row without tokens gives zeros
    return acc * (1.0 / denom)[:, None], m_i + tl.log2(denom)


@triton.jit
def store_merged(
    out_row, lse_row, out, lse, offs_v, WITH_LSE, H: tl.constexpr, DV: tl.constexpr, BLOCK_H: tl.constexpr
):
    """Write columns offs_v of one row of the result, and its LSE, which comes with base 2, if WITH_LSE."""
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    mask = mask_h[:, None] & (offs_v < DV)[None, :]
    tl.store(out_row + offs_h[:, None] * DV + offs_v[None, :], out.to(out_row.dtype.element_ty), mask=mask)
    if lse_row is not None:
        tl.store(lse_row + offs_h, lse * LN_2, mask=mask_h & WITH_LSE)


@triton.jit
def merge_by_last(
    out_row, lse_row, parts_ptr, count_at, splits, H: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    PART: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Merge a row's parts, whose number is `splits`, in the program that arrives last by the row's counter.

    That program sets the counter back to zero. It takes the parts in their own order, so that the same input gives the
    same bits.
    """
    offs_m = tl.arange(0, BLOCK_M)
    tl.debug_barrier()  # every thread's part is written before one of them says so
    if tl.atomic_add(count_at, 1, sem="acq_rel") == splits - 1:
        tl.store(count_at, 0)
        for column in range(0, DV, BLOCK_M):
            offs_v = column + offs_m
            out, lse = merge_parts(parts_ptr, PART, splits, offs_v, H, DV_PAD, BLOCK_H, UNROLL)
            store_merged(out_row, lse_row, out, lse, offs_v, column == 0, H, DV, BLOCK_H)


@triton.jit
def cluster_sync(x):
    """Wait for every program of the cluster, so that each sees what the others have written; returns x."""
    return tl.inline_asm_elementwise(
        "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; mov.b32 $0, $1;",
        "=r,r,~{memory}",
        [x],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def merge_by_cluster(
    out_row, lse_row, parts_ptr, counts_at, split, rank, splits, H: tl.constexpr, DV: tl.constexpr,
    DV_PAD: tl.constexpr, PART: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, UNROLL: tl.constexpr,
    CLUSTER: tl.constexpr,
):  # fmt: skip
    """Merge BLOCK_M columns of a row in each program of a cluster, whose parts are CLUSTER of the row's `splits`.

    Where the row has more clusters, the result of a cluster is again a part of the row, and the program that arrives
    last with the columns of its rank, by counter counts_at[rank], merges the clusters' results.
    """
    offs_m = tl.arange(0, BLOCK_M)
    rank = cluster_sync(rank)
    offs_v = rank * BLOCK_M + offs_m
    first_at = parts_ptr + (split - rank) * PART
    out, lse = merge_parts(first_at, PART, CLUSTER, offs_v, H, DV_PAD, BLOCK_H, CLUSTER)
    if splits == CLUSTER:
        store_merged(out_row, lse_row, out, lse, offs_v, rank == 0, H, DV, BLOCK_H)
    else:
        offs_h = tl.arange(0, BLOCK_H)
        mask_h = offs_h < H
        result_at = parts_ptr + split * PART + H * (DV_PAD + 2)
        tl.store(result_at + offs_h[:, None] * BLOCK_M + offs_m[None, :], out, mask=mask_h[:, None])
        tl.store(result_at + H * BLOCK_M + offs_h, lse, mask=mask_h)
        # The result is divided by its denominator: 1 where there are tokens.
        tl.store(result_at + H * (BLOCK_M + 1) + offs_h, tl.where(lse == float("-inf"), 0.0, 1.0), mask=mask_h)
        tl.debug_barrier()
        if tl.atomic_add(counts_at + rank, 1, sem="acq_rel") == splits // CLUSTER - 1:
            tl.store(counts_at + rank, 0)
            first_at = parts_ptr + rank * PART + H * (DV_PAD + 2)
            out, lse = merge_parts(first_at, CLUSTER * PART, splits // CLUSTER, offs_m, H, BLOCK_M, BLOCK_H, UNROLL)
            store_merged(out_row, lse_row, out, lse, offs_v, rank == 0, H, DV, BLOCK_H)
