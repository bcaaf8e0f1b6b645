"""The gate must fail: every fault that the parity suite is there for is planted here and has to be seen."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from nsa_sel import reference
from nsa_sel.bench.suite import gate

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ROWS, H, D, Dv = 4, 4, 64, 48
L_VALUES = (1, 2, 32, 200)


def draw(L: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Return q, k, v and ranges of ROWS dense rows of L tokens, and two groups of keys."""
    torch.manual_seed(seed)
    q = torch.randn(ROWS, 1, 2, H, D).to(dtype)
    k, v = (torch.randn(ROWS, 2, L, width).to(dtype) for width in (D, Dv))
    return q, k, v, torch.tensor([0, L]).expand(ROWS, 1, 2, 1, 2).clone()


def judge(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ranges: torch.Tensor, **options: float):
    want, packed = reference.oracle(q, k, v, ranges), reference.packed_sdpa(q, k, v, ranges)
    return gate.check(out, want, packed, dtype=q.dtype, **options)


@pytest.mark.parametrize("L", L_VALUES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_right_results_pass(dtype, L):
    q, k, v, ranges = draw(L, dtype)
    oracle = reference.oracle(q, k, v, ranges)
    for out in (oracle.to(dtype), reference.packed_sdpa(q, k, v, ranges), reference.masked_sdpa(q, k, v, ranges)):
        verdict = judge(out, q, k, v, ranges)
        assert verdict.ok, verdict.message
        assert verdict.worst_row_mae_ratio <= 1
        assert verdict.worst_max_err_ratio <= 1
        assert verdict.bad_row is None


@pytest.mark.parametrize("L", (2, 8, 32))
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dropped_token_fails(dtype, L):
    q, k, v, ranges = draw(L, dtype)
    shorter = ranges.clone()
    shorter[2, 0, 1, 0, 1] -= 1
    verdict = judge(reference.packed_sdpa(q, k, v, shorter), q, k, v, ranges)
    assert not verdict.ok
    assert verdict.bad_row == (2, 0, 1)
    assert "1 of 8 rows are bad" in verdict.message
    assert "row (2, 0, 1): MAE" in verdict.message


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dropped_dominant_token_fails_among_1024(dtype):
    q, k, v, ranges = draw(1024, dtype)
    k[1, 1, -1] = q[1, 0, 1, 0]
    shorter = ranges.clone()
    shorter[1, 0, 1, 0, 1] -= 1
    verdict = judge(reference.packed_sdpa(q, k, v, shorter), q, k, v, ranges)
    assert not verdict.ok
    assert verdict.bad_row == (1, 0, 1)


def test_the_row_bound_sees_what_the_batch_mae_passes():
    q, k, v, ranges = draw(1024, torch.bfloat16)
    out = reference.packed_sdpa(q, k, v, ranges)
    out[0, 0, 0, 0] += 0.01  # one head of one row
    verdict = judge(out, q, k, v, ranges)
    assert verdict.mae < gate.BATCH_MAE_BOUND
    assert not verdict.ok


def test_the_batch_mae_sees_what_every_row_bound_passes():
    # Rows of 8 tokens, so that 1.5 x rounding of the row bound exceeds 1e-3 while rounding alone stays below 0.7e-3.
    q, k, v, ranges = draw(8, torch.bfloat16)
    want = reference.oracle(q, k, v, ranges)
    out = (want + 1.3e-3 * torch.where(want > 0, -1, 1)).to(torch.bfloat16)
    verdict = gate.check(out, want, None, dtype=torch.bfloat16)
    assert verdict.worst_row_mae_ratio < 1
    assert verdict.mae > gate.BATCH_MAE_BOUND
    assert not verdict.ok
    assert "batch MAE is above" in verdict.message


def test_the_max_error_sees_what_the_row_mae_passes():
    q, k, v, ranges = draw(32, torch.bfloat16)
    want, packed = reference.oracle(q, k, v, ranges), reference.packed_sdpa(q, k, v, ranges)
    out = want.to(torch.bfloat16)
    out[3, 0, 0, 2, 5] += 0.06  # one of 192 values
    assert gate.check(out, want, None, dtype=torch.bfloat16).ok
    verdict = gate.check(out, want, packed, dtype=torch.bfloat16)
    assert not verdict.ok
    assert verdict.bad_row == (3, 0, 0)
    assert verdict.max_err > verdict.max_err_bound
    assert "h=2, dv=5:" in verdict.message


@pytest.mark.parametrize("L", (2, 32, 1024))
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_scale_fails(dtype, L):
    q, k, v, ranges = draw(L, dtype)
    assert not judge(reference.packed_sdpa(q, k, v, ranges, scale=1.1 * D**-0.5), q, k, v, ranges).ok


@pytest.mark.parametrize("dtype", DTYPES)
def test_swapped_groups_and_swapped_heads_fail(dtype):
    q, k, v, ranges = draw(32, dtype)
    assert not judge(reference.packed_sdpa(q, k.flip(1), v.flip(1), ranges), q, k, v, ranges).ok
    assert not judge(reference.packed_sdpa(q, k, v, ranges).flip(3), q, k, v, ranges).ok


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
@pytest.mark.parametrize("dtype", DTYPES)
def test_unwritten_rows_and_values_that_are_not_finite_fail(dtype, bad):
    q, k, v, ranges = draw(32, dtype)
    out = reference.packed_sdpa(q, k, v, ranges)
    out[1, 0, 1] = bad
    verdict = judge(out, q, k, v, ranges)
    assert not verdict.ok
    assert verdict.bad_row == (1, 0, 1)
    assert f"{H * Dv} values not finite" in verdict.message
    out = reference.packed_sdpa(q, k, v, ranges)
    out[0, 0, 0, 0, 0] = bad
    assert not judge(out, q, k, v, ranges).ok
    assert not judge(out, q, k, v, ranges, logit_factor=40).ok


def test_an_empty_row_must_be_exactly_zero():
    q, k, v, ranges = draw(32, torch.float16)
    ranges[0, 0, 0, 0] = 5
    out = reference.packed_sdpa(q, k, v, ranges)
    assert judge(out, q, k, v, ranges).ok
    out[0, 0, 0, 0, 0] = 6e-8
    assert judge(out, q, k, v, ranges).bad_row == (0, 0, 0)


def test_tf32_arithmetic_fails_in_fp32():
    q, k, v, ranges = draw(200, torch.float32)

    def tf32(x):
        return (x.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)

    assert not judge(reference.packed_sdpa(tf32(q), tf32(k), v, ranges), q, k, v, ranges).ok


def test_a_bf16_accumulator_fails():
    q, k, v, ranges = draw(200, torch.bfloat16)
    weights = torch.softmax(torch.einsum("bsghd,bgld->bsghl", q.float(), k.float()) * D**-0.5, -1)
    out = torch.zeros(ROWS, 1, 2, H, Dv, dtype=torch.bfloat16)
    for at in range(200):
        out += (weights[..., at, None] * v[:, None, :, None, at].float()).bfloat16()
    assert not judge(out, q, k, v, ranges).ok


def test_wrong_dtype_shape_and_a_broken_reference_fail():
    q, k, v, ranges = draw(32, torch.float16)
    want, packed = reference.oracle(q, k, v, ranges), reference.packed_sdpa(q, k, v, ranges)
    assert "torch.float32" in gate.check(packed.float(), want, packed, dtype=torch.float16).message
    assert not gate.check(packed[:, :, :1], want, packed, dtype=torch.float16).ok
    assert not gate.check(packed, want[:, :, :1], packed[:, :, :1], dtype=torch.float16).ok
    assert not gate.check(packed, want, packed * float("nan"), dtype=torch.float16).ok


@pytest.mark.skipif(torch.__version__.startswith("2.4."), reason="its SDPA on the CPU rounds too often in bf16")
def test_large_logits_leave_only_the_batch_mae_out():
    q, k, v, ranges = draw(32, torch.bfloat16)
    out = reference.packed_sdpa(q * 40, k, v, ranges)
    assert judge(out, q * 40, k, v, ranges, logit_factor=40).ok
    out[0, 0, 0, 0] = out[0, 0, 0, 1]
    assert not judge(out, q * 40, k, v, ranges, logit_factor=40).ok


def test_an_empty_result_passes():
    empty = torch.zeros(0, 1, 1, 4, 64)
    verdict = gate.check(empty, empty.double(), empty, dtype=torch.float32)
    assert verdict.ok
    assert (verdict.mae, verdict.worst_row_mae_ratio, verdict.max_err, verdict.worst_max_err_ratio) == (0, 0, 0, 0)
    assert verdict.max_err_bound == math.inf


# ---- Each bound from both sides. A row has a head of 50 ones and a head of 50 sevens, which every dtype holds exactly,
# so rounding costs nothing and the RMS is 5. Just above 1 a dtype's values are its eps apart, and so are the errors.

EPS = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2**-23}


