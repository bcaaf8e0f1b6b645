"""What the contract's tests run a kernel on: sizes and rows that it takes, where a test is about something else."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_sel import spans
from nsa_sel.bench.suite.kernels import UserKernel

from . import given_kernel
from .parity_case import Case, check, here, rows, tensors

SIZES = ((4, 64, 64), (16, 64, 64), (8, 128, 128), (16, 128, 128), (16, 192, 128), (1, 64, 64), (1, 128, 128))
USUAL = [
    {"dtype": dtype, "H": H, "D": D, "Dv": Dv}
    for dtype, (H, D, Dv) in itertools.product((torch.bfloat16, torch.float16, torch.float32), SIZES)
]
left_out: list[str] = []  # why drawn cases of the test that runs were not compared


def usual(**asked: Any) -> dict[str, Any]:
    """Return `asked` and, for what it leaves open, the dtype and sizes in which the kernel under test is tested."""
    kernel = given_kernel.under_test
    return asked if kernel is None else {**_usual(kernel), **asked}


def ordinary(ranges: Tensor, S_kv: int, **asked: Any) -> Case:
    """Return the case of a test that is about other things than which tokens are selected.

    A given kernel that takes blocks gets blocks of its size; another one those of the rows that it does not declare
    unsupported, so that an overlap in one row does not keep the others from being tested.
    """
    kernel = given_kernel.under_test
    if kernel is None:
        return Case(ranges, S_kv, **asked)
    if kernel.block_size:
        return Case(*block_rows(kernel.block_size), **usual(**asked))
    each = [Case(ranges[:, s : s + 1], S_kv, **_usual(kernel)) for s in range(ranges.shape[1])]
    taken = [case.ranges for case in each if kernel.unsupported(*tensors(case)) is None]
    return Case(torch.cat(taken, 1) if taken else ranges, S_kv, **usual(**asked))


def check_drawn(case: Case) -> None:
    """Check one of many drawn cases; one that a given kernel declares unsupported is left out."""
    asked = {} if case.dtype == torch.bfloat16 else {"dtype": case.dtype}
    try:
        check(replace(case, **usual(**asked)))
    except pytest.skip.Exception as skipped:
        left_out.append(str(skipped))


def block_rows(block: int) -> tuple[Tensor, int]:
    """Return five rows of blocks [1, 5, 1, 3, 2], none of which selects block 2, and a context of five and a half."""
    S_kv = 5 * block + (block + 1) // 2
    chosen = torch.tensor([[0, 5, -1], [3, -1, -1], [-1, -1, -1], [4, 1, 0], [5, -1, -1]])
    return spans.block_ranges(chosen[None, :, None], block, positions(5, S_kv)), S_kv


def positions(S: int, S_kv: int) -> Tensor:
    """Return how many tokens each of the last S tokens of a context sees, itself included: [1, S, 1, 1]."""
    return torch.arange(S_kv - S + 1, S_kv + 1).view(1, S, 1, 1)


def block_size() -> int:
    """Return the size of the blocks that the kernel under test takes; if it takes ranges, one that is soon tested."""
    kernel = given_kernel.under_test
    return kernel.block_size if kernel is not None and kernel.block_size else here(64, 16)


@cache
def _usual(kernel: UserKernel) -> dict[str, Any]:
    """Return the first of USUAL that the kernel does not declare unsupported, or the first."""
    length = kernel.block_size or 64
    cases = [Case(rows([(0, length)]), length, **sizes) for sizes in USUAL]
    supported = (u for u, case in zip(USUAL, cases, strict=True) if kernel.unsupported(*tensors(case)) is None)
    return next(supported, USUAL[0])
