"""More groups, batches and keys than one launch of SDPA takes."""

from __future__ import annotations

import pytest
import torch
from mode_case import DEVICE, assert_right, call, inputs, needs_gpu

from nsa_sel import UnsupportedError, reference


@pytest.mark.parametrize("form", (reference.packed_sdpa, reference.masked_sdpa))
@pytest.mark.parametrize(("limit", "value"), [("MAX_SDPA_BATCH", 3), ("MAX_MASK_KEYS", 39), ("MAX_MASK", 100)])
def test_beyond_a_limit_of_sdpa_the_result_and_its_gradients_are_the_same(form, limit, value, monkeypatch):
    args = inputs()
    leaves = [x.requires_grad_() for x in args[:3]]

    def run():
        out, lse = form(*args, return_lse=True)
        return out, lse, *torch.autograd.grad(out.sin().sum(), leaves)

    want = run()
    monkeypatch.setattr(reference, limit, value)
    for got, expected in zip(run(), want, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_sdpa_is_given_no_more_than_its_limits(monkeypatch):
    seen = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def recorded(q, k, v, **more):
        seen.append(len(q))
        return sdpa(q, k, v, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    monkeypatch.setattr(reference, "MAX_SDPA_BATCH", 3)
    assert_right(reference.masked_sdpa(*inputs()), *inputs())
    assert seen == [3, 1]


MANY = 65_536 + 5


@needs_gpu
@pytest.mark.parametrize("backend", ("auto", "triton", "packed_sdpa", "masked_sdpa"))
@pytest.mark.parametrize(("B", "G"), [(MANY, 1), (1, MANY)])
def test_many_batches_or_groups(backend, B, G):
    q, k, v = (torch.randn(B, *shape, 16, device=DEVICE) for shape in ((1, G, 1), (G, 4), (G, 4)))
    ranges = torch.tensor([[1, 4]], device=DEVICE).expand(B, 1, G, 1, 2)
    if backend == "triton" and G > 65_535:
        with pytest.raises(UnsupportedError, match=f"G={G} is above 65535"):
            call(backend)(q, k, v, ranges)
        return
    out = call(backend)(q, k, v, ranges)
    weights = (torch.einsum("bsghd,bgtd->bsght", q.double(), k[:, :, 1:].double()) / 4).softmax(-1)
    want = torch.einsum("bsght,bgtd->bsghd", weights, v[:, :, 1:].double())
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=0)


@needs_gpu
@pytest.mark.parametrize("backend", ("packed_sdpa", "masked_sdpa"))
@pytest.mark.parametrize(("S", "H", "S_kv"), [(1, 1, MANY), (2, 4, MANY), (1, 16, 140_001)])
def test_a_mask_over_many_keys(backend, S, H, S_kv):
    q, k, v = (torch.randn(1, *shape, 16, device=DEVICE) for shape in ((S, 1, H), (1, S_kv), (1, S_kv)))
    ranges = torch.tensor([[3, S_kv]], device=DEVICE).expand(1, S, 1, 1, 2).clone()
    ranges[0, 0, 0, 0, 1] -= 5  # of different lengths
    for x in (q, k, v):
        x.requires_grad_()
    out = call(backend, min_len=0, max_len=S_kv)(q, k, v, ranges)
    assert_right(out, q, k, v, ranges)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@needs_gpu
def test_a_mask_of_more_than_2_to_31_values():
    free, _ = torch.cuda.mem_get_info()
    if free < 80e9:  # the mask, and SDPA's scores in fp32 more than once
        pytest.skip(f"needs 80 GB of free GPU memory, found {free / 1e9:.1f}")
    q, k, v = (torch.randn(1, *shape, 16, device=DEVICE) for shape in ((40_000, 1, 1), (1, 60_000), (1, 60_000)))
    ranges = torch.tensor([[3, 50]], device=DEVICE).expand(1, 40_000, 1, 1, 2)
    torch.testing.assert_close(
        call("masked_sdpa")(q, k, v, ranges), call("packed_sdpa")(q, k, v, ranges), atol=1e-5, rtol=0
    )
