"""The min-L rule on runs with a known answer, and writing its decision down."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import saved_runs

from nsa_sel.bench import tables
from nsa_sel.bench.saved.run import Saved
from nsa_sel.bench.suite import cases
from nsa_sel.bench.suite.cases import Case
from nsa_sel.bench.threshold import command as threshold_command
from nsa_sel.bench.threshold import rule
from nsa_sel.bench.threshold import write as write_threshold
from nsa_sel.bench.threshold.judged import ThresholdError
from nsa_sel.bench.threshold.rule import Decision, Threshold, Verdict
from nsa_sel.config import PACKAGED_FILE, SelConfig


def thin(dtype: str = "bf16") -> list[Case]:
    """Return a sixth of the full matrix, with every family, layout, L and N of it."""
    return [c for c in cases.matrix("full", dtype) if c.D == c.Dv == 128 and (c.family != "rows" or c.hot) and c.H != 2]


FULL = thin()
DECODE = [c for c in FULL if c.family == "decode"]
HOT = next(c for c in FULL if c.family == "rows" and c.L == 16)
LONGEST = max(c.L for c in FULL if c.family == "rows")
COLD = next(c for c in DECODE if not c.hot)
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def thin_matrix(monkeypatch):
    """Expect the thin matrix, so that a test takes milliseconds."""
    thinned = {dtype: thin(dtype) for dtype in cases.DTYPES}
    monkeypatch.setattr(cases, "matrix", lambda name, dtype="bf16": thinned[dtype])


pytestmark = pytest.mark.usefixtures("thin_matrix")


def decide(tmp_path: Path, *documents: dict) -> Decision:
    paths = [saved_runs.save(data, tmp_path / f"000{at}_run.json") for at, data in enumerate(documents)]
    return rule.decide([Saved.load(path) for path in paths])


def of(decided: Decision, regime: str, launch: str = "eager", dtype: str = "bf16") -> rule.Threshold:
    (found,) = [t for t in decided.thresholds if (t.regime, t.launch, t.dtype) == (regime, launch, dtype)]
    return found


def slow_up_to(length: int, family: str = "rows"):
    return lambda case, kind: 1.0 if case.family == family and length >= case.L else 3.0


def first(family: str, length: int) -> Case:
    return next(c for c in FULL if c.family == family and length == c.L)


def op_keys(case: Case) -> set[tuple[str, str]]:
    return {(case.id, method) for method in case.methods}


def test_monotone_speedups_give_the_first_length_that_is_fast(tmp_path):
    decided = decide(tmp_path, saved_runs.run(FULL, slow_up_to(64)))
    assert of(decided, "rows").min_L == 128
    assert decided.min_L == 128


def test_every_length_fast_gives_the_shortest_tested_length(tmp_path):
    decided = decide(tmp_path, saved_runs.run(FULL))
    assert [of(decided, regime).min_L for regime in rule.REGIMES] == [16, 128, 512]
    assert decided.min_L == 16  # prefill, tested from 512 on, forbids nothing below


def test_a_hole_in_the_middle_counts(tmp_path):
    decided = decide(tmp_path, saved_runs.run(FULL, lambda c, kind: 1.0 if c.family == "rows" and c.L == 256 else 3.0))
    assert decided.min_L == 512


def test_one_slow_case_among_the_longest_leaves_no_threshold(tmp_path):
    slow = first("rows", LONGEST)
    decided = decide(tmp_path, saved_runs.run(FULL, lambda c, kind: 1.19 if c == slow else 3.0))
    assert of(decided, "rows").min_L is None
    assert decided.min_L is None
    assert of(decided, "rows").deciding.case == slow.id


def test_one_slow_case_is_named_as_the_deciding_one(tmp_path):
    slow = first("rows", 128)
    decided = decide(tmp_path, saved_runs.run(FULL, lambda c, kind: 1.1 if c == slow else 3.0))
    assert decided.min_L == 256
    assert decided.deciding_threshold.deciding.case == slow.id


@pytest.mark.parametrize("ratio, expected", [(1.2, 16), (1.1999, None)])
def test_the_bound_is_1_2(tmp_path, ratio, expected):
    long_ones = {c.id for c in FULL if c.family == "rows" and c.L == LONGEST}
    run = saved_runs.run(FULL, lambda c, kind: ratio + 1e-9 if c.id in long_ones else 3.0, half_width=0.0)
    assert of(decide(tmp_path, run), "rows").min_L == expected


def test_wide_intervals_count_against_triton(tmp_path):
    # 1.3 x 0.95 / 1.05 = 1.176 < 1.2, although the medians are 1.3 apart
    assert decide(tmp_path, saved_runs.run(FULL, 1.3, half_width=0.05)).min_L is None
    assert decide(tmp_path, saved_runs.run(FULL, 1.3, half_width=0.01)).min_L == 16


def test_nothing_qualifies(tmp_path):
    decided = decide(tmp_path, saved_runs.run(FULL, 1.0))
    assert decided.min_L is None
    assert {t.min_L for t in decided.thresholds} == {None}


@pytest.mark.parametrize("method", ["triton", "packed_sdpa", "packed_sdpa_fused", "packed_sdpa_compiled"])
def test_a_missing_method_never_passes(tmp_path, method):
    lost = next(c for c in FULL if c.hot and c.family == "rows" and c.L == 256)
    verdict = of(decide(tmp_path, saved_runs.run(FULL, without={(lost.id, method)})), "rows")
    assert verdict.min_L == 512
    assert [v.problem for v in verdict.missing] == [f"{method} is missing from {tmp_path.name}/0000_run.json"]


def test_a_missing_case_never_passes(tmp_path):
    lost = first("prefill", 1024)
    decided = decide(tmp_path, saved_runs.run(FULL, without=op_keys(lost)))
    assert of(decided, "prefill").min_L is None
    assert decided.min_L is None
    assert f"{lost.id}: missing from every run" in write_threshold.as_text(decided)


def test_a_case_without_parity_or_call_time_never_passes(tmp_path):
    data = saved_runs.run(FULL)
    no_parity, no_call = first("rows", 32), first("rows", 64)
    for entry in data["benchmarks"]:
        extra = entry["extra_info"]
        if (extra["case"], extra["method"]) == (no_parity.id, "triton"):
            extra["mae"] = float("nan")
        if (extra["case"], extra["method"]) == (no_call.id, "packed_sdpa"):
            extra["call_ci95_us"] = None
    decided = decide(tmp_path, data)
    assert [v.case for v in of(decided, "rows").missing] == [no_parity.id, no_call.id]
    assert [v.case for v in of(decided, "rows", "device").missing] == [no_parity.id]
    assert decided.min_L == 128


def test_a_regime_that_was_not_measured_leaves_no_threshold(tmp_path):
    decided = decide(tmp_path, saved_runs.run([c for c in FULL if c.family not in ("decode", "long")]))
    assert of(decided, "rows").min_L == 16
    assert of(decided, "decode").min_L is None
    assert decided.min_L is None


def test_the_long_cases_speak_for_their_own_length_only(tmp_path):
    decided = decide(tmp_path, saved_runs.run([c for c in FULL if c.family != "decode"]))
    assert of(decided, "decode").min_L == decided.min_L == 65_536


def test_two_runs_count_by_the_worse(tmp_path):
    fast, slow = saved_runs.run(FULL), saved_runs.run(FULL, slow_up_to(32))
    for order in ((fast, slow), (slow, fast)):
        decided = decide(tmp_path, *order)
        assert decided.min_L == 64
        assert min(v.bound for v in of(decided, "rows").verdicts) < 1.0


def test_a_case_that_dropped_out_of_one_of_two_runs_is_missing(tmp_path):
    lost = first("rows", 64)
    decided = decide(tmp_path, saved_runs.run(FULL), saved_runs.run(FULL, without=op_keys(lost)))
    assert [v.problem for v in of(decided, "rows").missing] == ["measured in 1 of 2 runs"]
    assert decided.min_L == 128


def test_chunks_of_one_matrix_are_merged(tmp_path):
    rows = [c for c in FULL if c.family in ("rows", "ragged")]
    others = [c for c in FULL if c not in rows]
    assert decide(tmp_path, saved_runs.run(rows, slow_up_to(16)), saved_runs.run(others)).min_L == 32


def test_eager_decides_and_each_launch_has_its_own_answer(tmp_path):
    decided = decide(
        tmp_path, saved_runs.run(FULL, lambda c, kind: slow_up_to(128)(c, kind) if kind == "call" else 3.0)
    )
    assert [of(decided, "rows", launch).min_L for launch in ("eager", "graph", "device")] == [256, 16, 16]
    assert decided.min_L == 256


@pytest.mark.parametrize("slow", ["device", "call", "graph"])
def test_device_time_and_the_launchs_own_time_must_both_hold(tmp_path, slow):
    decided = decide(tmp_path, saved_runs.run(FULL, lambda c, kind: slow_up_to(128)(c, kind) if kind == slow else 3.0))
    found = {launch: of(decided, "rows", launch).min_L for launch in ("eager", "graph", "device")}
    fails = {"device": ("eager", "graph", "device"), "call": ("eager",), "graph": ("graph",)}[slow]
    assert found == {launch: 256 if launch in fails else 16 for launch in found}
    assert all(0.98 < min(v.bound for v in of(decided, "rows", launch).verdicts) < 1 for launch in fails)


def test_the_largest_regime_is_switched_on(tmp_path):
    slow = lambda c, kind: 1.0 if (c.family, c.L) in (("rows", 16), ("prefill", 512)) else 3.0  # noqa: E731
    decided = decide(tmp_path, saved_runs.run(FULL, slow))
    assert [of(decided, regime).min_L for regime in rule.REGIMES] == [32, 128, 1024]
    assert decided.min_L == 1024


def test_a_slow_ragged_case_counts_up_to_its_longest_row(tmp_path):
    slow = first("ragged", 256)  # rows of up to about 700 tokens, which "auto" compares with the threshold
    decided = decide(tmp_path, saved_runs.run(FULL, lambda c, kind: 1.0 if c == slow else 3.0))
    assert decided.min_L == 1024


def test_dtypes_are_judged_apart(tmp_path):
    half = cases.matrix("full", "fp16")
    decided = decide(tmp_path, saved_runs.run(FULL), saved_runs.run(half, slow_up_to(32)))
    assert of(decided, "rows", dtype="bf16").min_L == 16
    assert of(decided, "rows", dtype="fp16").min_L == 64
    assert decided.min_L == 64


def test_the_real_matrix_in_the_real_size(tmp_path, monkeypatch):
    monkeypatch.undo()
    whole = cases.matrix("full")
    decided = decide(tmp_path, saved_runs.run(whole, slow_up_to(32)))
    assert len(whole) == sum(len(of(decided, regime).verdicts) for regime in rule.REGIMES)
    assert decided.min_L == 64
    assert decide(tmp_path, saved_runs.run(FULL)).min_L is None  # a sixth of it proves nothing


@pytest.mark.parametrize("field", ["gpu", "driver", "torch", "triton"])
def test_runs_of_two_machines_are_refused(tmp_path, field):
    other = saved_runs.IDENTITY | {field: "another"}
    with pytest.raises(ThresholdError, match=f"differ in {field}: .*another"):
        decide(tmp_path, saved_runs.run(DECODE), saved_runs.run(DECODE, identity=other))


def test_a_run_with_planted_slow_downs_is_refused(tmp_path):
    data = saved_runs.run(FULL)
    data["benchmarks"][-1]["extra_info"]["planted"] = 1.15
    with pytest.raises(ThresholdError, match="planted"):
        decide(tmp_path, data)


def test_a_run_without_a_gpu_is_refused(tmp_path):
    with pytest.raises(ThresholdError, match="no GPU figures"):
        decide(tmp_path, saved_runs.cpu_run(cases.matrix("smoke")))
    with pytest.raises(ThresholdError, match="/0000_run.json: no GPU figures"):
        decide(tmp_path, *[saved_runs.cpu_run(DECODE)] * 2)
    with pytest.raises(ThresholdError, match="no GPU figures"):
        decide(tmp_path, saved_runs.run(DECODE, identity=saved_runs.IDENTITY | {"gpu": "cpu"}))
    assert decide(tmp_path, saved_runs.run(DECODE, identity=saved_runs.IDENTITY | {"gpu": "gfx942"})).gpu == "gfx942"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"benchmarks": [1]}', '{"benchmarks": []}'])
def test_damaged_json_ends_in_one_line_and_exit_code_2(tmp_path, capsys, content):
    path = tmp_path / "0001_broken.json"
    path.write_text(content)
    assert threshold_command.main([str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "0001_broken.json" in line


# ---- Cases in which an SDPA form has no time, and the saved reason


def refused(case: Case, *methods: str, why: str = "needs 30.0 GB, 20.0 GB are free") -> dict[tuple[str, str], str]:
    return {(case.id, method): why for method in methods or case.methods}


def test_a_case_in_which_no_sdpa_form_ran_is_not_judged_counted_and_named(tmp_path):
    large = first("prefill", 1024)
    decided = decide(tmp_path, saved_runs.run(FULL, not_timed=refused(large)))
    found = of(decided, "prefill")
    assert found.min_L == 512 and decided.min_L == 16
    assert [(v.case, v.not_judged) for v in found.not_judged] == [(large.id, "needs 30.0 GB, 20.0 GB are free")]
    assert not found.failing and not found.missing
    assert decided.not_judged == found.not_judged
    said = write_threshold.as_text(decided)
    assert "Not judged, because no SDPA form ran: 1 case." in said
    assert f"{large.id}: needs 30.0 GB, 20.0 GB are free" in said
    assert f"Not judged: `{large.id}`: needs 30.0 GB, 20.0 GB are free." in write_threshold.prd_section(decided)


def test_tritons_own_time_does_not_matter_where_no_sdpa_form_ran(tmp_path):
    large = first("rows", 1024)
    forms = [method for method in large.methods if method.startswith("packed")]
    decided = decide(
        tmp_path, saved_runs.run(FULL, lambda c, kind: 0.5 if c == large else 3.0, not_timed=refused(large, *forms))
    )
    assert decided.min_L == 16 and [v.case for v in decided.not_judged] == [large.id]


def test_different_reasons_are_all_said(tmp_path):
    reasons = {
        **refused(COLD, "packed_sdpa", why="out of memory"),
        **refused(COLD, "packed_sdpa_fused", why="no backend"),
    }
    verdict = judge(tmp_path, saved_runs.run([COLD], not_timed=reasons), case=COLD)
    assert verdict.not_judged == "packed_sdpa: out of memory; packed_sdpa_fused: no backend"


def test_a_case_is_judged_against_the_sdpa_forms_that_ran(tmp_path):
    data = saved_runs.run([HOT], 1.5, not_timed=refused(HOT, "packed_sdpa_compiled"), half_width=0)
    verdict = judge(tmp_path, data)
    assert verdict.opponent == "packed_sdpa_fused" and verdict.bound == pytest.approx(1.5 * 1.2)
    data = saved_runs.run([HOT], 1.5, not_timed=refused(HOT, "packed_sdpa_compiled", "packed_sdpa_fused"), half_width=0)
    verdict = judge(tmp_path, data)
    assert verdict.opponent == "packed_sdpa" and verdict.bound == pytest.approx(1.5 * 1.4)


def test_a_form_without_a_time_and_without_a_reason_is_missing(tmp_path):
    data = saved_runs.run([HOT], without={(HOT.id, "packed_sdpa")}, not_timed=refused(HOT, "packed_sdpa_fused"))
    assert judge(tmp_path, data).problem.startswith("packed_sdpa is missing from ")
    gone = refused(HOT, "packed_sdpa", "packed_sdpa_fused", "packed_sdpa_compiled")
    data = saved_runs.run([HOT], without={(HOT.id, "triton")}, not_timed=gone)
    assert judge(tmp_path, data).problem.startswith("triton is missing from ")


def test_a_run_from_before_fused_packing_lacks_the_honest_opponent(tmp_path):
    decided = decide(tmp_path, saved_runs.run(FULL, without={(c.id, "packed_sdpa_fused") for c in FULL}))
    assert decided.min_L is None
    assert {v.problem for v in of(decided, "rows").verdicts} == {
        f"packed_sdpa_fused is missing from {tmp_path.name}/0000_run.json"
    }


def test_triton_without_a_time_beside_an_sdpa_form_with_one_never_passes(tmp_path):
    verdict = judge(tmp_path, saved_runs.run([HOT], not_timed=refused(HOT, "triton", why="H=300 is above 128")))
    assert verdict.problem.startswith("triton has no time in ") and verdict.problem.endswith(": H=300 is above 128")


def test_a_case_not_judged_in_one_run_is_judged_by_the_other(tmp_path):
    small, large = saved_runs.run([HOT], not_timed=refused(HOT)), saved_runs.run([HOT], 1.5)
    small["benchmarks"] = saved_runs.run([COLD])["benchmarks"]
    for order in ((small, large), (large, small)):
        verdict = judge(tmp_path, *order)
        assert not verdict.not_judged and 1.4 < verdict.bound < 1.5


def test_a_regime_in_which_nothing_could_be_judged_leaves_no_threshold(tmp_path):
    prefill = {key: why for c in FULL if c.family == "prefill" for key, why in refused(c).items()}
    decided = decide(tmp_path, saved_runs.run(FULL, not_timed=prefill))
    assert of(decided, "prefill").min_L is None and decided.min_L is None
    assert "prefill, bf16: 0 of 0 judged cases do not qualify" in write_threshold.as_text(decided)


@pytest.mark.parametrize("mark", [
    None, [], {"not_timed": None}, {"not_timed": {"case": "a"}}, {"not_timed": [None, 3, "packed_sdpa"]},
    {"not_timed": [{"case": HOT.id, "method": "packed_sdpa"}]},
    {"not_timed": [{"case": HOT.id, "method": "packed_sdpa", "reason": ""}]},
    {"not_timed": [{"case": HOT.id, "method": "packed_sdpa", "reason": ["out of memory"]}]},
    {"not_timed": [{"case": 3, "method": "packed_sdpa", "reason": "out of memory"}]},
])  # fmt: skip
def test_a_reason_that_is_none_excuses_nothing(tmp_path, mark):
    data = saved_runs.run([HOT], without={(HOT.id, "packed_sdpa")}) | {"nsa_sel": mark}
    assert judge(tmp_path, data).problem.startswith("packed_sdpa is missing from ")


def test_the_verdict_says_how_often_each_form_was_the_opponent(tmp_path):
    # Where the case is hot the compiled form is the fastest, elsewhere the one with fused packing.
    hot, gone = first("rows", 16), next(c for c in FULL if not c.hot)
    run = saved_runs.run(FULL, not_timed={**refused(hot, "packed_sdpa_compiled"), **refused(gone, "packed_sdpa_fused")})
    counts = {"packed_sdpa_compiled": sum(c.hot for c in FULL) - 1, "packed_sdpa": 1}
    counts["packed_sdpa_fused"] = len(FULL) - sum(counts.values())
    decided = decide(tmp_path, run)
    assert decided.opponents == counts
    names = {"packed_sdpa_fused": "with fused packing", "packed_sdpa_compiled": "compiled", "packed_sdpa": "eager"}
    order = sorted(counts, key=lambda form: -counts[form])
    listed = ", ".join(f"{names[form]} in {counts[form]}" + (" cases" if form == order[0] else "") for form in order)
    assert f"The opponent was packed SDPA {listed}." in write_threshold.sentence(decided)
    slow = saved_runs.run(FULL, 1.0)
    assert "The opponent was packed SDPA compiled in" in write_threshold.sentence(decide(tmp_path, slow))


# ---- The rule on verdicts written out: (L, bound), (L, bound, longest row) or (L, what is missing)


def threshold(*verdicts: tuple, regime: str = "rows", launch: str = "eager") -> Threshold:
    """Return a threshold of verdicts whose case is named by its L, its place and what it has."""
    return Threshold(regime, launch, "bf16", tuple(written_out(at, *each) for at, each in enumerate(verdicts)))


def written_out(at: int, L: int, bound: float | str | None, longest: int | None = None) -> Verdict:
    problem = bound if isinstance(bound, str) else ""
    return Verdict(f"case{at}", "rows", L, longest or L, None if problem else bound, None, problem)


@pytest.mark.parametrize(
    ("verdicts", "min_L", "deciding"),
    [
        ([(16, 3.0), (32, 2.0), (64, 2.5)], 16, "case1"),  # nothing fails: the one closest to failing
        ([(1, 3.0), (2, 3.0)], 1, "case0"),
        ([(16, 1.0), (32, 1.2), (64, 1.3)], 32, "case0"),  # 1.2x is enough
        ([(16, 1.0), (32, 1.1999), (64, 1.3)], 64, "case1"),
        ([(16, 3.0), (32, 3.0), (64, 1.1999)], None, "case2"),
        ([(32, 1.1), (32, 0.9), (32, 1.0), (16, 0.5), (64, 3.0)], 64, "case1"),  # the worst of the longest that fail
        ([(32, 0.9), (32, "missing"), (64, 3.0)], 64, "case1"),  # what is missing is worse than slow
        ([(32, None), (32, 0.9), (64, 3.0)], 64, "case0"),
        ([(16, 1.0, 63), (64, 3.0), (128, 3.0)], 64, "case0"),  # ragged rows up to 63, 64 and 65 tokens
        ([(16, 1.0, 64), (64, 3.0), (128, 3.0)], 128, "case0"),
        ([(16, 1.0, 65), (64, 3.0), (128, 3.0)], 128, "case0"),
        ([(16, 1.1, 128), (64, 1.0), (256, 3.0)], 256, "case0"),  # the longest row, not the largest L
        ([(16, 3.0, 64), (64, 3.0)], 16, "case0"),
        ([(16, 1.0), (16, 3.0), (32, 3.0)], 32, "case0"),
    ],
)
def test_the_threshold_is_the_shortest_length_above_every_failing_row(verdicts, min_L, deciding):
    assert threshold(*verdicts).min_L == min_L
    assert threshold(*verdicts).deciding.case == deciding


def test_failing_cases_are_slow_or_missing():
    found = threshold((16, 3.0), (16, 1.1), (32, "not measured"), (32, None))
    assert [v.case for v in found.failing] == ["case1", "case2", "case3"]
    assert [v.case for v in found.missing] == ["case2"]
    assert [v.case for v in found.too_slow] == ["case1", "case3"]
    assert found.by_length() == [(16, list(found.verdicts[:2])), (32, list(found.verdicts[2:]))]
    assert [length for length, _ in threshold((64, 3.0), (16, 3.0), (32, 3.0)).by_length()] == [16, 32, 64]


def test_equal_lengths_of_two_files_are_one_length():
    long_ones = threshold((int("1000"), 1.1), (int("1000"), 0.9))  # two int objects
    assert long_ones.deciding.case == "case1"
    assert long_ones.by_length() == [(1000, list(long_ones.verdicts))]


def test_a_verdict_says_its_bound_or_what_is_missing():
    assert str(written_out(0, 16, 1.234)) == "case0: lower bound 1.23x"
    assert str(written_out(0, 16, "no call time")) == "case0: no call time"
    assert not Verdict("case0", "rows", 16, 16, 3.0, 3.0, "no call time").ok


def decision_of(*found: Threshold) -> Decision:
    return Decision("a GPU", "2026-01-01", "full", (), found)


def test_the_largest_limited_regime_decides():
    slow = (threshold((16, 1.0), (32, 3.0)), threshold((64, 1.0), (128, 3.0)), threshold((16, 1.1), (32, 3.0)))
    assert decision_of(*slow).min_L == 128
    assert decision_of(*slow).deciding_threshold is slow[1]
    fast = threshold((512, 2.0))
    assert decision_of(slow[0], fast).min_L == 32
    assert decision_of(slow[0], fast).deciding_threshold is slow[0]
    never = threshold((8, 1.0))
    assert decision_of(*slow, never).min_L is None
    assert decision_of(*slow, never).deciding_threshold is never
    assert decision_of(never, *slow).deciding_threshold is never


def test_without_a_failing_case_the_shortest_tested_length_is_switched_on():
    fast = threshold((16, 3.0), (32, 2.0)), threshold((512, 1.5)), threshold((128, 2.5))
    assert decision_of(*fast).min_L == 16
    assert decision_of(*fast).deciding_threshold is fast[1]  # the case closest to failing


def test_only_eager_launches_decide():
    lengths = {"eager": 16, "graph": 64, "device": 256}
    eager, graph, device = (threshold((L, 1.0), (2 * L, 3.0), launch=launch) for launch, L in lengths.items())
    assert decision_of(graph, eager, device).deciding == [eager]
    assert decision_of(graph, eager, device).min_L == 32
    assert decision_of(graph, device).min_L is None


def test_a_verdict_a_threshold_and_a_decision_cannot_be_changed(tmp_path):
    found = threshold((16, 3.0))
    saved = Saved.load(saved_runs.save(saved_runs.run(DECODE[:1]), tmp_path / "0001_run.json"))
    for held in (found, found.verdicts[0], decision_of(found), saved):
        with pytest.raises(dataclasses.FrozenInstanceError):
            held.verdicts = held.bound = held.run = None


# ---- What a run's figures say of one case


TIMES = {  # median, 95 % CI
    "triton": (10, 9, 12),
    "packed_sdpa": (30, 24, 40),
    "packed_sdpa_fused": (50, 45, 60),
    "packed_sdpa_compiled": (20, 15, 26),
}


def measured(times: dict[str, tuple[float, float, float]], case: Case = HOT, kind: str = "call") -> dict:
    """Return a run of one case with these times of one kind; whatever else it holds is 3x."""
    data = saved_runs.run([case])
    for entry in data["benchmarks"]:
        median, *interval = times.get(entry["extra_info"]["method"], (1, 1, 1))
        if kind == "device":
            entry["stats"]["median"] = median / 1e6
            entry["extra_info"]["ci95_us"] = interval
        else:
            entry["extra_info"] |= {f"{kind}_us": median, f"{kind}_ci95_us": interval}
    return data


def judge(tmp_path: Path, *documents: dict, case: Case = HOT, launch: str = "eager") -> Verdict:
    paths = [saved_runs.save(data, tmp_path / f"000{at}_run.json") for at, data in enumerate(documents)]
    (verdict,) = rule.judge([case], [Saved.load(path) for path in paths], launch)
    return verdict


@pytest.mark.parametrize(("launch", "kind"), [("eager", "call"), ("graph", "graph"), ("device", "device")])
def test_the_bound_is_the_faster_sdpa_forms_lower_end_over_tritons_upper_end(tmp_path, launch, kind):
    verdict = judge(tmp_path, measured(TIMES, kind=kind), launch=launch)
    assert verdict == Verdict(HOT.id, "rows", 16, 16, 15 / 12, pytest.approx(2), opponent="packed_sdpa_compiled")
    for form in ("packed_sdpa", "packed_sdpa_fused"):
        swapped = TIMES | {form: TIMES["packed_sdpa_compiled"], "packed_sdpa_compiled": TIMES[form]}
        assert judge(tmp_path, measured(swapped, kind=kind), launch=launch) == replace(verdict, opponent=form)
    backwards = {method: (median, high, low) for method, (median, low, high) in TIMES.items()}
    assert judge(tmp_path, measured(backwards, kind=kind), launch=launch) == verdict


def test_the_lower_end_and_the_median_may_come_from_two_forms(tmp_path):
    verdict = judge(tmp_path, measured(TIMES | {"packed_sdpa": (30, 13.2, 90)}))
    assert (verdict.bound, verdict.speedup) == (pytest.approx(1.1), 2)


def test_the_worst_run_counts_for_the_bound_and_for_the_speed_up(tmp_path):
    runs = [measured(TIMES), measured(TIMES | {"triton": (11, 9, 11.5)}), measured(TIMES | {"triton": (8, 7, 12.5)})]
    verdict = judge(tmp_path, *runs)
    assert (verdict.bound, verdict.speedup) == (15 / 12.5, 20 / 11)
    assert verdict.ok
    assert judge(tmp_path, *runs[::-1]) == verdict


def test_a_form_that_was_measured_counts_where_none_was_asked_for(tmp_path):
    data = measured(TIMES, COLD)
    assert judge(tmp_path, data, case=COLD).bound == 24 / 12
    (extra,) = (copy.deepcopy(e) for e in data["benchmarks"] if e["extra_info"]["method"] == "packed_sdpa")
    extra["extra_info"] |= {"method": "packed_sdpa_compiled", "call_us": 20, "call_ci95_us": [15, 26]}
    data["benchmarks"].append(extra)
    assert judge(tmp_path, data, case=COLD).bound == 15 / 12


def without(data: dict, *methods: str) -> dict:
    kept = [entry for entry in data["benchmarks"] if entry["extra_info"]["method"] not in methods]
    return data | {"benchmarks": kept}


@pytest.mark.parametrize(
    ("documents", "problem"),
    [
        ([without(measured(TIMES), *TIMES)], "missing from every run"),  # only packed rows were timed
        ([without(measured(TIMES), "triton")], "triton is missing from "),
        ([measured(TIMES), without(measured(TIMES), "packed_sdpa")], "packed_sdpa is missing from "),
    ],
)
def test_what_is_missing_is_said(tmp_path, documents, problem):
    verdict = judge(tmp_path, *documents)
    assert verdict.problem.startswith(problem)
    assert not verdict.ok
    assert (verdict.bound, verdict.speedup, verdict.L) == (None, None, 16)


@pytest.mark.parametrize("kind", ("call", "graph"))
@pytest.mark.parametrize(
    "changed",
    [
        {"us": None},
        {"ci95_us": None},
        {"ci95_us": 3.0},
        {"ci95_us": [3.0]},
        {"ci95_us": [3.0, 4.0, 5.0]},
        {"ci95_us": [0, 4.0]},
        {"ci95_us": [3.0, -1]},
        {"ci95_us": [True, 4.0]},
        {"ci95_us": ["3", 4.0]},
        {"ci95_us": [3.0, math.nan]},
        {"ci95_us": [3.0, math.inf]},
    ],
)
def test_a_time_without_a_whole_interval_is_not_measured(tmp_path, kind, changed):
    data = measured(TIMES, kind=kind)
    data["benchmarks"][0]["extra_info"] |= {f"{kind}_{name}": value for name, value in changed.items()}
    launch = {"call": "eager", "graph": "graph"}[kind]
    method = data["benchmarks"][0]["extra_info"]["method"]
    assert judge(tmp_path, data, launch=launch).problem.startswith(f"{method} has no {kind} time in ")
    assert not judge(tmp_path, data, launch="device").problem


@pytest.mark.parametrize(("interval", "expected"), [([0.5, 3], (10, 0.5, 3)), ([4, 2], (10, 2, 4))])
def test_a_time_is_its_median_and_its_interval_in_order(tmp_path, interval, expected):
    data = measured(TIMES)
    data["benchmarks"][0]["extra_info"]["call_ci95_us"] = interval
    saved = Saved.load(saved_runs.save(data, tmp_path / "0001_run.json"))
    assert saved.time_us((HOT.id, "triton"), "call") == expected
    assert saved.time_us((HOT.id, "flex_attention"), "call") is None


@pytest.mark.parametrize("mae", (None, "small", True, math.nan, math.inf))
def test_a_case_without_a_parity_figure_is_not_judged(tmp_path, mae):
    data = measured(TIMES)
    for entry in data["benchmarks"]:
        if entry["extra_info"]["method"] == "triton":
            entry["extra_info"]["mae"] = mae
    assert judge(tmp_path, data).problem.startswith("no parity figure (mae) in ")
    assert judge(tmp_path, measured(TIMES), data).problem.endswith("/0001_run.json")


@pytest.mark.parametrize("mae", (0, 0.0, 1e-4))
def test_a_parity_figure_may_be_zero(tmp_path, mae):
    data = measured(TIMES)
    for entry in data["benchmarks"]:
        entry["extra_info"]["mae"] = mae
    assert judge(tmp_path, data).ok


def test_a_ragged_case_reaches_to_its_longest_row_and_every_other_to_its_L(tmp_path):
    # The longest of 64 ragged rows stands at 63.5 / 64 of a log-uniform law from 47 to 757 tokens.
    for family, longest in (("rows", 256), ("ragged", 741), ("decode", 256), ("prefill", 512), ("long", 65_536)):
        case = next(c for c in FULL if c.family == family and c.L >= 256)
        assert judge(tmp_path, saved_runs.run([case]), case=case).longest == longest
        assert judge(tmp_path, saved_runs.run([HOT]), case=case).longest == longest


def test_a_saved_run_keeps_what_the_machine_and_the_commit_were(tmp_path):
    data = saved_runs.run([HOT])
    path = tmp_path / "0001_run.json"
    saved = Saved.load(str(saved_runs.save(data, path)))
    assert (saved.machine["node"], saved.commit) == ("synthetic", "c0ffee0123456789")
    assert saved.run.name == f"{tmp_path.name}/0001_run.json"
    assert saved.extras[HOT.id, "triton"]["family"] == "rows"
    for machine, commit in (([], None), ({}, {"id": None})):
        saved = Saved.load(saved_runs.save(data | {"machine_info": machine, "commit_info": commit}, path))
        assert (saved.machine, saved.commit) == ({}, "")


def test_a_decision_names_its_gpu_matrix_and_newest_date(tmp_path):
    days = ("2026-03-01T23:00:00+00:00", "2026-12-02T10:00:00+00:00", "2026-07-01T10:00:00+00:00")
    decided = decide(tmp_path, *(saved_runs.run(DECODE, when=day) for day in days))
    assert (decided.gpu, decided.date, decided.expected) == (saved_runs.GPU, "2026-12-02", "matrix `full`")
    assert [one.run.datetime for one in decided.runs] == list(days)
    assert len(decided.thresholds) == 9
    assert decided.thresholds[0].regime == "rows"
    assert decided.thresholds[0].launch == "eager"


def test_a_run_without_dtypes_is_refused(tmp_path):
    data = saved_runs.run([HOT])
    for entry in data["benchmarks"]:
        entry["extra_info"]["dtype"] = "fp8"
    with pytest.raises(ThresholdError, match="/0000_run.json: no benchmark in it names a dtype of bf16, fp16"):
        decide(tmp_path, data, data)


def test_the_matrix_can_be_named(tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    path = saved_runs.save(saved_runs.run(cases.matrix("smoke")), tmp_path / "0001_run.json")
    assert threshold_command.main([str(path), "--matrix", "smoke"]) == 0
    assert f"{saved_runs.GPU}, 2026-11-20, matrix smoke, 1 run(s)" in capsys.readouterr().out
    assert threshold_command.main([str(path)]) == 1
    said = capsys.readouterr().out
    assert "matrix full" in said
    assert "Nothing is written." not in said
    with pytest.raises(SystemExit, match="2"):
        threshold_command.main([])


# ---- --apply


@pytest.fixture
def files(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """Copy base.yaml (which configs/ links to) and PRD.md, both without any measured GPU."""
    pytest.importorskip("ruamel.yaml", reason="--apply needs ruamel.yaml")
    config, prd = tmp_path / "configs" / "base.yaml", tmp_path / "PRD.md"
    config.parent.mkdir()
    config.write_text(CONFIG)
    head, rest = (REPOSITORY / "PRD.md").read_text().split(write_threshold.BEGIN)
    tail = rest.split(write_threshold.END)[1]
    prd.write_text(f"{head}{write_threshold.BEGIN}\nNo measured GPU yet.\n{write_threshold.END}{tail}")
    monkeypatch.chdir(tmp_path)
    return config, prd


CONFIG = """\
# Toggles.
runtime:
  use_triton_sel: auto      # when
  # how long
  sel_triton_min_L:         # by GPU
    default: 64             # the others
    "NVIDIA Never": null    # measured, never
  use_sel_pack: true        # packed
