"""A measuring session by the wall clock: what it saves, what it refuses, and how a broken one ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import nsa_sel
from nsa_sel.bench.methods.contender import NotTimed
from nsa_sel.bench.session import Session, is_planted
from nsa_sel.bench.suite import cases
from nsa_sel.bench.timer.machine import environment

SMALL = cases.rows_case("bf16", "mixed", 4, 64, 64, 64, 8)


@pytest.fixture
def cpu_bench(monkeypatch):
    environment()  # kept for the process: it must not be read first where the GPU is hidden
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    return Session()


def test_a_measurement_says_what_ran_and_has_every_pinned_key(cpu_bench):
    found = cpu_bench.measure(SMALL, "packed_sdpa", rounds=6, warmup=1)
    pinned = (
        "case family scope method dtype layout H D Dv L N bytes gbps limit_us pct_of_limit ci95_us call_us "
        "call_ci95_us graph_us graph_ci95_us bytes_rows mae sdpa_backend seed gpu gpu_id driver torch triton"
    )
    assert set(pinned.split()) <= set(found)
    assert (found["case"], found["scope"], found["seed"]) == (SMALL.id, "op", SMALL.seed)
    assert found["ci95_us"][0] <= found["median"] * 1e6 <= found["ci95_us"][1]
    assert found["gbps"] == pytest.approx(found["bytes"] / found["median"] / 1e9)
    assert 0 < found["mae"] < 1e-3


@pytest.mark.parametrize("method", ["triton", "triton_core", "packed_sdpa_compiled"])
def test_what_needs_a_gpu_is_not_timed_without_one(cpu_bench, method):
    with pytest.raises(NotTimed, match="no GPU"):
        cpu_bench.measure(SMALL, method)


def test_one_case_is_held_at_a_time(cpu_bench):
    first = cpu_bench.state(SMALL)
    assert cpu_bench.state(SMALL) is first
    other = cpu_bench.state(cases.rows_case("bf16", "few", 4, 64, 64, 64, 8))
    assert other is not first and cpu_bench.state(SMALL) is not first


def test_a_tenth_is_planted():
    pairs = [(case, method) for case in cases.matrix("full") for method in case.methods]
    share = sum(is_planted(*pair) for pair in pairs) / len(pairs)
    assert 0.08 < share < 0.12


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("session.calibrate = fail", "the instrument cannot be calibrated"),
        ("contender.check = fail; session.Session.lost = lambda self: True", "the GPU no longer answers"),
    ],
    ids=["no calibration", "GPU lost"],
)
def test_a_run_that_cannot_go_on_ends_with_one_clear_line(tmp_path, broken, said):
    imports = "from nsa_sel.bench import session; from nsa_sel.bench.methods import contender"
    (tmp_path / "broken.py").write_text(f"{imports}\ndef fail(*_): raise RuntimeError('out of order')\n{broken}\n")
    root = Path(nsa_sel.__file__).parents[2]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "broken",
        "tests/perf",
        "--sel-matrix=smoke",
        "-k",
        "sdpa_core",
    ]
    paths = os.pathsep.join([str(tmp_path), str(root / "src"), os.environ.get("PYTHONPATH", "")])
    hidden = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=hidden)
    assert done.returncode == 1 and said in done.stdout and "out of order" in done.stdout
    assert len(done.stdout.splitlines()) < 60, done.stdout
