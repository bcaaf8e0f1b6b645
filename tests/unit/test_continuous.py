"""`nsa-sel continuous`: two commits from worktrees, measured in turns, and nothing of the checkout changed."""

import contextlib
import functools
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import nsa_sel
from nsa_sel.bench.continuous import command, course, saving, trees, worker
from nsa_sel.bench.continuous.kept import CourseError, Kept
from nsa_sel.bench.continuous.process import Process, ProcessLost
from nsa_sel.bench.continuous.trees import TreeError
from nsa_sel.bench.methods.contender import CaseState, WrongResult, check
from nsa_sel.bench.methods.prepare import prepare
from nsa_sel.bench.saved import run as runs
from nsa_sel.bench.session import Session
from nsa_sel.bench.suite import cases
from nsa_sel.bench.suite.kernels import UserKernel
from nsa_sel.bench.timer.timing import WallTimer
from nsa_sel.bench.tune.log import Progress
from tests.programs import python

PACKAGE = Path(nsa_sel.__file__).parent
REPOSITORY = PACKAGE.parents[1]
FIRST_COMMIT = "32d8e45"  # the oldest that can be BASE
CARD = {"gpu": "NVIDIA H200", "gpu_id": "aa11", "driver": "580.1", "cuda": "13.0", "torch": "2.11.0", "triton": "3.6.0"}
NOT_FOR_GIT = {name: os.environ[name] for name in os.environ if not name.startswith("GIT_")}


