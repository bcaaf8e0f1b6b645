"""The regression rule, on synthetic runs."""

import copy
import dataclasses
import itertools
import json

import pytest
from saved_runs import as_run, document, entry, save, save_entries, use_noise

from nsa_sel.bench.compare import command as compare_command
from nsa_sel.bench.compare import rule
from nsa_sel.bench.saved import run as runs
from nsa_sel.bench.saved.speedups import EVERY_SDPA_FORM

CASE = "rows-bf16-H8-D128-Dv128-L512-N1024-many"


@pytest.fixture(autouse=True)
def silent_cards(monkeypatch, tmp_path):
    """Let every card of these tests be without noise: the rule alone is tested, test_noise.py has the noise."""
    use_noise(monkeypatch, tmp_path, dict.fromkeys(("NVIDIA H200", "same"), [[None, 0, 0, 0, 1]]))


def compare_one(old_us, new_us, old=None, new=None):
    return rule.compare(
        as_run([entry(CASE, "triton", old_us, **(old or {}))]), as_run([entry(CASE, "triton", new_us, **(new or {}))])
    )


def verdict(result):
    names = ("regressions", "suspects", "improvements", "noise")
    return {name: len(getattr(result, name)) for name in names if getattr(result, name)}


@pytest.mark.parametrize(
    ("new_us", "expected", "exit_code"),
    [(109.9, {}, 0), (110.1, {"regressions": 1}, 1), (100.0, {}, 0), (91.0, {}, 0), (90.8, {"improvements": 1}, 0)],
)
def test_ten_per_cent_is_the_line(new_us, expected, exit_code):
    result = compare_one(100.0, new_us)
    assert verdict(result) == expected
    assert result.exit_code == exit_code


def test_alert_names_case_method_both_times_and_change():
    text = compare_one(100.0, 115.0).text()
    (line,) = [line for line in text.splitlines() if CASE in line]
    for part in (CASE, "triton", "100.00 us", "115.00 us", "+15.0 %"):
        assert part in line
    assert "FAIL, 1 slower" in text


def test_less_than_half_a_microsecond_is_suspect():
    assert verdict(compare_one(3.0, 3.49)) == {"suspects": 1}
    assert verdict(compare_one(3.0, 3.51)) == {"regressions": 1}
    assert compare_one(3.0, 3.49).exit_code == 3


def test_less_than_the_timers_tick_is_suspect():
    old = as_run([entry(CASE, "triton", 3.0)], machine_info={"calibration": {"tick_us": 1.0}})
    assert verdict(rule.compare(old, as_run([entry(CASE, "triton", 3.9)]))) == {"suspects": 1}
    assert verdict(rule.compare(old, as_run([entry(CASE, "triton", 4.1)]))) == {"regressions": 1}


def test_three_quarters_of_the_wider_interval_is_suspect():
    # The slower run's interval is 2 * 0.1 * 115 = 23 us wide: 17.25 us must be passed, 15 are not enough.
    assert verdict(compare_one(100.0, 115.0, new={"ci": 0.1})) == {"suspects": 1}
    assert verdict(compare_one(100.0, 115.0, old={"ci": 0.11})) == {"suspects": 1}
    assert verdict(compare_one(100.0, 115.0, old={"ci": 0.08}, new={"ci": 0.08})) == {"regressions": 1}


def test_overlapping_quartiles_are_suspect():
    result = compare_one(100.0, 115.0, new={"q1": 101.9e-6})
    assert verdict(result) == {"suspects": 1}
    assert "quartiles overlap" in result.text()
    assert verdict(compare_one(100.0, 115.0, new={"q1": 102.1e-6})) == {"regressions": 1}


# ---- Each border exactly: times that a float holds, so that "at the border" and "past it" are two different numbers.


def at(us, q1=None, q3=None, low=None, high=None, case=CASE, method="triton", **host):
    """Return a timing without spread but for the ends that are given."""
    return runs.Timing(case, method, us, q1 or us, q3 or us, (low or us, high or us), **host)


