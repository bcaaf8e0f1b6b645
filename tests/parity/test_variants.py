"""Every way to launch the kernel, forced one by one: gathered and whole tiles, TMA, split rows, tiles, warps and stages."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache

import pytest
import torch
from parity_case import DEVICE, Case, check, here, rows

# Spans longer than the largest tile, remainders of every kind, an empty row, one token, doubly covered keys.
RANGES = rows(
    [(0, 300)],
    [(3, 131), (131, 140), (200, 201), (0, 0), (150, 182)],
    [(0, 0), (9, 2)],
    [(128, 256), (100, 260), (0, 1), (128, 256)],
    [(299, 300)],
)
S_KV = 300


@cache
def covering(H: int, D: int, Dv: int, tiles: tuple[int, ...], splits: tuple[int, ...], every_warp: bool = False) -> list:
    """Return few of the candidates: every load meets each of these tiles and splits and, if asked, each warp and stage count.

    The interpreter knows neither warps nor stages.
    """
    from nsa_sel import tuning

    candidates = [c for c in tuning.candidate_configs(H, D, Dv) if c.block_l in tiles and c.splits in splits]
    if not every_warp or DEVICE == "cpu":
        some = next(c for c in candidates if c.num_warps == 4 and c.num_stages > 1)
        candidates = [c for c in candidates if (c.num_warps, c.num_stages) == (some.num_warps, some.num_stages)]
    missing = {pair for config in candidates for pair in _pairs(config)}
    chosen = []
    while missing:
        best = max(candidates, key=lambda config: len(missing & _pairs(config)))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


def small_covering() -> list:
    """Return what the other tests of variants launch, at H = 4 and D = Dv = 64."""
    return covering(4, 64, 64, (16, 64), (1, 4))


def _pairs(config) -> set:
    return {(config.load, name, value) for name, value in asdict(config).items()}


def _needs_tma(load: str) -> None:
    if load == "tma" and DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("TMA needs compute capability 9.0")


@pytest.mark.parametrize("load", ("gather", "whole", "tma"))
@pytest.mark.parametrize(
    ("dtype", "H", "D", "Dv", "tiles", "splits", "every_warp"),
    [
        (torch.bfloat16, 4, 64, 64, (16, 32, 64, 128), here((1, 2, 8, 32), (1, 2, 16)), True),
        (torch.float16, 16, 192, 128, (16, 32), (1, 4), False),  # D in chunks
        (torch.float32, 6, 80, 48, (16,), (1, 4), False),  # padded heads and widths
    ],
    ids=("bf16", "fp16 in chunks", "fp32 padded"),
)
def test_triton_sel_parity_of_launch_variants(dtype, H, D, Dv, tiles, splits, every_warp, load):
    _needs_tma(load)
    for config in covering(H, D, Dv, tiles, splits, every_warp):
        if config.load == load:
            check(Case(RANGES, S_KV, H=H, D=D, Dv=Dv, dtype=dtype, launch=config))
