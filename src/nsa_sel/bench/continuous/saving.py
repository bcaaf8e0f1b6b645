"""The runs that a course yields, as pytest-benchmark saves them: one of each commit."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..saved import write
from ..saved.run import Key, Timing, timing
from ..saved.speedups import EVERY_SDPA_FORM
from .kept import Outcome, Outcomes, Pair
from .trees import Tree

# Of these the median over a commit's processes is saved, component by component.
FIGURES = (
    *("ci95_us", "call_us", "call_ci95_us", "graph_us", "graph_ci95_us"),
    *("gbps", "limit_us", "pct_of_limit", "mae", "delay_us"),
)


def document(
    tree: Tree, outcomes: Sequence[Outcomes], machine: Mapping[str, Any], notes: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a commit's run: of every timing what its processes found, each an item of `outcomes`.

    Median, quartiles and interval are the medians over the processes, so that each counts alike; minimum, mean and the
    like are of all samples. A timing that one process could not take has none: it is skipped if it cannot be taken
    here, and missing if it failed.
    """
    found = by_key(outcomes)
    not_timed = [
        {"case": case, "method": method, "reason": reason}
        for (case, method), each in found.items()
        if (reason := first(each, "not_timed")) and not first(each, "failed")
    ]
    entries = [_entry(key, each) for key, each in found.items() if _timed(each)]
    asked = {**notes, "asked": [list(key) for key in found], "not_timed": not_timed}
    return write.document(entries, machine, tree.commit, asked)


def by_key(outcomes: Iterable[Outcomes]) -> dict[Key, list[Outcome]]:
    """Return what several processes found of each timing."""
    found: dict[Key, list[Outcome]] = {}
    for each in outcomes:
        for key, outcome in each.items():
            found.setdefault(key, []).append(outcome)
    return found


def first(outcomes: Sequence[Outcome], name: str) -> str | None:
    """Return the first of several processes' reasons of a name, "failed" or "not_timed"."""
    return next((outcome[name] for outcome in outcomes if name in outcome), None)


def _timed(outcomes: Sequence[Outcome]) -> bool:
    return all("samples" in outcome for outcome in outcomes)


def _entry(key: Key, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the entry of a timing that several processes took."""
    each = [write.statistics(outcome["samples"]) for outcome in outcomes]
    extras = [outcome["extra"] for outcome in outcomes]
    figures = {name: _median([extra[name] for extra in extras]) for name in FIGURES if name in extras[0]}
    places = {name: _median([stats[name] for stats in each]) for name in ("median", "q1", "q3")}
    samples = [sample for outcome in outcomes for sample in outcome["samples"]]
    made = write.entry(key, samples, {**extras[0], **figures})
    return {**made, "stats": {**made["stats"], **places}}


def _median(values: Sequence[Any]) -> Any:
    """Return the median of numbers, or of pairs of them end by end; None if one is missing."""
    if any(value is None for value in values):
        return None
    if isinstance(values[0], list):
        return [statistics.median(ends) for ends in zip(*values, strict=True)]
    return statistics.median(values)


def agreement(pairs: Iterable[Pair]) -> list[str]:
    """Return a line that says how far the pairs of processes agree on what HEAD's kernel takes of BASE's time."""
    found: dict[Key, list[float]] = {}
    for base, head in pairs:
        for key in base.keys() & head.keys():
            if key[1] not in EVERY_SDPA_FORM and _timed([base[key], head[key]]):
                new, old = (statistics.median(side[key]["samples"]) for side in (head, base))
                found.setdefault(key, []).append(new / old)
    spreads = sorted(100 * (max(each) / min(each) - 1) for each in found.values() if len(each) > 1)
    if not spreads:
        return []
    return [f"the pairs' ratios agree within {statistics.median(spreads):.1f} % (median), {spreads[-1]:.1f} % (worst)"]


def fresh(pair: Pair, old: Mapping[Key, Timing]) -> dict[Key, Timing]:
    """Return HEAD's timings of one more pair, as they would be if BASE had just taken its `old` time.

    The pair's two processes ran one after the other, so that what the card does meanwhile meets both.
    """
    found = {}
    for key in pair[0]:
        base, head = pair[0][key], pair[1][key]
        if key in old and _timed([base, head]):
            again = timing(*key, write.statistics(head["samples"]), head["extra"], "measured again")
            found[key] = again.scaled(old[key].median_us / (statistics.median(base["samples"]) * 1e6))
    return found
