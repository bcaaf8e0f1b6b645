"""Extreme values: huge logits, infinities and NaN, one key, equal keys, denormals, through every kind of launch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa_sel import reference

from .fitting import ordinary
from .launches import small_covering
from .parity_case import DTYPES, SPANS, SPANS_S_KV, Case, check, judge, rows, run_kernel, tensors, unselected

ROWS = rows(SPANS, [(0, 1), (90, 95)], [(40, 41)])
BASE = Case(ROWS, SPANS_S_KV)
SPLIT = next(config for config in small_covering() if config.load == "gather" and config.splits > 1)
LAUNCHES = pytest.mark.parametrize("launch", (None, SPLIT), ids=("chosen", "split"))
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES)


@pytest.mark.contract
@EVERY_DTYPE
@LAUNCHES
def test_triton_sel_parity_of_logits_of_ten_thousand(dtype, launch):
    large = {"dtype": dtype, "q_factor": 2500, "launch": launch}
    q, k, _, _ = tensors(replace(BASE, **large))
    logits = torch.einsum("bsghd,bgtd->bsght", q.double(), k.double()) * BASE.D**-0.5
    assert logits.abs().max() >= 8000 and logits.min() < -5000
    check(ordinary(ROWS, SPANS_S_KV, **large))


@EVERY_DTYPE
@pytest.mark.parametrize("value", ("float('nan')", "float('inf')", "-float('inf')"))
def test_triton_sel_parity_neither_form_sees_what_is_not_selected(dtype, value):
    outside = unselected(BASE)
    case = replace(BASE, dtype=dtype)
    spoilt = replace(case, edit=f"k[:, :, {outside}] = v[:, :, {outside}] = {value}")
    assert torch.equal(run_kernel(spoilt, *tensors(spoilt)), run_kernel(case, *tensors(case)))
    assert torch.equal(reference.packed_sdpa(*tensors(spoilt)), reference.packed_sdpa(*tensors(case)))


@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN slice) encountered")  # NumPy, in the interpreter
@EVERY_DTYPE
@LAUNCHES
@pytest.mark.parametrize(
    "edit",
    (
        "k[:, :, 33, 5] = float('nan')",
        "v[:, :, 33, 5] = float('nan')",
        "k[:, :, 33, 5] = float('inf')",  # the logits are infinite, their sign is that of q
        "v[:, :, 33, 5] = float('inf')",
        "v[:, :, 33, 5], v[:, :, 62, 5] = float('inf'), -float('inf')",
        "q[:, 0, :, 1, 5] = float('nan')",
        "k[:, :, 93] = v[:, :, 93] = float('nan')",
    ),
)
def test_triton_sel_parity_of_what_nan_and_infinity_reach(dtype, launch, edit):
    case = replace(BASE, dtype=dtype, launch=launch, edit=edit)
    q, k, v, ranges = tensors(case)
    out = run_kernel(case, q, k, v, ranges)
    with sdpa_kernel(SDPBackend.MATH):  # the CPU's flash backend turns a logit of +inf into a row of zeros
        packed = reference.packed_sdpa(q, k, v, ranges)
    assert not packed.isfinite().all() and packed.isfinite().any()
    assert torch.equal(out.isnan(), packed.isnan())
    assert torch.equal(out.isposinf(), packed.isposinf()) and torch.equal(out.isneginf(), packed.isneginf())
    # Where the spoilt row stays finite it is right; and so are the rows that the value does not reach.
    finite = packed.isfinite()
    eps = torch.finfo(dtype).eps
    assert (out - packed)[finite].abs().max() <= 4 * max(eps, 1e-6) * packed[finite].abs().max()


@EVERY_DTYPE
@LAUNCHES
def test_triton_sel_parity_of_one_key_is_its_value(dtype, launch):
    case = replace(BASE, ranges=rows([(7, 8)], [(0, 0), (109, 110)]), dtype=dtype, launch=launch, q_factor=2500)
    q, k, v, ranges = tensors(case)
    out = run_kernel(case, q, k, v, ranges)
    assert torch.equal(out[0, :, 0], v[0, 0, [7, 109], None].expand(2, case.H, case.Dv))


@pytest.mark.contract
@EVERY_DTYPE
@LAUNCHES
def test_triton_sel_parity_of_equal_keys_is_the_mean(dtype, launch):
    case = ordinary(ROWS, SPANS_S_KV, dtype=dtype, launch=launch, edit="k[:] = k[:, :, :1]")
    out = check(case)
    v = tensors(case)[2]
    mean = torch.cat([v[0, 0, start:end].double() for start, end in case.ranges[0, 0, 0].tolist()]).mean(0)
    assert (out[0, 0, 0].double() - mean).abs().max() <= 2 * max(torch.finfo(dtype).eps, 1e-6)


@EVERY_DTYPE
@LAUNCHES
@pytest.mark.parametrize("name", ("q", "k", "v"))
def test_triton_sel_parity_of_denormals(dtype, launch, name):
    """A device may flush what lies below the smallest normal number to zero; it may not do worse."""
    tiny = torch.finfo(dtype).tiny
    case = replace(BASE, dtype=dtype, launch=launch, edit=f"{name} *= {tiny / 16}")
    q, k, v, ranges = tensors(case)
    spoilt = {"q": q, "k": k, "v": v}[name]
    assert ((spoilt != 0) & (spoilt.abs() < tiny)).float().mean() > 0.9
    if name != "v":
        check(case)  # the weights are equal, whatever happens to the logits
        return
    out = run_kernel(case, q, k, v, ranges)
    error = (out.double() - reference.oracle(q, k, v, ranges)).abs().max()
    assert out.isfinite().all() and error <= tiny, f"{float(error):.3g}"


def test_triton_sel_parity_the_gate_sees_a_flushed_fp16_row():
    """fp16 denormals are ordinary numbers to tensor cores and to fp32 sums: none may be flushed."""
    case = replace(BASE, dtype=torch.float16, edit="v *= 2**-18")
    inputs = tensors(case)
    out = run_kernel(case, *inputs)
    assert judge(case, out, *inputs).ok
    assert not judge(case, torch.zeros_like(out), *inputs).ok
