"""Ranks of a job, as torchrun starts them: shares, one saved run, failures with their rank, what a lost rank leaves."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from saved_runs import H200

from nsa_sel.bench.compare import command as compare_command
from nsa_sel.bench.compare.yardstick import explain
from nsa_sel.bench.ranks import job
from nsa_sel.bench.ranks.shares import benchmark_s, dealt
from nsa_sel.bench.saved import run, storage
from nsa_sel.bench.suite import cases
from tests.programs import needs_interpreter, python

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
WARNINGS = (ROOT / "pytest.ini").read_text().partition("filterwarnings =")[2]
CASES, METHODS = "abcdef", ("triton", "packed_sdpa")
MACHINES = [{**H200, "gpu_id": card} for card in ("aa", "bb")]
RANK_OF = {"a": 0, "b": 1, "c": 0, "d": 1, "e": 0, "f": 1}  # of two: all cost the same
CONFTEST = """
import json, os, pathlib, sys, pytest
from nsa_sel.bench.timer import machine

pytest_plugins = ["nsa_sel.bench.plugin"]
RANK = int(os.environ.get("RANK", 0))
machine._identity = lambda: {**json.loads(pathlib.Path("machine.json").read_text())[RANK], "cuda": None}
FLOOR_US = 3.0 + RANK  # each card has its own
CURVE = [[1e3, FLOOR_US], [1e9, 9.0]]
machine.set_calibration({"null_kernel_us": {"device": FLOOR_US}, "read_limit_us": CURVE})

@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_generate_commit_info(config):
    return {"id": "abc", "dirty": False}

@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_generate_machine_info():
    return {"node": "a-host"}

def pytest_unconfigure():
    loaded = [name for name in sys.modules if name.startswith("nsa_sel.bench.ranks.")]
    pathlib.Path(f"loaded-{RANK}.json").write_text(json.dumps(loaded))
"""
# Every benchmark does what do.json says of its case, and writes down that it was measured. SDPA takes 9 us.
SUITE = """
import json, os, pathlib, signal, time, pytest
from conftest import RANK
from nsa_sel.bench.compare import hooks
from nsa_sel.bench.resume import plugin
from nsa_sel.bench.timer import machine

todo, us = (json.loads(pathlib.Path(name).read_text()) for name in ("do.json", "us.json"))
now, kernel_us, us = 0.0, us, 9.0

def clock():
    global now
    now += us * 1e-6
    return now

def again():
    return dict.fromkeys(("median", "q1", "q3"), kernel_us * 1e-6) | {"ci95_us": [kernel_us, kernel_us]}

@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize(("case_id", "method"), [(case, method) for case in "CASES" for method in METHODS])
def test_sel(benchmark, case_id, method, pytestconfig):
    global us
    us = kernel_us if method == "triton" else 9.0
    hooks.register_remeasure(case_id, method, again)
    if plugin.holds(pytestconfig, case_id, method):
        benchmark.has_error = True
        return
    assert "RANK" not in os.environ
    action = todo.get(f"{case_id}-{method}")
    if action == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "hang":
        time.sleep(60)
    if action == "skip":
        benchmark.has_error = True
        hooks.register_skipped(case_id, method, "no memory")
        pytest.skip("no memory")
    if action == "fail":
        benchmark.has_error = True
        raise AssertionError("planted")
    time.sleep(todo.get("slowly", 0))
    benchmark.pedantic(lambda: None, rounds=5)
    card = {name: value for name, value in machine.environment().items() if name in ("gpu", "gpu_id")}
    benchmark.extra_info.update(case=case_id, method=method, ci95_us=[us, us], **card)
    with open(f"measured-{RANK}.txt", "a") as file:
        file.write(case_id)
""".replace("CASES", CASES).replace("METHODS", repr(METHODS))
PROFILE = """
from hypothesis import settings

