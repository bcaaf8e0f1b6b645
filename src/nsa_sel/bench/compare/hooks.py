"""Teach pytest-benchmark our comparison and storage; bench/plugin.py re-exports these hooks by name.

The root conftest.py names one of them too: `pytest-benchmark compare` reads nothing but that file, without pluggy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ..saved import storage
from ..saved.figures import is_figure, mapping
from ..saved.run import MARK, Key, Run, RunError, from_entries, notes, read_json, timing
from ..tables import printable
from ..timer.machine import environment
from . import table_command, theirs
from .result import Comparison
from .rule import compare, confirm, to_measure_again

Remeasure = Callable[[], Mapping[str, Any]]
remeasure: dict[Key, Remeasure] = {}
skipped: dict[Key, str] = {}  # what this process could not measure, and why
_CASES = pytest.StashKey[list[Key]]()  # what the run was asked for
_ASKED = pytest.StashKey[str | bool]()  # True: with the default baseline; a text: with this run
_INTERRUPTED = pytest.StashKey[bool]()
_RESULT = pytest.StashKey[Comparison | str]()
_THEIRS = pytest.StashKey[list[str]]()  # what --benchmark-compare-fail found
_SKIP_SUMMARY = (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR)


def register_remeasure(case: str, method: str, measure: Remeasure) -> None:
    """Register how to time a case once more, should it look slower.

    `measure` takes nothing, runs after the last test when fixtures are gone, and returns median, q1 and q3 in
    seconds and ci95_us (pair) in microseconds.
    """
    remeasure[case, method] = measure


def register_skipped(case: str, method: str, reason: str) -> None:
    """Register why a case could not be measured here (no memory for it): with a reason it is not missing."""
    skipped[case, method] = reason


def addoption(parser: pytest.Parser) -> None:
    """Add --perf-fail and --sel-baseline."""
    group = parser.getgroup("nsa_sel")
    group.addoption(
        "--perf-fail",
        action="store_true",
        help="compare, and exit with 1 on a regression, a missing case, no case in common or a different GPU",
    )
    group.addoption(
        "--sel-baseline",
        metavar="RUN",
        help="compare with this run: a file, a saved name, a prefix such as 0001 or a commit (default: the newest clean"
        f" run of an earlier commit on this card, else this GPU's run saved as {storage.BASELINE_NAME!r})",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Take --benchmark-compare over: pytest-benchmark would load its run before the GPU is known."""
    theirs.prepare(config)
    compare, fail = (config.getoption(name, None) for name in ("benchmark_compare", "benchmark_compare_fail"))
    named = next((spec for spec in (config.getoption("sel_baseline"), compare) if isinstance(spec, str)), None)
    if named is not None or compare or fail or config.getoption("perf_fail"):
        config.stash[_ASKED] = True if named is None else named
    if hasattr(config.option, "benchmark_compare"):
        config.option.benchmark_compare = []
    # pytest-benchmark warns so if Ctrl-C stops a benchmark before its first round; an error would hide the Ctrl-C.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Note what the run is asked for: what of it has no time at the end is missing."""
    params = [item.callspec.params for item in session.items if hasattr(item, "callspec")]
    params = [of for of in params if {"case_id", "method"} <= of.keys()]
    session.config.stash[_CASES] = [(of["case_id"], of["method"]) for of in params]
    if params:
        try:
            theirs.check_grouping(
                session.config.getoption("benchmark_group_by", "group"), set.intersection(*map(set, params))
            )
        except ValueError as error:
            raise pytest.UsageError(f"--benchmark-{error}") from None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> Iterator[None]:
    """Compare, and measure alerts again, before pytest-benchmark saves the run and prints its table."""
    config = session.config
    benchmarks = getattr(config, "_benchmarksession", None)
    if benchmarks is not None and exitstatus == pytest.ExitCode.INTERRUPTED:
        config.stash[_INTERRUPTED] = True
        with contextlib.suppress(RunError):
            if (partial := _this_run(config, benchmarks.benchmarks)) is not None:
                _keep_apart(benchmarks, partial.gpu)
    elif benchmarks is not None and not hasattr(config, "workerinput") and exitstatus not in _SKIP_SUMMARY:
        try:
            new = _this_run(config, benchmarks.benchmarks)
            if new is not None:
                _keep_apart(benchmarks, new.gpu)
            if _ASKED in config.stash:
                config.stash[_RESULT] = _compare(config, benchmarks, new)
        except RunError as error:
            config.stash[_RESULT] = printable(f"nsa_sel: not compared: {error}")
        if _failed(config) and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
    result = yield
    if config.stash.get(_THEIRS, None) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    return result


def _this_run(config: pytest.Config, benchmarks: Iterable[Any]) -> Run | None:
    """Return the session's own timings as a Run; None if this suite timed nothing."""
    entries = [bench.as_dict(include_data=False) for bench in benchmarks if _ours(bench)]
    if not entries:
        return None
    commit = config.hook.pytest_benchmark_generate_commit_info(config=config) if _ASKED in config.stash else {}
    return from_entries("this run", entries, environment(), **notes({"commit_info": commit, MARK: _asked(config)}))


def _asked(config: pytest.Config) -> dict[str, list[Any]]:
    """Return what the run was asked for, and what of it could not be measured and why, as a saved run says it."""
    reasons = [{"case": case, "method": method, "reason": why} for (case, method), why in skipped.items()]
    return {"asked": [list(key) for key in config.stash.get(_CASES, [])], "not_timed": reasons}


