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
from nsa_sel.bench.suite import cases

pytest_plugins = ["nsa_sel.bench.resume.plugin", "nsa_sel.bench.suite.kernel_options"]

__all__ = [
    "pytest_benchmark_group_stats",
    "pytest_benchmark_update_json",
    "pytest_benchmark_update_machine_info",
    "pytest_collection_finish",
    "pytest_configure",
    "pytest_sessionfinish",
    "pytest_terminal_summary",
]


FAMILY_HELP = f"only these, with commas: {', '.join(cases.FAMILIES)}; {cases.PEERS}: beside other people's kernels"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nsa_sel")
    group.addoption("--sel-matrix", choices=cases.MATRICES, help="cases to time (default: full on a GPU, else smoke)")
    group.addoption("--sel-dtype", choices=cases.DTYPES, default="bf16", help="dtype of the cases (default: bf16)")
    group.addoption("--sel-family", metavar="NAMES", help=FAMILY_HELP)
    group.addoption("--sel-table", action="store_true", help="print every benchmark at the end, not only the summary")
    group.addoption(
        "--sel-plant",
        type=float,
        metavar="SHARE",
        help="test of the instrument: slow a fixed tenth of the kernel's timings down by this share of their time",
    )
    hooks.addoption(parser)
