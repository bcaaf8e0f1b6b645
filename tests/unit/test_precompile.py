"""The kernels of a run are compiled ahead of it, each once."""

from __future__ import annotations

import io
import json
import re
import types
from dataclasses import asdict, replace

import pytest
import torch

from nsa_sel.bench import precompile
from nsa_sel.bench.suite import cases
from nsa_sel.bench.tune.log import Progress
from nsa_sel.bench.tune.space import Variant
from nsa_sel.kernel.call import Gpu
from nsa_sel.kernel.launch_config import LaunchConfig
from nsa_sel.kernel.shared_config import SharedLaunch

SMALL = cases.rows_case("bf16", "mixed", 4, 64, 64, 64, 8)


def test_every_kernel_of_a_run_is_compiled_once_ahead_of_it(monkeypatch):
    monkeypatch.setattr(precompile.launch, "unsupported_reason", lambda *arguments: None)
    tiny = [
        cases.rows_case("bf16", layout, 4, 64, 64, L, N)
        for layout in ("few", "many")
        for L in (16, 64)
        for N in (8, 16)
    ]
    pairs = [(case, method) for case in tiny for method in case.methods]
    every = precompile.distinct(pairs, "cpu")
    assert len(every) == len(set(every))
    kernels = [kernel for kernel in every if isinstance(kernel, Variant)]
    assert 2 <= len(kernels) < len(tiny) * 2
    assert {kernel.n_spans for kernel in kernels} == {1, 8}
    assert {(kernel.n_spans, kernel.masked) for kernel in every if kernel not in kernels} == {(1, False), (8, False)}
    assert {kernel.n_spans for kernel in precompile.distinct([(tiny[-1], "triton_core")], "cpu")} == {1}
    assert precompile.distinct([(case, "packed_sdpa") for case in tiny], "cpu") == []


def test_what_is_compiled_ahead_is_what_the_run_launches(monkeypatch):
    launch, forward = (pytest.importorskip(f"nsa_sel.kernel.{name}") for name in ("launch", "forward"))
    monkeypatch.setattr(launch, "unsupported_reason", lambda *arguments: None)
    names = [name for name, kind in forward._sel_fwd.fn.__annotations__.items() if "constexpr" in str(kind)]
    assert {"BLOCK_L", "UNIT", "WIDE", "QUERIES"} <= set(names)

    def compiled_for(tensors, config) -> tuple:
        plan = launch.Plan(*tensors, None, None, None, config)
        return [plan.values[name] for name in names], plan.options

    families = ",".join((*cases.FAMILIES, cases.PEERS))
    for case, method in ((case, m) for case in cases.matrix("hot", family=families) for m in cases.TRITON_METHODS):
        x = precompile.blank(case, method == "triton_core", "meta")
        tensors = x.q, x.k, x.v, x.ranges
        config = launch.launch_for(*tensors, min_len=x.min_len, max_len=x.max_len)
        (ahead,) = precompile.distinct([(case, method)], "meta")
        rows = precompile.workers.empty_rows(ahead, "meta")
        assert compiled_for(rows, ahead.launch) == compiled_for(tensors, config), (case.id, method)


def test_shared_tiles_that_are_compiled_ahead_are_what_the_run_launches(monkeypatch):
    """Of the full matrix's prefill on an H200, whose calls may share."""
    shared_launch, shared = (pytest.importorskip(f"nsa_sel.kernel.{name}") for name in ("shared_launch", "shared"))
    for module in (shared_launch, precompile.launch):
        monkeypatch.setattr(module, "gpu_of", lambda device: Gpu("NVIDIA H200", 132, 232448, True, True))
    monkeypatch.setattr(precompile.launch, "unsupported_reason", lambda *arguments: None)

    def compiled_for(plan, S_kv) -> tuple:
        n_spans, H = plan.n_spans, plan.out_shape[3]
        sharing = plan.shared.constants(H, n_spans), plan.shared.cover_constants(H, n_spans, S_kv)
        names = [name for name, kind in shared._sel_rest.fn.__annotations__.items() if "constexpr" in str(kind)]
        return *sharing, plan.shared, [plan.values[name] for name in names if name in plan.values], plan.options

    sharing = 0
    for case in cases.matrix("full", family="prefill"):
        x = precompile.blank(case, False, "meta")
        tensors = x.q, x.k, x.v, x.ranges
        plan = shared_launch.plan_for(*tensors, None, x.min_len, x.max_len)
        (ahead,) = precompile.distinct([(case, "triton")], "meta")
        assert (ahead.shared is not None) == isinstance(plan, shared_launch.SharedPlan)
        if ahead.shared is not None:
            rows = precompile.workers.empty_rows(ahead, "meta")
            built = shared_launch.SharedPlan(*rows, None, None, None, ahead.shared, ahead.launch)
            assert compiled_for(built, ahead.S_kv) == compiled_for(plan, case.S_kv), case.id
            sharing += 1
    assert sharing == 5


