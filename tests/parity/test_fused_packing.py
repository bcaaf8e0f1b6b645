"""The packing kernel of SDPA's fastest form: it must pack what the plain packing packs, bit for bit.

It is not the kernel that this suite is for, but what that kernel's speed-ups are measured against; like it, it runs
here on the GPU, else in Triton's interpreter.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings

import nsa_sel
from nsa_sel import reference
from nsa_sel.config import test_triton_sel as asked_for

from ..programs import python
from .parity_case import DTYPES, ON_GPU, VIEWS, Case, here, judge, row_lengths, rows, tensors
from .test_properties import OUT_OF_RANGE, OUT_OF_RANGE_64, cases

pytestmark = pytest.mark.skipif(not ON_GPU and asked_for() is False, reason="NSA_TEST_TRITON_SEL=0 and no GPU")


def run(case: Case, q, k, v, ranges):
    """Return the result with the lengths as a caller would pass them."""
    from nsa_sel.bench.methods.fused import packed_sdpa_fused

    L = row_lengths(ranges, case.S_kv)
    return packed_sdpa_fused(q, k, v, ranges, min_len=min(L), max_len=max(L))


def check(case: Case) -> None:
    """Compare the packed rows with the plain packing's, and put the result through the gate."""
    from nsa_sel.bench.methods.fused import pack_rows

    q, k, v, ranges = tensors(case)
    L = row_lengths(ranges, case.S_kv)
    if max(L) > 0:
        k_rows, v_rows, mask = pack_rows(k, v, ranges, min(L), max(L))
        k_wanted, v_wanted, valid = reference.gather_rows(k, v, ranges, max(L))
        empty = ~valid.any(-1)
        assert torch.equal(k_rows[:, 0][~empty], k_wanted[~empty])
        assert torch.equal(v_rows[:, 0][~empty], v_wanted[~empty])
        assert not v_rows[:, 0][empty].any()
        assert (mask is None) == (min(L) == max(L))
        if mask is not None:
            assert torch.equal(mask[:, 0, 0] == 0, valid) and mask.stride(0) % 16 == 0
    verdict = judge(case, run(case, q, k, v, ranges), q, k, v, ranges)
    assert verdict.ok, f"{case.label}\n{verdict.message}"


def spread(n_spans: int, length: int, rows_: int = 2) -> torch.Tensor:
    """Return ranges of rows_ rows with n_spans spans of one length each, apart from one another, in falling order."""
    starts = torch.arange(n_spans).flip(0) * (length + 1)
    return torch.stack((starts, starts + length), -1).int().expand(1, rows_, 1, n_spans, 2).contiguous()


@settings(max_examples=here(200, 25))
@given(cases())
@example(Case(rows([], [], []), 5))
@example(Case(rows([(0, 0)], [(4, 4)]), 5))
@example(Case(rows([(0, 0)], [(0, 3)]), 5))  # one empty row, to be zero
@example(Case(rows([(0, 9), (3, 12), (3, 12), (3, 12)], [(0, 12)] * 5), 12))  # a token twice counts twice
@example(Case(rows([(9, 12), (0, 3), (5, 7)]), 12, dtype=torch.float32))
@example(Case(rows(OUT_OF_RANGE, [(0, 9)]), 9))
@example(Case(rows(OUT_OF_RANGE + OUT_OF_RANGE_64, OUT_OF_RANGE_64, dtype=torch.int64), 9))
def test_any_span_layout_is_packed_as_the_plain_packing_does(case):
    check(case)


@pytest.mark.parametrize("n_spans", [1, 2, 3, 16, 63, 64, 65, 200])
@pytest.mark.parametrize("length", [1, 2])
def test_any_number_of_spans(n_spans, length):
    check(Case(spread(n_spans, length), n_spans * (length + 1), D=16, Dv=16))


