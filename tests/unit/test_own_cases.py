"""`--sel-cases FILE` in every command, on the CPU with tiny cases; what is saved is judged without the file."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import saved_runs
import torch

import nsa_sel
from nsa_sel.bench.compare import command as compare_command
from nsa_sel.bench.report import command as report_command
from nsa_sel.bench.saved import run as runs
from nsa_sel.bench.saved.journal import SUFFIX
from nsa_sel.bench.saved.run import Saved
from nsa_sel.bench.suite import case_file
from nsa_sel.bench.suite.saved_cases import definitions, rebuilt
from nsa_sel.bench.threshold import command as threshold_command
from nsa_sel.bench.threshold.judged import ThresholdError
from nsa_sel.bench.threshold.rule import decide
from nsa_sel.bench.tune import command as tune_command
from tests.programs import needs_interpreter, python

ROOT = Path(nsa_sel.__file__).parents[2]
ENTRIES = """\
cases:
  - {family: rows, distribution: few, H: 4, D: 16, Dv: 16, L: 16, N: 4}
  - {family: decode, distribution: local, H: 2, D: 16, Dv: 16, L: 48, batch: 1, context: 128, block: 16, name: mine}
  - {family: prefill, distribution: random, H: 2, D: 16, Dv: 16, L: 32, S: 32, G: 1, block: 16}
  - recorded: calls/*.pt
"""
NAMES = [
    "rows-bf16-H4-D16-Dv16-L16-N4-few",
    "decode-bf16-H2-D16-Dv16-L48-N4-t128-block16-local-mine",
    "prefill-bf16-H2-D16-Dv16-L32-N32-S32-block16-random",
    "recorded-bf16-H2-D16-Dv16-L7-N2-0001-",
]


@pytest.fixture
def file(tmp_path):
    """Return a file of tiny cases of each kind, among them a recorded call."""
    torch.manual_seed(0)
    shapes = (2, 1, 1, 2, 16), (2, 1, 20, 16), (2, 1, 20, 16)
    ranges = torch.tensor([[0, 4], [9, 12]]).expand(2, 1, 1, 2, 2)
    nsa_sel.record(tmp_path / "calls", *(torch.randn(shape).bfloat16() for shape in shapes), ranges)
    path = tmp_path / "mine.yaml"
    path.write_text(ENTRIES)
    return path


def pytest_run(*arguments, path: Path | str = "") -> CompletedProcess:
    """Run pytest on the CPU; path: a folder of plugins."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{path}"}
    return python("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, env=env)


def test_a_perf_run_holds_its_cases_and_is_compared_and_reported_without_the_file(file, tmp_path, capsys):
    saved = tmp_path / "saved"
    done = pytest_run("tests/perf", "--sel-cases", file, f"--benchmark-storage={saved}", "--benchmark-save=own")
    assert done.returncode == 0 and "4 cases, 8 benchmarks" in done.stdout, done.stdout + done.stderr
    expected = case_file.read(file)
    (path,) = saved.glob("*/0001_own.json")
    file.unlink()
    shutil.rmtree(tmp_path / "calls")

    run = runs.load(path)
    assert [name.startswith(start) for name, start in zip(run.cases, NAMES, strict=True)] == [True] * 4
    assert run.case_file == "mine.yaml" and list(rebuilt(run.cases).values()) == expected
    params = {entry["params"]["case_id"]: entry["params"] for entry in json.loads(path.read_text())["benchmarks"]}
    assert (params[expected[1].id]["block"], params[expected[3].id]["layout"]) == (16, "recorded")
    assert compare_command.main([str(path), str(path)]) == 0
    assert report_command.main([str(path), "--out", str(tmp_path / "report")]) == 0
    table = (tmp_path / "report/results.md").read_text()
    assert "| recorded | recorded | 1 |" in table and f"| {expected[3].id} | packed_sdpa |" in table


def test_a_run_that_ended_early_holds_its_cases_too(file, tmp_path):
    stop = tmp_path / "stop.py"
    stop.write_text(
        "import os\ndef pytest_runtest_logfinish(location):\n    'sdpa_core' in str(location) and os._exit(9)\n"
    )
    options = ("--benchmark-autosave", f"--benchmark-storage={tmp_path}/saved", "--sel-cases", file)
    assert pytest_run("-p", "stop", "tests/perf", *options, path=tmp_path).returncode == 9
    (journal,) = (tmp_path / "saved").rglob(f"*{SUFFIX}")
    assert list(rebuilt(runs.load(journal).cases).values()) == case_file.read(file)