def test_the_packing_that_is_compiled_ahead_is_what_the_run_launches(monkeypatch):
    fused = pytest.importorskip("nsa_sel.bench.methods.fused")
    monkeypatch.setattr(fused, "gpu_of", lambda device: types.SimpleNamespace(sm_count=132))
    annotations = fused._pack_rows.fn.__annotations__
    n_constants = sum("constexpr" in str(kind) for kind in annotations.values())
    assert n_constants == 9 and list(annotations)[-n_constants:] == [n for n in annotations if n.isupper()]
    families = ",".join((*cases.FAMILIES, cases.PEERS))
    seen = set()
    for case in cases.matrix("full", family=families):
        x = precompile.blank(case, False, "meta")
        tile = fused.tile_tokens(case.N, x.max_len, x.k.device)
        launched = fused.Launch(x.k, x.v, x.ranges, x.max_len, tile)
        (ahead,) = precompile.distinct([(case, "packed_sdpa_fused")], "meta")
        row = fused.Launch(*fused.empty_row(ahead, "meta"), fused.LARGEST_TILE, ahead.block_l)
        assert row.values[-n_constants:] == launched.values[-n_constants:], case.id
        assert ahead.masked == (x.min_len != x.max_len)
        seen.add(ahead)
    assert {kernel.block_l for kernel in seen} == {16, 32, 64}
    assert len(seen) < 60  # half a minute of one core


def test_a_worker_knows_a_packing_kernel_from_an_attention_kernel():
    packing = pytest.importorskip("nsa_sel.bench.methods.fused").Packing("bf16", 64, 128, 8, 32, True)
    sharing = replace(KERNELS[0], shared=SharedLaunch(64, 64, 64, 64, 4, 3), S_kv=4096)
    for sent in (packing, KERNELS[0], sharing):
        assert precompile.workers.kernel_of(json.loads(json.dumps(asdict(sent)))) == sent


def kernel(warps: int, stages: int) -> Variant:
    return Variant("bf16", 1, 4, 64, 64, 1, LaunchConfig("gather", 16, 64, 64, warps, stages))


KERNELS = [kernel(warps, stages) for warps in (1, 2, 4) for stages in (1, 2)]


def test_a_kernel_that_cannot_be_compiled_ahead_is_left_to_its_benchmark(monkeypatch):
    def compile_all(kernels, finished, total_s):
        for _ in kernels:
            finished()
        return {kernels[0]: "no room"}

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(precompile, "distinct", lambda *arguments: KERNELS)
    monkeypatch.setattr(precompile, "seconds_to_build", lambda kernel: None)
    monkeypatch.setattr(precompile.workers, "workers", lambda: 1)
    monkeypatch.setattr(precompile.workers, "compile_all", compile_all)
    shown = io.StringIO()
    said = precompile.compile_kernels([], Progress(shown))
    assert re.fullmatch(r"5 of 6 kernels compiled in \d+ s by 1 processes", said)
    assert shown.getvalue().endswith("] 6/6, 0:00 left: kernels compiled\n")


def test_kernels_that_take_too_long_are_left_to_the_run(monkeypatch):
    def late(kernels, finished, total_s):
        raise TimeoutError

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(precompile, "distinct", lambda *arguments: KERNELS)
    monkeypatch.setattr(precompile, "seconds_to_build", lambda kernel: None)
    monkeypatch.setattr(precompile.workers, "compile_all", late)
    assert precompile.compile_kernels([], Progress(io.StringIO())).startswith("6 kernels were not compiled in 150 s")
