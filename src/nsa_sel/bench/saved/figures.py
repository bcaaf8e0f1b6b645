"""Check the numbers of a saved run where they are read: a file may hold anything."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

SMALLEST, LARGEST = 1e-12, 1e12  # a time in seconds or µs beyond these was never measured
LARGEST_TICK_US = 100.0


class RunError(ValueError):
    """Say in one line which saved run cannot be used, why, and what to do."""


def is_figure(value: Any) -> TypeGuard[int | float]:
    """Tell whether a value of a saved run is a finite number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_positive(value: Any) -> TypeGuard[int | float]:
    """Tell whether a value can be a time or a size that was measured."""
    return is_figure(value) and SMALLEST <= value <= LARGEST


def short(value: object) -> str:
    """Return a wrong value as a message shows it."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "an integer of 30 digits or more"
    return text if len(text) <= 60 else f"{text[:60]}…"


def mapping(value: object) -> Mapping[str, Any]:
    """Return the value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def calibration(name: str, machine_info: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run's calibration says, as keyword arguments of Run.

    A tick beyond all measure would make every slow-down one of less than a tick.

    Raises: RunError if the tick is absurd.
    """
    values = mapping(machine_info.get("calibration"))
    tick = values.get("tick_us", 0.0)
    if not is_figure(tick) or not 0 <= tick <= LARGEST_TICK_US:
        raise RunError(
            f"{name}: the calibration's tick_us is {short(tick)}, expected 0 to {LARGEST_TICK_US:.0f};"
            " give another run or measure it again"
        )
    floor = mapping(values.get("null_kernel_us")).get("device")
    curve = values.get("read_limit_us")
    pairs = [pair for pair in curve if isinstance(pair, list) and len(pair) == 2] if isinstance(curve, list) else []
    known = [(float(size), float(us)) for size, us in pairs if is_positive(size) and is_positive(us)]
    return {
        "tick_us": float(tick),
        "floor_us": float(floor) if is_positive(floor) else None,
        "read_limit_us": tuple(sorted(known)),
    }


def statistics_of(samples: Iterable[float]) -> Any:
    """Return pytest-benchmark's statistics of samples in seconds, as a saved run has them."""
    from pytest_benchmark.stats import Stats

    stats = Stats()
    for sample in samples:
        stats.update(sample)
    return stats
