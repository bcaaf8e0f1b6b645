"""Launch a compiled kernel without Triton's argument binding: everything that is private API of Triton.

A compiled kernel's `run` is a CudaLauncher, around a C function that starts the kernel on a grid and a stream. Read in
triton/backends/nvidia/driver.py and driver.c of each version:

- 3.6 generates a C function for each signature. It takes grid, stream, function, cooperative grid, PDL, global and
  profile scratch, (num_warps, num_ctas, shared), launch metadata, the two launch hooks, and then the kernel's arguments
  one by one. With TMA descriptors it is wrapped in a closure that expands them.
- 3.7, 3.8 and 3.9 have one C function for all kernels, `utils.launch`. The scratch stands behind the hooks, then come
  the annotations of the arguments (which of them are constants), the signature as bytes, and the kernel's arguments as
  one sequence. 3.8 and 3.9 unload a kernel when its CompiledKernel is collected, so that a launch must keep it alive;
  with the sanitizer GSan they add arguments.

Common to all: a pointer may be an integer or None; constants and missing pointers are passed and ignored; a descriptor
is a tensor map, which `fill_tma_descriptor` (3.6) or `fill_tma_descriptor_tiled` makes of address, swizzle, element
size and type, block, shape, strides and padding, followed by its shape and strides. The grid's first dimension is
multiplied by num_ctas, of which clusters are made. Launch hooks are called only if they are passed.
"""

# No `from __future__ import annotations` here: Triton 3.0 and 3.1 read the annotations as objects.
import inspect
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import INTERPRETED

_works: dict[int, bool] = {}  # by device: what the self-test found
PROBE_ROWS, PROBE_COLUMNS = 16, 64


class Direct(NamedTuple):
    """Say how to launch a compiled kernel without Triton's argument binding.

    launch(*grid, stream, *head, *arguments), or with the arguments as one tuple if one_tuple. describe(address, rows,
    columns, stride, which) makes the arguments of the kernel's descriptor number `which`: a matrix of contiguous rows,
    `stride` elements apart; None if the kernel takes none. kernel: what must live as long as launches may come.
    """

    launch: Callable[..., None]
    head: tuple
    one_tuple: bool
    describe: Callable[[int, int, int, int, int], tuple] | None
    kernel: Any


def direct_launch(compiled: Any, cluster: int = 1) -> Direct | None:
    """Return how to launch a compiled kernel directly; None: only through the public interface.

    Valid for any call whose pointers are as aligned as those that the kernel was compiled for, with all arguments in
    the order of its signature, in place of a descriptor what `describe` makes. cluster: programs of a thread-block
    cluster, which the C function makes of what it takes for the CTAs of one program.
    """
    run = compiled.run
    if run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False):
        return None
    num_warps, _, shared = compiled.packed_metadata
    return ADAPTERS[_version()](compiled, (num_warps, cluster, shared))


def works(device: torch.device) -> bool:
    """Tell whether kernels can be launched directly on this CUDA device, by a self-test at first use.

    It compares what a small kernel writes with what the public launch has it write. Where they differ, or Triton is not
    as expected, it warns once. During a capture, which forbids the test, the answer is no until there is another call.
    """
    if INTERPRETED.value or _version() not in ADAPTERS:
        return False
    if device.index not in _works:
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                return False
            try:
                problem = _self_test(device)
            except Exception as error:  # whatever private API that is not as expected may raise
                problem = f"{type(error).__name__}: {error}"
        _works[device.index] = problem is None
        if problem is not None:
            reason = " ".join(problem.split())
            said = f"nsa_sel: Triton {triton.__version__} is launched through its public interface, which takes longer"
            warnings.warn(f"{said}: {reason}", RuntimeWarning, stacklevel=2)
    return _works[device.index]


def _version() -> tuple[str, ...]:
    return tuple(triton.__version__.split(".")[:2])


def _per_signature(compiled: Any, metadata: tuple[int, int, int]) -> Direct:
    run, launch, describe = compiled.run, compiled.run.launch, None
    if metas := getattr(compiled.metadata, "tensordesc_meta", None):
        launch = inspect.getclosurevars(launch).nonlocals["launcher"]
        describe = _describer(metas, triton.runtime.driver.active.utils.fill_tma_descriptor)
    head = (compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None, metadata, None, None, None)
    return Direct(launch, head, False, describe, compiled)


