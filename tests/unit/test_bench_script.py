"""bench/bench_sel_triton.py as a user runs it, and what it refuses."""

from __future__ import annotations

import csv
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "bench_sel_triton.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *arguments]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=hidden)


def test_decode_example_prints_one_line_for_each_method(tmp_path):
    table = tmp_path / "out.md"
    shape = ["--decode", "1", "--H", "4", "--D", "64", "--Dv", "64", "--L_list", "128,256", "--dist", "few"]
    done = run(*shape, "--csv", "--md", str(table))
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(done.stdout.splitlines()))
    methods = ("triton", "packed_sdpa", "packed_sdpa_fused", "triton_core", "sdpa_core")
    assert [(row["L"], row["method"]) for row in rows] == [(L, method) for L in ("128", "256") for method in methods]
    for row in rows:
        if "triton" in row["method"] or row["method"] == "packed_sdpa_fused":
            assert row["note"] == "not timed: no GPU" and row["time_ms"] == ""
        else:
            assert float(row["time_ms"]) > 0 and float(row["gbps"]) > 0 and 0 < float(row["mae"]) < 1e-3
    assert len(table.read_text().splitlines()) == 2 + len(rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dist", "many", "--L_list", "60"], "L: value is 60"),
        (["--decode", "1", "--L_list", "100"], "L: value is 100"),
        (["--decode", "1", "--N", "6"], "N: value is 6"),
        (["--L_list", "64,x"], "invalid literal"),
        (["--dist", "some"], "invalid choice"),
    ],
)
def test_bad_arguments_exit_with_two(options, message, capsys):
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(SCRIPT))["main"](options)
    said = capsys.readouterr()
    assert left.value.code == 2 and message in said.err and not said.out
