"""Write a run that was measured without pytest as pytest-benchmark would save it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..tables import replace_file
from .figures import statistics_of
from .run import MARK, Key, gpu_name
from .storage import slug


def entry(key: Key, samples: Sequence[float], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return a timing's entry, of its samples in seconds, under the name that the perf suite gives it."""
    case, method = key
    name = f"test_sel[{case}-{method}]"
    return {
        "group": case,
        "name": name,
        "fullname": f"tests/perf/test_sel.py::{name}",
        "params": {"case_id": case, "method": method},
        "param": f"{case}-{method}",
        "extra_info": dict(extra),
        "options": {},
        "stats": statistics(samples),
    }


def statistics(samples: Sequence[float]) -> dict[str, Any]:
    """Return pytest-benchmark's statistics of samples in seconds, as an entry has them."""
    return {**statistics_of(samples).as_dict(), "iterations": 1}


def document(
    entries: Sequence[Mapping[str, Any]],
    machine: Mapping[str, Any],
    commit: Mapping[str, Any],
    notes: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the run of these entries, measured now.

    machine: what the timer's environment says, beside pytest-benchmark's own. notes: what stands under our own mark.
    """
    import pytest_benchmark
    from pytest_benchmark.plugin import pytest_benchmark_generate_machine_info as machine_info

    return {
        "machine_info": {**machine_info(), **machine},
        "commit_info": dict(commit),
        "benchmarks": entries,
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "version": pytest_benchmark.__version__,
        MARK: dict(notes),
    }


def save(storage: Path, name: str, run: Mapping[str, Any]) -> Path:
    """Write a run as the next number of its machine's and GPU's folder, NNNN_<name>.json, and return the file.

    Raises: OSError.
    """
    from pytest_benchmark.utils import get_machine_id

    folder = storage / f"{get_machine_id()}-{slug(gpu_name(run['machine_info']['gpu']))}"
    folder.mkdir(parents=True, exist_ok=True)
    taken = [int(path.name[:4]) for path in folder.glob("[0-9][0-9][0-9][0-9]_*.json")]
    path = folder / f"{max(taken, default=0) + 1:04}_{name}.json"
    replace_file(path, as_text(run))
    return path


def as_text(run: Mapping[str, Any]) -> str:
    return json.dumps(run, indent=4)
