"""What runs of one commit differ by: the table, the grades that follow, and what the machine explains."""

import dataclasses
import json
import math
import random
from pathlib import Path

import pytest
import saved_runs
from saved_runs import as_run, entry, use_noise

from nsa_sel.bench.checks import instrument
from nsa_sel.bench.compare import noise, rule
from nsa_sel.bench.compare.noise import CONFIRMED_WRONG, SUSPECT_WRONG, noise_of
from nsa_sel.bench.compare.result import RollUp
from nsa_sel.bench.compare.rule import compare
from nsa_sel.bench.compare.yardstick import Machine
from nsa_sel.bench.saved import run as runs
from nsa_sel.bench.saved.speedups import is_kernel
from nsa_sel.bench.suite import cases

ROOT = Path(__file__).parents[2]
BASELINES = sorted((ROOT / ".benchmarks").glob("*-NVIDIA-H200/*_baseline.json"))
GPU = "NVIDIA H200"
BINS = [[10, 0.2, 0.4, 0.05, 500], [100, 1.0, 2.0, 0.08, 500], [None, 0.01, 0.02, 0.03, 500]]


@pytest.fixture
def known_noise(monkeypatch, tmp_path):
    """Let BINS be the card's noise in device time."""
    use_noise(monkeypatch, tmp_path, {GPU: BINS})


def as_timings(times, method="triton", **more):
    """Return a run of one timing per given time in µs, of the narrowest samples."""
    names = more.pop("names", [f"rows-{number}" for number in range(len(times))])
    entries = [entry(case, method, us, spread=0, ci=0) for case, us in zip(names, times, strict=True)]
    return as_run(entries, **more)


# ---- The committed baselines, by the table that is shipped


@pytest.mark.skipif(len(BASELINES) < 2, reason="a tree without its two committed baselines")
@pytest.mark.parametrize("first", [0, 1])
def test_the_two_baselines_of_one_commit_on_two_cards_pass_in_both_orders(first):
    old, new = (runs.load(path) for path in (BASELINES[first], BASELINES[1 - first]))
    assert old.commit == new.commit and old.environment["gpu_id"] != new.environment["gpu_id"]
    result = compare(old, new)
    assert (result.exit_code, result.regressions, result.suspects, result.missing) == (0, (), (), ())
    assert result.compared == 2 * 658 and not result.assumed_noise
    assert "another card of the same name" in result.text()
    assert "launch floor: every call takes 0." in result.text()
    assert "verdict: pass" in result.text().splitlines()[-1]