def compare_timings(old, new, old_tick=0.0, new_tick=0.0, asked=None):
    environment = dict.fromkeys(runs.IDENTITY, "same")
    before = runs.Run("old", {timing.key: timing for timing in old}, environment, old_tick)
    after = runs.Run("new", {timing.key: timing for timing in new}, environment, new_tick)
    return rule.compare(before, dataclasses.replace(after, asked=None if asked is None else frozenset(asked)))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (at(10), at(11), {}),  # 10 %
        (at(10), at(11.01), {"regressions": 1}),
        (at(11), at(10), {}),
        (at(11.01), at(10), {"improvements": 1}),
        (at(3), at(3.5), {"suspects": 1}),  # 0.5 us
        (at(3), at(3.51), {"regressions": 1}),
        (at(3.5), at(3), {}),
        (at(3.51), at(3), {"improvements": 1}),
        (at(40), at(46, low=44, high=52), {"suspects": 1}),  # 3/4 of 8 us, wherever the interval lies
        (at(40), at(46, low=46, high=54), {"suspects": 1}),
        (at(40), at(46, low=38, high=46), {"suspects": 1}),
        (at(40, low=38, high=46), at(46), {"suspects": 1}),
        (at(40, low=3, high=11), at(46), {"suspects": 1}),
        (at(40), at(46.1, low=44, high=52), {"regressions": 1}),
        (at(40, low=38, high=46), at(46.1), {"regressions": 1}),
        (at(40, low=38, high=46), at(46.1, low=44, high=52), {"regressions": 1}),  # the wider, not their sum
        (at(46, low=44, high=52), at(40), {}),
        (at(46.1, low=44, high=52), at(40), {"improvements": 1}),
        (at(40, q3=44), at(48, q1=44), {"suspects": 1}),  # quartiles that touch overlap
        (at(40, q3=44), at(48, q1=44.1), {"regressions": 1}),
        (at(48, q1=44), at(40, q3=44), {}),
        (at(48, q1=44.1), at(40, q3=44), {"improvements": 1}),
    ],
)
def test_a_change_counts_past_every_border_and_not_at_it(old, new, expected):
    result = compare_timings([old], [new])
    assert verdict(result) == expected
    assert result.exit_code == (1 if "regressions" in expected else 3 if "suspects" in expected else 0)


@pytest.mark.parametrize("ticks", [(1.0, 0.25), (0.25, 1.0)])
def test_a_change_of_the_coarser_tick_is_suspect(ticks):
    assert verdict(compare_timings([at(3)], [at(4)], *ticks)) == {"suspects": 1}
    assert verdict(compare_timings([at(3)], [at(4.01)], *ticks)) == {"regressions": 1}
    alerted = compare_timings([at(3)], [at(5)], *ticks)
    assert verdict(rule.confirm(alerted, {at(4).key: at(4)})) == {}
    assert verdict(rule.confirm(alerted, {at(4).key: at(4.01)})) == {"regressions": 1}


def test_a_suspect_says_by_how_much_it_is_within_what():
    (change,) = compare_timings([at(40)], [at(46, low=44, high=53)]).suspects
    assert "6.00 us is within the 6.75 us of tick and intervals" in change.text()


@pytest.mark.parametrize(
    ("old_us", "new_us", "warned"),
    [(10, 12, 0), (10, 12.01, 1), (10, 30, 1), (20, 22, 0), (20, 22.01, 1), (40, 44, 0), (40, 44.01, 1)],
)
@pytest.mark.parametrize("what", ("call_us", "graph_us"))
def test_call_and_graph_time_warn_past_ten_per_cent_and_two_microseconds(what, old_us, new_us, warned):
    result = compare_timings([at(5, **{what: old_us})], [at(5, **{what: new_us})])
    assert len(result.warnings) == warned
    assert result.exit_code == 0
    for change in result.warnings:
        assert (change.case, change.method, change.old_us, change.new_us) == (CASE, "triton", old_us, new_us)
        assert change.change == pytest.approx(new_us / old_us - 1)


@pytest.mark.parametrize("old, new", [({"call_us": 10}, {}), ({}, {"call_us": 90}), ({"graph_us": 1}, {"call_us": 90})])
def test_host_time_that_one_run_lacks_warns_of_nothing(old, new):
    assert not compare_timings([at(5, **old)], [at(5, **new)]).warnings


@pytest.mark.parametrize(
    ("sdpa_us", "moved"), [(1030.1, True), (1029.9, False), (1000, False), (970.1, False), (969.9, True)]
)
def test_three_per_cent_of_the_sdpa_cases_is_a_moved_machine(sdpa_us, moved):
    result = compare_timings([at(1000, method="packed_sdpa")], [at(sdpa_us, method="packed_sdpa")])
    assert result.moved == moved
    assert ("environment shift" in result.text()) == moved


def test_triton_alone_says_nothing_of_the_machine():
    result = compare_timings([at(1000)], [at(2000)])
    assert result.sdpa_ratio is None
    assert not result.moved


