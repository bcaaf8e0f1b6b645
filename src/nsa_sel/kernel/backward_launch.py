"""Run the backward pass: the rows, the index of rows by KV tile, the keys, and the merge of popular tiles.

Where neighbouring queries share tiles of KV the rows are three kernels: the coverage index, the query tiles that share,
and the rows of the others. Nine kernels one after another on one stream, at most; nothing is read back, so that they
can be captured. The same input gives the same bits.
Source: docs/kernel.md, "Backward pass".
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import kernel_failed
from .backward_config import LEAST_BATCHES, BackwardLaunch, choose, fits, shared_default
from .backward_index import KINDS, MARK_SIZES, _count, _list, _mark, _share_out
from .backward_keys import KEY_TENSORS, MOST_SPANS, _sel_bwd_keys, _sel_bwd_merge
from .backward_rows import ROW_TENSORS, _sel_bwd_rows
from .backward_shared import DQ_TENSORS, _sel_bwd_shared
from .backward_tensors import OfRows, RowIndex, Saved
from .call import Call
from .device import INTERPRETED, bind_context, call_of, gpu_of
from .forward import TENSOR_ARGS, _sel_fwd
from .kv import MAX_TMA_ROWS, Placed, lie_of
from .launch import Plan, count_launches
from .launch_config import MAX_SPANS, next_power_of_2
from .shared_launch import Index, Passed, SharedPlan, eligible

ROWS_EACH = 2  # of a program, where query tiles may share: with more those that do not share take longer
MERGE_COLUMNS = 32  # of dk or dv that a program of the merge adds


def unsupported_backward(q: Tensor, v: Tensor) -> str | None:
    """Say in one sentence why the backward pass cannot run these tensors, which the forward can; None if it can."""
    H, D, Dv = q.shape[3], q.shape[4], v.shape[3]
    if fits(Call(1, H, D, Dv, 1, 64, element_bytes=q.element_size(), fits_tma=False), gpu_of(q.device)):
        return None
    sizes = f"H={H}, D={D}, Dv={Dv} in {q.dtype}"
    return f"gradients needed, and the backward pass of {sizes} needs more shared memory than the GPU has"


def launch_for(
    q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, scale: float | None, min_len: int | None, max_len: int | None
) -> BackwardLaunch:
    """Return the launch of a call: its queries may share tiles where those of the forward may."""
    call, gpu = call_of(q, k, v, ranges, max_len=max_len), gpu_of(q.device)
    launch = choose(call, gpu)
    if eligible(q, k, v, ranges, scale, min_len, max_len) is None:
        return launch
    return replace(launch, shared=shared_default(call, gpu, launch.row))


class BackwardPlan(Plan):
    """Hold everything about the backward pass of a call but its pointers; arguments as `Plan` takes them.

    max_len: bounds the index; rows that are longer lose keys. None: it has room for any spans.

    Raises: ValueError if a forced launch cannot run these tensors.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ranges: Tensor,
        scale: float | None,
        min_len: int | None,
        max_len: int | None,
        launch: BackwardLaunch | None = None,
    ) -> None:
        H, D = q.shape[3:]
        if launch is None:
            launch = launch_for(q, k, v, ranges, scale, min_len, max_len)
        self.backward = launch
        if problem := self.backward.problem(H):
            raise ValueError(f"launch: value is {self.backward}, expected {problem}")
        super().__init__(q, k, v, ranges[:, :, :, :MAX_SPANS], scale, min_len, max_len, self.backward.row)
        B, S, G = q.shape[:3]
        block_t = self.backward.block_t
        self.tiles, self.words = -(-k.shape[2] // block_t), -(-S // 32)
        self.mark_grid = (B * self.words, G)
        self.n = B * G * self.tiles
        most = self.tiles if max_len is None else min(self.tiles, max_len // block_t + 2 * ranges.shape[3])
        self.capacity = max(B * S * G * most, 1)
        most_columns = max(D, v.shape[3])
        wide = max(S * q.stride(1) + H * q.stride(3), S * G * H * most_columns) >= 2**31
        self.values |= {"scale": D**-0.5 if scale is None else scale, "TMA": self.tma, "WIDE_Q": wide}
        self.sharing: SharedPlan | None = None
        if launch.shared is not None:
            self.sharing = SharedPlan(q, k, v, ranges, scale, min_len, max_len, launch.shared, launch.row)

    def run(self, saved: Saved, of_q: bool, of_kv: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        """Return dq if of_q, and dk and dv if of_kv, contiguous, in q's dtype.

        Raises: KernelFailed if a kernel does not compile or start.
        """
        q, k, v = saved[:3]
        if not INTERPRETED and torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                return self.run(saved, of_q, of_kv)
        if not q.numel() or not k.shape[2]:
            zeros = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
            return zeros[0] if of_q else None, zeros[1] if of_kv else None, zeros[2] if of_kv else None
        placed = self.places.find(lie_of(k, v))
        assert placed is not None, "a plan runs the tensors that it was made for"
        bind_context()
        try:
            of_rows = self.of_rows()
            dq = self.rows(saved, placed, of_rows, of_q)
            if not of_kv:
                return dq, None, None
            index = self.index()
            self.make_index(saved.ranges, of_rows.finite, k.shape[2], index)
            dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
            part = self.room(self.backward.slots * self.backward.block_t * (k.shape[3] + v.shape[3]), torch.float32)
            self.keys(saved, placed, of_rows.stat, index, (dk, dv, part))
            self.merge(index, (dk, dv, part))
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # the compiler, its cache and the driver raise whatever they like
            raise kernel_failed(self.backward, error) from error
        return dq, dk, dv

    def room(self, n: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(n, dtype=dtype, device=self.device)

    def of_rows(self) -> OfRows:
        """Return room for what the keys' pass needs of the rows."""
        B, S, G, H = self.out_shape[:4]
        return OfRows(self.room(B * S * G * H * 2, torch.float32), self.room(B * S * G, torch.float32))

    def rows(self, saved: Saved, placed: Placed, of_rows: OfRows, of_q: bool) -> Tensor | None:
        """Compute what the keys' pass needs of every row, and dq. Of rows of more spans than fit, part after part."""
        if of_q and self.sharing is not None and (passed := self._shareable(self.sharing, saved, placed)) is not None:
            return self.rows_sharing(self.sharing, saved, passed, of_rows)
        parts = saved.ranges.split(MAX_SPANS, dim=3) if of_q else [saved.ranges[:, :, :, :1]]
        dtype = saved.q.dtype if len(parts) == 1 else torch.float32
        total: Tensor | None = None
        for ranges in parts:
            dq = torch.empty(saved.q.shape, dtype=dtype, device=self.device) if of_q else None
            arguments, options = self.row_arguments(saved, placed, ranges, (*of_rows, dq))
            _sel_bwd_rows[(self.grid[0], self.grid[1])](*arguments, **options)
            total = dq if total is None else total.add_(dq)  # type: ignore[arg-type]
        count_launches(len(parts))
        return total if total is None else total.to(saved.q.dtype)

    def row_arguments(
        self,
        saved: Saved,
        placed: Placed,
        ranges: Tensor,
        results: tuple[Tensor, Tensor, Tensor | None],
        count: Tensor | None = None,
    ) -> tuple[list[Any], dict[str, int]]:
        """Return the arguments of `_sel_bwd_rows` in order, and its options; count: of query tiles that may share."""
        q, k, v, _, out, lse, dout, dlse = saved
        k_desc, v_desc = self.described(k, v, placed)
        values = self.values | self._placed(placed) | {"n_spans": ranges.shape[3]}
        TQ = self.sharing.TQ if self.sharing is not None and count is not None else 1
        values |= {"TQ": TQ, "EACH": min(TQ, ROWS_EACH)}
        in_order = [values[name] for name in _sel_bwd_rows.arg_names[len(ROW_TENSORS) :]]
        return [q, k, v, ranges, out, dout, lse, dlse, *results, count, k_desc, v_desc, *in_order], self.options

    @staticmethod
    def _shareable(sharing: SharedPlan, saved: Saved, placed: Placed) -> Passed | None:
        """Return what the kernels of query tiles are passed; None where they cannot run these tensors."""
        if saved.k.shape[2] > MAX_TMA_ROWS or saved.ranges.data_ptr() & 15:
            return None
        passed = sharing.passed(placed)
        return passed if passed.capacity else None

    def rows_sharing(self, sharing: SharedPlan, saved: Saved, passed: Passed, of_rows: OfRows) -> Tensor:
        """Do what `rows` does, with dq: the query tiles that share, and then the rows of the others."""
        dq = torch.empty(saved.q.shape, dtype=saved.q.dtype, device=self.device)
        index = sharing.index(passed)
        sharing.cover(saved.ranges, passed, index)
        arguments, options = self.shared_arguments(sharing, saved, passed, index, (*of_rows, dq))
        _sel_bwd_shared[(sharing.query_tiles,)](*arguments, **options)
        arguments, options = self.row_arguments(saved, passed.placed, saved.ranges, (*of_rows, dq), index.tensors[2])
        of_tile = sharing.TQ // min(sharing.TQ, ROWS_EACH)
        _sel_bwd_rows[(sharing.query_tiles // self.grid[1] * of_tile, self.grid[1])](*arguments, **options)
        count_launches(3)
        return dq

    def shared_arguments(
        self,
        sharing: SharedPlan,
        saved: Saved,
        passed: Passed,
        index: Index,
        results: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[list[Any], dict[str, int]]:
        """Return the arguments of `_sel_bwd_shared` in order, and its options."""
        q, k, v, ranges, out, lse, dout, dlse = saved
        values = self.values | self._placed(passed.placed) | {"capacity": passed.capacity}
        values |= sharing.shared.constants(self.out_shape[3], ranges.shape[3])
        in_order = [values[name] for name in _sel_bwd_shared.arg_names[len(DQ_TENSORS) :]]
        described = sharing.start_shared.public((q, k, v), passed.placed)
        tensors = (q, k, v, ranges, out, dout, lse, dlse, *results, *index.tensors, *described)
        return [*tensors, *in_order], sharing.shared.options

    def index(self) -> RowIndex:
        """Return room for the index."""
        n, slots = self.n, self.backward.slots
        marks = self.room(KINDS.value * n * self.words)
        of_tiles = self.room(KINDS.value * n), self.room(n, torch.int64), self.room(n), self.room(n)
        return RowIndex(marks, *of_tiles, self.room(1), self.room(self.capacity), self.room(slots))

    def make_index(self, ranges: Tensor, finite: Tensor, S_kv: int, index: RowIndex) -> None:
        """Make the index of rows by KV tile; finite: as the rows' pass leaves it."""
        marks, counts, first, chunks, slot, n_slots, rows, jobs = index
        arguments, options = self.mark_arguments(ranges, finite, S_kv, marks)
        _mark[self.mark_grid](*arguments, **options)
        block_w = min(next_power_of_2(self.words), 64)
        _count[(self.n, KINDS.value)](marks, counts, self.tiles, self.words, block_w)
        least = LEAST_BATCHES * self.backward.queries(self.out_shape[3])
        _share_out[(1,)](counts, first, chunks, slot, n_slots, self.n, self.backward.slots, least, 1024)
        _list[(self.n,)](
            marks, counts, first, chunks, slot, rows, jobs, self.tiles, self.words, self.capacity, block_w
        )  # fmt: skip
        count_launches(4)

    def mark_arguments(
        self, ranges: Tensor, finite: Tensor, S_kv: int, marks: Tensor
    ) -> tuple[list[Any], dict[str, int]]:
        """Return the arguments of `_mark` in order, and its options."""
        words = min(next_power_of_2(-(-self.tiles // 32)), 4)
        unroll = min(next_power_of_2(ranges.shape[3]), 8)
        values: dict[str, Any] = self.values | {"S_kv": S_kv, "n_spans": ranges.shape[3]}
        in_order = [values[name] for name in MARK_SIZES]
        plain = self.backward.queries(self.out_shape[3]) * values["BLOCK_N"] <= MOST_SPANS.value
        return [ranges, finite, marks, *in_order, plain, self.backward.block_t, words, unroll], {"num_warps": 4}

    def keys(
        self,
        saved: Saved,
        placed: Placed,
        stat: Tensor,
        index: RowIndex,
        results: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """Sum dk and dv of every KV tile, or of its chunks."""
        arguments, options = self.key_arguments(saved, placed, stat, index, results)
        _sel_bwd_keys[(self.backward.slots + self.n,)](*arguments, **options)
        count_launches(1)

    def key_arguments(
        self,
        saved: Saved,
        placed: Placed,
        stat: Tensor,
        index: RowIndex,
        results: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[list[Any], dict[str, int]]:
        """Return the arguments of `_sel_bwd_keys` in order, and its options."""
        launch = self.backward
        values = self.values | self._placed(placed) | launch.key_constants(self.out_shape[3])
        values |= {"n_spans": saved.ranges.shape[3], "slots": launch.slots, "capacity": self.capacity}
        in_order = [values[name] for name in _sel_bwd_keys.arg_names[len(KEY_TENSORS) :]]
        tensors = (*saved[:4], saved.dout, stat, *results, *index[1:])
        return [*tensors, *in_order], {"num_warps": launch.num_warps, "num_stages": launch.num_stages}

    def merge(self, index: RowIndex, results: tuple[Tensor, Tensor, Tensor]) -> None:
        """Add the chunks of popular tiles."""
        dk, dv, part = results
        blocks = sum(-(-x.shape[3] // MERGE_COLUMNS) for x in (dk, dv))
        _sel_bwd_merge[(self.n, blocks)](
            part, index.chunks, index.slot, dk, dv, self.values["scale"], dk.shape[2],
            dk.shape[3], dv.shape[3], self.backward.block_t, MERGE_COLUMNS,
        )  # fmt: skip
        count_launches(1)

    @staticmethod
    def _placed(placed: Placed) -> dict[str, Any]:
        """Return by name what depends on where K and V lie."""
        return dict(zip(_sel_fwd.arg_names[len(TENSOR_ARGS) :], placed.arguments, strict=True))
