"""What is said of a run with a user's kernel: it stands beside ours everywhere, and is never an SDPA form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import saved_runs
from test_screen import result

from nsa_sel.bench.compare.rule import compare
from nsa_sel.bench.report import command as report_command
from nsa_sel.bench.report import screen, tables
from nsa_sel.bench.saved import run as runs
from nsa_sel.bench.saved.run import Saved
from nsa_sel.bench.suite import cases
from nsa_sel.bench.suite.cases import Case
from nsa_sel.bench.suite.recorded import Recorded
from nsa_sel.bench.threshold import command as threshold_command
from nsa_sel.bench.threshold import judged, rule, write
from nsa_sel.bench.threshold.judged import ThresholdError
from nsa_sel.config import SelConfig

HOT = cases.matrix("hot")
DECODE = cases.matrix("full", family="decode,prefill")


def saved(folder: Path, data: dict, name: str = "0001_run") -> Saved:
    return Saved.load(saved_runs.save(data, folder / f"{name}.json"))


# --- the screen ---


def test_the_summary_has_lines_and_worst_cases_of_each_kernel_and_none_of_it_is_an_opponent():
    case = cases.rows_case("bf16", "few", 8, 128, 128, 64, 64)
    timed = [("triton", 10.0), ("mine", 5.0), ("packed_sdpa", 40.0), ("triton_core", 8.0), ("mine_core", 4.0)]
    results = [result(case, method, us) for method, us in [*timed, ("sdpa_core", 12.0)]]
    ratios = {(s.kernel, s.scope): s.ratio for s in screen.speedups(results)}
    assert ratios == {("triton", "op"): 4, ("mine", "op"): 8, ("triton", "core"): 1.5, ("mine", "core"): 3}
    lines = screen.screen(results)
    assert lines[1].split()[:6] == ["triton", "rows", "few", "1", "4.00", "1.50"]
    assert lines[2].split()[:6] == ["mine", "rows", "few", "1", "8.00", "3.00"]
    assert "worst cases of mine" in lines and f" 8.00x op   {case.id}: 5.0 µs, packed_sdpa (flash) 40.0 µs" in lines


def test_a_kernel_alone_is_summed_up_where_it_was_timed():
    few, many = (cases.rows_case("bf16", layout, 8, 128, 128, 64, 64) for layout in ("few", "many"))
    results = [result(few, "mine", 5.0), result(few, "packed_sdpa", 10.0), result(many, "packed_sdpa", 10.0)]
    assert [line.split()[:3] for line in screen.screen(results)[1:3]] == [["mine", "rows", "few"], []]


def test_beside_peers_it_is_a_column_and_said_to_be_faster():
    def beside(method: str, us: float) -> dict:
        return {"case": "a", "method": method, "device_us": us, "family": "decode"}

    timed = [beside("triton", 10.0), beside("fla_nsa", 12.0), beside("mine", 8.0)]
    lines, notes = screen.peers(timed, {})
    assert lines[0][1:3] == ["triton", "mine"] and lines[1][2] == "8.0 (0.80x)"
    assert notes[0] == "faster than triton: mine in a, 8.0 against 10.0 µs"
    assert any(line.split()[:2] == ["mine", "decode"] for line in screen.peers_screen(timed, {}))


# --- the report ---


def test_the_report_has_a_verdict_a_line_and_a_picture_of_each_kernel(tmp_path):
    pytest.importorskip("matplotlib", reason="the report's plots need matplotlib")
    data = saved_runs.with_kernel(saved_runs.run(HOT), "mine", 0.5)
    path = saved_runs.save(data, tmp_path / "0001_run.json")
    files = {file.name: file for file in report_command.write(path, None, tmp_path / "out", SelConfig())}
    assert {"speedup.svg", "speedup-mine.svg"} <= set(files)
    page, text = files["report.html"].read_text(), files["results.md"].read_text()
    assert page.count('<p class="verdict') == 2 and "so mine stays off by default" in page
    assert "From which length on: mine" in page
    assert (
        '"kernels":["triton","triton_core","mine","mine_core"]' in page
        and '"thresholds":{"triton":null,"mine":' in page
    )
    assert "so Triton stays off" in text and "so mine stays off" in text
    assert "| mine | rows | few |" in text and "mine:f, ranges" in text
    rows = tables.table(Saved.load(path))
    op = {row["method"]: row["speedup"] for row in rows if row["case"] == HOT[0].id and row["scope"] == "op"}
    assert op["mine"] == pytest.approx(2 * op["triton"])


def test_a_run_on_the_cpu_says_once_that_it_has_no_figures(tmp_path):
    pytest.importorskip("matplotlib", reason="the report's plots need matplotlib")
    data = saved_runs.cpu_run(cases.matrix("smoke"))
    identity = {"gpu": None, "gpu_id": None, "driver": None, "torch": "2.13.0+cpu", "triton": "3.7.1"}
    for name in ("mine", "other"):
        made = saved_runs.entry_of(HOT[0], name, {"device": 1e3}, 0.05, identity)
        data["benchmarks"].append(made)
    path = saved_runs.save(data, tmp_path / "0001_run.json")
    report_command.write(path, None, tmp_path / "out", SelConfig())
    assert (tmp_path / "out/report.html").read_text().count(report_command.NO_GPU) == 1


# --- the comparison ---


def entries(us: dict[str, float], spec: str = "mine:f") -> list[dict]:
    """Return timings by method in three cases of one family."""
    found = []
    for L in (64, 128, 256):
        for method, time in us.items():
            more = {"kernel": spec, "takes": "ranges"} if method.startswith("mine") else {}
            found.append(saved_runs.entry(f"rows-bf16-H8-D128-Dv128-L{L}-N64-few", method, time, **more))
    return found


def test_a_kernel_that_got_slower_is_a_regression_and_does_not_move_the_yardstick():
    times = {"triton": 100.0, "mine": 100.0, "sdpa_core": 100.0}
    old = saved_runs.as_run(entries(times))
    found = compare(old, saved_runs.as_run(entries(times | {"mine": 150.0})))
    assert {change.method for change in found.regressions} == {"mine"} and len(found.regressions) == 3
    assert found.sdpa_ratio == 1 and found.compared == 6
    assert "\n  mine rows op 1.500x" in found.text() and "\n  rows     op 1.000x" in found.text()


def test_where_the_machine_moved_it_is_judged_by_its_speed_up():
    times = {"mine": 100.0, "mine_core": 100.0, "packed_sdpa": 300.0, "sdpa_core": 200.0}
    found = compare(
        saved_runs.as_run(entries(times)),
        saved_runs.as_run(entries({method: 1.5 * us for method, us in times.items()})),
    )
    assert found.moved and not found.regressions and not found.suspects


def test_another_kernel_of_the_same_name_and_one_that_is_gone_are_said():
    old = saved_runs.as_run(entries({"triton": 10.0, "mine": 10.0}))
    other = saved_runs.as_run(entries({"triton": 10.0, "mine": 10.0}, spec="yours:g"))
    assert (
        "note: mine is yours:g, ranges in the new run and mine:f, ranges in the old one" in compare(old, other).text()
    )
    gone = compare(old, saved_runs.as_run(entries({"triton": 10.0})))
    assert "note: mine is measured in the old run alone" in gone.text()


# --- the threshold ---


def first(fits: Callable[[Case], bool]) -> Case:
    return next(case for case in cases.matrix("full") if fits(case))


def test_a_kernel_has_a_threshold_of_its_own(tmp_path):
    def fast_from_256(case: Case, kind: str) -> float:
        return 3.0 if case.L >= 256 else 1.3

    run = saved(tmp_path, saved_runs.with_kernel(saved_runs.run(cases.matrix("full"), fast_from_256), "mine", 2.0))
    assert rule.decide([run]).min_L == 16
    decided = rule.decide([run], kernel="mine")
    assert (decided.kernel, decided.min_L) == ("mine", 256)
    assert write.sentence(decided).startswith(f"On {saved_runs.GPU}, mine is safe to switch on from L = ")
    assert set(decided.opponents) <= {"packed_sdpa", "packed_sdpa_fused", "packed_sdpa_compiled"}


def test_cases_that_its_blocks_cannot_express_are_not_expected(tmp_path):
    data = saved_runs.with_kernel(saved_runs.run(DECODE), "mine", 1.0, takes="blocks:64")
    run = saved(tmp_path, data)
    (rows,) = {t for t in rule.decide([run], kernel="mine").deciding if t.regime == "rows"}
    layouts = {v.case.rpartition("-")[2] for v in rows.verdicts}
    assert "few" in layouts and not layouts & {"many", "mixed"}
    assert min(v.L for v in rows.verdicts) == 64
    assert all("missing" in v.problem for v in rows.verdicts)


def test_blocks_that_express_no_case_are_refused(tmp_path):
    data = saved_runs.with_kernel(saved_runs.run(HOT), "mine", 1.0, takes="blocks:48")
    with pytest.raises(ThresholdError, match="^mine takes blocks:48, which expresses none of the cases$"):
        rule.decide([saved(tmp_path, data)], own=rule.Own("cases.yaml", HOT[:1]), kernel="mine")


def test_of_recorded_calls_those_are_expected_that_were_asked_for_and_no_file_is_read(tmp_path):
    inside, outside = (
        Case("recorded", "bf16", "recorded", 4, 64, 64, 128, 1, recorded=Recorded("gone.pt", digest, 2, 128))
        for digest in ("00000001", "00000002")
    )
    data = saved_runs.with_kernel(saved_runs.run([inside]), "mine", 1.0, takes="blocks:64")
    data["benchmarks"] += saved_runs.run([outside])["benchmarks"]
    decided = rule.decide([saved(tmp_path, data)], own=rule.Own("cases.yaml", [inside, outside]), kernel="mine")
    assert {v.case for t in decided.thresholds for v in t.verdicts} == {inside.id}


def test_what_it_declares_unsupported_is_not_judged_and_what_else_has_no_time_counts(tmp_path):
    case = first(lambda case: case.family == "decode" and case.D == 64)
    other = first(lambda case: case.family == "decode" and case.D == 128)
    data = saved_runs.with_kernel(saved_runs.run([case, other]), "mine", 1.0)
    data["benchmarks"] = [entry for entry in data["benchmarks"] if not entry["extra_info"]["method"].startswith("mine")]
    reasons = {case.id: "unsupported: D is 64, expected 128", other.id: "out of memory"}
    data[runs.MARK] = {
        "not_timed": [{"case": name, "method": "mine", "reason": reason} for name, reason in reasons.items()]
    }
    run = saved(tmp_path, data)
    declared, failed = rule.judge([case, other], [run], "eager", "mine")
    assert declared.not_judged == "mine: unsupported: D is 64, expected 128" and declared.declared
    assert failed.problem.startswith("mine has no time in ") and failed.problem.endswith("out of memory")
    text = write.sentence(rule.decide([run], kernel="mine"))
    assert "Not judged, because mine does not support them: 1 case." in text


def test_an_unknown_kernel_two_kernels_of_one_name_and_apply_are_refused(tmp_path, capsys):
    plain = saved_runs.run(HOT)
    run = saved(tmp_path, saved_runs.with_kernel(plain, "mine", 1.0))
    other = saved(tmp_path, saved_runs.with_kernel(plain, "mine", 1.0, spec="yours:g"), "0002_run")
    with pytest.raises(
        ThresholdError, match="--kernel: value is 'other', expected one that the runs have: triton, mine"
    ):
        rule.decide([run], kernel="other")
    with pytest.raises(ThresholdError, match=r"the runs differ in what mine is: mine:f, ranges \(.*\), yours:g"):
        rule.decide([run, other], kernel="mine")
    fast = saved_runs.with_kernel(saved_runs.run(cases.matrix("full")), "mine", 1.0)
    path = saved_runs.save(fast, tmp_path / "0003_run.json")
    assert threshold_command.main([str(path), "--kernel", "mine"]) == 0
    assert capsys.readouterr().out.startswith(f"mine on {saved_runs.GPU}")
    assert threshold_command.main([str(path), "--kernel", "mine", "--apply"]) == 2
    assert "--apply: the configuration is of this package's kernel, and not of mine" in capsys.readouterr().err


def test_a_saved_run_knows_its_kernels(tmp_path):
    run = saved(tmp_path, saved_runs.with_kernel(saved_runs.run(HOT), "mine", 1.0, takes="blocks:64"))
    assert run.run.kernels == {"mine": "mine:f, blocks:64"}
    assert judged.kernels([run]) == ["triton", "mine"]
