"""What is timed: a case's tensors, a method made ready for it, and the check against the oracle that comes first.

Source: docs/measuring.md, "Scopes" and "Parity before time".
"""

from __future__ import annotations

import contextlib
import functools
import gc
import re
import statistics
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ... import reference, spans
from ..suite import gate
from ..suite.cases import Case
from ..suite.inputs import Inputs, make_inputs, memory_estimate, traffic
from ..timer.timing import Call, DeviceTimer, WallTimer

PARITY_ROWS = 64
MEMINFO = Path("/proc/meminfo")  # of Linux; elsewhere nothing is known, and nothing left out
# What SDPA itself puts into a mask for cuDNN, which has trouble with -inf. Beside a real token the weight is exactly 0.
MASKED = -65504.0
MASK_ALIGNMENT = 16  # elements: a mask whose rows begin elsewhere is copied at every call
SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
CLEARLY_FASTER = 1.03  # a backend must win by more, so that noise does not change which one is timed from run to run


class NotTimed(Exception):
    """Say why a method cannot be timed here; the benchmark is skipped."""


class WrongResult(AssertionError):
    """Say how a method's result differs from the oracle; it gets no time, and the benchmark fails."""


@dataclass(frozen=True)
class Prepared:
    """Hold a method ready to be timed.

    call: the timed call. result: turns its value into rows [N, H, Dv]. details: entries of extra_info that say what
    really runs. guard: the context in which it must run (the SDPA backend); it is entered once per measurement, since
    entering it costs host time. expected: what `CaseState.expect` gives for the spans that the method attends to, if
    those are not the case's. repro: lines that a wrong result is shown with. after: finds more entries of extra_info
    once the call is timed. verify: in place of the gate, checks the call's value and returns its error, or raises
    WrongResult.
    """

    call: Callable[[], Tensor]
    result: Callable[[Tensor], Tensor]
    details: dict[str, str | float] = field(default_factory=dict)
    guard: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
    expected: tuple[Tensor, Tensor, Tensor] | None = None
    repro: str = ""
    after: Callable[[], dict[str, float | None]] = dict
    verify: Callable[[Any], float] | None = None


