"""Launch the selection kernel: capability, arguments, workspaces, and the short way to a kernel compiled before."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import torch
import triton
from torch import Tensor

from . import kernels, tuning
from .kernels import _sel_fwd
from .tuning import LaunchConfig, next_power_of_2

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.4: no host-side descriptors
    TensorDescriptor = None

INTERPRETED = kernels.INTERPRETED.value
LOG2_E = 1.4426950408889634
# Launching a compiled kernel object is private API: only where its call has been checked against the public launch.
DIRECT_LAUNCH = triton.__version__.startswith("3.6.") and not INTERPRETED
MAX_PLANS = 4096

_launches = itertools.count()
_plans: dict[tuple, _Plan] = {}
_workspaces: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
_capture_counters: dict[int, tuple[Tensor, Any]] = {}
_lock = threading.Lock()


def launch_count() -> int:
    """Return how many times this process has launched the kernel."""
    global _launches
    with _lock:
        n = next(_launches)
        _launches = itertools.count(n)
        return n


def unsupported_reason(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor) -> str | None:
    """Say in one sentence why the kernel cannot run these (valid) tensors here; None if it can."""
    H, D, Dv = q.shape[3], q.shape[4], v.shape[3]
    if not INTERPRETED and q.device.type != "cuda":
        return f"no CUDA device: the tensors are on {q.device}, and TRITON_INTERPRET is not set"
    if q.device.type == "cuda" and torch.version.hip is not None:
        return "the GPU is not NVIDIA's"
    if q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) < (8, 0):
        return f"{torch.cuda.get_device_name(q.device)} has compute capability below 8.0"
    if H > tuning.MAX_HEADS:
        return f"H={H} is above {tuning.MAX_HEADS}"
    for name, width in (("D", D), ("Dv", Dv)):
        if width % 16 or not 16 <= width <= tuning.MAX_WIDTH:
            return f"{name}={width} is not a multiple of 16 from 16 to {tuning.MAX_WIDTH}"
    if ranges.shape[3] > tuning.MAX_SPANS:
        return f"n_spans={ranges.shape[3]} is above {tuning.MAX_SPANS}"
    if k.shape[2] >= 2**31:
        return f"S_kv={k.shape[2]} does not fit in 31 bits"
    return None


def launch_config(
    q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, *, min_len: int | None = None, max_len: int | None = None
) -> LaunchConfig:
    """Return the launch that `forward` would use for these tensors."""
    B, S, G, H, D = q.shape
    sm_count, has_tma = _device_facts(q.device)
    longest = k.shape[2] if max_len is None else max_len
    return tuning.choose(
        B * S * G, H, D, v.shape[3], ranges.shape[3], longest, sm_count=sm_count, has_tma=has_tma and _tma_fits(k, v)
    )


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
    lse: Tensor | None = None,
    launch: LaunchConfig | None = None,
) -> Tensor:
    """Run the kernel on arguments that `api` has checked; no routing.

    out: contiguous [B, S, G, H, Dv] of q's dtype to write into. lse: contiguous fp32 [B, S, G, H] that receives the rows'
    natural-log LSE. launch: forces a variant, as tests and sweeps do. min_len is not used: the kernel does not pad.
    """
    q_shape, k_shape = q.shape, k.shape
    key = (q_shape, k_shape, v.shape, ranges.shape, q.stride(), k.stride(), v.stride(), ranges.stride(), q.dtype,
           ranges.dtype, q.device, scale, max_len, lse is None, launch)  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        plan = _Plan(q, k, v, ranges, scale, max_len, lse is not None, launch)
        if len(_plans) >= MAX_PLANS:
            _plans.clear()
        _plans[key] = plan
    if out is None:
        out = torch.empty(plan.out_shape, dtype=q.dtype, device=q.device)
    plan.run(q, k, v, ranges, out, lse)
    return out


class _Plan:
    """Everything about a call that its pointers do not change. Keyed by all that it depends on, see `forward`."""

    def __init__(self, q, k, v, ranges, scale, max_len, has_lse, launch) -> None:
        B, S, G, H, D = q.shape
        S_kv, Dv = k.shape[2], v.shape[3]
        self.n_rows = B * S * G
        self.out_shape = (B, S, G, H, Dv)
        self.config = config = launch or launch_config(q, k, v, ranges, max_len=max_len)
        block_h = max(16, next_power_of_2(H))
        self.part_size = config.splits * block_h * (-(-Dv // config.block_dv) * config.block_dv + 2)
        strides = [_strides(x) for x in (q, k, v)]
        flat = [stride for x in strides for stride in x]
        self.unit = unit = next(u for u in (16, 8, 1) if all(stride % u == 0 for stride in flat))
        self.scale_log2 = (D**-0.5 if scale is None else scale) * LOG2_E
        self.sizes = (S, G, S_kv, ranges.shape[3], *(stride // unit for stride in flat), *_strides(ranges))
        block_n = next_power_of_2(ranges.shape[3])
        self.constants = (H, D, Dv, unit, block_h, config.block_d, config.block_dv, config.block_l, block_n,
                          config.splits, config.load != "gather")  # fmt: skip
        self.tma = config.load == "tma"
        if self.tma and not (TensorDescriptor is not None and _tma_fits(k, v)):
            raise ValueError(f"launch: value is {config}, expected a load that does without TMA descriptors")
        self.device = q.device.index
        self.compiled: Any = None

    def run(self, q, k, v, ranges, out, lse) -> None:
        if self.n_rows == 0:
            return
        counters, parts = None, None
        pointers = (q.data_ptr(), k.data_ptr(), v.data_ptr(), ranges.data_ptr(), out.data_ptr())
        compiled = self.compiled
        if INTERPRETED:
            if self.config.splits > 1:
                counters = torch.zeros(self.n_rows, dtype=torch.int32)
                parts = torch.full((self.n_rows * self.part_size,), float("nan"))
            self._launch(q, k, v, ranges, out, lse, parts, counters)
        elif torch.cuda.current_device() != self.device:
            with torch.cuda.device(self.device):
                self.run(q, k, v, ranges, out, lse)
            return
        else:
            stream = torch._C._cuda_getCurrentRawStream(self.device)
            if self.config.splits > 1:
                counters, parts = _workspace(self.device, stream, self.n_rows, self.n_rows * self.part_size)
            aligned = not (pointers[0] | pointers[1] | pointers[2] | pointers[4] | pointers[3]) & 15
            if compiled is not None and aligned and lse is None:
                compiled.run(self.n_rows * self.config.splits, 1, 1, stream, compiled.function, compiled.packed_metadata,
                             None, None, None, *pointers, None, parts if parts is None else parts.data_ptr(),
                             counters if counters is None else counters.data_ptr(), None, None, self.scale_log2,
                             *self.sizes, *self.constants)  # fmt: skip
            else:
                kernel = self._launch(q, k, v, ranges, out, lse, parts, counters)
                if DIRECT_LAUNCH and aligned and lse is None and not self.tma:
                    self.compiled = kernel
        next(_launches)

    def _launch(self, q, k, v, ranges, out, lse, parts, counters):
        """Launch through Triton's public interface; returns the compiled kernel."""
        k_desc, v_desc = (self._descriptor(k, self.config.block_d), self._descriptor(v, self.config.block_dv)) if self.tma else (None, None)
        return _sel_fwd[(self.n_rows * self.config.splits,)](
            q, k, v, ranges, out, lse, parts, counters, k_desc, v_desc, self.scale_log2, *self.sizes, *self.constants,
            num_warps=self.config.num_warps, num_stages=self.config.num_stages)  # fmt: skip

    def _descriptor(self, x: Tensor, width: int):
        B, G, S_kv, D = x.shape
        return TensorDescriptor(x, [B * G * S_kv, D], [x.stride(2), 1], [self.config.block_l, width])


