"""A batch whose K and V lie in a paged cache, and the same batch with each sequence's K and V in one piece."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nsa_sel import reference, spans
from nsa_sel.bench.suite import gate

from .parity_case import DEVICE

NAN = float("nan")


@dataclass(eq=False)
class PagedBatch:
    """Draw sequences, and put them into shuffled pages of a cache in which everything else is NaN.

    contexts: tokens of each sequence, its S queries being the last. blocks: selected by every row, of those that its
    query sees: the first, its own, the one before, and then random ones. shared: leading tokens, whole pages of them,
    that every sequence has from the first, in the same pages.
    """

    contexts: list[int]
    page_size: int
    layout: str = "NHD"
    block_size: int = 32
    S: int = 1
    G: int = 2
    H: int = 4
    D: int = 64
    Dv: int = 64
    dtype: torch.dtype = torch.float16
    blocks: int = 4
    shared: int = 0
    room: int = 0  # tokens that every sequence has pages for, beyond its context
    seed: int = 0
    q: Tensor = field(init=False)
    selected: Tensor = field(init=False)  # blocks [B, S, G, blocks], -1 for none
    table: Tensor = field(init=False)
    caches: list[Tensor] = field(init=False)
    contiguous: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        B, page_size = len(self.contexts), self.page_size
        n_pages = -(-(max(self.contexts) + self.room) // page_size)
        own_pages = [-(-(context + self.room) // page_size) for context in self.contexts]
        order = torch.randperm(sum(own_pages) + 3, generator=generator).tolist()
        table = torch.full((B, n_pages), -1)
        for b, count in enumerate(own_pages):
            table[b, :count] = torch.tensor([order.pop() for _ in range(count)])
        table[:, : self.shared // page_size] = table[0, : self.shared // page_size]
        self.table = table.int().to(DEVICE)
        n_cache = sum(own_pages) + 3

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype).to(DEVICE)

        self.q = draw(B, self.S, self.G, self.H, self.D)
        by_layout = (page_size, self.G) if self.layout == "NHD" else (self.G, page_size)
        self.caches, self.contiguous = [], []
        for width in (self.D, self.Dv):
            whole = draw(B, self.G, n_pages * page_size, width)
            whole[:, :, : self.shared] = whole[:1, :, : self.shared]
            cache = torch.full((n_cache, *by_layout, width), NAN, dtype=self.dtype, device=DEVICE)
            for b, context in enumerate(self.contexts):
                self._fill(cache, whole, b, 0, context)
            self.caches.append(cache)
            self.contiguous.append(whole)
        self.selected = torch.full((B, self.S, self.G, self.blocks), -1)
        for b, s, g in itertools.product(range(B), range(self.S), range(self.G)):
            own = (self.sees(b, s) - 1) // self.block_size
            if own >= 0:
                others = torch.randperm(own + 1, generator=generator).tolist()
                picked = list(dict.fromkeys([0, own, max(own - 1, 0), *others]))[: self.blocks]
                self.selected[b, s, g, : len(picked)] = torch.tensor(picked)
        self.selected = self.selected.int().to(DEVICE)

    def sees(self, b: int, s: int) -> int:
        """Return how many tokens a query sees."""
        return max(self.contexts[b] - self.S + s + 1, 0)

    def _fill(self, cache: Tensor, whole: Tensor, b: int, first: int, end: int) -> None:
        for t in range(first, end):
            page, place = int(self.table[b, t // self.page_size]), t % self.page_size
            if self.layout == "NHD":
                cache[page, place] = whole[b, :, t]
            else:
                cache[page, :, place] = whole[b, :, t]

    def grow(self) -> None:
        """Let every sequence have one more token, in the pages that it has."""
        for cache, whole in zip(self.caches, self.contiguous, strict=True):
            for b, context in enumerate(self.contexts):
                self._fill(cache, whole, b, context, context + 1)
        self.contexts = [context + 1 for context in self.contexts]

    @property
    def context(self) -> Tensor:
        """Return what every query sees: [B, S, 1, 1]."""
        seen = [[self.sees(b, s) for s in range(self.S)] for b in range(len(self.contexts))]
        return torch.tensor(seen, device=DEVICE)[..., None, None]

    def ranges(self, table: Tensor | None = None) -> Tensor:
        """Return the ranges over the cache, by another table if one is given."""
        table = self.table if table is None else table
        return spans.paged_ranges(
            self.selected, self.block_size, table, self.page_size, self.context, layout=self.layout
        )

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return q, k, v and ranges as a server has them."""
        k, v = (spans.paged_view(cache, len(self.contexts), self.layout) for cache in self.caches)
        return self.q, k, v, self.ranges()

    def in_one_piece(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return q, k, v and ranges of the same call without pages."""
        return self.q, *self.contiguous, spans.block_ranges(self.selected, self.block_size, self.context)

    def verdict(self, out: Tensor) -> gate.GateResult:
        """Put a result through the gate, whose oracle knows no pages."""
        inputs = self.in_one_piece()
        return gate.check(out, reference.oracle(*inputs), reference.packed_sdpa(*inputs), dtype=self.dtype)
