"""The regression rule, on synthetic runs."""

import pytest
from run_files import as_run, bench, save

from nsa_sel.bench.compare import command as compare_command
from nsa_sel.bench.compare import rule
from nsa_sel.bench.saved import run as runs

CASE = "rows-bf16-H8-D128-Dv128-L512-N1024-many"


def compare_one(old_us, new_us, old=None, new=None):
    return rule.compare(
        as_run([bench(CASE, "triton", old_us, **(old or {}))]), as_run([bench(CASE, "triton", new_us, **(new or {}))])
    )


def verdict(result):
    names = ("regressions", "improvements", "noise")
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


def test_less_than_half_a_microsecond_is_noise():
    assert verdict(compare_one(3.0, 3.49)) == {"noise": 1}
    assert verdict(compare_one(3.0, 3.51)) == {"regressions": 1}
    assert compare_one(3.0, 3.49).exit_code == 0


def test_less_than_the_timers_tick_is_noise():
    old = as_run([bench(CASE, "triton", 3.0)], machine_info={"calibration": {"tick_us": 1.0}})
    assert verdict(rule.compare(old, as_run([bench(CASE, "triton", 3.9)]))) == {"noise": 1}
    assert verdict(rule.compare(old, as_run([bench(CASE, "triton", 4.1)]))) == {"regressions": 1}


def test_three_quarters_of_the_wider_interval_is_noise():
    # The slower run's interval is 2 * 0.1 * 115 = 23 us wide: 17.25 us must be passed, 15 are not enough.
    assert verdict(compare_one(100.0, 115.0, new={"ci": 0.1})) == {"noise": 1}
    assert verdict(compare_one(100.0, 115.0, old={"ci": 0.11})) == {"noise": 1}
    assert verdict(compare_one(100.0, 115.0, old={"ci": 0.08}, new={"ci": 0.08})) == {"regressions": 1}


def test_overlapping_quartiles_are_noise():
    result = compare_one(100.0, 115.0, new={"q1": 101.9e-6})
    assert verdict(result) == {"noise": 1}
    assert "quartiles overlap" in result.text()
    assert verdict(compare_one(100.0, 115.0, new={"q1": 102.1e-6})) == {"regressions": 1}


def test_medians_decide_and_means_do_not():
    assert verdict(compare_one(100.0, 100.0, new={"mean": 150e-6})) == {}
    assert verdict(compare_one(100.0, 120.0, new={"mean": 100e-6})) == {"regressions": 1}
    assert verdict(compare_one(100.0, 120.0, old={"mean": 130e-6})) == {"regressions": 1}


def test_missing_case_fails_and_new_case_is_listed():
    old, new = as_run([bench("a", "triton", 9), bench("b", "triton", 9)]), as_run([bench("a", "triton", 9)])
    gone, added = rule.compare(old, new), rule.compare(new, old)
    assert (gone.missing, gone.exit_code) == ((("b", "triton"),), 1)
    assert "  b triton" in gone.text() and "FAIL, 1 missing" in gone.text()
    assert (added.new_cases, added.missing, added.exit_code) == ((("b", "triton"),), (), 0)
    assert "  b triton" in added.text()


def test_no_case_in_common_is_no_pass():
    result = rule.compare(as_run([bench("a", "triton", 9)]), as_run([bench("b", "triton", 9)]))
    assert result.exit_code == 1 and "no case in common" in result.text()


def test_another_gpu_is_never_a_pass_and_is_not_judged():
    result = compare_one(100.0, 150.0, new={"gpu": "NVIDIA GeForce RTX 4090"})
    assert result.exit_code == 1 and verdict(result) == {}
    assert "NVIDIA H200 -> NVIDIA GeForce RTX 4090" in result.text()
    assert compare_one(100.0, 100.0, new={"gpu": "NVIDIA GeForce RTX 4090"}).exit_code == 1


