"""More of the contract, for kernels that --sel-kernel gives: blocks as selection makes them, overlaps, the scale."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nsa_sel import spans

from .fitting import block_rows, block_size, check_drawn, ordinary, positions, usual
from .parity_case import DTYPES, Case, check, here, rows

# S, the context (both in blocks) and the blocks that each of S tokens selects; it sees its own block up to itself.
LAYOUTS = {
    "one block": (1, 4.0, [0]),
    "the own block": (1, 4.0, ["own"]),
    "adjacent blocks": (1, 8.0, [2, 3, 4]),
    "scattered blocks in any order": (1, here(64.0, 12.0), [7, 0, "own", 3, 9]),
    "many blocks": (1, here(64.0, 18.0), [*range(here(62, 16)), "own"]),
    "prefill": (here(3.5, 2.2), here(3.5, 2.2), [0, "own", 1]),
    "prefill of a later part": (here(1.3, 0.2), 4.6, [0, "own", 2]),
    "a context shorter than a block": (1, 0.4, [0]),
}


def select(block: int, S: int, S_kv: int, chosen: list[int | str]) -> torch.Tensor:
    """Return ranges [1, S, 1, n, 2] of the blocks that each of the last S tokens selects; none that lies after it."""
    sees = positions(S, S_kv)
    own = (sees - 1) // block  # [1, S, 1, 1]
    blocks = torch.cat([own if number == "own" else torch.full_like(own, number) for number in chosen], -1)
    # "own" may be one of the numbers, which then stands there once.
    twice = torch.tensor([number != "own" for number in chosen]) & (blocks == own) if "own" in chosen else blocks < 0
    return spans.block_ranges(torch.where(twice | (blocks > own), -1, blocks), block, sees)


@pytest.mark.contract
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_triton_sel_parity_of_block_layouts(layout, dtype):
    block = block_size()
    S, context, chosen = LAYOUTS[layout]
    S, S_kv = (S if isinstance(S, int) else int(S * block), max(int(context * block), 1))
    check(Case(select(block, S, S_kv, chosen), S_kv, **usual(dtype=dtype)))


@pytest.mark.contract
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_sel_parity_of_several_batches_and_groups_of_blocks(dtype):
    ranges, S_kv = block_rows(block_size())
    rolled = [ranges.roll(by, -2) for by in range(6)]  # the order of a row's blocks differs
    check(Case(torch.stack(rolled, 2).view(1, 5, 6, 3, 2).repeat(2, 1, 1, 1, 1), S_kv, **usual(dtype=dtype)))


@st.composite
def block_cases(draw: st.DrawFn) -> tuple[int, int, int, list[list[int]]]:
    """Draw the tokens S, the part of the last block that the context fills, its whole blocks, and each row's blocks."""
    n_blocks = draw(st.integers(1, here(40, 8)))
    S = draw(st.integers(1, 4))
    row = st.lists(st.integers(0, n_blocks), unique=True, max_size=here(32, 6))
    chosen = draw(st.lists(row, min_size=S, max_size=S))
    return S, draw(st.integers(0, 1000)), n_blocks, chosen


@pytest.mark.contract
@settings(max_examples=here(100, 20))
@given(block_cases(), st.integers(0, 99))
@example((1, 0, 1, [[]]), 0)  # none
@example((4, 999, 2, [[2, 0], [1], [0], [2]]), 0)
def test_triton_sel_parity_of_any_blocks(drawn, seed):
    S, part, n_blocks, chosen = drawn
    block = block_size()
    S_kv = n_blocks * block + part * block // 1000
    S = min(S, S_kv)
    most = max(map(len, chosen))
    blocks = torch.tensor([numbers + [-1] * (most - len(numbers)) for numbers in chosen[:S]], dtype=torch.int64)
    ranges = spans.block_ranges(blocks.view(1, S, 1, most), block, positions(S, S_kv))
    check_drawn(Case(ranges, S_kv, seed=seed))


@pytest.mark.contract
def test_triton_sel_parity_of_a_block_selected_twice():
    block = block_size()
    check(Case(select(block, 1, 3 * block, [1, 0, 1]), 3 * block, **usual()))


@pytest.mark.contract("spans")
@pytest.mark.parametrize("overlapping", ([(5, 25), (10, 20), (10, 20)], [(0, 40), (3, 4)]))
def test_triton_sel_parity_of_overlapping_spans(overlapping):
    check(Case(rows(overlapping, [(0, 9)]), 40, **usual()))


@pytest.mark.contract
@pytest.mark.parametrize("scale", (0.3, 1.0))
def test_triton_sel_parity_of_the_caller_s_scale(scale):
    check(ordinary(rows([(0, 9), (30, 31)], [(5, 25)]), 40, scale=scale))
