"""One-class problems: nothing anomalous is learnt from, detectors are scikit-learn's; recipes of DxMI refuse what does not fit and run."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets
import sklearn.metrics

from rgdiff import processes, schedules
from rgdiff.domains.anomaly import AnomalyJudge
from rgdiff.domains.anomaly import data as anomaly
from rgdiff.domains.anomaly.tasks import typicality
from rgdiff.recipes import compose as recipe
from rgdiff.recipes.methods import detectors, few_step, few_step_baselines

SMALL = {"features": [8]}


def test_a_held_out_digit_is_in_no_training_example():
    problem = anomaly.held_out_digit(3)
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    assert len(problem.anomalous) == (y == 3).sum() and problem.train.shape[1] == 64
    assert len(problem.train) + len(problem.normal) + len(problem.anomalous) == len(y)
    # undo the scale by what is known of it: every row of the parts is one row of the data, and of the right class
    pixels = x.astype(np.float32) / 8 - 1
    normal = np.sort(pixels[y != 3].sum(1))
    for rows, known in (
        (problem.anomalous, pixels[y == 3]),
        (np.concatenate([problem.train, problem.normal]), pixels[y != 3]),
    ):
        centred, expected = rows - rows.mean(0), known - known.mean(0)
        ratio = np.linalg.norm(expected) / np.linalg.norm(centred)
        np.testing.assert_allclose(
            np.sort(np.linalg.norm(centred, axis=1)) * ratio, np.sort(np.linalg.norm(expected, axis=1)), rtol=1e-3
        )
    assert len(normal) == len(problem.train) + len(problem.normal)
    np.testing.assert_allclose(problem.train.mean(0), 0, atol=1e-4)
    assert abs(problem.train.std() - 1) < 1e-3


@pytest.mark.parametrize(("name", "size", "normal"), [("breast_cancer", 30, 357), ("wine", 13, 71)])
def test_tables_are_split_anew_by_their_number_and_scaled_by_what_is_learnt_from(name, size, normal):
    first, again, second = anomaly.table(name, 0), anomaly.table(name, 0), anomaly.table(name, 1)
    total = len(getattr(sklearn.datasets, f"load_{name}")().target)
    assert first.train.shape == (normal // 2, size)
    assert len(first.train) + len(first.normal) == normal and len(first.anomalous) == total - normal
    np.testing.assert_array_equal(first.train, again.train)
    assert not np.array_equal(first.train, second.train)
    np.testing.assert_allclose(first.train.std(0), 1, rtol=1e-3)
    np.testing.assert_allclose(first.train.mean(0), 0, atol=1e-4)


def test_detectors_score_anomalies_higher_and_are_scikit_learns():
    rng = np.random.default_rng(0)
    far = rng.normal(size=(60, 2)) + [6.0, 0.0]
    problem = anomaly.OneClass("blobs", rng.normal(size=(200, 2)), rng.normal(size=(80, 2)), far)
    for name in anomaly.DETECTORS:
        assert anomaly.detect(name, problem) > 0.98
    from sklearn.svm import OneClassSVM

    x = np.r_[problem.anomalous, problem.normal] * [0.4, 1.0]
    near = problem._replace(anomalous=x[:60], normal=x[60:])
    scores = -OneClassSVM().fit(near.train).decision_function(x)
    expected = sklearn.metrics.roc_auc_score(np.r_[np.ones(60), np.zeros(80)], scores)
    assert abs(anomaly.detect("one_class_svm", near) - expected) < 1e-6 and expected < 0.999
    assert anomaly.detect("isolation_forest", near, 0) != anomaly.detect("isolation_forest", near, 1)


def test_a_study_is_means_and_deviations_over_seeds():
    class Prior:
        def problems(self, seed):
            return [anomaly.OneClass(name, *[np.zeros((1, 1))] * 3) for name in ("a", "b")]

    table = {("a", 0): 0.8, ("a", 1): 0.9, ("b", 0): 0.6, ("b", 1): 0.9}
    figures = detectors.study(Prior(), 2, lambda problem, seed: table[problem.name, seed])
    expected = {"auroc_a": 0.85, "auroc_b": 0.75, "auroc_mean": 0.8, "auroc_mean_sd": np.std([0.7, 0.9], ddof=1)}
    for name, value in expected.items():
        assert abs(figures[name] - value) < 1e-12


def tiny(out, cache, *more):
    """The arguments of a small run."""
    return [f"out={out}", f"cache_dir={cache}", "samples=64", *more]


@pytest.mark.slow
def test_an_anomaly_recipe_runs(tmp_path):
    from rgdiff.cli import main

    training = [
        f"methods.{m}.training.{o}"
        for m in ("dxmi", "dxmi_tau_0", "energy_mcmc")
        for o in ("iterations=30", "value.features=[16]")
    ]
    training += [f"methods.{m}.seeds=2" for m in ("dxmi", "dxmi_tau_0", "energy_mcmc", "isolation_forest")]
    overrides = tiny(tmp_path / "run", tmp_path / "cache", "domain.source=wine", *training)
    assert main(["run", "dxmi_anomaly", *overrides]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for method in ("dxmi", "energy_mcmc", "isolation_forest", "one_class_svm", "local_outlier_factor"):
        assert 0 <= summary[f"{method}/auroc_wine"] <= 1, method
    assert summary["isolation_forest/auroc_wine"] > 0.8


def few_steps(**options):
    return few_step.FewSteps(**({"network": object()} | options))


class Settings:
    """A prior's settings that hand data on."""

    gives_data = True

    def process(self, shape):
        return processes.gaussian(schedules.cosine_vp(), shape)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: anomaly.held_out_digit(10), "digit must be one of"),
        (lambda: anomaly.one_class("wines"), "did you mean 'wine'"),
        (lambda: anomaly.one_class(digits=()), "one at least"),
        (lambda: anomaly.detect("forest", None), "detector must be one of"),
        (lambda: few_steps().check(object(), (2,)), "learns from data, which Gaussian priors hand on"),
        (lambda: few_steps(network=None).check(Settings(), (2,)), "start=denoiser needs method.network"),
        (lambda: few_steps(start="warm").check(Settings(), (2,)), "start must be one of"),
        (lambda: few_steps(steps=4).check(Settings(), (2,)), "5 standard deviations for 4 steps"),
        (lambda: few_steps(levels="edm").check(Settings(), (2,)), "levels must be one of"),
        (lambda: detectors.Scikit("isolation_forest").check(Settings(), (2,)), "needs prior=one_class"),
        (lambda: few_step_baselines.LangevinTraining(None, None).check(object(), (2,)), "this method learns from data"),
    ],
)
def test_bad_input_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["dxmi_2d", "dxmi_digits", "dxmi_mnist", "dxmi_anomaly", "dxdp_reward", "dxdp_digits"])
def test_recipes_compose_and_their_arguments_fit(name):
    config = recipe.compose(name)
    recipe.check(config, set())
    assert recipe.summary_of(name) and config["methods"]


