"""Seeded tensors and spans of a case, and the bytes that it must move."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import spans
from . import pages
from .cases import ELEMENT_BYTES, Case
from .recorded import kept_tensors

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Inputs:
    """Hold a case's arguments: q [B,S,G,H,D], k [B,G,S_kv,D], v [B,G,S_kv,Dv], ranges int32 [B,S,G,n_spans,2].

    min_len, max_len: the shortest and the longest row's L, known without a device sync.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    ranges: Tensor
    min_len: int
    max_len: int


def make_inputs(case: Case, device: torch.device | str) -> Inputs:
    """Draw the case's tensors from N(0, 1) on the device, in its dtype, with its fixed seed; or read recorded ones.

    Raises: RecordingError if the recorded call is gone or another.
    """
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(case.seed)
    dtype = TORCH_DTYPES[case.dtype]

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    call = None if case.recorded is None else case.recorded.open()
    kept = None if call is None else kept_tensors(call)
    if kept is not None:
        q, k, v = (x.to(device) for x in kept)
    elif case.pages:
        q, cache_shape = draw(case.B, case.S, case.G, case.H, case.D), pages.cache_shape(case)
        k, v = (spans.paged_view(draw(*cache_shape, width), case.B, pages.kind(case)[0]) for width in (case.D, case.Dv))
    else:
        q = draw(case.B, case.S, case.G, case.H, case.D)
        k = draw(case.B, case.G, case.S_kv, case.D)
        v = draw(case.B, case.G, case.S_kv, case.Dv)
    ranges = make_ranges(case)
    length = spans.lengths(ranges, k.shape[2])
    return Inputs(q, k, v, ranges.to(device), int(length.min()), int(length.max()))


def make_ranges(case: Case) -> Tensor:
    """Draw the case's spans on the CPU: int32 [B, S, G, n_spans, 2], the same on every machine."""
    pairs = case.distribution.draw(case, torch.Generator().manual_seed(case.seed))
    return pairs.reshape(case.B, case.S, case.G, case.n_spans, 2).int()


def traffic(inputs: Inputs) -> tuple[int, int]:
    """Return (bytes, bytes_rows), with one sync.

    Both count q, out and ranges once; `bytes` adds the distinct K and V tokens, `bytes_rows` every row's tokens.
    Source: docs/measuring.md, "Bytes and the read limit".
    """
    q, k, v, ranges = inputs.q, inputs.k, inputs.v, inputs.ranges
    B, S, G = ranges.shape[:3]
    starts, ends = (x.transpose(1, 2).reshape(B, G, -1) for x in spans.clamp(ranges, k.shape[2]))
    every = (ends - starts).sum()
    starts, in_order = starts.sort(-1)
    ends = ends.gather(-1, in_order)
    reached = F.pad(ends.cummax(-1).values[..., :-1], (1, 0))  # by the spans that begin before
    distinct, every = torch.stack(((ends - starts.maximum(reached)).clamp(min=0).sum(), every)).tolist()
    per_token = (k.shape[3] + v.shape[3]) * k.element_size()
    out = B * S * G * q.shape[3] * v.shape[3] * q.element_size()
    fixed = q.numel() * q.element_size() + out + ranges.numel() * ranges.element_size()
    return distinct * per_token + fixed, every * per_token + fixed


def memory_estimate(case: Case, packed: bool = True) -> int:
    """Return the bytes of device memory that a case needs at its peak.

    These are its tensors and, where its rows are packed, every packed row twice and the indices that gather them.
    """
    size = ELEMENT_BYTES[case.dtype]
    tokens = case.B * case.G * case.S_kv * (case.D + case.Dv) * size
    packing = case.N * case.longest * (2 * (case.D + case.Dv) * size + 4 * 8)
    rows = case.N * case.H * (case.D + 2 * case.Dv) * size
    return tokens + rows + (packing if packed else 0)
