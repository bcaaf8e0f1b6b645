"""One measuring session: a case at a time, its methods one after another, and what is saved of each."""

from __future__ import annotations

import contextlib
import gc
import statistics
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .methods import contender
from .methods.contender import CaseState, NotTimed, Prepared, WrongResult
from .methods.prepare import prepare
from .saved.figures import statistics_of
from .saved.speedups import PEER_METHODS, is_kernel
from .saved.speedups import scope as scope_of
from .suite.cases import Case
from .suite.inputs import memory_estimate
from .suite.kernels import UserKernel
from .timer import timing
from .timer.calibration import calibrate, limit_us
from .timer.machine import environment
from .timer.timing import DeviceTimer, WallTimer

CACHE_LIMIT = 0.25  # share of the device's memory that the allocator may cache from case to case


class Session:
    """Measure cases on the GPU, or by the wall clock without one; calibrates itself when it is made.

    plant: slow a tenth of the kernel's benchmarks down by this share of their device median, to test whether a
    comparison finds it. SDPA's times stay: they are the yardstick.
    kernels: users' kernels by name; one of the name "triton" is measured in place of this package's own.
    """

    def __init__(
        self, flush: str = "read", plant: float | None = None, kernels: Mapping[str, UserKernel] | None = None
    ) -> None:
        self.timer: DeviceTimer | WallTimer = DeviceTimer(flush) if torch.cuda.is_available() else WallTimer()
        self.on_gpu = isinstance(self.timer, DeviceTimer)
        if not self.on_gpu:
            torch.set_num_threads(1)  # with two, a busy core makes every OpenMP barrier wait for the scheduler
        self.plant, self.kernels = plant, kernels or {}
        self.calibration = calibrate(self.timer)
        self.not_timed: dict[tuple[str, str], str] = {}  # (case, method) -> why it has no time
        self._state: CaseState | None = None
        self._refused: tuple[Case, str] | None = None
        gc.collect()
        gc.freeze()  # what exists now stays; a later collection in the midst of a round would cost milliseconds

    def state(self, case: Case) -> CaseState:
        """Return the case's tensors; those of the case before are freed first.

        Raises:
            NotTimed: not enough memory.
        """
        if self._refused is not None and self._refused[0] == case:
            raise NotTimed(self._refused[1])
        if self._state is None or self._state.case != case:
            self.free()
            try:
                self._state = CaseState(case, self.timer)
            except NotTimed as reason:
                self._refused = case, str(reason)
                raise
        return self._state

    def fits(self, case: Case) -> bool:
        """Tell whether the case's tensors fit on the device."""
        try:
            self.state(case)
        except NotTimed:
            return False
        return True

    def free(self) -> None:
        """Free the tensors of the case at hand."""
        self._state = None
        if self.on_gpu:
            cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            if cached > CACHE_LIMIT * torch.cuda.mem_get_info()[1]:
                with contextlib.suppress(RuntimeError):  # after a failed capture CUDA refuses this for good
                    torch.cuda.empty_cache()

    def lost(self) -> bool:
        """Tell whether the GPU no longer answers: after an illegal access every later call of this process fails."""
        if not self.on_gpu:
            return False
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False

    @contextmanager
    def ready(self, case: Case, method: str) -> Iterator[tuple[Prepared, dict[str, Any]]]:
        """Yield the method, checked against the oracle and armed in the timer, and the first entries of its extra_info.

        Raises:
            NotTimed: it cannot run here, or memory ran out; the message says why. A peer that fails or is wrong too:
                that is a finding, and no fault of this suite.
            WrongResult: its result is wrong.
        """
        try:
            with self._ready(case, method) as found:
                yield found
        except Exception as error:
            reason = error
            if method in PEER_METHODS and not isinstance(error, NotTimed):
                if self.lost():
                    raise
                kind = "wrong" if isinstance(error, WrongResult) else f"failed: {type(error).__name__}"
                reason = NotTimed(" ".join(f"{kind}: {error}".split())[:300])
            if case.peers or isinstance(reason, NotTimed):
                self.not_timed[case.id, method] = str(reason)
            if reason is error:
                raise
            raise reason from error

    @contextmanager
    def _ready(self, case: Case, method: str) -> Iterator[tuple[Prepared, dict[str, Any]]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of every SDPA backend that declines a call
            try:
                state = self.state(case)
                prepared = prepare(state, method, self.kernels)
                mae = contender.check(state, prepared)
                with prepared.guard():
                    prepared = self._planted(case, method, prepared)
                    timing.use(self.timer)
                    self.timer.arm(prepared.call)
                    yield prepared, {**_identity(case, method), **prepared.details, "mae": mae}
            except torch.cuda.OutOfMemoryError as error:
                self.free()
                torch.cuda.empty_cache()
                size = memory_estimate(case) / 1e9
                raise NotTimed(f"out of memory, estimated {size:.1f} GB") from error

    def figures(self, case: Case, prepared: Prepared, samples: Sequence[float]) -> dict[str, Any]:
        """Return the entries of extra_info that follow from device times in seconds; measures call and graph time."""
        state = self.state(case)
        device_us = statistics.median(samples) * 1e6
        limit = limit_us(state.bytes, self.calibration["read_limit_us"]) if self.on_gpu else None
        low, high = timing.median_ci(samples)
        found: dict[str, Any] = {
            "bytes": state.bytes,
            "bytes_rows": state.bytes_rows,
            "gbps": state.bytes / device_us / 1e3,
            "limit_us": limit,
            # In prefill rows share K and V, so that L2 and not memory is the limit.
            "pct_of_limit": None if limit is None or case.S > 1 else 100 * limit / device_us,
            "ci95_us": [low * 1e6, high * 1e6],
        }
        found |= dict.fromkeys(("call_us", "call_ci95_us", "graph_us", "graph_ci95_us"))
        if isinstance(self.timer, DeviceTimer):
            found |= {"repeated_rounds": self.timer.repeated, "delay_us": self.timer.delay_us}
            spread = timing.call_time(prepared.call, max(self.timer.host_us, device_us))
            found |= {"call_us": spread.us, "call_ci95_us": list(spread.ci95_us)}
            found |= {"call_blocks": [spread.groups, spread.calls]}
            try:
                spread = timing.graph_time(prepared.call, device_us)
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:  # a call that cannot be captured still has its other times
                found["graph_error"] = str(error).strip().splitlines()[0][:200]
            else:
                found |= {"graph_us": spread.us, "graph_ci95_us": list(spread.ci95_us)}
                found |= {"graph_replays": [spread.groups, spread.calls]}
        return found | prepared.after()

    def measure(self, case: Case, method: str, rounds: int = timing.ROUNDS, warmup: int = timing.WARMUP_ROUNDS) -> dict:
        """Measure one method outside pytest-benchmark: `samples` and their `median`, `q1`, `q3` in s, extra_info.

        Raises: as `ready`.
        """
        with self.ready(case, method) as (prepared, extra):
            samples = self.timer.samples(prepared.call, rounds, warmup)
            return {"samples": samples, **_quartiles(samples), **extra, **self.figures(case, prepared, samples)}

    def measure_again(self, case: Case, method: str) -> dict[str, Any]:
        """Measure the device time once more: `median`, `q1`, `q3` in seconds and `ci95_us`, as a comparison wants."""
        with self.ready(case, method) as (prepared, _):
            samples = self.timer.samples(prepared.call)
            return {**_quartiles(samples), "ci95_us": [bound * 1e6 for bound in timing.median_ci(samples)]}

    def _planted(self, case: Case, method: str, prepared: Prepared) -> Prepared:
        """Append a wait on the device to a planted benchmark; all others stay as they are."""
        if self.plant is None or not is_planted(case, method) or not isinstance(self.timer, DeviceTimer):
            return prepared
        before_us = statistics.median(self.timer.samples(prepared.call)) * 1e6
        target_us, cycles = before_us * (1 + self.plant), 0.0
        for _ in range(6):
            call = _with_wait(prepared.call, int(cycles))
            error_us = target_us - statistics.median(self.timer.samples(call)) * 1e6
            if abs(error_us) < 0.01 * before_us or cycles == 0.0 and error_us < 0:
                break
            cycles = max(0.0, cycles + error_us * self.timer.cycles_per_us)
        details = {**prepared.details, "planted": 1 + self.plant - error_us / before_us}
        return replace(prepared, call=call, details=details)


def is_planted(case: Case, method: str) -> bool:
    """Tell whether a benchmark is in the fixed tenth of the kernel's that `plant` slows down."""
    return is_kernel(method) and zlib.crc32(f"{case.id}-{method}".encode()) % 10 == 0


def _with_wait(call: Callable[[], Tensor], cycles: int) -> Callable[[], Tensor]:
    def slower() -> Tensor:
        out = call()
        torch.cuda._sleep(cycles)
        return out

    return slower


def _identity(case: Case, method: str) -> dict[str, Any]:
    names = "family", "dtype", "layout", "H", "D", "Dv", "L", "N", "S", "n_spans", "seed"
    shape = {name: getattr(case, name) for name in names}
    machine = environment()
    card = {name: machine[name] for name in ("gpu", "gpu_id", "driver", "torch", "triton")}
    return {"case": case.id, "scope": scope_of(method), "method": method, **shape, **card}


def _quartiles(samples: Sequence[float]) -> dict[str, float]:
    stats = statistics_of(samples)
    return {"median": stats.median, "q1": stats.q1, "q3": stats.q3}
