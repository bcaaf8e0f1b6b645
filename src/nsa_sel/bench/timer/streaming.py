"""Two plain Triton kernels that measure the card and not the attention: a streaming read and nothing at all."""

# No `from __future__ import annotations` here: Triton 3.0 and 3.1 read the annotations as objects.
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# (elements per step, programs per SM; 0 = one program per step): which pair is the fastest depends on the size.
READ_GRIDS = ((1024, 0), (4096, 0), (4096, 4), (4096, 8), (2048, 16))


@triton.jit
def _read(x_ptr, out_ptr, n_elements, BLOCK: tl.constexpr):
    step = tl.num_programs(0) * BLOCK
    acc = tl.zeros([BLOCK], dtype=tl.int32)
    for begin in range(tl.program_id(0) * BLOCK, n_elements, step):
        offs = begin + tl.arange(0, BLOCK)
        acc |= tl.load(x_ptr + offs, mask=offs < n_elements, other=0)
    found = tl.max(acc, axis=0)
    # The buffer holds zeros, so nothing is ever written and L2 stays clean; the store only keeps the loads alive.
    tl.store(out_ptr, found, mask=found != 0)


@triton.jit
def _empty(out_ptr):
    pass


def reader(buffer: Tensor, block: int = 4096, programs_per_sm: int = 8) -> Callable[[], Any]:
    """Return a call that reads `buffer` (int32 zeros, 1-D, contiguous) once from end to end and writes nothing."""
    steps = triton.cdiv(buffer.numel(), block)
    processors = torch.cuda.get_device_properties(buffer.device).multi_processor_count
    programs = min(steps, programs_per_sm * processors) if programs_per_sm else steps
    out = torch.zeros(1, dtype=torch.int32, device=buffer.device)

    def call() -> Any:
        return _read[(programs,)](buffer, out, buffer.numel(), BLOCK=block, num_warps=4 if block < 4096 else 8)

    return call


def null_kernel() -> Callable[[], Any]:
    """Return a call that launches an empty kernel."""
    out = torch.zeros(1, dtype=torch.int32, device="cuda")

    def call() -> Any:
        return _empty[(1,)](out)

    return call
