"""bench/bench_sel_triton.py as a user runs it, what it saves, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
import os
import runpy
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from saved_runs import IDENTITY, READ_LIMIT_US, entry_of

from nsa_sel.bench.methods.contender import NotTimed, WrongResult
from nsa_sel.bench.saved.run import Saved
from nsa_sel.bench.suite.cases import Case
from nsa_sel.bench.threshold import command as threshold
from tests.programs import python

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "bench_sel_triton.py"


def run(*arguments: str, folder: Path = ROOT) -> CompletedProcess:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    hidden.pop("TRITON_INTERPRET", None)  # the parity suite sets it, in this process too if it runs both
    return python(SCRIPT, *arguments, cwd=folder, env=hidden)


def main_of_script(**stand_ins: object) -> Callable[[list[str]], int]:
    """Return the script's main, which finds these in place of what it imports."""
    main = runpy.run_path(str(SCRIPT))["main"]
    main.__globals__.update(stand_ins)
    return main


class SyntheticGpu:
    """Stand in for a session on a GPU: made-up times, and no compiled packing."""

    on_gpu = True

    def __init__(self, **options: object) -> None:
        self.not_timed: dict[tuple[str, str], str] = {}

    def measure(self, case: Case, method: str, rounds: int, warmup: int) -> dict:
        if method == "packed_sdpa_compiled":
            self.not_timed[case.id, method] = "no compiler"
            raise NotTimed("no compiler")
        us = 10.0 if method.startswith("triton") else 20.0
        made = entry_of(case, method, {"device": us, "call": us}, 0.01, IDENTITY)
        stats = {name: made["stats"][name] for name in ("median", "q1", "q3")}
        return {"samples": [us * 1e-6] * rounds, **stats, **made["extra_info"]}

    def fits(self, case: Case) -> bool:
        return False  # no tensors, of which to say what "auto" does


def synthetic_environment() -> dict:
    calibration = {"tick_us": 0.03, "null_kernel_us": {"device": 2.8}, "read_limit_us": READ_LIMIT_US}
    return {**IDENTITY, "calibration": calibration}


def test_decode_example_prints_one_line_for_each_method(tmp_path):
    table = tmp_path / "results" / "2026-01-01" / "out.md"  # of folders that are not there
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
            assert float(row["ci95_low_ms"]) <= float(row["time_ms"]) <= float(row["ci95_high_ms"])
            assert float(row["gbps"]) == pytest.approx(int(row["bytes"]) / float(row["time_ms"]) / 1e6, abs=0.06)
    assert len(table.read_text().splitlines()) == 2 + len(rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dist", "many", "--L_list", "60"], "L: value is 60"),
        (["--decode", "1", "--L_list", "100"], "L: value is 100"),
        (["--decode", "1", "--N", "6"], "N: value is 6"),
        (["--L_list", "64,x"], "--L_list: value is 'x', expected a whole number of at least 1"),
        (["--L_list", ""], "--L_list: value is ''"),
        (["--N", "0"], "--N: value is '0', expected a whole number of at least 1"),
        (["--N", "-4"], "--N: value is '-4'"),
        (["--H", "8.5"], "--H: value is '8.5'"),
        (["--iters", "0"], "--iters: value is '0'"),
        (["--warmup", "-1"], "--warmup: value is '-1', expected a whole number of at least 0"),
        (["--dist", "few,some"], "--dist: value is 'some', expected some of few, many, mixed"),
        (["--save", "a/b"], "--save: Must not contain"),
        (["--sel-kernel", "no_such_module:f"], "--sel-kernel no_such_module:f: no module no_such_module in "),
        (["--csv", f"{SCRIPT}/out.csv"], str(SCRIPT)),
    ],
)
def test_bad_arguments_are_one_line_and_exit_with_two(options, message, capsys):
    with pytest.raises(SystemExit) as left:
        main_of_script()(options)
    said = capsys.readouterr()
    assert left.value.code == 2 and message in said.err and said.err.count("\n") == 1 and not said.out


def test_a_malformed_toggle_is_one_line_and_exits_with_two(monkeypatch, capsys):
    monkeypatch.setenv("NSA_FORCE_PARITY", "maybe")
    with pytest.raises(SystemExit) as left:
        main_of_script()([])
    assert left.value.code == 2
    assert capsys.readouterr().err.endswith("error: NSA_FORCE_PARITY: value is 'maybe', expected 1 or 0\n")


