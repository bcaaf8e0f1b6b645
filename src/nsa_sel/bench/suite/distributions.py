"""The distributions of spans: how a case's rows select. One function each, chosen by its name, drawn on the CPU.

Rows of three kinds select: SPANS, any stretches of a context that each row owns; DECODE, blocks of the whole context,
for one query token; PREFILL, causal blocks, for every token of a sequence. A name may be known to several kinds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

from ... import spans
from . import pages
from .recorded import Recorded, inside

SPANS, DECODE, PREFILL = "spans", "decode", "prefill"
RAGGED_RATIO = 16  # longest / shortest row of `ragged`
LONGEST_OVER_MEAN = RAGGED_RATIO * math.log(RAGGED_RATIO) / (RAGGED_RATIO - 1)  # of `ragged` rows
KEPT = 24  # tokens for which a slot of `local` keeps its block
LAWS = ("equal", "mixed", "ragged")  # of spans of any number, which stands behind the name: equal12
_COUNTED = re.compile(rf"({'|'.join(LAWS)})([1-9][0-9]*)")
_HELD = re.compile("kept([1-9][0-9]*)")  # `local` whose slots keep their block for that many tokens


class Shape(Protocol):
    """What a distribution may ask of a `Case`: its sizes, under the same names."""

    @property
    def B(self) -> int: ...
    @property
    def S(self) -> int: ...
    @property
    def G(self) -> int: ...
    @property
    def N(self) -> int: ...
    @property
    def L(self) -> int: ...
    @property
    def S_kv(self) -> int: ...
    @property
    def block(self) -> int: ...
    @property
    def n_spans(self) -> int: ...
    @property
    def pages(self) -> str: ...


Draw = Callable[[Shape, Generator], Tensor]


@dataclass(frozen=True)
class Distribution:
    """Hold how rows select, and what is known of it before it is drawn.

    draw(shape, generator): integer ranges of B·S·G·n_spans·2 elements. kinds: SPANS, DECODE, PREFILL. n_spans: spans of
    a row of SPANS (of blocks a row has L / block). longest(shape): tokens of the longest row where lengths differ by
    more than the causal limit; None where every row selects L. least: spans that a row must have.
    """

    draw: Draw
    kinds: tuple[str, ...]
    n_spans: int
    longest: Callable[[Shape], int] | None
    least: int = 1


DISTRIBUTIONS: dict[str, Distribution] = {}


def distribution(
    *kinds: str, n_spans: int = 1, longest: Callable[[Shape], int] | None = None, least: int = 1
) -> Callable[[Draw], Draw]:
    """Enter a function into DISTRIBUTIONS under its own name; the arguments are fields of Distribution."""

    def enter(draw: Draw) -> Draw:
        DISTRIBUTIONS[draw.__name__] = Distribution(draw, kinds, n_spans, longest, least)
        return draw

    return enter


def find(name: str, kind: str) -> Distribution:
    """Return a distribution by its name.

    Raises:
        ValueError: the name is unknown, or unknown to this kind of rows; the message lists the known.
    """
    if kind == SPANS and (counted := _COUNTED.fullmatch(name)):
        return spread(counted[1], int(counted[2]))
    if kind != SPANS and (held := _HELD.fullmatch(name)):
        tokens = int(held[1])
        return Distribution(lambda shape, generator: slots(shape, generator, tokens), (DECODE, PREFILL), 1, None, 3)
    known = [each for each, found in DISTRIBUTIONS.items() if kind in found.kinds]
    if name not in known:
        of = f" of {kind}" if name in DISTRIBUTIONS else ""
        raise ValueError(f"layout: value is {name!r}, expected a distribution{of}: {', '.join(known)}")
    return DISTRIBUTIONS[name]


def law_of(layout: str) -> str:
    """Return a distribution's name without the number of spans that LAWS have behind it."""
    counted = _COUNTED.fullmatch(layout)
    return counted[1] if counted else layout


