"""The quickstart over several seeds: its table in benchmarks/results/quickstart.md and the README's picture, from finished runs.

    for seed in 0 1 2 3 4; do rgdiff run quickstart seed=$seed out=runs/quickstart-$seed; done
    python -m benchmarks.studies.quickstart runs/quickstart-*             # the table; --picture draws rgdiff/docs/quickstart.png too

The picture shows the first samples of the first folder, unselected, a band for each method.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.speed.harness import ROOT, machine
from rgdiff.domains.images.data import to_uint8
from rgdiff.runtime.report import png

RESULTS = ROOT / "benchmarks" / "results" / "quickstart.md"
PICTURE = ROOT / "rgdiff" / "docs" / "quickstart.png"
NAMES = {"prior": "prior", "svdd": "SVDD", "draft": "DRaFT"}
ROWS, COLUMNS, SCALE, GAP, MARGIN = 2, 16, 3, 10, 80  # of a band, in samples; pixels a pixel; pixels


def sheet(samples: Mapping[str, np.ndarray]) -> np.ndarray:
    """Draw the first samples of every method, [N, H, W, 1] in [-1, 1], as bands under each other, named: uint8 [H, W, 1]."""
    bands = []
    for name, x0 in samples.items():
        tiles = to_uint8(x0[: ROWS * COLUMNS])[..., 0].repeat(SCALE, 1).repeat(SCALE, 2)
        height, width = tiles.shape[1:]
        band = tiles.reshape(ROWS, COLUMNS, height, width).swapaxes(1, 2).reshape(ROWS * height, COLUMNS * width)
        bands.append(np.hstack([_written(name, ROWS * height), band]))
        bands.append(np.full((GAP, bands[0].shape[1]), 255, np.uint8))
    return np.vstack(bands[:-1])[..., None]


def _written(text: str, height: int) -> np.ndarray:
    """A text in black on white, uint8 [height, MARGIN]."""
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    figure = Figure(figsize=(MARGIN / 100, height / 100), dpi=100)
    figure.text(0.1, 0.5, text, va="center", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    buffer.seek(0)
    return np.rint(255 * imread(buffer)[..., 0]).astype(np.uint8)


def table(runs: Sequence[tuple[int, Mapping[str, float]]]) -> list[str]:
    """Return a row for each run: seed, then accuracy, Frechet distance, recall and path KL of SVDD and DRaFT, and the distances' ratio."""
    lines = [
        "| seed | prior: accuracy, Fréchet | SVDD: accuracy, Fréchet, recall, KL | DRaFT: accuracy, Fréchet, recall, KL | ratio |",
        "|---|---|---|---|---|",
    ]
    for seed, of in runs:
        figures = lambda key, of=of: (  # noqa: E731
            f"{of[f'{key}/heldout_accuracy']:.3f}, {of[f'{key}/frechet']:.1f}, {of[f'{key}/recall']:.2f}, {of[f'{key}/kl']:.1f}"
        )
        prior = f"{of['prior/heldout_accuracy']:.3f}, {of['prior/frechet']:.0f}"
        ratio = of["draft/frechet"] / of["svdd/frechet"]
        lines.append(f"| {seed} | {prior} | {figures('svdd')} | {figures('draft')} | {ratio:.2f} |")
    return lines


def main() -> None:
    """Read the folders that are named, write the table, and the picture where it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="of finished runs of the quickstart")
    parser.add_argument("--picture", action="store_true", help="draw the README's picture from the first")
    given = parser.parse_args()
    runs = []
    for folder in given.folders:
        config = (folder / "config.yaml").read_text(encoding="utf-8")
        seed = next(int(line.split(":")[1]) for line in config.splitlines() if line.startswith("seed:"))
        runs.append((seed, json.loads((folder / "summary.json").read_text(encoding="utf-8"))))
    lines = table(sorted(runs, key=lambda run: run[0]))
    before = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else ""
    kept = before[before.index("\n## ") :] if "\n## " in before else ""  # what was written by hand below the table
    about = [f"- {name}: {value}" for name, value in machine().items()]
    head = [
        "# The quickstart over seeds",
        "",
        f"`python -m benchmarks.studies.quickstart FOLDERS`, {datetime.date.today()}",
    ]
    RESULTS.write_text("\n".join([*head, "", *about, "", *lines, ""]) + kept, encoding="utf-8")
    print("\n".join(lines))
    if given.picture:
        with np.load(given.folders[0] / "samples.npz") as samples:
            PICTURE.write_bytes(png(sheet({shown: samples[name] for name, shown in NAMES.items()})))
        print(PICTURE)


if __name__ == "__main__":
    main()
