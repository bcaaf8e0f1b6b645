"""`nsa-sel decide`: its course, what it goes on with after an interruption, and what it does without a GPU."""

from __future__ import annotations

import argparse
from pathlib import Path
from signal import SIGINT, raise_signal

import pytest

from nsa_sel import SelConfig
from nsa_sel.bench import cli
from nsa_sel.bench.decide import command
from nsa_sel.bench.threshold import command as threshold

ROOT = Path(__file__).parents[2]
GPU = {"gpu": "Some GPU", "gpu_id": "1", "driver": "580", "cuda": "13.0", "torch": "2.11.0", "triton": "3.6.0"}
RUNS = Path(".benchmarks/Linux-Some-GPU")
DONE = ["parity", "tune", "bench", "bench", "threshold", "report"]


class Processes:
    """Stand in for subprocess.Popen: keep each command's arguments, save a run where one is due, give the codes."""

    def __init__(self) -> None:
        self.arguments: list[list[str]] = []
        self.codes: list[int] = []  # of the next commands; 0 beyond

    def __call__(self, started: list[str], env: dict[str, str] | None) -> Processes:
        self.arguments.append(started[3:])
        self.env = env
        return self

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait(self) -> int:
        code = self.codes.pop(0) if self.codes else 0
        if self.arguments[-1][0] == "bench" and code in (0, 1):
            RUNS.mkdir(parents=True, exist_ok=True)
            (RUNS / f"{len(list(RUNS.iterdir())) + 1:04}_decide.json").touch()
        return code

    def verbs(self) -> list[str]:
        """Return the verbs of the commands since the last call."""
        verbs = [arguments[0] for arguments in self.arguments]
        self.arguments.clear()
        return verbs


@pytest.fixture
def processes(monkeypatch, tmp_path) -> Processes:
    """Let decide see a GPU in an empty folder, and start nothing."""
    stand_in = Processes()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command.subprocess, "Popen", stand_in)
    monkeypatch.setattr(command, "environment", lambda: dict(GPU))
    monkeypatch.setattr(command.parallel, "expected", lambda: 14)
    return stand_in


def test_the_steps_run_one_after_another_and_the_state_is_gone_at_the_end(processes, capsys):
    assert command.main([]) == 0
    parity, tune, *runs, decision, report = processes.arguments
    assert parity[0] == "parity" and processes.env["NSA_TEST_TRITON_SEL"] == "gpu"
    assert tune == ["tune", "--matrix", "hot", "--results", "bench/results/Some-GPU"]
    assert runs == [["bench", "-q", "--sel-matrix", "full", "--benchmark-save=decide"]] * 2
    files = [str(RUNS / f"000{n}_decide.json") for n in (1, 2)]
    assert decision == ["threshold", "--matrix", "full", "--apply", *files]
    assert report == ["report", "--out", "bench/results/Some-GPU", files[1]]
    said = capsys.readouterr().out
    assert "[1/6] parity: is the kernel right here?  about 23:48 left on an H200\n" in said
    assert said.splitlines()[-3:] == ["Files written:", *files]
    assert not Path("bench/results/Some-GPU/decide.json").exists()


def test_an_interrupted_decision_goes_on_with_the_step_that_was_interrupted(processes, capsys):
    processes.codes = [0, 0, 0, command.INTERRUPTED]
    assert command.main([]) == command.INTERRUPTED
    assert processes.verbs() == DONE[:4]
    capsys.readouterr()
    assert command.main([]) == 0
    assert processes.arguments[0] == ["bench", "-q", "--sel-matrix", "full", "--benchmark-save=decide", "--sel-resume"]
    assert processes.verbs() == DONE[3:]
    said = capsys.readouterr().out
    assert "[3/6] run 1: how fast is it here?  done before, 0:00\n" in said
    assert command.main([]) == 0
    assert processes.verbs() == DONE  # a new decision


@pytest.mark.parametrize("step", range(6))
def test_ctrl_c_is_called_that_in_every_step_and_the_same_command_goes_on(step, processes, monkeypatch, capsys):
    args = argparse.Namespace(matrix="full", tune="hot")
    names = [each.name for each in command.steps(args, True, Path())]
    wait, waits = processes.wait, []

    def pressed_in_the_step() -> int:
        waits.append(processes.arguments[-1])
        if len(waits) == step + 1:
            raise KeyboardInterrupt
        return wait()

    monkeypatch.setattr(processes, "wait", pressed_in_the_step)
    assert command.main([]) == command.INTERRUPTED
    assert capsys.readouterr().err == f"nsa-sel decide: interrupted in {names[step]}; the same command goes on there\n"
    assert processes.verbs() == DONE[: step + 1]
    assert command.main([]) == 0
    assert processes.verbs() == DONE[step:]


def test_a_second_ctrl_c_does_not_end_decide_before_the_step(processes, monkeypatch, capsys):
    waits = []

    def wait() -> int:
        waits.append(None)
        raise_signal(SIGINT)
        return 2

    monkeypatch.setattr(processes, "wait", wait)
    assert command.main([]) == command.INTERRUPTED
    assert len(waits) == 2 and "interrupted in parity" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):  # as it was before
        raise_signal(SIGINT)


