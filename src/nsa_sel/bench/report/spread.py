"""How a kernel's speed-up is spread over random cases: how many lose, the geomean, the worst, by kind.

Source: docs/measuring.md, "Off the grid".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..saved.speedups import CORE_SUFFIX, SDPA_FORMS, geomean, kernels_among
from ..suite.distributions import LAWS, law_of
from ..suite.random_cases import RANDOM

Result = Mapping[str, Any]  # of a (case, method): its extra_info and `device_us`, or its row in a report's table
USUAL = {64, 128}  # widths
KINDS: dict[str, Callable[[Result], bool]] = {
    "all": lambda r: True,
    "S = 1": lambda r: r["S"] == 1,
    "S of 2 to 8": lambda r: r["S"] > 1 and not _prefill(r),
    "prefill": lambda r: _prefill(r),
    "H up to 16": lambda r: r["H"] <= 16,
    "H above 16": lambda r: r["H"] > 16,
    "D, Dv of 64, 128": lambda r: {r["D"], r["Dv"]} <= USUAL,
    "other widths": lambda r: not {r["D"], r["Dv"]} <= USUAL,
    "1 span": lambda r: r["n_spans"] == 1,
    "2 to 8 spans": lambda r: 1 < r["n_spans"] <= 8,
    "more than 8": lambda r: r["n_spans"] > 8,
    "equal": lambda r: law_of(r["layout"]) == "equal",
    "mixed": lambda r: law_of(r["layout"]) == "mixed",
    "ragged": lambda r: law_of(r["layout"]) == "ragged",
}
NOTE = (
    "Device time of SDPA on packed rows over the kernel's: core, on packed rows too; in place, through the spans, so "
    "that only SDPA is spared the packing. The share of the read limit is that in place, where rows share no K and V."
)
HEAD = ("kind", "cases", "core <1x", "geomean", "worst", "in place <1x", "geomean", "worst", "of limit", "worst")


@dataclass(frozen=True)
class Rival:
    """Hold a kernel's result and that of SDPA on packed rows, for which packing is free.

    pct_of_limit: None where rows share K and V, and without a GPU.
    """

    result: Result
    sdpa: Result

    @property
    def ratio(self) -> float:
        return self.sdpa["device_us"] / self.result["device_us"]

    @property
    def pct_of_limit(self) -> float | None:
        return self.result.get("pct_of_limit")

    def text(self) -> str:
        """Return one line: the ratio, the case, and both times."""
        backend = self.sdpa.get("sdpa_backend") or self.sdpa.get("ran")
        times = f"{self.result['device_us']:.1f} µs, SDPA on packed rows ({backend}) {self.sdpa['device_us']:.1f} µs"
        return f"{self.ratio:.2f}x {self.result['case']}: {times}"


def table(results: Iterable[Result], kernel: str) -> list[list[str]]:
    """Return a heading and a line per kind that has cases, of a kernel's random cases; empty if it has none.

    The columns say what NOTE says.
    """
    core, in_place = rivals(results, kernel + CORE_SUFFIX), rivals(results, kernel)
    lines = []
    for kind, is_of in KINDS.items():
        of_both = [[rival for rival in rivals_ if is_of(rival.result)] for rivals_ in (core, in_place)]
        cases = {rival.result["case"] for each in of_both for rival in each}
        if cases:
            limits = [rival.pct_of_limit for rival in of_both[1] if rival.pct_of_limit is not None]
            shares = _text(geomean(limits), "{:.0f} %"), _text(min(limits, default=None), "{:.0f} %")
            lines.append([kind, str(len(cases)), *_spread(of_both[0]), *_spread(of_both[1]), *shares])
    return [list(HEAD), *lines] if lines else []


def lines(results: Sequence[Result]) -> list[str]:
    """Return the tables of all kernels for a screen, with the worst cases of each; nothing without random cases."""
    found = []
    for kernel in kernels_among(result["method"] for result in results):
        cells = table(results, kernel)
        if cells:
            widths = [max(len(line[i]) for line in cells) + 2 for i in range(len(HEAD))]
            found += ["", f"{kernel} over random cases, device time; x: SDPA on packed rows / {kernel}"]
            for kind, *others in cells:
                rest = "".join(f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))
                found.append(f"{kind:<{widths[0]}}{rest}")
            found += worst(results, kernel)
    return found


def worst(results: Iterable[Result], kernel: str) -> list[str]:
    """Return a line for the least speed-up of each scope, and one for the least share of the limit."""
    core, in_place = rivals(results, kernel + CORE_SUFFIX), rivals(results, kernel)
    limited = [rival for rival in in_place if rival.pct_of_limit is not None]
    scopes = ("core", core), ("in place", in_place)
    found = [f"worst {name}: {min(of, key=lambda rival: rival.ratio).text()}" for name, of in scopes if of]
    if limited:
        far = min(limited, key=lambda rival: rival.pct_of_limit or 0.0)
        found.append(f"farthest from the limit: {far.pct_of_limit:.0f} % {far.result['case']}")
    return found


def rivals(results: Iterable[Result], method: str) -> list[Rival]:
    """Return the random cases in which a method and SDPA on packed rows both have a time."""
    random = [result for result in results if result["family"] == RANDOM and result.get("n_spans")]
    sdpa = {result["case"]: result for result in random if result["method"] in SDPA_FORMS["core"]}
    of_method = [result for result in random if result["method"] == method]
    return [Rival(result, sdpa[result["case"]]) for result in of_method if result["case"] in sdpa]


def _spread(rivals: Sequence[Rival]) -> list[str]:
    """Return the share of the cases below 1.0x, the geomean and the worst."""
    ratios = [rival.ratio for rival in rivals]
    below = 100 * sum(ratio < 1 for ratio in ratios) / len(ratios) if ratios else None
    return [_text(below, "{:.1f} %"), _text(geomean(ratios), "{:.2f}x"), _text(min(ratios, default=None), "{:.2f}x")]


def _prefill(result: Result) -> bool:
    return law_of(result["layout"]) not in LAWS


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
