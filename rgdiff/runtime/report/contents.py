"""What a report holds: samples, figures, a sentence for each method, and numbers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rgdiff.domains.drawing import Logo, Plane

INK = -1  # the number of the page's own text colour


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