def spread(law: str, n_spans: int) -> Distribution:
    """Return the distribution of n_spans spans in order, without overlap, and anywhere in the context.

    law: "equal" cuts a row into spans of one length, or nearly; "mixed" anywhere, so that a span may be empty; "ragged"
    is "equal" in rows of the lengths of `ragged`.
    """

    def draw(shape: Shape, generator: Generator) -> Tensor:
        L = torch.full((shape.N, 1), shape.L)
        if law == "ragged":
            L = torch.tensor(ragged_lengths(shape))[torch.randperm(shape.N, generator=generator), None]
        edges = L * torch.arange(n_spans + 1) // n_spans
        if law == "mixed":
            cuts = torch.randint(shape.L + 1, (shape.N, n_spans - 1), generator=generator)
            edges = torch.cat((L * 0, cuts.sort(-1).values, L), -1)
        unselected = torch.rand(shape.N, n_spans, generator=generator, dtype=torch.float64) * (shape.S_kv - L + 1)
        before = unselected.long().sort(-1).values
        return torch.stack((edges[:, :-1] + before, edges[:, 1:] + before), -1)

    return Distribution(draw, (SPANS,), n_spans, _longest_of_ragged if law == "ragged" else None)


def of_recorded(recorded: Recorded) -> Distribution:
    """Return the spans of a recorded call, which are drawn by reading them."""
    return Distribution(lambda shape, generator: inside(recorded.open()), (), recorded.n_spans, None)


def ragged_lengths(shape: Shape) -> list[int]:
    """Return the row lengths of `ragged` in rising order: the N mid-quantiles of a log-uniform law with mean L."""
    shortest = shape.L * LONGEST_OVER_MEAN / RAGGED_RATIO
    return [round(shortest * RAGGED_RATIO ** ((i + 0.5) / shape.N)) for i in range(shape.N)]


def _longest_of_ragged(shape: Shape) -> int:
    return ragged_lengths(shape)[-1]


@distribution(SPANS, DECODE)
def few(shape: Shape, generator: Generator) -> Tensor:
    """Select one span, the first L tokens; of blocks adjacent ones, beginning anywhere."""
    if not shape.block:
        return torch.tensor([0, shape.L]).expand(shape.N, 1, 2)
    n_blocks = shape.S_kv // shape.block
    first = torch.randint(n_blocks - shape.n_spans + 1, (shape.B, shape.S, shape.G, 1), generator=generator)
    return block_ranges(shape, first + torch.arange(shape.n_spans))


@distribution(SPANS, DECODE, PREFILL, n_spans=8)
def many(shape: Shape, generator: Generator) -> Tensor:
    """Select 8 spans of one length, one anywhere in each eighth of the context; of blocks as `random`."""
    if shape.block:
        return random(shape, generator)
    length, part = shape.L // shape.n_spans, shape.S_kv // shape.n_spans
    offset = torch.randint(part - length + 1, (shape.N, shape.n_spans), generator=generator)
    starts = torch.arange(shape.n_spans) * part + offset
    return torch.stack((starts, starts + length), -1)


@distribution(SPANS, DECODE, n_spans=8)
def mixed(shape: Shape, generator: Generator) -> Tensor:
    """Cut L into 2, 4 or 8 random spans and spread them, in order and without overlap; of blocks as `random`."""
    if shape.block:
        return random(shape, generator)
    N, most = shape.N, shape.n_spans
    count = 2 ** torch.randint(1, 4, (N, 1), generator=generator)
    # Distinct cut points of 1..L-1; those beyond count - 1 move to L and leave empty spans.
    cuts = torch.rand(N, shape.L - 1, generator=generator).topk(most - 1, -1).indices + 1
    cuts = torch.where(torch.arange(most - 1) < count - 1, cuts, shape.L).sort(-1).values
    stops = torch.cat((cuts, torch.full((N, 1), shape.L)), -1)
    begins = torch.cat((torch.zeros(N, 1, dtype=torch.long), cuts), -1)
    gaps = torch.randint(shape.S_kv - shape.L + 1, (N, most), generator=generator).sort(-1).values
    return torch.stack((begins + gaps, stops + gaps), -1)


@distribution(SPANS, longest=_longest_of_ragged)
def ragged(shape: Shape, generator: Generator) -> Tensor:
    """Select one span from the first token on: 16 times as many in the longest row as in the shortest, mean L."""
    L = torch.tensor(ragged_lengths(shape))[torch.randperm(shape.N, generator=generator)]
    return torch.stack((torch.zeros_like(L), L), -1)


@distribution(DECODE, PREFILL)
def random(shape: Shape, generator: Generator) -> Tensor:
    """Select the first and the own block, and other earlier ones afresh for every token."""
    return _random(shape, generator)


