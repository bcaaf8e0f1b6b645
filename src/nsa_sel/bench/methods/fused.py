"""packed SDPA whose packing is one Triton kernel: the least work that an SDPA form can have in a call.

The kernel copies K and V of every row in one launch and, where rows have different lengths, writes the mask in the form
that SDPA adds to its scores, so that SDPA has nothing to convert.
Source: docs/measuring.md, "Scopes".
"""

# No `from __future__ import annotations` here: Triton 3.0 and 3.1 read the annotations as objects.
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ...kernel.device import gpu_of
from ...kernel.direct import Direct, direct_launch, works
from ...kernel.kv import MAX_KEPT, remember
from ...kernel.launch_config import span_bucket
from ...kernel.tiles import load_spans
from ...reference import MAX_SDPA_BATCH, aligned
from ..suite.cases import Case
from ..suite.inputs import TORCH_DTYPES
from .contender import MASK_ALIGNMENT, MASKED

CHUNK_N = tl.constexpr(64)  # spans that are compared with every token of a tile at a time
LARGEST_TILE, SMALLEST_TILE = 64, 16  # tokens
WIDEST_COPY = 128  # columns
PROGRAMS_PER_SM = 8  # below it tiles are made smaller: a program waits for memory most of its time
NUM_WARPS = 4

SIZE_ARGS = ["S", "G", "S_kv", "n_spans", "max_len", "mask_width"]
STRIDE_ARGS = [
    f"stride_{tensor}{axis}" for tensor, axes in (("k", "bgt"), ("v", "bgt"), ("r", "bsgn")) for axis in axes
]


@triton.jit
def _tokens_in(start, end, before, position):
    """Return, for each position that lies in one of these spans, the token there, else 0; and the spans' total length.

    before: the packed position at which the first of these spans begins.
    """
    length = end - start
    stop = before + tl.cumsum(length, 0)
    here = ((stop - length)[:, None] <= position[None, :]) & (position[None, :] < stop[:, None])
    token = tl.sum(tl.where(here, position[None, :] + (end - stop)[:, None], 0), axis=0)
    return token, tl.sum(length)


