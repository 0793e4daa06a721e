"""One self-contained report.html: a table of methods, grids of pictures, sequence logos, curves, histograms, notes, the config.

Assumes nothing about where it is opened: styles, pictures and curves are inside the file, there is no script
and no address, and it reads in light and dark. What is worth reporting is left to the caller.
"""

from __future__ import annotations

import base64
import functools
import html
import json
import math
import os
import re
import struct
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rgdiff.runtime.folder import write_atomic

_GRID_WIDTH, _TILE = 280, 96  # CSS pixels: four grids side by side on a page of 1212; the largest picture
_COLORS = (  # Tol's bright ones, then of his muted
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#888888",
    "#332288", "#44aa99", "#999933", "#882255", "#cc6600",
)  # fmt: skip
_DASHES = ("-", "--", ":", "-.")
_INK = "#010203"  # stands for the page's own text colour in a plot
_LETTERS = {  # colours of letters: nucleotides, and what of the amino acids is not one: acids, bases, polar, hydrophobic
    **dict(zip("ACGTU", ("#228833", "#4477aa", "#ccbb44", "#ee6677", "#ee6677"), strict=True)),
    **dict.fromkeys("DE", "#ee6677"), **dict.fromkeys("KRH", "#4477aa"), **dict.fromkeys("NQSY", "#aa3377"),
}  # fmt: skip
_LOGO_WIDTH, _LOGO_HEIGHT, _COLUMN = 560, 110, 34  # CSS pixels: two logos side by side; the widest column


@dataclass(frozen=True)
class Grid:
    """A batch of pictures: images [N, H, W, C] uint8 with C 1, 3 or 4; one reward under each if given."""

    title: str
    images: Any
    caption: str = ""
    rewards: Sequence[float] | None = None
    columns: int | None = None


@dataclass(frozen=True)
class Series:
    """One curve: y over x, and optionally a band from low to high.

    `color` and `dash` are numbers of a color and a line style; the color's is the curve's place by default.
    """

    name: str
    x: Any  # sequences or arrays of numbers, all of one length
    y: Any
    low: Any = None
    high: Any = None
    color: int | None = None
    dash: int = 0


@dataclass(frozen=True)
class Plot:
    """Curves that share axes."""

    title: str
    series: Sequence[Series]
    xlabel: str = ""
    ylabel: str = ""


@dataclass(frozen=True)
class Histogram:
    """How values are distributed, and optionally the exact law beside them: (values, probabilities). NaN is left out.

    Several samples, or several laws, are given by name. `bins` is their number, or their edges.
    """

    title: str
    values: Any
    exact: Any = None
    xlabel: str = "reward"
    bins: Any = 40


@dataclass(frozen=True)
class Logo:
    """A sequence logo: a column for each of `frequencies` [L, K] (rows sum to 1), as high as its information, log2 K - entropy, in bits."""

    title: str
    letters: str
    frequencies: Any


@dataclass(frozen=True)
class Report:
    """What a report says: table[method][metric], rows of grids side by side, logos, plots, notes, config."""

    title: str
    command: str = ""
    versions: Mapping[str, Any] = field(default_factory=dict)
    table: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    grids: Sequence[Sequence[Grid]] = ()
    logos: Sequence[Logo] = ()
    plots: Sequence[Plot | Histogram] = ()
    notes: Sequence[str] = ()
    config: Any = None
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M"))


def write_report(path: str | os.PathLike[str], report: Report) -> None:
    """Write the report as one HTML file; `config` is text (YAML) or a dict.

    Raises:
      ValueError: if a picture batch is not uint8 [N, H, W, C] with C in (1, 3, 4), or lengths or shapes do not match.
    """
    write_atomic(path, render(report).encode())


def plot_rows(
    rows: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    *,
    title: str,
    phase: str | None = None,
    x: str = "step",
) -> Plot:
    """Make a plot of the named metrics from metrics rows, of one phase or all; missing values are skipped."""
    series = []
    for name in names:
        of_phase = (row for row in rows if phase is None or row.get("phase") == phase)
        points = [(row[x], row[name]) for row in of_phase if row.get(x) is not None and row.get(name) is not None]
        if points:
            at, values = zip(*points, strict=True)
            series.append(Series(name, at, values))
    return Plot(title, series, xlabel=x)