class CaseState:
    """Hold what all methods of one case share: inputs, packed rows, the oracle's rows, the best SDPA backend.

    Raises:
        NotTimed: the case needs more memory than the device has free.
    """

    def __init__(self, case: Case, timer: DeviceTimer | WallTimer) -> None:
        self.case, self.timer = case, timer
        self.device = "cuda" if isinstance(timer, DeviceTimer) else "cpu"
        self.require(memory_estimate(case, packed=False))
        self.inputs: Inputs = make_inputs(case, self.device)
        self.bytes, self.bytes_rows = traffic(self.inputs)

    def require(self, needed: int) -> None:
        """Raise NotTimed unless so many bytes are free on the device."""
        if self.device == "cpu":
            needed *= 2  # SDPA may hold all of it in fp32 there, too
        if needed > _free_memory(self.device):
            gc.collect()  # tensors may hang on the traceback of a method that failed
            if self.device == "cuda":
                torch.cuda.empty_cache()
            if needed > (free := _free_memory(self.device)):
                raise NotTimed(f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")

    @functools.cached_property
    def packed(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return q [N, H, D], k [N, L, D], v [N, L, Dv] and the mask of real tokens, None if all are."""
        x = self.inputs
        k_rows, v_rows, valid = reference.gather_rows(x.k, x.v, x.ranges, x.max_len)
        return x.q.reshape(self.case.N, *x.q.shape[3:]), k_rows, v_rows, None if x.min_len == x.max_len else valid

    @functools.cached_property
    def core_call(self) -> Call:
        """Return SDPA on the packed rows in its fastest form: the shapes that it wants, the mask as it adds it.

        The mask belongs to packing; a bool one would be turned into this form at every call.
        """
        q, k, v, valid = self.packed
        if len(q) > reference.MAX_SDPA_BATCH or self.inputs.min_len == 0:
            return functools.partial(reference.sdpa_rows, q, k, v, valid)
        mask = None
        if valid is not None:
            N, L = valid.shape
            width = -(-L // MASK_ALIGNMENT) * MASK_ALIGNMENT
            mask = torch.zeros(N, 1, 1, width, dtype=q.dtype, device=q.device)[..., :L]
            mask.masked_fill_(~valid[:, None, None], MASKED)
        return functools.partial(F.scaled_dot_product_attention, q[:, None], k[:, None], v[:, None], attn_mask=mask)

    @functools.cached_property
    def core_backend(self) -> str:
        """Return the fastest SDPA backend for `core_call`."""
        return self.sdpa_backend if self.packed[3] is None else self._fastest_backend(self.core_call)

    @functools.cached_property
    def sdpa_backend(self) -> str:
        """Return the fastest SDPA backend for the rows and the bool mask that packing inside the operation makes."""
        return self._fastest_backend(functools.partial(reference.sdpa_rows, *self.packed))

    def _fastest_backend(self, call: Call) -> str:
        """Try every backend that runs the call, and leave out one whose result is wrong."""
        if self.device == "cpu":
            return "default"
        rows, oracle, packed = self.expected  # outside any backend's context
        times: dict[str, float] = {}
        for name, backend in SDPA_BACKENDS.items():
            if name == "math" and times:  # materialises the logits: only where nothing else runs
                continue
            with contextlib.suppress(RuntimeError), sdpa_kernel(backend):
                out = as_rows(self.case, call())[rows]
                if not gate.check(out, oracle, packed, dtype=out.dtype).ok:
                    continue
                times[name] = statistics.median(self.timer.samples(call, rounds=9, warmup=2))
        if not times:
            raise NotTimed("no SDPA backend runs this case and gives the right result")
        best = next(iter(times))
        for name in times:
            if times[name] * CLEARLY_FASTER < times[best]:
                best = name
        return best

    @functools.cached_property
    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return `expect` for the case's own spans."""
        return self.expect(self.inputs.ranges, self.inputs.min_len, self.inputs.max_len)

    def expect(self, ranges: Tensor, min_len: int, max_len: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return at most 64 fixed row numbers, the oracle's result for them and packed SDPA's, [R, H, Dv] both."""
        case, x = self.case, self.inputs
        rows = torch.linspace(0, case.N - 1, min(PARITY_ROWS, case.N)).long().to(self.device)
        b, s, g = rows // (case.S * case.G), rows // case.G % case.S, rows % case.G
        of_rows = ranges[b, s, g][:, None, None]
        index, valid = (found[:, 0, 0] for found in spans.token_index(of_rows, x.k.shape[2], max_len))
        k, v = (whole[b[:, None], g[:, None], index] for whole in (x.k, x.v))
        packed = reference.sdpa_rows(x.q[b, s, g], k, v, None if min_len == max_len else valid)
        return rows, reference.oracle(x.q, x.k, x.v, ranges, rows=rows), packed


def check(state: CaseState, prepared: Prepared) -> float:
    """Run the call once, judge the fixed rows, and return their MAE, or what the method's own check returns.

    Raises:
        WrongResult: the gate's message, and how to see it again.
    """
    if prepared.verify is not None:
        with prepared.guard():
            return prepared.verify(prepared.call())
    rows, oracle, packed = prepared.expected or state.expected
    case, q = state.case, state.inputs.q
    with prepared.guard():
        # The memory that the call gets for its result must not hold an earlier, right one.
        torch.full((case.N, case.H, case.Dv), float("nan"), dtype=q.dtype, device=q.device)
        out = prepared.result(prepared.call())[rows]
    result = gate.check(out, oracle, packed, dtype=q.dtype)
    if not result.ok:
        raise WrongResult(f"{case.id}, {len(rows)} of its rows: {result.message}{prepared.repro}")
    return result.mae


def within(backend: str) -> Callable[[], AbstractContextManager[object]]:
    """Return how to enter an SDPA backend."""
    return contextlib.nullcontext if backend == "default" else functools.partial(sdpa_kernel, SDPA_BACKENDS[backend])


def as_rows(case: Case, out: Tensor) -> Tensor:
    """Return a result as rows [N, H, Dv]."""
    return out.reshape(case.N, case.H, case.Dv)


def packed_as_inputs(state: CaseState) -> Inputs:
    """Present the packed rows, the very tensors that SDPA reads, as rows of one span (0, L) each."""
    q_rows, k_rows, v_rows, valid = state.packed
    q, k, v, ranges = spans.dense_rows(q_rows, k_rows, v_rows)
    if valid is not None:
        ranges[..., 1] = valid.sum(-1).view(-1, 1, 1, 1)
    return Inputs(q, k, v, ranges, state.inputs.min_len, state.inputs.max_len)


def _free_memory(device: str) -> int:
    """Return the bytes that the device can still give us, what the allocator or the system only caches included."""
    if device == "cpu":
        text = MEMINFO.read_text() if MEMINFO.exists() else ""
        found = re.search(r"^MemAvailable: +(\d+) kB$", text, re.MULTILINE)
        return int(found[1]) * 1024 if found else sys.maxsize
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
