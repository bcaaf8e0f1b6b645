"""`nsa-sel tune --regret` from end to end without a GPU: the grid, the side-by-side finals, the table and the file."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from sweep_fakes import DECODE, FEW, H200, MACHINE, MANY, RTX_4090, UNTUNED, FakeBench, FakeCompiler

from nsa_sel.bench.suite import cases, random_cases
from nsa_sel.bench.tune import command, regret, space, sweep
from nsa_sel.bench.tune.log import Log, Progress
from nsa_sel.bench.tune.regret import RegretSweep, grid
from nsa_sel.kernel.launch_config import LaunchConfig

FASTEST = LaunchConfig("gather", 64, 128, 128, 2, 3)  # of the grid


@pytest.fixture
def make(tmp_path):
    """Return a function that makes a sweep over a log in a folder of the test; logs are closed at its end."""
    logs = []

    def make(bench, *chosen, compiler=None, gpu=H200):
        logs.append(Log(tmp_path / "regret.jsonl", MACHINE))
        return RegretSweep(chosen, gpu, bench, logs[-1], Progress(io.StringIO()), compiler or FakeCompiler())

    yield make
    for log in logs:
        log.close()


class Bench(FakeBench):
    """Time every launch at 20 µs but the default one, at 18, and FASTEST, at 12."""

    def us(self, case, launch):
        return self.slow.get((case, launch), {FASTEST: 12.0, UNTUNED: 18.0}.get(launch, 20.0))


def test_the_grid_is_fixed_and_every_launch_of_it_can_compute_any_width():
    for D, Dv in ((16, 16), (128, 128), (160, 96), (256, 256)):
        launches = grid(D, Dv, has_tma=True)
        assert len(launches) == len(set(launches)) == 132
        assert not [launch for launch in launches if launch.problem(D, Dv)]
        assert sum(launch.splits == 1 for launch in launches) >= 36
    assert {launch.load for launch in grid(64, 64, has_tma=False)} == {"gather", "whole"}


def test_the_regret_of_a_case_is_its_default_launch_over_the_best_timed_side_by_side(make):
    bench = Bench()
    (found,) = make(bench, FEW).regrets()
    assert (found.default, found.best) == (UNTUNED, FASTEST)
    assert found.ratio == pytest.approx(1.5, rel=0.01) and found.tried == len(bench.checked) > 30
    turns = {launch: n - 1 for (_, launch), n in bench.sampled.items() if n > 1}
    assert set(turns.values()) == {sweep.FINAL_TURNS} and len(turns) == 1 + regret.AGAIN  # a default and the three best


def test_the_turns_alternate(make):
    bench, order = Bench(), []
    samples = bench.samples

    def noted(launch, rounds, warmup):
        order.append((launch, rounds))
        return samples(launch, rounds, warmup)

    bench.samples = noted
    make(bench, FEW).regrets()
    finals = [launch for launch, rounds in order if rounds == sweep.FINAL.rounds]
    assert all(a != b for a, b in zip(finals, finals[1:], strict=False))


def test_a_default_launch_that_none_beats_has_no_regret(make):
    bench = Bench()
    bench.slow = {(FEW, FASTEST): 19.0}
    (found,) = make(bench, FEW).regrets()
    assert (found.best, found.ratio) == (UNTUNED, 1.0)


def test_a_lucky_first_time_is_no_regret(make):
    """The best of many short timings is partly luck; the turns say what is true."""
    bench = Bench()
    bench.slow = {(FEW, FASTEST): 20.0}
    samples = bench.samples

    def lucky_at_first(launch, rounds, warmup):
        found = samples(launch, rounds, warmup)
        return [us / 3 for us in found] if rounds == sweep.FIRST.rounds and launch.num_stages == 3 else found

    bench.samples = lucky_at_first
    (found,) = make(bench, FEW).regrets()
    assert found.ratio == 1.0 and found.best == UNTUNED


def test_every_case_is_judged_by_itself(make):
    """Two cases that share an entry of the tuned table keep their own best launches."""
    assert space.key(MANY, H200) == space.key(replace(MANY, layout="mixed"), H200)
    mixed = replace(MANY, layout="mixed")
    bench, other = Bench(), LaunchConfig("gather", 32, 128, 128, 2, 3)
    bench.slow = {(mixed, FASTEST): 20.0, (mixed, other): 9.0}
    found = {each.case: each for each in make(bench, MANY, mixed).regrets()}
    assert (found[MANY].best, found[mixed].best) == (FASTEST, other)
    assert found[mixed].ratio == pytest.approx(2.0, rel=0.01)


def test_what_cannot_run_is_left_out_or_named(make):
    bench = Bench()
    bench.no_room, bench.wrong = {DECODE}, {FASTEST}
    of = make(bench, FEW, DECODE, compiler=FakeCompiler({UNTUNED}))
    assert of.regrets() == []
    assert of.missing() == {
        FEW.id: "the default launch failed: PTXASError: out of luck",
        DECODE.id: "needs 99.0 GB, 9.0 GB are free",
    }
    (found,) = make(Bench(), MANY, gpu=RTX_4090).regrets()
    assert found.best.load == "gather" and found.best.cluster == 1


def test_an_interruption_costs_no_finished_measurement(make):
    undisturbed = Bench()
    make(undisturbed, FEW).regrets()
    total = sum(undisturbed.sampled.values())
    again = make(Bench(), FEW)
    (found,) = again.regrets()
    assert again.log.found > 30 and found.ratio == pytest.approx(1.5, rel=0.01)
    assert sum(again.device.sampled.values()) == 0 < total


# --- the command ---


@pytest.fixture
def tell(tmp_path):
    """Return a function that runs the command with stand-ins for the GPU and the compiler, in a folder of the test."""

    def tell(chosen, bench, *arguments):
        given = ["--regret", "--results", str(tmp_path / "results"), *arguments]
        args = command.main_parser().parse_args(given)
        command.select(args)
        return command.tell_regret(args, chosen, H200, bench, FakeCompiler(), Progress(io.StringIO()))

    return tell


def test_the_table_names_the_grid_the_cases_the_geomean_and_the_worst(tell, tmp_path, capsys):
    bench = Bench()
    bench.slow = {(DECODE, UNTUNED): 36.0}
    assert tell([FEW, DECODE], bench, "--json", str(tmp_path / "out/regret.json")) == 0
    out = capsys.readouterr().out
    assert "2 cases, the default launch against a fixed grid of 132" in out
    assert "gather/tma: BL16 w1 s2, BL16 w1 s3, " in out and "split8 cluster8" in out
    table = [line for line in out.splitlines() if line.endswith((FEW.id, DECODE.id))]
    assert [line.split()[0] for line in table] == ["3.00x", "1.50x"]  # the largest first
    assert str(UNTUNED) in table[0] and str(FASTEST) in table[0]
    assert "regret over 2 cases: geomean 2.12" in out and "worst 3.00x" in out
    saved = json.loads((tmp_path / "out/regret.json").read_text())
    assert saved["gpu"] == H200.name and saved["worst"] == pytest.approx(3.0, rel=0.01) and len(saved["grid"]) == 132
    assert saved["random"] == {"seed": 1, "count": 40}
    first = saved["cases"][0]
    assert (first["case"], first["H"], first["n_spans"], first["default"]) == (DECODE.id, 16, 16, str(UNTUNED))
    assert first["default_us"] / first["best_us"] == first["regret"]


def test_without_a_figure_the_exit_code_is_1(tell, capsys):
    bench = Bench()
    bench.no_room = {FEW}
    assert tell([FEW], bench) == 1
    assert f"not measured: {FEW.id}: needs 99.0 GB" in capsys.readouterr().out


def test_no_table_of_launches_is_written(tell, tmp_path):
    tell([FEW], Bench())
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"regret.jsonl"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], random_cases.of_matrix("random", count=40)),
        (["--sel-count", "7"], random_cases.of_matrix("random", count=7)),
        (["--sel-seed", "3", "-k", "H1-"], [c for c in random_cases.of_matrix("random", seed=3, count=40) if c.H == 1]),
        (["--matrix", "hot", "--family", "rows"], cases.matrix("hot", family="rows")),
        (["--family", "ragged"], cases.matrix("hot", family="ragged") or None),
        (["--matrix", "full", "--family", "ragged"], cases.matrix("full", family="ragged")),
    ],
)
def test_the_cases_that_arguments_mean(arguments, expected):
    args = command.main_parser().parse_args(["--regret", *arguments])
    if expected is None:
        with pytest.raises(ValueError, match="no case"):
            command.select(args)
    else:
        assert command.select(args) == expected


def test_json_without_regret_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(["--json", "x.json"])
    assert caught.value.code == 2 and "--json: is said of --regret" in capsys.readouterr().err


@pytest.mark.parametrize(("H", "D", "L"), [(64, 256, 2048), (64, 256, 8), (8, 128, 1)])
def test_wide_and_short_rows_are_tried_with_many_launches_too(make, H, D, L):
    """A sweep leaves out what an estimate says spills or idles; here that would leave no launch to compare with."""
    case = cases.rows_case("bf16", "few", H, D, D, L, 600)
    of = make(FakeBench(), case)
    assert len(of.launches[case]) >= 15
