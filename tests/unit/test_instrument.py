"""The instrument itself: on a GPU against do_bench, the profiler and planted costs; anywhere, its judgement of runs."""

from __future__ import annotations

import copy
import json
import statistics
import time

import pytest
import saved_runs
import torch

from nsa_sel.bench.checks import instrument
from nsa_sel.bench.methods import contender
from nsa_sel.bench.methods.contender import NotTimed
from nsa_sel.bench.session import Session
from nsa_sel.bench.suite import cases
from nsa_sel.bench.timer import timing
from nsa_sel.bench.timer.timing import DeviceTimer, WallTimer

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: its instrument cannot be tested")

# Ten cells from a few µs to some hundred, each by two single-kernel methods: 20 cases.
SIZES = ((16, 64), (256, 64), (256, 256), (512, 1024), (1024, 1024))
CELLS = [(L, N, layout) for layout in ("few", "many") for L, N in SIZES]
METHODS = ("triton", "sdpa_core")


@pytest.fixture(scope="module")
def bench():
    return Session()


def calls(bench: Session, cells=CELLS):
    """Yield (name, call) for every cell and method, one case in memory at a time, in the method's SDPA backend."""
    for L, N, layout in cells:
        case = cases.rows_case("bf16", layout, 8, 128, 128, L, N)
        for method in METHODS:
            with bench.ready(case, method) as (prepared, _):
                yield f"{case.id}-{method}", prepared.call


def median_us(samples) -> float:
    return statistics.median(samples) * 1e6


@on_gpu
def test_flushed_with_zeros_the_timer_agrees_with_do_bench(bench):
    from triton.testing import do_bench

    zeros = DeviceTimer(flush="zeros")
    off, shown = [], []
    for name, call in calls(bench):
        ours, clean = median_us(zeros.samples(call)), median_us(bench.timer.samples(call))
        theirs = do_bench(call, warmup=10, rep=50, return_mode="median") * 1e3
        shown.append(f"{name}: cold by reading {clean:.1f} µs, by zeros {ours:.1f} µs, do_bench {theirs:.1f} µs")
        if abs(ours - theirs) > 0.1 * theirs + 1:
            off.append(shown[-1])
    print(*shown, sep="\n")
    assert len(shown) == 20
    assert not off, "\n".join(off)


