"""`nsa-sel compare`: which runs it takes, how it ends, and what it writes."""

import json
import os
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from saved_runs import entry, save_entries, use_noise

from nsa_sel.bench.compare import command
from nsa_sel.bench.report import command as report_command
from nsa_sel.bench.saved import run as runs
from nsa_sel.bench.saved import storage
from nsa_sel.bench.saved.speedups import EVERY_SDPA_FORM

H200 = "Linux-NVIDIA-H200"


@pytest.fixture(autouse=True)
def silent_card(monkeypatch, tmp_path_factory):
    """Let the card be without noise."""
    use_noise(monkeypatch, tmp_path_factory.mktemp("noise"), {"NVIDIA H200": [[None, 0, 0, 0, 1]]})


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """Return a function that saves a run of one case where `nsa-sel compare` looks for runs."""
    monkeypatch.chdir(tmp_path)

    def store(name, us, gpu="NVIDIA H200", commit="abc", dirty=False, gpu_id="aa11", root=".benchmarks", **more):
        folder = tmp_path / root / f"Linux-{gpu.replace(' ', '-')}"
        entries = more.pop("entries", None) or [entry("a", "triton", us, gpu=gpu, gpu_id=gpu_id)]
        more["commit_info"] = {"id": commit, "dirty": dirty}
        return save_entries(folder, name, entries, f"2026-01-01T00:00:{name[2:4]}", **more)

    return store


def compared(capsys):
    """Return the names of the two runs that were compared last."""
    first = capsys.readouterr().out.splitlines()[0].removeprefix("nsa_sel: ")
    return [name.split()[0].removeprefix(f"{H200}/").removesuffix(".json") for name in first.split(" -> ")]


# ---- Which runs


def test_the_latest_run_is_compared_with_the_baseline_of_its_gpu(stored, capsys):
    assert command.main([]) == 2
    assert "no saved run" in capsys.readouterr().err
    stored("0001_baseline", 100)
    assert command.main([]) == 2
    assert "no earlier run of NVIDIA H200 to compare with" in capsys.readouterr().err
    assert command.main(["baseline"]) == 2
    assert "the latest run is the old one itself" in capsys.readouterr().err
    stored("0002_x", 115)
    stored("0003_x", 116)
    stored("0001_baseline", 10, gpu="NVIDIA L4")
    assert command.main([]) == 1
    assert compared(capsys) == ["0001_baseline", "0003_x"]
    for old in (["--sel-baseline", "0002"], ["0002"], ["0002_x.json"], [f"{H200}/0002"], [f"{H200}/0002_x.json"]):
        assert command.main(old) == 0
        assert compared(capsys) == ["0002_x", "0003_x"]


NOT_CLEAN = {
    "slow": {"nsa_sel": {"regressions": ["a triton"]}},
    "cut short": {"nsa_sel": {"interrupted": True}},
    "lacks a case": {"nsa_sel": {"asked": [["a", "triton"], ["a", "triton_core"]]}},
    "uncommitted changes": {"dirty": True},
    "another card": {"gpu_id": "bb22"},
    "the same commit": {"commit": "three"},
    "a part": {"entries": [entry("b", "triton", 115)]},
}


@pytest.mark.parametrize("kind", NOT_CLEAN)
def test_the_opponent_is_the_newest_clean_run_of_an_earlier_commit_on_this_card(stored, kind):
    stored("0001_x", 100, commit="one")
    stored("0002_x", 115, **{"commit": "two", **NOT_CLEAN[kind]})
    stored("0003_x", 115, commit="three")
    stored("0009_baseline", 50, commit="three")
    new = storage.find("0003", storage.STORAGE)
    assert Path(storage.opponent(storage.STORAGE, runs.load(new)).path).name == "0001_x.json"
    stored("0002_x", 115, commit="two")
    assert Path(storage.opponent(storage.STORAGE, runs.load(new)).path).name == "0002_x.json"


