"""The report's page: one HTML file without any outside reference; every text in it is escaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Container, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ..compare.result import Comparison, describe
from ..saved.run import Saved
from ..saved.speedups import TRITON
from ..threshold.rule import DECIDING_LAUNCH, NEEDED_SPEEDUP, Decision, Threshold
from . import tables

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 1280px;
  margin: 0 auto; padding: 24px 24px 64px; }
h1 { font-size: 1.5rem; margin: 0 0 4px; }
h2 { font-size: 1.15rem; margin: 40px 0 8px; border-bottom: 1px solid #d0d0d0; padding-bottom: 4px; }
.verdict { font-size: 1.15rem; font-weight: 600; border-left: 5px solid #0072B2; background: #f1f6fa;
  padding: 12px 16px; margin: 16px 0 8px; }
.verdict.off { border-color: #D55E00; background: #fcf3ee; }
.note { color: #555; margin: 4px 0 10px; max-width: 90ch; }
img { width: 100%; max-width: 1120px; height: auto; display: block; }
.scroll { overflow: auto; max-height: 42rem; }
#all { border: 1px solid #d0d0d0; }
table { border-collapse: collapse; font-size: 13px; }
#all { font-size: 11.5px; } #all th, #all td { padding: 2px 5px; } #all th, #all td:last-child { white-space: normal; }
th, td { padding: 3px 9px; text-align: right; border-bottom: 1px solid #ececec; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
th { background: #f4f4f4; position: sticky; top: 0; vertical-align: bottom; }
.left { text-align: left; }
.wrap td, .wrap th { white-space: normal; text-align: left; overflow-wrap: anywhere; }
#all th { cursor: pointer; }
#all th[aria-sort=ascending]::after { content: " ▲"; }
#all th[aria-sort=descending]::after { content: " ▼"; }
#filter { font: inherit; padding: 4px 8px; width: min(36rem, 95%); margin: 4px 12px 8px 0; }
pre { background: #f6f6f6; padding: 10px 12px; overflow: auto; font-size: 12.5px; max-height: 26rem; }
@media print {
  body { max-width: none; padding: 0; font-size: 11px; }
  .scroll, pre { overflow: visible; max-height: none; border: 0; white-space: pre-wrap; }
  table { font-size: 9.5px; } #all { font-size: 6.5px; }
  th { position: static; } #all th, #all td { padding: 1px 2px; }
  section, tr { break-inside: avoid; } h2 { break-after: avoid; } .screen { display: none; }
}
"""

_SCRIPT = """
const table = document.getElementById("all"), body = table.tBodies[0], rows = [...body.rows];
const filter = document.getElementById("filter"), shown = document.getElementById("shown");
filter.addEventListener("input", () => {
  const words = filter.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let count = 0;
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every(word => text.includes(word));
    count += !row.hidden;
  }
  shown.textContent = `${count} of ${rows.length} rows`;
});
function sortBy(head) {
  const up = head.getAttribute("aria-sort") !== "ascending", at = head.cellIndex;
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = row => row.cells[at].textContent;
  const numbers = rows.every(row => value(row) === "" || !isNaN(value(row)));
  rows.sort((a, b) => {
    const x = value(a), y = value(b);
    if (x === "" || y === "") return (x === "") - (y === "");
    return (numbers ? x - y : x.localeCompare(y)) * (up ? 1 : -1);
  });
  body.append(...rows);
}
for (const head of table.tHead.rows[0].cells) {
  head.tabIndex = 0;
  head.addEventListener("click", () => sortBy(head));
  head.addEventListener("keydown", event => { if (event.key === "Enter") sortBy(head); });
}
"""


