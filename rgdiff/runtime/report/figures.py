"""Figures of a page: curves and histograms by matplotlib, as SVG in the page's own colours, and boxes."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rgdiff.runtime import tables
from rgdiff.runtime.report.contents import Boxes, Histogram, Plot
from rgdiff.runtime.report.words import brief, escaped, round_values

_COLORS = (  # Tol's bright ones, then of his muted, those that are read on white and on black
    "#4477aa", "#ee6677", "#228833", "#b8a635", "#3fb0d8", "#aa3377", "#7b6fc9",
    "#cc6600", "#44aa99", "#8f8f2f", "#b5567f", "#888888",
)  # fmt: skip
_DASHES = ("-", "--", ":", "-.")
_MARKERS = "os^DvPX*"
_INK = "#010203"  # stands for the page's own text colour in a figure


def drawn(plots: Sequence[Plot | Histogram | Boxes], first: int) -> str:
    """Return figures as HTML; `first` numbers them on the page, so that their ids differ."""
    drawn = (_boxes(plot) if isinstance(plot, Boxes) else _plot(plot, first + i) for i, plot in enumerate(plots))
    return f"<div class=figures>{''.join(drawn)}</div>"


def _color(number: int) -> str:
    return _INK if number < 0 else _COLORS[number % len(_COLORS)]


def _lines(axes: Any, plot: Plot) -> list[tuple[str, str, str]]:
    """Draw curves; return their legend: (name, colour, line style or mark)."""
    legend = []
    for index, series in enumerate(plot.series):
        if not len(series.x) == len(series.y):
            raise ValueError(f"plot {plot.title!r}: series {series.name!r} has {len(series.x)} x and {len(series.y)} y")
        number = index if series.color is None else series.color
        color, style = _color(number), _DASHES[(series.dash + max(number, 0) // len(_COLORS)) % len(_DASHES)]
        if series.low is not None and series.high is not None:
            axes.fill_between(series.x, series.low, series.high, color=color, alpha=0.2, linewidth=0)
        mark = _MARKERS[max(number, 0) // len(_COLORS) % len(_MARKERS)] if len(series.x) < 3 else ""
        axes.plot(series.x, series.y, style, color=color, linewidth=1.6, marker=mark, markersize=7)
        legend.append((series.name, color, mark or style))
    whole = all(float(x).is_integer() for series in plot.series for x in series.x)
    axes.xaxis.get_major_locator().set_params(integer=whole and any(len(series.x) > 1 for series in plot.series))
    axes.set_xlabel(plot.xlabel)
    axes.set_ylabel(plot.ylabel)
    return legend


def _bars(axes: Any, plot: Histogram) -> list[tuple[str, str, str]]:
    """Draw histograms; return their legend."""
    samples = plot.values if isinstance(plot.values, Mapping) else {"samples": plot.values}
    exact = plot.exact if isinstance(plot.exact, Mapping) else {} if plot.exact is None else {"exact law": plot.exact}
    laws: dict[str, Any] = {k: (v, np.full(len(v), 1 / max(np.isfinite(v).sum(), 1))) for k, v in samples.items()}
    laws.update(exact)
    finite = {}
    for name, law in laws.items():
        values, probabilities = (np.asarray(part, np.float64) for part in law)
        if values.shape != probabilities.shape:
            raise ValueError(
                f"histogram {plot.title!r}: {len(values)} exact values with {len(probabilities)} probabilities"
            )
        some = np.isfinite(values)
        finite[name] = values[some], probabilities[some]
    edges = _edges([finite[name][0] for name in samples], plot.bins)
    legend = []
    for index, (name, (v, weights)) in enumerate(finite.items()):
        known = index - len(samples)
        v = np.clip(v, edges[0], edges[-1]) if np.ndim(plot.bins) == 0 else v
        share = np.histogram(v, edges, weights=weights)[0]
        if known >= 0:  # thin lines of ink over the samples
            color, style = _INK, ("-", "--", ":")[known % 3]
            axes.stairs(share, edges, color=color, linestyle=style, linewidth=1.0)
        else:
            color, style = _color(plot.colors[index] if plot.colors else index), "fill"
            axes.stairs(share, edges, color=color, fill=True, alpha=0.25)
            axes.stairs(share, edges, color=color, linewidth=1.4)
        legend.append((name, color, style))
    axes.set_xlabel(plot.xlabel)
    axes.set_ylabel("share of the samples")
    return legend


def _edges(values: Sequence[np.ndarray], bins: Any) -> np.ndarray:
    """Return the edges of bins over all but what lies far off."""
    every = np.concatenate([*values, np.zeros(0)])
    if np.ndim(bins) or not len(every):
        return np.histogram_bin_edges(every, bins)
    near = [
        np.quantile(v, [0.05, 0.5, 0.95]) for v in values if len(v)
    ]  # of each, so that no long tail hides a narrow law
    low, high = min(q[0] - (q[1] - q[0]) for q in near), max(q[2] + (q[2] - q[1]) for q in near)
    return np.histogram_bin_edges(every, bins, range=(max(low, every.min()), min(high, every.max())))


def _legend(entries: Sequence[tuple[str, str, str]], title: str) -> str:
    """The names of what is drawn, as text that wraps; nothing where the title says the one name."""
    if len(entries) < 2 and all(name in title for name, _, _ in entries):
        return ""
    marks = {"o": "<circle cx=12 cy=6 r=4 />", "s": "<rect x=8 y=2 width=8 height=8 />", "^": '<path d="M12 1l5 9h-10z"/>',
             "D": '<path d="M12 1l5 5l-5 5l-5 -5z"/>', "v": '<path d="M12 11l5 -9h-10z"/>', "fill": "<rect x=2 y=1 width=20 height=10 opacity=.6 />"}  # fmt: skip
    dashes = {"--": "5 3", ":": "1.5 2.5", "-.": "5 2 1.5 2"}
    items = ""
    for name, color, style in entries:
        color = color.replace(_INK, "currentColor")
        if style in _DASHES:
            dash = f' stroke-dasharray="{dashes[style]}"' if style in dashes else ""
            shape = f'<path d="M1 6h22" stroke="{color}" stroke-width="2"{dash}/>'
        else:
            shape = f'<g fill="{color}">{marks.get(style, marks["o"])}</g>'
        items += f'<li><svg viewBox="0 0 24 12" width=24 height=12>{shape}</svg>{brief(name)}</li>'
    return f"<ul class=legend>{items}</ul>"


def _plot(plot: Plot | Histogram, number: int) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    look: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": f"plot{number}", "font.family": "sans-serif", "font.size": 9,
        "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _INK, "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "axes.grid": True,
        "grid.color": _INK, "grid.alpha": 0.12, "grid.linewidth": 0.6, "text.parse_math": False,
    }  # fmt: skip
    with rc_context(look):
        figure = Figure(figsize=(4.9, 3.0), layout="constrained")
        axes = figure.add_subplot()
        legend = _bars(axes, plot) if isinstance(plot, Histogram) else _lines(axes, plot)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg, count=2).replace(_INK, "currentColor")
    return f"<figure class=plot><figcaption><b>{escaped(plot.title)}</b></figcaption>{svg}{_legend(legend, plot.title)}</figure>"


def _boxes(plot: Boxes) -> str:
    """A line for each set: its name, which may be long, and a drawing that scales."""
    finite = {
        name: np.asarray(v, np.float64)[np.isfinite(np.asarray(v, np.float64))] for name, v in plot.values.items()
    }
    levels = {name: np.quantile(v, [0.05, 0.25, 0.5, 0.75, 0.95]) for name, v in finite.items() if len(v)}
    ends = [float(x) for q in levels.values() for x in (q[0], q[-1])] + [float(x) for x in plot.exact.values()]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    margin = 0.03 * (high - low) or 0.5
    low, high = low - margin, high + margin
    at = lambda value: 400 * (value - low) / (high - low)  # noqa: E731
    ticks = round_values(low, high)
    grid = "".join(f'<path class=grid d="M{at(t):.1f} 0v20"/>' for t in ticks)
    rows = ""
    for name in plot.values:
        shape, middle = grid, "no value"
        if name in levels:
            a, b, c, d, e = (at(x) for x in levels[name])
            shape += f'<path class=whisker d="M{a:.1f} 10H{e:.1f}"/><rect class=box x={b:.1f} y=4 width={max(d - b, 1):.1f} height=12 /><path class=median d="M{c:.1f} 2v16"/>'
            middle = tables.number(levels[name][2], 3)
        if name in plot.exact:
            shape += f'<path class=exact d="M{at(plot.exact[name]):.1f} 4l5 6l-5 6l-5 -6z"/>'
        drawing = f'<svg viewBox="0 0 400 20" preserveAspectRatio="none">{shape}</svg>'
        rows += f"<tr><th>{brief(name)}</th><td>{drawing}</td><td>{middle}</td></tr>"
    axis = "".join(f'<span style="left:{at(t) / 4:.2f}%">{tables.number(t, 3)}</span>' for t in ticks)
    foot = f"<tr><td></td><td><div class=axis>{axis}</div>{escaped(plot.xlabel)}</td><td>median</td></tr>"
    exact = " Diamond: mean under the exact law." if plot.exact else ""
    caption = f"<figcaption><b>{escaped(plot.title)}</b> Median, middle half, and 5 to 95 % of the samples.{exact}</figcaption>"
    return f"<figure class=boxes>{caption}<table>{rows}{foot}</table></figure>"
