"""The min-L rule: from which selected length L on a kernel is safe to switch on.

Source: docs/measuring.md, "From which length on".
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..saved.run import Saved, gpu_name, is_figure
from ..saved.speedups import SDPA_FORMS, TRITON, fastest_form
from ..suite import cases
from ..suite.cases import DTYPES, PAGED, RECORDED, SHARED, Case
from ..suite.kernels import UNSUPPORTED, block_size, expressible
from .judged import Own, ThresholdError, of_runs, takes

NEEDED_SPEEDUP = 1.2
REGIME_OF_FAMILY = {"rows": "rows", "ragged": "rows", "prefill": "prefill", SHARED: "prefill"} | dict.fromkeys(
    ("decode", "long", PAGED), "decode"
)
REGIMES = ("rows", "decode", "prefill")
# launch -> the times that judge it, of which the worse counts
LAUNCHES = {"eager": ("device", "call"), "graph": ("device", "graph"), "device": ("device",)}
DECIDING_LAUNCH = "eager"


@dataclass(frozen=True)
class Verdict:
    """Hold what the runs say of one expected case: its worst speed-up bound, or why it has none."""

    case: str
    regime: str
    L: int  # as in the case's id
    longest: int  # its longest row, which is what "auto" compares; above L only where rows are ragged
    bound: float | None = None  # SDPA's lower CI end / Triton's upper, fastest SDPA form, worst time and run
    speedup: float | None = None  # ratio of the medians, worst time and run
    problem: str = ""  # what is missing
    opponent: str = ""  # the SDPA form that the bound is over
    not_judged: str = ""  # why no SDPA form was timed, or what the kernel itself says that it cannot do

    @property
    def declared(self) -> bool:
        """Tell whether the kernel itself said that it cannot do the case."""
        return UNSUPPORTED in self.not_judged

    @property
    def ok(self) -> bool:
        return not self.problem and self.bound is not None and self.bound >= NEEDED_SPEEDUP

    @property
    def text(self) -> str:
        return self.problem or self.not_judged or f"lower bound {self.bound:.2f}x"

    def __str__(self) -> str:
        return f"{self.case}: {self.text}"


@dataclass(frozen=True)
class Threshold:
    """Hold the rule's answer for one regime, launch and dtype, and the verdicts behind it."""

    regime: str
    launch: str
    dtype: str
    verdicts: tuple[Verdict, ...]

    @property
    def judged(self) -> list[Verdict]:
        return [v for v in self.verdicts if not v.not_judged]

    @property
    def not_judged(self) -> list[Verdict]:
        return [v for v in self.verdicts if v.not_judged]

    @property
    def opponents(self) -> dict[str, int]:
        """Return in how many cases each SDPA form was the opponent, the most frequent first."""
        return dict(Counter(v.opponent for v in self.verdicts if v.opponent).most_common())

    @property
    def failing(self) -> list[Verdict]:
        return [v for v in self.judged if not v.ok]

    @property
    def missing(self) -> list[Verdict]:
        return [v for v in self.verdicts if v.problem]

    @property
    def too_slow(self) -> list[Verdict]:
        return [v for v in self.failing if not v.problem]

    @property
    def min_L(self) -> int | None:
        """Return the smallest judged L above the rows of every failing case; None if there is none."""
        blocked = max((v.longest for v in self.failing), default=0)
        return min((v.L for v in self.judged if blocked < v.L), default=None)

    @property
    def deciding(self) -> Verdict:
        """Return the case that stops the threshold from being lower; if none does, the one closest to doing so."""
        failing = self.failing
        if failing:
            longest = max(v.longest for v in failing)
            return min((v for v in failing if v.longest == longest), key=_worst_first)
        return min(self.judged or self.verdicts, key=_worst_first)

    def by_length(self) -> list[tuple[int, list[Verdict]]]:
        lengths = sorted({v.L for v in self.judged})
        return [(L, [v for v in self.judged if v.L == L]) for L in lengths]


