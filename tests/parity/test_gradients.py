"""The gradients of the kernel against float64 ones, in every shape and layout, and what must not reach them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings

from nsa_sel import reference
from nsa_sel.kernel import backward_launch
from nsa_sel.kernel.backward_config import BackwardLaunch
from nsa_sel.kernel.launch_config import LaunchConfig

from .gradient_case import check, exact, judge, lse_of, noise, run, upstream
from .parity_case import OUT_OF_RANGE, SPANS, SPANS_S_KV, Case, has_tma, here, rows, tensors
from .test_properties import cases

# NumPy, of which the interpreter is made, warns of inf - inf and of 0 times NaN.
spoils = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
SMALL = {"H": 2, "D": 16, "Dv": 16}
fp32 = torch.float32


@pytest.fixture(autouse=True)
def chunks_of_few_rows(monkeypatch):
    monkeypatch.setattr(backward_launch, "LEAST_BATCHES", 1)


def small(load="whole", block_t=16, rows=16, slots=12, block_d=16):
    """Return a launch of small tiles, in which rows share tiles and tiles are cut into chunks."""
    return BackwardLaunch(LaunchConfig(load, 16, block_d, 16, 4, 2), block_t, rows, 4, 1, slots)


@pytest.mark.parametrize(
    ("H", "D", "Dv", "dtype"),
    [
        (1, 16, 32, torch.float32),
        (3, 48, 16, torch.bfloat16),
        (4, 64, 64, torch.float16),
        (16, 80, 48, torch.bfloat16),
        (64, 16, 16, torch.bfloat16),
        (6, 192, 128, torch.bfloat16),
    ],
)
def test_triton_sel_parity_of_gradients_of_any_width(H, D, Dv, dtype):
    check(Case(rows(SPANS, [(0, 64)], [(3, 30), (25, 70)]), SPANS_S_KV, H=H, D=D, Dv=Dv, dtype=dtype), whole=True)


@pytest.mark.sanitizer
@pytest.mark.parametrize(("dtype", "with_lse"), [(torch.bfloat16, False), (torch.float32, True)])
def test_triton_sel_parity_of_gradients_where_tiles_are_shared_and_cut(dtype, with_lse):
    """36 queries, more than a word of the index has. All select the first tile, a second one and part of a third."""
    spans = [[(0, 16), (16 * (1 + s % 3), 16 * (2 + s % 3)), (64 + s % 5, 69 + s)] for s in range(36)]
    check(Case(rows(*spans), 110, dtype=dtype, **SMALL), small(), with_lse, whole=True)


def test_triton_sel_parity_of_gradients_of_many_tiles():
    """More tiles than a word of the maps has, most of which nothing selects from."""
    spans = torch.tensor([[(0, 16), (600, 620)], [(500, 560), (0, 0)], [(0, 0), (0, 0)]])
    case = Case(spans.view(1, 3, 1, 2, 2).int(), 635, dtype=fp32, hints=False, **SMALL)
    _, dk, _ = check(case, small())
    assert not dk[:, :, 20:500].any()


@settings(max_examples=here(100, 8))
@given(cases(max_spans=here(64, 8)))
@example(Case(rows([], [], []), 5))
@example(Case(rows([(0, 9), (3, 12), (3, 12), (3, 12)], [(0, 12)] * 5), 12))  # overlapping, duplicated
@example(Case(rows(OUT_OF_RANGE, [(0, 9)]), 9))
def test_triton_sel_parity_of_gradients_of_any_span_layout(case):
    check(replace(case, **SMALL), small())


def test_triton_sel_parity_of_gradients_of_very_many_spans(monkeypatch):
    """More than one launch of the rows takes: their parts are added."""
    monkeypatch.setattr(backward_launch, "MAX_SPANS", 16)
    spans = [(3 * i, 3 * i + 2) for i in range(40)]
    check(Case(rows(spans, [(0, 30)], spans[:20]), 130, dtype=torch.float16, **SMALL), small())


@pytest.mark.parametrize("view", here(("permuted", "odd", "shared", "every_second"), ("permuted", "odd")))
def test_triton_sel_parity_of_gradients_of_strided_tensors(view):
    spans = rows(SPANS, [(0, 64)]).repeat(2, 1, 2, 1, 1)
    check(Case(spans, SPANS_S_KV, view=view, dtype=torch.float16, **SMALL), small())


@pytest.mark.skipif(not has_tma(), reason="no TMA")
def test_triton_sel_parity_of_gradients_by_descriptors():
    spans = rows(SPANS, [(0, 64)]).repeat(1, 1, 2, 1, 1)
    for view in ("plain", "permuted"):
        check(Case(spans, SPANS_S_KV, D=64, Dv=16, view=view), small("tma", block_d=32))


def test_triton_sel_parity_of_gradients_under_a_scale_of_any_sign():
    for scale in (-0.3, 0.0):
        check(Case(rows(SPANS, [(0, 64)]), SPANS_S_KV, scale=scale, dtype=fp32, **SMALL), small())


def test_triton_sel_parity_of_gradients_with_central_differences():
    case = Case(rows([(0, 5), (3, 9)], [(2, 7)]), 10, H=1, D=16, Dv=16, dtype=fp32)
    q, k, v, ranges = tensors(case)
    up = upstream(case, q, v)

    def loss(tensors):
        out = (reference.oracle(*tensors, ranges) * up.dout.double()).sum()
        return float(out + (lse_of(tensors[0], tensors[1], ranges, None) * up.dlse.double()).sum())

    step = 1e-5
    got = run(q, k, v, ranges, up, case)
    for which, mine in enumerate(got):
        found = torch.zeros(mine.numel(), dtype=torch.float64)
        for i in range(mine.numel()):
            sides = []
            for sign in (1, -1):
                moved = [x.double() for x in (q, k, v)]
                moved[which] = moved[which].clone()
                moved[which].view(-1)[i] += sign * step
                sides.append(loss(moved))
            found[i] = (sides[0] - sides[1]) / (2 * step)
        error = (mine.cpu().double().flatten() - found).norm() / found.norm()
        assert error <= 1e-4, f"d{'qkv'[which]}: {error:.1e}"


def test_triton_sel_parity_of_gradients_twice_gives_the_same_bits():
    spans = [[(0, 16), (16 + s % 7, 40 + s % 3)] for s in range(10)]
    case = Case(rows(*spans), 50, **SMALL)
    given = tensors(case)
    up = upstream(case, given[0], given[2])
    for first, second in zip(*(run(*given, up, case, small()) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


# --- metamorphic ---


def gradients_of(case, spans):
    q, k, v, _ = tensors(case)
    ranges = rows(*spans).to(q.device)
    up = upstream(case, q, v)
    return run(q, k, v, ranges, up, case, small())


@pytest.mark.parametrize(
    "changed",
    [
        [[(30, 40), (0, 16), (20, 27)], [(3, 20)]],  # in another order
        [[(0, 7), (7, 16), (20, 27), (30, 40)], [(3, 16), (16, 20)]],  # split
    ],
    ids=("permuted", "split"),
)
def test_triton_sel_parity_of_gradients_does_not_depend_on_how_spans_are_written(changed):
    spans = [[(0, 16), (20, 27), (30, 40)], [(3, 20)]]
    case = Case(rows(*spans), 50, dtype=fp32, hints=False, **SMALL)
    for first, second in zip(gradients_of(case, spans), gradients_of(case, changed), strict=True):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-5)


def test_triton_sel_parity_of_gradients_is_zero_where_nothing_is_selected():
    spans = [[(0, 16), (20, 27)], [(3, 20)], []]
    dq, dk, dv = gradients_of(Case(rows(*spans), 50, **SMALL), spans)
    for x in (dk, dv):
        assert not x[:, :, 27:].any() and x[:, :, :27].any(-1).all()
    assert not dq[:, 2].any() and dq[:, :2].any()


def test_triton_sel_parity_of_gradients_does_not_see_a_vector_added_to_every_key():
    """Every score of a row moves by the same amount: neither its result nor dq changes, but for the LSE's gradient."""
    case = Case(rows([(0, 16), (20, 27)], [(3, 20)]), 30, dtype=fp32, **SMALL)
    q, k, v, ranges = tensors(case)
    up = upstream(case, q, v, with_lse=False)
    moved = k + torch.linspace(-1, 1, k.shape[3], device=k.device)
    (dq, _, dv), (dq_moved, _, dv_moved) = (run(q, x, v, ranges, up, case, small()) for x in (k, moved))
    torch.testing.assert_close(dq, dq_moved, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(dv, dv_moved, atol=2e-6, rtol=1e-5)


# --- NaN and infinities ---

# Rows 0 and 1 share a batch of the products. Row 0 selects the first tile as row 1 does, and part of the second.
SHARING, SHARING_S_KV = [[(0, 16), (16, 20)], [(0, 16), (18, 30)], [(32, 40)], [(30, 32), (40, 44)]], 50
OF_ROW_0 = 20  # the tokens from here on are others'


@spoils
@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")), ids=str)
@pytest.mark.parametrize("which", ("q", "dout", "lse", "out"))
def test_triton_sel_parity_of_gradients_keeps_apart_a_row_that_is_not_finite(which, bad):
    from nsa_sel.kernel.backward_launch import BackwardPlan
    from nsa_sel.kernel.backward_tensors import Saved
    from nsa_sel.kernel.launch import Plan

    case = Case(rows(*SHARING), SHARING_S_KV, **SMALL)
    q, k, v, ranges = tensors(case)
    up = upstream(case, q, v)
    lse = torch.empty(q.shape[:4], device=q.device)
    out = Plan(q, k, v, ranges, None, None, None).run(q, k, v, ranges, None, lse)
    results = []
    for value in (0.5, bad):
        saved = {"q": q.clone(), "dout": up.dout.clone(), "lse": lse.clone(), "out": out.clone()}
        saved[which][0, 0, 0, 1] = value
        given = Saved(saved["q"], k, v, ranges, saved["out"], saved["lse"], saved["dout"], up.dlse)
        results.append(BackwardPlan(saved["q"], k, v, ranges, None, None, None, small()).run(given, True, True))
    (dq, dk, dv), (dq_bad, dk_bad, dv_bad) = results
    assert torch.equal(dq[:, 1:], dq_bad[:, 1:])
    for x, spoilt in ((dk, dk_bad), (dv, dv_bad)):
        assert torch.equal(x[:, :, OF_ROW_0:], spoilt[:, :, OF_ROW_0:])
    if bad != bad:
        assert dk_bad[:, :, :OF_ROW_0].isnan().all(-1).all()


@spoils
@pytest.mark.parametrize("bad", (float("nan"), float("inf")), ids=str)
@pytest.mark.parametrize("which", ("k", "v"))
def test_triton_sel_parity_of_gradients_keeps_apart_a_key_that_is_not_finite(which, bad):
    """Row 0 selects it, in part of a tile that rows 1 and 3 select from, too; token 44 nobody does."""
    case = Case(rows(*SHARING), SHARING_S_KV, **SMALL)
    q, k, v, ranges = tensors(case)
    up = upstream(case, q, v)
    clean = run(q, k, v, ranges, up, case, small())
    for token, touched_rows, touched in ((44, [], []), (17, [0], [*range(OF_ROW_0)])):
        spoilt = {"k": k.clone(), "v": v.clone()}
        spoilt[which][:, :, token] = bad
        dq, dk, dv = run(q, spoilt["k"], spoilt["v"], ranges, up, case, small())
        others = [s for s in range(4) if s not in touched_rows]
        tokens = [t for t in range(SHARING_S_KV) if t not in touched]
        assert torch.equal(dq[:, others], clean[0][:, others])
        assert torch.equal(dk[:, :, tokens], clean[1][:, :, tokens])
        assert torch.equal(dv[:, :, tokens], clean[2][:, :, tokens])


@spoils
@pytest.mark.parametrize("which", ("q", "dout", "lse"))
def test_triton_sel_parity_of_gradients_of_keys_beside_a_causal_query_that_is_not_finite(which):
    """Every query selects all tokens up to its own: what the first one holds reaches token 0 and nothing else.

    The other queries of the tile are summed in another order then, so that bits may differ, but no more than that.
    """
    from nsa_sel.kernel.backward_launch import BackwardPlan
    from nsa_sel.kernel.backward_tensors import Saved
    from nsa_sel.kernel.launch import Plan

    case = Case(rows(*[[(0, s + 1)] for s in range(24)]), 24, **SMALL)
    q, k, v, ranges = tensors(case)
    up = upstream(case, q, v)
    lse = torch.empty(q.shape[:4], device=q.device)
    out = Plan(q, k, v, ranges, None, None, None).run(q, k, v, ranges, None, lse)
    spoilt = {"q": q.clone(), "dout": up.dout.clone(), "lse": lse.clone()}
    spoilt[which][:, 0] = float("nan")
    given = Saved(spoilt["q"], k, v, ranges, out, spoilt["lse"], spoilt["dout"], up.dlse)
    dq, dk, dv = BackwardPlan(q, k, v, ranges, None, None, None, small()).run(given, True, True)
    assert dk[:, :, 0].isnan().all()
    got, want, allowed = (
        [of_q[:, 1:].contiguous(), *(x[:, :, 1:].contiguous() for x in of_kv)]
        for of_q, *of_kv in ((dq, dk, dv), exact(q, k, v, ranges, up), noise(q, k, v, ranges, up))
    )
    judge(case, got, want, allowed)


def test_triton_sel_parity_of_gradients_writes_nothing_out_of_bounds_where_max_len_is_too_small():
    """Rows that are longer than max_len lose keys, and no more than that happens."""
    case = Case(rows(*[[(0, 64)]] * 6), 64, dtype=fp32, **SMALL)
    q, k, v, ranges = tensors(case)
    plan = backward_launch.BackwardPlan(q, k, v, ranges, None, 1, 1, small())
    index = plan.index()
    room = torch.full((len(index.rows) + 64,), -7, dtype=torch.int32, device=q.device)
    plan.make_index(ranges, torch.zeros(6, device=q.device), 64, index._replace(rows=room))
    assert plan.capacity < 6 * 4 and (room[plan.capacity :] == -7).all() and (room[: plan.capacity] >= 0).all()


# --- the index ---


@pytest.mark.parametrize("slots", (1, 9, 100))
def test_triton_sel_parity_of_gradients_index_against_plain_python(slots):
    spans = [[(0, 16), (20, 27)], [(3, 60)], [], [(16, 32), (16, 32)], [(48, 55)], [(0, 8), (8, 16)]] * 7
    case = Case(rows(*spans), 55, **SMALL)
    q, k, v, ranges = tensors(case)
    plan = backward_launch.BackwardPlan(q, k, v, ranges, None, None, None, small(slots=slots))
    index = plan.index()
    bad = [9, 13]  # queries that are not finite
    finite = torch.zeros(len(spans), device=q.device)
    finite[bad] = float("nan")
    plan.make_index(ranges, finite, case.S_kv, index)
    used = 0
    listed = index.rows.tolist()
    for tile in range(4):
        first, last = 16 * tile, min(16 * tile + 16, 55)
        touching = [[(a, b) for a, b in row if a < last and b > first and a < b] for row in spans]
        whole = [s for s, own in enumerate(touching) if len(own) == 1 and own[0][0] <= first and own[0][1] >= last]
        plain = [s for s, own in enumerate(touching) if len(own) == 1 and s not in whole + bad]
        other = [s for s, own in enumerate(touching) if own and s not in whole + plain]
        at, n = int(index.first[tile]), len(whole) + len(plain) + len(other)
        assert listed[at : at + n] == whole + plain + other
        assert index.counts.view(-1, 3)[tile].tolist() == [len(whole), len(plain), len(other)]
        chunks = int(index.chunks[tile])
        if chunks > 1:
            assert int(index.slot[tile]) == used
            assert index.jobs[used : used + chunks].tolist() == [tile] * chunks
            used += chunks
    assert int(index.n_slots) == used <= slots
    assert used or slots == 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rows": 8}, "rows for all heads"),
        ({"block_t": 24}, "tiles and rows that are powers of two"),
        ({"slots": 0}, "a slot or more"),
        ({"row": LaunchConfig("gather", 16, 16, 16, 4, 2)}, "rows in whole tiles"),
    ],
)
def test_a_backward_launch_that_cannot_run_is_refused(change, expected):
    q, k, v, ranges = tensors(Case(rows(SPANS), SPANS_S_KV, **SMALL))
    with pytest.raises(ValueError, match=f"launch: value is backward .*expected .*{expected}"):
        backward_launch.BackwardPlan(q, k, v, ranges, None, None, None, replace(small(), **change))


def test_the_gate_of_gradients_sees_a_key_of_one_row_that_is_missing():
    case = Case(rows([(0, 30)], [(0, 29)]), 30, **SMALL)
    q, k, v, ranges = tensors(case)
    up = upstream(case, q, v)
    wanted, allowed = exact(q, k, v, ranges, up), noise(q, k, v, ranges, up)
    assert judge(case, [x.to(case.dtype) for x in wanted], wanted, allowed) < 0.3
    shorter = torch.tensor([[(0, 29)], [(0, 29)]], dtype=torch.int32, device=q.device).view(1, 2, 1, 1, 2)
    with pytest.raises(pytest.fail.Exception, match="relative L2 error"):
        judge(case, [x.to(case.dtype) for x in exact(q, k, v, shorter, up)], wanted, allowed)
