"""Cases that are calls of a real model: what a case knows of its file, and what is read from it again.

Source: docs/cases.md, "From a real model".
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ... import spans
from ...recording import Recording, RecordingError, load

SHORT_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class Recorded:
    """Point to the file of a recorded call.

    file: its path. digest: of its ranges, by which another content under the same name is told. n_spans: of a row.
    shortest: tokens of the shortest row.
    """

    file: str
    digest: str
    n_spans: int
    shortest: int

    @property
    def id(self) -> str:
        """Return what names the call in a case's id: the file's name and the digest."""
        return f"{re.sub(r'[^A-Za-z0-9_.]', '_', Path(self.file).stem)}-{self.digest}"

    def open(self) -> Recording:
        """Read the file.

        Raises: RecordingError if it is gone, damaged, or holds other ranges than when the case was made.
        """
        call = load(self.file)
        if digest(call) != self.digest:
            raise RecordingError(f"{self.file}: its ranges are not those of the case; it was written anew since")
        return call


def point_to(path: Path, call: Recording, shortest: int) -> Recorded:
    """Return the pointer to a call that was read from a file, whose shortest row has so many tokens."""
    return Recorded(str(path.absolute()), digest(call), call.ranges.shape[3], shortest)


def inside(call: Recording) -> Tensor:
    """Return the ranges as the context clamps them, int32: they select the same."""
    return torch.stack(spans.clamp(call.ranges, call.S_kv), -1).int()


def digest(call: Recording) -> str:
    """Return eight hex digits that tell the ranges and the sizes of one call from another's."""
    sizes = f"{call.S_kv} {call.H} {call.D} {call.Dv} {call.dtype} {tuple(call.ranges.shape)}"
    return f"{zlib.crc32(inside(call).numpy().tobytes(), zlib.crc32(sizes.encode())):08x}"


def kept_tensors(call: Recording) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return q, k and v if the call holds them; a scale other than 1/sqrt(D), the suite's own, is multiplied into q."""
    if call.q is None or call.k is None or call.v is None:
        return None
    q = call.q if call.scale is None else (call.q.float() * (call.scale * call.D**0.5)).to(call.q.dtype)
    return q, call.k, call.v
