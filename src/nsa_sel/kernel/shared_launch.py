"""Calls in which neighbouring queries may share tiles of KV, and how they run.

Three kernels run one after another on one stream: `_cover` lists what every query tile selects, `_sel_shared` computes
the query tiles that share enough, `_sel_rest` the rows of the others. Nothing is read back, so that the three can be
captured.
Source: docs/kernel.md, "Shared tiles".
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import kernel_failed
from .coverage import COVER_TENSORS, _cover
from .device import INTERPRETED, call_of, gpu_of
from .forward import TENSOR_ARGS, _sel_fwd
from .kv import MAX_TMA_ROWS, Placed, lie_of
from .launch import Plan, count_launches, empty, launch_for
from .launch_config import LaunchConfig, next_power_of_2
from .shared import SHARED_TENSORS, _sel_rest, _sel_shared
from .shared_config import BREAK_EVEN, MAX_INDEX_BYTES, MAX_SHARED_SPANS, SharedLaunch, choose, row_of
from .start import Start

Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]  # q, k, v, ranges, out, lse
Addresses = tuple[int, int, int, int, int, int | None]  # of those


class Index(NamedTuple):
    """Hold the coverage index of a call, what `_cover` writes.

    room: tiles, who and counts of the query tiles, from the element in `starts` on. capacity: the places of a query
    tile's list. wide: `who` has 64 bits. addresses: where `tensors` lie.
    """

    room: Tensor
    starts: tuple[int, int, int]
    capacity: int
    wide: bool
    addresses: tuple[int, int, int]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return tiles, who and counts."""
        tiles, who, counts = (
            self.room[start:end] for start, end in zip(self.starts, (*self.starts[1:], None), strict=True)
        )
        return tiles, who.view(torch.int64) if self.wide else who, counts


class Found(NamedTuple):
    """Say how much a call shares. share: of its query tiles. listed: KV tiles that one of those reads, on average."""

    share: float
    listed: float


class Passed(NamedTuple):
    """Hold what the three kernels are passed for K and V that lie in one way, beside tensors and descriptors.

    starts, length: of an index in its room. cover, shared, rest: the values, in order. words: of `_cover` at a time.
    cover_options: what `_cover` is compiled with.
    """

    placed: Placed
    capacity: int
    starts: tuple[int, int, int]
    length: int
    words: int
    cover: tuple
    shared: tuple
    rest: tuple
    cover_options: dict[str, int]


def plan_for(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    scale: float | None,
    min_len: int | None,
    max_len: int | None,
) -> Plan:
    """Plan a call: with shared tiles where `eligible` says so, else row by row."""
    launch = eligible(q, k, v, ranges, scale, min_len, max_len)
    if launch is None:
        return Plan(q, k, v, ranges, scale, min_len, max_len)
    return SharedPlan(q, k, v, ranges, scale, min_len, max_len, launch)


def eligible(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    scale: float | None,
    min_len: int | None,
    max_len: int | None,
) -> SharedLaunch | None:
    """Return the launch of a call whose queries may share tiles, as far as sizes tell; None: row by row is better."""
    gpu = gpu_of(q.device)
    if gpu.name not in BREAK_EVEN or (scale is not None and not scale > 0) or not q.numel():
        return None
    launch = choose(call_of(q, k, v, ranges, min_len=min_len, max_len=max_len), gpu, q.shape[1], k.shape[2])
    row = launch_for(q, k, v, ranges, min_len=min_len, max_len=max_len)
    if launch is None or row.splits > 1:  # so few rows leave multiprocessors idle
        return None
    return launch if row.load == "tma" else replace(launch, tma=False)


