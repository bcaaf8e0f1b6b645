"""scale, min_len and max_len of any type: taken as the number they are, or refused by name."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from mode_case import DEVICE, L, assert_right, call, each_backend, inputs, needs_gpu

from nsa_sel import choose_route, reference, training

SCALES = [
    np.float32(0.5),
    np.float64(0.5),
    np.float16(0.5),
    np.array(0.5),
    torch.tensor(0.5),
    torch.tensor(0.5, dtype=torch.float64),
    torch.tensor(0.5, dtype=torch.bfloat16),
    Fraction(1, 2),
    Decimal("0.5"),
]
LENGTHS = [np.int64(L), np.int32(L), np.uint8(L), np.array(L), torch.tensor(L), float(L), np.float32(L), Fraction(L)]
BAD_SCALES = [
    ("0.5", TypeError, "type is str, expected a number"),
    ([0.5], TypeError, "type is list, expected a number"),
    (0.5j, TypeError, "type is complex, expected a number"),
    (np.array([0.5, 1.0]), TypeError, "type is ndarray, expected a number"),
    (torch.tensor([0.5]), ValueError, "rank is 1, expected a number or a tensor of rank 0"),
    (
        torch.tensor(0.5, requires_grad=True),
        ValueError,
        "value is a tensor that requires a gradient, expected a number",
    ),
    (torch.tensor(0.5, device="meta"), ValueError, "device is meta, expected cpu"),
    (float("nan"), ValueError, "value is nan, expected a finite number of fp32"),
    (np.float32("nan"), ValueError, "value is nan, expected a finite number of fp32"),
    (torch.tensor(float("nan")), ValueError, "value is nan, expected a finite number of fp32"),
    (float("-inf"), ValueError, "value is -inf, expected a finite number of fp32"),
    (1e300, ValueError, "value is 1e.300, expected a finite number of fp32"),
    (10**400, ValueError, "value is 10*, expected a finite number of fp32"),
]
BAD_LENGTHS = [
    ("26", TypeError, "type is str, expected a number"),
    ([26], TypeError, "type is list, expected a number"),
    (25.5, ValueError, "value is 25.5, expected a whole number"),
    (float("nan"), ValueError, "value is nan, expected a whole number"),
    (float("inf"), ValueError, "value is inf, expected a whole number"),
    (torch.tensor([26]), ValueError, "rank is 1, expected a number or a tensor of rank 0"),
    (torch.tensor(26, device="meta"), ValueError, "device is meta, expected cpu"),
    (np.int64(-1), ValueError, "value is -1, expected at least 0"),
]


@pytest.fixture
def failures(monkeypatch) -> dict:
    """Return where kernels that fail are kept, empty whatever earlier tests of this process have left there."""
    monkeypatch.setattr(training, "failures", {})
    return training.failures


def named(value) -> str:
    return f"{type(value).__module__}.{type(value).__name__}-{value}"[:40]


@each_backend
@pytest.mark.parametrize("value", SCALES, ids=named)
def test_a_scale_is_the_number_that_it_is(backend, value):
    args = inputs()
    want = call(backend, scale=0.5)(*args)
    torch.testing.assert_close(want.double(), reference.oracle(*args, scale=0.5), atol=1e-5, rtol=0)
    for _ in range(2):  # checked, then known
        assert torch.equal(call(backend, scale=value)(*args), want)


@each_backend
@pytest.mark.parametrize("value", LENGTHS, ids=named)
def test_a_length_is_the_number_that_it_is(backend, value):
    args = inputs()
    want = call(backend, min_len=L, max_len=L)(*args)
    for _ in range(2):
        assert torch.equal(call(backend, min_len=value, max_len=value)(*args), want)
    assert choose_route(*args, max_len=value) == choose_route(*args, max_len=L)


@each_backend
def test_booleans_are_ones_and_zeros(backend):
    args = inputs()
    assert torch.equal(call(backend, scale=True)(*args), call(backend, scale=1.0)(*args))
    assert torch.equal(call(backend, min_len=False)(*args), call(backend, min_len=0)(*args))


@each_backend
def test_a_tensor_that_changes_gives_its_new_value(backend):
    args = inputs()
    scale = torch.tensor(0.5)
    for value in (0.5, 0.25):
        scale.fill_(value)
        out = call(backend, scale=scale, min_len=L, max_len=L)(*args)
        torch.testing.assert_close(out.double(), reference.oracle(*args, scale=value), atol=1e-5, rtol=0)


@each_backend
@pytest.mark.parametrize(("value", "error", "words"), BAD_SCALES, ids=lambda x: named(x) if not callable(x) else "")
def test_a_bad_scale_is_named_and_costs_no_later_call_its_kernel(backend, value, error, words, failures):
    args = inputs()
    call(backend, scale=0.5)(*args)
    for _ in range(2):
        with pytest.raises(error, match=f"^scale: {words}"):
            call(backend, scale=value)(*args)
    assert failures == {}
    assert_right(call(backend)(*args), *args)


@each_backend
@pytest.mark.parametrize("name", ("min_len", "max_len"))
@pytest.mark.parametrize(("value", "error", "words"), BAD_LENGTHS, ids=lambda x: named(x) if not callable(x) else "")
def test_a_bad_length_is_named_and_costs_no_later_call_its_kernel(backend, name, value, error, words, failures):
    args = inputs()
    for _ in range(2):
        with pytest.raises(error, match=f"^{name}: {words}"):
            call(backend, **{name: value})(*args)
    with pytest.raises(error, match=f"^{name}: {words}"):
        choose_route(*args, backend=backend, **{name: value})
    assert failures == {}
    assert_right(call(backend)(*args), *args)


@needs_gpu
@each_backend
@pytest.mark.parametrize("name", ("scale", "min_len", "max_len"))
def test_a_number_on_the_gpu_is_refused_by_name(backend, name):
    value = torch.tensor(26, device=DEVICE)
    with pytest.raises(ValueError, match=rf"^{name}: device is cuda:0, expected cpu: reading it would wait"):
        call(backend, **{name: value})(*inputs())


@each_backend
def test_numbers_under_torch_compile(backend):
    torch._dynamo.reset()
    run = torch.compile(lambda *x: call(backend, scale=0.5, min_len=L, max_len=float(L))(*x), backend="aot_eager")
    args = inputs()
    assert torch.equal(run(*args), call(backend, scale=0.5, min_len=L, max_len=L)(*args))
    for bad, error in ((float("nan"), ValueError), ("0.5", TypeError)):
        torch._dynamo.reset()
        with pytest.raises(error, match="^scale: "):
            torch.compile(lambda *x, bad=bad: call(backend, scale=bad)(*x), backend="aot_eager")(*args)
