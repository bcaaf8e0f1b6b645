"""Random integers as ranges, through every variant, between poisoned guards: nothing outside is read or written."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest
import torch
from torch import Tensor

from nsa_sel.bench.suite import gate
from nsa_sel.kernel.launch_config import LaunchConfig

B, S, G, H, D, S_KV = 2, 3, 2, 4, 64, 700
GUARD = 8192  # elements; a multiple of 16 bytes, so that TMA descriptors are possible
CHUNK = 50  # tensors of ranges that are judged together
TENSORS = 20_000
KINDS = ((1, torch.int64), (5, torch.int32), (33, torch.int64))  # spans a row, dtype
SENTINEL = 1234.0
NAN_BITS = [0x7FC00000, 0x7F800001, 0xFFC00000 - 2**32, 0x7FF8000000000000, 0x7FF0000000000001, -(2**51)]
EDGES = [-1, 0, 1, S_KV - 1, S_KV, S_KV + 1, 2**31 - 1, 2**31, 2**31 + 5, -(2**31), -(2**31) - 1, 2**32 + 7]
EDGES += [2**63 - 1, -(2**63), *NAN_BITS]
COMPILE_LIMIT_S = 150  # for all variants; a worker that died is waited for in vain


def compile_one(job: tuple[LaunchConfig, int, torch.dtype]) -> None:
    """Leave a variant in Triton's disk cache: run it once, in a process of its own, on rows that select nothing."""
    from nsa_sel.kernel import launch

    config, n_spans, dtype = job
    q = torch.zeros(1, 2, 1, H, D, dtype=torch.bfloat16, device="cuda")
    kv = torch.zeros(1, 1, 256, D, dtype=torch.bfloat16, device="cuda")
    launch.forward(q, kv, kv, torch.zeros(1, 2, 1, n_spans, 2, dtype=dtype, device="cuda"), launch=config)
    torch.cuda.synchronize()


@pytest.fixture(scope="module")
def configs() -> list[LaunchConfig]:
    """Return the variants, compiled on all cores: one after another they take minutes."""
    from tests.parity.launches import covering
    from tests.parity.parity_case import has_clusters

    found = covering(H, D, D, (16, 32, 64, 128), (1, 2, 8, 32), True)
    if has_clusters():
        kinds = (("gather", 8, 8), ("tma", 8, 8), ("tma", 8, 2))
        found += [LaunchConfig(load, 64, D, D, 4, 2, n, cluster=cluster) for load, n, cluster in kinds]
    jobs = [(config, *kind) for config in found for kind in KINDS]
    with multiprocessing.get_context("spawn").Pool(min(len(os.sched_getaffinity(0)), 16)) as pool:
        pool.map_async(compile_one, jobs, chunksize=1).get(COMPILE_LIMIT_S)
    return found


def guarded(x: Tensor, between: bool) -> Tensor:
    """Copy x [B, G, S_kv, D] to where only NaN lies around it; between: around every group, else around the whole."""
    if between:
        buffer = torch.full((B, G, S_KV + 2 * GUARD // D, D), float("nan"), dtype=x.dtype, device="cuda")
        view = buffer[:, :, GUARD // D : GUARD // D + S_KV]
    else:
        buffer = torch.full((x.numel() + 2 * GUARD,), float("nan"), dtype=x.dtype, device="cuda")
        view = buffer[GUARD:-GUARD].view(x.shape)
    view.copy_(x)
    return view


def wild(n_spans: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Draw CHUNK tensors of ranges: spans of all lengths, bounds near and far, reversed, negative, any bits at all."""
    shape = (CHUNK, B, S, G, n_spans, 2)

    def draw(low: int, high: int, shape: tuple[int, ...] = shape) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    start = draw(-30, S_KV + 30, shape[:-1])
    length = torch.minimum(draw(-10, 140, shape[:-1]), draw(-10, S_KV, shape[:-1]))
    tame = torch.stack((start, start + length), -1)
    edges = torch.tensor(EDGES)[draw(0, len(EDGES))]
    bits = draw(-(2**31), 2**31) << 32 | draw(0, 2**32)
    kind = torch.minimum(draw(0, 4), draw(0, 4)[:, :1, :1, :1, :1, :1])  # half of it tame
    ranges = torch.where(kind < 2, tame, torch.where(kind == 2, edges, bits))
    if dtype == torch.int32:
        ranges = torch.where(bits % 2 == 0, ranges.clamp(-(2**31), 2**31 - 1), ranges)
    return ranges.to(dtype).cuda()  # int32 takes the low bits


def expected(logits: Tensor, v: Tensor, ranges: Tensor) -> Tensor:
    """Compute the operation for CHUNK tensors at once, float64, by counting how often each row selects each key."""
    bounds = ranges.clamp(0, S_KV).long()
    token = torch.arange(S_KV, device="cuda")
    counts = torch.zeros((*ranges.shape[:4], S_KV), dtype=torch.float64, device="cuda")
    for n in range(ranges.shape[4]):
        start, end = bounds[..., n, 0, None], bounds[..., n, 1, None]
        counts += (token >= start) & (token < end)
    weights = logits.exp() * counts[..., None, :]  # [CHUNK, B, S, G, H, S_kv]
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("cbsght,bgtd->cbsghd", weights / torch.where(total == 0, 1.0, total), v.double())


@pytest.mark.parametrize(("n_spans", "dtype"), KINDS, ids=str)
def test_wild_ranges_between_poisoned_guards(n_spans, dtype, configs, say):
    from nsa_sel.kernel import launch

    generator = torch.Generator().manual_seed(n_spans)
    torch.manual_seed(n_spans)
    q = torch.randn(B, S, G, H, D).bfloat16().cuda()
    k, v = (torch.randn(B, G, S_KV, D).bfloat16().cuda() for _ in range(2))
    guards = {between: (guarded(k, between), guarded(v, between)) for between in (True, False)}
    logits = torch.einsum("bsghd,bgtd->bsght", q.double(), k.double()) * D**-0.5
    size = q.numel()
    outs = torch.empty(CHUNK, size + 2 * GUARD, dtype=q.dtype, device="cuda")
    chunks = -(-TENSORS // len(KINDS) // CHUNK)
    begin, launches = time.perf_counter(), launch.launch_count()
    for _ in range(chunks):
        ranges = wild(n_spans, dtype, generator)
        want = expected(logits, v, ranges)
        for config in configs:
            near_k, near_v = guards[config.load != "tma"]
            outs.fill_(SENTINEL)
            outs[:, GUARD:-GUARD] = float("nan")
            views = [out[GUARD:-GUARD].view(q.shape) for out in outs]
            plan = launch.Plan(q, near_k, near_v, ranges[0], None, None, None, config)
            for one, out in zip(ranges, views, strict=True):
                plan.run(q, near_k, near_v, one, out)
            got = outs[:, GUARD:-GUARD].view(want.shape)
            verdict = gate.check(got, want, dtype=q.dtype)
            assert verdict.ok, f"{config}: {verdict.message}"
            around = torch.cat((outs[:, :GUARD], outs[:, -GUARD:]), 1)
            assert (around == SENTINEL).all(), f"{config}: wrote beside its result"
    launches = launch.launch_count() - launches
    assert launches == chunks * CHUNK * len(configs)
    for near_k, near_v in guards.values():
        assert torch.equal(near_k, k) and torch.equal(near_v, v)
    say(
        f"memory safety, {n_spans} spans, {dtype}: {chunks * CHUNK} tensors of ranges through {len(configs)} variants, "
        f"{launches} launches in {time.perf_counter() - begin:.0f} s, no read and no write outside"
    )
