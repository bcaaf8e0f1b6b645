"""What a range means, against plain Python lists: nothing here is checked against spans.py itself."""

from __future__ import annotations

import itertools
from unittest import mock

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
    for index, valid in both_ways(ranges, S_kv, max_len):
        assert index.dtype == torch.int64
        assert valid.dtype == torch.bool
        assert index.shape == valid.shape == (*ranges.shape[:3], max_len)
        assert valid.flatten(0, 2).tolist() == [[at < len(row) for at in range(max_len)] for row in packed]
        for row, row_index in zip(packed, index.flatten(0, 2).tolist(), strict=True):
            padding = row_index[len(row) :]
            assert row_index[: len(row)] == row
            if row:
                assert set(padding) <= {row[-1]}
            else:
                assert all(0 <= t < S_kv for t in padding)


def both_ways(ranges: torch.Tensor, S_kv: int, max_len: int, **options: bool) -> list[tuple[torch.Tensor, ...]]:
    """Return token_index's result as called and as torch.compile traces it, where it takes another path."""
    results = []
    for compiling in (False, True):
        with mock.patch.object(torch.compiler, "is_compiling", return_value=compiling):
            results.append(spans.token_index(ranges, S_kv, max_len, **options))
    return results


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
    for index, valid in both_ways(ranges, 100, 1):
        assert valid.all()
        assert index.flatten().tolist() == list(range(0, 48, 2))


def test_rows_of_one_length_need_no_padding():
    rows = [[(0, 3), (7, 9)], [(9, 10), (1, 5)]]
    for index, valid in both_ways(as_ranges(rows), 10, 5, ragged=False):
        assert valid.all()
        assert index.flatten(0, 2).tolist() == [tokens(row, 10) for row in rows]


def test_rows_that_break_the_promise_of_one_length_still_index_the_context():
    rows = [[(0, 3), (7, 9)], [(9, 10), (8, 10)], [(10, 10), (4, 4)]]
    for index, valid in both_ways(as_ranges(rows), 10, 5, ragged=False):
        assert valid.sum(-1).flatten().tolist() == [5, 3, 0]
        assert 0 <= int(index.min()) <= int(index.max()) < 10
        assert index[0, :2, 0, :3].tolist() == [[0, 1, 2], [9, 8, 9]]


@pytest.mark.filterwarnings("default")  # what the compiler warns of is not ours
@pytest.mark.parametrize("ragged", (True, False))
def test_compiled_token_index_matches_plain_lists(ragged):
    rows = [[(6, 9), (0, 2), (1, 4)], [(2, 2), (0, 8), (5, 3)]]
    compiled = torch.compile(spans.token_index, fullgraph=True, backend="eager")
    index, valid = compiled(as_ranges(rows), S_kv=9, max_len=8, ragged=ragged)
    assert valid.all()
    assert index.flatten(0, 2).tolist() == [tokens(row, 9) for row in rows]


def test_nothing_is_searched_in_a_compiled_graph_nor_for_a_single_span():
    several, single = as_ranges([[(6, 9), (0, 2)], [(2, 2), (0, 5)]]), as_ranges([[(6, 9)], [(2, 7)]])
    with mock.patch.object(torch, "searchsorted", side_effect=AssertionError):
        with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
            spans.token_index(several, 9, 5)
        spans.token_index(single, 9, 5)


def test_a_batch_without_rows_or_spans_is_valid():
    for shape in ((0, 3, 2, 4, 2), (2, 0, 2, 4, 2), (2, 3, 2, 0, 2)):
        ranges = torch.zeros(shape, dtype=torch.int32)
        assert spans.lengths(ranges, 8).tolist() == torch.zeros(shape[:3], dtype=torch.int64).tolist()
        index, valid = spans.token_index(ranges, 8, 2)
        assert index.shape == valid.shape == (*shape[:3], 2)
        assert (index.dtype, valid.dtype) == (torch.int64, torch.bool)
        assert not index.any()
        assert not valid.any()
        spans.validate(ranges, 8, 0, 8)


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize("span", ((-1, 2), (0, 9), (9, 9), (8, -1), (INT32.min, 4), (0, INT32.max)))
def test_validate_names_the_first_bad_row_and_span(span, dtype):
    ranges = torch.tensor([0, 8], dtype=dtype).expand(2, 3, 2, 4, 2).clone()
    spans.validate(ranges, 8)
    ranges[1, 2, 0, 3] = torch.tensor(span)
    ranges[1, 2, 1, 0] = -4  # a later one
    with pytest.raises(ValueError, match=r"ranges: value is .*row \(b=1, s=2, g=0\), span 3, expected") as caught:
        spans.validate(ranges, 8)
    assert f"[{span[0]}, {span[1]})" in str(caught.value)


