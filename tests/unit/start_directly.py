"""Launch the kernel publicly and directly, with Triton's own launcher, for a GPU that is not there.

    python start_directly.py

The C function, whose place a recorder takes, must be handed the same by both. Prints a line for each launch: "same", or
the first difference; then what the self-test says of a C function that works and of one that knows no clusters. A
program of its own, because the suite may have chosen the interpreter.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import torch
import triton.backends.nvidia.driver as nvidia
from start_kernel import AbsentGpu
from triton.runtime import driver

from nsa_sel.kernel import device, direct, launch, start
from nsa_sel.kernel.call import Gpu
from nsa_sel.kernel.launch_config import LaunchConfig
from nsa_sel.kernel.shared_config import SharedLaunch
from nsa_sel.kernel.shared_launch import SharedPlan

LAUNCHES = [  # and whether with an LSE
    (LaunchConfig("gather", 16, 64, 64, 1, 1), False),
    (LaunchConfig("gather", 16, 64, 64, 1, 1, splits=4), True),
    (LaunchConfig("tma", 16, 32, 64, 1, 1), False),
    (LaunchConfig("tma", 16, 64, 64, 1, 1, splits=4, cluster=2), True),
]
SHARED_LAUNCHES = [  # and the rows' launch, and whether with an LSE
    (SharedLaunch(16, 16, 64, 64, 1, 1), LaunchConfig("gather", 16, 64, 64, 1, 1), True),
    (SharedLaunch(64, 64, 64, 64, 4, 2, tma=True), LaunchConfig("tma", 16, 64, 64, 1, 1), False),
]
calls: list[tuple] = []


def fill(*what: Any) -> tuple:
    """Stand in for the function that makes a tensor map: say what it was asked for."""
    return ("map", *(tuple(x) if isinstance(x, list | tuple) else x for x in what))


class Gpu90(AbsentGpu):
    """Answer what Triton asks its driver before it compiles and when it launches."""

    launcher_cls = nvidia.CudaLauncher

    def __init__(self) -> None:
        super().__init__(90)
        self.utils = SimpleNamespace(
            launch=lambda *given: calls.append(given),
            build_signature_metadata=lambda signature: bytes(len(signature)),
            fill_tma_descriptor=fill,
            fill_tma_descriptor_tiled=fill,
            get_device_properties=lambda which: {"max_shared_mem": 232448},
            load_binary=lambda *what: (1, 2, 32, 0, 1024),
            unload_module=lambda module: None,
        )


def plain(x: Any) -> Any:
    """Return an argument as the C function reads it: a tensor is its address, and empty hooks are none."""
    if isinstance(x, torch.Tensor):
        return x.data_ptr()
    if type(x).__name__ in ("LazyDict", "HookChain"):
        return None
    return tuple(map(plain, x)) if isinstance(x, list | tuple) else x


def drawn(with_lse: bool) -> tuple[Any, ...]:
    """Return q, K and V of a short and of a longer context, ranges, and tensors to write into."""
    calls.clear()
    q, cache = torch.zeros(2, 2, 3, 4, 64).bfloat16(), torch.zeros(2, 3, 300, 64).bfloat16()
    values, ranges = cache.clone(), torch.zeros(2, 2, 3, 5, 2, dtype=torch.int32)
    out, lse = torch.zeros(2, 2, 3, 4, 64).bfloat16(), torch.zeros(2, 2, 3, 4) if with_lse else None
    short, longer = ((cache[:, :, :t], values[:, :, :t]) for t in (256, 270))
    return q, short, longer, ranges, out, lse


def difference(pairs: list[tuple[tuple, tuple]]) -> str | None:
    """Return the first two arguments that two launches were handed differently; None if there are none."""
    for one, other in pairs:
        if one != other:
            return next(f"{a} and {b}" for a, b in zip(one, other, strict=True) if a != b)
    return None


def compare(config: LaunchConfig, with_lse: bool) -> str:
    """Launch twice, and once with a longer context; clusters, which the public launch does not have, directly alone."""
    q, short, longer, ranges, out, lse = drawn(with_lse)
    plan, fresh = (launch.Plan(q, *kv, ranges, None, None, None, config) for kv in (short, longer))
    for kv in (short, short, longer):
        plan.run(q, *kv, ranges, out, lse)
    fresh.run(q, *longer, ranges, out, lse)
    first, second, third, fourth = (plain(call) for call in calls)
    if found := difference([(first, second), (third, fourth)]):
        return found
    clustered = [x[1] for x in first if isinstance(x, tuple) and len(x) == 3]
    return "same" if clustered == [config.cluster] else f"in clusters of {clustered}"


def compare_shared(shared: SharedLaunch, row: LaunchConfig, with_lse: bool) -> str:
    """Launch the three kernels of a call with shared tiles twice, and with a longer context once more and anew."""
    q, short, longer, ranges, out, lse = drawn(with_lse)
    plan, fresh = (SharedPlan(q, *kv, ranges, None, None, 640, shared, row) for kv in (short, longer))
    index = plan.index(plan.passed(plan.places.last))
    for each, (k, v) in ((plan, short), (plan, short), (plan, longer), (fresh, longer)):
        passed = each.passed(each.places.find(launch.lie_of(k, v)))
        each.cover(ranges, passed, index)
        each.attend((q, k, v, ranges, out, lse), passed, index)
        each.attend_rest((q, k, v, ranges, out, lse), passed, index)
    handed = [plain(call) for call in calls]
    same = [*zip(handed[:3], handed[3:6], strict=True), *zip(handed[6:9], handed[9:], strict=True)]
    return difference(same) or "same"


def probe(clusters: bool) -> Any:
    """Return a C function that does what the kernel of the self-test does."""

    def start(*given: Any) -> None:
        arguments = given[-1] if isinstance(given[-1], tuple | list) else given[-len(direct._probe.arg_names) - 4 :]
        metadata = next(x for x in given if isinstance(x, tuple) and len(x) == 3)
        x, _, out = map(plain, arguments[:3])
        factor, n = arguments[-7:-5]
        programs, size = given[0] * metadata[1], direct.PROBE_ROWS * direct.PROBE_COLUMNS
        source = torch.frombuffer((ctypes.c_char * (2 * size)).from_address(x), dtype=torch.half).float()
        target = torch.frombuffer((ctypes.c_char * (16 * size)).from_address(out), dtype=torch.float32).view(4, size)
        for program in range(programs):
            rank = program % metadata[1] if clusters else 0
            target[program] = source * factor + n + rank

    return start


gpu = Gpu90()
driver.set_active(gpu)
nvidia.PyKernelArg = lambda nested_tuple, type: type
nvidia.ARG_CONSTEXPR, nvidia.ARG_KERNEL, nvidia.ARG_TUPLE = 0, 1, 2
nvidia.compile_module_from_src = lambda **source: SimpleNamespace(launch=lambda *given: gpu.utils.launch(*given))
nvidia.library_dirs = lambda: []
works, direct.works = direct.works, lambda device: True
launch.INTERPRETED = device.INTERPRETED = start.INTERPRETED = True  # tensors of the CPU
workspace = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
device.workspace = lambda *what: workspace
device._gpus[torch.device("cpu")] = Gpu("sm_90", 132, 232448, has_tma=True, has_clusters=True)
for config, with_lse in LAUNCHES:
    print(f"{config}: {compare(config, with_lse)}")
for shared, config, with_lse in SHARED_LAUNCHES:
    print(f"{shared}: {compare_shared(shared, config, with_lse)}")
torch.cuda.get_device_capability = lambda device: (9, 0)
torch.cuda.current_stream = lambda device: SimpleNamespace(cuda_stream=0)
for clusters in (True, False):
    gpu.utils.launch = probe(clusters)
    print(direct._self_test(torch.device("cpu")))
