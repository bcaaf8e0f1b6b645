"""torch.compile(mode="reduce-overhead") as the first thing in a process, with a workspace that grows; its import."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch
from mode_case import environment, needs_gpu

COLD = """
import sys, warnings
warnings.simplefilter("ignore")
import torch, nsa_sel
from nsa_sel import reference
for B, T, n in ((1, 4096, 16), (2, 65536, 16), (8, 65536, 16), (40, 8192, 16)):
    torch.manual_seed(B)
    q = torch.randn(B, 1, 4, 16, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(B, 4, T, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    starts = torch.arange(n, device="cuda") * (T // n)
    ranges = torch.stack((starts, starts + 64), -1).expand(B, 1, 4, n, 2).contiguous()
    lengths = {"min_len": 64 * n, "max_len": 64 * n}

    def model(q, k, v, ranges):
        return nsa_sel.selection_attention(q * 1, k, v, ranges, backend="triton", **lengths) + 0

    torch._dynamo.reset()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for turn in range(6):
        q.normal_()
        torch.compiler.cudagraph_mark_step_begin()
        out = compiled(q, k, v, ranges).clone()
        error = float((out.double() - reference.oracle(q, k, v, ranges)).abs().max())
        assert error <= 2e-2, (B, turn, error)
    eager = nsa_sel.selection_attention(q, k, v, ranges, backend="triton", **lengths)
    assert torch.equal(eager, out), B
"""


@pytest.mark.skipif(torch.__version__ < "2.11", reason="torch 2.11 is the oldest of which this is known")
def test_a_test_can_import_the_compiler():
    """Where there is a GPU torch._dynamo.reset does, and what the import warns of would be that test's error."""
    importlib.import_module("torch._inductor.cudagraph_trees").reset_cudagraph_trees()


@needs_gpu
def test_a_cold_process_whose_workspace_grows():
    done = subprocess.run([sys.executable, "-c", COLD], env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


@needs_gpu
def test_a_workspace_that_is_replaced_waits_for_the_calls_that_use_it():
    """Many calls on a side stream use a workspace; a larger one takes its place; new memory is written at once."""
    from nsa_sel.kernel import device

    gpu = torch.device("cuda", torch.cuda.current_device())
    side = torch.cuda.Stream()
    for _ in range(3):  # the first turns load kernels and take memory, and may wait for the side stream meanwhile
        device._workspaces.pop((gpu.index, side.cuda_stream), None)
        with torch.cuda.stream(side):
            parts, counters = device.workspace(gpu, side.cuda_stream, 4, 1 << 22)
            at = parts.data_ptr()
            torch.cuda._sleep(200_000_000)
            parts.fill_(1)
            kept = parts.sum()
            del parts, counters
            device.workspace(gpu, side.cuda_stream, 4, 1 << 23)
        other = torch.full((1 << 22,), 2.0, device=gpu)  # on the default stream
        in_use = not side.query()
        assert other.data_ptr() != at or not in_use
        torch.cuda.synchronize()
        assert float(kept) == 1 << 22
        del other, kept
    assert in_use, "every turn came too late to see memory that is in use"
