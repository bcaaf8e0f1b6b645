"""A plugin of pytest, named in tests/conftest.py: the cases of a run, and the fixtures that are parametrized over them.

A test that asks for `shape`, `distribution` or `sel_case` runs for each case of one list, with `kernel` for each of its
methods, which stay adjacent. Source: docs/cases.md.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

from . import cases as matrix
from .cases import Case

_CASES = pytest.StashKey[dict[str, Case]]()
FAMILY_HELP = f"only these, with commas: {', '.join(matrix.FAMILIES)}; {matrix.PEERS}: beside other people's kernels"


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


OF_CASE = (*Shape._fields, "layout")  # parameters of a test, beside case_id and method


class Hooks:
    """The hook of this plugin, for a conftest.py or a plugin of one's own."""

    @staticmethod
    @pytest.hookspec
    def pytest_nsa_sel_cases(config: pytest.Config, cases: list[Case]) -> None:
        """Narrow or extend the cases of the run: change the list in place, and return nothing.

        cases: what --sel-matrix, --sel-dtype and --sel-family chose, in the order of measuring. Called once.
        """


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.add_hookspecs(Hooks)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nsa_sel")
    group.addoption("--sel-matrix", choices=matrix.MATRICES, help="cases to time (default: full on a GPU, else smoke)")
    group.addoption("--sel-dtype", choices=matrix.DTYPES, default="bf16", help="dtype of the cases (default: bf16)")
    group.addoption("--sel-family", metavar="NAMES", help=FAMILY_HELP)


def cases_of(config: pytest.Config) -> dict[str, Case]:
    """Return the cases of the run by their ids, in the order of measuring.

    Raises:
        pytest.UsageError: an unknown family, or a hook that returns a value or leaves two cases of one id.
    """
    if _CASES not in config.stash:
        option = config.getoption
        name = option("sel_matrix") or ("full" if torch.cuda.is_available() else "smoke")
        try:
            chosen = matrix.matrix(name, option("sel_dtype"), option("sel_family"))
            returned = config.hook.pytest_nsa_sel_cases(config=config, cases=chosen)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None
        if returned:
            raise pytest.UsageError("pytest_nsa_sel_cases: returned a value, expected the list changed in place")
        if twice := [name for name, count in Counter(case.id for case in chosen).items() if count > 1]:
            raise pytest.UsageError(f"pytest_nsa_sel_cases: {twice[0]} is there twice, expected cases of different ids")
        config.stash[_CASES] = {case.id: case for case in chosen}
    return config.stash[_CASES]


def parameters(case: Case) -> dict[str, Any]:
    """Return what pytest, a saved run and `--group-by=param:...` know of a case, by name."""
    return {"case_id": case.id, **{name: getattr(case, name) for name in OF_CASE}}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize the fixtures below through what they ask for: names and numbers, which pytest-benchmark saves."""
    asked = [name for name in ("case_id", *OF_CASE, "method") if name in metafunc.fixturenames]
    if not asked or not {"shape", "distribution", "kernel"} & set(metafunc.fixturenames):
        return
    values, ids = [], []
    for case in cases_of(metafunc.config).values():
        for method in case.methods if "method" in asked else [""]:
            known = {**parameters(case), "method": method}
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
