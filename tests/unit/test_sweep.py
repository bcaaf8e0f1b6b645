"""A sweep from end to end without a GPU: what wins, what is never chosen, what an interruption costs, the command."""

import csv
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sweep_fakes import BEST, DECODE, FEW, H200, MACHINE, MANY, MIXED, UNTUNED, FakeBench, FakeCompiler

from nsa_sel.bench import cli
from nsa_sel.bench.methods.contender import WrongResult
from nsa_sel.bench.suite import cases
from nsa_sel.bench.suite.cases import rows_case
from nsa_sel.bench.tune import command as tune_command
from nsa_sel.bench.tune import results, space, sweep
from nsa_sel.bench.tune.log import Log, Progress
from nsa_sel.bench.tune.space import grid
from nsa_sel.bench.tune.sweep import DeviceLost, Sweep, SweepError
from nsa_sel.kernel import tuned_table
from nsa_sel.kernel.launch_config import LaunchConfig


@pytest.fixture
def make(tmp_path):
    """Return a function that makes a sweep over a log in a folder of the test; logs are closed at its end."""
    logs = []

    def make(bench, *chosen, compiler=None, **options):
        logs.append(Log(tmp_path / "tune.jsonl", MACHINE))
        return Sweep(chosen, H200, bench, logs[-1], Progress(io.StringIO()), compiler or FakeCompiler(), **options)

    yield make
    for log in logs:
        log.close()


# --- the course of a sweep ---


def test_the_best_launch_wins_though_it_is_only_found_around_another(make):
    bench = FakeBench()
    (result,) = make(bench, FEW).run()
    assert BEST not in grid(128, 128)
    assert result.winner.launch == BEST
    assert result.gain(result.winner) == pytest.approx(bench.us(FEW, UNTUNED) / 10, rel=0.01)
    assert {each.launch for each in result.ranked} >= {BEST, UNTUNED} and len(result.ranked) <= 5


def test_all_that_is_timed_was_compiled_and_checked_once(make):
    bench, compiler = FakeBench(), FakeCompiler()
    sweep_of = make(bench, FEW, MANY, compiler=compiler)
    sweep_of.run()
    assert set(bench.checked.values()) == {1}
    assert {space.variant(case, launch) for case, launch in bench.sampled} == set(compiler.compiled)
    assert len(compiler.compiled) == len(set(compiler.compiled))


def test_what_is_left_out_is_counted(make):
    sweep_of = make(FakeBench(), FEW)
    (key,) = sweep_of.launches
    n_grid = len(list(grid(128, 128)))
    assert len(sweep_of.launches[key]) + sum(sweep_of.removed.values()) == n_grid
    plan = "\n".join(sweep_of.plan())
    assert all(why in plan and str(n) in plan for why, n in sweep_of.removed.items())


def test_exhaustive_tries_every_chunk_at_once(make):
    sweep_of = make(FakeBench(), FEW, every_chunk=True)
    assert BEST in next(iter(sweep_of.launches.values()))


def test_a_launch_that_miscomputes_is_recorded_and_never_chosen(make):
    bench = FakeBench()
    bench.wrong = {BEST}
    sweep_of = make(bench, FEW)
    (result,) = sweep_of.run()
    assert result.winner.launch != BEST and BEST not in {each.launch for each in result.ranked}
    assert sweep_of.log.error(FEW, BEST) == "WrongResult: MAE 0.1 2 of 64 rows are bad"
    assert (FEW, BEST) not in bench.sampled


def test_a_launch_wrong_in_one_case_of_a_class_does_not_win_it(make):
    bench = FakeBench()
    check = bench.check

    def wrong_for_mixed(launch):
        check(launch)
        if bench.opened[-1] == MIXED and launch == BEST:
            raise WrongResult("wrong")

    bench.check = wrong_for_mixed
    (result,) = make(bench, MANY, MIXED).run()
    assert result.cases == (MANY, MIXED) and result.winner.launch != BEST


def test_a_launch_that_does_not_compile_is_recorded_and_not_run(make):
    bench = FakeBench()
    sweep_of = make(bench, FEW, compiler=FakeCompiler({BEST}))
    (result,) = sweep_of.run()
    assert result.winner.launch != BEST and (FEW, BEST) not in bench.checked
    assert sweep_of.log.error(FEW, BEST) == "PTXASError: out of luck"


def test_kernels_that_all_fail_are_not_held_against_them(make, tmp_path):
    everything = {c for n in (1, 2) for c in grid(128, 128)} | {UNTUNED}
    with pytest.raises(SweepError, match="none of .* kernels can be compiled: PTXASError"):
        make(FakeBench(), FEW, compiler=FakeCompiler(everything)).run()
    log = Log(tmp_path / "tune.jsonl", MACHINE)
    log.close()
    assert not log.found


