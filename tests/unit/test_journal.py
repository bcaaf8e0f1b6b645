"""However a perf run ends, what it measured is saved or can be gone on with; whatever is wrong with the disk."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import pytest_benchmark
import torch
from packaging.version import Version
from pytest_benchmark.storage.file import FileStorage
from saved_runs import H200

from nsa_sel.bench.compare import command as compare_command
from nsa_sel.bench.compare import hooks
from nsa_sel.bench.resume import conditions, results
from nsa_sel.bench.saved import journal, run, storage
from nsa_sel.bench.timer import machine

pytest_plugins = ["pytester"]
ROOT = Path(__file__).parents[2]
WARNINGS = (ROOT / "pytest.ini").read_text().partition("filterwarnings =")[2]
CASES = ("a", "b", "c", "d", "e")
OPENS_JSON_FIRST = Version(pytest_benchmark.__version__) < Version("5.3")
OLD = "pytest-benchmark before 5.3 opens the file before it measures, and refuses what it cannot open"
CONFTEST = """
import json, pathlib, pytest
from nsa_sel.bench.compare import hooks
from nsa_sel.bench.compare.hooks import (
    pytest_benchmark_group_stats, pytest_benchmark_update_json, pytest_benchmark_update_machine_info,
    pytest_configure, pytest_sessionfinish, pytest_terminal_summary,
)

pytest_plugins = ["nsa_sel.bench.resume.plugin"]

def pytest_addoption(parser):
    hooks.addoption(parser)
    parser.addoption("--sel-plant", type=float)

@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_generate_commit_info(config):
    return {"id": "abc", "dirty": False} | json.loads(pathlib.Path("commit.json").read_text())
"""
# Every case does what do.json says, and what was measured is written down. All times are exactly 9 us, or us.json's.
SUITE = """
import functools, json, os, pathlib, signal, pytest
from nsa_sel.bench.compare import hooks
from nsa_sel.bench.resume import plugin

todo, us = (json.loads(pathlib.Path(name).read_text()) for name in ("do.json", "us.json"))
now = 0.0

def clock():
    global now
    now += us * 1e-6
    return now

def again():
    if todo.get("again") == "interrupt":
        raise KeyboardInterrupt
    return dict(median=us * 1e-6, q1=us * 1e-6, q3=us * 1e-6, ci95_us=[us, us])

@pytest.mark.benchmark(timer=clock)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("case_id", "method"), [(case, "triton") for case in "CASES"])
def test_sel(benchmark, case_id, method, pytestconfig):
    hooks.register_remeasure(case_id, method, again)
    if plugin.holds(pytestconfig, case_id, method):
        return
    action = todo.get(case_id)
    try:
        benchmark.pedantic(lambda: None, rounds=5)
        if action == "interrupt":
            raise KeyboardInterrupt
        if action == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        if action == "swallow":
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except KeyboardInterrupt:
                os.kill(os.getpid(), signal.SIGTERM)
        if action == "lose":
            pytest.exit("the GPU no longer answers", returncode=1)
        assert action != "fail"
    except BaseException:
        benchmark.has_error = True
        raise
    benchmark.extra_info.update(case=case_id, method=method, ci95_us=[us, us])
    with open("measured.txt", "a") as file:
        file.write(case_id)
