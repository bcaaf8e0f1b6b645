"""Seeded tensors and span layouts of a case, and the bytes that it must move."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ... import spans
from .cases import ELEMENT_BYTES, Case, ragged_lengths

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
    """Draw the case's tensors from N(0, 1) on the device, in its dtype, with its fixed seed."""
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(case.seed)
    dtype = TORCH_DTYPES[case.dtype]

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    q = draw(case.B, case.S, case.G, case.H, case.D)
    k = draw(case.B, case.G, case.S_kv, case.D)
    v = draw(case.B, case.G, case.S_kv, case.Dv)
    ranges = make_ranges(case).to(device)
    shortest = case.L
    if case.family == "ragged":
        shortest = ragged_lengths(case)[0]
    elif case.family == "prefill":
        shortest = 1
    return Inputs(q, k, v, ranges, shortest, case.longest)


def make_ranges(case: Case) -> Tensor:
    """Draw the case's spans on the CPU: int32 [B, S, G, n_spans, 2], the same on every machine."""
    generator = torch.Generator().manual_seed(case.seed)
    if case.family == "prefill":
        return _causal_blocks(case, generator)
    if case.block:
        return _decode_blocks(case, generator)
    if case.family == "ragged":
        L = torch.tensor(ragged_lengths(case))[torch.randperm(case.N, generator=generator)]
        pairs = torch.stack((torch.zeros_like(L), L), -1)[:, None]
    elif case.layout == "few":
        pairs = torch.tensor([0, case.L]).expand(case.N, 1, 2)
    elif case.layout == "many":
        pairs = _equal_spans(case, generator)
    else:
        pairs = _mixed_spans(case, generator)
    return pairs.reshape(case.B, case.S, case.G, case.n_spans, 2).int()


def traffic(inputs: Inputs) -> tuple[int, int]:
    """Return (bytes, bytes_rows), with one sync.

    Both count q, out and ranges once; `bytes` adds the distinct K and V tokens, `bytes_rows` every row's tokens.
    Source: docs/measuring.md, "Bytes and the read limit".
    """
    q, k, v, ranges = inputs.q, inputs.k, inputs.v, inputs.ranges
    B, S, G = ranges.shape[:3]
    S_kv = k.shape[2]
    starts, ends = (x.transpose(1, 2).reshape(B, G, -1) for x in spans.clamp(ranges, S_kv))
    edges = torch.zeros(B, G, S_kv + 1, dtype=torch.int32, device=k.device)
    one = torch.ones_like(starts, dtype=torch.int32)
    covered = edges.scatter_add(-1, starts, one).scatter_add(-1, ends, -one).cumsum(-1) > 0
    distinct, every = torch.stack((covered.sum(), (ends - starts).sum())).tolist()
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


def _equal_spans(case: Case, generator: torch.Generator) -> Tensor:
    """Put one span into each equal part of the context, at a random offset in it: [N, n_spans, 2]."""
    length, part = case.L // case.n_spans, case.S_kv // case.n_spans
    offset = torch.randint(part - length + 1, (case.N, case.n_spans), generator=generator)
    starts = torch.arange(case.n_spans) * part + offset
    return torch.stack((starts, starts + length), -1)


def _mixed_spans(case: Case, generator: torch.Generator) -> Tensor:
    """Cut each row's L into 2, 4 or 8 random parts and spread them, in order and without overlap: [N, 8, 2]."""
    N, most = case.N, case.n_spans
    count = 2 ** torch.randint(1, 4, (N, 1), generator=generator)
    # Distinct cut points of 1..L-1; those beyond count - 1 move to L and leave empty spans.
    cuts = torch.rand(N, case.L - 1, generator=generator).topk(most - 1, -1).indices + 1
    cuts = torch.where(torch.arange(most - 1) < count - 1, cuts, case.L).sort(-1).values
    stops = torch.cat((cuts, torch.full((N, 1), case.L)), -1)
    begins = torch.cat((torch.zeros(N, 1, dtype=torch.long), cuts), -1)
    gaps = torch.randint(case.S_kv - case.L + 1, (N, most), generator=generator).sort(-1).values
    return torch.stack((begins + gaps, stops + gaps), -1)


def _decode_blocks(case: Case, generator: torch.Generator) -> Tensor:
    """Choose L/64 blocks per row: adjacent ones (few), or the first, the last and random others (many, mixed)."""
    n_blocks, n_sel = case.S_kv // case.block, case.n_spans
    shape = (case.B, case.S, case.G)
    if case.layout == "few":
        first = torch.randint(n_blocks - n_sel + 1, (*shape, 1), generator=generator)
        blocks = first + torch.arange(n_sel)
    else:
        score = torch.rand(*shape, n_blocks, generator=generator)
        score[..., 0] = score[..., -1] = 2.0
        blocks = score.topk(n_sel, -1).indices.sort(-1).values
    return spans.block_ranges(blocks, case.block, case.S_kv)


def _causal_blocks(case: Case, generator: torch.Generator) -> Tensor:
    """Choose the first and the own block and random earlier ones for every (b, s, g), clamped to the tokens up to s."""
    position = torch.arange(case.S)[:, None, None]  # [S, 1, 1]
    own = position // case.block
    number = torch.arange(case.S_kv // case.block)
    score = torch.rand(case.B, case.S, case.G, len(number), generator=generator)
    score = torch.where((number == 0) | (number == own), 2.0, score).masked_fill(number > own, -1.0)
    best = score.topk(case.n_spans, -1)
    blocks = torch.where(best.values < 0, -1, best.indices).sort(-1).values
    return spans.block_ranges(blocks, case.block, position + 1)
