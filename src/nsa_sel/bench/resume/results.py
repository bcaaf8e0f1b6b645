"""A benchmark's result as a line of the journal, and back."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from ..saved.run import Key, timing

FROM_THE_TEST = ("name", "fullname", "group", "param", "params", "extra_info")


def dumps(record: Mapping[str, Any]) -> bytes:
    """Return a line of JSON, written as pytest-benchmark writes it."""
    from pytest_benchmark.utils import safe_dumps

    return str(safe_dumps(record, ensure_ascii=True)).encode()


def rebuilt(entry: Mapping[str, Any]) -> Any:
    """Return a journaled benchmark as pytest-benchmark holds it.

    Raises: KeyError, TypeError or ValueError if the entry is damaged, or holds a number that is no time.
    """
    from pytest_benchmark.stats import Metadata

    test = {name: entry[name] for name in FROM_THE_TEST}
    bench = Metadata(
        SimpleNamespace(**test, has_error=False, cprofile_stats=None),
        iterations=entry["stats"]["iterations"],
        options=dict(entry["options"]),
    )
    for sample in entry["stats"]["data"]:
        bench.stats.update(float(sample))
    timing(*pair_of(bench), {name: bench[name] for name in ("median", "q1", "q3")}, bench.extra_info, "journal")
    return bench


def pair_of(bench: Any) -> Key:
    """Return the (case, method) of one of this suite's benchmarks."""
    return bench.extra_info["case"], bench.extra_info["method"]
