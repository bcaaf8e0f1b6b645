"""The fixtures of the perf suite: their parameters, what -k selects, and the hook that changes the list of cases."""

from __future__ import annotations

from pathlib import Path

import pytest

import nsa_sel
from nsa_sel.bench.suite import cases
from tests.programs import python

pytest_plugins = ["pytester"]
ROOT = Path(nsa_sel.__file__).parents[2]
CONFTEST = 'pytest_plugins = ["nsa_sel.bench.suite.fixtures"]\n'
HOOK = """
from nsa_sel.bench.suite import cases as suite

def pytest_nsa_sel_cases(config, cases):
    {}
"""
SUITE = """
def test_sel(sel_case, kernel, request):
    params = request.node.callspec.params
    print(dict(params))
    assert params["case_id"] == sel_case.id and params["method"] == kernel
    assert {name: params[name] for name in sel_case.parameters} == sel_case.parameters
"""


@pytest.fixture
def suite(pytester):
    """Return a function that runs a small suite whose conftest.py has the body of a hook, or none."""
    pytester.makepyfile(SUITE)

    def run(*options, hook=""):
        pytester.makeconftest(CONFTEST + (HOOK.format(hook) if hook else ""))
        plain = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest", "--sel-matrix=smoke", "-q")
        return pytester.runpytest_inprocess(*plain, *options)

    return run


def collected(result) -> list[str]:
    return [line.partition("::")[2] for line in result.outlines if "::" in line]


def test_every_method_of_a_case_stands_beside_the_others(suite):
    expected = [f"test_sel[{case.id}-{method}]" for case in cases.matrix("smoke") for method in case.methods]
    assert collected(suite("--collect-only")) == expected


def test_the_fixtures_are_the_case_of_the_parameters(suite):
    done = suite("-rA", "-k", "decode and triton_core")
    done.assert_outcomes(passed=3)
    done.stdout.fnmatch_lines(
        ["{'case_id': 'decode-bf16-H4-D64-Dv64-L512-N4-t512-few', 'family': 'decode', *'L': 512, *"]
    )


def test_k_selects_by_shape(suite):
    by_k = collected(suite("--collect-only", "-k", "H4 and L64 and mixed and sdpa_core"))
    assert by_k == ["test_sel[rows-bf16-H4-D64-Dv64-L64-N64-mixed-sdpa_core]"]
    of_16 = [case.id for case in cases.matrix("smoke") if case.L == 16]
    exact = collected(suite("--collect-only", "-k", "L16- and sdpa_core"))
    assert exact == [f"test_sel[{name}-sdpa_core]" for name in of_16]


def test_a_test_without_a_kernel_runs_once_for_each_case(suite, pytester):
    pytester.makepyfile(
        test_own="""
        from nsa_sel.bench.suite.distributions import DISTRIBUTIONS

        def test_own(shape, distribution, H):
            assert shape.H == H and shape.L * shape.N > 0 and distribution in DISTRIBUTIONS
        """
    )
    done = suite("test_own.py")
    done.assert_outcomes(passed=len(cases.matrix("smoke")))


def test_a_hook_narrows_the_list(suite):
    hook = "cases[:] = [case for case in cases if case.family == 'decode']"
    expected = [f"test_sel[{case.id}-triton]" for case in cases.matrix("smoke", family="decode")]
    assert collected(suite("--collect-only", "-k", "triton and not triton_core", hook=hook)) == expected


@pytest.mark.parametrize("layout", ["local", "random", "zipf"])
def test_a_hook_adds_cases_that_no_matrix_has(suite, layout):
    hook = f"cases.append(suite.prefill_case(config.getoption('sel_dtype'), {layout!r}, 4, 64, 64, 512, 1024, 1))"
    found = collected(suite("--collect-only", "--sel-dtype=fp16", "-k", "prefill and packed_sdpa_fused", hook=hook))
    assert found == [f"test_sel[prefill-fp16-H4-D64-Dv64-L512-N1024-S1024-{layout}-packed_sdpa_fused]"]
    suite("-k", "prefill", hook=hook).assert_outcomes(passed=5)


def test_plugins_and_conftests_change_the_list_one_after_another(suite, pytester):
    pytester.makepyfile(narrower="def pytest_nsa_sel_cases(config, cases):\n    del cases[1:]\n")
    pytester.syspathinsert()
    hook = "cases.append(suite.rows_case('bf16', 'few', 8, 64, 64, 2048, 4))"
    found = collected(suite("--collect-only", "-p", "narrower", "-k", "sdpa_core", hook=hook))
    assert {name.split("-N")[0] for name in found} == {"test_sel[rows-bf16-H4-D64-Dv64-L16"}
    found = collected(suite("--collect-only", "-k", "sdpa_core and L2048", hook=hook))
    assert found == ["test_sel[rows-bf16-H8-D64-Dv64-L2048-N4-few-sdpa_core]"]


@pytest.mark.parametrize(
    ("hook", "said"),
    [
        ("return cases[:3]", "pytest_nsa_sel_cases: returned a value, expected the list changed in place"),
        ("cases.append(cases[0])", "pytest_nsa_sel_cases: rows-bf16-*-few is there twice, expected *"),
        (
            "cases.append(suite.rows_case('bf16', 'blocky', 8, 64, 64, 64, 4))",
            "layout: value is 'blocky', expected a distribution: few, *",
        ),
    ],
)
def test_a_list_that_cannot_be_measured_is_refused(suite, hook, said):
    refused = suite(hook=hook)
    assert refused.ret == pytest.ExitCode.INTERRUPTED
    refused.stdout.fnmatch_lines(["*ERROR collecting test_*", said, "*short test summary*"], consecutive=True)


def test_the_perf_suite_shows_the_fixtures_and_what_they_are():
    shown = python("-m", "pytest", "-p", "no:cacheprovider", "--fixtures", "tests/perf").stdout
    lines = shown.splitlines()
    for name in ("shape", "distribution", "sel_case", "kernel"):
        (at,) = (number for number, line in enumerate(lines) if line.startswith(f"{name} -- "))
        assert lines[at + 1].startswith("    The ")


def test_the_perf_suite_refuses_an_unknown_family_in_a_line():
    refused = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/perf", "--sel-family=columns")
    assert refused.returncode == pytest.ExitCode.USAGE_ERROR
    assert refused.stderr.strip().startswith("ERROR: family: value is 'columns', expected one of rows")
    assert len(refused.stderr.strip().splitlines()) == 1 and not refused.stdout.strip()
