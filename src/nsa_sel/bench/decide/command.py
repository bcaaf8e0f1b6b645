"""Decide for this card: is the kernel right, which launches are fastest, from which length on is it safe to switch on?

Runs parity, tiles, two perf runs in fresh processes, threshold and report, one after another. After an interruption the
same command goes on where it stopped. Without a GPU it shows the course in a smoke form, and decides nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import parallel
from ..command_line import Parser
from ..saved import storage
from ..suite import cases
from ..tables import replace_file
from ..timer.machine import environment
from ..tune.log import clock

PACKAGE = Path(__file__).parents[2]
SAVE = "decide"  # the name of the runs that are saved
CONFIG, PRD, SMOKE_RESULTS = Path("configs/base.yaml"), Path("PRD.md"), Path("bench/results/latest")
# Seconds on an H200 with 16 cores; parity's are in parallel.py, the other steps take little. Sources: PERFORMANCE.md,
# "The runs"; docs/cards.md.
FULL_RUN_S, TILES_S = 355.0, 540.0
ANSWERED = (0, 1)  # exit codes of a step that came to its end
REFUSED = 4  # pytest's, where --sel-resume finds other runs' journals alone
INTERRUPTED = 130
SMOKE_PARITY = ("-k", "every_number_of_spans")


@dataclass(frozen=True)
class Step:
    """Name a step, what it answers, the verb that it runs with its arguments, and its seconds on an H200."""

    name: str
    answers: str
    arguments: tuple[str, ...]
    seconds: float = 0.0

    @property
    def saves(self) -> bool:
        """Tell whether the step saves a run."""
        return self.arguments[0] == "bench"

    @property
    def last(self) -> bool:
        """Tell whether the step only reads the runs: whatever it says is an answer."""
        return self.arguments[0] in ("threshold", "report")


def steps(args: argparse.Namespace, on_gpu: bool, results: Path) -> list[Step]:
    """Return the steps in their order; those after the runs get the runs' files when they begin."""
    if not on_gpu:
        run: tuple[str, ...] = (
            "bench",
            "-q",
            "--sel-matrix",
            "smoke",
            "--sel-family",
            "decode",
            f"--benchmark-save={SAVE}",
        )
        return [
            Step(
                "parity", "is the kernel right? (a few tests, in Triton's interpreter)", ("parity", "-q", *SMOKE_PARITY)
            ),
            Step("run 1", "how fast are the references? (smoke)", run),
            Step("run 2", "once more, in a fresh process", run),
            Step("report", "tables and pictures", ("report", "--out", str(results))),
        ]
    run = ("bench", "-q", "--sel-matrix", args.matrix, f"--benchmark-save={SAVE}")
    seconds = FULL_RUN_S * len(cases.matrix(args.matrix)) / len(cases.matrix("full"))
    tune = ("tune", "--matrix", args.tune, "--results", str(results))
    tiles = Step("tiles", "which launches are fastest here?", tune, TILES_S if args.tune == "hot" else 0.0)
    return [
        Step("parity", "is the kernel right here?", ("parity", "-q"), parallel.expected_seconds(parallel.expected())),
        *([] if args.tune == "none" else [tiles]),
        Step("run 1", "how fast is it here?", run, seconds),
        Step("run 2", "once more, in a fresh process", run, seconds),
        Step("threshold", "from which L on is it safe?", ("threshold", "--matrix", args.matrix, "--apply")),
        Step("report", "tables and pictures", ("report", "--out", str(results))),
    ]


class State:
    """Keep on disk which steps are done, for a command that goes on after an interruption.

    path: the file. about: what must be equal for the steps to count.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path, self.note = path, ""
        self.kept: dict[str, Any] = {"about": dict(about), "began": time.time(), "begun": "", "done": {}}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            then = found["about"]
            differs = [
                f"{name} was {then.get(name)}, is {about[name]}" for name in about if then.get(name) != about[name]
            ]
            if differs:
                self.note = f"begins anew: {'; '.join(differs)}"
            elif all(Path(run).is_file() for run in _runs(found["done"])):
                self.kept = found
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self.note = f"begins anew: {path} cannot be read"

    @property
    def done(self) -> dict[str, dict[str, Any]]:
        """Return seconds and, where the step saved one, the run of each step that is done, by its name."""
        return self.kept["done"]

    def begin(self, step: Step) -> bool:
        """Note that the step begins; return whether an earlier command had begun it."""
        again = self.kept["begun"] == step.name
        self.kept["begun"] = step.name
        self._write()
        return again

    def end(self, step: Step, seconds: float, run: Path | None) -> None:
        self.done[step.name] = {"seconds": seconds, "run": None if run is None else str(run)}
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, json.dumps(self.kept, indent=1))


def _runs(done: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [of["run"] for of in done.values() if of["run"]]


def about(args: argparse.Namespace) -> dict[str, Any]:
    """Return the card, the versions, the options and a hash of the package's code."""
    machine = {name: value for name, value in environment().items() if name != "calibration"}
    code = b"".join(path.read_bytes() for path in sorted(PACKAGE.rglob("*.py")))
    source = hashlib.sha256(code).hexdigest()[:12]
    return {**machine, "python": platform.python_version(), "source": source, "matrix": args.matrix, "tune": args.tune}