def test_a_case_without_room_is_skipped_and_its_class_goes_on(make):
    bench = FakeBench()
    bench.no_room = {MIXED, FEW}
    sweep_of = make(bench, FEW, MANY, MIXED)
    (result,) = sweep_of.run()
    assert result.cases == (MANY,) and result.winner.launch == BEST
    assert sweep_of.skipped[MIXED] == "needs 99.0 GB, 9.0 GB are free"


@pytest.mark.parametrize("share", [0.0, 0.01, 0.4, 0.75, 0.8, 0.99])
def test_an_interruption_costs_no_finished_measurement(make, tmp_path, share):
    undisturbed = FakeBench()
    (expected,) = make(undisturbed, FEW).run()
    total = sum(undisturbed.sampled.values())
    before_finals = total - sweep.FINAL_TURNS * len(
        expected.ranked
    )  # a case's finals count when all its turns are done
    (tmp_path / "tune.jsonl").unlink()

    first = FakeBench(stop_after=int(share * total))
    with pytest.raises(KeyboardInterrupt):
        make(first, FEW).run()
    with (tmp_path / "tune.jsonl").open("a") as file:
        file.write('{"run": "cut off in the mid')
    second = FakeBench()
    again = make(second, FEW)
    assert again.log.found == min(first.stop_after, before_finals)
    (result,) = again.run()
    assert result.winner.launch == BEST
    assert sum(second.sampled.values()) == total - again.log.found


def test_a_launch_that_breaks_the_device_ends_the_process_and_is_not_tried_again(make):
    bench = FakeBench()
    bench.breaks = replace(UNTUNED, num_warps=1)
    with pytest.raises(DeviceLost, match="illegal memory access"):
        make(bench, FEW).run()
    again = FakeBench()
    again.breaks, again.checked = bench.breaks, bench.checked.copy()
    (result,) = make(again, FEW).run()
    assert result.winner.launch == BEST
    assert again.checked[FEW, bench.breaks] == 1  # the first attempt's


# --- checking and timing, as far as it goes without a GPU ---


@pytest.fixture
def interpreted():
    """Give the GPU's part of the sweep with a small case open, if the parity suite has switched the interpreter on."""
    device = pytest.importorskip("nsa_sel.kernel.device")
    if not device.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is not set")
    from nsa_sel.bench.methods import contender
    from nsa_sel.bench.timer import timing
    from nsa_sel.bench.tune import gpu

    bench = object.__new__(gpu.GpuSweepDevice)  # its timer needs a GPU
    bench.timer = timing.WallTimer()
    bench.state = contender.CaseState(rows_case("bf16", "mixed", 4, 64, 64, 64, 8), bench.timer)
    return bench


def test_a_launch_is_checked_against_the_oracle(interpreted, monkeypatch):
    launch = LaunchConfig("gather", 32, 64, 32, 2, 2, 2)
    interpreted.check(launch)
    assert len(interpreted.samples(launch, rounds=2, warmup=0)) == 2
    monkeypatch.setattr("nsa_sel.bench.tune.gpu.forward", lambda *tensors, out, **options: out)
    with pytest.raises(WrongResult, match="not finite"):
        interpreted.check(launch)


def test_rows_outside_the_checked_ones_must_be_written_too(interpreted, monkeypatch):
    from nsa_sel.kernel import launch

    rows, oracle, packed = interpreted.state.expected
    interpreted.state.expected = rows[:4], oracle[:4], packed[:4]
    forward = launch.forward

    def all_but_the_last(*tensors, out, **options):
        forward(*tensors, out=out, **options)
        out[-1] = float("nan")

    monkeypatch.setattr("nsa_sel.bench.tune.gpu.forward", all_but_the_last)
    with pytest.raises(WrongResult, match="never written"):
        interpreted.check(LaunchConfig("gather", 32, 64, 64, 2, 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_small_sweep_on_a_gpu(tmp_path, monkeypatch):
    few = [UNTUNED, replace(UNTUNED, num_warps=2), replace(UNTUNED, load="whole", block_l=32)]
    monkeypatch.setattr(space, "grid", lambda D, Dv, every_chunk: iter(few))
    monkeypatch.setattr(space, "around", lambda launch: iter([replace(launch, block_dv=64)]))
    monkeypatch.setenv("PYTHONPATH", str(Path(tune_command.__file__).parents[3]))  # for the compiling processes
    table = tmp_path / "table.json"
    assert tune_command.main(["-k", MANY.id, "-k", "N1024", "--out", str(table), "--results", str(tmp_path)]) == 0
    (entry,) = tuned_table.read(table, torch.cuda.get_device_name()).entries.values()
    assert 1 < entry.figures["us"][MANY.id] < 1000
    assert "Never chosen" not in (tmp_path / "tune.md").read_text()


# --- the command ---


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_refuses_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["tune", "--out", "table"]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "nothing can be tuned here" in captured.err
    assert not captured.out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--top", "1"], ["-k", "no such case"], ["--family", "none"]])
def test_bad_arguments_are_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        tune_command.main(arguments)
    assert caught.value.code == 2
    assert "nsa-sel tune: error" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], [c for c in cases.matrix("hot", family="rows") if c.N == 1024]),
        (["--family", "decode"], cases.matrix("hot", family="decode")),
        (["--matrix", "full", "--dtype", "fp16"], [c for c in cases.matrix("full", "fp16") if not c.ragged]),
        (["-k", "L64", "-k", "mixed"], [c for c in cases.matrix("hot") if "L64" in c.id and "mixed" in c.id]),
    ],
)
def test_the_cases_that_arguments_mean(arguments, expected):
    assert expected and tune_command.select(tune_command.main_parser().parse_args(arguments)) == expected


