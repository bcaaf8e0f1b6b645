"""A few parity tests under NVIDIA's compute-sanitizer, where it is installed and the host lets it run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
TESTS = "without_length_hints or padded_widths"  # more: pytest -m sanitizer tests/parity
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
LIMIT_S = 120


def check(tool: str) -> str | None:
    """Return what the tool and the tests under it print; None if they do not end in time."""
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/parity", "-m", "sanitizer"]
    command = [PROGRAM, "--tool", tool, "--target-processes", "all", *tests, "-k", TESTS]
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def outputs() -> Iterator[dict[str, Future]]:
    """Begin all four at once."""
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        yield {tool: pool.submit(check, tool) for tool in TOOLS}


@pytest.mark.parametrize("tool", TOOLS)
def test_compute_sanitizer_finds_nothing(tool, request, say):
    if not Path(PROGRAM).exists():
        pytest.skip("compute-sanitizer is not installed")
    text = request.getfixturevalue("outputs")[tool].result()
    if text is None:
        pytest.skip(f"{tool} did not finish within {LIMIT_S} s")
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    refused = re.search(r"^=+ (Error: .+)$", text, re.MULTILINE)
    if summary is None and refused:
        pytest.skip(f"the host refuses {tool}: {refused[1]}")
    assert summary is not None, text[-4000:]
    say(f"sanitizer: {tool}: {summary[0]}")
    assert int(summary[1]) == 0 and " passed" in text, text[-4000:]
