"""Derivatives: backward, forward, and through torch.func, compared with those of plain operations in float64."""

from __future__ import annotations

import pytest
import torch
from mode_case import (
    DEVICE,
    B,
    G,
    H,
    L,
    S,
    call,
    each_backend,
    each_differentiable,
    hinted_or_not,
    inputs,
    plain,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_sel import UnsupportedError, reference

# torch compiles its own rules for jvp with torch.jit.script, which it calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def doubles(*tensors):
    return [x.double() if x.is_floating_point() else x for x in tensors]


def close(got, want, atol=1e-5):
    torch.testing.assert_close(got.double(), want, atol=atol, rtol=1e-4)


# --- forward mode ---


@each_differentiable
@hinted_or_not
@pytest.mark.parametrize("which", range(3), ids="qkv")
def test_a_tangent_comes_out_right(backend, hints, which):
    args = list(inputs())
    tangent = torch.randn(args[which].shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))

    def of_one(x):
        return plain(*doubles(*args[:which]), x, *doubles(*args[which + 1 :]))

    want = jvp(of_one, (args[which].double(),), (tangent.double(),))[1]
    with forward_ad.dual_level():
        args[which] = forward_ad.make_dual(args[which], tangent)
        got = forward_ad.unpack_dual(call(backend, **hints)(*args)).tangent
    close(got, want)


@hinted_or_not
def test_triton_refuses_a_tangent_and_not_a_level_without_one(hints):
    q, k, v, ranges = inputs()
    want = call("triton", **hints)(q, k, v, ranges)
    with forward_ad.dual_level():
        assert torch.equal(call("triton", **hints)(q, k, v, ranges), want)
        with pytest.raises(UnsupportedError, match="gradients needed"):
            call("triton", **hints)(forward_ad.make_dual(q, q), k, v, ranges)


@each_differentiable
def test_bf16_has_tangents(backend):
    q, k, v, ranges = inputs(torch.bfloat16)
    want = jvp(lambda q: plain(q, *doubles(k, v), ranges), (q.double(),), (q.double(),))[1]
    got = jvp(lambda q: call(backend)(q, k, v, ranges), (q,), (q,))[1]
    assert got.dtype == torch.bfloat16
    close(got, want, atol=1e-2)


# --- torch.func ---


@each_differentiable
@hinted_or_not
def test_func_grad_vjp_and_second_derivatives(backend, hints):
    q, k, v, ranges = inputs()
    exact = doubles(q, k, v)
    run = call(backend, **hints)
    close(
        grad(lambda q: run(q, k, v, ranges).sin().sum())(q),
        grad(lambda q: plain(q, *exact[1:], ranges).sin().sum())(exact[0]),
    )
    out, back = vjp(lambda *x: run(*x, ranges), q, k, v)
    for got, want in zip(back(out), vjp(lambda *x: plain(*x, ranges), *exact)[1](out.double()), strict=True):
        close(got, want)

    def push(f, at):  # forward over reverse
        return jvp(grad(lambda q: f(q).pow(2).sum()), (at,), (at,))[1]

    close(
        push(lambda q: run(q, k, v, ranges), q),
        push(lambda q: plain(q, *exact[1:], ranges), exact[0]),
        atol=1e-4,
    )


@each_backend
@hinted_or_not
@pytest.mark.parametrize(
    "batched",
    [("q",), ("q", "k"), ("k",), ("q", "ranges"), ("q", "k", "v", "ranges")],
    ids="-".join,
)
def test_vmap_gives_what_a_loop_gives(backend, hints, batched):
    args = dict(zip(("q", "k", "v", "ranges"), inputs(), strict=True))
    for i, name in enumerate(batched):
        other = args[name].flip(i % 2)
        args[name] = torch.stack((args[name], other, args[name]), dim=i)
    dims = tuple(batched.index(name) if name in batched else None for name in args)

    def run(*x):
        return call(backend, return_lse=True, **hints)(*x)

    outs, lses = vmap(run, in_dims=dims, out_dims=1)(*args.values())
    for i in range(3):
        one = [x if d is None else x.select(d, i) for x, d in zip(args.values(), dims, strict=True)]
        want, want_lse = run(*one)
        torch.testing.assert_close(outs[:, i], want, atol=1e-5, rtol=0)
        torch.testing.assert_close(lses[:, i], want_lse, atol=1e-5, rtol=0)


