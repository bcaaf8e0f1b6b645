"""K and V that are views of a larger cache, and a context that grows in it."""

from __future__ import annotations

import pytest
import torch

import nsa_sel
from nsa_sel import dispatch, reference
from nsa_sel.bench.suite import gate
from nsa_sel.kernel.launch_config import LaunchConfig

from .parity_case import DEVICE, has_tma

B, G, H, D, ROOM = 2, 2, 4, 64, 200  # tokens that the cache has room for
TMA = LaunchConfig("tma", 64, 64, 64, 4, 2)
TMA_WITH_SMALL_TAILS = LaunchConfig("tma", 32, 32, 64, 1, 1, splits=2)
VIEWS = {  # of a cache [B + 1, G + 1, ROOM, D + 16]; what is outside a view must have no influence
    "tokens": lambda c, t: c[:B, :G, :t],
    "later tokens": lambda c, t: c[:B, :G, 8 : 8 + t],
    "other groups": lambda c, t: c[1:, 1:, :t],
    "one group": lambda c, t: c[:B, 1:2, :t].expand(B, G, t, -1),
    "one sequence": lambda c, t: c[1:2, :G, :t].expand(B, G, t, -1),
    "groups first": lambda c, t: c[:B, :G, :t].transpose(0, 1).contiguous().transpose(0, 1),
    "columns": lambda c, t: c[:B, :G, :t, 16:],
}


def cache(seed: int) -> torch.Tensor:
    return torch.randn(B + 1, G + 1, ROOM, D + 16, generator=torch.Generator().manual_seed(seed)).half().to(DEVICE)


def view_of(which: str, whole: torch.Tensor, t: int) -> torch.Tensor:
    """Return the view with D columns, in a cache of its own where everything else is NaN."""
    alone = torch.full_like(whole, float("nan"))
    view, source = (VIEWS[which](x, t)[..., :D] for x in (alone, whole))
    for b in range(B):  # by groups, since expanded memory cannot be written as a whole
        for g in range(G):
            view[b, g].copy_(source[b, g])
    return view


