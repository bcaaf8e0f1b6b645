"""The min-L rule: from which selected length L on Triton is safe to switch on, and writing that decision down."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsa_sel.bench import cases, inputs, runs
from nsa_sel.bench.cases import DTYPES, OP_METHODS, Case
from nsa_sel.config import ConfigError

NEEDED_SPEEDUP = 1.2
TRITON = "triton"
REGIME_OF_FAMILY = {"rows": "rows", "ragged": "rows", "decode": "decode", "long": "decode", "prefill": "prefill"}
REGIMES = ("rows", "decode", "prefill")
LAUNCHES = {"eager": "call", "graph": "graph", "device": "device"}  # launch -> the time that judges it
DECIDING_LAUNCH = "eager"


class ThresholdError(ValueError):
    """Say why no threshold can be computed from these runs, or why it cannot be written."""


@dataclass(frozen=True)
class Saved:
    """Hold a checked run together with all that its benchmarks and its machine said."""

    run: runs.Run
    extras: Mapping[runs.Key, Mapping[str, Any]]  # extra_info by (case, method)
    machine: Mapping[str, Any]
    commit: str

    @classmethod
    def load(cls, path: Path | str) -> Saved:
        """Raises: RunError with one line that names the file and what to do."""
        data = runs.read_json(Path(path))
        machine: dict[str, Any] = data["machine_info"] if isinstance(data.get("machine_info"), dict) else {}
        commit: dict[str, Any] = data["commit_info"] if isinstance(data.get("commit_info"), dict) else {}
        run = runs.from_entries(runs.short_name(path), data["benchmarks"], machine, **runs.notes(data))
        extras = [entry["extra_info"] for entry in data["benchmarks"]]
        return cls(run, {(e.get("case"), e.get("method")): e for e in extras}, machine, str(commit.get("id") or ""))

    def time_us(self, key: runs.Key, kind: str) -> tuple[float, float, float] | None:
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
        if not all(_is_figure(bound) and bound > 0 for bound in interval):
            return None
        return median, min(interval), max(interval)


@dataclass(frozen=True)
class Verdict:
    """Hold what the runs say of one expected case: its worst speed-up bound, or what is missing."""

    case: str
    regime: str
    L: int  # as in the case's id
    longest: int  # its longest row, which is what "auto" compares; above L only where rows are ragged
    bound: float | None  # SDPA's lower CI end / Triton's upper, faster SDPA form, worst run
    speedup: float | None  # ratio of the medians, worst run
    problem: str = ""

    @property
    def ok(self) -> bool:
        return not self.problem and self.bound is not None and self.bound >= NEEDED_SPEEDUP

    def __str__(self) -> str:
        return f"{self.case}: {self.problem or f'lower bound {self.bound:.2f}x'}"


@dataclass(frozen=True)
class Threshold:
    """Hold the rule's answer for one regime, launch and dtype, and the verdicts behind it."""

    regime: str
    launch: str
    dtype: str
    verdicts: tuple[Verdict, ...]

    @property
    def failing(self) -> list[Verdict]:
        return [v for v in self.verdicts if not v.ok]

    @property
    def missing(self) -> list[Verdict]:
        return [v for v in self.verdicts if v.problem]

    @property
    def too_slow(self) -> list[Verdict]:
        return [v for v in self.failing if not v.problem]

    @property
    def min_L(self) -> int | None:
        """Return the smallest tested L above the rows of every failing case; None if there is none."""
        blocked = max((v.longest for v in self.failing), default=0)
        return min((v.L for v in self.verdicts if blocked < v.L), default=None)

    @property
    def deciding(self) -> Verdict:
        """Return the case that stops the threshold from being lower; if none does, the one closest to doing so."""
        failing = self.failing
        if failing:
            longest = max(v.longest for v in failing)
            return min((v for v in failing if v.longest == longest), key=_worst_first)
        return min(self.verdicts, key=_worst_first)

    def by_length(self) -> list[tuple[int, list[Verdict]]]:
        lengths = sorted({v.L for v in self.verdicts})
        return [(L, [v for v in self.verdicts if v.L == L]) for L in lengths]


@dataclass(frozen=True)
class Decision:
    """Hold every threshold of one GPU and the value that is switched on."""

    gpu: str
    date: str  # of the newest run, YYYY-MM-DD
    matrix: str
    runs: tuple[Saved, ...]
    thresholds: tuple[Threshold, ...]

    @property
    def deciding(self) -> list[Threshold]:
        return [t for t in self.thresholds if t.launch == DECIDING_LAUNCH]

    @property
    def min_L(self) -> int | None:
        """Return the largest qualifying value over the regimes, eager; None if a regime has none.

        A regime that passes at every length it was tested at forbids nothing below its shortest one (prefill is tested
        from L = 512 on), so it does not raise the value; if no regime has a failing case, it is the shortest tested L.
        """
        if any(t.min_L is None for t in self.deciding):
            return None
        limited = [t.min_L for t in self.deciding if t.failing and t.min_L is not None]
        tested = [t.min_L for t in self.deciding if t.min_L is not None]
        return max(limited) if limited else min(tested, default=None)

    @property
    def deciding_threshold(self) -> Threshold:
        """Return the threshold whose deciding case sets `min_L`."""
        blocked = [t for t in self.deciding if t.failing]
        if not blocked:
            return min(self.deciding, key=lambda t: _worst_first(t.deciding))
        return max(blocked, key=lambda t: math.inf if t.min_L is None else t.min_L)


