"""Compare two measuring runs: what is slower, what is suspect, what is noise.

Source: docs/measuring.md, "Comparing two runs".
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ..saved.run import Key, Run, Timing
from ..saved.speedups import SDPA_FORMS, is_kernel, kernel_of, scope
from .noise import CONFIRMED_WRONG, SUSPECT_WRONG, Noise, noise_of, time_us
from .result import Change, Comparison, RollUp
from .yardstick import FLOOR_US, Machine, explain

SLOWER = 0.10  # a change counts from here
HOST_FLOOR_US = 2.0  # for call time and graph time, which only warn
FEWEST_OF_AN_INTERVAL = 3


@dataclass(frozen=True)
class _Judge:
    """Hold what every timing of two runs is judged by."""

    old: Mapping[Key, Timing]
    new: Mapping[Key, Timing]
    machine: Machine
    tick_us: float
    noise: Noise
    comparisons: int

    def grade(self, before: Timing, after: Timing) -> tuple[str, str]:
        """Return "slower", "suspect", "noise" or "same", and why it is not slower by the whole rule."""
        slower = after.median_us - before.median_us
        if slower <= SLOWER * before.median_us:
            return "same", ""
        confirmed, suspect = self._noise_us(before.median_us)
        why = self.unclear(before, after)
        if not why and slower <= confirmed:
            why = f"runs of one commit may differ by {confirmed:.2f} us here"
        if not why:
            return "slower", ""
        return ("suspect" if slower > suspect else "noise"), why

    def unclear(self, before: Timing, after: Timing) -> str:
        """Return why these samples do not tell whether one is slower; "" if they do."""
        slower = after.median_us - before.median_us
        margin = self.margin_us(before, after)
        if slower <= margin:
            return f"{slower:.2f} us is within the {margin:.2f} us of tick and intervals"
        return "" if after.q1_us > before.q3_us else "quartiles overlap"

    def margin_us(self, before: Timing, after: Timing) -> float:
        """Return what half a microsecond, the timer's tick and the wider interval leave open."""
        width = max(timing.ci95_us[1] - timing.ci95_us[0] for timing in (before, after))
        return max(FLOOR_US, self.tick_us, 3 * width / 4)

    def _noise_us(self, us: float) -> tuple[float, float]:
        """Return beyond which differences a timing is slower, and suspect."""
        confirmed, suspect = (
            self.noise.bound_us("device", us, wrong / self.comparisons) for wrong in (CONFIRMED_WRONG, SUSPECT_WRONG)
        )
        return max(confirmed, self.noise.worst_us("device", us)), suspect

    def pair(self, key: Key) -> tuple[Timing, Timing, Change]:
        """Return a timing before and after, as the old run's machine would have measured it, and the Change."""
        before, after = self.old[key], self.machine.corrected(self.new[key])
        speedups = None
        partner = self.partner(key) if self.machine.moved else None
        if partner is not None:
            # The time that this case would take on the unmoved machine: the speed-up changes as much as this does.
            sdpa_us = self.old[partner].median_us, self.machine.corrected(self.new[partner]).median_us
            speedups = (sdpa_us[0] / before.median_us, sdpa_us[1] / after.median_us)
            after = after.scaled(sdpa_us[0] / sdpa_us[1])
        slower = after.median_us / before.median_us - 1
        change = Change(*key, before.median_us, self.new[key].median_us, slower, speedups, family=before.family)
        return before, after, change

    def partner(self, key: Key) -> Key | None:
        """Return the SDPA timing in both runs that a kernel's speed-up is taken over, if there is one."""
        keys = ((key[0], method) for method in SDPA_FORMS[scope(key[1])])
        return next((partner for partner in keys if partner in self.old and partner in self.new), None)

    def host_warnings(self, before: Timing, after: Timing) -> Iterable[Change]:
        """Yield the call time and the graph time if they rose by more than 10 %, 2 µs and the noise."""
        for kind in ("call", "graph"):
            old, new = time_us(before, kind), time_us(after, kind)
            if old is None or new is None or new - old <= max(SLOWER * old, HOST_FLOOR_US):
                continue
            if new - old > self.noise.bound_us(kind, old, SUSPECT_WRONG / self.comparisons):
                yield Change(*before.key, old, new, new / old - 1, note=f"{kind} time", family=before.family)


