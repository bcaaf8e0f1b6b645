"""The course of a sweep: rounds of compiling, checking and timing, from every launch that fits to a few finalists."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...kernel.call import Gpu
from ...kernel.launch_config import LaunchConfig
from ..methods.contender import NotTimed
from ..suite.cases import Case
from . import space, workers
from .log import Log, Progress, clock
from .results import Ranked, Result, rank
from .space import Variant

AROUND = 3  # launches of a class around which narrower chunks, more stages and register limits are tried
KEPT_FOR_SECOND_ROUND = 16  # launches of a class that are timed again
FINAL_TURNS = 8
LATE_S = 0.5  # a first call that takes longer has compiled its kernel


@dataclass(frozen=True)
class Stage:
    """Name one round of timing, and how many samples each launch gets in it."""

    name: str
    rounds: int
    warmup: int


FIRST, SECOND_TIME, FINAL = Stage("first", 7, 1), Stage("second", 15, 2), Stage("final", 10, 2)


class SweepDevice(Protocol):
    """What a sweep needs of the device; see gpu.GpuSweepDevice."""

    def untuned(self, case: Case) -> LaunchConfig: ...
    def open(self, case: Case) -> None: ...
    def check(self, launch: LaunchConfig) -> None: ...
    def samples(self, launch: LaunchConfig, rounds: int, warmup: int) -> list[float]: ...
    def alive(self) -> bool: ...


Class = Hashable  # of cases for which one launch is sought: a key of the tuned table, or a case
Compile = Callable[[Sequence[Variant], Callable[[], Any]], Mapping[Variant, str]]


class SweepError(RuntimeError):
    """Say why nothing could be tuned."""


class DeviceLost(RuntimeError):
    """Say that a launch broke this process's access to the GPU; it is on record, and a new process can go on."""


