"""A sweep by the ranks of a job: each takes whole classes of calls, and rank 0 writes the one table.

Every rank keeps a log of its own, in which it finds what its card has measured. Source: docs/many-gpus.md.
"""

from __future__ import annotations

import io
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from ...kernel import tuned_table
from ..ranks.job import COMPILED, Job, JobError, take_card
from ..ranks.shares import dealt
from ..suite.cases import Case
from ..timer.machine import environment
from .log import Log, Progress
from .results import Result
from .space import Variant
from .sweep import Class, Compile, DeviceLost, Sweep, SweepError

__all__ = ["SharedProgress", "join", "open_log", "run", "take_card"]

READY = "ready"  # the box of rank 0's word that the logs of an earlier job are gathered
TIMING_S, CASE_S = 0.0045 * 1.5, 0.6  # as Sweep.expected_seconds; the compiling is divided among all


class SharedProgress(Progress):
    """Show the progress of all ranks in rank 0's line."""

    def __init__(self, job: Job, out: TextIO | None = None) -> None:
        super().__init__(out if job.leads else io.StringIO())
        self.job = job
        self._noted = 0.0

    def start(self, stage: str, total: int) -> None:
        super().start(stage, total)
        self.job.note(f"0/{total} {stage}")

    def step(self) -> None:
        super().step()
        if self.done == self.total or time.monotonic() - self._noted > 1:
            self._noted = time.monotonic()
            self.job.note(f"{self.done}/{self.total} {self.stage}")

    def beside(self) -> str:
        return "".join(f"; rank {rank}: {self.job.doing(rank)}" for rank in self.job.others)


def join(limit_s: float, chosen: Sequence[Case]) -> Job:
    """Meet the other ranks; SIGTERM, by which torchrun ends them once one has died, becomes an interruption.

    Raises: SweepError if they differ, or do not come.
    """
    job = Job(limit_s)
    about = {name: value for name, value in environment().items() if name != "calibration"}
    try:
        job.meet({**about, "kernel": tuned_table.kernel_hash(), "cases": [case.id for case in chosen]}, ("gpu_id",))
    except JobError as error:
        raise SweepError(str(error)) from None

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    return job


def open_log(job: Job, path: Path, machine: Mapping[str, Any]) -> Log:
    """Open this rank's log; rank 0's is the one of a sweep by one process, and takes over what a job has left."""
    if not job.leads:
        if not job.restarted:
            job.listen([0], lambda *_: True, READY)
        return Log(path.with_stem(f"{path.stem}-rank{job.rank}"), machine, beside=path)
    log = Log(path, machine)
    if not job.restarted:
        for left in sorted(path.parent.glob(f"{path.stem}-rank*{path.suffix}")):
            log.absorb(left)
        for rank in job.others:
            job.post(rank, None, READY)
    return log


def run(job: Job, sweep: Sweep) -> tuple[list[Result], list[Case]]:
    """Sweep this rank's classes. Rank 0 returns the results of all ranks, and the cases of those that gave none.

    The other ranks return once rank 0 has let them go.

    Raises: as Sweep.run; on other ranks SweepError if rank 0 is gone.
    """
    classes = {key: tuple(of_class) for key, of_class in sweep.classes.items()}
    sweep.compile_all = Together(job, sweep.compile_all)
    owner = dealt({key: _cost(sweep, key) for key in classes}, job.size)
    sweep.keep({key for key in classes if owner[key] == job.rank})
    if not job.leads:
        return _follow(job, sweep), []
    found: dict[Class, Result] = {}
    given: set[int] = set()

    def hear(rank: int, message: dict[str, Any]) -> bool:
        found.update({result.key: result for result in message["results"]})
        sweep.skipped.update(message["skipped"])
        sweep.late += message["late"]
        sweep.log.include(message["errors"])
        given.add(rank)
        return True

    try:
        found.update({result.key: result for result in sweep.run()})
        given.add(0)
        for rank in job.listen(job.others, hear):
            print(f"{job.described(rank)}: silent for {job.limit_s:g} s; its last sign: {job.doing(rank)}")
    except DeviceLost as error:
        if job.can_restart:
            raise
        raise SweepError(
            f"a launch broke this process's access to the GPU; the same command goes on: {error}"
        ) from None
    except KeyboardInterrupt:
        for rank in set(job.others) - given:
            for message in job.messages(rank):
                hear(rank, message)
        _name(_of_others(classes, owner, given))
        raise
    missing = _of_others(classes, owner, given)
    _name(missing)
    return [found[key] for key in classes if key in found], missing


def _follow(job: Job, sweep: Sweep) -> list[Result]:
    results = sweep.run()
    job.post(0, {"results": results, "skipped": sweep.skipped, "late": sweep.late, "errors": sweep.log.errors()})
    said: list[bool] = []

    def hear(_: int, whole: bool) -> bool:
        said.append(whole)
        return True

    if job.listen([0], hear):
        raise SweepError("rank 0 is gone or silent; the same command goes on")
    if said[0]:
        sweep.log.finish()
    return results


def _of_others(classes: Mapping[Class, Sequence[Case]], owner: Mapping[Class, int], given: set[int]) -> list[Case]:
    """Return the cases of the ranks that have given no results."""
    return [case for key, of_class in classes.items() if owner[key] not in given for case in of_class]


def _name(missing: Sequence[Case]) -> None:
    if missing:
        print(f"no result of {len(missing)} cases: {', '.join(case.id for case in missing)}", flush=True)


def _cost(sweep: Sweep, key: Class) -> float:
    return len(sweep.classes[key]) * (CASE_S + TIMING_S * len(sweep.launches[key]))


class Together:
    """Compile what the ranks of a host need for a round together, each a part, for as many rounds as bring new kernels.

    What another rank has compiled is in Triton's cache. A rank that is lost, or started anew, costs its part.
    """

    ROUNDS = 2  # all launches, and those around the best

    def __init__(self, job: Job, compile_all: Compile) -> None:
        self.job, self.compile_all = job, compile_all
        self.round = 0
        self.errors: dict[Variant, str | None] = {}  # None: compiled
        while job.restarted and self.round < self.ROUNDS:  # the others are somewhere between these
            self.round += 1
            for rank in job.here:
                for box in self._boxes():
                    job.post(rank, {}, box)

    def _boxes(self) -> tuple[str, str]:
        return f"wanted in round {self.round}", f"{COMPILED} in round {self.round}"

    def __call__(self, kernels: Sequence[Variant], finished: Callable[[], Any]) -> dict[Variant, str]:
        steps = iter(kernels)  # of the progress: a rank's part is not what it needs

        def step() -> None:
            if next(steps, None) is not None:
                finished()

        if self.round < self.ROUNDS:
            self.round += 1
            wanted, compiled = self._boxes()
            asked = self.job.exchange(self.job.here, dict.fromkeys(kernels), wanted)
            every = list(dict.fromkeys(kernel for rank in sorted(asked) for kernel in asked[rank]))
            number, of = self.job.part
            for part in self.job.exchange(self.job.here, self._compile(every[number::of], step), compiled).values():
                self.errors |= part
        self.errors |= self._compile([kernel for kernel in kernels if kernel not in self.errors], step)
        for _ in steps:
            finished()
        return {kernel: error for kernel in kernels if (error := self.errors[kernel]) is not None}

    def _compile(self, kernels: list[Variant], step: Callable[[], Any]) -> dict[Variant, str | None]:
        return {**dict.fromkeys(kernels), **self.compile_all(kernels, step)}
