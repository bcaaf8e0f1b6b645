"""Streams, threads and graphs at once: every result has the bits of its single-threaded twin."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

import nsa_sel

THREADS, STREAMS, CALLS, REPLAYS = 4, 8, 2000, 2000
# rows, H, D, n_spans, span length: split rows of decode, many short rows, odd ones
SHAPES = ((1, 16, 128, 8, 512), (3, 4, 128, 16, 64), (256, 8, 64, 4, 16), (64, 8, 128, 1, 256), (7, 6, 80, 3, 33))
SHAPES += ((2, 16, 128, 4, 2048), (32, 4, 64, 1, 1), (600, 4, 64, 2, 40))
S_KV = 8192


def call(seed: int, rows: int, H: int, D: int, n_spans: int, length: int) -> Callable[[], Tensor]:
    torch.manual_seed(seed)
    q = torch.randn(1, rows, 1, H, D, device="cuda").bfloat16()
    k, v = (torch.randn(1, 1, S_KV, D, device="cuda").bfloat16() for _ in range(2))
    start = torch.randint(0, S_KV - length + 1, (1, rows, 1, n_spans), device="cuda")
    ranges, L = torch.stack((start, start + length), -1).int(), n_spans * length
    return lambda: nsa_sel.selection_attention(q, k, v, ranges, backend="triton", min_len=L, max_len=L)


def splits() -> int:
    """Return how many of SHAPES the launcher splits over programs here."""
    from nsa_sel.kernel import launch

    found = 0
    for rows, H, D, n_spans, length in SHAPES:
        q, kv = torch.empty(1, rows, 1, H, D).bfloat16().cuda(), torch.empty(1, 1, S_KV, D).bfloat16().cuda()
        ranges = torch.zeros(1, rows, 1, n_spans, 2, dtype=torch.int32, device="cuda")
        L = n_spans * length
        found += launch.launch_for(q, kv, kv, ranges, min_len=L, max_len=L).splits > 1
    return found


def test_threads_that_share_streams(say):
    runs = [call(seed, *shape) for seed, shape in enumerate(SHAPES)]
    want = [run() for run in runs]
    assert splits() >= 2
    streams = [torch.cuda.Stream() for _ in range(STREAMS)]
    wrong = torch.zeros(THREADS, STREAMS, len(runs), dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    raised: list[BaseException] = []
    done = [0] * THREADS

    def work(thread: int) -> None:
        try:
            for i in range(CALLS):
                for at, stream in enumerate(streams):
                    which = (i * 3 + thread * 5 + at) % len(runs)
                    with torch.cuda.stream(stream):
                        wrong[thread, at, which] += (runs[which]() != want[which]).any()
                    done[thread] += 1
        except BaseException as error:
            raised.append(error)

    begin = time.perf_counter()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert not raised, raised[0]
    assert done == [CALLS * STREAMS] * THREADS
    assert not wrong.any(), f"wrong by thread, stream and shape: {wrong.nonzero().tolist()[:10]}"
    seconds = time.perf_counter() - begin
    say(
        f"races: {sum(done)} calls by {THREADS} threads on {STREAMS} shared streams, {len(runs)} shapes "
        f"({splits()} of them split) in {seconds:.0f} s, every result as its twin's"
    )


def test_graph_replays_among_eager_calls(say):
    runs = [call(seed, *shape) for seed, shape in enumerate(SHAPES)]
    want = [run() for run in runs]
    torch.cuda.synchronize()
    graphs, captured = [], []
    for chosen in (runs[:4], runs[4:]):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured.append([run() for run in chosen])
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in range(3)]
    wrong = torch.zeros(len(streams), dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    eager = 0
    for i in range(REPLAYS):
        for at, graph in enumerate(graphs):
            with torch.cuda.stream(streams[at]):
                graph.replay()
                if i % 10 == 0:
                    twins = want[:4] if at == 0 else want[4:]
                    for out, twin in zip(captured[at], twins, strict=True):
                        wrong[at] += (out != twin).any()
                        out.fill_(float("nan"))
        with torch.cuda.stream(streams[2]):
            for which in (i % len(runs), (i + 3) % len(runs)):
                wrong[2] += (runs[which]() != want[which]).any()
                eager += 1
    torch.cuda.synchronize()
    assert not wrong.any(), wrong.tolist()
    say(f"graphs: {REPLAYS * len(graphs)} replays on two streams among {eager} eager calls, every result as its twin's")
