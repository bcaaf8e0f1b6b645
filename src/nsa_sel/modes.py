"""What PyTorch may have switched on around a call: tensor subclasses, modes, transforms, tracing, derivatives."""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch.nn import Parameter
from torch.utils._device import DeviceContext

PLAIN = frozenset((Tensor, Parameter))  # tensors whose memory can be read; a subclass may have none


def eager(*tensors: Any) -> bool:
    """Tell whether an operation may read these tensors' memory at once.

    False: one is of a subclass, or a mode, a transform, a tracer or forward-mode AD wants to see the operation.
    """
    return all(type(x) in PLAIN for x in tensors) and none_on() and not _get_tracing_state()


def none_on() -> bool:
    """Tell that no mode, no transform and no forward-mode AD is on. A tracer is seen by the sizes that it gives."""
    return not (
        _len_torch_dispatch_stack()
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or (_len_torch_function_stack() and _function_modes())
    )


def _function_modes() -> bool:
    """Tell whether a function mode is on other than that of `torch.set_default_device`, which sees only factories."""
    stack = (torch._C._get_function_stack_at(i) for i in range(_len_torch_function_stack()))
    return any(not isinstance(mode, DeviceContext) for mode in stack)


def needs_derivative(*tensors: Tensor) -> bool:
    """Tell whether the result must carry a derivative, backward or forward, with respect to one of the tensors.

    Inside a transform of torch.func that takes derivatives it must: of its tensors nothing better can be told.
    torch.jit.trace compares what it recorded with a second trace, in which gradients are off.
    """
    if (torch.is_grad_enabled() or tracing()) and any(x.requires_grad for x in tensors):
        return True
    if torch.compiler.is_compiling():
        return False
    if _are_functorch_transforms_active():
        kinds = {str(level.key()) for level in torch._C._functorch.get_interpreter_stack()}
        return not kinds.isdisjoint(("TransformType.Grad", "TransformType.Jvp"))
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def transformed() -> bool:
    """Tell whether operations need rules beyond the plain backward pass: those of torch.func, or for tangents."""
    if torch.compiler.is_compiling():
        return False
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def tracing() -> bool:
    """Tell whether torch.jit.trace records, for which every value read is a constant."""
    return not torch.compiler.is_compiling() and _get_tracing_state() is not None


def autocasts(device: torch.device) -> bool:
    """Tell whether autocast is on for this kind of device."""
    return device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type)