""".replace("CASES", "".join(CASES))


@pytest.fixture(scope="module", autouse=True)
def machine_is_known():
    """Import Triton before an inner session, whose imports are forgotten, does: it cannot be imported twice."""
    conditions.environment()


@pytest.fixture
def perf(pytester, monkeypatch):
    """Return a function that runs five cases: `do` says what happens in which."""
    monkeypatch.setattr(hooks, "remeasure", {})
    monkeypatch.setattr(machine, "_identity", lambda: {**H200, "cuda": None})  # without a GPU nothing is compared
    monkeypatch.setattr("pytest_benchmark.plugin.get_cpu_info", dict)  # asks the CPU in a subprocess
    monkeypatch.setattr(tempfile, "tempdir", str(pytester.path / "tmp"))
    pytester.path.joinpath("tmp").mkdir()
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(SUITE)
    pytester.makefile(".ini", pytest=f"[pytest]\nfilterwarnings ={WARNINGS}")

    def perf(*options, do=None, us=9.0, commit=None):
        for name, value in (("do", do or {}), ("us", us), ("commit", commit or {})):
            pytester.path.joinpath(f"{name}.json").write_text(json.dumps(value))
        pytester.path.joinpath("measured.txt").write_text("")
        plain = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest")
        return pytester.runpytest_inprocess(*plain, *(options or ("--benchmark-save=x",)), no_reraise_ctrlc=True)

    return perf


RESUME = ("--benchmark-save=x", "--sel-resume")
ENDINGS = {
    "Ctrl-C": ({"c": "interrupt"}, (), pytest.ExitCode.INTERRUPTED),
    "SIGTERM": ({"c": "terminate"}, (), pytest.ExitCode.INTERRUPTED),
    "a lost GPU": ({"c": "lose"}, (), pytest.ExitCode.TESTS_FAILED),
    "--exitfirst": ({"c": "fail"}, ("-x",), pytest.ExitCode.TESTS_FAILED),
}


def measured(pytester) -> str:
    return pytester.path.joinpath("measured.txt").read_text()


def saved(pytester) -> list[Path]:
    return sorted(pytester.path.glob(".benchmarks/*/*.json"))


def journals(pytester) -> list[Path]:
    return sorted(pytester.path.glob(".benchmarks/**/*.journal"))


def form(path: Path) -> object:
    """Return all names of a saved run and the order of its benchmarks, without its figures."""

    def names(value: object) -> object:
        return {key: names(inner) for key, inner in value.items()} if isinstance(value, dict) else type(value)

    data = json.loads(path.read_text())
    return names(data), data[run.MARK], [(bench["fullname"], names(bench)) for bench in data["benchmarks"]]


# --- every way in which a run can end ---


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("data", ((), ("--benchmark-save-data",)), ids=("stats", "data"))
def test_a_run_that_ended_early_is_saved_in_part_and_gone_on_with(perf, pytester, ending, data):
    do, options, status = ENDINGS[ending]
    early = perf("--benchmark-save=x", *options, *data, do=do)
    assert early.ret == status and measured(pytester) == "ab"
    early.stdout.fnmatch_lines(["*ended early, after [23] of 5 benchmarks*"])
    (part,), (left,) = saved(pytester), journals(pytester)
    assert [case for case, _ in run.load(part).timings] == ["a", "b"] == [case for case, _ in run.load(left).timings]
    assert run.load(part).interrupted and run.load(left).interrupted
    later = dataclasses.replace(run.load(part), datetime="9999")
    assert storage.is_clean(dataclasses.replace(run.load(part), interrupted=False, asked=None), later)
    assert not storage.is_clean(run.load(part), later)
    assert perf(*RESUME, *data).ret == 0 and measured(pytester) == "cde"
    (whole,) = saved(pytester)
    assert whole != part and not journals(pytester)
    pytester.path.joinpath("measured.txt").write_text("")
    assert perf("--benchmark-save=x", *data).ret == 0 and measured(pytester) == "abcde"
    assert form(whole) == form(saved(pytester)[1]) and not journals(pytester)
    assert json.loads(whole.read_text())[run.MARK] == {"asked": [[case, "triton"] for case in CASES]}


def test_a_run_may_end_early_more_than_once(perf, pytester):
    perf(do={"b": "terminate"})
    again = perf(*RESUME, do={"d": "interrupt"})
    again.stdout.fnmatch_lines(["*goes on with .x.journal: 1 of 5*", "*ended early, after 3 of 5*"])
    assert measured(pytester) == "bc" and len(saved(pytester)) == 1  # of what both have measured
    assert perf(*RESUME, do={"d": "interrupt"}).ret == pytest.ExitCode.INTERRUPTED and measured(pytester) == ""
    assert len(run.load(saved(pytester)[0]).timings) == 3
    assert perf(*RESUME).ret == 0 and measured(pytester) == "de"
    assert len(run.load(saved(pytester)[0]).timings) == 5 and not journals(pytester)


def test_sigterm_that_a_call_swallows_ends_the_run_after_that_call(perf, pytester):
    early = perf(do={"b": "swallow"})
    assert early.ret == pytest.ExitCode.INTERRUPTED and measured(pytester) == "ab"
    assert perf(*RESUME).ret == 0 and measured(pytester) == "cde"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_while_the_run_is_saved_waits_until_it_is(perf, pytester, monkeypatch):
    def save(self, *arguments, original=FileStorage.save):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        original(self, *arguments)

    monkeypatch.setattr(FileStorage, "save", save)
    assert perf().ret == 0 and not journals(pytester)
    assert not run.load(saved(pytester)[0]).interrupted


def test_ctrl_c_while_alerts_are_measured_again_leaves_a_run_that_is_compared_again(perf, pytester):
    perf("--benchmark-save=baseline")
    slow = ("--benchmark-save=slow", "--perf-fail")
    stopped = perf(*slow, do={"again": "interrupt"}, us=99.0)
    assert stopped.ret == pytest.ExitCode.INTERRUPTED and measured(pytester) == "abcde"
    stopped.stderr.fnmatch_lines(["*interrupted before the comparison*"])
    assert run.load(saved(pytester)[1]).interrupted
    compared = perf(*slow, "--sel-resume", us=99.0)
    assert compared.ret == 1 and measured(pytester) == "" and not journals(pytester)
    compared.stdout.fnmatch_lines(["*a triton*9.00 us -> 99.00 us*again 99.00 us*"])
    assert len(saved(pytester)) == 2 and len(run.load(saved(pytester)[1]).regressions) == 5


def test_a_run_with_failed_cases_that_tried_all_is_whole(perf, pytester):
    assert perf(do={"b": "fail"}).ret == 1
    assert not run.load(saved(pytester)[0]).interrupted and not journals(pytester)


def test_a_run_that_measured_nothing_saves_nothing(perf, pytester):
    early = perf(do={"a": "interrupt"})
    assert early.ret == pytest.ExitCode.INTERRUPTED and not saved(pytester) and not journals(pytester)
    assert perf(do=dict.fromkeys(CASES, "fail")).ret == 1 and not saved(pytester)


def test_a_run_that_is_not_saved_leaves_no_journal(perf, pytester):
    assert perf("-q", do={"c": "interrupt"}).ret == pytest.ExitCode.INTERRUPTED
    assert perf("--benchmark-save=x", "--benchmark-disable", do={"c": "interrupt"}).ret == pytest.ExitCode.INTERRUPTED
    assert perf("--benchmark-save=x", "--collect-only").ret == 0
    assert not saved(pytester) and not journals(pytester)


@pytest.mark.skipif(OPENS_JSON_FIRST, reason=OLD)
def test_a_json_file_has_its_journal_beside_it(perf, pytester):
    file = pytester.path / "out" / "r.json"
    early = perf(f"--benchmark-json={file}", do={"c": "terminate"})
    early.stdout.fnmatch_lines(["*what was measured is in *out/.r.json.journal; the same command with --sel-resume*"])
    assert run.load(file).interrupted and len(run.load(file.parent / ".r.json.journal").timings) == 2
    assert perf(f"--benchmark-json={file}", "--sel-resume").ret == 0 and measured(pytester) == "cde"
    assert len(run.load(file).timings) == 5 and os.listdir(file.parent) == ["r.json"]
    assert all(len(bench["stats"]["data"]) == 5 for bench in json.loads(file.read_text())["benchmarks"])


# --- what may be gone on with ---

OTHERS = {
    "commit": {"commit": {"id": "def"}},
    "uncommitted changes": {"commit": {"dirty": True}},
    "--sel-plant": {"options": ("--sel-plant=0.1",)},
    "benchmarks asked for": {"options": ("-k", "not e-triton")},
    "gpu_id": {"machine": {"gpu_id": "bb22"}},
    "torch": {"machine": {"torch": "1.0"}},
    "source": {"source": "other"},
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_run_of_something_else_is_refused_in_one_line(perf, pytester, monkeypatch, other):
    perf(do={"c": "terminate"})
    (left,), before = journals(pytester), journals(pytester)[0].read_bytes()
    what = OTHERS[other]
    machine, source = conditions.environment() | what.get("machine", {}), what.get("source", conditions._source())
    monkeypatch.setattr(conditions, "environment", lambda: machine)
    monkeypatch.setattr(conditions, "_source", lambda: source)
    refused = perf(*RESUME, *what.get("options", ()), commit=what.get("commit"))
    assert refused.ret == pytest.ExitCode.USAGE_ERROR and measured(pytester) == ""
    (line,) = [line for line in refused.stderr.lines if line]
    assert line.startswith("ERROR: --sel-resume: .x.journal is of another run: ") and other in line
    assert line.count(" there, ") == 1
    assert left.read_bytes() == before and len(saved(pytester)) == 1


def test_the_newest_journal_of_this_run_is_gone_on_with_and_the_others_stay(perf, pytester):
    perf(do={"d": "terminate"})
    perf("--benchmark-save=x", do={"c": "terminate"})
    perf("--benchmark-save=x", do={"b": "terminate"}, commit={"id": "def"})
    assert [path.name for path in journals(pytester)] == [".x-2.journal", ".x-3.journal", ".x.journal"]
    for age, name in enumerate((".x.journal", ".x-2.journal", ".x-3.journal")):
        os.utime(next(path for path in journals(pytester) if path.name == name), (1e9 + age, 1e9 + age))
    resumed = perf(*RESUME)
    assert resumed.ret == 0 and measured(pytester) == "cde"
    resumed.stdout.fnmatch_lines(["*goes on with .x-2.journal: 2 of 5*", "2 earlier runs*left a journal*.x-3.journal"])
    assert [path.name for path in journals(pytester)] == [".x-3.journal", ".x.journal"]


def test_a_journal_whose_run_is_alive_is_left_alone(perf, pytester):
    perf(do={"c": "terminate"})
    alive = journal.Journal.reopen(journals(pytester)[0])
    assert perf(*RESUME).ret == 0 and measured(pytester) == "abcde"
    assert [path.name for path in journals(pytester)] == [".x.journal"]
    alive.close()


def test_resuming_asks_for_a_run_that_is_saved(perf):
    refused = perf("--sel-resume")
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines(["ERROR: --sel-resume: the run would not be saved; add --benchmark-autosave"])


def entry(**more: object) -> dict:
    """Return a journaled benchmark of five rounds of 9 us."""
    stats = {"data": [9e-6] * 5, "iterations": 1} | more.pop("stats", {})
    extra = {"case": "a", "method": "triton", "ci95_us": [9, 9]} | more.pop("extra_info", {})
    names = dict.fromkeys(("name", "fullname", "group", "param", "params"))
    return names | {"options": {}, "stats": stats, "extra_info": extra} | more


WRONG = (
    entry(stats={"data": []}),
    entry(stats={"data": [float("inf")] * 5}),
    entry(stats={"data": [0.0] * 5}),
    entry(stats={"data": "fast"}),
    entry() | {"stats": None},
    entry(extra_info={"ci95_us": [9]}),
    entry(extra_info={"call_us": -1}),
    entry() | {"extra_info": []},
    {name: value for name, value in entry().items() if name != "params"},
)


@pytest.mark.parametrize("wrong", WRONG)
def test_a_journaled_result_that_is_none_is_refused(wrong):
    assert results.rebuilt(entry())["median"] == 9e-6
    with pytest.raises((KeyError, TypeError, ValueError)):
        results.rebuilt(wrong)


def test_a_damaged_line_is_measured_again_and_none_counts_twice(perf, pytester):
    perf(do={"e": "terminate"})
    (left,) = journals(pytester)
    head, a, b, c, d, *_ = left.read_text().splitlines()
    c_as_b = c.replace('"case": "c"', '"case": "b"')
    left.write_text("\n".join([head, "null", "[1]", "\0", "", b.replace('"rounds"', '"old"'), b, c_as_b, a, d[:-20]]))
    assert perf(*RESUME, do={"e": "terminate"}).ret == pytest.ExitCode.INTERRUPTED
    assert measured(pytester) == "cd"
    assert [case for case, _ in run.load(saved(pytester)[-1]).timings] == ["a", "b", "c", "d"]


# --- every content that a storage folder can have ---

WHOLE = json.dumps({"machine_info": {}, "benchmarks": [], "nsa_sel": {"asked": []}})
CONTENTS = {
    "empty": "",
    "cut off in its first line": WHOLE[:20],
    "a list": "[]",
    "not text": "\0\1\2" * 99,
    "deep": "[" * 99999,
    "a folder": None,
}


@pytest.mark.parametrize("content", CONTENTS)
def test_a_journal_that_cannot_be_read_costs_nothing(perf, pytester, content):
    perf()
    strange = saved(pytester)[0].with_name(".y.journal")
    strange.mkdir() if CONTENTS[content] is None else strange.write_text(CONTENTS[content])
    resumed = perf(*RESUME)
    assert resumed.ret == 0 and measured(pytester) == "abcde"
    resumed.stdout.fnmatch_lines(["*no run that ended early in *: all is measured"])
    assert len(saved(pytester)) == 2 and journals(pytester) == [strange]


def test_a_journal_of_something_else_is_refused(perf, pytester):
    perf()
    saved(pytester)[0].with_name(".y.journal").write_text(WHOLE)
    refused = perf(*RESUME)
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines(
        ["ERROR: *.y.journal is of another run: its first line lacks what it was measured on*"]
    )


def test_other_files_of_the_storage_stay_and_harm_nothing(perf, pytester):
    perf(do={"c": "terminate"})
    folder = saved(pytester)[0].parent
    folder.joinpath("0007_x.json").mkdir()
    folder.joinpath("0008_x.json").write_text('{"benchmarks": [')
    folder.joinpath("0009_x.json").symlink_to("nowhere")
    folder.joinpath("notes.txt").write_text("mine")
    assert perf(*RESUME).ret == 0 and measured(pytester) == "cde"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["0007_x.json", "0008_x.json", "0009_x.json", "0010_x.json", "notes.txt"]
    assert len(run.load(folder / "0010_x.json").timings) == 5


def test_a_journal_is_no_saved_run_but_is_read_when_it_is_named(perf, pytester, capsys):
    perf("--benchmark-save=baseline")
    perf(do={"c": "terminate"}, us=99.0)
    (whole, part), (left,) = saved(pytester), journals(pytester)
    assert storage.saved_runs(pytester.path / ".benchmarks") == [whole, part]
    assert FileStorage(pytester.path / ".benchmarks", logger=None).query() == [whole, part]
    assert compare_command.main([str(whole), str(left)]) == 1
    assert "9.00 us -> 99.00 us" in capsys.readouterr().out


def storage_faults(folder: Path) -> dict[str, tuple[str, ...]]:
    file = folder / "file"
    file.write_text("in the way")
    return {
        "a file in the way": (f"--benchmark-storage={file}", "--benchmark-save=x"),
        "a file above it": (f"--benchmark-storage={file}/deeper", "--benchmark-save=x"),
        "no folder can be made": ("--benchmark-storage=/proc/none", "--benchmark-save=x"),
        "a name too long": (f"--benchmark-storage={folder}/{'n' * 5000}", "--benchmark-save=x"),
        "a run's name too long": ("--benchmark-save=" + "n" * 5000,),
        "JSON in a folder's place": (f"--benchmark-json={folder}/tmp",),
        "JSON below a file": (f"--benchmark-json={file}/r.json",),
        "JSON with a name too long": (f"--benchmark-json={folder}/{'n' * 5000}.json",),
    }


@pytest.mark.parametrize("fault", storage_faults(Path(tempfile.mkdtemp())))
def test_a_storage_that_cannot_be_written_costs_no_passing_test_and_no_result(perf, pytester, fault):
    if "JSON" in fault and OPENS_JSON_FIRST:
        pytest.skip(OLD)
    result = perf(*storage_faults(pytester.path)[fault])
    assert result.ret == 0 and measured(pytester) == "abcde"
    result.assert_outcomes(passed=5)
    result.stdout.fnmatch_lines(["*NOT SAVED: *Error: *", "what was measured is in *"])
    (kept,) = [*pytester.path.glob("tmp/nsa-sel-*.journal"), *pytester.path.glob(".*.journal")]
    assert len(run.load(kept).timings) == 5
    assert not saved(pytester)


def test_a_missing_storage_is_made(perf, pytester):
    assert perf("--benchmark-storage=deep/er", "--benchmark-save=x").ret == 0
    assert len(list(pytester.path.glob("deep/er/*/0001_x.json"))) == 1


def test_a_journal_that_meets_a_full_disk_warns_once_and_is_completed_when_there_is_room(perf, pytester, monkeypatch):
    full = iter([False, True, True, True] + [False] * 99)  # of the writes after the first line

    def write(file, data, original=os.write):
        if len(data) and next(full):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(file, data[: len(data) // 2 + 1])  # nor is a write whole

    with monkeypatch.context() as disk:
        disk.setattr(journal.os, "write", write)
        early = perf(do={"d": "interrupt"})
    assert early.stdout.str().count("No space left on device") == 1
    assert len(run.load(journals(pytester)[0]).timings) == 3


def test_a_run_that_a_full_disk_keeps_from_being_saved_is_saved_by_the_next(perf, pytester, monkeypatch):
    def save(self, output_json, name):
        self.get(f"0001_{name}.json").write_text('{"benchmarks": [')
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(FileStorage, "save", save)
        full = perf()
    assert full.ret == 0 and not saved(pytester)  # what was written of it is no run
    full.stdout.fnmatch_lines(["*NOT SAVED: OSError: *No space left*", "*is in *.x.journal; the same command with*"])
    assert perf(*RESUME).ret == 0 and measured(pytester) == ""
    assert len(run.load(saved(pytester)[0]).timings) == 5 and not journals(pytester)


# --- the real suite, in a process of its own ---


class Perf:
    """Run the perf suite without a GPU in a process of its own, and wait for what its journal holds."""

    def __init__(self, storage: Path, *options: str, limit: int = resource.RLIM_INFINITY) -> None:
        self.storage = storage
        arguments = ["tests/perf", "--sel-matrix", "smoke", "--sel-family", "ragged,decode"]
        arguments += [f"--benchmark-storage={storage}", "--benchmark-autosave", *options]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-o", "cache_dir=/proc/no-such-place/cache", *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )

    def kill(self, number: signal.Signals, held: int) -> Perf:
        """Send a signal when the journal holds so many results."""
        while self.process.poll() is None and self.held() < held:
            time.sleep(0.02)
        self.process.send_signal(number)
        return self

    def held(self) -> int:
        return sum(path.read_bytes().count(b'"fullname": ') for path in self.storage.glob("*/.*.journal"))

    def end(self) -> tuple[int, str]:
        said, _ = self.process.communicate(timeout=120)
        return self.process.returncode, said


@pytest.mark.skipif(torch.cuda.is_available(), reason="would time the kernel")
def test_the_suite_meets_a_full_disk_is_killed_and_terminated_and_yields_one_run(tmp_path):
    broken = tmp_path / "broken"
    status, said = Perf(broken, limit=12_000).end()  # pytest's cache cannot be written either
    assert status == 0 and "8 passed, 12 skipped" in said and "NOT SAVED: OSError: [Errno 27] File too large" in said
    assert said.count("what is measured is not on disk before the run ends: [Errno 27] File too large") == 1
    for number, held in ((signal.SIGKILL, 4), (signal.SIGTERM, 6)):
        perf = Perf(broken, "--sel-resume").kill(number, held)
        status, said = perf.end()
        assert status == (-signal.SIGKILL if number == signal.SIGKILL else pytest.ExitCode.INTERRUPTED), said
        assert held <= perf.held() < 8
    status, said = Perf(broken, "--sel-resume").end()
    assert status == 0 and "4 cases, 8 benchmarks on the CPU" in said and "8 passed, 12 skipped" in said, said
    assert Perf(tmp_path / "whole").end()[0] == 0
    (ours,), (whole,) = broken.glob("*/*"), tmp_path.glob("whole/*/*")
    assert form(ours) == form(whole) and list(run.load(ours).timings) == list(run.load(whole).timings)
