"""Autocast does not touch the operation: it computes in the dtype of q, k and v and returns that."""

from __future__ import annotations

import pytest
import torch
from mode_case import DEVICE, ON_GPU, assert_right, call, each_backend, hinted_or_not, inputs

from nsa_sel import reference

LOW = (torch.bfloat16, torch.float16) if ON_GPU else (torch.bfloat16,)


@each_backend
@hinted_or_not
@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
def test_fp32_stays_fp32(backend, hints, low, compiled):
    def run(*args):
        with torch.autocast(DEVICE, dtype=low):
            return call(backend, **hints)(*args)

    torch._dynamo.reset()
    out = (torch.compile(run, backend="aot_eager") if compiled else run)(*inputs())
    assert out.dtype == torch.float32
    assert_right(out, *inputs())


@each_backend
def test_low_precision_stays_what_it_is(backend):
    args = inputs(torch.float16)
    want = call(backend)(*args)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(call(backend)(*args), want)


@pytest.mark.parametrize("form", (reference.packed_sdpa, reference.masked_sdpa))
def test_the_reference_forms_keep_the_rule_when_called_themselves(form):
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out, lse = form(*inputs(), return_lse=True)
    assert (out.dtype, lse.dtype) == (torch.float32, torch.float32)
    assert_right(out, *inputs())


@each_backend
@pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
def test_gradients_stay_fp32(backend, compiled):
    def gradients(autocast: bool):
        q, k, v, ranges = inputs()
        leaves = [x.requires_grad_() for x in (q, k, v)]
        torch._dynamo.reset()

        def run(q, k, v):
            with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
                return call(backend, min_len=26, max_len=26)(q, k, v, ranges)

        (torch.compile(run, backend="aot_eager") if compiled else run)(q, k, v).sin().sum().backward()
        return [x.grad for x in leaves]

    for got, want in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
