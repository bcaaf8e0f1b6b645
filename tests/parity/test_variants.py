"""Every way to launch the kernel, forced one by one: loads, tiles, split rows, column chunks, warps and stages."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cache

import pytest
import torch
from parity_case import DEVICE, Case, check, has_tma, here, rows

from nsa_sel import tuning

LOADS = sorted({config.load for config in tuning.candidate_configs(4, 64, 64)})

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
def covering(
    H: int, D: int, Dv: int, tiles: tuple[int, ...], splits: tuple[int, ...], every_warp: bool = False
) -> list[tuning.LaunchConfig]:
    """Return few of the candidates: every load meets each of these tiles and splits.

    every_warp: and each number of warps and of stages, of which the interpreter knows nothing.
    """
    every = tuning.candidate_configs(H, D, Dv, has_tma=has_tma())
    candidates = [c for c in every if c.block_l in tiles and c.splits in splits]
    if not every_warp or DEVICE == "cpu":
        some = min(candidates, key=lambda c: (abs(c.num_warps - 4), abs(c.num_stages - 2)))
        candidates = [c for c in candidates if (c.num_warps, c.num_stages) == (some.num_warps, some.num_stages)]
    missing = {pair for config in candidates for pair in _pairs(config)}
    chosen = []
    while missing:
        best = max(candidates, key=lambda config: len(missing & _pairs(config)))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


def small_covering() -> list[tuning.LaunchConfig]:
    """Return what the other tests of variants launch, at H = 4 and D = Dv = 64."""
    return covering(4, 64, 64, (16, 64), (1, 4))


def _pairs(config: tuning.LaunchConfig) -> set[tuple[str, str, object]]:
    return {(config.load, name, value) for name, value in asdict(config).items()}


@pytest.mark.parametrize("load", LOADS)
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
    if load == "tma" and not has_tma():
        pytest.skip("TMA descriptors need Triton 3.4 and compute capability 9.0")
    for config in covering(H, D, Dv, tiles, splits, every_warp):
        if config.load == load:
            check(Case(RANGES, S_KV, H=H, D=D, Dv=Dv, dtype=dtype, launch=config))


@pytest.mark.parametrize(("block_d", "block_dv"), ((16, 64), (64, 16), (32, 32)))
def test_triton_sel_parity_of_column_chunks(block_d, block_dv):
    for load in {config.load for config in small_covering()}:
        config = next(c for c in small_covering() if c.load == load and c.splits > 1)
        check(Case(RANGES, S_KV, launch=replace(config, block_d=block_d, block_dv=block_dv)))
