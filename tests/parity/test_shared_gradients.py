"""The gradient of q where neighbouring queries share tiles of KV, and what only some of them select."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import nsa_sel
from nsa_sel.kernel import shared_launch
from nsa_sel.kernel.backward_config import BackwardLaunch
from nsa_sel.kernel.backward_launch import BackwardPlan
from nsa_sel.kernel.backward_tensors import Saved
from nsa_sel.kernel.launch import Plan
from nsa_sel.kernel.launch_config import LaunchConfig, chunk_width

from .gradient_case import check, exact, judge, noise, upstream
from .parity_case import DEVICE, DTYPES, Case, has_tma, here, rows, tensors
from .test_gradients import chunks_of_few_rows, small
from .test_layouts import MIXED, MIXED_S_KV
from .test_shared import ALIKE_AND_APART, BLOCK, TQ4, Runs, plans, prefill, shared, spoils

__all__ = ["chunks_of_few_rows", "plans"]


def sharing(case: Case, rows_of_products: int = here(64, 16), **change) -> BackwardLaunch:
    """Return a launch whose query tiles always share, with the widths of a case, and what is to be changed."""
    of_q = shared(case, rows=max(rows_of_products, 1 << (case.H - 1).bit_length()), **change)
    load = "tma" if of_q.tma else "whole"
    row = LaunchConfig(load, BLOCK, chunk_width(case.D), chunk_width(case.Dv), 4, 2)
    return replace(small(), row=row, rows=max(16, 1 << (case.H - 1).bit_length()), shared=of_q)


def run(case: Case, launch: BackwardLaunch | None, max_len: int | None = None) -> tuple[Tensor, list[bool]]:
    """Return dq, and which query tiles shared, in the end."""
    q, k, v, ranges = tensors(case)
    up = upstream(case, q, v)
    lse = torch.empty(q.shape[:4], device=q.device)
    out = Plan(q, k, v, ranges, None, None, None).run(q, k, v, ranges, None, lse)
    plan = BackwardPlan(q, k, v, ranges, None, None, max_len, launch)
    found = []
    if plan.sharing is not None:
        make = plan.sharing.index
        plan.sharing.index = lambda passed: found.append(make(passed)) or found[0]
    dq, _, _ = plan.run(Saved(q, k, v, ranges, out, lse, up.dout, up.dlse), True, False)
    assert dq is not None
    return dq, [n >= 0 for index in found for n in index.tensors[2].tolist()[: 2 * plan.sharing.query_tiles : 2]]


def check_shared(case: Case, shares: list[bool] | None = None, **change) -> None:
    """Put all gradients of a case through the gate; shares: which query tiles are to share."""
    launch = sharing(case, **change)
    check(case, launch)
    if shares is not None:
        assert run(case, launch)[1] == shares


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ("local", "zipf", "random"))
def test_triton_sel_parity_of_gradients_of_shared_tiles_in_prefill(layout, dtype):
    ranges = prefill(layout, 3 * BLOCK + 3, 3 * BLOCK + here(61, 9))
    empty = ranges.new_zeros(1, 1, 1, ranges.shape[3], 2)
    check_shared(Case(torch.cat((ranges, empty), 1), 4 * BLOCK, dtype=dtype, **TQ4))


@pytest.mark.sanitizer
def test_triton_sel_parity_of_gradients_of_shared_tiles_beside_rows_of_their_own():
    """Touching, overlapping, repeated, empty, unordered spans, several groups and batch entries."""
    case = Case(torch.cat((MIXED, MIXED[:, :2]), 1).repeat(2, 1, 2, 1, 1), MIXED_S_KV, **TQ4)
    check_shared(case, break_even=1.2)
    apart = Case(ALIKE_AND_APART, 6 * BLOCK, H=here(16, 4), D=32, Dv=32)
    check_shared(apart, [True, False, False], break_even=2.5)


@pytest.mark.parametrize(
    ("dtype", "H", "D", "Dv"),
    [(DTYPES[i % 3], H, D, Dv) for i, (H, D, Dv) in enumerate(
        [(1, 64, 16), (2, 16, 64), (3, 48, 32), (6, 80, 144), (16, 192, 64), (33, 16, 32), (64, 32, 32)]
    )],
)  # fmt: skip
def test_triton_sel_parity_of_gradients_of_shared_tiles_of_every_shape(dtype, H, D, Dv):
    check_shared(Case(MIXED[:, :5], MIXED_S_KV, H=H, D=D, Dv=Dv, dtype=dtype), num_stages=1)


@pytest.mark.skipif(not has_tma(), reason="TMA descriptors need Triton 3.4 and compute capability 9.0")
@pytest.mark.parametrize("view", ("plain", "permuted", "every_second"))
def test_triton_sel_parity_of_gradients_of_shared_tiles_by_tma(view):
    check_shared(Case(MIXED[:, :5].repeat(1, 1, 2, 1, 1), MIXED_S_KV, H=4, D=64, Dv=48, view=view), tma=True)


@pytest.mark.parametrize("view", ("permuted", "odd"))
def test_triton_sel_parity_of_gradients_of_shared_tiles_of_strided_tensors(view):
    check_shared(Case(MIXED[:, :4].repeat(2, 1, 2, 1, 1), MIXED_S_KV, view=view, **TQ4))


@settings(max_examples=here(100, 5), deadline=None)
@given(st.lists(Runs, min_size=2, max_size=here(9, 5)), st.sampled_from((0.0, 1.5)))
def test_triton_sel_parity_of_gradients_of_shared_tiles_of_any_spans(spans, break_even):
    lists = [[(start, start + length) for start, length in runs] for runs in spans]
    check_shared(Case(rows(*lists), 83, **TQ4), break_even=break_even)


def test_triton_sel_parity_of_gradients_of_shared_tiles_of_keys_that_are_selected_many_times():
    """Up to three times they are weighed in the shared product; more often, the query tile is computed row by row."""
    for times in (2, 3):
        spans = rows([(3, 5)] * times + [(0, 4)], [(1, 2)], *[[(0, 8)]] * 2)
        check_shared(Case(spans, BLOCK, H=here(16, 4), D=32, Dv=32), [times == 2])  # token 3 is in (0, 4) too


def test_triton_sel_parity_of_gradients_of_shared_tiles_twice_gives_the_same_bits():
    case = Case(ALIKE_AND_APART.repeat(1, 1, 2, 1, 1), 6 * BLOCK, H=here(16, 4), D=32, Dv=32)
    first, second = (run(case, sharing(case, break_even=2.5)) for _ in range(2))
    assert torch.equal(first[0], second[0]) and first[1] == second[1] and set(first[1]) == {True, False}


@spoils
@pytest.mark.parametrize("value", ("float('nan')", "float('inf')", "-float('inf')"))
@pytest.mark.parametrize("which", ("k", "v"))
def test_triton_sel_parity_of_gradients_of_shared_tiles_keeps_apart_what_only_some_queries_select(which, value):
    """Token `own` is selected, as part of a whole and of a partial tile, by one query of the first query tile alone."""
    common, H = (0, BLOCK), here(16, 4)
    for own, spans in ((2 * BLOCK + 3, (2 * BLOCK, 3 * BLOCK)), (BLOCK + 5, (BLOCK + 5, BLOCK + 9))):
        case = Case(rows(*[[common]] * 2, [common, spans], *[[common]] * 5), 3 * BLOCK, H=H, D=32, Dv=32)
        clean, shares = run(case, sharing(case))
        assert shares == [True, True]
        spoilt = replace(case, edit=f"{which}[:, :, {own}] = {value}")
        dq, shares = run(spoilt, sharing(case))
        assert shares == [False, True]
        others = [0, 1, 3, 4, 5, 6, 7]
        torch.testing.assert_close(dq[:, others].double(), clean[:, others].double(), atol=2e-2, rtol=2e-2)
        by_row, _ = run(spoilt, replace(sharing(case), shared=None))
        assert torch.equal(dq[:, :4].nan_to_num(7.0), by_row[:, :4].nan_to_num(7.0)), "computed row by row"


@spoils
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")  # of weights that are not taken
@pytest.mark.parametrize("value", ("1e4", "float('nan')", "float('inf')"))
def test_triton_sel_parity_of_gradients_of_shared_tiles_does_not_see_what_nobody_selects(value):
    spans = [[(0, BLOCK), (BLOCK + 2, BLOCK + 7)], [(0, BLOCK)], [(BLOCK + 3, BLOCK + 9)], []]
    case = Case(rows(*spans).repeat(1, 1, 2, 1, 1), 2 * BLOCK - 2, **TQ4)
    outside = [*range(BLOCK, BLOCK + 2), *range(BLOCK + 9, 2 * BLOCK - 2)]
    clean, shares = run(case, sharing(case))
    dq, shares_with = run(replace(case, edit=f"k[:, :, {outside}] = v[:, :, {outside}] = {value}"), sharing(case))
    assert shares == [True, True] and set(shares_with) == {value == "1e4"}
    torch.testing.assert_close(dq.double(), clean.double(), atol=2e-2, rtol=2e-2)


@spoils
@pytest.mark.parametrize("which", ("q", "dout", "lse"))
def test_triton_sel_parity_of_gradients_of_shared_tiles_keeps_apart_a_row_that_is_not_finite(which):
    """Query 1 of four that share; the keys' pass learns of it from the rows that shared, or from their rest."""
    case = Case(rows(*[[(0, s + 1)] for s in range(8)]), BLOCK, **TQ4)
    q, k, v, ranges = tensors(case)
    up = upstream(case, q, v)
    lse = torch.empty(q.shape[:4], device=q.device)
    out = Plan(q, k, v, ranges, None, None, None).run(q, k, v, ranges, None, lse)
    for bad in (float("nan"), float("inf")):
        spoilt = {"q": q.clone(), "dout": up.dout.clone(), "lse": lse.clone()}
        spoilt[which][:, 1] = bad
        saved = Saved(spoilt["q"], k, v, ranges, out, spoilt["lse"], spoilt["dout"], up.dlse)
        dq, dk, dv = BackwardPlan(q, k, v, ranges, None, None, None, sharing(case)).run(saved, True, True)
        others = [0, *range(2, 8)]
        got, want, allowed = (
            [of_q[:, others].contiguous(), *(x[:, :, 2:].contiguous() for x in of_kv)]
            for of_q, *of_kv in ((dq, dk, dv), exact(q, k, v, ranges, up), noise(q, k, v, ranges, up))
        )
        judge(case, got, want, allowed)


