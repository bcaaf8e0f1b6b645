"""A measuring session by the wall clock: what it saves, what it refuses, and how a broken one ends."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import nsa_sel
from nsa_sel.bench import session
from nsa_sel.bench.methods import contender
from nsa_sel.bench.methods.contender import NotTimed, WrongResult
from nsa_sel.bench.session import Session, is_planted
from nsa_sel.bench.suite import cases
from nsa_sel.bench.timer.machine import environment
from tests.programs import python

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


def test_what_a_method_finds_after_its_timing_is_saved_too(cpu_bench, monkeypatch):
    timed = []
    prepare = session.prepare

    def with_share(state, method, kernels):
        made = prepare(state, method, kernels)
        return replace(made, after=lambda: {"shared": len(timed)})

    monkeypatch.setattr(session, "prepare", with_share)
    monkeypatch.setattr(cpu_bench.timer, "samples", lambda *asked: timed.append(asked) or [1.0, 1.0])
    assert cpu_bench.measure(SMALL, "packed_sdpa")["shared"] == len(timed) > 0


@pytest.mark.parametrize("method", ["triton", "triton_core", "packed_sdpa_fused", "packed_sdpa_compiled"])
def test_what_needs_a_gpu_is_not_timed_without_one(cpu_bench, method):
    with pytest.raises(NotTimed, match="no GPU"):
        cpu_bench.measure(SMALL, method)
    assert cpu_bench.not_timed == {(SMALL.id, method): "no GPU"}


def test_a_wrong_result_is_no_reason_to_have_no_time(cpu_bench, monkeypatch):
    monkeypatch.setattr(contender, "check", lambda *arguments: (_ for _ in ()).throw(WrongResult("3 rows")))
    with pytest.raises(WrongResult):
        cpu_bench.measure(SMALL, "packed_sdpa")
    assert not cpu_bench.not_timed


def test_one_case_is_held_at_a_time(cpu_bench):
    first = cpu_bench.state(SMALL)
    assert cpu_bench.state(SMALL) is first
    other = cpu_bench.state(cases.rows_case("bf16", "few", 4, 64, 64, 64, 8))
    assert other is not first and cpu_bench.state(SMALL) is not first


def test_a_tenth_of_the_kernels_benchmarks_is_planted_and_none_of_the_yardstick():
    pairs = [(case, method) for case in cases.matrix("full", family="rows,decode,peers") for method in case.methods]
    planted = [pair for pair in pairs if is_planted(*pair)]
    assert {method for _, method in planted} == set(cases.TRITON_METHODS)
    assert 0.08 < len(planted) / sum(method in cases.TRITON_METHODS for _, method in pairs) < 0.12


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
    chosen = ["tests/perf", "--sel-matrix=smoke", "-k", "sdpa_core"]
    paths = os.pathsep.join([str(tmp_path), str(root / "src"), os.environ.get("PYTHONPATH", "")])
    hidden = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    done = python("-m", "pytest", "-q", "-p", "broken", *chosen, env=hidden)
    assert done.returncode == 1 and said in done.stdout and "out of order" in done.stdout
    assert len(done.stdout.splitlines()) < 60, done.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a pseudo-terminal")
@pytest.mark.parametrize("on_a_terminal", [True, False])
def test_a_run_shows_the_time_left_in_place_of_a_letter_per_benchmark(on_a_terminal):
    root = Path(nsa_sel.__file__).parents[2]
    chosen = ["--sel-matrix=smoke", "--sel-family=decode", "-k", "t512 and (packed_sdpa or sdpa_core)"]
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/perf", *chosen]
    env = {**os.environ, "PYTHONPATH": str(root / "src"), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120", "NO_COLOR": "1"}
    if on_a_terminal:
        ours, theirs = os.openpty()
        started = [sys.executable, *command]
        with subprocess.Popen(started, cwd=root, env=env, stdout=theirs, stdin=subprocess.DEVNULL) as process:
            os.close(theirs)
            shown = "".join(_read(ours))
        assert process.returncode == 0, shown
    else:
        shown = python(*command, env=env).stdout
    assert re.search(r"\[#+\] (\d+)/\1, 0:00 left: benchmarks", shown), shown
    assert ("\r[#" in shown) == on_a_terminal
    assert re.search(r"\b2 passed", shown) and re.search(r"\b1 skipped", shown) and " no GPU" in shown
    assert not re.search(r"^\r?[.s]+\s*(\[ *\d+%\])?\r?$", shown, re.MULTILINE)


def _read(terminal: int) -> Iterator[str]:
    """Yield what is written to a pseudo-terminal until its other end is closed, which ends in an error on Linux."""
    with contextlib.suppress(OSError), os.fdopen(terminal, "r", newline="") as stream:
        yield from stream