def test_a_context_past_int32_is_no_limit_to_int32_ranges():
    ranges = as_ranges([[(5, INT32.max)]], torch.int32)
    spans.validate(ranges, 2**33, 0, 2**31)
    starts, ends = spans.clamp(ranges, 2**33)
    assert (starts.item(), ends.item()) == (5, 2**31 - 1)


def test_validate_accepts_an_end_before_its_start():
    spans.validate(as_ranges([[(5, 2), (8, 8), (0, 0)]]), 8, 0, 0)


def test_validate_checks_both_length_hints():
    ranges = as_ranges([[(0, 4)], [(0, 2)], [(1, 8)]])
    spans.validate(ranges, 8, 2, 7)
    spans.validate(ranges, 8, 0, 100)
    spans.validate(ranges, 8, min_len=2)
    spans.validate(ranges, 8, max_len=7)
    with pytest.raises(ValueError, match=r"min_len: value is 3, expected at most 2.*row \(b=0, s=1, g=0\)"):
        spans.validate(ranges, 8, 3, 7)
    with pytest.raises(ValueError, match=r"max_len: value is 6, expected at least 7.*row \(b=0, s=2, g=0\)"):
        spans.validate(ranges, 8, 2, 6)
    with pytest.raises(ValueError, match=r"min_len: value is 5, expected at most 4.*row \(b=0, s=0, g=0\)"):
        spans.validate(ranges, 8, 5, 6)  # both hints are wrong, and two rows are too short
    with pytest.raises(ValueError, match=r"max_len: value is 1, expected at least 4.*row \(b=0, s=0, g=0\)"):
        spans.validate(ranges, 8, 0, 1)
    with pytest.raises(ValueError, match=r"ranges: value is \[1, 8\)"):
        spans.validate(ranges, 7, min_len=3)  # a span outside the context and a row that is too short
    with pytest.raises(ValueError, match="min_len: value is 3"):
        spans.validate(ranges, 8, min_len=3)
    with pytest.raises(ValueError, match="max_len: value is 6"):
        spans.validate(ranges, 8, max_len=6)


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


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_block_ranges_begin_where_the_sequence_of_their_row_does(dtype):
    blocks = torch.tensor([[0, 2, -1], [1, 5, 0]], dtype=dtype).view(1, 2, 1, 3)
    context = torch.tensor([41, 20]).view(1, 2, 1, 1)
    for offset, firsts in ((torch.tensor([100, 7]).view(1, 2, 1, 1), (100, 7)), (9, (9, 9)), (0, (0, 0))):
        ranges = spans.block_ranges(blocks, 16, context, offset=offset)
        assert ranges.dtype == torch.int32
        for s, (first, limit) in enumerate(zip(firsts, (41, 20), strict=True)):
            for span, n in zip(ranges[0, s, 0].tolist(), blocks[0, s, 0].tolist(), strict=True):
                inside = [t for t in range(16 * n, 16 * n + 16) if 0 <= t < limit]
                assert list(range(*span)) == [first + t for t in inside]


@given(st.lists(st.integers(-2, 5), max_size=9))
def test_a_block_that_a_row_names_twice_counts_once_if_asked_for(named):
    blocks = torch.tensor(named, dtype=torch.int32).view(1, 1, 1, -1).expand(2, 3, 1, -1)
    first_only = [n if n not in named[:i] else -1 for i, n in enumerate(named)]
    want = spans.block_ranges(torch.tensor(first_only, dtype=torch.int32).view(1, 1, 1, -1).expand(2, 3, 1, -1), 4, 21)
    assert torch.equal(spans.block_ranges(blocks, 4, 21, unique=True), want)
    twice = spans.block_ranges(blocks, 4, 21)
    tokens = [t for n in named if n >= 0 for t in range(4 * n, 4 * n + 4) if t < 21]
    assert spans.lengths(twice, 21)[0, 0, 0].item() == len(tokens)