def render(report: Report) -> str:
    """Return the report as HTML text."""
    versions = " · ".join(f"{name} {value}" for name, value in report.versions.items() if value is not None)
    parts = [f"<header><h1>{_text(report.title)}</h1><p class=quiet>{_text(report.date)}</p>"]
    if report.command:
        parts.append(f"<pre class=command>{_text(report.command)}</pre>")
    parts.append("</header>")
    if report.table:
        parts.append(f"<section><h2>Summary</h2>{_table(report.table)}</section>")
    if any(report.grids):
        rows = "".join(f"<div class=row>{''.join(map(_grid, row))}</div>" for row in report.grids)
        parts.append(f"<section><h2>Samples</h2>{rows}</section>")
    if report.logos:
        top = max((float(_information(logo).max()) for logo in report.logos), default=0.0)
        logos = "".join(_logo(logo, top) for logo in report.logos)
        parts.append(f"<section><h2>Sequence logos</h2><div class=row>{logos}</div></section>")
    if report.plots:
        plots = "".join(_plot(plot, number) for number, plot in enumerate(report.plots))
        parts.append(f"<section><h2>Curves</h2><div class=row>{plots}</div></section>")
    if report.notes:
        notes = "".join(f"<p>{_text(note)}</p>" for note in report.notes)
        parts.append(f"<section class=notes><h2>Notes</h2>{notes}</section>")
    if report.config is not None:
        config = report.config if isinstance(report.config, str) else json.dumps(report.config, indent=2, default=str)
        parts.append(f"<details><summary>Resolved config</summary><pre>{_text(config)}</pre></details>")
    if versions:
        parts.append(f"<footer class=quiet>{_text(versions)}</footer>")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(report.title)}</title><style>{_STYLE}</style>"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n'
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def png(image: Any) -> bytes:
    """Encode one picture [H, W, C] uint8 (C 1 gray, 3 RGB, 4 RGBA) as PNG."""
    image = np.ascontiguousarray(image)
    if image.ndim != 3 or image.dtype != np.uint8 or image.shape[2] not in (1, 3, 4) or 0 in image.shape:
        raise ValueError(f"png: got {image.dtype} {image.shape}, expected uint8 [H, W, C] with C in (1, 3, 4)")
    height, width, channels = image.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), image.reshape(height, -1)], axis=1)  # 0: row not filtered

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _text(value: Any) -> str:
    return html.escape(str(value))


def _number(value: Any) -> str:
    """Write a table cell: four significant digits, a dash for what is missing."""
    if value is None or isinstance(value, str):
        return value or "–"
    value = np.asarray(value).item()
    if isinstance(value, bool | int):
        return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
    return "–" if math.isnan(value) else f"{value:.4g}".replace("-", "−")


def _reward(value: float) -> str:
    value = float(value)
    text = f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
    return "–" if math.isnan(value) else text.replace("-", "−")


