"""Tensor subclasses, modes and tracers see the operation; what cannot be run is refused by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.utils._pytree as pytree
from mode_case import (
    BACKENDS,
    ON_GPU,
    SDPA,
    L,
    assert_right,
    call,
    each_backend,
    each_differentiable,
    environment,
    hinted_or_not,
    inputs,
    needs_gpu,
    plain,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import nsa_sel
from nsa_sel import UnsupportedError, dispatch, routing, training

NAMES = ("q", "k", "v", "ranges")


class Wrapper(Tensor):
    """A tensor without storage that wraps another."""

    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner):
        self.inner = inner


class Unwraps(Wrapper):
    """It runs every operation on what it wraps, and keeps their names."""

    seen: list[str] = []

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func))
        args, kwargs = pytree.tree_map_only(cls, lambda x: x.inner, (args, kwargs or {}))
        return pytree.tree_map_only(Tensor, cls, func(*args, **kwargs))


class Refuses(Wrapper):
    """It has no rule for any operation."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return NotImplemented


class Raises(Wrapper):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"no rule for {func}")


class KnowsNoFunction(Tensor):
    """It has memory, and refuses every torch function."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if "selection_attention" in str(func):
            return NotImplemented
        return super().__torch_function__(func, types, args, kwargs or {})


class Marked(Tensor):
    """It has memory and the usual rules."""


# --- tensor subclasses ---


@each_backend
@hinted_or_not
def test_a_subclass_that_wraps_a_tensor_is_run_on_what_it_wraps(backend, hints):
    Unwraps.seen.clear()
    args = inputs()
    call(backend, **hints)(*args)  # a plan of the same shapes is known
    out = call(backend, **hints)(*map(Unwraps, args))
    assert type(out) is Unwraps
    assert "nsa_sel.selection_attention.default" in Unwraps.seen
    assert_right(out.inner, *args)


@each_backend
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", (Refuses, Raises, KnowsNoFunction))
def test_a_subclass_without_a_rule_is_refused_by_name(backend, name, kind):
    args = dict(zip(NAMES, inputs(), strict=True))
    want = call(backend)(**args)
    spoilt = args[name].as_subclass(kind) if kind is KnowsNoFunction else kind(args[name])
    with pytest.raises(TypeError, match=rf"^{name}: type is {kind.__name__}, expected torch.Tensor or a subclass"):
        call(backend)(**{**args, name: spoilt})
    assert torch.equal(call(backend)(**args), want)


@each_backend
def test_a_subclass_with_memory_stays_what_it_is(backend):
    args = [x.as_subclass(Marked) for x in inputs()]
    out = call(backend)(*args)
    assert type(out) is Marked
    assert_right(out.as_subclass(Tensor), *inputs())


@each_backend
def test_a_parameter_is_a_tensor(backend):
    q, k, v, ranges = inputs()
    out = call(backend)(torch.nn.Parameter(q, requires_grad=False), k, v, ranges)
    assert type(out) is Tensor
    assert_right(out, q, k, v, ranges)


@each_backend
def test_a_subclass_is_differentiated_through_what_it_wraps(backend):
    args = inputs()
    leaves = [x.clone().requires_grad_() for x in args[:3]]
    want = torch.autograd.grad(plain(*leaves, args[3]).sum(), leaves)
    wrapped = [Unwraps(x).requires_grad_() for x in args[:3]]
    out = call(backend, min_len=L, max_len=L)(*wrapped, Unwraps(args[3]))
    for got, exact in zip(torch.autograd.grad(out.sum(), wrapped), want, strict=True):
        torch.testing.assert_close(got.inner, exact, atol=1e-5, rtol=0)


@each_backend
@pytest.mark.parametrize("name", ("k", "ranges"))
def test_a_sparse_tensor_is_refused_by_name(backend, name):
    args = dict(zip(NAMES, inputs(), strict=True))
    with pytest.raises(TypeError, match=rf"^{name}: type is a tensor of layout torch.sparse_coo, expected"):
        call(backend)(**{**args, name: args[name].to_sparse()})


# --- modes ---


class Records(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class RecordsFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@each_backend
@hinted_or_not
@pytest.mark.parametrize("mode", (Records, RecordsFunctions))
def test_a_mode_sees_one_operation(backend, hints, mode):
    args = inputs()
    want = call(backend, **hints)(*args)
    with mode() as active:
        out = call(backend, **hints)(*args)
    assert [name for name in active.seen if "nsa_sel" in name] == ["nsa_sel.selection_attention.default"]
    assert torch.equal(out, want)


@each_differentiable
def test_a_mode_sees_the_operations_of_a_differentiable_call(backend):
    q, k, v, ranges = inputs()
    with Records() as active:
        out = call(backend)(q.requires_grad_(), k, v, ranges)
    assert any("scaled_dot_product" in name for name in active.seen)
    assert_right(out, q, k, v, ranges)


@each_backend
def test_fake_tensors_give_a_fake_result(backend):
    with FakeTensorMode() as mode:
        q, k, v, ranges = map(mode.from_tensor, inputs())
        out, lse = call(backend, return_lse=True)(q, k, v, ranges)
    assert out.shape == q.shape and lse.shape == q.shape[:4]
    assert (out.dtype, lse.dtype) == (q.dtype, torch.float32)
    again = call(backend)(q, k, v, ranges)  # outside the mode
    assert type(again) is type(q)
    with pytest.raises(ValueError, match=r"^k: shape is"), mode:
        call(backend)(q, k[..., :8], v, ranges)


@each_backend
def test_a_config_of_the_call_is_refused_where_the_operation_is_seen(backend):
    with Records(), pytest.raises(ValueError, match="^config: value is not None"):
        call(backend, config=nsa_sel.SelConfig.load())(*inputs())


# --- tracers ---


@each_backend
@hinted_or_not
@pytest.mark.parametrize("tracing_mode", ("real", "fake", "symbolic"))
def test_make_fx_records_one_operation(backend, hints, tracing_mode):
    graph = make_fx(lambda *x: call(backend, **hints)(*x), tracing_mode=tracing_mode)(*inputs())
    calls = [node for node in graph.graph.nodes if "selection_attention" in str(node.target)]
    assert len(calls) == 1
    args = inputs(seed=1)
    assert_right(graph(*args), *args)


@each_backend
@hinted_or_not
@pytest.mark.parametrize("tracing_mode", ("real", "fake", "symbolic"))
def test_make_fx_records_gradients(backend, hints, tracing_mode):
    if backend == "packed_sdpa" and not hints and tracing_mode != "real":
        with pytest.raises(UnsupportedError, match="max_len: value is None, expected min_len and max_len"):
            assert_gradients_are_recorded(backend, hints, tracing_mode)
        return
    assert_gradients_are_recorded(backend, hints, tracing_mode)


@pytest.mark.parametrize("tracing_mode", ("fake", "symbolic"))
def test_make_fx_records_gradients_where_auto_would_train_by_a_length_that_it_cannot_read(tracing_mode, monkeypatch):
    decide, on_h200 = routing.decide, {"gpu_name": "NVIDIA H200", "unsupported": None}
    monkeypatch.setattr(routing, "decide", lambda backend, **call: decide(backend, **call | on_h200))
    assert_gradients_are_recorded("auto", {}, tracing_mode)


def assert_gradients_are_recorded(backend, hints, tracing_mode):
    def gradients(q, k, v, ranges):
        return torch.autograd.grad(call(backend, **hints)(q, k, v, ranges).sin().sum(), (q, k, v))

    q, k, v, ranges = inputs()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    recorded = make_fx(gradients, tracing_mode=tracing_mode)(*leaves, ranges)
    want = torch.autograd.grad(plain(*leaves, ranges).sin().sum(), leaves)
    for got, exact in zip(recorded(*leaves, ranges), want, strict=True):
        torch.testing.assert_close(got, exact, atol=1e-5, rtol=0)


def symbolic(x):
    return StatelessSymbolicContext([DimDynamic.DYNAMIC] * x.dim())


def test_an_earlier_failure_is_looked_up_by_sizes_that_a_tracer_gives(monkeypatch):
    monkeypatch.setattr(dispatch, "_unsupported", lambda *tensors: None)
    monkeypatch.setattr(training, "failures", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    args = inputs()
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        q, k, v, ranges = (
            torch.empty(mode.from_tensor(x, symbolic_context=symbolic(x)).shape, dtype=x.dtype, device="cuda")
            for x in args
        )
        assert isinstance(q.shape[3], torch.SymInt)
        config = nsa_sel.SelConfig.load(env={})
        assert dispatch.route(q, k, v, ranges, "auto", config, L).backend == "triton"
        training.failures[training.kind(q, v)] = "it failed before"
        assert dispatch.route(q, k, v, ranges, "auto", config, L).reason == "it failed before"


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@each_backend
@hinted_or_not
def test_jit_trace(backend, hints):
    traced = torch.jit.trace(lambda *x: call(backend, **hints)(*x), inputs())
    q, k, v, ranges = inputs(seed=1)
    moved = ranges + 3  # what the ranges hold is no part of the trace
    assert_right(traced(q, k, v, moved), q, k, v, moved)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@each_differentiable
@hinted_or_not
def test_jit_trace_of_a_differentiable_call(backend, hints):
    def trace(q):
        return torch.jit.trace(lambda *x: call(backend, **hints)(*x), (q, *inputs()[1:]))

    if backend == "packed_sdpa" and not hints:
        with pytest.raises(UnsupportedError, match="max_len: value is None, expected min_len and max_len"):
            trace(inputs()[0].requires_grad_())
        return
    traced = trace(inputs()[0].requires_grad_())
    # A limit that is a tensor would be one of the CPU, also where the rest is on a GPU.
    assert not [node.schema() for node in traced.graph.nodes() if node.schema().startswith("aten::clamp.Tensor")]
    q, k, v, ranges = inputs(seed=1)
    q.requires_grad_()
    got = torch.autograd.grad(traced(q, k, v, ranges).sin().sum(), q)[0]
    want = torch.autograd.grad(plain(q, k, v, ranges).sin().sum(), q)[0]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@each_backend
@hinted_or_not
def test_export(backend, hints):
    class Model(torch.nn.Module):
        def forward(self, q, k, v, ranges):
            return call(backend, **hints)(q, k, v, ranges)

    exported = torch.export.export(Model(), inputs())
    args = inputs(seed=1)
    assert_right(exported.module()(*args), *args)


# --- DTensor ---


@pytest.mark.parametrize(("device", "processes"), [("cpu", 2), pytest.param("cuda", 1, marks=needs_gpu)])
def test_dtensors(device, processes, tmp_path: Path):
    """Sharded over B, S, G or H, or placed otherwise: as on one device, with gradients; else refused by name."""
    if not hasattr(pytest.importorskip("torch.distributed.tensor"), "DTensor"):
        pytest.skip("needs the DTensor of torch 2.5")
    program = Path(__file__).with_name("dtensor_process.py")
    # Beside a GPU nothing says that Triton's interpreter gets along with the NumPy there.
    backends = SDPA if ON_GPU and device == "cpu" else BACKENDS
    workers = [
        subprocess.Popen(
            [sys.executable, str(program), device, str(rank), str(processes), str(tmp_path / "store"), *backends],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    for worker in workers:
        output, _ = worker.communicate(timeout=300)
        assert worker.returncode == 0, output
