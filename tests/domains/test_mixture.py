"""The mixture domain: its denoiser against the worlds', its figures against the exact law, and the recipe that shows ELEGANT."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgdiff import cli, nets
from rgdiff.domains.mixture import MixtureJudge, mixture
from rgdiff.domains.mixture.judge import BINS
from rgdiff.domains.mixture.tasks import quadratic
from rgdiff.recipes.priors import ExactPrior
from rgdiff.recipes.run import run_recipe
from rgdiff.recipes.typing import Outcome
from rgdiff.schedules import flow
from tests.worlds.worlds import MixtureWorld, assert_mean

WORLD = MixtureWorld(schedule="flow", steps=8, eta=0.25)


def domain():
    return mixture([0.3, 0.7], [-1.5, 1.0], 0.4, nets.MLP((8,)))


def prior():
    return ExactPrior(schedule=flow(), steps=8, eta=0.25).obtain(None, domain(), None)  # type: ignore[arg-type]


def test_the_denoiser_is_the_worlds_own_and_the_network_starts_at_zero():
    p, x = prior(), jnp.linspace(-4, 4, 41)[:, None]
    for t in (0.1, 0.5, 1.0):
        np.testing.assert_allclose(p.denoiser(x, jnp.float32(t)), WORLD.denoiser(x, jnp.float32(t)), atol=2e-6)


def test_data_have_the_moments_of_the_mixture():
    x = np.asarray(domain().data(jax.random.key(0), 200_000), float)
    mean = 0.3 * -1.5 + 0.7
    assert_mean(x[:, 0], mean)
    assert_mean(x[:, 0] ** 2, 0.3 * 1.5**2 + 0.7 + 0.4**2)
    assert_mean(x[:, 0] ** 3, sum(w * (m**3 + 3 * m * 0.4**2) for w, m in ((0.3, -1.5), (0.7, 1.0))))


@pytest.mark.slow
def test_the_judge_measures_distance_to_the_exact_law():
    """Draws of the tilted law itself are apart by sampling noise, those of the frozen one by what quadrature says."""
    judge, task, p, n = MixtureJudge(domain(), jax.random.key(0)), quadratic(), prior(), 50_000
    laws = judge.laws(0.5, task, p)
    rng = np.random.default_rng(0)

    def row(law):
        x = rng.choice(laws.x0, n, p=law / law.sum())[:, None].astype(np.float32)
        return judge.row(Outcome(x, 8, 0.0, 0.0, 0.0, temperature=0.5), task, p)

    own, frozen = row(laws.tilted), row(laws.frozen)
    most, spread = 0.5 * np.sqrt(2 * BINS / (np.pi * n)), 0.5 * np.sqrt((1 - 2 / np.pi) / n)  # were all bins alike
    assert own["distance"] < most + 4 * spread
    assert own["mean"] == pytest.approx(own["exact_mean"], abs=4 * own["std"] / np.sqrt(n))
    assert frozen["distance"] == pytest.approx(frozen["frozen_distance"], abs=own["distance"])
    assert frozen["frozen_distance"] > 10 * own["distance"]
    ((_, shown, lines, _, edges),) = judge.histograms(
        {"a": Outcome(np.zeros((2, 1)), 8, 0.0, 0.0, 0.0, temperature=0.5)}, task, p
    )
    assert list(shown) == ["a"] and len(lines) == 2 and len(edges) == BINS + 1


def test_a_mixture_that_is_none_is_refused():
    with pytest.raises(ValueError, match="as many centres"):
        mixture([0.5, 0.5], [1.0], 0.4, None)
    with pytest.raises(ValueError, match="positive weights"):
        mixture([0.5, 0.0], [1.0, 2.0], 0.4, None)
    with pytest.raises(ValueError, match="std"):
        mixture([1.0], [1.0], 0.0, None)


def test_elegant_needs_a_temperature_and_a_law(tmp_path, capsys):
    for override, said in (
        ("methods.elegant.tuning.temperature=null", "tuning.temperature > 0"),
        ("methods.elegant.tuning.eta=0", "eta = 0"),
    ):
        assert cli.main(["run", "toy_elegant", f"out={tmp_path}/run", override]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.slow
def test_the_recipe_shows_the_predicted_bias_and_that_elegant_has_none(tmp_path):
    summary = run_recipe("toy_elegant", [f"out={tmp_path}/run", f"cache_dir={tmp_path}/cache"])
    predicted = summary["frozen/frozen_distance"]
    assert predicted > 0.3
    assert summary["frozen/distance"] == pytest.approx(predicted, abs=0.04)
    assert summary["elegant/distance"] < 0.25 * predicted
    assert abs(summary["elegant/mean"] - summary["elegant/exact_mean"]) < 0.1
    html = (tmp_path / "run" / "report.html").read_text()
    assert "predicted: frozen start" in html and "Laws of x0" in html
