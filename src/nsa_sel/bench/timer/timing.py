"""Time a call on the device, on the host and in a CUDA graph; without a GPU, by the wall clock.

Source: docs/measuring.md, "Device time" and "Call and graph time".
"""

from __future__ import annotations

import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

ROUNDS, WARMUP_ROUNDS = 50, 5
L2_COVER = 4  # the flush reads so many times the size of L2
# Between delay and start event the host runs pytest-benchmark's own code for some 20 µs, which the delay must outlast.
DELAY_MARGIN_US = 40.0
MOST_REPEATS = 12  # of one round, with the delay growing to 80 times its length
# Some 3,400 benchmarks must fit into minutes. Of 12 groups the third to the tenth are a 95 % CI of the median. A block
# has 100 calls if one call takes up to 20 µs, and fewer if it takes longer. A graph of 20 calls is replayed 12 times
# for calls of up to 80 µs and 6 times for calls of up to 160 µs; for longer calls the graph has fewer of them.
GROUPS = 12
CALL_BUDGET_S = 0.025
GRAPH_BUDGET_S = 0.02

Call = Callable[[], Any]


@dataclass(frozen=True)
class Spread:
    """Hold the median time per call in µs, its 95 % CI, and how many groups of how many calls it comes from."""

    us: float
    ci95_us: tuple[float, float]
    groups: int
    calls: int


def median_ci(samples: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Return the CI of the median by order statistics: no assumption on the distribution of the samples.

    Takes the narrowest symmetric pair of ranks whose coverage, binomial(n, 1/2), reaches `confidence`; fewer than 6
    samples cannot reach 95 %: then it is the whole range.
    """
    ordered, n = sorted(samples), len(samples)
    tail, rank = 0.0, 0
    while rank < n // 2:
        tail += math.comb(n, rank) / 2**n
        if 1 - 2 * tail < confidence:
            break
        rank += 1
    rank = max(rank, 1)
    return ordered[rank - 1], ordered[n - rank]


class _Tick:
    """Mark one moment of the device's time line; the difference of two, in seconds, waits for the device."""

    def __init__(self, timer: DeviceTimer) -> None:
        self.timer = timer
        self.event = torch.cuda.Event(enable_timing=True)

    def __sub__(self, start: _Tick) -> float:
        return self.timer.elapsed(start, self)


class DeviceTimer:
    """Time one call at a time on the GPU, cold: L2 is filled with other data first, and launch cost is kept out.

    A round is `setup()` (flush, then a delay on the device), `tick()`, the call, `tick()`. The host queues all of it
    during the delay. If it did not, the start event has already passed: that round is thrown away and repeated, from
    the second time on with a longer delay. `flush`: "read" leaves L2 clean. "zeros" writes, as
    `triton.testing.do_bench` does, and leaves L2 dirty, so that the next kernel pays for the write-back; it is there to
    show that difference.
    """

    def __init__(self, flush: str = "read") -> None:
        if flush not in ("read", "zeros"):
            raise ValueError(f"flush: value is {flush!r}, expected read or zeros")
        from . import streaming  # needs Triton, as everything on a GPU

        self.flush = flush
        self.l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._buffer = torch.zeros(L2_COVER * self.l2_bytes // 4, dtype=torch.int32, device="cuda")
        self._read = streaming.reader(self._buffer)
        self._start, self._end = _Tick(self), _Tick(self)
        self._next = self._start
        self._call: Call = _nothing
        self.delay_us, self.host_us, self.repeated = DELAY_MARGIN_US, 0.0, 0
        self._clear()  # compiles
        self.count_cycles()

    def count_cycles(self) -> None:
        """Measure how fast the counter runs that `torch.cuda._sleep` waits for; it follows the card's clock."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        cycles = 2_000_000
        for _ in range(3):
            start.record()
            torch.cuda._sleep(cycles)
            end.record()
            end.synchronize()
        self.cycles_per_us = cycles / (start.elapsed_time(end) * 1e3)

    def arm(self, call: Call) -> None:
        """Make `call` the timed one: warm it up, and take the delay from how long the host needs to queue it."""
        self._call = call
        for _ in range(3):
            call()
        hosts = []
        for _ in range(5):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            hosts.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
        self.host_us = statistics.median(hosts) * 1e6
        self.delay_us, self.repeated = 1.5 * self.host_us + DELAY_MARGIN_US, 0

    def setup(self) -> None:
        """Begin a round: make L2 cold and queue the delay."""
        self._clear()
        torch.cuda._sleep(int(self.delay_us * self.cycles_per_us))
        self._next = self._start

    def tick(self) -> _Tick:
        """Record the round's start event, then its end event."""
        now = self._next
        now.event.record()
        self._next = self._end
        return now

    def elapsed(self, start: _Tick, end: _Tick) -> float:
        """Return the seconds between the round's events, repeating the round for as long as the host was late."""
        late = 0
        while start.event.query():  # already passed, though the host has only now queued the end
            late, self.repeated = late + 1, self.repeated + 1
            if late > MOST_REPEATS:
                raise RuntimeError("the call waits for the device: its device time cannot be told from its host time")
            if late > 1:  # once may be the host's scheduler, and says nothing about the next round
                self.delay_us *= 1.5
            end.event.synchronize()
            self.setup()
            self.tick()
            self._call()
            self.tick()
        end.event.synchronize()
        return start.event.elapsed_time(end.event) * 1e-3

    def samples(self, call: Call, rounds: int = ROUNDS, warmup: int = WARMUP_ROUNDS) -> list[float]:
        """Arm the timer with `call` and return `rounds` device times in seconds."""
        self.arm(call)
        with _no_gc():
            for _ in range(warmup):
                self._round()
            return [self._round() for _ in range(rounds)]

    def _round(self) -> float:
        self.setup()
        start = self.tick()
        self._call()
        end = self.tick()
        return end - start

    def _clear(self) -> None:
        if self.flush == "read":
            self._read()
        else:
            self._buffer.zero_()


class WallTimer:
    """Time one call at a time by the wall clock, where there is no GPU. Same use as DeviceTimer."""

    delay_us, repeated = 0.0, 0

    def arm(self, call: Call) -> None:
        call()

    def setup(self) -> None:
        return None

    def tick(self) -> float:
        return time.perf_counter()

    def samples(self, call: Call, rounds: int = ROUNDS, warmup: int = WARMUP_ROUNDS) -> list[float]:
        """Return `rounds` wall-clock times in seconds."""
        times = []
        with _no_gc():
            for _ in range(warmup + rounds):
                begin = time.perf_counter()
                call()
                times.append(time.perf_counter() - begin)
        return times[warmup:]


_in_use: DeviceTimer | WallTimer = WallTimer()


def use(timer: DeviceTimer | WallTimer) -> None:
    """Make `timer` the one behind `tick`."""
    global _in_use
    _in_use = timer


def tick() -> Any:
    """Mark a moment: the `timer` of pytest-benchmark's marker, which asks for a function and subtracts its results."""
    return _in_use.tick()


def call_time(call: Call, call_us: float) -> Spread:
    """Return the host's time per call, warm, as an eager user sees it: blocks of calls, with one sync at each end.

    There are 12 blocks of 100 calls, fewer if those would take longer than the budget. call_us: a rough time per call.
    """
    groups, calls = plan(call_us, CALL_BUDGET_S, calls=100)
    times = []
    with _no_gc():
        for _ in range(groups):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - begin) / calls * 1e6)
    return Spread(statistics.median(times), median_ci(times), groups, calls)


