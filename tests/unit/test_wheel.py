"""The distributions: the wheel has the package and both suites, which run in any folder; the source has everything.

One version is in both, in the package, and at the head of the changelog.
"""

from __future__ import annotations

import compileall
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import nsa_sel
from nsa_sel.bench import cli
from tests.programs import python

pytest.importorskip("setuptools", "77", reason="setuptools >= 77 builds the wheel (extra: dev)")

ROOT = Path(__file__).parents[2]
SUITES = ("parity", "perf")
NOT_KEPT = shutil.ignore_patterns(
    ".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "build", "dist", "*-cpu"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Copy the repository's files, without what runs leave there."""
    folder = tmp_path_factory.mktemp("source") / "copy"
    shutil.copytree(ROOT, folder, symlinks=True, ignore=NOT_KEPT)
    return folder


def built(kind: str, source: Path, out: Path) -> Path:
    """Build a distribution, `wheel` or `sdist`."""
    build = f"import sys, setuptools.build_meta as backend; backend.build_{kind}(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, out], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0 and "Package would be ignored" not in done.stderr, done.stderr
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory) -> Path:
    return built("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def unpacked(source: Path, tmp_path_factory) -> Path:
    """Unpack the source distribution and return its folder."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(built("sdist", source, tmp_path_factory.mktemp("sdist"))) as content:
        content.extractall(folder, filter="data")
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory) -> Path:
    """Unpack the wheel, with byte code, as pip does, and return the folder."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(folder)
    assert compileall.compile_dir(folder, quiet=1)
    return folder


def command(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `nsa-sel` of the wheel in a folder."""
    unwanted = ("NSA_", "PYTEST", "PYTHON", "TRITON")
    env = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    env |= {"PYTHONPATH": str(installed), "CUDA_VISIBLE_DEVICES": ""}
    return python("-m", "nsa_sel", *arguments, cwd=folder, env=env)


def contents(folder: Path) -> dict[Path, int]:
    """Return every file below a folder and when it was last written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_the_wheel_carries_the_files_that_the_package_reads(wheel):
    with zipfile.ZipFile(wheel) as content:
        assert content.read("nsa_sel/base.yaml") == (ROOT / "configs/base.yaml").read_bytes()
        assert content.read("nsa_sel/tests/suite.ini") == (ROOT / "pytest.ini").read_bytes()
        assert {"nsa_sel/bench/compare/noise.json", "nsa_sel/py.typed"} <= set(content.namelist())
        of_the_page = {path.name for path in (ROOT / "src/nsa_sel/bench/report/web").iterdir()}
        assert {f"nsa_sel/bench/report/web/{name}" for name in of_the_page} <= set(content.namelist())
        assert any(
            name.endswith("licenses/src/nsa_sel/bench/report/web/echarts.LICENSE") for name in content.namelist()
        )


def test_the_wheel_carries_every_module_and_of_the_tests_both_suites(wheel):
    package, tests = ROOT / "src" / "nsa_sel", ROOT / "tests"
    expected = {f"nsa_sel/{path.relative_to(package)}" for path in package.rglob("*.py")}
    expected |= {f"nsa_sel/tests/{path.name}" for path in tests.glob("*.py")}
    for suite in SUITES:
        expected |= {f"nsa_sel/tests/{path.relative_to(tests)}" for path in (tests / suite).rglob("*.py")}
    with zipfile.ZipFile(wheel) as content:
        assert {name for name in content.namelist() if name.endswith(".py")} == expected


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no repository says which files there are")
def test_the_source_distribution_has_every_file_of_the_repository(unpacked):
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
    files = [name for name in listed.split("\0") if name and (ROOT / name).exists()]
    assert len(files) > 200 and [name for name in files if not (unpacked / name).is_file()] == []
    assert (unpacked / "configs/base.yaml").read_bytes() == (ROOT / "configs/base.yaml").read_bytes()


def test_the_source_distribution_makes_the_same_wheel(wheel, unpacked, tmp_path):
    with zipfile.ZipFile(wheel) as ours, zipfile.ZipFile(built("wheel", unpacked, tmp_path)) as theirs:
        assert sorted(ours.namelist()) == sorted(theirs.namelist())


def test_the_version_is_said_in_one_place(wheel, unpacked):
    assert (
        wheel.name.startswith(f"nsa_sel-{nsa_sel.__version__}-") and unpacked.name == f"nsa_sel-{nsa_sel.__version__}"
    )
    released = re.findall(
        r"^## (\d+\.\d+\.\d+) \(\d{4}-\d\d-\d\d\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert released[0] == nsa_sel.__version__


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU means real kernels, and compiling them")
def test_a_wheel_tests_its_kernel_in_an_empty_folder_and_stays_as_it_was(installed, tmp_path):
    before = contents(installed)
    # The first runs the kernel; the other pastes a repro, which finds its modules in the wheel.
    done = command(installed, tmp_path, "parity", "-q", "-k", "without_length_hints or repro_of_one_row")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout and "with Triton's interpreter" in done.stdout
    assert contents(installed) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="would time the kernel")
def test_a_wheel_saves_a_perf_run_in_an_empty_folder_where_the_commands_find_it(installed, tmp_path):
    before = contents(installed)
    chosen = ("--sel-matrix", "smoke", "-k", "decode-bf16-H4", "--benchmark-autosave")
    done = command(installed, tmp_path, "bench", *chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = tmp_path.glob(".benchmarks/*-cpu/0001_*.json")
    timed = {entry["extra_info"]["method"] for entry in json.loads(run.read_text())["benchmarks"]}
    assert {"packed_sdpa", "sdpa_core"} <= timed
    report = command(installed, tmp_path, "report", "0001", "--out", "report")
    assert report.returncode == 0 and (tmp_path / "report" / "report.html").is_file(), report.stderr
    assert contents(installed) == before


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["parity", "-k", "no_such_test"], pytest.ExitCode.NO_TESTS_COLLECTED),
        (["bench", "--no-such-option"], pytest.ExitCode.USAGE_ERROR),
    ],
)
def test_the_exit_codes_of_pytest_are_passed_on(installed, tmp_path, arguments, code):
    assert command(installed, tmp_path, *arguments).returncode == code


