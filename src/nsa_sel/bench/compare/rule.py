"""Compare two measuring runs: regressions, improvements, noise, and what else differs.

Source: docs/measuring.md, "Comparing two runs".
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..saved.run import IDENTITY, Key, Run, Timing
from ..saved.speedups import EVERY_SDPA_FORM, SDPA_FORMS, TRITON
from ..tables import printable

SLOWER = 0.10  # a change counts from here
FLOOR_US = 0.5  # and from this difference
MOVED = 0.03  # the SDPA cases' median ratio beyond which the machine itself has changed
HOST_FLOOR_US = 2.0  # for call time and graph time, which only warn
PARTNERS = {triton: SDPA_FORMS[scope] for scope, triton in TRITON.items()}
SHOWN = 10  # lines of what does not decide the verdict
SHOWN_MISSING = 30


@dataclass(frozen=True)
class Change:
    """Hold one case that changed; `change` is the judged slow-down as a fraction, 0.15 being 15 % slower."""

    case: str
    method: str
    old_us: float
    new_us: float
    change: float
    speedups: tuple[float, float] | None = None  # old and new, where the speed-up over SDPA was judged
    note: str = ""
    again_us: float | None = None  # measured again; the change is then this one's

    def text(self) -> str:
        """Return one line: case, method, both times, the change, and what else there is to know."""
        parts = [f"{self.case} {self.method}  {self.old_us:.2f} us -> {self.new_us:.2f} us"]
        if self.again_us is not None:
            parts.append(f"again {self.again_us:.2f} us")
        if self.speedups:
            parts.append(f"speed-up {self.speedups[0]:.2f}x -> {self.speedups[1]:.2f}x")
        parts.append(f"{self.change * 100:+.1f} %")
        return printable("  ".join([*parts, self.note] if self.note else parts))


@dataclass(frozen=True)
class Comparison:
    """Hold what was found between two runs."""

    old: Run
    new: Run
    compared: int
    regressions: tuple[Change, ...] = ()
    improvements: tuple[Change, ...] = ()
    noise: tuple[Change, ...] = ()
    cleared: tuple[Change, ...] = ()  # looked slower, and were not when measured again
    warnings: tuple[Change, ...] = ()  # call time and graph time
    missing: tuple[Key, ...] = ()
    new_cases: tuple[Key, ...] = ()
    sdpa_ratio: float | None = None  # median of new / old time over the SDPA cases

    @property
    def different_gpu(self) -> bool:
        return self.old.gpu != self.new.gpu

    @property
    def moved(self) -> bool:
        return self.sdpa_ratio is not None and abs(self.sdpa_ratio - 1) > MOVED

    @property
    def exit_code(self) -> int:
        """Return 1 on a regression, a missing case, no case in common or a different GPU, else 0."""
        return int(bool(self.regressions or self.missing or not self.compared or self.different_gpu))

    def text(self) -> str:
        """Return the whole result as plain text of printable characters."""
        lines = [f"nsa_sel: {describe(self.old)} -> {describe(self.new)}"]
        lines.append(f"{self.compared} timings compared, {len(self.new_cases)} new, {len(self.missing)} missing")
        lines += self._environment()
        lines += section("REGRESSIONS", [change.text() for change in self.regressions])
        lines += section("MISSING", [" ".join(key) for key in self.missing], SHOWN_MISSING)
        lines += section("improvements", [change.text() for change in self.improvements], SHOWN)
        lines += section("measured again, not slower", [change.text() for change in self.cleared], SHOWN)
        lines += section("noise: slower, but not by the rule", [change.text() for change in self.noise], SHOWN)
        lines += section("warnings: call or graph time", [change.text() for change in self.warnings], SHOWN)
        lines += section("new, not judged", [" ".join(key) for key in self.new_cases], SHOWN)
        lines.append(f"verdict: {self._verdict()}")
        return "\n".join(printable(line) for line in lines)

    def _environment(self) -> list[str]:
        before, after = self.old.environment, self.new.environment
        lines = [
            f"environment changed: {field} {before[field]} -> {after[field]}"
            for field in IDENTITY
            if field != "gpu" and before[field] != after[field]
        ]
        if self.different_gpu:
            lines.append(f"DIFFERENT GPU: {self.old.gpu} -> {self.new.gpu}: the times cannot be compared")
        elif self.moved:
            lines.append(
                f"environment shift: the SDPA cases take {self.sdpa_ratio:.3f}x of their old time (median);"
                " Triton cases with an SDPA partner are judged by their speed-up"
            )
        lines += [
            f"note: {run.name} was interrupted and lacks cases" for run in (self.old, self.new) if run.interrupted
        ]
        if self.old.regressions:
            lines.append(f"note: the old run was saved with {len(self.old.regressions)} confirmed regressions")
        return lines

    def _verdict(self) -> str:
        if self.different_gpu:
            return "FAIL, different GPU"
        faults = []
        if not self.compared:
            faults.append("no case in common")
        if self.regressions:
            faults.append(f"{len(self.regressions)} slower")
        if self.missing:
            faults.append(f"{len(self.missing)} missing")
        return f"FAIL, {', '.join(faults)}" if faults else "pass, nothing got slower"


def describe(run: Run) -> str:
    """Return a run's name and date."""
    return f"{run.name} ({run.datetime[:16]})" if run.datetime else run.name


