"""One self-contained report.html: pictures of samples first, a sentence for each method, figures, then all numbers, folded.

Assumes nothing about where it is opened: styles, pictures and figures are inside the file, there is no script and no address,
and it reads in light and dark, on narrow screens and on paper. What is worth reporting is left to the caller (`pages`), how a
sample is drawn to its domain (`rgdiff.domains.drawing`), and what figures are called to `tables`.
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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rgdiff.domains.drawing import Logo, Plane
from rgdiff.runtime import tables
from rgdiff.runtime.folder import write_atomic

_TILE, _LARGEST, _VECTOR = 96, 256, 200  # CSS pixels: of a picture at least and at most; of a drawing of a vector
_SMALL = 64  # of a picture in a table, at least
_COLORS = (  # Tol's bright ones, then of his muted, those that are read on white and on black
    "#4477aa", "#ee6677", "#228833", "#b8a635", "#3fb0d8", "#aa3377", "#7b6fc9",
    "#cc6600", "#44aa99", "#8f8f2f", "#b5567f", "#888888",
)  # fmt: skip
_DASHES = ("-", "--", ":", "-.")
_MARKERS = "os^DvPX*"
_INK = "#010203"  # stands for the page's own text colour in a figure
INK = -1  # the number of that colour
_LETTERS = {  # colours of letters: nucleotides, and what of the amino acids is not one: acids, bases, polar, hydrophobic
    **dict(zip("ACGTU", ("#228833", "#4477aa", "#b8a635", "#ee6677", "#ee6677"), strict=True)),
    **dict.fromkeys("DE", "#ee6677"), **dict.fromkeys("KRH", "#4477aa"), **dict.fromkeys("NQSY", "#aa3377"),
}  # fmt: skip
_LINE, _COLUMN, _LOGO_HEIGHT = (
    50,
    26,
    96,
)  # a logo's columns in a line, at most; units of a column's width and of its height
_PLANE = 300  # units of a plane's side
_BRIEF = 36  # characters of a name in a figure
_COMMAND = 160  # characters of the command at the head of the page


@dataclass(frozen=True)
class Grid:
    """Single samples side by side: `drawn` are 8-bit pictures [N, H, W, C] (C 1, 3 or 4), or an SVG text or a line of letters for each.

    `labels` are written under them (before a line of letters), the first at the first; there may be fewer. `columns` bounds
    how many stand side by side.
    """

    title: str
    drawn: Any
    labels: Sequence[str] = ()
    caption: str = ""
    columns: int | None = None


@dataclass(frozen=True)
class Whole:
    """A set of samples in one drawing: a logo, a plane, or a picture [H, W, C]; `marks` names places [2] on a plane."""

    title: str
    drawing: Logo | Plane | Any
    marks: Mapping[str, Any] = field(default_factory=dict)
    caption: str = ""


@dataclass(frozen=True)
class Card:
    """One method's samples: sets side by side, each of one panel or several below each other; `more` are folded under them.

    `flag` says in what the method is over-optimised.
    """

    title: str
    sets: Sequence[Sequence[Grid | Whole]]
    more: Sequence[Sequence[Grid | Whole]] = ()
    flag: str = ""


@dataclass(frozen=True)
class Comparison:
    """Samples of every method under every condition: a table with `rows` of names (prompts) and `columns` of names (methods).

    `drawn` are 8-bit pictures [N, H, W, C] for each row and column, the samples of a cell; `labels` a line of text for each.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    drawn: Sequence[Sequence[Any]]
    labels: Sequence[Sequence[str]] = ()


