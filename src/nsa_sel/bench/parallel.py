"""In how many processes the parity suite runs, and what it then takes on an H200.

Almost all of its time goes to compiling kernels, one after another. The processes of pytest-xdist compile side by side
and share the GPU. Tests that need much of its memory are marked `much_memory`, and run one at a time.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch

from .timer.machine import one_of_many

MOST_PROCESSES = 14  # more were not tried
ORDINARY_TEST_BYTES = 600_000_000  # of GPU memory; a test that needs more is marked `much_memory`
LARGEST_TEST_BYTES = 6_000_000_000  # K and V beyond 2**31 elements, and the paged cases of 65,536 tokens
PROCESS_BYTES = 2 << 30  # a context takes about a quarter of it; torch caches more than one ordinary test needs
# Seconds on an H200, torch 2.11 and Triton 3.6, measured on 2026-11-29. One process: 449 tests, 16 cores. Several: 525
# tests in 14 processes, on 32 cores of which 14 compiled other kernels meanwhile.
ONE_PROCESS_S = 556.0
ALL_PROCESSES_S = 14 * 178.0  # of all of them together


def cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def affordable(memory: int, n_cores: int) -> int:
    """Return in how many processes the suite can run. memory: bytes of GPU memory that all of them may use."""
    return max(1, min(n_cores, MOST_PROCESSES, (memory - LARGEST_TEST_BYTES) // PROCESS_BYTES))


def expected() -> int:
    """Return in how many processes the suite will run on this GPU if it is idle; makes no context on it."""
    if find_spec("xdist") is None:
        return 1
    return affordable(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory, cores())


def expected_seconds(processes: int) -> float:
    """Return what the suite takes on an H200."""
    return ONE_PROCESS_S if processes == 1 else min(ONE_PROCESS_S, ALL_PROCESSES_S / processes)


def options(argv: Sequence[str]) -> list[str]:
    """Return the options with which pytest runs the suite in several processes; none where it is to be one process.

    That is: without pytest-xdist; where the caller chooses, by -n or -p no:xdist; for a rank of torchrun, which is one
    of many already; and for a caller's own kernels and cases, whose need of memory nobody knows.
    """
    parser = argparse.ArgumentParser("nsa-sel parity", add_help=False, allow_abbrev=False)
    parser.add_argument("-p", action="append", default=[])
    for names in (("-n", "--numprocesses"), ("--sel-kernel",), ("--sel-cases",), ("--sel-matrix",)):
        parser.add_argument(*names, dest="own")
    given, _ = parser.parse_known_args([*shlex.split(os.environ.get("PYTEST_ADDOPTS", "")), *argv])
    if find_spec("xdist") is None or given.own is not None or "no:xdist" in given.p or one_of_many():
        return []
    return ["-n", "auto", "--benchmark-disable"]  # pytest-benchmark warns of what it cannot time in several processes


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process is in here with this file, and let no other in before the end."""
    import fcntl  # not on Windows, where no kernel runs

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
