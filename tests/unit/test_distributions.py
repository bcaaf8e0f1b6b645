"""The distributions: what each one selects, against plain Python, and that saved runs' cases draw what they drew."""

from __future__ import annotations

import zlib
from collections import Counter

import pytest
import torch

from nsa_sel.bench.suite import cases, distributions
from nsa_sel.bench.suite.cases import Case
from nsa_sel.bench.suite.distributions import DECODE, DISTRIBUTIONS, PREFILL, SPANS, ragged_lengths
from nsa_sel.bench.suite.inputs import make_inputs, make_ranges

# CRC-32 of the int32 ranges of cases of saved runs, from the code that the baseline of 2026-11-22 was measured with.
SAVED = [
    ("rows-bf16-H4-D64-Dv64-L16-N64-few", 2394609989),
    ("rows-bf16-H8-D128-Dv128-L16-N1024-many", 3398878),
    ("rows-bf16-H4-D64-Dv128-L1024-N64-many", 2964852669),
    ("rows-bf16-H8-D128-Dv128-L16-N64-mixed", 1762370430),
    ("rows-bf16-H8-D64-Dv128-L1024-N1024-mixed", 908739995),
    ("ragged-bf16-H8-D128-Dv128-L64-N64-few", 116370295),
    ("ragged-bf16-H8-D128-Dv128-L1024-N1024-few", 1889503116),
    ("decode-bf16-H4-D64-Dv64-L512-N32-t512-few", 3070634685),
    ("decode-bf16-H4-D64-Dv64-L512-N32-t8192-many", 1467968685),
    ("decode-bf16-H16-D128-Dv128-L1024-N256-t8192-many", 2345088645),
    ("long-bf16-H16-D128-Dv128-L65536-N4-few", 3885768612),
    ("long-bf16-H16-D128-Dv128-L65536-N4-many", 3315008130),
    ("prefill-bf16-H4-D128-Dv128-L512-N1024-S1024-many", 1983749299),
    ("prefill-bf16-H16-D192-Dv128-L1024-N16384-S4096-many", 1038650968),
    ("prefill-bf16-H16-D128-Dv128-L1024-N65536-S16384-many", 919776626),
]


def tokens(case: Case, ranges: torch.Tensor) -> list[list[list[int]]]:
    """Return every row's spans as lists of token numbers."""
    rows = ranges.reshape(case.N, -1, 2).tolist()
    return [[list(range(max(a, 0), min(b, case.S_kv))) for a, b in row] for row in rows]


def case_of(kind: str, layout: str, dtype: str = "bf16") -> Case:
    """Return a small case of a kind of rows."""
    if kind == SPANS:
        return cases.rows_case(dtype, layout, 4, 64, 64, 64, 64)
    if kind == DECODE:
        return cases.decode_case(dtype, layout, 4, 64, 64, 512, 2, 2048)
    return cases.prefill_case(dtype, layout, 4, 64, 64, 512, 1024, 2, batch=2)


EVERY = [(kind, name) for name, known in DISTRIBUTIONS.items() for kind in known.kinds]


@pytest.mark.parametrize(("case_id", "checksum"), SAVED)
def test_a_saved_case_draws_the_same_spans_in_every_dtype(case_id, checksum):
    known = cases.by_id()
    for dtype in cases.DTYPES:
        ranges = make_ranges(known[case_id.replace("-bf16-", f"-{dtype}-")])
        assert zlib.crc32(ranges.numpy().tobytes()) == checksum


@pytest.mark.parametrize(("kind", "layout"), EVERY)
def test_every_distribution_gives_rows_of_distinct_tokens_within_sight(kind, layout):
    case = case_of(kind, layout)
    lengths = []
    for row, spans in enumerate(tokens(case, make_ranges(case))):
        flat = sum(spans, [])
        assert flat == sorted(set(flat)) and flat[0] >= 0
        assert flat[-1] <= case.S_kv - case.S + row // case.G % case.S
        lengths.append(len(flat))
        if case.block:
            assert all(span[0] % case.block == 0 and len(span) <= case.block for span in spans if span)
    assert max(lengths) == case.longest and case.one_length == (min(lengths) == max(lengths))
    x = make_inputs(case, "cpu")
    assert (x.min_len, x.max_len) == (min(lengths), max(lengths))
    if layout != "ragged":
        assert case.longest == case.L


