"""Sample metrics against closed forms, scipy and brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.linalg

from rgdiff import metrics


def exact_samples(rng, n, mean, covariance):
    """Samples whose empirical mean and unbiased covariance are exactly these."""
    z = rng.normal(size=(n, len(mean)))
    z -= z.mean(0)
    z = np.linalg.solve(np.linalg.cholesky(np.cov(z.T)), z.T).T
    return z @ np.linalg.cholesky(covariance).T + mean


def random_covariance(rng, d):
    a = rng.normal(size=(d, d))
    return a @ a.T + 0.1 * np.eye(d)


def test_frechet_of_commuting_gaussians_in_closed_form():
    rng = np.random.default_rng(0)
    s_a, s_b, shift = np.array([1.0, 4.0, 0.25]), np.array([9.0, 0.16, 0.25]), np.array([1.0, -2.0, 0.5])
    a = exact_samples(rng, 50, np.zeros(3), np.diag(s_a))
    b = exact_samples(rng, 40, shift, np.diag(s_b))
    expected = (shift**2).sum() + ((np.sqrt(s_a) - np.sqrt(s_b)) ** 2).sum()
    np.testing.assert_allclose(metrics.frechet_distance(a, b), expected, rtol=1e-10)


def test_frechet_of_general_gaussians_against_scipy_sqrtm():
    rng = np.random.default_rng(1)
    s_a, s_b, mu = random_covariance(rng, 6), random_covariance(rng, 6), rng.normal(size=6)
    a, b = exact_samples(rng, 80, mu, s_a), exact_samples(rng, 60, np.zeros(6), s_b)
    expected = mu @ mu + np.trace(s_a + s_b - 2 * scipy.linalg.sqrtm(s_a @ s_b).real)
    np.testing.assert_allclose(metrics.frechet_distance(a, b), expected, rtol=1e-9)
    np.testing.assert_allclose(metrics.frechet_distance(b, a), expected, rtol=1e-9)


def test_frechet_with_singular_covariances():
    """Fewer examples than dimensions; identical sets are at 0, shifted ones at the squared shift."""
    x = np.random.default_rng(2).normal(size=(5, 4, 5))
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-10)
    assert metrics.frechet_distance(x, x + 0.5) == pytest.approx(0.25 * 20, rel=1e-10)
    flat = np.zeros((3, 2))
    assert metrics.frechet_distance(flat, flat + 1) == pytest.approx(2.0)


def test_precision_recall_of_constructed_sets():
    rng = np.random.default_rng(3)
    near, far = rng.normal(size=(30, 4)), rng.normal(size=(30, 4)) + 100
    both = np.concatenate([near, far])
    assert metrics.precision_recall(near, near) == (1, 1)
    assert metrics.precision_recall(near, far) == (0, 0)
    assert metrics.precision_recall(both, near) == (1, 0.5)  # one of two modes is lost
    assert metrics.precision_recall(near, both) == (0.5, 1)  # half the samples are off
    collapsed = metrics.precision_recall(near, near[0] + 1e-6 * rng.normal(size=(20, 4)))
    assert collapsed.precision == 1 and collapsed.recall <= 1 / 30


def test_precision_recall_by_definition():
    rng = np.random.default_rng(4)
    real, fake, k = rng.normal(size=(25, 2)), rng.normal(size=(20, 2)) * 1.5 + 0.5, 2

    def covered(points, support):
        radius = [
            sorted(np.linalg.norm(p - q) for j, q in enumerate(support) if j != i)[k - 1] for i, p in enumerate(support)
        ]
        return np.mean([any(np.linalg.norm(p - q) <= r for q, r in zip(support, radius, strict=True)) for p in points])

    got = metrics.precision_recall(real, fake, k=k)
    np.testing.assert_allclose(got, (covered(fake, real), covered(real, fake)))
    assert 0 < got.precision < 1 and 0 < got.recall < 1


def test_diversity_by_brute_force():
    x = np.random.default_rng(5).normal(size=(7, 3, 2)).astype(np.float32)
    pairs = [np.linalg.norm(x[i].astype(float) - x[j]) for i, j in itertools.combinations(range(7), 2)]
    assert metrics.diversity(x) == pytest.approx(np.mean(pairs), rel=1e-12)
    assert metrics.diversity(np.ones((4, 3))) == 0


def test_summary_leaves_out_and_counts_nan():
    values = np.arange(1.0, 21.0)
    got = metrics.summarize_rewards(np.concatenate([[np.nan], np.random.default_rng(6).permutation(values), [np.nan]]))
    expected = {
        "reward_mean": 10.5,
        "reward_se": np.sqrt(35.0 / 20),
        "reward_median": 10.5,
        "reward_top_decile": 19.5,
    }
    assert got == pytest.approx(expected | {"infeasible": 2})  # variance of 1..n is n (n + 1) / 12 = 35


def test_the_error_of_samples_of_few_lineages():
    """Each of 5 values four times, as copies of one ancestor: the error is that of 5, with an offset that float32 forgets."""
    values = 1e7 + np.repeat([1.0, 4.0, 2.0, 7.0, 3.0], 4)
    got = metrics.summarize_rewards(values, np.repeat([8, 3, 5, 1, 4], 4))
    assert got["reward_se"] == pytest.approx(np.std([1, 4, 2, 7, 3], ddof=1) / np.sqrt(5), rel=1e-5)
    assert got["reward_se"] > 2 * metrics.summarize_rewards(values)["reward_se"]
    assert np.isnan(metrics.summarize_rewards(values, np.zeros(20, int))["reward_se"])


@pytest.mark.filterwarnings("error")
def test_summary_of_few_samples():
    none = metrics.summarize_rewards([np.nan] * 3)
    assert none.pop("infeasible") == 3 and all(np.isnan(v) for v in none.values())
    one = metrics.summarize_rewards([np.nan, 2.0])
    assert np.isnan(one.pop("reward_se"))
    assert one == {"reward_mean": 2, "reward_median": 2, "reward_top_decile": 2, "infeasible": 1}
    assert metrics.summarize_rewards(np.arange(11.0))["reward_top_decile"] == 9.5  # a tenth of 11, rounded up: two


@pytest.mark.parametrize("batch", [1, 2, 100])
def test_accuracy_counts_nan_as_wrong(batch):
    logits = np.array([[1.0, 0], [0, 1], [np.nan, 0], [3, 2], [0, 1]])
    assert metrics.classifier_accuracy(lambda x: x, logits, np.array([0, 1, 0, 1, 1]), batch=batch) == 3 / 5


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: metrics.frechet_distance(np.ones((1, 3)), np.ones((5, 3))), "a has shape .1, 3.*at least 2"),
        (lambda: metrics.frechet_distance(np.ones((5, 2)), np.ones((5, 3))), "2 and 3 dimensions"),
        (
            lambda: metrics.frechet_distance(np.ones((5, 2)), np.full((5, 2), np.nan)),
            "b has 5 examples that are not fin",
        ),
        (
            lambda: metrics.precision_recall(np.ones((3, 2)), np.ones((9, 2))),
            "real has shape .3, 2.*at least 4",
        ),
        (lambda: metrics.precision_recall(np.ones((9, 2)), np.ones((9, 2)), k=0), "k=0"),
        (lambda: metrics.diversity(np.ones((1, 2))), "at least 2"),
        (lambda: metrics.summarize_rewards(np.ones((2, 2))), "expected .B."),
        (
            lambda: metrics.classifier_accuracy(lambda x: x, np.ones((2, 2)), np.ones(3)),
            "one label for each of 2",
        ),
    ],
)
def test_refusals_are_one_clear_line(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
