"""Cases of servers: K and V in pages, several query tokens per sequence, contexts of every length.

Each case with pages has a twin without: the same sizes and selection, K and V of each sequence in one piece.
Source: docs/serving.md.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from ... import spans

KINDS = ("", "NHD16", "NHD64", "NHD256", "HND64")  # layout of a cache and tokens of its pages; blocks have 64
_KIND = re.compile(r"([A-Z]+)([1-9][0-9]*)")


class Shape(Protocol):
    """What this module asks of a `Case`."""

    @property
    def B(self) -> int: ...
    @property
    def G(self) -> int: ...
    @property
    def S_kv(self) -> int: ...
    @property
    def block(self) -> int: ...
    @property
    def pages(self) -> str: ...


def sizes(matrix: str) -> Iterator[dict]:
    """Yield the fields of the cases of "smoke", "hot" or "full"; the last two are the same."""
    kinds = ("", "NHD16", "NHD64", "NHD128", "HND64") if matrix == "smoke" else KINDS
    for layout, H, D, Dv, L, S, batch, context, own_kinds in _SMOKE if matrix == "smoke" else _FULL:
        G = 2 if matrix == "smoke" else 4
        fixed = {"layout": layout, "H": H, "D": D, "Dv": Dv, "L": L, "S": S, "G": G, "S_kv": context, "block": 64}
        for pages in own_kinds or kinds:
            yield {**fixed, "N": batch * S * G, "pages": pages}


_FEW = ("", "NHD64", "HND64")
# Distribution, H, D, Dv, L, S, batch, context, and kinds of pages if not all.
_FULL = (
    *(("random", 16, 128, 128, 1024, 1, batch, 8192, ()) for batch in (1, 8, 64)),
    ("random", 16, 192, 128, 1024, 1, 8, 8192, _FEW),
    *(("random", 16, 128, 128, 1024, S, batch, 8192, _FEW) for S, batch in itertools.product((2, 4, 8), (1, 8))),
    *(("unequal", 16, 128, 128, 1024, 1, batch, 65_536, _FEW) for batch in (8, 32)),
    ("unequal", 16, 128, 128, 1024, 4, 8, 65_536, _FEW),
)
_SMOKE = (
    ("random", 4, 64, 64, 128, 1, 2, 512, ()),
    ("random", 4, 64, 64, 128, 3, 1, 512, _FEW),
    ("unequal", 4, 64, 64, 192, 1, 3, 512, _FEW),
)


def kind(shape: Shape) -> tuple[str, int]:
    """Return the layout of a case's cache and the tokens of a page.

    Raises: ValueError if its pages are no layout and size, or if a context is no whole number of them.
    """
    found = _KIND.fullmatch(shape.pages)
    if found is None or found[1] not in spans.PAGE_LAYOUTS or shape.S_kv % int(found[2]):
        raise ValueError(f"pages: value is {shape.pages!r}, expected such as NHD64, and contexts of whole pages")
    return found[1], int(found[2])


def per_block(shape: Shape) -> int:
    """Return how many spans a block becomes."""
    return spans.pages_per_block(shape.block, kind(shape)[1])


def cache_shape(shape: Shape) -> tuple[int, int, int]:
    """Return the shape of a case's cache without its width: as many pages as its contexts have together."""
    layout, page_size = kind(shape)
    n_pages = shape.B * shape.S_kv // page_size
    return (n_pages, page_size, shape.G) if layout == "NHD" else (n_pages, shape.G, page_size)


def ranges(shape: Shape, blocks: Tensor, context: Tensor) -> Tensor:
    """Turn block numbers [B, S, G, n] of contexts [B or 1, S, 1, 1] into ranges over shuffled pages."""
    layout, page_size = kind(shape)
    n_pages = shape.B * shape.S_kv // page_size
    table = torch.randperm(n_pages, generator=torch.Generator().manual_seed(n_pages)).view(shape.B, -1)
    return spans.paged_ranges(blocks, shape.block, table, page_size, context, layout=layout)
