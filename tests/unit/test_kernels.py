"""Kernels that users bring: how they are named, imported, refused and called."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from nsa_sel import reference, spans
from nsa_sel.bench.saved.speedups import kernels_among
from nsa_sel.bench.saved.speedups import scope as scope_of
from nsa_sel.bench.suite import cases, kernels
from nsa_sel.bench.suite.inputs import make_inputs
from nsa_sel.bench.suite.kernels import KernelError, parse

MODULE = """
from nsa_sel import reference, spans

def right(q, k, v, ranges, *, scale, min_len, max_len):
    return reference.packed_sdpa(q, k, v, ranges, scale=scale, min_len=min_len, max_len=max_len)

def from_blocks(q, k, v, blocks, *, block_size, scale, min_len, max_len):
    assert str(blocks.dtype) == "torch.int32"
    S, S_kv = q.shape[1], k.shape[2]
    import torch
    limit = torch.arange(S_kv - S + 1, S_kv + 1).view(1, S, 1, 1)
    ranges = spans.block_ranges(blocks, block_size, limit)
    return reference.packed_sdpa(q, k, v, ranges, scale=scale, min_len=min_len, max_len=max_len)

def narrow(q, k, v, ranges, *, scale, min_len, max_len):
    assert q.shape[-1] == 128
    return right(q, k, v, ranges, scale=scale, min_len=min_len, max_len=max_len)

narrow.unsupported = lambda q, k, v, ranges: None if q.shape[-1] == 128 else f"D is {q.shape[-1]}, expected 128"
seven = 7
some_core = right
triton = right
"""
PREFILL = cases.Case("prefill", "bf16", "many", 4, 64, 64, 128, 256, S=256, S_kv=256, block=64)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write the module into an empty working directory and return its name, another for each test."""
    name = f"mine_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


def test_a_kernel_has_a_name_a_spec_and_two_methods(mine):
    plain, named = parse([f"{mine}:right", f"{mine}:from_blocks=by_block"], ["by_block=blocks:32"])
    assert (plain.name, plain.spec, plain.takes) == ("right", f"{mine}:right", "ranges")
    assert (named.name, named.spec, named.takes) == ("by_block", f"{mine}:from_blocks", "blocks:32")
    assert named.methods(PREFILL) == ("by_block", "by_block_core")
    assert [scope_of(method) for method in named.methods(PREFILL)] == ["op", "core"]
    assert kernels_among(kernels.methods(PREFILL, (plain, named))) == ["triton", "right", "by_block"]


def test_takes_without_a_name_is_for_all_and_what_is_said_of_one_goes_before_it(mine):
    specs = [f"{mine}:right", f"{mine}:from_blocks"]
    assert [kernel.block_size for kernel in parse(specs, ["blocks:64"])] == [64, 64]
    assert [kernel.block_size for kernel in parse(specs, ["right=blocks:16", "blocks:64"])] == [16, 64]


def test_the_working_directory_goes_before_what_is_installed(mine, tmp_path):
    (tmp_path / "hypothetical_kernel.py").write_text("where = 'elsewhere'\n\ndef f(): return where\n")
    here = tmp_path / "here"
    here.mkdir()
    (here / "hypothetical_kernel.py").write_text("def f(): return 'here'\n")
    sys.path.insert(0, str(tmp_path))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        (kernel,) = parse(["hypothetical_kernel:f"])
    assert kernel.function() == "here"


def test_a_module_that_warns_is_imported(tmp_path, monkeypatch):
    (tmp_path / "warning_kernel.py").write_text("import warnings\nwarnings.warn('old')\ndef f(): ...\n")
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="old"):
        assert parse(["warning_kernel:f"])


