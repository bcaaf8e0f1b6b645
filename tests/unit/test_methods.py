"""What the methods compute, and that a wrong one is not timed."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from nsa_sel.bench.methods import compiled, contender, prepare
from nsa_sel.bench.methods.contender import CaseState, Prepared, WrongResult
from nsa_sel.bench.suite import cases
from nsa_sel.bench.suite.cases import Case
from nsa_sel.bench.timer.timing import WallTimer

SMALL = cases.rows_case("bf16", "mixed", 4, 64, 64, 64, 8)


@pytest.mark.parametrize("family", ["rows", "ragged"])
def test_both_references_pass_the_gate_and_a_wrong_row_fails_it(family):
    case = SMALL if family == "rows" else Case("ragged", "bf16", "few", 4, 64, 64, 64, 8)
    state = CaseState(case, WallTimer())
    for method in ("packed_sdpa", "sdpa_core"):
        assert contender.check(state, prepare.prepare(state, method)) < 1e-3
    right = prepare.prepare(state, "packed_sdpa")
    row = state.expected[0][3:4]
    wrong = Prepared(lambda: right.call().index_fill(0, row, 0.0), right.result)
    with pytest.raises(WrongResult, match=case.id):
        contender.check(state, wrong)


def test_the_core_opponent_gets_its_mask_ready_to_be_added_and_aligned():
    state = CaseState(Case("ragged", "bf16", "few", 4, 64, 64, 64, 8), WallTimer())
    mask = state.core_call.keywords["attn_mask"]
    lengths = (state.inputs.ranges[..., 1] - state.inputs.ranges[..., 0]).flatten()
    assert state.inputs.max_len % 16 and mask.shape == (8, 1, 1, state.inputs.max_len)
    assert mask.dtype == state.inputs.q.dtype and all(stride % 16 == 0 for stride in mask.stride()[:3])
    assert (mask == 0).flatten(1).sum(-1).tolist() == lengths.tolist()
    even = CaseState(SMALL, WallTimer())
    assert even.core_call.keywords["attn_mask"] is None


def test_fused_packing_runs_in_the_backend_that_is_fastest_with_its_mask(monkeypatch):
    monkeypatch.setitem(sys.modules, "nsa_sel.bench.methods.fused", types.SimpleNamespace(packed_sdpa_fused=dict))
    monkeypatch.setattr(CaseState, "require", lambda self, needed: None)
    state = CaseState(SMALL, WallTimer())
    state.device, state.sdpa_backend, state.core_backend = "cuda", "efficient", "cudnn"
    prepared = prepare.prepare(state, "packed_sdpa_fused")
    x = state.inputs
    assert prepared.details == {"sdpa_backend": "cudnn"}
    assert prepared.call.args == (x.q, x.k, x.v, x.ranges)
    assert prepared.call.keywords == {"min_len": x.min_len, "max_len": x.max_len}
    with prepared.guard():
        assert torch.backends.cuda.cudnn_sdp_enabled() and not torch.backends.cuda.mem_efficient_sdp_enabled()


def test_a_build_that_fails_is_not_tried_in_every_case(monkeypatch):
    tried = []

    def fail():
        tried.append(1)
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr(compiled, "_build", lambda *arguments, **options: fail)
    monkeypatch.setattr(compiled, "_failures", {})
    inputs = CaseState(SMALL, WallTimer()).inputs
    for _ in range(2):
        with pytest.raises(NotImplementedError):
            compiled.choose(SMALL, inputs, "flash", WallTimer())
    for backend, times in (("flash", 2), ("flash", 2), ("cudnn", 3)):
        with pytest.raises((RuntimeError, NotImplementedError), match="no such kernel"):
            compiled.choose(SMALL, inputs, backend, WallTimer())
        assert len(tried) == times
