"""Read and check a saved benchmark run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import journal

IDENTITY = ("gpu", "gpu_id", "driver", "torch", "triton")
MARK = "nsa_sel"  # key at the top of a saved run under which our own notes stand
Key = tuple[str, str]  # case id, method


class RunError(ValueError):
    """Say in one line which saved run cannot be used, why, and what to do."""


@dataclass(frozen=True)
class Timing:
    """Hold one method of one case: device-time statistics, call time and graph time, all in microseconds."""

    case: str
    method: str
    median_us: float
    q1_us: float
    q3_us: float
    ci95_us: tuple[float, float]
    call_us: float | None = None
    graph_us: float | None = None

    @property
    def key(self) -> Key:
        return self.case, self.method

    def scaled(self, factor: float) -> Timing:
        """Return the timing with its device statistics multiplied by `factor`."""
        low, high = self.ci95_us
        return replace(
            self,
            median_us=self.median_us * factor,
            q1_us=self.q1_us * factor,
            q3_us=self.q3_us * factor,
            ci95_us=(low * factor, high * factor),
        )


@dataclass(frozen=True)
class Run:
    """Hold one measuring run: its timings, what it ran on, the timer's tick and its date (ISO 8601, UTC)."""

    name: str
    timings: Mapping[Key, Timing]
    environment: Mapping[str, str]  # the keys of IDENTITY
    tick_us: float = 0.0
    datetime: str = ""
    regressions: tuple[str, ...] = ()  # found when it was measured; such a run is no baseline unless named
    interrupted: bool = False  # it lacks cases; no baseline unless named either

    @property
    def gpu(self) -> str:
        return self.environment["gpu"]


def timing(case: str, method: str, stats: Mapping[str, Any], extra: Mapping[str, Any], run: str) -> Timing:
    """Build a checked Timing from pytest-benchmark statistics in seconds and `extra` in microseconds.

    Raises: RunError naming `run`, the case and the bad value.
    """

    def positive(source: Mapping[str, Any], name: str) -> float:
        value = source.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise RunError(
                f"{run}: {case!r} {method!r}: {name} is {value!r}, expected a positive number; measure it again"
            )
        return float(value)

    ci95 = extra.get("ci95_us")
    if not isinstance(ci95, list | tuple) or len(ci95) != 2:
        raise RunError(f"{run}: {case!r} {method!r}: ci95_us is {ci95!r}, expected a pair; measure it again")
    low, high = (positive({"ci95_us": bound}, "ci95_us") for bound in ci95)
    return Timing(
        case,
        method,
        median_us=positive(stats, "median") * 1e6,
        q1_us=positive(stats, "q1") * 1e6,
        q3_us=positive(stats, "q3") * 1e6,
        ci95_us=(min(low, high), max(low, high)),
        call_us=None if extra.get("call_us") is None else positive(extra, "call_us"),
        graph_us=None if extra.get("graph_us") is None else positive(extra, "graph_us"),
    )


def from_entries(name: str, entries: Iterable[Mapping[str, Any]], machine_info: Mapping[str, Any], **more: Any) -> Run:
    """Build a Run from benchmark entries (statistics under "stats", or flat as in a comparison's rows).

    Entries of other suites, which carry neither `case` nor `method`, are left out.

    Raises: RunError if none is left, a case stands twice, or two GPUs are mixed.
    """
    timings: dict[Key, Timing] = {}
    identities: list[dict[str, str]] = []
    for entry in entries:
        extra = entry.get("extra_info") if isinstance(entry, Mapping) else None
        stats = entry.get("stats", entry) if isinstance(entry, Mapping) else None
        if not isinstance(extra, Mapping) or not isinstance(stats, Mapping):
            raise RunError(f"{name}: not a saved pytest-benchmark run; give another file")
        case, method = extra.get("case"), extra.get("method")
        if case is None and method is None:
            continue
        if not isinstance(case, str) or not isinstance(method, str):
            raise RunError(f"{name}: case is {case!r} and method is {method!r}, expected two names; measure it again")
        if (case, method) in timings:
            raise RunError(f"{name}: {case!r} {method!r} stands twice; remove one of them or measure it again")
        timings[case, method] = timing(case, method, stats, extra, name)
        identities.append({field: str(extra.get(field) or machine_info.get(field) or "none") for field in IDENTITY})
    if not timings:
        raise RunError(f"{name}: no benchmark of this suite in it (none has a case and a method); give another file")
    gpus = sorted({identity["gpu"] for identity in identities})
    if len(gpus) > 1:
        raise RunError(f"{name}: mixes the GPUs {', '.join(gpus)}; measure each in its own run")
    calibration = machine_info.get("calibration")
    tick = calibration.get("tick_us") if isinstance(calibration, Mapping) else None
    environment = identities[0] | {"gpu": gpu_name(None if gpus[0] == "none" else gpus[0])}
    return Run(name, timings, environment, float(tick) if isinstance(tick, int | float) else 0.0, **more)


