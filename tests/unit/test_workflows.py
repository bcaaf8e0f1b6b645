"""The workflows of .github: every step's command runs here, and nothing in them trusts more than it must."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*.yml")}
# A job with those that need it.
JOBS = [
    (name, [job, *(other for other, about in workflow["jobs"].items() if about.get("needs") == job)])
    for name, workflow in WORKFLOWS.items()
    for job, about in workflow["jobs"].items()
    if "needs" not in about
]

# What GitHub would put in, where a command or its environment asks for it.
GITHUB = {
    "vars.SEL_OPTIONS": "--rounds 1 -k decode-bf16-H4-D64",  # one case of the smoke matrix: a run takes minutes
    "vars.PIP_EXTRA_INDEX_URL": "",
    "github.token": "",
    "github.repository": "owner/nsa_sel",
    "github.event.pull_request.number": "7",
}
# Run in place of the command: of style and types .ci/run says nothing, and mypy would take a minute here.
IN_PLACE_OF = {"make lint": "make --dry-run lint"}

# Installs nothing, and of a pytest run only sees that its folders are there: `make test` is what runs this test, and
# oldest and newest versions come from a package index. All else is this interpreter's.
PYTHON = """\
#!/bin/sh
here=$(dirname "$0")
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; exit ;;
  "-m pip") printf '#!/bin/sh\\nexec {python} -m nsa_sel "$@"\\n' > "$here/nsa-sel"; chmod +x "$here/nsa-sel"; exit ;;
  "-m nsa_sel") if [ "$3" = parity ]; then exit; fi ;;
  "-m pytest") for each; do case "$each" in tests/*) ls "$each" > /dev/null || exit ;; esac; done; exit ;;
esac
exec {python} "$@"
"""
GH = """#!/bin/sh\necho "gh $*" >> {said}\ncat comment.md >> {said}\n"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """Make a repository of two commits with all that this tree has, and a folder of programs to be found first."""
    folder = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns(".git", ".venv", ".benchmarks", "__pycache__", "*.egg-info", ".*_cache", "dist")
    shutil.copytree(ROOT, folder / "clone", symlinks=True, ignore=ignored)
    programs = folder / "programs"
    programs.mkdir()
    texts = {"python3": PYTHON.format(python=shlex.quote(sys.executable)), "gh": GH.format(said=folder / "said")}
    for name, text in texts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.com", "-C", str(folder / "clone")]
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "base"]):
        subprocess.run([*git, *command], check=True, env=environment(folder))
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "head"], check=True)
    return folder


def environment(folder):
    unwanted = ("GIT_", "MAKE", "MFLAGS", "NSA_", "PYTEST", "PY", "TRITON")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    path = f"{folder}/programs{os.pathsep}{kept['PATH']}"
    return {**kept, "PATH": path, "PYTHONPATH": str(folder / "clone/src"), "CUDA_VISIBLE_DEVICES": ""}


def filled_in(text, values):
    """Return a text of a workflow with what GitHub would put in; an expression that is not known fails the test."""
    return re.sub(r"\$\{\{ *(.*?) *\}\}", lambda found: values[found[1]], str(text))


def values_of(job, clone):
    """Yield what a job's expressions mean, once for each entry of its matrix."""
    commits = subprocess.run(["git", "-C", clone, "rev-list", "HEAD"], capture_output=True, text=True).stdout.split()
    known = {
        **GITHUB,
        "github.event.pull_request.head.sha": commits[0],
        "github.event.pull_request.base.sha": commits[1],
    }
    matrix = job.get("strategy", {}).get("matrix", {})
    for entry in product(*matrix.values()):
        yield known | {f"matrix.{name}": value for name, value in zip(matrix, entry, strict=True)}


def run_commands(workflow, job, checkout):
    """Run the commands of a job as GitHub does; one that fails fails the test."""
    clone = checkout / "clone"
    for values in values_of(job, clone):
        for step in job["steps"]:
            if "run" not in step:
                continue
            command = filled_in(step["run"], values)
            env = {**workflow.get("env", {}), **job.get("env", {}), **step.get("env", {})}
            env = environment(checkout) | {variable: filled_in(value, values) for variable, value in env.items()}
            started = ["bash", "-e", "-o", "pipefail", "-c", IN_PLACE_OF.get(command, command)]
            done = subprocess.run(started, cwd=clone, env=env, capture_output=True, text=True, timeout=200)
            assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"


@pytest.mark.skipif(not all(map(shutil.which, ("bash", "make", "git", "tar"))), reason="needs bash, make, git and tar")
@pytest.mark.parametrize(("workflow", "jobs"), JOBS, ids=lambda value: value if isinstance(value, str) else value[0])
def test_every_command_of_a_job_runs(workflow, jobs, checkout):
    if "distributions" in jobs:
        pytest.importorskip("build", reason="builds the distributions (extra: dev)")
        pytest.importorskip("setuptools", "77", reason="builds the distributions (extra: dev)")
    for job in jobs:
        run_commands(WORKFLOWS[workflow], WORKFLOWS[workflow]["jobs"][job], checkout)
    if "comment" in jobs:
        said = (checkout / "said").read_text()
        assert said.startswith("gh pr comment 7 --body-file comment.md\n### nsa_sel: ")


def test_a_command_that_fails_fails_the_test(checkout):
    with pytest.raises(AssertionError, match="make no-such-target"):
        run_commands({}, {"steps": [{"run": "make no-such-target\ntrue"}]}, checkout)


def test_an_expression_that_is_not_known_is_seen():
    with pytest.raises(KeyError, match="secrets.KEY"):
        filled_in("curl ${{ secrets.KEY }}", GITHUB)


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_actions_are_pinned_by_commit_with_the_version_beside_it(workflow):
    used = re.findall(r"uses: (.*)", (ROOT / ".github/workflows" / workflow).read_text())
    assert used and all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", each) for each in used)


def test_only_the_comment_may_write_and_its_job_runs_no_code_of_the_branch():
    for name, workflow in WORKFLOWS.items():
        assert workflow["permissions"] in ({}, {"contents": "read"})
        for job_name, job in workflow["jobs"].items():
            writes = "write" in job.get("permissions", {}).values()
            assert writes == ((name, job_name) == ("perf.yml", "comment"))
            checked_out = any(step.get("uses", "").startswith("actions/checkout") for step in job["steps"])
            assert not (writes and (checked_out or "self-hosted" in job["runs-on"]))


def test_the_gpu_measures_one_at_a_time_and_only_branches_of_the_repository():
    job = WORKFLOWS["perf.yml"]["jobs"]["measure"]
    assert job["concurrency"] == {"group": "gpu", "cancel-in-progress": False}
    assert "github.event.pull_request.head.repo.full_name == github.repository" in job["if"]


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_help_names_every_target_with_a_sentence():
    command = ["make", "--no-print-directory", "help", f"PY={sys.executable}"]  # make itself may run this test
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    listed = dict(re.fullmatch(r"make ([a-z-]+) +(\S.*)", line).groups() for line in done.stdout.splitlines())
    (phony,) = re.findall(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert done.returncode == 0 and set(listed) == set(phony.split())