class SharedPlan(Plan):
    """Hold what a call with shared tiles needs beside its rows' plan; arguments as `Plan` takes them."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ranges: Tensor,
        scale: float | None,
        min_len: int | None,
        max_len: int | None,
        shared: SharedLaunch,
        row: LaunchConfig | None = None,
    ) -> None:
        row = row_of(row or launch_for(q, k, v, ranges, min_len=min_len, max_len=max_len))
        super().__init__(q, k, v, ranges, scale, min_len, max_len, row)
        self.shared = shared
        B, S, G, H, D = q.shape
        self.n_spans = ranges.shape[3]
        if problem := self._shared_problem(scale, D):
            raise ValueError(f"launch: value is {shared}, expected {problem}")
        self.TQ = TQ = shared.queries(H)
        self.n_rows, self.query_tiles = B * S, B * -(-S // TQ) * G  # rows of a group
        self.start_cover = Start(_cover, (self.query_tiles // G, G, 1), 0, (), False)
        boxes = shared.block_d, shared.block_dv
        self.start_shared = Start(_sel_shared, (self.query_tiles, 1, 1), shared.block_t, boxes, shared.tma)
        rest = max(1, -(-self.n_rows // shared.rest_rows))
        self.start_rest = Start(_sel_rest, (rest, G, 1), row.block_l, self.boxes, self.tma)
        # KV tiles that a query tile can list: its spans touch no more, and a longer list is not worth sharing.
        self.most_listed = TQ * (max_len // shared.block_t + 2 * self.n_spans) if max_len is not None else None
        self.shared_options = shared.options
        self.last_passed: Passed | None = None

    def _shared_problem(self, scale: float | None, D: int) -> str | None:
        """Say what is expected in place of a launch, a scale or spans that it cannot run with; None if it can."""
        if scale is not None and not scale > 0:
            return f"a positive scale, which is {scale}"
        if self.n_spans > MAX_SHARED_SPANS:
            return f"at most {MAX_SHARED_SPANS} spans, which are {self.n_spans}"
        if self.shared.tma and not self.tma:
            return "a launch without TMA descriptors, as that of the rows is"
        return self.shared.problem(self.out_shape[3], D, self.out_shape[4])

    def capacity(self, S_kv: int) -> int:
        """Return the places of a query tile's list for this S_kv; 0 where the index would be too large."""
        most = -(-S_kv // self.shared.block_t)
        if self.most_listed is not None:
            most = min(most, int(self.most_listed / max(self.shared.break_even, 1.0)))
        most = max(most, 1)
        return most if self._index_places(most) * (12 if self.TQ > 32 else 8) <= MAX_INDEX_BYTES else 0

    def _index_places(self, capacity: int) -> int:
        """Return the places of all lists, and one that is read and not used."""
        return self.query_tiles * capacity + 1

    def passed(self, placed: Placed) -> Passed:
        """Return what is passed for K and V that lie so; capacity 0: there is no room for an index."""
        known = self.last_passed
        if known is None or known.placed is not placed:
            self.last_passed = known = self._passed(placed)
        return known

    def _passed(self, placed: Placed) -> Passed:
        S_kv = placed.lie[0][2]
        capacity = self.capacity(S_kv)
        places = self._index_places(capacity)
        sizes = places, places * (2 if self.TQ > 32 else 1), 2 * self.query_tiles
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // 4) * 4)  # each begins at 16 bytes, as kernels are compiled for
        H = self.out_shape[3]
        constants = self.shared.cover_constants(H, self.n_spans, S_kv)
        others = {"S_kv": S_kv, "capacity": capacity, "break_even": self.shared.break_even}
        cover = self.values | others | constants
        shared = dict(zip(_sel_fwd.arg_names[len(TENSOR_ARGS) :], placed.arguments, strict=True))
        shared |= {"n_tiles": self.query_tiles, "capacity": capacity} | self.shared.constants(H, self.n_spans)
        return Passed(
            placed, capacity, tuple(starts[:3]), starts[2] + sizes[2], constants["WORDS"],  # type: ignore[arg-type]
            tuple(cover[name] for name in _cover.arg_names[len(COVER_TENSORS) :]),
            tuple(shared[name] for name in _sel_shared.arg_names[len(SHARED_TENSORS) :]),
            (self.n_rows, *placed.arguments, self.TQ, next_power_of_2(self.shared.rest_rows)),
            {"num_warps": self.shared.cover_warps(constants["WORDS"], H)},
        )  # fmt: skip

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ranges: Tensor,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        placed: Placed | None = None,
    ) -> Tensor:
        """Launch, and return the result. Arguments and errors as of `Plan.run`."""
        if not INTERPRETED and torch._C._cuda_getDevice() != self.device.index:
            with torch.cuda.device(self.device):
                return self.run(q, k, v, ranges, out, lse, placed)
        placed = placed or self.places.find(lie_of(k, v))
        if placed is None or 0 in self.out_shape or not 0 < k.shape[2] <= MAX_TMA_ROWS:
            return super().run(q, k, v, ranges, out, lse, placed)
        passed = self.passed(placed)
        if out is None:
            out = empty(self.out_shape, self.out_stride, self.dtype, self.device)
        tensors = q, k, v, ranges, out, lse
        at = addresses(tensors)
        if not passed.capacity or (at[0] | at[1] | at[2] | at[3] | at[4] | (at[5] or 0)) & 15:
            return super().run(q, k, v, ranges, out, lse, placed)
        index = self.index(passed)
        try:
            self.cover(ranges, passed, index)
            self.attend(tensors, passed, index, at)
            self.attend_rest(tensors, passed, index, at)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # the compiler, its cache and the driver raise whatever they like
            raise kernel_failed(self.shared, error) from error
        count_launches(3)
        return out

    def found(self, q: Tensor, k: Tensor, v: Tensor, ranges: Tensor) -> Found:
        """Say how much the query tiles share, of the tensors that this was planned for, with a sync."""
        passed = self.passed(self.places.last)
        if not passed.capacity:
            return Found(0.0, 0.0)
        index, out = self.index(passed), torch.empty(self.out_shape, dtype=self.dtype, device=self.device)
        self.cover(ranges, passed, index)
        self.attend((q, k, v, ranges, out, None), passed, index)
        counts = index.tensors[2][: 2 * self.query_tiles].view(-1, 2)
        listed = counts[counts[:, 0] >= 0].sum(1).float()
        return Found(len(listed) / self.query_tiles, listed.mean().item() if len(listed) else 0.0)

    def index(self, passed: Passed) -> Index:
        """Return room for the coverage index."""
        room = empty((passed.length,), (1,), torch.int32, self.device)
        at, (tiles, who, count) = room.data_ptr(), passed.starts
        return Index(room, passed.starts, passed.capacity, self.TQ > 32, (at + 4 * tiles, at + 4 * who, at + 4 * count))

    def cover(self, ranges: Tensor, passed: Passed, index: Index) -> None:
        """Make the coverage index."""
        self.start_cover(
            passed.words,
            (ranges.data_ptr(), *index.addresses),
            lambda: (ranges, *index.tensors),
            passed.placed,
            passed.cover,
            passed.cover_options,
        )

    def attend(self, tensors: Tensors, passed: Passed, index: Index, at: Addresses | None = None) -> None:
        """Compute the query tiles that share; at: where the tensors lie."""
        self.start_shared(
            tensors[5] is None,
            (*(at or addresses(tensors)), *index.addresses),
            lambda: (*tensors, *index.tensors),
            passed.placed,
            passed.shared,
            self.shared_options,
        )

    def attend_rest(self, tensors: Tensors, passed: Passed, index: Index, at: Addresses | None = None) -> None:
        """Compute the rows of the other query tiles; at: where the tensors lie."""
        self.start_rest(
            tensors[5] is None,
            (*(at or addresses(tensors)), index.addresses[2]),
            lambda: (*tensors, index.tensors[2]),
            passed.placed,
            passed.rest,
            self.options,
        )


def addresses(tensors: Tensors) -> Addresses:
    """Return where tensors lie."""
    q, k, v, ranges, out, lse = tensors
    lse_at = None if lse is None else lse.data_ptr()
    return q.data_ptr(), k.data_ptr(), v.data_ptr(), ranges.data_ptr(), out.data_ptr(), lse_at