def _one_for_all(compiled: Any, metadata: tuple[int, int, int]) -> Direct:
    run, utils, describe = compiled.run, triton.runtime.driver.active.utils, None
    if metas := getattr(compiled.metadata, "tensordesc_meta", None):
        describe = _describer(metas, utils.fill_tma_descriptor_tiled)
    head = (
        compiled.function, run.launch_cooperative_grid, run.launch_pdl, metadata, None, None, None, None, None,
        run.arg_annotations, run.kernel_signature,
    )  # fmt: skip
    return Direct(utils.launch, head, True, describe, compiled)


ADAPTERS: dict[tuple[str, ...], Callable[[Any, tuple], Direct]] = {
    ("3", "6"): _per_signature,
    ("3", "7"): _one_for_all,
    ("3", "8"): _one_for_all,
    ("3", "9"): _one_for_all,
}


def _describer(metas: list[dict], fill: Callable[..., Any]) -> Callable[[int, int, int, int, int], tuple]:
    """Return the function that makes a descriptor's arguments; metas: what the compiler says of each descriptor."""
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    kinds = [
        (meta["swizzle"], meta["elem_size"], TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]], meta["block_size"])
        for meta in metas
    ]

    def describe(address: int, rows: int, columns: int, stride: int, which: int) -> tuple:
        shape, strides = (rows, columns), (stride, 1)
        return fill(address, *kinds[which], shape, strides, 0), *shape, *strides

    return describe


@triton.jit(do_not_specialize=["n"])
def _probe(
    x_ptr, none_ptr, out_ptr, x_desc, factor: tl.float32, n: tl.int32, stride, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, NAME: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Write factor · x + n, and with RANK the program's number in its cluster, to out[program]."""
    offs = tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, COLUMNS)[None, :]
    x = tl.load(x_ptr + offs) if x_desc is None else x_desc.load([0, 0])
    value = x.to(tl.float32) * factor + n
    if RANK:
        value += tl.inline_asm_elementwise("mov.u32 $0, %cluster_ctarank;", "=r", [], tl.int32, is_pure=False, pack=1)
    if none_ptr is None and NAME == "probe":
        tl.store(out_ptr + tl.program_id(0) * ROWS * stride + offs, value)


def _self_test(device: torch.device) -> str | None:
    """Say what is wrong with the direct launch on this device, which is current; None if nothing is."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    major = torch.cuda.get_device_capability(device)[0]
    shape = [PROBE_ROWS, PROBE_COLUMNS]
    x = torch.arange(PROBE_ROWS * PROBE_COLUMNS, device=device).view(shape).remainder(97).half()
    descriptor = TensorDescriptor(x, shape, [PROBE_COLUMNS, 1], shape) if major >= 9 else None
    values = (0.5, 3, PROBE_COLUMNS, PROBE_ROWS, PROBE_COLUMNS, "probe", major >= 9)

    def poisoned() -> Tensor:
        return torch.full((4, *shape), -1.0, device=device)

    want = poisoned()
    arguments: tuple = (x, None, want, descriptor, *values)
    compiled = _probe[(4, 1, 1)](*arguments)
    for cluster in (1, 2) if major in (9, 10) else (1,):
        direct, got = direct_launch(compiled, cluster), poisoned()
        if direct is None:
            return "it asks for scratch memory"
        described: tuple = (None,)
        if direct.describe is not None:
            described = direct.describe(x.data_ptr(), PROBE_ROWS, PROBE_COLUMNS, PROBE_COLUMNS, 0)
        arguments = (x.data_ptr(), None, got.data_ptr(), *described, *values)
        stream = torch.cuda.current_stream(device).cuda_stream
        grid = (4 // cluster, 1, 1)
        if direct.one_tuple:
            direct.launch(*grid, stream, *direct.head, arguments)
        else:
            direct.launch(*grid, stream, *direct.head, *arguments)
        ranks = torch.arange(4, device=device).remainder(cluster).view(4, 1, 1)
        if not torch.equal(got, want + ranks):
            return f"a direct launch in clusters of {cluster} writes other values"
    return None
