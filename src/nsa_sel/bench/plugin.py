"""The pytest plugin of both suites: the options of the perf suite, and the hooks that save and compare its runs."""

from __future__ import annotations

import pytest

from .compare import hooks
from .compare.hooks import (
    pytest_benchmark_group_stats,
    pytest_benchmark_update_json,
    pytest_benchmark_update_machine_info,
    pytest_collection_finish,
    pytest_configure,
    pytest_sessionfinish,
    pytest_terminal_summary,
)
from .suite import cases

pytest_plugins = [f"{__package__}.resume.plugin", f"{__package__}.suite.kernel_options"]

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
