"""The kernels of a run are compiled ahead of it, each once."""

from __future__ import annotations

import re

import pytest
import torch

from nsa_sel.bench import precompile
from nsa_sel.bench.suite import cases
from nsa_sel.bench.tune.space import Variant
from nsa_sel.kernel.launch_config import LaunchConfig

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
    kernels = precompile.distinct(pairs, "cpu")
    assert 2 <= len(kernels) < len(tiny) * 2 and len(kernels) == len(set(kernels))
    assert {kernel.n_spans for kernel in kernels} == {1, 8}
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


def kernel(warps: int, stages: int) -> Variant:
    return Variant("bf16", 1, 4, 64, 64, 1, LaunchConfig("gather", 16, 64, 64, warps, stages))


KERNELS = [kernel(warps, stages) for warps in (1, 2, 4) for stages in (1, 2)]


def test_a_kernel_that_cannot_be_compiled_ahead_is_left_to_its_benchmark(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(precompile, "distinct", lambda *arguments: KERNELS)
    monkeypatch.setattr(precompile, "seconds_to_build", lambda kernel: None)
    monkeypatch.setattr(precompile.workers, "workers", lambda: 1)
    monkeypatch.setattr(precompile.workers, "compile_all", lambda kernels, finished, total_s: {kernels[0]: "no room"})
    assert re.fullmatch(r"5 of 6 kernels compiled in \d+ s by 1 processes", precompile.compile_kernels([]))


def test_kernels_that_take_too_long_are_left_to_the_run(monkeypatch):
    def late(kernels, finished, total_s):
        raise TimeoutError

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(precompile, "distinct", lambda *arguments: KERNELS)
    monkeypatch.setattr(precompile, "seconds_to_build", lambda kernel: None)
    monkeypatch.setattr(precompile.workers, "compile_all", late)
    assert precompile.compile_kernels([]).startswith("6 kernels were not compiled in 150 s")
