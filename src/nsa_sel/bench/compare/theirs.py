"""pytest-benchmark's own options beside ours: its table, its parameters in older runs, and its verdict."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import pytest

from ..saved.figures import mapping
from ..suite import cases

# Whoever asks for one of these wants to see the table, which pytest.ini keeps quiet.
TABLE = ("columns", "sort", "group-by", "histogram", "name", "time-unit")
NO_PYGAL = "histogram: needs pygal: pip install 'nsa-sel[histogram]'"
SHOWN = 20


def prepare(config: pytest.Config) -> None:
    """Let pytest-benchmark show its table to whoever asked for something in it.

    Raises:
        pytest.UsageError: a histogram is asked for and cannot be drawn.
    """
    given = {str(arg).split("=")[0] for arg in config.invocation_params.args}
    if given & {f"--benchmark-{name}" for name in TABLE} and "--benchmark-quiet" not in given:
        config.option.benchmark_quiet = False
    if config.getoption("benchmark_histogram", None) and not draws_histograms():
        raise pytest.UsageError(f"--benchmark-{NO_PYGAL}")


def draws_histograms() -> bool:
    return find_spec("pygal") is not None


def check_grouping(group_by: str, known: Iterable[str]) -> None:
    """Refuse to group by parameters that a benchmark does not have, where pytest-benchmark ends in a traceback.

    Raises:
        ValueError: with the parameters that it has.
    """
    known = sorted(known)
    for part in group_by.split(","):
        kind, _, name = part.partition(":")
        if kind == "param" and name and name not in known:
            raise ValueError(f"group-by: value is {part!r}, expected param: and one of {', '.join(known)}")


def with_parameters(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of saved runs in which those that were saved with fewer parameters have today's.

    What a row says of its case counts, then what the matrix knows of a case of that name.
    """
    known = cases.by_id()
    return [{**row, "params": {**_parameters(row, known), **mapping(row.get("params"))}} for row in rows]


def _parameters(row: dict[str, Any], known: dict[str, cases.Case]) -> dict[str, Any]:
    about = mapping(row.get("extra_info"))
    case = known.get(str(about.get("case")))
    said = {name: about[name] for name in cases.PARAMETERS if name in about}
    return {**(case.parameters if case else {}), **said}


def take_regressions(benchmarks: Any) -> list[str] | None:
    """Return what --benchmark-compare-fail finds, and keep pytest-benchmark from raising it; None if nobody asked.

    Raised, in its summary, it would cost every summary that comes after it.
    """
    if not benchmarks.compare_fail:
        return None
    found = [f"{name} - {why}" for name, why in benchmarks.performance_regressions]
    if not benchmarks.compared_mapping:
        found = ["not judged: no run to compare with"]
    benchmarks.performance_regressions, benchmarks.compare_fail = [], []
    more = [f"... and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return found[:SHOWN] + more