def test_a_saved_run_is_read_by_report_and_compare(tmp_path):
    done = run("--N", "4", "--H", "2", "--L_list", "64,64", "--dist", "few,mixed", "--save", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob(".benchmarks/*-cpu/0001_bench_sel_triton.json")
    saved = Saved.load(path)
    ids = [f"rows-bf16-H2-D128-Dv128-L64-N4-{dist}" for dist in ("few", "mixed")]
    assert saved.run.timings.keys() == {(case, method) for case in ids for method in ("packed_sdpa", "sdpa_core")}
    assert saved.not_timed[ids[0], "triton"] == "no GPU" and not saved.run.unmeasured
    assert all(entry["stats"]["rounds"] == 5 for entry in json.loads(path.read_text())["benchmarks"])
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    for arguments in (["report", "0001", "--out", "out"], ["compare", "0001", "0001"]):
        read = python("-m", "nsa_sel", *arguments, cwd=tmp_path, env=env)
        assert read.returncode == 0, read.stderr


def test_a_saved_run_is_read_by_threshold(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main = main_of_script(Session=SyntheticGpu, environment=synthetic_environment)
    assert main(["--L_list", "64,128", "--dist", "few,many", "--save", "mine"]) == 0
    (path,) = tmp_path.glob(".benchmarks/*-NVIDIA-Synthetic/0001_mine.json")
    assert Saved.load(path).not_timed  # the compiled packing of the hot case
    capsys.readouterr()
    assert threshold.main(["mine"]) == 1  # the rest of the matrix is missing
    listed = capsys.readouterr().out
    assert "NVIDIA Synthetic" in listed and "missing from every run" in listed and "-L64-N1024-few:" not in listed


def test_what_is_wrong_or_fails_has_no_time_and_exit_status_one(tmp_path, monkeypatch, capsys):
    class Faulty(SyntheticGpu):
        def measure(self, case: Case, method: str, rounds: int, warmup: int) -> dict:
            if method == "triton":
                raise WrongResult("row 3 is off")
            if method == "triton_core":
                raise RuntimeError("no\nsuch thing")
            return super().measure(case, method, rounds, warmup)

    monkeypatch.chdir(tmp_path)
    main = main_of_script(Session=Faulty, environment=synthetic_environment)
    assert main(["--L_list", "64", "--save"]) == 1
    notes = {row["method"]: row for row in csv.DictReader(io.StringIO(capsys.readouterr().out))}
    assert notes["triton"]["note"] == "WRONG: row 3 is off"
    assert notes["triton_core"]["note"] == "FAILED: RuntimeError: no"
    assert float(notes["packed_sdpa"]["time_ms"]) == 0.02
    (path,) = tmp_path.glob(".benchmarks/*/*.json")
    assert {method for _, method in Saved.load(path).run.unmeasured} == {"triton", "triton_core"}


OWN = """
from nsa_sel import reference
def right(q, k, v, ranges, *, scale, min_len, max_len):
    return reference.packed_sdpa(q, k, v, ranges)
def wrong(q, k, v, ranges, *, scale, min_len, max_len):
    return reference.packed_sdpa(q, k, v, ranges) + 1
def blocked(q, k, v, blocks, *, block_size, scale, min_len, max_len):
    return reference.packed_sdpa(q, k, v, blocks.unsqueeze(-1) * block_size + blocks.new_tensor([0, block_size]))
"""


def test_kernels_of_ones_own_stand_beside_the_others(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    given = [f"--sel-kernel=mine:{name}" for name in ("right", "wrong", "blocked")]
    shape = ["--N", "8", "--H", "2", "--D", "64", "--decode", "1", "--L_list", "128"]
    done = run(*given, "--sel-takes", "blocked=blocks:64", *shape, folder=tmp_path)
    assert done.returncode == 1, done.stderr
    rows = {row["method"]: row for row in csv.DictReader(done.stdout.splitlines())}
    for name in ("right", "right_core", "blocked", "blocked_core"):
        assert float(rows[name]["time_ms"]) > 0 and rows[name]["note"].startswith("mine:")
    for name in ("wrong", "wrong_core"):
        assert rows[name]["time_ms"] == "" and rows[name]["note"].startswith("WRONG: decode-")
    assert "\n(kernel,) = kernels.parse(['mine:wrong=wrong'], [])\n" in done.stderr


def test_what_blocks_cannot_express_is_left_out_and_counted(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    shape = ["--N", "4", "--H", "2", "--D", "64", "--L_list", "100"]
    done = run("--sel-kernel", "mine:blocked", "--sel-takes", "blocks:64", *shape, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "blocked: 2 left out, which blocks:64 cannot express\n" in done.stderr
    assert "blocked" not in done.stdout


def test_a_terminal_gets_columns_that_stand_below_their_names(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert main_of_script(Session=SyntheticGpu)(["--L_list", "64,1024", "--N", "65536", "--D", "64"]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    for name in ("time_ms", "bytes"):
        end = heading.index(name) + len(name)
        assert all(line[end - 1].isdigit() and line[end].isspace() for line in lines), name
    assert all(line.startswith(" 65536   8   64  128") for line in lines)