@dataclass(frozen=True)
class Decision:
    """Hold every threshold of one GPU and kernel, and the value that is switched on."""

    gpu: str
    date: str  # of the newest run, YYYY-MM-DD
    expected: str  # what must be there: "matrix `full`", or "cases of `cases.yaml`"
    runs: tuple[Saved, ...]
    thresholds: tuple[Threshold, ...]
    kernel: str = TRITON["op"]

    @property
    def deciding(self) -> list[Threshold]:
        return [t for t in self.thresholds if t.launch == DECIDING_LAUNCH]

    @property
    def opponents(self) -> dict[str, int]:
        """Return in how many deciding cases each SDPA form was the opponent, the most frequent first."""
        return dict(sum((Counter(t.opponents) for t in self.deciding), Counter()).most_common())

    @property
    def not_judged(self) -> list[Verdict]:
        return [v for t in self.deciding for v in t.not_judged]

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


def decide(
    saved: Sequence[Saved], matrix: str | None = None, own: Own | None = None, kernel: str = TRITON["op"]
) -> Decision:
    """Apply the min-L rule to saved runs of one GPU; runs may repeat a matrix or hold chunks of it.

    matrix: the cases that must be there. own: these in place of a matrix. With neither, what the runs themselves hold:
    the cases of their file, else the full matrix. kernel: ours, or a user's; those count that its blocks can express.

    Raises: ThresholdError without GPU figures, with planted slow-downs, for runs that differ in GPU, versions or in
        what the kernel is, or for a kernel that is in none of them; RunError for damaged definitions of cases.
    """
    if matrix is None and own is None:
        own = of_runs(saved)
    gpu = _one_machine(saved)
    size = block_size(takes(saved, kernel))
    dtypes = sorted({str(extra.get("dtype")) for one in saved for extra in one.extras.values()} & set(DTYPES))
    if own is not None:
        dtypes = sorted({case.dtype for case in own.cases})
    if any("planted" in extra for one in saved for extra in one.extras.values()):
        raise ThresholdError("a run has planted slow-downs, which test the comparison; measure without --sel-plant")
    if not dtypes:
        raise ThresholdError(f"{saved[0].run.name}: no benchmark in it names a dtype of {', '.join(DTYPES)}")
    thresholds = []
    for dtype in dtypes:
        expected = cases.matrix(matrix or "full", dtype) if own is None else [c for c in own.cases if c.dtype == dtype]
        expected = [case for case in expected if _expects(case, size, saved, kernel)]
        for launch in LAUNCHES:
            verdicts = judge(expected, saved, launch, kernel)
            for regime in REGIMES:
                of_regime = tuple(v for v in verdicts if v.regime == regime)
                if of_regime:
                    thresholds.append(Threshold(regime, launch, dtype, of_regime))
    if not thresholds:
        raise ThresholdError(f"{kernel} takes {takes(saved, kernel)}, which expresses none of the cases")
    named = f"matrix `{matrix or 'full'}`" if own is None else f"cases of `{own.name}`"
    date = max(one.run.datetime for one in saved)[:10]
    return Decision(gpu, date, named, tuple(saved), tuple(thresholds), kernel)


def _expects(case: Case, size: int, saved: Sequence[Saved], kernel: str) -> bool:
    """Tell whether a kernel that takes blocks of this size, 0 for ranges, must have a time in the case."""
    if size and case.recorded is not None:  # its file may lie elsewhere, and was seen where the kernel was measured
        return any((case.id, kernel) in (*one.extras, *one.not_timed) for one in saved)
    return expressible(case, size)


def regime_of(case: Case) -> str:
    """Return the regime by which a case counts; a recorded call is one of decode if it has one query token."""
    if case.family == RECORDED:
        return "prefill" if case.S > 1 else "decode"
    return REGIME_OF_FAMILY[case.family]


