"""One measuring process: the suite in which this module lies times the package whose name it is given.

It writes one line when it has started and one for each line that it reads, both JSON, and ends with its input. Of the
measured package it uses only the public `selection_attention`.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..methods.contender import NotTimed
from ..methods.prepare import Kernel
from ..saved.speedups import SDPA_FORMS, TRITON
from ..session import Session
from ..suite import case_file, cases
from ..suite.cases import Case
from ..suite.saved_cases import definitions
from ..timer import timing
from ..timer.machine import environment

# The kernel in both scopes, and SDPA on packed rows: what no commit changes shows how far the machine itself moved.
METHODS = (TRITON["op"], TRITON["core"], *SDPA_FORMS["core"])


def choose(
    matrix: str | None, dtype: str, family: str | None, texts: Sequence[str], file: str | None = None
) -> list[Case]:
    """Return the cases of a matrix (None: hot on a GPU, else smoke) that have every one of the texts in their id.

    file: a file of cases, in place of the matrix.

    Raises: ValueError for an unknown name, a bad file, or if none is left.
    """
    if file is None:
        chosen = cases.matrix(matrix or ("hot" if torch.cuda.is_available() else "smoke"), dtype, family)
    else:
        chosen = case_file.read(file, dtype)
    chosen = [case for case in chosen if all(text in case.id for text in texts)]
    if not chosen:
        raise ValueError(f"-k: value is {' '.join(texts)!r}, expected texts that a case has in its id")
    return chosen


class Worker:
    """Answer requests about the chosen cases."""

    def __init__(self, kernel: Kernel, chosen: Sequence[Case]) -> None:
        self.kernel, self.cases = kernel, {case.id: case for case in chosen}

    @functools.cached_property
    def session(self) -> Session:
        """Return the session, which calibrates itself when it is first needed."""
        return Session(kernel=self.kernel)

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a request asks for: `calibrate`, `compile` or `measure`."""
        if request["do"] == "calibrate":
            return {"calibration": self.session.calibration}
        if request["do"] == "compile":
            return {"failed": sum(not self.compiles(*pair) for pair in request["pairs"])}
        return self.measure(self.cases[request["case"]], request["method"])

    def compiles(self, case: str, method: str) -> bool:
        """Run the kernel once on tensors of the case's shapes that select nothing; it then lies in Triton's cache."""
        from ..precompile import blank  # needs Triton

        try:
            x = blank(self.cases[case], method == TRITON["core"], "cuda")
            self.kernel(x.q, x.k, x.v, x.ranges, min_len=x.min_len, max_len=x.max_len)
            torch.cuda.synchronize()
        except Exception:  # its measurement will say why
            return False
        finally:
            torch.cuda.empty_cache()
        return True

    def measure(self, case: Case, method: str) -> dict[str, Any]:
        """Return the method's samples in seconds and its extra_info, or why it has none."""
        try:
            with self.session.ready(case, method) as (prepared, extra):
                samples = self.session.timer.samples(prepared.call, timing.ROUNDS, timing.WARMUP_ROUNDS)
                return {"samples": samples, "extra": {**extra, **self.session.figures(case, prepared, samples)}}
        except NotTimed as reason:
            return {"not_timed": str(reason)}
        except Exception as error:  # of whatever the measured commit raises; the other cases go on
            message = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            return {"failed": message, "lost": self.session.lost()}


def serve(name: str, choice: Mapping[str, Any]) -> None:
    """Measure the package `name` for as long as there are requests on standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a compiler prints is no answer

    def say(answer: Mapping[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    package = importlib.import_module(name)
    first = {"package": str(Path(package.__file__ or "").parent), "machine": environment()}
    try:
        chosen = choose(**choice)
    except ValueError as error:
        say({**first, "error": str(error)})
        return
    pairs = [[case.id, [m for m in METHODS if m in case.methods]] for case in chosen]
    notes = {"case_file": Path(choice["file"]).name, "cases": definitions(chosen)} if choice["file"] else {}
    say({**first, "cases": pairs, "notes": notes})
    worker = Worker(functools.partial(package.selection_attention, backend="triton"), chosen)
    for line in sys.stdin:
        say(worker.answer(json.loads(line)))


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
