"""The verb `nsa-sel compare`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..saved import storage
from ..saved.run import RunError, load, short_name
from ..tables import printable
from .rule import compare


def main(argv: list[str] | None = None) -> int:
    """Run `nsa-sel compare [OLD NEW]`; return 0 (clean), 1 (regression, missing, nothing common, other GPU) or 2."""
    parser = argparse.ArgumentParser(
        prog="nsa-sel compare", description="Say which cases got slower between two saved runs."
    )
    parser.add_argument("runs", nargs="*", metavar="OLD NEW", help="files, saved names or run prefixes such as 0001")
    parser.add_argument(
        "--sel-baseline", metavar="RUN", help="the old run, if OLD and NEW are not given (default: baseline)"
    )
    args = parser.parse_args(argv)
    if len(args.runs) not in (0, 2) or (args.runs and args.sel_baseline):
        parser.error("give both OLD and NEW, or neither")
    try:
        old, new = _choose(args.runs, args.sel_baseline, storage.STORAGE)
        comparison = compare(load(old), load(new))
    except RunError as error:
        print(printable(f"nsa-sel compare: {error}"), file=sys.stderr)
        return 2
    print(comparison.text())
    return comparison.exit_code


def _choose(given: list[str], baseline: str | None, folder: Path) -> tuple[Path, Path]:
    if given:
        return storage.find(given[0], folder), storage.find(given[1], folder)
    new = storage.latest(folder)
    if new is None:
        raise RunError(f"{folder}: no saved run; measure with pytest tests/perf --benchmark-autosave")
    old = storage.baseline(folder, load(new).gpu, baseline, other_than=new)
    if old.resolve() == new.resolve():
        raise RunError(
            f"{short_name(new)}: the latest run is the baseline itself;"
            " measure with pytest tests/perf --benchmark-autosave"
        )
    return old, new
