"""Launch the selection kernel: capability, arguments, workspaces, and the short way to a kernel compiled before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import kernel_failed
from . import device, direct, launch_config, rules, tuned_table
from .device import INTERPRETED, bind_context, call_of, descriptors, direct_descriptors, gpu_of, tma_fits
from .forward import TENSOR_ARGS, _sel_fwd
from .kv import MAX_KEPT, MAX_TMA_ROWS, Placed, Places, as_matrices, is_view, lie_of, outer_strides, remember
from .launch_config import LaunchConfig

try:  # what compiled graphs allocate with: a third of the time of torch.empty
    from torch._C._dynamo.guards import _empty_strided_cuda  # type: ignore[attr-defined]
except ImportError:
    _empty_strided_cuda = None

LOG2_E = 1.4426950408889634
MAX_CONTEXT = 2**31 - 1  # tokens of K and V

_launches = 0


def empty(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a new tensor on this device, which is current."""
    if _empty_strided_cuda is not None and device.type == "cuda":
        return _empty_strided_cuda(shape, stride, dtype)
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def launch_count() -> int:
    """Return how many times this process has launched the kernel."""
    return _launches


def count_launches(n: int) -> None:
    """Add the launches of other kernels of this folder."""
    global _launches
    _launches += n


def unsupported_reason(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor) -> str | None:
    """Say in one sentence why the kernel cannot run these (valid) tensors here; None if it can."""
    if not INTERPRETED and q.device.type != "cuda":
        return f"no CUDA device: the tensors are on {q.device}, and TRITON_INTERPRET is not set"
    if q.device.type == "cuda" and torch.version.hip is not None:
        return "the GPU is not NVIDIA's"
    if q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) < (8, 0):
        return f"{torch.cuda.get_device_name(q.device)} has compute capability below 8.0"
    return unsupported_sizes(q, k, v)


