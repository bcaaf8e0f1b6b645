"""The comparison inside pytest, under `pytest-benchmark compare` and under `nsa-sel compare`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from saved_runs import entry, save_entries

from nsa_sel.bench.compare import command as compare_command
from nsa_sel.bench.compare import hooks, rule
from nsa_sel.bench.saved import run as runs

pytest_plugins = ["pytester"]
SRC = Path(rule.__file__).parents[3]
CONFTEST = """
from nsa_sel.bench.compare import hooks
from nsa_sel.bench.compare.hooks import (
    pytest_benchmark_group_stats, pytest_benchmark_update_json, pytest_benchmark_update_machine_info,
    pytest_configure, pytest_sessionfinish, pytest_terminal_summary,
)

def pytest_addoption(parser):
    hooks.addoption(parser)
"""
SUITE = """
import json, pathlib, pytest
from nsa_sel.bench.compare import hooks

times, again = (json.loads(pathlib.Path(name).read_text()) for name in ("times.json", "again.json"))
now, step = 0.0, 1e-6

def clock():  # two calls are exactly `step` apart
    global now
    now += step
    return now

@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize(("case", "method"), [(case, "triton") for case in times])
def test_sel(benchmark, case, method):
    global step, now
    us, step, now = times[case], times[case] * 1e-6, 0.0
    benchmark.pedantic(lambda: None, rounds=3)
    benchmark.extra_info.update(case=case, method=method, ci95_us=[us, us], gpu="NVIDIA H200", driver="580.1")
    if case in again:
        def measure():
            if again[case] is None:
                raise MemoryError("no room")
            seconds = again[case] * 1e-6
            return dict(median=seconds, q1=seconds, q3=seconds, ci95_us=[again[case], again[case]])
        hooks.register_remeasure(case, method, measure)
