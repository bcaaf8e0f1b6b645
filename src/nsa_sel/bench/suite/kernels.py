"""Kernels that users bring, `--sel-kernel MODULE:FUNCTION[=NAME]`: each is checked and timed as ours is.

Source: docs/your-kernel.md.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ... import spans
from ..saved.speedups import CORE_SUFFIX, PEER_METHODS, scope
from .cases import CORE_METHODS, OP_METHODS, Case
from .inputs import make_ranges

if TYPE_CHECKING:
    import pytest

RESERVED = frozenset((*OP_METHODS, *CORE_METHODS, *PEER_METHODS))
UNSUPPORTED = "unsupported: "  # begins the reason for having no time where the kernel itself gave it
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)  # part of a benchmark's id, which joins its parts with "-"
_BLOCKS = re.compile(r"blocks:([1-9][0-9]*)", re.ASCII)


class KernelError(ValueError):
    """Say in one line which option names no kernel, and what is expected."""


@dataclass(frozen=True)
class UserKernel:
    """Hold one kernel: the name of its method, MODULE:FUNCTION, the function, and the size of the blocks that it takes.

    spec: empty for the kernel of a package that is measured in place of this one. block_size: 0 if it takes ranges.
    `function.unsupported(q, k, v, ranges)`, if there is one, says why it cannot do a
    call, or returns None.
    """

    name: str
    spec: str
    function: Callable[..., Tensor]
    block_size: int = 0

    @property
    def about(self) -> str:
        """Return the spec and what it takes, as a saved run tells the kernel from another of its name."""
        return f"{self.spec}, {self.takes}"

    @property
    def takes(self) -> str:
        """Return what it takes, as --sel-takes and `block_size` name it."""
        return f"blocks:{self.block_size}" if self.block_size else "ranges"

    def methods(self, case: Case) -> tuple[str, ...]:
        """Return its methods in a case: as it is called, and on rows packed beforehand, where SDPA gets them too."""
        return (self.name,) if case.peers else (self.name, self.name + CORE_SUFFIX)

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor, ranges: Tensor) -> str | None:
        """Return why the kernel, by its own word, cannot do this call; None if it can."""
        declared = getattr(self.function, "unsupported", None)
        return None if declared is None else declared(q, k, v, ranges)

    def expressible(self, case: Case, method: str = "") -> bool:
        """Tell whether what the kernel takes can say what the case selects, and its method on packed rows too.

        A packed row is a context of its own, whose end cuts the last block: as blocks, all rows must have one length.
        """
        packed = bool(self.block_size) and scope(method) == "core"
        return expressible(case, self.block_size) and (case.one_length or not packed)

    def ready(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ranges: Tensor,
        *,
        scale: float | None = None,
        min_len: int | None = None,
        max_len: int | None = None,
    ) -> Callable[[], Tensor]:
        """Return the call with its arguments in place: ranges have become blocks here, and not when it is called.

        scale: None is 1/sqrt(D); the function always gets a number.

        Raises:
            ValueError: the kernel takes blocks, and the ranges are none.
        """
        hints = {"scale": q.shape[-1] ** -0.5 if scale is None else scale, "min_len": min_len, "max_len": max_len}
        if not self.block_size:
            return functools.partial(self.function, q, k, v, ranges, **hints)
        blocks = spans.ranges_to_blocks(ranges, self.block_size, k.shape[2])
        return functools.partial(self.function, q, k, v, blocks, block_size=self.block_size, **hints)

    def __call__(self, *tensors: Tensor, **hints: Any) -> Tensor:
        """Run the kernel; the arguments are those of `ready`."""
        return self.ready(*tensors, **hints)()


def add_options(add: Callable[..., object]) -> None:
    """Add --sel-kernel and --sel-takes to a parser, by its `add_argument` or, of pytest's, `addoption`."""
    add(
        "--sel-kernel",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION[=NAME]",
        help="put this kernel, f(q, k, v, ranges, *, scale, min_len, max_len) -> out, under the suite; repeatable",
    )
    add(
        "--sel-takes",
        action="append",
        default=[],
        metavar="[NAME=]blocks:SIZE",
        help="it takes block numbers in place of ranges, and block_size; without NAME: every kernel given",
    )


def kernels_of(config: pytest.Config) -> tuple[UserKernel, ...]:
    """Return the kernels that pytest's options name, imported when first asked for: by then a suite has chosen between
    GPU and interpreter.

    Raises: pytest.UsageError
    """
    import pytest

    try:
        return _parsed(tuple(config.getoption("sel_kernel")), tuple(config.getoption("sel_takes")))
    except KernelError as error:
        raise pytest.UsageError(str(error)) from None