@dataclass(frozen=True)
class Series:
    """One curve: y over x, and optionally a band from low to high; a single point is a mark.

    `color` and `dash` are numbers of a color and a line style; the color's is the curve's place by default, `INK` the text's.
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
    """Curves that share axes; the labels of the axes say the unit."""

    title: str
    series: Sequence[Series]
    xlabel: str = ""
    ylabel: str = ""


@dataclass(frozen=True)
class Histogram:
    """How values are distributed, and optionally the exact law beside them: (values, probabilities). NaN is left out.

    Several samples, or several laws, are given by name. `bins` is their number, or their edges; without edges the outer bins
    hold what lies far off. `colors` are numbers of the samples' colors, as in `Series`.
    """

    title: str
    values: Any
    exact: Any = None
    xlabel: str = "reward"
    bins: Any = 40
    colors: Sequence[int] = ()


@dataclass(frozen=True)
class Boxes:
    """How many sets of values are distributed, a line for each: median, middle half, and 5 to 95 %; `exact` are means to compare with."""

    title: str
    values: Mapping[str, Any]
    xlabel: str = "reward"
    exact: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What a report says: cards of samples, words on each method (name, sentence), figures, table[method][figure], notes, config.

    `warnings` stand on top; `compared` before the cards; `more` are figures that are folded; `links` lead to other pages beside this
    one, by name.
    """

    title: str
    command: str = ""
    versions: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    cards: Sequence[Card] = ()
    words: Sequence[tuple[str, str]] = ()
    plots: Sequence[Plot | Histogram | Boxes] = ()
    more: Sequence[Plot | Histogram | Boxes] = ()
    table: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    links: Mapping[str, str] = field(default_factory=dict)
    config: Any = None
    compared: Comparison | None = None
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
    ylabel: str = "",
) -> Plot:
    """Make a plot of the named metrics from metrics rows, of one phase or all; missing values are skipped."""
    series = []
    for name in names:
        of_phase = (row for row in rows if phase is None or row.get("phase") == phase)
        points = [(row[x], row[name]) for row in of_phase if row.get(x) is not None and row.get(name) is not None]
        if points:
            at, values = zip(*points, strict=True)
            series.append(Series(name, at, values))
    return Plot(title, series, xlabel=x, ylabel=ylabel)


def render(report: Report) -> str:
    """Return the report as HTML text."""
    letters: set[str] = set()
    sections: dict[str, tuple[str, str]] = {}  # id -> (heading, body)
    panels = [panel for card in report.cards for one in (*card.sets, *card.more) for panel in one]
    logos = [panel.drawing for panel in panels if isinstance(panel, Whole) and isinstance(panel.drawing, Logo)]
    top = _round_up(max((float(_information(logo).max()) for logo in logos), default=0.0))
    if report.cards:
        planes = all(
            any(isinstance(p, Whole) and not isinstance(p.drawing, Logo) for p in one)
            for c in report.cards
            for one in c.sets
        )
        body = "".join(_card(card, top, letters) for card in report.cards)
        body = f"<div class=pairs>{body}</div>" if planes else body
        sections["samples"] = "Samples", _compared(report.compared) + body if report.compared else body
    if report.plots and not report.cards:  # the page opens with what there is to see
        sections["figures"] = "Figures", _figures(report.plots, 0)
    if report.words:
        items = "".join(f"<li>{_named(name, text)}</li>" for name, text in report.words)
        sections["words"] = "In words", f"<ul class=words>{items}</ul>"
    if report.links:
        items = "".join(f'<li><a href="{_text(to)}">{_text(name)}</a></li>' for name, to in report.links.items())
        sections["runs"] = "Runs", f"<ul class=words>{items}</ul>"
    if report.plots and report.cards:
        sections["figures"] = "Figures", _figures(report.plots, 0)
    said = f" · <code>{_text(tables.shorten(report.command, _COMMAND))}</code>" if report.command else ""
    parts = [f"<header><h1>{_text(report.title)}</h1><p class=quiet>{_text(report.date)}{said}</p>"]
    parts += [f"<p class=warning>{_text(warning)}</p>" for warning in report.warnings]
    if len(sections) > 1:
        parts.append(f"<nav>{' '.join(f'<a href=#{key}>{head}</a>' for key, (head, _) in sections.items())}</nav>")
    parts.append("</header>")
    parts += [f"<section id={key}><h2>{head}</h2>{body}</section>" for key, (head, body) in sections.items()]
    if report.more:
        parts.append(_folded("More figures", _figures(report.more, len(report.plots))))
    if report.table:
        parts.append(_folded("All numbers", _table(report.table)))
    if report.notes:
        parts.append(_folded("Notes", "".join(f"<p>{_text(note)}</p>" for note in report.notes), "notes"))
    if report.config is not None or report.command:
        config = report.config if isinstance(report.config, str) else json.dumps(report.config, indent=2, default=str)
        said = f"<pre class=command>{_text(report.command)}</pre>" if report.command else ""
        said += f"<pre>{_text(config)}</pre>" if report.config is not None else ""
        parts.append(_folded("Command and resolved config", said))
    if versions := [f"{name} {value}" for name, value in report.versions.items() if value is not None]:
        parts.append(_folded("Versions", f"<p class=quiet>{_text(' · '.join(versions))}</p>"))
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(report.title)}</title><style>{_STYLE}</style>"
    )
    outlines = "".join(f'<path id="{_letter_id(letter)}" d="{_glyph(letter)}"/>' for letter in sorted(letters))
    defined = f'<svg width="0" height="0" class=defs><defs>{outlines}</defs></svg>' if outlines else ""
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{defined}<main>\n'
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


