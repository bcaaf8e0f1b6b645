"""Device code of the keys' pass: tokens and batches of queries in chunks of columns, and their products.

Source: docs/kernel.md, "Backward pass".
"""

# No `from __future__ import annotations` here: Triton 3.0 and 3.1 read the annotations as objects.
import triton
import triton.language as tl

from .shared_tiles import load_rows
from .tiles import dot


@triton.jit
def load_chunks(ptr, at, mask, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Load rows at `at` in four chunks of columns, with zeros outside mask; chunks past WIDTH repeat the first."""
    x0 = load_rows(ptr, at, mask, 0, WIDTH, BLOCK)
    x1 = x0
    x2 = x0
    x3 = x0
    if WIDTH > BLOCK:
        x1 = load_rows(ptr, at, mask, 1, WIDTH, BLOCK)
    if WIDTH > 2 * BLOCK:
        x2 = load_rows(ptr, at, mask, 2, WIDTH, BLOCK)
    if WIDTH > 3 * BLOCK:
        x3 = load_rows(ptr, at, mask, 3, WIDTH, BLOCK)
    return x0, x1, x2, x3


@triton.jit
def inner(a0, a1, a2, a3, b0, b1, b2, b3, s, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Multiply the rows of a with those of b, and add s: fp32 [rows of a, rows of b]."""
    s = dot(a0, tl.trans(b0), s)
    if WIDTH > BLOCK:
        s = dot(a1, tl.trans(b1), s)
    if WIDTH > 2 * BLOCK:
        s = dot(a2, tl.trans(b2), s)
    if WIDTH > 3 * BLOCK:
        s = dot(a3, tl.trans(b3), s)
    return s


@triton.jit
def add_product(acc0, acc1, acc2, acc3, w, x0, x1, x2, x3, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Add w · x to the sums, chunk by chunk."""
    w = w.to(x0.dtype)
    acc0 = dot(w, x0, acc0)
    if WIDTH > BLOCK:
        acc1 = dot(w, x1, acc1)
    if WIDTH > 2 * BLOCK:
        acc2 = dot(w, x2, acc2)
    if WIDTH > 3 * BLOCK:
        acc3 = dot(w, x3, acc3)
    return acc0, acc1, acc2, acc3


@triton.jit
def not_finite(x):
    """Tell which rows of x hold NaN or an infinity, as 0 or 1."""
    return tl.max(tl.where(tl.abs(x.to(tl.float32)) < float("inf"), 0, 1), 1)


@triton.jit
def rows_not_finite(x0, x1, x2, x3, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Tell which rows hold NaN or an infinity in any chunk, as 0 or 1."""
    bad = not_finite(x0)
    if WIDTH > BLOCK:
        bad |= not_finite(x1)
    if WIDTH > 2 * BLOCK:
        bad |= not_finite(x2)
    if WIDTH > 3 * BLOCK:
        bad |= not_finite(x3)
    return bad


@triton.jit
def clear_rows(x0, x1, x2, x3, bad):
    """Put zeros in place of the rows `bad`."""
    good = (bad == 0)[:, None]
    return tl.where(good, x0, 0.0), tl.where(good, x1, 0.0), tl.where(good, x2, 0.0), tl.where(good, x3, 0.0)


@triton.jit
def store_tokens(
    ptr, acc0, acc1, acc2, acc3, offs_t, mask_t, factor, STEP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Write factor · acc, a row of STEP values per token."""
    for C in tl.static_range(4):
        if C * BLOCK < WIDTH:
            acc = acc0 if C == 0 else acc1 if C == 1 else acc2 if C == 2 else acc3
            offs = C * BLOCK + tl.arange(0, BLOCK)
            mask = mask_t[:, None] & (offs < WIDTH)[None, :]
            at = offs_t.to(tl.int64)[:, None] * STEP + offs[None, :]
            tl.store(ptr + at, (acc * factor).to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_both_ends(row_ptr, stride_rn, live, n_spans, S_kv, BLOCK_N: tl.constexpr):
    """Load starts and ends of all spans of each query, as `load_spans_of_queries` does, in one load."""
    offs_n = tl.arange(0, BLOCK_N)[None, :, None]
    there = live[:, None, None] & (offs_n < n_spans) & (tl.arange(0, 2)[None, None, :] < 2)
    ends = tl.load(row_ptr[:, None, None] + offs_n * stride_rn + tl.arange(0, 2)[None, None, :], mask=there, other=0)
    start, end = tl.split(tl.minimum(tl.maximum(ends, 0), S_kv).to(tl.int32))
    return start, tl.maximum(start, end)


@triton.jit
def add_batch(
    k0, k1, k2, k3, v0, v1, v2, v3, dk0, dk1, dk2, dk3, dv0, dv1, dv2, dv3,
    q0, q1, q2, q3, do0, do1, do2, do3, stat, scale_log2, selected, times,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Add what a batch of queries gives to dK / scale and dV.

    stat: base-2 LSE and -δ of each column, [columns, 2]. selected: which tokens each column selects; None: all. times:
    how often; None: once. Outside `selected` scores may be anything.
    """
    lse2, minus_delta = tl.split(stat)
    zero = tl.zeros([k0.shape[0], q0.shape[0]], tl.float32)
    s = inner(k0, k1, k2, k3, q0, q1, q2, q3, zero, D, BLOCK_D)
    # A sum that begins with -δ holds it in no registers of its own.
    dp = inner(v0, v1, v2, v3, do0, do1, do2, do3, zero + minus_delta[None, :], DV, BLOCK_DV)
    p = tl.exp2(s * scale_log2 - lse2[None, :])
    if times is not None:
        p *= times
    if selected is not None:
        p = tl.where(selected, p, 0.0)
    ds = p * dp
    if selected is not None:
        ds = tl.where(selected, ds, 0.0)
    # Last, so that both products are under way while the next batch is loaded.
    dv0, dv1, dv2, dv3 = add_product(dv0, dv1, dv2, dv3, p, do0, do1, do2, do3, DV, BLOCK_DV)
    dk0, dk1, dk2, dk3 = add_product(dk0, dk1, dk2, dk3, ds, q0, q1, q2, q3, D, BLOCK_D)
    return dk0, dk1, dk2, dk3, dv0, dv1, dv2, dv3
