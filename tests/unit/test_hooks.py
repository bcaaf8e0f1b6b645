"""The comparison inside pytest, under `pytest-benchmark compare` and under `nsa-sel compare`."""

import argparse
import json
import os
import re
from pathlib import Path

import pytest
import pytest_benchmark
import saved_runs
from packaging.version import Version
from saved_runs import document, entry, save_entries, use_noise

from nsa_sel.bench.compare import hooks, rule, table_command, theirs
from nsa_sel.bench.saved import run as runs
from nsa_sel.bench.suite import cases
from tests.programs import python

pytest_plugins = ["pytester"]
SRC = Path(rule.__file__).parents[3]
CONFTEST = """
from nsa_sel.bench.compare import hooks
from nsa_sel.bench.compare.hooks import (
    pytest_benchmark_group_stats, pytest_benchmark_update_json, pytest_benchmark_update_machine_info,
    pytest_collection_finish, pytest_configure, pytest_sessionfinish, pytest_terminal_summary,
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
@pytest.mark.parametrize(("case_id", "method"), [(case, "triton") for case in times])
def test_sel(benchmark, case_id, method):
    global step, now
    case = case_id
    if times[case] is None:
        hooks.register_skipped(case, method, "no memory for it")
        benchmark.has_error = True
        pytest.skip("no memory for it")
    us, step, now = times[case], times[case] * 1e-6, 0.0
    if us > 1e6:
        benchmark.has_error = True
        raise RuntimeError("no result")
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
def perf(pytester, monkeypatch, tmp_path_factory):
    """Return a function that runs a small suite with the given times (us), and times of a second measurement."""
    monkeypatch.setattr(hooks, "remeasure", {})
    monkeypatch.setattr(hooks, "skipped", {})
    use_noise(monkeypatch, tmp_path_factory.mktemp("noise"), {"NVIDIA H200": [[None, 0, 0, 0, 1]]})
    monkeypatch.setattr("pytest_benchmark.plugin.get_cpu_info", dict)  # asks the CPU in a subprocess
    monkeypatch.setattr(hooks, "environment", lambda: {"gpu": "NVIDIA H200", "calibration": {"tick_us": 0.5}})
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(SUITE)

    def run(times, *options, again=None):
        hooks.remeasure.clear()
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
    assert perf({"b": 50}, "--perf-fail").ret == 0  # asked for a part
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


def test_a_suspect_of_a_live_run_is_measured_again(perf):
    perf({"a": 3}, "--benchmark-save=baseline")
    for again, status, said in ((3, 0, "*measured again, not slower (1)*"), (4, 1, "*FAIL, 1 slower*")):
        found = perf({"a": 3.4}, "--perf-fail", again={"a": again})  # 13 %, and less than half a microsecond
        assert found.ret == status
        found.stdout.fnmatch_lines(["measuring 1 alerted timings again", said])
    left = perf({"a": 3.4}, "--perf-fail")
    assert left.ret == 1
    left.stdout.fnmatch_lines(["SUSPECT (1)", "*verdict: SUSPECT, 1 suspect*"])
    assert "--again" not in left.stdout.str()  # there is no file yet to compare again


def test_what_failed_is_missing_and_what_had_no_room_is_not(perf):
    perf({"a": 100, "b": 50}, "--benchmark-save=baseline")
    crashed = perf({"a": 2e6, "b": 50}, "--perf-fail")
    crashed.stdout.fnmatch_lines(["MISSING*(1)", "  a triton", "*verdict: FAIL, 1 missing*"])
    without = perf({"a": None, "b": 50}, "--perf-fail")
    assert without.ret == 0


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


GOOD = entry("a", "triton", 100)
BASELINES = {
    "empty": b"",
    "truncated": b'{"benchmarks": [',
    "binary": bytes(range(256)),
    "a list": b"[]",
    "no entries": b'{"benchmarks": []}',
    "not entries": b'{"benchmarks": [null, 3]}',
    "deep": b"[" * 100_000,
    "no time": document([entry("a", "triton", 100, median=None)]),
    "endless time": document([entry("a", "triton", 100, median=1e400)]),
    "endless tick": document([GOOD], machine={"calibration": {"tick_us": 1e400}}),
    "flat": document([GOOD["stats"] | {"extra_info": GOOD["extra_info"]}]),
    "no name": document([{key: value for key, value in GOOD.items() if key != "fullname"}]),
    "gaps": document([entry("a", "triton", 100, iqr=None, ops="x", outliers=3)]),
    "whole": document([GOOD]),
}


@pytest.mark.parametrize("kind", BASELINES)
@pytest.mark.parametrize("options", [["--sel-baseline=baseline"], ["--benchmark-compare"]], ids=["named", "default"])
def test_whatever_a_baseline_holds_the_run_is_saved(perf, pytester, kind, options):
    content = BASELINES[kind]
    path = pytester.path / ".benchmarks" / H200 / "0001_baseline.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    result = perf({"a": 100}, *options, "--benchmark-save=mine")
    assert result.ret == 0 and "INTERNALERROR" not in result.stdout.str() + result.stderr.str()
    assert any(name.endswith("_mine.json") for name in saved(pytester))
    refused = [line for line in result.stdout.lines if line.startswith("nsa_sel: not compared: ")]
    assert len(refused) == (kind not in ("flat", "no name", "gaps", "whole"))


NO_RUNS = ["", ".", "/", "/no/such.json", "a/b/c.json", "nothing", "x" * 5000, "a\0b", "é" * 300, "-", "[0]", "HEAD~1"]


@pytest.mark.parametrize("spec", NO_RUNS, ids=range(len(NO_RUNS)))
@pytest.mark.parametrize("option", ["--sel-baseline", "--benchmark-compare"])
def test_whatever_names_no_baseline_the_run_is_saved(perf, pytester, option, spec):
    result = perf({"a": 100}, f"{option}={spec}", "--benchmark-save=mine")
    assert result.ret == 0 and "INTERNALERROR" not in result.stdout.str() + result.stderr.str()
    assert len(saved(pytester)) == 1
    assert len([line for line in result.stdout.lines if line.startswith("nsa_sel: not compared: ")]) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_baseline_without_rights_is_one_line_and_the_run_is_saved(perf, pytester):
    perf({"a": 100}, "--benchmark-save=baseline")
    (path,) = pytester.path.glob(".benchmarks/*/*.json")
    path.chmod(0)
    result = perf({"a": 100}, "--perf-fail", "--benchmark-save=mine")
    assert result.ret == 1 and len(saved(pytester)) == 2
    result.stdout.fnmatch_lines(["*not compared: *0001_baseline.json: cannot be read (Permission denied)*"])


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


@pytest.mark.parametrize(
    ("option", "shown"),
    [
        ("--benchmark-columns=min,median", "Name (time in us)*Min*Median*"),
        ("--benchmark-sort=name", "Name (time in us)*Outliers*"),
        ("--benchmark-group-by=param:case_id", "*benchmark 'case_id=a': 1 tests*"),
        ("--benchmark-name=short", "sel?a-triton? *"),
        ("--benchmark-verbose", "*Name (time in us)*"),
    ],
)
def test_whoever_asks_for_something_in_the_table_sees_it(perf, pytester, option, shown):
    pytester.makeini("[pytest]\naddopts = --benchmark-quiet")
    assert "Name (time" not in perf({"a": 100}).stdout.str()
    perf({"a": 100}, option).stdout.fnmatch_lines([shown])
    assert "Name (time" not in perf({"a": 100}, "--benchmark-columns=min", "--benchmark-quiet").stdout.str()


def test_grouping_by_a_parameter_that_does_not_exist_lists_those_that_do(perf):
    refused = perf({"a": 100}, "--benchmark-group-by=group,param:L")
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines(
        ["*--benchmark-group-by: value is 'param:L', expected param: and one of case_id, method"]
    )


def test_a_histogram_that_cannot_be_drawn_says_what_it_needs(perf, monkeypatch):
    monkeypatch.setattr(theirs, "find_spec", lambda name: None)
    refused = perf({"a": 100}, "--benchmark-histogram")
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines(["*--benchmark-histogram: needs pygal: pip install 'nsa-sel?histogram?'"])


def test_compare_fail_of_pytest_benchmark_fails_the_run_beside_our_verdict(perf):
    perf({"a": 100, "b": 50}, "--benchmark-save=baseline")
    slower = perf({"a": 107, "b": 50}, "--benchmark-compare-fail=mean:5%")
    assert slower.ret == 1
    slower.stdout.fnmatch_lines(
        ["verdict: pass*", "--benchmark-compare-fail:", "test_sel?a-triton?*Field 'mean' has failed*", "*2 passed*"]
    )
    assert "test_sel[b-triton]" not in slower.stdout.str().partition("compare-fail:")[2]
    assert perf({"a": 107, "b": 50}, "--benchmark-compare-fail=mean:10%").ret == 0
    ours = perf({"a": 120, "b": 50}, "--benchmark-compare-fail=mean:30%", "--perf-fail")
    assert ours.ret == 1
    ours.stdout.fnmatch_lines(["*verdict: FAIL, 1 slower*"])


def test_compare_fail_without_a_run_to_compare_with_is_no_pass(perf):
    alone = perf({"a": 100}, "--benchmark-compare-fail=mean:5%", "--benchmark-save=first")
    assert alone.ret == 1
    alone.stdout.fnmatch_lines(["*not compared: *", "--benchmark-compare-fail:", "not judged: no run to compare with"])


def command(folder, *arguments):
    """Run one of the two commands in `folder` as a user does; return its result."""
    environment = os.environ | {"PYTHONPATH": str(SRC)}
    return python("-m", *arguments, cwd=folder, env=environment)


def test_both_commands_say_the_same(tmp_path):
    tmp_path.joinpath("conftest.py").write_text(CONFTEST)
    for number, name, us in ((1, "old", 90), (2, "baseline", 100), (3, "same-commit", 100), (4, "same-commit", 115)):
        entries = [entry("a", "triton", us), entry("b", "triton", 50)]
        save_entries(tmp_path / ".benchmarks" / H200, f"000{number}_{name}", entries, f"2026-01-0{number}T00:00:00")
    save_entries(tmp_path / ".benchmarks" / "Linux-cpu", "0001_x", [entry("a", "packed_sdpa", 9, gpu=None)], "2026-02")
    theirs = command(tmp_path, "pytest_benchmark", "compare")
    assert theirs.returncode == 0, theirs.stderr
    text, _, table = theirs.stdout.removeprefix("nsa_sel: ").partition("\n\n")
    assert text.startswith(f"{H200}/0002_baseline.json (2026-01-02T00:00) -> {H200}/0004_same-commit.json")
    assert "a triton  100.00 us -> 115.00 us  +15.0 %" in text and text.endswith("verdict: FAIL, 1 slower")
    assert "Legend:" in table and "test_sel[a-triton] (0004" in table.replace(f"{H200}/", "")
    assert "[b-triton]" not in table  # it did not change
    cut = "the table is cut to the 1 groups that changed; all: pytest-benchmark -v compare"
    assert table.endswith(f"\nverdict: FAIL, 1 slower\n{cut}\n")
    ours = command(tmp_path, "nsa_sel", "compare", f"{H200}/0002", "0004")
    assert (ours.returncode, ours.stdout.strip()) == (1, f"nsa_sel: {text}".strip()), ours.stderr
    for old, new in (("0003", "0004"), ("0004", "0003")):
        chosen = command(tmp_path, "pytest_benchmark", "compare", old, new).stdout
        assert f"nsa_sel: {H200}/{old}_same-commit.json (2026" in chosen
        assert ("FAIL, 1 slower" in chosen) == (old < new)
    assert "two of one GPU are needed" in command(tmp_path, "pytest_benchmark", "compare", "0003").stdout


@pytest.mark.parametrize("more", [["-v", "compare"], ["compare", "-k", "test_sel"], ["compare", "--csv=x.csv"]])
def test_the_table_of_pytest_benchmark_is_whole_if_more_is_asked_for(tmp_path, more):
    if "-k" in more and Version(pytest_benchmark.__version__) < Version("5.3"):
        pytest.skip("pytest-benchmark has this option since 5.3")
    tmp_path.joinpath("conftest.py").write_text(CONFTEST)
    for number, us in ((1, 100), (2, 115)):
        save_entries(
            tmp_path / ".benchmarks" / H200, f"000{number}_x", [entry("a", "triton", us), entry("b", "triton", 50)]
        )
    text = command(tmp_path, "pytest_benchmark", *more).stdout
    assert "test_sel[a-triton]" in text and "test_sel[b-triton]" in text and "cut to" not in text


def test_older_runs_are_grouped_by_the_parameters_that_they_lack(tmp_path):
    tmp_path.joinpath("conftest.py").write_text(CONFTEST)
    known = [cases.matrix("full", family="decode")[0], cases.rows_case("bf16", "few", 8, 64, 64, 3000, 64)]
    for number in (1, 2):  # as they were saved with case_id and method alone
        data = saved_runs.run(known, when=f"2026-01-0{number}T00:00:00+00:00", identity=saved_runs.H200)
        saved_runs.save(data, tmp_path / ".benchmarks" / H200 / f"000{number}_x.json")
    for group_by, groups in (
        ("param:L", ["L=128", "L=3000"]),
        ("param:layout,param:N", ["layout=few N=4", "layout=few N=64"]),
    ):
        done = command(tmp_path, "pytest_benchmark", "compare", f"--group-by={group_by}")
        assert done.returncode == 0, done.stderr
        assert re.findall(r"benchmark '(.*)'", done.stdout) == groups
    refused = command(tmp_path, "pytest_benchmark", "compare", "--group-by=param:S_kv")
    assert refused.returncode == 1 and not refused.stdout
    assert "'param:S_kv', expected param: and one of D, Dv, H, L, N, " in refused.stderr  # no case of the matrix tells
    drawn = command(tmp_path, "pytest_benchmark", "compare", "--histogram=x")
    assert (
        drawn.returncode == 0 or drawn.stderr == "nsa_sel: --histogram: needs pygal: pip install 'nsa-sel[histogram]'\n"
    )


def test_every_case_of_the_committed_runs_has_every_parameter():
    paths = sorted((SRC.parent / ".benchmarks").glob("*/*_baseline.json"))
    rows = theirs.with_parameters(json.loads(paths[-1].read_text())["benchmarks"])
    assert all(set(row["params"]) == {"case_id", "method", *cases.PARAMETERS} for row in rows)
    assert all(row["params"][name] == row["extra_info"][name] for row in rows for name in ("layout", "H", "L", "N"))


@pytest.mark.parametrize("folder", ["tests", "tests/unit", "tests/perf", "tests/parity", "tests/soak"])
def test_from_below_the_root_pytest_benchmark_says_where_to_stand(folder, tmp_path):
    root = SRC.parent
    storage = f"--storage={tmp_path}"  # else it would make a folder here
    done = command(root / folder, "pytest_benchmark", storage, "compare")
    assert done.returncode == 1
    assert done.stderr.endswith(f"of its own folder: cd {root}\n") and "Traceback" not in done.stderr


def test_dates_are_read_from_the_storage_that_is_named(tmp_path):
    tmp_path.joinpath("conftest.py").write_text(CONFTEST)
    elsewhere = tmp_path / "elsewhere"
    for version, number, us, month in (("3.11", 2, 100, 1), ("3.12", 1, 150, 2)):
        folder = elsewhere / H200.replace("3.12", version)
        save_entries(folder, f"000{number}_x", [entry("a", "triton", us)], f"2026-0{month}-01T00:00:00+00:00")
    for form in (f"{elsewhere}", f"file://{elsewhere}"):
        text = command(tmp_path, "pytest_benchmark", f"--storage={form}", "compare").stdout
        assert "a triton  100.00 us -> 150.00 us" in text and "FAIL, 1 slower" in text


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


def test_the_newest_run_is_told_by_its_date_not_by_its_number(stored):
    other = H200.replace("3.12", "3.11")
    stored("0001_new", 115, 9, folder=other)
    stored("0005_old", 100, 2)
    paths = {f"{other}/0001_new.json": 115, f"{H200}/0005_old.json": 100}
    rows = [{**entry("a", "triton", us), "path": path} for path, us in paths.items()]
    asked = argparse.Namespace(storage=".benchmarks", glob_or_file=[], filter_expr=None)
    (found,), problems = table_command.compare_rows(rows, asked)
    text = found.text()
    assert not problems and f"{H200}/0005_old.json" in text.split("->")[0] and "100.00 us -> 115.00 us" in text
