"""Neighbouring queries that share tiles of KV: the coverage index, the result, and which query tiles share."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import nsa_sel
from nsa_sel import dispatch, reference, training
from nsa_sel.bench.methods import contender, sharing
from nsa_sel.bench.suite import cases as suite
from nsa_sel.kernel import launch, shared_config, shared_launch
from nsa_sel.kernel.coverage import PARTIAL_COST
from nsa_sel.kernel.kv import lie_of
from nsa_sel.kernel.launch_config import LaunchConfig
from nsa_sel.kernel.shared_config import SharedLaunch, chunk_widths
from nsa_sel.kernel.shared_launch import Index, SharedPlan

from . import gradient_case
from .parity_case import (
    DEVICE,
    DTYPES,
    OUT_OF_RANGE,
    Case,
    fail,
    has_tma,
    here,
    judge,
    rows,
    tensors,
)
from .test_layouts import MIXED, MIXED_S_KV

ALWAYS = SharedLaunch(here(64, 16), here(64, 16), 64, 64, 4, 2)
TQ4 = {"H": 4, "D": 32, "Dv": 32}
BLOCK = here(64, 16)
# NumPy, of which the interpreter is made, warns of inf - inf and of 0 times NaN.
spoils = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def prefill(layout: str, first: int, last: int, S: int = 4 * BLOCK, L: int = 3 * BLOCK) -> Tensor:
    """Return the ranges of query tokens first to last - 1 of a prefill of S tokens, block by block of BLOCK."""
    case = suite.prefill_case("bf16", layout, 4, 32, 32, L, S, 1, block=BLOCK)
    drawn = case.distribution.draw(case, torch.Generator().manual_seed(1))
    return drawn.view(case.B, case.S, case.G, case.n_spans, 2)[:, first:last].int()


def shared(case: Case, **change) -> SharedLaunch:
    """Return the launch that shares always, with the widths of a case, and what is to be changed."""
    block_d, block_dv = chunk_widths(case.D, case.Dv)
    return replace(ALWAYS, block_d=block_d, block_dv=block_dv, **change)


def planned(
    case: Case, launch: SharedLaunch, max_len: int | None = None, row: LaunchConfig | None = None
) -> tuple[SharedPlan, tuple[Tensor, ...]]:
    q, k, v, ranges = inputs = tensors(case)
    if launch.tma and row is None:
        row = LaunchConfig("tma", BLOCK, launch.block_d, launch.block_dv, 4, 2)
    return SharedPlan(q, k, v, ranges, case.scale, None, max_len, launch, row), inputs


def steps(plan: SharedPlan, q: Tensor, k: Tensor, v: Tensor, ranges: Tensor) -> tuple[Tensor, Index]:
    """Run the three kernels one by one: the result, which begins as NaN, and the index, with what shared after all."""
    passed = plan.passed(plan.places.last)
    index = plan.index(passed)
    out = torch.full(plan.out_shape, float("nan"), dtype=q.dtype, device=q.device)
    plan.cover(ranges, passed, index)
    plan.attend((q, k, v, ranges, out, None), passed, index)
    plan.attend_rest((q, k, v, ranges, out, None), passed, index)
    launch.count_launches(3)
    return out, index


def rest_of(index: Index) -> list[int]:
    """Return the query tiles that are computed row by row."""
    return (index.tensors[2][::2] < 0).nonzero().flatten().tolist()


def check_shared(case: Case, config: SharedLaunch | None = None, max_len: int | None = None) -> Tensor:
    """Run a case with shared tiles, into results full of NaN, put it through the gate, and compare its LSE."""
    plan, (q, k, v, ranges) = planned(case, config or shared(case), max_len)
    out = torch.full(plan.out_shape, float("nan"), dtype=case.dtype, device=DEVICE)
    lse = torch.full(plan.out_shape[:4], float("nan"), device=DEVICE)
    plan.run(q, k, v, ranges, out, lse)
    verdict = judge(case, out, q, k, v, ranges)
    if not verdict.ok:
        fail(case, f"{plan.shared}: {verdict.message}")
    _, want = reference.masked_sdpa(q, k, v, ranges, scale=case.scale, return_lse=True)
    torch.testing.assert_close(lse, want, rtol=2e-3, atol=2e-3)
    return out


def plain_index(ranges: Tensor, S_kv: int, TQ: int, block_t: int) -> list[tuple[list, list, int]]:
    """List for every query tile its whole and its partial tiles with who selects them, and visits (partial: half)."""
    found = []
    B, S, G = ranges.shape[:3]
    for b, first, g in ((b, first, g) for b in range(B) for first in range(0, S, TQ) for g in range(G)):
        who: dict[int, int] = {}
        partial, visits = set(), 0.0
        for q, s in enumerate(range(first, min(first + TQ, S))):
            spans = ranges[b, s, g].tolist()
            times = Counter(t for start, end in spans for t in range(max(start, 0), min(end, S_kv)))
            touching = Counter(
                tile for start, end in spans for tile in {t // block_t for t in range(max(start, 0), min(end, S_kv))}
            )
            for tile in touching:
                who[tile] = who.get(tile, 0) | 1 << q
                covered = all(times[t] == 1 for t in range(tile * block_t, (tile + 1) * block_t))
                is_whole = covered and touching[tile] == 1
                visits += 1.0 if is_whole else 0.5
                if not is_whole:
                    partial.add(tile)
        whole = [(tile, mask) for tile, mask in sorted(who.items()) if tile not in partial]
        found.append((whole, [(tile, mask) for tile, mask in sorted(who.items()) if tile in partial], visits))
    return found


def check_index(ranges: Tensor, S_kv: int, H: int, break_even: float = 0.0) -> list[bool]:
    """Compare the index with plain Python; return which query tiles share."""
    case = Case(ranges, S_kv, H=H, D=16, Dv=16)
    plan, (q, k, v, on_device) = planned(case, shared(case, break_even=break_even))
    passed = plan.passed(plan.places.last)
    index = plan.index(passed)
    plan.cover(on_device, passed, index)
    found_tiles, found_who, counts = index.tensors
    places, shares = index.capacity, []
    for i, (whole, partial, visits) in enumerate(plain_index(ranges, S_kv, plan.TQ, plan.shared.block_t)):
        n_whole, n_partial = counts[2 * i : 2 * i + 2].tolist()
        shares.append(n_whole >= 0)
        cost = len(whole) + PARTIAL_COST.value * len(partial[1:]) + len(partial[:1])
        assert shares[-1] == (visits >= break_even * cost)
        listed = found_tiles[i * places : (i + 1) * places].tolist()
        who = [mask % 2**64 for mask in found_who[i * places : (i + 1) * places].tolist()]
        who = [mask % 2**32 for mask in who] if plan.TQ <= 32 else who
        entries = list(zip(listed, who, strict=True))
        assert n_partial == len(partial)
        if shares[-1]:
            assert n_whole == len(whole) and entries[:n_whole] == whole
            assert entries[::-1][:n_partial] == partial
    return shares


@pytest.mark.parametrize("H", (1, 4, 16))
def test_the_index_lists_what_plain_python_finds(H):
    ranges = rows(
        [(0, 2 * BLOCK), (3 * BLOCK, 4 * BLOCK)],
        [(3 * BLOCK, 4 * BLOCK), (0, BLOCK), (BLOCK, 2 * BLOCK)],
        [(BLOCK - 1, BLOCK + 1), (0, 0), (2 * BLOCK, 2 * BLOCK + 5), (2 * BLOCK + 5, 3 * BLOCK)],
        [(0, BLOCK), (0, BLOCK)],
        [],
        OUT_OF_RANGE,
    )
    check_index(ranges.repeat(1, 1, 2, 1, 1), 4 * BLOCK + 3, H)


def test_the_index_of_more_tiles_than_it_takes_at_once():
    far = 70 * BLOCK
    spans = [[(i * BLOCK * 5, i * BLOCK * 5 + BLOCK), (far - i, far + 2)] for i in range(3)]
    check_index(rows(*spans), far + 20, H=1)  # 64 queries: the maps are made 64 tiles at a time


# One query tile whose queries select the same, one whose queries select nothing in common, and what is left over.
ALIKE_AND_APART = rows(
    *[[(0, BLOCK), (2 * BLOCK, 3 * BLOCK)]] * 4, *[[(i * BLOCK, (i + 1) * BLOCK)] for i in range(4)], [], [(0, BLOCK)]
)


def test_a_query_tile_shares_from_the_break_even_on():
    H = here(16, 4)
    assert check_index(ALIKE_AND_APART, 6 * BLOCK, H) == [True, True, True]
    assert check_index(ALIKE_AND_APART, 6 * BLOCK, H, 2.5) == [True, False, False]


def test_tiles_that_are_selected_in_part_count_as_half_a_visit():
    """Spans between tiles: a row on its own reads half of each tile that it touches."""
    alike = [(BLOCK // 2, BLOCK // 2 + BLOCK), (3 * BLOCK - 1, 4 * BLOCK - 1)]
    between = rows(*[alike] * 4)
    assert check_index(between, 5 * BLOCK, here(16, 4), 1.4) == [True]
    assert check_index(between, 5 * BLOCK, here(16, 4), 2.0) == [False]
    aligned = rows(*[[(0, BLOCK), (3 * BLOCK, 4 * BLOCK)]] * 4)
    assert check_index(aligned, 5 * BLOCK, here(16, 4), 2.0) == [True]


def test_a_plan_says_how_much_a_call_shares():
    case = Case(ALIKE_AND_APART, 6 * BLOCK, H=here(16, 4), D=16, Dv=16)
    for break_even, share, listed in ((0.0, 1, (2 + 4 + 1) / 3), (2.5, 1 / 3, 2), (9.0, 0, 0)):
        plan, inputs = planned(case, shared(case, break_even=break_even))
        assert plan.found(*inputs) == pytest.approx((share, listed))


def test_an_index_that_is_too_large_is_not_made(monkeypatch):
    monkeypatch.setattr(shared_launch, "MAX_INDEX_BYTES", 8)
    plan, inputs = planned(case := Case(MIXED, MIXED_S_KV, **TQ4), shared(case))
    monkeypatch.setattr(plan, "cover", lambda *asked: pytest.fail("the index was made"))
    assert plan.found(*inputs) == (0, 0)
    verdict = judge(case, plan.run(*inputs), *inputs)
    assert verdict.ok, verdict.message


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ("local", "zipf", "random"))
def test_triton_sel_parity_of_shared_tiles_in_prefill(layout, dtype):
    ranges = prefill(layout, 3 * BLOCK + 3, 3 * BLOCK + here(61, 13))
    case = Case(torch.cat((ranges, MIXED[:, :0].new_zeros(1, 1, 1, ranges.shape[3], 2)), 1), 4 * BLOCK, dtype=dtype)
    out = check_shared(replace(case, **TQ4))
    assert (out[:, -1] == 0).all()


@pytest.mark.parametrize(("break_even", "partial_stages"), ((0.0, 2), (1.2, 2), (0.0, 0)))
def test_triton_sel_parity_of_shared_tiles_beside_rows_of_their_own(break_even, partial_stages):
    """Touching, overlapping, repeated, empty, unordered and wild spans, several groups and batch entries."""
    ranges = torch.cat((MIXED, rows(OUT_OF_RANGE)[:, :, :, :3], MIXED.flip(3), MIXED[:, :2]), 1)
    case = Case(ranges.repeat(2, 1, 2, 1, 1), MIXED_S_KV, **TQ4)
    check_shared(case, shared(case, break_even=break_even, rest_rows=3, partial_stages=partial_stages))


@pytest.mark.parametrize(
    ("dtype", "H", "D", "Dv"),
    [(DTYPES[i % 3], H, D, Dv) for i, (H, D, Dv) in enumerate(
        [(1, 64, 16), (2, 16, 64), (3, 48, 32), (6, 80, 48), (8, 32, 80), (16, 96, 64), (33, 16, 32), (64, 64, 32)]
    )],
)  # fmt: skip
def test_triton_sel_parity_of_shared_tiles_of_every_shape(dtype, H, D, Dv):
    case = Case(MIXED, MIXED_S_KV, H=H, D=D, Dv=Dv, dtype=dtype)
    check_shared(case, shared(case, rows=max(16, 1 << (H - 1).bit_length()), num_warps=4, num_stages=1))


@pytest.mark.skipif(not has_tma(), reason="TMA descriptors need Triton 3.4 and compute capability 9.0")
@pytest.mark.parametrize("view", ("plain", "permuted", "every_second"))  # groups side by side; with others between
def test_triton_sel_parity_of_shared_tiles_by_tma(view):
    case = Case(MIXED.repeat(1, 1, 2, 1, 1), MIXED_S_KV, H=4, D=64, Dv=48, view=view)
    plan, _ = planned(case, config := shared(case, tma=True, partial_stages=2))
    assert (plan.values["VIEW"], plan.values["COLUMNS"]) == (view != "plain", view == "permuted")
    check_shared(case, config)


@pytest.mark.parametrize("view", ("permuted", "odd", "every_second"))
def test_triton_sel_parity_of_shared_tiles_of_strided_tensors(view):
    check_shared(Case(MIXED[:, :4].repeat(2, 1, 2, 1, 1), MIXED_S_KV, view=view, **TQ4))


def test_triton_sel_parity_of_shared_tiles_with_lists_as_short_as_the_lengths_allow():
    case = Case(prefill("local", 3 * BLOCK + 3, 3 * BLOCK + 11), 4 * BLOCK, **TQ4)
    longest = max(sum(end - start for start, end in spans) for spans in case.ranges.flatten(0, 2).tolist())
    check_shared(case, max_len=longest)
    plan, inputs = planned(replace(case, ranges=case.ranges[..., :0, :]), shared(case), 0)
    assert plan.capacity(case.S_kv) == 1
    too_small, _ = planned(case, shared(case, break_even=100.0), longest)  # a list longer than its places
    assert judge(case, steps(too_small, *inputs[:3], tensors(case)[3])[0], *tensors(case)).ok


Runs = st.lists(st.tuples(st.integers(-9, 90), st.integers(-3, 60)), min_size=1, max_size=5)


@settings(max_examples=here(200, 12), deadline=None)
@given(
    st.lists(Runs, min_size=2, max_size=here(9, 6)),
    st.sampled_from((0.0, 1.5)),
    st.sampled_from(("64", "16")),
    st.sampled_from((0, 2)),
)
@example([[(0, 16), (16, 16), (0, 16)], [(0, 32)]], 0.0, "16", 2)
@example([[(0, 16), (16, 16), (0, 16)], [(0, 32), (40, 3), (50, 3)]], 0.0, "16", 0)
def test_triton_sel_parity_of_shared_tiles_of_any_spans(spans, break_even, rows_of_products, partial_stages):
    lists = [[(start, start + length) for start, length in runs] for runs in spans]
    case = Case(rows(*lists), 83, **TQ4)
    launch = shared(case, break_even=break_even, rows=here(int(rows_of_products), 16), partial_stages=partial_stages)
    check_shared(case, launch)


def test_triton_sel_parity_of_shared_tiles_twice_gives_the_same_bits():
    case = Case(ALIKE_AND_APART.repeat(1, 1, 3, 1, 1), 4 * BLOCK, H=here(16, 4), D=32, Dv=32)
    plan, inputs = planned(case, shared(case, break_even=2.5))
    out, index = steps(plan, *inputs)
    assert len(rest_of(index)) == 6 and judge(case, out, *inputs).ok
    assert all(torch.equal(steps(plan, *inputs)[0], out) for _ in range(here(20, 1)))


@spoils
@pytest.mark.parametrize("partial_stages", (0, 2))
@pytest.mark.parametrize("value", ("float('nan')", "float('inf')", "-float('inf')"))
@pytest.mark.parametrize("which", ("k", "v"))
def test_triton_sel_parity_of_shared_tiles_keeps_apart_what_only_some_queries_select(which, value, partial_stages):
    """Token `own` is selected, as part of a whole and of a partial tile, by one query of the first query tile alone."""
    common, H = (0, BLOCK), here(16, 4)
    for own, spans in ((2 * BLOCK + 3, (2 * BLOCK, 3 * BLOCK)), (BLOCK + 5, (BLOCK + 5, BLOCK + 9))):
        case = Case(rows(*[[common]] * 2, [common, spans], *[[common]] * 5), 3 * BLOCK, H=H, D=32, Dv=32)
        spoilt = replace(case, edit=f"{which}[:, :, {own}] = {value}")
        plan, inputs = planned(spoilt, shared(case, partial_stages=partial_stages))
        out, index = steps(plan, *inputs)
        assert rest_of(index) == [0]
        others = [0, 1, 3, 4, 5, 6, 7]
        verdict = judge(replace(case, ranges=case.ranges[:, others]), out[:, others], *_rows_of(case, others))
        assert verdict.ok, verdict.message
        alone = launch.forward(*inputs, launch=plan.config)
        assert torch.equal(out[:, :4].nan_to_num(7.0), alone[:, :4].nan_to_num(7.0)), "computed row by row"


def test_triton_sel_parity_of_shared_tiles_of_keys_that_are_selected_many_times():
    """Up to three times they are weighed in the shared product; more often, the query tile is computed row by row."""
    for times in (2, 3, 4, 9):
        case = Case(rows([(3, 5)] * times + [(0, 4)], [(1, 2)], *[[(0, 8)]] * 5), BLOCK, H=here(16, 4), D=32, Dv=32)
        plan, inputs = planned(case, shared(case))
        out, index = steps(plan, *inputs)
        verdict = judge(case, out, *inputs)
        assert verdict.ok, verdict.message
        assert rest_of(index) == ([] if times < 3 else [0])  # token 3 is in (0, 4) too


def _rows_of(case: Case, queries: list[int]) -> tuple[Tensor, ...]:
    q, k, v, ranges = tensors(case)
    return q[:, queries], k, v, ranges[:, queries]


@spoils
@pytest.mark.parametrize("partial_stages", (0, 2))
@pytest.mark.parametrize("tma", (False, pytest.param(True, marks=pytest.mark.skipif(not has_tma(), reason="no TMA"))))
def test_triton_sel_parity_of_shared_tiles_does_not_see_what_nobody_selects(tma, partial_stages):
    spans = [[(0, BLOCK), (BLOCK + 2, BLOCK + 7)], [(0, BLOCK)], [(BLOCK + 3, BLOCK + 9)], []]
    case = Case(rows(*spans).repeat(1, 1, 2, 1, 1), 2 * BLOCK - 2, **TQ4)
    plan, inputs = planned(case, shared(case, tma=tma, partial_stages=partial_stages))
    out, _ = steps(plan, *inputs)
    for value in ("1e4", "float('nan')", "float('inf')"):
        outside = [*range(BLOCK, BLOCK + 2), *range(BLOCK + 9, 2 * BLOCK - 2)]
        spoilt = replace(case, edit=f"k[:, :, {outside}] = v[:, :, {outside}] = {value}")
        again, index = steps(plan, *tensors(spoilt))
        assert judge(case, again, *inputs).ok
        assert len(rest_of(index)) == (0 if value == "1e4" else 2)
        assert value != "1e4" or torch.equal(again, out)


def test_triton_sel_parity_of_shared_tiles_of_a_context_that_grows():
    case = Case(MIXED[:, :4], MIXED_S_KV, **TQ4)
    plan, (q, k, v, ranges) = planned(case, shared(case), 200)
    for S_kv in (MIXED_S_KV, MIXED_S_KV - 20, 3):
        shorter = k[:, :, :S_kv], v[:, :, :S_kv]
        assert (placed := plan.places.find(lie_of(*shorter))) is not None
        out = plan.run(q, *shorter, ranges, placed=placed)
        torch.testing.assert_close(out.double(), reference.oracle(q, *shorter, ranges).double(), rtol=2e-2, atol=2e-2)


@pytest.fixture
def plans(monkeypatch) -> list[SharedPlan]:
    """Let this device share from half a visit on, however small the call; return the plans that are run."""
    from nsa_sel.kernel.device import gpu_of

    monkeypatch.setitem(shared_config.BREAK_EVEN, gpu_of(torch.empty(0, device=DEVICE).device).name, 0.5)
    for name in ("CERTAIN_WORK", "UNCERTAIN_WORK", "FEWEST_QUERIES", "SHORTEST_SPANS"):
        monkeypatch.setattr(shared_config, name, 0)
    monkeypatch.setattr(shared_launch, "gpu_of", lambda device: replace(gpu_of(device), sm_count=1))
    for module in (dispatch, training):
        monkeypatch.setattr(module, "_plans", {})
    plans, run = [], SharedPlan.run
    monkeypatch.setattr(SharedPlan, "run", lambda plan, *args: plans.append(plan) or run(plan, *args))
    return plans


@pytest.mark.public
def test_triton_sel_parity_of_shared_tiles_through_the_public_function(plans):
    case = Case(prefill("local", 2 * BLOCK + 3, 2 * BLOCK + 35), 4 * BLOCK, H=here(8, 16), D=64, Dv=64)
    q, k, v, ranges = tensors(case)
    assert nsa_sel.choose_route(q, k, v, ranges, max_len=3 * BLOCK, backend="triton").shares
    assert not nsa_sel.choose_route(q[:, :1], k, v, ranges[:, :1], max_len=3 * BLOCK, backend="triton").shares
    for _ in range(2):  # the second finds the plan of the first
        out = nsa_sel.selection_attention(q, k, v, ranges, max_len=3 * BLOCK, backend="triton")
        verdict = judge(case, out, q, k, v, ranges)
        assert verdict.ok, verdict.message
    assert len(plans) == 2 and plans[0] is plans[1]


@pytest.mark.public
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_triton_sel_parity_of_gradients_of_a_call_that_shares_tiles(dtype, plans):
    """The backward pass takes the result and the LSE that the shared kernel wrote."""
    case = Case(ALIKE_AND_APART.repeat(2, 1, 1, 1, 1), 5 * BLOCK, H=here(16, 4), D=32, Dv=16, dtype=dtype)
    q, k, v, ranges = inputs = tensors(case)
    up = gradient_case.upstream(case, q, v)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    results = nsa_sel.selection_attention(*leaves, ranges, max_len=2 * BLOCK, backend="triton", return_lse=True)
    assert [plan.found(*inputs).share for plan in plans] == [1]
    found = torch.autograd.grad(results, leaves, (up.dout, up.dlse))
    allowed = gradient_case.noise(*inputs, up)
    gradient_case.judge(case, found, gradient_case.exact(*inputs, up), allowed, whole=True)


@pytest.mark.skipif(DEVICE != "cpu", reason="its timer is one for a machine without a GPU")
def test_what_is_found_of_a_timed_call_is_the_share_and_both_kernels_times(monkeypatch):
    case = suite.Case("shared", "bf16", "kept9", 16, 64, 64, 3 * 16, 64, S=64, S_kv=64, block=16)
    timer = SimpleNamespace(samples=lambda call: [call().isfinite().sum().item() * 1e-6] * 3)
    state = contender.CaseState(case, timer)
    found = sharing.figures(state)
    assert found["shared"] is None
    assert found["rows_us"] == found["tiles_us"] == pytest.approx(64 * 16 * 64), "what the timer says of each"
    assert found["union"] == 1.5, "tiles of 32, of which the first 32 queries see one and the others two"
    monkeypatch.setattr(sharing, "SHARED", "another family")
    assert sharing.figures(state) == {"shared": None}


@pytest.mark.skipif(DEVICE == "cpu", reason="captures a CUDA graph")
def test_triton_sel_parity_of_shared_tiles_in_a_graph():
    case = Case(prefill("random", 2 * BLOCK + 3, 4 * BLOCK), 4 * BLOCK, H=16, D=64, Dv=64)
    plan, (q, k, v, ranges) = planned(case, shared(case, break_even=2.0, rows=64))
    want, out = plan.run(q, k, v, ranges), torch.empty(plan.out_shape, dtype=case.dtype, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.run(q, k, v, ranges, out)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, want)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rows": 4}, "rows that are a power of two from 16 on"),
        ({"rows": 1024}, "rows .* for 1 to 64 queries"),
        ({"block_d": 16, "block_dv": 16}, "at most 4 column chunks"),
        ({"block_dv": 32}, "chunks of K and V of 16 columns, of 32, or of 64 and more"),
        ({"block_t": 24}, "tiles and chunks that are powers of two"),
    ],
)
def test_a_shared_launch_that_cannot_run_is_refused(change, expected):
    case = Case(MIXED, MIXED_S_KV, H=8, D=80)
    with pytest.raises(ValueError, match=f"launch: value is shared .*expected .*{expected}"):
        planned(case, replace(shared(case), **change))


def test_a_scale_that_is_not_positive_is_computed_row_by_row():
    q, k, v, ranges = tensors(Case(MIXED, MIXED_S_KV))
    with pytest.raises(ValueError, match="expected a positive scale, which is -1.0"):
        SharedPlan(q, k, v, ranges, -1.0, None, None, ALWAYS)