def judge(expected: Sequence[Case], saved: Sequence[Saved], launch: str, kernel: str = TRITON["op"]) -> list[Verdict]:
    """Return the verdict of every expected case under one launch ("eager", "graph" or "device").

    Within a family every case must have been asked for as often as the one asked for most: a case that dropped out of
    one of two full runs is missing, while a family that a chunk leaves out altogether is not.
    """
    methods = kernel, *SDPA_FORMS["op"]
    asked_for = [(one, {case for case, method in (*one.extras, *one.not_timed) if method in methods}) for one in saved]
    holding = {c.id: [one for one, asked in asked_for if c.id in asked] for c in expected}
    most: dict[str, int] = {}
    for c in expected:
        most[c.family] = max(most.get(c.family, 0), len(holding[c.id]))
    return [_judge_case(c, holding[c.id], most[c.family], launch, kernel) for c in expected]


def _judge_case(case: Case, holding: Sequence[Saved], most: int, launch: str, kernel: str) -> Verdict:
    def verdict(**found: Any) -> Verdict:
        return Verdict(case.id, regime_of(case), case.L, case.longest, **found)

    if not holding:
        return verdict(problem="missing from every run")
    if len(holding) < most:
        return verdict(problem=f"measured in {len(holding)} of {most} runs")
    bounds, speedups, not_judged = [], [], ""
    for one in holding:
        methods = [kernel, *(m for m in SDPA_FORMS["op"] if m in case.methods or (case.id, m) in one.extras)]
        timed = [m for m in methods if (case.id, m) in one.extras]
        refused = {m: one.not_timed[case.id, m] for m in methods if m not in timed and (case.id, m) in one.not_timed}
        for method in methods:
            if method not in timed and method not in refused:
                return verdict(problem=f"{method} is missing from {one.run.name}")
        if not set(timed) & set(SDPA_FORMS["op"]):
            not_judged = _why({m: why for m, why in refused.items() if m in SDPA_FORMS["op"]})
            continue
        if kernel in refused and refused[kernel].startswith(UNSUPPORTED):
            not_judged = f"{kernel}: {refused[kernel]}"
            continue
        if kernel in refused:
            return verdict(problem=f"{kernel} has no time in {one.run.name}: {refused[kernel]}")
        if not is_figure(one.extras[case.id, kernel].get("mae")):
            return verdict(problem=f"no parity figure (mae) in {one.run.name}")
        for kind in LAUNCHES[launch]:
            times = {}
            for method in timed:
                time = one.time_us((case.id, method), kind)
                if time is None:
                    return verdict(problem=f"{method} has no {kind} time in {one.run.name}")
                times[method] = time
            median, _, upper = times[kernel]
            form, us = _fastest_sdpa({method: lower for method, (_, lower, _) in times.items()})
            bounds.append((us / upper, form))
            speedups.append(_fastest_sdpa({method: us for method, (us, _, _) in times.items()})[1] / median)
    if not bounds:
        return verdict(not_judged=not_judged)
    bound, opponent = min(bounds)
    return verdict(bound=bound, speedup=min(speedups), opponent=opponent)


def _fastest_sdpa(times: Mapping[str, float]) -> tuple[str, float]:
    form = fastest_form(times, "op")
    assert form is not None  # a case without one is not judged
    return form, times[form]


def _why(reasons: Mapping[str, str]) -> str:
    """Return why no SDPA form was timed, once if the reason is the same for all."""
    if len(set(reasons.values())) == 1:
        return next(iter(reasons.values()))
    return "; ".join(f"{form}: {reason}" for form, reason in reasons.items())


def _one_machine(saved: Sequence[Saved]) -> str:
    """Return the GPU's name if all runs share it and the versions."""
    for field in ("gpu", "driver", "torch", "triton"):
        found = {one.run.environment[field]: one.run.name for one in saved}
        if len(found) > 1:
            shown = ", ".join(f"{value} ({name})" for value, name in found.items())
            raise ThresholdError(f"the runs differ in {field}: {shown}; give runs of one GPU and one set of versions")
    gpu = saved[0].run.gpu
    if gpu == gpu_name(None):
        raise ThresholdError(f"{saved[0].run.name}: no GPU figures in it; measure on a GPU: nsa-sel bench")
    return gpu


def _worst_first(verdict: Verdict) -> float:
    return -math.inf if verdict.bound is None else verdict.bound
