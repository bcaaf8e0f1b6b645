"""The references against a loop in pure Python, against one another, and their gradients against a float64 formula."""

from __future__ import annotations

import math

import pytest
import torch

from nsa_sel import reference
from nsa_sel.bench.suite import gate

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
B, S, G, H, D, Dv, S_kv = 2, 3, 2, 4, 32, 16, 24
RAGGED = [
    [(0, 5), (9, 12), (0, 0)],
    [(0, 24), (0, 0), (0, 0)],
    [(7, 7), (5, 2), (0, 0)],  # an empty row
    [(3, 6), (3, 6), (4, 5)],  # keys covered two and three times
    [(20, 99), (-4, 2), (8, 9)],  # out of range, unordered
    [(23, 24), (0, 0), (0, 0)],  # one token
]


def draw(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Return q, k, v and ranges whose rows take the layouts of RAGGED in turn."""
    torch.manual_seed(seed)
    q = torch.randn(B, S, G, H, D).to(dtype)
    k, v = (torch.randn(B, G, S_kv, width).to(dtype) for width in (D, Dv))
    ranges = torch.tensor([RAGGED[row % len(RAGGED)] for row in range(B * S * G)]).view(B, S, G, 3, 2)
    return q, k, v, ranges


def _mean(weights: list[float], values: list[list[float]]) -> list[float]:
    total = sum(weights) or 1.0
    return [sum(w * value[d] for w, value in zip(weights, values, strict=True)) / total for d in range(Dv)]


def by_hand(q, k, v, ranges, scale: float) -> list:
    """Compute the operation on nested lists with math.exp and nothing else."""
    q, k, v, ranges = (x.tolist() for x in (q.double(), k.double(), v.double(), ranges))
    dims = range(D)
    out = [[[[None] * H for _ in range(G)] for _ in range(S)] for _ in range(B)]
    for b in range(B):
        for s in range(S):
            for g in range(G):
                chosen = [t for start, end in ranges[b][s][g] for t in range(max(start, 0), min(end, S_kv))]
                for h in range(H):
                    query = q[b][s][g][h]
                    weights = [math.exp(scale * sum(query[d] * k[b][g][t][d] for d in dims)) for t in chosen]
                    out[b][s][g][h] = _mean(weights, [v[b][g][t] for t in chosen])
    return out


@pytest.mark.parametrize("scale", (None, 0.3))
def test_the_oracle_is_the_definition(scale):
    q, k, v, ranges = draw(torch.bfloat16)
    got = reference.oracle(q, k, v, ranges, scale=scale)
    assert got.dtype == torch.float64
    expected = torch.tensor(by_hand(q, k, v, ranges, scale or 1 / math.sqrt(D)), dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_the_oracle_of_chosen_rows_is_that_part_of_the_whole():
    q, k, v, ranges = draw()
    rows = torch.tensor([11, 0, 4, 2])
    whole = reference.oracle(q, k, v, ranges).view(B * S * G, H, Dv)
    assert torch.equal(reference.oracle(q, k, v, ranges, rows=rows), whole[rows])


@pytest.mark.parametrize("name", ("packed_sdpa", "masked_sdpa"))
@pytest.mark.parametrize("scale", (None, 0.3))
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_sdpa_forms_pass_the_gate(dtype, scale, name):
    if (name, dtype) == ("packed_sdpa", torch.bfloat16) and torch.__version__.startswith("2.4."):
        pytest.skip("torch 2.4's SDPA on the CPU rounds its weights too often in bf16")
    q, k, v, ranges = draw(dtype)
    want = reference.oracle(q, k, v, ranges, scale=scale)
    out = getattr(reference, name)(q, k, v, ranges, scale=scale)
    verdict = gate.check(out, want, reference.packed_sdpa(q, k, v, ranges, scale=scale), dtype=dtype)
    assert verdict.ok, verdict.message


@pytest.mark.parametrize("name", ("oracle", "packed_sdpa", "masked_sdpa"))
def test_empty_rows_are_zero_and_do_not_disturb_others(name):
    q, k, v, ranges = draw()
    run = getattr(reference, name)
    out = run(q, k, v, ranges).view(B * S * G, H, Dv)
    empty = [row for row in range(B * S * G) if row % len(RAGGED) == 2]
    assert (out[empty] == 0).all()
    assert (out.abs().amax((1, 2)) > 0).sum() == B * S * G - len(empty)
    assert (run(q, k, v, torch.zeros_like(ranges)) == 0).all()
    assert run(q, k, v, ranges[..., :0, :]).eq(0).all()
    assert run(q[:0], k[:0], v[:0], ranges[:0]).shape == (0, S, G, H, Dv)
    assert run(q[:, :0], k, v, ranges[:, :0]).shape == (B, 0, G, H, Dv)
    assert run(q, k[:, :, :0], v[:, :, :0], ranges).eq(0).all()


@pytest.mark.parametrize("name", ("oracle", "packed_sdpa", "masked_sdpa"))
def test_a_key_covered_twice_counts_twice(name):
    q, k, v, _ = draw()
    run = getattr(reference, name)
    twice = torch.tensor([(0, 6), (2, 4)]).expand(B, S, G, 2, 2)
    order = [0, 1, 2, 2, 3, 3, 4, 5]
    once = torch.tensor([(0, 8)]).expand(B, S, G, 1, 2)
    expected = reference.oracle(q, k[:, :, order], v[:, :, order], once)
    torch.testing.assert_close(run(q, k, v, twice).double(), expected, rtol=1e-5, atol=1e-6)
    counted_once = run(q, k, v, torch.tensor([(0, 6)]).expand(B, S, G, 1, 2)).double()
    assert (counted_once - expected).abs().max() > 1e-2


def test_hints_change_the_path_of_packed_sdpa_but_not_its_result():
    q, k, v, ranges = draw()
    expected = reference.oracle(q, k, v, ranges)
    for min_len, max_len in ((0, 24), (None, 24), (0, None), (0, 40)):
        out = reference.packed_sdpa(q, k, v, ranges, min_len=min_len, max_len=max_len)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    even = torch.tensor([(1, 4), (9, 14)]).expand(B, S, G, 2, 2)  # all rows of one length: no mask
    out = reference.packed_sdpa(q, k, v, even, min_len=8, max_len=8)
    torch.testing.assert_close(out.double(), reference.oracle(q, k, v, even), rtol=1e-5, atol=1e-6)


def test_packed_sdpa_does_not_see_what_is_not_selected():
    q, k, v, _ = draw()
    ranges = torch.tensor([(2, 5), (9, 9)]).expand(B, S, G, 2, 2)
    expected = reference.packed_sdpa(q, k, v, ranges)
    k[:, :, 5:] = v[:, :, 5:] = k[:, :, :2] = v[:, :, :2] = float("nan")
    assert torch.equal(reference.packed_sdpa(q, k, v, ranges), expected)


def test_gather_rows_packs_the_tokens_in_span_order():
    q, k, v, ranges = draw()
    k_rows, v_rows, valid = reference.gather_rows(k, v, ranges, 24)
    for row in range(B * S * G):
        b, g = row // (S * G), row % G
        chosen = [t for start, end in RAGGED[row % len(RAGGED)] for t in range(max(start, 0), min(end, S_kv))]
        assert valid[row].tolist() == [True] * len(chosen) + [False] * (24 - len(chosen))
        assert torch.equal(k_rows[row, : len(chosen)], k[b, g, chosen])
        assert torch.equal(v_rows[row, : len(chosen)], v[b, g, chosen])


def test_sdpa_rows_splits_a_batch_beyond_the_grid_limit(monkeypatch):
    torch.manual_seed(0)
    q, k, v = torch.randn(7, H, D), torch.randn(7, 5, D), torch.randn(7, 5, Dv)
    valid = torch.rand(7, 5) < 0.6
    whole = [reference.sdpa_rows(q, k, v, mask) for mask in (None, valid)]
    monkeypatch.setattr(reference, "MAX_SDPA_BATCH", 3)
    for mask, expected in zip((None, valid), whole, strict=True):
        torch.testing.assert_close(reference.sdpa_rows(q, k, v, mask), expected)


def formula(q, k, v, ranges, scale: float) -> torch.Tensor:
    """Return the operation as one float64 expression that autograd can follow: weights = multiplicity · exp."""
    t = torch.arange(S_kv)
    start, end = ranges[..., :1], ranges[..., 1:]
    count = ((t >= start) & (t < end)).sum(-2).double()  # [B, S, G, S_kv]
    logits = torch.einsum("bsghd,bgtd->bsght", q, k) * scale
    weights = torch.exp(logits) * count[:, :, :, None]
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("bsght,bgtd->bsghd", weights / torch.where(total == 0, 1.0, total), v)


@pytest.mark.parametrize("name", ("packed_sdpa", "masked_sdpa"))
def test_gradients_match_autograd_of_the_formula(name):
    q, k, v, ranges = draw()
    upstream = torch.randn(B, S, G, H, Dv)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    (formula(*exact, ranges, 0.2) * upstream).sum().backward()
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    (getattr(reference, name)(*leaves, ranges, scale=0.2) * upstream).sum().backward()
    for got, expected, letter in zip(leaves, exact, "qkv", strict=True):
        assert expected.grad.abs().max() > 0.1
        torch.testing.assert_close(
            got.grad.double(), expected.grad, rtol=1e-4, atol=1e-5, msg=lambda text, letter=letter: f"d{letter}: {text}"
        )


@pytest.mark.parametrize("name", ("packed_sdpa", "masked_sdpa"))
def test_gradients_exist_and_are_zero_without_a_selected_token(name):
    q, k, v, ranges = draw()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    getattr(reference, name)(*leaves, torch.zeros_like(ranges)).sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert (leaf.grad == 0).all()
