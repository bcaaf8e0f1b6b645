"""The cases of `--sel-cases FILE`, or of `--sel-matrix random`, through the gate; else this file is not collected.

The kernel runs the whole case; of a large one at most some 500 rows, every group's and spread over the batch and the
tokens, are compared with the oracle, which takes one row at a time.
"""

import pytest
import torch

from nsa_sel.bench.suite.inputs import TORCH_DTYPES, make_inputs, memory_estimate

from . import given_kernel
from .parity_case import DEVICE, ON_GPU, Case, fail, judge, keep_record, run_kernel

ROWS = 512
MADE = """from nsa_sel.bench.suite import cases, inputs; from nsa_sel.bench.suite.recorded import Recorded
x = inputs.make_inputs(cases.{!r}, "{}"); q, k, v, ranges = x.q, x.k, x.v, x.ranges"""
KEPT = """s = torch.linspace(0, {}, {}).long().to(out.device)
out, q, ranges, k, v = out[::{step}, s], q[::{step}, s], ranges[::{step}, s], k[::{step}], v[::{step}]"""
INTERPRETER_LIMIT = 2**16  # selected tokens of all rows, which it computes in some 20 seconds


def unaffordable(case) -> str | None:
    """Return why this machine cannot run the case, or None."""
    if ON_GPU:
        needed, free = memory_estimate(case, packed=False), torch.cuda.mem_get_info()[0]
        return f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free" if needed > free else None
    if case.N * case.longest > INTERPRETER_LIMIT:
        rows = f"{case.N} rows of up to {case.longest} tokens"
        return f"{rows} are too large for Triton's interpreter, whose limit is {INTERPRETER_LIMIT} tokens in all"
    return None


@pytest.mark.contract
def test_own_case_triton_sel_parity(sel_case):
    from nsa_sel.kernel import launch

    if (reason := unaffordable(sel_case)) is not None:
        pytest.skip(reason)
    x = make_inputs(sel_case, DEVICE)
    ours = given_kernel.under_test is None
    if ours and (reason := launch.unsupported_reason(x.q, x.k, x.v, x.ranges)) is not None:
        pytest.skip(f"the Triton kernel cannot run it: {reason}")
    step = -(-sel_case.B * sel_case.G // ROWS)  # in the batch
    n = min(max(1, ROWS * step // (sel_case.B * sel_case.G)), sel_case.S)
    case = Case(
        x.ranges.cpu(),
        sel_case.S_kv,
        sel_case.H,
        sel_case.D,
        sel_case.Dv,
        TORCH_DTYPES[sel_case.dtype],
        made=MADE.format(sel_case, DEVICE),
        kept=KEPT.format(sel_case.S - 1, n, step=step),
    )
    out = run_kernel(case, x.q, x.k, x.v, x.ranges)
    compared = {"torch": torch, "out": out, "q": x.q, "k": x.k, "v": x.v, "ranges": x.ranges}
    exec(case.kept, compared)
    verdict = judge(case, *(compared[name] for name in ("out", "q", "k", "v", "ranges")))
    if out.isnan().any():
        fail(case, "NaN in the result, or an element that was never written")
    if not verdict.ok:
        fail(case, verdict.message)
    keep_record(case, verdict, "of a case of one's own")