def test_a_run_from_before_an_sdpa_form_was_timed_is_an_opponent(stored):
    stored("0001_x", 100, commit="one")
    forms = [entry("a", method, 100) for method in sorted(EVERY_SDPA_FORM)]
    new = runs.load(stored("0002_x", 100, commit="two", entries=[entry("a", "triton", 100), *forms]))
    assert storage.opponent(storage.STORAGE, new).name.endswith("0001_x.json")


def test_changes_that_are_not_committed_are_compared_with_their_commit(stored, capsys):
    stored("0001_x", 100, commit="one")
    stored("0002_x", 100, commit="two")
    stored("0003_x", 115, commit="two", dirty=True)
    assert command.main([]) == 1
    assert compared(capsys) == ["0002_x", "0003_x"]


def test_a_newer_run_is_no_opponent_of_an_older_one(stored):
    new = runs.load(stored("0001_x", 100, commit="one"))
    stored("0002_x", 100, commit="two")
    with pytest.raises(runs.RunError, match="no earlier run"):
        storage.opponent(storage.STORAGE, new)


@pytest.fixture
def history(stored, tmp_path):
    """Make a repository of three commits in the working directory; return their ids, the oldest first."""
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    environment |= {f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}

    def git(*arguments):
        done = subprocess.run(["git", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    git("init", "--quiet")
    ids = []
    for number in range(3):
        git("commit", "--quiet", "--allow-empty", "--message", f"commit {number}")
        ids.append(git("rev-parse", "HEAD"))
    return ids


def test_commits_mean_their_newest_whole_run(stored, history, capsys):
    stored("0001_x", 100, commit=history[1])
    stored("0002_x", 101, commit=history[1])
    stored("0003_x", 90, commit=history[1], dirty=True)
    stored("0004_x", 90, commit=history[1], nsa_sel={"interrupted": True})
    stored("0005_x", 115, commit=history[2])
    for specs in (["HEAD~1", "HEAD"], [history[1][:8], history[2][:7]], [history[1], history[2]], ["HEAD~1"]):
        assert command.main(specs) == 1
        assert compared(capsys) == ["0002_x", "0005_x"]
    assert command.main(["HEAD~2", "HEAD"]) == 2
    error = capsys.readouterr().err
    assert f"HEAD~2: commit {history[0][:10]} has no whole saved run" in error and error.count("\n") == 1


def test_the_old_commit_is_taken_on_the_card_of_the_new_run(stored, history, capsys):
    stored("0001_x", 100, commit=history[1])
    stored("0002_x", 100, commit=history[1], gpu_id="bb22")
    stored("0003_x", 100, commit=history[2])
    assert command.main(["HEAD~1", "HEAD"]) == 0
    assert compared(capsys) == ["0001_x", "0003_x"]


def test_of_several_cards_runs_with_a_prefix_that_of_the_new_runs_gpu_is_meant(stored, capsys):
    stored("0001_x", 100)
    stored("0001_x", 100, gpu="NVIDIA L4")
    stored("0002_x", 100)
    assert command.main(["0001", "0002"]) == 0
    assert compared(capsys) == ["0001_x", "0002_x"]
    assert command.main(["0002", "0001"]) == 2
    assert "means 2 runs" in capsys.readouterr().err


def test_without_history_a_hash_means_the_commit_that_a_run_says(stored, capsys):
    stored("0001_x", 100, commit="0123456789abcdef0123456789abcdef01234567")
    stored("0002_x", 100)
    assert command.main(["0123456"]) == 0
    assert compared(capsys) == ["0001_x", "0002_x"]


@pytest.mark.parametrize("uri", ["elsewhere/runs", "file://elsewhere/runs"])
def test_another_storage_can_be_named(stored, capsys, uri):
    stored("0001_baseline", 100, root="elsewhere/runs")
    stored("0002_x", 115, root="elsewhere/runs")
    assert command.main(["--storage", uri]) == 1
    assert compared(capsys) == ["0001_baseline", "0002_x"]
    assert command.main(["--storage", uri, "0002", "0001"]) == 0


def test_old_stands_before_new_in_the_report_too(stored, capsys):
    stored("0001_x", 100)
    stored("0002_x", 150)
    pytest.importorskip("matplotlib", reason="the report's plots need matplotlib")
    for name, us in (("0003_x", 100), ("0004_x", 150)):
        stored(name, us, entries=[entry("a", "packed_sdpa", us, gpu=None)])
    assert report_command.main(["0003", "0004", "--out", "out"]) == 0
    page = Path("out/report.html").read_text()
    assert page.index("0003_x.json") < page.index("0004_x.json", page.index("0003_x.json"))
    assert "0003_x.json (2026-01-01T00:00) -&gt; " in page
    with pytest.raises(SystemExit, match="2"):
        report_command.main(["0001", "0002", "0003", "--out", "out"])


USELESS = [
    "",
    "/",
    ".",
    "nothing",
    "a/b/c.json",
    "/no/such.json",
    "x" * 5000,
    "a\0b",
    "-",
    "0001*0",
    "[0]",
    "~",
    "é" * 300,
]


@pytest.mark.parametrize("spec", USELESS, ids=range(len(USELESS)))
@pytest.mark.parametrize("side", ["old", "new", "report"])
def test_what_means_no_run_is_one_line_and_exit_2(stored, capsys, spec, side):
    stored("0001_x", 100)
    main = report_command.main if side == "report" else command.main
    more = ["--out", "out"] if side == "report" else []
    assert main([*more, "--", *(["0001", spec] if side == "new" else [spec, "0001"])]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and len(captured.err) < 600 and captured.out == ""


# ---- How it ends


def test_what_had_no_memory_is_not_missing(stored):
    stored("0001_x", 100)
    mark = {"asked": [["a", "triton"], ["a", "triton_core"]]}
    mark["not_timed"] = [{"case": "a", "method": "triton_core", "reason": "needs 90 GB, 80 GB are free"}]
    stored("0002_x", 100, nsa_sel=mark)
    assert command.main(["0001", "0002"]) == 0


def test_exit_codes_are_those_of_the_help(stored, capsys):
    stored("0001_x", 100)
    stored("0002_x", 105)
    stored("0003_x", 115)
    stored("0004_x", 115, entries=[entry("a", "triton", 115, q1=101e-6)])
    stored("0005_x", 115, entries=[entry("z", "triton", 115)])
    stored("0006_x", 100, nsa_sel={"asked": [["a", "triton"], ["a", "triton_core"]]})
    stored("0007_x", 100, gpu="NVIDIA L4")
    for new, code in (("0002", 0), ("0003", 1), ("0004", 3), ("0005", 1), ("0006", 1), ("0007", 1), ("0008", 2)):
        assert command.main(["0001", new]) == code, new
    with pytest.raises(SystemExit):
        command.main(["--help"])
    assert "3 only suspects" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", (["0001"] * 3, ["0001", "--sel-baseline", "0001"], ["--storage"]))
def test_other_arguments_are_refused(stored, arguments, capsys):
    stored("0001_x", 100)
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    assert "nsa-sel compare: error" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("terminal", "environment", "coloured"),
    [(True, {}, True), (False, {}, False), (True, {"NO_COLOR": "1"}, False), (True, {"TERM": "dumb"}, False)],
)
def test_the_verdict_is_coloured_on_a_terminal_only(stored, capsys, monkeypatch, terminal, environment, coloured):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stored("0001_x", 100)
    stored("0002_x", 115)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    command.main(["0001", "0002"])
    assert ("\x1b[31mverdict: FAIL, 1 slower\x1b[0m" in capsys.readouterr().out) == coloured


# ---- What it writes


@pytest.fixture
def everything(stored):
    """Save two runs that differ in every way, the names of one case hostile."""
    evil = "rows-<b>|`*\x1b[2J"
    old = [entry(case, "triton", 100) for case in ("rows-slow", "rows-suspect", "rows-fast", "rows-same", evil)]
    new = [entry("rows-slow", "triton", 130), entry("rows-suspect", "triton", 120, q1=99e-6)]
    new += [entry("rows-fast", "triton", 50), entry("rows-same", "triton", 100), entry(evil, "triton", 150)]
    stored("0001_x", 0, entries=old)
    asked = [*([made["extra_info"]["case"], "triton"] for made in new), ["rows-gone", "triton"]]
    stored("0002_x", 0, entries=new, nsa_sel={"asked": asked})


def test_json_holds_everything(everything):
    assert command.main(["0001", "0002", "--json", "found.json"]) == 1
    found = json.loads(Path("found.json").read_text())
    assert found["verdict"] == "FAIL, 2 slower, 1 missing, 1 suspect" and found["exit_code"] == 1
    assert [change["case"] for change in found["regressions"]][1:] == ["rows-slow"]
    (suspect,) = found["suspects"]
    assert (suspect["case"], suspect["method"], suspect["note"]) == ("rows-suspect", "triton", "quartiles overlap")
    assert (suspect["old_us"], suspect["new_us"]) == (pytest.approx(100), pytest.approx(120))
    assert [change["case"] for change in found["improvements"]] == ["rows-fast"]
    assert found["missing"] == [["rows-gone", "triton"]]
    (family,) = found["families"]
    assert (family["family"], family["scope"], family["cases"]) == ("rows", "op", 5)
    assert found["runs"]["old"]["gpu_id"] == "aa11" and found["runs"]["new"]["commit"] == "abc"


def test_markdown_is_a_comment_with_the_verdict_first(everything):
    assert command.main(["0001", "0002", "--markdown", "comment.md"]) == 1
    text = Path("comment.md").read_text()
    assert text.startswith("### nsa_sel: FAIL, 2 slower, 1 missing, 1 suspect\n")
    assert "| rows-slow | triton | 100.00 | 130.00 |  | +30.0% |  |" in text
    assert "| rows-suspect | triton | 100.00 | 120.00 |  | +20.0% | quartiles overlap |" in text
    assert "nsa-sel compare " in text and "--again" in text
    assert "| rows | op | 5 |" in text and "rows-gone" in text and "**Faster (1)**" in text
    assert "<b>" not in text and "\x1b" not in text
    lines = [line for line in text.splitlines() if line.startswith("| rows-&lt;b>")]
    assert lines and all(line.replace("\\|", "").count("|") == 8 for line in lines)


def test_junit_fails_what_is_slower_or_missing(everything):
    assert command.main(["0001", "0002", "--junit", "junit.xml"]) == 1
    suite = ElementTree.parse("junit.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("7", "4", "1")
    failed = [test.get("classname") for test in suite if test.find("failure") is not None]
    assert failed[0] == "rows-slow" and failed[2:] == ["rows-gone", "nsa-sel compare"]
    assert [test.get("classname") for test in suite if test.find("skipped") is not None] == ["rows-suspect"]


def test_a_pass_has_no_failure(stored):
    stored("0001_x", 100)
    stored("0002_x", 101)
    files = ["--junit", "junit.xml", "--markdown", "comment.md", "--json", "found.json"]
    assert command.main(["0001", "0002", *files]) == 0
    suite = ElementTree.parse("junit.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("2", "0")
    assert "Slower" not in Path("comment.md").read_text()


def test_a_file_that_cannot_be_written_is_one_line(stored, capsys):
    stored("0001_x", 100)
    stored("0002_x", 100)
    assert command.main(["0001", "0002", "--json", "no/such/folder/x.json"]) == 2
    assert "no/such/folder/x.json: cannot be written" in capsys.readouterr().err


# ---- Measured again


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_nothing_can_be_measured_again(stored, capsys):
    stored("0001_x", 100)
    stored("0002_x", 115)
    assert command.main(["0001", "0002", "--again"]) == 2
    error = capsys.readouterr().err
    assert "here is none" in error and error.count("\n") == 1


class Timed:
    """Stand in for a measuring session: times by method in µs, None for what fails."""

    floor_us = 2.0

    def __init__(self, kernels):
        self.calibration = {"null_kernel_us": {"device": self.floor_us}}

    def measure_again(self, case, method):
        us = AGAIN[case.id, method]
        if us is None:
            raise MemoryError("no room")
        return {"median": us * 1e-6, "q1": us * 1e-6, "q3": us * 1e-6, "ci95_us": [us, us]}


AGAIN: dict = {}
SLOW, UNCLEAR = ("rows-bf16-H8-D128-Dv128-L16-N64-few", "rows-bf16-H8-D128-Dv128-L32-N64-few")


@pytest.fixture
def again(stored, monkeypatch):
    """Save two runs, one case slower and one suspect; return a function that compares them and measures again."""
    here = {"gpu": "NVIDIA H200", "gpu_id": "aa11"}
    monkeypatch.setattr("nsa_sel.bench.timer.machine.environment", lambda: here)
    monkeypatch.setattr("nsa_sel.bench.session.Session", Timed)
    monkeypatch.setattr(command, "_checked_out", lambda: "abc")
    machine = {"calibration": {"null_kernel_us": {"device": 2.0}}}
    stored("0001_x", 0, entries=[entry(SLOW, "triton", 10), entry(UNCLEAR, "triton", 10)], machine_info=machine)
    stored("0002_x", 0, entries=[entry(SLOW, "triton", 12), entry(UNCLEAR, "triton", 12, q1=9e-6)])

    def measure(slow, unclear, floor_us=2.0, **other):
        monkeypatch.setattr(Timed, "floor_us", floor_us)
        here.update(other)
        AGAIN.update({(SLOW, "triton"): slow, (UNCLEAR, "triton"): unclear})
        return command.main(["0001", "0002", "--again"])

    return measure


def test_measured_again_a_suspect_is_confirmed_or_cleared(again, capsys):
    assert again(12, 12) == 1
    said = capsys.readouterr()
    assert "FAIL, 2 slower" in said.out and "2/2, 0:00 left: measured again" in said.err
    assert again(10, 12) == 1
    out = capsys.readouterr().out
    assert "FAIL, 1 slower" in out and f"{UNCLEAR} triton  10.00 us -> 12.00 us  again 12.00 us  +20.0 %" in out
    assert again(10, 10) == 0
    assert "measured again, not slower (2)" in capsys.readouterr().out


def test_what_fails_when_measured_again_stays_what_it_was(again, capsys):
    assert again(10, None) == 3
    captured = capsys.readouterr()
    assert f"{UNCLEAR} triton: not measured again: MemoryError('no room')" in captured.err
    assert "SUSPECT (1)" in captured.out


def test_the_launch_floor_of_the_process_that_measures_again_is_taken_off(again):
    assert again(11.4, 11.4, floor_us=2.5) == 0
    assert again(11.4, 11.4, floor_us=2.2) == 1


@pytest.mark.parametrize("other", [{"gpu": "NVIDIA L4"}, {"gpu_id": "bb22"}])
def test_another_card_does_not_measure_again(again, capsys, other):
    assert again(12, 12, **other) == 2
    assert "--again: the new run is of" in capsys.readouterr().err


def test_another_commit_does_not_measure_again(again, capsys, monkeypatch):
    monkeypatch.setattr(command, "_checked_out", lambda: "def")
    assert again(12, 12) == 2
    assert "the new run is of commit abc; check it out, here is def" in capsys.readouterr().err
