"""Plots of one saved run, as SVG text. Colours are Okabe and Ito's, told apart by marker and dash as well."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from ..saved.speedups import CORE_SUFFIX, SDPA_FORMS, TRITON, geomean, kernels_among
from ..threshold.rule import NEEDED_SPEEDUP
from .tables import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SERIES = (("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."), ("#CC79A7", "D", ":"))
_METHODS = {
    "triton": ("Triton", "#0072B2", "o", "-"),
    "packed_sdpa": ("packed SDPA, eager", "#D55E00", "s", "--"),
    "packed_sdpa_fused": ("packed SDPA, packing fused", "#CC79A7", "P", "-."),
    "packed_sdpa_compiled": ("packed SDPA, compiled", "#E69F00", "D", ":"),
    "triton_core": ("Triton, rows packed", "#56B4E9", "v", "-"),
    "sdpa_core": ("SDPA, packing free", "#009E73", "^", "-."),
}
# Of users' kernels, one after another.
_OTHERS = (("#000000", "X", "-"), ("#8C564B", "*", "--"), ("#7F7F7F", "p", "-."), ("#17BECF", "h", ":"))
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
                _plain_ticks(ax, x_values=sorted({r["L"] for r in chosen}), suffix="x")
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


def time_by_bytes(rows: Sequence[Row], read_limit: Sequence[tuple[float, float]]) -> str | None:
    """Plot device time against the bytes a case must touch, with the card's read-limit curve.

    read_limit: pairs (bytes, µs) of the session's calibration; empty: no curve. Without prefill: its rows share K, V.
    """
    styles = _styles(rows)
    methods = (*SDPA_FORMS["op"], *SDPA_FORMS["core"], *kernels_among(r["method"] for r in rows))
    chosen = [r for r in rows if r["family"] != "prefill" and r["bytes"] and r["device_us"] and r["method"] in methods]
    if not chosen:
        return None

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        for method in methods:
            label, color, marker, _ = styles[method]
            found = [r for r in chosen if r["method"] == method]
            if found:
                x, y = [r["bytes"] / 1e6 for r in found], [r["device_us"] for r in found]
                ax.scatter(x, y, s=13, color=color, marker=marker, alpha=0.65, linewidths=0, label=label)
        if read_limit:
            curve = sorted(read_limit)
            ax.plot(
                [size / 1e6 for size, _ in curve],
                [us for _, us in curve],
                color="black",
                linewidth=1.3,
                label="read limit",
            )
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("distinct bytes touched (MB)")
        ax.set_ylabel("device time (µs)")
        _plain_ticks(ax)
        _legend_on_top(figure, [ax])

    return _svg(draw, 10.5, 5.2)


def decode_times(rows: Sequence[Row]) -> str | None:
    """Plot decode: device time beside eager call time against L, a row of panels per N."""
    styles = _styles(rows)
    chosen = [r for r in rows if r["family"] == "decode" and r["method"] in styles and r["scope"] == "op"]
    counts = sorted({r["N"] for r in chosen})
    if not counts:
        return None
    columns = [("device_us", "device time"), ("call_us", "eager call time")]

    def draw(figure: Figure) -> None:
        axes = figure.subplots(len(counts), len(columns), sharex=True, sharey="row", squeeze=False)
        for n, line in zip(counts, axes, strict=True):
            for (key, _), ax in zip(columns, line, strict=True):
                for method, (label, color, marker, dash) in styles.items():
                    found = [r for r in chosen if r["N"] == n and r["method"] == method and r[key]]
                    _band(ax, [(r["L"], r[key]) for r in found], color, marker, dash, label)
                ax.set_xscale("log", base=2)
                ax.set_yscale("log")
                _plain_ticks(ax, x_values=sorted({r["L"] for r in chosen}))
            line[0].set_ylabel(f"N = {n} rows\ntime (µs)")
        for (_, title), ax in zip(columns, axes[0], strict=True):
            ax.set_title(title, fontsize=10)
        for ax in axes[-1]:
            ax.set_xlabel("selected length L (tokens)")
        _legend_on_top(figure, axes.flat)

    return _svg(draw, 10.5, 0.9 + 2.3 * len(counts))


def prefill_times(rows: Sequence[Row]) -> str | None:
    """Plot prefill: device time beside eager call time, a line per case."""
    styles = _styles(rows)
    chosen = [r for r in rows if r["family"] == "prefill" and r["method"] in styles and r["scope"] == "op"]
    slowest = {r["case"]: r["device_us"] for r in sorted(chosen, key=lambda r: r["device_us"])}
    names = sorted(slowest, key=lambda name: slowest[name])
    if not names:
        return None
    columns = [("device_us", "device time"), ("call_us", "eager call time")]

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(columns), sharex=True, sharey=True)
        for (key, title), ax in zip(columns, axes, strict=True):
            for method, (label, color, marker, _) in styles.items():
                found = [r for r in chosen if r["method"] == method and r[key]]
                if found:
                    x, y = [r[key] / 1e3 for r in found], [names.index(r["case"]) for r in found]
                    ax.scatter(x, y, s=30, color=color, marker=marker, label=label, linewidths=0, zorder=3)
            ax.set_xscale("log")
            ax.set_title(title, fontsize=10)
            ax.set_xlabel("time (ms)")
            _plain_ticks(ax, y=False)
        axes[0].set_yticks(range(len(names)), [name.removeprefix("prefill-") for name in names], fontsize=8)
        _legend_on_top(figure, axes)

    return _svg(draw, 10.5, 1.4 + 0.27 * len(names))


def _styles(rows: Sequence[Row]) -> dict[str, tuple[str, str, str, str]]:
    """Return label, colour, marker and dash of every method, those of users' kernels included."""
    names = [name for name in kernels_among(row["method"] for row in rows) if name != TRITON["op"]]
    return {**_METHODS, **{name: (name, *style) for name, style in zip(names, cycle(_OTHERS), strict=False)}}


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


def _plain_ticks(ax: Axes, x_values: Sequence[int] = (), suffix: str = "", y: bool = True) -> None:
    """Write log axes in plain numbers; x_values: the tested lengths, as ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    def number(value: float, _: int) -> str:
        return f"{value:g}{suffix}"

    if x_values:
        ax.set_xticks(x_values, [f"{x}" for x in x_values], fontsize=8)
        ax.xaxis.set_minor_locator(NullLocator())
    else:
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
    if y:
        low, high = ax.get_ylim()
        steps = (1, 1.2, 1.5, 2, 3, 5, 7) if high / low < 8 else (1, 2, 5) if high / low < 300 else (1,)
        ax.yaxis.set_major_locator(LogLocator(subs=steps))
        ax.yaxis.set_major_formatter(FuncFormatter(number))
        ax.yaxis.set_minor_formatter(NullFormatter())


def _line_key(color: str, dash: Any, label: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, linestyle=dash, linewidth=1.2, label=label)


def _legend_on_top(figure: Figure, axes: Iterable[Axes], extra: Sequence[Any] = ()) -> None:
    """Put one legend above all panels, each series once."""
    found: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    for handle in extra:
        found.setdefault(handle.get_label(), handle)
    figure.legend(found.values(), found.keys(), loc="outside upper center", ncols=min(len(found), 5), fontsize=9)