def query_and_ranges(t: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q, and spans up to the last token, two of which reach past the context."""
    q = torch.randn(B, 1, G, H, D, generator=torch.Generator().manual_seed(9)).half().to(DEVICE)
    spans = [[0, 64], [t - 3, t + 9], [t - 70, t - 5], [20, 20], [t + 1, ROOM]]
    return q, torch.tensor(spans, dtype=torch.int32, device=DEVICE).expand(B, 1, G, len(spans), 2)


def assert_right(out, q, k, v, ranges):
    want, packed = reference.oracle(q, k, v, ranges), reference.packed_sdpa(q, k, v, ranges)
    verdict = gate.check(out, want, packed, dtype=q.dtype, logit_factor=1)
    assert verdict.ok, verdict.message


@pytest.mark.skipif(not has_tma(), reason="no TMA descriptors here")
@pytest.mark.parametrize("config", (TMA, TMA_WITH_SMALL_TAILS), ids=str)
@pytest.mark.parametrize("which", VIEWS)
def test_triton_sel_parity_of_descriptors_of_views_of_a_larger_cache(which, config):
    from nsa_sel.kernel import launch

    k, v = (view_of(which, cache(seed), 130) for seed in (1, 2))
    q, ranges = query_and_ranges(130)
    assert launch.call_of(q, k, v, ranges).fits_tma
    assert_right(launch.forward(q, k, v, ranges, launch=config), q, k, v, ranges)


@pytest.mark.parametrize("which", VIEWS)
def test_triton_sel_parity_of_views_of_a_larger_cache_by_pointers(which):
    from nsa_sel.kernel import launch

    k, v = (view_of(which, cache(seed), 130) for seed in (1, 2))
    q, ranges = query_and_ranges(130)
    config = LaunchConfig("whole", 32, 64, 64, 4, 2, splits=2)
    assert_right(launch.forward(q, k, v, ranges, launch=config), q, k, v, ranges)


@pytest.mark.skipif(not has_tma(), reason="no TMA descriptors here")
@pytest.mark.parametrize(
    "apart",
    (
        lambda k, v: (k.transpose(1, 2).contiguous().transpose(1, 2), v),  # groups next to each other
        lambda k, v: (k.contiguous(), v),  # a token has other rows in K than in V
        lambda k, v: (k[..., 1:], v[..., 1:]),  # not aligned to 16 bytes
    ),
    ids=("groups inside tokens", "other rows", "odd"),
)
def test_triton_sel_parity_of_what_descriptors_cannot_describe(apart):
    from nsa_sel.kernel import launch

    k, v = apart(*(view_of("tokens", cache(seed), 130) for seed in (1, 2)))
    q, ranges = query_and_ranges(130)
    q = q[..., : k.shape[3]]
    with pytest.raises(ValueError, match="expected a load that does without TMA descriptors"):
        launch.forward(q, k, v, ranges, launch=TMA)
    k, v, q = (x[..., : D // 16 * 16 - 16] for x in (k, v, q))
    assert_right(launch.forward(q, k, v, ranges), q, k, v, ranges)


@pytest.fixture
def plans(monkeypatch):
    """Return a function that lists the plans of this test."""
    monkeypatch.setattr(dispatch, "_plans", {})
    return lambda: [plan for _, known in dispatch._plans.values() for plan in known]


@pytest.mark.parametrize("hints", ({"min_len": 1, "max_len": 200}, {}), ids=("hints", "no hints"))
def test_triton_sel_parity_of_one_buffer_at_many_lengths(hints, plans):
    """The same pointers and strides with another S_kv each time, to and fro: one plan serves all."""
    from nsa_sel.kernel import launch

    whole = [cache(seed) for seed in (1, 2)]
    for t in (130, 200, 131, 130):
        k, v = (x[:B, :G, :t, :D] for x in whole)
        assert k.data_ptr() == whole[0].data_ptr()
        q, ranges = query_and_ranges(t)
        out, lse = nsa_sel.selection_attention(q, k, v, ranges, backend="triton", return_lse=True, **hints)
        assert_right(out, q, k, v, ranges)
        assert torch.equal(out, launch.forward(q, k, v, ranges, **hints))
    assert len(plans()) == 1


@pytest.mark.skipif(not has_tma(), reason="no TMA descriptors here")
def test_triton_sel_parity_of_a_whole_cache_and_then_of_a_part_of_it(plans, monkeypatch):
    """Groups that lie one behind the other, and the same strides with tokens between them: another kernel."""
    from nsa_sel.kernel import launch

    monkeypatch.setattr(launch, "launch_for", lambda *_, **__: TMA)
    whole = [cache(seed)[:B, :G, :, :D].contiguous() for seed in (1, 2)]
    room = whole[0].shape[2]
    for t in (room, 130, 131, room):
        k, v = (x[:, :, :t] for x in whole)
        q, ranges = query_and_ranges(t)
        hints = {"min_len": 1, "max_len": 200}
        assert_right(nsa_sel.selection_attention(q, k, v, ranges, backend="triton", **hints), q, k, v, ranges)
    assert [plan.values["VIEW"] for plan in plans()] == [False, True]


@pytest.mark.parametrize("hints", ({"min_len": 1, "max_len": 200}, {}), ids=("hints", "no hints"))
def test_triton_sel_parity_of_a_cache_that_torch_cat_makes_anew(hints, plans):
    """Every step has other strides over batch and groups: one plan serves all."""
    whole = [cache(seed)[:B, :G, :, :D] for seed in (1, 2)]
    for t in (130, 131, 150, 130):
        k, v = (torch.cat((x[:, :, : t - 1], x[:, :, t - 1 : t]), 2) for x in whole)
        assert k.stride() == (G * t * D, t * D, D, 1)
        q, ranges = query_and_ranges(t)
        out = nsa_sel.selection_attention(q, k, v, ranges, backend="triton", **hints)
        assert_right(out, q, k, v, ranges)
    assert len(plans()) == 1


@pytest.mark.parametrize("load", ("gather", "whole", "tma") if has_tma() else ("gather", "whole"))
def test_triton_sel_parity_of_a_cache_with_the_groups_of_a_token_side_by_side(load):
    """[B, tokens, G, D], as models that write whole tokens have it, seen as [B, G, tokens, D]."""
    from nsa_sel.kernel import launch

    k, v = (cache(seed)[:B, :G, :130, :D].transpose(1, 2).contiguous().transpose(1, 2) for seed in (1, 2))
    assert k.stride() == (130 * G * D, D, G * D, 1)
    q, ranges = query_and_ranges(130)
    assert_right(launch.forward(q, k, v, ranges, launch=LaunchConfig(load, 64, 64, 64, 4, 2)), q, k, v, ranges)
