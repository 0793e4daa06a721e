"""Samples on a page: pictures, drawings, lines of letters, logos, and places in a plane."""

from __future__ import annotations

import base64
import functools
import math
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rgdiff.domains.drawing import Logo, Plane
from rgdiff.runtime import tables
from rgdiff.runtime.report.contents import Card, Comparison, Grid, Whole
from rgdiff.runtime.report.words import brief, escaped, folded, round_values

_TILE, _LARGEST, _VECTOR = 96, 256, 156  # CSS pixels: of a picture at least and at most; of a drawing of a vector
_SMALL = 64  # of a picture in a table, at least
_LETTERS = {  # colours of letters: nucleotides, and what of the amino acids is not one: acids, bases, polar, hydrophobic
    **dict(zip("ACGTU", ("#228833", "#4477aa", "#b8a635", "#ee6677", "#ee6677"), strict=True)),
    **dict.fromkeys("DE", "#ee6677"), **dict.fromkeys("KRH", "#4477aa"), **dict.fromkeys("NQSY", "#aa3377"),
}  # fmt: skip
_LINE = 50  # a logo's columns in a line, at most
_COLUMN, _LOGO_HEIGHT = 26, 96  # units of a logo's column: its width, and the height of its letters
_PLANE = 300  # units of a plane's side


def card(one: Card, top: float, letters: set[str]) -> str:
    """Return a card as HTML; logos reach `top` bits, and the letters that they show are added to the set."""
    flag = f"<p class=flag><b>over-optimised</b> {escaped(one.flag)}</p>" if one.flag else ""
    said = one.title if len(one.sets) == 1 else ""  # the prior's card has its samples alone
    sets = "".join(_set(panels, top, letters, said) for panels in one.sets)
    more = ""
    if one.more:
        inside = "".join(_set(panels, top, letters) for panels in one.more)
        more = folded(f"More of {one.title}", f"<div class=sets>{inside}</div>")
    return f"<article class=card><h3>{escaped(one.title)}</h3>{flag}<div class=sets>{sets}</div>{more}</article>"


def _set(panels: Sequence[Grid | Whole], top: float, letters: set[str], said: str = "") -> str:
    """One set of samples: its panels below each other, a title that they share, or that was `said` above, said once."""
    kinds, body, style = [], "", ""
    for panel in panels:
        kind, inside, width = _panel(panel, top, letters)
        title = "" if panel.title == said else f"<b>{escaped(panel.title)}</b> "
        said = panel.title
        caption = f"<figcaption>{title}{escaped(panel.caption)}</figcaption>" if title or panel.caption else ""
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


def compared(one: Comparison) -> str:
    """A table of small pictures: conditions down, methods across, samples within a cell."""
    head = "".join(f"<th>{brief(name)}</th>" for name in one.columns)
    body = ""
    for i, name in enumerate(one.rows):
        cells = ""
        for j, column in enumerate(one.columns):
            images = _thumbnails(np.asarray(one.drawn[i][j]))
            tiles = "".join(f"<div>{_image(image, f'{name}: {column}', '', _SMALL)}</div>" for image in images)
            label = f"<span>{escaped(one.labels[i][j])}</span>" if one.labels else ""
            cells += f"<td><div class=row>{tiles}</div>{label}</td>"
        body += f"<tr><th>{escaped(name)}</th>{cells}</tr>"
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<article class="card compared"><h3>{escaped(one.title)}</h3><div class=scroll>{table}</div></article>'