def compare(old: Run, new: Run) -> Comparison:
    """Compare two runs by the kernel's device times; times of different GPUs, or without one, are not judged."""
    common = [key for key in old.timings if key in new.timings and is_kernel(key[1])]
    missing, part = _missing(old, new)
    result = Comparison(
        old,
        new,
        len(common),
        missing=missing,
        new_cases=tuple(key for key in new.timings if key not in old.timings and is_kernel(key[1])),
        part=part,
    )
    if result.different_gpu or result.references_only:
        return result
    result = replace(result, machine=explain(old, new))
    if not result.machine.judged or not common:
        return result
    judge = _judge_of(result, new.timings, result.machine)
    found: dict[str, list[Change]] = {"slower": [], "suspect": [], "faster": [], "noise": [], "same": []}
    warnings: list[Change] = []
    ratios: dict[tuple[str, str, str], list[float]] = {}
    for key in common:
        before, after, change = judge.pair(key)
        grade, why = judge.grade(before, after)
        if grade == "same" and judge.grade(after, before)[0] == "slower":
            grade = "faster"
        found[grade].append(replace(change, note=why))
        warnings += judge.host_warnings(old.timings[key], new.timings[key])
        if change.change > -1:  # else the launch floor is longer than the timing, of which no logarithm can be taken
            ratios.setdefault((kernel_of(key[1]), change.family, scope(key[1])), []).append(1 + change.change)
    return replace(
        result,
        regressions=_worst_first(found["slower"]),
        suspects=_worst_first(found["suspect"]),
        improvements=_worst_first(found["faster"])[::-1],
        noise=_worst_first(found["noise"]),
        same=_worst_first(found["same"]),
        warnings=_worst_first(warnings),
        roll_up=tuple(_rolled_up(*key, values) for key, values in ratios.items()),
        assumed_noise=judge.noise.gpu if judge.noise.assumed else "",
    )


def _missing(old: Run, new: Run) -> tuple[tuple[Key, ...], tuple[int, int] | None]:
    """Return what the new run was asked for and lacks, and its share of the old run's cases if it is a part of them.

    A run that was saved before runs said what they were asked for is taken for whole if it has all cases of the old.
    """
    cases = [{case for case, method in run.timings if is_kernel(method)} for run in (old, new)]
    shared = len(cases[0] & cases[1])
    if new.asked is not None:
        asked = {case for case, method in new.asked if is_kernel(method)}
        share = len(cases[0] & asked)
        return new.unmeasured, (share, len(cases[0])) if share < len(cases[0]) else None
    if shared < len(cases[0]):
        return (), (shared, len(cases[0]))
    return tuple(key for key in old.timings if key not in new.timings and is_kernel(key[1])), None


def _judge_of(comparison: Comparison, new: Mapping[Key, Timing], machine: Machine) -> _Judge:
    tick = max(comparison.old.tick_us, comparison.new.tick_us)
    noise = noise_of(comparison.new.gpu)
    return _Judge(comparison.old.timings, new, machine, tick, noise, comparison.compared)


def _rolled_up(kernel: str, family: str, of_scope: str, ratios: list[float]) -> RollUp:
    """Return the geomean of positive ratios with the 95 % interval of Student's t over their logarithms."""
    logs = [math.log(ratio) for ratio in ratios]
    mean, interval = statistics.fmean(logs), None
    if len(logs) >= FEWEST_OF_AN_INTERVAL:
        half = _t975(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
        interval = math.exp(mean - half), math.exp(mean + half)
    return RollUp(family, of_scope, len(ratios), math.exp(mean), interval, kernel)


def _t975(freedom: int) -> float:
    """Return Student's 97.5 % quantile: exact for 2 degrees of freedom, within 1 % from 3 on (Cornish-Fisher)."""
    if freedom == 2:
        return 4.303
    z, n = 1.959964, freedom
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / n**power for power, term in enumerate(terms, 1))


def _worst_first(changes: list[Change]) -> tuple[Change, ...]:
    return tuple(sorted(changes, key=lambda change: -change.change))


def to_measure_again(comparison: Comparison) -> list[Key]:
    """List the timings to measure again: the slower and the suspect, and SDPA partners where speed-ups were judged."""
    judge = _judge_of(comparison, comparison.new.timings, comparison.machine)
    keys: dict[Key, None] = {}
    for change in (*comparison.regressions, *comparison.suspects):
        keys[change.key] = None
        if change.speedups and (partner := judge.partner(change.key)) is not None:
            keys[partner] = None
    return list(keys)


def confirm(comparison: Comparison, fresh: Mapping[Key, Timing], machine: Machine | None = None) -> Comparison:
    """Judge every slower and suspect timing by a fresh one: slower than the old run again is confirmed, else cleared.

    Two looks have then seen it, so that the fresh one need only pass 10 %, half a microsecond, tick and intervals.
    What has no fresh timing stays what it was. `machine` explains the fresh timings, if another than the new run's.
    """
    judge = _judge_of(comparison, {**comparison.new.timings, **fresh}, machine or comparison.machine)
    left: dict[str, list[Change]] = {"slower": [], "suspect": [], "cleared": []}
    for grade, changes in (("slower", comparison.regressions), ("suspect", comparison.suspects)):
        for change in changes:
            if change.key not in fresh:
                left[grade].append(replace(change, note="not measured again"))
                continue
            before, after, again = judge.pair(change.key)
            slower = after.median_us - before.median_us
            confirmed = slower > max(SLOWER * before.median_us, judge.margin_us(before, after))
            said = replace(again, new_us=change.new_us, again_us=again.new_us)
            left["slower" if confirmed else "cleared"].append(said)
    return replace(
        comparison,
        regressions=_worst_first(left["slower"]),
        suspects=_worst_first(left["suspect"]),
        cleared=_worst_first(left["cleared"]),
    )
