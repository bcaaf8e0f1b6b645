"""Compile the kernel without a GPU for every supported architecture, and show registers, spills and shared memory.

Exits 1 where the compiler fails, where a program takes more shared memory than the architecture has, where a launch
for a shape of the perf matrix spills registers, and where a buffer has two swizzles. Needs Triton >= 3.4.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..command_line import Parser, exit_code
from ..suite.inputs import TORCH_DTYPES
from ..tune.log import Progress
from .variants import ARCHITECTURES, Variant, every_variant, sample


@dataclass(frozen=True)
class Build:
    """What came of compiling a variant: an error, or registers per thread, spilled bytes and shared bytes.

    two_swizzles: see the function of this name.
    """

    variant: Variant
    seconds: float
    error: str | None = None
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    two_swizzles: bool = False

    @property
    def problem(self) -> str | None:
        """Say why this build fails the check; None if it does not."""
        limit = ARCHITECTURES[self.variant.arch][0].shared_bytes
        if self.error is not None:
            return self.error
        if self.shared_bytes > limit:
            return f"{self.shared_bytes} bytes of shared memory, the architecture has {limit}"
        if self.spill_bytes and self.variant.in_matrix and not ARCHITECTURES[self.variant.arch][0].has_tma:
            return f"spills {self.spill_bytes} bytes at a shape of the matrix"
        if self.two_swizzles:
            return "one buffer has two swizzles, of which ptxas 12.8 makes wrong code"
        return None


def build(variant: Variant) -> Build:
    """Compile a variant, with the arguments that the launcher passes and types as its binder derives them."""
    import triton
    from triton.backends.compiler import GPUTarget

    start = time.perf_counter()
    # ptxas runs whatever the cache holds, and Triton prints what it says of the registers.
    os.environ.update(TRITON_ALWAYS_COMPILE="1", TRITON_DUMP_PTXAS_LOG="1")
    with contextlib.redirect_stdout(io.StringIO()) as log:
        try:
            source, options = _source(variant)
            compiled = triton.compile(source, target=GPUTarget("cuda", variant.arch, 32), options=options)
        except Exception as error:  # whatever the compiler raises is the result
            return Build(variant, time.perf_counter() - start, _with_causes(error))
    registers = re.search(r"Used (\d+) registers", log.getvalue())
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
    if registers is None or spills is None:
        return Build(variant, time.perf_counter() - start, f"ptxas does not tell the registers:\n{log.getvalue()}")
    return Build(
        variant,
        time.perf_counter() - start,
        registers=int(registers[1]),
        spill_bytes=int(spills[1]) + int(spills[2]),
        shared_bytes=compiled.metadata.shared,
        two_swizzles=two_swizzles(compiled.asm.get("ptx", "")),
    )


def two_swizzles(ptx: str) -> bool:
    """Tell whether wgmma reads one buffer in shared memory with two swizzles, as K's tiles and as V's.

    A descriptor is the buffer's address with constants, and its two highest bits are the swizzle. With two of them for
    one address, ptxas 12.8, which Triton 3.6 and 3.7 bring along, may take the second address from registers that hold
    something else: results are wrong, or the GPU reports an illegal memory access. ptxas 12.9 does not.
    Source: PTX ISA, "Matrix descriptor".
    """
    read = {
        register for line in ptx.splitlines() if "wgmma.mma_async" in line for register in re.findall(r"%rd\d+", line)
    }
    swizzles: dict[str, set[int]] = {}
    for descriptor, buffer, constant in re.findall(r"(?:or|add)\.[bs]64\s+(%rd\d+), (%rd\d+), (-?\d+);", ptx):
        if descriptor in read:
            swizzles.setdefault(buffer, set()).add(int(constant) >> 62)
    return any(len(found) > 1 for found in swizzles.values())


def _with_causes(error: BaseException) -> str:
    """Say what an error is and what caused it: of a fault in a function that a kernel calls, Triton names the call."""
    said = f"{type(error).__name__}: {error}"
    return said if error.__cause__ is None else f"{said}\n{_with_causes(error.__cause__)}"


def _source(variant: Variant) -> tuple:
    """Return what `triton.compile` takes: the kernel with its signature, and the options."""
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

    kernel, arguments, options = _called(variant)
    signature, constants, attributes = {}, {}, {}
    for param, value in zip(kernel.params, arguments, strict=True):
        if param.is_constexpr or value is None:
            signature[param.name] = "constexpr"
            constants[(param.num,)] = value
        elif param.annotation_type:
            signature[param.name] = param.annotation_type
        else:
            signature[param.name] = mangle_type(value)
            if isinstance(value, torch.Tensor) and variant.tensors != "odd strides":
                attributes[(param.num,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), options


def _called(variant: Variant) -> tuple[Any, Sequence[Any], dict[str, int]]:
    """Return the kernel, the arguments that the launcher passes, on tensors without memory, and the options."""
    from ...kernel.forward import _sel_fwd
    from ...kernel.launch import Plan
    from ...kernel.shared_launch import SharedPlan

    H, D, Dv, config, tensors = variant.H, variant.D, variant.Dv, variant.config, variant.tensors
    dtype = TORCH_DTYPES[variant.dtype]
    S_kv = 2**30 if tensors == "many tokens" else 4096
    odd = int(tensors == "odd strides")

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    G = 2 if tensors == "groups beside" else 1
    q, k, v = tensor(1, 2, G, H, D + odd), tensor(1, S_kv, G, D + odd), tensor(1, S_kv, G, Dv + odd)
    q, k, v = q[..., :D], k[..., :D].transpose(1, 2), v[..., :Dv].transpose(1, 2)
    ranges = tensor(1, 2, G, variant.n_spans, 2, dtype=torch.int64 if tensors == "int64 ranges" else torch.int32)
    lse = tensor(1, dtype=torch.float32) if tensors == "lse" else None
    if variant.shared is not None:
        sharing = SharedPlan(q, k, v, ranges, None, None, None, variant.shared, config)
        passed = sharing.passed(sharing.places.last)
        index, given = sharing.index(passed), (q, k, v, ranges, tensor(1), lse)
        starts = {
            "_cover": (sharing.start_cover, (ranges, *index.tensors), passed.cover, passed.cover_options),
            "_sel_shared": (sharing.start_shared, (*given, *index.tensors), passed.shared, sharing.shared.options),
            "_sel_rest": (sharing.start_rest, (*given, *index.tensors[2:]), passed.rest, sharing.options),
        }
        start, of_kernel, values, options = starts[variant.kernel]
        return start.kernel, (*of_kernel, *start.public(of_kernel, passed.placed), *values), options
    if variant.backward is not None:
        return backward_called(variant, q, k, v, ranges)
    parts = tensor(1, dtype=torch.float32) if config.splits > 1 else None
    counters = tensor(1, dtype=torch.int32) if config.splits > 1 else None
    plan = Plan(q, k, v, ranges, None, None, None, config)
    placed = plan.places.last
    arguments = (q, k, v, ranges, tensor(1), lse, parts, counters, *plan.described(k, v, placed), *placed.arguments)
    return _sel_fwd, arguments, plan.options


def backward_called(variant: Variant, *tensors: torch.Tensor) -> tuple[Any, Sequence[Any], dict[str, int]]:
    """Return a kernel of the backward pass, its arguments and options, as `_called` does."""
    from ...kernel.backward_index import _mark
    from ...kernel.backward_keys import _sel_bwd_keys
    from ...kernel.backward_launch import BackwardPlan
    from ...kernel.backward_rows import _sel_bwd_rows
    from ...kernel.backward_shared import _sel_bwd_shared
    from ...kernel.backward_tensors import Saved

    q, k, v, ranges = tensors
    out, (dk, dv), (lse, part) = (
        q.new_empty(1),
        (q.new_empty(1) for _ in range(2)),
        (torch.empty(1, dtype=torch.float32, device="meta") for _ in range(2)),
    )
    plan = BackwardPlan(q, k, v, ranges, None, None, None, variant.backward)
    saved = Saved(q, k, v, ranges, out, lse, out, lse if variant.tensors == "lse" else None)
    placed, index = plan.places.last, plan.index()
    if variant.kernel == "_mark":
        return _mark, *plan.mark_arguments(ranges, lse, k.shape[2], index.marks)
    if variant.kernel == "_sel_bwd_keys":
        return _sel_bwd_keys, *plan.key_arguments(saved, placed, lse, index, (dk, dv, part))
    if variant.kernel == "_sel_bwd_rows" or plan.sharing is None:
        return _sel_bwd_rows, *plan.row_arguments(saved, placed, ranges, (lse, lse, dk))
    passed = plan.sharing.passed(placed)
    coverage = plan.sharing.index(passed)
    if variant.kernel == "_sel_bwd_rest":
        return _sel_bwd_rows, *plan.row_arguments(saved, placed, ranges, (lse, lse, dk), coverage.tensors[2])
    arguments = plan.shared_arguments(plan.sharing, saved, passed, coverage, (lse, lse, dk))
    return _sel_bwd_shared, *arguments


def build_all(variants: Iterable[Variant], jobs: int) -> Iterator[Build]:
    """Compile in `jobs` processes, and yield each build when it is done."""
    # The interpreter is chosen when triton is imported: not in these processes.
    os.environ.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            running: dict[Future, Variant] = {pool.submit(build, variant): variant for variant in variants}
            for done in as_completed(list(running)):
                suspects = list(running.values())[:jobs]  # they are begun in this order
                variant = running.pop(done)
                try:
                    yield done.result()
                except BrokenProcessPool:
                    crash = "the compiler crashed on one of: " + ", ".join(str(suspect) for suspect in suspects)
                    yield Build(variant, 0.0, crash)
                    return


def main(argv: list[str] | None = None) -> int:
    """Compile, print one line per variant, and return 1 if one has a problem."""
    command = f"python -m {__package__}.aot"
    parser = Parser(
        command,
        description=__doc__,
        examples=f"""
            {command}            what `rules.choose` can return, as far as `every_variant` says
            {command} --sample   a hundred kernels, in some minutes""",
    )
    parser.add_argument("--sample", action="store_true", help="compile the sample only")
    parser.add_argument(
        "--arch",
        type=int,
        action="append",
        choices=ARCHITECTURES,
        help="compile for it only; repeatable (default: all)",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    args = parser.parse_args(argv)
    variants = [v for v in (sample() if args.sample else every_variant()) if v.arch in (args.arch or ARCHITECTURES)]
    builds = []
    progress = Progress()
    progress.start("kernels compiled", len(variants))
    for done in build_all(variants, args.jobs):
        builds.append(done)
        if args.json:
            progress.say(json.dumps({**asdict(done), "id": str(done.variant), "problem": done.problem}))
        else:
            figures = f"{done.registers:3} registers, {done.spill_bytes:4} spilled, {done.shared_bytes:6} bytes shared"
            progress.say(f"{done.variant}: {figures}{f'  FAILS: {done.problem}' if done.problem else ''}")
        progress.step()
    failed = [done for done in builds if done.problem]
    spilling = sum(done.spill_bytes > 0 for done in builds)
    summary = f"{len(builds)} of {len(variants)} kernels compiled: {len(failed)} fail, {spilling} spill registers"
    print(summary, file=sys.stderr if args.json else sys.stdout)
    return int(bool(failed) or len(builds) < len(variants))


if __name__ == "__main__":
    sys.exit(exit_code(main))
