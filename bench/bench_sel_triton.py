#!/usr/bin/env python3
"""Time the kernel against SDPA for shapes of your own, with the suite's inputs and timer: one line per method."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # runs without being installed

from nsa_sel import choose_route
from nsa_sel.bench import tables
from nsa_sel.bench.methods.contender import NotTimed, WrongResult
from nsa_sel.bench.saved.speedups import fastest_sdpa
from nsa_sel.bench.session import Session
from nsa_sel.bench.suite import cases
from nsa_sel.bench.suite.cases import Case

COLUMNS = (
    *("N", "H", "D", "Dv", "L", "dist", "dtype", "scope", "method"),
    *("time_ms", "speedup", "gbps", "mae", "rounds", "note"),
)
CPU_ROUNDS, CPU_WARMUP = 5, 1  # without a GPU a call takes up to a second


def main(argv: list[str] | None = None) -> int:
    """Print the lines; exit with 1 if a result is wrong, 2 for bad arguments."""
    args = _arguments(argv)
    session = Session()
    rounds, warmup = args.iters, args.warmup
    if not session.on_gpu:
        rounds, warmup = min(rounds, CPU_ROUNDS), min(warmup, CPU_WARMUP)
        print(f"no GPU: SDPA by the wall clock, {rounds} rounds; the kernel is not timed", file=sys.stderr)
    outputs = [(form, path) for form, path in ((_csv, args.csv), (_markdown, args.md)) if path] or [(_csv, "-")]
    wrong = False
    with contextlib.ExitStack() as stack:
        files = [(form, sys.stdout if path == "-" else stack.enter_context(open(path, "w"))) for form, path in outputs]
        for form, file in files:
            print(form(COLUMNS), file=file)
            if form is _markdown:
                print(form(["---"] * len(COLUMNS)), file=file)
        for case in args.cases:
            for row in _measure(session, case, rounds, warmup):
                wrong |= row["note"].startswith("WRONG")
                for form, file in files:
                    print(form(row.values()), file=file, flush=True)
    for _, path in outputs:
        if path != "-":
            print(f"wrote {path}", file=sys.stderr)
    return int(wrong)


def _measure(session: Session, case: Case, rounds: int, warmup: int) -> Iterator[dict[str, str]]:
    """Yield one line per method of the case."""
    results, notes = [], {}
    for method in case.methods:
        try:
            found = session.measure(case, method, rounds, warmup)
            results.append({**found, "device_us": found["median"] * 1e6})
        except NotTimed as reason:
            notes[method] = f"not timed: {reason}"
        except WrongResult as error:
            notes[method] = f"WRONG: {error}"
    if session.fits(case):
        x = session.state(case).inputs
        route = choose_route(x.q, x.k, x.v, x.ranges, min_len=x.min_len, max_len=x.max_len)
        print(f"{case.id}: auto runs {route.backend} ({route.reason})", file=sys.stderr)
    fastest = fastest_sdpa(results)
    for method in case.methods:
        scope = cases.scope(method)
        shape = (case.N, case.H, case.D, case.Dv, case.L, case.layout, case.dtype, scope, method)
        cells = [str(value) for value in shape]
        timed = next((result for result in results if result["method"] == method), None)
        if timed is None:
            cells += [""] * 5 + [notes[method]]
        else:
            speedup = fastest[case.id, scope]["device_us"] / timed["device_us"] if (case.id, scope) in fastest else None
            cells += [f"{timed['device_us'] / 1e3:.5f}", "" if speedup is None else f"{speedup:.2f}"]
            cells += [f"{timed['gbps']:.1f}", f"{timed['mae']:.2e}", str(rounds)]
            cells += [str(timed.get("config") or timed["sdpa_backend"])]
        yield dict(zip(COLUMNS, cells, strict=True))


def _csv(cells: Iterable[str]) -> str:
    return tables.as_csv([map(_one_line, cells)]).rstrip("\n")


def _markdown(cells: Iterable[str]) -> str:
    return tables.markdown_line(map(_one_line, cells))


def _one_line(cell: str) -> str:
    return " ".join(cell.replace('"', "'").split())


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--N", type=int, help="rows; with --decode 4 groups times the batch (default: 1024, decode 32)")
    parser.add_argument("--H", type=int, default=8, help="query heads of a row")
    parser.add_argument("--D", type=int, default=128, help="width of queries and keys")
    parser.add_argument("--Dv", type=int, default=128, help="width of values")
    parser.add_argument("--L_list", default="64,128,256,512", help="selected tokens of a row, with commas")
    parser.add_argument("--dist", choices=cases.LAYOUTS, default="few", help="one span, 8 equal, 2 to 8 random ones")
    parser.add_argument("--iters", type=int, default=50, help="timed rounds")
    parser.add_argument("--warmup", type=int, default=5, help="untimed rounds")
    parser.add_argument("--decode", type=int, choices=(0, 1), default=0, help="1: one query token, L/64 blocks a row")
    parser.add_argument("--dtype", choices=cases.DTYPES, default="bf16")
    parser.add_argument("--csv", nargs="?", const="-", metavar="FILE", help="CSV to FILE, or to the terminal")
    parser.add_argument("--md", nargs="?", const="-", metavar="FILE", help="Markdown to FILE, or to the terminal")
    args = parser.parse_args(argv)
    try:
        lengths = [int(part) for part in args.L_list.split(",")]
        args.cases = [_case(args, L) for L in lengths]
        if args.iters < 1 or args.warmup < 0 or min(args.H, args.D, args.Dv, *lengths) < 1:
            raise ValueError("sizes and --iters must be at least 1, --warmup at least 0")
    except ValueError as error:
        parser.error(str(error))
    return args


def _case(args: argparse.Namespace, L: int) -> Case:
    if not args.decode:
        return cases.rows_case(args.dtype, args.dist, args.H, args.D, args.Dv, L, args.N or 1024)
    if (args.N or 32) % 4:
        raise ValueError(f"N: value is {args.N}, expected a multiple of the 4 groups with --decode")
    context = max(8192, 2 * L)
    return cases.decode_case(args.dtype, args.dist, args.H, args.D, args.Dv, L, (args.N or 32) // 4, context)


if __name__ == "__main__":
    sys.exit(main())
