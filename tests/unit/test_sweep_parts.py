"""The parts of a sweep: what is tried and why, who wins, the log, the progress, and the compiler's processes."""

import io
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from sweep_fakes import BEST, DECODE, FEW, H200, MACHINE, MANY, MIXED, RTX_4090, UNTUNED

from nsa_sel.bench.suite import cases
from nsa_sel.bench.suite.cases import rows_case
from nsa_sel.bench.suite.inputs import make_inputs
from nsa_sel.bench.tune import space, workers
from nsa_sel.bench.tune.log import Log, Progress, clock
from nsa_sel.bench.tune.results import Ranked, Result, rank
from nsa_sel.bench.tune.space import Variant, around, grid, unfit
from nsa_sel.kernel.launch_config import LaunchConfig
from nsa_sel.kernel.tuned_table import Key

# --- what is tried ---


def reason(launch, case, gpu=H200):
    found = unfit(launch, case, gpu)
    return found and found.split(" (")[0]


@pytest.mark.parametrize(
    ("launch", "case", "gpu", "expected"),
    [
        (UNTUNED, FEW, H200, None),
        (replace(UNTUNED, block_d=16), rows_case("bf16", "few", 8, 128, 128, 64, 1024), H200, "more than 4 chunks"),
        (UNTUNED, rows_case("bf16", "few", 8, 64, 128, 64, 1024), H200, "chunks at least twice"),
        (
            replace(UNTUNED, num_stages=1),
            rows_case("bf16", "few", 33, 128, 128, 64, 1024),
            H200,
            "a loop without pipeline",
        ),
        (replace(UNTUNED, num_stages=1), rows_case("bf16", "few", 32, 128, 128, 64, 1024), H200, None),
        (replace(UNTUNED, load="tma"), FEW, H200, None),
        (replace(UNTUNED, load="tma"), FEW, RTX_4090, "no TMA"),
        (replace(UNTUNED, block_l=128, num_stages=3), FEW, H200, None),
        (replace(UNTUNED, block_l=128, num_stages=3), FEW, RTX_4090, "more shared memory"),
        (replace(UNTUNED, block_l=128, num_warps=1), FEW, H200, "more registers"),
        (replace(UNTUNED, num_warps=8), FEW, H200, "eight warps where four"),
        (replace(UNTUNED, load="tma", block_l=16), MANY, H200, "tiles longer than any span"),  # spans of 8
        (replace(UNTUNED, load="tma", block_l=16), MIXED, H200, None),
        (replace(UNTUNED, block_l=256), FEW, H200, "tiles more than twice as long"),
        (replace(UNTUNED, splits=2), rows_case("bf16", "few", 8, 128, 128, 64, 64), H200, "more splits than tiles"),
        (replace(UNTUNED, splits=2), rows_case("bf16", "few", 8, 128, 128, 128, 64), H200, None),
        (replace(UNTUNED, splits=2), rows_case("bf16", "few", 8, 128, 128, 128, 1024), H200, "splits beyond"),
        (replace(UNTUNED, splits=2), DECODE, H200, "too few splits"),
        (replace(UNTUNED, splits=8), DECODE, H200, None),
    ],
)
def test_the_pruner_says_why(launch, case, gpu, expected):
    found = reason(launch, case, gpu)
    assert found is None if expected is None else found is not None and found.startswith(expected)


# Compiled for sm_90 with Triton 3.7.1, bf16, H=8, D=Dv=128: bytes spilled.
@pytest.mark.parametrize(
    ("load", "block_l", "warps", "spilled"),
    [
        ("gather", 16, 1, 0),
        ("gather", 64, 1, 508),  # little enough that it may still win
        ("gather", 64, 2, 0),
        ("gather", 128, 1, 1408),
        ("gather", 128, 2, 0),
        ("gather", 256, 2, 1388),
        ("gather", 256, 4, 0),
        ("tma", 128, 1, 0),
        ("tma", 256, 1, 2592),
        ("tma", 256, 2, 0),
    ],
)
def test_the_estimate_of_registers_agrees_with_the_compiler(load, block_l, warps, spilled):
    launch = LaunchConfig(load, block_l, 128, 128, warps, 2)
    assert (space.registers(launch, FEW) > space.REGISTERS) is (spilled > 1000)


def test_the_grid_is_what_the_issue_lists():
    every = list(grid(128, 128, every_chunk=True))
    assert len(set(every)) == len(every)
    assert {c.block_l for c in every} == {16, 32, 64, 128, 256}
    assert {(c.block_d, c.block_dv) for c in every} == {(d, dv) for d in (32, 64, 128) for dv in (32, 64, 128)}
    assert {c.num_warps for c in every} == {1, 2, 4, 8} and {c.num_stages for c in every} == {1, 2, 3}
    assert {c.load for c in every} == {"gather", "whole", "tma"}
    assert {(c.block_d, c.block_dv) for c in grid(192, 128)} == {(64, 128)}


