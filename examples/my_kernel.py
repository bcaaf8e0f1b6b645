"""A plain kernel to start from: a program per row, which goes through the row's spans tile by tile.

pytest tests/parity --sel-kernel examples.my_kernel:my_kernel
pytest tests/perf --sel-kernel examples.my_kernel:my_kernel
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _kernel(
    q_ptr, stride_qb, stride_qs, stride_qg, stride_qh,
    k_ptr, stride_kb, stride_kg, stride_kt,
    v_ptr, stride_vb, stride_vg, stride_vt,
    ranges_ptr, stride_rb, stride_rs, stride_rg, stride_rn,
    out_ptr, scale, S, G, S_kv, n_spans,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # offsets pass 2**31
    b, s, g = row // (S * G), row // G % S, row % G
    offs_h, offs_d, offs_dv = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    mask_h, mask_d, mask_dv = offs_h < H, offs_d < D, offs_dv < DV

    q_row = q_ptr + b * stride_qb + s * stride_qs + g * stride_qg
    q = tl.load(q_row + offs_h[:, None] * stride_qh + offs_d, mask=mask_h[:, None] & mask_d, other=0.0)
    k_row = k_ptr + b * stride_kb + g * stride_kg
    v_row = v_ptr + b * stride_vb + g * stride_vg
    span = ranges_ptr + b * stride_rb + s * stride_rs + g * stride_rg

    m_i = tl.full((BLOCK_H,), float("-inf"), tl.float32)  # each head's largest logit so far
    l_i = tl.zeros((BLOCK_H,), tl.float32)  # the softmax denominator, relative to it
    acc = tl.zeros((BLOCK_H, BLOCK_DV), tl.float32)
    for _ in range(n_spans):
        start = tl.minimum(tl.maximum(tl.load(span), 0), S_kv).to(tl.int32)
        end = tl.minimum(tl.maximum(tl.load(span + 1), 0), S_kv).to(tl.int32)
        span += stride_rn
        for first in range(start, end, BLOCK_L):
            token = (first + tl.arange(0, BLOCK_L)).to(tl.int64)
            mask_l = token < end
            # Other tokens may hold NaN: they are not loaded.
            k = tl.load(k_row + token * stride_kt + offs_d[:, None], mask=mask_l & mask_d[:, None], other=0.0)
            v = tl.load(v_row + token[:, None] * stride_vt + offs_dv, mask=mask_l[:, None] & mask_dv, other=0.0)
            logits = tl.where(mask_l, tl.dot(q, k, input_precision="ieee") * scale, float("-inf"))
            m_new = tl.maximum(m_i, tl.max(logits, 1))
            weights = tl.exp(logits - m_new[:, None])
            shrink = tl.exp(m_i - m_new)
            l_i = l_i * shrink + tl.sum(weights, 1)
            acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            m_i = m_new

    out = acc / tl.where(l_i > 0, l_i, 1.0)[:, None]  # a row without tokens: 0 / 1
    out_row = out_ptr + row * H * DV
    tl.store(out_row + offs_h[:, None] * DV + offs_dv, out.to(out_ptr.dtype.element_ty), mask=mask_h[:, None] & mask_dv)


def my_kernel(q, k, v, ranges, *, scale, min_len, max_len):
    """q [B, S, G, H, D], k [B, G, S_kv, D], v [B, G, S_kv, Dv], ranges [B, S, G, n_spans, 2] -> [B, S, G, H, Dv]."""
    B, S, G, H, D = q.shape
    S_kv, Dv = v.shape[2:]
    out = torch.empty(B, S, G, H, Dv, dtype=q.dtype, device=q.device)
    blocks = [max(16, triton.next_power_of_2(size)) for size in (H, D, Dv)]  # 16: the smallest that tl.dot multiplies
    strides = [tensor.stride()[:-1] for tensor in (q, k, v, ranges)]
    if out.numel():
        _kernel[(B * S * G,)](
            q, *strides[0], k, *strides[1], v, *strides[2], ranges, *strides[3],
            out, scale, S, G, S_kv, ranges.shape[3], H, D, Dv, *blocks, BLOCK_L=32, num_stages=2,
        )  # fmt: skip
    return out


def _unsupported(q, k, v, ranges):
    widest = 512 // q.element_size()  # tiles of more do not fit into the shared memory of the smallest GPUs
    for name, size, most in (("H", q.shape[3], 64), ("D", q.shape[4], widest), ("Dv", v.shape[3], widest)):
        if size > most:
            return f"{name} is {size}, expected at most {most} in {q.dtype}"
    return None


my_kernel.unsupported = _unsupported
