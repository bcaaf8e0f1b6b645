"""Kernels compiled without a GPU, in processes of their own, since the parity suite may have chosen the interpreter."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nsa_sel.bench.checks import aot
from nsa_sel.bench.checks import variants as aot_variants

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton.tools.tensor_descriptor") is None,
    reason="compiling ahead of time needs Triton 3.4",
)


def compiled(*arguments: str) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """Run python with the arguments, and return what it printed as JSON lines."""
    env = {**os.environ, "PYTHONPATH": str(Path(aot.__file__).parents[3])}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env)
    return done, [json.loads(line) for line in done.stdout.splitlines()]


def test_sample_compiles_for_every_architecture():
    done, builds = compiled("-m", "nsa_sel.bench.checks.aot", "--sample", "--json", "--jobs", "2")
    failed = [f"{build['id']}: {build['problem']}" for build in builds if build["problem"]]
    assert done.returncode == 0 and not failed, "\n".join([*failed, done.stderr])
    assert len(builds) == len(aot_variants.sample()) <= 150
    # With a kernel out of a cache ptxas does not run and tells no registers.
    assert all(build["registers"] > 0 and build["shared_bytes"] > 0 for build in builds)
    variants = [build["variant"] for build in builds]
    assert {(v["arch"], v["dtype"]) for v in variants} == set(
        itertools.product((80, 86, 89, 90, 100, 120), ("bf16", "fp16", "fp32"))
    )
    assert {v["tensors"] for v in variants} == set(aot_variants.TENSORS)
    with_tma = {v["arch"] for v in variants if v["config"]["load"] == "tma"}
    assert with_tma == {90, 100, 120}
    assert {v["arch"] for v in variants if v["in_matrix"]} == {80, 86, 89, 90, 100, 120}


PLANTED = """
import sys
from dataclasses import replace
from nsa_sel.bench.checks import aot
from nsa_sel.kernel.launch_config import LaunchConfig

good = aot.Variant(89, "bf16", 8, 128, 128, 8, LaunchConfig("gather", 64, 128, 128, 4, 2), in_matrix=True)
large = replace(good, config=replace(good.config, num_stages=4))
invalid = replace(good, config=replace(good.config, block_l=2**20))
spilling = replace(good, config=replace(good.config, max_registers=32))
planted = {
    "good": good,
    "large": large,
    "large on sm_90": replace(large, arch=90),
    "invalid": invalid,
    "spilling": spilling,
    "spilling on sm_90": replace(spilling, arch=90),
    "spilling beyond the matrix": replace(spilling, in_matrix=False),
}
aot.sample = lambda: [planted[name] for name in sys.argv[1:]]
sys.exit(aot.main(["--sample", "--json", "--jobs", "1"]))
"""


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (("good", "large"), "104448 bytes of shared memory, the architecture has 101376"),
        (("good", "invalid"), "CompilationError: .*exceeds triton maximum tensor numel.*"),
        (("good", "spilling"), r"spills \d+ bytes at a shape of the matrix"),
    ],
)
def test_planted_fault_fails(names, problem):
    done, (good, bad) = compiled("-c", PLANTED, *names)
    assert done.returncode == 1
    assert good["problem"] is None
    assert re.fullmatch(problem, bad["problem"], re.DOTALL), bad["problem"]


def test_large_tiles_pass_where_they_fit_and_spills_where_they_are_only_shown():
    done, builds = compiled("-c", PLANTED, "good", "large on sm_90", "spilling on sm_90", "spilling beyond the matrix")
    assert done.returncode == 0, done.stderr
    assert [build["problem"] for build in builds] == [None] * 4
    assert [build["spill_bytes"] > 0 for build in builds] == [False, False, True, True]


def test_every_two_traits_that_occur_together_are_compiled_together():
    _, gpu = aot_variants.ARCHITECTURES[89]
    shapes = aot_variants._all_shapes()[::31]
    every = list(dict.fromkeys(aot_variants.chosen(89, "bf16", shape, gpu) for shape in shapes))
    picked = aot_variants._each_pair(every)

    def shown(variants):
        return {pair for variant in variants for pair in itertools.combinations(aot_variants._traits(variant), 2)}

    assert shown(picked) == shown(every)
    assert set(picked) <= set(every) and len(picked) < len(every) / 5
