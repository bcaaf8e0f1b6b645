"""The matrix and its inputs: counts, names, lengths, layouts and bytes, against plain Python."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nsa_sel.bench.saved.speedups import scope as scope_of
from nsa_sel.bench.suite import cases
from nsa_sel.bench.suite.cases import Case
from nsa_sel.bench.suite.inputs import make_inputs, memory_estimate, traffic

FULL = cases.matrix("full")


def tokens(case: Case, ranges: torch.Tensor) -> list[list[list[int]]]:
    """Return every row's spans as lists of token numbers."""
    rows = ranges.reshape(case.N, -1, 2).tolist()
    return [[list(range(max(a, 0), min(b, case.S_kv))) for a, b in row] for row in rows]


def values(chosen: list[Case], *names: str) -> list[set]:
    return [{getattr(case, name) for case in chosen} for name in names]


def test_rows_are_every_combination_of_their_sizes_and_distributions():
    rows = [case for case in FULL if case.family == "rows"]
    each = values(rows, "layout", "H", "D", "Dv", "L", "N")
    assert len(rows) == math.prod(map(len, each))
    assert each[0] == set(cases.LAYOUTS) and each[4] >= {16, 32, 64, 128, 256, 512, 1024}


def test_a_short_context_is_selected_whole_once():
    assert {case.family for case in FULL} == set(cases.FAMILIES)
    decode = [case for case in FULL if case.family == "decode"]
    for case in decode:
        assert (case.S_kv == case.L) == (case.layout == "few") and case.S_kv >= case.L
    # In every shape the same contexts and lengths; those up to 512 are what 8 and 16 blocks select alike, hence once.
    pairs = Counter((case.S_kv, case.L) for case in decode if case.H < 16)
    assert len(set(pairs.values())) == 1 and {(128, 128), (512, 512), (8192, 512), (8192, 1024)} <= set(pairs)


def test_the_cases_of_committed_runs_stay_in_the_matrix():
    paths = sorted((Path(__file__).parents[2] / ".benchmarks").glob("*/*_baseline.json"))
    known = {case.id: case for dtype in cases.DTYPES for case in cases.matrix("full", dtype)}
    for path in paths:
        saved = [bench["extra_info"] for bench in json.loads(path.read_text())["benchmarks"]]
        for about in saved:
            case = known[about["case"]]
            assert about["method"] in case.methods and about["seed"] == case.seed
            assert all(about[name] == case.parameters[name] for name in ("family", "layout", "H", "D", "Dv", "L", "N"))
    assert paths


def test_subsets():
    hot, smoke = cases.matrix("hot"), cases.matrix("smoke")
    assert set(hot) < set(FULL) and set(smoke) < set(FULL)
    assert {case.family for case in hot} == {"rows", "decode"}
    rows = [case for case in hot if case.family == "rows"]
    assert {(c.H, c.D, c.Dv) for c in rows} == {(8, 128, 128)}
    assert values(rows, "layout", "L", "N") == values([c for c in FULL if c.family == "rows"], "layout", "L", "N")
    assert all(case.methods == (*cases.OP_METHODS, *cases.CORE_METHODS) for case in hot)
    assert sum("triton" not in m and "compiled" not in m for c in smoke for m in c.methods) >= 24
    assert {case.layout for case in smoke} == set(cases.LAYOUTS)


def test_ids_are_unique_and_stable():
    ids = [case.id for dtype in cases.DTYPES for case in cases.matrix("full", dtype)]
    assert len(set(ids)) == len(ids) == 2 * len(FULL)
    assert "rows-bf16-H8-D128-Dv128-L512-N1024-many" in ids
    assert cases.rows_case("bf16", "many", 8, 128, 128, 512, 1024).seed == 1708012210  # a new seed is a new baseline


def test_only_hot_cases_are_compiled():
    for case in FULL:
        assert ("packed_sdpa_compiled" in case.methods) == case.hot
        assert [scope_of(m) for m in case.methods[-2:]] == ["core", "core"]


PAGED = cases.matrix("full", family="paged")


def test_cases_of_servers_are_there_only_when_asked_for_and_each_has_a_twin_without_pages():
    assert not any(case.family == "paged" for case in FULL)
    twins = {case.id: case for case in PAGED if not case.pages}
    for case in PAGED:
        twin = twins[case.id.removesuffix(f"-{case.pages}")]
        assert replace(case, pages="") == twin and case.seed == twin.seed
        assert case.methods == twin.methods == cases.OP_METHODS[:-1]
    assert len(twins) < len(PAGED) and {case.S for case in PAGED} >= {1, 2, 4, 8}
    assert {case.layout for case in PAGED} == {"random", "unequal"}
    assert all(memory_estimate(case) < 30e9 for case in PAGED)


