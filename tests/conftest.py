"""The plugin of cases and fixtures; and where `pytest-benchmark compare`, which reads this file in tests/, belongs."""

from nsa_sel.bench.compare.elsewhere import pytest_benchmark_group_stats

__all__ = ["pytest_benchmark_group_stats"]

pytest_plugins = ["nsa_sel.bench.suite.fixtures"]