def test_variations_include_chunks_stages_and_registers():
    found = list(around(UNTUNED))
    assert replace(UNTUNED, block_dv=32) in found and replace(UNTUNED, num_stages=4) in found
    assert {c.max_registers for c in found} == {0, 96, 144, 168, 216}
    # 65,536 registers a multiprocessor
    assert {c.max_registers for c in around(replace(UNTUNED, num_warps=16))} == {0, 96}


def test_launches_that_differ_in_splits_alone_are_one_kernel():
    splits = [replace(UNTUNED, splits=n) for n in (1, 2, 4, 32)]
    assert len({space.variant(DECODE, launch) for launch in splits}) == 2
    clusters = [replace(UNTUNED, splits=n, cluster=cluster) for n in (8, 16, 64) for cluster in (2, 8)]
    variants = {space.variant(DECODE, launch) for launch in clusters}
    assert {(variant.launch.splits, variant.launch.cluster) for variant in variants} == {(2, 2), (8, 8)}
    assert space.variant(MANY, UNTUNED) == space.variant(MIXED, UNTUNED)
    assert space.variant(MANY, UNTUNED) != space.variant(FEW, UNTUNED)


@pytest.mark.parametrize(
    "case", [c for c in cases.matrix("smoke") if c.layout != "few" and not c.ragged][:6] + [DECODE], ids=str
)
def test_a_case_is_tuned_under_the_key_that_its_call_is_looked_up_by(case):
    launch = pytest.importorskip("nsa_sel.kernel.launch")
    x = make_inputs(case, "cpu")
    called = Key.of(launch.call_of(x.q, x.k, x.v, x.ranges, min_len=x.min_len, max_len=x.max_len), H200)
    assert space.key(case, H200) == called


# --- who wins ---


def result_of(times, untuned=UNTUNED, chosen=(FEW,)):
    measured = {launch: dict(zip((case.id for case in chosen), us, strict=True)) for launch, us in times.items()}
    ids = {case.id: untuned for case in chosen}
    return Result(space.key(FEW, H200), tuple(chosen), tuple(rank(measured, chosen)), ids)


@pytest.mark.parametrize(
    ("challenger_us", "winner"), [(9.0, BEST), (9.89, BEST), (9.95, UNTUNED), (10.0, UNTUNED), (11.0, UNTUNED)]
)
def test_a_challenger_must_be_clearly_faster_than_the_untuned_launch(challenger_us, winner):
    assert result_of({UNTUNED: [10.0], BEST: [challenger_us]}).winner.launch == winner


def test_a_launch_that_slows_one_case_down_does_not_win():
    other = replace(BEST, num_warps=4)
    result = result_of({UNTUNED: [10.0, 10.0], BEST: [5.0, 10.3], other: [9.0, 10.1]}, chosen=(MANY, MIXED))
    assert result.ranked[0].launch == BEST
    assert result.winner.launch == other


def test_without_a_launch_for_all_cases_there_is_no_entry():
    result = result_of({UNTUNED: [10.0, 12.0], BEST: [12.0, 10.0]}, chosen=(MANY, MIXED))
    split = replace(result, untuned={MANY.id: UNTUNED, MIXED.id: BEST})
    assert split.winner is None and split.entry() is None


def test_an_untuned_launch_that_failed_binds_nobody():
    assert result_of({BEST: [10.0]}).winner.launch == BEST


def test_rank_leaves_out_launches_without_a_time_in_every_case():
    ranked = rank({BEST: {MANY.id: 1.0}, UNTUNED: {MANY.id: 2.0, MIXED.id: 8.0}}, (MANY, MIXED))
    assert ranked == [Ranked(UNTUNED, 1.0, {MANY.id: 2.0, MIXED.id: 8.0})]
    both = rank({BEST: {MANY.id: 1.0, MIXED.id: 9.0}, UNTUNED: {MANY.id: 2.0, MIXED.id: 8.0}}, (MANY, MIXED))
    assert [(each.launch, round(each.score, 3)) for each in both] == [(BEST, 1.061), (UNTUNED, 1.414)]


def test_an_entry_says_by_how_much_it_won():
    entry = result_of({UNTUNED: [12.0], BEST: [10.0]}).entry()
    assert entry.launch == BEST
    assert entry.figures == {
        "us": {FEW.id: 10.0},
        "untuned_us": {FEW.id: 12.0},
        "runner_up": str(UNTUNED),
        "margin": 0.2,
    }


# --- the log ---


def test_the_log_ignores_other_kernels_and_machines(tmp_path):
    path = tmp_path / "tune.jsonl"
    log = Log(path, MACHINE)
    log.add("first", FEW, BEST, 10.0)
    log.close()
    other = Log(path, {**MACHINE, "torch": "2.12.0"})
    other.close()
    same = Log(path, MACHINE)
    same.close()
    assert (other.found, same.found) == (0, 1)
    assert same.time_us("first", FEW, BEST) == 10.0 and same.time_us("second", FEW, BEST) is None


def test_after_a_finished_sweep_everything_is_measured_anew(tmp_path):
    log = Log(tmp_path / "tune.jsonl", MACHINE)
    log.add("first", FEW, BEST, 10.0)
    log.add("first", FEW, UNTUNED, error="bad")
    log.finish()
    again = Log(tmp_path / "tune.jsonl", MACHINE)
    again.close()
    assert not again.found and again.error(FEW, UNTUNED) is None


