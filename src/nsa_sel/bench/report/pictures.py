"""What the page's pictures are drawn from, as JSON: web/report.js filters it and draws."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..compare.result import Comparison
from ..compare.rule import SLOWER
from ..saved.speedups import CORE_SUFFIX, is_kernel
from ..threshold.rule import NEEDED_SPEEDUP
from . import history, tables
from .tables import Row

LABELS = {  # in the order of their colours
    "triton": "Triton",
    "packed_sdpa": "SDPA eager",
    "packed_sdpa_fused": "SDPA fused",
    "packed_sdpa_compiled": "SDPA compiled",
    "triton_core": "Triton core",
    "sdpa_core": "SDPA core",
    "dense": "dense SDPA",
    "flex_attention": "FlexAttention",
    "fla_nsa": "fla NSA",
    "flashinfer_paged": "FlashInfer",
}
FIGURES = ("device_us", "call_us", "graph_us", *tables.SPEEDUPS, "bytes", "tflops", *tables.SHARING)
COLUMNS = ("case", "method", "scope", "family", "layout", "H", "D", "Dv", "L", "N", *FIGURES)
GRADES = {"regressions": "slower", "suspects": "suspect", "improvements": "faster", "noise": "noise", "same": "same"}


def data(
    rows: Sequence[Row],
    read_limit: Sequence[tuple[float, float]],
    thresholds: Mapping[str, int | None],
    compared: Comparison | None,
    past: Sequence[history.Past],
) -> dict[str, Any]:
    """Return every figure of the pictures. Times are µs; thresholds: the length from which each kernel is switched on.

    rows: in the order of the page's table, by whose number a point finds its line.
    """
    kernels = [at for at, row in enumerate(rows) if is_kernel(row["method"])]
    there = {rows[at]["method"] for at in kernels}
    of_ours_first = (method for name in tables.kernels(rows) for method in (name, name + CORE_SUFFIX))
    lender, lent = history.peers(past, rows)
    return {
        "columns": COLUMNS,
        "rows": [_values(row) for row in rows],
        "labels": LABELS,
        "kernels": [method for method in of_ours_first if method in there],
        "needed": NEEDED_SPEEDUP,
        "slower": SLOWER,
        "thresholds": dict(thresholds),
        "limit": sorted(read_limit),
        "changes": [] if compared is None else _changes(compared, rows),
        "history": history.figures(past, rows, kernels),
        "lender": lender,
        "lent": [_values(row) for row in lent],
    }


def as_json(figures: Mapping[str, Any]) -> str:
    """Return JSON to five digits that no text in it can end, or turn into a tag, where it stands in a page."""
    return json.dumps(_rounded(figures), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _values(row: Row) -> list[Any]:
    return [row[name] for name in COLUMNS]


def _changes(compared: Comparison, rows: Sequence[Row]) -> list[list[Any]]:
    """Return (row, old µs, new µs, judged change, grade) of every kernel's timing that was judged."""
    numbers = {(row["case"], row["method"]): at for at, row in enumerate(rows)}
    return [
        [numbers[change.key], change.old_us, change.new_us, change.change, grade]
        for name, grade in GRADES.items()
        for change in getattr(compared, name)
    ]


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
