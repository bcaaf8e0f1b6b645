"""Which kernels the launcher can choose on which architecture."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import cache

from ...kernel import backward_config, rules, shared_config
from ...kernel.backward_config import BackwardLaunch
from ...kernel.call import Call, Gpu
from ...kernel.launch_config import MAX_WIDTH, SPAN_BUCKETS, LaunchConfig, chunk_width, shared_memory, span_bucket
from ...kernel.shared_config import SharedLaunch
from ..suite import cases
from ..suite.cases import ELEMENT_BYTES


def _architecture(
    shared_bytes: int, small: tuple[str, int], large: tuple[str, int], tma: bool, clusters: bool
) -> tuple[Gpu, Gpu]:
    return Gpu(*small, shared_bytes, tma, clusters), Gpu(*large, shared_bytes, tma, clusters)


# A small and a large GPU of each architecture, with their SMs. The shared memory that one block may use is taken from
# the CUDA programming guide, technical specifications by compute capability.
ARCHITECTURES = {
    80: _architecture(163 * 1024, ("A30", 56), ("A100", 108), False, False),
    86: _architecture(99 * 1024, ("RTX 3050", 20), ("RTX 3090 Ti", 84), False, False),
    89: _architecture(99 * 1024, ("L4", 58), ("RTX 4090", 128), False, False),
    90: _architecture(227 * 1024, ("H100 PCIe", 114), ("H200", 132), True, True),
    100: _architecture(227 * 1024, ("B100", 132), ("B200", 148), True, True),
    120: _architecture(99 * 1024, ("RTX 5060", 30), ("RTX PRO 6000", 188), True, False),
}
# What the kernel is compiled for besides shape and launch: an LSE asked for, int64 ranges, tokens that int32 cannot
# count, rows at odd addresses, and the groups of a token side by side, as in a paged cache.
TENSORS = ("plain", "lse", "int64 ranges", "many tokens", "odd strides", "groups beside")
# One of each kind of call, for the sample; the widths and heads are the corners.
SAMPLE = (
    Call(1024, 8, 128, 128, 8, 512),  # many rows
    Call(64, 4, 64, 64, 1, 16),  # short ones
    Call(256, 8, 128, 128, 1, 1024, one_length=True),  # one long span each
    Call(64, 4, 128, 64, 8, 1024),  # parts of rows that are gathered
    Call(4, 16, 128, 128, 16, 1024),  # decode
    Call(4, 16, 128, 128, 1024, 65_536),  # its longest context
    Call(16_384, 16, 192, 128, 16, 1024, shared_kv=True),  # prefill, NSA's own widths
    Call(1024, 64, 256, 256, 8, 1024),
    Call(256, 1, 16, 80, 64, 256),
)


# Prefill in which queries may share tiles: heads that are few, many and no power of two, widths in one chunk or more.
SHARED_SAMPLE = (
    Call(65_536, 16, 128, 128, 16, 1024, shared_kv=True),
    Call(65_536, 4, 128, 128, 16, 1024, shared_kv=True),
    Call(65_536, 1, 64, 64, 8, 1024, shared_kv=True),
    Call(65_536, 64, 256, 256, 8, 1024, shared_kv=True),
    Call(65_536, 16, 192, 128, 16, 1024, shared_kv=True),
    Call(65_536, 6, 80, 48, 64, 4096, shared_kv=True),
)
SHARED_KERNELS = ("_sel_shared", "_cover", "_sel_rest")
# Training: the shapes of prefill, many short spans, and the widest rows.
BACKWARD_SAMPLE = (
    *SHARED_SAMPLE,
    Call(65_536, 16, 64, 64, 1024, 16_384, shared_kv=True),
    Call(65_536, 16, 256, 256, 16, 1024, shared_kv=True),
    Call(65_536, 16, 128, 128, 32, 512, shared_kv=True),
)
BACKWARD_KERNELS = ("_sel_bwd_keys", "_sel_bwd_rows", "_mark")
# Where queries share tiles; the second is `_sel_bwd_rows` for those that do not.
BACKWARD_SHARED_KERNELS = ("_sel_bwd_shared", "_sel_bwd_rest")


@dataclass(frozen=True)
class Variant:
    """One kernel to compile. tensors: one of TENSORS. in_matrix: chosen for a case of the perf matrix.

    kernel, shared: which of SHARED_KERNELS, and its launch; `config` is then that of the rows. backward: the launch of
    one of BACKWARD_KERNELS or BACKWARD_SHARED_KERNELS.
    """

    arch: int
    dtype: str
    H: int
    D: int
    Dv: int
    n_spans: int
    config: LaunchConfig
    tensors: str = "plain"
    in_matrix: bool = field(default=False, compare=False)  # the same kernel, whoever needs it
    kernel: str = "_sel_fwd"
    shared: SharedLaunch | None = None
    backward: BackwardLaunch | None = None

    def __str__(self) -> str:
        shape = f"H{self.H} D{self.D} Dv{self.Dv} spans{self.n_spans}"
        other = "" if self.tensors == "plain" else f" ({self.tensors})"
        launch = f"{self.kernel} {self.shared}, {self.config}" if self.shared else self.config
        if self.backward:
            launch = f"{self.kernel} {self.backward}"
        return f"sm_{self.arch} {self.dtype} {shape} {launch}{other}"


def chosen(arch: int, dtype: str, shape: Call, gpu: Gpu, tensors: str = "plain") -> Variant:
    """Return the variant that the launcher takes for a call of this shape, in this dtype, on a GPU."""
    call = replace(shape, element_bytes=ELEMENT_BYTES[dtype], fits_tma=tensors != "odd strides")
    config = rules.choose(call, gpu).with_fewest_parts()
    in_matrix = tensors == "plain" and dtype in cases.DTYPES and shape in _matrix()
    return Variant(arch, dtype, shape.H, shape.D, shape.Dv, span_bucket(shape.n_spans), config, tensors, in_matrix)


def sharing(
    arch: int, dtype: str, shape: Call, gpu: Gpu, kernel: str = SHARED_KERNELS[0], tensors: str = "plain"
) -> Variant:
    """Return a kernel of a call whose queries share tiles."""
    of_rows = chosen(arch, dtype, shape, gpu, tensors)
    call = replace(shape, element_bytes=ELEMENT_BYTES[dtype], fits_tma=tensors != "odd strides")
    launch = shared_config.default(call, gpu, 2.0)
    launch = replace(launch, tma=launch.tma and of_rows.config.load == "tma")
    return replace(of_rows, config=shared_config.row_of(of_rows.config), kernel=kernel, shared=launch, in_matrix=False)


def backward(
    arch: int, dtype: str, shape: Call, gpu: Gpu, kernel: str = BACKWARD_KERNELS[0], tensors: str = "plain"
) -> Variant:
    """Return a kernel of the backward pass of a call of this shape, in this dtype, on a GPU."""
    call = replace(shape, element_bytes=ELEMENT_BYTES[dtype], fits_tma=tensors != "odd strides")
    launch = backward_config.choose(call, gpu)
    if kernel in BACKWARD_SHARED_KERNELS:
        launch = replace(launch, shared=backward_config.shared_default(call, gpu, launch.row))
    spans = span_bucket(shape.n_spans)
    widths = shape.H, shape.D, shape.Dv
    return Variant(arch, dtype, *widths, spans, launch.row, tensors, False, kernel, backward=launch)


@cache
def _matrix() -> frozenset[Call]:
    """Return every shape of the perf matrix: in place, and its rows packed."""
    shapes = set()
    for case in cases.matrix("full"):
        same = not case.ragged
        shapes.add(Call(case.N, case.H, case.D, case.Dv, case.n_spans, case.longest, case.S > 1, same))
        shapes.add(Call(case.N, case.H, case.D, case.Dv, 1, case.longest, one_length=same))
    return frozenset(shapes)


def sample() -> list[Variant]:
    """Return the launches for SAMPLE on every architecture: bf16 plain or fp16 with TENSORS by turns, and one fp32.

    What is a shape of the perf matrix is there in bf16 everywhere. Of SHARED_SAMPLE the first, and another in turn with
    all of SHARED_KERNELS; likewise of BACKWARD_SAMPLE.
    """
    variants = []
    for turn, (arch, (_, gpu)) in enumerate(ARCHITECTURES.items()):
        for i, shape in enumerate(SAMPLE):
            if (i + turn) % 2 and shape not in _matrix():
                variants.append(chosen(arch, "fp16", shape, gpu, TENSORS[(i + turn) // 2 % len(TENSORS)]))
            else:
                variants.append(chosen(arch, "bf16", shape, gpu))
        variants.append(chosen(arch, "fp32", SAMPLE[turn], gpu))
        for kernel in SHARED_KERNELS:
            variants.append(sharing(arch, "bf16", SHARED_SAMPLE[turn], gpu, kernel))
        variants.append(sharing(arch, "bf16", SHARED_SAMPLE[0], gpu))
        of_keys, of_rows, of_index = BACKWARD_KERNELS
        variants += [backward(arch, "bf16", BACKWARD_SAMPLE[turn], gpu, kernel) for kernel in (of_keys, of_rows)]
        for kernel in BACKWARD_SHARED_KERNELS:
            variants.append(backward(arch, "bf16", SHARED_SAMPLE[turn], gpu, kernel))
        variants.append(backward(arch, "fp16", BACKWARD_SAMPLE[0], gpu, of_keys, TENSORS[turn]))
        if arch == 90:
            variants.append(backward(arch, "bf16", BACKWARD_SAMPLE[0], gpu, of_index))
    return list(dict.fromkeys(variants))


def every_variant() -> list[Variant]:
    """Return every launch of the perf matrix, and of all other shapes enough to see every two choices together.

    Their product is some 300,000 kernels; what matters about each is its tile, its heads, its widths and its spans (see
    `_traits`), and each value of one is compiled with each value of every other that `rules.choose` combines it with.
    """
    variants = []
    for arch, dtype in itertools.product(ARCHITECTURES, ELEMENT_BYTES):
        in_order = sorted(_matrix(), key=astuple) if dtype in cases.DTYPES else ()
        variants += [chosen(arch, dtype, shape, gpu) for shape in in_order for gpu in ARCHITECTURES[arch]]
        large = ARCHITECTURES[arch][1]
        others = dict.fromkeys(chosen(arch, dtype, shape, large) for shape in _all_shapes())
        variants += _each_pair(list(others))
        for shape, tensors in itertools.product(SAMPLE, TENSORS[1:]):
            variants.append(chosen(arch, dtype, shape, large, tensors))
        for shape, tensors, kernel in itertools.product(SHARED_SAMPLE, TENSORS, SHARED_KERNELS):
            variants.append(sharing(arch, dtype, shape, large, kernel, tensors))
        of_rows = itertools.product(BACKWARD_SAMPLE, TENSORS, BACKWARD_KERNELS)
        of_tiles = itertools.product(SHARED_SAMPLE, TENSORS, BACKWARD_SHARED_KERNELS)
        for shape, tensors, kernel in itertools.chain(of_rows, of_tiles):
            if backward_config.fits(replace(shape, element_bytes=ELEMENT_BYTES[dtype]), large):
                variants.append(backward(arch, dtype, shape, large, kernel, tensors))
    return list(dict.fromkeys(variants))


def _all_shapes() -> list[Call]:
    """Return shapes on both sides of every border that `rules.choose` may draw."""
    widths = {_chunks(width): width for width in range(16, MAX_WIDTH + 1, 16)}.values()  # the widest of a kind
    rows = (1, 4, 16, 64, 256, 1024)
    heads = (1, 16, 17, 64)
    spans = (2, *SPAN_BUCKETS)
    lengths = (16, 32, 64, 128, 256, 512, 1024, 65_536)
    shapes = [Call(*each) for each in itertools.product(rows, heads, widths, widths, spans, lengths, (False, True))]
    return shapes + [replace(shape, one_length=True) for shape in shapes if shape.n_spans == 1]


def _chunks(width: int) -> tuple[int, int]:
    """Return the width of the chunks that D or Dv is cut into, and how many there are."""
    block = chunk_width(width)
    return block, -(-width // block)


def _each_pair(variants: Sequence[Variant]) -> list[Variant]:
    """Pick variants so that each pair of traits that occurs is in one of them, and per tile the most shared memory."""
    picked: list[Variant] = []
    seen: set[tuple] = set()
    hungriest: dict[tuple, tuple[int, Variant]] = {}
    pairs = [frozenset(itertools.combinations(_traits(variant), 2)) for variant in variants]
    for wanted in (10, 6, 4, 3, 2, 1):  # those that show many new pairs first, so that few are needed
        for variant, shown in zip(variants, pairs, strict=True):
            if len(shown - seen) >= wanted:
                seen |= shown
                picked.append(variant)
    for variant in variants:
        tile = _traits(variant)[0]
        used = shared_memory(variant.config, variant.H, variant.D, variant.Dv, ELEMENT_BYTES[variant.dtype])
        if tile not in hungriest or used > hungriest[tile][0]:
            hungriest[tile] = used, variant
    return picked + [variant for _, variant in hungriest.values()]


def _traits(variant: Variant) -> tuple[tuple[str, object], ...]:
    c = variant.config
    return (
        ("tile", (c.load, c.block_l, c.num_warps, c.num_stages, c.splits, c.max_registers, c.cluster)),
        ("heads", variant.H),
        ("D", _chunks(variant.D)),
        ("Dv", _chunks(variant.Dv)),
        ("spans", variant.n_spans),
    )
