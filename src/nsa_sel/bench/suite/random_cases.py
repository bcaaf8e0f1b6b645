"""Seeded random cases over the whole range that the kernel supports: the matrix `random`.

Source: docs/measuring.md, "Off the grid".
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...kernel.launch_config import MAX_HEADS, MAX_WIDTH
from . import cases
from .cases import Case
from .distributions import LAWS, LONGEST_OVER_MEAN, RAGGED_RATIO

RANDOM = "random"  # the matrix, and the family of its cases
MATRICES = (*cases.MATRICES, RANDOM)
SEED = 1
MOST_SPANS = 256
MOST_BYTES = 8 * 10**9  # of a case's packed rows, and of its K and V
ELEMENT_BYTES = 2  # of bf16 and fp16, which draw the same cases
KV_GROUPS = 4  # powers of two, from 1 on
BLOCKS = (16, 32, 64, 128)  # tokens of a block in prefill


@dataclass(frozen=True)
class Range:
    """Bound what is drawn. rows: N. tokens: L of the longest row. queries: N of prefill. count: cases, by default."""

    rows: int
    tokens: int
    queries: int
    count: int


WHOLE = Range(rows=16_384, tokens=8_192, queries=16_384, count=300)
SMALL = Range(rows=16, tokens=512, queries=64, count=100)  # what Triton's interpreter computes in a second per case


def add_options(add: Callable[..., object]) -> None:
    """Add --sel-seed and --sel-count to a parser, by its `add_argument` or, of pytest's, `addoption`."""
    add("--sel-seed", type=int, metavar="S", help=f"of --sel-matrix {RANDOM} (default: {SEED})")
    add("--sel-count", type=int, metavar="M", help=f"cases of --sel-matrix {RANDOM} (default: {WHOLE.count})")


def asked_for(matrix: str | None, seed: int | None, count: int | None) -> dict[str, int]:
    """Return the seed and the count of the matrix `random`; nothing for any other.

    Raises: ValueError if they are given with another matrix, or the count is below 1.
    """
    if matrix != RANDOM:
        for name, value in (("--sel-seed", seed), ("--sel-count", count)):
            if value is not None:
                raise ValueError(f"{name}: is said of --sel-matrix {RANDOM}, and of no other")
        return {}
    asked = {"seed": SEED if seed is None else seed, "count": here().count if count is None else count}
    if asked["count"] < 1:
        raise ValueError(f"--sel-count: value is {count}, expected at least 1")
    return asked


def of_matrix(
    matrix: str, dtype: str = "bf16", family: str | None = None, seed: int | None = None, count: int | None = None
) -> list[Case]:
    """Return the cases of any of MATRICES; family, dtype: as of `cases.matrix`. seed, count: of the matrix `random`.

    Raises: ValueError for what does not exist, or does not go together.
    """
    asked = asked_for(matrix, seed, count)
    if not asked:
        return cases.matrix(matrix, dtype, family)
    if family is not None:
        raise ValueError(f"--sel-family: is no choice within the matrix {RANDOM}; -k chooses by what stands in an id")
    return draw(**asked, dtype=dtype, within=here())


def here() -> Range:
    """Return the range that this machine can afford: the whole on a GPU, whichever it is."""
    return WHOLE if torch.cuda.is_available() else SMALL


def draw(seed: int, count: int, dtype: str = "bf16", within: Range = WHOLE) -> list[Case]:
    """Return the first `count` cases of a seed: the same shapes for every dtype, and on every machine.

    Of `random.Random` only `random()` is used, which Python promises to keep.
    """
    dice = random.Random(seed)
    found: dict[str, Case] = {}
    while len(found) < count:
        case = _prefill(dice, dtype, within) if dice.random() < 0.25 else _spans(dice, dtype, within)
        if case is not None:
            found.setdefault(case.id, case)
    return list(found.values())


def _spans(dice: random.Random, dtype: str, within: Range) -> Case | None:
    """Draw a case of any spans, two in three with S = 1, the others with 2 to 8; None if it is too large."""
    S = 1 if dice.random() < 2 / 3 else 2 + int(7 * dice.random())
    H, D, Dv = _heads_and_widths(dice)
    wanted = _log_uniform(dice, 1, within.rows)
    G = min(_power_of_2(dice), wanted)
    N = max(1, wanted // (S * G)) * S * G
    # Rows as few as these have no longest and shortest one to speak of.
    law = _one_of(dice, LAWS if N >= RAGGED_RATIO else [law for law in LAWS if law != "ragged"])
    least, most = (8, int(within.tokens / LONGEST_OVER_MEAN)) if law == "ragged" else (1, within.tokens)
    L = _log_uniform(dice, least, most)
    case = Case(RANDOM, dtype, f"{law}{_log_uniform(dice, 1, min(MOST_SPANS, L))}", H, D, Dv, L, N, S=S, G=G)
    S_kv = case.longest * _log_uniform(dice, 1, 16)
    return None if within.rows < N else _unless_too_large(replace(case, S_kv=S_kv, name=f"S{S}-G{G}-t{S_kv}"))


def _prefill(dice: random.Random, dtype: str, within: Range) -> Case | None:
    """Draw a case of causal blocks for every token of a sequence; None if it is too large."""
    H, D, Dv = _heads_and_widths(dice)
    block = _one_of(dice, BLOCKS)
    n_spans = _log_uniform(dice, 1, min(MOST_SPANS, max(1, within.tokens // block)))
    layout = "local" if dice.random() < 0.5 and n_spans >= 3 else "random"
    S = block * _log_uniform(dice, n_spans, max(n_spans, within.queries // block))
    G = min(_power_of_2(dice), max(1, within.queries // S))
    N = S * G * _log_uniform(dice, 1, max(1, within.queries // (S * G)))
    case = Case(RANDOM, dtype, layout, H, D, Dv, n_spans * block, N, S, G, S_kv=S, block=block, name=f"S{S}-G{G}")
    return None if within.queries < N or S < 2 else _unless_too_large(case)


def _unless_too_large(case: Case) -> Case | None:
    tokens = max(case.N * case.longest, case.B * case.G * case.S_kv)
    return case if tokens * (case.D + case.Dv) * ELEMENT_BYTES <= MOST_BYTES else None


def _heads_and_widths(dice: random.Random) -> tuple[int, int, int]:
    """Draw H, D and Dv; D and Dv are the same in every second case."""
    H, D, Dv = _log_uniform(dice, 1, MAX_HEADS), _width(dice), _width(dice)
    return H, D, D if dice.random() < 0.5 else Dv


def _width(dice: random.Random) -> int:
    return 16 * round(_log_uniform(dice, 16, MAX_WIDTH) / 16)


def _log_uniform(dice: random.Random, least: int, most: int) -> int:
    """Draw an integer from least to most whose logarithm is uniform."""
    return int(least * ((most + 1) / least) ** dice.random())


def _power_of_2(dice: random.Random) -> int:
    return 2 ** int(KV_GROUPS * dice.random())


def _one_of(dice: random.Random, choices: Sequence[Any]) -> Any:
    return choices[int(len(choices) * dice.random())]
