"""What a course has measured so far, on disk: a line for every pair of processes, from which `--resume` goes on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..tables import replace_file

Key = tuple[str, str]  # case id, method
Outcome = dict[str, Any]  # `samples` in seconds and `extra`; or `not_timed`; or `failed`: why there are none
Outcomes = dict[Key, Outcome]
Pair = tuple[Outcomes, Outcomes]  # of BASE and of HEAD, measured one after the other
Number = tuple[int, int]  # piece, round


class CourseError(RuntimeError):
    """Say in one line why two trees cannot be measured, and what to do."""


class Kept:
    """Hold the pairs of a course, and append each to a file as soon as it is there.

    about: what all of them must have in common: trees, cases, card, versions.

    Raises: CourseError if the file is to be gone on with and is of something else; OSError if it cannot be written.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], resume: bool) -> None:
        self.path, self.problem = path, ""
        self.pairs: dict[Number, Pair] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if resume and path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # what follows the last newline was cut off
        if whole:
            try:
                head, *lines = map(json.loads, whole.splitlines())
                other = [name for name, value in json.loads(json.dumps(about)).items() if head.get(name) != value]
                self.pairs = {tuple(number): (_outcomes(base), _outcomes(new)) for number, base, new in lines}
            except (ValueError, TypeError, AttributeError):
                raise CourseError(f"--resume: {path} is damaged; measure without --resume") from None
            if other:
                raise CourseError(f"--resume: {other[0]} is not what it was in {path}; measure without --resume")
        replace_file(path, whole or json.dumps(about) + "\n")

    def add(self, number: Number, pair: Pair) -> None:
        """Keep a pair; a file that cannot be written costs only the way to go on, and is noted in `problem`."""
        self.pairs[number] = pair
        if self.problem:  # half a line may stand at the end
            return
        sides = [[[*key, outcome] for key, outcome in side.items()] for side in pair]
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([number, *sides]) + "\n")
        except OSError as error:
            self.problem = f"what was measured cannot be kept for --resume: {error.strerror}"

    def finish(self) -> None:
        """Remove the file: the course is over."""
        with contextlib.suppress(OSError):  # not there, or its folder holds those of other courses
            self.path.unlink()
            self.path.parent.rmdir()


def _outcomes(lines: Iterable[tuple[str, str, Outcome]]) -> Outcomes:
    return {(case, method): outcome for case, method, outcome in lines}
