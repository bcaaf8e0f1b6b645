"""Read and check a saved benchmark run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import journal
from .figures import RunError, calibration, is_figure, is_positive, mapping, short
from .speedups import kernel_of

IDENTITY = ("gpu", "gpu_id", "driver", "torch", "triton")
MARK = "nsa_sel"  # key at the top of a saved run under which our own notes stand
NO_COMMIT = ("unversioned", "unknown")  # pytest-benchmark's words for a folder without history
Key = tuple[str, str]  # case id, method


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
    bytes: float | None = None  # that any method must move
    card: str = ""  # gpu_id of what it was measured on

    @property
    def key(self) -> Key:
        return self.case, self.method

    @property
    def family(self) -> str:
        return self.case.split("-")[0]

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

    def shifted(self, us: float) -> Timing:
        """Return the timing with `us` added to its device statistics."""
        low, high = self.ci95_us
        return replace(
            self,
            median_us=self.median_us + us,
            q1_us=self.q1_us + us,
            q3_us=self.q3_us + us,
            ci95_us=(low + us, high + us),
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
    shared_cards: bool = False  # ranks of a job timed on one card at once: no figures, and no baseline either
    asked: frozenset[Key] | None = None  # what it was to measure; None: it was saved before runs said so
    skipped: frozenset[Key] = frozenset()  # of these, what could not be measured there, for a saved reason
    case_file: str = ""  # the name of the file that the run's cases are from; "": they are of the matrix
    cases: Mapping[str, Any] = field(default_factory=dict)  # definitions, by id, of cases that no matrix may know
    random: Mapping[str, Any] = field(default_factory=dict)  # seed and count, if they are those of the matrix `random`
    commit: str = ""
    dirty: bool = False  # measured with uncommitted changes
    floor_us: float | None = None  # device time of an empty kernel
    read_limit_us: tuple[tuple[float, float], ...] = ()  # (bytes, µs) by rising size
    cards: Mapping[str, Any] = field(default_factory=dict)  # of a job of ranks: each card's calibration, by gpu_id
    path: str = ""  # the file that it was read from
    kernels: Mapping[str, str] = field(default_factory=dict)  # users' kernels: what each name means

    @property
    def gpu(self) -> str:
        return self.environment["gpu"]

    @property
    def on_gpu(self) -> bool:
        return self.gpu != gpu_name(None)

    def calibration_of(self, card: str) -> tuple[float, tuple[tuple[float, float], ...]] | None:
        """Return a card's launch floor and read limit, as they were in this run; None if one is not known."""
        known = self.cards.get(card, {"floor_us": self.floor_us, "read_limit_us": self.read_limit_us})
        return (known["floor_us"], known["read_limit_us"]) if known["floor_us"] and known["read_limit_us"] else None

    @property
    def unmeasured(self) -> tuple[Key, ...]:
        """Return what was asked for, was not measured, and has no saved reason for that."""
        return tuple(sorted((self.asked or frozenset()) - self.timings.keys() - self.skipped))


def timing(case: str, method: str, stats: Mapping[str, Any], extra: Mapping[str, Any], run: str) -> Timing:
    """Build a checked Timing from pytest-benchmark statistics in seconds and `extra` in microseconds.

    Raises: RunError naming `run`, the case and the bad value.
    """

    def positive(source: Mapping[str, Any], name: str) -> float:
        value = source.get(name)
        if not is_positive(value):
            where = f"{run}: {short(case)} {short(method)}: {name}"
            raise RunError(f"{where} is {short(value)}, expected a positive number; measure it again")
        return float(value)

    ci95 = extra.get("ci95_us")
    if not isinstance(ci95, list | tuple) or len(ci95) != 2:
        raise RunError(
            f"{run}: {short(case)} {short(method)}: ci95_us is {short(ci95)}, expected a pair; measure it again"
        )
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
        bytes=float(size) if is_positive(size := extra.get("bytes")) else None,
    )


