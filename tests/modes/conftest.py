"""Every mode in which a framework calls the operation. Without a GPU the kernel runs in Triton's interpreter."""

from __future__ import annotations

import os

import torch

from nsa_sel.bench.compare.elsewhere import pytest_benchmark_group_stats

__all__ = ["pytest_benchmark_group_stats"]

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first import of triton