@pytest.mark.parametrize("field", ["driver", "torch", "triton", "gpu_id"])
def test_other_versions_are_said_and_do_not_excuse(field):
    result = compare_one(100.0, 115.0, new={field: "other"})
    assert f"environment changed: {field}" in result.text() and result.exit_code == 1
    assert compare_one(100.0, 100.0, new={field: "other"}).exit_code == 0


def sdpa_and_triton(sdpa_us, triton_us):
    entries = [bench(case, "packed_sdpa", sdpa_us) for case in "abc"]
    return as_run([*entries, bench("a", "triton", triton_us), bench("alone", "triton", triton_us)])


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
    old = as_run([bench(case, "packed_sdpa", 100) for case in "abc"])
    new = as_run([bench(case, "packed_sdpa", us) for case, us in (("a", 100), ("b", 200), ("c", 100))])
    assert not rule.compare(old, new).moved


def test_core_scope_has_its_own_partner():
    old = as_run([bench("a", "sdpa_core", 50), bench("a", "packed_sdpa", 50), bench("a", "triton_core", 20)])
    new = as_run([bench("a", "sdpa_core", 54), bench("a", "packed_sdpa", 50.1), bench("a", "triton_core", 22.2)])
    assert rule.compare(old, new).moved
    assert rule.compare(old, new).exit_code == 0


def test_sdpa_counts_as_itself_on_a_moved_machine():
    result = rule.compare(sdpa_and_triton(200, 100), sdpa_and_triton(240, 120))
    assert [change.method for change in result.regressions].count("packed_sdpa") == 3
    assert ("a", "triton") not in [(change.case, change.method) for change in result.regressions]


def test_call_and_graph_time_only_warn():
    old = {"call_us": 30.0, "graph_us": 10.0}
    result = compare_one(100, 100, old=old, new={"call_us": 34.0, "graph_us": 11.9})
    assert result.exit_code == 0 and [change.note for change in result.warnings] == ["call time"]
    assert "30.00 us -> 34.00 us" in result.text()
    assert compare_one(100, 100, old=old, new={"call_us": 32.9, "graph_us": 12.1}).warnings[0].note == "graph time"


def fresh(us, case="a", method="triton"):
    entry = bench(case, method, us)
    return {(case, method): runs.timing(case, method, entry["stats"], entry["extra_info"], "again")}


def test_measuring_again_clears_or_confirms():
    alerted = rule.compare(as_run([bench("a", "triton", 100)]), as_run([bench("a", "triton", 120)]))
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
    text = rule.compare(as_run([bench(evil, "triton", 100)]), as_run([bench(evil, "triton", 150)])).text()
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
    bad, good = tmp_path / "bad.json", save(tmp_path, "good", [bench("a", "triton", 9)])
    bad.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert compare_command.main([str(good), str(bad)]) == 2
    error = capsys.readouterr().err
    assert "bad.json" in error and said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([bench("a", "triton", 9), bench("a", "triton", 8)], "stands twice"),
        ([bench("a", "triton", 9), bench("b", "triton", 8, gpu="NVIDIA L4")], "mixes the GPUs"),
        ([bench("a", "triton", 9, median=float("nan"))], "median is nan"),
        ([bench("a", "triton", 9, median=0)], "median is 0"),
        ([bench("a", "triton", 9, ci95_us=None)], "ci95_us is None"),
        ([bench("a", "triton", 9, call_us="fast")], "call_us is 'fast'"),
    ],
)
def test_wrong_entries_are_named(entries, said, tmp_path, capsys):
    good, bad = save(tmp_path, "good", [bench("a", "triton", 9)]), save(tmp_path, "bad", entries)
    assert compare_command.main([str(good), str(bad)]) == 2
    error = capsys.readouterr().err
    assert "bad.json" in error and said in error and error.count("\n") == 1


def test_benchmarks_of_other_suites_are_left_out():
    other = {"extra_info": {}, "stats": {"median": 1.0}}
    assert list(as_run([bench("a", "triton", 9), other]).timings) == [("a", "triton")]
