"""Time every method of every case: `pytest tests/perf --benchmark-autosave`."""

from __future__ import annotations

import functools

import pytest
import torch

from nsa_sel.bench.compare import hooks
from nsa_sel.bench.methods.contender import NotTimed, WrongResult
from nsa_sel.bench.resume import plugin as resume
from nsa_sel.bench.session import Session
from nsa_sel.bench.suite import cases, kernels
from nsa_sel.bench.suite.kernels import kernels_of
from nsa_sel.bench.timer import timing


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    name = option("sel_matrix") or ("full" if torch.cuda.is_available() else "smoke")
    try:
        chosen = cases.matrix(name, option("sel_dtype"), option("sel_family"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    # Names, not objects: pytest-benchmark saves the parameters. The methods of a case stay adjacent in time.
    metafunc.config.stash[CASES] = {case.id: case for case in chosen}
    try:
        given = kernels_of(metafunc.config)
    except pytest.UsageError:  # said when everything is collected: here it would be an error of this file
        given = ()
    pairs = [(case.id, method) for case in chosen for method in kernels.methods(case, given)]
    metafunc.parametrize(("case_id", "method"), pairs, ids=[f"{case_id}-{method}" for case_id, method in pairs])


CASES = pytest.StashKey[dict[str, cases.Case]]()


@pytest.mark.benchmark(timer=timing.tick, disable_gc=True)
@pytest.mark.filterwarnings("ignore")  # whatever torch and the compilers warn of, it is no reason to lose a measurement
def test_sel(case_id, method, benchmark, bench: Session, pytestconfig: pytest.Config) -> None:
    case = pytestconfig.stash[CASES][case_id]
    measure_again = functools.partial(bench.measure_again, case, method)
    if resume.holds(pytestconfig, case_id, method):
        hooks.register_remeasure(case_id, method, measure_again)
        return
    benchmark.group = case_id
    try:
        with bench.ready(case, method) as (prepared, extra):
            benchmark.pedantic(
                prepared.call, setup=bench.timer.setup, rounds=timing.ROUNDS, warmup_rounds=timing.WARMUP_ROUNDS
            )
            if benchmark.stats is not None:  # None: --benchmark-disable
                benchmark.extra_info.update(extra)
                benchmark.extra_info.update(bench.figures(case, prepared, benchmark.stats.stats.data))
    except NotTimed as reason:
        benchmark.has_error = True
        hooks.register_skipped(case_id, method, str(reason))
        pytest.skip(f"not timed: {reason}")
    except BaseException as error:  # an interrupt too
        benchmark.has_error = True  # else half a measurement would be saved, or a run could not be saved at all
        if isinstance(error, WrongResult):  # its lines as they are, to be pasted
            raise pytest.fail.Exception(str(error), pytrace=False) from None
        if isinstance(error, Exception) and bench.lost():
            pytest.exit(f"the GPU no longer answers since {case_id} {method}: {error}", returncode=1)
        raise
    hooks.register_remeasure(case_id, method, measure_again)