def _strides(x: Tensor) -> tuple[int, ...]:
    """Return the strides of all but the last dimension, 0 where the dimension has one element and the stride means nothing."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True))


def _tma_fits(k: Tensor, v: Tensor) -> bool:
    """Tell whether K and V can each be seen as one matrix [B·G·S_kv, width] that a TMA descriptor may describe."""
    for x in (k, v):
        B, G, S_kv, D = x.shape
        stride_b, stride_g, stride_t, _ = x.stride()
        one_matrix = (G == 1 or stride_g == S_kv * stride_t) and (B == 1 or stride_b == G * S_kv * stride_t)
        aligned = x.data_ptr() % 16 == 0 and stride_t * x.element_size() % 16 == 0 and stride_t >= D
        if not (one_matrix and aligned and 0 < B * G * S_kv < 2**31):
            return False
    return True


_facts: dict[torch.device, tuple[int, bool]] = {}


def _device_facts(device: torch.device) -> tuple[int, bool]:
    """Return the number of multiprocessors, and whether TMA descriptors can be used."""
    if device not in _facts:
        if device.type != "cuda":
            _facts[device] = (1, TensorDescriptor is not None)
        else:
            props = torch.cuda.get_device_properties(device)
            _facts[device] = (props.multi_processor_count, TensorDescriptor is not None and props.major >= 9)
    return _facts[device]


def _workspace(device: int, stream: int, n_counters: int, n_floats: int) -> tuple[Tensor, Tensor]:
    """Return zeroed counters, which the kernel sets back to zero, and room for partial results.

    Calls on one stream run one after another and share them. A captured call gets its own, since its graph may be replayed
    on any stream: the partial results from the graph's pool, the counters from a block that no other call uses.
    """
    if torch.cuda.is_current_stream_capturing():
        parts = torch.empty(n_floats, dtype=torch.float32, device=f"cuda:{device}")
        return torch.zeros(n_counters, dtype=torch.int32, device=parts.device), parts
    counters, parts = _workspaces.get((device, stream), (None, None))
    if counters is None or parts is None or counters.numel() < n_counters or parts.numel() < n_floats:
        counters = torch.zeros(max(n_counters, 1024), dtype=torch.int32, device=f"cuda:{device}")
        parts = torch.empty(max(n_floats, 1 << 20), dtype=torch.float32, device=counters.device)
        _workspaces[device, stream] = counters, parts
    return counters, parts
