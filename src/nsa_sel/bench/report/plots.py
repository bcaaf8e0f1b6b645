"""The speed-up plot of a saved run as SVG text, for a README. Colours are Okabe and Ito's, told apart by marker too."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from ..saved.speedups import CORE_SUFFIX, TRITON, geomean
from ..threshold.rule import NEEDED_SPEEDUP
from .tables import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SERIES = (("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."), ("#CC79A7", "D", ":"))
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "text.parse_math": False,  # a case's name is not mathematics
    "svg.hashsalt": "nsa_sel",  # the same run gives the same bytes
}
_LAYOUTS = {"few": "few: one span", "many": "many: 8 equal spans", "mixed": "mixed: 2 to 8 random spans"}


def speedup_by_length(rows: Sequence[Row], min_len: int | None, kernel: str = TRITON["op"]) -> str | None:
    """Plot a kernel's speed-up over the fastest SDPA against L, of `rows`: one column per layout, one line per N.

    A line is the geomean over the head shapes, its band runs from the worst to the best of them. min_len: the chosen
    threshold, drawn where it applies; None: no line. Returns None if there is nothing to plot.
    """
    core = kernel + CORE_SUFFIX
    chosen = [r for r in rows if r["family"] == "rows" and r["method"] in (kernel, core)]
    there = dict.fromkeys(r["layout"] for r in chosen)
    layouts = [name for name in _LAYOUTS if name in there] + [name for name in there if name not in _LAYOUTS]
    panels = [
        (kernel, "call_speedup", "op, eager call time\nspeed-up (decides)"),
        (kernel, "speedup", "op, device time\nspeed-up"),
        (core, "speedup", "core (packing free),\ndevice time, speed-up"),
    ]
    panels = [p for p in panels if any(r["method"] == p[0] and r[p[1]] for r in chosen)]
    if not panels:
        return None
    counts = sorted({r["N"] for r in chosen})

    def draw(figure: Figure) -> None:
        axes = figure.subplots(len(panels), len(layouts), sharex=True, sharey="row", squeeze=False)
        for (method, key, label), line in zip(panels, axes, strict=True):
            for layout, ax in zip(layouts, line, strict=True):
                for n, (color, marker, dash) in zip(counts, cycle(_SERIES), strict=False):
                    found = [r for r in chosen if (r["method"], r["layout"], r["N"]) == (method, layout, n) and r[key]]
                    _band(ax, [(r["L"], r[key]) for r in found], color, marker, dash, f"N = {n} rows")
                ax.set_xscale("log", base=2)
                ax.set_yscale("log")
                ax.axhline(1.0, color="#999999", linewidth=0.8)
                ax.axhline(NEEDED_SPEEDUP, color="black", linewidth=0.9, linestyle=(0, (5, 3)))
                if min_len is not None and method == kernel:
                    ax.axvline(min_len, color="#666666", linewidth=1.2, linestyle=":")
                _plain_ticks(ax, sorted({r["L"] for r in chosen}))
            line[0].set_ylabel(label)
        for layout, ax in zip(layouts, axes[0], strict=True):
            ax.set_title(_LAYOUTS.get(layout, layout), fontsize=10)
        for ax in axes[-1]:
            ax.set_xlabel("selected length L (tokens)")
        extra = [_line_key("black", (0, (5, 3)), f"{NEEDED_SPEEDUP}x")]
        if min_len is not None:
            extra.append(_line_key("#666666", ":", f"chosen threshold L = {min_len}"))
        _legend_on_top(figure, axes.flat, extra)

    return _svg(draw, 10.5, 0.8 + 2.6 * len(panels))


def _svg(draw: Callable[[Figure], None], width: float, height: float) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _band(ax: Axes, points: Iterable[tuple[int, float]], color: str, marker: str, dash: str, label: str) -> None:
    """Draw the geomean of the points of each x, and a band from their smallest to their largest."""
    by_x: dict[int, list[float]] = {}
    for x, y in points:
        by_x.setdefault(x, []).append(y)
    if not by_x:
        return
    xs = sorted(by_x)
    means = [geomean(by_x[x]) or 1.0 for x in xs]
    ax.fill_between(xs, [min(by_x[x]) for x in xs], [max(by_x[x]) for x in xs], color=color, alpha=0.13, linewidth=0)
    ax.plot(xs, means, color=color, marker=marker, linestyle=dash, markersize=4, linewidth=1.4, label=label)


def _plain_ticks(ax: Axes, x_values: Sequence[int]) -> None:
    """Write log axes in plain numbers, the tested lengths as ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    ax.set_xticks(x_values, [f"{x}" for x in x_values], fontsize=8)
    ax.xaxis.set_minor_locator(NullLocator())
    low, high = ax.get_ylim()
    steps = (1, 1.2, 1.5, 2, 3, 5, 7) if high / low < 8 else (1, 2, 5) if high / low < 300 else (1,)
    ax.yaxis.set_major_locator(LogLocator(subs=steps))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _line_key(color: str, dash: Any, label: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, linestyle=dash, linewidth=1.2, label=label)


def _legend_on_top(figure: Figure, axes: Iterable[Axes], extra: Sequence[Any]) -> None:
    """Put one legend above all panels, each series once."""
    found: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    for handle in extra:
        found.setdefault(handle.get_label(), handle)
    figure.legend(found.values(), found.keys(), loc="outside upper center", ncols=min(len(found), 5), fontsize=9)
