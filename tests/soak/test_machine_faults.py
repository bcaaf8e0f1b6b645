"""A GPU without memory, a compiler that is gone, a cache that is read-only, full or damaged: for real."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import nsa_sel
from nsa_sel import reference

ROOT = Path(__file__).parents[2]
DAMAGED, HOW = ("json", "cubin", "all but libraries"), ("empty", "half")

CALL = """
import resource, sys, warnings
import torch, nsa_sel
torch.manual_seed(0)
q = torch.randn(2, 1, 1, 8, 64, device="cuda").bfloat16()
k, v = (torch.randn(2, 1, 300, 64, device="cuda").bfloat16() for _ in range(2))
ranges = torch.tensor([[3, 90], [120, 290]], device="cuda").expand(2, 1, 1, 2, 2)
config = nsa_sel.SelConfig(use_triton_sel=True, sel_triton_min_L=1)
want = nsa_sel.reference.packed_sdpa(q, k, v, ranges)
if "full" in sys.argv:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    outs = [nsa_sel.selection_attention(q, k, v, ranges, config=config) for _ in range(3)]
for out in outs:
    assert (out - want).abs().max() < 2e-2
said = [str(w.message) for w in caught if "runs in place of Triton" in str(w.message)]
route = nsa_sel.choose_route(q, k, v, ranges, config=config)
try:
    nsa_sel.selection_attention(q, k, v, ranges, backend="triton")
    explicit = "ran"
except nsa_sel.UnsupportedError as error:
    explicit = str(error)
print(len(said), route.backend, explicit.replace("\\n", "|"), sep="\\n")
"""


def begin(cache: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    """Begin CALL in a process of its own, with this folder for compiled kernels."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "TRITON_CACHE_DIR": str(cache), **environment}
    command = [sys.executable, "-c", CALL, *arguments]
    return subprocess.Popen(command, env=env, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def outcome(process: subprocess.Popen) -> tuple[int, str, str]:
    """Wait for CALL; return the number of warnings, auto's route afterwards, and what "triton" said."""
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, out + errors
    warned, route, explicit = out.splitlines()
    return int(warned), route, explicit


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Iterator[dict[str, tuple[subprocess.Popen, int]]]:
    """Begin one process for each fault, all at once; of each also how many files are damaged."""
    folder, found = tmp_path_factory.mktemp("faults"), {}
    whole = folder / "whole"
    in_order = begin(whole)
    (folder / "in the way").touch()  # as a read-only folder, which root could write to
    try:
        found["no compiler"] = begin(folder / "no compiler", CC=str(folder / "nowhere")), 0
        found["no folder"] = begin(folder / "in the way" / "below"), 0
        found["full"] = begin(folder / "full", "full"), 0
        assert outcome(in_order) == (0, "triton", "ran")
        for which, how in itertools.product(DAMAGED, HOW):
            cache = folder / f"{which} {how}"
            shutil.copytree(whole, cache)
            files = [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".so"]
            chosen = [path for path in files if which.startswith("all") or path.suffix == f".{which}"]
            for path in chosen:
                path.write_bytes(b"" if how == "empty" else path.read_bytes()[: path.stat().st_size // 2])
            found[cache.name] = begin(cache), len(chosen)
        yield found
    finally:
        for process in (in_order, *(process for process, _ in found.values())):
            process.kill()
            process.communicate()


@pytest.mark.parametrize("fault", ("no compiler", "no folder", "full"))
def test_a_kernel_that_cannot_be_built(begun, fault, say):
    warned, route, explicit = outcome(begun[fault][0])
    say(f"faults: {fault}: {explicit[:200]}")
    assert (warned, route) == (1, "packed_sdpa")
    assert "cannot be compiled or started: " in explicit


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("which", DAMAGED)
def test_a_damaged_cache(begun, which, how, say):
    """Shared libraries stay whole: half of one may end a process before anybody can say why."""
    process, files = begun[f"{which} {how}"]
    assert files
    warned, route, explicit = outcome(process)
    say(f"faults: cache with damaged {which} ({how}, {files} files): {explicit[:200]}")
    assert (warned, route, explicit) == (0, "triton", "ran") or (
        (warned, route) == (1, "packed_sdpa") and "cannot be compiled or started: " in explicit
    )


def test_out_of_memory_while_packing(say):
    torch.manual_seed(0)
    D = 128
    free = torch.cuda.mem_get_info()[0]
    S_kv, n_spans = 65536, 4
    rows = 2 * free // (S_kv * n_spans * D * 2) + 1  # packed K alone takes twice the free memory
    q = torch.randn(1, rows, 1, 4, D, device="cuda").bfloat16()
    k, v = (torch.randn(1, 1, S_kv, D, device="cuda").bfloat16() for _ in range(2))
    ranges = torch.tensor([0, S_kv], device="cuda").expand(1, rows, 1, n_spans, 2)
    before = [x.clone() for x in (q, k, v)]
    config = nsa_sel.SelConfig(use_triton_sel=False)
    with pytest.raises(torch.cuda.OutOfMemoryError) as caught:
        nsa_sel.selection_attention(q, k, v, ranges, config=config)
    said = str(caught.value)
    del caught
    assert f"packing {rows} rows of {S_kv * n_spans} tokens takes " in said and "GB" in said
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))
    some = q[:, :3], k, v, ranges[:, :3]
    out = nsa_sel.selection_attention(*some, config=config)
    want = reference.oracle(*some)
    assert (out.double() - want).abs().max() < 1e-2
    kernel = nsa_sel.selection_attention(*some, backend="triton")
    assert (kernel.double() - want).abs().max() < 1e-2
    torch.cuda.empty_cache()
    say(f"faults: out of memory while packing: {said[:200]}")