def git(folder, *arguments):
    who = ("-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "init.defaultBranch=main")
    command = ["git", *who, "-C", str(folder), *arguments]
    return subprocess.run(command, env=NOT_FOR_GIT, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """Return a repository of two commits whose package has the version 1, then 2."""
    folder = tmp_path / "repository"
    package = folder / "src/nsa_sel"
    for needed in (trees.WORKER, trees.CASE_FILE):
        (package / needed).parent.mkdir(parents=True)
        (package / needed).touch()
    (package / "base.yaml").touch()
    (folder / "configs").mkdir()
    (folder / "configs/base.yaml").symlink_to("../src/nsa_sel/base.yaml")
    git(folder, "init", "--quiet")
    for version in (1, 2):
        (package / "__init__.py").write_text(f"version = {version}\n")
        git(folder, "add", "--all")
        git(folder, "commit", "--quiet", "--message", f"version {version}")
    return folder


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Return the only folder for temporary files, so that what is left over shows."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(trees.tempfile, "tempdir", str(folder))
    return folder


def version(tree):
    return (tree.package / "__init__.py").read_text()


def everything(repository):
    """Return hashes of a checkout's files, its index and its HEAD, and how many worktrees the repository has.

    What Python compiles when the command is imported is not counted.
    """
    others = {".git", "__pycache__"}
    paths = [path for path in repository.rglob("*") if path.is_file() and not others & set(path.parts)]
    paths += [repository / ".git/index", repository / ".git/HEAD"]
    files = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    return files, git(repository, "worktree", "list", "--porcelain").count("worktree ")


# --- the trees ---


def test_two_commits_are_worktrees_and_nothing_of_them_is_left(repository, temporary):
    before = everything(repository)
    with trees.of_commits(repository, "HEAD~1", "HEAD") as both:
        assert (version(both.base), version(both.head)) == ("version = 1\n", "version = 2\n")
        assert both.base.commit["id"] == git(repository, "rev-parse", "HEAD~1") and not both.base.commit["dirty"]
        assert both.base.name == both.base.commit["id"][:7]
        assert git(repository, "worktree", "list").count("\n") == 2
        assert (both.base.root / "configs/base.yaml").exists()
        assert (both.suite / "nsa_sel_suite/__init__.py").read_text() == "version = 2\n" and not both.note
    assert everything(repository) == before
    assert not list(temporary.iterdir())


def test_without_head_the_working_tree_is_copied_as_it_is(repository):
    (repository / "src/nsa_sel/__init__.py").write_text("version = 3\n")
    (repository / "src/nsa_sel/new.json").write_text("untracked")
    before = everything(repository)
    with trees.of_commits(repository / "src", "HEAD", None) as both:
        assert version(both.head) == "version = 3\n" and version(both.base) == "version = 2\n"
        assert (both.head.package / "new.json").read_text() == "untracked"
        assert both.head.name == both.base.name + "-dirty"
        assert both.head.commit["dirty"] and both.head.commit["id"] == both.base.commit["id"]
        assert both.base.fingerprint() != both.head.fingerprint()
        (repository / "src/nsa_sel/__init__.py").write_text("version = 4\n")  # an edit while it is measured
        assert version(both.head) == "version = 3\n"
        (repository / "src/nsa_sel/__init__.py").write_text("version = 3\n")
    assert everything(repository) == before


def test_a_change_that_is_not_measured_makes_no_tree_dirty(repository):
    (repository / "README.md").write_text("words")
    with trees.of_commits(repository, "HEAD", None) as both:
        assert both.head.name == both.base.name and not both.head.commit["dirty"]
        assert both.base.fingerprint() == both.head.fingerprint()


def test_inside_a_hook_the_callers_index_is_left_alone(repository, monkeypatch):
    monkeypatch.setenv("GIT_INDEX_FILE", str(repository / ".git/index"))
    monkeypatch.setenv("GIT_DIR", str(repository / ".git"))
    hook = repository / ".git/hooks/post-checkout"
    hook.write_text(f"#!/bin/sh\ntouch {repository}/the-hook-ran\n")
    hook.chmod(0o755)
    before = everything(repository)
    with trees.of_commits(repository, "HEAD~1", "HEAD"):
        pass
    assert everything(repository) == before


def test_a_worktree_that_vanished_leaves_no_entry(repository):
    with trees.of_commits(repository, "HEAD~1", "HEAD") as both:
        shutil.rmtree(both.base.root)
    assert everything(repository)[1] == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_a_worktree_is_whole_and_removed(repository, temporary, monkeypatch, number):
    ask = trees.Git.ask

    def interrupted(self, *arguments):
        if arguments[0] == "worktree":
            os.kill(os.getpid(), number)
        return ask(self, *arguments)

    monkeypatch.setattr(trees.Git, "ask", interrupted)
    with command._signals(), pytest.raises(KeyboardInterrupt), trees.of_commits(repository, "HEAD~1", "HEAD"):
        pass
    monkeypatch.undo()
    assert everything(repository)[1] == 1
    assert not list(temporary.iterdir())


def test_folders_are_read_where_they_lie(repository, tmp_path, temporary):
    shutil.copytree(repository, tmp_path / "unpacked", ignore=shutil.ignore_patterns(".git"))
    with trees.of_folders(tmp_path / "unpacked", repository) as both:
        assert both.base.root == tmp_path / "unpacked" and both.base.name == "unpacked"
        assert both.head.name == "repository" and both.head.commit["id"] == "unversioned"
    assert not list(temporary.iterdir())


def test_a_head_older_than_the_command_is_measured_by_the_running_suite(repository):
    git(repository, "rm", "--quiet", "src/nsa_sel/bench/continuous/worker.py")
    with trees.of_commits(repository, "HEAD", None) as both:
        assert "is older than this command" in both.note
        assert (both.suite / "nsa_sel_suite" / trees.WORKER).read_bytes() == (PACKAGE / trees.WORKER).read_bytes()


@pytest.mark.parametrize(
    ("where", "base", "said"),
    [
        ("repository", "no-such", "no-such: no commit of"),
        (".", "HEAD", "not a git repository.*; without one, give two unpacked trees"),
        ("no", "HEAD", "no"),
    ],
)
def test_a_tree_that_is_not_there_is_one_line(repository, tmp_path, where, base, said):
    with pytest.raises(TreeError, match=said) as error, trees.of_commits(tmp_path / where, base, None):
        pass
    assert "\n" not in str(error.value)


def test_a_tree_without_the_package_is_refused(repository, tmp_path):
    with pytest.raises(TreeError, match="has no src/nsa_sel"), trees.of_folders(tmp_path, repository):
        pass


# --- the course, with stand-ins for the measuring processes ---


class Card:
    """Stand in for the card and the processes on it; every figure is made up.

    slower: factor by (tree, method) for the kernel. answers: an outcome, or an error, by (tree, case, method).
    """

    def __init__(self):
        self.cases = [f"rows-bf16-H8-D128-Dv128-L{64 * i}-N64-few" for i in range(1, 9)]
        self.machine, self.slower, self.answers = dict(CARD), {}, {}
        self.shortest_us, self.step_us, self.floor_us = (
            40,
            10,
            {},
        )  # floor_us: what every call of a tree takes longer, by tree
        self.log: list[tuple] = []
        self.dies_compiling = ""  # name of a tree
        self.on_measure = lambda tree, case, method: None

    def us(self, case, method):
        return (
            self.shortest_us
            + self.step_us * self.cases.index(case)
            + {"triton": 5, "triton_core": 3, "sdpa_core": 9}[method]
        )

    def start(self, tree, suite, choice):
        return StandIn(self, tree)

    def turns(self):
        """Return tree, number of timings for each process that measured."""
        found = []
        for what, tree in self.log:
            if what == "start":
                found.append([tree, 0])
            elif what == "measure":
                found[-1][1] += 1
        return [tuple(turn) for turn in found if turn[1]]


class StandIn:
    def __init__(self, card, tree):
        self.card, self.tree = card, tree
        self.noise = random.Random(len(card.log))
        card.log.append(("start", tree.name))

    @property
    def said(self):
        methods = ["triton", "triton_core", "sdpa_core"]
        cases = [[case, methods] for case in self.card.cases]
        return {"machine": dict(self.card.machine), "cases": cases, "notes": {}}

    def send(self, **request):
        self.card.log.append((request["do"], self.tree.name))

    def fileno(self):
        return self.card.always_readable.fileno()

    def answer(self, limit_s):
        if self.card.dies_compiling == self.tree.name:
            raise ProcessLost("died")
        return {"failed": 0}

    def end(self):
        pass

    def ask(self, do, case=None, method=None):
        card, name = self.card, self.tree.name
        card.log.append((do, name))
        if do == "calibrate":
            return {"calibration": {"tick_us": 0.03}}
        card.on_measure(name, case, method)
        answer = card.answers.get((name, case, method))
        if isinstance(answer, Exception):
            raise answer
        if answer is not None:
            return dict(answer)
        if card.machine["gpu"] is None and method != "sdpa_core":
            return {"not_timed": "no GPU"}
        us = card.us(case, method) * card.slower.get((name, method), 1.0) + card.floor_us.get(name, 0.0)
        samples = [us * (1 + self.noise.uniform(-0.004, 0.004)) * 1e-6 for _ in range(50)]
        extra = {"case": case, "method": method, "family": "rows", "bytes": 1e6, "ci95_us": [us * 0.999, us * 1.001]}
        return {"samples": samples, "extra": {**extra, **card.machine, "call_us": 2 * us, "graph_us": None}}


@pytest.fixture
def card(monkeypatch):
    card = Card()
    monkeypatch.setattr(command, "Process", card.start)
    with open(os.devnull) as card.always_readable:
        yield card


@pytest.fixture
def both(repository):
    with trees.of_commits(repository, "HEAD~1", "HEAD") as both:
        yield both


def course_of(card, both):
    return course.Course(both, {}, Progress(io.StringIO()), card.start)


def test_the_processes_alternate_and_each_measures_everything(card, both, tmp_path):
    kept = Kept(tmp_path / "kept", {}, resume=False)
    course_of(card, both).run(2, kept)
    a, b = both.base.name, both.head.name
    assert card.turns() == [(a, 24), (b, 24), (a, 24), (b, 24)]
    assert [what for what, _ in card.log].index("compile") < [what for what, _ in card.log].index("measure")
    assert sorted(kept.pairs) == [(0, 0), (0, 1)]


def test_compiling_shows_the_time_left_and_each_tree_compiles_every_kernel_once(card, both, tmp_path, monkeypatch):
    monkeypatch.setattr(course, "cores", lambda: 6)
    out = io.StringIO()
    measured = course.Course(both, {}, Progress(out, every_s=0), card.start)
    measured.run(1, Kept(tmp_path / "kept", {}, resume=False))
    compiling = [line for line in out.getvalue().splitlines() if "compiling the kernels of both" in line]
    assert len(compiling) == 2 * 24 and "48/48, 0:00 left" in compiling[-1] and "6 processes" in compiling[-1]
    assert [card.log.count(("compile", tree.name)) for tree in (both.base, both.head)] == [24, 24]


def test_a_tree_whose_processes_die_compiling_does_not_hold_up_the_other(card, both, tmp_path, monkeypatch):
    monkeypatch.setattr(course, "cores", lambda: 4)
    card.dies_compiling = both.base.name
    course_of(card, both).run(1, Kept(tmp_path / "kept", {}, resume=False))
    assert [card.log.count(("compile", tree.name)) for tree in (both.base, both.head)] == [2, 24]


def test_many_cases_are_measured_in_pieces(card, both, tmp_path, monkeypatch):
    monkeypatch.setattr(course, "PIECE", 3)
    kept = Kept(tmp_path / "kept", {}, resume=False)
    course_of(card, both).run(1, kept)
    a, b = both.base.name, both.head.name
    assert card.turns() == [(a, 9), (b, 9), (a, 9), (b, 9), (a, 6), (b, 6)]


def test_a_lost_process_costs_one_timing_and_too_many_cost_the_turn(card, both, tmp_path):
    first, *others = card.cases
    card.answers[both.head.name, first, "triton"] = ProcessLost("the process died: Segmentation fault")
    card.answers[both.head.name, first, "triton_core"] = {"failed": "CUDA error", "lost": True}
    kept = Kept(tmp_path / "kept", {}, resume=False)
    course_of(card, both).run(1, kept)
    _, head = kept.pairs[0, 0]
    assert head[first, "triton"] == {"failed": "the process died: Segmentation fault"}
    assert head[first, "triton_core"] == {"failed": "CUDA error"}
    assert [key for key, outcome in head.items() if "samples" not in outcome] == list(head)[:2]

    card.answers[both.head.name, others[0], "triton"] = ProcessLost("no answer in 300 s")
    course_of(card, both).run(1, kept := Kept(tmp_path / "kept", {}, resume=False))
    _, head = kept.pairs[0, 0]
    assert len(head) == 24 and "samples" in head[first, "sdpa_core"]
    assert head[others[-1], "sdpa_core"] == {"failed": "not tried: 3 processes were lost before it"}


def test_another_card_on_the_way_ends_the_course(card, both, tmp_path):
    def other_card(tree, case, method):
        card.machine["gpu_id"] = "bb22"

    card.on_measure = other_card
    with pytest.raises(CourseError, match="gpu_id was aa11, is bb22"):
        course_of(card, both).run(1, Kept(tmp_path / "kept", {}, resume=False))


def test_a_tree_that_cannot_start_is_named(card, both, tmp_path):
    class Broken(StandIn):
        @property
        def said(self):
            if self.tree is both.base:
                raise ProcessLost("the process died: ImportError: no")
            return super().said

    measuring = course.Course(both, {}, Progress(io.StringIO()), lambda tree, *_: Broken(card, tree))
    with pytest.raises(CourseError, match=f"{both.base.name} cannot be measured: the process died: ImportError: no"):
        measuring.run(1, Kept(tmp_path / "kept", {}, resume=False))


# --- what is kept for --resume ---

PAIR = ({("a", "triton"): {"samples": [1.0]}}, {("a", "triton"): {"failed": "wrong"}})


def test_kept_pairs_are_read_back_without_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "folder/kept"
    about = {"cases": [("a", "triton")]}
    Kept(path, about, resume=False).add((0, 1), PAIR)
    with path.open("a") as file:
        file.write("[[0, 2], [[")
    kept = Kept(path, about, resume=True)
    assert kept.pairs == {(0, 1): PAIR}
    kept.add((1, 0), PAIR)
    assert Kept(path, about, resume=True).pairs == {(0, 1): PAIR, (1, 0): PAIR}
    assert Kept(path, about, resume=False).pairs == {}
    kept.finish()
    assert not path.parent.exists()


@pytest.mark.parametrize("text", ["x\n", '{"a": 1}\n{}\n', "[]\n", '{"a": 2}\n'], ids=["text", "line", "head", "other"])
def test_what_is_of_another_course_or_damaged_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "kept"
    path.write_text(text)
    with pytest.raises(CourseError, match="measure without --resume") as error:
        Kept(path, {"a": 1}, resume=True)
    assert "\n" not in str(error.value)
    assert path.read_text() == text


def test_a_full_disk_costs_only_the_way_to_go_on(tmp_path):
    kept = Kept(tmp_path / "kept", {}, resume=False)
    kept.path = Path("/dev/full")
    kept.add((0, 0), PAIR)
    assert "cannot be kept" in kept.problem and kept.pairs == {(0, 0): PAIR}


# --- the command ---


def main(repository, *arguments, base="HEAD~1", head="HEAD"):
    where = ("--storage", str(repository.parent / "storage"), "--repo", str(repository))
    return command.main([base, *([head] if head else []), *where, *arguments])


def saved(repository):
    return sorted((repository.parent / "storage").glob("*/*.json"))


def names(repository):
    return [git(repository, "rev-parse", spec)[:7] for spec in ("HEAD~1", "HEAD")]


def test_one_code_twice_passes_and_both_runs_are_saved_under_their_commits(card, repository, capsys):
    before = everything(repository)
    assert main(repository) == 0
    out = capsys.readouterr().out
    assert "verdict: pass" in out and "the pairs' ratios agree within" in out
    a, b = names(repository)
    old, new = saved(repository)
    assert [old.name, new.name] == [f"0001_continuous_{a}.json", f"0002_continuous_{b}.json"]
    assert old.parent.name.endswith("-NVIDIA-H200")
    for path, spec in ((old, "HEAD~1"), (new, "HEAD")):
        found = runs.Saved.load(path)
        assert found.commit == git(repository, "rev-parse", spec)
        assert len(found.run.timings) == 24 and found.run.tick_us == 0.03 and not found.run.regressions
        key = card.cases[0], "triton"
        assert found.run.timings[key].median_us == pytest.approx(45, rel=0.004)
        assert found.run.timings[key].call_us == pytest.approx(90) and found.run.timings[key].graph_us is None
    assert everything(repository) == before
    assert not (repository.parent / "storage/continuous").exists()
    assert main(repository) == 0 and len(saved(repository)) == 4


def test_a_planted_slow_down_is_measured_again_confirmed_and_marked(card, repository, capsys):
    a, b = names(repository)
    card.slower[b, "triton_core"] = 1.2
    assert main(repository) == 1
    out = capsys.readouterr().out
    assert "verdict: FAIL, 8 slower" in out and f"{card.cases[0]} triton_core" in out
    assert card.turns()[4:] == [(a, 8), (b, 8)]
    assert set(runs.load(saved(repository)[1]).regressions) == {f"{case} triton_core" for case in card.cases}


def test_an_alert_that_is_not_slower_again_is_cleared(card, repository, capsys):
    a, b = names(repository)
    card.slower[b, "triton"] = 1.3

    def fast_again(tree, case, method):
        if len(card.turns()) > 4:
            card.slower.clear()

    card.on_measure = fast_again
    assert main(repository) == 0
    assert "measured again, not slower (8)" in capsys.readouterr().out
    assert not runs.load(saved(repository)[1]).regressions


def test_the_launch_floor_of_the_first_look_is_not_taken_off_the_second(card, repository, capsys):
    a, b = names(repository)
    card.cases = [f"rows-bf16-H8-D128-Dv128-L{16 * i}-N64-few" for i in range(1, 25)]
    card.shortest_us, card.step_us = 6, 0.05
    card.floor_us[b], card.slower[b, "triton"] = 0.9, 1.16

    def another_floor(tree, case, method):
        if len(card.turns()) > 4:
            card.floor_us.clear()

    card.on_measure = another_floor
    assert main(repository) == 1
    out = capsys.readouterr().out
    assert "launch floor: every call takes 0.90 us longer" in out and "verdict: FAIL, 24 slower" in out


def test_what_slows_both_processes_of_the_second_look_down_confirms_nothing(card, repository):
    a, b = names(repository)
    card.slower[b, "triton"] = 1.3

    def slow_card(tree, case, method):
        if len(card.turns()) > 4:
            card.slower.update({(a, "triton"): 2.0, (b, "triton"): 2.0})

    card.on_measure = slow_card
    assert main(repository) == 0


def test_a_failing_kernel_of_head_gets_no_time_and_fails_with_its_message(card, repository, capsys):
    _, b = names(repository)
    card.answers[b, card.cases[0], "triton"] = {"failed": "WrongResult: MAE 1.0"}
    assert main(repository) == 1
    out = capsys.readouterr().out
    assert f"FAILED in {b} (1)" in out and f"{card.cases[0]} triton: WrongResult: MAE 1.0" in out
    assert len(runs.load(saved(repository)[1]).timings) == 23


def test_a_kernel_that_only_base_fails_in_is_no_regression(card, repository, capsys):
    a, _ = names(repository)
    card.answers[a, card.cases[0], "triton"] = {"failed": "WrongResult: MAE 1.0"}
    assert main(repository) == 0
    assert f"FAILED in {a} (1)" in capsys.readouterr().out


def test_a_timing_that_one_process_could_not_take_has_none(card, repository):
    _, b = names(repository)

    def once(tree, case, method):
        card.answers[b, card.cases[0], "triton"] = {"not_timed": "out of memory"} if len(card.turns()) == 2 else None

    card.on_measure = once
    main(repository)
    old, new = saved(repository)
    assert (card.cases[0], "triton") in runs.load(old).timings and (card.cases[0], "triton") not in runs.load(
        new
    ).timings
    marks = json.loads(new.read_text())["nsa_sel"]
    assert marks["not_timed"] == [{"case": card.cases[0], "method": "triton", "reason": "out of memory"}]
    asked = [method for case, method in marks["asked"] if case == card.cases[0]]
    assert asked == ["triton", "triton_core", "sdpa_core"]


def test_the_verdict_is_coloured_where_a_terminal_shows_it(card, repository, capsys, monkeypatch):
    monkeypatch.setattr(command, "shows_colour", lambda: True)
    assert main(repository) == 0
    assert "\x1b[32mverdict: pass" in capsys.readouterr().out


def test_the_verdict_is_written_as_a_pull_requests_comment_too(card, repository, tmp_path):
    card.slower[names(repository)[1], "triton"] = 1.3
    assert main(repository, "--markdown", str(tmp_path / "comment.md")) == 1
    assert (tmp_path / "comment.md").read_text().startswith("### nsa_sel: FAIL, ")


def test_a_verdict_that_nobody_reads_is_left_to_the_command_line(card, repository, monkeypatch):
    def closed(*arguments, **options):
        raise BrokenPipeError

    monkeypatch.setattr(command, "print", closed, raising=False)
    with pytest.raises(BrokenPipeError):
        main(repository)


def test_without_a_gpu_there_is_no_verdict(card, repository, capsys):
    card.machine = dict.fromkeys(CARD) | {"torch": "2.13.0"}
    card.slower[names(repository)[1], "sdpa_core"] = 2.0
    assert main(repository) == 0
    assert "references only: no verdict" in capsys.readouterr().out
    assert {method for _, method in runs.load(saved(repository)[1]).timings} == {"sdpa_core"}
    assert "compile" not in {what for what, _ in card.log}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_leaves_nothing_behind_and_resume_measures_none_twice(
    card, repository, temporary, capsys, number, code
):
    before = everything(repository)

    def end(tree, case, method):
        if len(card.turns()) == 4:
            card.on_measure = lambda *_: None
            os.kill(os.getpid(), number)

    card.on_measure = end
    handler = signal.getsignal(number)
    assert main(repository) == code
    assert "--resume goes on" in capsys.readouterr().err
    assert everything(repository) == before and not list(temporary.iterdir()) and not saved(repository)
    assert signal.getsignal(number) is handler

    card.log.clear()
    assert main(repository, "--resume") == 0
    a, b = names(repository)
    assert card.turns() == [(a, 24), (b, 24)]
    assert all(len(runs.load(path).timings) == 24 for path in saved(repository))


def test_a_course_that_was_ended_in_the_second_look_measures_only_that(card, repository):
    a, b = names(repository)
    card.slower[b, "triton"] = 1.2

    def end(tree, case, method):
        if len(card.turns()) == 5:
            raise KeyboardInterrupt

    card.on_measure = end
    assert main(repository) == 130
    card.log.clear()
    assert main(repository, "--resume") == 1
    assert card.turns() == [(a, 8), (b, 8)]


def test_resume_refuses_another_card(card, repository, capsys):
    def end(tree, case, method):
        if len(card.turns()) == 3:
            raise KeyboardInterrupt

    card.on_measure = end
    assert main(repository) == 130
    card.machine["gpu_id"] = "bb22"
    assert main(repository, "--resume") == 2
    assert "--resume: gpu_id is not what it was" in capsys.readouterr().err


def test_two_unpacked_trees_need_no_history(card, repository, tmp_path, monkeypatch, capsys):
    for name in ("old", "new"):
        shutil.copytree(repository, tmp_path / name, ignore=shutil.ignore_patterns(".git"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")  # not even git
    assert command.main(["--base-dir", "old", "--head-dir", "new"]) == 0
    assert "note: both are the same code" in capsys.readouterr().out
    assert [path.name for path in sorted(Path(".benchmarks").glob("*/*"))] == [
        "0001_continuous_old.json",
        "0002_continuous_new.json",
    ]


@pytest.mark.parametrize(
    "arguments",
    [[], ["HEAD", "--base-dir", "x", "--head-dir", "y"], ["--base-dir", "x"], ["HEAD", "--rounds", "0"]],
    ids=" ".join,
)
def test_bad_arguments_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_a_storage_that_cannot_be_written_is_said_before_anything_is_measured(card, repository, tmp_path, capsys):
    (tmp_path / "storage").write_text("a file")
    assert main(repository) == 2
    assert not card.turns() and "nsa-sel continuous: " in capsys.readouterr().err


def test_the_median_over_processes_is_saved_and_the_rest_is_of_all_samples(card, both):
    key = ("rows-x", "triton")
    outcomes = [
        {key: {"samples": [us * 1e-6] * 50, "extra": {"ci95_us": [us - 1, us + 1], "graph_us": None, "config": "c"}}}
        for us in (10, 11, 90)
    ]
    (entry,) = saving.document(both.base, outcomes, CARD, {})["benchmarks"]
    assert entry["stats"]["median"] == pytest.approx(11e-6) and entry["stats"]["rounds"] == 150
    assert entry["stats"]["max"] == pytest.approx(90e-6)
    assert entry["extra_info"] == {"ci95_us": [10, 12], "graph_us": None, "config": "c"}


# --- one measuring process ---


def test_the_cases_are_chosen_by_matrix_and_texts():
    assert [case.id for case in worker.choose("smoke", "bf16", "decode", ["t512"])] == [
        case.id for case in cases.matrix("smoke", "bf16", "decode") if "t512" in case.id
    ]
    with pytest.raises(ValueError, match="-k: value is 'no such'"):
        worker.choose("smoke", "bf16", None, ["no such"])


def packed(q, k, v, ranges, *, scale, min_len, max_len):
    return nsa_sel.reference.packed_sdpa(q, k, v, ranges, scale=scale, min_len=min_len, max_len=max_len)


def in_place_of_ours(function):
    return UserKernel("triton", "", function)


@pytest.fixture
def state():
    """Return a small case whose tensors are on the CPU, as the kernels here are, and that says it is on a GPU."""
    case = next(case for case in cases.matrix("smoke") if case.family == "ragged")
    state = CaseState(case, WallTimer())
    assert state.expected and state.packed  # made on the CPU
    state.device, state.require = "cuda", lambda needed: None
    return state


@pytest.mark.parametrize("method", ["triton", "triton_core"])
def test_a_given_kernel_is_called_and_judged_by_the_gate(state, method):
    assert check(state, prepare(state, method, {"triton": in_place_of_ours(packed)})) < 1e-3

    def wrong(q, k, v, ranges, **lengths):
        return packed(q, k, v, ranges.clamp(max=3), **lengths | {"min_len": None, "max_len": None})

    with pytest.raises(WrongResult, match="rows are bad"):
        check(state, prepare(state, method, {"triton": in_place_of_ours(wrong)}))


def test_a_worker_times_a_right_kernel_and_says_why_another_has_no_time(state, monkeypatch):
    monkeypatch.setattr(Session, "state", lambda self, case: state)

    def measured(kernel, method):
        request = {"do": "measure", "case": state.case.id, "method": method}
        return json.loads(json.dumps(worker.Worker([in_place_of_ours(kernel)], [state.case]).answer(request)))

    def broken(*arguments, **lengths):
        raise RuntimeError("the kernel does not\ncompile")

    found = measured(packed, "triton")
    assert len(found["samples"]) == 50 and found["extra"]["method"] == "triton" and found["extra"]["mae"] < 1e-3
    assert measured(broken, "triton") == {"failed": "RuntimeError: the kernel does not compile", "lost": False}
    assert measured(lambda q, *_, **lengths: q * 0, "triton_core")["failed"].startswith("WrongResult: ragged-")
    state.device = "cpu"
    assert measured(packed, "triton") == {"not_timed": "no GPU"}


def stub(monkeypatch, tmp_path, text):
    """Make a tree whose `worker` is the text of a script, and start a process in it."""
    package = tmp_path / "tree/src/nsa_sel"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (tmp_path / "suite").mkdir()
    (tmp_path / "suite/stub.py").write_text(text)
    monkeypatch.setattr("nsa_sel.bench.continuous.process.WORKER", "stub")
    return Process(trees.Tree("stub", tmp_path / "tree", {}), tmp_path / "suite", {})


HELLO = "import sys, json, time, nsa_sel\nprint(json.dumps({'package': sys.path[1] + '/nsa_sel'}), flush=True)\n"


def test_a_process_answers_and_is_ended(monkeypatch, tmp_path):
    monkeypatch.setenv("NSA_FORCE_PARITY", "1")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    text = HELLO + "import os\nfor line in sys.stdin: print(json.dumps(dict(os.environ)), flush=True)\n"
    process = stub(monkeypatch, tmp_path, text)
    env = process.ask(do="measure")
    assert not {"NSA_FORCE_PARITY", "TRITON_INTERPRET"} & set(env)
    process.end()
    assert process._process.returncode == -signal.SIGKILL
    process.end()  # a second time is no error


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise ImportError('no torch')", "the process died: ImportError: no torch"),
        ("import os; os._exit(3)", "the process died: exit status 3"),
        ('print(\'{"package": "/elsewhere"}\', flush=True); input()', "imported from /elsewhere"),
        ("import time; time.sleep(60)", "no answer in 3 s"),
    ],
)
def test_a_process_that_is_no_use_says_why(monkeypatch, tmp_path, text, said):
    process = stub(monkeypatch, tmp_path, text)
    process.answer = functools.partial(process.answer, 3)
    with pytest.raises(ProcessLost, match=said):
        _ = process.said
    process.end()


# --- the whole, with real processes ---


@pytest.fixture
def clone(tmp_path):
    """Return a clone of this repository in which the package as it stands here is an uncommitted change."""
    if subprocess.run(["git", "-C", str(REPOSITORY), "cat-file", "-e", FIRST_COMMIT], env=NOT_FOR_GIT).returncode:
        pytest.skip(f"{FIRST_COMMIT} is not in this repository's history")
    folder = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", "--shared", str(REPOSITORY), str(folder)], env=NOT_FOR_GIT, check=True)
    shutil.rmtree(folder / "src/nsa_sel")
    shutil.copytree(PACKAGE, folder / "src/nsa_sel", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "src/nsa_sel/uncommitted").touch()
    return folder


def start(clone, *arguments):
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(clone.parent / "temporary")}
    command = [sys.executable, "-m", "nsa_sel", "continuous", FIRST_COMMIT, "-k", "L16-N64-few", *arguments]
    env["PYTHONPATH"] = str(clone / "src")
    return subprocess.Popen(command, cwd=clone, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_oldest_commit_and_a_dirty_working_tree_are_measured(clone, temporary):
    before = everything(clone)
    process = start(clone, "--rounds", "1")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.splitlines()[-1] == "references only: no verdict"
    assert "HEAD " in err and " left: " in err  # the time left
    old, new = sorted(clone.glob(".benchmarks/*-cpu/*.json"))
    assert old.name == f"0001_continuous_{FIRST_COMMIT}.json" and new.stem.endswith("-dirty")
    assert runs.Saved.load(old).commit.startswith(FIRST_COMMIT)
    assert json.loads(new.read_text())["commit_info"]["dirty"]
    assert runs.load(old).timings.keys() == runs.load(new).timings.keys()
    for path in (old, new):
        path.unlink()
    assert everything(clone) == before and not list(temporary.iterdir())


def test_ctrl_c_ends_the_measuring_process_and_removes_the_worktrees(clone, temporary):
    before = everything(clone)
    process = start(clone)
    end = time.monotonic() + 60
    while not (workers := _processes_in(temporary)) and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and workers, err
    assert everything(clone) == before and not list(temporary.iterdir())
    assert not _processes_in(temporary)


def _processes_in(folder):
    """Return the ids of the processes whose working directory is below a folder."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if os.readlink(link).startswith(str(folder)):
                found.append(int(link.parts[2]))
    return found


MINE = """
from nsa_sel import reference

def f(q, k, v, ranges, *, scale, min_len, max_len):
    return reference.packed_sdpa(q, k, v, ranges, scale=scale, min_len=min_len, max_len=max_len)
"""


def test_two_commits_of_another_repository_are_measured_by_their_kernel(tmp_path, temporary):
    folder = tmp_path / "theirs"
    (folder / "src").mkdir(parents=True)
    git(folder, "init", "--quiet")
    (folder / "kernels.py").write_text("from theirs import f\n")
    (folder / "src/theirs.py").write_text(MINE)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "right")
    (folder / "src/theirs.py").write_text(MINE.replace("ranges, scale", "ranges + 1, scale"))  # wrong
    (folder / "new.py").touch()
    before = everything(folder)
    work = tmp_path / "work"
    work.mkdir()
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(temporary), "PYTHONPATH": str(PACKAGE.parent)}

    def continuous(*arguments):
        chosen = ["--rounds", "1", "-k", "L64-N64-few", "--sel-family", "rows", *arguments]
        return python("-m", "nsa_sel", "continuous", "HEAD", "--repo", folder, *chosen, cwd=work, env=env)

    done = continuous("--sel-kernel", "kernels:f=mine")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no GPU: no verdict" in done.stdout and "-dirty (4)" in done.stdout
    assert "mine: WrongResult: rows-bf16-H4-D64-Dv64-L64-N64-few, 64 of its rows: MAE" in done.stdout
    old, new = sorted(work.glob(".benchmarks/*-cpu/*.json"))
    assert {method for _, method in runs.load(old).timings} == {"mine", "mine_core", "sdpa_core"}
    assert runs.load(old).kernels == {"mine": "kernels:f, ranges"}
    assert {method for _, method in runs.load(new).timings} == {"sdpa_core"}
    about = json.loads(new.read_text())["commit_info"]
    assert (about["project"], about["dirty"]) == ("theirs", True)

    for arguments, said in (
        (["--sel-kernel", "kernels:g"], "--sel-kernel kernels:g: kernels has no g"),
        (["--sel-kernel", "new:f"], "--sel-kernel new:f: new has no f"),
        (["--sel-kernel", "json:dumps"], "the kernel was imported from"),
        (["--sel-kernel", "kernels:f", "--sel-takes", "blocks:48"], "--sel-takes: f takes blocks:48"),
    ):
        done = continuous(*arguments)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert everything(folder) == before and not list(temporary.iterdir())


def test_the_verb_is_one_of_the_command_line():
    from nsa_sel.bench import cli

    assert cli.function_of("continuous") is command.main