@pytest.mark.public
def test_triton_sel_parity_of_gradients_shares_where_the_forward_does(plans, monkeypatch):
    case = Case(prefill("local", 2 * BLOCK + 3, 2 * BLOCK + 35), 4 * BLOCK, H=here(8, 16), D=64, Dv=64)
    q, k, v, ranges = inputs = *tensors(case)[:3], case.ranges.to(DEVICE, copy=True)  # aligned, as a call that shares
    ran, rows_sharing = [], BackwardPlan.rows_sharing
    monkeypatch.setattr(BackwardPlan, "rows_sharing", lambda plan, *args: ran.append(plan) or rows_sharing(plan, *args))
    for S, shares in ((32, True), (1, False)):
        assert nsa_sel.choose_route(q[:, :S], k, v, ranges[:, :S], max_len=3 * BLOCK, backend="triton").shares == shares
        leaves = [q[:, :S].clone().requires_grad_(), k, v]
        out = nsa_sel.selection_attention(*leaves, ranges[:, :S], max_len=3 * BLOCK, backend="triton")
        up = upstream(case, q, v, with_lse=False)
        (dq,) = torch.autograd.grad(out, leaves[:1], up.dout[:, :S])
        assert len(ran) == 1
        if shares:
            torch.testing.assert_close(dq.double(), exact(*inputs, up)[0], atol=2e-2, rtol=2e-2)


def test_triton_sel_parity_of_gradients_of_an_index_that_is_too_large_are_those_of_the_rows(monkeypatch):
    monkeypatch.setattr(shared_launch, "MAX_INDEX_BYTES", 8)
    case = Case(MIXED, MIXED_S_KV, **TQ4)
    check_shared(case, [])


@pytest.mark.skipif(DEVICE == "cpu", reason="captures a CUDA graph")
def test_triton_sel_parity_of_gradients_of_shared_tiles_in_a_graph():
    case = Case(ALIKE_AND_APART.repeat(1, 1, 2, 1, 1), 6 * BLOCK, H=16, D=64, Dv=64)
    q, k, v, ranges = tensors(case)
    up = upstream(case, q, v)
    lse = torch.empty(q.shape[:4], device=q.device)
    out = Plan(q, k, v, ranges, None, None, None).run(q, k, v, ranges, None, lse)
    plan = BackwardPlan(q, k, v, ranges, None, None, None, sharing(case, break_even=2.5))
    saved = Saved(q, k, v, ranges, out, lse, up.dout, up.dlse)
    want = plan.run(saved, True, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = plan.run(saved, True, True)
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
