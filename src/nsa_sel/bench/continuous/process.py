"""One measuring process, seen from outside: started in a tree, asked line by line, and ended."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .trees import MEASURED, RUNNING, SUITE, Tree

ANSWER_S = 300.0  # for one answer: compiling a kernel and measuring take seconds, importing torch from a cold disk more
WORKER = f"{SUITE}.{__package__.partition('.')[2]}.worker"


class ProcessLost(RuntimeError):
    """Say in one line why a measuring process gives no more answers."""


class Process:
    """Own one process, which imports the measured package from a tree, and the suite from its copy.

    said: its first line, which names the machine, where the package was imported from, and the cases that were chosen.
    """

    def __init__(self, tree: Tree, suite: Path, choice: Mapping[str, Any]) -> None:
        self.tree = tree
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  closed by `end`
        self._process = subprocess.Popen(
            (sys.executable, "-m", WORKER, MEASURED, json.dumps(choice)),
            cwd=tree.root,
            env=environment(tree, suite),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,  # Ctrl-C is for the command, which then ends its processes
        )
        self._said: dict[str, Any] | None = None

    @property
    def said(self) -> dict[str, Any]:
        """Raises: ProcessLost if it could not start, or imported another package than the tree's."""
        if self._said is None:
            said = self.answer()
            package = Path(said.get("package", self.tree.package)).resolve()  # none: it says why it cannot measure
            if not package.is_relative_to(self.tree.package.resolve()):
                what = "the kernel" if self.tree.foreign else MEASURED
                raise ProcessLost(f"{what} was imported from {package}, expected {self.tree.package}")
            self._said = said
        return self._said

    def fileno(self) -> int:
        """Return what `select` waits for: the pipe of the answers."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def send(self, **request: Any) -> None:
        """Ask for something; `answer` then waits for what it says."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # dead: no answer either
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def answer(self, limit_s: float = ANSWER_S) -> dict[str, Any]:
        """Return the next answer.

        Raises: ProcessLost if there is none in time, or the process died.
        """
        assert self._process.stdout is not None
        # One line is written for each line read, so that none can wait in the buffer while select looks at the pipe.
        if not select.select([self._process.stdout], [], [], limit_s)[0]:
            self.end()
            raise ProcessLost(f"no answer in {limit_s:g} s")
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise ProcessLost(f"the process died: {self.end()}")
        return json.loads(line)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and return its answer.

        Raises: ProcessLost.
        """
        _ = self.said
        self.send(**request)
        return self.answer()

    def end(self) -> str:
        """Kill the process; return the last line that it wrote to standard error, or its exit status."""
        if self._errors.closed:
            return "ended before"
        self._process.kill()
        status = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):  # a line that was never read
                if pipe is not None:
                    pipe.close()
        with self._errors as errors:
            errors.seek(0)
            said = [line.strip() for line in errors if line.strip()]
        return said[-1][:300] if said else f"exit status {status}"


def environment(tree: Tree, suite: Path) -> dict[str, str]:
    """Return the environment of a measuring process: toggles are the tree's own, and nothing is written into it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NSA_")}
    kept.pop("TRITON_INTERPRET", None)  # the interpreter is never timed
    paths = [*tree.paths, suite]
    if tree.foreign:  # a kernel may use this package
        paths.append(RUNNING.parent)
    return {**kept, "PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONDONTWRITEBYTECODE": "1"}
