"""Calls in which neighbouring queries may share tiles of KV, and how they run.

Three kernels run one after another on one stream: `_cover` lists what every query tile selects, `_sel_shared` computes
the query tiles that share enough, `_sel_rest` the rows of the others. Nothing is read back, so that the three can be
captured.
Source: docs/kernel.md, "Shared tiles".
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import kernel_failed
from .coverage import COVER_TENSORS, _cover
from .device import INTERPRETED, bind_context, call_of, descriptor, gpu_of
from .forward import TENSOR_ARGS, _sel_fwd
from .kv import MAX_TMA_ROWS, Placed, lie_of
from .launch import Plan, count_launches, launch_for
from .launch_config import LaunchConfig
from .shared import SHARED_TENSORS, _sel_rest, _sel_shared
from .shared_config import BREAK_EVEN, MAX_INDEX_BYTES, SharedLaunch, choose

Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]  # q, k, v, ranges, out, lse


class Index(NamedTuple):
    """Hold the coverage index of a call: what `_cover` writes, and the places of a query tile's list."""

    tiles: Tensor
    who: Tensor
    counts: Tensor
    rest: Tensor
    n_rest: Tensor
    capacity: int


def plan_for(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    scale: float | None,
    min_len: int | None,
    max_len: int | None,
    launch: SharedLaunch | None = None,
) -> Plan:
    """Plan a call: with shared tiles where `choose` finds that they pay, or as `launch` forces; else row by row."""
    gpu = gpu_of(q.device)
    if launch is None and gpu.name in BREAK_EVEN and (scale is None or scale > 0) and q.numel():
        launch = choose(call_of(q, k, v, ranges, min_len=min_len, max_len=max_len), gpu, q.shape[1], k.shape[2])
        row = launch_for(q, k, v, ranges, min_len=min_len, max_len=max_len)
        if launch is not None and row.splits > 1:
            launch = None  # so few rows leave multiprocessors idle
        if launch is not None and row.load != "tma":
            launch = replace(launch, tma=False)
    if launch is None:
        return Plan(q, k, v, ranges, scale, min_len, max_len)
    return SharedPlan(q, k, v, ranges, scale, min_len, max_len, launch)


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
        if row is None:  # the loop over rows takes more registers than a row, and shared memory is what is scarce
            row = replace(launch_for(q, k, v, ranges, min_len=min_len, max_len=max_len), max_registers=0)
        row = replace(row, splits=1, cluster=1)
        super().__init__(q, k, v, ranges, scale, min_len, max_len, row)
        self.shared = shared
        if problem := self._shared_problem(q, v, scale):
            raise ValueError(f"launch: value is {shared}, expected {problem}")
        B, S, G, H, _ = q.shape
        n_spans = ranges.shape[3]
        self.TQ = TQ = shared.queries(H)
        self.query_tiles = B * -(-S // TQ)
        self.shared_grid = (self.query_tiles, G)
        self.rest_grid = (max(1, B * S * G // shared.rest_rows),)
        # KV tiles that a query tile can list: its spans touch no more, and a longer list is not worth sharing.
        self.most_listed = TQ * (max_len // shared.block_t + 2 * n_spans) if max_len is not None else None
        self.shared_constants = shared.constants(H, n_spans)

    def _shared_problem(self, q: Tensor, v: Tensor, scale: float | None) -> str | None:
        """Say what is expected in place of a launch, or a scale, that cannot run; None if it can."""
        if scale is not None and not scale > 0:
            return f"a positive scale, which is {scale}"
        if self.shared.tma and not self.tma:
            return "a launch without TMA descriptors, as that of the rows is"
        return self.shared.problem(q.shape[3], q.shape[4], v.shape[3])

    def capacity(self, S_kv: int) -> int:
        """Return the places of a query tile's list for this S_kv; 0 where the index would be too large."""
        most = -(-S_kv // self.shared.block_t)
        if self.most_listed is not None:
            most = min(most, int(self.most_listed / max(self.shared.break_even, 1.0)))
        most = max(most, 1)
        return most if self.index_places(most) * (12 if self.TQ > 32 else 8) <= MAX_INDEX_BYTES else 0

    def index_places(self, capacity: int) -> int:
        """Return the places of all lists, and one that is read and not used."""
        return self.query_tiles * self.out_shape[2] * capacity + 1

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
        if not INTERPRETED and torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                return self.run(q, k, v, ranges, out, lse, placed)
        placed = placed or self.places.find(lie_of(k, v))
        aligned = not any(x.data_ptr() & 15 for x in (q, k, v, ranges))
        capacity = self.capacity(k.shape[2])
        if placed is None or 0 in self.out_shape or not 0 < k.shape[2] <= MAX_TMA_ROWS or not capacity or not aligned:
            return super().run(q, k, v, ranges, out, lse, placed)
        if out is None:
            out = torch.empty(self.out_shape, dtype=self.dtype, device=self.device)
        bind_context()
        tensors, index = (q, k, v, ranges, out, lse), self.index(capacity)
        try:
            self.cover(ranges, k.shape[2], index)
            self.attend(tensors, placed, index)
            self.attend_rest(tensors, placed, index)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # the compiler, its cache and the driver raise whatever they like
            raise kernel_failed(self.shared, error) from error
        count_launches(3)
        return out

    def index(self, capacity: int) -> Index:
        """Return room for the coverage index."""

        def room(n: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(n, dtype=dtype, device=self.device)

        query_tiles, places = self.query_tiles * self.out_shape[2], self.index_places(capacity)
        who = room(places, torch.int64 if self.TQ > 32 else torch.int32)
        n_rest = torch.zeros(1, dtype=torch.int32, device=self.device)
        return Index(room(places), who, room(2 * query_tiles), room(query_tiles), n_rest, capacity)

    def cover(self, ranges: Tensor, S_kv: int, index: Index) -> None:
        """Make the coverage index."""
        arguments, options = self.cover_arguments(ranges, S_kv, index)
        _cover[self.shared_grid](*arguments, **options)

    def attend(self, tensors: Tensors, placed: Placed, index: Index) -> None:
        """Compute the query tiles that share."""
        arguments, options = self.shared_arguments(tensors, placed, index)
        _sel_shared[self.shared_grid](*arguments, **options)

    def attend_rest(self, tensors: Tensors, placed: Placed, index: Index) -> None:
        """Compute the rows of the other query tiles."""
        _sel_rest[self.rest_grid](*self.rest_arguments(tensors, placed, index), **self.options)

    def cover_arguments(self, ranges: Tensor, S_kv: int, index: Index) -> tuple[list[Any], dict[str, int]]:
        """Return the arguments of `_cover` in order, and its options."""
        constants = self.shared.cover_constants(self.out_shape[3], ranges.shape[3], S_kv)
        others = {"S_kv": S_kv, "capacity": index.capacity, "break_even": self.shared.break_even}
        values = self.values | others | constants
        in_order = [values[name] for name in _cover.arg_names[len(COVER_TENSORS) :]]
        return [ranges, *index[:5], *in_order], {"num_warps": 1 if self.TQ * constants["WORDS"] <= 32 else 4}

    def shared_arguments(self, tensors: Tensors, placed: Placed, index: Index) -> tuple[list[Any], dict[str, int]]:
        """Return the arguments of `_sel_shared` in order, and its options."""
        shared = self.shared
        descriptors = self._descriptors(tensors, placed, shared.block_t, shared.block_d, shared.block_dv, shared.tma)
        values = dict(zip(_sel_fwd.arg_names[len(TENSOR_ARGS) :], placed.arguments, strict=True))
        values |= {"capacity": index.capacity} | self.shared_constants
        in_order = [values[name] for name in _sel_shared.arg_names[len(SHARED_TENSORS) :]]
        options = {"num_warps": shared.num_warps, "num_stages": shared.num_stages}
        return [*tensors, *index[:5], *descriptors, *in_order], options

    def rest_arguments(self, tensors: Tensors, placed: Placed, index: Index) -> list[Any]:
        """Return the arguments of `_sel_rest` in order; its options are those of the rows' plan."""
        row = self.config
        descriptors = self._descriptors(tensors, placed, row.block_l, row.block_d, row.block_dv, self.tma)
        return [*tensors, index.rest, index.n_rest, *descriptors, *placed.arguments, self.TQ]

    @staticmethod
    def _descriptors(
        tensors: Tensors, placed: Placed, tokens: int, block_d: int, block_dv: int, tma: bool
    ) -> tuple[Any, Any]:
        """Return the descriptors of K and V for tiles of so many tokens; None without TMA."""
        if not tma:
            return None, None
        (_, k, v, *_), (of_k, of_v) = tensors, placed.columns
        return descriptor(k, placed.rows, of_k, [tokens, block_d]), descriptor(v, placed.rows, of_v, [tokens, block_dv])
