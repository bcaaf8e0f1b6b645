"""The course of a comparison: A B A B, each in a fresh process, so that a drift of the card meets both sides alike."""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ..parallel import cores
from ..saved.run import IDENTITY
from ..tune.log import Progress
from .kept import CourseError, Kept, Key, Outcome, Outcomes, Pair
from .process import ANSWER_S, Process, ProcessLost
from .trees import Tree, Trees

PIECE = 100  # cases of one process: a minute on a GPU, and what a course that is ended has to measure again
MOST_LOST = 3  # processes in one turn: starting one takes longer than what it is to measure
MOST_COMPILERS = 16
Start = Callable[[Tree, Path, Mapping[str, Any]], Process]


class Course:
    """Measure the chosen cases of both trees in turns.

    choice: the arguments of `worker.choose`, which tells the cases. machines: of each tree, by its place, what its
    first process said of the machine, with its calibration.

    Raises: CourseError if a tree cannot be measured, the choice is none, or the card changes on the way.
    """

    def __init__(self, trees: Trees, choice: Mapping[str, Any], progress: Progress, start: Start) -> None:
        self.trees, self.choice, self.progress, self.start = trees, choice, progress, start
        self.machines: dict[Path, dict[str, Any]] = {}
        with self._process(trees.head) as process:
            said = process.said
        if "error" in said:
            raise CourseError(said["error"])
        self.machine: dict[str, Any] = said["machine"]
        self.cases: dict[str, list[str]] = dict(said["cases"])
        self.notes: dict[str, Any] = said["notes"]  # what a saved run says of its cases

    @property
    def on_gpu(self) -> bool:
        return self.machine["gpu"] is not None

    def pieces(self) -> list[list[Key]]:
        """Return the (case, method) pairs in pieces that one process measures."""
        names = list(self.cases)
        parts = [names[at : at + PIECE] for at in range(0, len(names), PIECE)]
        return [[(case, method) for case in part for method in self.cases[case]] for part in parts]

    def about(self, rounds: int) -> dict[str, Any]:
        """Return what a course that was ended and one that goes on must have in common."""
        prints = {"BASE": self.trees.base.fingerprint(), "HEAD": self.trees.head.fingerprint()}
        kernels = self.choice.get("kernels")
        return {
            **prints,
            **{name: self.machine[name] for name in IDENTITY},
            "kernels": kernels,
            "rounds": rounds,
            "cases": self.pieces(),
        }

    def run(self, rounds: int, kept: Kept) -> None:
        """Measure every piece that is not yet kept, and keep it."""
        pieces = self.pieces()
        numbers = [(piece, turn) for piece in range(len(pieces)) for turn in range(rounds)]
        todo = [number for number in numbers if number not in kept.pairs]
        self._compile([key for piece in sorted({piece for piece, _ in todo}) for key in pieces[piece]])
        self.progress.start("", 2 * sum(len(pieces[piece]) for piece, _ in todo))
        for piece, turn in todo:
            of = f", piece {piece + 1} of {len(pieces)}" if len(pieces) > 1 else ""
            kept.add((piece, turn), self._pair(pieces[piece], f"round {turn + 1} of {rounds}{of}"))

    def again(self, keys: Sequence[Key]) -> Pair:
        """Measure some timings once more, in two more processes."""
        self.progress.start("", 2 * len(keys))
        return self._pair(keys, "again")

    def _pair(self, keys: Sequence[Key], stage: str) -> Pair:
        base, head = self.trees.base, self.trees.head
        old = self._turn(base, keys, f"BASE {base.name}, {stage}")
        return old, self._turn(head, keys, f"HEAD {head.name}, {stage}")

    def _turn(self, tree: Tree, keys: Sequence[Key], stage: str) -> Outcomes:
        """Measure in one process, and in another where that one is lost."""
        self.progress.stage = stage
        found: Outcomes = {}
        lost = 0
        while len(found) < len(keys):
            with self._process(tree) as process:
                self._calibrated(process)
                for key in keys[len(found) :]:
                    found[key] = outcome = _measured(process, key)
                    self.progress.step()
                    if outcome.pop("lost", False):
                        lost += 1
                        break
            if lost == MOST_LOST:
                for key in keys[len(found) :]:
                    found[key] = {"failed": f"not tried: {lost} processes were lost before it"}
                    self.progress.step()
        return found

    @contextmanager
    def _process(self, tree: Tree) -> Iterator[Process]:
        """Yield a fresh process and end it.

        Raises: CourseError if it is lost.
        """
        process = self.start(tree, self.trees.suite, self.choice)
        try:
            yield process
        except ProcessLost as error:
            raise CourseError(f"{tree.name} cannot be measured: {error}") from None
        finally:
            process.end()

    def machine_of(self, tree: Tree) -> dict[str, Any]:
        """Return what a process of the tree said of the machine, with its calibration."""
        if tree.root not in self.machines:  # all its processes ended before this command began
            with self._process(tree) as process:
                self._calibrated(process)
        return self.machines[tree.root]

    def _calibrated(self, process: Process) -> None:
        if "error" in process.said:
            raise CourseError(f"{process.tree.name}: {process.said['error']}")
        machine = process.said["machine"]
        for name in IDENTITY:
            if machine[name] != self.machine[name]:
                raise CourseError(f"{name} was {self.machine[name]}, is {machine[name]}; measure on one card alone")
        calibration = process.ask(do="calibrate")["calibration"]
        self.machines.setdefault(process.tree.root, {**machine, "calibration": calibration})

    def _compile(self, keys: Sequence[Key]) -> None:
        """Compile the kernels of both trees side by side, into the cache on disk where each process finds them.

        Users' kernels are compiled when they are first called: nothing is known of what they make of blank tensors.
        """
        if not self.on_gpu or not keys or self.choice.get("kernels"):
            return
        each = max(1, min(cores(), MOST_COMPILERS) // 2)
        self.progress.start(f"compiling the kernels of both with {2 * each} processes", 2 * len(keys))
        with ExitStack() as stack:
            todo: dict[Process, Iterator[Key]] = {}
            for tree in (self.trees.base, self.trees.head):
                of_tree = iter(keys)
                todo |= {stack.enter_context(self._process(tree)): of_tree for _ in range(each)}
            busy = [process for process, left in todo.items() if _compiles_next(process, left)]
            while busy:
                for process in select.select(busy, [], [], ANSWER_S)[0] or list(busy):
                    if not (_has_compiled(process) and _compiles_next(process, todo[process])):
                        busy.remove(process)
                    self.progress.step()


def _compiles_next(process: Process, todo: Iterator[Key]) -> bool:
    """Send the next kernel; tell whether there was one, and a process to take it."""
    with suppress(ProcessLost):  # whatever it is, the measuring process will say it
        _ = process.said
        for key in todo:
            process.send(do="compile", pairs=[key])
            return True
    return False


def _has_compiled(process: Process) -> bool:
    with suppress(ProcessLost):
        process.answer(limit_s=0.0)
        return True
    return False


def _measured(process: Process, key: Key) -> Outcome:
    case, method = key
    try:
        return process.ask(do="measure", case=case, method=method)
    except ProcessLost as error:
        return {"failed": str(error), "lost": True}
