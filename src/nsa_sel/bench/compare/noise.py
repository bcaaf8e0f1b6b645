"""What two runs of one commit differ by on one card: a table by kind of time and duration, made from such runs.

    {"<GPU>": {"runs": 2, "device": [[5, 0.27, 0.34, 0.08, 40], ...], "call": [...], "graph": [...]}}

A bin is [up to µs, p90, p99, worst, differences]; p90 and p99 are µs, and shares of the time in the last bin, which has
no end (null). The worst difference is a share of its time everywhere.
Source: docs/measuring.md, "Noise".
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..saved.run import Key, Run, RunError, Timing
from ..saved.speedups import is_kernel
from .yardstick import FLOOR_US, explain

TABLE = Path(__file__).with_name("noise.json")
KINDS = ("device", "call", "graph")
EDGES_US = (5.0, 6.0, 8.0, 10.0, 15.0, 40.0, 80.0, 200.0)
FEWEST = 200  # differences in a bin, each pair of runs in both directions; fewer join the next bin
# How often one comparison of two runs of one commit may name any of its timings, were the tail exponential.
CONFIRMED_WRONG, SUSPECT_WRONG = 0.01, 0.6
# Some timings have two levels, from process to process, that lie further apart than any tail through the percentiles
# says. The worst that was seen is an example, not a limit: this much more counts as possible.
WORST_MARGIN = 1.25
Bin = tuple[float | None, float, float, float, int]


@dataclass(frozen=True)
class Noise:
    """Hold one card's table; `gpu` is the card that it was measured on, `assumed` that this is another one."""

    gpu: str
    bins: dict[str, tuple[Bin, ...]]
    assumed: bool

    def bound_us(self, kind: str, us: float, probability: float) -> float:
        """Return the difference that a timing of `us` passes with this probability, without any change of the code.

        The tail beyond the 90th percentile is taken as exponential, through the 99th. On another card than the table's
        the bound grows with the time, as a share of the bin's middle, and is at least 0.5 µs.
        """
        start, end, p90, p99, _ = self._bin(kind, us)
        bound = max(0.0, p90 + (p99 - p90) / math.log(10) * math.log(0.1 / probability))
        if math.isinf(end):
            bound *= us
        elif self.assumed:
            bound *= us / ((start + end) / 2)
        return max(bound, FLOOR_US) if self.assumed else bound

    def worst_us(self, kind: str, us: float) -> float:
        """Return what two runs of one commit once differed by at such a duration, and a quarter more."""
        *_, worst = self._bin(kind, us)
        return WORST_MARGIN * worst * us

    def _bin(self, kind: str, us: float) -> tuple[float, float, float, float, float]:
        """Return start, end, p90, p99 and the worst share of the bin that a time falls into."""
        start = 0.0
        for up_to, p90, p99, worst, _ in self.bins[kind]:
            end = math.inf if up_to is None else up_to
            if us < end:
                return start, end, p90, p99, worst
            start = end
        raise RunError(f"{TABLE.name}: no bin of {kind} times holds {us} us; make the table again")


def noise_of(gpu: str) -> Noise:
    """Return the card's table, or the first one there is, assumed to hold for it relative to the time."""
    tables = _tables(TABLE)
    measured = gpu if gpu in tables else next(iter(tables))
    bins = {kind: tuple(tuple(entry) for entry in tables[measured][kind]) for kind in KINDS}
    return Noise(measured, bins, assumed=gpu not in tables)


@cache
def _tables(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def time_us(timing: Timing, kind: str) -> float | None:
    """Return the time of one kind: "device", "call" or "graph"."""
    return {"device": timing.median_us, "call": timing.call_us, "graph": timing.graph_us}[kind]


def measure(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the table of one card's name from runs in fresh processes, each pair of one commit on one card.

    Raises: RunError if the runs are of several GPUs, no two of them are of one commit and one card, or a time lacks.
    """
    gpus = {run.gpu for run in runs}
    if len(gpus) != 1:
        raise RunError(f"the runs are of {len(gpus)} GPUs ({', '.join(sorted(gpus))}); give those of one")
    pairs = [(old, new) for old, new in itertools.permutations(runs, 2) if _of_one(old) == _of_one(new)]
    if not pairs:
        raise RunError("no two of these runs are of one commit on one card; measure one commit twice")
    differences: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for old, new in pairs:
        machine = explain(old, new)
        for key in _kernel(old, new):
            before, after = old.timings[key], machine.corrected(new.timings[key])
            for kind in KINDS:
                times = time_us(before, kind), time_us(after, kind)
                if times[0] is not None and times[1] is not None:
                    differences[kind].append((times[0], abs(times[1] - times[0])))
    if lacking := [kind for kind in KINDS if not differences[kind]]:
        raise RunError(f"the runs have no {' and no '.join(lacking)} times; give runs of a GPU")
    used = {run.name for pair in pairs for run in pair}
    return {gpus.pop(): {"runs": len(used), **{kind: _bins(differences[kind]) for kind in KINDS}}}


def as_text(tables: dict[str, Any]) -> str:
    """Return tables as JSON, a bin on each line."""
    cards = []
    for gpu, table in tables.items():
        kinds = [f'  "{kind}": [\n   ' + ",\n   ".join(map(json.dumps, table[kind])) + "]" for kind in KINDS]
        cards.append(f' {json.dumps(gpu)}: {{"runs": {table["runs"]},\n' + ",\n".join(kinds) + "}")
    return "{\n" + ",\n".join(cards) + "\n}\n"


def _of_one(run: Run) -> tuple[str, bool, str]:
    return run.commit, run.dirty, run.environment["gpu_id"]


def _kernel(old: Run, new: Run) -> Iterable[Key]:
    return (key for key in old.timings if key in new.timings and is_kernel(key[1]))


def _bins(differences: list[tuple[float, float]]) -> list[list[float | None]]:
    """Return the bins of (time, difference) pairs by rising time."""
    found: list[list[float | None]] = []
    waiting: list[tuple[float, float]] = []
    start = last = 0.0
    for end in EDGES_US:
        waiting += [(us, by) for us, by in differences if start <= us < end]
        start = end
        if len(waiting) >= FEWEST:
            percentiles = _ranks([by for _, by in waiting], 0.9, 0.99)
            found.append([end, *percentiles, *_ranks(_shares(waiting), 1), len(waiting)])
            waiting, last = [], end
    rest = _shares([(us, by) for us, by in differences if us >= last])
    return [*found, [None, *_ranks(rest or [1.0], 0.9, 0.99, 1), len(rest)]]


def _shares(differences: list[tuple[float, float]]) -> list[float]:
    return [by / us for us, by in differences]


def _ranks(values: list[float], *shares: float) -> list[float]:
    """Return what these shares of the values do not exceed, rounded up."""
    ranked = sorted(values)
    return [math.ceil(ranked[math.ceil(share * len(ranked)) - 1] * 1e4) / 1e4 for share in shares]