def unsupported_sizes(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Say in one sentence for which size the kernel cannot run these tensors, on any GPU; None if it can."""
    H, D, Dv = q.shape[3], q.shape[4], v.shape[3]
    if H > launch_config.MAX_HEADS:
        return f"H={H} is above {launch_config.MAX_HEADS}"
    for name, width in (("D", D), ("Dv", Dv)):
        if width % 16 or not 16 <= width <= launch_config.MAX_WIDTH:
            return f"{name}={width} is not a multiple of 16 from 16 to {launch_config.MAX_WIDTH}"
    if k.shape[2] > MAX_CONTEXT:
        return f"S_kv={k.shape[2]} does not fit in 31 bits"
    if k.shape[1] > launch_config.MAX_GROUPS:
        return f"G={k.shape[1]} is above {launch_config.MAX_GROUPS}"
    if q.shape[0] * q.shape[1] >= 2**31:
        return f"B*S={q.shape[0] * q.shape[1]} does not fit in 31 bits"
    return None


def launch_for(
    q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, *, min_len: int | None = None, max_len: int | None = None
) -> LaunchConfig:
    """Return the launch that `forward` uses for these tensors: the tuned one if there is one, else by the rules."""
    call, gpu = call_of(q, k, v, ranges, min_len=min_len, max_len=max_len), gpu_of(q.device)
    tuned = None if max_len is None or q.device.type != "cuda" else tuned_table.lookup(call, gpu)
    return tuned or rules.choose(call, gpu)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    *,
    scale: float | None = None,
    min_len: int | None = None,
    max_len: int | None = None,
    out: Tensor | None = None,
    launch: LaunchConfig | None = None,
) -> Tensor:
    """Plan and run one call whose arguments `dispatch` has checked; no routing. Arguments as `Plan` and its `run`."""
    return Plan(q, k, v, ranges, scale, min_len, max_len, launch).run(q, k, v, ranges, out)


class Plan:
    """Hold everything about a call but its pointers and where K and V lie: launch, grid, arguments.

    It serves every call whose four tensors have the same shapes, strides, dtypes and devices, with the same scale and
    hints, where S_kv and the strides of K and V over batch and groups may be others as far as `places` says. Pointer
    alignment is looked at in each call. launch: forces a variant, as tests and sweeps do. scale, min_len, max_len: as
    `selection_attention` takes them.

    Raises: ValueError if the forced variant cannot run these tensors.
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
        launch: LaunchConfig | None = None,
    ) -> None:
        B, S, G, H, D = q.shape
        S_kv, Dv, n_spans = k.shape[2], v.shape[3], ranges.shape[3]
        self.config = config = launch or launch_for(q, k, v, ranges, min_len=min_len, max_len=max_len)
        if problem := self._problem(q, k, v):
            raise ValueError(f"launch: value is {config}, expected {problem}")
        self.arguments = (scale, min_len, max_len, launch)
        self.dtype, self.device = q.dtype, q.device
        self.out_shape = (B, S, G, H, Dv)
        self.out_stride = (S * G * H * Dv, G * H * Dv, H * Dv, Dv, 1)
        # The C launcher makes a cluster of programs along the grid's first dimension, and multiplies that.
        self.grid = (B * S, G, config.splits // config.cluster)
        self.n_counters = B * S * G * config.counters
        self.part_size = B * S * G * config.splits * config.part_floats(H, Dv)
        self.tma = config.load == "tma"
        self.boxes = config.block_d, config.block_dv
        lie = lie_of(k, v)
        of_q, of_ranges = ([0 if x.shape[i] == 1 else x.stride(i) for i in range(4)] for x in (q, ranges))
        self.token_strides = of_tokens = (k.stride(2), v.stride(2))
        unit = next(u for u in (16, 8, 1) if not any(n % u for n in (*of_q, *of_tokens, *outer_strides(lie))))
        # Positions in a row, to the end of its last tile, and offsets from its first token: 32 bits if those suffice.
        narrow = (2**31 - config.block_l) // max(n_spans, *of_tokens, 1)
        # Up to which S_kv one kernel and launch serve: no token, narrow offsets, TMA, an unknown max_len.
        stand_in = device.stand_in_len(S_kv)
        last = [0, narrow, MAX_TMA_ROWS, MAX_CONTEXT]
        if max_len is None:
            last += stand_in - 1, 2 * stand_in - 1
        lengths = range(max([-1, *(n for n in last if n < S_kv)]) + 1, min(n for n in last if n >= S_kv) + 1)
        matrices = as_matrices(lie, q.element_size()) if self.tma else None
        view = matrices is not None and is_view(lie, matrices)
        self.values = {
            "scale_log2": (D**-0.5 if scale is None else scale) * LOG2_E,
            **{"S": S, "G": G, "n_spans": n_spans, "splits": config.splits},
            **{f"stride_q{axis}": n // unit for axis, n in zip("bsgh", of_q, strict=True)},
            **{f"stride_{x}t": n // unit for x, n in zip("kv", of_tokens, strict=True)},
            **{f"stride_r{axis}": n for axis, n in zip("bsgn", of_ranges, strict=True)},
            **{"H": H, "D": D, "DV": Dv, "UNIT": unit, "WIDE": S_kv > narrow, "QUERIES": S > 1},
            **{"VIEW": view, "COLUMNS": matrices is not None and any(matrix.column for matrix in matrices)},
            **config.constants(H, Dv, n_spans),
        }
        self.options: dict[str, int] = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        if config.max_registers:
            self.options["maxnreg"] = config.max_registers
        self.direct: Any = None  # how to launch what is compiled, without and with an LSE
        self.direct_lse: Any = None
        self.descriptors: dict[tuple, tuple] = {}
        names = _sel_fwd.arg_names[len(TENSOR_ARGS) :]
        self.places = Places(lie, q.element_size(), unit, lengths, self.tma, view, names, self.values)

    def _problem(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """Say which launch is expected in place of one that cannot run these tensors; None if it can."""
        gpu = gpu_of(q.device)
        if problem := self.config.problem(q.shape[4], v.shape[3]):
            return problem
        if self.config.load == "tma" and not (gpu.has_tma and tma_fits(k, v)):
            return "a load that does without TMA descriptors"
        return "a launch without clusters" if self.config.cluster > 1 and not gpu.has_clusters else None

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
        """Launch, and return the result.

        out: contiguous [B, S, G, H, Dv] of q's dtype to write into. lse: contiguous fp32 [B, S, G, H] that receives the
        rows' natural-log LSE. placed: what `places` found for K and V, where the caller has it at hand.

        Raises: KernelFailed if the kernel does not compile or start.
        """
        global _launches
        placed = placed or self.places.find(lie_of(k, v))
        if placed is None:
            return Plan(q, k, v, ranges, *self.arguments).run(q, k, v, ranges, out, lse)
        if not INTERPRETED and torch._C._cuda_getDevice() != self.device.index:
            with torch.cuda.device(self.device):
                return self.run(q, k, v, ranges, out, lse, placed)
        if out is None:
            out = empty(self.out_shape, self.out_stride, self.dtype, self.device)
        if 0 in self.out_shape:
            return out
        lse_at = None if lse is None else lse.data_ptr()
        q_at, k_at, v_at, ranges_at, out_at = pointers = (
            q.data_ptr(), k.data_ptr(), v.data_ptr(), ranges.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        aligned = not (q_at | k_at | v_at | ranges_at | out_at | (lse_at or 0)) & 15
        if not aligned:
            if self.tma and (k_at | v_at) & 15:
                return Plan(q, k, v, ranges, *self.arguments).run(q, k, v, ranges, out, lse)
            if self.config.cluster > 1:  # launched directly, hence only with the alignment it was compiled for
                apart = replace(self.config, cluster=1)
                return Plan(q, k, v, ranges, *self.arguments[:3], apart).run(q, k, v, ranges, out, lse)
        parts = counters = None
        stream = 0 if INTERPRETED else torch._C._cuda_getCurrentRawStream(self.device.index)
        if self.config.splits > 1:
            parts, counters = device.workspace(self.device, stream, self.n_counters, self.part_size)
        known = self.direct if lse_at is None else self.direct_lse
        if known is not None and aligned:
            launch, head, one_tuple, describe, _ = known
            parts_at = counters_at = None
            if parts is not None and counters is not None:
                parts_at, counters_at = parts.data_ptr(), counters.data_ptr()
            described = (None,) * len(self.boxes)
            if describe is not None:
                at = (k_at, v_at, placed.rows)
                described = self.descriptors.get(at) or self._describe(describe, *at, placed.columns)
            if one_tuple:
                arguments = (*pointers, lse_at, parts_at, counters_at, *described, *placed.arguments)
                launch(*self.grid, stream, *head, arguments)
            else:
                launch(
                    *self.grid, stream, *head,
                    *pointers, lse_at, parts_at, counters_at, *described, *placed.arguments,
                )  # fmt: skip
            _launches += 1
            return out
        return self._run_publicly(q, k, v, ranges, out, lse, parts, counters, aligned, placed)

    def _run_publicly(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ranges: Tensor,
        out: Tensor,
        lse: Tensor | None,
        parts: Tensor | None,
        counters: Tensor | None,
        aligned: bool,
        placed: Placed,
    ) -> Tensor:
        """Compile if need be, launch through Triton's public interface, and keep the direct way for later calls."""
        global _launches
        if self.tma:
            bind_context()
        arguments = (q, k, v, ranges, out, lse, parts, counters, *self.described(k, v, placed), *placed.arguments)
        try:
            if self.config.cluster > 1:  # the public launch knows no clusters of separate programs
                compiled = _sel_fwd.warmup(*arguments, grid=self.grid, **self.options)
            else:
                compiled = _sel_fwd[self.grid](*arguments, **self.options)
                _launches += 1
            known = None
            if aligned and direct.works(self.device):
                known = direct.direct_launch(compiled, self.config.cluster)
            if known is not None:
                setattr(self, "direct" if lse is None else "direct_lse", known)
            if self.config.cluster > 1:
                if known is None:
                    raise RuntimeError("it takes scratch memory, which only the public launch provides")
                return self.run(q, k, v, ranges, out, lse, placed)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # the compiler, its cache and the driver raise whatever they like
            raise kernel_failed(self.config, error) from error
        return out

    def described(self, k: Tensor, v: Tensor, placed: Placed) -> tuple:
        """Return Triton's descriptors of K and V for the kernel's tiles, None for one that it does without."""
        if not self.tma:
            return (None,) * len(self.boxes)
        return descriptors((k, v), placed.rows, placed.columns, self.config.block_l, self.boxes)

    def _describe(self, describe: Any, k_at: int, v_at: int, rows: int, columns: tuple[int, int]) -> tuple:
        """Make the descriptors of K and V as the compiled kernel takes them, and keep them for the next call."""
        made = direct_descriptors(describe, (k_at, v_at), rows, columns, self.token_strides)
        return remember(self.descriptors, (k_at, v_at, rows), made, MAX_KEPT)