def _brief(name: str) -> str:
    """Write a name that may be long: its middle left out, and whole where the pointer rests."""
    short = tables.shorten(name, _BRIEF)
    return _text(name) if short == name else f'<span title="{_text(name)}">{_text(short)}</span>'


def _named(name: str, text: str) -> str:
    """Write a sentence with the name that it begins with in bold."""
    rest = text.removeprefix(name)
    return f"<b>{_text(name)}</b>{_text(rest)}" if rest != text else _text(text)


def _folded(title: str, body: str, kind: str = "") -> str:
    return f"<details{f' class={kind}' if kind else ''}><summary>{_text(title)}</summary>{body}</details>"


def _table(table: Mapping[str, Mapping[str, Any]]) -> str:
    """A table for every kind of figure, methods down; what a column means stands under its table, and on its heading."""
    out = ""
    for heading, names in tables.grouped(table).items():
        columns = [tables.column(name) for name in names]
        head = ""
        for column in columns:
            unit = f"<i>{_text(column.unit)}</i>" if column.unit else ""
            head += f'<th title="{_text(column.meaning or column.label)}">{_text(column.label)}{unit}</th>'
        body = ""
        for method, row in table.items():
            cells = ""
            for name in names:
                value = row.get(name)
                side = " class=word" if isinstance(value, str) else ""
                cells += f"<td{side}>{_text(_said(name, value))}</td>"
            body += f"<tr><th>{_text(method)}</th>{cells}</tr>"
        meanings = "".join(
            f"<dt>{_text(c.label)}</dt><dd>{_text(c.meaning)}</dd>"
            for c in columns
            if c.meaning and c.meaning != c.label
        )
        out += (
            f"<h3>{_text(heading)}</h3><div class=scroll><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
            + (f"<dl>{meanings}</dl>" if meanings else "")
        )
    return out


def _said(name: str, value: Any) -> str:
    return f"over-optimised: {value}" if name == "over_optimised" and value else tables.number(value)


def _card(card: Card, top: float, letters: set[str]) -> str:
    flag = f"<p class=flag><b>over-optimised</b> {_text(card.flag)}</p>" if card.flag else ""
    sets = "".join(_set(panels, top, letters) for panels in card.sets)
    more = ""
    if card.more:
        inside = "".join(_set(panels, top, letters) for panels in card.more)
        more = _folded(f"More of {card.title}", f"<div class=sets>{inside}</div>")
    return f"<article class=card><h3>{_text(card.title)}</h3>{flag}<div class=sets>{sets}</div>{more}</article>"