def _ours(bench: Any) -> bool:
    return bool(bench) and not bench.has_error and "case" in bench.extra_info


def _keep_apart(benchmarks: Any, gpu: str) -> None:
    """Save in <storage>/<machine>-<GPU>/; pytest-benchmark's own folder name does not know the GPU."""
    folder = f"{benchmarks.machine_id}-{storage.slug(gpu)}"
    benchmarks.machine_id = folder
    if hasattr(benchmarks.storage, "default_machine_id"):
        benchmarks.storage.default_machine_id = folder


def _compare(config: pytest.Config, benchmarks: Any, new: Run | None) -> Comparison:
    """Compare `new` with the baseline, and hand the baseline to pytest-benchmark's table as well."""
    if new is None:
        raise RunError("no benchmark was timed; see the tests above")
    asked = config.stash[_ASKED]
    folder = Path(getattr(benchmarks.storage, "path", storage.STORAGE))
    old = storage.opponent(folder, new, asked if isinstance(asked, str) else None)
    path = Path(old.path)
    shown = path.relative_to(folder) if path.is_relative_to(folder) else path
    entries = filter(_fits_the_table, read_json(path)["benchmarks"])
    benchmarks.compared_mapping[shown] = {bench["fullname"]: bench for bench in entries}
    comparison = compare(old, new)
    again = [key for key in to_measure_again(comparison) if key in remeasure]
    if again:
        config.get_terminal_writer().line(f"\nmeasuring {len(again)} alerted timings again")
    fresh, failed = {}, {}
    for key in again:
        try:
            values = remeasure[key]()
            fresh[key] = timing(*key, values, values, "measured again")
        except Exception as error:  # the comparison must outlive whatever a measurement does
            failed[key] = f"could not be measured again: {error}".splitlines()[0]
    confirmed = confirm(comparison, fresh)
    regressions, suspects = (
        tuple(replace(change, note=failed.get(change.key, change.note)) for change in changes)
        for changes in (confirmed.regressions, confirmed.suspects)
    )
    return replace(confirmed, regressions=regressions, suspects=suspects)


def _fits_the_table(bench: Any) -> bool:
    """Tell whether pytest-benchmark's table can show an entry of a baseline: a gap would end it in a traceback."""
    stats = mapping(bench.get("stats"))
    numbers = ("min", "max", "mean", "median", "stddev", "iqr", "ops", "rounds", "iterations")
    return (
        isinstance(bench.get("fullname"), str)
        and "outliers" in stats
        and all(is_figure(stats.get(name)) for name in numbers)
    )


def _failed(config: pytest.Config) -> bool:
    """Return whether --perf-fail asks for exit status 1: anything but a clean comparison does."""
    if not config.getoption("perf_fail"):
        return False
    result = config.stash.get(_RESULT, None)
    return not isinstance(result, Comparison) or bool(result.exit_code)


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(terminalreporter: Any) -> Iterator[None]:
    """Print the comparison after pytest-benchmark's table, and say if benchmarks were switched off."""
    config = terminalreporter.config
    benchmarks = getattr(config, "_benchmarksession", None)
    regressed = theirs.take_regressions(benchmarks) if benchmarks is not None else None
    done = yield
    if _switched_off(config, terminalreporter.stats):
        terminalreporter.write_line(
            "nsa_sel: NOTHING WAS TIMED: benchmarks are switched off (--benchmark-disable, or xdist's -n)", red=True
        )
    result = config.stash.get(_RESULT, None)
    if result is not None:
        terminalreporter.section("comparison", sep="-")
        text = result if isinstance(result, str) else result.text(terminalreporter.hasmarkup)
        terminalreporter.write_line(text)
    if regressed:
        config.stash[_THEIRS] = regressed
        for line in ("--benchmark-compare-fail:", *regressed):
            terminalreporter.write_line(line, red=True)
    return done


def _switched_off(config: pytest.Config, stats: Mapping[str, list[Any]]) -> bool:
    """Return whether benchmark tests ran without being timed."""
    if not getattr(getattr(config, "_benchmarksession", None), "disabled", False):
        return False
    reports = (report for reports in stats.values() for report in reports)
    return any(
        "benchmark" in getattr(report, "keywords", ()) or "tests/perf/" in getattr(report, "nodeid", "")
        for report in reports
    )


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Add GPU, driver, versions and calibration to the saved run."""
    if any(_ours(bench) for bench in config._benchmarksession.benchmarks):  # type: ignore[attr-defined]
        machine_info.update(environment())


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Mark a run that is saved with confirmed regressions, or that Ctrl-C cut short: no baseline unless it is named."""
    if config.stash.get(_INTERRUPTED, False):
        output_json[MARK] = {"interrupted": True}
    result = config.stash.get(_RESULT, None)
    if isinstance(result, Comparison) and result.regressions:
        slower = [f"{change.case} {change.method}" for change in result.regressions]
        output_json[MARK] = {"baseline": result.old.name, "regressions": slower}


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_group_stats(
    config: pytest.Config | None, benchmarks: Iterable[dict[str, Any]], group_by: str
) -> Any:
    """Group as pytest-benchmark does; under its `compare` command (config None) what changed, with our comparison."""
    from pytest_benchmark import plugin

    rows = list(benchmarks)
    if config is None:
        rows = table_command.announce(theirs.with_parameters(rows))
    return plugin.pytest_benchmark_group_stats(config, rows, group_by)