def decide(saved: Sequence[Saved], matrix: str = "full") -> Decision:
    """Apply the min-L rule to saved runs of one GPU; runs may repeat a matrix or hold chunks of it.

    Raises: ThresholdError without GPU figures, with planted slow-downs, or for runs that differ in GPU or versions.
    Source: MEASURING, point 8.
    """
    gpu = _one_machine(saved)
    dtypes = sorted({str(extra.get("dtype")) for one in saved for extra in one.extras.values()} & set(DTYPES))
    if any("planted" in extra for one in saved for extra in one.extras.values()):
        raise ThresholdError("a run has planted slow-downs, which test the comparison; measure without --sel-plant")
    if not dtypes:
        raise ThresholdError(f"{saved[0].run.name}: no benchmark in it names a dtype of {', '.join(DTYPES)}")
    thresholds = []
    for dtype in dtypes:
        expected = cases.matrix(matrix, dtype)
        for launch in LAUNCHES:
            verdicts = judge(expected, saved, launch)
            for regime in REGIMES:
                of_regime = tuple(v for v in verdicts if v.regime == regime)
                if of_regime:
                    thresholds.append(Threshold(regime, launch, dtype, of_regime))
    return Decision(gpu, max(one.run.datetime for one in saved)[:10], matrix, tuple(saved), tuple(thresholds))


def judge(expected: Sequence[Case], saved: Sequence[Saved], launch: str) -> list[Verdict]:
    """Return the verdict of every expected case under one launch ("eager", "graph" or "device").

    Within a family every case must have been measured as often as the one measured most: a case that dropped out of one
    of two full runs is missing, while a family that a chunk leaves out altogether is not.
    """
    holding = {c.id: [one for one in saved if any((c.id, m) in one.extras for m in OP_METHODS)] for c in expected}
    most: dict[str, int] = {}
    for c in expected:
        most[c.family] = max(most.get(c.family, 0), len(holding[c.id]))
    return [_judge_case(c, holding[c.id], most[c.family], launch) for c in expected]


def _judge_case(case: Case, holding: Sequence[Saved], most: int, launch: str) -> Verdict:
    longest = max(inputs.ragged_lengths(case)) if case.family == "ragged" else case.L

    def verdict(bound: float | None = None, speedup: float | None = None, problem: str = "") -> Verdict:
        return Verdict(case.id, REGIME_OF_FAMILY[case.family], case.L, longest, bound, speedup, problem)

    if not holding:
        return verdict(problem="missing from every run")
    if len(holding) < most:
        return verdict(problem=f"measured in {len(holding)} of {most} runs")
    bounds, speedups = [], []
    for one in holding:
        times = {}
        for method in OP_METHODS:
            if (case.id, method) not in one.extras:
                if method in case.methods:
                    return verdict(problem=f"{method} is missing from {one.run.name}")
                continue
            time = one.time_us((case.id, method), LAUNCHES[launch])
            if time is None:
                return verdict(problem=f"{method} has no {launch} time in {one.run.name}")
            times[method] = time
        if not _is_figure(one.extras[case.id, TRITON].get("mae")):
            return verdict(problem=f"no parity figure (mae) in {one.run.name}")
        median, _, upper = times.pop(TRITON)
        bounds.append(min(lower for _, lower, _ in times.values()) / upper)
        speedups.append(min(sdpa for sdpa, _, _ in times.values()) / median)
    return verdict(min(bounds), min(speedups))


def _one_machine(saved: Sequence[Saved]) -> str:
    """Return the GPU's name if all runs share it and the versions."""
    for field in ("gpu", "driver", "torch", "triton"):
        found = {one.run.environment[field]: one.run.name for one in saved}
        if len(found) > 1:
            shown = ", ".join(f"{value} ({name})" for value, name in found.items())
            raise ThresholdError(f"the runs differ in {field}: {shown}; give runs of one GPU and one set of versions")
    gpu = saved[0].run.gpu
    if gpu == runs.gpu_name(None):
        raise ThresholdError(f"{saved[0].run.name}: no GPU figures in it; measure on a GPU: pytest tests/perf")
    return gpu


def _worst_first(verdict: Verdict) -> float:
    return -math.inf if verdict.bound is None else verdict.bound


def _is_figure(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `nsa-sel threshold`: 0 with a threshold, 1 if the data supports none, 2 if it cannot be judged or written."""
    from nsa_sel.bench import decision as writing

    parser = argparse.ArgumentParser(prog="nsa-sel threshold", description=__doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN.json", help="saved runs of one GPU, or chunks of one"
    )
    parser.add_argument(
        "--matrix", choices=cases.MATRICES, default="full", help="the cases that must be there, in each dtype"
    )
    parser.add_argument("--apply", action="store_true", help="write the value and its rationale")
    parser.add_argument("--config", type=Path, default=Path("configs/base.yaml"), help="YAML file to write")
    parser.add_argument("--prd", type=Path, default=Path("PRD.md"), help="requirements file to write")
    args = parser.parse_args(argv)
    try:
        decision = decide([Saved.load(path) for path in args.runs], args.matrix)
        print(writing.as_text(decision))
        if decision.min_L is None:
            if args.apply:
                print("Nothing is written.")
            return 1
        if args.apply:
            changed = writing.apply(decision, args.config, args.prd)
            print("Wrote " + ", ".join(map(str, changed)) if changed else "Already written; nothing changes.")
    except (runs.RunError, ThresholdError, ConfigError) as error:
        print(f"nsa-sel threshold: {error}", file=sys.stderr)
        return 2
    return 0
