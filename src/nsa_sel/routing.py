"""The routing rule: toggles, GPU, length and capability in; the backend and one plain sentence out.

Source: README.md, "Toggles".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .config import SelConfig
from .errors import UnsupportedError

BACKENDS = ("auto", "triton", "packed_sdpa", "masked_sdpa")


@dataclass(frozen=True)
class Route:
    """Name the backend that runs a call, and the reason in one sentence.

    shares: neighbouring queries may share tiles of K and V; which of them do is decided on the GPU, by their ranges.
    """

    backend: str
    reason: str
    shares: bool = False


def decide(
    backend: str,
    *,
    config: SelConfig,
    gpu_name: str | None,
    max_len: int | Callable[[], int],
    needs_grad: bool,
    unsupported: str | None,
    transformed: bool = False,
) -> Route:
    """Choose the backend of one call.

    gpu_name: the CUDA device that holds the tensors; None if they are not on one.
    max_len: the longest row's L in tokens, or a function that finds it, called only if the length decides. It raises
    UnsupportedError where the ranges cannot be read; `"auto"` then takes SDPA, which can do without.
    needs_grad: whether the result must be differentiable.
    unsupported: why the Triton kernel cannot run these tensors; None if it can.
    transformed: whether derivatives are those of torch.func, of forward mode or of a trace, and not the plain backward.

    An explicit backend never falls back. `"auto"` never picks Triton without a GPU: its interpreter is for tests.

    Raises: ValueError for an unknown backend; UnsupportedError if Triton is asked for by name and cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: value is {backend!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    if backend == "triton":
        obstacle = _kill_switch(config) or _no_rule(needs_grad and transformed) or unsupported
        if obstacle:
            raise UnsupportedError(f"backend: value is 'triton', which cannot run this call: {obstacle}")
        return _ASKED[backend]
    if backend != "auto":
        return _ASKED[backend]
    if config.force_parity:
        return Route("packed_sdpa", _kill_switch(config) or "")

    instead = fallback(config)
    obstacle = _switched_off(config) or _no_rule(needs_grad and transformed) or _no_device(gpu_name)
    obstacle = obstacle or unsupported or _not_measured(config, gpu_name)
    if obstacle:
        return Route(instead, obstacle)
    threshold = config.min_len_for(gpu_name, training=needs_grad)
    if threshold is None and needs_grad:
        return Route(instead, f"gradients needed, and sel_triton_min_L has no training length for {gpu_name}")
    if threshold is None:
        return Route(instead, f"sel_triton_min_L is null (never) for {gpu_name}")
    try:
        length = max_len() if callable(max_len) else max_len
    except UnsupportedError as unknown:
        return Route(instead, str(unknown))
    regime = " for training" if needs_grad else ""
    if length < threshold:
        return Route(instead, f"L={length} is below sel_triton_min_L={threshold}{regime}")
    return Route("triton", f"L={length} is at least sel_triton_min_L={threshold}{regime}")


def fallback(config: SelConfig) -> str:
    """Return the backend that `"auto"` takes where it does not take Triton, the kill switch apart."""
    return "packed_sdpa" if config.use_sel_pack else "masked_sdpa"


_ASKED = {backend: Route(backend, f"backend={backend!r} was asked for") for backend in BACKENDS if backend != "auto"}


def _kill_switch(config: SelConfig) -> str | None:
    if config.force_parity:
        return f"NSA_FORCE_PARITY is on (set by {config.sources['force_parity']})"
    return None


def _switched_off(config: SelConfig) -> str | None:
    if config.use_triton_sel is False:
        return f"NSA_USE_TRITON_SEL is 0 (set by {config.sources['use_triton_sel']})"
    return None


def _no_rule(needed: bool) -> str | None:
    if needed:
        return "gradients needed under torch.func, in forward mode or in a trace, and the Triton kernel has none there"
    return None


def _no_device(gpu_name: str | None) -> str | None:
    return "no CUDA device" if gpu_name is None else None


def _not_measured(config: SelConfig, gpu_name: str | None) -> str | None:
    if config.use_triton_sel == "auto" and not config.has_entry(gpu_name):
        return f"NSA_USE_TRITON_SEL is auto and sel_triton_min_L has no measured entry for {gpu_name}"
    return None
