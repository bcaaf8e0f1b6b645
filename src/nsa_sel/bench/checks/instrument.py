"""Judge the instrument by its own runs: false alarms between runs of one commit, planted slow-downs that are found.

    python -m nsa_sel.bench.checks.instrument RUN.json RUN.json …       runs of the same commit, all pairs
    python -m nsa_sel.bench.checks.instrument --planted RUN.json        a run made with --sel-plant and --sel-baseline

Make the runs in fresh processes: `pytest tests/perf --sel-matrix hot --benchmark-json=RUN.json`.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from ..compare.rule import compare
from ..saved.run import Key, Run, RunError, load, notes, read_json

FALSE_PER_1000 = 1.0  # tolerated: docs/measuring.md, "Comparing two runs"
FOUND_SHARE = 0.95


def spread(same_commit: Sequence[Run]) -> list[float]:
    """Return for every benchmark in all runs how far its medians lie apart, (max - min) / median, in rising order."""
    common = set.intersection(*(set(run.timings) for run in same_commit))
    apart = []
    for key in common:
        medians = [run.timings[key].median_us for run in same_commit]
        apart.append((max(medians) - min(medians)) / statistics.median(medians))
    return sorted(apart)


def false_alarms(same_commit: Sequence[Run]) -> tuple[int, list[str]]:
    """Compare every pair of runs in both directions: how many comparisons, and a line for each regression found."""
    compared, alarms = 0, []
    for old, new in itertools.permutations(same_commit, 2):
        result = compare(old, new)
        compared += result.compared
        alarms += [f"{old.name} -> {new.name}: {change.text()}" for change in result.regressions]
    return compared, alarms


def planted(path: Path) -> tuple[set[Key], set[Key], int]:
    """Return what was planted in a run, what its comparison confirmed as slower, and how many benchmarks it timed."""
    data = read_json(path)
    entries = [entry["extra_info"] for entry in data["benchmarks"] if "case" in entry["extra_info"]]
    slowed = {(extra["case"], extra["method"]) for extra in entries if "planted" in extra}
    # The mark names each regression as "<case> <method>"; neither holds a space.
    found = {(line.split()[0], line.split()[1]) for line in notes(data)["regressions"]}
    return slowed, found, len(entries)


def main(argv: list[str] | None = None) -> int:
    """Print the figures; return 0 if they hold, 1 if not, 2 if a run cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN.json", help="two or more runs of the same commit")
    parser.add_argument("--planted", type=Path, metavar="RUN.json")
    args = parser.parse_args(argv)
    if len(args.runs) == 1 or not (args.runs or args.planted):
        parser.error("give two runs or more, or --planted")
    good = True
    try:
        if args.runs:
            good &= _report_pairs([load(path) for path in args.runs])
        if args.planted:
            good &= _report_planted(args.planted)
    except RunError as error:
        print(error, file=sys.stderr)
        return 2
    return int(not good)


def _report_pairs(same_commit: Sequence[Run]) -> bool:
    apart = spread(same_commit)
    at = {share: apart[int(share * (len(apart) - 1))] for share in (0.5, 0.9, 0.99, 1.0)}
    shares = ", ".join(f"{value:.1%} at {share:.0%}" for share, value in at.items())
    print(f"between {len(same_commit)} processes, {len(apart)} benchmarks: (max - min) / median is {shares}")
    compared, alarms = false_alarms(same_commit)
    rate = 1000 * len(alarms) / compared
    print(f"{compared} comparisons, {len(alarms)} false regressions: {rate:.2f} per 1,000")
    for alarm in alarms[:20]:
        print(f"  {alarm}")
    return rate < FALSE_PER_1000


def _report_planted(path: Path) -> bool:
    slowed, found, timed = planted(path)
    hit, elsewhere = slowed & found, found - slowed
    print(f"{timed} benchmarks, {len(slowed)} planted, {len(hit)} found, {len(elsewhere)} reported elsewhere")
    for label, keys in (("not found", slowed - found), ("reported elsewhere", elsewhere)):
        for case, method in sorted(keys):
            print(f"  {label}: {case} {method}")
    return bool(slowed) and len(hit) >= FOUND_SHARE * len(slowed) and not elsewhere


if __name__ == "__main__":
    sys.exit(main())
