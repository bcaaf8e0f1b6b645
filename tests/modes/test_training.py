"""The kernel in a training loop: masks of gradients, compilers, checkpoints, second derivatives, failures."""

from __future__ import annotations

import pytest
import torch
from mode_case import ON_GPU, L, call, hinted_or_not, inputs, plain
from torch.func import grad
from torch.utils.checkpoint import checkpoint

import nsa_sel
from nsa_sel import UnsupportedError, dispatch, reference, training
from nsa_sel.errors import KernelFailed
from nsa_sel.kernel import backward_launch
from nsa_sel.routing import Route

# torch compiles rules of its own with torch.jit.script, which it calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
HINTS = {"min_len": L, "max_len": L}


@pytest.fixture
def trains(monkeypatch):
    """Let "auto" choose the kernel, as on a GPU with a training length."""
    monkeypatch.setattr(dispatch, "route", lambda *args: Route("triton", "a GPU that was measured"))


def exact(wanted="qkv"):
    leaves = [x.double().requires_grad_(name in wanted) for name, x in zip("qkv", inputs()[:3], strict=True)]
    asked = [x for x in leaves if x.requires_grad]
    return torch.autograd.grad(plain(*leaves, inputs()[3]).sin().sum(), asked)


def gradients(run, wanted="qkv"):
    leaves = [x.requires_grad_(name in wanted) for name, x in zip("qkv", inputs()[:3], strict=True)]
    asked = [x for x in leaves if x.requires_grad]
    return torch.autograd.grad(run(*leaves, inputs()[3]).sin().sum(), asked)


def assert_exact(got, wanted="qkv"):
    for mine, want in zip(got, exact(wanted), strict=True):
        torch.testing.assert_close(mine.double(), want, atol=1e-5, rtol=1e-4)


@hinted_or_not
@pytest.mark.parametrize("wanted", ("q", "k", "v", "kv", "qkv"))
def test_only_the_gradients_that_are_needed_are_computed(hints, wanted, monkeypatch):
    asked = []
    run = backward_launch.BackwardPlan.run
    monkeypatch.setattr(
        backward_launch.BackwardPlan, "run", lambda plan, saved, *which: asked.append(which) or run(plan, saved, *which)
    )
    assert_exact(gradients(call("triton", **hints), wanted), wanted)
    assert asked == [("q" in wanted, wanted != "q")]


@pytest.mark.parametrize("compiler", ("aot_eager", "inductor"))
def test_under_torch_compile_without_a_graph_break(compiler):
    torch._dynamo.reset()
    assert_exact(gradients(torch.compile(call("triton"), backend=compiler, fullgraph=True)))


@pytest.mark.parametrize(("threshold", "trained"), ((None, False), (L, True), (L + 1, False)))
def test_auto_under_torch_compile_has_the_threshold_of_training(threshold, trained, monkeypatch):
    def of_device(device_type, index):
        return threshold

    of_device._dynamo_marked_constant = True
    monkeypatch.setattr(dispatch, "training_min_len", of_device)
    ran = []
    monkeypatch.setattr(training, "_plan", lambda *args, plan=training._plan: ran.append(args) or plan(*args))
    torch._dynamo.reset()
    assert_exact(gradients(torch.compile(call("auto", **HINTS), backend="aot_eager", fullgraph=True)))
    assert bool(ran) == trained


