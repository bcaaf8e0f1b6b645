"""Kernels compiled without a GPU, in processes of their own, since the parity suite may have chosen the interpreter."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nsa_sel.bench.checks import aot
from nsa_sel.bench.checks import variants as aot_variants
from nsa_sel.kernel.call import Call
from nsa_sel.kernel.launch_config import LaunchConfig

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton.tools.tensor_descriptor") is None,
    reason="compiling ahead of time needs Triton 3.4",
)


def test_sample_compiles_for_every_architecture():
    env = {**os.environ, "PYTHONPATH": str(Path(aot.__file__).parents[3])}
    command = [sys.executable, "-m", "nsa_sel.bench.checks.aot", "--sample", "--json", "--jobs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    builds = [json.loads(line) for line in done.stdout.splitlines()]
    failed = [f"{build['id']}: {build['problem']}" for build in builds if build["problem"]]
    assert done.returncode == 0 and not failed, "\n".join([*failed, done.stderr])
    assert len(builds) == len(aot_variants.sample()) <= 150
    # With a kernel out of a cache ptxas does not run and tells no registers.
    assert all(build["registers"] > 0 for build in builds)
    # One warp makes an index without any.
    assert all(build["shared_bytes"] > 0 for build in builds if build["variant"]["kernel"] != "_cover")
    variants = [build["variant"] for build in builds]
    assert {(v["arch"], v["dtype"]) for v in variants} == set(
        itertools.product((80, 86, 89, 90, 100, 120), ("bf16", "fp16", "fp32"))
    )
    assert {v["tensors"] for v in variants} == set(aot_variants.TENSORS)
    with_tma = {v["arch"] for v in variants if v["config"]["load"] == "tma"}
    assert with_tma == {90, 100, 120}
    assert {v["arch"] for v in variants if v["in_matrix"]} == {80, 86, 89, 90, 100, 120}


GOOD = aot.Variant(89, "bf16", 8, 128, 128, 8, LaunchConfig("gather", 64, 128, 128, 4, 2), in_matrix=True)
LARGE, INVALID, SPILLING = (
    replace(GOOD, config=replace(GOOD.config, **change))
    for change in ({"num_stages": 4}, {"block_l": 2**20}, {"max_registers": 32})
)


@pytest.fixture
def compile_only(monkeypatch, capsys):
    """Return a function that has the command compile these variants, and returns its exit code and what it printed."""
    for name in ("TRITON_INTERPRET", "TRITON_CACHE_DIR"):  # which the command sets for the processes that it starts
        monkeypatch.setenv(name, os.environ.get(name, ""))

    def compile_only(*variants: aot.Variant) -> tuple[int, list[dict]]:
        monkeypatch.setattr(aot, "sample", lambda: variants)
        code = aot.main(["--sample", "--json", "--jobs", "1"])
        said = capsys.readouterr()
        assert f"{len(variants)}/{len(variants)}, 0:00 left: kernels compiled" in said.err
        return code, [json.loads(line) for line in said.out.splitlines()]

    return compile_only


def test_planted_faults_fail(compile_only):
    code, (good, *bad) = compile_only(GOOD, LARGE, INVALID, SPILLING)
    assert code == 1
    assert good["problem"] is None
    problems = (
        "104448 bytes of shared memory, the architecture has 101376",
        "CompilationError: .*exceeds triton maximum tensor numel.*",
        r"spills \d+ bytes at a shape of the matrix",
    )
    for build, problem in zip(bad, problems, strict=True):
        assert re.fullmatch(problem, build["problem"], re.DOTALL), build["problem"]


def test_large_tiles_pass_where_they_fit_and_spills_where_they_are_only_shown(compile_only):
    elsewhere = replace(LARGE, arch=90), replace(SPILLING, arch=90), replace(SPILLING, in_matrix=False)
    code, builds = compile_only(GOOD, *elsewhere)
    assert code == 0
    assert [build["problem"] for build in builds] == [None] * 4
    assert [build["spill_bytes"] > 0 for build in builds] == [False, False, True, True]


NARROW_V = aot.Variant(90, "bf16", 56, 128, 32, 16, LaunchConfig("tma", 64, 128, 32, 4, 2))


def test_no_kernel_has_two_swizzles_in_one_buffer(compile_only):
    chunks_of_k = replace(NARROW_V, D=224, Dv=64, config=LaunchConfig("tma", 64, 64, 64, 8, 2, 8, 0, 8))
    of_parts = replace(NARROW_V, D=64, Dv=16, config=LaunchConfig("tma", 64, 64, 16, 4, 3, 2, 0, 2))
    call = Call(65_536, 16, 64, 16, 16, 1024, shared_kv=True)
    shared = aot_variants.sharing(90, "bf16", call, aot_variants.ARCHITECTURES[90][1])
    code, builds = compile_only(NARROW_V, chunks_of_k, of_parts, shared)
    assert [build["problem"] for build in builds] == [None] * 4
    assert code == 0


@pytest.mark.parametrize("load", ("tma", "whole", "gather"))
def test_a_loop_without_pipeline_fails_where_v_has_another_swizzle_than_k(compile_only, load):
    one_stage = replace(NARROW_V, config=replace(NARROW_V.config, load=load, num_stages=1))
    same_width = replace(one_stage, Dv=64, config=replace(one_stage.config, block_dv=64))
    code, (bad, good) = compile_only(one_stage, same_width)
    assert code == 1
    assert bad["problem"] == "one buffer has two swizzles, of which ptxas 12.8 makes wrong code"
    assert good["problem"] is None


def test_every_two_traits_that_occur_together_are_compiled_together():
    _, gpu = aot_variants.ARCHITECTURES[89]
    shapes = aot_variants._all_shapes()[::31]
    every = list(dict.fromkeys(aot_variants.chosen(89, "bf16", shape, gpu) for shape in shapes))
    picked = aot_variants._each_pair(every)

    def shown(variants):
        return {pair for variant in variants for pair in itertools.combinations(aot_variants._traits(variant), 2)}

    assert shown(picked) == shown(every)
    assert set(picked) <= set(every) and len(picked) < len(every) / 5
