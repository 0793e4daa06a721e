"""A campaign with a laboratory: SEIKO proposes by `ask`, the laboratory measures elsewhere, and the answers come back by `tell`.

Run it: `python -m rgdiff.examples.campaign [FOLDER]`

Measurements take days, so that this script is not running while they are made. Each `session` below stands for one start of the
script: it opens the campaign in its folder, takes in what has been measured since, writes proposals, and ends. The laboratory
knows nothing of rgdiff; the two exchange CSV files.
"""

import csv
import sys
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from rgdiff import processes, schedules, seiko, surrogates, tuners
from rgdiff.runtime.campaign import Campaign, open_campaign

ROUNDS, TEMPERATURE, NOISE = [32, 32, 32], 0.1, 0.1
BEST = np.array([1.5, -1.0])  # known to the laboratory alone: its answers are -|x - BEST|^2 / 2 plus noise


def opened(folder: Path) -> Campaign:
    """Build the method and open its campaign: the same call begins it and continues it."""
    process = processes.gaussian(schedules.cosine_vp(), (2,))
    times = process.times(20)
    alpha, sigma = process.schedule.alpha, process.schedule.sigma
    model = lambda w: lambda x, t, cond=None: alpha(t) * x + sigma(t) ** 2 * w  # noqa: E731 - of N(w, I); a network in real life
    prior = model(jnp.zeros(2))
    surrogate = surrogates.gaussian_process(
        surrogates.rbf(2.0, variance=4.0), noise=NOISE
    )  # what it believes of the reward
    inner = lambda reward, **anchors: tuners.draft(  # noqa: E731 - how a round tunes; the anchors are SEIKO's two KLs
        model, process, reward, times, tuners.adamw(0.05), batch=64, **anchors
    )
    method = seiko.seiko(
        model,
        process,
        times,
        surrogate,
        inner,
        prior=prior,
        temperature=TEMPERATURE,
        batch=32,
        capacity=sum(ROUNDS),
        steps=60,
    )
    return open_campaign(folder / "campaign", method, jnp.zeros(2), queries=ROUNDS)


def session(folder: Path) -> Campaign:
    """One start of the script: tell what was measured, ask, write the proposals, end."""
    campaign = opened(folder)
    results = folder / "results.csv"
    if results.exists():
        with results.open() as file:
            rows = list(csv.DictReader(file))
        # In any order, some or all; the same answer once more is no error. An empty value is a measurement that failed: NaN.
        campaign.tell([int(row["id"]) for row in rows], [float(row["value"] or "nan") for row in rows])
    if not campaign.done:
        ids, x0 = campaign.ask()  # when the round is complete this refits and tunes first, then draws the next one
        with (folder / "proposals.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "first", "second"])
            writer.writerows([int(i), *map(repr, map(float, x))] for i, x in zip(ids, x0, strict=True))
    return campaign


def laboratory(folder: Path, day: int, most: int) -> None:
    """Measure up to `most` of the proposals and write the results; one in 16 measurements fails."""
    with (folder / "proposals.csv").open() as file:
        rows = list(csv.DictReader(file))[:most]
    draws = np.random.default_rng(day)
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "value"])
        for row in rows:
            x = np.array([float(row["first"]), float(row["second"])])
            value = -0.5 * ((x - BEST) ** 2).sum() + NOISE * draws.standard_normal()
            writer.writerow([row["id"], "" if int(row["id"]) % 16 == 5 else f"{value:.4f}"])


def main(folder: str | Path | None = None) -> None:
    """Run six days of a laboratory in a folder, a temporary one by default, and go on where an earlier run stopped."""
    folder = Path(folder or tempfile.mkdtemp(prefix="campaign-"))
    folder.mkdir(parents=True, exist_ok=True)

    # The laboratory measures 20 proposals a day at most: a round of 32 takes two days, all three take six. Given a FOLDER, you
    # can stop this program at any line and start it again.
    for day in range(20):
        campaign = session(folder)
        if campaign.done:
            break
        waiting = campaign.ask().ids
        print(f"day {day}: round {campaign.round + 1}, {len(waiting)} proposals wait, the first is query {waiting[0]}")
        # What was asked does not change until it is answered, whoever asks, and however often.
        assert (opened(folder).ask().ids == waiting).all()
        laboratory(folder, day, most=20)
    else:
        raise AssertionError("three rounds take six days")

    means = []
    for number, (_, values) in enumerate(campaign.history()):
        means.append(float(np.nanmean(values)))
        print(
            f"round {number + 1}: mean answer {means[-1]:6.2f}, best {np.nanmax(values):6.2f}, failed {np.isnan(values).sum()}"
        )
        assert np.isnan(values).sum() == 2  # kept as infeasible; they never enter the fit of the reward
    assert means[0] < means[1] < means[2]

    # The last round is answered, so that `sample` tunes once more. Were the reward known, the best mean would be
    # BEST / (1 + temperature): the prior's mean is 0, and the path KL holds the model to it. SEIKO knows 90 noisy answers.
    mean, best = np.asarray(campaign.sample(4096)).mean(0), BEST / (1 + TEMPERATURE)
    print(
        f"mean of the tuned model ({mean[0]:.2f}, {mean[1]:.2f}); with the reward known ({best[0]:.2f}, {best[1]:.2f})"
    )
    assert np.abs(mean - best).max() < 0.25


if __name__ == "__main__":
    main(*sys.argv[1:2])
