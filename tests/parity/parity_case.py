"""One parity case: integers in; tensors, a poisoned kernel run, the gate's verdict and a repro out.

Imports of the kernel stay inside functions: conftest.py must choose between GPU and interpreter first.
"""

from __future__ import annotations

import contextlib
import json
import traceback
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from nsa_sel import reference
from nsa_sel.bench.suite import gate
from nsa_sel.bench.suite.kernels import UserKernel

from . import given_kernel
from .summary import OURS

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
if not ON_GPU:
    from . import interpreter_bf16  # noqa: F401
CLONE = Path(__file__).parents[2]
OUR_FRAMES = (__file__, given_kernel.__file__)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SPANS, SPANS_S_KV = [(2, 11), (30, 47), (20, 21), (60, 95), (13, 13)], 110  # a row out of order, with an empty span
INT32, INT64 = torch.iinfo(torch.int32), torch.iinfo(torch.int64)
OUT_OF_RANGE = [(-5, 3), (4, INT32.max), (INT32.min, INT32.max), (INT32.min, 0), (-1, -1), (3, -7), (INT32.max, 9)]
OUT_OF_RANGE_64 = [(2**32, 2**32 + 5), (-(2**40), 2), (1, 2**40), (INT64.min, INT64.max), (2**31 + 1, 2**31 + 4)]

# Source text, because a repro prints what the suite ran.
VIEWS = {
    "plain": "lambda t: t",
    "permuted": "lambda t: t.transpose(0, -2).contiguous().transpose(0, -2)",  # tokens outermost
    "odd": "lambda t: torch.cat((t[..., :1], t), -1)[..., 1:]",  # no stride and no pointer divisible by 16 bytes
    "shared": "lambda t: t[:, :1].expand_as(t)",  # stride 0
    "every_second": "lambda t: torch.cat((t, t), 1)[:, ::2]",
}


@dataclass(frozen=True, eq=False)
class Case:
    """Describe one call: the ranges [B, S, G, n_spans, 2] (CPU) give B, S, G and n_spans; the seed makes q, k and v.

    q_factor multiplies q after the draw. view: a key of VIEWS, applied to all four tensors (ranges that become blocks
    excepted). edit: one Python statement on q, k, v, run before the view. scale: None is 1/sqrt(D). hints: whether
    min_len and max_len are passed. launch: a LaunchConfig to force. made, kept: where q, k, v and ranges are no draw of
    the seed, the statements with which a repro makes them, and then keeps the rows of them and `out` that are compared.
    """

    ranges: Tensor
    S_kv: int
    H: int = 4
    D: int = 64
    Dv: int = 64
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    q_factor: int = 1
    view: str = "plain"
    edit: str = ""
    scale: float | None = None
    hints: bool = True
    launch: Any = None
    made: str = ""
    kept: str = ""
    row: tuple[int, int, int] | None = None  # keep only this row (b, s, g); with the plain view

    @property
    def label(self) -> str:
        """Name the case in a report."""
        B, S, G, n_spans, _ = self.ranges.shape
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"{dtype} B{B} S{S} G{G} H{self.H} D{self.D} Dv{self.Dv} S_kv{self.S_kv} spans{n_spans}"
        return sizes + (f" seed{self.seed}" if self.seed else "") + (f" [{self.launch}]" if self.launch else "")


def has_tma() -> bool:
    """Tell whether the kernel can load through TMA descriptors here (in the interpreter: whether Triton has them)."""
    return _gpu().has_tma


def has_clusters() -> bool:
    """Tell whether programs can merge as thread-block clusters here."""
    return _gpu().has_clusters


def _gpu() -> Any:
    from nsa_sel.kernel.device import gpu_of

    return gpu_of(torch.device(DEVICE, 0) if ON_GPU else torch.device(DEVICE))


def here(on_gpu: Any, in_interpreter: Any) -> Any:
    """Pick the size that this machine can afford."""
    return on_gpu if ON_GPU else in_interpreter


