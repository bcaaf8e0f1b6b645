"""The pytest plugin of both suites: the options of the perf suite, and the hooks that save and compare its runs."""

from __future__ import annotations

import pytest
import torch

from . import parallel
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
from .timer.machine import one_of_many

pytest_plugins = [
    f"{__package__}.resume.plugin",
    f"{__package__}.suite.fixtures",
    f"{__package__}.suite.kernel_options",
]
if one_of_many():  # by torchrun; else nothing of that is imported
    pytest_plugins.append(f"{__package__}.ranks.plugin")

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
    group.addoption(
        "--sel-rank-limit",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="under torchrun: give a rank up that is silent for so long (default: %(default)s)",
    )
    hooks.addoption(parser)


@pytest.hookimpl(optionalhook=True, tryfirst=True)  # pytest-xdist's, which may be missing; it has an answer of its own
def pytest_xdist_auto_num_workers() -> int | None:
    """Let `-n auto` start on a GPU no more processes than its memory holds; 0 where that is one, without workers."""
    if not torch.cuda.is_available():
        return None
    processes = parallel.affordable(torch.cuda.mem_get_info()[0], parallel.cores())
    return processes if processes > 1 else 0
