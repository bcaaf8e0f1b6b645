"""Options of the perf suite, and the hooks that pytest and `pytest-benchmark compare` look for here, by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "src"))  # `pytest-benchmark compare` reads no pytest.ini

from nsa_sel.bench.compare import hooks
from nsa_sel.bench.compare.hooks import (
    pytest_benchmark_group_stats,
    pytest_benchmark_update_json,
    pytest_benchmark_update_machine_info,
    pytest_collection_finish,
    pytest_configure,
    pytest_sessionfinish,
    pytest_terminal_summary,
)

# tests/conftest.py names the fixtures too; `pytest --help`, here, would not read that file.
pytest_plugins = ["nsa_sel.bench.resume.plugin", "nsa_sel.bench.suite.fixtures"]

__all__ = [
    "pytest_benchmark_group_stats",
    "pytest_benchmark_update_json",
    "pytest_benchmark_update_machine_info",
    "pytest_collection_finish",
    "pytest_configure",
    "pytest_sessionfinish",
    "pytest_terminal_summary",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nsa_sel")
    group.addoption("--sel-table", action="store_true", help="print every benchmark at the end, not only the summary")
    group.addoption(
        "--sel-plant",
        type=float,
        metavar="SHARE",
        help="test of the instrument: slow a fixed tenth of the kernel's timings down by this share of their time",
    )
    hooks.addoption(parser)
