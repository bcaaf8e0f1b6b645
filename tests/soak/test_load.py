"""Two hundred thousand eager calls of varying shapes: memory, compilations and call time."""

from __future__ import annotations

import gc
import random
import time
from pathlib import Path

import torch

import nsa_sel

CALLS, WARM_UP = 200_000, 60_000
HOT, COLD = 500, 20_000  # shapes: nine calls of ten are of a hot one
ROWS, GROUPS, S_KV, LONGEST, MOST_SPANS = 64, 2, 4096, 64, 16
HEADS = ((4, 64, torch.bfloat16), (8, 128, torch.bfloat16), (8, 128, torch.float16))
ROOM = 32 * 2**20  # bytes: what loading a kernel late, and the allocators' own blocks, may take


def host_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def compiled() -> int:
    """Return how many kernels this process has compiled or loaded."""
    from nsa_sel.kernel.forward import _sel_fwd

    caches = getattr(_sel_fwd, "device_caches", None)
    return (
        sum(len(each[0]) for each in caches.values()) if caches is not None else sum(map(len, _sel_fwd.cache.values()))
    )


def test_two_hundred_thousand_calls(say):
    from nsa_sel.kernel import kv, launch
    from nsa_sel.kernel.forward import _sel_fwd

    torch.manual_seed(0)
    dice = random.Random(0)
    base = []
    for H, D, dtype in HEADS:
        q = torch.randn(ROWS, 1, GROUPS, H, D, device="cuda").to(dtype)
        k, v = (torch.randn(ROWS, GROUPS, S_KV, D, device="cuda").to(dtype) for _ in range(2))
        base.append((q, k, v))
    start = torch.randint(0, S_KV, (ROWS, 1, GROUPS, MOST_SPANS), device="cuda")
    ranges = torch.stack((start, start + torch.randint(1, LONGEST + 1, start.shape, device="cuda")), -1).int()

    def shape() -> tuple[int, ...]:
        groups, tokens = dice.choice(((1, dice.randint(128, S_KV)), (2, dice.randint(128, S_KV)), (2, S_KV)))
        return dice.randrange(len(HEADS)), dice.randint(1, ROWS), groups, tokens, dice.choice((1, 2, 4, 7, 16))

    def tensors(which: int, rows: int, groups: int, tokens: int, n_spans: int) -> tuple:
        q, k, v = base[which]
        return (
            q[:rows, :, :groups],
            k[:rows, :groups, :tokens],
            v[:rows, :groups, :tokens],
            ranges[:rows, :, :groups, :n_spans],
        )

    hot, cold = ([shape() for _ in range(n)] for n in (HOT, COLD))
    constants = [param.name for param in _sel_fwd.params if param.is_constexpr]
    kinds = set()
    for each in (*hot, *cold):
        given = tensors(*each)
        plan = launch.Plan(*given, None, 0, each[-1] * LONGEST)
        kinds.add(
            (given[0].dtype, tuple(plan.values[name] for name in constants), tuple(plan.options.items()), plan.tma)
        )
    before = compiled()
    times = torch.empty(CALLS - WARM_UP, dtype=torch.float64)
    for i in range(CALLS):
        each = dice.choice(cold if i % 10 == 9 else hot)
        given, L = tensors(*each), each[-1] * LONGEST
        begin = time.perf_counter()
        nsa_sel.selection_attention(*given, backend="triton", min_len=0, max_len=L)
        if i >= WARM_UP:
            times[i - WARM_UP] = time.perf_counter() - begin
        if i % 500 == 0:
            torch.cuda.synchronize()
        if i == WARM_UP:
            gc.collect()
            at_first = (
                torch.cuda.memory_allocated(),
                torch.cuda.memory_reserved(),
                torch.cuda.mem_get_info()[0],
                host_bytes(),
            )
    torch.cuda.synchronize()
    gc.collect()
    at_last = torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[0], host_bytes()
    new = compiled() - before
    p50, p99, p999 = (float(times.quantile(p)) * 1e6 for p in (0.5, 0.99, 0.999))
    shapes = len({*hot, *cold})
    say(f"load: {CALLS} calls of {shapes} shapes; call time p50 {p50:.1f}, p99 {p99:.1f}, p99.9 {p999:.1f} µs")
    say(f"load: {new} kernels compiled, bound {len(kinds)}: one for each launch, head shape, dtype and span bucket")
    grown = [(b - a) / 2**20 for a, b in zip(at_first, at_last, strict=True)]
    say(f"load: after {WARM_UP} calls, MiB: allocated {grown[0]:+.2f}, reserved {grown[1]:+.2f}, host {grown[3]:+.2f}")
    assert new <= len(kinds)
    assert at_last[0] == at_first[0] and at_last[1] == at_first[1]
    assert at_first[2] - at_last[2] <= ROOM and at_last[3] - at_first[3] <= ROOM
    assert len(nsa_sel.dispatch._plans) <= kv.MAX_KEPT
