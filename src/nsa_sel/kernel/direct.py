"""Launch a compiled kernel without Triton's argument binding: everything that is private API of Triton."""

from __future__ import annotations

import inspect
from typing import Any

import triton

from .tiles import INTERPRETED

# Private API: only in the versions where the parity suite has run it on a GPU.
DIRECT_LAUNCH = triton.__version__.startswith("3.6.") and not INTERPRETED.value


def direct_launch(compiled: Any, values: tuple, tma: bool, cluster: int = 1) -> tuple | None:
    """Return how to launch a compiled kernel without Triton's argument binding: the C function, and what it is given.

    Valid for any call of the same plan whose pointers are as aligned as those that the kernel was compiled for: sizes
    and strides are not specialised, and everything else is part of the plan. None: launch through the public interface.
    Triton's launch hooks do not see such a launch. cluster: programs of a thread-block cluster, which the C function
    makes of what it takes for the CTAs of one program.
    """
    run = compiled.run
    if run.global_scratch_size or run.profile_scratch_size:
        return None
    num_warps, _, shared = compiled.packed_metadata
    launch, describe = run.launch, None
    if tma:
        from triton.backends.nvidia.driver import make_tensordesc_arg

        inner = inspect.getclosurevars(launch).nonlocals
        launch, meta = inner["launcher"], inner["tensordesc_meta"]

        def describe(descriptor: Any, which: int) -> list:
            return make_tensordesc_arg(descriptor, meta[which])

    head = (
        compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None, (num_warps, cluster, shared),
        None, None, None,
    )  # fmt: skip
    return launch, head, describe, values
