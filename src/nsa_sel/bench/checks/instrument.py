"""Judge the instrument by its own runs: false alarms between runs of one commit, planted slow-downs that are found.

Make the runs in fresh processes: `pytest tests/perf --benchmark-json=RUN.json`. The table of noise that the comparison
uses is src/nsa_sel/bench/compare/noise.json; --noise replaces the runs' GPU in FILE and leaves the others.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ..command_line import Parser, exit_code
from ..compare import noise
from ..compare.rule import compare, confirm, to_measure_again
from ..compare.yardstick import explain
from ..saved.run import Key, Run, RunError, load, notes, read_json
from ..saved.speedups import is_kernel
from ..tables import replace_file

SUSPECTS_PER_PAIR = 1.0  # tolerated of runs of one commit, and no confirmed one: docs/measuring.md, "Noise"
FOUND_SHARE = 0.95


class Found(NamedTuple):
    """Count timings made slower; of them the slower, suspect and confirmed by a second look; and others named."""

    slowed: int
    slower: int
    suspect: int
    confirmed: int
    elsewhere: int


def spread(same_commit: Sequence[Run]) -> list[float]:
    """Return for every benchmark in all runs how far its medians lie apart, (max - min) / median, in rising order."""
    common = set.intersection(*(set(run.timings) for run in same_commit))
    apart = []
    for key in common:
        medians = [run.timings[key].median_us for run in same_commit]
        apart.append((max(medians) - min(medians)) / statistics.median(medians))
    return sorted(apart)


def false_alarms(same_commit: Sequence[Run]) -> tuple[int, list[str], list[str]]:
    """Compare every pair of runs in both directions: how many pairs, and a line for each confirmed and each suspect."""
    confirmed: list[str] = []
    suspect: list[str] = []
    pairs = list(itertools.permutations(same_commit, 2))
    for old, new in pairs:
        result = compare(old, new)
        for lines, changes in ((confirmed, result.regressions), (suspect, result.suspects)):
            lines += [f"{old.name} -> {new.name}: {change.text()}" for change in changes]
    return len(pairs), confirmed, suspect


def slowed(same_commit: Sequence[Run], share: float, seeds: Sequence[int] = (0, 1, 2)) -> Found:
    """Make a tenth of the kernel's timings slower by a share, in every order of three runs: old, new, and again.

    The third run stands for the second look that slower and suspect timings get.
    """
    total = Found(0, 0, 0, 0, 0)
    for (old, new, again), seed in itertools.product(itertools.permutations(same_commit, 3), seeds):
        kernel = sorted(
            key for key in old.timings.keys() & new.timings.keys() & again.timings.keys() if is_kernel(key[1])
        )
        chosen = set(random.Random(seed).sample(kernel, len(kernel) // 10))
        new, again = (
            replace(run, timings={key: x.scaled(1 + share * (key in chosen)) for key, x in run.timings.items()})
            for run in (new, again)
        )
        first = compare(old, new)
        last = confirm(first, {key: again.timings[key] for key in to_measure_again(first)}, explain(old, again))
        slower, suspect, confirmed = (
            {change.key for change in changes} for changes in (first.regressions, first.suspects, last.regressions)
        )
        counts = (
            len(chosen),
            *(len(keys & chosen) for keys in (slower, suspect, confirmed)),
            len((slower | suspect) - chosen),
        )
        total = Found(*map(sum, zip(total, counts, strict=True)))
    return total


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
    command = f"python -m {__package__}.instrument"
    parser = Parser(
        command,
        description=__doc__,
        examples=f"""
            {command} A.json B.json                all pairs of runs of one commit
            {command} --slowed 0.15 A.json B.json C.json   what of so much slower timings is found
            {command} --planted C.json             a run with --sel-plant and --sel-baseline
            {command} --noise FILE A.json B.json   write what such runs differ by""",
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN.json", help="two or more runs of the same commit")
    parser.add_argument("--planted", type=Path, metavar="RUN.json", help="a run in which slow-downs were planted")
    of_runs = parser.add_mutually_exclusive_group()
    of_runs.add_argument("--slowed", type=float, metavar="SHARE", help="make a tenth slower by it; needs three runs")
    of_runs.add_argument("--noise", type=Path, metavar="FILE", help="the table of noise that is written")
    args = parser.parse_args(argv)
    if len(args.runs) == 1 or not (args.runs or args.planted) or (args.noise and not args.runs):
        parser.error("give two runs or more, or --planted")
    if args.slowed is not None and (len(args.runs) < 3 or args.slowed <= 0):
        parser.error("--slowed: needs three runs or more, and a share above 0")
    good = True
    try:
        if args.noise:
            _write_noise(args.noise, [load(path) for path in args.runs])
        elif args.slowed:
            good &= _report_slowed([load(path) for path in args.runs], args.slowed)
        elif args.runs:
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
    pairs, confirmed, suspect = false_alarms(same_commit)
    print(f"{pairs} ordered pairs: {len(confirmed)} confirmed, {len(suspect)} suspects, all of them false")
    for line in (confirmed + suspect)[:20]:
        print(f"  {line}")
    return not confirmed and len(suspect) <= SUSPECTS_PER_PAIR * pairs


def _write_noise(path: Path, same_commit: Sequence[Run]) -> None:
    """Write the noise of these runs' GPU into a table.

    Raises: RunError if the runs or the table cannot be used.
    """
    found = noise.measure(same_commit)
    try:
        tables = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        replace_file(path, noise.as_text({**tables, **found}))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{path}: cannot be read or written as a table of noise: {error}") from None
    for gpu, table in found.items():
        print(f"{path}: {gpu}, {table['runs']} runs")
        for kind in noise.KINDS:
            print(f"  {kind:<7} " + ", ".join(map(_bin, table[kind])))


def _bin(entry: Sequence[float | None]) -> str:
    up_to, p90, p99, worst, count = entry
    ranks = f"p90 {p90}, p99 {p99} us" if up_to else f"p90 {p90:.2%}, p99 {p99:.2%}"
    return f"{'longer' if up_to is None else f'to {up_to:g} us'}: {ranks}, worst {worst:.1%} of {count}"


def _report_slowed(same_commit: Sequence[Run], share: float) -> bool:
    found = slowed(same_commit, share)
    slower, suspect, confirmed = (f"{count / found.slowed:.1%}" for count in found[1:4])
    print(f"{found.slowed} timings {share:.0%} slower: {slower} slower and {suspect} suspect in two runs,")
    print(f"{confirmed} slower when measured again, {found.elsewhere} named elsewhere")
    return found.confirmed >= FOUND_SHARE * found.slowed and not found.elsewhere


def _report_planted(path: Path) -> bool:
    slowed, found, timed = planted(path)
    hit, elsewhere = slowed & found, found - slowed
    print(f"{timed} benchmarks, {len(slowed)} planted, {len(hit)} found, {len(elsewhere)} reported elsewhere")
    for label, keys in (("not found", slowed - found), ("reported elsewhere", elsewhere)):
        for case, method in sorted(keys):
            print(f"  {label}: {case} {method}")
    return bool(slowed) and len(hit) >= FOUND_SHARE * len(slowed) and not elsewhere


if __name__ == "__main__":
    sys.exit(exit_code(main))
