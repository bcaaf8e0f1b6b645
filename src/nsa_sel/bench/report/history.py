"""Earlier and later saved runs of one card's kind, beside the reported one: what the history is drawn from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..saved.run import RunError, Saved
from ..suite.cases import PEER_METHODS
from . import tables

MOST_RUNS = 20  # each adds some 17 kB to the page, which is to stay below 4 MB


@dataclass(frozen=True)
class Past:
    """Hold a saved run and its table."""

    saved: Saved
    rows: Sequence[tables.Row]

    @property
    def about(self) -> dict[str, Any]:
        """Return what the page says of the run."""
        run = self.saved.run
        return {
            "name": run.name,
            "when": run.datetime[:16],
            "commit": run.commit[:10] + ("-dirty" if run.dirty else ""),
            "card": run.environment["gpu_id"],
        }


def read(files: Sequence[Path], saved: Saved, rows: Sequence[tables.Row]) -> list[Past]:
    """Return the newest of the saved runs that are of the reported run's GPU, itself among them, by date.

    What cannot be read or measured another GPU is left out: the history is no check of the storage.
    """
    found = [Past(saved, rows)]
    here = Path(saved.run.path).resolve()
    for path in files[-MOST_RUNS:]:
        if path.resolve() == here:
            continue
        try:
            past = Saved.load(path)
        except RunError:
            continue
        if past.run.gpu == saved.run.gpu:
            found.append(Past(past, tables.table(past)))
    return sorted(found, key=lambda past: (past.saved.run.datetime, past.saved.run.name))


def figures(past: Iterable[Past], rows: Sequence[tables.Row], kernels: Sequence[int]) -> dict[str, Any]:
    """Return every run's time and speed-up in the reported run's `rows`, of which `kernels` are the indices."""
    runs, times, speedups = [], [], []
    for each in past:
        by_key = {(row["case"], row["method"]): row for row in each.rows}
        same = [by_key.get((rows[at]["case"], rows[at]["method"]), {}) for at in kernels]
        runs.append({**each.about, "reported": each.rows is rows})
        times.append([row.get("device_us") for row in same])
        speedups.append([row.get("speedup") for row in same])
    return {"runs": runs, "rows": list(kernels), "time": times, "speedup": speedups}


def peers(past: Sequence[Past], rows: Sequence[tables.Row]) -> tuple[str, list[tables.Row]]:
    """Return the prefill times of peers, and the name of the run that they are from; "" if it is the reported one.

    A full run measures no peers. Then those of the newest other run count, in the cases that both have.
    """

    def among(candidates: Sequence[tables.Row]) -> list[tables.Row]:
        return [
            r for r in candidates if r["family"] == "prefill" and r["method"] in PEER_METHODS and r["case"] in cases
        ]

    cases = {row["case"] for row in rows}
    if among(rows):
        return "", []
    for each in reversed(past):
        if found := among(each.rows):
            return f"{each.about['name']} ({each.about['when']})", found
    return "", []
