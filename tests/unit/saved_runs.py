"""Saved runs with a known answer, in pytest-benchmark's JSON form; every figure in them is made up.

`run` and `cpu_run` measure whole cases of the matrix; `entry` is one time under any name, for tests of the comparison.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from nsa_sel.bench.compare import noise
from nsa_sel.bench.saved import run as runs
from nsa_sel.bench.saved.speedups import scope
from nsa_sel.bench.suite.cases import Case

GPU = "NVIDIA Synthetic"
IDENTITY = {"gpu": GPU, "gpu_id": "0f1e2d", "driver": "580.0", "torch": "2.11.0+cu130", "triton": "3.6.0"}
H200 = {"gpu": "NVIDIA H200", "gpu_id": "aa11", "driver": "580.1", "torch": "2.11.0", "triton": "3.6.0"}
WHEN = "2026-01-01T00:00:00+00:00"
READ_LIMIT_US = [[0.25e6, 3.5], [2.2e6, 4.0], [8.7e6, 5.4], [33.6e6, 10.8], [134e6, 32.6], [540e6, 121.0]]  # bytes
Speedup = Callable[[Case, str], float]  # (case, "device" | "call" | "graph") -> fastest SDPA form's time / Triton's


def run(
    cases: Iterable[Case],
    speedup: Speedup | float = 3.0,
    *,
    half_width: float = 0.005,
    without: Collection[tuple[str, str]] = (),
    not_timed: Mapping[tuple[str, str], str] | None = None,
    when: str = "2026-11-20T10:00:00+00:00",
    identity: Mapping[str, str] = IDENTITY,
) -> dict[str, Any]:
    """Return a GPU run in which Triton has exactly this `op` speed-up over the fastest SDPA form.

    half_width: of each 95 % interval, relative to its median. without: (case id, method) pairs that were not asked for.
    not_timed: pairs that were, and why they have no time.
    """
    ratio = speedup if callable(speedup) else lambda case, kind: speedup
    entries = [
        entry_of(
            case,
            method,
            {kind: _time_us(case, method, kind, ratio(case, kind)) for kind in _BASE},
            half_width,
            identity,
        )
        for case in cases
        for method in case.methods
        if (case.id, method) not in without and (case.id, method) not in (not_timed or {})
    ]
    calibration = {
        "tick_us": 0.032,
        "null_kernel_us": {"device": 2.8, "graph": 1.1, "eager": 4.4},
        "copy_gbps": 4240.0,
        "read_limit_us": READ_LIMIT_US,
    }
    made = document(entries, when, {**identity, "cuda": "13.0", "calibration": calibration})
    if not_timed:
        reasons = [{"case": case, "method": method, "reason": why} for (case, method), why in not_timed.items()]
        made[runs.MARK] = {"not_timed": reasons}
    return made


def cpu_run(cases: Iterable[Case], when: str = "2026-11-20T10:00:00+00:00") -> dict[str, Any]:
    """Return a run as a machine without a GPU makes it: references only, wall-clock time, no GPU figures."""
    identity = {"gpu": None, "gpu_id": None, "driver": None, "torch": "2.13.0+cpu", "triton": "3.7.1"}
    entries = []
    for case in cases:
        for method in ("packed_sdpa", "sdpa_core"):
            made = entry_of(case, method, {"device": 1e3 * case.L}, 0.05, identity)
            for key in ("gbps", "limit_us", "pct_of_limit"):
                made["extra_info"][key] = None
            entries.append(made)
    return document(entries, when, identity)


def document(
    entries: list[dict[str, Any]],
    when: str = WHEN,
    machine: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Return a saved run of these entries, measured at `when`; more: other keys at its top."""
    return {
        "machine_info": {"node": "synthetic", "machine": "x86_64", "cpu": {"brand_raw": "None"}, **(machine or {})},
        "commit_info": {"id": "c0ffee0123456789", "branch": "main", "dirty": False},
        "benchmarks": entries,
        "datetime": when,
        "version": "5.3.1",
        **more,
    }


