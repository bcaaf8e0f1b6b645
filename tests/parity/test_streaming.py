"""The kernel that reads memory for the calibration, where the parity suite runs."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from nsa_sel.kernel.device import INTERPRETED

from .parity_case import DEVICE, ON_GPU


@pytest.mark.skipif(not ON_GPU and not INTERPRETED, reason="neither a GPU nor the interpreter")
@pytest.mark.skipif(
    importlib.metadata.version("triton").startswith("3.0."), reason="its interpreter ignores the mask of a scalar store"
)
@pytest.mark.parametrize("n", (3 * 4096, 1000))
def test_the_streaming_kernel_reads_every_element_and_writes_nothing_for_zeros(n):
    from nsa_sel.bench.timer import streaming

    x, out = (torch.zeros(size, dtype=torch.int32, device=DEVICE) for size in (n, 1))
    for at in (None, 0, n // 2, n - 1):
        x.zero_()
        out.fill_(-1)
        if at is not None:
            x[at] = 7
        streaming._read[(3,)](x, out, n, BLOCK=1024)
        assert out.item() == (-1 if at is None else 7), at
