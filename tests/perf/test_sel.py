"""Time every method of every case: `pytest tests/perf --benchmark-autosave`."""

from __future__ import annotations

import functools

import pytest

from nsa_sel.bench.compare import hooks
from nsa_sel.bench.methods.contender import NotTimed, WrongResult
from nsa_sel.bench.resume import plugin as resume
from nsa_sel.bench.session import Session
from nsa_sel.bench.suite.cases import Case
from nsa_sel.bench.timer import timing


@pytest.mark.benchmark(timer=timing.tick, disable_gc=True)
@pytest.mark.filterwarnings("ignore")  # whatever torch and the compilers warn of, it is no reason to lose a measurement
def test_sel(sel_case: Case, kernel: str, benchmark, bench: Session, pytestconfig: pytest.Config) -> None:
    measure_again = functools.partial(bench.measure_again, sel_case, kernel)
    if resume.holds(pytestconfig, sel_case.id, kernel):
        hooks.register_remeasure(sel_case.id, kernel, measure_again)
        return
    benchmark.group = sel_case.id
    try:
        with bench.ready(sel_case, kernel) as (prepared, extra):
            benchmark.pedantic(
                prepared.call, setup=bench.timer.setup, rounds=timing.ROUNDS, warmup_rounds=timing.WARMUP_ROUNDS
            )
            if benchmark.stats is not None:  # None: --benchmark-disable
                benchmark.extra_info.update(extra)
                benchmark.extra_info.update(bench.figures(sel_case, prepared, benchmark.stats.stats.data))
    except NotTimed as reason:
        benchmark.has_error = True
        hooks.register_skipped(sel_case.id, kernel, str(reason))
        pytest.skip(f"not timed: {reason}")
    except BaseException as error:  # an interrupt too
        benchmark.has_error = True  # else half a measurement would be saved, or a run could not be saved at all
        if isinstance(error, WrongResult):  # its lines as they are, to be pasted
            raise pytest.fail.Exception(str(error), pytrace=False) from None
        if isinstance(error, Exception) and bench.lost():
            pytest.exit(f"the GPU no longer answers since {sel_case.id} {kernel}: {error}", returncode=1)
        raise
    hooks.register_remeasure(sel_case.id, kernel, measure_again)
