"""What breaks around the kernel (memory, compiler, files, Ctrl-C) ends in a clear reason; nothing is lost."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from saved_runs import document, entry, save_entries

import nsa_sel
from nsa_sel import dispatch, reference, routing, training
from nsa_sel.bench.compare import command as compare_command
from nsa_sel.bench.compare import rule
from nsa_sel.bench.report import command as report_command
from nsa_sel.bench.saved import run as runs
from nsa_sel.bench.saved import storage as saved_storage
from nsa_sel.bench.threshold import command as threshold_command
from nsa_sel.bench.tune import command as tune_command
from nsa_sel.config import get_config
from nsa_sel.errors import KernelFailed
from nsa_sel.routing import Route
from tests.programs import python

ROOT = Path(__file__).parents[2]


def arguments() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 1, 4, 16), torch.randn(1, 1, 20, 16), torch.randn(1, 1, 20, 16)
    return {"q": q, "k": k, "v": v, "ranges": torch.tensor([[2, 9], [5, 20]]).expand(1, 2, 1, 2, 2)}


# --- memory ---


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
def test_packing_beyond_the_memory_names_the_size_and_corrupts_nothing(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = python(Path(__file__).with_name("pack_too_much.py"))
    assert done.returncode == 0, done.stderr
    said, after = done.stdout.splitlines()
    asked = re.search(r"tried to allocate (\d+) bytes", said)
    assert asked and int(asked[1]) >= 2**24 * 4096, said  # a byte or more for every token of every row
    assert after == "the next call is right"


def test_running_out_of_gpu_memory_names_what_packing_takes(monkeypatch):
    def no_room(*args, **options):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 GiB")

    monkeypatch.setattr(reference, "packed_sdpa", no_room)
    with pytest.raises(torch.cuda.OutOfMemoryError) as caught:
        nsa_sel.selection_attention(**arguments())
    said = str(caught.value)
    assert "packing 2 rows of 22 tokens takes 0.00 GB" in said and "Tried to allocate 64.00 GiB" in said


# --- the compiler ---


class Broken:
    """Stand in for the device code of a machine whose compiler is gone; count how often it is asked."""

    def __init__(self, arg_names: list[str]) -> None:
        self.arg_names, self.asked = arg_names, 0

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.asked += 1
            raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

        return launch


@pytest.fixture
def broken(monkeypatch):
    from nsa_sel.kernel import launch

    toggles = get_config()
    if toggles.force_parity:
        pytest.skip(f"NSA_FORCE_PARITY is on (set by {toggles.sources['force_parity']})")
    kernel = Broken(launch._sel_fwd.arg_names)
    monkeypatch.setattr(launch, "_sel_fwd", kernel)
    monkeypatch.setattr(launch, "INTERPRETED", True)
    monkeypatch.setattr(launch, "unsupported_reason", lambda *tensors: None)
    monkeypatch.setattr(training, "failures", {})
    return kernel


def test_asked_for_by_name_a_broken_compiler_is_an_unsupported_error(broken):
    for n in (1, 2):
        with pytest.raises(
            nsa_sel.UnsupportedError, match="Failed to find C compiler. Please specify via CC"
        ) as caught:
            nsa_sel.selection_attention(**arguments(), backend="triton", min_len=22, max_len=22)
        assert isinstance(caught.value, KernelFailed) and broken.asked == n
    with pytest.raises(nsa_sel.UnsupportedError, match="Failed to find C compiler"):
        nsa_sel.selection_attention(**arguments(), backend="triton", return_lse=True)


@pytest.mark.parametrize("use_sel_pack", (True, False))
def test_auto_warns_of_a_broken_compiler_and_runs_its_fallback(broken, monkeypatch, use_sel_pack):
    monkeypatch.setattr(dispatch, "route", lambda *args: Route("triton", "a GPU that was measured"))
    config = nsa_sel.SelConfig(use_sel_pack=use_sel_pack)
    given = arguments()
    fallback = "packed_sdpa" if use_sel_pack else "masked_sdpa"
    with pytest.warns(RuntimeWarning, match=f"{fallback} runs in place of Triton: .*Failed to find C compiler"):
        out = nsa_sel.selection_attention(**given, config=config, min_len=22, max_len=22)
    assert torch.equal(out, getattr(reference, fallback)(**given))
    assert list(training.failures) == [training.kind(given["q"], given["v"])]


def test_out_of_memory_in_the_kernels_launch_is_no_failure_of_the_kernel(broken, monkeypatch):
    def no_room(*args, **options):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    monkeypatch.setattr(Broken, "__getitem__", lambda self, grid: no_room)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="1.00 GiB"):
        nsa_sel.selection_attention(**arguments(), backend="triton")


def test_a_kernel_that_fails_is_an_obstacle_for_auto_and_nothing_else():
    config = nsa_sel.SelConfig(use_triton_sel=True)
    options = {"config": config, "gpu_name": "NVIDIA H200", "max_len": 512, "needs_grad": False}
    assert routing.decide("auto", **options, unsupported=None).backend == "triton"
    route = routing.decide("auto", **options, unsupported="the kernel cannot be compiled")
    assert route == Route("packed_sdpa", "the kernel cannot be compiled")


# --- saved files ---

WHOLE = json.dumps(document([entry("a", "triton", 9)]))
DAMAGED = {
    "truncated": WHOLE[:-40],
    "empty": "",
    "another schema": '{"version": 2, "results": {}}',
    "a tuned table": '{"schema": 1, "gpu": "NVIDIA H200", "entries": []}',
    "a case twice": json.dumps(document([entry("a", "triton", 9), entry("a", "triton", 8)])),
}
COMMANDS = {
    "compare": lambda bad, out: compare_command.main([str(bad), str(bad)]),
    "report": lambda bad, out: report_command.main([str(bad), "--out", str(out)]),
    "threshold": lambda bad, out: threshold_command.main([str(bad)]),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_run_is_one_line_and_stays_as_it_is(tmp_path, capsys, kind, command):
    bad, out = tmp_path / "0001_bad.json", tmp_path / "out"
    bad.write_text(DAMAGED[kind])
    assert COMMANDS[command](bad, out) == 2
    said = capsys.readouterr().err
    assert "0001_bad.json" in said and said.count("\n") == 1, said
    assert bad.read_text() == DAMAGED[kind] and not out.exists()


def test_pytest_benchmarks_own_command_survives_a_truncated_run(tmp_path):
    folder = tmp_path / ".benchmarks" / "Linux-NVIDIA-H200"
    old = save_entries(folder, "0001_old", [entry("a", "triton", 100)])
    cut = save_entries(folder, "0002_cut", [entry("a", "triton", 100)])
    save_entries(folder, "0003_new", [entry("a", "triton", 150)], "2026-01-03T00:00:00")
    cut.write_text(half := cut.read_text()[:-300])
    (tmp_path / "conftest.py").symlink_to(ROOT / "conftest.py")
    before = old.read_bytes()
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = python("-c", "from pytest_benchmark.cli import main; main()", "compare", cwd=tmp_path, env=env)
    text = done.stdout + done.stderr
    assert "Traceback" not in text and "0002_cut" in text, text
    assert "a triton  100.00 us -> 150.00 us" in text, text
    assert old.read_bytes() == before and cut.read_text() == half


@pytest.mark.parametrize("content", ("", WHOLE, '{"schema": 1'))
def test_tuning_sets_aside_what_stands_in_its_tables_place(tmp_path, capsys, content):
    table = tmp_path / "NVIDIA_H200.json"
    for name in ("NVIDIA_H200.json.old", "NVIDIA_H200.json.old1"):
        table.write_text(content)
        tune_command.set_aside(table, "NVIDIA H200")
        assert not table.exists() and (tmp_path / name).read_text() == content
        assert name in capsys.readouterr().out
    tune_command.set_aside(table, "NVIDIA H200")
    assert capsys.readouterr().out == ""


# --- Ctrl-C ---


# A plugin for the run: Ctrl-C in the midst of the second benchmark.
INTERRUPT = """
import itertools, signal
from nsa_sel.bench.timer import timing
tick, ticks = timing.tick, itertools.count()
def interrupting_tick():
    if next(ticks) == 3 * timing.ROUNDS:
        signal.raise_signal(signal.SIGINT)
    return tick()
