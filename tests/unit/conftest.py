"""What every unit test is kept from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nsa_sel.bench.compare.elsewhere import pytest_benchmark_group_stats

__all__ = ["pytest_benchmark_group_stats"]


@pytest.fixture(autouse=True, scope="session")
def _no_worker() -> Iterator[None]:
    """Let the pytest runs that tests start be no workers of pytest-xdist: those time no benchmarks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTEST_XDIST_WORKER", raising=False)
        yield