def section(title: str, lines: list[str], shown: int | None = None) -> list[str]:
    """Return a titled, indented list, cut after `shown` lines; nothing if there are none."""
    if not lines:
        return []
    cut = lines[:shown]
    more = [f"  ... and {len(lines) - len(cut)} more"] if len(cut) < len(lines) else []
    return [f"{title} ({len(lines)})", *(f"  {line}" for line in cut), *more]


def _not_confirmed(old: Timing, new: Timing, tick_us: float) -> str | None:
    """Return why `new` is no confirmed slow-down of `old`; "" if it is one, None if it is not slower by 10 %."""
    slower = new.median_us - old.median_us
    if slower <= SLOWER * old.median_us:
        return None
    width = max(timing.ci95_us[1] - timing.ci95_us[0] for timing in (old, new))
    margin = max(FLOOR_US, tick_us, 3 * width / 4)
    if slower <= margin:
        return f"{slower:.2f} us is within the noise of {margin:.2f} us"
    return "" if new.q1_us > old.q3_us else "quartiles overlap"


def _partner(old: Mapping[Key, Timing], new: Mapping[Key, Timing], key: Key) -> Key | None:
    """Return the SDPA timing in both runs that a Triton timing's speed-up is taken over, if there is one."""
    keys = ((key[0], method) for method in PARTNERS.get(key[1], ()))
    return next((partner for partner in keys if partner in old and partner in new), None)


def _judge(
    old: Mapping[Key, Timing], new: Mapping[Key, Timing], key: Key, tick_us: float, moved: bool
) -> tuple[str, Change]:
    """Return the verdict on one timing ("slower", "faster", "noise" or "same") and its Change."""
    before, after = old[key], new[key]
    speedups = None
    partner = _partner(old, new, key) if moved else None
    if partner is not None:
        # The time that this case would take on the unmoved machine: the speed-up changes as much as this does.
        speedups = (old[partner].median_us / before.median_us, new[partner].median_us / after.median_us)
        after = after.scaled(old[partner].median_us / new[partner].median_us)
    change = Change(*key, before.median_us, new[key].median_us, after.median_us / before.median_us - 1, speedups)
    reason = _not_confirmed(before, after, tick_us)
    if reason is not None:
        return ("noise", replace(change, note=reason)) if reason else ("slower", change)
    return ("faster" if _not_confirmed(after, before, tick_us) == "" else "same"), change


def _host_warnings(before: Timing, after: Timing) -> list[Change]:
    """Return the call time and the graph time if they rose by more than 10 % and 2 us."""
    pairs = (("call time", before.call_us, after.call_us), ("graph time", before.graph_us, after.graph_us))
    return [
        Change(*before.key, old, new, new / old - 1, note=what)
        for what, old, new in pairs
        if old is not None and new is not None and new - old > max(SLOWER * old, HOST_FLOOR_US)
    ]


def compare(old: Run, new: Run) -> Comparison:
    """Compare two runs by device time; times of different GPUs are not judged."""
    common = [key for key in old.timings if key in new.timings]
    ratios = [new.timings[key].median_us / old.timings[key].median_us for key in common if key[1] in EVERY_SDPA_FORM]
    result = Comparison(
        old,
        new,
        len(common),
        missing=tuple(key for key in old.timings if key not in new.timings),
        new_cases=tuple(key for key in new.timings if key not in old.timings),
        sdpa_ratio=statistics.median(ratios) if ratios else None,
    )
    if result.different_gpu:
        return result
    tick = max(old.tick_us, new.tick_us)
    found: dict[str, list[Change]] = {"slower": [], "faster": [], "noise": [], "same": []}
    warnings: list[Change] = []
    for key in common:
        verdict, change = _judge(old.timings, new.timings, key, tick, result.moved)
        found[verdict].append(change)
        warnings += _host_warnings(old.timings[key], new.timings[key])
    return replace(
        result,
        regressions=_worst_first(found["slower"]),
        improvements=_worst_first(found["faster"])[::-1],
        noise=_worst_first(found["noise"]),
        warnings=_worst_first(warnings),
    )


def _worst_first(changes: list[Change]) -> tuple[Change, ...]:
    return tuple(sorted(changes, key=lambda change: -change.change))


def to_measure_again(comparison: Comparison) -> list[Key]:
    """List the timings to measure again: the alerted ones, and SDPA partners where speed-ups were judged."""
    keys: dict[Key, None] = {}
    for change in comparison.regressions:
        keys[change.case, change.method] = None
        if change.speedups:
            partner = _partner(comparison.old.timings, comparison.new.timings, (change.case, change.method))
            if partner is not None:
                keys[partner] = None
    return list(keys)


def confirm(comparison: Comparison, fresh: Mapping[Key, Timing]) -> Comparison:
    """Judge every alert by its fresh timing against the old run; what is not slower again is cleared.

    An alert without a fresh timing stays a regression.
    """
    old = comparison.old.timings
    new = {**comparison.new.timings, **fresh}
    tick = max(comparison.old.tick_us, comparison.new.tick_us)
    regressions: list[Change] = []
    cleared: list[Change] = []
    for change in comparison.regressions:
        key = (change.case, change.method)
        if key not in fresh:
            regressions.append(replace(change, note="not measured again"))
            continue
        verdict, again = _judge(old, new, key, tick, comparison.moved)
        said = replace(again, new_us=change.new_us, again_us=again.new_us, note="")
        (regressions if verdict == "slower" else cleared).append(said)
    return replace(comparison, regressions=_worst_first(regressions), cleared=_worst_first(cleared))