def test_vmap_over_queries_copies_no_keys(monkeypatch):
    seen, form = [], reference.packed_sdpa
    monkeypatch.setattr(reference, "packed_sdpa", lambda *x, **more: (seen.append(x), form(*x, **more))[1])
    q, k, v, ranges = inputs()
    vmap(lambda q: call("packed_sdpa")(q, k, v, ranges))(torch.stack((q, q, q)))
    assert [(x[0].shape, x[1].data_ptr()) for x in seen] == [((B, 3 * S, G, *q.shape[3:]), k.data_ptr())]


@each_differentiable
@hinted_or_not
def test_vmap_and_grad_in_either_order(backend, hints):
    q, k, v, ranges = inputs()
    batch = torch.stack((q, q + 1))
    run = call(backend, **hints)
    want = torch.stack([grad(lambda q: plain(q, *doubles(k, v), ranges).sin().sum())(x.double()) for x in batch])
    close(vmap(grad(lambda q: run(q, k, v, ranges).sin().sum()))(batch), want)
    close(grad(lambda qs: vmap(lambda q: run(q, k, v, ranges))(qs).sin().sum())(batch), want)
    both = torch.stack((ranges, ranges))
    if backend == "packed_sdpa" and not hints:
        with pytest.raises(UnsupportedError, match="max_len: value is None, expected min_len and max_len"):
            vmap(grad(lambda q, r: run(q, k, v, r).sum()))(batch, both)
    else:
        close(vmap(grad(lambda q, r: run(q, k, v, r).sin().sum()))(batch, both), want)


@each_differentiable
def test_functional_call(backend):
    q, k, v, ranges = inputs()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.eye(q.shape[-1], device=DEVICE))

        def forward(self, q):
            return call(backend)(q @ self.weight, k, v, ranges)

    model = Model()
    weights = {"weight": model.weight.detach()}
    got = grad(lambda w: functional_call(model, w, (q,)).sum())(weights)["weight"]
    want = grad(lambda w: plain(q.double() @ w, *doubles(k, v), ranges).sum())(weights["weight"].double())
    close(got, want, atol=1e-4)


# --- the plain backward pass ---


