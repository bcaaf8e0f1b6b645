"""Users' kernels in the perf suite, by the wall clock: which get a time, and what the others are told."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

import nsa_sel
from nsa_sel.bench.methods.contender import NotTimed, WrongResult
from nsa_sel.bench.resume.conditions import conditions
from nsa_sel.bench.saved.run import Saved
from nsa_sel.bench.session import Session
from nsa_sel.bench.suite import case_file, cases
from nsa_sel.bench.suite.kernels import UserKernel
from nsa_sel.bench.timer.machine import environment
from nsa_sel.recording import RecordingError
from tests.programs import python

ROOT = Path(nsa_sel.__file__).parents[2]
SMALL = cases.rows_case("bf16", "mixed", 4, 64, 64, 64, 8)
DECODE = cases.decode_case("bf16", "many", 4, 64, 64, 128, 1, 512)
MODULE = """
import torch
from nsa_sel import reference, spans

def right(q, k, v, ranges, *, scale, min_len, max_len):
    return reference.packed_sdpa(q, k, v, ranges, scale=scale, min_len=min_len, max_len=max_len)

def by_blocks(q, k, v, blocks, *, block_size, scale, min_len, max_len):
    S, S_kv = q.shape[1], k.shape[2]
    limit = torch.arange(S_kv - S + 1, S_kv + 1).view(1, S, 1, 1)
    ranges = spans.block_ranges(blocks, block_size, limit)
    return right(q, k, v, ranges, scale=scale, min_len=min_len, max_len=max_len)

def drops_the_last_token(q, k, v, ranges, *, scale, min_len, max_len):
    last = (ranges[..., 1] - ranges[..., 0] > 0).int().cumsum(-1).argmax(-1, keepdim=True)
    ends = ranges[..., 1].scatter_add(-1, last, torch.full_like(last, -1, dtype=ranges.dtype))
    shorter = torch.stack((ranges[..., 0], ends), -1)
    return reference.packed_sdpa(q, k, v, shorter, scale=scale)

def only_128(q, k, v, ranges, *, scale, min_len, max_len):
    assert q.shape[-1] == 128
    return right(q, k, v, ranges, scale=scale, min_len=min_len, max_len=max_len)

only_128.unsupported = lambda q, k, v, ranges: None if q.shape[-1] == 128 else f"D is {q.shape[-1]}, expected 128"
"""


@pytest.fixture(scope="module")
def perf(tmp_path_factory) -> tuple[CompletedProcess, Path, Path]:
    """Run the perf suite once with four kernels; return what it said, its saved run, and the kernels' folder."""
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "mine.py").write_text(MODULE)
    saved = folder / "run.json"
    names = ("right", "by_blocks=blk", "drops_the_last_token=wrong", "only_128")
    options = [f"--sel-kernel=mine:{name}" for name in names] + ["--sel-takes=blk=blocks:64"]
    chosen = ["--sel-matrix=smoke", "-k", "L64-N64 and (few or mixed) or t512"]
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{folder}", "CUDA_VISIBLE_DEVICES": ""}
    env.pop("TRITON_INTERPRET", None)
    more = [*options, *chosen, f"--benchmark-json={saved}"]
    return python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/perf", *more, env=env), saved, folder