@on_gpu
def test_zeros_leave_a_write_back_that_a_plain_read_pays_for(bench):
    from nsa_sel.bench.timer import streaming

    read = streaming.reader(torch.zeros(33_600_000 // 4, dtype=torch.int32, device="cuda"))
    dirty, clean = median_us(DeviceTimer(flush="zeros").samples(read)), median_us(bench.timer.samples(read))
    print(f"33.6 MB read: {clean:.1f} µs after reading, {dirty:.1f} µs after zeros")
    assert dirty > 1.05 * clean


@on_gpu
def test_device_time_agrees_with_the_profiler(bench):
    rounds = 20
    overhead_us = bench.calibration["null_kernel_us"]["device"]  # event to event around nothing; no part of a kernel
    cells = [cell for cell in CELLS if cell[0] * cell[1] >= 256 * 256][:5]
    names = []
    for name, call in calls(bench, cells):
        if not name.endswith("triton"):
            continue
        names.append(name)
        ours = median_us(bench.timer.samples(call))
        activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(rounds):
                bench.timer.setup()
                call()
            torch.cuda.synchronize()
        kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        times = [event.time_range.elapsed_us() for event in kernels if "_sel_fwd" in event.name]
        assert len(times) == rounds, {event.name for event in kernels}
        theirs = statistics.median(times)
        print(f"{name}: {ours:.1f} µs, profiler {theirs:.1f} µs")
        assert -0.05 * theirs - 1 <= ours - theirs <= 0.1 * theirs + overhead_us
    assert len(names) == 5


@on_gpu
def test_a_launch_cost_on_the_host_moves_call_time_and_not_device_time(bench):
    extra_us = 40.0

    def slow_to_launch() -> None:
        end = time.perf_counter() + extra_us / 1e6
        while time.perf_counter() < end:
            pass
        call()

    for _, call in calls(bench, CELLS[:2]):
        plain, slowed = median_us(bench.timer.samples(call)), median_us(bench.timer.samples(slow_to_launch))
        before = timing.call_time(call, 50).us
        after = timing.call_time(slow_to_launch, 50 + extra_us).us
        print(f"device {plain:.2f} -> {slowed:.2f} µs, call {before:.1f} -> {after:.1f} µs")
        assert abs(slowed - plain) <= 0.05 * plain + 0.5
        assert after - before >= 0.5 * extra_us


@on_gpu
def test_a_call_that_waits_for_the_device_is_refused():
    x = torch.ones(8, device="cuda")
    with pytest.raises(RuntimeError, match="waits for the device"):
        DeviceTimer().samples(lambda: x.sum().item(), rounds=1)


@on_gpu
def test_a_late_host_is_noticed_and_the_round_repeated(bench):
    x = torch.ones(8, device="cuda")
    bench.timer.arm(lambda: x.add_(1))
    bench.timer.delay_us = 0.0
    bench.timer.setup()
    start = bench.timer.tick()
    time.sleep(0.01)  # far longer than flush and delay
    bench.timer.delay_us = 200.0
    x.add_(1)
    assert 0 < bench.timer.tick() - start < 1e-3
    assert bench.timer.repeated > 0


@on_gpu
def test_every_hot_method_is_measured_with_all_times(bench):
    case = cases.rows_case("bf16", "many", 8, 128, 128, 256, 256)
    for method in case.methods:
        found = bench.measure(case, method)
        for key in ("call_us", "graph_us", "limit_us", "pct_of_limit"):
            assert found.get(key), (method, key, found)
        assert found["ci95_us"][0] <= found["median"] * 1e6 <= found["ci95_us"][1]
        assert found["pct_of_limit"] < 105  # nothing reads faster than a plain read


@on_gpu
def test_a_planted_share_is_added_to_a_planted_benchmark_only(bench):
    from nsa_sel.bench.session import is_planted

    long = [case for case in cases.matrix("hot") if case.L >= 512 and case.N == 1024]  # 5 % is beyond the timer's tick
    hot = [(case, method) for case in long for method in case.methods]
    slowed = Session(plant=0.15)
    for wanted in (True, False):
        case, method = next(pair for pair in hot if is_planted(*pair) == wanted)
        found = slowed.measure(case, method)
        assert ("planted" in found) == wanted
        ratio = found["median"] / bench.measure(case, method)["median"]
        assert ratio > 1.1 if wanted else 0.95 < ratio < 1.05


def test_a_case_that_does_not_fit_is_not_timed(monkeypatch):
    case = cases.rows_case("bf16", "few", 4, 64, 64, 64, 8)
    monkeypatch.setattr(contender, "_free_memory", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    timer = DeviceTimer.__new__(DeviceTimer)  # a GPU's timer, which is not used
    with pytest.raises(NotTimed, match=r"needs 0\.0 GB, 0\.0 GB are free"):
        contender.CaseState(case, timer)


def test_without_a_gpu_what_needs_more_than_the_machine_has_is_not_timed(monkeypatch, tmp_path):
    """Before, the system killed the process that asked for it."""
    case = cases.rows_case("bf16", "few", 4, 64, 64, 64, 8)
    assert contender._free_memory("cpu") > 2**28
    monkeypatch.setattr(contender, "MEMINFO", tmp_path / "meminfo")
    contender.CaseState(case, WallTimer())  # nothing is known
    contender.MEMINFO.write_text("MemFree:       9 kB\nMemAvailable:       100 kB\n")
    with pytest.raises(NotTimed, match=r"needs 0\.0 GB, 0\.0 GB are free"):
        contender.CaseState(case, WallTimer())


@pytest.fixture
def runs_of_one_commit(tmp_path):
    """Write three runs of 330 benchmarks, the last with its first one 20 % slower; return their paths."""
    data = saved_runs.run(cases.matrix("hot"))
    data["benchmarks"] = data["benchmarks"][:330]  # so that two false alarms are just too many
    paths = [tmp_path / f"run{i}.json" for i in range(3)]
    for path in paths:
        if path is paths[-1]:
            data = copy.deepcopy(data)
            slow = data["benchmarks"][0]
            for name in ("median", "q1", "q3"):
                slow["stats"][name] *= 1.2
            slow["extra_info"]["ci95_us"] = [bound * 1.2 for bound in slow["extra_info"]["ci95_us"]]
            slow["stats"]["median"] += 1e-6  # past the floor, however short
            slow["stats"]["q1"] += 1e-6
        path.write_text(json.dumps(data))
    return [str(path) for path in paths]


def test_runs_that_agree_raise_no_alarm(runs_of_one_commit, capsys):
    assert instrument.main(runs_of_one_commit[:2]) == 0
    text = capsys.readouterr().out
    assert "0.0% at 100%" in text and "2 ordered pairs: 0 confirmed, 0 suspects" in text


def test_an_alarm_between_runs_of_one_commit_is_counted_and_named(runs_of_one_commit, capsys):
    first = cases.matrix("hot")[0]
    assert instrument.main(runs_of_one_commit) == 1
    text = capsys.readouterr().out
    assert "6 ordered pairs: 2 confirmed, 0 suspects" in text
    assert text.count(first.id) == 2


@pytest.mark.parametrize(("share", "found", "code"), [(0.5, "100.0%", 0), (0.05, "0.0%", 1)])
def test_timings_made_slower_are_found_and_no_other(tmp_path, capsys, share, found, code):
    paths = [saved_runs.save(saved_runs.run(cases.matrix("hot")), tmp_path / f"{name}.json") for name in "abc"]
    assert instrument.main(["--slowed", str(share), *map(str, paths)]) == code
    text = capsys.readouterr().out
    assert f"timings {share:.0%} slower" in text and f"{found} slower when measured again, 0 named elsewhere" in text


def test_two_runs_are_too_few_for_a_second_look(runs_of_one_commit, capsys):
    with pytest.raises(SystemExit):
        instrument.main(["--slowed", "0.15", *runs_of_one_commit[:2]])
    assert "--slowed: needs three runs or more" in capsys.readouterr().err


def test_a_table_of_noise_is_not_made_of_slowed_runs(runs_of_one_commit, capsys):
    with pytest.raises(SystemExit):
        instrument.main(["--noise", "noise.json", "--slowed", "0.15", *runs_of_one_commit])
    assert "--slowed: not allowed with argument --noise" in capsys.readouterr().err


@pytest.mark.parametrize(("suspects", "code"), [(3, 0), (4, 1)])
def test_more_than_a_suspect_per_ordered_pair_is_too_many(tmp_path, capsys, suspects, code):
    data = saved_runs.run(cases.matrix("hot"))
    paths = [tmp_path / f"run{i}.json" for i in range(3)]
    for path in paths:
        slowed = copy.deepcopy(data)
        for made in slowed["benchmarks"][: 5 * suspects] if path is paths[-1] else ():
            if made["extra_info"]["method"] == "triton":
                made["stats"]["median"] *= 1.3  # the quartiles stay
        path.write_text(json.dumps(slowed))
    assert instrument.main([str(path) for path in paths]) == code
    assert f"6 ordered pairs: 0 confirmed, {2 * suspects} suspects" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("found", "code"), [([0, 1], 0), ([0], 1), ([0, 1, 2], 1), ([], 1)], ids=["all", "half", "elsewhere", "none"]
)
def test_planted_benchmarks_must_be_found_and_no_other(tmp_path, capsys, found, code):
    data = saved_runs.run(cases.matrix("hot"))
    keys = [f"{b['extra_info']['case']} {b['extra_info']['method']}" for b in data["benchmarks"]]
    for bench in data["benchmarks"][:2]:
        bench["extra_info"]["planted"] = 1.15
    data["nsa_sel"] = {"baseline": "old", "regressions": [keys[i] for i in found]}
    path = tmp_path / "planted.json"
    path.write_text(json.dumps(data))
    assert instrument.main(["--planted", str(path)]) == code
    assert f"{len(keys)} benchmarks, 2 planted, {len({0, 1} & set(found))} found" in capsys.readouterr().out


def test_a_run_that_cannot_be_read_exits_with_two(tmp_path, capsys):
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    assert instrument.main([str(bad), str(bad)]) == 2 and "bad.json" in capsys.readouterr().err
