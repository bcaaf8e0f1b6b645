"""What a measuring run says at its end: speed-ups that fit a screen, and the whole table on request."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ..saved.speedups import (
    PEER_METHODS,
    SDPA_FORMS,
    TRITON,
    fastest_sdpa,
    geomean,
    is_kernel,
    kernel_of,
    kernels_among,
)
from ..suite.cases import TRAINING
from ..suite.distributions import law_of
from . import spread

WORST_SHOWN = 10
COLUMNS = (
    *("case", "method", "time_us", "ci95_us", "speedup"),
    *("gbps", "pct_of_limit", "call_us", "graph_us", "mae", "ran"),
)
OTHER_WORK = "dense"  # attends to the whole context: shown for scale, and never said to be faster
_PAGES = re.compile(r"-[NH]{2}D\d+$")  # at the end of a case's id
Reasons = Mapping[tuple[str, str], str]  # (case, method) -> why it has no time


@dataclass(frozen=True)
class Speedup:
    """Hold one comparison: a kernel's time and that of the fastest SDPA form of the same scope, in µs."""

    kernel: str
    case: str
    family: str
    layout: str
    scope: str
    kernel_us: float
    sdpa_us: float
    sdpa: str

    @property
    def ratio(self) -> float:
        return self.sdpa_us / self.kernel_us


