"""The timer's arithmetic, its wall-clock form, and what calibration leaves behind: no GPU needed."""

from __future__ import annotations

import math
import random

import pytest

from nsa_sel.bench.timer import timing
from nsa_sel.bench.timer.calibration import calibrate, limit_us
from nsa_sel.bench.timer.machine import environment
from nsa_sel.bench.timer.timing import WallTimer, median_ci, plan


@pytest.mark.parametrize(("n", "ranks"), [(6, (1, 6)), (10, (2, 9)), (20, (6, 15)), (50, (18, 33)), (100, (40, 61))])
def test_median_ci_takes_the_ranks_of_the_textbook(n, ranks):
    samples = [float(rank) for rank in range(1, n + 1)]
    random.Random(n).shuffle(samples)
    assert median_ci(samples) == ranks
    # The pair covers 95 % and the next narrower one does not.
    low = ranks[0]
    tail = sum(math.comb(n, i) for i in range(low)) / 2**n
    assert 1 - 2 * tail >= 0.95 > 1 - 2 * (tail + math.comb(n, low) / 2**n)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_median_ci_of_too_few_samples_is_their_range(n):
    assert median_ci([float(i) for i in range(n)]) == (0.0, n - 1.0)


def test_limit_is_linear_between_points_flat_below_and_proportional_beyond():
    curve = [[1e6, 4.0], [2e6, 5.0], [4e6, 9.0]]
    assert [limit_us(size, curve) for size in (1e3, 1e6, 1.5e6, 2e6, 3e6, 4e6, 8e6)] == [4, 4, 4.5, 5, 7, 9, 18]


@pytest.mark.parametrize(
    ("call_us", "expected"), [(10, (12, 100)), (80, (12, 100)), (200, (12, 41)), (1000, (10, 10)), (30_000, (6, 1))]
)
def test_plan_keeps_the_budget_with_as_many_calls_as_it_can(call_us, expected):
    assert plan(call_us, 0.1, calls=100) == expected


def test_plan_of_a_graph_keeps_its_calls_and_replays_it_less_often():
    assert [plan(us, 0.02, calls=20, fewest=20) for us in (10, 100, 160, 1000)] == [(12, 20), (10, 20), (6, 20), (6, 3)]


def test_wall_timer_gives_one_sample_a_round_and_calls_the_warm_ups_too():
    calls = []
    samples = WallTimer().samples(lambda: calls.append(1), rounds=7, warmup=2)
    assert len(samples) == 7 and len(calls) == 9 and min(samples) > 0


def test_tick_belongs_to_the_timer_in_use():
    class Counter(WallTimer):
        def tick(self) -> float:
            return 42.0

    timing.use(Counter())
    try:
        assert timing.tick() == 42.0
    finally:
        timing.use(WallTimer())


def test_calibration_is_part_of_the_environment():
    values = calibrate(WallTimer())
    assert environment()["calibration"] == values and values["tick_us"] > 0
