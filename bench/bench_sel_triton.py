#!/usr/bin/env python3
"""Time the kernel against SDPA for shapes of your own, with the suite's inputs and timer: one line per method.

The lines go to the terminal as a table, as CSV where it is no terminal, or where --csv and --md say.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from pytest_benchmark.utils import get_commit_info, parse_save

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # runs without being installed

from nsa_sel import SelConfig, choose_route
from nsa_sel.bench import tables
from nsa_sel.bench.command_line import Parser, exit_code
from nsa_sel.bench.methods.contender import NotTimed, WrongResult
from nsa_sel.bench.saved import storage, write
from nsa_sel.bench.saved.speedups import fastest_sdpa
from nsa_sel.bench.saved.speedups import scope as scope_of
from nsa_sel.bench.session import Session
from nsa_sel.bench.suite import cases, kernels
from nsa_sel.bench.suite.cases import Case
from nsa_sel.bench.suite.kernels import UserKernel
from nsa_sel.bench.timer.machine import environment
from nsa_sel.config import ConfigError

# Column -> how a terminal shows it: on which side, and how wide at least.
COLUMNS = {
    **{"N": ">6", "H": ">2", "D": ">3", "Dv": ">3", "L": ">5", "dist": "<5", "dtype": "<5", "scope": "<5"},
    **{"method": "<20", "time_ms": ">9", "ci95_low_ms": ">11", "ci95_high_ms": ">12", "speedup": ">7"},
    **{"bytes": ">12", "gbps": ">7", "mae": ">8", "rounds": ">6", "note": "<"},
}
CPU_ROUNDS, CPU_WARMUP = 5, 1  # without a GPU a call takes up to a second
RUN_NAME = "bench_sel_triton"

Result = dict[str, Any]  # what Session.measure says of a method
Methods = Mapping[Case, Sequence[str]]  # of each case
Form = Callable[[Iterable[str]], str]  # cells -> a line


def main(argv: list[str] | None = None) -> int:
    """Print the lines; exit with 1 if a result is wrong or a method fails, 2 for bad arguments, toggles or files."""
    parser = _parser()
    args = parser.parse_args(argv)
    outputs = [(form, path) for form, path in ((_csv, args.csv), (_markdown, args.md)) if path]
    with contextlib.ExitStack() as stack:
        try:
            SelConfig.load()
            given = kernels.parse(args.sel_kernel, args.sel_takes)
            chosen = [_case(args, dist, L) for dist in args.dist for L in args.L_list]
            files = [(form, sys.stdout if path == "-" else stack.enter_context(_open(path))) for form, path in outputs]
        except (ConfigError, ValueError, OSError) as error:
            parser.error(str(error))
        files = files or [(_aligned if sys.stdout.isatty() else _csv, sys.stdout)]
        session = Session(kernels={kernel.name: kernel for kernel in given})
        failed = _run(args, session, {case: _methods(case, given) for case in chosen}, files)
    for kernel in given:
        if n := sum(not kernel.expressible(case, method) for case in chosen for method in kernel.methods(case)):
            print(f"{kernel.name}: {n} left out, which {kernel.takes} cannot express", file=sys.stderr)
    for _, path in outputs:
        if path != "-":
            print(f"wrote {path}", file=sys.stderr)
    return int(failed)


def _open(path: str) -> TextIO:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return open(path, "w")


def _methods(case: Case, given: Sequence[UserKernel]) -> list[str]:
    """Return the case's methods, and those of users' kernels that what the kernel takes can express."""
    return [*case.methods, *(m for kernel in given for m in kernel.methods(case) if kernel.expressible(case, m))]


def _run(args: argparse.Namespace, session: Session, chosen: Methods, files: Sequence[tuple[Form, TextIO]]) -> bool:
    """Measure the cases, print and save what was found; return whether a result was wrong or a method failed."""
    rounds, warmup = args.iters, args.warmup
    if not session.on_gpu:
        rounds, warmup = min(rounds, CPU_ROUNDS), min(warmup, CPU_WARMUP)
        print(f"no GPU: SDPA by the wall clock, {rounds} rounds; the kernel is not timed", file=sys.stderr)
    for form, file in files:
        print(form(COLUMNS), file=file)
        if form is _markdown:
            print(form(["---"] * len(COLUMNS)), file=file)
    results: list[Result] = []
    failed = False
    for case, methods in chosen.items():
        measured, notes = _measure(session, case, methods, rounds, warmup)
        results += measured
        failed |= any(note.startswith(("WRONG", "FAILED")) for note in notes.values())
        for cells in _lines(case, methods, measured, notes):
            for form, file in files:
                print(form(cells), file=file, flush=True)
    if args.save:
        print(_save(args.save, chosen, results, session), file=sys.stderr)
    return failed


def _measure(
    session: Session, case: Case, methods: Sequence[str], rounds: int, warmup: int
) -> tuple[list[Result], dict[str, str]]:
    """Return what was measured of the case's methods, and why the others have no time."""
    results, notes = [], {}
    for method in methods:
        try:
            found = session.measure(case, method, rounds, warmup)
            results.append({**found, "device_us": found["median"] * 1e6})
        except NotTimed as reason:
            notes[method] = f"not timed: {reason}"
        except WrongResult as error:
            notes[method] = f"WRONG: {error}"
            print(error, file=sys.stderr)  # whole, to be pasted: a line of the table has room for the first of it
        except Exception as error:  # the other methods and cases are still of use
            notes[method] = f"FAILED: {type(error).__name__}: {error}"
    if results and session.fits(case):
        x = session.state(case).inputs
        route = choose_route(x.q, x.k, x.v, x.ranges, min_len=x.min_len, max_len=x.max_len)
        print(f"{case.id}: auto runs {route.backend} ({route.reason})", file=sys.stderr)
    return results, notes


