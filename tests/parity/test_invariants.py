"""What must not change the result, what must, and integers that point outside the context."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nsa_sel.kernel.launch_config import LOADS

from . import given_kernel
from .fitting import ordinary, usual
from .launches import small_covering
from .parity_case import (
    DTYPES,
    OUT_OF_RANGE,
    OUT_OF_RANGE_64,
    SPANS,
    SPANS_S_KV,
    Case,
    check,
    fail,
    has_tma,
    here,
    judge,
    repro,
    row_lengths,
    rows,
    run_kernel,
    tensors,
    unselected,
)

NAN = "float('nan')"
BASE = rows(SPANS, [(0, 1), (90, 95)])


@pytest.mark.contract("spans")
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_sel_parity_under_permuted_and_split_spans(dtype):
    case = Case(BASE, SPANS_S_KV, **usual(dtype=dtype))
    out = check(case)
    others = {
        "reversed": SPANS[::-1],
        "rotated": SPANS[2:] + SPANS[:2],
        "split": [(2, 11), (30, 31), (31, 47), (20, 21), (60, 77), (77, 94), (94, 95)],
        "split and shuffled": [(77, 95), (5, 11), (36, 47), (20, 21), (60, 77), (2, 5), (30, 36)],
    }
    for name, spans in others.items():
        again = check(replace(case, ranges=rows(spans, [(90, 95), (0, 1)])))
        verdict = judge(case, again, *tensors(case))  # against the oracle of the first order
        assert verdict.ok, f"{name}: {verdict.message}"
        assert (again - out).abs().max() <= 4 * torch.finfo(dtype).eps * out.abs().max(), name


@pytest.mark.contract
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", ("1e4", NAN, "float('inf')"))
def test_triton_sel_parity_does_not_see_what_is_not_selected(value, dtype):
    base = ordinary(BASE, SPANS_S_KV, dtype=dtype)
    outside = unselected(base)
    ours = given_kernel.under_test is None
    for launch in [None, *(small_covering() if ours and (dtype, value) == (torch.bfloat16, NAN) else [])]:
        case = replace(base, launch=launch)
        spoilt = replace(case, edit=f"k[:, :, {outside}] = v[:, :, {outside}] = {value}")
        q, k, v, ranges = tensors(spoilt)
        assert k[0, 0, outside].ne(tensors(case)[1][0, 0, outside]).any()
        if not ours:  # not every kernel gives the same bits twice
            check(spoilt)
            continue
        expected, out = run_kernel(case, *tensors(case)), run_kernel(spoilt, q, k, v, ranges)
        assert torch.equal(out, expected), f"{case.label}: unselected K and V reach the result\n{repro(spoilt)}"


@pytest.mark.contract
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_sel_parity_of_a_constant_v(dtype):
    case = ordinary(BASE, SPANS_S_KV, dtype=dtype, edit="v.fill_(0.75)")
    out = check(case)
    out = out[:, torch.tensor(row_lengths(case.ranges, case.S_kv)) > 0]
    # P is rounded to the dtype for the product but not for the sum; fp32 only sums in another order.
    tolerance = torch.finfo(dtype).eps * (16 if dtype == torch.float32 else 1)
    if (out - 0.75).abs().max() > tolerance * 0.75:
        fail(case, f"the mean of equal values is off by {float((out - 0.75).abs().max()):.3g}")


def shifted(case: Case, row: int, span: int, side: int, by: int) -> Case:
    """Move one edge of one span."""
    ranges = case.ranges.clone()
    ranges[0, row, 0, span, side] += by
    return replace(case, ranges=ranges)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("side", "by"), ((0, 1), (0, -1), (1, 1), (1, -1)))
def test_triton_sel_parity_gate_fails_when_a_short_row_loses_or_gains_a_token(side, by, dtype):
    for L in (2, 9, 32):
        case = Case(rows([(40, 41), (10, 10 + L - 1)], [(0, 32)]), 64, dtype=dtype)
        check(case)
        for span in (0, 1):
            wrong = run_kernel(case, *tensors(shifted(case, 0, span, side, by)))
            verdict = judge(case, wrong, *tensors(case))
            assert not verdict.ok, f"L={L}, span {span}: {verdict.message}"
            assert verdict.bad_row == (0, 0, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", (0, 1))
def test_triton_sel_parity_gate_fails_when_a_long_row_loses_a_dominant_token(side, dtype):
    dominant = 5 if side == 0 else 5 + 1023
    edit = f"k[0, 0, {dominant}] = q[0, 0, 0, 0]"
    case = Case(rows([(5, 5 + 1024)]), 1100, dtype=dtype, edit=edit)
    check(case)
    wrong = run_kernel(case, *tensors(shifted(case, 0, 0, side, 1 if side == 0 else -1)))
    assert not judge(case, wrong, *tensors(case)).ok


@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_sel_parity_gate_fails_on_swapped_heads_groups_and_scale(dtype):
    case = Case(rows([(0, 20)], [(4, 30)]).repeat(1, 1, 2, 1, 1), 30, dtype=dtype)
    out = check(case)
    q, k, v, ranges = tensors(case)
    swapped, scaled = run_kernel(case, q, k.flip(1), v.flip(1), ranges), run_kernel(case, q * 1.1, k, v, ranges)
    for wrong in (out.flip(3), swapped, scaled):
        assert not judge(case, wrong, q, k, v, ranges).ok


@pytest.mark.contract("spans")
@pytest.mark.sanitizer
@pytest.mark.parametrize("launch", (None, *LOADS))
@pytest.mark.parametrize("index", (torch.int32, torch.int64))
def test_triton_sel_parity_of_integers_outside_the_context(index, launch):
    """Clamped here in plain Python, so that spans.py is not checked against itself."""
    if launch == "tma" and not has_tma():
        pytest.skip("TMA descriptors need Triton 3.4 and compute capability 9.0")
    S_kv = here(300, 70)
    wild = OUT_OF_RANGE + (OUT_OF_RANGE_64 if index == torch.int64 else []) + [(S_kv - 1, S_kv + 1), (S_kv, S_kv + 9)]
    clamped = [(min(max(start, 0), S_kv), min(max(end, 0), S_kv)) for start, end in wild]
    tame = [(start, max(start, end)) for start, end in clamped]
    configs = [None] if launch is None else [c for c in small_covering() if c.load == launch]
    for config in configs:
        case = Case(rows(wild, *([span] for span in wild), dtype=index), S_kv, **usual(launch=config))
        out = check(case)
        verdict = judge(case, out, *tensors(replace(case, ranges=rows(tame, *([span] for span in tame)))))
        assert verdict.ok, verdict.message
