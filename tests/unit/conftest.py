"""What the programs that unit tests start must not inherit."""

from __future__ import annotations

import signal
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


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c() -> Iterator[None]:
    """Let Ctrl-C reach the programs that tests start, though a shell has its background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
