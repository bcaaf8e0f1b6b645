"""The call that the tests of modes make: two spans in every row, small enough for Triton's interpreter."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nsa_sel
from nsa_sel import reference, selection_attention

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
BACKENDS = ("auto", "triton", "packed_sdpa", "masked_sdpa")
SDPA = ("auto", "packed_sdpa", "masked_sdpa")  # the backends that give derivatives
B, S, G, H, D, S_KV = 2, 3, 2, 4, 16, 40
SPANS = [[0, 9], [20, 37]]
L = 26
HINTS: tuple[dict[str, int], ...] = ({}, {"min_len": L, "max_len": L})

needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_differentiable = pytest.mark.parametrize("backend", SDPA)
hinted_or_not = pytest.mark.parametrize("hints", HINTS, ids=("no_hints", "hints"))


def environment() -> dict[str, str]:
    """Return the environment of a process that is to import this package, and what PYTHONPATH gives this process."""
    folders = (str(Path(nsa_sel.__file__).parents[1]), os.environ.get("PYTHONPATH"))
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}


def inputs(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, k, v and ranges."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(shape, generator=generator, dtype=torch.float32).to(DEVICE, dtype)
        for shape in ((B, S, G, H, D), (B, G, S_KV, D), (B, G, S_KV, D))
    )
    return q, k, v, torch.tensor(SPANS, device=DEVICE).expand(B, S, G, len(SPANS), 2).contiguous()


def call(backend: str, **options: Any) -> functools.partial:
    """Return selection_attention with these options."""
    return functools.partial(selection_attention, backend=backend, **options)


def plain(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor) -> Tensor:
    """Compute the operation for SPANS in operations that every mode has rules for, in the dtype of its arguments."""
    tokens = torch.cat([torch.arange(start, end, device=q.device) for start, end in SPANS])
    scores = torch.einsum("bsghd,bgtd->bsght", q, k[:, :, tokens]) * q.shape[-1] ** -0.5
    return torch.einsum("bsght,bgtd->bsghd", scores.softmax(-1), v[:, :, tokens])


def assert_right(out: Tensor, q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, atol: float = 1e-5) -> None:
    """Compare with the float64 oracle."""
    torch.testing.assert_close(out.double(), reference.oracle(q, k, v, ranges), atol=atol, rtol=0)
