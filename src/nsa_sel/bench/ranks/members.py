"""What the ranks do in a job of tests: followers run their share and report, the leader hears them and sums up."""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import sys
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import pytest

from ..compare import hooks
from ..resume import plugin as resume
from ..resume.results import dumps, rebuilt
from ..saved.run import Key
from ..timer.machine import environment
from .job import COMPILED, Job
from .keeper import RankKeeper

NAMED = 20  # cases or tests without a result that are named
Shares = Sequence[list[pytest.Item]]


def case_of(item: pytest.Item) -> str | None:
    """Return the id of the case that a benchmark is of; None for any other test."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return str(params["case_id"]) if {"case_id", "method"} <= params.keys() else None


class Member:
    """Be one rank. shares: the tests of every rank, all in the order of the collection."""

    def __init__(self, job: Job, session: pytest.Session, shares: Shares) -> None:
        self.job, self.config, self.shares = job, session.config, shares
        self.every_item = list(session.items)
        self.compiled = False  # this rank's part of the kernels

    @property
    def keeper(self) -> RankKeeper | None:
        """Return what keeps the run; None if it will not be saved."""
        keeper = self.config.stash.get(resume.KEEPER, None)
        return keeper if isinstance(keeper, RankKeeper) else None

    @contextlib.contextmanager
    def own_share(self, session: pytest.Session) -> Iterator[None]:
        """Let the session run this rank's tests alone."""
        session.items = self.shares[self.job.rank]
        try:
            yield
        finally:
            session.items = self.every_item
            if not self.compiled:  # none of its tests wanted a kernel: those who wait for this rank need not
                with contextlib.suppress(RuntimeError):
                    for rank in self.job.others:
                        self.job.post(rank, None, COMPILED)