def by_case(results: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Group results (extra_info plus `device_us`) by case and method, in the order in which they were measured."""
    grouped: dict[str, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for result in results:
        grouped[result["case"]][result["method"]] = result
    return dict(grouped)


def speedups(results: Sequence[Mapping[str, Any]]) -> list[Speedup]:
    """Compare each kernel with the fastest SDPA form of the same scope, in every case that has both."""
    best = fastest_sdpa(results)
    found = []
    for timed in results:
        rival = best.get((timed["case"], timed["scope"]))
        if is_kernel(timed["method"]) and rival is not None:
            name = f"{rival['method']} ({rival['sdpa_backend']})"
            times = timed["device_us"], rival["device_us"]
            about = timed["case"], timed["family"], law_of(timed["layout"]), timed["scope"]
            found.append(Speedup(kernel_of(timed["method"]), *about, *times, name))
    return found


def screen(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the summary: a line per kernel, family and layout, the ten worst cases, and what was measured on."""
    if not results:
        return ["nothing was timed"]
    grouped = by_case(results)
    compared = speedups(results)
    kernels = kernels_among(result["method"] for result in results) or [TRITON["op"]]
    width = max(map(len, kernels)) + 1 if kernels != [TRITON["op"]] else 0  # a column of names only where it tells

    def named(kernel: str) -> str:
        return f"{kernel:<{width}}" if width else ""

    head = f"{'family':<9}{'layout':<8}{'cases':>6}{'op x':>8}{'core x':>8}{'GB/s':>8}{'of limit':>10}"
    said = "the kernel" if width else "triton"
    lines = [f"{named('')}{head}   geomeans; op x: fastest SDPA form / {said}, GB/s and limit: {said}"]
    groups = dict.fromkeys((timed["family"], law_of(timed["layout"])) for timed in results)
    for kernel, (family, layout) in product(kernels, groups):
        members = [timed for timed in grouped.values() if _is(timed, family, layout)]
        of_group = [s for s in compared if (s.kernel, s.family, s.layout) == (kernel, family, layout)]
        ratios = {scope: geomean(s.ratio for s in of_group if s.scope == scope) for scope in TRITON}
        shown = [timed[kernel] for timed in members if kernel in timed]
        if width and not (shown or of_group):
            continue
        rate = geomean(result["gbps"] for result in shown)
        share = geomean(result["pct_of_limit"] for result in shown if result["pct_of_limit"] is not None)
        speed = f"{_number(ratios['op'], '.2f'):>8}{_number(ratios['core'], '.2f'):>8}"
        memory = f"{_number(rate, '.0f'):>8}{_number(share, '.0f', ' %'):>10}"
        count = len(shown) if width else len(members)
        lines.append(f"{named(kernel)}{family:<9}{layout:<8}{count:>6}{speed}{memory}")
    for kernel in kernels if compared else ():
        lines += ["", f"worst cases of {kernel}" if width else "worst cases"]
        for s in sorted((s for s in compared if s.kernel == kernel), key=lambda s: s.ratio)[:WORST_SHOWN]:
            lines.append(f"{s.ratio:5.2f}x {s.scope:<5}{s.case}: {s.kernel_us:.1f} µs, {s.sdpa} {s.sdpa_us:.1f} µs")
    lines += spread.lines(results)
    first = results[0]
    lines += ["", f"{len(grouped)} cases, {len(results)} benchmarks on {first['gpu'] or 'the CPU, by the wall clock'}"]
    return lines


def table(results: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return every benchmark as text cells under COLUMNS; the speed-up is over the fastest SDPA form of its scope."""
    best = fastest_sdpa(results)
    rows = []
    for result in results:
        base = best.get((result["case"], result["scope"]))
        low, high = result["ci95_us"]
        rows.append(
            {
                "case": result["case"],
                "method": result["method"],
                "time_us": f"{result['device_us']:.2f}",
                "ci95_us": f"{low:.2f}..{high:.2f}",
                "speedup": _number(base["device_us"] / result["device_us"] if base else None, ".2f"),
                "gbps": f"{result['gbps']:.0f}",
                "pct_of_limit": _number(result["pct_of_limit"], ".0f"),
                "call_us": _number(result["call_us"], ".1f"),
                "graph_us": _number(result["graph_us"], ".1f"),
                "mae": f"{result['mae']:.2g}",
                "ran": str(result.get("config") or result.get("sdpa_backend")),
            }
        )
    return rows


def peers(results: Iterable[Mapping[str, Any]], not_timed: Reasons) -> tuple[list[list[str]], list[str]]:
    """Return the table of peers, its heading first, and notes on it; both empty if none was asked for.

    A cell is the device time in µs and how many times Triton's it is; "wrong" or "n/a" where there is none, with the
    number of the note that says why. The notes begin with every peer that is faster than Triton.
    """
    results = list(results)
    times = _times(results)
    asked = _beside_peers(times, not_timed)
    given = kernels_among(method for _, method in (*times, *not_timed))
    methods = (*dict.fromkeys((TRITON["op"], *given)), *PEER_METHODS, *SDPA_FORMS["op"])
    reasons: dict[str, int] = {}
    lines, faster = [], []
    for case in asked:
        ours, cells = times.get((case, "triton")), [case]
        for method in methods:
            us, reason = times.get((case, method)), not_timed.get((case, method))
            if us is not None:
                cells.append(f"{us:.1f}" + (f" ({us / ours:.2f}x)" if ours and method != "triton" else ""))
                if ours and us < ours and method != OTHER_WORK:
                    faster.append(f"faster than triton: {method} in {case}, {us:.1f} against {ours:.1f} µs")
            elif reason is not None:
                number = reasons.setdefault(f"{method}: {reason}", len(reasons) + 1)
                cells.append(f"{'wrong' if reason.startswith('wrong') else 'n/a'} [{number}]")
            else:
                cells.append("-")
        lines.append(cells)
    if not lines:
        return [], []
    versions = dict.fromkeys(f"{result['method']}: {result['peer']}" for result in results if "peer" in result)
    why = [f"[{number}] {reason}" for reason, number in reasons.items()]
    notes = [*faster, *versions, f"{OTHER_WORK}: other work, the whole context; for scale", *why]
    return [["case", *methods], *lines], notes


def peers_screen(results: Sequence[Mapping[str, Any]], not_timed: Reasons) -> list[str]:
    """Return a line for each family and peer, who is faster than Triton, and why times are missing."""
    _, notes = peers(results, not_timed)
    if not notes:
        return []
    times = _times(results)
    lines = [f"{'peer':<18}{'family':<9}{'cases':>6}{'geomean':>9}{'lowest':>8}   device time over triton's"]
    given = kernels_among(method for _, method in times)
    for method in (*PEER_METHODS, *(name for name in given if name != TRITON["op"])):
        for family in dict.fromkeys(result["family"] for result in results):
            cases = [r["case"] for r in results if (r["method"], r["family"]) == (method, family)]
            if cases:
                ratios = [times[c, method] / times[c, "triton"] for c in cases if (c, "triton") in times]
                shown = _number(geomean(ratios), ".2f"), _number(min(ratios, default=None), ".2f")
                lines.append(f"{method:<18}{family:<9}{len(cases):>6}{shown[0]:>9}{shown[1]:>8}")
    faster = [note for note in notes if note.startswith("faster")]
    more = [f"… and {len(faster) - WORST_SHOWN} more"] if len(faster) > WORST_SHOWN else []
    missing: dict[str, int] = defaultdict(int)
    asked = _beside_peers(times, not_timed)
    for (case, method), reason in not_timed.items():
        if case in asked:
            missing[f"{method}: {reason}"] += 1
    why = sorted(missing, key=lambda text: -missing[text])[:WORST_SHOWN]
    return [*lines, *faster[:WORST_SHOWN], *more, *(f"{missing[text]} x {text}" for text in why)]


def paged_screen(results: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a line for each kernel's case with K and V in pages: its times over those of the twin without pages."""
    timed = {(result["case"], result["method"]): result for result in results if is_kernel(result["method"])}
    lines = []
    for (case, method), paged in timed.items():
        twin = timed.get((_PAGES.sub("", case), method))
        if twin is not None and twin is not paged:
            ratios = [_number(_over(paged[time], twin[time]), ".2f") for time in ("device_us", "graph_us", "call_us")]
            lines.append("".join(f"{ratio:>8}" for ratio in ratios) + f"   {case} {method}")
    return (
        [f"{'device':>8}{'graph':>8}{'call':>8}   times with K and V in pages over those without", *lines]
        if lines
        else []
    )


def training_screen(results: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a line for each case of training: what each method takes, and the memory at its peak beyond the inputs."""
    grouped = by_case([result for result in results if result["family"] == TRAINING])
    lines = []
    for case, timed in grouped.items():
        shown = []
        for method, result in timed.items():
            peak = f", {result['peak_bytes'] / 1e9:.2f} GB" if "peak_bytes" in result else ""
            shown.append(f"{method} {result['device_us'] / 1e3:.2f} ms{peak}")
        lines.append(f"{case}: {'; '.join(shown)}")
    return ["training: time, and memory at its peak beyond the inputs", *lines] if lines else []


def _over(us: float | None, twin_us: float | None) -> float | None:
    return us / twin_us if us and twin_us else None


def _beside_peers(times: Iterable[tuple[str, str]], not_timed: Iterable[tuple[str, str]]) -> dict[str, None]:
    """Return the cases that were asked for beside peers, in order."""
    return dict.fromkeys(case for case, method in (*times, *not_timed) if method in PEER_METHODS)


def _times(results: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    return {(result["case"], result["method"]): result["device_us"] for result in results}


def aligned(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Return rows of text cells as lines of columns."""
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in COLUMNS}
    lines = [{name: name for name in COLUMNS}, *rows]
    return ["  ".join(line[name].ljust(widths[name]) for name in COLUMNS).rstrip() for line in lines]


def _is(timed: Mapping[str, Mapping[str, Any]], family: str, layout: str) -> bool:
    any_method = next(iter(timed.values()))
    return (any_method["family"], law_of(any_method["layout"])) == (family, layout)


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