def rows(*spans_of_rows: list[tuple[int, int]], dtype: torch.dtype = torch.int32) -> Tensor:
    """Return ranges [1, S, 1, n_spans, 2] with one list of spans a row, padded with empty spans."""
    n_spans = max((len(spans) for spans in spans_of_rows), default=0)
    padded = [list(spans) + [(0, 0)] * (n_spans - len(spans)) for spans in spans_of_rows]
    return torch.tensor(padded, dtype=dtype).view(1, len(padded), 1, n_spans, 2)


def tensors(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw q, k and v ~ N(0, 1) in fp32, cast, and place all four tensors on the device."""
    B, S, G = case.ranges.shape[:3]
    torch.manual_seed(case.seed)
    q, k, v = (torch.randn(s).to(case.dtype).to(DEVICE) for s in _shapes(case))
    q = q * case.q_factor
    if case.edit:
        exec(case.edit, {"torch": torch, "q": q, "k": k, "v": v})  # the repro prints the same statement
    view = eval(VIEWS[case.view])
    q, k, v = (view(t) for t in (q, k, v))
    ranges = case.ranges.to(DEVICE) if _takes_blocks() else view(case.ranges.to(DEVICE))
    if case.row is not None:
        b, s, g = case.row
        q, ranges = q[b : b + 1, s : s + 1, g : g + 1], ranges[b : b + 1, s : s + 1, g : g + 1]
        k, v = k[b : b + 1, g : g + 1], v[b : b + 1, g : g + 1]
    return q, k, v, ranges


def row_lengths(ranges: Tensor, S_kv: int) -> list[int]:
    """Count L of every row in plain Python."""
    flat = ranges.flatten(0, 2).tolist()
    return [sum(max(0, min(end, S_kv) - max(start, 0)) for start, end in spans) for spans in flat]


def unselected(case: Case) -> list[int]:
    """Return the tokens that no row selects, in plain Python."""
    every_span = case.ranges.flatten(0, 3).tolist()
    return [t for t in range(case.S_kv) if not any(start <= t < end for start, end in every_span)]


def hints(case: Case, ranges: Tensor) -> dict[str, int]:
    """Return min_len and max_len as a caller would pass them, or nothing; a given kernel always gets them."""
    L = row_lengths(ranges, case.S_kv)
    return {"min_len": min(L), "max_len": max(L)} if (case.hints or given_kernel.under_test) and L else {}


def run_kernel(case: Case, q: Tensor, k: Tensor, v: Tensor, ranges: Tensor) -> Tensor:
    """Run the kernel under test; ours into an output full of NaN, with a proof that it, and nothing else, ran.

    A given kernel that declares the call unsupported skips the test.
    """
    if given_kernel.under_test is not None:
        return _run_given(given_kernel.under_test, case, q, k, v, ranges)
    from nsa_sel.kernel import launch

    out = torch.full((*q.shape[:4], v.shape[3]), float("nan"), dtype=q.dtype, device=q.device)
    launches = launch.launch_count()
    result = launch.forward(q, k, v, ranges, scale=case.scale, out=out, launch=case.launch, **hints(case, ranges))
    assert result.data_ptr() == out.data_ptr(), "forward did not return the buffer that it was given"
    assert launch.launch_count() > launches or not any(row_lengths(ranges, case.S_kv)), "the kernel never ran"
    return out


def _run_given(kernel: UserKernel, case: Case, q: Tensor, k: Tensor, v: Tensor, ranges: Tensor) -> Tensor:
    watched = replace(kernel, function=given_kernel.watched(kernel.function))
    call = watched.ready(q, k, v, ranges, scale=case.scale, **hints(case, ranges))
    try:
        if (reason := kernel.unsupported(q, k, v, ranges)) is not None:
            pytest.skip(f"{kernel.name}: {reason}")
        with warnings.catch_warnings():
            warnings.simplefilter("default")  # errors only where this package's own code warns
            return call()
    except given_kernel.Broken as error:
        said = str(error)
    except Exception as error:  # a kernel may fail in any way
        own = error.__traceback__
        while own is not None and own.tb_next is not None and own.tb_frame.f_code.co_filename in OUR_FRAMES:
            own = own.tb_next
        said = f"it raised\n{''.join(traceback.format_exception(type(error), error, own))}".rstrip()
    fail(case, said)


def fail(case: Case, message: str, code: str | None = None) -> NoReturn:
    """Fail the test with the case's name, what is wrong, and a repro whose lines can be pasted as they are printed."""
    kernel = given_kernel.under_test
    name = f"{kernel.name}: " if kernel else ""
    pytest.fail(f"{name}{case.label}\n{message}\n\n{code or repro(case)}\n", pytrace=False)


def judge(case: Case, out: Tensor, q: Tensor, k: Tensor, v: Tensor, ranges: Tensor) -> gate.GateResult:
    """Put one result through the gate."""
    oracle, packed = (f(q, k, v, ranges, scale=case.scale) for f in (reference.oracle, reference.packed_sdpa))
    return gate.check(out, oracle, packed, dtype=case.dtype, logit_factor=case.q_factor)


@dataclass(frozen=True)
class Record:
    """Keep the figures of one passed comparison for the summary at the end of the run: plain values only."""

    kernel: str
    dtype: str
    label: str
    variant: str
    q_factor: int
    mae: float
    max_err: float
    row_mae_ratio: float


RECORDS: list[Record] = []


def check(case: Case) -> Tensor:
    """Run a case and put it through the gate; a failure prints the figures and a repro. Returns the kernel's output."""
    q, k, v, ranges = tensors(case)
    out = run_kernel(case, q, k, v, ranges)
    verdict = judge(case, out, q, k, v, ranges)
    if not verdict.ok:
        fail(case, verdict.message, smallest_repro(case))
    keep_record(case, verdict, _launch(case, q, k, v, ranges))
    return out


def keep_record(case: Case, verdict: gate.GateResult, launch: Any) -> None:
    """Keep a passed comparison for the summary."""
    dtype = str(case.dtype).removeprefix("torch.")
    kernel = given_kernel.under_test.name if given_kernel.under_test else OURS
    variant = f"{dtype} H{case.H} D{case.D} Dv{case.Dv} {launch}"
    figures = (float(x) for x in (verdict.mae, verdict.max_err, verdict.worst_row_mae_ratio))
    RECORDS.append(Record(kernel, dtype, case.label, variant, case.q_factor, *figures))


def _launch(case: Case, q: Tensor, k: Tensor, v: Tensor, ranges: Tensor) -> Any:
    if given_kernel.under_test is not None:
        return None
    from nsa_sel.kernel.launch import launch_for

    return case.launch or launch_for(q, k, v, ranges, **hints(case, ranges))


def smallest_repro(case: Case) -> str:
    """Return the repro of the first bad row alone, if that still fails, else of the whole case."""
    B, S, G = case.ranges.shape[:3]
    if B * S * G > 1 and case.view == "plain":
        q, k, v, ranges = tensors(case)
        # A given kernel may do something else the second time, and blocks may express the row in its place alone.
        with contextlib.suppress(pytest.fail.Exception, pytest.skip.Exception, ValueError):
            verdict = judge(case, run_kernel(case, q, k, v, ranges), q, k, v, ranges)
            if verdict.bad_row is not None:
                b, s, g = verdict.bad_row
                alone = replace(case, row=(b, s, g))
                if not judge(alone, run_kernel(alone, *(drawn := tensors(alone))), *drawn).ok:
                    return repro(alone)
    return repro(case)


def repro(case: Case) -> str:
    """Return at most 15 lines that run when pasted in the folder of the run, and end in the gate's verdict."""
    ranges = case.ranges
    q_shape, k_shape, v_shape = _shapes(case)
    B, S, G, n_spans, _ = ranges.shape
    keep = ""
    if case.row is not None:  # only this row's spans need printing
        b, s, g = case.row
        ranges = ranges[b : b + 1, s : s + 1, g : g + 1]
        k_part = f"[{b}:{b + 1}, {g}:{g + 1}]"
        keep = f"q, k, v = q[{b}:{b + 1}, {s}:{s + 1}, {g}:{g + 1}], k{k_part}, v{k_part}"
    scale = "" if case.scale is None else f", scale={case.scale}"
    factor = f", logit_factor={case.q_factor}" if case.q_factor != 1 else ""
    elsewhere = __package__ == "tests.parity" and Path.cwd() != CLONE  # a wheel's tests are found anywhere
    paths = [str(CLONE / "src"), str(CLONE), "."] if elsewhere else ["src", "."]
    interpreter = "" if ON_GPU else '; os.environ["TRITON_INTERPRET"] = "1"'
    viewed = "q, k, v" if _takes_blocks() else "q, k, v, ranges"
    imports, call = _imports_and_call(case)
    drawn = [
        f"torch.manual_seed({case.seed})",
        f'q, k, v = (torch.randn(s).to({case.dtype}).to("{DEVICE}") for s in ({q_shape}, {k_shape}, {v_shape}))',
        f"q = q * {case.q_factor}" if case.q_factor != 1 else "",
        case.edit,
        f'ranges = torch.tensor({ranges.flatten().tolist()}, dtype={ranges.dtype}, device="{DEVICE}")'
        f".view({tuple(ranges.shape)})",
        "" if case.view == "plain" else f"{viewed} = map({VIEWS[case.view]}, ({viewed}))",
        keep,
    ]
    lines = [
        f"import os, sys; sys.path[:0] = {json.dumps(paths)}{interpreter}",
        "import torch" if ON_GPU else f"import torch, {__package__}.interpreter_bf16",
        "from nsa_sel import reference, spans; from nsa_sel.bench.suite import gate",
        imports,
        *([case.made] if case.made else drawn),
        *call,
        case.kept,
        f"oracle, packed = (f(q, k, v, ranges{scale}) for f in (reference.oracle, reference.packed_sdpa))",
        f"verdict = gate.check(out, oracle, packed, dtype=q.dtype{factor})",
        "assert verdict.ok, verdict.message",
    ]
    return "\n".join(line for line in lines if line)


def _imports_and_call(case: Case) -> tuple[str, list[str]]:
    """Return the repro's lines that import the kernel under test and that make `out`."""
    ranges = case.ranges if case.made else tensors(case)[3]
    given = [f"{name}={value}" for name, value in hints(case, ranges).items()]
    kernel = given_kernel.under_test
    if kernel is None:
        given += [f"launch={case.launch!r}"] if case.launch is not None else []
        given += [f"scale={case.scale}"] if case.scale is not None else []
        return "from nsa_sel.kernel import launch; from nsa_sel.kernel.launch_config import LaunchConfig", [
            'out = torch.full((*q.shape[:4], v.shape[3]), float("nan"), dtype=q.dtype, device=q.device)',
            f"launch.forward({', '.join(['q, k, v, ranges, out=out', *given])})",
        ]
    module, function = kernel.spec.split(":")
    given.append(f"scale={'q.shape[-1] ** -0.5' if case.scale is None else case.scale}")
    blocks = [f"blocks = spans.ranges_to_blocks(ranges, {kernel.block_size}, k.shape[2])"] if kernel.block_size else []
    given += [f"block_size={kernel.block_size}"] if kernel.block_size else []
    selected = "blocks" if kernel.block_size else "ranges"
    return f"from {module} import {function} as kernel; from {given_kernel.__name__} import watched", [
        *blocks,
        f"out = watched(kernel)(q, k, v, {selected}, {', '.join(given)})",
    ]


def _takes_blocks() -> bool:
    """Tell whether ranges become blocks, which no view may move to another token."""
    return given_kernel.under_test is not None and given_kernel.under_test.block_size > 0


def _shapes(case: Case) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    B, S, G = case.ranges.shape[:3]
    return (B, S, G, case.H, case.D), (B, G, case.S_kv, case.D), (B, G, case.S_kv, case.Dv)