def test_a_run_of_the_matrix_holds_only_the_definitions_that_a_hook_adds(tmp_path):
    (tmp_path / "hook.py").write_text(
        "from nsa_sel.bench.suite.cases import rows_case\n"
        "def pytest_nsa_sel_cases(cases):\n"
        "    cases.append(rows_case('bf16', 'few', H=4, D=16, Dv=16, L=24, N=4))\n"
    )
    saved = tmp_path / "run.json"
    options = ("--sel-family=ragged", "--sel-matrix=smoke", f"--benchmark-json={saved}")
    done = pytest_run("-p", "hook", "tests/perf", *options, path=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = runs.load(saved)
    assert (run.case_file, list(run.cases)) == ("", ["rows-bf16-H4-D16-Dv16-L24-N4-few"])
    assert len({case for case, _ in run.timings}) == 2


@needs_interpreter
def test_parity_runs_the_files_cases_and_skips_what_the_interpreter_cannot_afford(file):
    file.write_text(file.read_text() + "  - {family: rows, distribution: many, H: 4, D: 64, Dv: 64, L: 1024, N: 65}\n")
    done = pytest_run("tests/parity", "--sel-cases", file, "-k", "own_case", "-rs")
    assert "4 passed, 1 skipped" in done.stdout, done.stdout + done.stderr
    assert "4 comparisons with Triton's interpreter" in done.stdout
    assert "65 rows of up to 1024 tokens are too large for Triton's interpreter" in done.stdout


@needs_interpreter
def test_a_wrong_kernel_fails_on_the_files_cases(file, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text(
        "import os\n"
        "os.environ['TRITON_INTERPRET'] = '1'\n"
        "from nsa_sel.kernel import launch\n"
        "right = launch.forward\n"
        "def one_token_less(q, k, v, ranges, **more):\n"
        "    ranges = ranges.clone()\n"
        "    ranges[..., -1, 1] -= 1\n"
        "    return right(q, k, v, ranges, **more)\n"
        "def pytest_runtest_call(item):\n"
        "    launch.forward = one_token_less\n"
    )
    done = pytest_run("-p", "broken", "tests/parity", "--sel-cases", file, "-k", "own_case", path=tmp_path)
    assert "4 failed" in done.stdout and "rows are bad" in done.stdout, done.stdout + done.stderr


def test_parity_without_the_option_collects_none_of_it():
    done = pytest_run("tests/parity", "--collect-only", "-k", "own_case")
    assert "own_case" not in done.stdout and done.returncode == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("tests/perf --sel-cases none.yaml", "none.yaml: cannot be read: No such file or directory"),
        ("tests/parity --sel-cases none.yaml", "none.yaml: cannot be read: No such file or directory"),
        ("tests/perf --sel-cases x --sel-matrix hot", "--sel-cases: stands in place of --sel-matrix; give one of them"),
        ("tests/perf --sel-family none", "family: value is 'none', expected one of rows, "),
    ],
)
def test_a_bad_choice_ends_pytest_in_one_line(arguments, message):
    done = pytest_run(*arguments.split())
    assert done.returncode == 4
    assert done.stderr.strip().startswith(f"ERROR: {message}") and "\n" not in done.stderr.strip()


def test_tune_takes_the_files_cases(file, capsys):
    args = tune_command.main_parser().parse_args(["--sel-cases", str(file), "-k", "H2"])
    assert tune_command.select(args) == case_file.read(file)[1:]
    with pytest.raises(SystemExit) as ended:
        tune_command.main(["--sel-cases", str(file), "--matrix", "hot"])
    assert ended.value.code == 2
    assert "--sel-cases: stands in place of --matrix and --family" in capsys.readouterr().err
    file.write_text(file.read_text().replace("L: 16", "L: 6x4"))
    with pytest.raises(SystemExit) as ended:
        tune_command.main(["--sel-cases", str(file)])
    assert ended.value.code == 2
    assert "mine.yaml line 2: L: value is '6x4', expected a whole" in capsys.readouterr().err


def continuous(folder: Path, *arguments) -> CompletedProcess:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return python("-m", "nsa_sel", "continuous", *arguments, cwd=folder, env=env)


