"""The perf family `training`: its cases, its passes, the check of gradients before they get a time, its summary."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nsa_sel
from nsa_sel.bench.methods import training
from nsa_sel.bench.methods.contender import WrongResult
from nsa_sel.bench.report import screen
from nsa_sel.bench.saved.run import Saved
from nsa_sel.bench.suite import cases
from nsa_sel.bench.suite.inputs import make_inputs

SMOKE = cases.matrix("smoke", family="training")


def test_cases_of_training_are_there_only_when_asked_for_and_each_pass_is_one():
    full = cases.matrix("full", family="training")
    assert not any(case.family == "training" for case in cases.matrix("full"))
    assert {(case.S, case.H, case.layout, case.name) for case in full} == {
        (S, H, layout, of_pass)
        for S in (1024, 4096, 16_384)
        for H in (4, 16)
        for layout in ("local", "random")
        for of_pass in ("forward", "backward", "both")
    }
    assert {case.methods for case in full} == {("triton", "dense", "packed_sdpa")}
    assert {case.H for case in cases.matrix("hot", family="training")} == {16}
    assert set(SMOKE).isdisjoint(full) and [case.name for case in SMOKE] == ["forward", "backward", "both"]


def gradients():
    x = make_inputs(SMOKE[0], "cpu")
    upstream = torch.randn(x.q.shape, generator=torch.Generator().manual_seed(0)).to(x.q.dtype)
    leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v)]
    out = nsa_sel.reference.packed_sdpa(*leaves, x.ranges, min_len=x.min_len, max_len=x.max_len)
    return x, upstream, torch.autograd.grad(out, leaves, upstream)


def test_right_gradients_pass_and_a_key_that_is_dropped_does_not():
    x, upstream, found = gradients()
    assert 0 < training.verify("a", x, upstream, found) < 0.05
    for which in range(3):
        wrong = [t.clone() for t in found]
        wrong[which] *= 1.2
        with pytest.raises(WrongResult, match="a: relative error of query 127 and token .*expected 1.2e-01"):
            training.verify("a", x, upstream, wrong)


def test_the_check_is_that_of_autograd_in_float64():
    x, upstream, _ = gradients()
    leaves = [t.double().requires_grad_() for t in (x.q, x.k, x.v)]
    out = nsa_sel.reference.oracle(*leaves, x.ranges)
    dq, dk, dv = torch.autograd.grad(out, leaves, upstream.double())
    of_group = x.__class__(x.q[0, :, 0], x.k[0, 0], x.v[0, 0], x.ranges[0, :, 0], x.min_len, x.max_len)
    for s, token in ((127, 0), (40, 33)):
        found = training.exact(of_group, upstream[0, :, 0], s, token)
        for mine, want in zip(found, (dq[0, s, 0], dk[0, 0, token], dv[0, 0, token]), strict=True):
            torch.testing.assert_close(mine, want, atol=1e-10, rtol=1e-9)


def test_the_smoke_form_runs_on_the_cpu_and_is_summed_up(tmp_path):
    root, saved = Path(nsa_sel.__file__).parents[2], tmp_path / "run.json"
    options = ["--sel-family=training", "--sel-matrix=smoke", f"--benchmark-json={saved}"]
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "tests/perf", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 0 and "3 x triton: no GPU" in done.stdout, done.stdout + done.stderr
    assert "training: time, and memory at its peak" in done.stdout
    extras = Saved.load(saved).extras
    assert set(extras) == {(case.id, method) for case in SMOKE for method in ("dense", "packed_sdpa")}
    assert {extra["pass"] for extra in extras.values()} == {"forward", "backward", "both"}


def test_the_summary_names_the_memory_at_its_peak():
    timed = {"family": "training", "case": "a", "method": "triton", "device_us": 1500.0, "peak_bytes": 2.5e8}
    assert screen.training_screen([timed])[1:] == ["a: triton 1.50 ms, 0.25 GB"]
    assert screen.training_screen([timed | {"family": "rows"}]) == []
