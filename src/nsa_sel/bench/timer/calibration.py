"""Measure the instrument and the card's limits once per session.

Source: docs/measuring.md, "Calibration" and "Bytes and the read limit".
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from . import timing
from .machine import set_calibration
from .timing import DeviceTimer, WallTimer

READ_MB = (0.25, 0.53, 1.05, 2.2, 4.3, 8.7, 16.8, 33.6, 67.2, 134, 268, 540)
READ_SIZES = tuple(int(mb * 1e6) // 4096 * 4096 for mb in READ_MB)
COPY_BYTES = 540_000_000
CURVE_ROUNDS = 15
Curve = Sequence[Sequence[float]]  # [bytes, µs] pairs by rising size


def calibrate(timer: DeviceTimer | WallTimer) -> dict[str, Any]:
    """Measure and store the session's calibration; the figures are saved in `machine_info`.

    tick_us: the timer's smallest step. On a GPU also event_pair_us (two events with nothing between them),
    null_kernel_us (device, graph, eager), read_limit_us ([bytes, µs] pairs: a cold streaming read), copy_gbps, l2_mb,
    flush.
    """
    if isinstance(timer, WallTimer):
        values: dict[str, Any] = {"tick_us": time.get_clock_info("perf_counter").resolution * 1e6}
    else:
        _warm_clocks(timer)
        tick_us, pair_us = _event_resolution()
        values = {
            "tick_us": tick_us,
            "event_pair_us": pair_us,
            "null_kernel_us": _null_kernel(timer),
            "read_limit_us": read_curve(timer),
            "copy_gbps": _copy_gbps(timer),
            "l2_mb": timer.l2_bytes / 1e6,
            "flush": timer.flush,
        }
    set_calibration(values)
    return values


def limit_us(size: float, curve: Curve) -> float:
    """Return the µs that the card needs to read `size` bytes: the curve, linear between its points.

    Below the first point the time of the first point holds, beyond the last one the bandwidth of the last point.
    """
    first, last = curve[0], curve[-1]
    if size <= first[0]:
        return first[1]
    for (low, low_us), (high, high_us) in zip(curve[:-1], curve[1:], strict=True):
        if size <= high:
            return low_us + (high_us - low_us) * (size - low) / (high - low)
    return last[1] * size / last[0]


def read_curve(timer: DeviceTimer) -> list[list[float]]:
    """Return [bytes, µs] for a dozen sizes, each by the fastest of a few grids."""
    from . import streaming  # needs Triton

    whole = torch.zeros(READ_SIZES[-1] // 4, dtype=torch.int32, device="cuda")
    curve = []
    for size in READ_SIZES:
        part = whole[: size // 4]
        calls = [streaming.reader(part, block, programs) for block, programs in streaming.READ_GRIDS]
        curve.append([float(size), min(_device_us(timer, call, CURVE_ROUNDS) for call in calls)])
    return curve


def _device_us(timer: DeviceTimer, call: timing.Call, rounds: int = timing.ROUNDS) -> float:
    return statistics.median(timer.samples(call, rounds)) * 1e6


def _warm_clocks(timer: DeviceTimer, seconds: float = 0.5) -> None:
    """Keep the card busy until it has left its idle clocks, then measure the delay's counter again."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(50):
            timer.setup()
        torch.cuda.synchronize()
    timer.count_cycles()


def _event_resolution() -> tuple[float, float]:
    """Return the smallest step between event times, and the median time between two adjacent events, in µs."""
    graded = _between_events(range(100, 8_100, 40))
    levels = sorted({round(value, 4) for value in graded})
    steps = [high - low for low, high in zip(levels[:-1], levels[1:], strict=True)]
    return min(steps, default=0.0), statistics.median(_between_events([None] * 200))


def _between_events(cycles: Iterable[int | None]) -> list[float]:
    """Return the µs between two events with a wait of so many cycles between them, or nothing (None)."""
    pairs = []
    for wait in cycles:
        pairs.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        pairs[-1][0].record()
        if wait is not None:
            torch.cuda._sleep(wait)
        pairs[-1][1].record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in pairs]


def _null_kernel(timer: DeviceTimer) -> dict[str, float]:
    from . import streaming  # needs Triton

    call = streaming.null_kernel()
    device = _device_us(timer, call)
    eager = timing.call_time(call, max(timer.host_us, device)).us
    return {"device": device, "graph": timing.graph_time(call, device).us, "eager": eager}


def _copy_gbps(timer: DeviceTimer) -> float:
    source = torch.zeros(COPY_BYTES, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _device_us(timer, lambda: target.copy_(source), CURVE_ROUNDS) / 1e3
