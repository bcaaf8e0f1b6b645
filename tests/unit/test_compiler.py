"""Triton's real compiler, of whatever version is installed, and its cache: what it accepts, and what is said of faults.

The interpreter, which is plain Python, accepts what an older compiler refuses.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from nsa_sel.kernel import launch_config
from tests.programs import python

ROOT = Path(__file__).parents[2]
ONE = [[80, 1, ["gather", 16, 64, 64, 1, 1]]]  # compute capability, spans per row, LaunchConfig


def start(jobs: list, cache: Path, full: bool = False) -> list[str]:
    """Start these kernels in a process of its own, on a full disk or not, and return what is said of each."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT / "src"), "TRITON_CACHE_DIR": str(cache)}
    program = [str(Path(__file__).with_name("start_kernel.py")), json.dumps(jobs)]
    if full:  # no file can be written, that of a program's output neither
        pipes = {"capture_output": True, "text": True, "preexec_fn": no_room}
        done = subprocess.run([sys.executable, *program], env=env, timeout=120, **pipes)
    else:
        done = python(*program, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_kind_of_launch_without_tma_compiles(tmp_path):
    jobs = [
        [89, n_spans, [load, 32, 64, 64, 4, 2, splits]]
        for load in launch_config.LOADS
        if load != "tma"
        for n_spans in (1, 5)
        for splits in (1, 4)
    ]
    assert start(jobs, tmp_path) == ["compiled"] * 8
    assert len(list(tmp_path.rglob("*.cubin"))) == 8


def no_room() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


@pytest.mark.parametrize("fault", ("no folder", "full"))
def test_a_kernel_that_cannot_be_compiled_says_why_in_one_line(tmp_path, fault):
    if fault == "no folder":  # as a read-only one, which root could write to
        (tmp_path / "file").write_text("in the way")
        (said,) = start(ONE, tmp_path / "file" / "kernels")
        reason = "NotADirectoryError"
    else:
        (said,) = start(ONE, tmp_path / "kernels", full=True)
        reason = "File too large"
    assert re.fullmatch(
        rf"the kernel \(gather .+\) cannot be compiled or started: .*{reason}.+kernels: clear it.+", said
    )


def test_a_damaged_cache_is_compiled_anew_or_named(tmp_path):
    assert start(ONE, tmp_path) == ["compiled"]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (said,) = start(ONE, tmp_path)
    assert said == "compiled" or ("cannot be compiled or started" in said and f"{tmp_path}: clear it" in said)