def test_a_cut_off_or_damaged_line_costs_itself_alone(tmp_path):
    path = tmp_path / "tune.jsonl"
    log = Log(path, MACHINE)
    log.add("first", FEW, BEST, 10.0)
    log.close()
    path.write_text(path.read_text() + "[]\n{}\nnull\n" + json.dumps({"run": log.run}) + "\n" + path.read_text()[:-9])
    again = Log(path, MACHINE)
    again.add("first", FEW, UNTUNED, 12.0)
    again.close()
    third = Log(path, MACHINE)
    third.close()
    assert (again.found, third.found) == (1, 2)
    assert third.time_us("first", FEW, UNTUNED) == 12.0


def test_progress_tells_the_remaining_time(monkeypatch):
    now = iter([0.0, 10.0, 20.0, 40.0])
    monkeypatch.setattr("nsa_sel.bench.tune.log.time.monotonic", lambda: next(now))
    out = io.StringIO()
    progress = Progress(out)
    progress.start("compiling", 3)
    for _ in range(3):
        progress.step()
    lines = out.getvalue().splitlines()
    assert lines == [  # nothing after 10 s: a line every 15
        "[################........] 2/3, 0:10 left: compiling",
        "[########################] 3/3, 0:00 left: compiling",
    ]
    assert clock(3725) == "62:05"


def test_a_line_said_takes_the_place_of_the_progress_shown_which_comes_again(monkeypatch, capsys):
    now = iter([0.0, 1.0, 1.1])
    monkeypatch.setattr("nsa_sel.bench.tune.log.time.monotonic", lambda: next(now))
    monkeypatch.setenv("COLUMNS", "60")
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: True)
    progress = Progress(out)
    progress.start("compiling", 3)
    progress.step()
    progress.say("a result")
    progress.step()
    assert capsys.readouterr().out == "a result\n"
    first, cleared, _, second = out.getvalue().split("\r")[1:]
    assert "1/3" in first and cleared == 59 * " " and "2/3" in second


# --- the compiler's processes ---

STAND_IN = """
import json, os, sys, time
for line in sys.stdin:
    block_l = json.loads(line)["launch"]["block_l"]
    if block_l == 16:
        os.kill(os.getpid(), 11)
    if block_l == 32:
        time.sleep(60)
    if block_l == 64:
        print("LLVM ERROR: cannot select", file=sys.stderr)
        sys.exit(134)
    print(json.dumps({"error": "bad" if block_l == 128 else None, "lost": block_l == 128}), flush=True)
    if block_l == 128:
        sys.exit()
"""


def test_a_worker_that_dies_or_hangs_costs_one_variant(monkeypatch):
    monkeypatch.setattr(workers, "workers", lambda: 2)
    variants = [
        Variant("bf16", 1, 8, 128, 128, 1, replace(UNTUNED, block_l=block_l, num_warps=warps))
        for block_l in (16, 32, 64, 128, 256)
        for warps in (1, 2)
    ]
    finished = []
    errors = workers.compile_all(
        variants, lambda: finished.append(1), command=(sys.executable, "-c", STAND_IN), limit_s=2.0
    )
    assert len(finished) == len(variants)
    assert {v.launch.block_l for v in variants if v not in errors} == {256}
    for variant, error in errors.items():
        expected = {16: "exit status -11", 32: "no answer in 2 s", 64: "LLVM ERROR: cannot select", 128: "bad"}
        assert expected[variant.launch.block_l] in error


def test_an_interruption_leaves_no_worker_behind(monkeypatch):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(workers, "workers", lambda: 2)
    monkeypatch.setattr(workers.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])

    def interrupt():
        raise KeyboardInterrupt

    variants = [Variant("bf16", 1, 8, 128, 128, 1, replace(UNTUNED, block_l=256, splits=n)) for n in range(1, 9)]
    with pytest.raises(KeyboardInterrupt):
        workers.compile_all(variants, interrupt, command=(sys.executable, "-c", STAND_IN))
    assert started and all(process.wait(10) is not None for process in started)


def test_a_limit_for_all_kernels_ends_the_workers(monkeypatch):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(workers, "workers", lambda: 2)
    monkeypatch.setattr(workers.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    hanging = [Variant("bf16", 1, 8, 128, 128, 1, replace(UNTUNED, block_l=32, splits=n)) for n in range(1, 5)]
    with pytest.raises(TimeoutError, match="4 kernels were not compiled in 1 s"):
        workers.compile_all(hanging, lambda: None, command=(sys.executable, "-c", STAND_IN), total_s=1.0)
    assert started and all(process.wait(10) is not None for process in started)


def test_the_worker_answers_a_line_with_a_line():
    variant = Variant("bf16", 1, 8, 128, 128, 8, UNTUNED)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        workers.COMMAND,
        input=json.dumps(asdict(variant)) + "\n",
        capture_output=True,
        text=True,
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
    )
    answer = json.loads(done.stdout)
    on_gpu = torch.cuda.is_available()
    assert (answer["error"] is None) is on_gpu and answer["lost"] is not on_gpu, done.stderr
