"""Turn a saved run into files that people look at: CSV, Markdown, and one page that opens from disk."""

from __future__ import annotations

import argparse
import csv
import io
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nsa_sel.bench import decision, regress, runs
from nsa_sel.bench.cases import FAMILIES, scope
from nsa_sel.bench.summary import peers as side_by_side
from nsa_sel.bench.thresholds import Decision, Saved, ThresholdError, decide
from nsa_sel.config import ConfigError, SelConfig

Row = dict[str, Any]
TRITON_OF_SCOPE = {"op": "triton", "core": "triton_core"}
NO_GPU = "This run has no GPU figures: only the references were timed, on the CPU, and no threshold follows from it."
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
            for name in ("H", "D", "Dv", "L", "N", "bytes", "gbps", "pct_of_limit", "mae")
        }
        row |= {"case": key[0], "method": key[1], "scope": scope(key[1]), "device_us": timing.median_us}
        row |= {"ms": timing.median_us / 1e3, "ci_low_ms": low / 1e3, "ci_high_ms": high / 1e3}
        row |= {"call_us": timing.call_us, "graph_us": timing.graph_us}
        row["ran"] = str(extra.get("config") or extra.get("sdpa_backend") or "")
        rows.append(row)
    fastest: dict[tuple[str, str, str], float] = {}
    for row in rows:
        for time in ("device_us", "call_us", "graph_us"):
            if "sdpa" in row["method"] and row[time]:
                place = (row["case"], row["scope"], time)
                fastest[place] = min(row[time], fastest.get(place, math.inf))
    for row in rows:
        for time, name in (("device_us", "speedup"), ("call_us", "call_speedup"), ("graph_us", "graph_speedup")):
            best = fastest.get((row["case"], row["scope"], time))
            row[name] = best / row[time] if best and row[time] else None
    return sorted(rows, key=_in_matrix_order)


def summary(rows: Sequence[Row]) -> list[list[str]]:
    """Return a heading and a line per family and layout: Triton's speed-ups and share of the limit, geomean (worst)."""
    lines = [["family", "layout", "cases", "op, device", "op, eager", "op, graph", "core, device", "% of limit (op)"]]
    for family in FAMILIES:
        for layout in sorted({r["layout"] for r in rows if r["family"] == family}):
            of_both = [r for r in rows if (r["family"], r["layout"]) == (family, layout)]
            op, core = ([r for r in of_both if r["method"] == name] for name in TRITON_OF_SCOPE.values())
            speedups = [_spread(op, name) for name in ("speedup", "call_speedup", "graph_speedup")]
            cells = [*speedups, _spread(core, "speedup"), _spread(op, "pct_of_limit", "{:.0f} %")]
            lines.append([family, layout, str(len({r["case"] for r in of_both})), *cells])
    return lines


def as_csv(rows: Iterable[Row]) -> str:
    """Return the table with every column, to six digits, empty where not measured."""
    out = io.StringIO()
    names = [*COLUMNS, "family", "dtype", "layout", "H", "D", "Dv", "L", "N", "bytes"]
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{v:.6g}" if isinstance(v := row[name], float) else v for name in names})
    return out.getvalue()


def cells(row: Row) -> list[str]:
    """Return a row's COLUMNS as text, rounded."""
    shown = []
    for name, (_, form) in COLUMNS.items():
        shown.append("" if row[name] is None else format(row[name], form))
    return shown


def peers(run: Path, saved: Saved) -> tuple[list[list[str]], list[str]]:
    """Return the run's table of peers and the notes on it, both empty without any."""
    mark = runs.read_json(run).get(runs.MARK)
    found = mark.get("not_timed") if isinstance(mark, Mapping) else None
    entries = [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list) else []
    not_timed = {(str(e.get("case")), str(e.get("method"))): str(e.get("reason")) for e in entries}
    timings = saved.run.timings.items()
    return side_by_side([{**saved.extras[key], "device_us": timing.median_us} for key, timing in timings], not_timed)


def as_markdown(
    heading: str, verdict: str, rows: Sequence[Row], beside: Sequence[Sequence[str]] = (), notes: Sequence[str] = ()
) -> str:
    """Return the verdict, the summary, the table of peers with its notes if there is one, and the table in Markdown."""
    full = [[heading for heading, _ in COLUMNS.values()], *(cells(row) for row in rows)]
    note = "Speed-ups are over the fastest SDPA form of the same scope; summary: geomean (worst)."
    listed = "\n".join(f"- {regress.printable(each).replace('<', '&lt;')}" for each in notes)
    blocks = [
        f"# {heading}",
        verdict,
        "## Summary",
        note,
        _markdown_table(summary(rows)),
        *(["## Peers", PEERS_NOTE, _markdown_table(beside), listed] if beside else []),
        "## All",
        _markdown_table(full),
    ]
    return "\n\n".join(blocks) + "\n"


