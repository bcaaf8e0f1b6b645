"""The tables of a report: every timing with its speed-ups, the summary, the peers; as CSV and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

from ..saved.run import Saved, is_figure
from ..saved.speedups import CORE_SUFFIX, TRITON, fastest_sdpa, geomean, kernels_among, scope
from ..suite.cases import ELEMENT_BYTES, FAMILIES, RECORDED
from ..suite.distributions import law_of
from ..suite.random_cases import RANDOM
from ..tables import as_csv, as_markdown, printable
from . import spread
from .screen import OTHER_WORK
from .screen import peers as side_by_side

Row = dict[str, Any]
SPEEDUPS = {"speedup": "device_us", "call_speedup": "call_us", "graph_speedup": "graph_us"}  # of which time
SHARING = ("shared", "union", "rows_us", "tiles_us")  # see methods/sharing.py
PEERS_NOTE = (
    "Device time in µs (wall-clock time without a GPU), and how many times Triton's it is. "
    "What has a time was first checked against the oracle."
)
# column -> (heading, how its numbers are shown; empty: a text)
COLUMNS: dict[str, tuple[str, str]] = {
    "case": ("case", ""),
    "method": ("method", ""),
    "scope": ("scope", ""),
    "ms": ("ms", ".5f"),
    "ci_low_ms": ("CI low (ms)", ".5f"),
    "ci_high_ms": ("CI high (ms)", ".5f"),
    "speedup": ("speed-up", ".2f"),
    "call_us": ("call (µs)", ".2f"),
    "call_speedup": ("call speed-up", ".2f"),
    "graph_us": ("graph (µs)", ".2f"),
    "graph_speedup": ("graph speed-up", ".2f"),
    "gbps": ("GB/s", ".0f"),
    "pct_of_limit": ("% of limit", ".1f"),
    "tflops": ("TFLOP/s", ".1f"),
    "mae": ("MAE", ".1e"),
    "ran": ("what ran", ""),
}


def table(saved: Saved) -> list[Row]:
    """Return one row per (case, method): COLUMNS, the case's fields, and `device_us` and `bytes` for the plots.

    A speed-up is the fastest SDPA form's time in the same scope over this method's; None where either was not measured.
    """
    rows = []
    for key, timing in saved.run.timings.items():
        extra = saved.extras[key]
        low, high = timing.ci95_us
        row: Row = {name: str(extra.get(name) or "") for name in ("family", "dtype", "layout")}
        row |= {
            name: _figure(extra.get(name))
            for name in ("H", "D", "Dv", "L", "N", "S", "n_spans", "bytes", "gbps", "pct_of_limit", "mae", *SHARING)
        }
        row |= {"case": key[0], "method": key[1], "scope": scope(key[1]), "device_us": timing.median_us}
        row |= {"ms": timing.median_us / 1e3, "ci_low_ms": low / 1e3, "ci_high_ms": high / 1e3}
        row |= {"call_us": timing.call_us, "graph_us": timing.graph_us}
        row["tflops"] = _tflops(row, _figure(extra.get("bytes_rows")))
        row["ran"] = str(extra.get("config") or extra.get("sdpa_backend") or "")
        rows.append(row)
    for name, time in SPEEDUPS.items():
        fastest = fastest_sdpa(rows, time)
        for row in rows:
            best = fastest.get((row["case"], row["scope"]))
            row[name] = best[time] / row[time] if best and row[time] else None
    return sorted(rows, key=_in_matrix_order)


def summary(rows: Sequence[Row]) -> list[list[str]]:
    """Return a heading and a line per kernel, family and layout: speed-ups and share of the limit, geomean (worst)."""
    lines = [["kernel", "family", "layout", "cases"]]
    lines[0] += ["op, device", "op, eager", "op, graph", "core, device", "% of limit (op)", "TFLOP/s (op)"]
    groups = [
        (family, layout)
        for family in (*FAMILIES, RECORDED, RANDOM)
        for layout in sorted({law_of(r["layout"]) for r in rows if r["family"] == family})
    ]
    for kernel, group in product(kernels(rows), groups):
        of_both = [r for r in rows if (r["family"], law_of(r["layout"])) == group]
        op, core = ([r for r in of_both if r["method"] == name] for name in (kernel, kernel + CORE_SUFFIX))
        if op or core or kernel == TRITON["op"]:
            speedups = [_spread(op, name) for name in SPEEDUPS]
            rates = [_spread(op, "pct_of_limit", "{:.0f} %"), _spread(op, "tflops", "{:.0f}")]
            cells = [*speedups, _spread(core, "speedup"), *rates]
            lines.append([kernel, *group, str(len({r["case"] for r in of_both})), *cells])
    return lines


def kernels(rows: Sequence[Row]) -> list[str]:
    """Return the kernels that have times, ours first."""
    return kernels_among(row["method"] for row in rows) or [TRITON["op"]]


def csv_text(rows: Iterable[Row]) -> str:
    """Return the table with every column, to six digits, empty where not measured."""
    names = [*COLUMNS, "family", "dtype", "layout", "H", "D", "Dv", "L", "N", "bytes"]
    lines = ([f"{v:.6g}" if isinstance(v := row[name], float) else v for name in names] for row in rows)
    return as_csv([names, *lines])


def cells(row: Row) -> list[str]:
    """Return a row's COLUMNS as text, rounded."""
    shown = []
    for name, (_, form) in COLUMNS.items():
        shown.append("" if row[name] is None else format(row[name], form))
    return shown