def test_a_run_that_left_nothing_to_go_on_with_is_measured_anew(processes):
    processes.codes = [0, 0, 2]
    assert command.main([]) == 1
    processes.verbs()
    processes.codes = [command.REFUSED]
    assert command.main([]) == 0
    first, second = processes.arguments[:2]
    assert first == [*second, "--sel-resume"]
    assert processes.verbs() == ["bench", *DONE[2:]]


def test_a_run_with_failures_counts_and_one_that_was_not_saved_does_not(processes, monkeypatch, capsys):
    processes.codes = [0, 0, 1]
    assert command.main([]) == 1
    assert processes.verbs() == DONE
    monkeypatch.setattr(command, "saved_runs", set)
    assert command.main([]) == 1
    assert processes.verbs() == DONE[:3]
    assert "run 1 ended with 0; the same command goes on there" in capsys.readouterr().err


def test_a_step_that_ends_because_nobody_reads_is_not_called_a_failure(processes, monkeypatch, capsys):
    def closed(line, **options):
        if line == "parity took 0:00":
            raise BrokenPipeError

    monkeypatch.setattr(command, "print", closed, raising=False)
    processes.codes = [1]
    with pytest.raises(BrokenPipeError):
        command.main([])
    assert processes.verbs() == ["parity"]


def test_another_driver_begins_anew_and_is_named(processes, monkeypatch, capsys):
    processes.codes = [0, 0, 2]
    command.main([])
    processes.verbs()
    monkeypatch.setattr(command, "environment", lambda: {**GPU, "driver": "590"})
    assert command.main([]) == 0
    assert "begins anew: driver was 580, is 590\n" in capsys.readouterr().out
    assert processes.verbs() == DONE


def test_a_state_that_cannot_be_read_begins_anew(processes, capsys):
    path = Path("bench/results/Some-GPU/decide.json")
    path.parent.mkdir(parents=True)
    path.write_text("[]")
    assert command.main([]) == 0
    assert f"begins anew: {path} cannot be read\n" in capsys.readouterr().out
    assert processes.verbs() == DONE


def test_a_wrong_kernel_is_not_timed(processes, capsys):
    processes.codes = [1]
    assert command.main([]) == 1
    assert processes.verbs() == ["parity"]
    assert "parity failed" in capsys.readouterr().err


def test_without_a_better_launch_the_rules_decide_and_it_goes_on(processes, capsys):
    processes.codes = [0, 1]
    assert command.main([]) == 0
    assert processes.verbs() == DONE
    assert "no table: the launches stay those of the rules\n" in capsys.readouterr().out


def test_no_threshold_is_an_answer_and_the_report_is_still_written(processes):
    processes.codes = [0, 0, 0, 0, 1]
    assert command.main([]) == 1
    assert processes.verbs() == DONE
    assert not Path("bench/results/Some-GPU/decide.json").exists()


@pytest.mark.parametrize(("in_processes", "parity_s"), ((1, 556), (3, 556), (7, 356), (14, 178)))
def test_the_time_left_is_that_of_the_run_before(in_processes, parity_s, monkeypatch, tmp_path):
    monkeypatch.setattr(command.parallel, "expected", lambda: in_processes)
    course = command.steps(argparse.Namespace(matrix="full", tune="hot"), True, tmp_path)
    done: dict = {}
    assert round(command.seconds_left(course, done)) == parity_s + 540 + 2 * 355
    done |= {"parity": {"seconds": 9.0, "run": None}, "run 1": {"seconds": 1000.0, "run": "0001"}}
    assert command.seconds_left(course[3:], done) == 1000


def test_without_a_gpu_it_says_so_and_runs_the_smoke_form(processes, monkeypatch, capsys):
    monkeypatch.setattr(command, "environment", lambda: {**GPU, "gpu": None})
    assert command.main([]) == 0
    assert [arguments[:4] for arguments in processes.arguments if arguments[0] == "bench"] == [
        ["bench", "-q", "--sel-matrix", "smoke"]
    ] * 2
    assert processes.env is None
    assert processes.verbs() == ["parity", "bench", "bench", "report"]
    assert capsys.readouterr().out.startswith("no GPU here: the smoke form")
    assert not Path("configs").exists() and not Path("PRD.md").exists()


def test_a_threshold_can_be_written_where_there_is_no_clone(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    runs = [str(path) for path in sorted(ROOT.glob(".benchmarks/*-NVIDIA-H200/000[12]_baseline.json"))]
    assert threshold.main([*runs, "--apply"]) == 0
    decided = SelConfig.load(command.CONFIG, env={}).min_len_for("NVIDIA H200")
    assert f"### NVIDIA H200: Triton from L = {decided} " in command.PRD.read_text()


def test_decide_is_a_verb():
    assert cli.function_of("decide") is command.main
