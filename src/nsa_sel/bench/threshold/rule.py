"""The min-L rule: from which selected length L on Triton is safe to switch on.

Source: docs/measuring.md, "From which length on".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..saved.run import Saved, gpu_name, is_figure
from ..saved.speedups import TRITON, fastest_form
from ..suite import cases
from ..suite.cases import DTYPES, OP_METHODS, Case

NEEDED_SPEEDUP = 1.2
REGIME_OF_FAMILY = {"rows": "rows", "ragged": "rows", "decode": "decode", "long": "decode", "prefill": "prefill"}
REGIMES = ("rows", "decode", "prefill")
LAUNCHES = {"eager": "call", "graph": "graph", "device": "device"}  # launch -> the time that judges it
DECIDING_LAUNCH = "eager"


class ThresholdError(ValueError):
    """Say why no threshold can be computed from these runs, or why it cannot be written."""


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
    def verdict(bound: float | None = None, speedup: float | None = None, problem: str = "") -> Verdict:
        return Verdict(case.id, REGIME_OF_FAMILY[case.family], case.L, case.longest, bound, speedup, problem)

    triton = TRITON["op"]
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
        if not is_figure(one.extras[case.id, triton].get("mae")):
            return verdict(problem=f"no parity figure (mae) in {one.run.name}")
        median, _, upper = times[triton]
        bounds.append(_fastest_sdpa_us({method: lower for method, (_, lower, _) in times.items()}) / upper)
        speedups.append(_fastest_sdpa_us({method: us for method, (us, _, _) in times.items()}) / median)
    return verdict(min(bounds), min(speedups))


def _fastest_sdpa_us(times: Mapping[str, float]) -> float:
    form = fastest_form(times, "op")
    assert form is not None  # every case has one, and a missing one is a problem of its own
    return times[form]


def _one_machine(saved: Sequence[Saved]) -> str:
    """Return the GPU's name if all runs share it and the versions."""
    for field in ("gpu", "driver", "torch", "triton"):
        found = {one.run.environment[field]: one.run.name for one in saved}
        if len(found) > 1:
            shown = ", ".join(f"{value} ({name})" for value, name in found.items())
            raise ThresholdError(f"the runs differ in {field}: {shown}; give runs of one GPU and one set of versions")
    gpu = saved[0].run.gpu
    if gpu == gpu_name(None):
        raise ThresholdError(f"{saved[0].run.name}: no GPU figures in it; measure on a GPU: pytest tests/perf")
    return gpu


def _worst_first(verdict: Verdict) -> float:
    return -math.inf if verdict.bound is None else verdict.bound