@distribution(DECODE, PREFILL)
def zipf(shape: Shape, generator: Generator) -> Tensor:
    """Select blocks afresh for every token, block r, counted from the first, with weight 1/(r+1), none twice."""
    number = torch.arange(shape.S_kv // shape.block)
    # The first arrivals of independent exponential clocks of these rates are draws without repetition. In double, so
    # that another machine's last bit of a logarithm does not change the order.
    uniform = torch.rand(shape.B, shape.S, shape.G, len(number), generator=generator, dtype=torch.float64)
    return best_blocks(shape, (number + 1) * torch.log1p(-uniform))


@distribution(DECODE, PREFILL, least=3)
def local(shape: Shape, generator: Generator) -> Tensor:
    """Select as real models do: the first block, the own, the one before, and others that stay for a while.

    Each of the other slots keeps its block for 24 tokens and then draws another earlier one; the slots' changes are
    spread evenly over the 24. While there are fewer earlier blocks than slots, all of them are selected.
    """
    return slots(shape, generator, KEPT)


@distribution(DECODE, PREFILL, longest=lambda shape: shape.L)
def unequal(shape: Shape, generator: Generator) -> Tensor:
    """Select as `random`, each sequence in a context of its own: the longest has all tokens, the shortest two blocks.

    Those between are spread evenly on a logarithmic scale, in random order. None has less than S tokens.
    """
    share = torch.randperm(shape.B, generator=generator).double() / max(shape.B - 1, 1)
    tokens = shape.S_kv * (max(2 * shape.block, shape.S) / shape.S_kv) ** share
    return _random(shape, generator, tokens.round().long()[:, None, None, None])


def _random(shape: Shape, generator: Generator, context: Tensor | None = None) -> Tensor:
    number, own = torch.arange(shape.S_kv // shape.block), own_block(shape, context)
    score = torch.rand(shape.B, shape.S, shape.G, len(number), generator=generator)
    score = torch.where((number == 0) | (number == own), 2.0, score)
    return best_blocks(shape, score, context)


def position(shape: Shape, context: Tensor | None = None) -> Tensor:
    """Return the position of every query token, the last of its context [B, 1, 1, 1] or of S_kv: [B or 1, S, 1, 1]."""
    last = torch.full((1, 1, 1, 1), shape.S_kv) if context is None else context
    return last - shape.S + torch.arange(shape.S)[:, None, None]


def own_block(shape: Shape, context: Tensor | None = None) -> Tensor:
    """Return the block that a query token lies in: [B or 1, S, 1, 1]."""
    return position(shape, context) // shape.block


def best_blocks(shape: Shape, score: Tensor, context: Tensor | None = None) -> Tensor:
    """Turn scores [B, S, G, blocks] into the ranges of each row's best among its own block and earlier ones."""
    later = torch.arange(score.shape[-1]) > own_block(shape, context)
    best = score.masked_fill(later, -math.inf).topk(shape.L // shape.block, -1)
    return block_ranges(shape, torch.where(best.values.isinf(), -1, best.indices).sort(-1).values, context)


def block_ranges(shape: Shape, blocks: Tensor, context: Tensor | None = None) -> Tensor:
    """Turn block numbers [B, S, G, n], -1 for none, into ranges that end with the query's own token."""
    seen = position(shape, context) + 1
    return pages.ranges(shape, blocks, seen) if shape.pages else spans.block_ranges(blocks, shape.block, seen)


def slots(shape: Shape, generator: Generator, kept: int) -> Tensor:
    """Return the ranges of `local` whose slots keep a block for that many tokens."""
    own = own_block(shape)[0, :, 0, 0]
    others = shape.n_spans - 3
    held = torch.full((shape.B, shape.G, others), -1)
    blocks = torch.full((shape.B, shape.S, shape.G, shape.n_spans), -1)
    blocks[..., 0] = own[:, None]
    blocks[..., 1] = torch.where(own > 0, 0, -1)[:, None]
    blocks[..., 2] = torch.where(own > 1, own - 1, -1)[:, None]
    filled = 0
    for s, last in enumerate((own - 2).clamp(min=0).tolist()):  # the earlier blocks are 1..last
        due = [slot for slot in range(filled) if (s + slot * kept // others) % kept == 0]
        new = list(range(filled, min(others, last)))
        filled += len(new)
        if change := [*new, *due][: last - (filled - len(new))]:  # as many as there are blocks that no slot holds
            score = torch.rand(shape.B, shape.G, last, generator=generator)
            score.scatter_(-1, held[..., : filled - len(new)] - 1, -1.0)
            held[..., change] = score.topk(len(change)).indices + 1
        blocks[:, s, :, 3:] = held
    return block_ranges(shape, blocks.sort(-1).values)
