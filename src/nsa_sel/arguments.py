"""What the arguments of a call may be: tensors that fit one another, and numbers of any type."""

from __future__ import annotations

import math
from typing import Any, SupportsFloat

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_FLOAT = torch.finfo(torch.float32).max


def numbers(scale: Any, min_len: Any, max_len: Any) -> tuple[float | None, int | None, int | None]:
    """Return scale as a float and the length hints as ints, whatever kind of number they are: NumPy's, a 0-d tensor.

    Raises: TypeError for what is no number; ValueError for one that cannot be read here without loss or a wait.
    """
    return _scale(scale), _length("min_len", min_len), _length("max_len", max_len)


def _scale(value: Any) -> Any:
    if value is None or isinstance(value, torch.SymFloat):
        return value
    number = _float("scale", value)
    if not abs(number) <= LARGEST_FLOAT:  # NaN too
        raise ValueError(f"scale: value is {value}, expected a finite number of fp32")
    return number


def _length(name: str, value: Any) -> Any:
    if value is None or isinstance(value, (int, torch.SymInt)):
        return int(value) if isinstance(value, bool) else value
    number = _float(name, value)
    if not math.isfinite(number) or number != int(number):
        raise ValueError(f"{name}: value is {value}, expected a whole number")
    return int(number)


def _float(name: str, value: Any) -> float:
    """Return a number of any type as a float, reading no device and losing no gradient."""
    if not isinstance(value, SupportsFloat):
        raise TypeError(f"{name}: type is {type(value).__name__}, expected a number")
    if isinstance(value, Tensor):
        if value.dim():
            raise ValueError(f"{name}: rank is {value.dim()}, expected a number or a tensor of rank 0")
        if value.device.type != "cpu":
            raise ValueError(f"{name}: device is {value.device}, expected cpu: reading it would wait for the device")
        if value.requires_grad:
            raise ValueError(f"{name}: value is a tensor that requires a gradient, expected a number: none flows to it")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{name}: value is {value}, expected a finite number of fp32") from error
    except (TypeError, ValueError, RuntimeError) as error:  # an array of several, a tensor without a value
        raise TypeError(f"{name}: type is {type(value).__name__}, expected a number: {error}") from error


def check(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, min_len: int | None, max_len: int | None) -> None:
    """Raise for the first argument that does not fit the others."""
    for name, x, rank in (("q", q, 5), ("k", k, 4), ("v", v, 4), ("ranges", ranges, 5)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: type is {type(x).__name__}, expected torch.Tensor")
        if x.layout != torch.strided:
            raise TypeError(f"{name}: type is a tensor of layout {x.layout}, expected torch.strided")
        if x.dim() != rank:
            raise ValueError(f"{name}: rank is {x.dim()}, expected {rank}")
    B, S, G, H, D = q.shape
    S_kv, Dv = k.shape[2], v.shape[3]
    if q.dtype not in DTYPES:
        raise TypeError(f"q: dtype is {q.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: dtype is {x.dtype}, expected {q.dtype} as q")
    if ranges.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ranges: dtype is {ranges.dtype}, expected torch.int32 or torch.int64")
    for name, x in (("k", k), ("v", v), ("ranges", ranges)):
        if x.device != q.device:
            raise ValueError(f"{name}: device is {x.device}, expected {q.device} as q")
    for name, x, expected in (
        ("k", k, (B, G, S_kv, D)),
        ("v", v, (B, G, S_kv, Dv)),
        ("ranges", ranges, (B, S, G, ranges.shape[3], 2)),
    ):
        if tuple(x.shape) != expected:
            raise ValueError(f"{name}: shape is {tuple(x.shape)}, expected {expected}")
    if min(H, D, Dv) == 0:
        raise ValueError(f"q: shape is {tuple(q.shape)}, expected H, D and Dv of at least 1")
    for name, x in (("q", q), ("k", k), ("v", v), ("ranges", ranges)):
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name}: stride is {x.stride()}, expected a contiguous last dimension")
    for name, hint in (("min_len", min_len), ("max_len", max_len)):
        if hint is not None and hint < 0:
            raise ValueError(f"{name}: value is {hint}, expected at least 0")
    if min_len is not None and max_len is not None and min_len > max_len:
        raise ValueError(f"min_len: value is {min_len}, expected at most max_len, which is {max_len}")