def test_the_machine_has_moved_by_the_median_of_every_sdpa_method():
    us = {"packed_sdpa": 102, "packed_sdpa_compiled": 120, "sdpa_core": 105}
    result = compare_timings([at(100, method=m) for m in us], [at(new, method=m) for m, new in us.items()])
    assert result.sdpa_ratio == 1.05


def test_a_moved_machine_scales_the_whole_timing_by_the_partners_change():
    partners = [at(100, method="packed_sdpa")], [at(200, method="packed_sdpa")]
    for new, expected in (
        (at(23, q1=22.1), {"regressions": 1}),  # 11.5 on the old machine, its first quartile at 11.05
        (at(23, q1=22), {"suspects": 1}),
        (at(22.2, q1=22.1, low=22, high=22.5), {"regressions": 1}),
        (at(22.2, q1=22.1, low=21, high=24.3), {"suspects": 1}),  # 1.65 wide on the old machine
        (at(18, q3=19), {"improvements": 1}),
    ):
        result = compare_timings([*partners[0], at(10, q3=11, low=10, high=10)], [*partners[1], new])
        assert verdict(result) == expected, new
    (change,) = result.improvements
    assert (change.old_us, change.new_us, change.speedups) == (10, 18, (10, 200 / 18))
    assert change.change == pytest.approx(-0.1)


@pytest.mark.parametrize("others", (["packed_sdpa"], ["packed_sdpa_compiled"], ["packed_sdpa", "packed_sdpa_compiled"]))
def test_the_speed_up_is_over_plain_sdpa_or_else_over_compiled_sdpa(others):
    old = [at(100 + at_, method=method) for at_, method in enumerate(others)]
    new = [at(200 + at_, method=method) for at_, method in enumerate(others)]
    result = compare_timings([*old, at(8)], [*new, at(30)])
    (change,) = [change for change in result.regressions if change.method == "triton"]
    assert change.speedups == (12.5, pytest.approx(20 / 3))
    assert set(rule.to_measure_again(result)) >= {(CASE, "triton"), (CASE, others[0])}


def test_a_partner_counts_only_if_both_runs_have_it():
    one, other = at(100, method="packed_sdpa"), at(100, method="packed_sdpa_compiled")
    moved = [at(100, case="b", method="sdpa_core")], [at(110, case="b", method="sdpa_core")]
    result = compare_timings([*moved[0], one, at(10)], [*moved[1], other, at(11)])
    assert result.moved
    assert verdict(result) == {}
    result = compare_timings([*moved[0], one, at(10)], [*moved[1], other, at(12)])
    assert [change.speedups for change in result.regressions] == [None]
    assert rule.to_measure_again(result) == [(CASE, "triton")]


def test_the_worst_stands_first_and_the_best_too():
    slower = {"a": 120, "b": 150, "c": 130}
    old = [at(100, case=case, call_us=100) for case in slower]
    new = [at(us, case=case, call_us=us) for case, us in slower.items()]
    worse, better = compare_timings(old, new), compare_timings(new, old)
    assert [change.case for change in worse.regressions] == ["b", "c", "a"]
    assert [change.case for change in worse.warnings] == ["b", "c", "a"]
    assert [change.case for change in better.improvements] == ["b", "c", "a"]
    noisy = compare_timings(old, [dataclasses.replace(timing, q1_us=90) for timing in new])
    assert [change.case for change in noisy.suspects] == ["b", "c", "a"]
    assert rule.to_measure_again(worse) == [("b", "triton"), ("c", "triton"), ("a", "triton")]
    fresh = {(case, "triton"): at(us, case=case) for case, us in (("a", 140), ("b", 115))}
    again = rule.confirm(worse, fresh)
    assert [(change.case, change.note) for change in again.regressions] == [
        ("a", ""),
        ("c", "not measured again"),
        ("b", ""),
    ]
    assert [(change.new_us, change.again_us) for change in again.regressions] == [(120, 140), (130, None), (150, 115)]
    cleared = rule.confirm(worse, {(case, "triton"): at(us, case=case) for case, us in (("a", 109), ("b", 90))})
    assert [(change.case, change.again_us) for change in cleared.cleared] == [("a", 109), ("b", 90)]
    assert [change.case for change in cleared.regressions] == ["c"]


# ---- What is printed


