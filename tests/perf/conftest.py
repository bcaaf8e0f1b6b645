"""The measuring session, and the summary at its end."""

from __future__ import annotations

import functools
import io
import sys
import traceback
from collections import Counter
from collections.abc import Generator
from typing import Any, TextIO

import pytest
import torch

from nsa_sel.bench.compare.elsewhere import pytest_benchmark_group_stats
from nsa_sel.bench.report import screen
from nsa_sel.bench.saved.run import MARK, RunError, Saved
from nsa_sel.bench.saved.speedups import kernel_of, kernels_among
from nsa_sel.bench.session import Session
from nsa_sel.bench.suite.chosen import cases_of
from nsa_sel.bench.suite.kernels import UserKernel, kernels_of
from nsa_sel.bench.suite.random_cases import RANDOM
from nsa_sel.bench.threshold.judged import ThresholdError
from nsa_sel.bench.threshold.rule import decide
from nsa_sel.bench.threshold.write import sentence
from nsa_sel.bench.tune.log import Progress

__all__ = ["pytest_benchmark_group_stats"]

BENCH = pytest.StashKey[Session]()
REPORTED = pytest.StashKey["Reported"]()
NOT_TIMED = "not timed"  # the name of a report's property
INEXPRESSIBLE = pytest.StashKey[Counter[UserKernel]]()  # timings left out because a kernel's blocks cannot say the case


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Session:
    """Compile the run's kernels, then calibrate the instrument, without which nothing can be timed."""
    config = request.config
    progress = config.stash[REPORTED].progress
    if torch.cuda.is_available():
        with config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
            said = _compiled(request.session, progress)
        _say(config, said)
    try:
        given = {kernel.name: kernel for kernel in kernels_of(config)}
        made = config.stash[BENCH] = Session(plant=config.getoption("sel_plant"), kernels=given)
        progress.start("benchmarks", len(config.stash[REPORTED].timed))
        return made
    except Exception as error:
        pytest.exit(f"the instrument cannot be calibrated: {''.join(traceback.format_exception(error))}", returncode=1)


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect, and count, the cases that what a user's kernel takes cannot express."""
    given = {kernel.name: kernel for kernel in kernels_of(config) if kernel.block_size}
    if not given:
        return
    known, left_out = cases_of(config), []
    counts = config.stash[INEXPRESSIBLE] = Counter()
    for item in filter(_is_timed, items):
        case_id, method = _key(item)
        kernel = given.get(kernel_of(method))
        if kernel is not None and not kernel.expressible(known[case_id], method):
            left_out.append(item)
            counts[kernel] += 1
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]


@pytest.hookimpl(trylast=True)  # after --sel-resume has found what is measured
def pytest_collection_finish(session: pytest.Session) -> None:
    """Show the time left, unless there is a line per test anyway (-v) or this process is one of many that run them."""
    config = session.config
    shown = config.get_verbosity() <= 0 and not hasattr(config, "workerinput")
    reported = config.stash[REPORTED] = Reported(session.items, sys.stdout if shown else None)
    config.pluginmanager.register(reported)


class Reported:
    """Follow the reports of the benchmarks, another process's too. out: where the time left is shown."""

    def __init__(self, items: list[pytest.Item], out: TextIO | None) -> None:
        self.shown = out is not None
        self.progress = Progress(out or io.StringIO())
        self.timed = {item.nodeid: _key(item) for item in items if _takes_time(item)}
        self.progress.start("benchmarks", len(self.timed))
        self._why: dict[tuple[str, str], str] = {}

    @property
    def not_timed(self) -> dict[tuple[str, str], str]:
        """Return why a (case, method) has no time, in the order of measuring."""
        return {key: self._why[key] for key in self.timed.values() if key in self._why}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name == NOT_TIMED and report.when == "call":
                case, method, why = value
                self._why[case, method] = why
        if report.when == "teardown" and report.nodeid in self.timed:
            self.progress.step()


