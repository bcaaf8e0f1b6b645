"""Start the kernel as a caller does, with Triton's real compiler, for a GPU that is not there; nothing is launched.

    python start_kernel.py '[[80, 1, ["gather", 64, 64, 64, 4, 2]]]'    compute capability, spans per row, LaunchConfig

A program of its own, because the suite may have chosen the interpreter. Prints a line for each: "compiled", or what the
launcher says.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from nsa_sel.errors import KernelFailed
from nsa_sel.kernel import launch
from nsa_sel.kernel.launch_config import LaunchConfig


class AbsentGpu:
    """Answer what Triton asks its driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it has compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


class Kernel:
    """Stand in for the kernel where the launcher meets it: compile, and do not launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.arg_names = kernel, kernel.arg_names

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        def start(*arguments: Any, **options: Any) -> None:
            assert self.kernel.warmup(*arguments, grid=grid, **options).asm["cubin"]

        return start


def say(n_spans: int, config: LaunchConfig) -> str:
    q, kv = torch.zeros(1, 2, 1, 4, 64).bfloat16(), torch.zeros(1, 1, 256, 64).bfloat16()
    try:
        launch.forward(q, kv, kv, torch.zeros(1, 2, 1, n_spans, 2, dtype=torch.int64), launch=config)
    except KernelFailed as error:
        return str(error)
    return "compiled"


if __name__ == "__main__":
    launch._sel_fwd = Kernel(launch._sel_fwd)
    # Tensors of the CPU, and no way around the stand-in.
    launch.INTERPRETED, launch.direct.works = True, lambda device: False
    for capability, n_spans, fields in json.loads(sys.argv[1]):
        driver.set_active(AbsentGpu(capability))
        print(say(n_spans, LaunchConfig(*fields)))
