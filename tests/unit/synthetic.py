"""Saved runs with a known answer, in pytest-benchmark's JSON form; every figure in them is made up."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from nsa_sel.bench.suite.cases import Case, scope

GPU = "NVIDIA Synthetic"
IDENTITY = {"gpu": GPU, "gpu_id": "0f1e2d", "driver": "580.0", "torch": "2.11.0+cu130", "triton": "3.6.0"}
READ_LIMIT_US = [[0.25e6, 3.5], [2.2e6, 4.0], [8.7e6, 5.4], [33.6e6, 10.8], [134e6, 32.6], [540e6, 121.0]]  # bytes
Speedup = Callable[[Case, str], float]  # (case, "device" | "call" | "graph") -> faster SDPA form's time / Triton's


def run(
    cases: Iterable[Case],
    speedup: Speedup | float = 3.0,
    *,
    half_width: float = 0.005,
    without: Collection[tuple[str, str]] = (),
    when: str = "2026-11-20T10:00:00+00:00",
    identity: Mapping[str, str] = IDENTITY,
) -> dict[str, Any]:
    """Return a GPU run in which Triton has exactly this `op` speed-up over the faster SDPA form.

    half_width: of each 95 % interval, relative to its median. without: (case id, method) pairs that were not measured.
    """
    ratio = speedup if callable(speedup) else lambda case, kind: speedup
    benchmarks = [
        benchmark(
            case,
            method,
            {kind: _time_us(case, method, kind, ratio(case, kind)) for kind in _BASE},
            half_width,
            identity,
        )
        for case in cases
        for method in case.methods
        if (case.id, method) not in without
    ]
    calibration = {
        "tick_us": 0.032,
        "null_kernel_us": {"device": 2.8, "graph": 1.1, "eager": 4.4},
        "copy_gbps": 4240.0,
        "read_limit_us": READ_LIMIT_US,
    }
    return document(benchmarks, {**identity, "cuda": "13.0", "calibration": calibration}, when)


def cpu_run(cases: Iterable[Case], when: str = "2026-11-20T10:00:00+00:00") -> dict[str, Any]:
    """Return a run as a machine without a GPU makes it: references only, wall-clock time, no GPU figures."""
    identity = {"gpu": None, "gpu_id": None, "driver": None, "torch": "2.13.0+cpu", "triton": "3.7.1"}
    benchmarks = []
    for case in cases:
        for method in ("packed_sdpa", "sdpa_core"):
            entry = benchmark(case, method, {"device": 1e3 * case.L}, 0.05, identity)
            for key in ("gbps", "limit_us", "pct_of_limit"):
                entry["extra_info"][key] = None
            benchmarks.append(entry)
    return document(benchmarks, identity, when)


def document(benchmarks: list[dict[str, Any]], machine: Mapping[str, Any], when: str) -> dict[str, Any]:
    return {
        "machine_info": {"node": "synthetic", "machine": "x86_64", "cpu": {"brand_raw": "None"}, **machine},
        "commit_info": {"id": "c0ffee0123456789", "branch": "main", "dirty": False},
        "benchmarks": benchmarks,
        "datetime": when,
        "version": "5.3.1",
    }


def benchmark(
    case: Case, method: str, times_us: Mapping[str, float], half_width: float, identity: Mapping[str, Any]
) -> dict[str, Any]:
    """Return one entry; times_us: "device" and, where measured, "call" and "graph"."""
    device = times_us["device"]
    size = case.N * (case.L * (case.D + case.Dv) + case.H * (case.D + case.Dv)) * 2

    def interval(time: float | None) -> list[float] | None:
        return None if time is None else [time * (1 - half_width), time * (1 + half_width)]

    extra = {
        **{name: getattr(case, name) for name in ("family", "dtype", "layout", "H", "D", "Dv", "L", "N", "seed")},
        "case": case.id,
        "method": method,
        "scope": scope(method),
        "bytes": size,
        "bytes_rows": size,
        "gbps": size / device / 1e3,
        "limit_us": _limit_us(case),
        "pct_of_limit": None if case.family == "prefill" else 100 * _limit_us(case) / device,
        "ci95_us": interval(device),
        "mae": 2e-4,
        "config" if method.startswith("triton") else "sdpa_backend": "gather BL64 w4 s3"
        if "triton" in method
        else "cudnn",
        **identity,
    }
    for kind in ("call", "graph"):
        extra |= {f"{kind}_us": times_us.get(kind), f"{kind}_ci95_us": interval(times_us.get(kind))}
    name = f"test_sel[{case.id}-{method}]"
    seconds = device / 1e6
    stats = {
        **dict.fromkeys(("min", "max", "mean", "median", "hd15iqr", "ld15iqr"), seconds),
        "q1": seconds * (1 - half_width),
        "q3": seconds * (1 + half_width),
        "iqr": 2 * half_width * seconds,
        "stddev": half_width * seconds,
        "rounds": 50,
        "iterations": 1,
    }
    return {
        "group": case.id,
        "name": name,
        "fullname": f"tests/perf/test_sel.py::{name}",
        "params": None,
        "param": f"{case.id}-{method}",
        "extra_info": extra,
        "options": {"disable_gc": False, "min_rounds": 5, "warmup": False},
        "stats": stats,
    }


def save(data: Mapping[str, Any], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


_BASE = {"device": 1.0, "call": 1.1, "graph": 0.9}  # of the device time
_SLOWER_FORM = 1.4  # eager packed SDPA, where the compiled form is the faster one


def _limit_us(case: Case) -> float:
    return 3.5 + case.N * case.L * (case.D + case.Dv) * 2 / 4.6e6


def _time_us(case: Case, method: str, kind: str, speedup: float) -> float:
    triton = _BASE[kind] * _limit_us(case) / 0.85 + (8.0 if kind == "call" else 0.0)
    if method in ("triton", "triton_core"):
        return triton
    if method == "sdpa_core":
        return 1.3 * triton
    return triton * speedup * (_SLOWER_FORM if method == "packed_sdpa" and case.hot else 1.0)