@pytest.mark.parametrize("context", (0, 41))
def test_a_block_that_was_not_selected_is_an_empty_span_of_every_context(context):
    ranges = spans.block_ranges(torch.tensor([-1, -7]).view(1, 1, 1, 2), 16, context)
    spans.validate(ranges, context, 0, 0)


def test_block_numbers_past_int32_positions_are_beyond_every_context():
    ranges = spans.block_ranges(torch.tensor([2**26], dtype=torch.int32).view(1, 1, 1, 1), 64, 2**31 - 1)
    assert ranges.dtype == torch.int32
    assert ranges.flatten().tolist() == [2**31 - 1] * 2
    assert spans.lengths(ranges, 2**31 - 1).item() == 0


def attended(blocks: torch.Tensor, block_size: int, S_kv: int) -> list[list[int]]:
    """Return the tokens that a kernel attends to which takes blocks, row by row, in plain Python."""
    S, G = blocks.shape[1:3]
    limits = [S_kv - S + s + 1 for _ in range(blocks.shape[0]) for s in range(S) for _ in range(G)]
    return [
        [t for n in row if n >= 0 for t in range(n * block_size, (n + 1) * block_size) if t < limit]
        for row, limit in zip(blocks.flatten(0, 2).tolist(), limits, strict=True)
    ]


@given(st.data())
def test_blocks_that_became_ranges_become_those_blocks_again(data):
    B, S, G, n_spans = (data.draw(st.integers(1, 3)) for _ in range(4))
    size, S_kv = data.draw(st.integers(1, 5)), data.draw(st.integers(3, 23))
    numbers = st.integers(-1, -(-S_kv // size))
    count = B * S * G * n_spans
    flat = data.draw(st.lists(numbers, min_size=count, max_size=count))
    blocks = torch.tensor(flat).view(B, S, G, n_spans)
    position = torch.arange(S_kv - S, S_kv).view(1, S, 1, 1)
    ranges = spans.block_ranges(blocks, size, position + 1)
    again = spans.ranges_to_blocks(ranges, size, S_kv)
    assert again.dtype == torch.int32
    rows = [[n for n in row if n >= 0] for row in again.flatten(0, 2).tolist()]
    seen = [
        [n for n in row if n >= 0 and n * size <= at]
        for row, at in zip(blocks.flatten(0, 2).tolist(), position.expand(B, S, G, 1).flatten().tolist(), strict=True)
    ]
    assert rows == seen and again.shape == (B, S, G, max(map(len, seen)))
    assert attended(again, size, S_kv) == [tokens(row, S_kv) for row in ranges.flatten(0, 2).tolist()]


def test_a_span_of_several_blocks_and_an_overlap_are_blocks_too():
    ranges = as_ranges([[(0, 0), (16, 48), (0, 16)], [(32, 61), (48, 61), (9, 3)]])
    blocks = spans.ranges_to_blocks(ranges.transpose(0, 1).contiguous(), 16, 61)
    assert blocks.squeeze().tolist() == [[1, 2, 0], [2, 3, 3]]
    assert spans.ranges_to_blocks(as_ranges([[(0, 0)]]), 16, 61).shape == (1, 1, 1, 0)
    assert spans.ranges_to_blocks(torch.zeros(0, 2, 1, 3, 2, dtype=torch.int32), 16, 61).shape == (0, 2, 1, 0)


@pytest.mark.parametrize(
    ("span", "S_kv", "why"),
    [
        ((8, 32), 64, "begins inside a block"),
        ((16, 40), 64, "ends inside a block"),
        ((16, 64), 64, "the first token sees 63 only"),
        ((48, 64), 64, "the first token sees 63 only"),
        ((0, 63), 64, "its second token sees more of this block"),
    ],
)
def test_ranges_that_are_no_blocks_name_the_first_row_and_span(span, S_kv, why):
    ranges = as_ranges([[(0, 16), (0, 0)], [(0, 16), (0, 0)]])  # S = 2
    row = 1 if span == (0, 63) else 0
    ranges[0, row, 0, 1] = torch.tensor(span)
    pattern = rf"ranges: value is \[{span[0]}, {span[1]}\) in row \(b=0, s={row}, g=0\), span 1, expected whole blocks"
    with pytest.raises(ValueError, match=pattern):
        spans.ranges_to_blocks(ranges, 16, S_kv)