def lines_of(text, title):
    """Return the indented lines under a title."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(title)) + 1
    return list(itertools.takewhile(lambda line: line.startswith("  "), lines[start:]))


@pytest.mark.parametrize(
    ("title", "old", "new", "counts"),
    [
        ("REGRESSIONS", {"us": 20}, {"us": 30}, "; rows {}"),
        ("SUSPECT", {"us": 20}, {"us": 30, "q1": 10}, "; rows {}"),
        ("improvements", {"us": 20}, {"us": 10}, ""),
        ("new, not judged", None, {"us": 20}, ""),
    ],
)
def test_long_lists_are_cut_and_say_by_how_much(title, old, new, counts):
    for cases in (10, 300):
        either = [[at(**us, case=f"rows-{number:03}") for number in range(cases) if us] for us in (old, new)]
        text = compare_timings(*either).text()
        assert f"{title} ({cases})" in text
        listed = lines_of(text, title)
        assert all(line.startswith("  rows-") for line in listed[:10])
        assert listed[10:] == ([] if cases == 10 else [f"  ... and {cases - 10} more{counts.format(cases)}"])


def test_a_long_list_of_missing_cases_is_cut_too():
    asked = frozenset((f"rows-{number:03}", "triton") for number in range(300))
    new = dataclasses.replace(as_run([entry("rows-000", "triton", 9)]), asked=asked)
    text = rule.compare(new, new).text()
    assert "MISSING: asked for and not measured (299)" in text
    assert lines_of(text, "MISSING")[10:] == ["  ... and 289 more"]


def test_twelve_per_cent_everywhere_is_a_line_per_family_and_ten_cases():
    old = [at(20 + number / 100, case=f"{family}-{number}") for family in ("rows", "decode") for number in range(400)]
    new = [at(timing.median_us * 1.12, case=timing.case) for timing in old]
    text = compare_timings(old, new).text()
    assert "  rows     op 1.120x [1.120, 1.120] of 400\n  decode   op 1.120x [1.120, 1.120] of 400\n" in text
    assert "REGRESSIONS (800)" in text and "  ... and 790 more; rows 400, decode 400" in text
    assert len(text.splitlines()) < 20


def test_noise_is_counted_and_not_listed(monkeypatch, tmp_path):
    use_noise(monkeypatch, tmp_path, {"same": [[None, 0.5, 0.5, 0, 1]]})
    result = compare_timings([at(20), at(20, case="b")], [at(25), at(20, case="b")])
    assert verdict(result) == {"noise": 1} and result.exit_code == 0
    assert CASE not in result.text()
    assert "noise (1): slower by more than 10 %, and by no more than runs of one commit differ" in result.text()


def test_warnings_are_a_line_per_kind_with_the_worst():
    old = [at(20, case=case, call_us=10, graph_us=10) for case in "abc"]
    new = [at(20, case=case, call_us=us, graph_us=us) for case, us in zip("abc", (20, 30, 9), strict=True)]
    lines = [line for line in compare_timings(old, new).text().splitlines() if line.startswith("warning")]
    assert lines == [
        f"warning: {kind} time rose in 2 cases, worst b triton  10.00 us -> 30.00 us  +200.0 %  {kind} time"
        for kind in ("call", "graph")
    ]


def test_more_than_ten_cleared_alerts_are_cut():
    old, new = ([at(us, case=f"case{number}") for number in range(12)] for us in (10, 20))
    cleared = rule.confirm(compare_timings(old, new), {timing.key: timing for timing in old})
    assert lines_of(cleared.text(), "measured again, not slower")[9:] == [
        "  case9 triton  10.00 us -> 20.00 us  again 10.00 us  +0.0 %",
        "  ... and 2 more",
    ]


def test_counts_and_faults_are_summed_up():
    old = [at(10, case=case) for case in "abcd"]
    new = [at(20, case="a"), at(20, case="b"), at(12, q1=9, case="c"), at(10, case="e")]
    asked = [(case, "triton") for case in "abcdef"]
    text = compare_timings(old, new, asked=asked).text()
    assert "3 timings compared, 1 new, 2 missing" in text
    assert text.endswith("verdict: FAIL, 2 slower, 2 missing, 1 suspect")
    assert compare_timings(old, [], asked=asked).text().endswith("verdict: FAIL, no case in common, 6 missing")
    only = compare_timings(old, new[2:])
    assert only.exit_code == 3 and only.text().endswith("verdict: SUSPECT, 1 suspect: to be measured again")
    text = compare_timings(old, old).text()
    assert text.endswith("verdict: pass, nothing got slower")
    sections = ("REGRESSIONS", "SUSPECT", "MISSING", "improvements", "again", "noise", "warning", "new, not judged")
    for absent in (*sections, "note", "environment"):
        assert absent not in text


def test_the_head_names_both_runs_and_their_dates():
    old = as_run([entry("a", "triton", 9)], datetime="2026-01-02T03:04:05+00:00")
    text = rule.compare(old, as_run([entry("a", "triton", 9)])).text()
    assert text.splitlines()[0] == "nsa_sel: a run (2026-01-02T03:04) -> a run"


def test_a_run_from_before_an_sdpa_form_was_timed_can_still_be_compared():
    old = [at(10), at(30, method="packed_sdpa")]
    later = compare_timings(old, [*old, at(20, method="packed_sdpa_fused")])
    assert (later.exit_code, later.compared, later.new_cases) == (0, 1, ())


def test_runs_that_are_no_good_baseline_are_named():
    whole = as_run([entry("a", "triton", 9)])
    cut = dataclasses.replace(whole, name="cut short", interrupted=True)
    slow = dataclasses.replace(whole, name="slow", regressions=("a triton", "b triton"))
    for old, new in ((cut, whole), (whole, cut)):
        assert "note: cut short was cut short and lacks cases" in rule.compare(old, new).text()
    assert rule.compare(cut, cut).text().count("and lacks cases") == 2
    assert "saved with 2 confirmed regressions" in rule.compare(slow, whole).text()
    assert "confirmed" not in rule.compare(whole, slow).text()


def test_only_what_differs_between_the_machines_is_named():
    text = compare_one(100.0, 100.0, new={"driver": "590.1", "torch": "2.10.0"}).text()
    changed = [line for line in text.splitlines() if line.startswith("environment changed")]
    assert changed == ["environment changed: driver 580.1 -> 590.1", "environment changed: torch 2.11.0 -> 2.10.0"]
    other_gpu = compare_one(100.0, 100.0, new={"gpu": "NVIDIA L4"}).text()
    assert "environment changed" not in other_gpu
    assert "FAIL, different GPU" in other_gpu


def test_another_gpu_is_said_rather_than_a_moved_machine():
    gpus = {"NVIDIA H200": 10, "NVIDIA L4": 20}
    old, new = (as_run([entry("a", "packed_sdpa", us, gpu=gpu)]) for gpu, us in gpus.items())
    text = rule.compare(old, new).text()
    assert "DIFFERENT GPU: NVIDIA H200 -> NVIDIA L4" in text
    assert "environment shift" not in text


def test_results_cannot_be_changed():
    result = compare_one(100.0, 115.0)
    for held in (result, result.regressions[0]):
        with pytest.raises(dataclasses.FrozenInstanceError):
            held.old = held.case = None


# ---- On the whole


def test_medians_decide_and_means_do_not():
    assert verdict(compare_one(100.0, 100.0, new={"mean": 150e-6})) == {}
    assert verdict(compare_one(100.0, 120.0, new={"mean": 100e-6})) == {"regressions": 1}
    assert verdict(compare_one(100.0, 120.0, old={"mean": 130e-6})) == {"regressions": 1}


def test_what_was_asked_for_and_not_measured_is_missing():
    old = as_run([entry("a", "triton", 9), entry("b", "triton", 9)])
    part = as_run([entry("a", "triton", 9)])
    asked = frozenset(old.timings)
    gone = rule.compare(old, dataclasses.replace(part, asked=asked))
    assert (gone.missing, gone.exit_code) == ((("b", "triton"),), 1)
    assert "  b triton" in gone.text() and "FAIL, 1 missing" in gone.text()
    excused = rule.compare(old, dataclasses.replace(part, asked=asked, skipped=frozenset({("b", "triton")})))
    assert (excused.missing, excused.exit_code) == ((), 0)
    added = rule.compare(part, old)
    assert (added.new_cases, added.missing, added.exit_code) == ((("b", "triton"),), (), 0)
    assert "  b triton" in added.text()


def test_a_run_that_was_asked_for_a_part_is_compared_on_that_part():
    old = as_run([entry("a", "triton", 9), entry("b", "triton", 9), entry("c", "triton", 9)])
    part = dataclasses.replace(as_run([entry("a", "triton", 12)]), asked=frozenset({("a", "triton")}))
    result = rule.compare(old, part)
    assert (result.compared, result.missing, len(result.regressions)) == (1, (), 1)
    assert "a part: the new run has 1 of the old run's 3 cases" in result.text()
    assert "a part" not in rule.compare(part, old).text()


def test_a_run_that_says_nothing_of_what_it_was_asked_for_is_whole_if_it_has_every_case():
    old = as_run([entry("a", "triton", 9), entry("a", "triton_core", 9), entry("b", "triton", 9)])
    lacks_a_method = rule.compare(old, as_run([entry("a", "triton", 9), entry("b", "triton", 9)]))
    assert (lacks_a_method.missing, lacks_a_method.exit_code) == ((("a", "triton_core"),), 1)
    lacks_a_case = rule.compare(old, as_run([entry("a", "triton", 9)]))
    assert (lacks_a_case.missing, lacks_a_case.exit_code, lacks_a_case.part) == ((), 0, (1, 2))
    others_too = rule.compare(old, as_run([entry(case, "triton", 9) for case in "acd"]))
    assert (others_too.missing, others_too.exit_code, others_too.part) == ((), 0, (1, 2))


@pytest.mark.parametrize("method", [*sorted(EVERY_SDPA_FORM), "dense", "flex_attention"])
def test_sdpa_and_peers_are_never_slower_faster_or_missing(method):
    old = as_run([entry("a", "triton", 9), entry("a", method, 9), entry("b", "triton", 9), entry("b", method, 9)])
    for us in (4, 90):
        new = as_run([entry("a", "triton", 9), entry("b", "triton", 9), entry("b", method, us, call_us=900)])
        result = rule.compare(old, new)
        if not result.moved:
            assert (verdict(result), result.missing, result.warnings, result.compared) == ({}, (), (), 2)
        assert not {change.method for change in (*result.regressions, *result.improvements)} & {method}
    assert rule.compare(as_run([entry("a", method, 9)]), as_run([entry("a", method, 9)])).exit_code == 1


def test_without_a_gpu_there_is_no_verdict():
    result = compare_one(100.0, 150.0, {"gpu": None}, {"gpu": None})
    assert result.exit_code == 0 and verdict(result) == {}
    assert result.text().endswith("verdict: references only: no verdict")
    assert compare_one(100.0, 150.0, {"gpu": None}).exit_code == 1  # with and without: another GPU


def test_no_case_in_common_is_no_pass():
    result = rule.compare(as_run([entry("a", "triton", 9)]), as_run([entry("b", "triton", 9)]))
    assert result.exit_code == 1 and "no case in common" in result.text()


def test_another_gpu_is_never_a_pass_and_is_not_judged():
    result = compare_one(100.0, 150.0, new={"gpu": "NVIDIA GeForce RTX 4090"})
    assert result.exit_code == 1 and verdict(result) == {}
    assert "NVIDIA H200 -> NVIDIA GeForce RTX 4090" in result.text()
    assert compare_one(100.0, 100.0, new={"gpu": "NVIDIA GeForce RTX 4090"}).exit_code == 1


@pytest.mark.parametrize("field", ["driver", "torch", "triton"])
def test_other_versions_are_said_and_do_not_excuse(field):
    result = compare_one(100.0, 115.0, new={field: "other"})
    assert f"environment changed: {field}" in result.text() and result.exit_code == 1
    assert compare_one(100.0, 100.0, new={field: "other"}).exit_code == 0


def sdpa_and_triton(sdpa_us, triton_us):
    entries = [entry(case, "packed_sdpa", sdpa_us) for case in "abc"]
    return as_run([*entries, entry("a", "triton", triton_us), entry("alone", "triton", triton_us)])


def test_moved_machine_judges_triton_by_its_speed_up():
    old = sdpa_and_triton(200, 100)
    slow_machine = rule.compare(old, sdpa_and_triton(216, 112))  # SDPA 1.08x, Triton 1.12x: speed-up 1.037 worse
    assert slow_machine.moved and "1.080x" in slow_machine.text()
    assert [change.case for change in slow_machine.regressions] == ["alone"]  # no partner: by its time
    hidden = rule.compare(old, sdpa_and_triton(190, 106))  # Triton is 6 % slower on a machine 5 % faster
    (found,) = hidden.regressions
    assert (found.case, found.method) == ("a", "triton") and found.change == pytest.approx(0.1158, abs=1e-3)
    assert "speed-up 2.00x -> 1.79x" in hidden.text() and "106.00 us" in hidden.text()
    still = rule.compare(old, sdpa_and_triton(205, 112))  # 2.5 % is no move
    assert not still.moved and len(still.regressions) == 2


def test_one_changed_sdpa_case_is_no_moved_machine():
    old = as_run([entry(case, "packed_sdpa", 100) for case in "abc"])
    new = as_run([entry(case, "packed_sdpa", us) for case, us in (("a", 100), ("b", 200), ("c", 100))])
    assert not rule.compare(old, new).moved


def test_core_scope_has_its_own_partner():
    old = as_run([entry("a", "sdpa_core", 50), entry("a", "packed_sdpa", 50), entry("a", "triton_core", 20)])
    new = as_run([entry("a", "sdpa_core", 54), entry("a", "packed_sdpa", 50.1), entry("a", "triton_core", 22.2)])
    assert rule.compare(old, new).moved
    assert rule.compare(old, new).exit_code == 0


def test_a_kernel_that_is_as_much_slower_as_sdpa_passes_on_a_moved_machine():
    result = rule.compare(sdpa_and_triton(200, 100), sdpa_and_triton(240, 120))
    assert [(change.case, change.method) for change in result.regressions] == [("alone", "triton")]


def test_call_and_graph_time_only_warn():
    old = {"call_us": 30.0, "graph_us": 10.0}
    result = compare_one(100, 100, old=old, new={"call_us": 34.0, "graph_us": 11.9})
    assert result.exit_code == 0 and [change.note for change in result.warnings] == ["call time"]
    assert "warning: call time rose in 1 cases" in result.text() and "30.00 us -> 34.00 us" in result.text()
    assert compare_one(100, 100, old=old, new={"call_us": 32.9, "graph_us": 12.1}).warnings[0].note == "graph time"


def fresh(us, case="a", method="triton"):
    made = entry(case, method, us)
    return {(case, method): runs.timing(case, method, made["stats"], made["extra_info"], "again")}


def test_measuring_again_clears_or_confirms():
    alerted = rule.compare(as_run([entry("a", "triton", 100)]), as_run([entry("a", "triton", 120)]))
    assert rule.to_measure_again(alerted) == [("a", "triton")]
    cleared = rule.confirm(alerted, fresh(104))
    assert cleared.exit_code == 0 and cleared.cleared and "again 104.00 us" in cleared.text()
    confirmed = rule.confirm(alerted, fresh(118))
    assert confirmed.exit_code == 1 and "100.00 us -> 120.00 us" in confirmed.text()
    assert "again 118.00 us" in confirmed.text() and "+18.0 %" in confirmed.text()
    assert rule.confirm(alerted, {}).exit_code == 1


def test_measuring_again_on_a_moved_machine_takes_the_partner_along():
    alerted = rule.compare(sdpa_and_triton(200, 100), sdpa_and_triton(190, 106))
    assert rule.to_measure_again(alerted) == [("a", "triton"), ("a", "packed_sdpa")]
    again = {**fresh(106), **fresh(205, method="packed_sdpa")}
    assert rule.confirm(alerted, again).exit_code == 0


def test_names_from_a_file_cannot_drive_the_terminal():
    evil = "a\x1b[2J\nverdict: pass"
    text = rule.compare(as_run([entry(evil, "triton", 100)]), as_run([entry(evil, "triton", 150)])).text()
    assert "\x1b" not in text and "a\\x1b[2J\\nverdict: pass triton" in text


DAMAGED = {
    "empty": ("", "empty"),
    "truncated": ('{"benchmarks": [', "damaged or truncated"),
    "binary": (b"\xff\xfe\x00", "damaged or truncated"),
    "a list": ("[1]", "no list of benchmarks"),
    "deep": ("[" * 100_000, "damaged or truncated"),
    "no benchmarks": ('{"machine_info": {}}', "no list of benchmarks"),
    "not entries": ('{"benchmarks": [3]}', "not a saved pytest-benchmark run"),
    "another suite": ('{"benchmarks": [{"extra_info": {}, "stats": {}}]}', "no benchmark of this suite"),
    "no case name": ('{"benchmarks": [{"extra_info": {"case": 3}, "stats": {}}]}', "case is 3"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_unreadable_run_is_one_line_and_exit_2(kind, tmp_path, capsys):
    content, said = DAMAGED[kind]
    bad, good = tmp_path / "bad.json", save_entries(tmp_path, "good", [entry("a", "triton", 9)])
    bad.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert compare_command.main([str(good), str(bad)]) == 2
    error = capsys.readouterr().err
    assert "bad.json" in error and said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([entry("a", "triton", 9), entry("a", "triton", 8)], "stands twice"),
        ([entry("a", "triton", 9), entry("b", "triton", 8, gpu="NVIDIA L4")], "mixes the GPUs"),
        ([entry("a", "triton", 9, median=float("nan"))], "median is nan"),
        ([entry("a", "triton", 9, median=0)], "median is 0"),
        ([entry("a", "triton", 9, median=-1)], "median is -1"),
        ([entry("a", "triton", 9, median=10**400)], "median is an integer of 30 digits or more"),
        ([entry("a", "triton", 9, median=float("inf"))], "median is inf"),
        ([entry("a", "triton", 9, median=1e300)], "median is 1e+300"),
        ([entry("a", "triton", 9, median=1e-300)], "median is 1e-300"),
        ([entry("a", "triton", 9, median=True)], "median is True"),
        ([entry("a", "triton", 9, q1=None)], "q1 is None"),
        ([entry("a", "triton", 9, q3=[9] * 1000)], "q3 is [9, 9, "),
        ([entry("a", "triton", 9, ci95_us=[9])], "ci95_us is [9]"),
        ([entry("a", "triton", 9, ci95_us=[8, float("nan")])], "ci95_us is nan"),
        ([entry("a", "triton", 9, graph_us=10**400)], "graph_us is an integer"),
        ([entry("a", "triton", 9, ci95_us=None)], "ci95_us is None"),
        ([entry("a", "triton", 9, call_us="fast")], "call_us is 'fast'"),
    ],
)
def test_wrong_entries_are_named(entries, said, tmp_path, capsys):
    good, bad = save_entries(tmp_path, "good", [entry("a", "triton", 9)]), save_entries(tmp_path, "bad", entries)
    assert compare_command.main([str(good), str(bad)]) == 2
    error = capsys.readouterr().err
    assert "bad.json" in error and said in error and error.count("\n") == 1


def test_benchmarks_of_other_suites_are_left_out():
    other = {"extra_info": {}, "stats": {"median": 1.0}}
    assert list(as_run([entry("a", "triton", 9), other]).timings) == [("a", "triton")]


@pytest.mark.parametrize("tick", [float("inf"), float("nan"), -5, 1e6, 10**400, "1", [1], True])
def test_a_tick_of_no_use_is_refused_and_does_not_hide_a_regression(tick, tmp_path, capsys):
    good = save_entries(tmp_path, "good", [entry("a", "triton", 100)])
    machine = {"calibration": {"tick_us": tick}}
    bad = save_entries(tmp_path, "bad", [entry("a", "triton", 200)], machine_info=machine)
    for runs_ in ((good, bad), (bad, good)):
        assert compare_command.main(list(map(str, runs_))) == 2
        error = capsys.readouterr().err
        assert "bad.json: the calibration's tick_us is" in error and error.count("\n") == 1


@pytest.mark.parametrize("tick", [0, 0.032, 100])
def test_a_tick_that_a_timer_can_have_is_read(tick):
    assert as_run([entry("a", "triton", 9)], machine_info={"calibration": {"tick_us": tick}}).tick_us == tick


def test_a_byte_order_mark_is_no_damage(tmp_path):
    path = save_entries(tmp_path, "marked", [entry("a", "triton", 9)])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert compare_command.main([str(path), str(path)]) == 0


ABSURD = [None, True, -1, 0, 10**400, 1e400, float("nan"), "", "x" * 5000, "\0\x1b[2J", [], {}, [[]], {"a": [1]}]


def places(value, path=()):
    """Yield the path to every value of a document."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


