"""Cases of prefill in which neighbouring queries select alike, or not at all: what shared tiles are measured on.

Source: docs/kernel.md, "Shared tiles".
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

BLOCKS = 16  # that a token selects, NSA's own number
KEPT = (1, 2, 3, 4, 6, 9, 14, 48, 96)  # tokens for which a block stays: from hardly any sharing to nearly all


def sizes(matrix: str) -> Iterator[dict]:
    """Yield the fields of the cases of "smoke", "hot" (NSA's own number of heads) or "full".

    First other sizes and blocks, drawn by `local` and `random`; then the degree of sharing, in two shapes.
    """
    if matrix == "smoke":
        for layout in ("local", "random", "kept2"):
            yield _sizes(layout, 4, 256, 64, 64, 3)
        return
    for H, S, block, layout in product((1, 4, 8, 16), (1024, 4096, 16_384, 32_768), (64, 128), ("local", "random")):
        if matrix == "full" or H == 16:
            yield _sizes(layout, H, S, block, 128, min(BLOCKS, S // block))
    for H, tokens in product((4, 16), KEPT):
        if matrix == "full" or H == 16:
            yield _sizes(f"kept{tokens}", H, 4096, 64, 128, BLOCKS)


def _sizes(layout: str, H: int, S: int, block: int, width: int, blocks: int) -> dict:
    G = 4 if H >= 8 else 8
    fixed = {"layout": layout, "H": H, "D": width, "Dv": width, "S": S, "S_kv": S, "block": block}
    return {**fixed, "G": G, "N": S * G, "L": blocks * block}
