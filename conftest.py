"""What pytest and `pytest-benchmark compare` look for here: the plugin of the suites, and the hook by its name."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "src"))  # `pytest-benchmark compare` reads no pytest.ini

from nsa_sel.bench.compare.hooks import pytest_benchmark_group_stats

pytest_plugins = ["nsa_sel.bench.plugin"]

__all__ = ["pytest_benchmark_group_stats"]
