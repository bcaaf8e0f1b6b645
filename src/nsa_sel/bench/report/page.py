"""The report's page: one HTML file that fetches nothing; every text in it is escaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Container, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..compare.result import Comparison, describe
from ..saved.run import Saved
from ..saved.speedups import TRITON
from ..threshold.rule import DECIDING_LAUNCH, NEEDED_SPEEDUP, Decision, Threshold
from . import pictures, tables

WEB = Path(__file__).with_name("web")
# name, title, note; what each shows is in web/pictures.js
_PICTURES = (
    (
        "heat",
        "Speed-up by shape",
        f"Over the fastest SDPA form of the scope. Orange: slower; white: up to {NEEDED_SPEEDUP}x; blue: faster.",
    ),
    (
        "speedup",
        "Speed-up against length",
        "Line: geomean over the head shapes; dots: each of them. "
        f"Above {NEEDED_SPEEDUP}x (dashed) it is worth it; dotted: the length from which it is switched on.",
    ),
    (
        "bytes",
        "Time against bytes",
        "Line: the time that this card takes merely to read so many bytes. Without prefill: its rows share K, V.",
    ),
    ("decode", "Decode", "Geomean over the head shapes and contexts. Packing is inside SDPA's time."),
    (
        "prefill",
        "Prefill",
        "One line a case, the fastest at the bottom. Packing is inside SDPA's time. Dense SDPA attends to the whole "
        "context: other work, for scale. Rows share K and V, so that operations and not bytes are the measure.",
    ),
    (
        "sharing",
        "Shared tiles",
        "Device time against the KV tiles that a query tile selects: the fewer, the more alike its queries select. Row "
        "kernel: each query reads its tiles alone; shared: all queries of a tile read each once; Triton: the choice.",
    ),
    (
        "history",
        "History",
        "Saved runs of this GPU by date, named by commit; hollow: measured on another card of the name. A run counts "
        "in the cases that it shares with this one.",
    ),
)
_MISSING = {"history": "No other saved run of this GPU was found."}
_NO_CASE = "No such case with a time of the kernel in this run."


def render(
    heading: str,
    verdicts: Sequence[tuple[str, Decision | None]],
    source: str,
    saved: Saved,
    rows: Sequence[tables.Row],
    figures: Mapping[str, Any],
    compared: Comparison | None,
    beside: Sequence[Sequence[str]] = (),
    notes: Sequence[str] = (),
    commit_url: str = "",
) -> str:
    """Return the page. verdicts: of each kernel, a sentence and the decision behind it, None without GPU figures.
    figures: what the pictures are drawn from. beside, notes: the table of peers and what is said of it.

    A content security policy forbids every outside reference, and every script but the page's own.
    """
    decisions = [decided for _, decided in verdicts if decided]
    sections = {"thresholds": [line for decided in decisions for line in _threshold(decided)]}
    if decisions:
        sections |= _pictures(rows, figures)
        sections["summary"] = [
            "<h2>Summary</h2>",
            _note("Each kernel over the fastest SDPA form of the same scope: geomean (worst case)."),
            _table(tables.summary(rows), left={0, 1, 2}),
        ]
    if beside:
        sections["peers"] = ["<h2>Peers</h2>", _note(tables.PEERS_NOTE), _table(beside, left={0}), *map(_note, notes)]
    sections["changes"] = _changes(compared, bool(figures["changes"]))
    environment = _table(_environment(saved))
    sections["environment"] = ["<h2>Environment</h2>", f'<div class="wrap">{environment}</div>']
    sections["all"] = _all(rows, gpu=bool(decisions))
    titles = {name: _title(lines) for name, lines in sections.items() if lines}
    body = [
        f"<h1>{escape(heading)}</h1>",
        _compared(compared),
        *(_verdict(*verdict) for verdict in verdicts),
        _note(source) if source else "",
        _contents(titles, saved.commit, commit_url),
        '<div id="filters" class="screen"></div>',
        *(f'<section id="{name}-section">\n{_lines(lines)}\n</section>' for name, lines in sections.items() if lines),
    ]
    scripts = [_web("echarts.min.js")] if decisions else []
    scripts.append(_web("report.js") + _web("pictures.js"))
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(each.encode()).digest()).decode()}'" for each in scripts
    )
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src {hashes}"
    return _lines(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(heading)}</title>\n<style>{_web('report.css')}</style>\n</head>\n<body>",
            *body,
            f'<script type="application/json" id="data">{pictures.as_json(figures)}</script>',
            *(f"<script>{each}</script>" for each in scripts),
            "</body>\n</html>\n",
        ]
    )


def _web(name: str) -> str:
    return (WEB / name).read_text(encoding="utf-8")


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(filter(None, lines))


def _title(lines: Iterable[str]) -> str:
    """Return the text, still escaped, of a section's first heading."""
    first = next(line for line in lines if line.startswith("<h2>"))
    return first.removeprefix("<h2>").removesuffix("</h2>")


