"""How a domain's samples are drawn, as plain data that a report lays out: logos of sequences, clouds of points, vectors as bars.

A single sample is an 8-bit picture [H, W, C], an SVG text, or a line of letters; a set of samples is a `Logo` or a `Plane`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

PIXELS = 240  # of a plane's side
BARS = 128  # of a vector, at most: longer ones are averaged
FEW = 500  # points


class Logo(NamedTuple):
    """Letter frequencies [L, K] of a set of sequences; rows sum to 1."""

    letters: str
    frequencies: np.ndarray


class Plane(NamedTuple):
    """A set of samples as one picture [H, W, C], 8 bits: gray ones are ink on white, and dark where the page is.

    `extent` is (left, right, bottom, top) in the unit of the axes; `points` [N, 2] are the samples' places, if they have any.
    """

    image: np.ndarray
    extent: tuple[float, float, float, float]
    points: np.ndarray | None = None
    xlabel: str = ""
    ylabel: str = ""


def cloud(points: np.ndarray, extent: tuple[float, float, float, float], pixels: int = PIXELS) -> np.ndarray:
    """Draw points [N, 2] as a gray picture [pixels, pixels, 1], darker where they are denser; upwards is up.

    Fewer than `FEW` points are 3 pixels wide, since single pixels are hardly seen.
    """
    points = np.asarray(points, np.float64)
    points = points[np.isfinite(points).all(-1)]
    left, right, bottom, top = extent
    edges = np.linspace(left, right, pixels + 1), np.linspace(bottom, top, pixels + 1)
    counts = np.histogram2d(points[:, 0], points[:, 1], edges)[0].T[::-1]
    if len(points) < FEW:
        wide = np.pad(counts, 1)
        rows = range(3)
        counts = np.max([wide[i : i + pixels, j : j + pixels] for i in rows for j in rows], 0)
    ink = np.sqrt(counts / max(counts.max(), 1.0))
    return np.rint(255 * (1 - ink)).astype(np.uint8)[..., None]


def bars(x: np.ndarray, largest: float) -> list[str]:
    """Draw vectors [N, ...] as SVG texts, a bar for every coordinate: from 0 up or down, `largest` reaches the edge."""
    x = np.asarray(x, np.float64).reshape(len(x), -1)
    parts = np.array_split(np.arange(x.shape[1]), min(x.shape[1], BARS))
    means = np.stack([x[:, part].mean(1) for part in parts], 1)
    heights = np.clip(np.nan_to_num(means / max(largest, 1e-12)), -1, 1)
    out = []
    for row in heights:
        up, down = (
            "".join(f"M{i} 1v{-h:.3f}h.9v{h:.3f}z" for i, h in enumerate(row) if h * sign > 0) for sign in (1, -1)
        )
        out.append(
            f'<svg viewBox="0 0 {len(row)} 2" preserveAspectRatio="none" role="img">'
            f'<path fill="#4477aa" d="{up or "M0 1"}"/><path fill="#ee6677" d="{down or "M0 1"}"/></svg>'
        )
    return out
