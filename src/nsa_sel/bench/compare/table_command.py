"""What `pytest-benchmark compare` says: our verdict before its table and after it, its table cut to what changed.

The command reads no conftest.py but that of the current folder, and of its functions only
`pytest_benchmark_group_stats` lets us speak. It gives that one the rows of all runs shown, before it prints them.
"""

from __future__ import annotations

import argparse
import atexit
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..command_line import shows_colour
from ..saved import storage
from ..saved.figures import mapping
from ..saved.run import Run, RunError, from_entries, notes, read_json, short_name
from ..tables import printable
from . import theirs
from .result import SHOWN, Comparison
from .rule import compare

Rows = list[dict[str, Any]]


def announce(rows: Rows) -> Rows:
    """Print the comparison, again its verdict when the command ends, and return the rows for the table.

    Raises:
        SystemExit: a histogram that cannot be drawn, or a parameter that the runs do not have.
    """
    asked = asked_for()
    if asked.histogram and not theirs.draws_histograms():
        raise SystemExit(f"nsa_sel: --{theirs.NO_PYGAL}")
    try:
        theirs.check_grouping(
            asked.group_by, set.intersection(*(set(row["params"]) for row in rows)) if rows else set()
        )
    except ValueError as error:
        raise SystemExit(f"nsa_sel: --{error}") from None
    comparisons, problems = compare_rows(rows, asked)
    colour = shows_colour()
    print("\n\n".join([*(found.text(colour) for found in comparisons), *problems]))
    shown = rows if _whole_table(asked) else changed(rows, comparisons)
    last = [found.last_line(colour) for found in comparisons] or problems[-1:]
    if len(shown) < len(rows):
        groups = len({row["group"] for row in shown})
        last.append(f"the table is cut to the {groups} groups that changed; all: pytest-benchmark -v compare")
    atexit.register(print, "\n".join(last), flush=True)
    return shown


def asked_for() -> argparse.Namespace:
    """Return the command line that the command was given."""
    from pytest_benchmark.cli import make_parser

    parser = make_parser()
    parser.set_defaults(filter_expr=None)  # an option that pytest-benchmark has since 5.3
    return parser.parse_args()


def _whole_table(asked: argparse.Namespace) -> bool:
    more = (asked.verbose, asked.filter_expr, asked.csv, asked.histogram, asked.group_by != "group")
    return any(more)


def changed(rows: Rows, comparisons: Iterable[Comparison]) -> Rows:
    """Return the rows of the cases that the comparisons list, and those of other suites."""
    cases = {
        change.case
        for found in comparisons
        for changes in (found.regressions, found.suspects, found.improvements)
        for change in changes[:SHOWN]
    }
    return [row for row in rows if mapping(row.get("extra_info")).get("case") in {None, *cases}]


def compare_rows(rows: Iterable[Mapping[str, Any]], asked: argparse.Namespace) -> tuple[list[Comparison], list[str]]:
    """Compare the runs of a table: two that are named as OLD NEW, else of each GPU the newest with its opponent.

    Returns the comparisons, and a line for each run or GPU that has none.
    """
    by_path: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_path.setdefault(str(row.get("path")), []).append(row)
    problems: list[str] = []
    found: dict[str, Run] = {}
    folder = storage.folder(asked.storage)
    for path, entries in by_path.items():
        try:
            found[path] = _run_of_rows(path, entries, folder, whole=not asked.filter_expr)
        except RunError as error:
            problems.append(printable(f"nsa_sel: not compared: {error}"))
    if (named := _named(asked.glob_or_file, found, folder)) is not None:
        return [compare(*named)], problems
    by_gpu: dict[str, list[Run]] = {}
    for run in sorted(found.values(), key=lambda run: run.datetime):
        by_gpu.setdefault(run.gpu, []).append(run)
    groups = [group for group in by_gpu.values() if len(group) > 1]
    if not groups and len(found) == 2:  # one run of each of two GPUs: the comparison says that they cannot be compared
        groups = [[run for group in by_gpu.values() for run in group]]
    comparisons = []
    for *older, newest in groups:
        comparisons.append(compare(storage.choose(newest, older) or older[0], newest))
    if not groups:
        problems.append(f"nsa_sel: not compared: {len(found)} saved runs read, two of one GPU are needed")
    return comparisons, problems


def _named(given: list[str], found: Mapping[str, Run], folder: Path) -> tuple[Run, Run] | None:
    """Return the two runs that were given, in their order; None if they were not two."""
    if len(given) != 2 or len(found) != 2:
        return None
    try:
        paths = [storage.find(spec, folder).resolve() for spec in given]
    except RunError:
        return None
    runs = {Path(run.path).resolve(): run for run in found.values()}
    old, new = (runs.get(path) for path in paths)
    return (old, new) if old and new else None


def _run_of_rows(path: str, rows: list[Mapping[str, Any]], folder: Path, whole: bool) -> Run:
    """Build a Run from table rows; its date, commit and calibration, which rows lack, are read from its file."""
    file = next((file for file in (folder / path, Path(path)) if file.is_file()), None)
    data = read_json(file) if file else {}
    about = notes(data) | ({} if whole else {"asked": None})  # -k shows a part of what was asked for
    return from_entries(short_name(path), rows, mapping(data.get("machine_info")), **about, path=str(file or path))
