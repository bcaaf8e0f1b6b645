"""Which rank does what: groups that stay on one card, dealt by their expected cost."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Mapping
from typing import TypeVar

from ..suite.cases import Case
from ..suite.inputs import memory_estimate

Group = TypeVar("Group", bound=Hashable)

# What a benchmark takes on a GPU: setup, check and rounds; more where there is more to draw, pack and read.
BENCHMARK_S = 0.15
BYTES_PER_S = 20e9
COMPILED_S = 2.0  # a form under torch.compile


def dealt(costs: Mapping[Group, float], size: int) -> dict[Group, int]:
    """Return the rank of every group: the costliest first, each to the rank that has the least so far.

    Depends on nothing but the costs, their order and the number of ranks. No rank has more than the mean and one group.
    """
    loads = [(0.0, rank) for rank in range(size)]
    found = {}
    for group in sorted(costs, key=lambda group: -costs[group]):
        load, rank = heapq.heappop(loads)
        found[group] = rank
        heapq.heappush(loads, (load + costs[group], rank))
    return {group: found[group] for group in costs}


def benchmark_s(case: Case, method: str) -> float:
    """Return the seconds that a benchmark is expected to take."""
    return BENCHMARK_S + memory_estimate(case) / BYTES_PER_S + COMPILED_S * (method == "packed_sdpa_compiled")
