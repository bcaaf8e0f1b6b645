"""Where the parity suite runs, which tests, the proof that the kernel ran, and the summary at the end.

On a GPU the suite uses real kernels only; without one, Triton's interpreter, which must be chosen before the first
import of triton.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
import torch

from nsa_sel.bench import parallel
from nsa_sel.bench.compare.elsewhere import pytest_benchmark_group_stats
from nsa_sel.bench.suite.chosen import cases_of
from nsa_sel.bench.suite.kernels import UserKernel, kernels_of
from nsa_sel.bench.suite.random_cases import RANDOM
from nsa_sel.config import get_config, test_triton_sel

__all__ = ["pytest_benchmark_group_stats"]

HERE = Path(__file__).parent
if not torch.cuda.is_available() and test_triton_sel() not in (False, "gpu"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False

MARK = "triton_sel_parity"  # in the name of every test that runs the kernel
MARKERS = """
    sanitizer: a quick parity test that also runs under compute-sanitizer
    contract(what="any"): what every kernel must meet, --sel-kernel's too; "spans": no blocks can express the cases
    public: calls the kernel through nsa_sel.selection_attention
    costs(seconds): what a test takes, if much more than others: by this tests are dealt to ranks
    much_memory: needs more GPU memory than ordinary tests; several processes run one such test at a time
"""
_DESELECTED = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers and the Hypothesis profile: always the same examples, unless --hypothesis-seed is given."""
    import hypothesis  # not above: `pytest-benchmark compare` imports this file, and warns of an early hypothesis

    # PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m pytest -m sanitizer tests/parity
    # (PyTorch's caching allocator would hide reads past the end of a tensor)
    for line in MARKERS.strip().splitlines():
        config.addinivalue_line("markers", line.strip())
    derandomize = config.getoption("hypothesis_seed", None) is None
    hypothesis.settings.register_profile("parity", derandomize=derandomize, deadline=None, database=None)
    hypothesis.settings.load_profile("parity")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out what is for given kernels alone, or for a file of cases or random ones, where there are none."""
    needed = {
        HERE / "test_given.py": kernels_of,
        HERE / "test_own_cases.py": lambda config: (
            config.getoption("sel_cases") or config.getoption("sel_matrix") == RANDOM
        ),
    }
    return True if collection_path in needed and not needed[collection_path](config) else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test of the contract on each given kernel."""
    kernels = kernels_of(metafunc.config)
    if kernels and metafunc.definition.get_closest_marker("contract"):
        metafunc.parametrize("kernel_under_test", kernels, ids=[kernel.name for kernel in kernels], indirect=True)


@pytest.fixture(autouse=True)
def kernel_under_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """Choose the kernel that the suite's helpers run: the one that --sel-kernel gives, else this package's own."""
    from . import given_kernel

    given_kernel.under_test = getattr(request, "param", None)
    yield
    given_kernel.under_test = None


@pytest.fixture(autouse=True)
def room_on_the_gpu(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let a test that needs much memory wait for those of pytest-xdist's other processes, and leave them no less."""
    if request.node.get_closest_marker("much_memory") is None or "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    with parallel.alone(tmp_path_factory.getbasetemp().parent / "much_memory.lock"):  # a folder of all workers
        torch.cuda.empty_cache()
        yield
        torch.cuda.empty_cache()


def given(item: pytest.Item):
    """Return the given kernel that the test is about, or None."""
    return item.callspec.params.get("kernel_under_test") if hasattr(item, "callspec") else None


def expressible(config: pytest.Config, item: pytest.Item, kernel: UserKernel) -> bool:
    """Tell whether what the kernel takes can say what a file's case selects; other tests are marked."""
    case_id = item.callspec.params.get("case_id")
    return case_id is None or kernel.expressible(cases_of(config)[case_id])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect, where kernels are given, what is not for them: our own promises, and spans that are no blocks."""
    kernels = kernels_of(config)
    if not kernels:
        return
    own, inexpressible, kept = [], [], []
    for item in items:
        kernel, contract = given(item), item.get_closest_marker("contract")
        if HERE not in item.path.parents:
            kept.append(item)
        elif kernel is None or item.callspec.params.get("launch") is not None:
            own.append(item)
        elif kernel.block_size and (contract.args == ("spans",) or not expressible(config, item, kernel)):
            inexpressible.append(item)
        else:
            kept.append(item)
    # A test with a launch of ours is there once for each kernel.
    lines = [f"{sum(given(item) in (None, kernels[0]) for item in own)} tests of nsa_sel's own kernel deselected"]
    for kernel in kernels:
        if n := sum(given(item) is kernel for item in inexpressible):
            lines.append(f"{n} tests of {kernel.name} deselected: {kernel.takes} cannot express what they select")
    config.stash[_DESELECTED] = lines
    config.hook.pytest_deselected(items=own + inexpressible)
    items[:] = kept


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
    if wanted == "gpu" and not torch.cuda.is_available():
        pytest.fail("NSA_TEST_TRITON_SEL=gpu: no CUDA device, and the interpreter does not count", pytrace=False)
    if given(item) is not None:
        return
    if wanted is False:
        pytest.skip("NSA_TEST_TRITON_SEL=0")
    reason = why_not()
    if reason is not None and (wanted != "auto" or torch.cuda.is_available()):
        pytest.fail(f"the Triton kernel cannot run here: {reason}", pytrace=False)
    if reason is not None:
        pytest.skip(f"the Triton kernel cannot run here: {reason}")
    config = get_config()
    if config.force_parity and item.get_closest_marker("public"):
        pytest.skip(f"NSA_FORCE_PARITY is on (set by {config.sources['force_parity']})")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Fail a test that names the kernel and did not run it."""
    if MARK not in item.name:
        return (yield)
    from nsa_sel.kernel import launch

    from . import fitting, given_kernel, parity_case, summary

    kernel, known = given(item), len(parity_case.RECORDS)
    before = launch.launch_count(), given_kernel.calls
    fitting.left_out.clear()
    result = yield
    launches, calls = launch.launch_count() - before[0], given_kernel.calls - before[1]
    if kernel is not None and not calls and fitting.left_out:
        pytest.skip(fitting.left_out[0])
    if kernel is not None and not calls:
        pytest.fail(f"this test is about {kernel.name} and never called it", pytrace=False)
    if kernel is None and not launches:
        pytest.fail("this test names the Triton kernel and never launched it", pytrace=False)
    # Reports carry the figures to the summary, also from the workers of pytest-xdist.
    item.user_properties += [(summary.COMPARED, asdict(record)) for record in parity_case.RECORDS[known:]]
    item.user_properties += [(summary.LEFT_OUT, reason) for reason in fitting.left_out]
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print which kernels ran, the worst figures per dtype, and what did not run."""
    from . import summary

    summary.write(terminalreporter, kernels_of(config), config.stash.get(_DESELECTED, []))
