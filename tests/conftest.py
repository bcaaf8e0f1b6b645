"""Say where `pytest-benchmark compare` belongs: it reads no conftest.py but that of the current folder."""

from nsa_sel.bench.compare.elsewhere import pytest_benchmark_group_stats

__all__ = ["pytest_benchmark_group_stats"]
