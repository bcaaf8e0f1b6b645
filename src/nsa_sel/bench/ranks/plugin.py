"""A plugin of pytest, loaded by bench/plugin.py where torchrun started the process: one rank of a job of tests.

Every rank collects all tests and runs its share; rank 0 hears of each test, prints one summary and saves one run.
Source: docs/many-gpus.md.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import signal
import threading
from collections.abc import Callable, Generator

import pytest

from ..resume import plugin as resume
from ..resume.conditions import conditions
from ..resume.keeper import Keeper
from ..suite.chosen import cases_of
from .job import COMPILED, VARIABLES, Job, JobError, take_card
from .keeper import RankKeeper
from .members import Follower, Leader, Member, case_of
from .shares import benchmark_s, dealt

JOB = pytest.StashKey[Job]()
MEMBER = pytest.StashKey[Member]()
# Options that a single test depends on.
OPTIONS = ("sel_kernel", "sel_cases", "sel_matrix", "sel_seed", "sel_count", "sel_family", "sel_dtype")


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Take the card before any conftest asks for one, and leave what is printed to rank 0."""
    take_card()
    if os.environ["RANK"] != "0":
        pluginmanager.unregister(name="terminal")


@pytest.hookimpl(tryfirst=True)  # before the seed is read
def pytest_configure(config: pytest.Config) -> None:
    job = config.stash[JOB] = Job(config.getoption("sel_rank_limit"))
    if not job.leads:
        config.workerinput = {}  # type: ignore[attr-defined]  # as under pytest-xdist: no cache, no report of its own
        seed = config.getoption("hypothesis_seed", None) or "0"
        config.option.hypothesis_seed = str(int(seed) + job.rank) if seed.isdigit() else f"{seed}-{job.rank}"
        if config.pluginmanager.hasplugin("hypothesispytest"):
            _let_the_seed_count()


def _let_the_seed_count() -> None:
    """Draw by the seed also where the profile draws the same examples always, as Hypothesis's own does in CI."""
    from hypothesis import settings  # not needed without tests that use it

    settings.register_profile("nsa_sel rank", settings.default, derandomize=False)
    settings.load_profile("nsa_sel rank")


@pytest.hookimpl(tryfirst=True)  # before a journal is begun
def pytest_collection_finish(session: pytest.Session) -> None:
    """Meet the other ranks, and deal the tests."""
    config = session.config
    if config.option.collectonly or session.testsfailed:
        return
    job = config.stash[JOB]
    names = "\n".join(item.nodeid for item in session.items)
    about = conditions({}, config.getoption("sel_plant"), config.getoption("sel_kernel") or ())
    about["the list of tests"] = f"{len(session.items)} ({hashlib.sha256(names.encode()).hexdigest()[:8]})"
    try:
        job.meet(about, may_differ=("gpu_id",))
    except JobError as error:
        raise pytest.UsageError(f"nsa_sel: {error}") from None
    for name in VARIABLES:
        del os.environ[name]  # a process that a test starts is no rank
    groups = {item: case_of(item) or item.nodeid for item in session.items}
    costs: dict[str, float] = {}
    for item, group in groups.items():
        costs[group] = costs.get(group, 0.0) + _cost(item)
    owner = dealt(costs, job.size)
    shares = [
        [item for item in session.items if owner[groups[item]] == rank or _explores(item)] for rank in range(job.size)
    ]
    keeper: Callable[..., Keeper] = functools.partial(RankKeeper, job, owner)
    config.stash[resume.KIND] = keeper
    config.stash[MEMBER] = (Leader if job.leads else Follower)(job, session, shares)
    config.pluginmanager.register(config.stash[MEMBER])
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: resume.end(session))  # by which torchrun ends the other ranks


def _explores(item: pytest.Item) -> bool:
    """Tell whether Hypothesis draws the test's examples: every rank draws others."""
    return bool(getattr(getattr(item, "obj", None), "is_hypothesis_test", False))


def _cost(item: pytest.Item) -> float:
    """Return the seconds that a test is expected to take on each rank; what all ranks do weighs nothing."""
    if isinstance(item, pytest.Function) and (name := case_of(item)):
        case = cases_of(item.config).get(name)
        return 1.0 if case is None else benchmark_s(case, str(item.callspec.params["method"]))
    costs = item.get_closest_marker("costs")
    return 0.0 if _explores(item) else float(costs.args[0]) if costs else 1.0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Say below a failure which rank it is of, and how to see it without the others."""
    report = yield
    if report.failed and MEMBER in item.config.stash:
        job = item.config.stash[JOB]
        report.sections.append((f"rank {job.rank}", f"{job.described(job.rank)}; alone:\n  {_alone(item)}"))
    return report


def _alone(item: pytest.Item) -> str:
    """Return the command that runs a test as this rank did."""
    words = ["python", "-m", "pytest", item.nodeid]
    seed = item.config.getoption("hypothesis_seed", None)
    if seed is not None and _explores(item):
        words.append(f"--hypothesis-seed={seed}")
    for name in OPTIONS:
        value = item.config.getoption(name, None)
        for one in value if isinstance(value, list | tuple) else [value]:
            if one not in (None, "bf16"):
                words.append(f"--{name.replace('_', '-')}={one}")
    return shlex.join(words)


# --- for tests/perf/conftest.py ---


def every_item(session: pytest.Session) -> list[pytest.Item]:
    """Return the tests of all ranks."""
    return session.config.stash[MEMBER].every_item


def compile_together(config: pytest.Config, compile_part: Callable[[tuple[int, int]], str]) -> str:
    """Compile a part of the kernels of all ranks, and wait for the other ranks of this host to compile theirs."""
    job = config.stash[JOB]
    said = compile_part(job.part)
    config.stash[MEMBER].compiled = True
    job.exchange(job.here, None, COMPILED)
    return said