def pytest_report_teststatus(report: pytest.TestReport, config: pytest.Config) -> tuple[str, str, str] | None:
    """Leave out the letter of a benchmark that did not fail: the line with the time left takes its place."""
    timed = "benchmark" in getattr(report, "keywords", ())  # a module that cannot be collected has none
    if REPORTED in config.stash and config.stash[REPORTED].shown and timed and (report.skipped or report.passed):
        return report.outcome if report.skipped or report.when == "call" else "", "", ""
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Let the report say why the method has no time."""
    try:
        return (yield)
    finally:
        if _is_timed(item) and BENCH in item.config.stash:
            key = _key(item)
            if why := item.config.stash[BENCH].not_timed.get(key):
                item.user_properties.append((NOT_TIMED, [*key, why]))


def _compiled(session: pytest.Session, progress: Progress) -> str:
    ranks = session.config.pluginmanager.get_plugin("nsa_sel.bench.ranks.plugin")  # None but under torchrun
    items = session.items if ranks is None else ranks.every_item(session)
    asked = [item.callspec.params for item in items if isinstance(item, pytest.Function) and _is_timed(item)]
    known = cases_of(session.config)
    pairs = [(known[params["case_id"]], params["method"]) for params in asked]
    try:
        from nsa_sel.bench import precompile

        compile_part = functools.partial(precompile.compile_kernels, pairs, progress)
        return compile_part() if ranks is None else ranks.compile_together(session.config, compile_part)
    except Exception as error:  # the run compiles what it needs, one kernel after another
        return f"kernels not compiled ahead: {type(error).__name__}: {error}"


def _is_timed(item: pytest.Item) -> bool:
    return hasattr(item, "callspec") and "case_id" in item.callspec.params


def _key(item: pytest.Item) -> tuple[str, str]:
    return item.callspec.params["case_id"], item.callspec.params["method"]


def _resume(config: pytest.Config) -> Any:
    """Return the plugin that keeps runs. Imported here it would end `pytest-benchmark compare` with a warning."""
    return config.pluginmanager.get_plugin("nsa_sel.bench.resume.plugin")


def _takes_time(item: pytest.Item) -> bool:
    return _is_timed(item) and not _resume(item.config).holds(item.config, *_key(item))


def _say(config: pytest.Config, text: str) -> None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.write_line(f" {text}")


@pytest.hookimpl(trylast=True)  # after our other note on a saved run
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Save why a method that was asked for has no time."""
    if reasons := _not_timed(config):
        saved = [{"case": case, "method": method, "reason": why} for (case, method), why in reasons.items()]
        output_json.setdefault(MARK, {})["not_timed"] = saved


def _not_timed(config: pytest.Config) -> dict[tuple[str, str], str]:
    return config.stash[REPORTED].not_timed if REPORTED in config.stash else {}


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    timed = [b for b in session.benchmarks if b and not b.has_error and "case" in b.extra_info] if session else []
    skipped = Counter(_reason(report) for report in terminalreporter.stats.get("skipped", ()))
    if not timed and not skipped:
        return
    results = [{**bench.extra_info, "device_us": bench["median"] * 1e6} for bench in timed]
    terminalreporter.section("selection attention", sep="-")
    if results and config.getoption("sel_table"):
        for line in screen.aligned(screen.table(results)):
            terminalreporter.write_line(line)
        terminalreporter.write_line("")
    for line in screen.screen(results):
        terminalreporter.write_line(line)
    for more in (screen.paged_screen(results), screen.training_screen(results)):
        for line in ["", *more] if more else ():
            terminalreporter.write_line(line)
    beside = screen.peers_screen(results, _not_timed(config))
    for line in ["", *beside] if beside else (f"{count} {reason}" for reason, count in skipped.most_common(5)):
        terminalreporter.write_line(line)
    for kernel, count in config.stash.get(INEXPRESSIBLE, Counter()).items():
        terminalreporter.write_line(f"{kernel.name}: {count} deselected, which {kernel.takes} cannot express")
    files = [str(path) for path in _resume(config).saved_files(config)]
    whole = not config.getoption("sel_family") and config.getoption("sel_matrix") != RANDOM
    if files and results[0]["gpu"] and whole:
        for kernel in kernels_among(result["method"] for result in results):
            terminalreporter.write_line(_proposal(files[-1], config.getoption("sel_matrix"), kernel))
    if not (session.save or session.autosave or session.json):
        terminalreporter.write_line("not saved; --benchmark-autosave does")
    if files:
        terminalreporter.write_line(f"saved in {', '.join(files)}")
        terminalreporter.write_line(f"its report: nsa-sel report {files[0]} --out report")


def _reason(report: Any) -> str:
    """Return the text given to pytest.skip."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def _proposal(path: str, matrix: str | None, kernel: str) -> str:
    """Return the threshold of a kernel that this run alone supports."""
    try:
        return sentence(decide([Saved.load(path)], matrix, kernel=kernel))
    except (RunError, ThresholdError) as error:
        return f"no threshold of {kernel} proposed: {error}"
