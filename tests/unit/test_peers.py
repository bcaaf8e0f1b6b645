"""Peers: their layouts against our oracle where they run on the CPU, and what is said of those that do not."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import itertools
import os
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import nsa_sel
from nsa_sel import reference
from nsa_sel.bench.methods import contender, peers, prepare
from nsa_sel.bench.methods.contender import CaseState, NotTimed, Prepared, WrongResult
from nsa_sel.bench.report import tables as report_tables
from nsa_sel.bench.saved.run import Saved
from nsa_sel.bench.session import Session
from nsa_sel.bench.suite import cases, inputs
from nsa_sel.bench.suite.cases import Case
from nsa_sel.bench.timer.timing import WallTimer
from tests.programs import python

PREFILL = Case("prefill", "bf16", "many", 4, 32, 16, 128, 2 * 192 * 2, S=192, G=2, S_kv=192, block=64, peers=True)
DECODE = replace(cases.decode_case("bf16", "many", 2, 32, 16, 256, 2, 1024), peers=True)
BOTH = pytest.mark.parametrize("case", [PREFILL, DECODE], ids=["prefill", "decode"])


class OnceTimer(WallTimer):
    """Choose between forms after a call each."""

    def samples(self, call, rounds=1, warmup=0):
        return super().samples(call, 1, 0)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Session:
    """Return a session by the wall clock, whatever this machine has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    made = Session()
    assert torch.get_num_threads() == threads
    return made


def test_peers_are_timed_only_when_asked_for():
    full = cases.matrix("full")
    assert not any(case.peers or set(case.methods) & set(cases.PEER_METHODS) for case in full)


def test_the_peers_matrix_is_decode_prefill_and_a_larger_set():
    found = cases.matrix("full", family="peers")
    known = {case.id for case in cases.matrix("full", family="decode,prefill")}
    larger = [case for case in found if case.id not in known]
    assert known < {case.id for case in found} and all(case.peers for case in found)
    assert [(c.family, c.S, c.S_kv, c.B) for c in larger] == [
        *(("decode", 1, 65_536, batch) for batch in (1, 8, 64)),
        ("prefill", 16_384, 16_384, 1),
    ]
    assert {case.H for case in cases.matrix("hot", family="peers")} == {16}
    assert cases.matrix("smoke", family="peers")
    for case in found:
        assert case.methods[:5] == ("triton", *cases.PEER_METHODS) and case.methods[5] == "packed_sdpa"
    # Beside a family that it overlaps with, no case is measured twice.
    both = cases.matrix("full", family="decode,peers")
    assert {c.id for c in both} == {c.id for c in found} and len(both) == len(found)


@BOTH
def test_selected_blocks_are_those_of_the_ranges(case):
    state = CaseState(case, OnceTimer())
    number, length = peers.selected_blocks(state)
    for row, blocks, lengths in zip(
        *(t.flatten(0, 2).tolist() for t in (state.inputs.ranges, number, length)), strict=True
    ):
        spans = [(start, end) for start, end in row if end > start]
        there = [(n * case.block, n * case.block + l) for n, l in zip(blocks, lengths, strict=True) if n >= 0]
        assert there == spans and sum(lengths) == sum(end - start for start, end in spans)


@BOTH
@pytest.mark.parametrize("method", ["dense", "flex_attention"])
@pytest.mark.filterwarnings("ignore")  # of torch.compile about itself
def test_what_runs_on_the_cpu_is_right(case, method):
    if method == "flex_attention" and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    if method == "flex_attention":
        pytest.importorskip("torch.nn.attention.flex_attention", reason="torch has it from 2.5 on")
    state = CaseState(case, OnceTimer())
    form = peers.prepare(state, method)
    assert contender.check(state, form) < 1e-3
    assert form.details["peer"] == f"torch {importlib.metadata.version('torch')}"


