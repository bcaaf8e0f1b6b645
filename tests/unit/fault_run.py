"""Run tests of a copy of the repository, each run in a process that has imported torch, Triton and pytest already.

Importing them takes longer than most of these runs. Nothing of the package is imported here: a run takes its copy's.
"""

from __future__ import annotations

import contextlib
import gc
import io
import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.pool import Pool
from pathlib import Path

import pytest


def processes(count: int) -> Pool:
    """Return a pool that forks a fresh process for each run, with Triton as interpreter."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "triton", "numpy", "pytest"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        return context.Pool(count, maxtasksperchild=1)


def run(folder: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Run these tests of the copy in `folder`, on nothing but the copy; return the exit code and what was printed."""
    for name in [name for name in os.environ if name.startswith("NSA_")]:
        del os.environ[name]
    os.environ |= {"PYTHONPATH": str(folder / "src"), "NSA_TEST_TRITON_SEL": "1"}
    sys.path.insert(0, str(folder / "src"))
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        gc.freeze()  # pytest collects garbage at its end: not among all of torch
        code = pytest.main(["-q", "-x", "--tb=native", "-p", "no:cacheprovider", *tests])
    return int(code), said.getvalue()
