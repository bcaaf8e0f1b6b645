"""The one matrix of measured cases, and the methods that are timed in each."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from functools import cached_property

from ..saved.speedups import PEER_METHODS, SDPA_FORMS, TRITON
from . import distributions, pages, sharing, training
from .distributions import DECODE, PREFILL, SPANS, Distribution
from .recorded import Recorded

BLOCK = 64  # tokens of a selected block in decode, long and prefill (l_sel in the paper)
ROW_CONTEXT = 2048  # KV tokens that every row of `rows` owns
GQA = 4  # KV groups of a decode case, unless it says otherwise
FAMILIES = ("rows", "ragged", "decode", "long", "prefill")
RECORDED = "recorded"  # the family of a real model's calls, and their layout; in no matrix
PAGED = "paged"  # asked for like a family: calls of servers, with K and V in pages and without; in no matrix
TRAINING = "training"  # likewise: forward and backward pass of prefill; in no matrix
PEERS = "peers"  # asked for like a family: decode, prefill and a larger set, beside what a user would pick instead
SHARED = "shared"  # asked for like a family: prefill beside dense SDPA, with the degree of sharing varied; in no matrix
ONLY_NAMED = (PEERS, PAGED, SHARED, TRAINING)
LAYOUTS = ("few", "many", "mixed")  # the distributions of `rows`
DTYPES = ("bf16", "fp16")
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}  # of every dtype that the kernel takes
MATRICES = ("smoke", "hot", "full")
# What pytest, a saved run and `--group-by=param:...` know of a case, beside case_id and method: fields of Case.
PARAMETERS = ("family", "dtype", "layout", "H", "D", "Dv", "L", "N", "S", "G", "S_kv", "block")

OP_METHODS = (TRITON["op"], *SDPA_FORMS["op"])
CORE_METHODS = (TRITON["core"], *SDPA_FORMS["core"])
TRITON_METHODS = tuple(TRITON.values())


@dataclass(frozen=True)
class Case:
    """Describe one measured shape; frozen, hashable, and named by `id`.

    family: one of FAMILIES, or RECORDED. dtype: "bf16" or "fp16", recorded also "fp32". layout: the distribution's
    name. H: heads per group. D, Dv: widths. L: selected tokens per row (the mean in `ragged`, the most in `prefill` and
    of a recorded call). N = B·S·G rows. S_kv: KV tokens of one (b, g). block: span length, 0 where spans are no blocks.
    peers: timed beside other people's kernels. name: in a file of cases. recorded: the real model's call that it is.
    pages: in which K and V lie, as NHD64 says (see pages.py), or none.

    Raises:
        ValueError: no distribution has the layout's name, or it does not draw such rows.
    """

    family: str
    dtype: str
    layout: str
    H: int
    D: int
    Dv: int
    L: int
    N: int
    S: int = 1
    G: int = 1
    S_kv: int = ROW_CONTEXT
    block: int = 0
    peers: bool = False
    name: str = ""
    recorded: Recorded | None = None
    pages: str = ""

    def __post_init__(self) -> None:
        if (least := self.distribution.least) > self.n_spans:
            raise ValueError(
                f"L: value is {self.L}, expected at least {least} blocks of {self.block} for {self.layout}"
            )

    @property
    def distribution(self) -> Distribution:
        """Return how rows select. The family `ragged` draws `ragged`, though saved runs call its layout `few`."""
        if self.recorded is not None:
            return distributions.of_recorded(self.recorded)
        kind = SPANS if not self.block else PREFILL if self.S > 1 else DECODE
        return distributions.find("ragged" if self.family == "ragged" else self.layout, kind)

    @property
    def id(self) -> str:
        """Return the readable name, e.g. `rows-bf16-H8-D128-Dv128-L512-N1024-many`."""
        shape = f"{self.family}-{self.dtype}-H{self.H}-D{self.D}-Dv{self.Dv}-L{self.L}-N{self.N}"
        if self.family == "decode":
            shape += f"-t{self.S_kv}" + (f"-G{self.G}" if self.G != GQA else "")
        elif self.family in ("prefill", SHARED, TRAINING):
            shape += f"-S{self.S}" + (f"-G{self.G}" if self.B > 1 else "")
        elif self.family == PAGED:
            shape += f"-t{self.S_kv}-S{self.S}"
        if self.block not in (0, BLOCK):
            shape += f"-block{self.block}"
        selection = self.layout if self.recorded is None else self.recorded.id
        return "-".join(filter(None, (shape, selection, self.name, self.pages)))

    @property
    def parameters(self) -> dict[str, str | int]:
        """Return PARAMETERS by name."""
        return {name: getattr(self, name) for name in PARAMETERS}

    @property
    def B(self) -> int:
        return self.N // (self.S * self.G)

    @property
    def n_spans(self) -> int:
        if self.pages:
            return self.L // self.block * pages.per_block(self)
        return self.L // self.block if self.block else self.distribution.n_spans

    @cached_property
    def longest(self) -> int:
        """Return the tokens of the longest row: L, or more where rows are ragged."""
        longest = self.distribution.longest
        return self.L if longest is None else longest(self)

    @property
    def ragged(self) -> bool:
        """Tell whether the distribution gives rows different lengths, beyond what the causal limit does."""
        return self.distribution.longest is not None if self.recorded is None else self.recorded.shortest < self.L

    @property
    def one_length(self) -> bool:
        """Tell whether every row has L tokens; causal rows begin with one."""
        return self.S == 1 and not self.ragged

    @property
    def hot(self) -> bool:
        """Tell whether the case is in the hot subset, where `packed_sdpa_compiled` runs too."""
        if self.family == "rows":
            return (self.H, self.D, self.Dv) == (8, 128, 128)
        return self.family == "decode" and self.H == 16

    @property
    def seed(self) -> int:
        """Return the fixed seed of the tensors and spans, the same for every dtype and for the twin without pages."""
        return zlib.crc32(replace(self, pages="").id.replace(f"-{self.dtype}-", "-").encode())

    @property
    def methods(self) -> tuple[str, ...]:
        """Return the methods in the order of timing; beside peers packing comes last, as it needs the most memory."""
        if self.family == PAGED:  # packed rows are the same with and without pages
            return OP_METHODS[:-1]
        if self.family in (SHARED, TRAINING):  # of SHARED most are too large to pack
            return training.METHODS if self.family == TRAINING else (TRITON["op"], "dense")
        ours = tuple(m for m in OP_METHODS + CORE_METHODS if m != "packed_sdpa_compiled" or self.hot)
        return ("triton", *PEER_METHODS, *(m for m in ours if m.startswith("packed"))) if self.peers else ours


def matrix(name: str, dtype: str = "bf16", family: str | None = None) -> list[Case]:
    """Return the cases of "smoke", "hot" or "full", optionally of one family (or several, separated by commas).

    ONLY_NAMED are there only when named; the "hot" cases of peers and training are those of 16 heads, NSA's own number.

    Raises:
        ValueError: an unknown matrix, dtype or family.
    """
    families = FAMILIES if family is None else tuple(family.split(","))
    arguments = ("matrix", (name,), MATRICES), ("dtype", (dtype,), DTYPES), ("family", families, FAMILIES + ONLY_NAMED)
    for argument, values, known in arguments:
        for value in values:
            if value not in known:
                raise ValueError(f"{argument}: value is {value!r}, expected one of {', '.join(known)}")
    cases = [*_rows(dtype), *_ragged(dtype), *_decode(dtype), *_long(dtype), *_prefill(dtype)]
    if name == "hot":
        cases = [case for case in cases if case.hot]
    elif name == "smoke":
        cases = [case for case in cases if _in_smoke(case)]
    chosen = [case for case in cases if case.family in families]
    chosen += _peers(name, dtype) if PEERS in families else []
    for extra, sizes in ((PAGED, pages.sizes), (SHARED, sharing.sizes), (TRAINING, training.sizes)):
        chosen += [Case(extra, dtype, **fields) for fields in sizes(name)] if extra in families else []
    return list({case.id: case for case in chosen}.values())


def by_id() -> dict[str, Case]:
    """Return every case of the full matrix in each dtype, those of ONLY_NAMED included, by its id."""
    families = ",".join(FAMILIES + ONLY_NAMED)
    return {case.id: case for dtype in DTYPES for case in matrix("full", dtype, families)}


def rows_case(dtype: str, layout: str, H: int, D: int, Dv: int, L: int, N: int) -> Case:
    """Return a case whose N rows own K and V of 2048 tokens (2·L where a row selects more than half of that).

    Raises:
        ValueError: `many` cannot cut L into 8 equal spans, or `mixed` into up to 8 spans.
    """
    if layout == "many" and L % 8 or layout == "mixed" and L < 8:
        raise ValueError(f"L: value is {L}, expected a multiple of 8 for many, at least 8 for mixed")
    return Case("rows", dtype, layout, H, D, Dv, L, N, S_kv=max(ROW_CONTEXT, 2 * L))


def ragged_case(dtype: str, H: int, D: int, Dv: int, L: int, N: int) -> Case:
    """Return a case of N rows with L tokens on average and about 3·L in the longest."""
    return Case("ragged", dtype, "few", H, D, Dv, L, N, S_kv=max(ROW_CONTEXT, 4 * L))


def decode_case(
    dtype: str,
    layout: str,
    H: int,
    D: int,
    Dv: int,
    L: int,
    batch: int,
    context: int,
    G: int = GQA,
    block: int = BLOCK,
) -> Case:
    """Return a case of one query token and L / block blocks out of `context` tokens per group.

    Raises:
        ValueError: L or the context is no multiple of the block, or L exceeds the context.
    """
    _check_blocks(block, L, context, "context")
    return Case("decode", dtype, layout, H, D, Dv, L, G * batch, G=G, S_kv=context, block=block)


def prefill_case(
    dtype: str, layout: str, H: int, D: int, Dv: int, L: int, S: int, G: int, batch: int = 1, block: int = BLOCK
) -> Case:
    """Return a case of S query tokens that each select up to L / block blocks of the S keys, its own among the last.

    Raises:
        ValueError: L or S is no multiple of the block, or L exceeds S.
    """
    _check_blocks(block, L, S, "S")
    return Case("prefill", dtype, layout, H, D, Dv, L, batch * S * G, S=S, G=G, S_kv=S, block=block)


def _check_blocks(block: int, L: int, tokens: int, name: str) -> None:
    if tokens % block:
        raise ValueError(f"{name}: value is {tokens}, expected a multiple of the block of {block}")
    if L % block or not 0 < L <= tokens:
        raise ValueError(f"L: value is {L}, expected a multiple of {block} up to the {tokens} tokens of {name}")


def _rows(dtype: str) -> list[Case]:
    return [
        rows_case(dtype, layout, H, D, Dv, L, N)
        for H in (4, 8)
        for D in (64, 128)
        for Dv in (64, 128)
        for L in (16, 32, 64, 128, 256, 512, 1024)
        for N in (64, 256, 1024)
        for layout in LAYOUTS
    ]


def _ragged(dtype: str) -> list[Case]:
    return [ragged_case(dtype, 8, 128, 128, L, N) for L in (64, 256, 1024) for N in (64, 256, 1024)]


def _decode(dtype: str) -> list[Case]:
    cases = []
    for H in (2, 4):
        for D in (64, 128):
            for Dv in (64, 128):
                for batch in (1, 8, 64):
                    for context in (128, 256, 512, 8192):
                        # A context shorter than the selection is selected whole, in adjacent blocks, whatever n_sel is.
                        lengths = sorted({min(n_sel * BLOCK, context) for n_sel in (8, 16)})
                        layout = "few" if lengths[-1] == context else "many"
                        cases += [decode_case(dtype, layout, H, D, Dv, L, batch, context) for L in lengths]
    return cases + [decode_case(dtype, "many", 16, 128, 128, 16 * BLOCK, batch, 8192) for batch in (1, 8, 64)]


def _long(dtype: str) -> list[Case]:
    few = Case("long", dtype, "few", 16, 128, 128, 65_536, 4, G=4, S_kv=131_072)
    many = Case("long", dtype, "many", 16, 128, 128, 65_536, 4, G=4, S_kv=131_072, block=BLOCK)
    return [few, many]


def _prefill(dtype: str) -> list[Case]:
    shapes = [(S, G, H, 128) for S in (1024, 4096) for G in (1, 4) for H in (4, 16)]
    shapes += [(S, 4, 16, 192) for S in (1024, 4096)]  # NSA's own widths
    return [prefill_case(dtype, "many", H, D, 128, n_sel * BLOCK, S, G) for S, G, H, D in shapes for n_sel in (8, 16)]


def _peers(name: str, dtype: str) -> list[Case]:
    L = 16 * BLOCK
    larger = [decode_case(dtype, "many", 16, 128, 128, L, batch, 65_536) for batch in (1, 8, 64)]
    larger.append(prefill_case(dtype, "many", 16, 128, 128, L, 16_384, 4))
    cases = [replace(case, peers=True) for case in (*_decode(dtype), *_prefill(dtype), *larger)]
    if name == "hot":
        return [case for case in cases if case.H == 16]
    return [case for case in cases if name == "full" or _in_smoke(case)]


def _in_smoke(case: Case) -> bool:
    """Pick cases that two CPU cores time in seconds: every layout, one ragged case and two of decode."""
    narrow = (case.D, case.Dv) == (64, 64)
    if case.family == "rows":
        small = case.N == 64 and case.L in (16, 64, 256) and case.H == 4 and narrow
        return small or (case.N == 64 and case.L == 64 and case.hot)
    if case.family == "ragged":
        return case.N == 64 and case.L == 64
    return case.family == "decode" and narrow and case.H == 4 and case.N == 4 and case.S_kv in (512, 8192)
