"""The LSE of every backend, and the merge of results over disjoint keys."""

from __future__ import annotations

import pytest
import torch
from mode_case import DEVICE, ON_GPU, B, D, G, H, S, call, each_backend, hinted_or_not, inputs

import nsa_sel
from nsa_sel import reference, selection_attention, spans


def exact_lse(q, k, ranges, scale):
    """Compute the LSE in float64, row by row."""
    want = torch.full(q.shape[:4], -torch.inf, dtype=torch.float64)
    for b, s, g in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        tokens = [t for start, end in ranges[b, s, g].tolist() for t in range(start, end)]
        if tokens:
            want[b, s, g] = torch.logsumexp(q[b, s, g].double() @ k[b, g, tokens].double().T * scale, -1).cpu()
    return want


@each_backend
@pytest.mark.parametrize("hints", ({}, {"min_len": 0, "max_len": 26}), ids=("no_hints", "hints"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_every_backend_gives_the_natural_lse(backend, hints, dtype):
    q, k, v, ranges = inputs(dtype)
    ranges[0, 1] = 0  # an empty row
    ranges[1, 2, 0] = torch.tensor([[3, 5], [4, 6]])  # a shorter one that selects a key twice
    run = call(backend, return_lse=True, scale=0.3, **hints)
    for _ in range(2):
        out, lse = run(q, k, v, ranges)
        assert (lse.dtype, lse.shape) == (torch.float32, q.shape[:4])
        assert torch.isneginf(lse[0, 1]).all()
        torch.testing.assert_close(lse.cpu().double(), exact_lse(q, k, ranges, 0.3), atol=2e-5, rtol=0)
        assert torch.equal(out, call(backend, scale=0.3, **hints)(q, k, v, ranges))


@each_backend
@hinted_or_not
def test_the_lse_under_torch_compile(backend, hints):
    args = inputs()
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: call(backend, return_lse=True, **hints)(*x), backend="aot_eager")
    for got, want in zip(compiled(*args), call(backend, return_lse=True, **hints)(*args), strict=True):
        torch.testing.assert_close(got, want)


@each_backend
@pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
def test_the_lse_is_differentiable(backend, compiled):
    q, k, v, ranges = inputs()
    ranges[0, 1] = 0

    def run(q, k):
        return call(backend, return_lse=True, min_len=0, max_len=26)(q, k, v, ranges)[1].exp().sum()

    torch._dynamo.reset()
    leaves = [x.requires_grad_() for x in (q, k)]
    got = torch.autograd.grad((torch.compile(run, backend="aot_eager") if compiled else run)(*leaves), leaves)
    tokens = [*range(9), *range(20, 37)]
    scores = torch.einsum("bsghd,bgtd->bsght", q.double(), k[:, :, tokens].double()) * D**-0.5
    chosen = torch.ones(B, S, G, 1, device=DEVICE)
    chosen[0, 1] = 0
    want = torch.autograd.grad((scores.exp().sum(-1) * chosen).sum(), leaves)
    for mine, exact in zip(got, want, strict=True):
        torch.testing.assert_close(mine, exact, atol=1e-3, rtol=1e-4)


# --- merge ---


@pytest.mark.parametrize("first", ("triton", "packed_sdpa", "masked_sdpa"))
@pytest.mark.parametrize("second", ("triton", "packed_sdpa", "masked_sdpa"))
def test_two_parts_of_a_selection_merge_to_the_whole(first, second):
    q, k, v, ranges = inputs()
    ranges[0, 0, :, 0] = 0  # the first part is empty,
    ranges[0, 1, :, 1] = 0  # the second,
    ranges[0, 2] = 0  # both
    parts = [
        call(backend, return_lse=True)(q, k, v, part)
        for backend, part in ((first, ranges[..., :1, :]), (second, ranges[..., 1:, :]))
    ]
    out, lse = nsa_sel.merge(*parts[0], *parts[1])
    want, want_lse = call("triton", return_lse=True)(q, k, v, ranges)
    torch.testing.assert_close(out, want, atol=1e-6, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=1e-6, rtol=1e-6)
    assert torch.isneginf(lse[0, 2]).all() and not out[0, 2].any()


def test_an_empty_part_is_not_looked_at():
    q, k, v, ranges = inputs()
    out, lse = call("packed_sdpa", return_lse=True)(q, k, v, ranges)
    nothing = torch.full_like(out, float("nan")), torch.full_like(lse, -torch.inf)
    for got, got_lse in (nsa_sel.merge(out, lse, *nothing), nsa_sel.merge(*nothing, out, lse)):
        assert torch.equal(got, out)
        assert torch.equal(got_lse, lse)


@pytest.mark.parametrize("backend", ("triton", "packed_sdpa"))
def test_merge_is_differentiable_also_where_a_part_is_empty(backend):
    leaves = [x.requires_grad_() for x in inputs()[:3]]
    ranges = inputs()[3]
    ranges[0, 0, :, 0] = 0
    ranges[0, 1] = 0

    def whole():
        return selection_attention(*leaves, ranges, backend="packed_sdpa", return_lse=True)

    def merged():
        parts = [whole_of(ranges[..., :1, :]), whole_of(ranges[..., 1:, :])]
        return nsa_sel.merge(*parts[0], *parts[1])

    def whole_of(part):
        return selection_attention(*leaves, part, backend=backend, return_lse=True)

    def gradients(run):
        out, lse = run()
        return torch.autograd.grad(out.sin().sum() + lse[lse.isfinite()].sin().sum(), leaves)

    for got, want in zip(gradients(merged), gradients(whole), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "spoil", "error"),
    [
        ("lse_a", lambda x: x[..., None], ValueError),
        ("lse_b", lambda x: x[:1], ValueError),
        ("out_b", lambda x: x[..., :8], ValueError),
        ("out_b", lambda x: x.half(), TypeError),
    ],
)
def test_what_does_not_fit_a_merge_is_named(name, spoil, error):
    out, lse = call("packed_sdpa", return_lse=True)(*inputs())
    args = {"out_a": out, "lse_a": lse, "out_b": out, "lse_b": lse}
    with pytest.raises(error, match=rf"^{name}: (shape|dtype) is .+, expected .+ as out_a"):
        nsa_sel.merge(**{**args, name: spoil(args[name])})


