"""Where K and V lie: as the kernel's arguments say it, and as matrices that TMA descriptors see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_TMA_ROWS = 2**30  # tokens of a row, and rows before the last group's first: their sum is a 32-bit coordinate
MAX_KEPT = 4096  # plans of a process, and pairs of descriptors of a plan
MAX_PLACES = 64  # of a plan: layers may have their own, and a context that grows needs none again
OUTER_STRIDES = ("stride_kb", "stride_kg", "stride_vb", "stride_vg")

Lie = tuple[torch.Size, torch.Size, tuple[int, ...], tuple[int, ...]]  # of K and V: k.shape, v.shape, their strides


def remember(kept: dict[Any, Any], key: Any, value: Any, most: int) -> Any:
    """Keep a value for later calls of the same key, and no more than `most` of them: past it all are forgotten."""
    if len(kept) >= most:
        kept.clear()
    kept[key] = value
    return value


class Matrix(NamedTuple):
    """Say where the tokens of K or V lie in one matrix that has a row per token.

    batch, group: rows between batch entries, and between groups. column: columns between groups that lie beside each
    other in a token's row, else 0. rows, columns: its size, to the last group of the last token.
    """

    batch: int
    group: int
    column: int
    rows: int
    columns: int


class Placed(NamedTuple):
    """Hold what a plan passes for K and V that lie in one way.

    arguments: the kernel's after the tensors, in the order of its signature. rows, columns: of the matrices of K and V,
    if they are such. kind: what else of where they lie decides about kernel and launch.
    """

    lie: Lie
    arguments: tuple
    rows: int
    columns: tuple[int, int]
    kind: tuple


class Places:
    """Say what one plan passes for K and V, wherever they lie as far as its kernel and launch serve them.

    lie: those that it was planned for. unit: what the kernel takes strides of K and V divided by. lengths: S_kv that
    it serves. tma: by descriptors. view: the kernel is compiled for views, too. names, values: the kernel's arguments
    after the tensors, in order, and all of them but S_kv and OUTER_STRIDES.
    """

    def __init__(
        self,
        lie: Lie,
        element_bytes: int,
        unit: int,
        lengths: range,
        tma: bool,
        view: bool,
        names: Sequence[str],
        values: Mapping[str, object],
    ) -> None:
        self.element_bytes, self.unit, self.lengths, self.tma, self.view = element_bytes, unit, lengths, tma, view
        self.B, self.G, _, self.D = lie[0]
        # Where groups lie one behind the other, the same strides with another S_kv leave tokens between them.
        self.whole = tma and not view and self.B * self.G > 1
        self.Dv = lie[1][3]
        self.inner_strides = lie[2][2:], lie[3][2:]
        self.arguments = [values.get(name) for name in names]
        self.at = [names.index(name) for name in ("S_kv", *OUTER_STRIDES)]
        self.last = self._placed(lie)  # that was asked for
        self.kept: dict[tuple, Placed | None] = {lie[2:]: self.last}  # by strides; S_kv is put in. None: another kernel

    def find(self, lie: Lie) -> Placed | None:
        """Return what to pass for K and V that lie so.

        None: they agree neither with each other nor with q, or another kernel or launch is due.
        """
        S_kv, strides = lie[0][2], lie[2:]
        B, G = self.B, self.G
        if S_kv not in self.lengths or lie[0] != (B, G, S_kv, self.D) or lie[1] != (B, G, S_kv, self.Dv):
            return None
        placed: Placed | None = self.last
        if strides != self.last.lie[2:]:
            placed = self.kept[strides] if strides in self.kept else self._elsewhere(lie)
            if placed is None:
                return None
        seen, arguments, rows, columns, kind = placed  # type: ignore[misc]
        if seen[0][2] != S_kv:
            if self.whole:
                return None
            at = self.at[0]
            arguments = (*arguments[:at], S_kv, *arguments[at + 1 :])
            placed = Placed(lie, arguments, rows + S_kv - seen[0][2], columns, kind)
        self.last = placed  # type: ignore[assignment]
        return placed

    def _elsewhere(self, lie: Lie) -> Placed | None:
        """Place K and V of other strides than before, and keep that; None where `find` returns it."""
        placed = None
        if (lie[2][2:], lie[3][2:]) == self.inner_strides and not any(n % self.unit for n in outer_strides(lie)):
            placed = self._placed(lie)
            if placed.kind != self.last.kind:
                placed = None
        return remember(self.kept, lie[2:], placed, MAX_PLACES)

    def _placed(self, lie: Lie) -> Placed:
        outer = [stride // self.unit for stride in outer_strides(lie)]
        matrices = as_matrices(lie, self.element_bytes)
        rows, columns, beside, view = 0, (0, 0), None, False
        if matrices is not None:
            of_k, of_v = matrices
            rows, columns, beside = of_k.rows, (of_k.columns, of_v.columns), (of_k.column, of_v.column)
            view = self.tma and (self.view or is_view(lie, matrices))
            if self.view:
                outer[0] = of_k.batch
                outer[1] = outer[1] if any(beside) else of_k.group
        arguments = self.arguments.copy()
        for at, value in zip(self.at, (lie[0][2], *outer), strict=True):
            arguments[at] = value
        return Placed(lie, tuple(arguments), rows, columns, (beside, view, *(stride >= 2**31 for stride in outer)))


def lie_of(k: Tensor, v: Tensor) -> Lie:
    """Return the shapes and strides of K and V."""
    return k.shape, v.shape, k.stride(), v.stride()


def outer_strides(lie: Lie) -> list[int]:
    """Return the strides over batch and groups, of K and then of V; 0 where there is but one."""
    return [
        0 if shape[axis] == 1 else stride[axis]
        for shape, stride in zip(lie[:2], lie[2:], strict=True)
        for axis in (0, 1)
    ]


def as_matrices(lie: Lie, element_bytes: int) -> tuple[Matrix, Matrix] | None:
    """Return K and V as matrices in which a token has the same row; None where TMA descriptors cannot serve them.

    Pointers must be aligned to 16 bytes besides.
    """
    of_k, of_v = _as_matrix(lie[0], lie[2], element_bytes), _as_matrix(lie[1], lie[3], element_bytes)
    if of_k is None or of_v is None or (of_k.batch, of_k.group) != (of_v.batch, of_v.group):
        return None
    return of_k, of_v


def is_view(lie: Lie, matrices: tuple[Matrix, Matrix]) -> bool:
    """Tell whether the groups of K and V lie otherwise than one behind the other in these matrices."""
    B, G, S_kv, _ = lie[0]
    batch, group = matrices[0][:2]
    return (B > 1 and batch != G * S_kv) or (G > 1 and group != S_kv)


def _as_matrix(shape: torch.Size, stride: tuple[int, ...], element_bytes: int) -> Matrix | None:
    """Return K or V seen as one matrix of its tokens, with what lies between them, such as the rest of a cache."""
    B, G, S_kv, width = shape
    stride_b, stride_g, stride_t, _ = stride
    column = stride_g if G > 1 and 0 < stride_g < stride_t else 0
    columns = (G - 1) * column + width
    if not shape.numel() or stride_t * element_bytes % 16 or stride_t < columns:
        return None
    batch, odd_b = divmod(stride_b, stride_t) if B > 1 else (0, 0)
    group, odd_g = divmod(stride_g, stride_t) if G > 1 and not column else (0, 0)
    before = (B - 1) * batch + (G - 1) * group
    if odd_b or odd_g or max(before, S_kv) > MAX_TMA_ROWS:
        return None
    return Matrix(batch, group, column, before + S_kv, columns)