timing.tick = interrupting_tick
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="would time the kernel")
def test_an_interrupted_perf_run_leaves_the_earlier_one_and_is_no_baseline(tmp_path):
    earlier = save_entries(tmp_path / "earlier-cpu", "0001_whole", [entry("a", "triton", 9, gpu=None)])
    (tmp_path / "interrupt.py").write_text(INTERRUPT)
    arguments = ["tests/perf", "--sel-matrix", "smoke", "--sel-family", "ragged,decode", "--benchmark-autosave"]
    arguments += [f"--benchmark-storage={tmp_path}"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "src")])}
    done = python("-m", "pytest", "-p", "interrupt", "-p", "no:cacheprovider", *arguments, env=env)
    assert done.returncode == pytest.ExitCode.INTERRUPTED, done.stdout + done.stderr
    (partial,) = [path for path in tmp_path.glob("*/*.json") if path != earlier]
    assert runs.load(earlier).timings and runs.load(partial).interrupted
    cut = runs.load(partial)
    clean = dataclasses.replace(cut, interrupted=False, asked=None, dirty=False)
    later = dataclasses.replace(clean, datetime="9999", path="", dirty=True)
    assert saved_storage.choose(later, [clean]) is clean
    assert saved_storage.choose(later, [dataclasses.replace(clean, interrupted=True)]) is None
    assert "was cut short and lacks cases" in rule.compare(cut, runs.load(earlier)).text()
