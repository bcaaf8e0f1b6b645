"""What a user would pick instead of our kernel: each in its own layout, ready for the same timer and the same check.

Every adapter takes a state whose spans are blocks of `case.block` tokens in rising order, the last possibly cut short,
and makes layouts, masks and plans ready, outside the timed region.
Source: docs/peers.md, which says what each peer can do.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import statistics
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..suite.inputs import TORCH_DTYPES
from . import contender
from .contender import CaseState, NotTimed, Prepared

TENSOR_CORE_ROWS = 16  # rows of the smallest tile that multiplies on tensor cores
# (warps, stages) tried for FlexAttention's 16-row tiles: its default is made for 128 rows.
FLEX_LAUNCHES = ((4, 3), (2, 2), (1, 1))
FLASHINFER_WORKSPACE = 128 << 20  # bytes, as its documentation recommends


@dataclass(frozen=True)
class Peer:
    """Name a peer's package, the top-level module that it installs, and how it is made ready."""

    package: str
    module: str
    adapter: Callable[[CaseState], Prepared]
    needs_gpu: bool = False


def prepare(state: CaseState, method: str) -> Prepared:
    """Return the peer ready for timing, not yet checked, its version among the details.

    Raises:
        NotTimed: not installed, no GPU, or it cannot do this case.
        Exception: whatever the peer itself raises.
    """
    peer = PEERS[method]
    if importlib.util.find_spec(peer.module) is None:
        raise NotTimed(f"{peer.package} is not installed: pip install 'nsa-sel[peers]'")
    if peer.needs_gpu and state.device == "cpu":
        raise NotTimed("no GPU")
    form = peer.adapter(state)
    return replace(form, details={**form.details, "peer": f"{peer.package} {importlib.metadata.version(peer.package)}"})


