"""The hook for folders in which `pytest-benchmark compare` finds another conftest.py than the repository's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_group_stats(config: pytest.Config | None, benchmarks: Any, group_by: str) -> None:
    """Say where to stand, if `pytest-benchmark compare` asks (config None); under pytest leave it to the root's."""
    if config is None:
        root = next(folder for folder in (*Path.cwd().parents, Path.cwd()) if (folder / "pytest.ini").is_file())
        raise SystemExit(
            f"nsa_sel: pytest-benchmark compare reads the conftest.py and the .benchmarks of its own folder: cd {root}"
        )