@pytest.mark.parametrize("layout", [name for name, known in DISTRIBUTIONS.items() if PREFILL in known.kinds])
def test_prefill_selects_every_block_while_they_are_few(layout):
    case = case_of(PREFILL, layout)
    for row, spans in enumerate(tokens(case, make_ranges(case))):
        position = row // case.G % case.S
        assert len([span for span in spans if span]) == min(case.n_spans, position // case.block + 1)


@pytest.mark.parametrize(
    ("kind", "layout", "message"),
    [
        (SPANS, "blocky", "layout: value is 'blocky', expected a distribution: few, many, mixed, "),
        (PREFILL, "", "layout: value is '', expected a distribution: many, random, zipf, local"),
        (SPANS, "local", "layout: value is 'local', expected a distribution of spans: few, many, mixed, "),
        (PREFILL, "few", "layout: value is 'few', expected a distribution of prefill: many, random, zipf, local"),
    ],
)
def test_an_unknown_name_lists_the_known(kind, layout, message):
    with pytest.raises(ValueError) as refused:
        case_of(kind, layout)
    said = str(refused.value)
    assert said.startswith(message)
    assert said.rpartition(": ")[2].split(", ") == [name for of, name in EVERY if of == kind]


def test_sequences_of_unequal_contexts_see_from_two_blocks_to_all_tokens():
    case = Case("paged", "bf16", "unequal", 4, 64, 64, 128, 9 * 2, S=2, S_kv=8192, block=64)
    own = make_ranges(case)[..., -1, 1].reshape(9, 2).sort(0).values
    assert own[:, 1].tolist() == [128, 215, 362, 609, 1024, 1722, 2896, 4871, 8192]  # thirds of a power of four
    assert torch.equal(own[:, 0], own[:, 1] - 1)


def test_a_distribution_is_one_function(monkeypatch):
    monkeypatch.setattr(distributions, "DISTRIBUTIONS", dict(DISTRIBUTIONS))

    @distributions.distribution(DECODE, PREFILL)
    def newest(shape, generator):
        number = torch.arange(shape.S_kv // shape.block).expand(shape.B, shape.S, shape.G, -1)
        return distributions.best_blocks(shape, number.float())

    case = case_of(PREFILL, "newest")
    assert case.id.endswith("-newest")
    for row, spans in enumerate(tokens(case, make_ranges(case))):
        position = row // case.G % case.S
        first = max(0, position // 64 - 7) * 64
        assert sum(spans, []) == list(range(first, position + 1))


@pytest.mark.parametrize("layout", ["few", "many", "mixed"])
@pytest.mark.parametrize("L", [16, 64, 1024])
def test_rows_select_L_tokens_once_spread_over_the_context(layout, L):
    case = cases.rows_case("bf16", layout, 4, 64, 64, L, 64)
    counts = Counter()
    for row in tokens(case, make_ranges(case)):
        spans = [span for span in row if span]
        flat = [token for span in spans for token in span]
        assert len(flat) == len(set(flat)) == L and flat == sorted(flat)
        counts[len(spans)] += 1
        if layout == "many":
            assert [span[0] // 256 for span in spans] == list(range(8)) and {len(span) for span in spans} == {L // 8}
        elif layout == "few":
            assert spans == [list(range(L))]
    assert set(counts) == {"few": {1}, "many": {8}, "mixed": {2, 4, 8}}[layout]


def test_ragged_lengths_have_the_mean_and_the_ratio():
    for case in cases.matrix("full", family="ragged"):
        L = ragged_lengths(case)
        assert abs(sum(L) / len(L) / case.L - 1) < 0.01 and 13 < max(L) / min(L) <= 17 and max(L) <= case.S_kv
        drawn = [len(row[0]) for row in tokens(case, make_ranges(case))]
        assert sorted(drawn) == L and drawn != L  # the long rows stand anywhere


def test_decode_selects_whole_blocks():
    case = cases.decode_case("bf16", "many", 4, 64, 64, 512, 2, 8192)
    for row in tokens(case, make_ranges(case)):
        starts = [span[0] for span in row]
        assert starts[0] == 0 and starts[-1] == 8192 - 64 and len(set(starts)) == 8
        assert all(start % 64 == 0 and len(span) == 64 for start, span in zip(starts, row, strict=True))
    few = cases.decode_case("bf16", "few", 4, 64, 64, 512, 2, 8192)
    for row in tokens(few, make_ranges(few)):
        flat = sum(row, [])
        assert flat == list(range(flat[0], flat[0] + 512))


def test_prefill_is_causal_and_takes_the_first_and_the_own_block():
    case = next(c for c in cases.matrix("full", family="prefill") if (c.S, c.G, c.L) == (1024, 4, 512))
    lengths = []
    for row, spans in enumerate(tokens(case, make_ranges(case))):
        position = row // case.G % case.S
        spans = [span for span in spans if span]
        flat = sum(spans, [])
        own = list(range(position // 64 * 64, position + 1))
        assert len(flat) == len(set(flat)) and max(flat) == position and own in spans
        assert spans[0][0] == 0 and len(spans) == min(8, position // 64 + 1)
        lengths.append(len(flat))
    assert min(lengths) == 1 and max(lengths) == case.L  # the hints that make_inputs gives


def selected_blocks(case: Case) -> torch.Tensor:
    """Return whether a token selects a block, bool [S, G, blocks]."""
    assert case.B == 1
    ranges = make_ranges(case)[0]
    first = torch.where(ranges[..., 1] > ranges[..., 0], ranges[..., 0] // case.block, case.S_kv // case.block)
    chosen = torch.zeros(case.S, case.G, case.S_kv // case.block + 1, dtype=torch.bool)
    return chosen.scatter(-1, first.long(), True)[..., :-1]


def test_local_changes_as_slowly_as_real_models_do():
    case = cases.prefill_case("bf16", "local", 4, 64, 64, 1024, 4096, 4)
    chosen = selected_blocks(case)[1024:]  # from here on a token has more blocks than it may select
    assert (chosen.sum(-1) == 16).all()
    same, either = (chosen[1:] & chosen[:-1]).sum(-1), (chosen[1:] | chosen[:-1]).sum(-1)
    assert round((same / either).mean().item(), 2) == 0.93
    of_8 = chosen.view(-1, 8, case.G, chosen.shape[-1]).any(1).sum(-1)
    assert round(of_8.float().mean().item()) == 19


def test_local_takes_the_fixed_blocks_and_holds_each_other_one_for_24_tokens():
    case = cases.prefill_case("bf16", "local", 4, 64, 64, 1024, 4096, 1)
    chosen = selected_blocks(case)[:, 0].tolist()
    since: dict[int, int] = {}
    begins, held_for = Counter(), Counter()
    for s in range(1088, case.S):
        own = s // 64
        others = {block for block, taken in enumerate(chosen[s]) if taken}
        assert {0, own - 1, own} < others and max(others) == own
        others -= {0, own - 1, own}
        for block in set(since) - others:
            held_for[s - since[block]] += since[block] > 1088  # what was there at first began before
        begins[s % 24] += len(others - set(since)) if s > 1088 else 0
        since = {block: since.get(block, s) for block in others}
    assert set(+held_for) == {24}
    assert len(+begins) == 13 and max(begins.values()) - min((+begins).values()) <= 1


def test_kept_is_local_that_holds_a_block_for_so_many_tokens():
    def union(layout: str) -> float:
        chosen = selected_blocks(cases.prefill_case("bf16", layout, 4, 64, 64, 1024, 2048, 1))[1024:]
        return chosen.view(-1, 4, chosen.shape[-1]).any(1).sum(-1).float().mean().item()

    assert union("kept24") == pytest.approx(union("local"), abs=0.2)
    unions = [union(f"kept{tokens}") for tokens in (1, 4, 12, 96)]
    assert unions == sorted(unions, reverse=True) and unions[0] > 23 and unions[-1] < 17
    with pytest.raises(ValueError, match="layout: value is 'kept24', expected a distribution: few"):
        case_of(SPANS, "kept24")


def test_random_is_what_saved_runs_call_many():
    known = cases.prefill_case("bf16", "many", 4, 64, 64, 512, 1024, 2)
    generator = torch.Generator().manual_seed(known.seed)
    assert torch.equal(DISTRIBUTIONS["random"].draw(known, generator), make_ranges(known))


def test_zipf_draws_a_block_with_weight_one_over_its_number():
    case = cases.prefill_case("bf16", "zipf", 4, 64, 64, 64, 4096, 64)  # one block for each token and group
    drawn = selected_blocks(case)[-64:].sum((0, 1))
    weight = 1 / torch.arange(1, 65)
    expected = drawn.sum() * weight / weight.sum()
    assert ((drawn - expected).abs() < 4 * expected.sqrt()).all()
