"""The min-L rule on runs with a known answer, and writing its decision down."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import synthetic

from nsa_sel.bench import tables
from nsa_sel.bench.saved.run import Saved
from nsa_sel.bench.suite import cases
from nsa_sel.bench.suite.cases import Case
from nsa_sel.bench.threshold import command as threshold_command
from nsa_sel.bench.threshold import rule
from nsa_sel.bench.threshold import write as write_threshold
from nsa_sel.bench.threshold.rule import Decision, ThresholdError
from nsa_sel.config import SelConfig


def thin(dtype: str = "bf16") -> list[Case]:
    """Return a sixth of the full matrix, with every family, layout, L and N of it."""
    return [c for c in cases.matrix("full", dtype) if c.D == c.Dv == 128 and (c.family != "rows" or c.hot) and c.H != 2]


FULL = thin()
DECODE = [c for c in FULL if c.family == "decode"]
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def thin_matrix(monkeypatch):
    """Expect the thin matrix, so that a test takes milliseconds."""
    thinned = {dtype: thin(dtype) for dtype in cases.DTYPES}
    monkeypatch.setattr(cases, "matrix", lambda name, dtype="bf16": thinned[dtype])


pytestmark = pytest.mark.usefixtures("thin_matrix")


def decide(tmp_path: Path, *documents: dict) -> Decision:
    paths = [synthetic.save(data, tmp_path / f"000{at}_run.json") for at, data in enumerate(documents)]
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
    decided = decide(tmp_path, synthetic.run(FULL, slow_up_to(64)))
    assert of(decided, "rows").min_L == 128
    assert decided.min_L == 128


def test_every_length_fast_gives_the_shortest_tested_length(tmp_path):
    decided = decide(tmp_path, synthetic.run(FULL))
    assert [of(decided, regime).min_L for regime in rule.REGIMES] == [16, 128, 512]
    assert decided.min_L == 16  # prefill, tested from 512 on, forbids nothing below


def test_a_hole_in_the_middle_counts(tmp_path):
    decided = decide(tmp_path, synthetic.run(FULL, lambda c, kind: 1.0 if c.family == "rows" and c.L == 256 else 3.0))
    assert decided.min_L == 512


def test_one_slow_case_among_the_longest_leaves_no_threshold(tmp_path):
    slow = first("rows", 1024)
    decided = decide(tmp_path, synthetic.run(FULL, lambda c, kind: 1.19 if c == slow else 3.0))
    assert of(decided, "rows").min_L is None
    assert decided.min_L is None
    assert of(decided, "rows").deciding.case == slow.id


def test_one_slow_case_is_named_as_the_deciding_one(tmp_path):
    slow = first("rows", 128)
    decided = decide(tmp_path, synthetic.run(FULL, lambda c, kind: 1.1 if c == slow else 3.0))
    assert decided.min_L == 256
    assert decided.deciding_threshold.deciding.case == slow.id


@pytest.mark.parametrize("ratio, expected", [(1.2, 16), (1.1999, None)])
def test_the_bound_is_1_2(tmp_path, ratio, expected):
    long_ones = {c.id for c in FULL if c.family == "rows" and c.L == 1024}
    run = synthetic.run(FULL, lambda c, kind: ratio + 1e-9 if c.id in long_ones else 3.0, half_width=0.0)
    assert of(decide(tmp_path, run), "rows").min_L == expected


def test_wide_intervals_count_against_triton(tmp_path):
    # 1.3 x 0.95 / 1.05 = 1.176 < 1.2, although the medians are 1.3 apart
    assert decide(tmp_path, synthetic.run(FULL, 1.3, half_width=0.05)).min_L is None
    assert decide(tmp_path, synthetic.run(FULL, 1.3, half_width=0.01)).min_L == 16


def test_nothing_qualifies(tmp_path):
    decided = decide(tmp_path, synthetic.run(FULL, 1.0))
    assert decided.min_L is None
    assert {t.min_L for t in decided.thresholds} == {None}


@pytest.mark.parametrize("method", ["triton", "packed_sdpa", "packed_sdpa_compiled"])
def test_a_missing_method_never_passes(tmp_path, method):
    lost = next(c for c in FULL if c.hot and c.family == "rows" and c.L == 256)
    verdict = of(decide(tmp_path, synthetic.run(FULL, without={(lost.id, method)})), "rows")
    assert verdict.min_L == 512
    assert [v.problem for v in verdict.missing] == [f"{method} is missing from {tmp_path.name}/0000_run.json"]


def test_a_missing_case_never_passes(tmp_path):
    lost = first("prefill", 1024)
    decided = decide(tmp_path, synthetic.run(FULL, without=op_keys(lost)))
    assert of(decided, "prefill").min_L is None
    assert decided.min_L is None
    assert f"{lost.id}: missing from every run" in write_threshold.as_text(decided)


def test_a_case_without_parity_or_call_time_never_passes(tmp_path):
    data = synthetic.run(FULL)
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
    decided = decide(tmp_path, synthetic.run([c for c in FULL if c.family not in ("decode", "long")]))
    assert of(decided, "rows").min_L == 16
    assert of(decided, "decode").min_L is None
    assert decided.min_L is None


def test_the_long_cases_speak_for_their_own_length_only(tmp_path):
    decided = decide(tmp_path, synthetic.run([c for c in FULL if c.family != "decode"]))
    assert of(decided, "decode").min_L == decided.min_L == 65_536


def test_two_runs_count_by_the_worse(tmp_path):
    fast, slow = synthetic.run(FULL), synthetic.run(FULL, slow_up_to(32))
    for order in ((fast, slow), (slow, fast)):
        decided = decide(tmp_path, *order)
        assert decided.min_L == 64
        assert min(v.bound for v in of(decided, "rows").verdicts) < 1.0


def test_a_case_that_dropped_out_of_one_of_two_runs_is_missing(tmp_path):
    lost = first("rows", 64)
    decided = decide(tmp_path, synthetic.run(FULL), synthetic.run(FULL, without=op_keys(lost)))
    assert [v.problem for v in of(decided, "rows").missing] == ["measured in 1 of 2 runs"]
    assert decided.min_L == 128


def test_chunks_of_one_matrix_are_merged(tmp_path):
    rows = [c for c in FULL if c.family in ("rows", "ragged")]
    others = [c for c in FULL if c not in rows]
    assert decide(tmp_path, synthetic.run(rows, slow_up_to(16)), synthetic.run(others)).min_L == 32


def test_eager_decides_and_each_launch_has_its_own_answer(tmp_path):
    decided = decide(tmp_path, synthetic.run(FULL, lambda c, kind: slow_up_to(128)(c, kind) if kind == "call" else 3.0))
    assert [of(decided, "rows", launch).min_L for launch in ("eager", "graph", "device")] == [256, 16, 16]
    assert decided.min_L == 256


def test_the_largest_regime_is_switched_on(tmp_path):
    slow = lambda c, kind: 1.0 if (c.family, c.L) in (("rows", 16), ("prefill", 512)) else 3.0  # noqa: E731
    decided = decide(tmp_path, synthetic.run(FULL, slow))
    assert [of(decided, regime).min_L for regime in rule.REGIMES] == [32, 128, 1024]
    assert decided.min_L == 1024


def test_a_slow_ragged_case_counts_up_to_its_longest_row(tmp_path):
    slow = first("ragged", 256)  # rows of up to about 700 tokens, which "auto" compares with the threshold
    decided = decide(tmp_path, synthetic.run(FULL, lambda c, kind: 1.0 if c == slow else 3.0))
    assert decided.min_L == 1024


def test_dtypes_are_judged_apart(tmp_path):
    half = cases.matrix("full", "fp16")
    decided = decide(tmp_path, synthetic.run(FULL), synthetic.run(half, slow_up_to(32)))
    assert of(decided, "rows", dtype="bf16").min_L == 16
    assert of(decided, "rows", dtype="fp16").min_L == 64
    assert decided.min_L == 64


def test_the_real_matrix_in_the_real_size(tmp_path, monkeypatch):
    monkeypatch.undo()
    whole = cases.matrix("full")
    decided = decide(tmp_path, synthetic.run(whole, slow_up_to(32)))
    assert len(whole) == sum(len(of(decided, regime).verdicts) for regime in rule.REGIMES)
    assert decided.min_L == 64
    assert decide(tmp_path, synthetic.run(FULL)).min_L is None  # a sixth of it proves nothing


@pytest.mark.parametrize("field", ["gpu", "driver", "torch", "triton"])
def test_runs_of_two_machines_are_refused(tmp_path, field):
    other = synthetic.IDENTITY | {field: "another"}
    with pytest.raises(ThresholdError, match=f"differ in {field}: .*another"):
        decide(tmp_path, synthetic.run(DECODE), synthetic.run(DECODE, identity=other))


def test_a_run_with_planted_slow_downs_is_refused(tmp_path):
    data = synthetic.run(FULL)
    data["benchmarks"][-1]["extra_info"]["planted"] = 1.15
    with pytest.raises(ThresholdError, match="planted"):
        decide(tmp_path, data)


def test_a_run_without_a_gpu_is_refused(tmp_path):
    with pytest.raises(ThresholdError, match="no GPU figures"):
        decide(tmp_path, synthetic.cpu_run(cases.matrix("smoke")))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"benchmarks": [1]}', '{"benchmarks": []}'])
def test_damaged_json_ends_in_one_line_and_exit_code_2(tmp_path, capsys, content):
    path = tmp_path / "0001_broken.json"
    path.write_text(content)
    assert threshold_command.main([str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "0001_broken.json" in line


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
    paths = [synthetic.save(data, tmp_path / "runs" / f"000{at}_run.json") for at, data in enumerate(documents)]
    return threshold_command.main([*map(str, paths), "--apply"])


def test_apply_adds_one_entry_and_keeps_comments_and_order(files, tmp_path):
    config, prd = files
    assert apply(tmp_path, synthetic.run(FULL, slow_up_to(64))) == 0
    never = '    "NVIDIA Never": null    # measured, never\n'
    assert config.read_text() == CONFIG.replace(never, f"{never}    {synthetic.GPU}: 128\n")
    assert SelConfig.load(config, env={}).sel_triton_min_L == {"default": 64, "NVIDIA Never": None, synthetic.GPU: 128}
    text = prd.read_text()
    assert f"### {synthetic.GPU}: Triton from L = 128 (2026-11-20)" in text
    assert "No measured GPU yet." not in text
    assert f"| 64 | {sum(c.L == 64 and c.family in ('rows', 'ragged') for c in FULL)} | 0.99x |" in text
    assert "Decided by `rows-bf16-" in text and "L = 64): lower bound 0.99x" in text


def test_apply_changes_an_existing_entry_in_place(files, tmp_path):
    config, _ = files
    entry = f"    {synthetic.GPU}: 512  # measured here\n"
    before = CONFIG.replace("    default", f"{entry}    default")
    config.write_text(before)
    assert apply(tmp_path, synthetic.run(FULL)) == 0
    assert config.read_text() == before.replace(": 512 ", ": 16 ").replace(": 16  #", ": 16   #")


def test_apply_twice_changes_nothing(files, tmp_path, capsys):
    run = synthetic.run(FULL, slow_up_to(64))
    assert apply(tmp_path, run) == 0
    assert "Wrote" in capsys.readouterr().out
    first_time = [(path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) for path in files]
    assert apply(tmp_path, run) == 0
    assert "nothing changes" in capsys.readouterr().out
    assert [(path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) for path in files] == first_time


def test_apply_keeps_the_other_gpus_and_replaces_its_own(files, tmp_path):
    config, prd = files
    other = synthetic.IDENTITY | {"gpu": "NVIDIA Other"}
    assert apply(tmp_path, synthetic.run(FULL, slow_up_to(64))) == 0
    assert apply(tmp_path, synthetic.run(FULL, slow_up_to(32), identity=other)) == 0
    assert apply(tmp_path, synthetic.run(FULL, slow_up_to(256), when="2026-12-01T00:00:00+00:00")) == 0
    entries = SelConfig.load(config, env={}).sel_triton_min_L
    assert (entries[synthetic.GPU], entries["NVIDIA Other"]) == (512, 64)
    headings = [line for line in prd.read_text().splitlines() if line.startswith("### ")]
    assert headings == [
        "### NVIDIA Other: Triton from L = 64 (2026-11-20)",
        f"### {synthetic.GPU}: Triton from L = 512 (2026-12-01)",
    ]


def test_apply_turns_one_number_for_all_into_a_map(files, tmp_path):
    config, _ = files
    config.write_text("# Toggles.\nruntime:\n  sel_triton_min_L: 96  # tokens\n")
    assert apply(tmp_path, synthetic.run(FULL)) == 0
    assert SelConfig.load(config, env={}).sel_triton_min_L == {"default": 96, synthetic.GPU: 16}
    assert "# Toggles." in config.read_text() and "# tokens" in config.read_text()


def test_apply_writes_through_a_link(files, tmp_path):
    config, _ = files
    link = tmp_path / "packaged.yaml"
    link.symlink_to(config)
    path = synthetic.save(synthetic.run(FULL), tmp_path / "0001_run.json")
    assert threshold_command.main([str(path), "--apply", "--config", str(link)]) == 0
    assert link.is_symlink()
    assert SelConfig.load(config, env={}).has_entry(synthetic.GPU)


def test_without_a_threshold_nothing_is_written_and_the_reason_is_said(files, tmp_path, capsys):
    before = [path.read_bytes() for path in files]
    slow, lost = first("rows", 1024), first("decode", 1024)
    run = synthetic.run(FULL, lambda c, kind: 1.1 if c == slow else 3.0, without=op_keys(lost))
    assert apply(tmp_path, run) == 1
    said = capsys.readouterr().out
    assert f"{slow.id}: lower bound 1.09x" in said
    assert f"{lost.id}: missing from every run" in said
    assert "Nothing is written." in said
    assert [path.read_bytes() for path in files] == before


def test_a_prd_without_markers_is_refused_before_anything_is_written(files, tmp_path, capsys):
    config, prd = files
    prd.write_text("# Requirements\n")
    assert apply(tmp_path, synthetic.run(FULL)) == 2
    assert "threshold:begin" in capsys.readouterr().err
    assert config.read_text() == CONFIG


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
    data = synthetic.run(DECODE)
    data["benchmarks"][0]["extra_info"]["call_ci95_us"] = ["<script>", 3]
    path = synthetic.save(data, tmp_path / "0001_run.json")
    saved = Saved.load(path)
    assert saved.time_us(next(iter(saved.run.timings)), "call") is None
    assert json.loads(path.read_text())["benchmarks"]