# NumPy, of which the interpreter is made, warns of inf - inf and of 0 times NaN.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("backend", ("auto", "triton", "packed_sdpa"))
@pytest.mark.parametrize("hints", ({}, {"min_len": 0, "max_len": L}), ids=("no_hints", "hints"))
@pytest.mark.parametrize("bad", (float("nan"), float("inf")), ids=str)
@pytest.mark.parametrize("token", (9, 19, 0, 39))
def test_what_no_row_selects_reaches_no_gradient(backend, hints, bad, token):
    """One row is empty; what stands for its tokens may be the bad one."""
    q, k, v, _ = inputs()
    ranges = torch.tensor([[1, 9], [20, 38]], device=DEVICE).expand(B, S, G, 2, 2).clone()
    ranges[0, 1] = 0
    results = []
    for value in (0.0, bad):
        leaves = [x.clone() for x in (q, k, v)]
        leaves[1][:, :, token] = leaves[2][:, :, token] = value
        for x in leaves:
            x.requires_grad_()
        out = call(backend, **hints)(*leaves, ranges)
        out.sin().sum().backward()
        results.append([out, *(x.grad for x in leaves)])
    for clean, spoilt in zip(*results, strict=True):
        assert spoilt.isfinite().all()
        torch.testing.assert_close(spoilt, clean, atol=1e-6, rtol=0)
    assert not results[1][1][0, 1].any()  # q of the empty row
    assert not results[1][2][:, :, token].any() and not results[1][3][:, :, token].any()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_gradients_of_keys_that_many_rows_share_are_summed_in_fp32(dtype):
    """64 rows select the same tokens. Sums in bf16 would be off by 3e-2."""
    rows, tokens = 64, 32
    torch.manual_seed(0)
    q = torch.randn(1, rows, 1, H, 16, device=DEVICE, dtype=dtype)
    k, v = (torch.randn(1, 1, tokens, 16, device=DEVICE, dtype=dtype) for _ in range(2))
    ranges = torch.tensor([[0, tokens]], device=DEVICE).expand(1, rows, 1, 1, 2)
    upstream = torch.randn(1, rows, 1, H, 16, device=DEVICE, dtype=dtype)

    def gradients(q, k, v, form):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(form(*leaves), leaves, upstream.to(q.dtype))

    def dense(q, k, v):
        weights = (torch.einsum("bsghd,bgtd->bsght", q, k) * 16**-0.5).softmax(-1)
        return torch.einsum("bsght,bgtd->bsghd", weights, v)

    want = gradients(*doubles(q, k, v), dense)
    got = gradients(q, k, v, lambda *x: reference.packed_sdpa(*x, ranges))
    for name, mine, exact in zip("qkv", got, want, strict=True):
        error = float((mine.double() - exact).norm() / exact.norm())
        assert mine.dtype == dtype and error <= 4e-3, f"d{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_the_sum_over_rows_is_told_to_be_fp32(dtype):
    """On a CPU torch sums in fp32 by itself, and accuracy alone would not tell."""
    dtypes = []

    class Records(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "scatter_add" in str(func):
                dtypes.append(args[3].dtype)
            return func(*args, **(kwargs or {}))

    leaves = [x.requires_grad_() for x in inputs(dtype)[:3]]
    out = reference.packed_sdpa(*leaves, inputs()[3])
    with Records():
        torch.autograd.grad(out.sum(), leaves)
    assert dtypes == [torch.float32] * 2


@pytest.mark.parametrize("heads", (1, 4))
def test_gradients_of_scores_far_below_zero_are_finite(heads):
    """Every score is near -120, and one row is shorter than the other."""
    torch.manual_seed(0)
    q = torch.randn(1, 2, 1, heads, 32, device=DEVICE) * 0.1
    k, v = (torch.randn(1, 1, 64, 32, device=DEVICE) * size for size in (0.1, 1))
    q[..., 0], k[..., 0] = 1, -120 * 32**0.5
    leaves = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    ranges = torch.tensor([[0, 64], [0, 63]], device=DEVICE).view(1, 2, 1, 1, 2)
    out, lse = reference.packed_sdpa(*leaves, ranges, return_lse=True)
    assert (lse < -88).all()
    gradients = torch.autograd.grad(out, leaves, torch.randn_like(out))
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.skipif(not reference.CUDNN_MAY_BE_FIRST, reason="SDPA's kernels have an order from torch 2.6 on")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("grad", (True, False))
@pytest.mark.parametrize("flash", (True, False))
def test_cudnn_computes_no_gradients(dtype, grad, flash, monkeypatch):
    """On a GPU, in low precision. Which of the other kernels may be taken stays as it was."""
    allowed, judge, sdpa = [], reference._cudnn_is_wrong, torch.nn.functional.scaled_dot_product_attention

    def on_gpu(x):
        with FakeTensorMode():
            return torch.empty(x.shape, dtype=x.dtype, device="cuda", requires_grad=x.requires_grad)

    def recorded(*args, **more):
        now = torch.backends.cuda
        others = now.flash_sdp_enabled(), now.mem_efficient_sdp_enabled(), now.math_sdp_enabled()
        allowed.append((now.cudnn_sdp_enabled(), *others))
        return sdpa(*args, **more)

    monkeypatch.setattr(reference, "_cudnn_is_wrong", lambda *x: judge(*map(on_gpu, x)))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    q, k, v, ranges = inputs(dtype)
    every = [SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, *every] if flash else every):
        reference.packed_sdpa(q.requires_grad_(grad), k, v, ranges)
    assert allowed == [(not (grad and dtype == torch.bfloat16), flash, False, True)]


@each_backend
def test_gradients_of_a_call_without_tokens_are_zeros(backend):
    q, k, v, _ = inputs()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = call(backend, return_lse=True)(*leaves, torch.zeros(B, S, G, 1, 2, dtype=torch.int32, device=DEVICE))
    out.sum().backward()
    assert torch.isneginf(lse).all()
    assert all(x.grad is not None and not x.grad.any() for x in leaves)