@pytest.mark.parametrize(
    ("specs", "takes", "said"),
    [
        (["{mine}"], [], "expected MODULE:FUNCTION or MODULE:FUNCTION=NAME"),
        (["{mine}:"], [], "expected MODULE:FUNCTION"),
        (["{mine}:right="], [], "expected MODULE:FUNCTION"),
        (["no_such:f"], [], "no module no_such in "),
        (["{mine}.inner:f"], [], "{mine}.inner cannot be imported|no module {mine}.inner"),
        (["broken:f"], [], "broken cannot be imported: ZeroDivisionError: division by zero"),
        (["needs:f"], [], "needs cannot be imported: ModuleNotFoundError: No module named 'no_such_dependency'"),
        (["{mine}:wrong"], [], "{mine} has no wrong"),
        (["{mine}:seven"], [], "seven is of type int, not callable"),
        (["{mine}:right", "{mine}:right"], [], "there are two kernels right; give one another name: =NAME"),
        (["{mine}:triton"], [], "the name triton is taken"),
        (["{mine}:right=packed_sdpa"], [], "the name packed_sdpa is taken"),
        (["{mine}:right=fla_nsa"], [], "the name fla_nsa is taken"),
        (["{mine}:some_core"], [], "names in _core are kept"),
        (["{mine}:right=a-b"], [], "the name a-b is no word"),
        (["{mine}:right=größe"], [], "the name größe is no word"),
        (["{mine}:right"], ["pages:16"], "--sel-takes pages:16: expected blocks:SIZE"),
        (["{mine}:right"], ["blocks:0"], "expected blocks:SIZE"),
        (["{mine}:right"], ["=blocks:64"], "expected blocks:SIZE"),
        (["{mine}:right"], ["left=blocks:64"], "no kernel left; there are: right"),
        (["{mine}:right"], ["blocks:64", "blocks:32"], "--sel-takes blocks:32: given twice"),
        (["{mine}:right"], ["right=blocks:64", "right=blocks:32"], "given twice"),
        ([], ["blocks:64"], "there is no kernel; give one"),
    ],
)
def test_what_names_no_kernel_is_refused_in_one_line(mine, tmp_path, specs, takes, said):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "needs.py").write_text("import no_such_dependency\n")
    with pytest.raises(KernelError, match=said.format(mine=mine)) as error:
        parse([spec.format(mine=mine) for spec in specs], takes)
    assert "\n" not in str(error.value) and str(error.value).startswith("--sel-")


def test_a_kernel_that_takes_blocks_gets_those_of_the_ranges_and_is_right(mine):
    (kernel,) = parse([f"{mine}:from_blocks"], ["blocks:64"])
    x = make_inputs(PREFILL, "cpu")
    out = kernel(x.q, x.k, x.v, x.ranges, min_len=x.min_len, max_len=x.max_len)
    wanted = reference.packed_sdpa(x.q, x.k, x.v, x.ranges, min_len=x.min_len, max_len=x.max_len)
    assert torch.equal(out, wanted)


def test_ranges_become_blocks_before_the_call_that_is_timed(mine, monkeypatch):
    (kernel,) = parse([f"{mine}:from_blocks"], ["blocks:64"])
    x = make_inputs(PREFILL, "cpu")
    call = kernel.ready(x.q, x.k, x.v, x.ranges, min_len=x.min_len, max_len=x.max_len)
    monkeypatch.setattr(spans, "ranges_to_blocks", None)
    assert call().shape == (1, 256, 1, 4, 64)


def test_the_function_always_gets_a_number_as_scale(mine):
    (kernel,) = parse([f"{mine}:right"])
    x = make_inputs(PREFILL, "cpu")
    said = kernel.ready(x.q, x.k, x.v, x.ranges).keywords
    assert said == {"scale": 1 / math.sqrt(64), "min_len": None, "max_len": None}
    assert kernel.ready(x.q, x.k, x.v, x.ranges, scale=2.0).keywords["scale"] == 2.0


def test_a_kernel_says_itself_what_it_cannot_do(mine):
    right, narrow = parse([f"{mine}:right", f"{mine}:narrow"])
    x = make_inputs(PREFILL, "cpu")
    assert right.unsupported(x.q, x.k, x.v, x.ranges) is None
    assert narrow.unsupported(x.q, x.k, x.v, x.ranges) == "D is 64, expected 128"


def test_blocks_express_cases_of_blocks_and_whole_spans_alone(mine):
    (blocks,) = parse([f"{mine}:from_blocks"], ["blocks:64"])
    (small,) = parse([f"{mine}:from_blocks"], ["blocks:32"])
    (large,) = parse([f"{mine}:from_blocks"], ["blocks:128"])
    (ranges,) = parse([f"{mine}:right"])
    decode = cases.decode_case("bf16", "many", 4, 64, 64, 512, 1, 8192)
    whole = cases.rows_case("bf16", "few", 4, 64, 64, 256, 4)
    short = cases.rows_case("bf16", "few", 4, 64, 64, 32, 4)
    scattered = cases.rows_case("bf16", "many", 4, 64, 64, 512, 64)
    found = {k: [k.expressible(c) for c in (PREFILL, decode, whole, short, scattered)] for k in (blocks, small, large)}
    assert found[blocks] == [True, True, True, False, False]
    assert found[small] == [True, True, True, True, False]
    assert found[large] == [False, False, True, False, False]
    assert all(ranges.expressible(case) for case in (PREFILL, decode, whole, short, scattered))
    assert blocks.expressible(decode, "from_blocks_core") and not blocks.expressible(PREFILL, "from_blocks_core")