def test_dense_is_not_judged_by_the_selection():
    state = CaseState(PREFILL, OnceTimer())
    form = peers.prepare(state, "dense")
    with pytest.raises(WrongResult):
        contender.check(state, replace(form, expected=None))


@pytest.mark.parametrize(("method", "module"), [("fla_nsa", "fla"), ("flashinfer_paged", "flashinfer")])
def test_an_absent_peer_says_so(method, module, bench, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))
    with (
        pytest.raises(NotTimed, match=r"is not installed: pip install 'nsa-sel\[peers\]'"),
        bench.ready(DECODE, method),
    ):
        pass
    assert "is not installed" in bench.not_timed[DECODE.id, method]


@pytest.mark.parametrize("method", ["fla_nsa", "flashinfer_paged"])
def test_a_peer_that_needs_a_gpu_says_so(method, bench, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(NotTimed, match="^no GPU$"), bench.ready(DECODE, method):
        pass


def test_flashinfer_has_one_width(monkeypatch):
    with pytest.raises(NotTimed, match="one head_dim for K and V, here they are 32 and 16"):
        peers._flashinfer_paged(CaseState(DECODE, OnceTimer()))


class PagedDecode:
    """Stand in for FlashInfer's wrapper: the page table as its documentation describes it, in plain loops."""

    def __init__(self, workspace: torch.Tensor, kv_layout: str, use_tensor_cores: bool) -> None:
        assert workspace.dtype == torch.uint8 and kv_layout == "NHD"

    def plan(self, indptr, indices, last_page_len, *shape, q_data_type, kv_data_type) -> None:
        assert {indptr.dtype, indices.dtype, last_page_len.dtype} == {torch.int32} and q_data_type == kv_data_type
        self.table, self.shape = (indptr.tolist(), indices.tolist(), last_page_len.tolist()), shape

    def run(self, q, cache):
        (indptr, indices, last), (H, kv_heads, D, page) = self.table, self.shape
        assert q.shape == (len(last), H, D) and all(t.shape[1:] == (page, kv_heads, D) for t in cache)
        out = torch.empty_like(q)
        for row, tail in enumerate(last):
            assert 1 <= tail <= page
            pages = indices[indptr[row] : indptr[row + 1]]
            k, v = (t[pages].reshape(-1, D)[: (len(pages) - 1) * page + tail].float() for t in cache)
            out[row] = (torch.softmax(q[row].float() @ k.T * D**-0.5, -1) @ v).to(q.dtype)
        return out


@BOTH
def test_flashinfer_gets_the_selection_as_pages(case, monkeypatch):
    module = types.SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=PagedDecode)
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    state = CaseState(replace(case, Dv=case.D), OnceTimer())
    assert contender.check(state, peers._flashinfer_paged(state)) < 1e-3


def parallel_nsa_fwd(*, q, k, v, block_indices, block_counts, block_size, scale):
    """Stand in for flash-linear-attention's function: its layouts, and the causality that it adds."""
    (B, TQ, HQ, _), (_, TK, G, _) = q.shape, k.shape
    out = q.new_empty(B, TQ, HQ, v.shape[3])
    assert HQ // G >= 16 and block_indices.shape == (B, TQ, G, block_counts)
    for b, t, h in itertools.product(range(B), range(TQ), range(HQ)):
        g, position = h // (HQ // G), TK - TQ + t
        blocks = [n for n in block_indices[b, t, g].tolist() if n >= 0]
        tokens = [x for n in blocks for x in range(n * block_size, (n + 1) * block_size) if x <= position]
        weights = torch.softmax(k[b, tokens, g].float() @ q[b, t, h].float() * scale, -1)
        out[b, t, h] = (weights @ v[b, tokens, g].float()).to(q.dtype)
    return out, None