def judge(saved: Saved) -> tuple[str, Decision | None]:
    """Return the verdict in one sentence, and the decision behind it; None without GPU figures.

    Raises: ThresholdError as `decide`.
    """
    if saved.run.gpu == runs.gpu_name(None):
        return NO_GPU, None
    decided = decide([saved])
    return decision.sentence(decided), decided


def write(run: Path, baseline: Path | None, out: Path, config: SelConfig) -> list[Path]:
    """Write report.html, results.csv, results.md and the speed-up plot of a run to a folder; return the files.

    Raises: RunError or ThresholdError if a run cannot be read or judged; ImportError without the plotting library.
    """
    from nsa_sel.bench import page, plots

    saved = Saved.load(run)
    compared = None if baseline is None else regress.compare(runs.load(baseline), saved.run)
    rows = table(saved)
    verdict, decided = judge(saved)
    chosen, source = chosen_length(saved.run.gpu, decided, config)
    # Without a GPU there is nothing to plot; a case without a length has no place on an axis.
    drawn = [r for r in rows if r["L"] and r["N"]] if decided else []
    pictures = {
        "speedup": plots.speedup_by_length(drawn, chosen),
        "bytes": plots.time_by_bytes(drawn, read_limit(saved.machine)),
        "decode": plots.decode_times(drawn),
        "prefill": plots.prefill_times(drawn),
    }
    beside, notes = peers(run, saved)
    heading = f"nsa_sel on {saved.run.gpu}, {saved.run.datetime[:10] or 'undated'}"
    texts = {
        "report.html": page.render(heading, verdict, source, saved, decided, rows, pictures, compared, beside, notes),
        "results.csv": as_csv(rows),
        "results.md": as_markdown(heading, verdict, rows, beside, notes),
    }
    if pictures["speedup"]:
        texts["speedup.svg"] = pictures["speedup"]
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        decision.replace_file(out / name, text)
    return [out / name for name in texts]


def chosen_length(gpu: str, decided: Decision | None, config: SelConfig) -> tuple[int | None, str]:
    """Return the threshold to draw, and where it comes from: the configuration's entry for this GPU, else this run."""
    if decided is None:
        return None, ""
    if config.has_entry(gpu):
        value = config.min_len_for(gpu)
        said = f"The configuration switches Triton on from L = {value}." if value else "The configuration says never."
        return value, said
    return (
        decided.min_L,
        "The configuration has no entry for this GPU yet: nsa-sel threshold RUN.json … --apply writes it.",
    )


def read_limit(machine: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Return the calibration's (bytes, µs) pairs that are numbers."""
    calibration = machine.get("calibration")
    pairs = calibration.get("read_limit_us") if isinstance(calibration, Mapping) else None
    found = [pair for pair in pairs if isinstance(pair, list) and len(pair) == 2] if isinstance(pairs, list) else []
    return [(size, us) for size, us in found if _figure(size) and _figure(us)]


def _figure(value: object) -> float | int | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        return None
    return value


def _spread(rows: Iterable[Row], name: str, form: str = "{:.2f}x") -> str:
    values = [r[name] for r in rows if r[name]]
    if not values:
        return "–"
    geomean = math.exp(sum(map(math.log, values)) / len(values))
    return f"{form.format(geomean)} ({form.format(min(values))})"


def _in_matrix_order(row: Row) -> tuple[Any, ...]:
    family = FAMILIES.index(row["family"]) if row["family"] in FAMILIES else len(FAMILIES)
    return (
        family,
        *((row[name] or 0) for name in ("H", "D", "Dv", "L", "N")),
        row["case"],
        row["scope"] != "op",
        row["method"],
    )


def _markdown_table(lines: Sequence[Sequence[str]]) -> str:
    def line(texts: Sequence[str]) -> str:
        return (
            "| " + " | ".join(regress.printable(text).replace("<", "&lt;").replace("|", "\\|") for text in texts) + " |"
        )

    head, *body = lines
    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, body)])


def main(argv: Sequence[str] | None = None) -> int:
    """Run `nsa-sel report`: 0, or 2 if a run cannot be read or the plotting library is missing."""
    parser = argparse.ArgumentParser(prog="nsa-sel report", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN.json")
    parser.add_argument(
        "baseline", type=Path, nargs="?", metavar="BASELINE.json", help="say what changed since this run"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the files, made if missing")
    args = parser.parse_args(argv)
    try:
        for path in write(args.run, args.baseline, args.out, SelConfig.load(env={})):
            print(path)
    except (runs.RunError, ThresholdError, ConfigError, OSError) as error:
        print(f"nsa-sel report: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(
            f"nsa-sel report: needs {error.name}, of the extra `bench`: pip install 'nsa-sel[bench]'", file=sys.stderr
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