def seconds_left(todo: Sequence[Step], done: Mapping[str, Mapping[str, Any]]) -> float:
    """Predict the seconds of what is left: a run takes what the one before took, else what an H200 takes."""
    runs = [of["seconds"] for of in done.values() if of["run"]]
    return sum(runs[-1] if step.saves and runs else step.seconds for step in todo)


def perform(step: Step, runs: Sequence[str], again: bool, on_gpu: bool) -> int:
    """Run a step in a process of its own and return its exit code; Ctrl-C and SIGTERM let it save what it has.

    runs: the saved runs, for a step that reads them. again: it was begun before, and goes on.
    """
    arguments = list(step.arguments)
    if step.saves and again:
        arguments.append("--sel-resume")
    elif step.name == "threshold":
        arguments += runs
    elif step.name == "report":
        arguments.append(runs[-1])
    env = {**os.environ, "NSA_TEST_TRITON_SEL": "gpu"} if on_gpu else None
    command = [sys.executable, "-m", __package__.rsplit(".", 2)[0], *arguments]
    with subprocess.Popen(command, env=env) as child:
        before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        ctrl_c = signal.getsignal(signal.SIGINT)
        try:
            code = child.wait()
        except KeyboardInterrupt:  # the terminal has sent it to the step too, which saves what it has
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one is for the step alone
            child.wait()
            code = INTERRUPTED
        finally:
            signal.signal(signal.SIGTERM, before)
            signal.signal(signal.SIGINT, ctrl_c)
    return perform(step, runs, False, on_gpu) if code == REFUSED and again and step.saves else code


def saved_runs() -> set[Path]:
    return set(storage.folder(str(storage.STORAGE)).glob(f"*/*_{SAVE}.json"))


def written(since: float, results: Path) -> Iterator[Path]:
    """Yield the files that the steps have written."""
    for root in (storage.STORAGE, results, PACKAGE / "tuned", CONFIG.parent, PRD):
        files = [root] if Path(root).is_file() else sorted(Path(root).rglob("*"))
        yield from (path for path in files if path.is_file() and path.stat().st_mtime >= since)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `nsa-sel decide`: 0, 1 if the kernel is wrong, a step fails or no threshold follows, 130 if interrupted."""
    args = main_parser().parse_args(argv)
    machine = about(args)
    on_gpu = machine["gpu"] is not None
    results = Path("bench/results") / storage.slug(machine["gpu"]) if on_gpu else SMOKE_RESULTS
    if not on_gpu:
        print("no GPU here: the smoke form of each step, on the CPU; nothing is decided, and nothing is switched on")
    state = State(results / "decide.json", machine)
    if state.note:
        print(state.note)
    return _course(steps(args, on_gpu, results), state, results, on_gpu)


def main_parser() -> argparse.ArgumentParser:
    """Return what `nsa-sel decide` is asked with."""
    parser = Parser(
        "nsa-sel decide",
        description=__doc__,
        examples="""
            nsa-sel decide
            nsa-sel decide --tune none   with the launches that the rules choose""",
        epilog="exit code: 0 decided; 1 the kernel is wrong, a step failed or no threshold follows; 130 interrupted",
    )
    parser.add_argument("--matrix", choices=cases.MATRICES, default="full", help="cases of the perf runs")
    parser.add_argument(
        "--tune",
        choices=(*cases.MATRICES, "none"),
        default="hot",
        help="cases whose launches are searched for; none: the rules' stay",
    )
    return parser


def _course(course: Sequence[Step], state: State, results: Path, on_gpu: bool) -> int:
    status = 0
    for number, step in enumerate(course, start=1):
        head = f"[{number}/{len(course)}] {step.name}: {step.answers}"
        if step.name in state.done:
            print(f"{head}  done before, {clock(state.done[step.name]['seconds'])}", flush=True)
            continue
        left = seconds_left(course[number - 1 :], state.done)
        basis = "" if _runs(state.done) else " on an H200"
        print(f"{head}{f'  about {clock(left)} left{basis}' if left else ''}", flush=True)
        before, start = saved_runs(), time.monotonic()
        code = perform(step, _runs(state.done), state.begin(step), on_gpu)
        seconds = time.monotonic() - start
        # Where nobody reads any more this ends the command in silence: the step's own code says no more than 1.
        print(f"{step.name} took {clock(seconds)}", flush=True)
        new = max(saved_runs() - before, key=lambda path: path.stat().st_mtime, default=None) if step.saves else None
        if code == INTERRUPTED:
            print(f"nsa-sel decide: interrupted in {step.name}; the same command goes on there", file=sys.stderr)
            return INTERRUPTED
        if code and step.name == "parity":
            print("nsa-sel decide: parity failed: a kernel that is wrong here is not timed", file=sys.stderr)
            return 1
        if (code not in ANSWERED and not step.last) or (step.saves and new is None):
            print(f"nsa-sel decide: {step.name} ended with {code}; the same command goes on there", file=sys.stderr)
            return 1
        if step.name == "tiles" and code:
            print("no table: the launches stay those of the rules")
            code = 0
        status = max(status, code)
        state.end(step, seconds, new)
    state.path.unlink()
    print("Files written:", *written(state.kept["began"], results), sep="\n")
    return status
