"""The verb `nsa-sel compare`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from ..command_line import Parser, shows_colour
from ..saved import storage
from ..saved.run import Key, Run, RunError, Timing, load, short_name, timing
from ..suite import kernels
from ..suite.cases import Case
from ..suite.saved_cases import known
from ..tables import printable, replace_file
from ..tune.log import Progress
from . import export
from .result import Comparison
from .rule import compare, confirm, to_measure_again

EPILOG = """\
OLD and NEW: files, saved names, run prefixes such as 0001, or commits such as HEAD~1 (the newest whole run of it).
Without NEW: the latest run. Without OLD: the newest clean run of an earlier commit on the same card, else the run
saved as baseline.
Exit code: 0 pass, or no verdict without a GPU; 1 slower, missing, no case in common or another GPU model; 2 a run that
cannot be used; 3 only suspects.
"""
EXPORTS: dict[str, Callable[[Comparison], str]] = {
    "json": export.as_json,
    "markdown": export.as_comment,
    "junit": export.as_junit,
}


def main(argv: list[str] | None = None) -> int:
    """Run `nsa-sel compare [OLD [NEW]]`; return 0, 1, 2 or 3 as its help says."""
    parser = main_parser()
    args = parser.parse_args(argv)
    if args.old and args.sel_baseline:
        parser.error("give OLD or --sel-baseline, not both")
    try:
        comparison = compare(*_choose(args.old or args.sel_baseline, args.new, storage.folder(args.storage)))
        if args.again:
            comparison = measure_again(comparison, kernels.parse(args.sel_kernel, args.sel_takes))
        write_exports(args, comparison)
    except (RunError, kernels.KernelError) as error:
        print(printable(f"nsa-sel compare: {error}"), file=sys.stderr)
        return 2
    print(comparison.text(colour=shows_colour()))
    return comparison.exit_code


def main_parser() -> argparse.ArgumentParser:
    """Return what `nsa-sel compare` is asked with."""
    parser = Parser(
        "nsa-sel compare",
        description="Say which cases got slower between two saved runs.",
        examples="""
            nsa-sel compare                             the latest run with its default opponent
            nsa-sel compare HEAD~1 HEAD                 the newest whole runs of two commits
            nsa-sel compare 0001 0002 --markdown c.md   two saved runs, and a comment for a pull request""",
        epilog=EPILOG,
    )
    parser.add_argument("old", nargs="?", metavar="OLD", help="the run to compare with, as said below")
    parser.add_argument("new", nargs="?", metavar="NEW", help="the run that is judged (default: the latest)")
    parser.add_argument("--sel-baseline", metavar="RUN", help="the old run, as in a perf run; in place of OLD")
    parser.add_argument("--storage", default=str(storage.STORAGE), metavar="DIR", help="folder of the saved runs")
    parser.add_argument("--again", action="store_true", help="measure what is slower or suspect again, on the new GPU")
    add_exports(parser)
    kernels.add_options(parser.add_argument)
    return parser


def add_exports(parser: argparse.ArgumentParser) -> None:
    """Add --json, --markdown and --junit."""
    for name, what in (("json", "everything"), ("markdown", "a pull request's comment"), ("junit", "a test per case")):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"write {what} to this file")


def write_exports(args: argparse.Namespace, comparison: Comparison) -> None:
    """Write the files that were asked for.

    Raises: RunError if one cannot be written.
    """
    for name, written in EXPORTS.items():
        if (path := getattr(args, name)) is not None:
            _write(path, written(comparison))


def _choose(old: str | None, new: str | None, folder: Path) -> tuple[Run, Run]:
    path = storage.latest(folder) if new is None else storage.find(new, folder)
    if path is None:
        raise RunError(f"{folder}: no saved run; measure with nsa-sel bench --benchmark-autosave")
    after = load(path)
    before = storage.opponent(folder, after, old)
    if new is None and Path(before.path).resolve() == path.resolve():
        raise RunError(
            f"{short_name(path)}: the latest run is the old one itself; measure with nsa-sel bench --benchmark-autosave"
        )
    return before, after


def _write(path: Path, text: str) -> None:
    try:
        replace_file(path, text)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror}); give another file") from None


def measure_again(comparison: Comparison, given: Iterable[kernels.UserKernel] = ()) -> Comparison:
    """Measure what is slower or suspect again on this machine, and judge it by that. given: users' kernels.

    Raises: RunError if this is not the card of the new run, or another commit is checked out.
    """
    from ..timer.machine import environment

    here, new = environment(), comparison.new
    if here["gpu"] is None:
        raise RunError("--again measures on the new run's GPU, and here is none; run it there")
    for field in ("gpu", "gpu_id"):
        if str(here[field] or "none") != new.environment[field]:
            raise RunError(f"--again: the new run is of {field} {new.environment[field]}, and here is {here[field]}")
    commit = _checked_out()
    if commit and new.commit and commit != new.commit:
        raise RunError(f"--again: the new run is of commit {new.commit[:10]}; check it out, here is {commit[:10]}")
    keys = to_measure_again(comparison)
    if not keys:
        return comparison
    fresh, floor_us = _fresh(keys, known(new.cases), given)
    machine = comparison.machine
    if floor_us is not None and comparison.old.floor_us is not None:  # another process has a launch floor of its own
        machine = replace(machine, shift_us=floor_us - comparison.old.floor_us)
    return confirm(comparison, fresh, machine)


def _checked_out() -> str:
    """Return the commit of the package that would be measured; "" if it lies in no repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _fresh(
    keys: list[Key], cases: Mapping[str, Case], given: Iterable[kernels.UserKernel]
) -> tuple[dict[Key, Timing], float | None]:
    """Return fresh timings of those that can be measured, and this process's launch floor in µs."""
    from ..session import Session

    session = Session(kernels={kernel.name: kernel for kernel in given})
    found = {}
    progress = Progress()
    progress.start("measured again", len(keys))
    for case, method in sorted(keys):
        try:
            values = session.measure_again(cases[case], method)
        except Exception as error:  # a case that fails here stays what it was
            progress.say(printable(f"{case} {method}: not measured again: {error!r}"), sys.stderr)
        else:
            found[case, method] = timing(case, method, values, values, "measured again")
        progress.step()
    return found, session.calibration.get("null_kernel_us", {}).get("device")
