"""NSA_TEST_TRITON_SEL decides between run, skip and fail, and a test that never launches the kernel fails."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from ..programs import python

ROOT = Path(__file__).parents[2]
ONE_TEST = "tests/parity/test_layouts.py::test_triton_sel_parity_without_length_hints"
NO_KERNEL = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU means real kernels")
pytestmark = pytest.mark.costs(6)  # starts Python anew


def run(environment: dict[str, str], *options: str, test: str = ONE_TEST) -> str:
    names = ("NSA_TEST_TRITON_SEL", "TRITON_INTERPRET")
    env = {name: value for name, value in os.environ.items() if name not in names and "XDIST" not in name}
    env["PYTHONDONTWRITEBYTECODE"] = "1"  # where these tests came with a wheel, that stays as it was installed
    command = ["-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", test, *options]
    done = python(*command, cwd=ROOT, env={**env, **environment})
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("environment", "verdict", "words"),
    [
        pytest.param({}, "1 passed", "with Triton's interpreter, no GPU", marks=WITHOUT_GPU),
        pytest.param({"NSA_TEST_TRITON_SEL": "1"}, "1 passed", "with Triton's interpreter, no GPU", marks=WITHOUT_GPU),
        ({"NSA_TEST_TRITON_SEL": "0"}, "1 skipped", "NSA_TEST_TRITON_SEL=0"),
        (NO_KERNEL, "1 skipped", "cannot run here: no CUDA device"),
        ({**NO_KERNEL, "NSA_TEST_TRITON_SEL": "1"}, r"1 (failed|error)", "cannot run here: no CUDA device"),
        pytest.param(
            {"NSA_TEST_TRITON_SEL": "gpu"}, r"1 (failed|error)", "interpreter does not count", marks=WITHOUT_GPU
        ),
        ({"NSA_TEST_TRITON_SEL": "yes please"}, "ConfigError", "NSA_TEST_TRITON_SEL"),
    ],
    ids=(
        "interpreter",
        "interpreter, must run",
        "off",
        "nothing there",
        "nothing there, must run",
        "on a GPU",
        "malformed",
    ),
)
def test_the_switch(environment, verdict, words):
    text = run(environment)
    assert re.search(verdict, text), text
    assert words in text


def test_the_kill_switch_skips_what_calls_the_public_function():
    test = "tests/parity/test_layouts.py::test_triton_sel_parity_of_the_public_function"
    text = run({"NSA_FORCE_PARITY": "1"}, test=test)
    assert "3 skipped" in text, text
    assert "NSA_FORCE_PARITY is on (set by environment NSA_FORCE_PARITY)" in text


def test_a_test_that_never_launches_the_kernel_fails(tmp_path):
    """What a silent fallback would look like: everything agrees, and no kernel ran."""
    (tmp_path / "fallback.py").write_text(
        "import pytest\n"
        "@pytest.fixture(autouse=True)\n"
        "def _fallback(monkeypatch):\n"
        f"    monkeypatch.setattr('{__package__}.test_layouts.check', lambda case: None)\n"
    )
    text = run({"PYTHONPATH": str(tmp_path)}, "-p", "fallback")
    assert "1 failed" in text, text
    assert "names the Triton kernel and never launched it" in text