def from_entries(name: str, entries: Iterable[Mapping[str, Any]], machine_info: Mapping[str, Any], **more: Any) -> Run:
    """Build a Run from benchmark entries (statistics under "stats", or flat as in a comparison's rows).

    Entries of other suites, which carry neither `case` nor `method`, are left out.

    Raises: RunError if none is left, a case stands twice, two GPUs are mixed, or the timer's tick is absurd.
    """
    timings: dict[Key, Timing] = {}
    identities: list[dict[str, str]] = []
    kernels: dict[str, str] = {}
    for entry in entries:
        extra = entry.get("extra_info") if isinstance(entry, Mapping) else None
        stats = entry.get("stats", entry) if isinstance(entry, Mapping) else None
        if not isinstance(extra, Mapping) or not isinstance(stats, Mapping):
            raise RunError(f"{name}: not a saved pytest-benchmark run; give another file")
        case, method = extra.get("case"), extra.get("method")
        if case is None and method is None:
            continue
        if not isinstance(case, str) or not isinstance(method, str):
            raise RunError(
                f"{name}: case is {short(case)} and method is {short(method)}, expected two names; measure it again"
            )
        if (case, method) in timings:
            raise RunError(
                f"{name}: {short(case)} {short(method)} stands twice; remove one of them or measure it again"
            )
        identities.append({key: str(extra.get(key) or machine_info.get(key) or "none") for key in IDENTITY})
        timings[case, method] = replace(timing(case, method, stats, extra, name), card=identities[-1]["gpu_id"])
        if extra.get("kernel"):
            kernels[kernel_of(method)] = f"{extra['kernel']}, {extra.get('takes')}"
    if not timings:
        raise RunError(f"{name}: no benchmark of this suite in it (none has a case and a method); give another file")
    gpus = sorted({identity["gpu"] for identity in identities})
    if len(gpus) > 1:
        raise RunError(f"{name}: mixes the GPUs {', '.join(map(short, gpus))}; measure each in its own run")
    cards = "+".join(sorted({identity["gpu_id"] for identity in identities}))  # of a run by many ranks several
    environment = identities[0] | {"gpu_id": cards, "gpu": gpu_name(None if gpus[0] == "none" else gpus[0])}
    return Run(name, timings, environment, **calibration(name, machine_info), kernels=kernels, **more)


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
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows put a mark at a file's start
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
    """Return a saved run's date, commit and marks, as keyword arguments of Run."""
    mark, commit = mapping(data.get(MARK)), mapping(data.get("commit_info"))
    slow, asked, ranks = mark.get("regressions"), mark.get("asked"), mark.get("ranks")
    of_ranks = [mapping(rank) for rank in ranks] if isinstance(ranks, list) else []
    identity = str(commit.get("id") or "")
    return {
        "datetime": str(data.get("datetime", "")),
        "regressions": tuple(str(item) for item in slow) if isinstance(slow, list) else (),
        "interrupted": bool(mark.get("interrupted")),
        "shared_cards": bool(mark.get("shared_cards")),
        "asked": _pairs(asked) if isinstance(asked, list) else None,
        "skipped": frozenset(not_timed(data)),
        "case_file": str(mark.get("case_file") or ""),
        "cases": mapping(mark.get("cases")),
        "random": mapping(mark.get("random")),
        "cards": {str(rank.get("gpu_id")): calibration("a rank", rank) for rank in of_ranks},
        "commit": "" if identity in NO_COMMIT else identity,
        "dirty": bool(commit.get("dirty")),
    }


def _pairs(asked: list[Any]) -> frozenset[Key]:
    """Return the (case, method) pairs among the items of a list."""
    pairs = (pair for pair in asked if isinstance(pair, list) and len(pair) == 2)
    return frozenset((str(case), str(method)) for case, method in pairs)


def not_timed(data: Mapping[str, Any]) -> dict[Key, str]:
    """Return why methods of a saved run have no time, by (case, method); entries that do not say so are left out."""
    entries = mapping(data.get(MARK)).get("not_timed")
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
    return from_entries(short_name(path), data["benchmarks"], info, **notes(data), path=str(path))


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
        run = from_entries(short_name(path), data["benchmarks"], machine, **notes(data), path=str(path))
        entries = [entry["extra_info"] for entry in data["benchmarks"]]
        extras = {(extra.get("case"), extra.get("method")): extra for extra in entries}
        return cls(run, extras, machine, run.commit, not_timed(data))

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
