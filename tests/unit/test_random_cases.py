"""Random cases: what a seed means, what is drawn, which commands take them, and how their results are summed up."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import saved_runs
import torch

import nsa_sel
from nsa_sel import spans
from nsa_sel.bench.compare.rule import compare
from nsa_sel.bench.continuous import command as continuous_command
from nsa_sel.bench.continuous import worker
from nsa_sel.bench.report import command as report_command
from nsa_sel.bench.report import screen, spread
from nsa_sel.bench.saved import run as runs
from nsa_sel.bench.saved.speedups import scope
from nsa_sel.bench.suite import cases, random_cases
from nsa_sel.bench.suite.distributions import law_of
from nsa_sel.bench.suite.inputs import make_ranges
from nsa_sel.bench.suite.random_cases import RANDOM, SMALL, WHOLE, draw
from nsa_sel.bench.suite.saved_cases import definitions, rebuilt
from nsa_sel.bench.threshold import command as threshold_command
from nsa_sel.bench.tune import command as tune_command
from nsa_sel.kernel.launch_config import MAX_WIDTH
from tests.programs import needs_interpreter, python

ROOT = Path(nsa_sel.__file__).parents[2]
FIRST = draw(1, 1000)


# --- what a seed means ---


def test_a_seed_means_the_same_cases_for_ever():
    assert [case.id for case in FIRST[:4]] == [
        "random-bf16-H34-D128-Dv128-L1184-N10528-block32-random-S1504-G1",
        "random-bf16-H6-D112-Dv32-L131-N6294-equal98-S2-G1-t262",
        "random-bf16-H5-D16-Dv16-L96-N1152-block32-local-S288-G2",
        "random-bf16-H31-D96-Dv32-L201-N5232-mixed1-S1-G8-t201",
    ]


def test_fewer_cases_are_the_first_of_more_and_every_dtype_has_the_same():
    assert draw(1, 10) == FIRST[:10]
    assert [case.id.replace("fp16", "bf16") for case in draw(1, 10, "fp16")] == [case.id for case in FIRST[:10]]
    assert not {case.id for case in draw(2, 100)} & {case.id for case in FIRST}


def test_cases_have_ids_of_their_own_and_can_be_rebuilt_from_a_saved_run():
    assert len({case.id for case in FIRST}) == len(FIRST)
    assert list(rebuilt(json.loads(json.dumps(definitions(FIRST)))).values()) == FIRST


def test_the_sizes_reach_over_the_whole_supported_range_and_not_beyond():
    reached = {"H": (1, 64), "D": (16, MAX_WIDTH), "Dv": (16, MAX_WIDTH), "N": (1, WHOLE.rows), "longest": (1, 8192)}
    for name, (least, most) in reached.items():
        found = {getattr(case, name) for case in FIRST}
        assert min(found) == least and 0.8 * most < max(found) <= most, name
    assert {case.S for case in FIRST if not case.block} == set(range(1, 9))
    assert all(case.D % 16 == case.Dv % 16 == 0 for case in FIRST)
    n_spans = [case.n_spans for case in FIRST]
    assert min(n_spans) == 1 and 200 < max(n_spans) <= 256
    assert {law_of(case.layout) for case in FIRST} == {"equal", "mixed", "ragged", "random", "local"}
    share = sum(case.S == 1 for case in FIRST) / len(FIRST)
    assert 0.4 < share < 0.65 and sum(case.block > 0 for case in FIRST) > 100


@pytest.mark.parametrize("name", ["N", "L", "H"])
def test_sizes_are_drawn_by_their_logarithm(name):
    found = sorted(math.log(getattr(case, name)) for case in FIRST if not case.block)  # a sequence has many rows
    assert 0.4 < found[len(found) // 2] / found[-1] < 0.6


def test_packed_rows_and_caches_take_no_more_than_8_gb():
    sizes = [(case.D + case.Dv) * 2 * max(case.N * case.longest, case.B * case.G * case.S_kv) for case in FIRST]
    assert 4e9 < max(sizes) <= 8e9


def test_small_cases_are_what_the_interpreter_can_compute():
    for case in draw(3, 300, within=SMALL):
        assert case.N * case.longest <= 2**13 and case.n_spans <= 256, case.id


@pytest.mark.parametrize("case", draw(5, 60, within=SMALL), ids=lambda case: case.id)
def test_rows_select_distinct_tokens_of_their_context_in_as_many_spans(case):
    ranges = make_ranges(case)
    lengths = spans.lengths(ranges, case.S_kv).flatten().tolist()
    assert ranges.shape == (case.B, case.S, case.G, case.n_spans, 2)
    for row in ranges.reshape(case.N, -1, 2).tolist():
        chosen = [token for start, end in row for token in range(start, end)]
        assert chosen == sorted(set(chosen)) and 0 <= chosen[0] <= chosen[-1] < case.S_kv
    assert max(lengths) == case.longest
    law = law_of(case.layout)
    if law in ("equal", "mixed"):
        assert set(lengths) == {case.L}
    if law == "equal":
        sizes = (ranges[..., 1] - ranges[..., 0]).flatten()
        assert sizes.max() - sizes.min() <= 1
    if law == "ragged":
        assert min(lengths) < case.L < max(lengths)


# --- who takes them ---


def pytest_run(*arguments) -> CompletedProcess:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    return python("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, env=env)


def test_a_perf_run_says_and_saves_its_seed_and_count(tmp_path):
    path = tmp_path / "run.json"
    done = pytest_run("tests/perf", "--sel-matrix=random", "--sel-count=4", f"--benchmark-json={path}")
    assert done.returncode == 0 and "random cases: --sel-matrix random --sel-seed 1 --sel-count 4" in done.stdout
    run = runs.load(path)
    assert run.random == {"seed": 1, "count": 4}
    expected = draw(1, 4, within=SMALL)
    assert list(rebuilt(run.cases).values()) == expected
    extras = {e["extra_info"]["case"]: e["extra_info"] for e in json.loads(path.read_text())["benchmarks"]}
    assert [(extras[case.id]["n_spans"], extras[case.id]["S"]) for case in expected] == [
        (case.n_spans, case.S) for case in expected
    ]
    assert report_command.main([str(path), "--out", str(tmp_path / "report")]) == 0
    assert "| triton | random | equal | " in (tmp_path / "report/results.md").read_text()


@needs_interpreter
def test_parity_judges_them_by_the_gate():
    done = pytest_run("tests/parity", "--sel-matrix=random", "--sel-seed=7", "--sel-count=3", "-k", "own_case")
    assert "3 passed" in done.stdout, done.stdout + done.stderr
    assert "3 comparisons with Triton's interpreter" in done.stdout
    assert "--sel-seed 7 --sel-count 3" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--sel-seed 3", "--sel-seed: is said of --sel-matrix random, and of no other"),
        ("--sel-matrix hot --sel-count 3", "--sel-count: is said of --sel-matrix random, and of no other"),
        ("--sel-matrix random --sel-count 0", "--sel-count: value is 0, expected at least 1"),
        ("--sel-matrix random --sel-family rows", "--sel-family: is no choice within the matrix random"),
        ("--sel-cases x.yaml --sel-seed 3", "--sel-cases: stands in place of --sel-seed; give one of them"),
    ],
)
def test_options_that_do_not_go_together_end_pytest_in_one_line(arguments, message):
    done = pytest_run("tests/perf", *arguments.split())
    assert done.returncode == 4
    assert done.stderr.strip().startswith(f"ERROR: {message}") and "\n" not in done.stderr.strip()


def test_on_a_gpu_the_whole_range_is_drawn_whatever_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert random_cases.of_matrix(RANDOM, seed=1, count=5) == draw(1, 5, within=SMALL)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert random_cases.of_matrix(RANDOM, seed=1, count=5) == FIRST[:5]
    assert len(random_cases.of_matrix(RANDOM)) == 300


@pytest.mark.parametrize("here", [SMALL, WHOLE])
def test_tune_takes_them(here, monkeypatch):
    monkeypatch.setattr(random_cases, "here", lambda: here)
    args = ["--sel-matrix", "random", "--sel-seed", "1", "--sel-count", "9", "-k", "S1-"]
    chosen = tune_command.select(tune_command.main_parser().parse_args(args))
    assert chosen == [case for case in draw(1, 9, within=here) if case.S == 1]


@pytest.mark.parametrize("here", [SMALL, WHOLE])
def test_continuous_takes_them(here, monkeypatch, capsys):
    monkeypatch.setattr(random_cases, "here", lambda: here)
    asked = ["--base-dir", "a", "--head-dir", "b", "--sel-matrix", "random", "--sel-count", "9"]
    args = continuous_command.main_parser().parse_args(asked)
    assert (args.sel_matrix, args.sel_seed, args.sel_count) == ("random", None, 9)
    assert worker.choose("random", "bf16", None, ["equal"], seed=1, count=9) == [
        case for case in draw(1, 9, within=here) if "equal" in case.layout
    ]
    with pytest.raises(SystemExit):
        continuous_command.main([*asked[:4], "--sel-seed", "3"])
    assert "--sel-seed: is said of --sel-matrix random" in capsys.readouterr().err


# --- what is said of them ---


def random_run(tmp_path: Path, seed: int = 1, count: int = 6) -> runs.Run:
    made = saved_runs.run(draw(seed, count))
    return runs.load(
        saved_runs.save({**made, runs.MARK: {"random": {"seed": seed, "count": count}}}, tmp_path / f"{seed}.json")
    )


def test_a_comparison_says_that_the_random_cases_are_others(tmp_path):
    first, second = random_run(tmp_path, 1), random_run(tmp_path, 2)
    text = compare(first, second).text()
    assert "note: other random cases: seed 1, count 6 -> seed 2, count 6" in text and "no case in common" in text
    assert "other random cases" not in compare(first, first).text()


def test_no_threshold_is_taken_from_them(tmp_path, capsys):
    assert threshold_command.main([random_run(tmp_path).path]) == 2
    said = capsys.readouterr().err
    assert "is of random cases, from which no threshold follows; give runs of the matrix" in said


def results(ratios: dict[str, tuple[float, float]]) -> list[dict]:
    """Return results of the first random cases, whose kernel is so many times as fast as SDPA: (core, in place)."""
    found = []
    for case, (core, in_place) in ratios.items():
        about = {name: getattr(case, name) for name in ("family", "layout", "H", "D", "Dv", "L", "N", "S", "n_spans")}
        limit = None if case.S > 1 else 100 * in_place / 3
        figures = {"gbps": 1.0, "gpu": "Testcard", "ci95_us": [1, 2], "call_us": None, "graph_us": None, "mae": 0.0}
        times = {"sdpa_core": 30.0, "triton_core": 30.0 / core, "triton": 30.0 / in_place}
        for method, us in times.items():
            more = {"case": case.id, "method": method, "scope": scope(method), "device_us": us}
            found.append({**about, **figures, **more, "pct_of_limit": limit, "sdpa_backend": "flash"})
    return found


def line_of(lines: list[str], kind: str) -> str:
    (line,) = (line for line in lines if re.match(rf"{re.escape(kind)}  ", line))
    return " ".join(line.removeprefix(kind).split())


def test_the_summary_gives_the_share_below_one_the_geomean_and_the_worst_by_kind():
    of_one = [case for case in FIRST if case.S == 1 and case.n_spans == 1 and case.H <= 16][:3]
    prefill = next(case for case in FIRST if case.block)
    measured = results(dict(zip([*of_one, prefill], [(2.0, 1.0), (0.5, 0.9), (1.0, 3.0), (4.0, 4.0)], strict=True)))
    lines = screen.screen(measured)
    assert line_of(lines, "all") == "4 25.0 % 1.41x 0.50x 25.0 % 1.81x 0.90x 46 % 30 %"
    assert line_of(lines, "S = 1") == "3 33.3 % 1.00x 0.50x 33.3 % 1.39x 0.90x 46 % 30 %"
    assert line_of(lines, "prefill") == "1 0.0 % 4.00x 4.00x 0.0 % 4.00x 4.00x - -"
    assert not [line for line in lines if line.startswith("S of 2 to 8")]
    name = of_one[1].id
    assert f"worst core: 0.50x {name}: 60.0 µs, SDPA on packed rows (flash) 30.0 µs" in lines
    assert f"worst in place: 0.90x {name}: 33.3 µs, SDPA on packed rows (flash) 30.0 µs" in lines
    assert f"farthest from the limit: 30 % {name}" in lines
    of_family = {line.split()[1]: line.split()[2] for line in lines if line.startswith("random  ")}
    assert sum(map(int, of_family.values())) == 4 and len(of_family) <= 5  # by law, not by the number of spans


def test_without_random_cases_nothing_is_added():
    case = cases.rows_case("bf16", "few", 8, 64, 64, 64, 64)
    (*measured,) = results({case: (2.0, 2.0)})
    assert spread.lines(measured) == [] and spread.table(measured, "triton") == []


def test_the_report_of_a_gpu_run_has_the_table_and_no_threshold(tmp_path):
    run = saved_runs.run(draw(1, 20))
    for entry in run["benchmarks"]:
        case = next(case for case in FIRST if case.id == entry["extra_info"]["case"])
        entry["extra_info"] |= {"S": case.S, "n_spans": case.n_spans}
    path = saved_runs.save({**run, runs.MARK: {"random": {"seed": 1, "count": 20}}}, tmp_path / "run.json")
    assert report_command.main([str(path), "--out", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report/results.md").read_text()
    assert "## Random cases" in text and "| all | 20 | 0.0 % | 1.30x | 1.30x |" in text
    assert "no threshold follows" in text and "missing" not in text