def test_whatever_stands_anywhere_in_a_run_is_judged_or_refused_in_one_line(tmp_path, capsys):
    calibration = {"tick_us": 0.03, "null_kernel_us": {"device": 2.0}, "read_limit_us": [[1e6, 3.0], [1e8, 30.0]]}
    entries = [entry("rows-a", "triton", 9, call_us=9, graph_us=9, bytes=1e6), entry("rows-a", "sdpa_core", 9)]
    mark = {"asked": [["rows-a", "triton"]], "regressions": ["z"]}
    mark |= {"not_timed": [{"case": "rows-b", "method": "triton", "reason": "no memory"}]}
    data = document(entries, machine={"calibration": calibration, "gpu": "NVIDIA H200"}, nsa_sel=mark)
    good, bad = save(data, tmp_path / "good.json"), tmp_path / "bad.json"
    ends = set()
    for *path, last in places(data):
        for value in ABSURD:
            changed = copy.deepcopy(data)
            inner = changed
            for key in path:
                inner = inner[key]
            inner[last] = value
            bad.write_text(json.dumps(changed))
            for order in ((good, bad), (bad, good)):
                code = compare_command.main(list(map(str, order)))
                captured = capsys.readouterr()
                assert code in (0, 1, 2, 3) and "\x1b" not in captured.out + captured.err
                assert captured.err.count("\n") == (code == 2) and len(captured.err) < 700, (path, last, value)
                ends.add(code)
    assert ends >= {0, 1, 2}
