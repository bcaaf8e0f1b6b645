"""A kernel that --sel-kernel gives, run so that what it must not do shows: a repro imports `watched`."""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nsa_sel import reference
from nsa_sel.bench.suite.kernels import UserKernel

under_test: UserKernel | None = None  # of the test that runs; None: this package's own
calls = 0  # of watched functions
# Every byte of memory that was not written yet: in each float dtype a NaN that no arithmetic gives.
POISON = 0xFF
POISONED_BLOCKS = 16  # the kernel may need memory before its output does
EMPTY = {
    torch.empty,
    torch.empty_like,
    torch.empty_strided,
    torch.empty_permuted,
    Tensor.new_empty,
    Tensor.new_empty_strided,
}
SIGNED = {2: torch.int16, 4: torch.int32}  # integers by their bytes


class Broken(AssertionError):
    """Say what a kernel did that none may do."""


def watched(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the kernel with a look at each call: form of the result, unwritten memory, inputs, the reference."""

    def call(q: Tensor, k: Tensor, v: Tensor, selected: Tensor, **options: Any) -> Tensor:
        global calls
        calls += 1
        inputs = {"q": q, "k": k, "v": v, "blocks" if "block_size" in options else "ranges": selected}
        before = {name: tensor.clone() for name, tensor in inputs.items()}
        shape = (*q.shape[:4], v.shape[3])
        with _poisoned(math.prod(shape) * q.element_size(), q.device), _entered_reference() as entered:
            out = function(q, k, v, selected, **options)
        if q.is_cuda:
            torch.cuda.synchronize()  # what the kernel does wrong is reported here, and not by the next call
        if entered:
            raise Broken(f"it called {reference.__name__}.{entered[0]}, so that the reference is compared with itself")
        for name, tensor in inputs.items():
            if not torch.equal(_bits(tensor), _bits(before[name])):
                raise Broken(f"it wrote into its input {name}")
        if not isinstance(out, Tensor):
            raise Broken(f"out: type is {type(out).__name__}, expected a tensor")
        found = {"shape": tuple(out.shape), "dtype": out.dtype, "device": out.device}
        for what, wanted in {"shape": shape, "dtype": q.dtype, "device": q.device}.items():
            if found[what] != wanted:
                raise Broken(f"out: {what} is {found[what]}, expected {wanted}")
        if unwritten := int((_bits(out) == -1).sum()):
            raise Broken(f"out: {unwritten} of {out.numel()} elements were never written")
        return out

    return call


def _bits(x: Tensor) -> Tensor:
    return x.view(SIGNED[x.element_size()]) if x.is_floating_point() else x


@contextlib.contextmanager
def _poisoned(size: int, device: torch.device) -> Iterator[None]:
    """Let an output of `size` bytes that the kernel allocates hold POISON."""
    if device.type != "cpu":  # for what allocates without torch.empty: the allocator hands out again what fits best
        blocks = [torch.full((size,), POISON, dtype=torch.uint8, device=device) for _ in range(POISONED_BLOCKS)]
        del blocks
    with _PoisonedEmpty():
        yield


class _PoisonedEmpty(TorchFunctionMode):
    """Fill what torch.empty and its kin return with POISON."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in EMPTY and out.device.type != "meta":
            out.untyped_storage().fill_(POISON)
        return out


@contextlib.contextmanager
def _entered_reference() -> Iterator[list[str]]:
    """List the functions of nsa_sel.reference that are entered meanwhile, whatever name they were imported under."""
    inlined = [function for function in vars(reference).values() if inspect.isfunction(function)]
    inlined = [function for function in inlined if not hasattr(function, "_torchdynamo_disable")]
    for function in inlined:
        function._torchdynamo_disable = True  # torch.compile would inline it, and nothing would enter it
    entered: list[str] = []

    def look(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename == reference.__file__:
            entered.append(frame.f_code.co_name)

    before = sys.getprofile()
    threading.setprofile(look)
    sys.setprofile(look)
    try:
        yield entered
    finally:
        sys.setprofile(before)
        threading.setprofile(before)
        for function in inlined:
            del function._torchdynamo_disable