def test_a_warning_fails_a_test_of_the_wheel_as_in_a_clone(installed, tmp_path):
    plugin = "import warnings\ndef pytest_runtest_call(item):\n    warnings.warn('planted')\n"
    (tmp_path / "warns.py").write_text(plugin)
    chosen = ("-q", "-p", "warns", "-k", "more_column_chunks_than_the_kernel_holds")
    done = command(installed, tmp_path, "parity", *chosen)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED and "UserWarning: planted" in done.stdout, done.stdout


def test_a_clone_runs_its_tests_from_a_folder_that_has_tests_too(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").touch()
    done = command(ROOT / "src", tmp_path, "parity", "-q", "-k", "more_column_chunks_than_the_kernel_holds")
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr


def test_a_copy_without_tests_says_so(installed, tmp_path):
    shutil.copytree(installed / "nsa_sel", tmp_path / "nsa_sel", ignore=shutil.ignore_patterns("tests"))
    done = command(tmp_path, tmp_path, "parity")
    assert done.returncode == 2 and done.stderr.startswith("nsa-sel parity: no tests in "), done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("verb", "options"),
    [("parity", {"--sel-kernel", "--sel-matrix"}), ("bench", {"--sel-kernel", "--sel-matrix", "--sel-resume"})],
)
def test_help_shows_the_options_of_the_suite_and_an_example(verb, options, capsys):
    with pytest.raises(SystemExit):
        cli.function_of(verb)(["--help"])
    said = capsys.readouterr().out
    for option in ("--sel-kernel", "--sel-matrix", "--sel-resume"):
        assert (f"\n  {option} " in said) == (option in options)
    assert f"\n  nsa-sel {verb} " in said