def _thumbnails(images: np.ndarray) -> np.ndarray:
    """Pictures [N, H, W, C] of at most `_LARGEST` / 2 pixels a side: means of squares, the rest at the edges left out."""
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(f"a cell of pictures is uint8 [N, H, W, C], got {images.dtype} {images.shape}")
    n, high, wide, channels = images.shape
    side = min(max(1, -(-2 * max(high, wide) // _LARGEST)), high, wide)
    high, wide = high // side, wide // side
    parts = images[:, : high * side, : wide * side].reshape(n, high, side, wide, side, channels)
    return np.rint(parts.mean((2, 4))).astype(np.uint8)


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
        under = f"<span>{escaped(label) or '&nbsp;'}</span>" if some else ""
        tiles += f'<div style="width:{width}px">{cell}{under}</div>' if width else f"<div>{under}{cell}</div>"
    return kind, f"<div class={'row' if width else 'rows'}>{tiles}</div>", width


def _image(image: np.ndarray, title: str, label: str, least: int = _TILE) -> str:
    """One picture, at least so many CSS pixels wide and high."""
    high, wide = _size(image.shape[0], image.shape[1], least)
    data = base64.b64encode(png(image)).decode()
    smooth = "" if wide >= image.shape[1] else ' style="image-rendering:auto"'
    about = escaped(f"{title} {label}".strip())
    return f'<img alt="{about}" width={wide} height={high}{smooth} src="data:image/png;base64,{data}">'


def _size(height: int, width: int, least: int = _TILE) -> tuple[int, int]:
    """Return the height and width of a picture in CSS pixels: a small one enlarged by a whole multiple, so that pixels stay square."""
    scale = max(1, -(-least // max(1, min(height, width))))
    if scale > 1 or max(height, width) <= _LARGEST:
        return scale * height, scale * width
    return round(height * _LARGEST / max(height, width)), round(width * _LARGEST / max(height, width))


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


def _colored(line: str) -> str:
    """A line of letters in their colours, runs of one colour together."""
    out = ""
    for color, run in _runs((_LETTERS.get(letter), letter) for letter in line):
        out += f'<i style="color:{color}">{escaped(run)}</i>' if color else escaped(run)
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
    for value in round_values(left, right):
        x = (value - left) / (right - left) * _PLANE
        out += f'<path class=frame d="M{x:.1f} {_PLANE}v5"/><text x={x:.1f} y={_PLANE + 18} text-anchor=middle>{tables.number(value, 3)}</text>'
    for value in round_values(bottom, top):
        y = (top - value) / (top - bottom) * _PLANE
        out += f'<path class=frame d="M0 {y:.1f}h-5"/><text x=-8 y={y + 4:.1f} text-anchor=end>{tables.number(value, 3)}</text>'
    out += f"<text x={_PLANE / 2} y={_PLANE + 36} text-anchor=middle>{escaped(plane.xlabel)}</text>"
    out += (
        f'<text transform="translate(-40 {_PLANE / 2}) rotate(-90)" text-anchor=middle>{escaped(plane.ylabel)}</text>'
    )
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
        out += f"<circle cx={x:.1f} cy={y:.1f} r=4.5 class=mark /><text x={at:.1f} y={down:.1f} text-anchor={side} class=mark>{escaped(name)}</text>"
    return f'<svg viewBox="-52 -6 {_PLANE + 64} {_PLANE + 48}" role="img">{out}</svg>'


def information(logo: Logo) -> np.ndarray:
    """Bits of every column: log2 K + sum f log2 f, [L]."""
    f = np.asarray(logo.frequencies, np.float64)
    if f.ndim != 2 or f.shape[1] != len(logo.letters) or not len(f):
        raise ValueError(f"logo: expected frequencies [L, {len(logo.letters)}], got shape {list(f.shape)}")
    return math.log2(f.shape[1]) + np.sum(f * np.log2(np.where(f > 0, f, 1)), 1)


def _logo(title: str, logo: Logo, top: float, letters: set[str]) -> str:
    """Draw a logo whose axis reaches `top` bits, the same for all of a report, in lines; columns are as high as their information."""
    frequencies, bits = np.asarray(logo.frequencies, np.float64), information(logo)
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
                        f'<use href="#{letter_id(letter)}" fill="{_LETTERS.get(letter, "#888888")}" '
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
        out += f'<svg viewBox="-34 -3 {width + 36} {_LOGO_HEIGHT + 35}" style="{size}" role="img" aria-label="{escaped(title)}">{marks}</svg>'
    return out


def letter_id(letter: str) -> str:
    """Return the id of a letter's outline on the page."""
    return f"letter-{ord(letter)}"


@functools.cache
def glyph(letter: str) -> str:
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