def _table(table: Mapping[str, Mapping[str, Any]]) -> str:
    """Methods across, metrics down: a page is longer than wide."""
    metrics = list(dict.fromkeys(name for row in table.values() for name in row))
    head = "".join(f"<th>{_text(method)}</th>" for method in table)
    body = ""
    for name in metrics:
        cells = ""
        for row in table.values():
            side = " class=word" if isinstance(row.get(name), str) else ""
            cells += f"<td{side}>{_text(_number(row.get(name)))}</td>"
        body += f"<tr><th>{_text(name)}</th>{cells}</tr>"
    return f"<div class=scroll><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _grid(grid: Grid) -> str:
    images = np.asarray(grid.images)
    if images.ndim != 4 or images.dtype != np.uint8 or not len(images):
        raise ValueError(f"grid {grid.title!r}: got {images.dtype} {images.shape}, expected uint8 [N, H, W, C], N >= 1")
    if grid.rewards is not None and len(grid.rewards) != len(images):
        raise ValueError(f"grid {grid.title!r}: {len(grid.rewards)} rewards for {len(images)} images")
    columns = grid.columns or min(8, math.ceil(math.sqrt(len(images))))
    scale = max(1, min(_GRID_WIDTH // columns - 3, _TILE) // images.shape[2])
    width, height = scale * images.shape[2], scale * images.shape[1]  # a whole multiple: pixels stay square
    cells = ""
    for index, image in enumerate(images):
        data = base64.b64encode(png(image)).decode()
        under = "" if grid.rewards is None else f"<span>{_reward(grid.rewards[index])}</span>"
        cells += f'<div><img alt="" width={width} height={height} src="data:image/png;base64,{data}">{under}</div>'
    caption = f"<figcaption><b>{_text(grid.title)}</b> {_text(grid.caption)}</figcaption>"
    style = f"grid-template-columns:repeat({columns},{width}px)"
    outer = max(columns * (width + 3), 140)
    return f'<figure style="width:{outer}px">{caption}<div class=grid style="{style}">{cells}</div></figure>'


def _information(logo: Logo) -> np.ndarray:
    """Bits of every column: log2 K + sum f log2 f, [L]."""
    f = np.asarray(logo.frequencies, np.float64)
    if f.ndim != 2 or f.shape[1] != len(logo.letters) or not len(f):
        raise ValueError(
            f"logo {logo.title!r}: expected frequencies [L, {len(logo.letters)}], got shape {list(f.shape)}"
        )
    return math.log2(f.shape[1]) + np.sum(f * np.log2(np.where(f > 0, f, 1)), 1)


def _logo(logo: Logo, top: float) -> str:
    """Draw a logo whose axis reaches `top` bits, the same for all of a report."""
    frequencies, bits = np.asarray(logo.frequencies, np.float64), _information(logo)
    top = max(top, 1e-3)
    column = min(_COLUMN, _LOGO_WIDTH / len(bits))
    marks = ""
    for place, (row, height) in enumerate(zip(frequencies, bits, strict=True)):
        below = 0.0
        for index in np.argsort(row):
            size = row[index] * height / top * _LOGO_HEIGHT
            if size >= 0.25:
                letter = logo.letters[index]
                where = (
                    f"translate({place * column:.1f} {_LOGO_HEIGHT - below:.2f}) scale({column * 0.96:.2f} {-size:.2f})"
                )
                marks += f'<path fill="{_LETTERS.get(letter, "#888888")}" transform="{where}" d="{_glyph(letter)}"/>'
            below += size
    width = math.ceil(column * len(bits))
    caption = f"<figcaption><b>{_text(logo.title)}</b> full height {_number(round(top, 3))} bits</figcaption>"
    svg = f'<svg viewBox="0 0 {width} {_LOGO_HEIGHT}" width={width} height={_LOGO_HEIGHT} role="img">{marks}</svg>'
    return f"<figure class=logo>{caption}{svg}</figure>"


@functools.cache
def _glyph(letter: str) -> str:
    """Outline of a capital letter in the unit square, as the d of an SVG path."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.path import Path
    from matplotlib.textpath import TextPath

    outline = TextPath((0, 0), letter, size=10, prop=FontProperties(family="DejaVu Sans", weight="bold"))
    low, high = outline.vertices.min(0), outline.vertices.max(0)
    commands: dict[Any, str] = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C"}
    out = []
    for points, code in outline.iter_segments():
        if code == Path.CLOSEPOLY:
            out.append("Z")
        else:
            scaled = (np.asarray(points).reshape(-1, 2) - low) / (high - low)
            out.append(commands[code] + " ".join(f"{x:.3f} {y:.3f}" for x, y in scaled))
    return "".join(out)


def _lines(axes: Any, plot: Plot) -> None:
    for index, series in enumerate(plot.series):
        if not len(series.x) == len(series.y):
            raise ValueError(f"plot {plot.title!r}: series {series.name!r} has {len(series.x)} x and {len(series.y)} y")
        color = _COLORS[(index if series.color is None else series.color) % len(_COLORS)]
        if series.low is not None and series.high is not None:
            axes.fill_between(series.x, series.low, series.high, color=color, alpha=0.2, linewidth=0)
        marker = "o" if len(series.x) < 3 else ""
        style = _DASHES[series.dash % len(_DASHES)]
        axes.plot(series.x, series.y, style, color=color, linewidth=1.6, label=series.name, marker=marker)
        if len(series.x) == 1:
            axes.annotate(series.name, (series.x[0], series.y[0]), (4, 4), textcoords="offset points", fontsize=7)
    axes.set_xlabel(plot.xlabel)
    axes.set_ylabel(plot.ylabel)
    if any(len(series.x) > 1 for series in plot.series):  # single points have their names beside them
        axes.legend(frameon=False)


def _bars(axes: Any, plot: Histogram) -> None:
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
    edges = np.histogram_bin_edges(np.concatenate([v for v, _ in finite.values()]), plot.bins)
    for index, (name, (v, weights)) in enumerate(finite.items()):
        share, known = np.histogram(v, edges, weights=weights)[0], index - len(samples)
        look: dict[str, Any] = {
            "fill": not index,
            "color": _COLORS[index % len(_COLORS)],
            "alpha": 1 if index else 0.45,
        }
        if known >= 0 and len(laws) > 2:  # thin lines of ink over several samples
            look |= {"color": _INK, "linestyle": ("-", "--", ":")[known % 3], "linewidth": 0.9}
        axes.stairs(share, edges, label=name, **look)
    axes.set_xlabel(plot.xlabel)
    axes.set_ylabel("share")
    axes.legend(frameon=False)


def _plot(plot: Plot | Histogram, number: int) -> str:
    import io

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
        figure = Figure(figsize=(5.4, 3.2), layout="constrained")
        axes = figure.add_subplot()
        if isinstance(plot, Histogram):
            _bars(axes, plot)
        else:
            _lines(axes, plot)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg, count=2).replace(_INK, "currentColor")
    return f"<figure class=plot><figcaption><b>{_text(plot.title)}</b></figcaption>{svg}</figure>"


_STYLE = """
:root{color-scheme:light dark;--ink:#1d2127;--quiet:#667080;--line:#d9dee5;--page:#fbfbfa;--card:#fff}
@media (prefers-color-scheme:dark){:root{--ink:#dfe3e8;--quiet:#8d97a5;
--line:#343a43;--page:#15181c;--card:#1b1f24}}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,"Segoe UI",Roboto,Helvetica,Arial,sans-serif}
main{max-width:1214px;margin:0 auto;padding:28px 24px 48px}
h1{font-size:26px;font-weight:600;margin:0}
h2{font-size:17px;font-weight:600;margin:34px 0 10px}
.quiet{color:var(--quiet);font-size:13px}
header p{margin:2px 0 10px}
pre{font:12.5px/1.5 ui-monospace,Menlo,Consolas,monospace;background:var(--card);border:1px solid var(--line);
border-radius:6px;padding:10px 12px;margin:8px 0;overflow-x:auto}
.command{white-space:pre-wrap;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:6px 14px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
thead th{color:var(--quiet);font-weight:500;font-size:13px}
tbody th{text-align:left;font-weight:600;padding-left:0}
td.word{text-align:left}
tbody tr:hover{background:var(--card)}
.row{display:flex;flex-wrap:wrap;gap:22px 28px;margin:6px 0 22px}
figure{margin:0}
figcaption{font-size:13.5px;color:var(--quiet);margin-bottom:7px}
figcaption b{color:var(--ink);font-weight:600}
.grid{display:grid;gap:3px}
.grid span{margin-bottom:2px}
.grid img{display:block;image-rendering:pixelated}
.grid span{display:block;text-align:center;font-size:10.5px;line-height:1.5;
color:var(--quiet);font-variant-numeric:tabular-nums}
.logo svg{max-width:100%}
.plot{width:min(580px,100%)}
.plot svg{width:100%;height:auto}
.plot text{font-family:inherit!important}
.notes p{max-width:75ch;white-space:pre-wrap;margin:6px 0}
details{margin-top:34px}
summary{cursor:pointer;font-weight:600}
footer{margin-top:30px;border-top:1px solid var(--line);padding-top:10px}
"""
