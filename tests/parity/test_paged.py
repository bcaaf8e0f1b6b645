"""K and V in a paged cache, as servers have them: both page layouts, tables, and batches of every make-up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import nsa_sel
from nsa_sel import dispatch, reference, spans
from nsa_sel.bench.parallel import ORDINARY_TEST_BYTES
from nsa_sel.bench.suite import cases, gate
from nsa_sel.bench.suite.inputs import make_inputs, memory_estimate
from nsa_sel.kernel.launch_config import LaunchConfig

from .paged_case import NAN, PagedBatch
from .parity_case import DEVICE, DTYPES, ON_GPU, has_tma, here

LAYOUTS = tuple(spans.PAGE_LAYOUTS)
PAGE_SIZES = (16, 32, 24, 64)  # of blocks of 32: smaller, equal, no divisor, larger
TMA = (LaunchConfig("tma", 64, 64, 64, 4, 2), LaunchConfig("tma", 32, 32, 64, 1, 1, splits=2))
UNEQUAL = here([1500, 70, 8000, 333], [150, 5, 70])
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
both_layouts = pytest.mark.parametrize("layout", LAYOUTS)


def check(batch: PagedBatch, launch: LaunchConfig | None = None) -> torch.Tensor:
    from nsa_sel.kernel import launch as kernel

    before = kernel.launch_count()
    out = kernel.forward(*batch.arguments(), launch=launch)
    assert kernel.launch_count() > before
    verdict = batch.verdict(out)
    assert verdict.ok, verdict.message
    return out


def is_large(case: cases.Case) -> bool:
    return memory_estimate(case) > ORDINARY_TEST_BYTES


@both_layouts
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_sel_parity_of_shuffled_pages_and_unequal_contexts(layout, page_size, dtype):
    check(PagedBatch(UNEQUAL, page_size, layout, dtype=dtype))


@pytest.mark.skipif(not has_tma(), reason="no TMA descriptors here")
@both_layouts
@pytest.mark.parametrize(("D", "Dv"), ((64, 64), (80, 48), (48, 80), (192, 128)))
@pytest.mark.parametrize("config", TMA, ids=str)
def test_triton_sel_parity_of_descriptors_of_a_paged_cache(layout, D, Dv, config):
    """With widths that chunks of 64 and 32 columns do not divide, too: NaN of other groups lies behind a token."""
    from nsa_sel.kernel import launch

    batch = PagedBatch([400, 70], 16, layout, D=D, Dv=Dv)
    own = batch.in_one_piece()[3]
    assert launch.call_of(*batch.arguments()).fits_tma
    for b, g in ((0, 0), (0, 1)):  # what the other group selects and this one does not
        mine, theirs = ({t for span in own[b, 0, x].tolist() for t in range(*span)} for x in (g, 1 - g))
        assert theirs - mine
        for cache, whole in zip(batch.caches, batch.contiguous, strict=True):
            for t in theirs - mine:
                page, place = int(batch.table[b, t // 16]), t % 16
                (cache[page, place, g] if layout == "NHD" else cache[page, g, place]).fill_(NAN)
                whole[b, g, t] = NAN
    check(batch, replace(config, block_d=64))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.id, marks=[pytest.mark.much_memory] if is_large(case) else [])
        for case in cases.matrix(here("full", "smoke"), family="paged")
    ],
)
def test_triton_sel_parity_of_the_measured_cases(case):
    from nsa_sel.kernel import launch

    x = make_inputs(case, DEVICE)
    rows = torch.linspace(0, case.N - 1, min(case.N, 64)).long()
    b, s, g = rows // (case.S * case.G), rows // case.G % case.S, rows % case.G
    out = launch.forward(x.q, x.k, x.v, x.ranges, min_len=x.min_len, max_len=x.max_len)
    oracle = reference.oracle(x.q, x.k, x.v, x.ranges, rows=rows.to(DEVICE))
    packed = reference.packed_sdpa(x.q, x.k, x.v, x.ranges)
    verdict = gate.check(out[b, s, g], oracle, packed[b, s, g], dtype=x.q.dtype)
    assert verdict.ok, verdict.message


@both_layouts
def test_triton_sel_parity_of_a_prefix_that_two_sequences_share(layout):
    batch = PagedBatch([150, 100, 70], 32, layout, shared=64)
    assert torch.equal(batch.table[0, :2], batch.table[2, :2])
    check(batch)


@both_layouts
@pytest.mark.parametrize("S", (2, 5, 8))
def test_triton_sel_parity_of_speculative_decoding(layout, S):
    check(PagedBatch(UNEQUAL, 16, layout, S=S))


@pytest.mark.parametrize("S", (2, 3, 4, 8))
def test_triton_sel_parity_of_speculative_decoding_without_pages(S):
    from nsa_sel.kernel import launch

    batch = PagedBatch(UNEQUAL, 32, S=S)
    verdict = batch.verdict(launch.forward(*batch.in_one_piece()))
    assert verdict.ok, verdict.message


@both_layouts
def test_triton_sel_parity_of_a_mix_of_short_and_long_contexts(layout):
    """One of them empty: zeros."""
    contexts = [0, 1, here(16_384, 400), 2, 33]
    batch = PagedBatch(contexts, 16, layout, blocks=here(16, 8))
    assert (check(batch)[0] == 0).all()


@both_layouts
def test_triton_sel_parity_of_a_batch_that_changes_size(layout, monkeypatch):
    monkeypatch.setattr(dispatch, "_plans", {})
    whole = PagedBatch(UNEQUAL, 16, layout, blocks=3)
    q, k, v, ranges = whole.arguments()
    want = nsa_sel.selection_attention(q, k, v, ranges, backend="triton", max_len=96)
    assert whole.verdict(want).ok
    for size in (1, 3, 2, 3, 1):
        k, v = (spans.paged_view(cache, size, layout) for cache in whole.caches)
        some = q[:size], k, v, ranges[:size]
        torch.testing.assert_close(
            nsa_sel.selection_attention(*some, backend="triton", max_len=96), want[:size], rtol=0, atol=2e-3
        )
    assert len(dispatch._plans) <= len(UNEQUAL)


@both_layouts
def test_triton_sel_parity_of_a_context_that_grows_through_its_pages(layout, monkeypatch):
    monkeypatch.setattr(dispatch, "_plans", {})
    batch = PagedBatch([46, 30], 16, layout, room=8)
    for _ in range(5):
        out = nsa_sel.selection_attention(*batch.arguments(), backend="triton", max_len=128)
        verdict = batch.verdict(out)
        assert verdict.ok, verdict.message
        batch.grow()
    ((_, plans),) = dispatch._plans.values()
    assert len(plans) == 1


@both_layouts
@pytest.mark.parametrize("backend", ("packed_sdpa", "auto"))
def test_other_backends_read_a_paged_cache_too(layout, backend):
    batch = PagedBatch(UNEQUAL, 16, layout)
    out = nsa_sel.selection_attention(*batch.arguments(), backend=backend)
    verdict = batch.verdict(out)
    assert verdict.ok, verdict.message


@both_layouts
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_triton_sel_parity_sees_two_entries_of_a_table_that_are_swapped(layout, page_size):
    from nsa_sel.kernel import launch

    batch = PagedBatch([12 * page_size, 12 * page_size], page_size, layout, blocks=3)
    q, k, v, ranges = batch.arguments()
    right = launch.forward(q, k, v, ranges)
    swapped, foreign = batch.table.clone(), batch.table.clone()
    swapped[1, [0, 5]] = swapped[1, [5, 0]]  # a page of the first block, and one that is not selected
    foreign[1, 0] = batch.table[0, 0]
    for table in (swapped, foreign):
        wrong = launch.forward(q, k, v, batch.ranges(table))
        assert torch.equal(wrong[0], right[0])
        verdict = batch.verdict(wrong)
        assert not verdict.ok and verdict.bad_row is not None and verdict.bad_row[0] == 1


@needs_gpu
@both_layouts
def test_triton_sel_parity_of_a_graph_whose_tables_change_in_place(layout):
    """Captured once: selection, context and table are new at each replay, and so is where the tokens lie."""
    first = PagedBatch([1500, 70, 333], 16, layout, room=600)
    k, v = (spans.paged_view(cache, 3, layout) for cache in first.caches)
    q, selected, table, context = (x.clone() for x in (first.q, first.selected, first.table, first.context))

    def step() -> torch.Tensor:
        ranges = spans.paged_ranges(selected, 32, table, 16, context, layout=layout)
        return nsa_sel.selection_attention(q, k, v, ranges, backend="triton", min_len=0, max_len=128)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for seed in range(1, 6):
        batch = PagedBatch([1500 + 100 * seed, 70 + seed, 33 * seed], 16, layout, room=600 - 100 * seed, seed=seed)
        table.fill_(-1)
        table[:, : batch.table.shape[1]] = batch.table
        for old, new in zip((q, selected, context), (batch.q, batch.selected, batch.context), strict=True):
            old.copy_(new)
        for old, new in zip(first.caches, batch.caches, strict=True):
            old.fill_(float("nan"))
            old[: len(new)] = new[: len(old)]
        graph.replay()
        torch.cuda.synchronize()
        verdict = batch.verdict(out)
        assert verdict.ok, verdict.message