"""
H200 = "Linux-CPython-3.12-64bit-NVIDIA-H200"


@pytest.fixture
def perf(pytester, monkeypatch):
    """Return a function that runs a small suite with the given times (us), and times of a second measurement."""
    monkeypatch.setattr(hooks, "remeasure", {})
    monkeypatch.setattr("pytest_benchmark.plugin.get_cpu_info", dict)  # asks the CPU in a subprocess
    monkeypatch.setattr(hooks, "environment", lambda: {"gpu": "NVIDIA H200", "calibration": {"tick_us": 0.5}})
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(SUITE)

    def run(times, *options, again=None):
        pytester.path.joinpath("times.json").write_text(json.dumps(times))
        pytester.path.joinpath("again.json").write_text(json.dumps(again or {}))
        return pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:hypothesispytest", *options)

    return run


def saved(pytester):
    return sorted(path.relative_to(pytester.path).as_posix() for path in pytester.path.glob(".benchmarks/*/*.json"))


def test_runs_are_kept_apart_by_gpu_without_raw_data(perf, pytester):
    assert perf({"a": 100}, "--benchmark-save=baseline").ret == 0
    (name,) = saved(pytester)
    assert name.endswith("-NVIDIA-H200/0001_baseline.json")
    data = json.loads(pytester.path.joinpath(name).read_text())
    assert data["machine_info"]["gpu"] == "NVIDIA H200" and data["machine_info"]["calibration"] == {"tick_us": 0.5}
    assert "data" not in data["benchmarks"][0]["stats"] and runs.MARK not in data
    assert runs.load(pytester.path / name).tick_us == 0.5


def test_comparison_follows_the_table_and_perf_fail_decides_the_status(perf):
    perf({"a": 100, "b": 50}, "--benchmark-save=baseline")
    shown = perf({"a": 120, "b": 50}, "--benchmark-compare")
    assert shown.ret == 0
    shown.stdout.fnmatch_lines(["*Legend:*", "*0001_baseline.json*-> this run*", "*a triton  100.00 us -> 120.00 us*"])
    shown.stdout.fnmatch_lines(["test_sel?a-triton? (0001_baselin)*", "test_sel?a-triton? (NOW)*"])
    assert perf({"a": 120, "b": 50}, "--perf-fail").ret == 1
    assert perf({"a": 109, "b": 50}, "--perf-fail").ret == 0
    assert perf({"b": 50}, "--perf-fail").ret == 1  # a is missing
    assert perf({"z": 50}, "--perf-fail").ret == 1  # none in common


def test_measuring_again_clears_a_false_alarm_and_confirms_a_real_one(perf, pytester):
    perf({"a": 100, "b": 50}, "--benchmark-save=baseline")
    slow = {"a": 120, "b": 70}
    cleared = perf(slow, "--perf-fail", "--benchmark-save=lucky", again={"a": 101, "b": 50})
    assert cleared.ret == 0
    cleared.stdout.fnmatch_lines(
        ["measuring 2 alerted timings again", "measured again, not slower (2)", "*verdict: pass*"]
    )
    real = perf(slow, "--perf-fail", "--benchmark-save=slow", again={"a": 119, "b": 50})
    assert real.ret == 1
    real.stdout.fnmatch_lines(["REGRESSIONS (1)", "*a triton  100.00 us -> 120.00 us  again 119.00 us  +19.0 %*"])
    broken = perf(slow, "--perf-fail", again={"a": None, "b": 50})
    assert broken.ret == 1
    broken.stdout.fnmatch_lines(["*a triton*could not be measured again: no room*"])
    marks = [json.loads(pytester.path.joinpath(name).read_text()).get(runs.MARK) for name in saved(pytester)[1:]]
    assert marks[0] is None and marks[1]["regressions"] == ["a triton"]


def test_a_confirmed_slow_run_does_not_become_the_baseline(perf):
    perf({"a": 100}, "--benchmark-save=first")
    assert perf({"a": 120}, "--perf-fail", "--benchmark-save=slow").ret == 1
    hidden = perf({"a": 120}, "--perf-fail")  # pytest-benchmark itself would compare with 0002 and pass
    assert hidden.ret == 1
    hidden.stdout.fnmatch_lines(["*0001_first.json*"])
    asked = perf({"a": 120}, "--perf-fail", "--sel-baseline=slow")
    assert asked.ret == 0
    asked.stdout.fnmatch_lines(["*note: the old run was saved with 1 confirmed regressions"])
    assert perf({"a": 120}, "--perf-fail", "--benchmark-compare=0001").ret == 1
    assert perf({"a": 120}, "--perf-fail", "--benchmark-compare=0002").ret == 0


def test_nothing_to_compare_with_is_said_and_is_no_pass(perf, pytester):
    first = perf({"a": 100}, "--benchmark-compare", "--benchmark-autosave")
    assert first.ret == 0 and len(saved(pytester)) == 1
    first.stdout.fnmatch_lines(["*not compared:*no earlier run of NVIDIA H200*"])
    unknown = perf({"a": 100}, "--perf-fail", "--sel-baseline=nonsense")
    assert unknown.ret == 1
    unknown.stdout.fnmatch_lines(["*not compared: nonsense: no such file*"])
    pytester.path.joinpath(saved(pytester)[0]).write_text('{"benchmarks": [')
    damaged = perf({"a": 100}, "--perf-fail")
    assert damaged.ret == 1
    damaged.stdout.fnmatch_lines(["*not compared: *0001_*damaged or truncated*"])


def test_a_baseline_of_another_gpu_is_no_pass(perf, pytester):
    other = save_entries(pytester.path, "other", [entry("a", "triton", 100, gpu="NVIDIA L4")])
    result = perf({"a": 100}, "--perf-fail", f"--sel-baseline={other}")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["DIFFERENT GPU: NVIDIA L4 -> NVIDIA H200*"])


def test_benchmarks_switched_off_are_announced(perf):
    off = perf({"a": 100}, "--benchmark-disable")
    assert off.ret == 0
    off.stdout.fnmatch_lines(["*NOTHING WAS TIMED*"])
    assert perf({"a": 100}, "--benchmark-disable", "--perf-fail").ret == 1
    assert "NOTHING WAS TIMED" not in perf({"a": 100}).stdout.str()


def command(folder, *arguments):
    """Run one of the two commands in `folder` as a user does; return its result."""
    environment = os.environ | {"PYTHONPATH": str(SRC)}
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def test_both_commands_say_the_same(tmp_path):
    tmp_path.joinpath("conftest.py").write_text(CONFTEST)
    for number, name, us in ((1, "old", 90), (2, "baseline", 100), (3, "same-commit", 100), (4, "same-commit", 115)):
        entries = [entry("a", "triton", us), entry("b", "triton", 50)]
        save_entries(tmp_path / ".benchmarks" / H200, f"000{number}_{name}", entries, f"2026-01-0{number}T00:00:00")
    save_entries(tmp_path / ".benchmarks" / "Linux-cpu", "0001_x", [entry("a", "packed_sdpa", 9, gpu=None)], "2026-02")
    theirs = command(tmp_path, "pytest_benchmark", "compare")
    assert theirs.returncode == 0, theirs.stderr
    table, _, text = theirs.stdout.partition("nsa_sel: ")
    assert "Legend:" in table and "test_sel[a-triton] (0004" in table.replace(f"{H200}/", "")
    assert text.startswith(f"{H200}/0002_baseline.json (2026-01-02T00:00) -> {H200}/0004_same-commit.json")
    assert "a triton  100.00 us -> 115.00 us  +15.0 %" in text and "FAIL, 1 slower" in text
    ours = command(tmp_path, "nsa_sel", "compare", f"{H200}/0002", "0004")
    assert (ours.returncode, ours.stdout.strip()) == (1, f"nsa_sel: {text}".strip()), ours.stderr
    chosen = command(tmp_path, "pytest_benchmark", "compare", "0003", "0004").stdout
    assert f"nsa_sel: {H200}/0003_same-commit.json" in chosen
    assert "two of one GPU are needed" in command(tmp_path, "pytest_benchmark", "compare", "0003").stdout


def test_grouping_stays_that_of_pytest_benchmark():
    from pytest_benchmark import plugin

    rows = [entry(case, "triton", 9) for case in "ba"]
    for group_by in ("group", "name", "fullfunc"):
        ours = hooks.pytest_benchmark_group_stats(object(), iter(rows), group_by)
        assert ours == plugin.pytest_benchmark_group_stats(None, rows, group_by)


@pytest.fixture
def stored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def store(name, us, day, folder=H200, **more):
        entries = [entry("a", "triton", us, gpu=None if folder.endswith("cpu") else "NVIDIA H200")]
        return save_entries(
            tmp_path / ".benchmarks" / folder, name, entries, f"2026-01-{day:02}T00:00:00+00:00", **more
        )

    return store


def test_nsa_sel_compare_takes_the_named_baseline_and_the_latest_of_its_gpu(stored, capsys):
    assert compare_command.main([]) == 2 and "no saved run" in capsys.readouterr().err
    stored("0001_baseline", 100, 1)
    assert compare_command.main([]) == 2 and "the latest run is the baseline itself" in capsys.readouterr().err
    stored("0001_x", 7, 1, folder="Linux-cpu")
    stored("0002_x", 115, 2)
    stored("0003_x", 115, 3)
    assert compare_command.main([]) == 1
    assert f"{H200}/0001_baseline.json" in capsys.readouterr().out
    assert compare_command.main(["--sel-baseline", "0002"]) == 0
    assert compare_command.main(["0002", "0003"]) == 0
    assert compare_command.main(["0001_b", "0003"]) == 1
    capsys.readouterr()
    assert compare_command.main(["0001", "0003"]) == 2  # of two GPUs
    assert "means 2 runs" in capsys.readouterr().err
    assert compare_command.main(["Linux-cpu/0001", "0003"]) == 1
    assert "DIFFERENT GPU: cpu -> NVIDIA H200" in capsys.readouterr().out
    assert compare_command.main(["9999", "0003"]) == 2
    assert "9999: no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        compare_command.main(["0001"])


def test_nsa_sel_compare_without_a_named_baseline_skips_slow_runs(stored, capsys):
    stored("0001_x", 100, 1)
    assert compare_command.main([]) == 2 and "no earlier run" in capsys.readouterr().err
    stored("0002_x", 115, 2, nsa_sel={"regressions": ["a triton"]})
    stored("0003_x", 115, 3)
    assert compare_command.main([]) == 1
    assert f"{H200}/0001_x.json" in capsys.readouterr().out


def test_the_newest_run_is_told_by_its_date_not_by_its_number(stored):
    other = H200.replace("3.12", "3.11")
    stored("0001_new", 115, 9, folder=other)
    stored("0005_old", 100, 2)
    paths = {f"{other}/0001_new.json": 115, f"{H200}/0005_old.json": 100}
    rows = [{**entry("a", "triton", us), "path": path} for path, us in paths.items()]
    text = hooks.compare_rows(rows)
    assert f"{H200}/0005_old.json" in text.split("->")[0] and "100.00 us -> 115.00 us" in text