class Sweep:
    """Measure launches for cases, class by class; what the log has is not measured again."""

    def __init__(
        self,
        chosen: Sequence[Case],
        gpu: Gpu,
        device: SweepDevice,
        log: Log,
        progress: Progress,
        compile_all: Compile = workers.compile_all,
        *,
        every_chunk: bool = False,
        top: int = 4,
    ) -> None:
        self.gpu, self.device, self.log, self.progress, self.compile_all = gpu, device, log, progress, compile_all
        self.top = top
        self.classes: dict[Class, list[Case]] = {}
        for case in chosen:
            self.classes.setdefault(self.class_of(case), []).append(case)
        self.untuned = {case: device.untuned(case) for case in chosen}
        self.removed: Counter[str] = Counter()
        self.every_chunk = every_chunk
        self.launches = {key: self._worth_timing(of_class) for key, of_class in self.classes.items()}
        self.skipped: dict[Case, str] = {}
        self.late = 0  # kernels that the workers had not left in the cache
        self._compiled: set[Variant] = set()

    def class_of(self, case: Case) -> Class:
        """Return what one launch is sought for: all cases of a key of the tuned table."""
        return space.key(case, self.gpu)

    def grid(self, D: int, Dv: int) -> Iterable[LaunchConfig]:
        """Return the launches of the first round, those that are not worth timing included."""
        return space.grid(D, Dv, self.every_chunk)

    def unfit(self, launch: LaunchConfig, case: Case) -> str | None:
        """Say why a launch is not worth timing for a case; None if it is."""
        return space.unfit(launch, case, self.gpu)

    def _worth_timing(self, of_class: Sequence[Case]) -> list[LaunchConfig]:
        """Return the launches of the first round; what fits no case of the class is counted by its reason."""
        found = [self.untuned[case] for case in of_class]
        for launch in self.grid(of_class[0].D, of_class[0].Dv):
            reasons = [self.unfit(launch, case) for case in of_class]
            if None in reasons:
                found.append(launch)
            else:
                self.removed[str(reasons[0])] += 1
        return list(dict.fromkeys(found))

    def size(self) -> tuple[int, int, int]:
        """Return how many cases, kernels and timings the first round has."""
        members = [(case, self.launches[key]) for key, of_class in self.classes.items() for case in of_class]
        variants = {space.variant(case, launch) for case, launches in members for launch in launches}
        return len(members), len(variants), sum(len(launches) for _, launches in members)

    def expected_seconds(self, n_workers: int, slower: float = 1.0) -> float:
        """Predict how long the sweep takes on a GPU that needs `slower` times as long for a timing as an H200."""
        n_cases, n_kernels, n_timings = self.size()
        # On an H200: 1.4 s per kernel, 4.5 ms per check with samples; the later rounds add about half.
        return 30 + 1.5 * (1.4 * n_kernels / n_workers + 0.0045 * slower * n_timings) + 0.6 * n_cases

    def plan(self) -> Iterator[str]:
        """Yield the lines that say what will be tried, what will not and why, and how long it may take."""
        n_cases, n_kernels, n_timings = self.size()
        sizes = f"{n_cases} cases in {len(self.classes)} classes, {n_kernels} kernels, {n_timings} timings"
        yield f"{self.gpu.name}: {sizes}"
        for reason, n in self.removed.most_common():
            yield f"  left out {n:6}  {reason}"
        yield "  tried later, around the best: narrower chunks of D and Dv, one stage more, limits on registers"
        seconds = self.expected_seconds(workers.workers())
        yield f"  on an H200 about {clock(seconds)}; whatever is measured is kept in {self.log.path}"
        if self.log.found:
            yield f"  continues: {self.log.found} measurements are there already"

    def summary(self, results: Sequence[Result]) -> Iterator[str]:
        """Yield a line per class, and one for what failed or was skipped."""
        for result in results:
            winner = result.winner
            if winner is None:
                yield f"{result.key}: no entry, the model decides"
            else:
                yield f"{result.key}: {winner.launch}, {winner.mean_us:.1f} µs, {result.gain(winner):.2f}x untuned"
        for case, reason in self.skipped.items():
            yield f"not measured: {case.id}: {reason}"
        if self.late:
            yield f"{self.late} kernels were compiled only when they were timed, which takes long but changes no figure"
        if failed := len(self.log.errors()):
            yield f"{failed} of the timings failed; tune.md lists them with their errors"

    def keep(self, keys: Collection[Class]) -> None:
        """Leave all other classes to others."""
        self.classes = {key: of_class for key, of_class in self.classes.items() if key in keys}

    def run(self) -> list[Result]:
        """Measure all that is not on record, and return the results by class.

        Raises: SweepError if nothing compiles; DeviceLost.
        """
        self._time(FIRST, self.launches)
        near = {}
        for key in self.classes:
            best = [each.launch for each in self._ranked(FIRST, key, self.launches[key])[:AROUND]]
            near[key] = [
                launch
                for launch in dict.fromkeys(other for each in best for other in space.around(each))
                if launch not in self.launches[key]
                and any(self.unfit(launch, case) is None for case in self.classes[key])
            ]
        self._time(FIRST, near)
        tried = {key: [*self.launches[key], *near[key]] for key in self.classes}
        again = {key: self._best(FIRST, key, tried[key], KEPT_FOR_SECOND_ROUND) for key in self.classes}
        self._time(SECOND_TIME, again)
        finalists = {key: self._best(SECOND_TIME, key, again[key], self.top) for key in self.classes}
        self._finals(finalists)
        return [
            Result(
                space.key(of_class[0], self.gpu),
                tuple(of_class),
                tuple(self._ranked(FINAL, key, finalists[key])),
                {case.id: self.untuned[case] for case in of_class},
            )
            for key, of_class in self.classes.items()
            if of_class
        ]

    def _ranked(self, stage: Stage, key: Class, launches: Sequence[LaunchConfig]) -> list[Ranked]:
        times = {}
        for launch in launches:
            found = {case.id: self.log.time_us(stage.name, case, launch) for case in self.classes[key]}
            times[launch] = {case: us for case, us in found.items() if us is not None}
        return rank(times, self.classes[key]) if self.classes[key] else []

    def _best(self, stage: Stage, key: Class, launches: Sequence[LaunchConfig], n: int) -> list[LaunchConfig]:
        """Return the n best launches of a class, and what its cases run untuned."""
        best = [each.launch for each in self._ranked(stage, key, launches)[:n]]
        return list(dict.fromkeys([*best, *(self.untuned[case] for case in self.classes[key])]))

    def _time(self, stage: Stage, wanted: Mapping[Class, Sequence[LaunchConfig]]) -> None:
        """Time every wanted launch for every case of its class; a launch is checked before it is timed at all."""
        pending = [
            (case, [launch for launch in wanted[key] if self._is_open(stage, case, launch)])
            for key, of_class in self.classes.items()
            for case in of_class
        ]
        pending = [(case, launches) for case, launches in pending if launches]
        self._compile([(case, launch) for case, launches in pending for launch in launches])
        self.progress.start(f"timing, {stage.name} round", sum(len(launches) for _, launches in pending))
        for case, launches in pending:
            opened = self._open(case)
            for launch in launches:
                if opened and self.log.error(case, launch) is None:
                    with self._recorded(stage, case, launch):
                        if stage is FIRST:
                            begin = time.monotonic()
                            self.device.check(launch)
                            self.late += time.monotonic() - begin > LATE_S
                        us = statistics.median(self.device.samples(launch, stage.rounds, stage.warmup))
                        self.log.add(stage.name, case, launch, us)
                self.progress.step()

    def _finals(self, finalists: Mapping[Class, Sequence[LaunchConfig]]) -> None:
        """Time the finalists of every case in turns, so that a drift of the card affects all of them alike."""
        pending = [
            (case, [launch for launch in finalists[key] if self.log.error(case, launch) is None])
            for key, of_class in self.classes.items()
            for case in of_class
            if any(self._is_open(FINAL, case, launch) for launch in finalists[key])
        ]
        self._compile([(case, launch) for case, launches in pending for launch in launches])
        self.progress.start("timing, finals in turns", FINAL_TURNS * sum(len(launches) for _, launches in pending))
        for case, launches in pending:
            opened = self._open(case)
            samples: dict[LaunchConfig, list[float]] = {launch: [] for launch in launches}
            for turn in range(FINAL_TURNS):
                first = turn % len(launches)
                for launch in [*launches[first:], *launches[:first]]:
                    if opened and self.log.error(case, launch) is None:
                        with self._recorded(FINAL, case, launch):
                            samples[launch] += self.device.samples(launch, FINAL.rounds, FINAL.warmup)
                    self.progress.step()
            for launch, times in samples.items():
                if opened and self.log.error(case, launch) is None:
                    self.log.add(FINAL.name, case, launch, statistics.median(times))

    def _is_open(self, stage: Stage, case: Case, launch: LaunchConfig) -> bool:
        known = self.log.time_us(stage.name, case, launch) is not None or self.log.error(case, launch) is not None
        return not known

    def _compile(self, wanted: Sequence[tuple[Case, LaunchConfig]]) -> None:
        """Compile what this process has not, and put what fails on record.

        Raises: SweepError if the very first kernels fail all: that is not their fault.
        """
        by_variant: dict[Variant, list[tuple[Case, LaunchConfig]]] = {}
        for case, launch in wanted:
            by_variant.setdefault(space.variant(case, launch), []).append((case, launch))
        variants = [variant for variant in by_variant if variant not in self._compiled]
        self.progress.start("compiling", len(variants))
        errors = self.compile_all(variants, self.progress.step)
        if variants and len(errors) == len(variants) and not self._compiled and not self.log.found:
            raise SweepError(f"none of {len(variants)} kernels can be compiled: {errors[variants[0]]}")
        for variant, error in errors.items():
            for case, launch in by_variant[variant]:
                self.log.add("compile", case, launch, error=error)
        self._compiled.update(variants)

    def _open(self, case: Case) -> bool:
        """Tell whether the case can be measured; if not, its class goes on without it."""
        try:
            self.device.open(case)
        except NotTimed as reason:
            self.skipped[case] = str(reason)
            for of_class in self.classes.values():
                if case in of_class:
                    of_class.remove(case)
            return False
        return True

    @contextlib.contextmanager
    def _recorded(self, stage: Stage, case: Case, launch: LaunchConfig) -> Iterator[None]:
        """Put whatever the launch raises on record; it is never tried again.

        Raises: DeviceLost if the GPU does not answer any more.
        """
        try:
            yield
        except Exception as error:
            self.log.add(stage.name, case, launch, error=workers.one_line(error))
            if not self.device.alive():
                raise DeviceLost(f"{launch} in {case.id}: {workers.one_line(error)}") from error
