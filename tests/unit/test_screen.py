"""What a run says on the screen: speed-ups, and who is faster beside peers."""

from __future__ import annotations

from nsa_sel.bench.report import screen
from nsa_sel.bench.saved.speedups import scope as scope_of
from nsa_sel.bench.suite import cases
from nsa_sel.bench.suite.cases import Case


def result(case: Case, method: str, device_us: float) -> dict:
    about = {"case": case.id, "family": case.family, "layout": case.layout, "scope": scope_of(method)}
    about |= {"method": method, "device_us": device_us, "gbps": 100.0, "pct_of_limit": 50.0, "ci95_us": [1.0, 2.0]}
    return about | {"gpu": "Testcard", "sdpa_backend": "flash", "call_us": None, "graph_us": 3.0, "mae": 1e-4}


def test_summary_compares_with_the_fastest_sdpa_form_of_the_same_scope():
    fast, slow = (cases.rows_case("bf16", "few", 8, 128, 128, L, 64) for L in (64, 128))
    results = [
        *(result(fast, m, us) for m, us in [("triton", 10.0), ("packed_sdpa", 80.0), ("packed_sdpa_compiled", 40.0)]),
        *(result(fast, m, us) for m, us in [("triton_core", 10.0), ("sdpa_core", 15.0)]),
        *(result(slow, m, us) for m, us in [("triton", 10.0), ("packed_sdpa", 90.0), ("triton_core", 20.0)]),
    ]
    ratios = {(s.case, s.scope): s.ratio for s in screen.speedups(results)}
    assert ratios == {(fast.id, "op"): 4.0, (fast.id, "core"): 1.5, (slow.id, "op"): 9.0}
    lines = screen.screen(results)
    assert lines[1].split() == ["rows", "few", "2", "6.00", "1.50", "100", "50", "%"]
    assert any(line.startswith(" 1.50x core") and fast.id in line for line in lines)
    assert len(screen.aligned(screen.table(results))) == len(results) + 1


def beside(method: str, us: float, **more: str) -> dict:
    return {"case": "a", "method": method, "device_us": us, "family": "decode", **more}


def test_the_table_says_who_is_faster_and_why_a_time_is_missing():
    timed = [beside("triton", 10.0), beside("fla_nsa", 9.0, peer="fla-core 1.2"), beside("dense", 2.0)]
    missing = {("a", "flex_attention"): "wrong: 3 rows", ("a", "flashinfer_paged"): "no GPU"}
    lines, notes = screen.peers(timed, missing)
    assert lines[1] == ["a", "10.0", "wrong [1]", "9.0 (0.90x)", "n/a [2]", "2.0 (0.20x)", "-", "-", "-"]
    assert notes == [
        "faster than triton: fla_nsa in a, 9.0 against 10.0 µs",
        "fla_nsa: fla-core 1.2",
        "dense: other work, the whole context; for scale",
        "[1] flex_attention: wrong: 3 rows",
        "[2] flashinfer_paged: no GPU",
    ]
    shown = screen.peers_screen(timed, missing)
    assert shown[1].split() == ["fla_nsa", "decode", "1", "0.90", "0.90"]
    assert shown[-2:] == ["1 x flex_attention: wrong: 3 rows", "1 x flashinfer_paged: no GPU"]
    elsewhere = {("b", "packed_sdpa_compiled"): "torch.compile failed"}  # a case that is not beside peers
    assert screen.peers_screen(timed, missing | elsewhere) == shown
    assert screen.peers(timed[:1], elsewhere) == ([], []) and screen.peers_screen(timed[:1], elsewhere) == []
    assert screen.peers(timed[:1], {}) == ([], []) and screen.peers_screen(timed[:1], {}) == []


def test_a_case_with_pages_is_shown_over_its_twin():
    twin, paged, hnd = (case for case in cases.matrix("full", family="paged")[:5] if case.pages[-2:] in ("", "64"))
    results = [
        *(result(twin, m, us) for m, us in [("triton", 10.0), ("packed_sdpa", 80.0), ("mine", 20.0)]),
        *(result(paged, m, us) for m, us in [("triton", 10.4), ("packed_sdpa", 99.0)]),
        {**result(hnd, "mine", 19.0), "graph_us": 3.3},
    ]
    head, ours, mine = screen.paged_screen(results)
    assert head.split()[:3] == ["device", "graph", "call"]
    assert ours.split() == ["1.04", "1.00", "-", paged.id, "triton"]
    assert mine.split() == ["0.95", "1.10", "-", hnd.id, "mine"]
    assert screen.paged_screen(results[:3]) == screen.paged_screen(results[3:]) == []
