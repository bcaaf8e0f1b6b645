"""One measuring process: the suite in which this module lies times the package whose name it is given.

It writes one line when it has started and one for each line that it reads, both JSON, and ends with its input. Of the
measured package it uses only the public `selection_attention`; users' kernels, if any are given, are measured instead.
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
from ..saved.speedups import CORE_SUFFIX, SDPA_FORMS, TRITON, kernel_of
from ..session import Session
from ..suite import case_file, random_cases
from ..suite.cases import Case
from ..suite.kernels import UserKernel, parse
from ..suite.saved_cases import definitions
from ..timer import timing
from ..timer.machine import environment

YARDSTICK = SDPA_FORMS["core"]  # what no commit changes shows how far the machine itself moved


def choose(
    matrix: str | None,
    dtype: str,
    family: str | None,
    texts: Sequence[str],
    file: str | None = None,
    seed: int | None = None,
    count: int | None = None,
) -> list[Case]:
    """Return the cases of a matrix (None: hot on a GPU, else smoke) that have every one of the texts in their id.

    file: a file of cases, in place of the matrix. seed, count: of the matrix `random`.

    Raises: ValueError for an unknown name, a bad file, or if none is left.
    """
    if file is None:
        name = matrix or ("hot" if torch.cuda.is_available() else "smoke")
        chosen = random_cases.of_matrix(name, dtype, family, seed, count)
    else:
        chosen = case_file.read(file, dtype)
    chosen = [case for case in chosen if all(text in case.id for text in texts)]
    if not chosen:
        raise ValueError(f"-k: value is {' '.join(texts)!r}, expected texts that a case has in its id")
    return chosen


def pairs(chosen: Sequence[Case], kernels: Sequence[UserKernel]) -> dict[str, list[str]]:
    """Return the methods to be measured by case: each kernel's, where it can express the case, and the yardstick.

    Raises: ValueError if no kernel can express any of the cases.
    """
    found = {}
    for case in chosen:
        ours = [m for kernel in kernels for m in kernel.methods(case) if kernel.expressible(case, m)]
        if ours:
            found[case.id] = [*ours, *(m for m in YARDSTICK if m in case.methods)]
    if not found:
        takes = ", ".join(f"{kernel.name} takes {kernel.takes}" for kernel in kernels)
        raise ValueError(f"--sel-takes: {takes}, expected what one of the cases can be said in")
    return found


class Worker:
    """Answer requests about the chosen cases. kernels: what is measured."""

    def __init__(self, kernels: Sequence[UserKernel], chosen: Sequence[Case]) -> None:
        self.kernels = {kernel.name: kernel for kernel in kernels}
        self.cases = {case.id: case for case in chosen}

    @functools.cached_property
    def session(self) -> Session:
        """Return the session, which calibrates itself when it is first needed."""
        return Session(kernels=self.kernels)

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
            x = blank(self.cases[case], method.endswith(CORE_SUFFIX), "cuda")
            self.kernels[kernel_of(method)](x.q, x.k, x.v, x.ranges, min_len=x.min_len, max_len=x.max_len)
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
    """Measure the package `name` for as long as there are requests on standard input.

    choice: the arguments of `choose`; and `kernels`, the values of --sel-kernel and --sel-takes, to measure those.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a compiler prints is no answer

    def say(answer: Mapping[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    first: dict[str, Any] = {"machine": environment()}
    options = dict(choice)
    try:
        kernels, first["package"] = _kernels(name, options.pop("kernels", None))
        chosen = choose(**options)
        asked = pairs(chosen, kernels)
    except ValueError as error:
        say({**first, "error": str(error)})
        return
    notes: dict[str, Any] = {"case_file": Path(choice["file"]).name} if choice["file"] else {}
    if "seed" in choice:
        notes["random"] = {"seed": choice["seed"], "count": choice["count"]}
    notes |= {"cases": definitions(chosen)} if notes else {}
    say({**first, "cases": list(asked.items()), "notes": notes})
    worker = Worker(kernels, chosen)
    for line in sys.stdin:
        say(worker.answer(json.loads(line)))


def _kernels(name: str, given: tuple[list[str], list[str]] | None) -> tuple[tuple[UserKernel, ...], str]:
    """Return the kernels to be measured, and where the code lies that a commit changes.

    Raises: ValueError
    """
    if given is None:
        package = importlib.import_module(name)
        function = functools.partial(package.selection_attention, backend="triton")
        return (UserKernel(TRITON["op"], "", function),), str(Path(package.__file__ or "").parent)
    kernels = parse(*given)
    files = [sys.modules[kernel.spec.partition(":")[0]].__file__ or "" for kernel in kernels]
    of_the_tree = [file for file in files if Path(file).resolve().is_relative_to(Path.cwd().resolve())]
    return kernels, (of_the_tree or files)[0]


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
