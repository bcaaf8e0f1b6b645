"""The verb `nsa-sel continuous`: did a commit make it slower? Both are measured now, in turns, on one card."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from ..command_line import Parser, shows_colour
from ..compare.command import add_exports, write_exports
from ..compare.result import Comparison
from ..compare.rule import compare, confirm, to_measure_again
from ..compare.yardstick import Machine
from ..saved import storage, write
from ..saved.run import MARK, RunError, gpu_name, load, read_json
from ..suite import cases, kernels, random_cases
from ..tables import printable, replace_file
from ..tune.log import Progress
from . import saving, trees
from .course import Course
from .kept import CourseError, Kept, Outcomes
from .process import Process
from .trees import Tree, TreeError, Trees, file_name

ROUNDS = 2
SHOWN = 10
KEPT = "continuous"  # folder in the storage that holds what an ended course has measured


class Ended(KeyboardInterrupt):
    """Say that a signal ends the command."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def main(argv: Sequence[str] | None = None) -> int:
    """Run `nsa-sel continuous`: 0 pass, 1 slower or failing, 2 cannot be measured, 3 only suspects, 128 + a signal."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = main_parser()
    args = parser.parse_args(argv)
    folders = args.base_dir, args.head_dir
    if any(folders) != all(folders) or (args.base is None) != all(folders) or (args.repo and any(folders)):
        parser.error("give BASE [HEAD], or both --base-dir and --head-dir")
    if args.sel_takes and not args.sel_kernel:
        parser.error("--sel-takes: is said of a kernel; give --sel-kernel MODULE:FUNCTION")
    try:
        args.random = random_cases.asked_for(args.sel_matrix, args.sel_seed, args.sel_count)
    except ValueError as error:
        parser.error(str(error))
    if args.sel_cases and (args.sel_matrix or args.sel_family):
        parser.error("--sel-cases: stands in place of --sel-matrix and --sel-family; give one of them")
    if args.rounds < 1:
        parser.error(f"--rounds: value is {args.rounds}, expected at least 1")
    try:
        with _signals(), _opened(args) as both:
            return _compared(args, both)
    except BrokenPipeError:  # nobody reads any more: for the command line, which ends in silence
        raise
    except (TreeError, CourseError, RunError, OSError) as error:
        print(printable(f"nsa-sel continuous: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print("nsa-sel continuous: ended; the same command with --resume goes on", file=sys.stderr)
        return 128 + (error.number if isinstance(error, Ended) else signal.SIGINT)


def _opened(args: argparse.Namespace) -> AbstractContextManager[Trees]:
    foreign = bool(args.sel_kernel)
    if args.base_dir:
        return trees.of_folders(args.base_dir, args.head_dir, foreign)
    return trees.of_commits(args.repo or Path(), args.base, args.head, foreign)


@contextmanager
def _signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the command as Ctrl-C does: everything that is open is closed."""

    def end(number: int, frame: Any) -> None:
        raise Ended(number)

    before = {number: signal.signal(number, end) for number in trees.SIGNALS if number != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _compared(args: argparse.Namespace, both: Trees) -> int:
    """Measure both trees, save their runs, and print the verdict; return the exit code."""
    base, head = both.base, both.head
    choice: dict[str, Any] = {"matrix": args.sel_matrix, "dtype": args.sel_dtype, "family": args.sel_family}
    choice |= {"texts": args.k, **args.random}
    choice["file"] = args.sel_cases and str(args.sel_cases.absolute())  # the measuring processes run elsewhere
    if args.sel_kernel:
        choice["kernels"] = [args.sel_kernel, args.sel_takes]
    course = Course(both, choice, Progress(), Process)
    print(f"{base.name} -> {head.name} on {gpu_name(course.machine['gpu'])}: {len(course.cases)} cases", flush=True)
    if both.note:
        print(f"note: {both.note}", flush=True)
    if base.fingerprint() == head.fingerprint():
        print("note: both are the same code; every difference is the machine's", flush=True)
    name = f"{file_name(base.name)}-{file_name(head.name)}.jsonl"
    kept = Kept(args.storage / KEPT / name, course.about(args.rounds), args.resume)
    course.run(args.rounds, kept)
    if kept.problem:
        print(kept.problem)

    paths = []
    for side, tree in enumerate((base, head)):
        about = {"base": base.commit["id"], "head": head.commit["id"], "processes": args.rounds}
        outcomes = [kept.pairs[number][side] for number in sorted(kept.pairs)]
        run = saving.document(tree, outcomes, course.machine_of(tree), {**course.notes, KEPT: about})
        paths.append(write.save(args.storage, f"continuous_{file_name(tree.name)}", run))
    print(f"saved in {paths[0]} and {paths[1].name}")
    for line in saving.agreement(kept.pairs.values()):
        print(line)
    comparison = _judged(course, *paths)
    if course.on_gpu:
        print(comparison.text(shows_colour()))
        code = comparison.exit_code
    else:
        print(f"{'no GPU' if args.sel_kernel else 'references only'}: no verdict")
        code = 0
    kept.finish()
    write_exports(args, comparison)
    failures = [_failures(tree, [pair[side] for pair in kept.pairs.values()]) for side, tree in enumerate((base, head))]
    for line in (*failures[0], *failures[1]):
        print(printable(line))
    return 1 if failures[1] else code


def _judged(course: Course, base: Path, head: Path) -> Comparison:
    """Compare the saved runs; measure alerts in one more pair, and mark HEAD's run with those that it confirms."""
    old = load(base)
    comparison = compare(old, load(head))
    if comparison.compared and (keys := to_measure_again(comparison)):
        # `fresh` relates the second look to BASE's own: nothing of the machine is left to explain.
        comparison = confirm(comparison, saving.fresh(course.again(keys), old.timings), Machine())
    if comparison.regressions:
        run = read_json(head)
        slower = [f"{change.case} {change.method}" for change in comparison.regressions]
        run[MARK] |= {"baseline": old.name, "regressions": slower}
        replace_file(head, write.as_text(run))
    return comparison


def _failures(tree: Tree, outcomes: Sequence[Outcomes]) -> list[str]:
    """Return lines that say in which timings a tree failed, and why."""
    found = {key: reason for key, each in saving.by_key(outcomes).items() if (reason := saving.first(each, "failed"))}
    lines = [f"  {case} {method}: {reason}" for (case, method), reason in found.items()]
    more = [f"  ... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return [f"FAILED in {tree.name} ({len(lines)})", *lines[:SHOWN], *more] if lines else []


def main_parser() -> argparse.ArgumentParser:
    """Return what `nsa-sel continuous` is asked with."""
    parser = Parser(
        "nsa-sel continuous",
        description="Did a commit make the kernel slower? Measures two commits in turns on this card, in fresh"
        " processes, by the suite of HEAD; the checkout stays as it is. With --sel-kernel of any repository.",
        examples="""
            nsa-sel continuous HEAD~1                          the last commit with the working tree as it is
            nsa-sel continuous main HEAD --sel-matrix full     two commits, all cases
            nsa-sel continuous HEAD~1 HEAD --markdown c.md     and a comment for a pull request""",
        epilog="exit code: 0 nothing got slower, or no GPU; 1 slower, or a kernel of HEAD fails; 2 cannot be measured;"
        " 3 only suspects",
    )
    parser.add_argument("base", nargs="?", metavar="BASE", help="a commit: HEAD~1, a branch, a short hash")
    parser.add_argument("head", nargs="?", metavar="HEAD", help="a commit (default: the working tree as it is)")
    matrices = random_cases.MATRICES
    parser.add_argument("--sel-matrix", choices=matrices, help="cases to time (default: hot, smoke on a CPU)")
    random_cases.add_options(parser.add_argument)
    parser.add_argument("--sel-dtype", choices=cases.DTYPES, default="bf16", help="dtype of the cases")
    parser.add_argument(
        "--sel-family", metavar="NAMES", help="only these families, with commas (default: all but peers)"
    )
    parser.add_argument("--sel-cases", type=Path, metavar="FILE", help="a YAML file of cases, in place of the matrix")
    kernels.add_options(parser.add_argument)
    parser.add_argument(
        "-k", action="append", default=[], metavar="TEXT", help="only cases with TEXT in their id (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help="processes of each commit")
    parser.add_argument("--resume", action="store_true", help="go on where the same command was ended")
    parser.add_argument("--repo", type=Path, metavar="DIR", help="the repository of the commits (default: this one)")
    parser.add_argument("--base-dir", type=Path, metavar="DIR", help="an unpacked tree, in place of BASE")
    parser.add_argument("--head-dir", type=Path, metavar="DIR", help="an unpacked tree, in place of HEAD")
    parser.add_argument("--storage", type=Path, metavar="DIR", default=storage.STORAGE, help="saved runs")
    add_exports(parser)
    return parser
