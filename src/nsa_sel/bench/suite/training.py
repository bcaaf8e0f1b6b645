"""Cases of training: prefill of NSA's own kind, each as its forward pass, its backward pass and both.

Source: docs/measuring.md, "Training".
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

METHODS = ("triton", "dense", "packed_sdpa")  # packing comes last, as it needs the most memory
PASSES = ("forward", "backward", "both")
LAYOUTS = ("local", "random")
BLOCKS, BLOCK, GROUPS = 16, 64, 4


def sizes(matrix: str) -> Iterator[dict]:
    """Yield the fields of the cases of "smoke", "hot" or "full"; those of hot have 16 heads. `name` is the pass."""
    if matrix == "smoke":
        for of_pass in PASSES:
            yield _fields(128, 2, 32, 3, 16, 1, "local", of_pass)
        return
    heads = (16,) if matrix == "hot" else (4, 16)
    for S, H, layout, of_pass in itertools.product((1024, 4096, 16_384), heads, LAYOUTS, PASSES):
        yield _fields(S, H, 128, BLOCKS, BLOCK, GROUPS, layout, of_pass)


def _fields(S: int, H: int, D: int, blocks: int, block: int, G: int, layout: str, of_pass: str) -> dict:
    sizes = {"H": H, "D": D, "Dv": D, "L": blocks * block, "N": S * G, "S": S, "G": G, "S_kv": S, "block": block}
    return {"layout": layout, "name": of_pass, **sizes}