def _compared(compared: Comparison | None) -> str:
    if compared is None:
        return ""
    state = {0: "pass", 1: "fail", 3: "suspect"}[compared.exit_code] if compared.machine.judged else ""
    link = f'<a href="#changes-section">since {escape(describe(compared.old))}</a>'
    return f'<p class="compared {state}">{escape(compared.verdict)}<br>{link}</p>'


def _verdict(text: str, decided: Decision | None) -> str:
    state = "" if decided and decided.min_L is not None else " off"
    return f'<p class="verdict{state}">{escape(text)}</p>'


def _contents(titles: Mapping[str, str], commit: str, commit_url: str) -> str:
    links = [f'<a href="#{name}-section">{title}</a>' for name, title in titles.items()]
    links += ['<a href="results.csv">CSV</a>', '<a href="results.md">Markdown</a>']
    if commit:
        said = f"commit {escape(commit[:10])}"
        links.append(f'<a href="{escape(commit_url)}">{said}</a>' if commit_url else f"<span>{said}</span>")
    return f"<nav>{' '.join(links)}</nav>"


def _threshold(decided: Decision) -> list[str]:
    counts = ["cases", "too slow", "missing", "not judged"]
    head = ["regime", "dtype", "launch", "from L", *counts, "opponents", "its lower bound", "deciding case"]
    lines = [head, *(_threshold_line(t) for t in decided.thresholds)]
    note = (
        "The smallest L such that at every tested length from there on every expected case was measured, passed parity "
        f"and has a lower bound of the op speed-up of at least {NEEDED_SPEEDUP}x, in device time and in the launch's "
        f"own. The {DECIDING_LAUNCH} lines decide. Opponents: the SDPA form that each bound is over. A case in which no"
        " SDPA form ran is not judged. "
        "This page judges one run; nsa-sel threshold takes several, and counts each case by its worst."
    )
    refused = [["not judged", "why"], *([v.case, v.not_judged] for v in decided.not_judged)]
    shown = [_note(note), _table(lines, left={0, 1, 2, 8, 10})]
    of = "" if decided.kernel == TRITON["op"] else f": {escape(decided.kernel)}"
    return [
        f"<h2>From which length on{of}</h2>",
        *shown,
        *([_table(refused, left={0, 1})] if decided.not_judged else []),
    ]


def _threshold_line(t: Threshold) -> list[str]:
    value = "off" if t.min_L is None else str(t.min_L)
    counts = [str(len(found)) for found in (t.verdicts, t.too_slow, t.missing, t.not_judged)]
    opponents = ", ".join(f"{form} {n}" for form, n in t.opponents.items())
    bound = t.deciding.text.removeprefix("lower bound ")
    return [t.regime, t.dtype, t.launch, value, *counts, opponents, bound, t.deciding.case]