def exact_rows(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an oracle of 40 rows and the right result for it; an error in one row is too little for the batch MAE."""
    oracle = torch.tensor([1.0, 7.0], dtype=torch.float64).view(1, 2, 1).expand(40, 2, 50)
    return oracle, oracle.to(dtype).clone()


@pytest.mark.parametrize(
    ("dtype", "logit_factor", "limit"),
    [
        (torch.float16, 1, 5),  # 50 of 100 values 5 eps off: half an eps of the RMS
        (torch.bfloat16, 1, 5),
        (torch.float16, 3, 5),
        (torch.bfloat16, 3, 5),
        (torch.float32, 1, 80),  # 16 times as much
        (torch.float32, 3, 240),
    ],
)
def test_a_row_mae_may_reach_half_an_eps_of_the_rms_and_not_a_step_more(dtype, logit_factor, limit):
    oracle, out = exact_rows(dtype)
    out[3, 0, :25] = 1 + limit * EPS[dtype]
    assert gate.check(out, oracle, dtype=dtype, logit_factor=logit_factor).worst_row_mae_ratio == 0.5
    out[3, 0] = 1 + limit * EPS[dtype]
    verdict = gate.check(out, oracle, dtype=dtype, logit_factor=logit_factor)
    assert verdict.ok, verdict.message
    assert verdict.worst_row_mae_ratio == 1
    assert verdict.mae == limit * EPS[dtype] / 80
    out[3, 0, 0] += EPS[dtype]
    verdict = gate.check(out, oracle, dtype=dtype, logit_factor=logit_factor)
    assert not verdict.ok
    assert verdict.bad_row == (3,)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_a_row_mae_may_exceed_what_rounding_costs_by_half(dtype):
    # Rounding 1 + eps / 4 to 1 costs eps / 4, so the bound is (1.5 / 4 + 0.5) eps = 0.875 eps and eps^2 / 8. A value of
    # 1 + 2 eps is 1.5 eps further off: 0.25 + 1.5 n / 400 passes 0.875 between n = 166 and n = 167, where eps^2 / 8
    # moves the bound by less than a value.
    eps = EPS[dtype]
    oracle = torch.full((40, 4, 100), 1.0, dtype=torch.float64)
    oracle[5] += eps / 4
    out = torch.ones(40, 4, 100, dtype=dtype)
    out[5].view(-1)[:166] += 2 * eps
    assert gate.check(out, oracle, dtype=dtype).ok
    out[5].view(-1)[:167] = 1 + 2 * eps
    assert gate.check(out, oracle, dtype=dtype).bad_row == (5,)


@pytest.mark.parametrize(
    ("dtype", "logit_factor", "limit"),
    [
        (torch.float16, 1, 20),  # twice packed SDPA's 3 eps, and 2 eps of the largest value, 7
        (torch.bfloat16, 1, 20),
        (torch.bfloat16, 3, 20),
        (torch.float32, 1, 2 * 3 + 16 * 14),
        (torch.float32, 3, 2 * 3 + 3 * 16 * 14),
    ],
)
def test_a_max_error_may_reach_twice_packed_sdpas_and_two_eps_of_the_largest_value(dtype, logit_factor, limit):
    oracle, out = exact_rows(dtype)
    packed = out.clone()
    packed[3, 0, 7] += 3 * EPS[dtype]
    packed[4] += 1  # another row's error, which must not count
    out[3, 0, 0] += limit * EPS[dtype]
    verdict = gate.check(out, oracle, packed, dtype=dtype, logit_factor=logit_factor)
    assert verdict.ok, verdict.message
    assert verdict.max_err == verdict.max_err_bound == limit * EPS[dtype]
    assert verdict.worst_max_err_ratio == 1
    out[3, 0, 0] += EPS[dtype]
    verdict = gate.check(out, oracle, packed, dtype=dtype, logit_factor=logit_factor)
    assert not verdict.ok
    assert verdict.bad_row == (3,)


def test_without_packed_sdpa_there_is_no_bound_on_the_max_error():
    oracle, out = exact_rows(torch.bfloat16)
    out[3, 0, 0] += 1
    verdict = gate.check(out, oracle, dtype=torch.bfloat16)
    assert verdict.ok
    assert (verdict.max_err, verdict.max_err_bound, verdict.worst_max_err_ratio) == (1, math.inf, 0)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_the_batch_mae_may_reach_a_thousandth(dtype):
    # Zeros in place of 0.002, next to a value whose size makes the row bound wide.
    oracle = torch.tensor([[[16.0, 0.002]]], dtype=torch.float64)
    out = torch.tensor([[[16.0, 0.0]]], dtype=dtype)
    verdict = gate.check(out, oracle, dtype=dtype)
    assert verdict.ok, verdict.message
    assert verdict.mae == 0.001
    assert not gate.check(out, oracle * torch.tensor([1, 1.001]), dtype=dtype).ok


@pytest.mark.parametrize(("dtype", "logit_factor"), [(torch.float32, 1), (torch.float16, 1.5), (torch.bfloat16, 0.5)])
def test_the_batch_mae_counts_neither_in_fp32_nor_with_other_logits(dtype, logit_factor):
    oracle = torch.tensor([[[2.0**15, 0.002]]], dtype=torch.float64)
    out = torch.tensor([[[2.0**15, 0.01]]], dtype=dtype)
    verdict = gate.check(out, oracle, dtype=dtype, logit_factor=logit_factor)
    assert verdict.mae > 0.003
    assert verdict.ok, verdict.message


def bf16_rows_that_rounding_costs(oracle: torch.Tensor) -> gate.GateResult:
    """Judge ones, every eighth the next larger bf16 value: a batch MAE above 1e-3, but no row above its bound."""
    out = torch.ones(oracle.shape, dtype=torch.bfloat16)
    out[..., ::8] += 2**-7
    verdict = gate.check(out, oracle, dtype=torch.bfloat16)
    assert verdict.mae > 1e-3
    assert verdict.worst_row_mae_ratio < 1
    return verdict


def test_the_batch_mae_counts_where_rounding_costs_up_to_seven_tenths_of_its_bound():
    ones = torch.ones(8, 4, 16, dtype=torch.float64)
    assert not bf16_rows_that_rounding_costs(ones + 0.699e-3).ok
    assert bf16_rows_that_rounding_costs(ones + 0.701e-3).ok
    # One row can be above that as long as the batch is not.
    assert not bf16_rows_that_rounding_costs(ones + torch.tensor([5.5e-3 - 2**-8] + [0.5e-3] * 7).view(8, 1, 1)).ok


def test_rounding_that_costs_exactly_seven_tenths_still_lets_the_batch_mae_count():
    # A double above 1 is a multiple of 2^-52, so no value can cost exactly 0.7e-3, but the mean of 2048 of them can.
    each, left = divmod(int(2048 * 0.7e-3 * 2**52), 2048)
    costs = torch.tensor([each + (at < left) for at in range(2048)], dtype=torch.float64)
    oracle = 1 + costs.view(1, 16, 128) * 2**-52
    assert float((oracle - 1).mean()) == 0.7e-3
    assert not bf16_rows_that_rounding_costs(oracle).ok


def test_a_row_that_must_be_zero_is_infinitely_bad_if_it_is_not():
    oracle, out = exact_rows(torch.float16)
    assert gate.check(out, oracle, out, dtype=torch.float16).worst_row_mae_ratio == 0
    oracle = oracle.clone()
    oracle[7] = out[7] = 0
    verdict = gate.check(out, oracle, out, dtype=torch.float16)
    assert (verdict.ok, verdict.worst_row_mae_ratio, verdict.worst_max_err_ratio) == (True, 0, 0)
    wrong = out.clone()
    wrong[7, 1, 1] = 6e-8
    verdict = gate.check(wrong, oracle, out, dtype=torch.float16)
    assert verdict.bad_row == (7,)
    assert verdict.worst_row_mae_ratio == verdict.worst_max_err_ratio == math.inf


def test_the_max_error_and_its_bound_are_of_the_worst_row_and_a_nan_is_the_worst():
    oracle, out = exact_rows(torch.float16)
    packed = out.clone()
    packed[2, 0, 0] += 2
    packed[6, 0, 0] += 4
    out[1, 0, 0] += 0.5
    out[2, 0, 0] += 3
    out[6, 0, 0] += 2
    verdict = gate.check(out, oracle, packed, dtype=torch.float16)
    assert verdict.max_err == 3
    assert verdict.max_err_bound == 4 + 14 * 2**-10
    out[6, 1, 3] = math.nan
    verdict = gate.check(out, oracle, packed, dtype=torch.float16)
    assert math.isnan(verdict.max_err)
    assert verdict.max_err_bound == 8 + 14 * 2**-10
    assert verdict.worst_row_mae_ratio == verdict.worst_max_err_ratio == math.inf
    assert "row (6,): " in verdict.message
    assert "1 values not finite; worst at h=1, dv=3: nan, oracle 7" in verdict.message


def test_the_message_shows_the_figures_of_the_first_three_bad_rows():
    oracle, out = exact_rows(torch.float16)
    assert "MAE 0, max error 0" in gate.check(out, oracle, out, dtype=torch.float16).message
    wrong = out.clone()
    wrong[[4, 8, 9, 30], 1, 20] = 9
    verdict = gate.check(wrong, oracle, out, dtype=torch.float16)
    assert verdict.bad_row == (4,)
    head, count, *shown = verdict.message.splitlines()
    assert "MAE 0.002, max error 2" in head  # 4 x 2 / 4000
    assert "4 of 40 rows are bad" in count
    assert [line.split(":")[0] for line in shown] == ["row (4,)", "row (8,)", "row (9,)"]
    # RMS 5: 2.5 eps; largest value 7: 14 eps.
    assert "MAE 0.02 (bound 0.00244), max error 2 (bound 0.0137)" in shown[0]
    assert "worst at h=1, dv=20: 9, oracle 7" in shown[0]
    assert "finite" not in shown[0]


def test_without_a_bad_row_the_message_names_none():
    oracle = torch.tensor([[[16.0, 0.002]]], dtype=torch.float64)
    verdict = gate.check(torch.tensor([[[16.0, 0.005]]], dtype=torch.float16), oracle, dtype=torch.float16)
    assert not verdict.ok
    assert verdict.bad_row is None
    assert "row (" not in verdict.message and "first" not in verdict.message


@pytest.mark.parametrize("broken", (math.nan, math.inf))
def test_a_reference_with_one_broken_value_condemns_no_row(broken):
    oracle, out = exact_rows(torch.float16)
    packed = out.clone()
    packed[3, 1, 4] = broken
    verdict = gate.check(out, oracle, packed, dtype=torch.float16)
    assert not verdict.ok
    assert verdict.bad_row is None
    assert "packed SDPA" in verdict.message
    figures = (verdict.mae, verdict.worst_row_mae_ratio, verdict.max_err, verdict.worst_max_err_ratio)
    assert all(map(math.isnan, (*figures, verdict.max_err_bound)))


def test_a_verdict_cannot_be_changed():
    oracle, out = exact_rows(torch.float16)
    verdict = gate.check(out + 1, oracle, dtype=torch.float16)
    with pytest.raises(dataclasses.FrozenInstanceError):
        verdict.ok = True