settings.register_profile("as the test says", derandomize=FIXED)
settings.load_profile("as the test says")
"""
DRAWN = """
import json
from conftest import RANK
from hypothesis import given, settings, strategies as st

drawn = []

@settings(max_examples=20)
@given(st.integers())
def test_drawn(n):
    drawn.append(n)
    with open(f"drawn-{RANK}.json", "w") as file:
        json.dump(drawn, file)
    assert RANK == 0 or abs(n) < 100
"""


@pytest.fixture(scope="module")
def zygote() -> Iterator[subprocess.Popen[str]]:
    """Give the process that starts ranks."""
    env = {name: value for name, value in os.environ.items() if "XDIST" not in name and name not in job.VARIABLES}
    env |= {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(HERE / "start_ranks.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        yield process
        process.stdin.close()


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def environment(size: int) -> list[dict[str, str]]:
    """Return what a launcher sets for each rank; nothing for a process of its own (size 0)."""
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)] or [{}]


class Jobs:
    """Run jobs in a folder, and tell what they left there."""

    def __init__(self, folder: Path, zygote: subprocess.Popen[str]) -> None:
        self.folder, self.zygote = folder, zygote
        self.codes: list[int] = []

    def start(self, argv: list[str], size: int, patience: float = 20, **env: str) -> list[str]:
        """Run a job of so many ranks, and return what each printed."""
        outs = [self.folder / f"out-{rank}" for rank in range(size or 1)]
        ranks = [{"env": {**of, **env}, "out": str(out)} for of, out in zip(environment(size), outs, strict=True)]
        task = {"ranks": ranks, "cwd": str(self.folder), "argv": argv, "patience": patience}
        assert self.zygote.stdin is not None and self.zygote.stdout is not None
        print(json.dumps(task), file=self.zygote.stdin, flush=True)
        self.codes = json.loads(self.zygote.stdout.readline())
        return [out.read_text() for out in outs]

    def perf(self, *options: str, size: int = 2, do: dict | None = None, us: float = 9.0, machines=MACHINES):
        """Run the benchmarks: `do` says what happens in which, `machines` what each rank runs on."""
        for name, value in (("do", do or {}), ("us", us), ("machine", machines)):
            (self.folder / f"{name}.json").write_text(json.dumps(value))
        for path in self.folder.glob("measured-*.txt"):
            path.unlink()
        plain = ("-p", "no:cacheprovider", "test_perf.py")
        return self.start([*plain, *(options or ("--benchmark-save=x",))], size)

    def measured(self) -> list[str]:
        """Return which cases each rank has measured, a letter for each of their methods."""
        files = [self.folder / f"measured-{rank}.txt" for rank in (0, 1)]
        return [file.read_text() if file.exists() else "" for file in files]

    def saved(self) -> list[Path]:
        return sorted(self.folder.glob(".benchmarks/*/*.json"))

    def journals(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob(".benchmarks/*/.*.journal"))


@pytest.fixture
def jobs(tmp_path, zygote) -> Jobs:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_perf.py").write_text(SUITE)
    (tmp_path / "test_drawn.py").write_text(DRAWN)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\naddopts = --benchmark-quiet\nfilterwarnings ={WARNINGS}")
    return Jobs(tmp_path, zygote)


RESUME = ("--benchmark-save=x", "--sel-resume")


def form(path: Path) -> object:
    """Return all names of a saved run and the order of its benchmarks, without figures and the note of its ranks."""

    def names(value: object) -> object:
        return {key: names(inner) for key, inner in value.items()} if isinstance(value, dict) else type(value)

    data = json.loads(path.read_text())
    mark = {name: value for name, value in data.pop(run.MARK).items() if name != "ranks"}
    return names(data), mark, [(bench["fullname"], names(bench)) for bench in data["benchmarks"]]


# --- shares ---


@given(st.lists(st.floats(0, 1e3), max_size=60), st.integers(1, 9))
def test_every_group_has_one_rank_and_no_rank_has_more_than_the_mean_and_one_group(costs, size):
    owner = dealt(dict(enumerate(costs)), size)
    assert list(owner) == list(range(len(costs))) and set(owner.values()) <= set(range(size))
    loads = [sum(costs[group] for group, rank in owner.items() if rank == of) for of in range(size)]
    assert max(loads) <= sum(costs) / size + max(costs, default=0) + 1e-6
    assert dealt(dict(enumerate(costs)), size) == owner


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_full_matrix_is_dealt_in_equal_parts(size):
    costs = {case: sum(benchmark_s(case, method) for method in case.methods) for case in cases.matrix("full")}
    loads = [0.0] * size
    for case, rank in dealt(costs, size).items():
        loads[rank] += costs[case]
    assert max(loads) < 1.01 * sum(costs.values()) / size


@pytest.mark.parametrize(
    ("visible", "rank", "taken"),
    [(None, 1, "1"), (None, 5, "1"), ("6,2", 0, "6"), ("6,2", 3, "2"), ("GPU-ab", 1, "GPU-ab"), ("", 1, "")],
)
def test_a_rank_takes_the_card_of_its_local_rank_and_may_share_it(visible, rank, taken, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4 if visible is None and rank == 1 else 2)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    job.take_card()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == taken


# --- one run of many ranks ---


def test_two_ranks_save_what_one_process_does_each_case_on_one_card(jobs, capsys):
    one = jobs.perf(size=0)
    assert jobs.codes == [0] and json.loads((jobs.folder / "loaded-0.json").read_text()) == []
    two = jobs.perf()
    assert jobs.codes == [0, 0] and jobs.journals() == []
    assert "12 passed" in one[0] and "12 passed" in two[0] and two[1] == ""
    assert "2 ranks: rank 0 on NVIDIA H200 aa, rank 1 on NVIDIA H200 bb" in two[0]
    assert [set(cases) for cases in jobs.measured()] == [{"a", "c", "e"}, {"b", "d", "f"}]
    assert jobs.perf(size=1) and jobs.codes == [0]
    of_one, of_two, of_a_job_of_one = jobs.saved()
    assert form(of_one) == form(of_two) == form(of_a_job_of_one)
    assert json.loads(of_one.read_text())[run.MARK] == json.loads(of_a_job_of_one.read_text())[run.MARK]
    cards = {extra["case"]: extra["gpu_id"] for extra in run.Saved.load(of_two).extras.values()}
    assert cards == {case: ("aa", "bb")[rank] for case, rank in RANK_OF.items()}
    # Each timing is judged by its own card: that of rank 1 launches 1 us later.
    assert compare_command.main([str(of_one), str(of_two)]) == 0
    assert "another card of the same name: aa -> aa+bb, calibration taken off" in capsys.readouterr().out
    old, new = run.load(of_one), run.load(of_two)
    corrected = {key: explain(old, new).corrected(timing).median_us for key, timing in new.timings.items()}
    assert corrected["a", "triton"] == pytest.approx(9.0) and corrected["b", "triton"] == pytest.approx(8.0)
    assert not explain(new, new).other_card


def test_what_looks_slower_is_measured_again_by_its_own_rank(jobs):
    jobs.perf("--benchmark-save=baseline")
    slow = jobs.perf("--benchmark-save=slow", "--perf-fail", us=99.0, do={"d-packed_sdpa": "skip"})[0]
    assert jobs.codes == [1, 0] and "0 missing" in slow
    for case in CASES:
        assert re.search(rf"{case} triton.*9.00 us -> 99.00 us.*again 99.00 us", slow)


def test_a_failure_is_shown_with_its_rank_and_its_repro(jobs):
    out, other = jobs.perf(do={"b-triton": "fail"})
    assert jobs.codes == [1, 0] and other == "" and "1 failed, 11 passed" in out
    assert re.search(r"- rank 1 -+\nrank 1 on NVIDIA H200 bb; alone:\n  python -m pytest 'test_perf.py::test_sel", out)
    assert len(run.load(jobs.saved()[0]).timings) == 11 and jobs.journals() == []


def test_after_the_first_failure_all_ranks_stop(jobs):
    jobs.perf("--benchmark-save=x", "-x", do={"a-triton": "fail", "slowly": 0.1})
    assert jobs.codes == [1, 0] and len(jobs.measured()[1]) < 6
    jobs.perf(*RESUME)
    assert jobs.codes == [0, 0] and len(run.load(jobs.saved()[0]).timings) == 12 and jobs.journals() == []


@pytest.mark.parametrize("fixed", [False, True])  # examples always the same: Hypothesis's own profile in CI
def test_ranks_draw_different_examples_and_a_failure_is_seen_again_on_one_process(jobs, fixed):
    (jobs.folder / "conftest.py").write_text(CONFTEST + PROFILE.replace("FIXED", str(fixed)))
    (jobs.folder / "machine.json").write_text(json.dumps(MACHINES))
    out, _ = jobs.start(["-p", "no:cacheprovider", "test_drawn.py"], 2)
    drawn = [json.loads((jobs.folder / f"drawn-{rank}.json").read_text()) for rank in (0, 1)]
    assert jobs.codes == [1, 0] and drawn[0][:5] != drawn[1][:5] and "1 failed, 1 passed" in out
    (command,) = re.findall(r"^  python -m pytest (.*)$", out, re.MULTILINE)
    assert "--hypothesis-seed=1" in command
    (jobs.folder / "conftest.py").write_text(CONFTEST + PROFILE.replace("FIXED", "False"))
    jobs.start(["-p", "no:cacheprovider", *shlex.split(command)], 0)
    assert json.loads((jobs.folder / "drawn-0.json").read_text())[:5] == drawn[1][:5]


# --- what cannot be one run ---


@pytest.mark.parametrize("what", ["gpu", "torch"])
def test_ranks_on_different_models_or_versions_are_refused(jobs, what):
    names = {"gpu": ("NVIDIA H200", "NVIDIA A100"), "torch": ("2.11.0", "2.10.0")}[what]
    out = jobs.perf(machines=[{**H200, what: name} for name in names])
    assert set(jobs.codes) <= {pytest.ExitCode.USAGE_ERROR, -signal.SIGTERM} and jobs.measured() == ["", ""]
    assert f"ERROR: nsa_sel: {what} is {names[0]} on rank 0, {names[1]} on rank 1" in "".join(out)
    assert ("CUDA_VISIBLE_DEVICES" in "".join(out)) == (what == "gpu")


def test_a_run_of_ranks_that_share_a_card_says_so_and_is_no_baseline(jobs):
    out = jobs.perf(machines=[MACHINES[0], MACHINES[0]])[0]
    assert jobs.codes == [0, 0] and "no figures" in out
    found = run.load(jobs.saved()[0])
    assert found.shared_cards and not storage.is_clean(found, found)


# --- a rank that is lost ---


def test_a_killed_rank_costs_no_result_and_the_rest_is_measured_later(jobs):
    out = jobs.perf(do={"d-packed_sdpa": "die", "slowly": 0.1})[0]
    assert jobs.codes == [pytest.ExitCode.INTERRUPTED, -signal.SIGKILL]
    assert "rank 1 on NVIDIA H200 bb: ended early; 3 of its tests have no result" in out
    assert "its last sign: test_perf.py::test_sel[d-packed_sdpa]" in out
    assert re.search(r"no result, or not of every method: .*d.*f", out)
    (part,) = jobs.saved()
    assert run.load(part).interrupted and [case for case, _ in run.load(part).timings].count("b") == 2
    assert jobs.journals() == [".x-rank0.journal", ".x-rank1.journal"]
    before = len(run.load(part).timings)
    plain = jobs.perf(*RESUME, size=0)[0]
    assert jobs.codes == [pytest.ExitCode.USAGE_ERROR] and "many ranks True there, None here" in plain
    out = jobs.perf(*RESUME)[0]
    assert jobs.codes == [0, 0] and f"{before} of 12 benchmarks are in them" in out
    assert sum(map(len, jobs.measured())) == 12 - before
    (whole,) = jobs.saved()
    assert whole != part and jobs.journals() == [] and jobs.perf() and jobs.codes == [0, 0]
    assert form(whole) == form(jobs.saved()[1])


def test_rank_0_may_die_too(jobs):
    jobs.perf(do={"c-triton": "die", "slowly": 0.1})
    assert jobs.codes[0] == -signal.SIGKILL and jobs.codes[1] != 0 and jobs.saved() == []
    assert jobs.journals() == [".x-rank0.journal", ".x-rank1.journal"]
    done = sum(map(len, jobs.measured()))
    assert "goes on with" in jobs.perf(*RESUME)[0] and jobs.codes == [0, 0]
    assert sum(map(len, jobs.measured())) == 12 - done and jobs.journals() == []
    assert len(run.load(jobs.saved()[0]).timings) == 12


def test_a_rank_that_hangs_is_given_up_after_the_limit(jobs):
    out = jobs.perf("--benchmark-save=x", "--sel-rank-limit=2", do={"d-triton": "hang"})[0]
    assert jobs.codes[0] == 1 and jobs.codes[1] != 0
    assert "rank 1 on NVIDIA H200 bb: silent for 2 s; 4 of its tests have no result" in out
    assert "no result, or not of every method: d, f" in out
    assert len(run.load(jobs.saved()[0]).timings) == 8
    jobs.perf(*RESUME)
    assert jobs.codes == [0, 0] and jobs.measured() == ["", "ddff"] and jobs.journals() == []


def test_a_case_half_measured_on_another_card_is_measured_anew(jobs):
    jobs.perf(do={"d-packed_sdpa": "die", "slowly": 0.05})
    assert jobs.measured()[1] == "bbd"
    jobs.perf(*RESUME, machines=[MACHINES[0], {**H200, "gpu_id": "cc"}])
    assert jobs.codes == [0, 0] and jobs.measured()[1] == "ddff"
    cards = {extra["case"]: set() for extra in run.Saved.load(jobs.saved()[0]).extras.values()}
    for extra in run.Saved.load(jobs.saved()[0]).extras.values():
        cards[extra["case"]].add(extra["gpu_id"])
    assert cards["b"] == {"bb"} and cards["d"] == cards["f"] == {"cc"}


def test_a_resumed_job_may_have_fewer_ranks(jobs):
    jobs.perf(do={"d-packed_sdpa": "die", "slowly": 0.05})
    out = jobs.perf(*RESUME, size=1)[0]
    assert jobs.codes == [0] and "goes on with" in out and jobs.measured()[0].count("d") == 2
    assert len(run.load(jobs.saved()[0]).timings) == 12 and jobs.journals() == []


# --- tune ---

TUNE = ("-k", "N1024", "-k", "few", "--out", "table.json", "--results", "results")


def tune(jobs: Jobs, *options: str, size: int = 2, patience: float = 20, does: str = "") -> list[str]:
    for path in jobs.folder.glob("did-*.json"):
        path.unlink()
    return jobs.start([str(HERE / "start_tune.py"), *TUNE, *options], size, patience, RANK_DOES=does)


def did(jobs: Jobs, rank: int) -> dict:
    return json.loads((jobs.folder / f"did-{rank}.json").read_text())


def test_ranks_tune_classes_of_their_own_and_write_the_table_of_one(jobs):
    tune(jobs, size=0)
    alone, entries = did(jobs, 0), json.loads((jobs.folder / "table.json").read_text())["entries"]
    (jobs.folder / "table.json").unlink()
    out, other = tune(jobs)
    assert jobs.codes == [0, 0] and other == ""
    both = [did(jobs, rank) for rank in (0, 1)]
    assert not set(both[0]["timed"]) & set(both[1]["timed"])
    assert sorted(both[0]["timed"] + both[1]["timed"]) == alone["timed"]
    assert abs(both[0]["timings"] - both[1]["timings"]) < 0.35 * alone["timings"]
    again = json.loads((jobs.folder / "table.json").read_text())["entries"]
    assert [(e["key"], e["launch"]) for e in again] == [(e["key"], e["launch"]) for e in entries]
    assert out.count("cases in") == 1


def test_a_rank_that_hangs_in_a_sweep_costs_what_it_had_not_measured(jobs):
    out = tune(jobs, "--sel-rank-limit=2", does="hang")[0]
    assert jobs.codes[0] == 1 and jobs.codes[1] != 0
    assert re.search(r"rank 1 .*: silent for 2 s; its last sign: .* timing, first round", out)
    (named,) = re.findall(r"no result of 3 cases: (.*)", out)
    entries = json.loads((jobs.folder / "table.json").read_text())["entries"]
    assert len(entries) == 4 and "The same command measures what is missing" in out
    assert not [case for entry in entries for case in entry["figures"]["us"] if case in named]
    out = tune(jobs)[0]
    assert jobs.codes == [0, 0] and "continues: " in out and did(jobs, 0)["timings"] == 0
    assert len(json.loads((jobs.folder / "table.json").read_text())["entries"]) == 7
    tune(jobs)  # a finished sweep is measured anew
    assert did(jobs, 0)["timings"] and did(jobs, 1)["timings"]


def test_a_rank_that_lost_its_gpu_starts_anew_and_goes_on(jobs):
    tune(jobs, does="lose")
    assert (jobs.folder / "lost").exists() and jobs.codes == [0, 0]


# --- under torchrun itself ---


def torchrun(*arguments: str, folder: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    unwanted = ("NSA_", "PYTEST", "TRITON", *job.VARIABLES)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    kept |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{HERE}"}
    start = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    return python(*start, *arguments, cwd=folder, env={**kept, **env})


def test_torchrun_of_the_perf_suite(tmp_path):
    options = ("--sel-matrix=smoke", "--sel-family=ragged,decode", f"--benchmark-storage={tmp_path}")
    done = torchrun("-m", "pytest", "-p", "no:cacheprovider", "tests/perf", "--benchmark-autosave", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 cases, 8 benchmarks on the CPU" in done.stdout and "8 passed, 12 skipped" in done.stdout
    assert done.stdout.count("test session starts") == done.stdout.count("saved in ") == 1
    assert re.search(r"20/20, 0:00 left: benchmarks", done.stdout)
    (saved,) = tmp_path.glob("*/*.json")
    assert len(run.load(saved).timings) == 8 and not list(tmp_path.glob("*/.*"))


@needs_interpreter
def test_torchrun_of_the_parity_suite():
    tests = ("tests/parity/test_layouts.py", "-k", "test_triton_sel_parity_of_every_layout and decode")
    done = torchrun("-m", "pytest", "-p", "no:cacheprovider", *tests)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\n\d+ comparisons with Triton's interpreter", done.stdout)
    assert done.stdout.count("test session starts") == 1


def test_torchrun_ends_all_ranks_of_a_sweep_when_one_dies_and_the_next_goes_on(jobs):
    done = torchrun(str(HERE / "start_tune.py"), *TUNE, folder=jobs.folder, RANK_DOES="die")
    assert done.returncode != 0 and re.search(r"no result of \d cases: rows-bf16", done.stdout)
    assert "interrupted; the same command goes on" in done.stderr and not (jobs.folder / "table.json").exists()
    assert "continues: " in tune(jobs)[0] and jobs.codes == [0, 0] and (jobs.folder / "table.json").exists()