def _set(panels: Sequence[Grid | Whole], top: float, letters: set[str]) -> str:
    """One set of samples: its panels below each other, a title that they share said once."""
    kinds, body, style, said = [], "", "", ""
    for panel in panels:
        kind, inside, width = _panel(panel, top, letters)
        title = "" if panel.title == said else f"<b>{_text(panel.title)}</b> "
        said = panel.title
        caption = f"<figcaption>{title}{_text(panel.caption)}</figcaption>" if title or panel.caption else ""
        body += f'<figure class="{kind}">{caption}{inside}</figure>'
        kinds.append(kind)
        if isinstance(panel, Grid) and panel.columns and width and len(panels) == 1:
            style = f' style="flex:0 1 {panel.columns * (width + 6)}px"'
    kind = next((kind for kind in ("wide", "plane", "logo", "tiles", "vectors", "lines") if kind in kinds), "")
    return f'<div class="set {kind}-set"{style}>{body}</div>'


def _panel(panel: Grid | Whole, top: float, letters: set[str]) -> tuple[str, str, int]:
    """Return the kind of a panel, its HTML, and the width of one of its samples, if it has one."""
    if isinstance(panel, Grid):
        return _grid(panel)
    if isinstance(panel.drawing, Logo):
        wide = len(panel.drawing.frequencies) > _LINE // 2
        return "wide" if wide else "logo", _logo(panel.title, panel.drawing, top, letters), 0
    if isinstance(panel.drawing, Plane):
        return "plane", _plane(panel.drawing, panel.marks), 0
    return "plane", _image(np.asarray(panel.drawing), panel.title, ""), 0


def _compared(one: Comparison) -> str:
    """A table of small pictures: conditions down, methods across, samples within a cell."""
    head = "".join(f"<th>{_brief(name)}</th>" for name in one.columns)
    body = ""
    for i, name in enumerate(one.rows):
        cells = ""
        for j, column in enumerate(one.columns):
            images = _thumbnails(np.asarray(one.drawn[i][j]))
            tiles = "".join(f"<div>{_image(image, f'{name}: {column}', '', _SMALL)}</div>" for image in images)
            label = f"<span>{_text(one.labels[i][j])}</span>" if one.labels else ""
            cells += f"<td><div class=row>{tiles}</div>{label}</td>"
        body += f"<tr><th>{_text(name)}</th>{cells}</tr>"
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<article class="card compared"><h3>{_text(one.title)}</h3><div class=scroll>{table}</div></article>'