def selected_blocks(state: CaseState) -> tuple[Tensor, Tensor]:
    """Return number and length in tokens of every selected block, int64 [B, S, G, n_spans]: -1 and 0 where empty."""
    start, end = state.inputs.ranges.long().unbind(-1)
    length = (end - start).clamp(min=0)
    return torch.where(length > 0, start // state.case.block, -1), length


def _flex_attention(state: CaseState) -> Prepared:
    """FlexAttention: a token's heads are query positions of their KV group, in a tile of the block mask of their own.

    q [B, G, S * rows, D], k and v as they are. Blocks are listed per tile; whole ones skip the mask function.
    """
    from torch.nn.attention.flex_attention import BlockMask

    case, x = state.case, state.inputs
    B, S, G, H = case.B, case.S, case.G, case.H
    tile = max(TENSOR_CORE_ROWS, 1 << (H - 1).bit_length())
    rows = H if S == 1 else tile  # tokens of a tile would otherwise share one list of blocks
    q = F.pad(x.q.transpose(1, 2), (0, 0, 0, rows - H)).reshape(B, G, S * rows, case.D)
    number, length = (t.transpose(1, 2) for t in selected_blocks(state))  # [B, G, S, n_spans]

    def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many blocks of each tile are chosen, and their numbers first: int32 [B, G, S], [B, G, S, all]."""
        first = number.gather(-1, chosen.logical_not().int().argsort(dim=-1, stable=True)).clamp(min=0)
        return chosen.sum(-1).int(), F.pad(first, (0, case.S_kv // case.block - case.n_spans)).int()

    def causal(b: Tensor, g: Tensor, position: Tensor, token: Tensor) -> Tensor:
        return token <= position // rows + (case.S_kv - S)

    whole = length == case.block
    mask = BlockMask.from_kv_blocks(
        *listed((length > 0) & ~whole), *listed(whole), (tile, case.block), causal, seq_lengths=(S * rows, case.S_kv)
    )
    launches: list[dict[str, int] | None] = [None]  # None: FlexAttention chooses
    if S > 1 and state.device == "cuda":
        names = "BLOCK_M", "BLOCK_N", "num_warps", "num_stages"
        launches = [dict(zip(names, (tile, case.block, *launch), strict=True)) for launch in FLEX_LAUNCHES]

    def result(out: Tensor) -> Tensor:
        return out.view(B, G, S, rows, case.Dv)[:, :, :, :H].transpose(1, 2).reshape(case.N, H, case.Dv)

    forms = []
    for options in launches:
        compiled = torch.compile(_body_of_its_own(), fullgraph=True, dynamic=False)
        said = "compiled, block mask given" + (f", {options['num_warps']} warps" if options else "")
        call = functools.partial(compiled, q, x.k, x.v, mask, options)
        forms.append(Prepared(call, result, {"config": said + (f", heads padded to {rows}" if rows > H else "")}))
    return _fastest(state, forms)


def _fla_nsa(state: CaseState) -> Prepared:
    """flash-linear-attention: the forward kernel of its NSA selection, without the compression that its API adds.

    q [B, S, G * group, D], k and v [B, S_kv, G, *], block numbers [B, S, G, n_spans], -1 where there is none.
    """
    from fla.ops.nsa import parallel

    case, x = state.case, state.inputs
    B, S, G, H = case.B, case.S, case.G, case.H
    group = max(TENSOR_CORE_ROWS, 1 << (H - 1).bit_length())  # its API asks for a power of 2 of at least 16 heads
    q = F.pad(x.q, (0, 0, 0, group - H)).reshape(B, S, G * group, case.D)
    k, v = (t.transpose(1, 2).contiguous() for t in (x.k, x.v))
    number = selected_blocks(state)[0].int().contiguous()
    tuner = parallel.parallel_nsa_fwd_kernel.fn
    tuner.cache_results = False  # it keeps one choice, on disk too, for all shapes of these widths: tune for this one
    tuner.cache.clear()

    def call() -> Tensor:
        out, _ = parallel.parallel_nsa_fwd(
            q=q,
            k=k,
            v=v,
            block_indices=number,
            block_counts=case.n_spans,
            block_size=case.block,
            scale=case.D**-0.5,
        )
        return out

    def result(out: Tensor) -> Tensor:
        return out.view(B, S, G, group, case.Dv)[:, :, :, :H].reshape(case.N, H, case.Dv)

    padded = f", heads padded to {group}" if group > H else ""
    return Prepared(call, result, {"config": f"parallel_nsa_fwd, tuned for the case{padded}"})


def _flashinfer_paged(state: CaseState) -> Prepared:
    """FlashInfer's paged decode: one request per row, whose blocks are its pages, planned outside the timed region.

    q [N, H, D], k and v pages [B * G * S_kv / block, block, 1, D]: the tensors as they are, one KV head per request.
    """
    case, x = state.case, state.inputs
    if case.Dv != case.D:
        raise NotTimed(f"it has one head_dim for K and V, here they are {case.D} and {case.Dv}")
    import flashinfer

    number, length = selected_blocks(state)
    selected = length > 0
    B, _, G = number.shape[:3]
    context = torch.arange(B * G, device=number.device).view(B, 1, G, 1) * (case.S_kv // case.block)
    pages = (context + number)[selected].int()
    end = F.pad(selected.sum(-1).flatten().cumsum(0), (1, 0)).int()
    last = ((length.sum(-1).flatten() - 1) % case.block + 1).int()
    q = x.q.reshape(case.N, case.H, case.D)
    cache = tuple(t.reshape(-1, case.block, 1, case.D) for t in (x.k, x.v))
    dtype = TORCH_DTYPES[case.dtype]
    forms = []
    for cores in ("tensor", "CUDA"):
        workspace = torch.zeros(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=q.device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=cores == "tensor")
        arguments = (end, pages, last, case.H, 1, case.D, case.block)
        plan = functools.partial(wrapper.plan, *arguments, q_data_type=dtype, kv_data_type=dtype)
        call = _planned(plan, functools.partial(wrapper.run, q, cache))
        forms.append(Prepared(call, lambda out: out, {"config": f"paged decode, {cores} cores, pages of {case.block}"}))
    return _fastest(state, forms)


def _dense(state: CaseState) -> Prepared:
    """Dense SDPA, for scale only: it attends to the whole context, and is checked against the oracle for just that.

    Decode: a group's heads are the query positions of its KV head. Prefill: causal, KV heads shared or repeated.
    """
    case, x = state.case, state.inputs
    B, S, G, H = case.B, case.S, case.G, case.H
    end = torch.arange(case.S_kv - S + 1, case.S_kv + 1, device=x.q.device).view(1, S, 1, 1).expand(B, S, G, 1)
    expected = state.expect(torch.stack((torch.zeros_like(end), end), -1), case.S_kv - S + 1, case.S_kv)
    sdpa = F.scaled_dot_product_attention
    if S == 1:
        calls = {"": functools.partial(sdpa, x.q[:, 0].contiguous(), x.k, x.v)}
    else:
        q = x.q.permute(0, 2, 3, 1, 4).reshape(B, G * H, S, case.D)
        k, v = (t.repeat_interleave(H, 1) for t in (x.k, x.v))
        calls = {
            ", causal, KV heads shared": functools.partial(sdpa, q, x.k, x.v, is_causal=True, enable_gqa=True),
            ", causal, KV heads repeated": functools.partial(sdpa, q, k, v, is_causal=True),
        }

    def result(out: Tensor) -> Tensor:  # out [B, G, H, Dv] or [B, G * H, S, Dv]
        return out.view(B, G, H, S, case.Dv).permute(0, 3, 1, 2, 4).reshape(case.N, H, case.Dv)

    backends = ("flash", "cudnn", "efficient") if state.device == "cuda" else ("default",)
    forms = [
        Prepared(call, result, {"config": f"dense, {backend}{said}"}, contender.within(backend), expected)
        for said, call in calls.items()
        for backend in backends
    ]
    return _fastest(state, forms)


def _fastest(state: CaseState, forms: Sequence[Prepared]) -> Prepared:
    """Return the fastest form that runs and is right.

    Raises:
        Exception: of the last form, if there is none.
    """
    times: dict[int, float] = {}
    problem: Exception | None = None
    for number, form in enumerate(forms):
        try:
            contender.check(state, form)
            with form.guard():
                times[number] = statistics.median(state.timer.samples(form.call, rounds=9, warmup=2))
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            problem = error
    if problem is not None and not times:
        raise problem
    return forms[min(times, key=times.__getitem__)]


def _planned(plan: Callable[[], None], run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return `run`, after a `plan` at its first call: what the plan raises is then an error of this form alone."""
    planned = False

    def call() -> Tensor:
        nonlocal planned
        if not planned:
            plan()
            planned = True
        return run()

    return call


def _flex_body(q: Tensor, k: Tensor, v: Tensor, mask: Any, options: Any) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v, block_mask=mask, kernel_options=options)


def _body_of_its_own() -> Callable[..., Tensor]:
    """Copy `_flex_body` with code of its own: torch.compile counts builds by code object, and stops at eight."""
    return types.FunctionType(_flex_body.__code__.replace(co_name="flex"), _flex_body.__globals__, "flex")


PEERS = {
    "flex_attention": Peer("torch", "torch", _flex_attention),
    "fla_nsa": Peer("fla-core", "fla", _fla_nsa, needs_gpu=True),
    "flashinfer_paged": Peer("flashinfer-python", "flashinfer", _flashinfer_paged, needs_gpu=True),
    "dense": Peer("torch", "torch", _dense),
}