def methods_by_case(saved: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for case, method in Saved.load(saved).run.timings:
        found.setdefault(case, set()).add(method)
    return found


def test_a_right_kernel_has_a_time_in_every_case_beside_sdpa(perf):
    done, saved, _ = perf
    timed = methods_by_case(saved)
    assert len(timed) == 6, done.stdout
    assert all({"right", "right_core", "packed_sdpa", "sdpa_core"} <= methods for methods in timed.values())
    run = Saved.load(saved)
    assert run.run.kernels["right"] == "mine:right, ranges"
    extra = run.extras["rows-bf16-H8-D128-Dv128-L64-N64-few", "right_core"]
    assert (extra["scope"], extra["kernel"], extra["takes"]) == ("core", "mine:right", "ranges") and extra["mae"] < 1e-3
    assert ["right", "rows", "few", "2"] in [line.split()[:4] for line in done.stdout.splitlines()]
    assert "worst cases of right" in done.stdout


def test_a_kernel_that_takes_blocks_is_timed_where_they_can_say_what_is_selected(perf):
    done, saved, _ = perf
    timed = {
        (case.split("-")[0], case.split("-")[-1])
        for case, methods in methods_by_case(saved).items()
        if "blk" in methods
    }
    assert timed == {("rows", "few"), ("decode", "few")}
    assert all("blk_core" in methods for methods in methods_by_case(saved).values() if "blk" in methods)
    assert "blk: 6 deselected, which blocks:64 cannot express" in done.stdout
    asked = {method for _, method in json.loads(saved.read_text())["nsa_sel"]["asked"]}
    assert (
        "blk" in asked and sum(m.startswith("blk") for _, m in json.loads(saved.read_text())["nsa_sel"]["asked"]) == 6
    )


def test_a_kernel_that_declares_what_it_cannot_do_is_skipped_with_its_words(perf):
    done, saved, _ = perf
    timed = {case for case, methods in methods_by_case(saved).items() if "only_128" in methods}
    assert timed and all("-D128-" in case for case in timed)
    reasons = {key: why for key, why in Saved.load(saved).not_timed.items() if key[1].startswith("only_128")}
    assert set(reasons.values()) == {"unsupported: D is 64, expected 128"}
    assert all("-D64-" in case for case, _ in reasons)
    assert "not timed: unsupported: D is 64, expected 128" in done.stdout


def test_a_wrong_kernel_has_no_time_and_a_repro_that_can_be_pasted(perf):
    done, saved, folder = perf
    assert done.returncode == 1
    assert not any("wrong" in method for methods in methods_by_case(saved).values() for method in methods)
    assert "During handling" not in done.stdout and "Traceback" not in done.stdout
    lines = done.stdout.splitlines()
    begin = next(at for at, line in enumerate(lines) if line.startswith("import sys; "))
    end = lines.index("assert verdict.ok, verdict.message", begin)
    assert "64 of its rows: MAE" in "".join(lines[begin - 6 : begin]) and end - begin <= 15
    program = "\n".join(lines[begin : end + 1])
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": ""}
    again = python("-c", program, cwd=folder, env=env)
    assert again.returncode == 1 and "AssertionError: MAE " in again.stderr and "rows are bad" in again.stderr


def test_what_names_no_kernel_ends_the_run_in_one_line(perf):
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": ""}
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/perf", "--sel-kernel=no_such:f", env=env)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--sel-kernel no_such:f: no module no_such in " in done.stderr and "Traceback" not in done.stderr


# --- in one process ---


@pytest.fixture
def timed(monkeypatch):
    """Return how to time a function in place of a user's kernel, without a GPU."""
    environment()  # kept for the process: it must not be read first where the GPU is hidden
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def measure(function, method="mine", case=SMALL, block_size=0):
        session = Session(kernels={"mine": UserKernel("mine", "mine:f", function, block_size)})
        return session.measure(case, method, rounds=6, warmup=1)

    return measure


def right(q, k, v, ranges, *, scale, min_len, max_len):
    return nsa_sel.reference.packed_sdpa(q, k, v, ranges, scale=scale, min_len=min_len, max_len=max_len)


def test_on_packed_rows_it_gets_the_rows_that_sdpa_gets_one_span_each(timed):
    seen = []

    def look(q, k, v, ranges, **hints):
        seen.append((q.shape, k.shape, ranges.shape, hints))
        return right(q, k, v, ranges, **hints)

    assert timed(look, "mine_core")["config"] == "mine:f, ranges"
    hints = {"scale": 0.125, "min_len": 64, "max_len": 64}
    assert seen[0] == ((8, 1, 1, 4, 64), (8, 1, 64, 64), (8, 1, 1, 1, 2), hints)


def test_packed_rows_as_blocks_are_the_first_blocks_of_a_context_of_their_own(timed):
    seen = []

    def look(q, k, v, blocks, *, block_size, **hints):
        seen.append((k.shape, blocks.unique().tolist(), block_size))
        return right(q, k, v, nsa_sel.spans.block_ranges(blocks, block_size, k.shape[2]), **hints)

    assert timed(look, "mine_core", DECODE, 64)["takes"] == "blocks:64"
    assert seen[0] == ((4, 1, 128, 64), [0, 1], 64)


@pytest.fixture
def recorded(tmp_path) -> cases.Case:
    """Return a call of two whole blocks as a case."""
    q, kv = torch.randn(1, 1, 1, 4, 64), torch.randn(1, 1, 128, 64)
    nsa_sel.record(tmp_path, q, kv, kv, torch.tensor([[64, 128], [0, 64]]).view(1, 1, 1, 2, 2))
    (tmp_path / "cases.yaml").write_text("cases:\n  - recorded: '*.pt'\n")
    (case,) = case_file.read(tmp_path / "cases.yaml", "bf16")
    return case


def test_a_recorded_call_that_is_gone_is_no_call_that_blocks_cannot_express(recorded):
    kernel = UserKernel("mine", "mine:f", right, 64)
    assert kernel.expressible(recorded) and not replace(kernel, block_size=48).expressible(recorded)
    Path(recorded.recorded.file).unlink()
    with pytest.raises(RecordingError):
        replace(kernel, block_size=32).expressible(recorded)


def test_the_repro_of_a_recorded_call_names_its_file(timed, recorded):
    with pytest.raises(WrongResult) as error:
        timed(lambda q, k, v, ranges, **hints: right(q, k, v, ranges, **hints) + 1, case=recorded)
    lines, names = str(error.value).splitlines(), {}
    exec("\n".join(line for line in lines if line.startswith("from ")), names)
    made = next(line for line in lines if line.startswith("state = "))
    assert eval(made.removeprefix("state = CaseState(").removesuffix(", WallTimer())"), names) == recorded


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (
            lambda q, k, v, ranges, **hints: (right(q, k, v, ranges, **hints), None),
            "mine returns tuple, expected a tensor",
        ),
        (
            lambda q, k, v, ranges, **hints: right(q, k, v, ranges, **hints).flatten(2, 3),
            r"returns a tensor \(8, 1, 4, 64\), expected \(8, 1, 1, 4, 64\)",
        ),
        (lambda q, k, v, ranges, **hints: right(q.mul_(1.0), k, v, ranges, **hints), "mine changes its argument q"),
        (lambda q, k, v, ranges, **hints: right(q, k, v, ranges, **hints).float(), "dtype and shape are torch.float32"),
        (lambda q, k, v, ranges, **hints: torch.empty_like(q), "rows are bad"),
    ],
    ids=["a tuple", "another shape", "in place", "another dtype", "nothing written"],
)
def test_what_is_no_right_result_gets_no_time(timed, function, said):
    with pytest.raises(WrongResult, match=said):
        timed(function)


def test_what_a_kernel_raises_is_its_failure(timed):
    def broken(*arguments, **hints):
        raise ValueError("a fault of its own")

    with pytest.raises(ValueError, match="a fault of its own"):
        timed(broken)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_a_kernel_for_gpus_has_no_time_without_one(timed):
    with pytest.raises(NotTimed, match="^no GPU$"):
        timed(lambda q, *arguments, **hints: q.cuda())


def test_the_interpreter_is_not_timed(timed, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(NotTimed, match="the interpreter is not timed"):
        timed(right)


def test_a_run_is_gone_on_with_only_with_the_same_kernels(tmp_path, monkeypatch):
    module = tmp_path / "resumed_kernel.py"
    module.write_text("def f(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("resumed_kernel")
    before = conditions({}, None, ["resumed_kernel:f"])
    assert before == conditions({}, None, ["resumed_kernel:f"]) != conditions({}, None)
    module.write_text("def f(): return 1\n")
    assert before != conditions({}, None, ["resumed_kernel:f"])