def _thumbnails(images: np.ndarray) -> np.ndarray:
    """Pictures [N, H, W, C] of at most `_LARGEST` / 2 pixels a side: means of squares, the rest at the edges left out."""
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(f"a cell of pictures is uint8 [N, H, W, C], got {images.dtype} {images.shape}")
    n, high, wide, channels = images.shape
    side = min(max(1, -(-2 * max(high, wide) // _LARGEST)), high, wide)
    high, wide = high // side, wide // side
    parts = images[:, : high * side, : wide * side].reshape(n, high, side, wide, side, channels)
    return np.rint(parts.mean((2, 4))).astype(np.uint8)


def _round_up(value: float) -> float:
    """Return the next round number."""
    if not value > 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    return round(next((m for m in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if m * unit >= value * 0.999), 10) * unit, 12)


def _grid(grid: Grid) -> tuple[str, str, int]:
    """Return the kind of a grid, its HTML, and the width of a sample: tiles of pictures or drawings, or lines of letters."""
    drawn, labels, width = grid.drawn, list(grid.labels), 0
    if isinstance(drawn, Sequence) and (not len(drawn) or isinstance(drawn[0], str)):
        count, lines = len(drawn), [d for d in drawn if not d.lstrip().startswith("<svg")]
        cells = [_colored(d) if lines else d for d in drawn]
        kind, width = ("lines", 0) if lines else ("vectors", _VECTOR)
        if any(len(line) > _LINE // 2 for line in lines):
            kind = "wide"
    else:
        images = np.asarray(drawn)
        if images.ndim != 4 or images.dtype != np.uint8 or not len(images):
            raise ValueError(
                f"grid {grid.title!r}: got {images.dtype} {images.shape}, expected uint8 [N, H, W, C], N >= 1"
            )
        count, kind, width = len(images), "tiles", _size(*images.shape[1:3])[1]
        cells = [
            _image(image, grid.title, label) for image, label in zip(images, [*labels, *[""] * count], strict=False)
        ]
    if len(labels) > count:
        raise ValueError(f"grid {grid.title!r}: {len(labels)} labels for {count} samples")
    labels += [""] * (count - len(labels))
    some = any(labels)
    tiles = ""
    for cell, label in zip(cells, labels, strict=True):
        under = f"<span>{_text(label) or '&nbsp;'}</span>" if some else ""
        tiles += f'<div style="width:{width}px">{cell}{under}</div>' if width else f"<div>{under}{cell}</div>"
    return kind, f"<div class={'row' if width else 'rows'}>{tiles}</div>", width


def _image(image: np.ndarray, title: str, label: str, least: int = _TILE) -> str:
    """One picture, at least so many CSS pixels wide and high."""
    high, wide = _size(image.shape[0], image.shape[1], least)
    data = base64.b64encode(png(image)).decode()
    smooth = "" if wide >= image.shape[1] else ' style="image-rendering:auto"'
    about = _text(f"{title} {label}".strip())
    return f'<img alt="{about}" width={wide} height={high}{smooth} src="data:image/png;base64,{data}">'


def _size(height: int, width: int, least: int = _TILE) -> tuple[int, int]:
    """Return the height and width of a picture in CSS pixels: a small one enlarged by a whole multiple, so that pixels stay square."""
    scale = max(1, -(-least // max(1, min(height, width))))
    if scale > 1 or max(height, width) <= _LARGEST:
        return scale * height, scale * width
    return round(height * _LARGEST / max(height, width)), round(width * _LARGEST / max(height, width))


def _colored(line: str) -> str:
    """A line of letters in their colours, runs of one colour together."""
    out = ""
    for color, run in _runs((_LETTERS.get(letter), letter) for letter in line):
        out += f'<i style="color:{color}">{_text(run)}</i>' if color else _text(run)
    return f"<code>{out}</code>"


def _runs(pairs: Iterable[tuple[Any, str]]) -> list[tuple[Any, str]]:
    runs: list[tuple[Any, str]] = []
    for key, letter in pairs:
        if runs and runs[-1][0] == key:
            runs[-1] = key, runs[-1][1] + letter
        else:
            runs.append((key, letter))
    return runs


def _plane(plane: Plane, marks: Mapping[str, Any]) -> str:
    """A picture in a frame, with its axes' ends and labels, and named places."""
    image = np.asarray(plane.image)
    left, right, bottom, top = plane.extent
    data = base64.b64encode(png(image)).decode()
    ink = " class=ink" if image.shape[2] == 1 else ""
    out = (
        f'<image{ink} width={_PLANE} height={_PLANE} preserveAspectRatio="none" href="data:image/png;base64,{data}"/>'
        f"<rect width={_PLANE} height={_PLANE} class=frame />"
    )
    for value in _ticks(left, right):
        x = (value - left) / (right - left) * _PLANE
        out += f'<path class=frame d="M{x:.1f} {_PLANE}v5"/><text x={x:.1f} y={_PLANE + 18} text-anchor=middle>{tables.number(value, 3)}</text>'
    for value in _ticks(bottom, top):
        y = (top - value) / (top - bottom) * _PLANE
        out += f'<path class=frame d="M0 {y:.1f}h-5"/><text x=-8 y={y + 4:.1f} text-anchor=end>{tables.number(value, 3)}</text>'
    out += f"<text x={_PLANE / 2} y={_PLANE + 36} text-anchor=middle>{_text(plane.xlabel)}</text>"
    out += f'<text transform="translate(-40 {_PLANE / 2}) rotate(-90)" text-anchor=middle>{_text(plane.ylabel)}</text>'
    taken: list[tuple[float, float]] = []
    for name, place in marks.items():
        x, y = float(place[0]), float(place[1])
        if not (left <= x <= right and bottom <= y <= top):
            continue
        x, y = (x - left) / (right - left) * _PLANE, (top - y) / (top - bottom) * _PLANE
        side, at = ("end", x - 8) if x > 0.75 * _PLANE else ("start", x + 8)
        down = y + 4
        while any(abs(down - other) < 13 and abs(at - beside) < 70 for beside, other in taken):
            down += 13
        taken.append((at, down))
        out += f"<circle cx={x:.1f} cy={y:.1f} r=4.5 class=mark /><text x={at:.1f} y={down:.1f} text-anchor={side} class=mark>{_text(name)}</text>"
    return f'<svg viewBox="-52 -6 {_PLANE + 64} {_PLANE + 48}" role="img">{out}</svg>'


def _ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round values between the two, about so many."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return []
    rough = span / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough * 0.8)
    return [round(k * step, 12) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _information(logo: Logo) -> np.ndarray:
    """Bits of every column: log2 K + sum f log2 f, [L]."""
    f = np.asarray(logo.frequencies, np.float64)
    if f.ndim != 2 or f.shape[1] != len(logo.letters) or not len(f):
        raise ValueError(f"logo: expected frequencies [L, {len(logo.letters)}], got shape {list(f.shape)}")
    return math.log2(f.shape[1]) + np.sum(f * np.log2(np.where(f > 0, f, 1)), 1)


def _logo(title: str, logo: Logo, top: float, letters: set[str]) -> str:
    """Draw a logo whose axis reaches `top` bits, the same for all of a report, in lines; columns are as high as their information."""
    frequencies, bits = np.asarray(logo.frequencies, np.float64), _information(logo)
    length = len(bits)
    lines = -(-length // _LINE)
    of_line = -(-length // lines)
    out = ""
    for start in range(0, length, of_line):
        marks, stop = "", min(start + of_line, length)
        for place in range(start, stop):
            below = 0.0
            for index in np.argsort(frequencies[place]):
                size = frequencies[place, index] * bits[place] / top * _LOGO_HEIGHT
                if size >= 0.25:
                    letter = logo.letters[index]
                    letters.add(letter)
                    x, y = (place - start) * _COLUMN, _LOGO_HEIGHT - below
                    marks += (
                        f'<use href="#{_letter_id(letter)}" fill="{_LETTERS.get(letter, "#888888")}" '
                        f'transform="translate({x} {y:.2f}) scale({_COLUMN * 0.96:.2f} {-size:.2f})"/>'
                    )
                below += size
            if (place + 1) % 10 == 0 or place in (start, stop - 1) and length <= 20:
                marks += f"<text x={(place - start + 0.5) * _COLUMN} y={_LOGO_HEIGHT + 15} text-anchor=middle>{place + 1}</text>"
        width = of_line * _COLUMN
        marks += f'<path class=frame d="M-4 0h-4v{_LOGO_HEIGHT}h4"/><text x=-12 y=9 text-anchor=end>{tables.number(top, 3)}</text>'
        marks += f'<text x=-12 y={_LOGO_HEIGHT} text-anchor=end>0</text><text transform="translate(-16 {_LOGO_HEIGHT / 2}) rotate(-90)" text-anchor=middle>bits</text>'
        marks += f"<text x={width / 2} y={_LOGO_HEIGHT + 29} text-anchor=middle>position</text>"
        size = f"max-width:{round((width + 36) * (1.5 if length <= 12 else 1.0))}px"
        out += f'<svg viewBox="-34 -3 {width + 36} {_LOGO_HEIGHT + 35}" style="{size}" role="img" aria-label="{_text(title)}">{marks}</svg>'
    return out


def _letter_id(letter: str) -> str:
    return f"letter-{ord(letter)}"


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


def _figures(plots: Sequence[Plot | Histogram | Boxes], first: int) -> str:
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
        items += f'<li><svg viewBox="0 0 24 12" width=24 height=12>{shape}</svg>{_brief(name)}</li>'
    return f"<ul class=legend>{items}</ul>"


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
        figure = Figure(figsize=(4.9, 3.0), layout="constrained")
        axes = figure.add_subplot()
        legend = _bars(axes, plot) if isinstance(plot, Histogram) else _lines(axes, plot)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg, count=2).replace(_INK, "currentColor")
    return f"<figure class=plot><figcaption><b>{_text(plot.title)}</b></figcaption>{svg}{_legend(legend, plot.title)}</figure>"


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
    ticks = _ticks(low, high)
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
        rows += f"<tr><th>{_brief(name)}</th><td>{drawing}</td><td>{middle}</td></tr>"
    axis = "".join(f'<span style="left:{at(t) / 4:.2f}%">{tables.number(t, 3)}</span>' for t in ticks)
    foot = f"<tr><td></td><td><div class=axis>{axis}</div>{_text(plot.xlabel)}</td><td>median</td></tr>"
    exact = " Diamond: mean under the exact law." if plot.exact else ""
    caption = (
        f"<figcaption><b>{_text(plot.title)}</b> Median, middle half, and 5 to 95 % of the samples.{exact}</figcaption>"
    )
    return f"<figure class=boxes>{caption}<table>{rows}{foot}</table></figure>"


_STYLE = """
:root{color-scheme:light dark;--ink:#1d2127;--quiet:#5d6775;--line:#d9dee5;--page:#fbfbfa;--card:#fff;
--warm:#a33b00;--warmer:#fdeee2;--blue:#2b6a9f}
@media screen and (prefers-color-scheme:dark){:root{--ink:#dfe3e8;--quiet:#98a2b0;
--line:#343a43;--page:#15181c;--card:#1b1f24;--warm:#ffb27a;--warmer:#3a2618;--blue:#86bdea}
.ink{filter:invert(.88)}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);overflow-wrap:anywhere;
font:15px/1.5 system-ui,"Segoe UI",Roboto,Helvetica,Arial,sans-serif}
main{max-width:1230px;margin:0 auto;padding:26px 22px 48px}
h1{font-size:26px;line-height:1.25;font-weight:600;margin:0}
h2{font-size:19px;font-weight:600;margin:30px 0 10px}
h3{font-size:15.5px;font-weight:600;margin:0 0 4px}
a{color:var(--blue)}
.quiet{color:var(--quiet);font-size:13px}
header p{margin:2px 0 8px}
nav{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:14px}
.warning,.flag{background:var(--warmer);color:var(--warm);border-radius:6px;padding:5px 10px;margin:6px 0;font-size:14px;
print-color-adjust:exact;-webkit-print-color-adjust:exact}
pre{font:12.5px/1.5 ui-monospace,Menlo,Consolas,monospace;background:var(--card);border:1px solid var(--line);
border-radius:6px;padding:10px 12px;margin:8px 0;overflow-x:auto}
.command{white-space:pre-wrap}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 16px 14px;margin:0 0 14px}
.card details{margin:10px 0 0;font-size:14px}
.pairs{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(560px,100%),1fr));gap:14px}
.pairs .card{margin:0}
.pairs .plane-set{flex:1 1 240px;width:auto;max-width:300px}
.plane-set .row>div{width:100%!important}
.sets{display:flex;flex-wrap:wrap;gap:14px 24px;align-items:flex-start}
.set{min-width:0;max-width:100%}
.tiles-set,.vectors-set{flex:1 1 280px}
.logo-set,.lines-set{flex:1 1 300px;max-width:560px}
.wide-set{flex:1 1 100%}
.plane-set{width:min(340px,100%)}
figure{margin:0 0 8px;min-width:0}
figcaption{font-size:13.5px;color:var(--quiet);margin-bottom:6px}
figcaption b{color:var(--ink);font-weight:600}
.row{display:flex;flex-wrap:wrap;gap:6px}
.row>div{max-width:100%}
.row span,.rows span{font-size:12px;line-height:1.5;color:var(--quiet);font-variant-numeric:tabular-nums}
.row span{display:block;text-align:center}
.card img{display:block;image-rendering:pixelated;max-width:100%;height:auto}
.vectors svg{display:block;width:100%;height:auto;border:1px solid var(--line)}
.vectors svg[preserveAspectRatio=none]{height:96px}
.rows>div{display:flex;gap:10px;align-items:baseline}
.rows span{flex:0 0 15ch}
.rows code{font:14px/1.5 ui-monospace,Menlo,Consolas,monospace;letter-spacing:.06em}
.rows i{font-style:normal}
.plane svg,.logo svg,.wide svg{display:block;width:100%;height:auto;overflow:visible}
svg text{fill:var(--quiet);font:12px system-ui,"Segoe UI",Roboto,Helvetica,Arial,sans-serif}
.frame{fill:none;stroke:var(--quiet);stroke-width:1}
circle.mark{fill:none;stroke:#e0442c;stroke-width:2}
text.mark{fill:var(--ink);font-weight:600;paint-order:stroke;stroke:var(--card);stroke-width:3px}
.defs{position:absolute}
.words{padding-left:20px;max-width:100ch}
.words li{margin:5px 0}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));gap:22px 30px}
.plot,.boxes{max-width:600px}
.plot svg{width:100%;height:auto}
.plot text{fill:currentColor;font-family:inherit!important}
.legend{list-style:none;margin:4px 0 0;padding:0;display:flex;flex-wrap:wrap;gap:2px 16px;font-size:13px}
.legend li{white-space:nowrap}
.legend svg{width:24px;height:12px;margin-right:6px;vertical-align:-1px}
.compared td,.compared thead th{text-align:left;vertical-align:top;cursor:auto}
.compared .row{gap:3px;flex-wrap:nowrap}
.compared tbody th{max-width:20ch;background:var(--card);vertical-align:top}
.compared td span{font-size:12px;color:var(--quiet)}
.boxes table{width:100%;table-layout:fixed}
.boxes th{width:34%;white-space:normal;font-weight:400;font-size:13px;padding:2px 8px 2px 0;text-align:left;border:0}
.boxes td{padding:2px 0;border:0;font-size:13px;color:var(--quiet);text-align:left}
.boxes td:last-child{width:15%;text-align:right}
.boxes svg{display:block;width:100%;height:20px}
.axis{position:relative;height:18px;font-size:12px}
.axis span{position:absolute;transform:translateX(-50%)}
.grid{stroke:var(--line)}
.whisker{stroke:var(--quiet);stroke-width:1.5}
.box{fill:#4477aa;fill-opacity:.55}
.median{stroke:var(--ink);stroke-width:2.5}
.exact{fill:none;stroke:#ee6677;stroke-width:1.5}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:5px 12px;text-align:right;border-bottom:1px solid var(--line)}
thead th{color:var(--quiet);font-weight:500;font-size:13px;vertical-align:bottom;min-width:9ch;max-width:16ch;
overflow-wrap:break-word;cursor:help}
thead th i{display:block;font-style:normal;font-size:12px;opacity:.85}
tbody th{text-align:left;font-weight:600;padding-left:0;min-width:12ch;max-width:30ch;position:sticky;left:0;background:var(--page)}
td{white-space:nowrap}
td.word{text-align:left;white-space:normal;min-width:24ch}
dl{display:grid;grid-template-columns:minmax(12ch,max-content) 1fr;gap:2px 16px;font-size:13px;color:var(--quiet);max-width:110ch}
dt{color:var(--ink)}
dd{margin:0}
.notes p{max-width:90ch;white-space:pre-wrap;margin:6px 0}
details{margin-top:16px}
details h3{margin:16px 0 4px}
summary{cursor:pointer;font-weight:600}
@media (max-width:560px){main{padding:16px 12px 32px}.card{padding:10px 10px 12px}h1{font-size:21px}
dl{grid-template-columns:1fr}dd{margin:0 0 6px}.rows>div{display:block}.rows span{margin-right:10px}
.row>div:nth-child(n+13){display:none}}
@media print{main{max-width:none;padding:0}body,.card{background:none}nav{display:none}
.card,.plot,tr,li{break-inside:avoid}.tiles-set{flex:1 1 0!important}.tiles-set[style]{flex:0 0 198px!important}
.tiles .row>div{width:60px!important}.row span{font-size:9px}.figures{grid-template-columns:1fr 1fr}h2,h3{break-after:avoid}.scroll{overflow:visible}th,td{padding:3px 6px;font-size:10px}
tbody th{position:static}img,image,.box,i{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
