"""The one definition of "the kernel is right": a result against the float64 oracle, judged row by row.

The batch MAE alone is blind (at L = 1024 a whole dropped token passes 1e-3), so every row has a bound of its own, made
from what rounding the oracle to the dtype costs that row.
Source: docs/measuring.md, "Parity before time".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BATCH_MAE_BOUND = 1e-3
# Very short bf16 rows have outputs of the size of V itself: rounding alone then comes close to the batch bound.
ROUNDING_DECIDES_ALONE = 0.7e-3
# fp32 is not limited by rounding the result but by fp32 arithmetic itself: any order of summation, SDPA's included,
# needs up to 4 eps of a row's RMS. 0.5 x 16 eps (tf32's own eps is 8192) leaves room for that; logits f times larger
# are f times less exact.
FP32_EPS_FACTOR = 16.0
ROWS_SHOWN = 3


@dataclass(frozen=True)
class GateResult:
    """Report one comparison.

    ok: the gate's verdict. mae: mean absolute error of the batch. worst_row_mae_ratio: the largest row MAE over its own
    bound (1 is the limit). max_err: the largest absolute error; max_err_bound: the bound of the row that holds it
    (inf without `packed`). worst_max_err_ratio: the largest max error of a row over its own bound. message: what failed
    and the first bad rows, or one line of figures. bad_row: the leading indices of the first bad row.
    """

    ok: bool
    mae: float
    worst_row_mae_ratio: float
    max_err: float
    max_err_bound: float
    worst_max_err_ratio: float
    message: str
    bad_row: tuple[int, ...] | None = None


def check(
    out: Tensor, oracle: Tensor, packed: Tensor | None = None, *, dtype: torch.dtype, logit_factor: float = 1.0
) -> GateResult:
    """Judge `out` [..., H, Dv] of `dtype` against `oracle`, float64 of its shape; the leading dimensions number rows.

    packed: packed SDPA's result for the same inputs; None leaves the bound on the max error out. logit_factor: how much
    larger than for N(0, 1) inputs the logits are; other than 1 it leaves the batch MAE out.

    Fails on: a wrong dtype or shape; a value that is not finite; a batch MAE above 1e-3 in fp16 and bf16 (unless
    rounding the oracle alone costs more than 0.7e-3); a row whose MAE exceeds 1.5 x MAE(oracle rounded) + 0.5 x eps x
    RMS(oracle row), or whose max error exceeds 2 x packed SDPA's in that row + 2 x eps x max|oracle row|. A row whose
    oracle is zero must be zero. In fp32 eps counts FP32_EPS_FACTOR x logit_factor times.
    """
    if out.dtype != dtype or out.shape != oracle.shape:
        found, wanted = f"{out.dtype} {tuple(out.shape)}", f"{dtype} {tuple(oracle.shape)}"
        return _failed(f"dtype and shape are {found}, expected {wanted}")
    if out.numel() == 0:
        return GateResult(True, 0.0, 0.0, 0.0, float("inf"), 0.0, "empty result")
    if packed is not None and not packed.isfinite().all():
        return _failed("packed SDPA's own result is not finite, so it bounds nothing")

    leading = tuple(oracle.shape[:-2])
    want = oracle.double().reshape(-1, oracle.shape[-2] * oracle.shape[-1])  # [rows, H * Dv]
    got = out.double().reshape(want.shape)
    rounding = (want.to(dtype).double() - want).abs().mean(1)
    eps = torch.finfo(dtype).eps * (FP32_EPS_FACTOR * logit_factor if dtype == torch.float32 else 1.0)
    err = (got - want).abs()
    row_mae, row_max = err.mean(1), err.amax(1)
    mae_bound = 1.5 * rounding + 0.5 * eps * want.square().mean(1).sqrt()
    max_bound = torch.full_like(row_max, float("inf"))
    if packed is not None:
        packed_err = (packed.double().reshape(want.shape) - want).abs().amax(1)
        max_bound = 2 * packed_err + 2 * eps * want.abs().amax(1)

    mae = float(row_mae.mean())
    batch_counts = dtype != torch.float32 and logit_factor == 1 and float(rounding.mean()) <= ROUNDING_DECIDES_ALONE
    batch_ok = not batch_counts or mae <= BATCH_MAE_BOUND
    # "not <=" rather than ">": a NaN must count as bad.
    bad = ~(row_mae <= mae_bound) | ~(row_max <= max_bound)
    worst_at = int(row_max.argmax())  # a NaN counts as the largest
    ok = batch_ok and not bool(bad.any())
    figures = f"MAE {mae:.3g}, max error {float(row_max[worst_at]):.3g}"
    message, bad_rows = figures, [tuple(row) for row in bad.reshape(leading).nonzero().tolist()]
    if not ok:
        lines = [figures + ("" if batch_ok else f"; the batch MAE is above {BATCH_MAE_BOUND}")]
        lines += [f"{len(bad_rows)} of {bad.numel()} rows are bad" + (", the first:" if bad_rows else "")]
        for indices, row in list(zip(bad_rows, bad.nonzero().flatten().tolist(), strict=True))[:ROWS_SHOWN]:
            judged = (x[row] for x in (got, want, err, mae_bound, max_bound))
            lines.append(f"row {indices}: " + _describe(oracle.shape[-1], *judged))
        message = "\n".join(lines)
    return GateResult(
        ok,
        mae,
        _worst_ratio(row_mae, mae_bound),
        float(row_max[worst_at]),
        float(max_bound[worst_at]),
        _worst_ratio(row_max, max_bound),
        message,
        bad_rows[0] if bad_rows else None,
    )


def _failed(message: str) -> GateResult:
    nan = float("nan")
    return GateResult(False, nan, nan, nan, nan, nan, message)


def _worst_ratio(value: Tensor, bound: Tensor) -> float:
    """Return the largest value / bound; 0 / 0 is 0 (an exact row), anything not finite is inf."""
    ratio = torch.where(value == 0, 0.0, value / bound)
    return float(ratio.nan_to_num(float("inf"), posinf=float("inf")).max())


def _describe(Dv: int, got: Tensor, want: Tensor, err: Tensor, mae_bound: Tensor, max_bound: Tensor) -> str:
    """Say how bad one row is and what stands at its worst element."""
    at = int(err.argmax())
    not_finite = int((~got.isfinite()).sum())
    return (
        f"MAE {float(err.mean()):.3g} (bound {float(mae_bound):.3g}), "
        f"max error {float(err.max()):.3g} (bound {float(max_bound):.3g})"
        + (f", {not_finite} values not finite" if not_finite else "")
        + f"; worst at h={at // Dv}, dv={at % Dv}: {float(got[at]):.6g}, oracle {float(want[at]):.6g}"
    )
