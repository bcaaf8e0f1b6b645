"""What a range means, against plain Python lists: nothing here is checked against spans.py itself."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nsa_sel import spans

INT32 = torch.iinfo(torch.int32)
INT64 = torch.iinfo(torch.int64)
WILD = [(-5, 3), (4, INT32.max), (INT32.min, INT32.max), (INT32.min, 0), (-1, -1), (3, -7), (INT32.max, INT32.max)]
WILD_64 = [(2**32, 2**32 + 3), (-(2**40), 2), (1, 2**40), (INT64.min, INT64.max), (2**31 + 1, 2**31 + 4)]


def tokens(row: list[tuple[int, int]], S_kv: int) -> list[int]:
    """Return the packed row: each span's tokens that exist, in the order of the spans."""
    return [t for start, end in row for t in range(max(start, 0), min(end, S_kv))]


def as_ranges(rows: list[list[tuple[int, int]]], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Return ranges [1, rows, 1, n_spans, 2], rows padded with empty spans."""
    n_spans = max(map(len, rows))
    padded = [row + [(0, 0)] * (n_spans - len(row)) for row in rows]
    return torch.tensor(padded, dtype=dtype).view(1, len(rows), 1, n_spans, 2)


def check_against_lists(rows: list[list[tuple[int, int]]], S_kv: int, dtype: torch.dtype, extra: int = 0) -> None:
    ranges = as_ranges(rows, dtype)
    packed = [tokens(row, S_kv) for row in rows]
    starts, ends = spans.clamp(ranges, S_kv)
    assert starts.dtype == ends.dtype == torch.int64
    assert starts.shape == ends.shape == ranges.shape[:4]
    for row, (row_starts, row_ends) in enumerate(zip(*(x.flatten(0, 2).tolist() for x in (starts, ends)), strict=True)):
        bounds = list(zip(row_starts, row_ends, strict=True))
        assert all(0 <= start <= end <= S_kv for start, end in bounds)
        assert [t for start, end in bounds for t in range(start, end)] == packed[row]
    assert spans.lengths(ranges, S_kv).flatten().tolist() == [len(row) for row in packed]

    max_len = max(map(len, packed)) + extra
    index, valid = spans.token_index(ranges, S_kv, max_len)
    assert index.dtype == torch.int64
    assert valid.dtype == torch.bool
    assert index.shape == valid.shape == (*ranges.shape[:3], max_len)
    for row, (row_index, row_valid) in enumerate(zip(*(x.flatten(0, 2).tolist() for x in (index, valid)), strict=True)):
        L = len(packed[row])
        assert row_valid == [True] * L + [False] * (max_len - L)
        assert row_index[:L] == packed[row]
        assert set(row_index[L:]) <= (set(packed[row]) or set(range(S_kv))), "padding must repeat a token of the row"


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[list[tuple[int, int]]], int, int]:
    S_kv = draw(st.integers(1, 40))
    edge = st.integers(-3, S_kv + 3) | st.sampled_from([INT32.min, INT32.max, S_kv, 0])
    rows = draw(st.lists(st.lists(st.tuples(edge, edge), max_size=6), min_size=1, max_size=5))
    return rows, S_kv, draw(st.integers(0, 3))


@settings(derandomize=True, deadline=None, max_examples=150)
@given(layouts(), st.sampled_from((torch.int32, torch.int64)))
@example(([[]], 1, 0), torch.int32)  # no span at all
@example(([[], [(0, 1)]], 1, 2), torch.int64)
@example(([[(2, 2), (3, 1)]], 4, 3), torch.int32)  # only empty spans
@example(([[(0, 4), (0, 4), (2, 6)]], 8, 0), torch.int64)  # duplicated and overlapping
@example(([[(5, 8), (0, 2), (2, 5)]], 8, 1), torch.int32)  # touching, unordered
@example(([WILD, [(0, 9)]], 9, 0), torch.int32)
@example(([WILD + WILD_64], 9, 1), torch.int64)
def test_clamp_lengths_and_token_index_match_plain_lists(layout, dtype):
    rows, S_kv, extra = layout
    check_against_lists(rows, S_kv, dtype, extra)


def test_every_pair_of_spans_over_four_tokens():
    edges = list(itertools.product(range(-1, 6), repeat=2))
    rows = [[first, second] for first in edges for second in edges]
    check_against_lists(rows, 4, torch.int32)


def test_rows_belong_to_their_batch_token_and_group():
    ranges = torch.arange(2 * 3 * 4 * 2).view(2, 3, 4, 1, 2)  # every row another span of one token
    index, valid = spans.token_index(ranges, 100, 1)
    assert valid.all()
    assert index.flatten().tolist() == list(range(0, 48, 2))


def test_rows_of_one_length_need_no_padding():
    rows = [[(0, 3), (7, 9)], [(9, 10), (1, 5)]]
    index, valid = spans.token_index(as_ranges(rows), 10, 5, ragged=False)
    assert valid.all()
    assert index.flatten(0, 2).tolist() == [tokens(row, 10) for row in rows]


def test_a_batch_without_rows_or_spans_is_valid():
    for shape in ((0, 3, 2, 4, 2), (2, 0, 2, 4, 2), (2, 3, 2, 0, 2)):
        ranges = torch.zeros(shape, dtype=torch.int32)
        assert spans.lengths(ranges, 8).tolist() == torch.zeros(shape[:3], dtype=torch.int64).tolist()
        index, valid = spans.token_index(ranges, 8, 2)
        assert index.shape == valid.shape == (*shape[:3], 2)
        assert not valid.any()
        spans.validate(ranges, 8, 0, 8)


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize("span", ((-1, 2), (0, 9), (9, 9), (INT32.min, 4), (0, INT32.max)))
def test_validate_names_the_first_bad_row_and_span(span, dtype):
    ranges = torch.tensor([0, 8], dtype=dtype).expand(2, 3, 2, 4, 2).clone()
    spans.validate(ranges, 8)
    ranges[1, 2, 0, 3] = torch.tensor(span)
    ranges[1, 2, 1, 0] = -4  # a later one
    with pytest.raises(ValueError, match=r"ranges: value is .*row \(b=1, s=2, g=0\), span 3, expected") as caught:
        spans.validate(ranges, 8)
    assert f"[{span[0]}, {span[1]})" in str(caught.value)


def test_validate_accepts_an_end_before_its_start():
    spans.validate(as_ranges([[(5, 2), (8, 8), (0, 0)]]), 8, 0, 0)


def test_validate_checks_both_length_hints():
    ranges = as_ranges([[(0, 4)], [(0, 2)], [(1, 8)]])
    spans.validate(ranges, 8, 2, 7)
    spans.validate(ranges, 8, 0, 100)
    with pytest.raises(ValueError, match=r"min_len: value is 3, expected at most 2.*row \(b=0, s=1, g=0\)"):
        spans.validate(ranges, 8, 3, 7)
    with pytest.raises(ValueError, match=r"max_len: value is 6, expected at least 7.*row \(b=0, s=2, g=0\)"):
        spans.validate(ranges, 8, 2, 6)


def test_dense_rows_are_one_full_span_each():
    q, k, v = torch.randn(3, 2, 8), torch.randn(3, 5, 8), torch.randn(3, 5, 4)
    q_api, k_api, v_api, ranges = spans.dense_rows(q, k, v)
    assert q_api.shape == (3, 1, 1, 2, 8)
    assert torch.equal(q_api[:, 0, 0], q)
    for row in range(3):
        assert ranges[row].flatten().tolist() == [0, 5]
        assert torch.equal(k_api[row, 0], k[row])
        assert torch.equal(v_api[row, 0], v[row])


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_varlen_rows_are_the_slices_between_cu_seqlens(dtype):
    cu = [0, 3, 3, 7, 8]
    q, k, v = torch.randn(4, 2, 8), torch.randn(8, 8), torch.randn(8, 4)
    q_api, k_api, v_api, ranges = spans.varlen_rows(q, k, v, torch.tensor(cu, dtype=dtype))
    assert q_api.shape == (1, 4, 1, 2, 8)
    assert ranges.dtype == dtype
    assert torch.equal(q_api[0, :, 0], q)
    for row in range(4):
        start, end = ranges[0, row, 0, 0].tolist()
        assert torch.equal(k_api[0, 0, start:end], k[cu[row] : cu[row + 1]])
        assert torch.equal(v_api[0, 0, start:end], v[cu[row] : cu[row + 1]])


def test_block_ranges_are_blocks_cut_at_the_context():
    blocks = torch.tensor([0, 2, -1, 1, 3]).view(1, 1, 1, 5).expand(2, 1, 1, 5)
    contexts = [41, 64]
    for context in (torch.tensor(contexts).view(2, 1, 1, 1), 41, 64):
        ranges = spans.block_ranges(blocks, 16, context)
        for b in range(2):
            limit = context if isinstance(context, int) else contexts[b]
            whole = [range(16 * n, 16 * n + 16) if n >= 0 else () for n in (0, 2, -1, 1, 3)]
            expected = [[t for t in block if t < limit] for block in whole]
            assert [list(range(*span)) for span in ranges[b, 0, 0].tolist()] == expected
