"""Teach pytest-benchmark our comparison and storage; the root conftest.py re-exports these hooks by name.

`pytest-benchmark compare` reads nothing but that conftest.py, and calls its functions without pluggy.
"""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ..saved import storage
from ..saved.run import MARK, Key, Run, RunError, from_entries, load, notes, read_json, short_name, timing
from ..tables import printable
from ..timer.machine import environment
from .rule import Comparison, compare, confirm, to_measure_again

Remeasure = Callable[[], Mapping[str, Any]]
remeasure: dict[Key, Remeasure] = {}
_ASKED = pytest.StashKey[str | bool]()  # True: with the default baseline; a text: with this run
_INTERRUPTED = pytest.StashKey[bool]()
_RESULT = pytest.StashKey[Comparison | str]()
_SKIP_SUMMARY = (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR)


def register_remeasure(case: str, method: str, measure: Remeasure) -> None:
    """Register how to time a case once more, should it look slower.

    `measure` takes nothing, runs after the last test when fixtures are gone, and returns median, q1 and q3 in
    seconds and ci95_us (pair) in microseconds.
    """
    remeasure[case, method] = measure


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
        help="compare with this run: a file, a saved name or a prefix such as 0001"
        f" (default: this GPU's run saved as {storage.BASELINE_NAME!r}, else its latest without confirmed regressions)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Take --benchmark-compare over: pytest-benchmark would load its run before the GPU is known."""
    asked = config.getoption("benchmark_compare", None) or config.getoption("perf_fail")
    baseline = config.getoption("sel_baseline")
    if asked or baseline:
        config.stash[_ASKED] = baseline or asked
    if hasattr(config.option, "benchmark_compare"):
        config.option.benchmark_compare = []
    # pytest-benchmark warns so if Ctrl-C stops a benchmark before its first round; an error would hide the Ctrl-C.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> Iterator[None]:
    """Compare, and measure alerts again, before pytest-benchmark saves the run and prints its table."""
    config = session.config
    benchmarks = getattr(config, "_benchmarksession", None)
    if benchmarks is not None and exitstatus == pytest.ExitCode.INTERRUPTED:
        config.stash[_INTERRUPTED] = True
        with contextlib.suppress(RunError):
            if (partial := _this_run(benchmarks.benchmarks)) is not None:
                _keep_apart(benchmarks, partial.gpu)
    elif benchmarks is not None and not hasattr(config, "workerinput") and exitstatus not in _SKIP_SUMMARY:
        try:
            new = _this_run(benchmarks.benchmarks)
            if new is not None:
                _keep_apart(benchmarks, new.gpu)
            if _ASKED in config.stash:
                config.stash[_RESULT] = _compare(config, benchmarks, new)
        except RunError as error:
            config.stash[_RESULT] = printable(f"nsa_sel: not compared: {error}")
        if _failed(config) and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
    return (yield)


def _this_run(benchmarks: Iterable[Any]) -> Run | None:
    """Return the session's own timings as a Run; None if this suite timed nothing."""
    entries = [bench.as_dict(include_data=False) for bench in benchmarks if _ours(bench)]
    return from_entries("this run", entries, environment()) if entries else None


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
    path = storage.baseline(folder, new.gpu, asked if isinstance(asked, str) else None)
    old = load(path)
    shown = path.relative_to(folder) if path.is_relative_to(folder) else path
    benchmarks.compared_mapping[shown] = {bench.get("fullname"): bench for bench in read_json(path)["benchmarks"]}
    comparison = compare(old, new)
    again = [key for key in to_measure_again(comparison) if key in remeasure]
    if again:
        config.get_terminal_writer().line(f"\nmeasuring {len(again)} alerted timings again")
    fresh, notes = {}, {}
    for key in again:
        try:
            values = remeasure[key]()
            fresh[key] = timing(*key, values, values, "measured again")
        except Exception as error:  # the comparison must outlive whatever a measurement does
            notes[key] = f"could not be measured again: {error}".splitlines()[0]
    confirmed = confirm(comparison, fresh)
    return replace(
        confirmed,
        regressions=tuple(
            replace(change, note=notes.get((change.case, change.method), change.note))
            for change in confirmed.regressions
        ),
    )


def _failed(config: pytest.Config) -> bool:
    """Return whether --perf-fail asks for exit status 1: anything but a clean comparison does."""
    if not config.getoption("perf_fail"):
        return False
    result = config.stash.get(_RESULT, None)
    return not isinstance(result, Comparison) or bool(result.exit_code)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the comparison after pytest-benchmark's table, and say if benchmarks were switched off."""
    config = terminalreporter.config
    if _switched_off(config, terminalreporter.stats):
        terminalreporter.write_line(
            "nsa_sel: NOTHING WAS TIMED: benchmarks are switched off (--benchmark-disable, or xdist's -n)", red=True
        )
    result = config.stash.get(_RESULT, None)
    if result is not None:
        terminalreporter.section("comparison", sep="-")
        text = result if isinstance(result, str) else result.text()
        terminalreporter.write_line(text)


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
    """Group as pytest-benchmark does; under its `compare` command (config None), print our comparison at exit."""
    from pytest_benchmark import plugin

    rows = list(benchmarks)
    if config is None:
        atexit.register(print, f"\n{compare_rows(rows)}", flush=True)
    return plugin.pytest_benchmark_group_stats(config, rows, group_by)


def compare_rows(rows: Iterable[Mapping[str, Any]]) -> str:
    """Compare, for each GPU among a table's rows, the named baseline, else the oldest run, with the newest."""
    by_path: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_path.setdefault(str(row.get("path")), []).append(row)
    texts: list[str] = []
    found: list[Run] = []
    for path, entries in by_path.items():
        try:
            found.append(_run_of_rows(path, entries))
        except RunError as error:
            texts.append(printable(f"nsa_sel: not compared: {error}"))
    found.sort(key=lambda run: run.datetime)
    by_gpu: dict[str, list[Run]] = {}
    for run in found:
        by_gpu.setdefault(run.gpu, []).append(run)
    groups = [group for group in by_gpu.values() if len(group) > 1]
    if not groups and len(found) > 1:  # one run of each GPU: the comparison says that they cannot be compared
        groups = [found]
    for group in groups:
        *older, newest = group
        baselines = [run for run in older if run.name.endswith(f"_{storage.BASELINE_NAME}.json")]
        texts.append(compare(baselines[-1] if baselines else older[0], newest).text())
    if not groups:
        texts.append(f"nsa_sel: not compared: {len(found)} saved runs read, two of one GPU are needed")
    return "\n\n".join(texts)


def _run_of_rows(path: str, rows: list[Mapping[str, Any]]) -> Run:
    """Build a Run from table rows; its date and calibration, which rows lack, are read from its file."""
    file = next((file for file in (Path(path), storage.STORAGE / path) if file.is_file()), None)
    data = read_json(file) if file else {}
    return from_entries(short_name(path), rows, data.get("machine_info") or {}, **notes(data))
