"""The check that "auto" is never far from the better form: its rule, and that what looks slow is measured again."""

from __future__ import annotations

import pytest

from nsa_sel import UnsupportedError
from nsa_sel.bench.checks import auto
from nsa_sel.bench.methods.contender import NotTimed
from nsa_sel.bench.suite import cases
from nsa_sel.bench.timer.timing import WallTimer

CASE = cases.matrix("smoke")[0]


def test_the_allowance_is_ten_percent_and_two_microseconds_over_the_better():
    assert auto.excess(13.0, 10.0, 50.0) == pytest.approx(0.0)
    assert auto.excess(13.1, 10.0, 50.0) > 0
    assert auto.excess(13.1, 50.0, 10.0) > 0
    assert auto.excess(12.9, 10.0, 50.0) < 0


@pytest.mark.parametrize(("times", "reported", "measured"), [([9, 9], 0, 1), ([30, 9], 0, 2), ([30, 30], 1, 2)])
def test_a_case_is_reported_when_it_is_slow_twice(monkeypatch, times, reported, measured):
    seen = []

    def measure(calls, timer):
        seen.append(set(calls))
        return {kind: {"auto": times[len(seen) - 1] if kind == "call" else 8, "triton": 8, "packed_sdpa": 20}
                for kind in auto.KINDS}  # fmt: skip

    monkeypatch.setattr(auto, "_measure", measure)
    monkeypatch.setattr(auto, "selection_attention", lambda *tensors, **options: None)
    backend, beyond, lines = auto.judge(CASE, WallTimer())
    assert (backend, len(lines), len(seen)) == ("packed_sdpa", reported, measured)
    assert beyond["device"] < 0 and (beyond["call"] > 0) == bool(reported)
    assert all(CASE.id in line and "call" in line for line in lines)


def test_a_form_that_cannot_run_is_no_time(monkeypatch):
    monkeypatch.setattr(auto, "selection_attention", _refuse)
    with pytest.raises(NotTimed, match="refused"):
        auto.judge(CASE, WallTimer())


def _refuse(*tensors, **options):
    raise UnsupportedError("refused")


def test_the_command_shows_the_time_left(monkeypatch, capsys):
    for name, value in (("is_available", True), ("get_device_name", "NVIDIA Synthetic"), ("empty_cache", None)):
        monkeypatch.setattr(auto.torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(auto, "DeviceTimer", WallTimer)
    monkeypatch.setattr(auto, "judge", lambda case, timer: ("triton", dict.fromkeys(auto.KINDS, -1.0), []))
    n = len(cases.matrix("hot", family="decode"))
    assert auto.main(["--matrix", "hot", "--family", "decode"]) == 0
    said = capsys.readouterr()
    assert f"{n}/{n}, 0:00 left: cases" in said.err and f"triton in {n} of {n} cases" in said.out


def test_an_unknown_family_is_refused_in_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        auto.main(["--family", "nonsense"])
    assert capsys.readouterr().err.count("\n") == 1