def render(
    heading: str,
    verdicts: Sequence[tuple[str, Decision | None]],
    source: str,
    saved: Saved,
    rows: Sequence[tables.Row],
    pictures: Mapping[str, str | None],
    compared: Comparison | None,
    beside: Sequence[Sequence[str]] = (),
    notes: Sequence[str] = (),
) -> str:
    """Return the page. verdicts: of each kernel, a sentence and the decision behind it, None without GPU figures.
    pictures: SVG text by name (speedup, one more of each other kernel, bytes, decode, prefill); None: nothing to show.
    beside, notes: the table of peers and what is said of it.

    A content security policy forbids every outside reference, and every script but the page's own.
    """
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    body = [f"<h1>{escape(heading)}</h1>"]
    for verdict, decided in verdicts:
        state = "" if decided and decided.min_L is not None else " off"
        body.append(f'<p class="verdict{state}">{escape(verdict)}</p>')
    decisions = [decided for _, decided in verdicts if decided]
    body += [
        f'<p class="note">{escape(source)}</p>' if source else "",
    ]
    for decided in decisions:
        body += _threshold(decided)
    if decisions:
        body += [
            *_pictures(pictures),
            "<h2>Summary</h2>",
            _note("Each kernel over the fastest SDPA form of the same scope: geomean (worst case)."),
            _table(tables.summary(rows), left={0, 1, 2}),
        ]
    if beside:
        body += ["<h2>Peers</h2>", _note(tables.PEERS_NOTE), _table(beside, left={0}), *map(_note, notes)]
    body += _changes(compared)
    body += [
        "<h2>Environment</h2>",
        f'<div class="wrap">{_table(_environment(saved))}</div>',
        *_all(rows, gpu=bool(decisions)),
    ]
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(heading)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
            *filter(None, body),
            f"<script>{_SCRIPT}</script>\n</body>\n</html>\n",
        ]
    )


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


def _pictures(pictures: Mapping[str, str | None]) -> list[str]:
    shown = {
        "speedup": (
            "Speed-up against length",
            "Line: geomean over the head shapes; band: worst to best of them. Above 1.2x (dashed) it is worth it.",
        ),
        "bytes": (
            "Time against bytes",
            "Black: the time that this card takes merely to read so many bytes. Without prefill: its rows share K, V.",
        ),
        "decode": ("Decode", "Geomean over the head shapes and contexts; band: fastest to slowest. Packing is inside."),
        "prefill": ("Prefill", "One line a case, the fastest at the bottom. Packing is inside SDPA's time."),
    }
    parts = []
    for name, picture in pictures.items():
        kind, _, kernel = name.partition(" ")
        title, note = shown[kind]
        title += f": {kernel}" if kernel else ""
        if picture is None:
            content = _note("No such case with a time of the kernel in this run.")
        else:
            data = base64.b64encode(picture.encode()).decode()
            content = f'{_note(note)}<img alt="{escape(title)}" src="data:image/svg+xml;base64,{data}">'
        parts.append(f"<section><h2>{escape(title)}</h2>{content}</section>")
    return parts


def _changes(compared: Comparison | None) -> list[str]:
    title = "<h2>What changed since the baseline</h2>"
    if compared is None:
        return [title, _note("No baseline was given.")]
    *found, verdict = compared.text().splitlines()
    return [title, f"<p><strong>{escape(verdict)}</strong></p>", "<pre>" + escape("\n".join(found)) + "</pre>"]


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
        _table(lines, left={0, 1, 2, 14}, identity="all"),
    ]


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _table(lines: Sequence[Sequence[Any]], left: Container[int] = (), identity: str = "") -> str:
    """Return a table of texts, its first line the heading; left: the columns aligned to the left."""

    def cells(tag: str, texts: Iterable[Any]) -> str:
        marks = (' class="left"' if at in left else "" for at in range(len(lines[0])))
        return "".join(f"<{tag}{mark}>{escape(str(text))}</{tag}>" for mark, text in zip(marks, texts, strict=True))

    head, *body = lines
    name = f' id="{identity}"' if identity else ""
    content = "\n".join(f"<tr>{cells('td', texts)}</tr>" for texts in body)
    table = f"<table{name}><thead><tr>{cells('th', head)}</tr></thead>\n<tbody>\n{content}\n</tbody></table>"
    return f'<div class="scroll">{table}</div>'
