"""What saved runs are judged by: whose cases, and which kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..saved.run import Saved
from ..saved.speedups import TRITON, kernels_among
from ..suite.cases import Case
from ..suite.saved_cases import rebuilt


class ThresholdError(ValueError):
    """Say why no threshold can be computed from these runs, or why it cannot be written."""


@dataclass(frozen=True)
class Own:
    """Hold cases that are judged in place of a matrix, and the name of their file."""

    name: str
    cases: Sequence[Case]


def of_runs(saved: Sequence[Saved]) -> Own | None:
    """Return the cases of the file that the runs are of, or None if they are of the matrix.

    Raises: ThresholdError if they are of different files, or of random cases.
    """
    if random := [one.run.name for one in saved if one.run.random]:
        raise ThresholdError(
            f"{random[0]}: is of random cases, from which no threshold follows; give runs of the matrix"
        )
    files = {one.run.case_file: one for one in saved}
    if set(files) == {""}:
        return None
    if len(files) > 1:
        shown = ", ".join(f"{name or 'the matrix'} ({one.run.name})" for name, one in files.items())
        raise ThresholdError(f"the runs are of different cases: {shown}; say by --sel-cases or --matrix which to judge")
    found = {name: case for one in saved for name, case in rebuilt(one.run.cases).items()}
    return Own(saved[0].run.case_file, list(found.values()))


def kernels(saved: Sequence[Saved]) -> list[str]:
    """Return the kernels that the runs were asked for, ours first."""
    return kernels_among(method for one in saved for _, method in (*one.extras, *one.not_timed))


def takes(saved: Sequence[Saved], kernel: str) -> str:
    """Return what the kernel takes.

    Raises: ThresholdError if no run has it, or it is not the same in all.
    """
    known = kernels(saved)
    if kernel not in (TRITON["op"], *known):
        names = ", ".join(known) or "none"
        raise ThresholdError(f"--kernel: value is {kernel!r}, expected one that the runs have: {names}")
    found = {about: one.run.name for one in saved if (about := one.run.kernels.get(kernel))}
    if len(found) > 1:
        shown = ", ".join(f"{about} ({name})" for about, name in found.items())
        raise ThresholdError(f"the runs differ in what {kernel} is: {shown}")
    return next(iter(found), "").rpartition(", ")[2]
