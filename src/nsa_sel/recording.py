"""Calls of a real model, kept as files: `record` writes them from inside the model, `load` reads and checks them.

A file holds a dict of plain values and tensors, written by torch.save: ranges, S_kv, H, D, Dv, dtype (its name without
"torch."), scale (None: 1/sqrt(D)), and, where the tensors were kept, q, k and v.
Source: docs/cases.md, "From a real model".
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import arguments, ops
from .config import get_config
from .errors import UnsupportedError

SUFFIX = ".pt"


class RecordingError(ValueError):
    """Say in one line why a file is no recorded call."""


@dataclass(frozen=True)
class Recording:
    """Hold one recorded call, on the CPU. q [B,S,G,H,D], k [B,G,S_kv,D], v [B,G,S_kv,Dv]: None where not kept.

    ranges: int32 or int64 [B,S,G,n_spans,2]. dtype: "bfloat16", "float16" or "float32". scale: None is 1/sqrt(D).
    """

    ranges: Tensor
    S_kv: int
    H: int
    D: int
    Dv: int
    dtype: str
    scale: float | None
    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None


def record(
    folder: str | os.PathLike[str],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    *,
    scale: float | None = None,
    tensors: bool = True,
) -> Path | None:
    """Write the arguments of one call of `selection_attention` to the next free number of a folder, made if missing.

    Returns the file, or None where the folder already holds as many as the toggle NSA_SEL_RECORD says (a warning says
    so once). No file is ever overwritten, and several processes may record to one folder. tensors=False keeps the
    ranges and the shapes alone, which is small; the suite then draws q, k and v.

    Raises:
        ValueError, TypeError: as `selection_attention`; ConfigError for a toggle.
        UnsupportedError: under torch.compile, or while a CUDA graph is captured.
        OSError: the file cannot be written; no part of it is left.
    """
    if torch.compiler.is_compiling():
        ops.refuse_record(q)
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError("nsa_sel.record: cannot run while a CUDA graph is captured; record from an eager call")
    arguments.check(q, k, v, ranges, None, None)
    folder, limit = Path(folder), get_config().sel_record
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1, limit + 1):
        path = folder / f"{number:04}{SUFFIX}"
        part = path.with_suffix(".part")
        if path.exists():
            continue
        try:
            part.touch(exist_ok=False)  # the number is this process's now
        except FileExistsError:
            continue
        if path.exists():  # another process had the number, and has just finished
            part.unlink()
            continue
        try:
            torch.save(_content(q, k, v, ranges, scale, tensors), part)
            os.replace(part, path)
        except BaseException:
            part.unlink()
            raise
        return path
    if limit:
        said = f"nsa_sel.record: {folder} holds {limit} calls, as many as NSA_SEL_RECORD says; no more are recorded"
        warnings.warn(said, RuntimeWarning, stacklevel=2)
    return None


def _content(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, scale: float | None, tensors: bool) -> dict[str, Any]:
    kept = {"ranges": ranges, **({"q": q, "k": k, "v": v} if tensors else {})}
    sizes = {"S_kv": k.shape[2], "H": q.shape[3], "D": q.shape[4], "Dv": v.shape[3]}
    # A clone, because torch.save writes the whole storage of a view.
    copies = {name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in kept.items()}
    scale = None if scale is None else float(scale)
    return {**sizes, "dtype": str(q.dtype).removeprefix("torch."), "scale": scale, **copies}


def load(path: str | os.PathLike[str]) -> Recording:
    """Read and check one recorded call; its tensors stay on disk until they are used.

    Raises: RecordingError with one line that names the file.
    """
    try:
        content = torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise RecordingError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception as error:  # of the unpickler and of the archive's reader, which raise anything
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RecordingError(f"{path}: is damaged, or no file of nsa_sel.record: {first[:100]}") from None
    known = [field.name for field in fields(Recording)]
    if not isinstance(content, dict) or not set(content) <= set(known):
        found = ", ".join(map(repr, sorted(set(content) - set(known), key=str))) if isinstance(content, dict) else ""
        what = f"unknown key {found}" if found else f"a {type(content).__name__}"
        raise RecordingError(f"{path}: holds {what}, expected the keys {', '.join(known)}")
    try:
        found_call = Recording(**content)
        _check(found_call)
    except (TypeError, ValueError) as error:
        reason = str(error).removeprefix("Recording.__init__() ")
        raise RecordingError(f"{path}: {reason}") from None
    return found_call


def _check(call: Recording) -> None:
    """Raise ValueError or TypeError for the first value that does not fit the others."""
    for name in ("S_kv", "H", "D", "Dv"):
        value = getattr(call, name)
        if type(value) is not int or value < (0 if name == "S_kv" else 1):
            raise ValueError(f"{name}: value is {value!r}, expected a whole number")
    if call.dtype not in (known := [str(dtype).removeprefix("torch.") for dtype in arguments.DTYPES]):
        raise ValueError(f"dtype: value is {call.dtype!r}, expected one of {', '.join(known)}")
    if call.scale is not None and not (type(call.scale) in (int, float) and abs(call.scale) < float("inf")):
        raise ValueError(f"scale: value is {call.scale!r}, expected a finite number or None")
    if not isinstance(call.ranges, Tensor) or call.ranges.dim() != 5:
        raise ValueError("ranges: expected a tensor [B, S, G, n_spans, 2]")
    B, S, G = call.ranges.shape[:3]
    expected = {"q": (B, S, G, call.H, call.D), "k": (B, G, call.S_kv, call.D), "v": (B, G, call.S_kv, call.Dv)}
    kept = {name: getattr(call, name) for name in expected if getattr(call, name) is not None}
    if len(kept) not in (0, 3):
        raise ValueError(f"holds {' and '.join(kept)}, expected q, k and v together or none of them")
    dtype = getattr(torch, call.dtype)
    for name, x in kept.items():
        if not isinstance(x, Tensor) or tuple(x.shape) != expected[name] or x.dtype != dtype:
            found = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name}: is {found}, expected {dtype} {expected[name]}")
    like = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in expected.items()}
    arguments.check(**like, ranges=call.ranges.to("meta"), min_len=None, max_len=None)
