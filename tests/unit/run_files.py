"""Build synthetic saved runs for the tests of the comparison."""

import json
from pathlib import Path
from typing import Any

from nsa_sel.bench.saved import run as runs


def bench(case: str, method: str, us: float, *, spread: float = 0.02, ci: float = 0.002, **more: Any) -> dict:
    """Return one benchmark entry: quartiles at us * (1 +- spread), 95 % CI at us * (1 +- ci), mean at the median."""
    stats = {"median": us * 1e-6, "q1": us * (1 - spread) * 1e-6, "q3": us * (1 + spread) * 1e-6, "mean": us * 1e-6}
    stats |= {"min": stats["q1"], "max": stats["q3"], "stddev": 1e-9, "iqr": 1e-9, "ops": 1e6 / us, "rounds": 50}
    stats |= {"iterations": 1, "outliers": "0;0", "total": us * 50e-6}
    stats |= {name: more.pop(name) for name in list(more) if name in stats}
    extra = {"case": case, "method": method, "ci95_us": [us * (1 - ci), us * (1 + ci)], "gpu": "NVIDIA H200"}
    extra |= {"gpu_id": "aa11", "driver": "580.1", "torch": "2.11.0", "triton": "3.6.0"} | more
    name = f"test_sel[{case}-{method}]"
    head = {"group": case, "name": name, "fullname": f"tests/perf/test_sel.py::{name}", "params": None, "param": None}
    return head | {"extra_info": extra, "options": {}, "stats": stats}


def run_json(entries: list[dict], datetime: str = "2026-01-01T00:00:00+00:00", **more: Any) -> dict:
    """Return a saved run as pytest-benchmark writes it."""
    head = {"machine_info": {"node": "n"}, "commit_info": {"id": "abc"}, "datetime": datetime, "version": "5.3.1"}
    return head | {"benchmarks": entries} | more


def as_run(entries: list[dict], **more: Any) -> runs.Run:
    """Return entries as a loaded run."""
    return runs.from_entries("a run", entries, more.pop("machine_info", {}), **more)


def save(folder: Path, name: str, entries: list[dict], datetime: str = "2026-01-01T00:00:00+00:00", **more) -> Path:
    """Write a run to `<folder>/<name>.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(run_json(entries, datetime, **more), indent=4))
    return path