def entry_of(
    case: Case, method: str, times_us: Mapping[str, float], half_width: float, identity: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the entry of a case of the matrix; times_us: "device" and, where measured, "call" and "graph"."""
    device = times_us["device"]
    size = case.N * (case.L * (case.D + case.Dv) + case.H * (case.D + case.Dv)) * 2
    extra = {
        **{name: getattr(case, name) for name in ("family", "dtype", "layout", "H", "D", "Dv", "L", "N", "seed")},
        "scope": scope(method),
        "bytes": size,
        "bytes_rows": size * (4 if case.family == "prefill" else 1),  # more than `bytes` where rows share tokens
        "gbps": size / device / 1e3,
        "limit_us": _limit_us(case),
        "pct_of_limit": None if case.family == "prefill" else 100 * _limit_us(case) / device,
        "mae": 2e-4,
        "config" if method.startswith("triton") else "sdpa_backend": "gather BL64 w4 s3"
        if "triton" in method
        else "cudnn",
        **identity,
    }
    for kind in ("call", "graph"):
        time = times_us.get(kind)
        extra |= {f"{kind}_us": time, f"{kind}_ci95_us": None if time is None else _around(time, half_width)}
    return entry(case.id, method, device, spread=half_width, ci=half_width, **extra)


def entry(case: str, method: str, us: float, *, spread: float = 0.02, ci: float = 0.002, **more: Any) -> dict[str, Any]:
    """Return one entry: quartiles at us * (1 +- spread), 95 % interval at us * (1 +- ci), mean at the median.

    more: statistics in seconds, or keys of extra_info, in place of these or beside them.
    """
    q1, q3 = (bound * 1e-6 for bound in _around(us, spread))
    stats = {"min": q1, "max": q3, "mean": us * 1e-6, "median": us * 1e-6, "q1": q1, "q3": q3, "iqr": q3 - q1}
    stats |= {"stddev": spread * us * 1e-6, "rounds": 50, "iterations": 1, "total": us * 50e-6, "ops": 1e6 / us}
    stats |= {"ld15iqr": q1, "hd15iqr": q3, "outliers": "0;0"}
    stats |= {name: more.pop(name) for name in list(more) if name in stats}
    name = f"test_sel[{case}-{method}]"
    return {
        "group": case,
        "name": name,
        "fullname": f"tests/perf/test_sel.py::{name}",
        "params": None,
        "param": f"{case}-{method}",
        "extra_info": {"case": case, "method": method, "ci95_us": _around(us, ci), **H200, **more},
        "options": {"disable_gc": False, "min_rounds": 5, "warmup": False},
        "stats": stats,
    }


def as_run(entries: list[dict[str, Any]], **more: Any) -> runs.Run:
    """Return entries as a loaded run."""
    return runs.from_entries("a run", entries, more.pop("machine_info", {}), **more)


def save(data: Mapping[str, Any], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=4))
    return path


def save_entries(folder: Path, name: str, entries: list[dict[str, Any]], when: str = WHEN, **more: Any) -> Path:
    """Write a run of these entries to `<folder>/<name>.json`."""
    return save(document(entries, when, **more), folder / f"{name}.json")


def use_noise(monkeypatch: Any, folder: Path, device: dict[str, list], host: list | None = None) -> None:
    """Let `noise` be the table of the cards: device bins by GPU, and bins of call and graph times."""
    host = host or [[None, 0, 0, 0, 1]]
    path = folder / f"noise-{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps({gpu: {"device": bins, "call": host, "graph": host} for gpu, bins in device.items()}))
    monkeypatch.setattr(noise, "TABLE", path)


_BASE = {"device": 1.0, "call": 1.1, "graph": 0.9}  # of the device time
# SDPA forms over the fastest one of the case: the compiled form where it is measured, else the one with fused packing.
_SLOWER_FORM = {"packed_sdpa": 1.4, "packed_sdpa_fused": 1.2}


def _around(us: float, share: float) -> list[float]:
    return [us * (1 - share), us * (1 + share)]


def _limit_us(case: Case) -> float:
    return 3.5 + case.N * case.L * (case.D + case.Dv) * 2 / 4.6e6


def _time_us(case: Case, method: str, kind: str, speedup: float) -> float:
    triton = _BASE[kind] * _limit_us(case) / 0.85 + (8.0 if kind == "call" else 0.0)
    if method in ("triton", "triton_core"):
        return triton
    if method == "sdpa_core":
        return 1.3 * triton
    fastest = "packed_sdpa_compiled" if case.hot else "packed_sdpa_fused"
    return triton * speedup * (1.0 if method == fastest else _SLOWER_FORM[method])


def with_kernel(
    data: dict[str, Any], name: str, times_ours: float, *, spec: str = "mine:f", takes: str = "ranges"
) -> dict[str, Any]:
    """Return a run in which a user's kernel takes so many times ours in every case that was measured with it."""
    added = []
    for original in data["benchmarks"]:
        extra = original["extra_info"]
        if not extra["method"].startswith("triton"):
            continue
        made = copy.deepcopy(original)
        method = extra["method"].replace("triton", name)
        made["extra_info"] |= {"method": method, "config": f"{spec}, {takes}", "kernel": spec, "takes": takes}
        for times, keys in ((made["stats"], ("median", "q1", "q3")), (made["extra_info"], ("call_us", "graph_us"))):
            times |= {key: times[key] * times_ours for key in keys if times.get(key)}
        for key in ("ci95_us", "call_ci95_us", "graph_ci95_us"):
            if made["extra_info"].get(key):
                made["extra_info"][key] = [bound * times_ours for bound in made["extra_info"][key]]
        added.append(made)
    return {**data, "benchmarks": [*data["benchmarks"], *added]}
