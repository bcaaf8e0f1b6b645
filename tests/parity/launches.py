"""Few launches that together meet every load, tile and split, for tests that force the launch."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache

from nsa_sel.bench.tune import space
from nsa_sel.kernel.launch_config import SMALLEST_SHARED_BYTES, LaunchConfig, shared_memory

from .parity_case import ON_GPU, has_tma


@cache
def covering(
    H: int, D: int, Dv: int, tiles: tuple[int, ...], splits: tuple[int, ...], every_warp: bool = False
) -> list[LaunchConfig]:
    """Return few of the candidates: every load meets each of these tiles and splits.

    every_warp: and each number of warps and of stages, of which the interpreter knows nothing.
    """
    candidates = [
        c
        for c in space.grid(D, Dv)
        if c.block_l in tiles
        and c.splits in splits
        and c.cluster == 1
        and (has_tma() or c.load != "tma")
        and shared_memory(c, H, D, Dv, 2) <= SMALLEST_SHARED_BYTES
    ]
    if not every_warp or not ON_GPU:
        some = min(candidates, key=lambda c: (abs(c.num_warps - 4), abs(c.num_stages - 2)))
        candidates = [c for c in candidates if (c.num_warps, c.num_stages) == (some.num_warps, some.num_stages)]
    missing = {pair for config in candidates for pair in _pairs(config)}
    chosen = []
    while missing:
        best = max(candidates, key=lambda config: len(missing & _pairs(config)))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


def small_covering() -> list[LaunchConfig]:
    """Return the launches of tests that are about something else, at H = 4 and D = Dv = 64."""
    return covering(4, 64, 64, (16, 64), (1, 4))


def _pairs(config: LaunchConfig) -> set[tuple[str, str, object]]:
    return {(config.load, name, value) for name, value in asdict(config).items()}
