"""In how many processes the parity suite runs: who chooses, what a GPU's memory allows, and who must wait for whom."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
import torch

from nsa_sel.bench import parallel, plugin, run_tests
from nsa_sel.bench.suite import cases
from nsa_sel.bench.suite.inputs import memory_estimate
from tests.programs import python

ROOT = Path(__file__).parents[2]
GB = 10**9
SEVERAL = ["-n", "auto", "--benchmark-disable"]


@pytest.fixture(autouse=True)
def _with_xdist(monkeypatch):
    """Let pytest-xdist seem installed, no launcher have started this process, and the environment say nothing."""
    monkeypatch.setattr(parallel, "find_spec", lambda name: name)
    monkeypatch.setattr(parallel, "one_of_many", lambda: False)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)


@pytest.mark.parametrize("asked", ([], ["-q"], ["-k", "layouts", "-x"], ["-p", "no:cacheprovider"], ["--no-header"]))
def test_the_suite_runs_in_several_processes(asked):
    assert parallel.options(asked) == SEVERAL


@pytest.mark.parametrize(
    "asked",
    (
        ["-n", "4"],
        ["-n0"],
        ["-q", "--numprocesses=4"],
        ["-p", "no:xdist"],
        ["-pno:xdist"],
        ["--sel-kernel", "mine:f"],
        ["--sel-kernel=mine:f"],
        ["--sel-cases", "cases.yaml"],
        ["--sel-matrix", "random"],
    ),
)
def test_the_caller_chooses_and_what_is_not_ours_runs_in_one_process(asked, monkeypatch):
    assert parallel.options(asked) == []
    monkeypatch.setenv("PYTEST_ADDOPTS", " ".join(asked))
    assert parallel.options([]) == []


def test_without_xdist_there_is_one_process(monkeypatch):
    monkeypatch.setattr(parallel, "find_spec", lambda name: None)
    assert parallel.options([]) == [] and parallel.expected() == 1


def test_a_rank_of_torchrun_is_one_process(monkeypatch):
    monkeypatch.setattr(parallel, "one_of_many", lambda: True)
    assert parallel.options([]) == []


@pytest.mark.parametrize(("verb", "several"), ((run_tests.parity, True), (run_tests.bench, False)))
def test_the_parity_verb_alone_hands_them_to_pytest_before_the_caller_s(verb, several, monkeypatch):
    started = []
    monkeypatch.setattr(run_tests.os, "execv", lambda program, words: started.extend(words))
    for name in ("OMP_NUM_THREADS", "PYTHONDONTWRITEBYTECODE"):
        monkeypatch.setenv(name, "")  # put back at the end, whatever the verb sets
        monkeypatch.delenv(name)
    verb(["-q"])
    assert (started[-4:] == [*SEVERAL, "-q"]) == several == ("auto" in started)
    assert os.environ.get("OMP_NUM_THREADS") == ("1" if several else None)


@pytest.mark.parametrize(
    ("free", "n_cores", "processes"),
    (
        (139 * GB, 16, 14),
        (139 * GB, 8, 8),
        (23 * GB, 16, 7),
        (15 * GB, 16, 4),
        (11 * GB, 16, 2),
        (7 * GB, 16, 1),
        (3 * GB, 16, 1),
        (139 * GB, 1, 1),
    ),
)
def test_processes_leave_room_for_the_largest_test(free, n_cores, processes):
    assert parallel.affordable(free, n_cores) == processes
    if processes > 1:
        assert processes * parallel.PROCESS_BYTES + parallel.LARGEST_TEST_BYTES <= free


@pytest.mark.parametrize(("free", "processes"), ((100 * GB, 8), (11 * GB, 2), (7 * GB, 0)))
def test_auto_counts_the_free_memory_of_a_gpu_and_one_process_has_no_workers(free, processes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 139 * GB))
    monkeypatch.setattr(parallel, "cores", lambda: 8)
    assert plugin.pytest_xdist_auto_num_workers() == processes


def test_auto_means_without_a_gpu_what_xdist_says(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert plugin.pytest_xdist_auto_num_workers() is None


def test_xdist_asks_this_plugin_first(tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "test_two.py").write_text("def test_one():\n    pass\n")
    few = "from nsa_sel.bench import plugin\nplugin.torch.cuda.is_available = lambda: True\n"
    few += "plugin.torch.cuda.mem_get_info = lambda: (11 * 10**9, 0)\nplugin.parallel.cores = lambda: 8\n"
    (tmp_path / "few.py").write_text(few)
    command = ["-m", "pytest", "-p", "few", "-p", "nsa_sel.bench.plugin", "-n", "auto", tmp_path]
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{tmp_path}"}
    done = python(*command, cwd=tmp_path, env=env)
    assert "2 workers [1 item]" in done.stdout, done.stdout + done.stderr


def test_nobody_else_is_let_in(tmp_path):
    path = tmp_path / "lock"
    with path.open("w") as other:
        with parallel.alone(path), pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU means real kernels, and compiling them")
@pytest.mark.parametrize(("worker", "held"), (({"PYTEST_XDIST_WORKER": "gw0"}, "prefill"), ({}, "none")))
def test_a_test_that_needs_much_memory_keeps_the_others_out_where_there_are_others(worker, held, tmp_path):
    (tmp_path / "tries.py").write_text(f"""
import fcntl
def pytest_runtest_call(item):
    with open({str(tmp_path / "much_memory.lock")!r}, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("held in", item.name)
""")
    tests = "of_every_layout and dtype1 and (prefill or decode)"
    command = ["-m", "pytest", "-qs", "-p", "tries", f"--basetemp={tmp_path / 'gw0'}", "-k", tests]
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{tmp_path}", **worker}
    done = python(*command, "tests/parity/test_layouts.py", env=env)
    assert "2 passed" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("held in") == (held != "none")
    assert ("held in test_triton_sel_parity_of_every_layout[prefill-dtype1]" in done.stdout) == (held == "prefill")


def test_no_paged_case_needs_more_than_the_largest_test():
    largest = max(map(memory_estimate, cases.matrix("full", family="paged")))
    assert parallel.ORDINARY_TEST_BYTES < largest < parallel.LARGEST_TEST_BYTES


def test_more_processes_take_less_and_none_more_than_one():
    seconds = [parallel.expected_seconds(n) for n in range(1, parallel.MOST_PROCESSES + 1)]
    assert seconds[0] == 556 and seconds[1:] == sorted(seconds[1:], reverse=True)
    assert round(seconds[-1]) == 178
    assert max(seconds) == 556