def graph_time(call: Call, device_us: float) -> Spread:
    """Return the time per call of a CUDA graph of 20 calls that is replayed 12 times with warm L2.

    There are fewer calls or replays if those would take longer than the budget.

    Raises:
        RuntimeError: the call cannot be captured.
    """
    replays, calls = plan(device_us, GRAPH_BUDGET_S, calls=20, fewest=20)
    stream, graph = _capture_stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    # Not `with torch.cuda.graph(...)`: that empties the allocator's cache and collects garbage every time.
    with _no_gc(), torch.cuda.stream(stream):
        call()
        torch.cuda.synchronize()
        graph.capture_begin()
        try:
            for _ in range(calls):
                call()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * replays)]
    with _no_gc():
        graph.replay()
        graph.replay()
        for start, end in zip(events[::2], events[1::2], strict=True):
            start.record()
            graph.replay()
            end.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) * 1e3 / calls for start, end in zip(events[::2], events[1::2], strict=True)]
    return Spread(statistics.median(times), median_ci(times), replays, calls)


@functools.cache
def _capture_stream() -> torch.cuda.Stream:
    """Return the one stream of all captures: the allocator keeps freed memory, often gigabytes, per stream."""
    return torch.cuda.Stream()


def plan(call_us: float, budget_s: float, calls: int, groups: int = GROUPS, fewest: int = 10) -> tuple[int, int]:
    """Fit groups x calls into a budget.

    First it takes fewer calls (down to `fewest`), then fewer groups (down to 6, enough for a CI), then single calls.
    """
    affordable = max(1, int(budget_s * 1e6 / max(call_us, 0.1)))
    calls = min(calls, max(fewest, affordable // groups))
    groups = min(groups, max(6, affordable // calls))
    return groups, min(calls, max(1, affordable // groups))


@contextmanager
def _no_gc() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _nothing() -> None:
    return None
