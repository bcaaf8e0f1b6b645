"""A plugin of pytest, named in bench/plugin.py: journal a perf run, end it in order on SIGTERM, resume it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..saved.run import MARK
from .keeper import Keeper

KEEPER = pytest.StashKey[Keeper]()
KIND = pytest.StashKey[Callable[..., Keeper]]()  # what keeps the run, if it is no plain Keeper
TERMINATED = "SIGTERM"  # why such a session stops
_HANDLER = pytest.StashKey[Any]()  # what SIGTERM did before


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("nsa_sel").addoption(
        "--sel-resume",
        action="store_true",
        help="go on with the newest run that ended early, of the same cases, commit, card and versions; what it has"
        " measured is not measured again, and the whole is saved as one run",
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin to keep the run, if it will be saved."""
    config = session.config
    benchmarks: Any = getattr(config, "_benchmarksession", None)
    if benchmarks is None or benchmarks.disabled or config.option.collectonly:
        return
    resume = config.getoption("sel_resume")
    if not (benchmarks.save or benchmarks.autosave or benchmarks.json):
        if resume:
            raise pytest.UsageError("--sel-resume: the run would not be saved; add --benchmark-autosave")
        return
    tests = [item for item in session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec")]
    params: dict[str, dict[str, Any]] = {item.nodeid: item.callspec.params for item in tests}
    pairs = {name: (of["case_id"], of["method"]) for name, of in params.items() if {"case_id", "method"} <= set(of)}
    if not pairs:
        return
    keeper = config.stash.get(KIND, Keeper)(config, pairs)
    if resume:
        keeper.resume()
    config.stash[KEEPER] = keeper
    if threading.current_thread() is threading.main_thread():
        config.stash[_HANDLER] = signal.signal(signal.SIGTERM, lambda *_: end(session))


def end(session: pytest.Session) -> None:
    """End the session as Ctrl-C does, or after this test, should the exception be swallowed in the midst of a call."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    session.shouldstop = TERMINATED
    raise KeyboardInterrupt(TERMINATED)


def holds(config: pytest.Config, case: str, method: str) -> bool:
    """Tell whether the run that is gone on with has measured this already."""
    return KEEPER in config.stash and (case, method) in config.stash[KEEPER].held


def saved_files(config: pytest.Config) -> list[Path]:
    """Return the files that the run was saved in."""
    return config.stash[KEEPER].saved if KEEPER in config.stash else []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    keeper = item.config.stash.get(KEEPER, None)
    if keeper is None:
        return (yield)
    try:
        result = yield
    except KeyboardInterrupt as stop:
        # Compiled code leaves traceback entries without a line number, over which pytest's report of Ctrl-C fails.
        raise KeyboardInterrupt(*stop.args) from None
    finally:
        keeper.take()
    keeper.ran.add(item.nodeid)
    return result


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """Save what was measured even if the comparison, which may measure again, is interrupted."""
    keeper = session.config.stash.get(KEEPER, None)
    try:
        return (yield)
    except KeyboardInterrupt:
        if keeper is None or keeper.settled:
            raise
        keeper.stopped = True
        keeper.save()
        pytest.exit("\n".join(["interrupted before the comparison", *keeper.lines()]), pytest.ExitCode.INTERRUPTED)


@pytest.hookimpl(optionalhook=True, trylast=True)  # after other notes on a saved run
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Save what the run was asked for, and whether it tried all of it."""
    if KEEPER in config.stash:
        keeper = config.stash[KEEPER]
        mark = output_json.setdefault(MARK, {})
        mark |= keeper.notes()
        if keeper.partial:
            mark["interrupted"] = True


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    config = terminalreporter.config
    for line in config.stash[KEEPER].lines() if KEEPER in config.stash else ():
        terminalreporter.write_line(line, yellow=True)


def pytest_unconfigure(config: pytest.Config) -> None:
    if KEEPER in config.stash:
        config.stash[KEEPER].close()
    if _HANDLER in config.stash:
        signal.signal(signal.SIGTERM, config.stash[_HANDLER])