class Follower(Member):
    """Run a share, and tell rank 0 of each test."""

    def __init__(self, job: Job, session: pytest.Session, shares: Shares) -> None:
        super().__init__(job, session, shares)
        self._reports: list[Any] = []
        self._told = [0, 0, 0]  # benchmarks, timings that can be repeated, and reasons against a timing
        self._delivered = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(self.config.hook.pytest_report_to_serializable(config=self.config, report=report))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self.job.note(item.nodeid)
        done = yield
        reports, self._reports = self._reports, []
        self.job.post(0, {"test": item.nodeid, "reports": reports, **self._news()})
        for why in self.job.messages(0):
            item.session.shouldstop = why
        return done

    def _news(self) -> dict[str, Any]:
        """Return what the last test added to what this process knows."""
        benchmarks = getattr(getattr(self.config, "_benchmarksession", None), "benchmarks", [])
        known: list[list[Any]] = [benchmarks, list(hooks.remeasure), list(hooks.skipped.items())]
        new = [of[n:] for of, n in zip(known, self._told, strict=True)]
        self._told = [len(of) for of in known]
        lines = [dumps(bench.as_dict(include_data=True)) for bench in new[0] if bench and not bench.has_error]
        return {"benchmarks": lines, "again": new[1], "skipped": new[2]}

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        try:
            with self.own_share(session):
                done = yield
        except (session.Failed, session.Interrupted):
            self._serve()
            raise
        except BaseException as error:  # Ctrl-C, SIGTERM, pytest.exit: rank 0 may still be told why
            with contextlib.suppress(RuntimeError):
                self.job.post(0, {"ended": f"{type(error).__name__}: {error}"})
            raise
        self._serve()
        return done

    def _serve(self) -> None:
        """Measure again what rank 0 asks for, until it has saved the run."""
        try:
            self.job.post(0, {"ended": "", "calibration": environment()["calibration"]})
            self._delivered = not self.job.listen([0], self._hear)
            self.pytest_unconfigure()
        except RuntimeError:  # rank 0 kept the store, and is gone
            self._delivered = False
        if not self._delivered:
            print(f"nsa_sel: rank {self.job.rank}: rank 0 is gone or silent; resume the run", file=sys.stderr)

    def _hear(self, _: int, message: Any) -> bool:
        match message:
            case {"end": safe}:
                if safe and self.keeper is not None:
                    self.keeper.release()
                return True
            case {"again": key}:
                try:
                    answer: Any = dict(hooks.remeasure[key]())
                except Exception as error:  # whatever it is, rank 0 waits for an answer
                    answer = f"{type(error).__name__}: {error}"
                self.job.post(0, {"measured": answer})
        return False  # or a text: to stop, which this rank has done

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, object, object]:
        """Leave the exit status to rank 0 if it has heard all: torchrun ends every rank once one has failed."""
        done = yield
        session.exitstatus = pytest.ExitCode.OK if self._delivered else session.exitstatus or 1
        return done

    @pytest.hookimpl(trylast=True)  # after other handlers are put back
    def pytest_unconfigure(self) -> None:
        """Go in peace: if rank 0's status is not 0, torchrun's SIGTERM finds this rank on its way out."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Leader(Member):
    """Run a share, hear the other ranks, and sum up."""

    def __init__(self, job: Job, session: pytest.Session, shares: Shares) -> None:
        super().__init__(job, session, shares)
        self._waited_for = [{item.nodeid for item in share} for share in shares]
        self._why: dict[int, str] = {}  # a rank's last word, by rank; empty if it did its share
        self._say(f"nsa_sel: {job.size} ranks: {', '.join(map(job.described, range(job.size)))}")

    def _say(self, text: str) -> None:
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.ensure_newline()
            reporter.write_line(text)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self.job.note(item.nodeid)
        done = yield
        self._waited_for[0].discard(item.nodeid)
        self._listen()
        return done

    def _listen(self) -> None:
        """Hear what has come, without waiting."""
        for rank in self.job.others:
            for message in self.job.messages(rank):
                self._hear(rank, message)

    def _hear(self, rank: int, message: Any) -> bool:
        match message:
            case {"test": test, "reports": reports}:
                self._take(rank, test, message)
                for data in reports:
                    report = self.config.hook.pytest_report_from_serializable(config=self.config, data=data)
                    self.config.hook.pytest_runtest_logreport(report=report)
            case {"ended": why}:
                self._why[rank] = why
                self.job.cards[rank]["calibration"] = message.get("calibration")
        return rank in self._why

    def _take(self, rank: int, test: str, message: dict[str, Any]) -> None:
        """Take over what another rank's test brought."""
        self._waited_for[rank].discard(test)
        benchmarks = [rebuilt(json.loads(line)) for line in message["benchmarks"]]
        if self.keeper is not None:
            self.keeper.add(test, benchmarks)
        elif benchmarks:
            self.config._benchmarksession.benchmarks += benchmarks  # type: ignore[attr-defined]
        for case, method in message["again"]:
            hooks.register_remeasure(case, method, functools.partial(self._ask, rank, (case, method)))
        for (case, method), why in message["skipped"]:
            hooks.register_skipped(case, method, why)

    def _ask(self, rank: int, key: Key) -> dict[str, Any]:
        """Let the rank that measured a benchmark measure it again."""
        self.job.post(rank, {"again": key})
        found: dict[int, Any] = {}
        self.job.listen([rank], lambda rank, message: bool(found.setdefault(rank, message)))
        answer = found[rank]["measured"] if rank in found else "it is silent"
        if isinstance(answer, str):
            raise RuntimeError(f"rank {rank}: {answer}")
        return answer

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        try:
            with self.own_share(session):
                done = yield
        except (session.Failed, session.Interrupted) as stop:
            for rank in self.job.others:
                self.job.post(rank, f"rank 0: {stop}")
            if str(stop) != resume.TERMINATED:
                self._gather()
            raise
        except BaseException:  # Ctrl-C, or torchrun's SIGTERM once a rank has died: nobody answers any more
            with contextlib.suppress(RuntimeError):
                self._listen()
            raise
        self._gather()
        session.testsfailed += any(self._waited_for)
        return done

    def _gather(self) -> None:
        """Hear all ranks to their end, or until they fall silent."""
        self.job.cards[0]["calibration"] = environment()["calibration"]
        lost = self.job.listen([rank for rank in self.job.others if rank not in self._why], self._hear)
        self._why |= dict.fromkeys(lost, f"silent for {self.job.limit_s:g} s")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Say which ranks did not do their share, and name what therefore has no result."""
        if any(self._waited_for):
            terminalreporter.section("ranks", sep="-")
        line = functools.partial(terminalreporter.write_line, red=True)
        for rank, tests in enumerate(self._waited_for):
            if tests:
                why = self._why.get(rank, "ended early")
                line(f"nsa_sel: {self.job.described(rank)}: {why}; {len(tests)} of its tests have no result")
                if rank and (doing := self.job.doing(rank)):
                    line(f"  its last sign: {doing}")
        tests = set[str]().union(*self._waited_for)
        of_cases = {case_of(item) for item in self.every_item if item.nodeid in tests}
        if tests:
            names = sorted(tests if None in of_cases else filter(None, of_cases))
            more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
            line(f"  no result, or not of every method: {', '.join(names[:NAMED])}{more}")
        if self.job.sharing:
            line("nsa_sel: ranks share a card: their times are for function, and no figures")
        if self.job.size > 1 and any("hypothesis" in item.keywords for item in self.every_item):
            line("nsa_sel: rank N draws Hypothesis's examples by --hypothesis-seed=N, rank 0 as without torchrun")

    @pytest.hookimpl(tryfirst=True)
    def pytest_unconfigure(self) -> None:
        """Let the other ranks go."""
        with contextlib.suppress(RuntimeError):
            listening = [rank for rank, why in self._why.items() if not why]
            self.job.let_go({"end": self.keeper is None or self.keeper.safe}, listening)