def _pictures(rows: Sequence[tables.Row], figures: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the sections of the pictures; one without a figure says so."""
    ours = [row for row in rows if row["method"] in figures["kernels"] and row["L"] and row["N"]]
    families = {row["family"] for row in ours}
    there = {
        "heat": any(row["speedup"] for row in ours),
        "speedup": any(row["speedup"] for row in ours),
        "bytes": any(row["bytes"] for row in ours if row["family"] != "prefill"),
        "decode": "decode" in families,
        "prefill": "prefill" in families,
        "sharing": any(row["union"] for row in ours),
        "history": len(figures["history"]["runs"]) > 1,
    }
    found = {}
    for name, title, note in _PICTURES:
        if name == "sharing" and not there[name]:  # cases that are asked for by name
            continue
        content = _picture(name, note) if there[name] else [_note(_MISSING.get(name, _NO_CASE))]
        found[name] = [f"<h2>{escape(title)}</h2>", *content]
    return found


def _picture(name: str, note: str) -> list[str]:
    wide = " wide" if name in ("heat", "prefill", "history") else ""
    return [
        _note(note),
        f'<div data-picture="{name}"><div class="panels{wide}"></div>',
        '<p class="note nothing" hidden>Nothing of it passes the filters.</p></div>',
    ]


def _changes(compared: Comparison | None, judged: bool) -> list[str]:
    title = "<h2>What changed since the baseline</h2>"
    if compared is None:
        return [title, _note("No baseline was given.")]
    *found, verdict = compared.text().splitlines()
    note = "Each timing of a kernel as it was judged: what the machine explains is taken off. Dashed: what counts."
    return [
        title,
        f"<p><strong>{escape(verdict)}</strong></p>",
        *(_picture("changes", note) if judged else []),
        "<pre>" + escape("\n".join(found)) + "</pre>",
    ]


def _environment(saved: Saved) -> list[list[str]]:
    machine = saved.machine
    cpu = machine.get("cpu")
    calibration = machine.get("calibration")
    values = dict(calibration) if isinstance(calibration, Mapping) else {}
    if curve := tables.read_limit(machine):
        values["read_limit_us"] = ", ".join(f"{size / 1e6:.3g} MB: {us:.1f}" for size, us in curve)
    found = {
        "run": describe(saved.run),
        "commit": saved.commit,
        **saved.run.environment,
        **{key: machine.get(key) for key in ("cuda", "python_version", "system", "machine")},
        "cpu": cpu.get("brand_raw") if isinstance(cpu, Mapping) else None,
        **{f"calibration: {key}": value for key, value in values.items()},
    }
    return [
        ["what", "value"],
        *([key, _shown(value)] for key, value in found.items() if value not in (None, "", "none")),
    ]


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_shown(inner)}" for key, inner in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _all(rows: Sequence[tables.Row], gpu: bool) -> list[str]:
    clock = "Device" if gpu else "Wall-clock"
    lines = [[heading for heading, _ in tables.COLUMNS.values()], *(tables.cells(row) for row in rows)]
    return [
        "<h2>All configurations</h2>",
        _note(f"{clock} time unless it says call or graph; speed-up over the fastest SDPA form of the same scope."),
        '<p class="screen"><input id="filter" type="search" placeholder="filter: words of a row, e.g. L512 many core" '
        f'aria-label="filter the rows"> <span id="shown">{len(rows)} of {len(rows)} rows</span></p>',
        f'<div id="all">{_table(lines, left={0, 1, 2, len(lines[0]) - 1})}</div>',
    ]


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _table(lines: Sequence[Sequence[Any]], left: Container[int] = ()) -> str:
    """Return a table of texts, its first line the heading; left: the columns aligned to the left."""

    def cells(tag: str, texts: Iterable[Any]) -> str:
        marks = (' class="left"' if at in left else "" for at in range(len(lines[0])))
        return "".join(f"<{tag}{mark}>{escape(str(text))}</{tag}>" for mark, text in zip(marks, texts, strict=True))

    head, *body = lines
    content = "\n".join(f"<tr>{cells('td', texts)}</tr>" for texts in body)
    table = f"<table><thead><tr>{cells('th', head)}</tr></thead>\n<tbody>\n{content}\n</tbody></table>"
    return f'<div class="scroll">{table}</div>'
