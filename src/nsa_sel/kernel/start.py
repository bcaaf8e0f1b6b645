"""Start the kernels of a call that has several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import direct
from .device import INTERPRETED, Boxes, bind_context, descriptors, direct_descriptors
from .kv import MAX_KEPT, Placed, remember


class Start:
    """Start one kernel of a plan: through Triton at first, and then directly where that works.

    block_l, boxes: tokens and columns of the tiles of K and V that its descriptors see. tma: it is given those.
    """

    def __init__(self, kernel: Any, grid: tuple[int, int, int], block_l: int, boxes: Boxes, tma: bool) -> None:
        self.kernel, self.grid, self.block_l, self.boxes, self.tma = kernel, grid, block_l, boxes, tma
        self.none: tuple = (None,) * len(boxes)
        self.known: dict[Any, direct.Direct | None] = {}
        self.descriptors: dict[tuple, tuple] = {}

    def __call__(
        self,
        kind: Any,
        pointers: tuple[int | None, ...],
        tensors: Callable[[], tuple[Tensor | None, ...]],
        placed: Placed,
        values: tuple,
        options: dict[str, int],
    ) -> None:
        """Start it. kind: what decides which compiled kernel it is. pointers: where the tensors lie."""
        known = self.known.get(kind)
        if known is None:
            given = tensors()
            bind_context()
            compiled = self.kernel[self.grid](*given, *self.public(given, placed), *values, **options)
            device = given[0].device  # type: ignore[union-attr]
            if direct.works(device):
                self.known[kind] = direct.direct_launch(compiled)
            return
        launch, head, one_tuple, describe, _ = known
        if describe is None:
            described = self.none
        else:
            at = pointers[1], pointers[2], placed.rows
            described = self.descriptors.get(at) or self._describe(describe, at, placed)
        stream = 0 if INTERPRETED else torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())
        if one_tuple:
            launch(*self.grid, stream, *head, (*pointers, *described, *values))
        else:
            launch(*self.grid, stream, *head, *pointers, *described, *values)

    def public(self, tensors: tuple[Tensor | None, ...], placed: Placed) -> tuple:
        """Return the descriptors of K and V as Triton takes them; none where the kernel has no place for them."""
        if not self.tma:
            return self.none
        return descriptors(tensors[1:3], placed.rows, placed.columns, self.block_l, self.boxes)  # type: ignore[arg-type]

    def _describe(self, describe: Any, at: tuple, placed: Placed) -> tuple:
        strides = placed.lie[2][2], placed.lie[3][2]
        made = direct_descriptors(describe, at[:2], placed.rows, placed.columns, strides)
        return remember(self.descriptors, at, made, MAX_KEPT)
