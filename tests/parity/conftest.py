"""Where the parity suite runs, the proof that the kernel did, and the summary at the end.

On a GPU the suite uses real kernels only; without one, Triton's interpreter, which must be chosen before the first
import of triton.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
import torch

from nsa_sel.bench.compare.elsewhere import pytest_benchmark_group_stats
from nsa_sel.config import test_triton_sel

__all__ = ["pytest_benchmark_group_stats"]

if not torch.cuda.is_available() and test_triton_sel() is not False:
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False

MARK = "triton_sel_parity"  # in the name of every test that runs the kernel


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker and the Hypothesis profile: always the same examples, unless --hypothesis-seed is given."""
    import hypothesis  # not above: `pytest-benchmark compare` imports this file, and warns of an early hypothesis

    # PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m pytest -m sanitizer tests/parity
    # (PyTorch's caching allocator would hide reads past the end of a tensor)
    config.addinivalue_line("markers", "sanitizer: a quick parity test that also runs under compute-sanitizer")
    derandomize = config.getoption("hypothesis_seed", None) is None
    hypothesis.settings.register_profile("parity", derandomize=derandomize, deadline=None, database=None)
    hypothesis.settings.load_profile("parity")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the tests of a file of cases where none is given."""
    return True if collection_path.name == "test_own_cases.py" and not config.getoption("sel_cases") else None


@cache
def why_not() -> str | None:
    """Return why the kernel cannot run here, or None."""
    from . import parity_case

    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 on a machine with a GPU: the parity suite uses real kernels there"
    try:
        from nsa_sel.kernel import launch
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return launch.unsupported_reason(*parity_case.tensors(parity_case.Case(parity_case.rows([(0, 4)]), 4)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip or fail a test of the kernel where the kernel cannot run, as NSA_TEST_TRITON_SEL says."""
    if MARK not in item.name:
        return
    wanted = test_triton_sel()
    if wanted is False:
        pytest.skip("NSA_TEST_TRITON_SEL=0")
    reason = why_not()
    if reason is not None and (wanted is True or torch.cuda.is_available()):
        pytest.fail(f"the Triton kernel cannot run here: {reason}", pytrace=False)
    if reason is not None:
        pytest.skip(f"the Triton kernel cannot run here: {reason}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Fail a test that names the kernel and did not launch it."""
    if MARK not in item.name:
        return (yield)
    from nsa_sel.kernel import launch

    from . import parity_case

    before, known = launch.launch_count(), len(parity_case.RECORDS)
    result = yield
    if launch.launch_count() == before:
        pytest.fail("this test names the Triton kernel and never launched it", pytrace=False)
    # Reports carry the figures to the summary, also from the workers of pytest-xdist.
    item.user_properties += [(MARK, asdict(record)) for record in parity_case.RECORDS[known:]]
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print which kernels ran and the worst figures per dtype."""
    reports = [r for r in terminalreporter.getreports("passed") if r.when == "call"]
    records = [value for report in reports for name, value in report.user_properties if name == MARK]
    if not records:
        return
    on_gpu = torch.cuda.is_available()
    where = f"real kernels on {torch.cuda.get_device_name()}" if on_gpu else "Triton's interpreter, no GPU"
    variants = {r["variant"] for r in records}
    terminalreporter.section("parity of the Triton kernel")
    terminalreporter.line(f"{len(records)} comparisons with {where}; {len(variants)} kernel variants")
    for dtype in sorted({r["dtype"] for r in records}):
        of_dtype = [r for r in records if r["dtype"] == dtype]
        ordinary = [r for r in of_dtype if r["q_factor"] == 1] or of_dtype
        mae = max(ordinary, key=lambda r: r["mae"])
        worst = max(ordinary, key=lambda r: r["max_err"])
        row = max(of_dtype, key=lambda r: r["row_mae_ratio"])
        terminalreporter.line(f"{dtype}: worst MAE {mae['mae']:.3g} in {mae['label']}")
        terminalreporter.line(f"{'':14} worst max error {worst['max_err']:.3g} in {worst['label']}")
        terminalreporter.line(f"{'':14} worst row MAE at {row['row_mae_ratio']:.0%} of its bound in {row['label']}")