@functools.cache
def _parsed(specs: tuple[str, ...], takes: tuple[str, ...]) -> tuple[UserKernel, ...]:
    return parse(specs, takes)


def methods(case: Case, kernels: Iterable[UserKernel]) -> tuple[str, ...]:
    """Return every method of a case: its own, then those of the kernels that users bring."""
    return (*case.methods, *(method for kernel in kernels for method in kernel.methods(case)))


@functools.cache
def expressible(case: Case, size: int) -> bool:
    """Tell whether blocks of this size, the last cut short only at a token's own position, are what it selects.

    size: 0 is a kernel that takes ranges, which express every case.
    """
    if not size or (case.block and case.block % size == 0 and not case.pages):
        return True
    if case.pages:
        return False
    ranges = make_ranges(case)
    try:
        spans.ranges_to_blocks(ranges, size, case.S_kv)
    except ValueError:
        return False
    return True


def block_size(takes: str) -> int:
    """Return the size of the blocks in the words of --sel-takes, 0 for anything else."""
    size = _BLOCKS.fullmatch(takes)
    return int(size[1]) if size else 0


def parse(specs: Iterable[str], takes: Iterable[str] = ()) -> tuple[UserKernel, ...]:
    """Import the kernels that `--sel-kernel` and `--sel-takes` name; modules are first sought in the working directory.

    Raises:
        KernelError: one line that names the option and what is wrong with it.
    """
    found: dict[str, UserKernel] = {}
    for spec in specs:
        kernel = _kernel(spec)
        if kernel.name in found:
            raise KernelError(f"--sel-kernel {spec}: there are two kernels {kernel.name}; give one another name: =NAME")
        found[kernel.name] = kernel
    sizes = _block_sizes(takes, list(found))
    return tuple(replace(kernel, block_size=sizes.get(name, 0)) for name, kernel in found.items())


def _kernel(spec: str) -> UserKernel:
    """Return the kernel that MODULE:FUNCTION[=NAME] names."""
    target, equals, name = spec.partition("=")
    module_name, colon, function_name = target.partition(":")
    if not (module_name and colon and function_name) or (equals and not name):
        raise KernelError(f"--sel-kernel {spec}: expected MODULE:FUNCTION or MODULE:FUNCTION=NAME")
    name = name or function_name
    if not _NAME.fullmatch(name):
        raise KernelError(f"--sel-kernel {spec}: the name {name} is no word of letters, digits and _; give one: =NAME")
    if name in RESERVED or name.endswith(CORE_SUFFIX):
        why = f"names in {CORE_SUFFIX} are kept" if name.endswith(CORE_SUFFIX) else "a method of this suite has it"
        raise KernelError(f"--sel-kernel {spec}: the name {name} is taken ({why}); give another: =NAME")
    function = getattr(_module(module_name, spec), function_name, None)
    if function is None:
        raise KernelError(f"--sel-kernel {spec}: {module_name} has no {function_name}")
    if not callable(function):
        raise KernelError(f"--sel-kernel {spec}: {function_name} is of type {type(function).__name__}, not callable")
    return UserKernel(name, target, function)


def _module(name: str, spec: str) -> object:
    here = str(Path.cwd())
    if sys.path[0] != here:
        sys.path.insert(0, here)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")  # the suite's settings make errors of them, for this package's own code
            return importlib.import_module(name)
    except Exception as error:  # a user's module may fail in any way
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise KernelError(f"--sel-kernel {spec}: no module {name} in {here} or installed") from None
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise KernelError(f"--sel-kernel {spec}: {name} cannot be imported: {said}") from error


def _block_sizes(takes: Iterable[str], names: Sequence[str]) -> dict[str, int]:
    """Return the block size of each kernel that takes blocks; what is said of one kernel goes before what is of all."""
    of_all: dict[str, int] = {}
    of_one: dict[str, int] = {}
    for text in takes:
        name, equals, what = text.rpartition("=")
        size = block_size(what)
        if not size or (equals and not name):
            raise KernelError(f"--sel-takes {text}: expected blocks:SIZE or NAME=blocks:SIZE, such as blocks:64")
        if equals and name not in names:
            raise KernelError(f"--sel-takes {text}: no kernel {name}; there are: {', '.join(names) or 'none'}")
        if not names:
            raise KernelError(f"--sel-takes {text}: there is no kernel; give one: --sel-kernel MODULE:FUNCTION")
        if name in of_one or (not name and of_all):
            raise KernelError(f"--sel-takes {text}: given twice")
        if name:
            of_one[name] = size
        else:
            of_all = dict.fromkeys(names, size)
    return of_all | of_one
