"""A few parity tests under NVIDIA's compute-sanitizer, where it is installed and the host lets it run."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
TESTS = "without_length_hints or padded_widths"  # more: pytest -m sanitizer tests/parity
OURS = ("--kernel-name", "kns=_sel_fwd")  # PyTorch's kernels would take most of the time
TOOLS = {
    "memcheck": (*OURS, "--report-api-errors", "no"),  # libraries ask the driver for functions that it may not have
    "racecheck": OURS,
    "initcheck": ("--print-limit", "0", "--show-backtrace", "no"),  # must see who else writes what the kernel reads
    "synccheck": OURS,
}
# Nor does initcheck see what cuDNN's attention writes (through TMA), and so PyTorch's next kernel would be reported.
WITHOUT_CUDNN = (
    "import sys, torch, pytest; torch.backends.cuda.enable_cudnn_sdp(False); sys.exit(pytest.main(sys.argv[1:]))"
)
LIMIT_S = 120


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[subprocess.Popen, Path, float]]]:
    """Begin all four at once; return of each the process, the file it prints into, and when it must have ended."""
    tests = [sys.executable, "-c", WITHOUT_CUDNN, "-q", "-p", "no:cacheprovider", "tests/parity", "-m", "sanitizer"]
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    folder, found = tmp_path_factory.mktemp("sanitizer"), {}
    try:
        for tool, options in TOOLS.items():
            command = [PROGRAM, "--tool", tool, *options, "--target-processes", "all", *tests, "-k", TESTS]
            with (folder / tool).open("w") as out:
                process = subprocess.Popen(
                    command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
                )
            found[tool] = process, folder / tool, time.monotonic() + LIMIT_S
        yield found
    finally:
        for process, _, _ in found.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the tests that it runs too
            process.wait()


@pytest.mark.parametrize("tool", TOOLS)
def test_compute_sanitizer_finds_nothing(tool, request, say):
    if not Path(PROGRAM).exists():
        pytest.skip("compute-sanitizer is not installed")
    process, printed, end = request.getfixturevalue("begun")[tool]
    try:
        process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        pytest.skip(f"{tool} did not finish within {LIMIT_S} s")
    text = printed.read_text(errors="replace")
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    refused = re.search(r"^=+ (?:Error: )?(Device not supported.*)$", text, re.MULTILINE)
    if summary is None and refused is None:
        refused = re.search(r"^=+ Error: (.+)$", text, re.MULTILINE)
    if refused:
        pytest.skip(f"the host refuses {tool}: {refused[1]}")
    assert summary is not None, text[-4000:]
    errors = int(summary[1])
    if tool == "initcheck":
        readers = re.findall(r"Uninitialized .*\n=+ +at (.*)", text)
        if len(readers) < errors:
            pytest.skip(f"initcheck dropped {errors - len(readers)} of {errors} reports, so that nothing is shown")
        errors = sum("_sel_fwd" in reader for reader in readers)
        say(f"sanitizer: {tool}: {errors} in the kernel, {len(readers)} in PyTorch's")
    else:
        say(f"sanitizer: {tool}: {summary[0]}")
    assert errors == 0 and " passed" in text and " failed" not in text, text[:2000] + text[-4000:]