"""


def apply(tmp_path: Path, *documents: dict) -> int:
    paths = [saved_runs.save(data, tmp_path / "runs" / f"000{at}_run.json") for at, data in enumerate(documents)]
    return threshold_command.main([*map(str, paths), "--apply"])


def test_apply_adds_one_entry_and_keeps_comments_and_order(files, tmp_path):
    config, prd = files
    assert apply(tmp_path, saved_runs.run(FULL, slow_up_to(64))) == 0
    never = '    "NVIDIA Never": null    # measured, never\n'
    assert config.read_text() == CONFIG.replace(never, f"{never}    {saved_runs.GPU}: 128\n")
    assert SelConfig.load(config, env={}).sel_triton_min_L == {"default": 64, "NVIDIA Never": None, saved_runs.GPU: 128}
    text = prd.read_text()
    assert f"### {saved_runs.GPU}: Triton from L = 128 (2026-11-20)" in text
    assert "No measured GPU yet." not in text
    assert f"| 64 | {sum(c.L == 64 and c.family in ('rows', 'ragged') for c in FULL)} | 0.99x |" in text
    assert "Decided by `rows-bf16-" in text and "L = 64): lower bound 0.99x" in text


def test_apply_changes_an_existing_entry_in_place(files, tmp_path):
    config, _ = files
    entry = f"    {saved_runs.GPU}: 512  # measured here\n"
    before = CONFIG.replace("    default", f"{entry}    default")
    config.write_text(before)
    assert apply(tmp_path, saved_runs.run(FULL)) == 0
    assert config.read_text() == before.replace(": 512 ", ": 16 ").replace(": 16  #", ": 16   #")


def test_apply_twice_changes_nothing(files, tmp_path, capsys):
    run = saved_runs.run(FULL, slow_up_to(64))
    assert apply(tmp_path, run) == 0
    assert "Wrote" in capsys.readouterr().out
    first_time = [(path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) for path in files]
    assert apply(tmp_path, run) == 0
    assert "nothing changes" in capsys.readouterr().out
    assert [(path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) for path in files] == first_time


def test_apply_keeps_the_other_gpus_and_replaces_its_own(files, tmp_path):
    config, prd = files
    other = saved_runs.IDENTITY | {"gpu": "NVIDIA Other"}
    assert apply(tmp_path, saved_runs.run(FULL, slow_up_to(64))) == 0
    assert apply(tmp_path, saved_runs.run(FULL, slow_up_to(32), identity=other)) == 0
    assert apply(tmp_path, saved_runs.run(FULL, slow_up_to(256), when="2026-12-01T00:00:00+00:00")) == 0
    entries = SelConfig.load(config, env={}).sel_triton_min_L
    assert (entries[saved_runs.GPU], entries["NVIDIA Other"]) == (512, 64)
    headings = [line for line in prd.read_text().splitlines() if line.startswith("### ")]
    assert headings == [
        "### NVIDIA Other: Triton from L = 64 (2026-11-20)",
        f"### {saved_runs.GPU}: Triton from L = 512 (2026-12-01)",
    ]


def test_apply_turns_one_number_for_all_into_a_map(files, tmp_path):
    config, _ = files
    config.write_text("# Toggles.\nruntime:\n  sel_triton_min_L: 96  # tokens\n")
    assert apply(tmp_path, saved_runs.run(FULL)) == 0
    assert SelConfig.load(config, env={}).sel_triton_min_L == {"default": 96, saved_runs.GPU: 16}
    assert "# Toggles." in config.read_text() and "# tokens" in config.read_text()


def test_apply_writes_through_a_link(files, tmp_path):
    config, _ = files
    link = tmp_path / "packaged.yaml"
    link.symlink_to(config)
    path = saved_runs.save(saved_runs.run(FULL), tmp_path / "0001_run.json")
    assert threshold_command.main([str(path), "--apply", "--config", str(link)]) == 0
    assert link.is_symlink()
    assert SelConfig.load(config, env={}).has_entry(saved_runs.GPU)


def test_without_a_threshold_nothing_is_written_and_the_reason_is_said(files, tmp_path, capsys):
    before = [path.read_bytes() for path in files]
    slow, lost = first("rows", LONGEST), first("decode", 1024)
    run = saved_runs.run(FULL, lambda c, kind: 1.1 if c == slow else 3.0, without=op_keys(lost))
    assert apply(tmp_path, run) == 1
    said = capsys.readouterr().out
    assert f"{slow.id}: lower bound 1.09x" in said
    assert f"{lost.id}: missing from every run" in said
    assert "Nothing is written." in said
    assert [path.read_bytes() for path in files] == before


def test_a_prd_without_markers_is_refused_before_anything_is_written(files, tmp_path, capsys):
    config, prd = files
    prd.write_text("# Requirements\n")
    assert apply(tmp_path, saved_runs.run(FULL)) == 2
    assert "threshold:begin" in capsys.readouterr().err
    assert config.read_text() == CONFIG


def test_apply_in_an_empty_folder_makes_both_files_where_the_package_reads_them(tmp_path, monkeypatch, capsys):
    pytest.importorskip("ruamel.yaml", reason="--apply needs ruamel.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NSA_SEL_CONFIG", raising=False)
    assert apply(tmp_path, saved_runs.run(FULL, slow_up_to(64))) == 0
    config, prd = tmp_path / "configs" / "base.yaml", tmp_path / "PRD.md"
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == [
        "Wrote configs/base.yaml, PRD.md",
        f"Programs started in this folder read it, others with NSA_SEL_CONFIG={config}",
    ]
    read = SelConfig.load(env={})
    assert read.min_len_for(saved_runs.GPU) == 128 and read.sources["sel_triton_min_L"] == "file configs/base.yaml"
    assert read.min_len_for("NVIDIA H200") == SelConfig.load(PACKAGED_FILE, env={}).min_len_for("NVIDIA H200")
    assert prd.read_text().count(f"### {saved_runs.GPU}: Triton from L = 128") == 1
    written = config.read_bytes(), prd.read_bytes()
    assert apply(tmp_path, saved_runs.run(FULL, slow_up_to(64))) == 0
    assert (config.read_bytes(), prd.read_bytes()) == written


def test_apply_writes_the_file_that_the_environment_names(files, tmp_path, monkeypatch, capsys):
    config, _ = files
    monkeypatch.setenv("NSA_SEL_CONFIG", str(tmp_path / "mine.yaml"))
    assert apply(tmp_path, saved_runs.run(FULL)) == 0
    assert f"Wrote {tmp_path}/mine.yaml, PRD.md\n" in capsys.readouterr().out
    assert SelConfig.load().has_entry(saved_runs.GPU) and config.read_text() == CONFIG


def test_apply_to_a_file_that_nothing_here_reads_says_how_to_have_it_read(files, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("NSA_SEL_CONFIG", raising=False)
    path = saved_runs.save(saved_runs.run(FULL), tmp_path / "runs" / "0001_run.json")
    assert threshold_command.main([str(path), "--apply", "--config", "elsewhere/my.yaml"]) == 0
    assert f"\nIt is read with NSA_SEL_CONFIG={tmp_path}/elsewhere/my.yaml\n" in capsys.readouterr().out


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def fails(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        tables.replace_file(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_saved_figures_are_not_trusted(tmp_path):
    data = saved_runs.run(DECODE)
    data["benchmarks"][0]["extra_info"]["call_ci95_us"] = ["<script>", 3]
    path = saved_runs.save(data, tmp_path / "0001_run.json")
    saved = Saved.load(path)
    assert saved.time_us(next(iter(saved.run.timings)), "call") is None
    assert json.loads(path.read_text())["benchmarks"]