def test_typicality_is_minus_half_the_squared_distance():
    np.testing.assert_allclose(typicality().reward(jnp.array([[3.0, 4.0]])), [-12.5])


def test_the_page_of_detectors_shows_the_data_and_the_auroc_of_every_digit():
    domain = anomaly.one_class("digits", (3, 5))
    judge = AnomalyJudge(domain, jax.random.key(0))
    (first, normal), (second, anomalous) = judge.references(typicality()).items()
    assert first.startswith("normal: every other than digit ") and second.startswith("anomalous: digit ")
    pictures = judge.show_each(anomalous)
    assert pictures.shape == (len(anomalous), 8, 8, 1) and pictures.dtype == np.uint8 and len(normal)
    np.testing.assert_allclose((pictures.reshape(-1, 64) - 127.5) / 127.5 * 3, np.clip(anomalous, -3, 3), atol=0.02)
    rows = {"prior": {}, "a": {"auroc_digit_3": 0.9, "auroc_digit_5": 0.8, "auroc_digit_3_sd": 0.1}}
    ((x, y, curves),) = judge.curves(rows).values()
    assert curves == {"a": ([3, 5], [0.9, 0.8])} and "AUROC" in y and "digit" in x
    assert AnomalyJudge(anomaly.one_class("wine"), jax.random.key(0)).show_each(normal[:2, :13])[0].startswith("<svg")
