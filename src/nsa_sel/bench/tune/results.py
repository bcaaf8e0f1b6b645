"""From a sweep's figures to its results: who wins each class of calls, the lists of finalists, the tuned table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...kernel import tuned_table
from ...kernel.launch_config import LaunchConfig
from ...kernel.tuned_table import Entry, Key, Table, TableError
from .. import tables
from ..saved.speedups import geomean
from ..suite.cases import Case

SLOWEST = 1.02  # times the untuned launch, which no case of a class may exceed
WORTH_IT = 0.99  # times the untuned launch's geomean, which a challenger must stay below

Times = Mapping[LaunchConfig, Mapping[str, float]]  # case id -> median µs


@dataclass(frozen=True)
class Ranked:
    """Hold a launch of a class. score: geomean over the class's cases of its time over the best launch's."""

    launch: LaunchConfig
    score: float
    us: Mapping[str, float]  # by case id

    @property
    def mean_us(self) -> float:
        """Return the geomean of its times."""
        return geomean(self.us.values()) or 1.0


@dataclass(frozen=True)
class Result:
    """Hold what the finals of one class say. untuned: the launch of each case without a table."""

    key: Key
    cases: tuple[Case, ...]
    ranked: tuple[Ranked, ...]  # fastest first
    untuned: Mapping[str, LaunchConfig]

    def untuned_us(self) -> dict[str, float]:
        """Return the time of every case's untuned launch, where it was measured."""
        times = {each.launch: each.us for each in self.ranked}
        return {case: times[launch][case] for case, launch in self.untuned.items() if launch in times}

    def gain(self, each: Ranked) -> float:
        """Return the untuned launch's time over this one's, geomean over the cases that have both; 1 if none has."""
        return geomean(us / each.us[case] for case, us in self.untuned_us().items()) or 1.0

    @property
    def winner(self) -> Ranked | None:
        """Return the fastest launch that slows no case down, or the untuned one where none is clearly faster.

        None: every launch slows a case down against what that case runs untuned, or none ran.
        """
        untuned_us = self.untuned_us()
        eligible = [
            each for each in self.ranked if all(each.us[case] <= SLOWEST * us for case, us in untuned_us.items())
        ]
        if not eligible:
            return None
        stay = [each for each in eligible if set(self.untuned.values()) == {each.launch}]
        if stay and self.gain(eligible[0]) * WORTH_IT <= 1:
            return stay[0]
        return eligible[0]

    def entry(self) -> Entry | None:
        """Return the winner as the tuned table has it."""
        winner = self.winner
        if winner is None:
            return None
        others = [each for each in self.ranked if each is not winner]
        figures: dict[str, object] = {"us": _rounded(winner.us), "untuned_us": _rounded(self.untuned_us())}
        if others:
            margin = others[0].mean_us / winner.mean_us - 1
            figures |= {"runner_up": str(others[0].launch), "margin": round(margin, 4)}
        return Entry(winner.launch, figures)


def rank(times: Times, cases: Sequence[Case]) -> list[Ranked]:
    """Rank the launches that have a time in every case, the fastest first; ties by name, so that a repeat agrees."""
    complete = {launch: us for launch, us in times.items() if all(case.id in us for case in cases)}
    best = {case.id: min((us[case.id] for us in complete.values()), default=1.0) for case in cases}
    ranked = []
    for launch, us in complete.items():
        score = geomean(us[case] / best[case] for case in best)
        ranked.append(Ranked(launch, 1.0 if score is None else score, us))
    return sorted(ranked, key=lambda each: (each.score, str(each.launch)))


COLUMNS = (
    *("L", "span", "rows_per_sm", "shared_kv", "heads", "D", "Dv", "element_bytes"),
    *("rank", "won", "launch", "us", "behind_best", "gain", "cases"),
)


def rows(results: Sequence[Result]) -> list[dict[str, str]]:
    """Return one row per finalist, the fastest first. us: geomean over the class's cases; gain: over untuned."""
    found = []
    for result in results:
        key, winner = result.key, result.winner
        for number, each in enumerate(result.ranked, 1):
            values = (
                2**key.length,
                "one" if key.span < 0 else 2**key.span,
                f"{2.0**key.rows:g}",
                int(key.shared_kv),
                *(key.heads, key.D, key.Dv, key.element_bytes, number),
                "yes" if each is winner else "untuned" if each.launch in result.untuned.values() else "",
                each.launch,
                f"{each.mean_us:.2f}",
                f"{100 * (each.score - 1):.1f}%",
                f"{result.gain(each):.3f}x",
                " ".join(case.id for case in result.cases),
            )
            found.append(dict(zip(COLUMNS, map(str, values), strict=True)))
    return found


def as_csv(found: Sequence[Mapping[str, str]]) -> str:
    """Return the rows as CSV."""
    return tables.as_csv([COLUMNS, *([row[name] for name in COLUMNS] for row in found)])


def as_markdown(
    heading: str,
    results: Sequence[Result],
    errors: Mapping[tuple[str, LaunchConfig], str],
    notes: Sequence[str],
) -> str:
    """Return a table of finalists per class, then what was never chosen and why."""
    lines = [f"# {heading}", "", *notes]
    columns = ("rank", "won", "launch", "us", "behind_best", "gain")
    for result in results:
        lines += ["", f"## {result.key}", ", ".join(case.id for case in result.cases), ""]
        if result.winner is None:
            lines += ["No launch serves these cases as well as the model does: no entry.", ""]
        lines.append(tables.as_markdown([columns, *([row[name] for name in columns] for row in rows([result]))]))
    if errors:
        counted = Counter((str(launch), error) for (_, launch), error in errors.items())
        never = [[launch, str(n), error] for (launch, error), n in sorted(counted.items())]
        lines += ["", "## Never chosen", tables.as_markdown([["launch", "cases", "error"], *never])]
    return "\n".join(lines) + "\n"


def merged(path: Path, gpu: str, measured: Mapping[str, str], results: Sequence[Result]) -> Table:
    """Return the table at `path` with these results put in; what is there of other versions or kernels is dropped."""
    entries: dict[Key, Entry] = {}
    try:
        old = tuned_table.read(path, gpu)
    except TableError:
        pass
    else:
        if {**old.measured, "date": ""} == {**measured, "date": ""}:
            entries.update(old.entries)
    for result in results:
        entry = result.entry()
        if entry is None:
            entries.pop(result.key, None)
        else:
            entries[result.key] = entry
    return Table(gpu, measured, entries)


def _rounded(times: Mapping[str, float]) -> dict[str, float]:
    return {case: round(us, 2) for case, us in times.items()}
