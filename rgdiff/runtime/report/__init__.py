"""One self-contained report.html: pictures of samples first, a sentence for each method, figures, then all numbers, folded.

Assumes nothing about where it is opened: styles, pictures and figures are inside the file, there is no script and no address,
and it reads in light and dark, on narrow screens and on paper. What is worth reporting is left to the caller (`pages`), how a
sample is drawn to its domain (`rgdiff.domains.drawing`), and what figures are called to `tables`.
"""

from rgdiff.runtime.report.contents import (
    INK,
    Boxes,
    Card,
    Comparison,
    Grid,
    Histogram,
    Plot,
    Report,
    Series,
    Whole,
    plot_rows,
)
from rgdiff.runtime.report.page import render, write_report
from rgdiff.runtime.report.pictures import png

__all__ = [
    "INK",
    "Boxes",
    "Card",
    "Comparison",
    "Grid",
    "Histogram",
    "Plot",
    "Report",
    "Series",
    "Whole",
    "plot_rows",
    "png",
    "render",
    "write_report",
]