def test_many_spans_of_which_most_are_empty_or_lie_in_other_tiles():
    starts = torch.arange(300) * 3
    lengths = torch.where(starts % 4 == 0, 2, 0)
    lengths[130:200] = 0
    lengths[299] = 90
    ranges = torch.stack((starts, starts + lengths), -1).int().view(1, 1, 1, 300, 2)
    check(Case(torch.cat((ranges, ranges.roll(7, 3), ranges * 0), 1), 990, D=16, Dv=16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D, Dv", [(16, 256), (48, 80), (192, 128), (256, 32)])
def test_widths_and_dtypes(D, Dv, dtype):
    check(Case(rows([(3, 40)], [(0, 1), (5, 70)], [(7, 7)]), 80, D=D, Dv=Dv, dtype=dtype))


@pytest.mark.parametrize("view", VIEWS)
def test_views_of_several_batches_and_groups(view):
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(-3, 60, (2, 3, 2, 4, 1), generator=generator)
    ranges = torch.cat((starts, starts + torch.randint(-1, 20, starts.shape, generator=generator)), -1).int()
    check(Case(ranges, 64, H=3, view=view))


def test_the_scale_is_the_callers():
    from nsa_sel.bench.methods.fused import packed_sdpa_fused

    q, k, v, ranges = tensors(Case(rows([(0, 5)], [(2, 30)]), 40, dtype=torch.float32))
    out = packed_sdpa_fused(q, k, v, ranges, scale=0.5, min_len=5, max_len=28)
    torch.testing.assert_close(out.double(), reference.oracle(q, k, v, ranges, scale=0.5), rtol=0, atol=1e-5)


def test_nan_that_no_row_selects_does_not_reach_the_result():
    case = Case(rows([(3, 20), (30, 31)], [(25, 26)], [(8, 8)]), 40)
    q, k, v, ranges = tensors(case)
    clean = run(case, q, k, v, ranges)
    for tensor in (k, v):
        for part in (slice(0, 3), slice(20, 25), slice(26, 30), slice(31, 40)):
            tensor[:, :, part] = float("nan")
    assert torch.equal(run(case, q, k, v, ranges), clean)


def test_more_rows_than_one_sdpa_call_takes(monkeypatch):
    from nsa_sel.bench.methods import fused

    monkeypatch.setattr(fused, "MAX_SDPA_BATCH", 2)
    check(Case(rows([(0, 9)], [(4, 30)], [(2, 2)], [(1, 20)], [(0, 30)]), 30))
    check(Case(rows(*[[(i, i + 9)] for i in range(5)]), 30))


def test_a_second_call_of_the_same_shapes_reads_its_own_tensors():
    first = Case(rows([(0, 9)], [(4, 20)]), 30)
    check(first)
    check(Case(rows([(1, 17)], [(5, 14)]), 30, seed=1))


AHEAD_OF_TIME = """
import json, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type
from nsa_sel.bench.methods import fused

def source(dtype, D, Dv, n_spans, L, masked, index=torch.int32):
    def tensor(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")
    k, v, ranges = tensor(64, 1, 4096, D), tensor(64, 1, 4096, Dv), tensor(64, 1, 1, n_spans, 2, dtype=index)
    values = fused.Launch(k, v, ranges, L, fused.LARGEST_TILE).values
    arguments = (k, v, ranges, tensor(1), tensor(1), tensor(1) if masked else None, *values)
    signature, constants, attributes = {}, {}, {}
    for param, value in zip(fused._pack_rows.params, arguments, strict=True):
        if param.is_constexpr or value is None:
            signature[param.name], constants[(param.num,)] = "constexpr", value
        else:
            signature[param.name] = param.annotation_type or mangle_type(value)
            if isinstance(value, torch.Tensor):
                attributes[(param.num,)] = [["tt.divisibility", 16]]
    return ASTSource(fused._pack_rows, signature, constants, attributes)

for arch in (80, 89, 90):
    for given in (
        (torch.bfloat16, 128, 128, 1, 64, False), (torch.float16, 192, 128, 16, 1024, True),
        (torch.float32, 256, 48, 1024, 4096, True, torch.int64),
    ):
        made = triton.compile(source(*given), target=GPUTarget("cuda", arch, 32), options={"num_warps": 4})
        print(json.dumps(["v4" in made.asm["ptx"], made.metadata.shared]))
"""


def test_the_packing_kernel_compiles_for_every_architecture_with_wide_copies():
    pytest.importorskip("triton.tools.tensor_descriptor", reason="compiling ahead of time needs Triton 3.4")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(Path(nsa_sel.__file__).parents[1])
    done = python("-c", AHEAD_OF_TIME, env=env)
    assert done.returncode == 0, done.stderr
    builds = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(builds) == 9
    assert all(wide and shared < 48 << 10 for wide, shared in builds)
