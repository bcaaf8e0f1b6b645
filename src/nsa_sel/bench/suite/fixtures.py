"""A plugin of pytest, named in tests/conftest.py: the cases of a run, and the fixtures that are parametrized over them.

A test that asks for `shape`, `distribution` or `sel_case` runs for each case of one list, with `kernel` for each of its
methods, which stay adjacent. Source: docs/cases.md.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest

from . import cases as matrix
from . import random_cases
from .cases import Case
from .chosen import asked_for, cases_of, random_of
from .kernels import kernels_of, methods

pytest_plugins = [f"{__package__}.kernel_options"]  # whose kernels are methods too

FAMILY_HELP = (
    f"only these, with commas: {', '.join(matrix.FAMILIES)}; {matrix.PEERS}: beside other people's kernels; "
    f"{matrix.PAGED}: calls of servers, K and V in pages and without; {matrix.SHARED}: prefill with queries that "
    f"select more and less alike; {matrix.TRAINING}: forward and backward pass (default: all but these four)"
)


class Shape(NamedTuple):
    """Hold the sizes of a case; what they mean says `Case`."""

    family: str
    dtype: str
    H: int
    D: int
    Dv: int
    L: int
    N: int
    S: int
    G: int
    S_kv: int
    block: int


class Hooks:
    """The hook of this plugin, for a conftest.py or a plugin of one's own."""

    @staticmethod
    @pytest.hookspec
    def pytest_nsa_sel_cases(config: pytest.Config, cases: list[Case]) -> None:
        """Narrow or extend the cases of the run: change the list in place, and return nothing.

        cases: what --sel-matrix, --sel-dtype and --sel-family chose, or --sel-cases holds, in the order of measuring.
        Called once.
        """


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.add_hookspecs(Hooks)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nsa_sel")
    cases_help = "cases to time (default: full on a GPU, else smoke); random: drawn over the whole supported range"
    group.addoption("--sel-matrix", choices=random_cases.MATRICES, help=cases_help)
    random_cases.add_options(group.addoption)
    group.addoption("--sel-dtype", choices=matrix.DTYPES, default="bf16", help="dtype of the cases (default: bf16)")
    group.addoption("--sel-family", metavar="NAMES", help=FAMILY_HELP)
    group.addoption("--sel-cases", metavar="FILE", help="a YAML file of cases, in place of the matrix (docs/cases.md)")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a bad choice of cases before anything is collected, in one line."""
    if any(config.getoption(name) is not None for name in ("sel_cases", "sel_family", "sel_seed", "sel_count")):
        asked_for(config)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say which random cases the run was of, so that it can be repeated."""
    if random := random_of(config):
        terminalreporter.write_line(
            f"random cases: --sel-matrix random --sel-seed {random['seed']} --sel-count {random['count']}"
            f" (rows to {random_cases.here().rows}, tokens to {random_cases.here().tokens})"
        )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize the fixtures below through what they ask for: names and numbers, which pytest-benchmark saves."""
    asked = [name for name in ("case_id", *matrix.PARAMETERS, "method") if name in metafunc.fixturenames]
    if not asked or not {"shape", "distribution", "kernel"} & set(metafunc.fixturenames):
        return
    try:
        cases = cases_of(metafunc.config)
    except pytest.UsageError as error:  # raised in a hook of the collection it would be shown with a traceback
        raise pytest.Collector.CollectError(str(error)) from None
    try:
        given = kernels_of(metafunc.config)
    except pytest.UsageError:  # said when everything is collected: here it would be an error of the test's file
        given = ()
    values, ids = [], []
    for case in cases.values():
        for method in methods(case, given) if "method" in asked else [""]:
            known = {**case.parameters, "case_id": case.id, "method": method}
            values.append([known[name] for name in asked])
            ids.append(f"{case.id}-{method}".removesuffix("-"))
    metafunc.parametrize(asked, values, ids=ids)


@pytest.fixture
def shape(
    family: str, dtype: str, H: int, D: int, Dv: int, L: int, N: int, S: int, G: int, S_kv: int, block: int
) -> Shape:
    """The sizes of a case: heads per group, widths, L selected tokens in each of N rows, the context."""
    return Shape(family, dtype, H, D, Dv, L, N, S, G, S_kv, block)


@pytest.fixture
def distribution(layout: str) -> str:
    """The name of the distribution by which the rows of a case select: few, many, mixed, local, ..."""
    return layout


@pytest.fixture
def sel_case(shape: Shape, distribution: str, case_id: str, pytestconfig: pytest.Config) -> Case:
    """The case: a shape whose rows select by a distribution; `make_inputs(case, device)` draws its tensors."""
    return replace(cases_of(pytestconfig)[case_id], layout=distribution, **shape._asdict())


@pytest.fixture
def kernel(method: str) -> str:
    """The method that is timed in a case: this package's kernel, a form of SDPA, or another kernel."""
    return method
