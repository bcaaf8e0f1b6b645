"""Regret: how many times the best launch's time the launch takes that the rules choose, in any case.

The best launch is that of a fixed grid, so that the figure says the same of every commit and card.
Source: docs/measuring.md, "Off the grid".
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...kernel.launch_config import LaunchConfig, chunk_width
from ..saved.speedups import geomean
from ..suite.cases import Case
from . import space, workers
from .log import clock
from .results import Ranked
from .sweep import FINAL, FIRST, Class, Sweep

CASES = 40  # random ones, where none are named
AGAIN = 3  # launches of the grid that are timed again beside the default one
SHOWN = 40  # lines of the table
# Tokens per tile, warps and stages.
TILES = (
    *((16, 1, 2), (16, 1, 3), (16, 4, 2), (32, 1, 2), (32, 1, 3), (32, 2, 2), (32, 2, 3), (32, 4, 2), (64, 1, 2)),
    *((64, 2, 1), (64, 2, 2), (64, 2, 3), (64, 4, 2), (64, 4, 3), (128, 2, 2), (128, 4, 2), (128, 4, 3), (256, 4, 2)),
)
SPLIT_TILES = ((32, 4, 2), (64, 4, 2), (64, 4, 3), (128, 4, 3))
# Programs per row, and how many of them merge as a cluster.
SPLITS = ((2, 1), (2, 2), (4, 1), (4, 4), (8, 1), (8, 8), (16, 1), (16, 8), (32, 1), (32, 2), (64, 1), (64, 8))


def grid(D: int, Dv: int, has_tma: bool) -> list[LaunchConfig]:
    """Return the launches that every case is tried with, as far as they can run it."""
    shapes = [(tile, (1, 1)) for tile in TILES] + list(itertools.product(SPLIT_TILES, SPLITS))
    return [
        LaunchConfig(load, block_l, chunk_width(D), chunk_width(Dv), warps, stages, splits, cluster=cluster)
        for load in loads(has_tma)
        for (block_l, warps, stages), (splits, cluster) in shapes
    ]


def loads(has_tma: bool) -> tuple[str, str]:
    return "gather", "tma" if has_tma else "whole"


@dataclass(frozen=True)
class Regret:
    """Hold one case's figures, from the turns in which the default launch and the best were timed side by side.

    best: the default launch itself where none of the grid was faster. tried: launches that ran.
    """

    case: Case
    default: LaunchConfig
    default_us: float
    best: LaunchConfig
    best_us: float
    tried: int

    @property
    def ratio(self) -> float:
        return self.default_us / self.best_us

    def as_dict(self) -> dict[str, Any]:
        """Return the figures and the case's sizes, for JSON."""
        launches = {"default": str(self.default), "best": str(self.best)}
        times = {"default_us": self.default_us, "best_us": self.best_us, "regret": self.ratio, "tried": self.tried}
        return {"case": self.case.id, **self.case.parameters, "n_spans": self.case.n_spans, **launches, **times}