@triton.jit
def _copy(src, dst, token, position, load_l, store_l, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Copy tokens to positions, BLOCK columns at a time; outside load_l zeros are stored."""
    for c in tl.static_range(WIDTH // BLOCK):
        offs = c * BLOCK + tl.arange(0, BLOCK)
        tile = tl.load(src + token[:, None] + offs[None, :], mask=load_l[:, None], other=0.0)
        tl.store(dst + position[:, None] * WIDTH + offs[None, :], tile, mask=store_l[:, None])


@triton.jit(do_not_specialize=SIZE_ARGS + STRIDE_ARGS)
def _pack_rows(
    k_ptr, v_ptr, ranges_ptr, k_rows_ptr, v_rows_ptr, mask_ptr,
    S, G, S_kv: tl.int32, n_spans: tl.int32, max_len, mask_width,
    stride_kb, stride_kg, stride_kt,
    stride_vb, stride_vg, stride_vt,
    stride_rb, stride_rs, stride_rg, stride_rn,
    D: tl.constexpr, DV: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Pack K or V of one tile of one row: program (row (b·S + s)·G + g, tile, 0 for K and the mask or 1 for V).

    Strides of k and v come divided by UNIT, so that the compiler knows what divides them. WIDE: positions in a row take
    64 bits. Positions past the row's end repeat its last token; an empty row becomes zeros, so that it attends to a
    value of zero.
    """
    row = tl.program_id(0)
    b, s, g = (row // (S * G)).to(tl.int64), (row // G % S).to(tl.int64), (row % G).to(tl.int64)
    row_ptr = ranges_ptr + b * stride_rb + s * stride_rs + g * stride_rg
    step_rn = stride_rn.to(tl.int64)
    first = tl.program_id(1) * BLOCK_L
    offs_l = first + tl.arange(0, BLOCK_L)
    if BLOCK_N == 1:
        start, end = load_spans(row_ptr, step_rn, 0, n_spans, S_kv, WIDE)
        n_tokens = end - start
        token = start + tl.minimum(offs_l, n_tokens - 1)
    else:
        offs_n = tl.arange(0, BLOCK_N)
        start, end = load_spans(row_ptr, step_rn, offs_n, n_spans, S_kv, WIDE)
        n_tokens = tl.sum(end - start)
        position = tl.minimum(offs_l, n_tokens - 1)
        if BLOCK_N <= CHUNK_N:
            token, _ = _tokens_in(start, end, 0, position)
        else:  # of many spans, only those that reach into the tile
            stop = tl.cumsum(end - start, 0)
            last = tl.minimum(first + BLOCK_L, n_tokens)
            low = tl.sum((stop <= tl.minimum(first, n_tokens - 1)).to(tl.int32))
            high = tl.sum((stop - (end - start) < last).to(tl.int32))
            before = tl.sum(tl.where(offs_n < low, end - start, 0))
            token = position * 0
            for c in range(0, tl.cdiv(high - low, CHUNK_N)):
                offs_c = low + c * CHUNK_N + tl.arange(0, CHUNK_N)
                start_c, end_c = load_spans(row_ptr, step_rn, offs_c, n_spans, S_kv, WIDE)
                here, length = _tokens_in(start_c, end_c, before, position)
                token += here
                before += length
    store_l = offs_l < max_len
    load_l = store_l & (tl.full([BLOCK_L], n_tokens, n_tokens.dtype) > 0)  # as a block: see merge_parts
    token = token.to(tl.int64)
    row_start = row.to(tl.int64) * max_len
    at = offs_l.to(tl.int64)
    if tl.program_id(2) == 0:
        src = k_ptr + (b * stride_kb + g * stride_kg) * UNIT
        _copy(src, k_rows_ptr + row_start * D, token * stride_kt * UNIT, at, load_l, store_l, D, BLOCK_D)
        if mask_ptr is not None:
            mask = tl.where(offs_l < n_tokens, 0.0, MASKED).to(mask_ptr.dtype.element_ty)
            tl.store(mask_ptr + row.to(tl.int64) * mask_width + offs_l, mask, mask=offs_l < mask_width)
    else:
        src = v_ptr + (b * stride_vb + g * stride_vg) * UNIT
        _copy(src, v_rows_ptr + row_start * DV, token * stride_vt * UNIT, at, load_l, store_l, DV, BLOCK_DV)


@dataclass(frozen=True)
class Packing:
    """Name one packing kernel: everything that it is specialised on. n_spans: the most spans per row that it takes."""

    dtype: str
    D: int
    Dv: int
    n_spans: int
    block_l: int
    masked: bool


def packing_of(case: Case, device: torch.device) -> Packing:
    """Return the kernel that packs a case's rows."""
    block_l = tile_tokens(case.N, case.longest, device)
    return Packing(case.dtype, case.D, case.Dv, span_bucket(case.n_spans), block_l, not case.one_length)


def tile_tokens(N: int, max_len: int, device: torch.device) -> int:
    """Return how many tokens of its row a program packs: fewer where there would be too few programs."""
    enough, block_l = PROGRAMS_PER_SM * gpu_of(device).sm_count, LARGEST_TILE
    while block_l > SMALLEST_TILE and 2 * N * triton.cdiv(max_len, block_l) < enough:
        block_l //= 2
    return block_l


def pack_empty_row(kernel: Packing) -> None:
    """Launch a packing kernel on the GPU, with the alignment and types of the timing, for one empty row."""
    k, v, ranges = empty_row(kernel, "cuda")
    mask = torch.empty_like(k) if kernel.masked else None
    launch = Launch(k, v, ranges, LARGEST_TILE, kernel.block_l)
    launch.run(k, v, ranges, torch.empty_like(k), torch.empty_like(v), mask)


def empty_row(kernel: Packing, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return k, v and ranges that select nothing, with what a packing kernel is specialised on."""
    dtype = TORCH_DTYPES[kernel.dtype]
    k, v = (torch.zeros(1, 1, LARGEST_TILE, width, dtype=dtype, device=device) for width in (kernel.D, kernel.Dv))
    return k, v, torch.zeros(1, 1, 1, kernel.n_spans, 2, dtype=torch.int32, device=device)


class Launch:
    """Hold what the pointers of a call do not change: the grid, the kernel's other arguments, the short way to it."""

    def __init__(self, k: Tensor, v: Tensor, ranges: Tensor, max_len: int, block_l: int) -> None:
        B, S, G, n_spans, _ = ranges.shape
        S_kv, D, Dv = k.shape[2], k.shape[3], v.shape[3]
        strides = [x.stride(axis) if x.shape[axis] > 1 else 0 for x in (k, v) for axis in range(3)]
        unit = 16 if all(stride % 16 == 0 for stride in strides) else 1
        self.mask_width = -(-max_len // MASK_ALIGNMENT) * MASK_ALIGNMENT
        self.grid = (B * S * G, triton.cdiv(max_len, block_l), 2)
        self.values = (
            S, G, S_kv, n_spans, max_len, self.mask_width,
            *(stride // unit for stride in strides), *ranges.stride()[:4],
            D, Dv, unit, n_spans * S_kv >= 2**31 - block_l, min(D & -D, WIDEST_COPY), min(Dv & -Dv, WIDEST_COPY),
            block_l, span_bucket(n_spans), MASKED,
        )  # fmt: skip
        self.direct: Direct | None = None

    def run(self, k: Tensor, v: Tensor, ranges: Tensor, k_rows: Tensor, v_rows: Tensor, mask: Tensor | None) -> None:
        aligned_all = not (k.data_ptr() | v.data_ptr() | ranges.data_ptr()) & 15
        if self.direct is not None and aligned_all:
            launch, head, one_tuple, _, _ = self.direct
            arguments = (
                k.data_ptr(), v.data_ptr(), ranges.data_ptr(), k_rows.data_ptr(), v_rows.data_ptr(),
                None if mask is None else mask.data_ptr(), *self.values,
            )  # fmt: skip
            stream = torch._C._cuda_getCurrentRawStream(k.device.index)
            if one_tuple:
                launch(*self.grid, stream, *head, arguments)
            else:
                launch(*self.grid, stream, *head, *arguments)
            return
        compiled = _pack_rows[self.grid](k, v, ranges, k_rows, v_rows, mask, *self.values, num_warps=NUM_WARPS)
        if aligned_all and works(k.device):
            self.direct = direct_launch(compiled)


_launches: dict[tuple, Launch] = {}


def packed_sdpa_fused(
    q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, *, scale: float | None = None, min_len: int, max_len: int
) -> Tensor:
    """Compute the operation as `reference.packed_sdpa` does, packing in one launch; no gradients, no device sync.

    min_len, max_len: the shortest and the longest row's L. Equal: no mask. Tensors on the current CUDA device.
    """
    B, S, G, H, D = q.shape
    Dv = v.shape[3]
    if max_len == 0 or k.shape[2] == 0 or q.numel() == 0:
        return q.new_zeros(B, S, G, H, Dv)
    k_rows, v_rows, mask = pack_rows(k, v, ranges, min_len, max_len)
    q_rows = aligned(q.reshape(B * S * G, 1, H, D))
    return _sdpa(q_rows, k_rows, v_rows, mask, scale).reshape(B, S, G, H, Dv)


def pack_rows(k: Tensor, v: Tensor, ranges: Tensor, min_len: int, max_len: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Pack every row: K [N, 1, max_len, D], V [N, 1, max_len, Dv], and what SDPA adds, [N, 1, 1, max_len] or None.

    N = B·S·G; rows are in (b, s, g) order, in which neither q nor the result is copied. max_len and S_kv must be at
    least 1.
    """
    N = ranges.shape[0] * ranges.shape[1] * ranges.shape[2]
    k_rows = k.new_empty((N, 1, max_len, k.shape[3]))
    v_rows = v.new_empty((N, 1, max_len, v.shape[3]))
    key = (
        k.shape, v.shape, ranges.shape, k.stride(), v.stride(), ranges.stride(), k.dtype, ranges.dtype, k.device,
        min_len != max_len, max_len,
    )  # fmt: skip
    launch = _launches.get(key)
    if launch is None:
        made = Launch(k, v, ranges, max_len, tile_tokens(N, max_len, k.device))
        launch = remember(_launches, key, made, MAX_KEPT)
    mask = None if min_len == max_len else k.new_empty((N, 1, 1, launch.mask_width))
    launch.run(k, v, ranges, k_rows, v_rows, mask)
    return k_rows, v_rows, mask if mask is None else mask[..., :max_len]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Call SDPA on q [N, 1, H, D] and packed rows, in parts where N is more than its kernels take."""
    if q.shape[0] <= MAX_SDPA_BATCH:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    parts = [slice(at, at + MAX_SDPA_BATCH) for at in range(0, q.shape[0], MAX_SDPA_BATCH)]
    return torch.cat([_sdpa(q[p], k[p], v[p], mask if mask is None else mask[p], scale) for p in parts])