def peers(saved: Saved) -> tuple[list[list[str]], list[str]]:
    """Return the run's table of peers and the notes on it, both empty without any."""
    results = [{**saved.extras[key], "device_us": timing.median_us} for key, timing in saved.run.timings.items()]
    return side_by_side(results, saved.not_timed)


def markdown_text(
    heading: str,
    verdicts: Sequence[str],
    rows: Sequence[Row],
    beside: Sequence[Sequence[str]] = (),
    notes: Sequence[str] = (),
) -> str:
    """Return the verdicts, the summary, the peers with their notes if there are any, and the table in Markdown."""
    full = [[heading for heading, _ in COLUMNS.values()], *(cells(row) for row in rows)]
    note = "Speed-ups are over the fastest SDPA form of the same scope; summary: geomean (worst)."
    listed = "\n".join(f"- {printable(each).replace('<', '&lt;')}" for each in notes)
    blocks = [
        f"# {heading}",
        *verdicts,
        "## Summary",
        note,
        as_markdown(summary(rows)),
        *_random(rows),
        *(["## Peers", PEERS_NOTE, as_markdown(beside), listed] if beside else []),
        "## All",
        as_markdown(full),
    ]
    return "\n\n".join(blocks) + "\n"


def _random(rows: Sequence[Row]) -> list[str]:
    """Return how each kernel's speed-up is spread over random cases, if the run has any."""
    tables = {kernel: found for kernel in kernels(rows) if (found := spread.table(rows, kernel))}
    blocks = [
        text
        for kernel, found in tables.items()
        for text in (f"### {kernel}", as_markdown(found), "\n".join(f"- {line}" for line in spread.worst(rows, kernel)))
    ]
    return ["## Random cases", spread.NOTE, *blocks] if blocks else []


def read_limit(machine: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Return the calibration's (bytes, µs) pairs that are numbers."""
    calibration = machine.get("calibration")
    pairs = calibration.get("read_limit_us") if isinstance(calibration, Mapping) else None
    found = [pair for pair in pairs if isinstance(pair, list) and len(pair) == 2] if isinstance(pairs, list) else []
    return [(size, us) for size, us in found if _figure(size) and _figure(us)]


def _tflops(row: Row, bytes_rows: float | None) -> float | None:
    """Return the selected work per time, in TFLOP/s, where rows share K and V; else bytes are the measure, and None.

    A selected token costs 2·H·(D + Dv) operations, and `bytes_rows` counts (D + Dv) elements for it, next to q and out.
    """
    shapes, size = [row[name] for name in ("H", "D", "Dv", "N", "bytes")], ELEMENT_BYTES.get(row["dtype"])
    if row["method"] == OTHER_WORK or size is None or not all((bytes_rows, *shapes)):
        return None
    H, D, Dv, N, distinct = shapes
    selected = bytes_rows - N * H * (D + Dv) * size
    if bytes_rows <= distinct or selected <= 0:
        return None
    return 2 * H * selected / size / row["device_us"] / 1e6


def _figure(value: Any) -> float | int | None:
    return value if is_figure(value) and value >= 0 else None


def _spread(rows: Iterable[Row], name: str, form: str = "{:.2f}x") -> str:
    values = [r[name] for r in rows if r[name]]
    mean = geomean(values)
    return "–" if mean is None else f"{form.format(mean)} ({form.format(min(values))})"


def _in_matrix_order(row: Row) -> tuple[Any, ...]:
    family = FAMILIES.index(row["family"]) if row["family"] in FAMILIES else len(FAMILIES)
    return (
        family,
        *((row[name] or 0) for name in ("H", "D", "Dv", "L", "N")),
        row["case"],
        row["scope"] != "op",
        row["method"],
    )
