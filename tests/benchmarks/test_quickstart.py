"""The README's picture shows samples as they are, and the quickstart's table the figures of a summary."""

from __future__ import annotations

import numpy as np

from benchmarks.studies import quickstart


def test_a_band_for_every_method_shows_its_first_samples():
    rng = np.random.default_rng(0)
    samples = {name: rng.uniform(-1, 1, (40, 4, 4, 1)).astype(np.float32) for name in ("prior", "SVDD")}
    picture = quickstart.sheet(samples)
    tile, width = 4 * quickstart.SCALE, quickstart.MARGIN
    band = quickstart.ROWS * tile
    assert (
        picture.shape == (2 * band + quickstart.GAP, width + quickstart.COLUMNS * tile, 1) and picture.dtype == np.uint8
    )
    shown = picture[band + quickstart.GAP + tile :, width + 2 * tile :][:tile, :tile, 0][
        :: quickstart.SCALE, :: quickstart.SCALE
    ]
    sample = samples["SVDD"][quickstart.COLUMNS + 2, ..., 0]  # second row, third column
    np.testing.assert_allclose(shown / 127.5 - 1, sample, atol=1 / 255 + 1e-6)
    assert picture[:band, :width].min() < 100 < 250 < picture[:band, :width].max()  # its name, in ink on white


def test_the_ratio_is_of_the_two_distances():
    names = ("heldout_accuracy", "frechet", "recall", "kl")
    summary = {f"{key}/{name}": 1.0 for key in ("prior", "svdd", "draft") for name in names}
    (line,) = quickstart.table([(3, summary | {"svdd/frechet": 10.0, "draft/frechet": 15.0})])[2:]
    assert line.startswith("| 3 |") and line.endswith("| 1.50 |")