def test_cases_of_shared_tiles_are_there_only_when_asked_for_and_always_beside_dense_attention():
    assert not any(case.family == "shared" for case in FULL)
    chosen = cases.matrix("full", family="shared")
    assert len({case.id for case in chosen}) == len(chosen) == len(set(values(chosen, "seed")[0]))
    assert all(case.methods == ("triton", "dense") for case in chosen)
    sizes = [case for case in chosen if case.layout in ("local", "random")]
    each = values(sizes, "H", "S", "block", "layout")
    assert each[:3] == [{1, 4, 8, 16}, {1024, 4096, 16_384, 32_768}, {64, 128}]
    assert len(sizes) == math.prod(map(len, each))
    assert all(
        min(16 * case.block, case.S) == case.L and {16: 4, 8: 4, 4: 8, 1: 8}[case.H] == case.G for case in chosen
    )
    assert len([case for case in chosen if case.layout.startswith("kept") and case.H == 16]) >= 8
    assert all(memory_estimate(case, packed=False) < 4e9 for case in chosen)
    assert all(case.S <= 256 for case in cases.matrix("smoke", family="shared"))


@pytest.mark.parametrize("case", [case for case in cases.matrix("smoke", family="paged") if case.pages], ids=str)
def test_a_case_with_pages_reads_as_many_bytes_and_tokens_as_its_twin(case):
    x, twin = make_inputs(case, "cpu"), make_inputs(replace(case, pages=""), "cpu")
    assert (x.min_len, x.max_len) == (twin.min_len, twin.max_len) and torch.equal(x.q, twin.q)
    more = x.ranges.numel() * 4 - twin.ranges.numel() * 4
    assert traffic(x) == tuple(n + more for n in traffic(twin))
    assert x.ranges.shape[3] == case.n_spans and x.k.untyped_storage().nbytes() == twin.k.untyped_storage().nbytes()


@pytest.mark.parametrize("pages", ("NHD", "64", "HNW64", "NHD48", "NHD0"))
def test_pages_that_are_none_are_refused(pages):
    with pytest.raises(ValueError, match=f"pages: value is '{pages}', expected such as NHD64"):
        make_inputs(replace(PAGED[0], pages=pages), "cpu")


@pytest.mark.parametrize(
    "arguments", [("fast",), ("full", "fp8"), ("full", "bf16", "rows,columns")], ids=["matrix", "dtype", "family"]
)
def test_unknown_names_are_refused(arguments):
    with pytest.raises(ValueError, match="expected one of"):
        cases.matrix(*arguments)


@pytest.mark.parametrize("make", [
    lambda: cases.rows_case("bf16", "many", 8, 64, 64, 60, 4),
    lambda: cases.rows_case("bf16", "mixed", 8, 64, 64, 7, 4),
    lambda: cases.decode_case("bf16", "few", 4, 64, 64, 100, 1, 8192),
    lambda: cases.decode_case("bf16", "few", 4, 64, 64, 256, 1, 128),
])  # fmt: skip
def test_impossible_lengths_are_refused(make):
    with pytest.raises(ValueError, match="^L: value is"):
        make()


@pytest.mark.parametrize("case", [case for case in cases.matrix("smoke") if case.L <= 64], ids=lambda case: case.id)
def test_inputs_have_the_shapes_hints_and_bytes_of_the_case(case):
    x = make_inputs(case, "cpu")
    assert x.q.shape == (case.B, case.S, case.G, case.H, case.D) and x.q.dtype == torch.bfloat16
    assert x.k.shape == (case.B, case.G, case.S_kv, case.D) and x.v.shape == (case.B, case.G, case.S_kv, case.Dv)
    assert x.ranges.shape == (case.B, case.S, case.G, case.n_spans, 2) and x.ranges.dtype == torch.int32
    L = [sum(map(len, row)) for row in tokens(case, x.ranges)]
    assert (x.min_len, x.max_len) == (min(L), max(L))
    again = make_inputs(case, "cpu")
    assert all(torch.equal(getattr(x, name), getattr(again, name)) for name in ("q", "k", "v", "ranges"))


def test_bytes_count_shared_tokens_once_and_rows_separately():
    shape = {"S": 256, "G": 2, "S_kv": 256, "block": 64}
    case = Case("prefill", "bf16", "many", 4, 64, 32, 128, 512, **shape)
    x = make_inputs(case, "cpu")
    distinct, every = set(), 0
    for row, spans in enumerate(tokens(case, x.ranges)):
        group = (row // (case.S * case.G), row % case.G)
        distinct |= {(group, token) for span in spans for token in span}
        every += sum(map(len, spans))
    fixed = 2 * (case.N * 4 * 64 + case.N * 4 * 32) + 4 * 2 * case.n_spans * case.N  # q, out, ranges
    assert traffic(x) == (len(distinct) * (64 + 32) * 2 + fixed, every * (64 + 32) * 2 + fixed)


def test_memory_estimate_covers_the_tensors():
    for case in FULL:
        kv = case.B * case.G * case.S_kv * (case.D + case.Dv) * 2
        packed = case.N * case.L * (case.D + case.Dv) * 2
        assert kv + 2 * packed < memory_estimate(case) < 30e9  # the whole matrix fits a card of 40 GB


@pytest.mark.parametrize("family", ["rows", "ragged", "decode", "prefill"])
def test_a_case_knows_whether_its_rows_have_one_length(family):
    case = next(iter(cases.matrix("smoke", family=family)), None)
    case = case or Case("prefill", "bf16", "many", 4, 64, 64, 128, 256, S=256, S_kv=256, block=64)
    x = make_inputs(case, "cpu")
    assert case.one_length == (x.min_len == x.max_len) == (family in ("rows", "decode"))
