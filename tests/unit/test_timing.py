"""The instrument's arithmetic, its wall-clock form, and the summary: no GPU needed."""

from __future__ import annotations

import importlib.metadata
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nsa_sel
from nsa_sel.bench import precompile
from nsa_sel.bench.methods import compiled, contender, prepare
from nsa_sel.bench.methods.contender import CaseState, NotTimed, Prepared, WrongResult
from nsa_sel.bench.report import screen
from nsa_sel.bench.session import Session, is_planted
from nsa_sel.bench.suite import cases
from nsa_sel.bench.suite.cases import Case
from nsa_sel.bench.timer import timing
from nsa_sel.bench.timer.calibration import calibrate, limit_us
from nsa_sel.bench.timer.machine import environment
from nsa_sel.bench.timer.timing import WallTimer, median_ci, plan
from nsa_sel.bench.tune.space import Variant
from nsa_sel.kernel.launch_config import LaunchConfig

SMALL = cases.rows_case("bf16", "mixed", 4, 64, 64, 64, 8)


@pytest.mark.parametrize(("n", "ranks"), [(6, (1, 6)), (10, (2, 9)), (20, (6, 15)), (50, (18, 33)), (100, (40, 61))])
def test_median_ci_takes_the_ranks_of_the_textbook(n, ranks):
    samples = [float(rank) for rank in range(1, n + 1)]
    random.Random(n).shuffle(samples)
    assert median_ci(samples) == ranks
    # The pair covers 95 % and the next narrower one does not.
    low = ranks[0]
    tail = sum(math.comb(n, i) for i in range(low)) / 2**n
    assert 1 - 2 * tail >= 0.95 > 1 - 2 * (tail + math.comb(n, low) / 2**n)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_median_ci_of_too_few_samples_is_their_range(n):
    assert median_ci([float(i) for i in range(n)]) == (0.0, n - 1.0)


def test_limit_is_linear_between_points_flat_below_and_proportional_beyond():
    curve = [[1e6, 4.0], [2e6, 5.0], [4e6, 9.0]]
    assert [limit_us(size, curve) for size in (1e3, 1e6, 1.5e6, 2e6, 3e6, 4e6, 8e6)] == [4, 4, 4.5, 5, 7, 9, 18]


@pytest.mark.parametrize(
    ("call_us", "expected"), [(10, (20, 100)), (50, (20, 100)), (200, (20, 25)), (1000, (10, 10)), (30_000, (6, 1))]
)
def test_plan_keeps_the_budget_with_as_many_calls_as_it_can(call_us, expected):
    assert plan(call_us, 0.1, calls=100) == expected


def test_plan_of_a_graph_keeps_its_calls_and_replays_it_less_often():
    assert [plan(us, 0.02, calls=20, fewest=20) for us in (10, 100, 160, 1000)] == [(20, 20), (10, 20), (6, 20), (6, 3)]


def test_wall_timer_gives_one_sample_a_round_and_calls_the_warm_ups_too():
    calls = []
    samples = WallTimer().samples(lambda: calls.append(1), rounds=7, warmup=2)
    assert len(samples) == 7 and len(calls) == 9 and min(samples) > 0


def test_tick_belongs_to_the_timer_in_use():
    class Counter(WallTimer):
        def tick(self) -> float:
            return 42.0

    timing.use(Counter())
    try:
        assert timing.tick() == 42.0
    finally:
        timing.use(WallTimer())


def test_calibration_is_part_of_the_environment():
    values = calibrate(WallTimer())
    assert environment()["calibration"] == values and values["tick_us"] > 0