@each_backend
def test_recipe_a_sink(backend):
    """A learned score per head that takes weight and gives nothing: an empty result whose LSE is that score."""
    q, k, v, ranges = inputs()
    sink = torch.randn(G, H, device=DEVICE)
    out, lse = call(backend, return_lse=True)(q, k, v, ranges)
    got, _ = nsa_sel.merge(out, lse, torch.zeros_like(out), sink.expand_as(lse))
    tokens = [*range(9), *range(20, 37)]
    scores = torch.einsum("bsghd,bgtd->bsght", q, k[:, :, tokens]) * D**-0.5
    weights = torch.cat((scores, sink.expand(B, S, G, H)[..., None]), -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(got, torch.einsum("bsght,bgtd->bsghd", weights, v[:, :, tokens]), atol=1e-5, rtol=0)


@each_backend
def test_recipe_a_window_beside_a_selection(backend):
    """One softmax over selected blocks and a window that overlaps none of them: two calls, merged."""
    q, k, v, selected = inputs()
    window = torch.tensor([[37, 40]], device=DEVICE).expand(B, S, G, 1, 2)
    parts = [call(backend, return_lse=True)(q, k, v, r) for r in (selected, window)]
    out, _ = nsa_sel.merge(*parts[0], *parts[1])
    want = reference.oracle(q, k, v, torch.cat((selected, window), 3))
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=0)


# --- more spans than the kernel takes ---


@pytest.mark.parametrize("backend", ("auto", "triton"))
@pytest.mark.parametrize("n_spans", (1025, 2048, 2050))
@pytest.mark.parametrize("hinted", (False, True))
def test_rows_of_more_than_1024_spans_run_in_parts(backend, n_spans, hinted):
    """2,048 single tokens, say. The last part of the second row is empty."""
    from nsa_sel.kernel import launch

    torch.manual_seed(0)
    rows, tokens = 2, 3000
    q = torch.randn(1, rows, 1, 2, 16, device=DEVICE, dtype=torch.float16)
    k, v = (torch.randn(1, 1, tokens, 16, device=DEVICE, dtype=torch.float16) for _ in range(2))
    starts = torch.stack([torch.randperm(tokens)[:n_spans] for _ in range(rows)]).view(1, rows, 1, n_spans)
    ranges = torch.stack((starts, starts + 1), -1).int().to(DEVICE)
    ranges[0, 1, :, 1024:] = 0
    hints = {"min_len": 1024, "max_len": n_spans} if hinted else {}
    before = launch.launch_count()
    out, lse = call(backend, return_lse=True, **hints)(q, k, v, ranges)
    if backend == "triton" or ON_GPU:
        assert launch.launch_count() - before == -(-n_spans // 1024)
    want = reference.oracle(q, k, v, ranges)
    torch.testing.assert_close(out.double(), want, atol=float(want.abs().max()) * 2**-10, rtol=0)
    torch.testing.assert_close(lse.cpu().double(), exact_lse(q, k, ranges, 0.25), atol=2e-5, rtol=0)
    assert torch.equal(call(backend, **hints)(q, k, v, ranges), out)


# --- varlen batches in one call ---


@each_backend
def test_sequences_of_one_long_context_are_told_by_their_offsets(backend):
    lengths, size = [13, 30, 21], 8
    q = inputs()[0].new_empty(1, 3, 1, H, D).normal_()
    k, v = (q.new_empty(1, 1, sum(lengths), D).normal_() for _ in range(2))
    first = torch.tensor([0, 13, 43], device=DEVICE).view(1, 3, 1, 1)
    context = torch.tensor(lengths, device=DEVICE).view(1, 3, 1, 1)
    blocks = torch.tensor([[0, 1, 1], [3, 0, -1], [2, 2, 0]], device=DEVICE).view(1, 3, 1, 3)
    ranges = spans.block_ranges(blocks, size, context, offset=first, unique=True)
    out = call(backend)(q, k, v, ranges)
    for s, named in enumerate(([0, 1], [3, 0], [2, 0])):
        own = slice(int(first[0, s]), int(first[0, s]) + lengths[s])
        alone = torch.tensor([[b * size, min((b + 1) * size, lengths[s])] for b in named], device=DEVICE)
        want = reference.oracle(q[:, s : s + 1], k[:, :, own], v[:, :, own], alone.view(1, 1, 1, 2, 2))
        torch.testing.assert_close(out[:, s : s + 1].double(), want, atol=1e-5, rtol=0)
