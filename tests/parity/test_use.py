"""The ways in which people call the kernel: LSE, torch.compile, CUDA graphs, streams, threads, other devices."""

from __future__ import annotations

import threading

import pytest
import torch

import nsa_sel
from nsa_sel import reference

from .parity_case import DEVICE, ON_GPU, Case, has_clusters, has_tma, here, judge, rows, tensors

pytestmark = pytest.mark.public
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
CASES = [
    Case(rows([(0, 40)], [(3, 4)], [(0, 0)]), 64, H=8, dtype=torch.float16),
    Case(rows([(0, 512), (600, 1000)], [(100, 900)]), 1000, H=16, D=128, Dv=128),  # split over programs, and merged
    Case(rows(*[[(i, i + 9), (64 + i, 130)] for i in range(here(600, 5))]), 130, H=4, D=64, Dv=128),
    Case(rows([(64 * i, 64 * i + 64) for i in range(10)]), 640, H=16, D=128, Dv=128),  # merged by a cluster
    Case(rows([(64 * i, 64 * i + 64) for i in range(here(64, 9))]), here(4096, 576), H=16, D=128, Dv=128),  # by two
]


def call(case: Case, inputs, **options):
    q, k, v, ranges = inputs
    L = nsa_sel.spans.lengths(ranges, case.S_kv)
    hints = {"min_len": int(L.min()), "max_len": int(L.max())}
    return lambda: nsa_sel.selection_attention(q, k, v, ranges, backend="triton", **hints, **options)


@pytest.mark.parametrize("case", CASES)
def test_triton_sel_parity_of_the_lse(case):
    q, k, v, ranges = inputs = tensors(case)
    out, lse = call(case, inputs, return_lse=True)()
    assert judge(case, out, *inputs).ok
    assert torch.equal(out, call(case, inputs)())
    logits = torch.einsum("bsghd,bgtd->bsght", q.double(), k.double()) * case.D**-0.5
    token = torch.arange(case.S_kv, device=q.device)
    chosen = ((token >= ranges[..., :1]) & (token < ranges[..., 1:])).any(3)  # the cases' spans do not overlap
    want = torch.where(chosen[..., None, :], logits, float("-inf")).logsumexp(-1)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), want, rtol=0, atol=2e-3)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ("packed_sdpa", "masked_sdpa"))
def test_triton_sel_parity_of_the_lse_with_every_other_backend(case, backend):
    q, k, v, ranges = inputs = tensors(case)
    _, lse = call(case, inputs, return_lse=True)()
    _, other = nsa_sel.selection_attention(q, k, v, ranges, backend=backend, return_lse=True)
    torch.testing.assert_close(lse, other, rtol=0, atol=2e-3)


def test_triton_sel_parity_of_one_plan_with_and_without_the_lse(monkeypatch):
    monkeypatch.setattr(nsa_sel.dispatch, "_plans", {})
    inputs = tensors(CASES[1])
    plain = call(CASES[1], inputs)
    with_lse = call(CASES[1], inputs, return_lse=True)
    first, again = plain(), with_lse()
    assert len(nsa_sel.dispatch._plans) == 1
    assert torch.equal(first, again[0]) and torch.equal(first, with_lse()[0]) and torch.equal(first, plain())
    assert torch.equal(again[1], with_lse()[1])


def test_triton_sel_parity_a_known_plan_does_not_spare_the_check_of_ranges(monkeypatch):
    monkeypatch.setattr("nsa_sel.config._cached", nsa_sel.SelConfig(sel_validate=True))
    q, k, v, ranges = tensors(Case(rows([(0, 5)]), 4))  # a token too many
    asked = {"backend": "triton", "min_len": 4, "max_len": 4}
    for _ in range(2):
        nsa_sel.selection_attention(q, k, v, ranges, validate=False, **asked)
    with pytest.raises(ValueError, match="ranges: value is"):
        nsa_sel.selection_attention(q, k, v, ranges, **asked)


@pytest.mark.parametrize("case", CASES)
def test_triton_sel_parity_same_input_same_bits(case):
    run = call(case, tensors(case))
    first = run()
    assert all(torch.equal(first, run()) for _ in range(here(50, 2)))


@pytest.mark.filterwarnings("default")  # what the compiler warns of is not ours
@pytest.mark.parametrize("case", CASES)
def test_triton_sel_parity_under_compile(case):
    torch._dynamo.reset()  # what other tests compiled counts towards its limit of recompiles
    q, k, v, ranges = inputs = tensors(case)
    L = nsa_sel.spans.lengths(ranges, case.S_kv)
    low, high = int(L.min()), int(L.max())

    def model(q, k, v, ranges):
        out = nsa_sel.selection_attention(q * 1, k, v, ranges, backend="triton", min_len=low, max_len=high)
        routed = nsa_sel.selection_attention(q, k, v, ranges, min_len=low, max_len=high)
        return out + 0, routed

    out, routed = torch.compile(model, fullgraph=True, backend=here("inductor", "aot_eager"))(q, k, v, ranges)
    assert torch.equal(out, call(case, inputs)())
    assert judge(case, routed, *inputs).ok


