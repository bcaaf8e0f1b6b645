"""Ranges over a paged cache, against plain Python lists, and the views of both page layouts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from nsa_sel import spans

PAGES = 12  # of the cache
LAYOUTS = tuple(spans.PAGE_LAYOUTS)


def pieces(
    named: list[int], block_size: int, table: list[int], page_size: int, context: int, unique: bool
) -> list[list[tuple[int, int]]]:
    """Return what each page adds to a row, page after page, as pairs of page and place in it; maybe nothing."""
    found = []
    for i, block in enumerate(named):
        chosen = block >= 0 and not (unique and block in named[:i])
        tokens = [t for t in range(block * block_size, (block + 1) * block_size) if chosen and t < context]
        number = most_pages(block_size, page_size)
        first = tokens[0] // page_size if tokens else 0
        for page in range(first, first + number):
            real = page < len(table) and table[page] >= 0
            found.append([(table[page], t % page_size) for t in tokens if real and t // page_size == page])
    return found


def most_pages(block_size: int, page_size: int) -> int:
    """Return the most pages that a block touches, by trying every block that begins elsewhere in a page."""
    starts = (n * block_size for n in range(page_size))
    return max((start + block_size - 1) // page_size - start // page_size + 1 for start in starts)


def in_cache(page: int, place: int, g: int, G: int, page_size: int, layout: str) -> int:
    """Return the token of the one long K that `paged_view` shows to group g."""
    return page * page_size + place if layout == "NHD" else (page * G + g) * page_size + place


@st.composite
def calls(draw: st.DrawFn) -> dict:
    B, S, G, n = (draw(st.integers(1, 2)) for _ in range(4))
    block_size, page_size = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    n_pages = draw(st.integers(1, 6))

    def lists(numbers: st.SearchStrategy[int], *sizes: int) -> torch.Tensor:
        count = torch.Size(sizes).numel()
        return torch.tensor(draw(st.lists(numbers, min_size=count, max_size=count)), dtype=torch.int64).view(sizes)

    return {
        "blocks": lists(st.integers(-2, 8), B, S, G, n + 2),
        "block_size": block_size,
        # Often one page behind the other, now and then none.
        "block_table": (lists(st.integers(-1, PAGES - 6), B, 1) + torch.arange(n_pages))
        * lists(st.sampled_from((1, 1, 1, -1)), B, n_pages),
        "page_size": page_size,
        "context": lists(st.integers(0, n_pages * page_size + 3), B, S, 1, 1),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "unique": draw(st.booleans()),
    }


@settings(derandomize=True, deadline=None, max_examples=300)
@given(calls(), st.sampled_from((torch.int32, torch.int64)))
def test_paged_ranges_are_the_blocks_tokens_in_their_pages(call, dtype):
    call = {**call, "blocks": call["blocks"].to(dtype), "block_table": call["block_table"].to(dtype)}
    ranges = spans.paged_ranges(**call)
    B, S, G, n = call["blocks"].shape
    page_size, layout, unique = call["page_size"], call["layout"], call["unique"]
    number = n * most_pages(call["block_size"], page_size)
    assert ranges.dtype == torch.int32 and ranges.shape == (B, S, G, number, 2)
    for b, s, g in torch.cartesian_prod(*(torch.arange(size) for size in (B, S, G))).view(-1, 3).tolist():
        named, table = call["blocks"][b, s, g].tolist(), call["block_table"][b].tolist()
        found = pieces(named, call["block_size"], table, page_size, int(call["context"][b, s]), unique)
        want = [[in_cache(*token, g, G, page_size, layout) for token in piece] for piece in found]
        got = [list(range(*span)) for span in ranges[b, s, g].tolist()]
        assert [t for span in got for t in span] == [t for piece in want for t in piece]
        joins = sum(bool(a and b and a[-1] + 1 == b[0]) for a, b in zip(want, want[1:], strict=False))
        assert sum(map(bool, got)) == sum(map(bool, want)) - joins


def test_adjacent_pages_are_one_span_and_unused_spans_are_empty():
    blocks = torch.tensor([0, 1, -1, 3]).view(1, 1, 1, 4)
    table = torch.tensor([[4, 5, 6, 7, 1, 2, 9, 8]])
    ranges = spans.paged_ranges(blocks, 32, table, 16, 120)
    assert ranges[0, 0, 0].tolist() == [[64, 128], [0, 0], [0, 0], [0, 0], [0, 0], [0, 0], [144, 160], [128, 136]]
    by_group = spans.paged_ranges(blocks.expand(1, 1, 2, 4), 32, table, 64, 120, layout="HND")
    assert by_group[0, 0, 0].tolist() == [[512, 576], [0, 0], [0, 0], [672, 696]]
    assert by_group[0, 0, 1].tolist() == [[576, 640], [0, 0], [0, 0], [736, 760]]


@pytest.mark.parametrize("page_size", (16, 64, 256))
def test_a_context_may_be_one_number(page_size):
    blocks, table = torch.tensor([[0, 2], [1, -1]]).view(2, 1, 1, 2), torch.randperm(32).view(2, 16)
    whole, each = (spans.paged_ranges(blocks, 64, table, page_size, c) for c in (150, torch.full((2, 1, 1, 1), 150)))
    assert torch.equal(whole, each)


def test_pages_one_behind_the_other_give_the_ranges_of_a_cache_without_pages():
    blocks = torch.tensor([3, 0, 7, -1]).view(1, 1, 1, 4)
    for page_size in (64, 128):
        paged = spans.paged_ranges(blocks, 64, torch.arange(8)[None], page_size, 470)
        assert torch.equal(paged, spans.block_ranges(blocks, 64, 470))


@pytest.mark.parametrize("shape", ((0, 1, 2, 3), (2, 0, 2, 3), (2, 1, 2, 0)))
def test_no_rows_and_no_blocks_are_valid(shape):
    ranges = spans.paged_ranges(torch.zeros(shape, dtype=torch.int32), 32, torch.zeros(shape[0], 4).long(), 16, 64)
    assert ranges.shape == (*shape[:3], 2 * shape[3], 2)


def test_the_shape_follows_from_shapes_and_nothing_is_read_from_the_device():
    with FakeTensorMode():  # whatever needs a value raises
        blocks, context = torch.zeros(3, 2, 4, 5, dtype=torch.int32), torch.zeros(3, 2, 1, 1, dtype=torch.int32)
        for page_size, number in ((16, 20), (64, 5), (48, 10), (512, 5)):
            table = torch.zeros(3, 7, dtype=torch.int32)
            ranges = spans.paged_ranges(blocks, 64, table, page_size, context, unique=True)
            assert ranges.shape == (3, 2, 4, number, 2)


@pytest.mark.filterwarnings("default")  # what the compiler warns of is not ours
def test_paged_ranges_are_one_graph():
    blocks, table = torch.tensor([0, 2, 2, -1]).view(1, 1, 1, 4), torch.tensor([[3, 4, 0, 1, 7, 6]])
    compiled = torch.compile(spans.paged_ranges, fullgraph=True, backend="eager")
    for layout in LAYOUTS:
        call = (blocks, 32, table, 16, torch.tensor(90).view(1, 1, 1, 1))
        assert torch.equal(compiled(*call, layout=layout), spans.paged_ranges(*call, layout=layout))


@pytest.mark.parametrize("B", (1, 3))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_view_shows_every_token_of_the_cache_and_copies_nothing(layout, B):
    page_size, G, D = 4, 3, 8
    cache = torch.randn(PAGES, *((page_size, G) if layout == "NHD" else (G, page_size)), D)
    view = spans.paged_view(cache, B, layout)
    assert view.shape == (B, G, PAGES * page_size * (G if layout == "HND" else 1), D)
    assert view.data_ptr() == cache.data_ptr()
    for page, place, g in torch.cartesian_prod(*map(torch.arange, (PAGES, page_size, G))).tolist():
        stored = cache[page, place, g] if layout == "NHD" else cache[page, g, place]
        for b in range(B):
            assert torch.equal(view[b, g, in_cache(page, place, g, G, page_size, layout)], stored)


def test_a_cache_that_holds_k_and_v_page_by_page_is_seen_as_one_of_twice_the_pages():
    """As docs/serving.md says: [pages, 2, page_size, G, D]."""
    both, table = torch.randn(PAGES, 2, 4, 3, 8), torch.tensor([[5, 2, 9]])
    pages = both.flatten(0, 1)
    k, v = spans.paged_view(pages[:-1], 1), spans.paged_view(pages[1:], 1)
    ranges = spans.paged_ranges(torch.arange(3).view(1, 1, 1, 3).expand(1, 1, 3, 3), 4, 2 * table, 4, 12)
    assert k.shape == v.shape
    for g in range(3):
        for page, (start, end) in zip(table[0].tolist(), ranges[0, 0, g].tolist(), strict=True):
            assert torch.equal(k[0, g, start:end], both[page, 0, :, g])
            assert torch.equal(v[0, g, start:end], both[page, 1, :, g])


CACHE = torch.zeros(3, 4, 2, 8)
BLOCKS, TABLE = torch.zeros(2, 1, 2, 3, dtype=torch.int32), torch.zeros(2, 5, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    (
        (lambda: spans.paged_view(CACHE[0], 1), ValueError, "cache: rank is 3, expected 4"),
        (lambda: spans.paged_view(CACHE, 1, "BSHD"), ValueError, "layout: value is 'BSHD', expected one of NHD, HND"),
        (lambda: spans.paged_view(CACHE[:, :3], 1), ValueError, r"cache: stride is \(64, 16, 8, 1\), expected pages"),
        (lambda: spans.paged_view(CACHE.transpose(1, 2), 1, "HND"), ValueError, "cache: stride is"),
        (
            lambda: spans.paged_view(torch.zeros(1, 1, 1, 1).expand(2**16, 2**15, 1, 1), 1),
            ValueError,
            r"cache: shape is \(65536, 32768, 1, 1\), expected at most 2147483647 tokens",
        ),
        (lambda: spans.paged_ranges(BLOCKS, 64, TABLE.float(), 16, 9), TypeError, "block_table: dtype is"),
        (lambda: spans.paged_ranges(BLOCKS, 64, TABLE, 0, 9), ValueError, "page_size: value is 0, expected at least 1"),
        (lambda: spans.paged_ranges(BLOCKS, 0, TABLE, 1, 9), ValueError, "block_size: value is 0, expected at least 1"),
        (lambda: spans.paged_ranges(BLOCKS, 64, TABLE[:1], 16, 9), ValueError, r"block_table: shape is \(1, 5\)"),
        (lambda: spans.paged_ranges(BLOCKS, 64, TABLE[0], 16, 9), ValueError, r"block_table: shape is \(5,\)"),
        (lambda: spans.paged_ranges(BLOCKS, 64, TABLE[:, :0], 16, 9), ValueError, r"block_table: shape is \(2, 0\)"),
        (lambda: spans.paged_ranges(BLOCKS[0], 64, TABLE, 16, 9), ValueError, "blocks: rank is 3, expected 4"),
        (lambda: spans.paged_ranges(BLOCKS, 64, TABLE, 16, 9, layout="nhd"), ValueError, "layout: value is 'nhd'"),
    ),
)  # fmt: skip
def test_bad_arguments_are_named(call, error, said):
    with pytest.raises(error, match=f"^{said}"):
        call()