@pytest.fixture
def tune(tmp_path, monkeypatch):
    """Return a function that runs the command with stand-ins for the GPU and the compiler, in a folder of the test."""
    monkeypatch.setattr(tuned_table, "LOCAL", tmp_path / "local")
    monkeypatch.setattr(tuned_table, "PACKAGED", tmp_path / "packaged")
    tuned_table.forget()

    def tune(chosen, bench=None, *arguments):
        args = tune_command.main_parser().parse_args(["--results", str(tmp_path / "results"), *arguments])
        quiet = Progress(io.StringIO())
        return tune_command.tune(args, chosen, H200, bench or FakeBench(), FakeCompiler(), quiet)

    yield tune
    tuned_table.forget()


def lookup(case):
    return tuned_table.lookup(space.call_of(case), H200)


def test_a_sweep_writes_what_the_run_time_reads(tune, tmp_path, capsys):
    assert tune([FEW, MANY]) == 0
    assert lookup(FEW) == lookup(MANY) == lookup(MIXED) == BEST
    assert lookup(DECODE) is None
    data = json.loads((tmp_path / "packaged" / "NVIDIA_H200.json").read_text())
    assert set(data["measured"]) == {"torch", "triton", "driver", "cuda", "date"}
    assert data["measured"]["torch"] == torch.__version__
    out = capsys.readouterr().out
    assert "left out" in out and str(BEST) in out and "NVIDIA_H200.json" in out


def test_the_lists_of_finalists(tune, tmp_path):
    bench = FakeBench()
    bench.wrong = {LaunchConfig("gather", 16, 128, 128, 2, 3)}
    tune([FEW, MANY, MIXED], bench, "--top", "3")
    found = list(csv.DictReader((tmp_path / "results" / "tune.csv").read_text().splitlines()))
    assert list(found[0]) == list(results.COLUMNS)
    assert [row["rank"] for row in found if row["span"] == "one"] == ["1", "2", "3", "4"]  # 3 and the untuned
    assert {row["launch"] for row in found if row["won"] == "yes"} == {str(BEST)}
    assert {row["launch"] for row in found if row["won"] == "untuned"} == {str(UNTUNED)}
    assert {row["cases"] for row in found if row["span"] == "8"} == {f"{MANY.id} {MIXED.id}"}
    text = (tmp_path / "results" / "tune.md").read_text()
    assert "## Never chosen" in text and "WrongResult" in text and "left out" in text


def test_a_later_sweep_keeps_the_other_classes(tune):
    tune([FEW])
    tune([MANY])
    assert lookup(FEW) == lookup(MANY) == BEST


def test_a_later_sweep_measures_anew(tune):
    tune([FEW])
    slower = FakeBench()
    slower.slow = {(FEW, BEST): 30.0}
    tune([FEW], slower)
    assert lookup(FEW) not in (None, BEST)


def test_entries_of_other_versions_are_dropped(tune, tmp_path):
    tune([FEW])
    path = tmp_path / "packaged" / "NVIDIA_H200.json"
    path.write_text(path.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "1.0"'))
    tune([MANY])
    assert (lookup(FEW), lookup(MANY)) == (None, BEST)


def test_without_an_entry_no_table_is_written(tune, tmp_path, capsys):
    bench = FakeBench()
    bench.no_room = {FEW}
    assert tune([FEW], bench) == 1
    assert not list((tmp_path / "packaged").glob("*")) and (tmp_path / "results" / "tune.md").exists()
    assert "99.0 GB" in capsys.readouterr().out


def test_a_table_elsewhere_says_where_it_must_go(tune, tmp_path, capsys):
    tune([FEW], None, "--out", str(tmp_path / "mine.json"))
    assert (tmp_path / "mine.json").exists() and lookup(FEW) is None
    assert f"once it lies in {tuned_table.LOCAL}" in capsys.readouterr().out


def test_a_table_goes_where_it_will_be_read(tune, tmp_path, monkeypatch):
    assert tune_command.default_folder(H200.name) == tuned_table.PACKAGED
    tuned_table.LOCAL.mkdir()
    (tuned_table.LOCAL / "NVIDIA_H200.json").write_text("")  # shadows the packaged one
    assert tune_command.default_folder(H200.name) == tuned_table.LOCAL
    assert tune_command.default_folder("NVIDIA L4") == tuned_table.PACKAGED
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert tune_command.default_folder("NVIDIA L4") == tuned_table.LOCAL