@pytest.mark.filterwarnings("default")
def test_triton_sel_parity_under_compile_a_gradient_goes_to_packed_sdpa():
    torch._dynamo.reset()
    q, k, v, ranges = tensors(CASES[1])
    call(CASES[1], (q, k, v, ranges))()
    q.requires_grad_()
    model = torch.compile(nsa_sel.selection_attention, fullgraph=True, backend="aot_eager")
    model(q, k, v, ranges, min_len=800, max_len=912).float().sum().backward()
    got, q.grad = q.grad, None
    reference.packed_sdpa(q, k, v, ranges, min_len=800, max_len=912).float().sum().backward()
    torch.testing.assert_close(got, q.grad)


@pytest.mark.parametrize(
    ("case", "clusters"),
    ((Case(rows([(0, 512)], [(100, 900)]), 1000, H=16, D=128, Dv=128), False), (CASES[3], True)),
    ids=("apart", "clusters"),
)
def test_triton_sel_parity_of_every_alignment_of_one_shape(case, clusters):
    """A pointer 2 bytes off must not reach a kernel compiled for 16, nor a TMA descriptor."""
    from nsa_sel.kernel import launch

    q, k, v, ranges = inputs = tensors(case)
    if has_tma() and not clusters:
        assert launch.launch_for(*inputs, max_len=800).load == "tma"  # else this test guards nothing
    if has_clusters() and clusters:
        assert launch.launch_for(*inputs, max_len=640).cluster > 1
    want = call(case, inputs)()
    for offset in (0, 1, 8, 0):
        moved = [
            torch.empty(t.numel() + offset, dtype=t.dtype, device=t.device)[offset:].view(t.shape) for t in (q, k, v)
        ]
        for new, old in zip(moved, (q, k, v), strict=True):
            new.copy_(old)
        torch.testing.assert_close(call(case, (*moved, ranges))(), want, rtol=0, atol=4e-3)


@needs_gpu
@pytest.mark.parametrize("zeros_left", (True, False))
@pytest.mark.parametrize("case", CASES)
def test_triton_sel_parity_in_a_graph(case, zeros_left, monkeypatch):
    """Replay on another stream, interleaved with eager calls, with new values in the same tensors."""
    from nsa_sel.kernel import device

    q, k, v, ranges = inputs = tensors(case)
    run = call(case, inputs)
    run()
    if not zeros_left:  # so many calls were captured that the graph must make its own
        monkeypatch.setitem(device._graph_counters, q.device.index, torch.zeros(0, dtype=torch.int32, device=q.device))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [run() for _ in range(3)]
    other = torch.cuda.Stream()
    for seed in range(20):
        torch.manual_seed(seed)
        q.normal_()
        torch.cuda.synchronize()
        with torch.cuda.stream(other):
            graph.replay()
        eager = [run() for _ in range(3)]
        torch.cuda.synchronize()
        assert all(torch.equal(out, eager[0]) for out in (*outs, *eager))
        assert judge(case, outs[0], *inputs).ok


@needs_gpu
def test_triton_sel_parity_from_streams_and_threads_at_once():
    runs = [call(case, tensors(case)) for case in CASES for _ in range(2)]
    want = [run() for run in runs]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(seed: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for i in range(300):
                which = (i * 7 + seed) % len(runs)
                if not torch.equal(runs[which](), want[which]):
                    wrong.append(which)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@needs_gpu
@pytest.mark.parametrize("case", CASES)
def test_triton_sel_parity_of_a_new_thread_s_first_call(case):
    """Its memory comes from torch's cache, so that the call is the first that needs a CUDA context in this thread."""
    q, k, v, ranges = inputs = tensors(case)
    want = [call(case, inputs)()]
    moved = (q, k.clone(), v.clone(), ranges)  # new addresses: descriptors are made again
    got: list = []
    free = torch.empty_like(want[0])
    torch.cuda.synchronize()
    del free
    thread = threading.Thread(target=lambda: got.append(call(case, moved)()))
    thread.start()
    thread.join()
    assert len(got) == 1 and torch.equal(got[0], want[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_triton_sel_parity_on_a_device_that_is_not_current():
    for case in CASES:
        q, k, v, ranges = tensors(case)
        want = call(case, (q, k, v, ranges))()
        got = call(case, tuple(t.to("cuda:1") for t in (q, k, v, ranges)))()
        assert got.device.index == 1
        assert torch.equal(got.to(DEVICE), want)
