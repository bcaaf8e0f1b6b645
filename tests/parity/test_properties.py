"""Hypothesis over span layouts: it draws integers, a seed makes the tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from .fitting import check_drawn
from .launches import small_covering
from .parity_case import OUT_OF_RANGE, OUT_OF_RANGE_64, Case, check, here, rows

MAX_S_KV, MAX_L, MAX_SPANS, MAX_ROWS = here(5000, 120), here(4096, 160), here(64, 24), here(8, 4)
# On a GPU a new dtype means new kernels for every launch that a layout leads to: the examples below cover the others.
DTYPE = st.sampled_from(here((torch.bfloat16,), (torch.bfloat16, torch.float16, torch.float32)))
INDEX = st.sampled_from((torch.int32, torch.int64))


Spans = list[tuple[int, int]]


def row_from_runs(runs: list[tuple[int, int, int, int]], S_kv: int, max_spans: int, max_L: int) -> Spans:
    """Expand runs (start, length, step, count): step = length touches, less overlaps, 0 repeats, below 0 goes back.

    Stops where the row would have more than max_spans spans or max_L tokens.
    """
    spans: Spans = []
    L = 0
    for start, length, step, count in runs:
        for i in range(count):
            span = (start + i * step, start + i * step + length)
            L += max(0, min(span[1], S_kv) - max(span[0], 0))
            if max_L < L or len(spans) == max_spans:
                return spans
            spans.append(span)
    return spans


@st.composite
def cases(draw: st.DrawFn, max_spans: int = MAX_SPANS) -> Case:
    S_kv = draw(st.integers(1, MAX_S_KV))
    runs = st.tuples(
        st.integers(-3, S_kv + 3),
        st.integers(-2, 9) | st.sampled_from([16, 64, 65, 128, S_kv]) | st.integers(0, S_kv),
        st.integers(-4, 140),
        st.integers(1, 4) | st.integers(1, max_spans),
    )
    a_row = st.tuples(st.lists(runs, max_size=5), st.lists(st.sampled_from(OUT_OF_RANGE), max_size=2))
    drawn = []
    for runs_of_row, wild in draw(st.lists(a_row, min_size=1, max_size=MAX_ROWS)):
        drawn.append(row_from_runs(runs_of_row, S_kv, max_spans - 2, MAX_L) + (wild if S_kv <= MAX_L // 2 else []))
    dtype, index = draw(DTYPE), draw(INDEX)
    return Case(rows(*drawn, dtype=index), S_kv, dtype=dtype, seed=draw(st.integers(0, 99)))


@pytest.mark.contract("spans")
@settings(max_examples=here(300, 60))
@given(cases())
@example(Case(rows([], [], []), 5))  # no spans
@example(Case(rows([(0, 0)], [(4, 4)]), 5))  # all rows empty
@example(Case(rows([(0, 1)], [(4, 5)], [(2, 3)]), 5, dtype=torch.float16))  # single tokens
@example(Case(rows([(0, 1)]), 1, dtype=torch.float32))
@example(Case(rows([(0, 8), (8, 16), (16, 17)]), 17))  # touching
@example(Case(rows([(0, 9), (3, 12), (3, 12), (3, 12)], [(0, 12)] * 5), 12))  # overlapping, duplicated
@example(Case(rows([(9, 12), (0, 3), (5, 7)]), 12, dtype=torch.float32))  # unordered
@example(Case(rows([(0, here(4096, 130))], [(0, 64)], [(0, 63)], [(1, 66)]), here(4096, 130)))  # to S_kv, around a tile
@example(Case(rows([(i, i + 1) for i in range(0, 128, 2)], [(0, 2)]), 128))  # 64 single tokens
@example(Case(rows(OUT_OF_RANGE, [(0, 9)]), 9))
@example(Case(rows(OUT_OF_RANGE + OUT_OF_RANGE_64, OUT_OF_RANGE_64, dtype=torch.int64), 9))
def test_triton_sel_parity_of_any_span_layout(case):
    check_drawn(case)


@settings(max_examples=here(60, 12))
@given(cases(), st.integers(0, 99))
def test_triton_sel_parity_of_any_span_layout_in_any_variant(case, which):
    configs = [c for c in small_covering() if c.load != "tma"]
    check(replace(case, dtype=torch.bfloat16, launch=configs[which % len(configs)]))


@pytest.mark.contract("spans")
@settings(max_examples=here(20, 3))
@given(cases(max_spans=here(1024, 150)))
@example(Case(rows([(3 * i, 3 * i + 2) for i in range(here(1024, 100))], [(0, 5)]), 3 * 1024))
def test_triton_sel_parity_of_very_many_spans(case):
    check_drawn(case)
