"""The gate must fail: every fault that the parity suite is there for is planted here and has to be seen."""

from __future__ import annotations

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
    assert "h=2, dv=5" in verdict.message


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
    assert gate.check(empty, empty.double(), empty, dtype=torch.float32).ok
