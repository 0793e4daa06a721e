"""Text of a page, escaped, and the round numbers of its axes."""

from __future__ import annotations

import html
import math
from typing import Any

from rgdiff.runtime import tables

_BRIEF = 36  # characters of a name in a figure


def escaped(value: Any) -> str:
    """Return a value as text that HTML shows as it is."""
    return html.escape(str(value))


def brief(name: str) -> str:
    """Write a name that may be long: its middle left out, and whole where the pointer rests."""
    short = tables.shorten(name, _BRIEF)
    return escaped(name) if short == name else f'<span title="{escaped(name)}">{escaped(short)}</span>'


def named(name: str, text: str) -> str:
    """Write a sentence with the name that it begins with in bold."""
    rest = text.removeprefix(name)
    return f"<b>{escaped(name)}</b>{escaped(rest)}" if rest != text else escaped(text)


def folded(title: str, body: str, kind: str = "") -> str:
    """Return HTML that a reader opens by its title; `kind` is a class of the style sheet."""
    return f"<details{f' class={kind}' if kind else ''}><summary>{escaped(title)}</summary>{body}</details>"


def round_values(low: float, high: float, about: int = 4) -> list[float]:
    """Return round numbers between the two, about so many, for the marks of an axis."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return []
    rough = span / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough * 0.8)
    return [round(k * step, 12) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def round_up(value: float) -> float:
    """Return the next round number, for the end of an axis."""
    if not value > 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    return round(next((m for m in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if m * unit >= value * 0.999), 10) * unit, 12)