def _lines(
    case: Case, methods: Sequence[str], results: Sequence[Result], notes: Mapping[str, str]
) -> Iterator[list[str]]:
    """Yield the cells of one line per method of the case."""
    fastest = fastest_sdpa(results)
    of_method = {result["method"]: result for result in results}
    for method in methods:
        scope = scope_of(method)
        shape = (case.N, case.H, case.D, case.Dv, case.L, case.layout, case.dtype, scope, method)
        cells = [str(value) for value in shape]
        if timed := of_method.get(method):
            cells += [f"{us / 1e3:.5f}" for us in (timed["device_us"], *timed["ci95_us"])]
            sdpa = fastest.get((case.id, scope))
            cells += ["" if sdpa is None else f"{sdpa['device_us'] / timed['device_us']:.2f}"]
            cells += [str(timed["bytes"]), f"{timed['gbps']:.1f}", f"{timed['mae']:.2e}", str(len(timed["samples"]))]
            cells += [str(timed.get("config") or timed["sdpa_backend"])]
        else:
            cells += [""] * (len(COLUMNS) - len(cells) - 1) + notes[method].splitlines()[:1]
        yield cells


def _save(name: str, chosen: Methods, results: Iterable[Result], session: Session) -> str:
    """Store the results as a run of the perf suite, and say where."""
    of_samples = ("samples", "median", "q1", "q3", "device_us")
    entries = [
        write.entry(
            (result["case"], result["method"]),
            result["samples"],
            {name: value for name, value in result.items() if name not in of_samples},
        )
        for result in results
    ]
    if not entries:
        return "not saved: nothing was timed"
    reasons = session.not_timed.items()
    notes = {
        "asked": [[case.id, method] for case, methods in chosen.items() for method in methods],
        "not_timed": [{"case": case, "method": method, "reason": reason} for (case, method), reason in reasons],
    }
    run = write.document(entries, environment(), get_commit_info(), notes)
    try:
        return f"saved in {write.save(storage.STORAGE, name, run)}"
    except OSError as error:  # the lines were printed
        return f"not saved: {error}"


def _csv(cells: Iterable[str]) -> str:
    return tables.as_csv([map(_one_line, cells)]).rstrip("\n")


def _markdown(cells: Iterable[str]) -> str:
    return tables.markdown_line(map(_one_line, cells))


def _aligned(cells: Iterable[str]) -> str:
    return "  ".join(f"{_one_line(cell):{form}}" for cell, form in zip(cells, COLUMNS.values(), strict=True)).rstrip()


def _one_line(cell: str) -> str:
    return " ".join(cell.replace('"', "'").split())


def _parser() -> Parser:
    parser = Parser(
        prog="python bench/bench_sel_triton.py",
        description=__doc__,
        examples="""
            bench_sel_triton.py                                  the default shape
            bench_sel_triton.py --H 16 --Dv 64 --L_list 64,512   another one
            bench_sel_triton.py --decode 1 --csv times.csv       decode, into a file""",
    )

    def number(name: str, default: int | None, text: str, least: int = 1) -> None:
        parser.add_argument(name, type=_at_least(least), default=default, metavar="INT", help=text)

    number("--N", None, "rows; with --decode 4 groups times the batch (default: 1024, decode 32)")
    number("--H", 8, "query heads of a row")
    number("--D", 128, "width of queries and keys")
    number("--Dv", 128, "width of values")
    parser.add_argument(
        "--L_list",
        type=_lengths,
        default="64,128,256,512",
        metavar="INTS",
        help="selected tokens of a row, with commas",
    )
    parser.add_argument(
        "--dist",
        type=_distributions,
        default="few",
        metavar="NAMES",
        help=f"how a row selects, with commas; of {', '.join(cases.LAYOUTS)}: one span, 8 equal, 2 to 8 random ones",
    )
    number("--iters", 50, "timed rounds")
    number("--warmup", 5, "untimed rounds", least=0)
    parser.add_argument("--decode", type=int, choices=(0, 1), default=0, help="1: one query token, L/64 blocks per row")
    parser.add_argument("--dtype", choices=cases.DTYPES, default="bf16", help="of q, k and v")
    kernels.add_options(parser.add_argument)
    place = "to FILE, whose folder is made, or to the terminal"
    parser.add_argument("--csv", nargs="?", const="-", metavar="FILE", help=f"CSV {place}")
    parser.add_argument("--md", nargs="?", const="-", metavar="FILE", help=f"Markdown {place}")
    parser.add_argument(
        "--save",
        nargs="?",
        const=RUN_NAME,
        type=parse_save,
        metavar="NAME",
        help=f"store the run in {storage.STORAGE} here, as {RUN_NAME} or NAME; nsa-sel compare, report and threshold"
        " read it",
    )
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"value is {text!r}, expected a whole number of at least {least}")
        return value

    return number


def _lengths(text: str) -> list[int]:
    return [_at_least(1)(part) for part in text.split(",")]


def _distributions(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in cases.LAYOUTS]:
        known = ", ".join(cases.LAYOUTS)
        raise argparse.ArgumentTypeError(f"value is {unknown[0]!r}, expected some of {known}, with commas")
    return names


def _case(args: argparse.Namespace, dist: str, L: int) -> Case:
    shape = (args.dtype, dist, args.H, args.D, args.Dv, L)
    if not args.decode:
        return cases.rows_case(*shape, args.N or 1024)
    N = args.N or 32
    if N % 4:
        raise ValueError(f"N: value is {N}, expected a multiple of the 4 groups with --decode")
    return cases.decode_case(*shape, N // 4, max(8192, 2 * L))


if __name__ == "__main__":
    sys.exit(exit_code(main))