def gpu_name(gpu: str | None) -> str:
    """Return the name under which runs of this GPU are kept; "cpu" without one."""
    return gpu or "cpu"


def short_name(path: Path | str) -> str:
    """Return a run's folder and file name, which is how messages call it."""
    return "/".join(Path(path).parts[-2:])


def read_json(path: Path) -> dict[str, Any]:
    """Read a saved run as it stands; of a run that was killed, its journal.

    Raises: RunError if the file is missing, empty, truncated or something else than a run.
    """
    name = short_name(path)
    try:
        text = path.read_text(encoding="utf-8")
        read = journal.parse if path.suffix == journal.SUFFIX else json.loads
        data = read(text) if text.strip() else None
    except OSError as error:
        raise RunError(f"{name}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, RecursionError):
        raise RunError(f"{name}: damaged or truncated JSON; restore it or delete it and measure again") from None
    if data is None:
        raise RunError(f"{name}: the file is empty; restore it or delete it and measure again")
    if not isinstance(data, dict) or not isinstance(data.get("benchmarks"), list):
        raise RunError(f"{name}: not a saved pytest-benchmark run (no list of benchmarks); give another file")
    return data


def notes(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved run's date and marks, as keyword arguments of Run."""
    mark = data.get(MARK)
    slow = mark.get("regressions") if isinstance(mark, Mapping) else None
    return {
        "datetime": str(data.get("datetime", "")),
        "regressions": tuple(str(item) for item in slow) if isinstance(slow, list) else (),
        "interrupted": isinstance(mark, Mapping) and bool(mark.get("interrupted")),
    }


def not_timed(data: Mapping[str, Any]) -> dict[Key, str]:
    """Return why methods of a saved run have no time, by (case, method); entries that do not say so are left out."""
    mark = data.get(MARK)
    entries = mark.get("not_timed") if isinstance(mark, Mapping) else None
    found: dict[Key, str] = {}
    for entry in entries if isinstance(entries, list) else []:
        match entry:
            case {"case": str(name), "method": str(method), "reason": str(reason)} if reason:
                found[name, method] = reason
    return found


def load(path: Path | str) -> Run:
    """Load and check one saved run.

    Raises: RunError with one line that names the file and what to do.
    """
    data = read_json(Path(path))
    machine_info = data.get("machine_info")
    info = machine_info if isinstance(machine_info, Mapping) else {}
    return from_entries(short_name(path), data["benchmarks"], info, **notes(data))


@dataclass(frozen=True)
class Saved:
    """Hold a checked run together with all that its benchmarks and its machine said."""

    run: Run
    extras: Mapping[Key, Mapping[str, Any]]  # extra_info by (case, method)
    machine: Mapping[str, Any]
    commit: str
    not_timed: Mapping[Key, str]  # why a (case, method) that was asked for has no time

    @classmethod
    def load(cls, path: Path | str) -> Saved:
        """Raises: RunError with one line that names the file and what to do."""
        data = read_json(Path(path))
        machine: dict[str, Any] = data["machine_info"] if isinstance(data.get("machine_info"), dict) else {}
        commit: dict[str, Any] = data["commit_info"] if isinstance(data.get("commit_info"), dict) else {}
        run = from_entries(short_name(path), data["benchmarks"], machine, **notes(data))
        entries = [entry["extra_info"] for entry in data["benchmarks"]]
        extras = {(extra.get("case"), extra.get("method")): extra for extra in entries}
        return cls(run, extras, machine, str(commit.get("id") or ""), not_timed(data))

    def time_us(self, key: Key, kind: str) -> tuple[float, float, float] | None:
        """Return (median, lower, upper 95 % CI end) in µs of a "device", "call" or "graph" time; None: not measured."""
        timing = self.run.timings.get(key)
        if timing is None:
            return None
        if kind == "device":
            return timing.median_us, *timing.ci95_us
        median = timing.call_us if kind == "call" else timing.graph_us
        interval = self.extras[key].get(f"{kind}_ci95_us")
        if median is None or not isinstance(interval, list) or len(interval) != 2:
            return None
        if not all(is_figure(bound) and bound > 0 for bound in interval):
            return None
        return median, min(interval), max(interval)


def is_figure(value: object) -> bool:
    """Tell whether a value of a saved run is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