def test_the_length_of_training_is_read_from_the_toggles(monkeypatch):
    regimes = {"Measured": {"inference": 16, "training": 128}, "Other": 16}
    monkeypatch.setattr(dispatch, "get_config", lambda: nsa_sel.SelConfig(sel_triton_min_L=regimes))
    for name, found in (("Measured", 128), ("Other", None), ("Unknown", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index, name=name: name)
        assert dispatch.training_min_len("cuda", 0) == found
    assert dispatch.training_min_len("cpu", None) is None


@pytest.mark.parametrize("reentrant", (False, True))
def test_activation_checkpointing(reentrant):
    leaves = [x.requires_grad_() for x in inputs()[:3]]
    checkpoint(call("triton"), *leaves, inputs()[3], use_reentrant=reentrant).sin().sum().backward()
    assert_exact([x.grad for x in leaves])


def second_derivative(run):
    q, k, v, ranges = inputs()
    q.requires_grad_()
    (first,) = torch.autograd.grad(run(q, k, v, ranges).sin().sum(), q, create_graph=True)
    return torch.autograd.grad(first.sin().sum(), q)[0]


def test_triton_refuses_second_derivatives():
    with pytest.raises(UnsupportedError, match="backend: value is 'triton', .*: second derivatives needed"):
        second_derivative(call("triton"))


def test_auto_takes_second_derivatives_of_an_sdpa_form(trains):
    got = second_derivative(call("auto", **HINTS))
    torch.testing.assert_close(got, second_derivative(plain), atol=1e-5, rtol=1e-4)


def test_triton_refuses_transforms():
    q, k, v, ranges = inputs()
    with pytest.raises(UnsupportedError, match="gradients needed under torch.func"):
        grad(lambda q: call("triton")(q, k, v, ranges).sum())(q)


@pytest.fixture
def broken(monkeypatch):
    """Let the backward kernels fail to compile."""

    def fail(*args):
        raise KernelFailed("the kernel cannot be compiled")

    monkeypatch.setattr(backward_launch.BackwardPlan, "run", fail)
    monkeypatch.setattr(training, "failures", {})


def test_a_backward_kernel_that_fails_costs_auto_a_warning(trains, broken):
    with pytest.warns(RuntimeWarning, match="packed_sdpa runs in place of Triton: the kernel cannot be compiled"):
        found = gradients(call("auto", **HINTS))
    assert_exact(found)
    q, _, v, _ = inputs()
    assert list(training.failures) == [training.kind(q, v)]


def test_a_backward_kernel_that_fails_is_an_error_for_triton(broken):
    with pytest.raises(UnsupportedError, match="the kernel cannot be compiled"):
        gradients(call("triton"))


@pytest.mark.skipif(ON_GPU, reason="some GPUs have that much")
def test_a_backward_pass_that_needs_too_much_shared_memory_is_refused_and_the_forward_is_not():
    q, k, v, ranges = inputs()
    q = torch.randn(1, 1, q.shape[2], 64, 256, device=q.device)
    k, v = (torch.randn(1, x.shape[1], x.shape[2], 256, device=q.device) for x in (k, v))
    ranges = ranges[:1, :1]
    assert nsa_sel.choose_route(q, k, v, ranges, backend="triton").backend == "triton"
    with pytest.raises(UnsupportedError, match="H=64, D=256, Dv=256 in torch.float32 needs more shared memory"):
        call("triton")(q.requires_grad_(), k, v, ranges)


def test_the_kill_switch_holds_for_a_traced_call(monkeypatch):
    monkeypatch.setattr(training, "get_config", lambda: nsa_sel.SelConfig(force_parity=True))
    torch._dynamo.reset()
    with pytest.raises(UnsupportedError, match="NSA_FORCE_PARITY is on"):
        gradients(torch.compile(call("triton", scale=0.5), backend="aot_eager"))


def test_the_results_need_no_gradient_of_their_own():
    """The result alone, the LSE alone, and neither of which the loss depends on by every head."""
    leaves = [x.requires_grad_() for x in inputs()[:3]]
    ranges = inputs()[3]
    for pick in (lambda out, lse: out[:, :, :, 0], lambda out, lse: lse[:, :, :, 1]):
        got = torch.autograd.grad(
            pick(*call("triton", return_lse=True)(*leaves, ranges)).sin().sum(), leaves, allow_unused=True
        )
        form = reference.packed_sdpa(*leaves, ranges, return_lse=True)
        want = torch.autograd.grad(pick(*form).sin().sum(), leaves, allow_unused=True)
        for mine, other in zip(got, want, strict=True):
            torch.testing.assert_close(mine, torch.zeros_like(mine) if other is None else other, atol=1e-5, rtol=0)


@pytest.mark.skipif(not ON_GPU, reason="captures a CUDA graph")
def test_a_step_in_a_cuda_graph():
    q, k, v, ranges = inputs()
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def step():
        return torch.autograd.grad(call("triton", **HINTS)(*leaves, ranges).sin().sum(), leaves)

    want = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for _ in range(3):
        for x in got:
            x.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(mine, other) for mine, other in zip(got, want, strict=True))