@pytest.mark.skipif(
    importlib.metadata.version("triton").startswith("3.0."), reason="its interpreter ignores the mask of a scalar store"
)
def test_the_streaming_kernel_reads_every_element_and_writes_nothing_for_zeros():
    script = """
import torch
from nsa_sel.bench.timer import streaming
for n in (3 * 4096, 1000):
    x, out = torch.zeros(n, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    for at in (None, 0, n // 2, n - 1):
        x.zero_()
        out.fill_(-1)
        if at is not None:
            x[at] = 7
        streaming._read[(3,)](x, out, n, BLOCK=1024)
        assert out.item() == (-1 if at is None else 7), (n, at, out)
"""
    path = os.pathsep.join([str(Path(nsa_sel.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    interpreted = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", script], env=interpreted, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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


@pytest.mark.parametrize("family", ["rows", "ragged"])
def test_both_references_pass_the_gate_and_a_wrong_row_fails_it(family):
    case = SMALL if family == "rows" else Case("ragged", "bf16", "few", 4, 64, 64, 64, 8)
    state = CaseState(case, WallTimer())
    for method in ("packed_sdpa", "sdpa_core"):
        assert contender.check(state, prepare.prepare(state, method)) < 1e-3
    right = prepare.prepare(state, "packed_sdpa")
    row = state.expected[0][3:4]
    wrong = Prepared(lambda: right.call().index_fill(0, row, 0.0), right.result)
    with pytest.raises(WrongResult, match=case.id):
        contender.check(state, wrong)


def test_the_core_opponent_gets_its_mask_ready_to_be_added_and_aligned():
    state = CaseState(Case("ragged", "bf16", "few", 4, 64, 64, 64, 8), WallTimer())
    mask = state.core_call.keywords["attn_mask"]
    lengths = (state.inputs.ranges[..., 1] - state.inputs.ranges[..., 0]).flatten()
    assert state.inputs.max_len % 16 and mask.shape == (8, 1, 1, state.inputs.max_len)
    assert mask.dtype == state.inputs.q.dtype and all(stride % 16 == 0 for stride in mask.stride()[:3])
    assert (mask == 0).flatten(1).sum(-1).tolist() == lengths.tolist()
    even = CaseState(SMALL, WallTimer())
    assert even.core_call.keywords["attn_mask"] is None


def test_a_build_that_fails_is_not_tried_in_every_case(monkeypatch):
    tried = []

    def fail():
        tried.append(1)
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr(compiled, "_build", lambda *arguments, **options: fail)
    monkeypatch.setattr(compiled, "_failures", {})
    inputs = CaseState(SMALL, WallTimer()).inputs
    for _ in range(2):
        with pytest.raises(NotImplementedError):
            compiled.choose(SMALL, inputs, "flash", WallTimer())
    for backend, times in (("flash", 2), ("flash", 2), ("cudnn", 3)):
        with pytest.raises((RuntimeError, NotImplementedError), match="no such kernel"):
            compiled.choose(SMALL, inputs, backend, WallTimer())
        assert len(tried) == times


def test_every_kernel_of_a_run_is_compiled_once_ahead_of_it(monkeypatch):
    monkeypatch.setattr(precompile.launch, "unsupported_reason", lambda *arguments: None)
    tiny = [
        cases.rows_case("bf16", layout, 4, 64, 64, L, N)
        for layout in ("few", "many")
        for L in (16, 64)
        for N in (8, 16)
    ]
    pairs = [(case, method) for case in tiny for method in case.methods]
    kernels = precompile.distinct(pairs, "cpu")
    assert 2 <= len(kernels) < len(tiny) * 2 and len(kernels) == len(set(kernels))
    assert {kernel.n_spans for kernel in kernels} == {1, 8}
    assert {kernel.n_spans for kernel in precompile.distinct([(tiny[-1], "triton_core")], "cpu")} == {1}
    assert precompile.distinct([(case, "packed_sdpa") for case in tiny], "cpu") == []


def test_what_is_compiled_ahead_is_what_the_run_launches(monkeypatch):
    launch, forward = (pytest.importorskip(f"nsa_sel.kernel.{name}") for name in ("launch", "forward"))
    monkeypatch.setattr(launch, "unsupported_reason", lambda *arguments: None)
    names = [name for name, kind in forward._sel_fwd.fn.__annotations__.items() if "constexpr" in str(kind)]
    assert {"BLOCK_L", "UNIT", "WIDE", "QUERIES"} <= set(names)

    def compiled_for(tensors, config) -> tuple:
        plan = launch.Plan(*tensors, None, None, None, config)
        return [plan.values[name] for name in names], plan.options

    families = ",".join((*cases.FAMILIES, cases.PEERS))
    for case, method in ((case, m) for case in cases.matrix("hot", family=families) for m in cases.TRITON_METHODS):
        x = precompile.blank(case, method == "triton_core", "meta")
        tensors = x.q, x.k, x.v, x.ranges
        config = launch.launch_for(*tensors, min_len=x.min_len, max_len=x.max_len)
        (ahead,) = precompile.distinct([(case, method)], "meta")
        rows = precompile.workers.empty_rows(ahead, "meta")
        assert compiled_for(rows, ahead.launch) == compiled_for(tensors, config), (case.id, method)


def kernel(warps: int, stages: int) -> Variant:
    return Variant("bf16", 1, 4, 64, 64, 1, LaunchConfig("gather", 16, 64, 64, warps, stages))


KERNELS = [kernel(warps, stages) for warps in (1, 2, 4) for stages in (1, 2)]


def test_a_kernel_that_cannot_be_compiled_ahead_is_left_to_its_benchmark(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(precompile, "distinct", lambda *arguments: KERNELS)
    monkeypatch.setattr(precompile, "seconds_to_build", lambda kernel: None)
    monkeypatch.setattr(precompile.workers, "workers", lambda: 1)
    monkeypatch.setattr(precompile.workers, "compile_all", lambda kernels, finished, total_s: {kernels[0]: "no room"})
    assert re.fullmatch(r"5 of 6 kernels compiled in \d+ s by 1 processes", precompile.compile_kernels([]))


def test_kernels_that_take_too_long_are_left_to_the_run(monkeypatch):
    def late(kernels, finished, total_s):
        raise TimeoutError

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(precompile, "distinct", lambda *arguments: KERNELS)
    monkeypatch.setattr(precompile, "seconds_to_build", lambda kernel: None)
    monkeypatch.setattr(precompile.workers, "compile_all", late)
    assert precompile.compile_kernels([]).startswith("6 kernels were not compiled in 150 s")


def test_one_case_is_held_at_a_time(cpu_bench):
    first = cpu_bench.state(SMALL)
    assert cpu_bench.state(SMALL) is first
    other = cpu_bench.state(cases.rows_case("bf16", "few", 4, 64, 64, 64, 8))
    assert other is not first and cpu_bench.state(SMALL) is not first


def test_a_tenth_is_planted():
    pairs = [(case, method) for case in cases.matrix("full") for method in case.methods]
    share = sum(is_planted(*pair) for pair in pairs) / len(pairs)
    assert 0.08 < share < 0.12


def result(case: Case, method: str, device_us: float) -> dict:
    about = {"case": case.id, "family": case.family, "layout": case.layout, "scope": cases.scope(method)}
    about |= {"method": method, "device_us": device_us, "gbps": 100.0, "pct_of_limit": 50.0, "ci95_us": [1.0, 2.0]}
    return about | {"gpu": "Testcard", "sdpa_backend": "flash", "call_us": None, "graph_us": 3.0, "mae": 1e-4}


def test_summary_compares_with_the_fastest_sdpa_form_of_the_same_scope():
    fast, slow = (cases.rows_case("bf16", "few", 8, 128, 128, L, 64) for L in (64, 128))
    results = [
        *(result(fast, m, us) for m, us in [("triton", 10.0), ("packed_sdpa", 80.0), ("packed_sdpa_compiled", 40.0)]),
        *(result(fast, m, us) for m, us in [("triton_core", 10.0), ("sdpa_core", 15.0)]),
        *(result(slow, m, us) for m, us in [("triton", 10.0), ("packed_sdpa", 90.0), ("triton_core", 20.0)]),
    ]
    ratios = {(s.case, s.scope): s.ratio for s in screen.speedups(results)}
    assert ratios == {(fast.id, "op"): 4.0, (fast.id, "core"): 1.5, (slow.id, "op"): 9.0}
    lines = screen.screen(results)
    assert lines[1].split() == ["rows", "few", "2", "6.00", "1.50", "100", "50", "%"]
    assert any(line.startswith(" 1.50x core") and fast.id in line for line in lines)
    assert len(screen.aligned(screen.table(results))) == len(results) + 1


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
