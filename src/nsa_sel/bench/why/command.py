"""The verb `nsa-sel why`: which launch a call gets, and which rule decided it, on this GPU or on one that is named."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from ...kernel import choice
from ...kernel.call import Call, Gpu
from ...kernel.launch_config import MAX_HEADS, MAX_SPANS, MAX_WIDTH
from ..checks.variants import ARCHITECTURES
from ..command_line import Parser
from ..suite.cases import ELEMENT_BYTES

MAKER = "NVIDIA "  # before the names of GPUs, in torch and in the files of tuned tables
KNOWN = {gpu.name: (arch, replace(gpu, name=MAKER + gpu.name)) for arch, both in ARCHITECTURES.items() for gpu in both}


def known_gpu(name: str) -> Gpu | None:
    """Return the GPU of a name such as H200, or the large one of an architecture such as sm_89."""
    for arch, (_, large) in ARCHITECTURES.items():
        if name == f"sm_{arch}":
            return KNOWN[large.name][1]
    short = name.removeprefix(MAKER).removeprefix("GeForce ").lower()
    return next((gpu for known, (_, gpu) in KNOWN.items() if known.lower() == short), None)


def this_gpu() -> Gpu | None:
    """Return the GPU that torch uses, if there is one."""
    if not torch.cuda.is_available():
        return None
    from ...kernel import device  # needs Triton

    return device.gpu_of(torch.device("cuda", torch.cuda.current_device()))


def describe(call: Call, gpu: Gpu, known_length: bool) -> Iterator[str]:
    """Yield the lines that say what was asked, which launch it is, who chose it, and what decided each field."""
    has = [name if there else f"no {name}" for name, there in (("TMA", gpu.has_tma), ("clusters", gpu.has_clusters))]
    shared = f"{gpu.shared_bytes // 1024} KiB of shared memory per program"
    yield f"GPU        {gpu.name}: {gpu.sm_count} SMs, {shared}, {', '.join(has)}"
    length = f"{'' if call.one_length else 'up to '}{call.max_len} tokens"
    size = f"{call.element_bytes} bytes per element{', rows share K and V' if call.shared_kv else ''}"
    spans = f"{call.n_spans} span{'s' * (call.n_spans != 1)}"
    yield f"call       {call.N} rows of {length} in {spans}, H={call.H} D={call.D} Dv={call.Dv}, {size}"
    found = choice.explain(call, gpu, known_length)
    yield f"launch     {found.launch}"
    yield f"chosen by  {found}"
    for reason in dict.fromkeys(found.by_field.values()):
        fields = [f"{name} {getattr(found.launch, name)}" for name, why in found.by_field.items() if why == reason]
        yield f"  {', '.join(fields)}: {reason}"


def main_parser() -> argparse.ArgumentParser:
    """Return what `nsa-sel why` is asked with."""
    parser = Parser(
        "nsa-sel why",
        description="Which launch does a call get, and which rule decided it? On this GPU, or on one that is named.",
        examples="""
            nsa-sel why --H 16 --D 128 --N 4 --L 1024 --spans 16              decode, on this GPU
            nsa-sel why --H 8 --D 96 --N 64 --L 512 --spans 1 --gpu sm_89     on another""",
        epilog="exit code: 0, or 2 for bad arguments or if there is no GPU and none is named",
    )
    parser.add_argument("--H", type=int, required=True, help=f"query heads per group, up to {MAX_HEADS} (required)")
    parser.add_argument("--D", type=int, required=True, help="width of q and K (required)")
    parser.add_argument("--Dv", type=int, help="width of V (default: D)")
    parser.add_argument("--N", type=int, required=True, help="rows: batch x query tokens x groups (required)")
    parser.add_argument("--L", type=int, required=True, help="selected tokens of the longest row (required)")
    parser.add_argument("--spans", type=int, required=True, help="spans per row (required)")
    parser.add_argument("--S", type=int, default=1, help="query tokens per sequence")
    parser.add_argument("--dtype", choices=ELEMENT_BYTES, default="bf16", help="of q, K and V")
    parser.add_argument("--unequal", action="store_true", help="rows differ in length (min_len is not max_len)")
    parser.add_argument("--no-max-len", action="store_true", help="no hints are given, and L is S_kv")
    architectures = ", ".join(f"sm_{arch}" for arch in ARCHITECTURES)
    parser.add_argument("--gpu", metavar="NAME", help=f"{', '.join(KNOWN)}, or {architectures} (default: this one)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `nsa-sel why`: 0, or 2 for bad arguments or if there is no GPU and none is named."""
    parser = main_parser()
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    Dv = args.D if args.Dv is None else args.Dv
    for name, value, most in (("H", args.H, MAX_HEADS), ("spans", args.spans, MAX_SPANS)):
        if not 1 <= value <= most:
            parser.error(f"--{name}: value is {value}, expected 1 to {most}")
    for name, value in (("D", args.D), ("Dv", Dv)):
        if value % 16 or not 16 <= value <= MAX_WIDTH:
            parser.error(f"--{name}: value is {value}, expected a multiple of 16 up to {MAX_WIDTH}")
    for name, value in (("N", args.N), ("L", args.L), ("S", args.S)):
        if value < 1:
            parser.error(f"--{name}: value is {value}, expected at least 1")
    gpu = this_gpu() if args.gpu is None else known_gpu(args.gpu)
    if gpu is None:
        said = "there is no GPU here" if args.gpu is None else f"value is {args.gpu!r}"
        parser.error(f"--gpu: {said}, expected one of {', '.join(KNOWN)}, or an architecture such as sm_89")
    length = 1 << args.L.bit_length() >> 1 if args.no_max_len else args.L
    one_length = not (args.unequal or args.no_max_len)
    call = Call(args.N, args.H, args.D, Dv, args.spans, length, args.S > 1, ELEMENT_BYTES[args.dtype], one_length)
    for line in describe(call, gpu, not args.no_max_len):
        print(line)
    return 0
