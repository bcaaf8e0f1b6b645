"""What the GPU and this Triton can do, what a call is to them, TMA descriptors, and workspaces that calls share."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from . import direct, tiles
from .call import Call, Gpu
from .kv import as_matrices, lie_of
from .launch_config import SMALLEST_SHARED_BYTES

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.4: no descriptors made on the host, hence no TMA
    TensorDescriptor = None

INTERPRETED = tiles.INTERPRETED.value
# Zeroed counters set aside for CUDA graphs, 1 MiB per device; each captured call whose rows are split takes its own.
GRAPH_COUNTERS = 1 << 18

Boxes = tuple[int, ...]  # the columns of a kernel's descriptors of K and V; none where it has no place for them

_gpus: dict[torch.device, Gpu] = {}
_workspaces: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
_graph_counters: dict[int, Tensor] = {}  # by device: zeros that captured calls take from, each its own
_graph_lock = threading.Lock()


def gpu_of(device: torch.device) -> Gpu:
    """Return what launches are chosen by on this device.

    The interpreter's CPU stands for a GPU of one multiprocessor; the meta device, for compiling alone, has clusters.
    """
    if device not in _gpus:
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            gpu = Gpu(
                name=torch.cuda.get_device_name(device),
                sm_count=properties.multi_processor_count,
                shared_bytes=getattr(properties, "shared_memory_per_block_optin", SMALLEST_SHARED_BYTES),
                has_tma=TensorDescriptor is not None and properties.major >= 9,
                has_clusters=direct.works(device) and properties.major in (9, 10),
            )
            if torch.cuda.is_current_stream_capturing():  # what `works` says then does not hold for long
                return gpu
            _gpus[device] = gpu
        else:
            only_compiled = device.type == "meta"
            _gpus[device] = Gpu(device.type, 1, SMALLEST_SHARED_BYTES, TensorDescriptor is not None, only_compiled)
    return _gpus[device]


def tma_fits(k: Tensor, v: Tensor) -> bool:
    """Tell whether TMA descriptors can serve K and V."""
    return not (k.data_ptr() | v.data_ptr()) % 16 and as_matrices(lie_of(k, v), k.element_size()) is not None


def stand_in_len(S_kv: int) -> int:
    """Return what stands in for a max_len that is not known: S_kv rounded down to a power of two, or zero."""
    return 1 << S_kv.bit_length() >> 1


def call_of(
    q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, *, min_len: int | None = None, max_len: int | None = None
) -> Call:
    """Return what the launch of these tensors is chosen by; in place of an unknown max_len `stand_in_len` of S_kv."""
    B, S, G, H, D = q.shape
    return Call(
        N=B * S * G,
        H=H,
        D=D,
        Dv=v.shape[3],
        n_spans=ranges.shape[3],
        max_len=stand_in_len(k.shape[2]) if max_len is None else max_len,
        shared_kv=S > 1,
        element_bytes=q.element_size(),
        one_length=max_len is not None and min_len == max_len,
        fits_tma=tma_fits(k, v),
    )


def bind_context() -> None:
    """Give this thread the CUDA context that making a TMA descriptor takes for granted.

    A new thread has none before its first call of the CUDA runtime, and cached memory is had without one. This call is
    the cheapest that gives it, and is legal during capture.
    """
    if not INTERPRETED:
        torch.cuda.is_current_stream_capturing()


def descriptor(x: Tensor, rows: int, columns: int, block: list[int]) -> Any:
    """Make the TMA descriptor of K or V, seen as a matrix of a row per token, for tiles of this shape."""
    return TensorDescriptor(x, [rows, columns], [x.stride(2), 1], block)


def descriptors(kv: tuple[Tensor, Tensor], rows: int, columns: tuple[int, int], block_l: int, boxes: Boxes) -> tuple:
    """Return the descriptors of K and V, for tiles of block_l tokens.

    boxes: the columns of each descriptor's tiles. rows, columns: of the matrices of K and V.
    """
    each = zip(boxes, kv, columns, strict=True)
    return tuple(descriptor(x, rows, n, [block_l, width]) for width, x, n in each)


def direct_descriptors(
    describe: Any, addresses: tuple[int, int], rows: int, columns: tuple[int, int], strides: tuple[int, int]
) -> tuple:
    """Return the same as a compiled kernel takes them; addresses: of K and V; describe: of its direct launch."""
    bind_context()
    each = enumerate(zip(addresses, columns, strides, strict=True))
    return tuple(part for which, (at, n, stride) in each for part in describe(at, rows, n, stride, which))


def workspace(device: torch.device, stream: int, n_counters: int, n_floats: int) -> tuple[Tensor, Tensor]:
    """Return room for partial results, and counters that are zero and that the kernel sets back to zero.

    Calls on one stream run one after another and share them. A captured call gets its own, since its graph may be
    replayed on any stream: room from the graph's pool, and counters from GRAPH_COUNTERS zeros that an earlier call
    made. Where none or too few are left the graph itself makes its zeros, at the cost of one more kernel a replay.
    """
    if device.type != "cuda":
        parts = torch.empty(n_floats, dtype=torch.float32, device=device)
        return parts, torch.zeros(n_counters, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        parts = torch.empty(n_floats, dtype=torch.float32, device=device)
        with _graph_lock:
            zeros = _graph_counters.get(device.index)
            if zeros is not None and zeros.numel() >= n_counters:
                _graph_counters[device.index] = zeros[n_counters:]
                return parts, zeros[:n_counters]
        return parts, torch.zeros(n_counters, dtype=torch.int32, device=device)
    known = _workspaces.get((device.index, stream))
    if known is None or known[0].numel() < n_floats or known[1].numel() < n_counters:
        known = _lasting(device, max(n_floats, 1 << 20), max(n_counters, 1 << 10))
        for x in known:  # so that its memory, once a larger one takes its place, waits for the calls that use it
            x.record_stream(torch.cuda.current_stream(device))
        _workspaces[device.index, stream] = known
        if device.index not in _graph_counters:
            _graph_counters[device.index] = _lasting(device, 0, GRAPH_COUNTERS)[1]
    return known


def _lasting(device: torch.device, n_floats: int, n_counters: int) -> tuple[Tensor, Tensor]:
    """Make room for partial results and zeroed counters, in no CUDA graph's pool: what stays may not lie there.

    While torch.compile warms a graph up, memory for this thread, or stream, comes from the graph's pool: hence another
    thread, which has the default stream. What it makes is there for every stream.
    """

    def make() -> tuple[Tensor, Tensor]:
        with torch.cuda.device(device):
            parts = torch.empty(n_floats, dtype=torch.float32, device=device)
            counters = torch.zeros(n_counters, dtype=torch.int32, device=device)
            torch.cuda.current_stream().synchronize()
        return parts, counters

    with ThreadPoolExecutor(1) as apart:
        return apart.submit(make).result()