@pytest.mark.skipif(not BASELINES, reason="a tree without its committed baselines")
@pytest.mark.parametrize("share", [0.12, 0.15])
def test_a_tenth_of_a_baseline_made_slower_is_found_and_nothing_else(share):
    old = runs.load(BASELINES[0])
    kernel = sorted(key for key in old.timings if is_kernel(key[1]))
    planted = set(random.Random(0).sample(kernel, len(kernel) // 10))
    slowed = {key: timing.scaled(1 + share) if key in planted else timing for key, timing in old.timings.items()}
    result = compare(old, dataclasses.replace(old, timings=slowed))
    found = {change.key for change in (*result.regressions, *result.suspects)}
    assert found <= planted
    long = {key for key in planted if old.timings[key].median_us > 7}
    assert long <= found  # shorter ones are within what two runs differ by, or near it


# ---- The bound


@pytest.mark.parametrize(
    ("us", "p90", "p99"), [(0.1, 0.2, 0.4), (9.99, 0.2, 0.4), (10, 1, 2), (99, 1, 2), (100, 1, 2), (1000, 10, 20)]
)
def test_the_bound_is_exponential_through_the_90th_and_99th_percentile(known_noise, us, p90, p99):
    bound = noise_of(GPU).bound_us
    assert bound("device", us, 0.1) == pytest.approx(p90)
    assert bound("device", us, 0.01) == pytest.approx(p99)
    assert bound("device", us, 1e-4) == pytest.approx(p99 + 2 * (p99 - p90))
    assert bound("device", us, 1.0) == pytest.approx(max(0, 2 * p90 - p99))


def test_a_bound_is_never_below_nothing(monkeypatch, tmp_path):
    use_noise(monkeypatch, tmp_path, {GPU: [[None, 0.1, 0.4, 0.4, 1]]})
    assert noise_of(GPU).bound_us("device", 1, 1.0) == 0


def test_another_cards_noise_grows_with_the_time_and_is_half_a_microsecond_at_least(known_noise):
    table = noise_of("NVIDIA L4")
    assert table.assumed and table.gpu == GPU
    assert table.bound_us("device", 2, 0.01) == 0.5  # 0.4 us in the middle of 0 to 10
    assert table.bound_us("device", 9, 0.01) == pytest.approx(0.4 * 9 / 5)
    assert table.bound_us("device", 11, 0.01) == 0.5
    assert table.bound_us("device", 99, 0.01) == pytest.approx(2 * 99 / 55)
    assert table.bound_us("device", 1000, 0.01) == pytest.approx(20)


def test_assumed_noise_is_said_with_the_verdict(known_noise):
    old = as_run([entry("a", "triton", 20, gpu="NVIDIA L4")])
    assert compare(old, old).text().endswith("pass, nothing got slower (noise of NVIDIA H200 assumed)")
    old = as_run([entry("a", "triton", 20)])
    assert "assumed" not in compare(old, old).text()


# ---- The grades


def grade(new_us, comparisons=1, old_us=20.0):
    rest = [old_us] * (comparisons - 1)
    result = compare(as_timings([old_us, *rest]), as_timings([new_us, *rest]))
    return [name for name in ("regressions", "suspects", "noise") if getattr(result, name)]


@pytest.mark.parametrize("comparisons", [1, 30, 1316])
def test_beyond_the_noise_of_so_many_comparisons_is_suspect_and_far_beyond_confirmed(known_noise, comparisons):
    suspect, confirmed = (
        noise_of(GPU).bound_us("device", 20, wrong / comparisons) for wrong in (SUSPECT_WRONG, CONFIRMED_WRONG)
    )
    assert suspect < confirmed
    assert grade(20 + confirmed + 0.01, comparisons) == ["regressions"] or confirmed < 2
    assert grade(20 + max(2, confirmed) + 0.01, comparisons) == ["regressions"]
    if confirmed > 2:  # 10 %
        assert grade(20 + confirmed - 0.01, comparisons) == ["suspects"]
        assert grade(20 + max(2, suspect) + 0.01, comparisons) == ["suspects"]
    if suspect > 2:
        assert grade(20 + suspect - 0.01, comparisons) == ["noise"]
    assert grade(22.0, comparisons) == []


def test_exactly_at_the_noise_is_within_it(monkeypatch, tmp_path):
    use_noise(monkeypatch, tmp_path, {GPU: [[1000, 4.0, 4.0, 0, 1], [None, 0, 0, 0, 1]]})
    assert grade(24.0, old_us=20.0) == ["noise"]
    assert grade(24.01, old_us=20.0) == ["regressions"]


@pytest.mark.parametrize("kind", ["call_us", "graph_us"])
def test_a_call_or_graph_time_within_its_noise_does_not_warn(monkeypatch, tmp_path, kind):
    use_noise(monkeypatch, tmp_path, {GPU: [[None, 0, 0, 0, 1]]}, host=[[1000, 5.0, 5.0, 0, 1], [None, 0, 0, 0, 1]])
    old = as_run([entry("a", "triton", 20, **{kind: 20})])
    for us, warned in ((24.9, 0), (25.1, 1)):
        assert len(compare(old, as_run([entry("a", "triton", 20, **{kind: us})])).warnings) == warned


def test_what_runs_of_one_commit_once_differed_by_is_suspect_whatever_the_percentiles_say(monkeypatch, tmp_path):
    use_noise(monkeypatch, tmp_path, {GPU: [[None, 0.01, 0.02, 0.12, 500]]})
    assert noise_of(GPU).worst_us("device", 20) == pytest.approx(1.25 * 0.12 * 20)
    assert grade(22.9) == ["suspects"] and grade(23.1) == ["regressions"]


def test_the_more_comparisons_the_more_is_noise(known_noise):
    assert [grade(23.3, comparisons) for comparisons in (1, 10, 100, 1316)] == [
        ["regressions"],
        ["regressions"],
        ["suspects"],
        ["noise"],
    ]


def draw(random_state, us):
    """Return a difference of two runs of one commit, drawn from BINS: of either sign, with an exponential tail."""
    p90, p99 = next((p90, p99) for end, p90, p99, *_ in BINS if end is None or us < end)
    scale = (p99 - p90) / math.log(10)
    size = p90 + scale * math.log(0.1 / random_state.random())
    size = size * us if us >= BINS[-2][0] else size
    return random_state.choice((-1, 1)) * max(0.0, size)


def test_runs_of_one_commit_never_fail_and_are_seldom_suspect(known_noise):
    state, confirmed, suspects, pairs = random.Random(7), 0, 0, 200
    times = [math.exp(state.uniform(math.log(4), math.log(400))) for _ in range(400)]
    for _ in range(pairs):
        new = [us + draw(state, us) for us in times]
        result = compare(as_timings(times), as_timings(new))
        confirmed, suspects = confirmed + len(result.regressions), suspects + len(result.suspects)
    assert confirmed <= 0.03 * pairs  # 1 % are expected, of either sign
    assert suspects <= 0.5 * pairs
    assert suspects > 0  # else the noise drawn here would be none


def test_fifteen_per_cent_planted_is_confirmed_when_measured_again(known_noise):
    state = random.Random(8)
    times = [math.exp(state.uniform(math.log(30), math.log(400))) for _ in range(600)]
    planted = set(state.sample(range(600), 60))

    def measured():
        return [us * (1.15 if at in planted else 1) + draw(state, us) / 4 for at, us in enumerate(times)]

    alerted = compare(as_timings(times), as_timings(measured()))
    again = as_timings(measured()).timings
    result = rule.confirm(alerted, {key: again[key] for key in rule.to_measure_again(alerted)})
    found = {int(change.case.split("-")[1]) for change in result.regressions}
    assert found <= planted and len(found) >= 0.95 * len(planted)
    assert not result.suspects


# ---- Measured again


def test_a_suspect_needs_a_second_look_that_is_slower_by_the_rule_without_the_noise(known_noise):
    old, new = as_timings([20.0] * 1316), as_timings([24.0] + [20.0] * 1315)
    alerted = compare(old, new)
    (suspect,) = alerted.suspects
    assert "runs of one commit may differ by" in suspect.note
    for again, expected in ((22.01, (1, 0)), (22.0, (0, 1)), (25.0, (1, 0)), (19.0, (0, 1))):
        result = rule.confirm(alerted, as_timings([again]).timings)
        assert (len(result.regressions), len(result.cleared)) == expected, again
        assert not result.suspects
    wide = as_run([entry("rows-0", "triton", 23, spread=0, ci=0.1)])  # 3/4 of 4.6 us
    assert rule.confirm(alerted, wide.timings).cleared
    unmeasured = rule.confirm(alerted, {})
    assert [change.note for change in unmeasured.suspects] == ["not measured again"]
    assert unmeasured.exit_code == 3


# ---- What the machine explains: the launch floor


def with_sdpa(kernel_us, sdpa_us, count=20):
    """Return a run with `count` short timings of SDPA on packed rows, and some of the kernel."""
    entries = [entry(f"rows-{number}", "sdpa_core", sdpa_us + number / 10, spread=0, ci=0) for number in range(count)]
    entries += [entry(f"decode-{number}", "triton", us, spread=0, ci=0) for number, us in enumerate(kernel_us)]
    return as_run(entries)


def test_what_every_short_call_takes_longer_is_taken_off(known_noise):
    old, new = with_sdpa([5.0, 8.0], 10.0), with_sdpa([5.8, 9.3], 10.2)
    result = compare(old, new)
    assert result.machine.shift_us == pytest.approx(0.2)
    assert "launch floor: every call takes 0.20 us longer, SDPA's too; taken off" in result.text()
    assert [change.change for change in result.regressions] == [pytest.approx(1.1 / 8), pytest.approx(0.6 / 5)]
    assert "every call takes 0.20 us less" in compare(new, old).text()


def test_too_few_or_long_sdpa_timings_say_nothing_of_the_launch_floor(known_noise):
    assert compare(with_sdpa([5], 10, count=19), with_sdpa([5], 10.2, count=19)).machine.shift_us == 0
    assert compare(with_sdpa([5], 20), with_sdpa([5], 20.2)).machine.shift_us == 0
    packed = as_run([entry(f"rows-{number}", "packed_sdpa", 10 + number / 10) for number in range(30)])
    slower = as_run([entry(f"rows-{number}", "packed_sdpa", 10.2 + number / 10) for number in range(30)])
    assert compare(packed, slower).machine.shift_us == 0


def test_a_small_shift_is_taken_off_without_a_word(known_noise):
    result = compare(with_sdpa([5], 10), with_sdpa([5], 10.04))
    assert result.machine.taken_off_us == pytest.approx(0.04) and "launch floor" not in result.text()


@pytest.mark.parametrize(("shift", "taken"), [(0.99, True), (1.01, False), (-0.99, True), (-1.01, False)])
def test_more_than_a_microsecond_is_no_launch_floor_and_hides_nothing(known_noise, shift, taken):
    result = compare(with_sdpa([8.0], 15.0), with_sdpa([8.0 + 1.5], 15.0 + shift))
    assert result.machine.taken_off_us == (pytest.approx(shift) if taken else 0)
    assert result.moved == (not taken)
    assert ("too much to be taken off" in result.text()) == (not taken)
    assert bool(result.regressions or result.suspects) == (not taken or shift < 0)


def test_a_large_shift_of_short_calls_is_a_moved_machine_whatever_the_long_ones_say(known_noise):
    long = as_timings([900.0] * 50, method="packed_sdpa").timings
    short = with_sdpa([8], 15), with_sdpa([8], 16.1)
    old, new = (dataclasses.replace(run, timings={**run.timings, **long}) for run in short)
    result = compare(old, new)
    assert result.moved and result.sdpa_ratio == 1
    assert "environment shift: the SDPA cases take 1.000x" in result.text()


@pytest.mark.parametrize(("sdpa_us", "shift"), [(19.9, 0.25), (20.0, 0.0), (20.5, 0.0), (30.0, 0.0)])
def test_sdpa_timings_from_20_us_on_say_nothing_of_the_launch_floor(known_noise, sdpa_us, shift):
    old, new = (as_exact([us] * 20, method="sdpa_core") for us in (sdpa_us, sdpa_us + 0.25))
    assert compare(old, new).machine.shift_us == pytest.approx(shift)


def as_exact(times, method="triton"):
    """Return a run of timings that are exactly these µs, as no file of seconds holds them."""
    timings = [runs.Timing(f"rows-{number}", method, us, us, us, (us, us)) for number, us in enumerate(times)]
    return dataclasses.replace(as_run([entry("a", method, 1)]), timings={timing.key: timing for timing in timings})


def test_a_microsecond_exactly_is_a_launch_floor():
    machine = Machine(shift_us=1.0)
    assert (machine.taken_off_us, machine.moved) == (1.0, False)


# ---- Another card


CALIBRATION = {"null_kernel_us": {"device": 2.6}, "read_limit_us": [[1e6, 4.0], [1e8, 26.0]]}
SLOW_CARD = {"null_kernel_us": {"device": 4.4}, "read_limit_us": [[1e6, 5.8], [1e8, 29.16]]}  # reads 1.2x as long


def on_card(gpu_id, us, calibration, size=1e8):
    return as_run(
        [entry("rows-a", "triton", us, gpu_id=gpu_id, spread=0, ci=0, bytes=size)],
        machine_info={"calibration": calibration} if calibration else {},
    )


HALVES = [{key: CALIBRATION[key]} for key in CALIBRATION]


@pytest.mark.parametrize(
    "calibrations",
    [(None, None), (CALIBRATION, None), (None, CALIBRATION), *((CALIBRATION, half) for half in HALVES)],
)
def test_another_card_without_calibration_is_not_judged(known_noise, calibrations):
    result = compare(on_card("a", 30, calibrations[0]), on_card("b", 60, calibrations[1]))
    assert result.exit_code == 0 and not result.regressions
    assert "another card of the same name: a -> b, without calibration" in result.text()
    assert result.text().endswith("verdict: another card: not judged")
    assert compare(on_card("a", 30, None), on_card("a", 60, None)).exit_code == 1


def test_another_card_is_judged_by_what_its_calibration_explains(known_noise):
    old = on_card("a", 30.0, CALIBRATION)
    slope = (29.16 - 4.4) / (26 - 2.6)
    expected = 4.4 + (30 - 2.6) * slope
    result = compare(old, on_card("b", expected, SLOW_CARD))
    assert result.exit_code == 0 and result.roll_up[0].ratio == pytest.approx(1)
    assert "another card of the same name: a -> b, calibration taken off" in result.text()
    slower = compare(old, on_card("b", 4.4 + (30 * 1.2 - 2.6) * slope, SLOW_CARD))
    assert [change.change for change in slower.regressions] == [pytest.approx(0.2)]
    floor_only = compare(
        on_card("a", 5.0, CALIBRATION, size=None), on_card("b", 6.8, SLOW_CARD, size=None)
    )  # bytes unknown: the floor alone
    assert floor_only.roll_up[0].ratio == pytest.approx(1)


@pytest.mark.parametrize(
    ("old_limit_us", "new_limit_us", "factor"),
    [(3.0, 4.0, 0.5), (3.0, 1.5, 1), (3.0, 2.0, 1), (2.0, 4.0, 1), (1.5, 4.0, 1)],
)
def test_a_read_limit_below_the_launch_floor_does_not_scale(old_limit_us, new_limit_us, factor):
    old, new = (
        dataclasses.replace(
            as_run([entry("a", "triton", 9, gpu_id=card)]), floor_us=2.0, read_limit_us=[[1e6, us], [1e8, us]]
        )
        for card, us in (("aa11", old_limit_us), ("bb22", new_limit_us))
    )
    timing = runs.Timing("a", "triton", 10.0, 9.0, 11.0, (9.5, 10.5), bytes=1e7)
    assert Machine(cards=(old, new)).corrected(timing).median_us == 2 + 8 * factor


# ---- The roll-up


def test_the_roll_up_names_a_family_that_is_slower_though_no_case_is(known_noise):
    names = [f"{family}-{number}" for family in ("rows", "decode") for number in range(20)]
    old = as_timings([20 + number / 10 for number in range(40)], names=names)
    slower = {
        key: timing.scaled(1.08 + (number % 3 - 1) / 1000 if timing.family == "decode" else 1)
        for number, (key, timing) in enumerate(old.timings.items())
    }
    result = compare(old, dataclasses.replace(old, timings=slower))
    assert result.exit_code == 0
    rows, decode = result.roll_up
    assert (rows.family, rows.ratio, rows.slower) == ("rows", pytest.approx(1), False)
    assert decode.slower and decode.interval[0] < 1.08 < decode.interval[1]
    assert decode.interval[1] - decode.interval[0] < 0.002
    assert "pass, no case is over 10 %; as a whole slower: decode op 1.080x [1.080, 1.080] of 20" in result.text()


@pytest.mark.parametrize(
    ("ratio", "interval", "slower"),
    [(1.05, (1.01, 1.09), True), (1.05, (0.99, 1.1), False), (1.02, (1.01, 1.03), False), (1.05, None, False)],
)
def test_a_family_is_slower_if_it_is_by_much_and_for_sure(ratio, interval, slower):
    assert RollUp("rows", "op", 9, ratio, interval).slower == slower


def test_the_interval_is_students(known_noise):
    old = as_timings([20.0, 20.0, 20.0])
    new = as_timings([20 * math.exp(x) for x in (0.01, 0.02, 0.03)])
    (part,) = compare(old, new).roll_up
    half = 4.303 * 0.01 / math.sqrt(3)
    assert part.interval == (pytest.approx(math.exp(0.02 - half)), pytest.approx(math.exp(0.02 + half)))
    assert compare(as_timings([20.0, 20.0]), as_timings([20.0, 20.0])).roll_up[0].interval is None
    for freedom, quantile in ((3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (503, 1.965)):
        assert rule._t975(freedom) == pytest.approx(quantile, rel=0.01)
        # The expansion's published coefficients at the normal quantile: Abramowitz and Stegun, 26.7.5.
        expansion = 1.95996 + 2.37227 / freedom + 2.82250 / freedom**2 + 2.55585 / freedom**3
        assert rule._t975(freedom) == pytest.approx(expansion, rel=1e-5)


def test_four_cases_have_three_degrees_of_freedom(known_noise):
    old = as_timings([20.0] * 4)
    (part,) = compare(old, as_timings([20 * math.exp(x) for x in (0.01, 0.01, 0.03, 0.03)])).roll_up
    half = 3.182 * math.sqrt(4e-4 / 3) / math.sqrt(4)
    assert math.log(part.interval[1]) - 0.02 == pytest.approx(half, rel=0.01)


def test_a_time_that_the_launch_floor_leaves_nothing_of_is_no_part_of_the_roll_up(known_noise):
    old, new = with_sdpa([0.5, 0.5, 8.0], 10.0), with_sdpa([0.5, 0.25, 9.0], 10.5)  # 0, less than nothing, and 8.5 us
    (part,) = compare(old, new).roll_up
    assert (part.cases, part.ratio) == (1, pytest.approx(8.5 / 8))
    assert compare(with_sdpa([0.5], 10.0), with_sdpa([0.25], 10.5)).roll_up == ()


# ---- The table is made from runs


def test_a_bin_holds_200_differences_from_its_start_to_below_its_end():
    starts = (0.5, 5, 6, 8, 10, 15, 40, 80, 200)
    differences = [(us, number / 100) for us in starts for number in range(1, 201)]
    *bins, last = noise._bins(differences)
    shares = [pytest.approx(2 / us, abs=1e-4) for us in starts]
    assert bins == [[end, 1.8, 1.98, worst, 200] for end, worst in zip(starts[1:], shares[:-1], strict=True)]
    assert last == [None, pytest.approx(1.8 / 200, abs=1e-4), pytest.approx(1.98 / 200, abs=1e-4), shares[-1], 200]
    just_below = noise._bins([(math.nextafter(end, 0), 1.0) for end in starts[1:] for _ in range(200)])
    assert [count for *_, count in just_below] == [200] * 8 + [0]


def test_fewer_differences_join_the_next_bin_and_at_last_the_shares_of_the_time():
    joined, last = noise._bins([(4, 1.0)] * 199 + [(5, 1.0), (7, 3.5)])
    assert joined == [6, 1.0, 1.0, 0.25, 200] and last == [None, 0.5, 0.5, 0.5, 1]
    assert noise._bins([(0.5, 1.0)]) == [[None, 2.0, 2.0, 2.0, 1]]


def test_a_difference_is_a_share_of_the_time_before_and_without_the_launch_floor():
    def measured(kernel_us, sdpa_us):
        sdpa = [entry(f"rows-{number}", "sdpa_core", sdpa_us) for number in range(20)]
        return as_run([*sdpa, entry("rows-a", "triton", kernel_us, call_us=kernel_us, graph_us=kernel_us)])

    (table,) = noise.measure([measured(10, 10), measured(11.5, 10.5)]).values()
    tenth = pytest.approx(1 / 10, abs=1e-4)
    assert table["device"] == [[None, tenth, tenth, tenth, 2]]


def test_a_cards_noise_cannot_be_changed(known_noise):
    with pytest.raises(dataclasses.FrozenInstanceError):
        noise_of(GPU).assumed = True


def files_of(tmp_path, count=3, shift=0.05, floor=0.0):
    """Write runs of one commit, each `shift` µs slower than the one before, and SDPA's calls too by `floor` µs."""
    whole = cases.matrix("full")
    paths = []
    for number in range(count):
        data = saved_runs.run(whole)
        for made in data["benchmarks"]:
            if is_kernel(made["extra_info"]["method"]):
                made["stats"]["median"] += number * shift * 1e-6
                made["extra_info"]["call_us"] += number * 2 * shift
            made["stats"]["median"] += number * floor * 1e-6
        paths.append(saved_runs.save(data, tmp_path / f"run{number}.json"))
    return paths


def test_the_command_writes_what_runs_of_one_commit_differ_by(tmp_path, capsys):
    table = tmp_path / "noise.json"
    table.write_text(json.dumps({GPU: {"runs": 2, "device": BINS, "call": BINS, "graph": BINS}}))
    paths = [str(path) for path in files_of(tmp_path)]
    assert instrument.main(["--noise", str(table), *paths]) == 0
    found = json.loads(table.read_text())
    assert found[GPU]["device"] == BINS and list(found) == [GPU, saved_runs.GPU]
    made = found[saved_runs.GPU]
    assert made["runs"] == 3
    timings = 2 * len(cases.matrix("full"))
    for kind, step in (("device", 0.05), ("call", 0.1), ("graph", 0)):
        *bins, last = made[kind]
        assert bins and [end for end, *_ in bins] == sorted(end for end, *_ in bins) and last[0] is None
        for _, p90, p99, _, count in bins:  # of six ordered pairs two differ by two steps
            assert count >= noise.FEWEST
            assert (p90, p99) == (pytest.approx(2 * step, abs=1e-3), pytest.approx(2 * step, abs=1e-3))
        assert sum(count for *_, count in made[kind]) >= 6 * timings
    assert f"{table}: {saved_runs.GPU}, 3 runs" in capsys.readouterr().out


def test_the_launch_floor_is_no_noise(tmp_path):
    paths = files_of(tmp_path, shift=0.0, floor=0.3)
    assert instrument.main(["--noise", str(tmp_path / "table.json"), *map(str, paths)]) == 0
    *bins, _ = json.loads((tmp_path / "table.json").read_text())[saved_runs.GPU]["device"]
    assert bins and all(p99 < 0.001 for _, _, p99, *_ in bins)


def test_runs_whose_noise_is_in_the_table_do_not_fail(tmp_path, monkeypatch):
    paths = files_of(tmp_path, shift=0.5)
    assert instrument.main(["--noise", str(tmp_path / "table.json"), *map(str, paths)]) == 0
    monkeypatch.setattr(noise, "TABLE", tmp_path / "table.json")
    assert instrument.main([str(path) for path in paths]) == 0


def test_runs_that_tell_nothing_of_noise_are_refused(tmp_path, capsys):
    one, two, _ = files_of(tmp_path)
    other = json.loads(two.read_text())
    other["commit_info"]["id"] = "another"
    other_commit = saved_runs.save(other, tmp_path / "commit.json")
    card = json.loads(two.read_text())
    for made in card["benchmarks"]:
        made["extra_info"]["gpu_id"] = "another"
    other_card = saved_runs.save(card, tmp_path / "card.json")
    no_graph = json.loads(two.read_text())
    for made in no_graph["benchmarks"]:
        made["extra_info"]["graph_us"] = None
    no_graph = saved_runs.save(no_graph, tmp_path / "graph.json")
    l4 = saved_runs.run(cases.matrix("hot"), identity={**saved_runs.IDENTITY, "gpu": "NVIDIA L4"})
    l4 = saved_runs.save(l4, tmp_path / "l4.json")
    table = tmp_path / "table.json"
    for paths, said in (
        ((one, other_commit), "no two of these runs are of one commit on one card"),
        ((one, other_card), "no two of these runs are of one commit on one card"),
        ((one, no_graph), "the runs have no graph times"),
        ((one, l4), "the runs are of 2 GPUs"),
    ):
        assert instrument.main(["--noise", str(table), *map(str, paths)]) == 2
        assert said in capsys.readouterr().err and not table.exists()
    table.write_text("[")
    assert instrument.main(["--noise", str(table), str(one), str(two)]) == 2
    assert table.read_text() == "["