class RegretSweep(Sweep):
    """Time every launch of the grid, then the default and the best in turns; what the log has is not timed again."""

    def class_of(self, case: Case) -> Class:
        return case

    def grid(self, D: int, Dv: int) -> Iterable[LaunchConfig]:
        return grid(D, Dv, self.gpu.has_tma)

    def unfit(self, launch: LaunchConfig, case: Case) -> str | None:
        """Leave out what cannot run, and parts or whole tiles that would be empty: no launch by an estimate."""
        return space.unfit(launch, case, self.gpu, but=(space.SPILLS, space.LONG_TILES, space.IDLE))

    def plan(self) -> Iterator[str]:
        """Yield the lines that name the grid, and say what of it is left out and why, and how long it may take."""
        n_launches = sum(map(len, self.launches.values()))
        of = "/".join(loads(self.gpu.has_tma))
        n_grid = len(grid(64, 64, self.gpu.has_tma))
        yield f"{self.gpu.name}: {len(self.classes)} cases, the default launch against a fixed grid of {n_grid}"
        yield f"  {of}: {_named(TILES)}"
        yield f"  {of}: {_named(SPLIT_TILES)}, each with {', '.join(f'split{n} cluster{c}' for n, c in SPLITS)}"
        for reason, n in self.removed.most_common():
            yield f"  left out {n:6}  {reason}"
        # As a sweep takes, on an H200 with 16 cores; parts that merge without clusters share a kernel.
        seconds = 30 + 0.7 * 1.4 * n_launches / workers.workers() + 0.005 * n_launches + 2 * len(self.classes)
        yield f"  {n_launches} timings; on an H200 about {clock(seconds)}; what is measured is kept in {self.log.path}"
        if self.log.found:
            yield f"  continues: {self.log.found} measurements are there already"

    def regrets(self) -> list[Regret]:
        """Measure all that is not on record; return the cases whose default launch has a time, the largest first.

        Raises: as `run`.
        """
        self._time(FIRST, self.launches)
        others = {
            case: [launch for launch in self.launches[case] if launch != default]
            for case, default in self.untuned.items()
        }
        finalists: dict[Class, list[LaunchConfig]] = {
            case: self._best(FIRST, case, launches, AGAIN) for case, launches in others.items()
        }
        self._finals(finalists)
        found = []
        for case, default in self.untuned.items():
            ranked = self._ranked(FINAL, case, finalists[case]) if self.classes[case] else []
            default_us = next((each.mean_us for each in ranked if each.launch == default), None)
            if default_us is not None:
                best: Ranked = ranked[0]
                tried = len(self._ranked(FIRST, case, self.launches[case]))
                found.append(Regret(case, default, default_us, best.launch, best.mean_us, tried))
        return sorted(found, key=lambda each: -each.ratio)

    def missing(self) -> dict[str, str]:
        """Return why cases have no regret: no memory for them, or a default launch that failed, by id."""
        failed = {case.id: self.log.error(case, default) for case, default in self.untuned.items()}
        reasons = {case: f"the default launch failed: {error}" for case, error in failed.items() if error is not None}
        return {**reasons, **{case.id: reason for case, reason in self.skipped.items()}}


def lines(regrets: Sequence[Regret], missing: Mapping[str, str]) -> Iterator[str]:
    """Yield a table of the cases, the largest regret first, then the geomean and the worst."""
    cells = [["regret", "default µs", "best µs", "default", "best", "case"]]
    for each in regrets[:SHOWN]:
        times = f"{each.default_us:.1f}", f"{each.best_us:.1f}"
        cells.append([f"{each.ratio:.2f}x", *times, str(each.default), str(each.best), each.case.id])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
    if len(regrets) > SHOWN:
        yield f"... and {len(regrets) - SHOWN} more of less"
    for case, reason in missing.items():
        yield f"not measured: {case}: {reason}"
    if regrets:
        yield f"regret over {len(regrets)} cases: geomean {_mean(regrets):.3f}x, worst {regrets[0].ratio:.2f}x"


def document(regrets: Sequence[Regret], missing: Mapping[str, str], sweep: RegretSweep) -> dict[str, Any]:
    """Return everything that was measured, for JSON."""
    figures = {"geomean": _mean(regrets), "worst": regrets[0].ratio} if regrets else {}
    named = [asdict(each) for each in grid(64, 64, sweep.gpu.has_tma)]
    for each in named:
        del each["block_d"], each["block_dv"]  # these follow from a case's widths
    cases = [each.as_dict() for each in regrets]
    return {"gpu": sweep.gpu.name, **figures, "cases": cases, "not_measured": dict(missing), "grid": named}


def _mean(regrets: Sequence[Regret]) -> float:
    return geomean(each.ratio for each in regrets) or 1.0


def _named(tiles: Iterable[tuple[int, int, int]]) -> str:
    return ", ".join(f"BL{tile} w{warps} s{stages}" for tile, warps, stages in tiles)
