"""The soak run: what a GPU must endure. Skipped without one; its counts and figures are printed at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nsa_sel.bench.compare.elsewhere import pytest_benchmark_group_stats

__all__ = ["pytest_benchmark_group_stats"]

FIGURE = "soak"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "soak: takes minutes on a GPU; make soak")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.soak)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no GPU: nothing can be soaked"))


@pytest.fixture
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Return a function that keeps a line for the end of the run."""
    return lambda text: request.node.user_properties.append((FIGURE, text))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for key in ("passed", "failed") for report in terminalreporter.getreports(key)]
    lines = [text for r in reports if r.when == "call" for name, text in r.user_properties if name == FIGURE]
    if lines:
        terminalreporter.section(f"soak on {torch.cuda.get_device_name()}")
        for line in lines:
            terminalreporter.line(line)