@BOTH
def test_fla_gets_the_selection_as_blocks_and_tunes_for_the_case(case, monkeypatch):
    tuner = types.SimpleNamespace(cache={"of another shape": 1}, cache_results=True)
    module = types.ModuleType("fla.ops.nsa")
    module.parallel = types.SimpleNamespace(
        parallel_nsa_fwd=parallel_nsa_fwd, parallel_nsa_fwd_kernel=types.SimpleNamespace(fn=tuner)
    )
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.nsa", module)
    state = CaseState(case, OnceTimer())
    assert contender.check(state, peers._fla_nsa(state)) < 1e-3
    assert not tuner.cache and not tuner.cache_results


def plant(monkeypatch: pytest.MonkeyPatch, call) -> None:
    """Put a peer in the place of dense SDPA that answers with `call(state)`."""

    def adapter(state: CaseState) -> Prepared:
        return Prepared(functools.partial(call, state), lambda out: out)

    monkeypatch.setitem(peers.PEERS, "dense", peers.Peer("torch", "torch", adapter))


def test_a_wrong_peer_is_shown_as_wrong_and_gets_no_time(bench, monkeypatch):
    def off_by_one_token(state: CaseState) -> torch.Tensor:
        x = state.inputs
        ranges = x.ranges.clone()
        ranges[..., 0, 1] -= 1
        return reference.packed_sdpa(x.q, x.k, x.v, ranges).reshape(DECODE.N, DECODE.H, DECODE.Dv)

    plant(monkeypatch, off_by_one_token)
    timed = False
    with pytest.raises(NotTimed, match="^wrong: .*rows are bad"), bench.ready(DECODE, "dense"):
        timed = True
    assert not timed and bench.not_timed[DECODE.id, "dense"].startswith("wrong: ")


def test_a_failing_peer_is_a_finding_and_ours_a_failure(bench, monkeypatch):
    def fails(state: CaseState) -> torch.Tensor:
        raise LookupError("no\nkernel")

    plant(monkeypatch, fails)
    with pytest.raises(NotTimed, match="^failed: LookupError: no kernel$"), bench.ready(DECODE, "dense"):
        pass
    monkeypatch.setattr(contender, "check", fails)
    with pytest.raises(TypeError), bench.ready(DECODE, "packed_sdpa"):
        pass


def test_the_fastest_right_form_is_timed():
    state = CaseState(DECODE, OnceTimer())
    right = peers.prepare(state, "dense")
    wrong = replace(right, result=lambda out: torch.zeros(DECODE.N, DECODE.H, DECODE.Dv, dtype=out.dtype))
    assert peers._fastest(state, [wrong, right, wrong]) is right
    with pytest.raises(WrongResult):
        peers._fastest(state, [wrong])


def test_packing_that_does_not_fit_is_not_applicable_and_the_rest_goes_on(monkeypatch):
    tensors = inputs.memory_estimate(PREFILL, packed=False)
    state = CaseState(PREFILL, OnceTimer())
    monkeypatch.setattr(contender, "_free_memory", lambda device: tensors)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(state, "device", "cuda")
    state.require(tensors)
    with pytest.raises(NotTimed, match="needs .* GB, .* GB are free"):
        prepare.prepare(state, "packed_sdpa")


def test_a_run_beside_peers_is_saved_and_reported_with_its_reasons(tmp_path):
    root = Path(nsa_sel.__file__).parents[2]
    saved = tmp_path / "run.json"
    options = ["--sel-family=peers", "--sel-matrix=smoke", f"--benchmark-json={saved}", "-k", "t512 and not flex"]
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "CUDA_VISIBLE_DEVICES": ""}
    done = python("-m", "pytest", "-q", "tests/perf", *options, env=environment)
    assert done.returncode == 0 and "1 x triton: no GPU" in done.stdout, done.stdout + done.stderr
    lines, notes = report_tables.peers(Saved.load(saved))
    (cells,) = [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
    assert cells["triton"] == "n/a [1]" and float(cells["dense"]) > 0 and float(cells["packed_sdpa"]) > 0
    assert "[1] triton: no GPU" in notes and f"dense: torch {importlib.metadata.version('torch')}" in notes
