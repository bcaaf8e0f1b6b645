"""A small transformer whose attention selects blocks of keys by the top-k of pooled scores, beside its own block."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsa_sel import selection_attention, spans

VOCABULARY, WIDTH, LAYERS, LONGEST = 24, 64, 2, 96
G, H, D = 2, 2, 16
BLOCK, CHOSEN = 8, 2
MAX_LEN = (CHOSEN + 1) * BLOCK  # of a row: the chosen blocks and the token's own


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, G * (H + 2) * D, bias=False)
        self.out = nn.Linear(G * H * D, WIDTH, bias=False)

    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None, attend: Any, blocks: Tensor | None) -> Any:
        """Return the result, and the blocks that were selected if none are given."""
        B, S, _ = x.shape
        q, k, v = self.qkv(x).view(B, S, G, H + 2, D).split((H, 1, 1), 3)
        k, v = (t.squeeze(3).transpose(1, 2) for t in (k, v))
        if cache is not None:
            k, v = cache.append(k, v, positions)
        if blocks is None:
            blocks = select(q.detach(), k.detach(), positions)
        ranges = spans.block_ranges(blocks, BLOCK, positions.view(1, S, 1, 1) + 1)
        return self.out(attend(q, k.contiguous() if cache is None else k, v, ranges).flatten(2)), blocks


def select(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    """Choose for every row the blocks before its own whose pooled keys score best: [B, S, G, CHOSEN + 1]."""
    n_blocks = -(-k.shape[2] // BLOCK)
    pooled = F.pad(k.float(), (0, 0, 0, n_blocks * BLOCK - k.shape[2])).unflatten(2, (n_blocks, BLOCK)).mean(3)
    scores = torch.einsum("bsghd,bgnd->bsgn", q.float(), pooled)
    own = (positions // BLOCK).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    scores = scores.masked_fill(torch.arange(n_blocks, device=q.device) >= own, -torch.inf)
    best, at = F.pad(scores, (0, CHOSEN), value=-torch.inf).topk(CHOSEN)
    return torch.cat((torch.where(best > -torch.inf, at, -1), own), -1).int()


class Cache:
    """Keys and values of one layer. growing: hand out what is filled, else the whole buffers."""

    def __init__(self, B: int, dtype: torch.dtype, device: str, growing: bool) -> None:
        self.k, self.v = (torch.zeros(B, G, LONGEST, D, dtype=dtype, device=device) for _ in range(2))
        self.growing, self.filled = growing, 0

    def append(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        self.k.index_copy_(2, positions, k.to(self.k.dtype))
        self.v.index_copy_(2, positions, v.to(self.v.dtype))
        if not self.growing:
            return self.k, self.v
        self.filled += k.shape[2]
        return self.k[:, :, : self.filled], self.v[:, :, : self.filled]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.attentions = nn.ModuleList(Attention() for _ in range(LAYERS))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
            for _ in range(LAYERS)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS + 1))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(
        self, tokens: Tensor, positions: Tensor, attend: Any, caches: Any = None, blocks: Any = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Return logits [B, S, VOCABULARY] and the blocks that every layer selected."""
        x = self.tokens(tokens) + self.places(positions)
        selected = []
        for i in range(LAYERS):
            cache, given = None if caches is None else caches[i], None if blocks is None else blocks[i]
            y, of_layer = self.attentions[i](self.norms[i](x), positions, cache, attend, given)
            x = x + y
            x = x + self.mlps[i](x)
            selected.append(of_layer)
        return self.head(self.norms[LAYERS](x)), selected


def attend(backend: str, **hints: int) -> Any:
    """Return the attention of the model, by one backend."""
    return functools.partial(selection_attention, backend=backend, **hints)


def sequences(n: int, length: int, seed: int) -> Tensor:
    """Return random patterns of 16 tokens, repeated: int64 [n, length]. What follows can be copied from before."""
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.randint(VOCABULARY, (n, 16), generator=generator)
    return pattern.repeat(1, -(-length // 16))[:, :length]
