"""Start the kernels of a call that has several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import direct
from .device import INTERPRETED, bind_context, descriptor
from .kv import MAX_KEPT, Placed, remember


class Start:
    """Start one kernel of a plan: through Triton at first, and then directly where that works.

    blocks: tokens and columns of the tiles of K and V that descriptors see; None without.
    """

    def __init__(self, kernel: Any, grid: tuple[int, int, int], blocks: tuple[int, int, int] | None, tma: bool) -> None:
        self.kernel, self.grid, self.blocks, self.tma = kernel, grid, blocks, tma
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
        descriptors: tuple = () if self.blocks is None else (None, None)
        if describe is not None:
            at = pointers[1], pointers[2], placed.rows
            descriptors = self.descriptors.get(at) or self._describe(describe, at, placed)
        stream = 0 if INTERPRETED else torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())
        arguments = (*pointers, *descriptors, *values)
        if one_tuple:
            launch(*self.grid, stream, *head, arguments)
        else:
            launch(*self.grid, stream, *head, *arguments)

    def public(self, tensors: tuple[Tensor | None, ...], placed: Placed) -> tuple:
        """Return the descriptors of K and V as Triton takes them; none where the kernel has no place for them."""
        if self.blocks is None or not self.tma:
            return () if self.blocks is None else (None, None)
        tokens, *widths = self.blocks
        return tuple(
            descriptor(x, placed.rows, columns, [tokens, width])  # type: ignore[arg-type]
            for x, columns, width in zip(tensors[1:3], placed.columns, widths, strict=True)
        )

    def _describe(self, describe: Any, at: tuple, placed: Placed) -> tuple:
        bind_context()
        strides = placed.lie[2][2], placed.lie[3][2]
        made: tuple = ()
        for which, (columns, stride) in enumerate(zip(placed.columns, strides, strict=True)):
            made += tuple(describe(at[which], placed.rows, columns, stride, which))
        return remember(self.descriptors, at, made, MAX_KEPT)
