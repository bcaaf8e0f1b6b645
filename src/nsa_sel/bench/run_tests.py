"""`nsa-sel parity` and `nsa-sel bench`: pytest on the tests of this wheel or clone, with all results in this folder."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import parallel
from .command_line import Parser

PACKAGE = Path(__file__).parents[1]
NEEDED = ("pytest", "pytest_benchmark", "hypothesis", "numpy")
DESCRIPTION = """{}

Runs `python -m pytest` on the tests that came with this installation. All of pytest's options can be given, and its
exit codes are passed on. Saved runs (.benchmarks), reports and pytest's cache are written to the working directory;
its configs/base.yaml holds the toggles, if it is there, and modules are sought in it first."""


@dataclass(frozen=True)
class Suite:
    """Hold a suite that a verb runs: its folder in tests/, and what the help says.

    options: the modules, below this package, whose options the help lists.
    """

    verb: str
    folder: str
    options: tuple[str, ...]
    description: str
    examples: str


PARITY = Suite(
    "parity",
    "parity",
    ("suite.fixtures", "suite.kernel_options"),
    """Is a kernel right here? Checks it against a float64 oracle; without a GPU in Triton's interpreter.

Where pytest-xdist is installed, this package's own kernel is checked in several processes: -n N says in how many, -n 0
in one.""",
    """
        nsa-sel parity
        nsa-sel parity -k layouts -x              only tests with this in their name, up to the first failure
        nsa-sel parity --sel-kernel mine:f        a kernel of your own: the function f of mine.py""",
)
PERF = Suite(
    "bench",
    "perf",
    ("plugin", "resume.plugin", "suite.fixtures", "suite.kernel_options"),
    "How fast is a kernel here? Times it beside packed SDPA; without a GPU only the references are timed.",
    """
        nsa-sel bench --benchmark-autosave        saves the run; nsa-sel compare, report and threshold read it
        nsa-sel bench --sel-matrix hot -k L64-    only cases with this in their id
        nsa-sel bench --sel-kernel mine:f         with a kernel of your own: the function f of mine.py""",
)


def parity(argv: Sequence[str]) -> int:
    """Run `nsa-sel parity`: pytest's exit code, or 2 if there is nothing to run."""
    return _run(PARITY, argv)


def bench(argv: Sequence[str]) -> int:
    """Run `nsa-sel bench`: pytest's exit code, or 2 if there is nothing to run."""
    return _run(PERF, argv)


def parity_parser() -> argparse.ArgumentParser:
    """Return the options of `nsa-sel parity` that are not pytest's own."""
    return _parser(PARITY)


def bench_parser() -> argparse.ArgumentParser:
    """Return the options of `nsa-sel bench` that are not pytest's own."""
    return _parser(PERF)


def _run(suite: Suite, argv: Sequence[str]) -> int:
    """Show the help, or become pytest: this process, so that a signal reaches what saves the run."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        return _fail(suite, f"needs {', '.join(missing)}, of the extra `bench`: pip install 'nsa-sel[bench]'")
    if {"-h", "--help"} & set(argv):
        _parser(suite).parse_args(["--help"])
    in_wheel = (PACKAGE / "tests").is_dir()
    tests = PACKAGE / "tests" if in_wheel else PACKAGE.parents[1] / "tests"
    if not (tests / suite.folder).is_dir():
        return _fail(suite, f"no tests in {tests}; install the wheel, or work in a clone")
    arguments = ["-c", str(tests / "suite.ini"), "-o", "pythonpath=", "-p", f"{__package__}.plugin"]
    arguments += ["--rootdir", str(Path.cwd()), "--confcutdir", str(tests)]
    # A clone's tests are the package `tests`, a name that the working directory may have too: the clone goes before it.
    arguments += ["--import-mode", "append" if in_wheel else "prepend", str(tests / suite.folder)]
    if suite is PARITY and (several := parallel.options(argv)):
        arguments += several
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # each process has a core
        os.environ.setdefault("PYTHONDONTWRITEBYTECODE", "1")  # what -B says, for all of them
    # -B: pytest would write the byte code of the tests that it rewrites into the installation.
    os.execv(sys.executable, [sys.executable, "-B", "-m", "pytest", *arguments, *argv])


def _fail(suite: Suite, text: str) -> int:
    print(f"nsa-sel {suite.verb}: {text}", file=sys.stderr)
    return 2


def _parser(suite: Suite) -> argparse.ArgumentParser:
    parser = Parser(
        f"nsa-sel {suite.verb}",
        description=DESCRIPTION.format(suite.description),
        examples=suite.examples,
        epilog="The other options of pytest: python -m pytest --help",
    )
    parser.usage = f"nsa-sel {suite.verb} [options of pytest, and those below]"
    for name in suite.options:
        importlib.import_module(f".{name}", __package__).pytest_addoption(_Options(parser))
    return parser


class _Options:
    """Stand in for pytest's parser, so that the help shows the options as pytest gets them."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.addoption = parser.add_argument

    def getgroup(self, name: str) -> Any:
        return self
