"""A plugin of pytest: the options that name users' kernels, the same for the parity and the perf suite."""

from __future__ import annotations

import pytest

from .kernels import add_options, kernels_of


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser.getgroup("nsa_sel").addoption)


def pytest_collection_modifyitems(config: pytest.Config) -> None:
    """End the run if an option names no kernel."""
    kernels_of(config)