def test_continuous_measures_the_files_cases_of_another_repository_and_saves_them(file, tmp_path):
    repository = tmp_path / "repository"
    shutil.copytree(ROOT / "src", repository / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@example.com"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    for arguments in (["init", "-q"], ["add", "--all"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *arguments], env=env, check=True)
    done = continuous(tmp_path, "HEAD", "--repo", repository, "--rounds", "1", "--sel-cases", file.name)
    assert done.returncode == 0 and "4 cases" in done.stdout, done.stdout + done.stderr
    for path in (tmp_path / ".benchmarks").glob("*/*_continuous_*.json"):
        run = runs.load(path)
        assert run.case_file == "mine.yaml" and list(rebuilt(run.cases).values()) == case_file.read(file)
        assert {case for case, _ in run.timings} == set(run.cases)


def test_continuous_refuses_a_bad_file_in_one_line(file, tmp_path):
    file.write_text(file.read_text().replace("L: 48", "L: 50"))
    done = continuous(tmp_path, "--base-dir", ROOT, "--head-dir", ROOT, "--sel-cases", file)
    assert done.returncode == 2
    assert f"{file} line 3: L: value is 50, expected a multiple of 16" in done.stderr and "Traceback" not in done.stderr


# --- the threshold, from runs that a GPU could have saved ---


def saved_run(file: Path, speedup: float = 3.0) -> dict:
    found = case_file.read(file)
    made = saved_runs.run(found, speedup)
    return {**made, runs.MARK: {"case_file": file.name, "cases": definitions(found)}}


def loaded(tmp_path: Path, *documents: dict) -> list[Saved]:
    return [Saved.load(saved_runs.save(one, tmp_path / f"run{at}.json")) for at, one in enumerate(documents)]


def test_the_threshold_of_a_files_run_is_over_the_cases_that_it_holds(file, tmp_path, capsys):
    saved = loaded(tmp_path, saved_run(file))
    file.unlink()
    decided = decide(saved)
    assert decided.expected == "cases of `mine.yaml`"
    assert {t.regime: len(t.verdicts) for t in decided.deciding} == {"rows": 1, "decode": 2, "prefill": 1}
    assert decided.min_L == 7 and not any(t.missing for t in decided.deciding)
    assert threshold_command.main([str(tmp_path / "run0.json")]) == 0
    assert "cases of mine.yaml, 1 run(s)" in capsys.readouterr().out


def test_a_case_of_the_file_that_no_run_has_is_missing(file, tmp_path, capsys):
    loaded(tmp_path, saved_run(file))
    file.write_text(file.read_text().replace("L: 16", "L: [16, 32]"))
    assert threshold_command.main([str(tmp_path / "run0.json"), "--sel-cases", str(file)]) == 1
    assert "rows-bf16-H4-D16-Dv16-L32-N4-few: missing from every run" in capsys.readouterr().out


def test_the_matrix_can_be_asked_for_and_then_all_of_it_is_missing(file, tmp_path):
    decided = decide(loaded(tmp_path, saved_run(file)), "smoke")
    assert decided.expected == "matrix `smoke`"
    assert all(v.problem == "missing from every run" for t in decided.deciding for v in t.verdicts)


def test_runs_of_different_cases_are_judged_only_when_one_says_which(file, tmp_path):
    matrix_run = saved_runs.run(case_file.read(file)[:1])
    with pytest.raises(ThresholdError, match="the runs are of different cases: mine.yaml .*, the matrix "):
        decide(loaded(tmp_path, saved_run(file), matrix_run))


def test_a_bad_file_or_definition_ends_the_threshold_in_one_line(file, tmp_path, capsys):
    document = saved_run(file)
    path = saved_runs.save(document, tmp_path / "run.json")
    assert threshold_command.main([str(path), "--sel-cases", "none.yaml"]) == 2
    assert capsys.readouterr().err == "nsa-sel threshold: none.yaml: cannot be read: No such file or directory\n"
    next(iter(document[runs.MARK]["cases"].values()))["H"] = 5
    saved_runs.save(document, path)
    assert threshold_command.main([str(path)]) == 2
    assert "the run's definition of this case is damaged; measure it again" in capsys.readouterr().err


def test_a_case_that_only_the_run_knows_is_measured_again(file, tmp_path, monkeypatch, capsys):
    measured = []

    class Session:
        calibration: dict = {}

        def __init__(self, kernels):
            assert not kernels

        def measure_again(self, case, method):
            measured.append(case)
            return {"median": 1.0, "q1": 1.0, "q3": 1.0, "ci95_us": [1e6, 1e6]}

    document = saved_run(file)
    paths = [saved_runs.save(document, tmp_path / "0001_old.json")]
    for entry in document["benchmarks"]:
        if entry["extra_info"]["method"] == "triton":
            entry["stats"].update({name: 2 * entry["stats"][name] for name in ("median", "q1", "q3")})
            entry["extra_info"]["ci95_us"] = [2 * bound for bound in entry["extra_info"]["ci95_us"]]
    paths.append(saved_runs.save(document, tmp_path / "0002_new.json"))
    expected = case_file.read(file)
    file.unlink()
    monkeypatch.setattr("nsa_sel.bench.timer.machine.environment", lambda: saved_runs.IDENTITY)
    monkeypatch.setattr("nsa_sel.bench.session.Session", Session)
    monkeypatch.setattr(compare_command, "_checked_out", lambda: "")
    assert compare_command.main([*map(str, paths), "--again"]) == 1
    assert sorted(measured, key=str) == sorted(expected, key=str)
    assert "not measured again" not in capsys.readouterr().err


def test_the_report_of_a_files_gpu_run_has_its_tables_and_pictures(file, tmp_path):
    path = saved_runs.save(saved_run(file), tmp_path / "run.json")
    file.unlink()
    assert report_command.main([str(path), "--out", str(tmp_path / "report")]) == 0
    assert "Triton is safe to switch on from L = 7" in (tmp_path / "report/results.md").read_text()
