"""Metrics of samples: distances between sets, coverage, diversity, accuracy, AUROC, reward summaries; of sequences, k-mers.

Everything is computed on the host in float64 from arrays whose first axis counts examples, and the number of examples left
out is returned. The caller chooses the features (raw pixels, a classifier's penultimate layer).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class PrecisionRecall(NamedTuple):
    """The share of fakes in the support of the reals, and of reals in the support of the fakes; both in [0, 1]."""

    precision: float
    recall: float


def frechet_distance(a: Any, b: Any) -> float:
    """Compute the squared Frechet distance of two Gaussian fits.

    d = |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), with unbiased covariances S.

    Args:
      a, b: features [N, ...], trailing axes flattened to D; N may differ, D may not.

    Returns:
      The distance, in squared units of the features; 0 for identical sets.

    Raises:
      ValueError: for fewer than two examples, differing D, or values that are not finite.

    Note: the distance of finite samples is biased upwards, the more the larger D / N: compare only at equal N,
      with N well above D. With S_i = R_i^T R_i from a QR of the centred data, the square root's trace is the sum of
      the singular values of R_a R_b^T: no matrix square root, and singular covariances do no harm.

    References: Heusel et al. 2017, arXiv:1706.08500, equation 6.

    Example:
      >>> import numpy as np, rgdiff
      >>> a = np.array([[0.0], [2.0]])
      >>> print(f"{rgdiff.metrics.frechet_distance(a, a + 3.0):.4f}")  # equal variances: 3^2
      9.0000
    """
    a, b = _features(a, "a", 2), _features(b, "b", 2)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features have {a.shape[1]} and {b.shape[1]} dimensions: take both from one feature map")
    r_a, r_b = (np.asarray(np.linalg.qr((x - x.mean(0)) / np.sqrt(len(x) - 1), mode="r")) for x in (a, b))
    cross = np.linalg.svd(r_a @ r_b.T, compute_uv=False).sum()
    distance = ((a.mean(0) - b.mean(0)) ** 2).sum() + (r_a**2).sum() + (r_b**2).sum() - 2 * cross
    return float(max(distance, 0.0))


def precision_recall(real: Any, fake: Any, k: int = 3) -> PrecisionRecall:
    """Estimate precision and recall by nearest-neighbour balls.

    A set's support is the union of balls around its points that reach to the k-th nearest other point; precision is
    the share of fakes in the support of the reals, recall the share of reals in the support of the fakes.

    Args:
      real, fake: features [N, ...], trailing axes flattened; memory is quadratic in N.
      k: neighbours that set a ball's radius.

    Returns:
      PrecisionRecall(precision, recall), both in [0, 1].

    Raises:
      ValueError: for k < 1, for sets of k or fewer examples, differing dimensions, or values that are not finite.

    References: Kynkaanniemi et al. 2019, arXiv:1904.06991, equations 1-2.

    Example:
      >>> import numpy as np, rgdiff
      >>> real, fake = np.array([[0.0], [1.0], [9.0], [10.0]]), np.array([[0.0], [1.0]])
      >>> print(tuple(rgdiff.metrics.precision_recall(real, fake, k=1)))  # the fakes miss one of two clusters
      (1.0, 0.5)
    """
    if k < 1:
        raise ValueError(f"k={k}: expected at least one neighbour")
    real, fake = _features(real, "real", k + 1), _features(fake, "fake", k + 1)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"features have {real.shape[1]} and {fake.shape[1]} dimensions: take both from one feature map"
        )
    from scipy.spatial.distance import cdist

    across = cdist(real, fake)
    radius_real, radius_fake = (
        np.partition(cdist(x, x), k, axis=1)[:, k] for x in (real, fake)
    )  # 0 is the point itself
    precision = (across <= radius_real[:, None]).any(0).mean()
    recall = (across <= radius_fake[None, :]).any(1).mean()
    return PrecisionRecall(float(precision), float(recall))


def sliced_wasserstein(a: Any, b: Any, projections: int = 1000, seed: int = 0) -> float:
    """Compute the sliced 2-Wasserstein distance of two sets of examples.

    d^2 = mean over random unit directions u of int_0^1 (F_a^-1(q) - F_b^-1(q))^2 dq, F the distributions of u . x; each integral exact.

    Args:
      a, b: examples [N, ...], trailing axes flattened to D; N may differ, D may not.
      projections: number of directions.
      seed: of the directions; they are the same for every call with one seed.

    Returns:
      The distance d, in the unit of the examples.

    Raises:
      ValueError: for no projection, differing D, or values that are not finite.

    Note: of finite samples it is biased upwards: two sets of 10,000 points of one distribution of spread 3 are about .05 apart.

    Example:
      >>> import numpy as np, rgdiff
      >>> a = np.array([[0.0], [2.0]])
      >>> print(f"{rgdiff.metrics.sliced_wasserstein(a, a + 3.0):.4f}")  # on the line: the shift
      3.0000
    """
    a, b = _features(a, "a", 1), _features(b, "b", 1)
    if a.shape[1] != b.shape[1] or projections < 1:
        raise ValueError(
            f"expected examples of one size and at least one projection, got {a.shape[1]} and {b.shape[1]} dimensions, {projections} projections"
        )
    n, m = len(a), len(b)
    levels = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)  # of the quantiles, in units of 1 / (n m)
    weights, of_a, of_b = np.diff(levels, prepend=0) / (n * m), (levels - 1) // m, (levels - 1) // n
    directions = np.random.default_rng(seed).normal(size=(projections, a.shape[1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    total = 0.0
    for u in directions:
        total += weights @ (np.sort(a @ u)[of_a] - np.sort(b @ u)[of_b]) ** 2
    return float(np.sqrt(total / projections))


def auroc(positive: Any, negative: Any) -> float:
    """Compute the area under the ROC curve: the probability that a positive's score exceeds a negative's, ties counting half.

    Args:
      positive, negative: scores [N] and [M]; higher means positive. Infinite ones compare as usual.

    Returns:
      The area, in [0, 1].

    Raises:
      ValueError: for an empty set, or for NaN.

    Example:
      >>> import rgdiff
      >>> rgdiff.metrics.auroc([1.0, 3.0], [0.0, 2.0])  # 3 of 4 pairs
      0.75
    """
    positive, negative = np.asarray(positive, np.float64).ravel(), np.sort(np.asarray(negative, np.float64).ravel())
    if not len(positive) or not len(negative) or np.isnan(positive).any() or np.isnan(negative).any():
        raise ValueError(
            f"expected scores without NaN on both sides, got {len(positive)} positive and {len(negative)} negative ones"
        )
    below = sum(np.searchsorted(negative, positive, side).sum() for side in ("left", "right"))
    return float(below / (2 * len(positive) * len(negative)))


def diversity(x: Any) -> float:
    """Average the Euclidean distance over all pairs of different examples.

    Args:
      x: [N, ...], trailing axes flattened.

    Returns:
      The mean distance, in the unit of x.

    Raises:
      ValueError: for fewer than two examples, or values that are not finite.

    Example:
      >>> import rgdiff
      >>> rgdiff.metrics.diversity([[0.0, 0.0], [3.0, 4.0]])
      5.0
    """
    from scipy.spatial.distance import pdist

    return float(pdist(_features(x, "x", 2)).mean())


def jackknife(statistic: Callable[[np.ndarray], float], x: Any, groups: int = 10, most: int = 2000) -> float:
    """Estimate the standard error of a statistic of independent samples by leaving out one group at a time.

    se^2 = (G - 1) / G sum_g (s_g - mean s)^2, s_g the statistic without group g.

    Args:
      statistic: samples [n, ...] -> a number.
      x: samples [N, ...].
      groups: G, or N where that is smaller.
      most: samples that are looked at; of more, the first, and the error is scaled by sqrt(most / N).

    Returns:
      The standard error, in the statistic's unit; NaN for fewer than three samples.

    Raises:
      ValueError: for fewer than two groups.

    References: Efron 1982, The jackknife, the bootstrap and other resampling plans, equation 3.5, for groups.
    """
    x = np.asarray(x)
    if groups < 2:
        raise ValueError(f"groups={groups}: expected two at least")
    seen = x[:most]
    if len(seen) < 3:
        return float("nan")
    parts = np.array_split(np.arange(len(seen)), min(groups, len(seen)))
    values = np.array([statistic(np.delete(seen, part, 0)) for part in parts], np.float64)
    error = np.sqrt((len(parts) - 1) / len(parts) * ((values - values.mean()) ** 2).sum())
    return float(error * np.sqrt(len(seen) / len(x)))


def share_error(share: float, count: int) -> float:
    """Return the standard error of a share of independent samples: sqrt(p (1 - p) / n), with p (1 - p) at least 1/n, so that 0 and 1 have one too.

    Args:
      share: p, in [0, 1].
      count: n, the number of samples.

    Returns:
      The standard error.

    Example:
      >>> import rgdiff
      >>> print(rgdiff.metrics.share_error(0.5, 100), rgdiff.metrics.share_error(1.0, 100))
      0.05 0.01
    """
    return float(np.sqrt(max(share * (1 - share), 1 / count) / count))


def summarize_rewards(rewards: Any, lineages: Any = None) -> dict[str, float | int]:
    """Summarise the rewards of a set of samples; NaN marks an infeasible one, which is left out and counted.

    Args:
      rewards: [B].
      lineages: [B], integers; samples of one lineage are not independent, and `reward_se` is then the error over
        lineages (`resampling.standard_error`), NaN if there is one only. Without them samples are independent.

    Returns:
      reward_mean, reward_se (standard error of the mean), reward_median, reward_top_decile (mean of the best tenth,
      rounded up to whole samples), all over the feasible ones and NaN where there are too few; infeasible, a count.

    Raises:
      ValueError: for rewards that are not one number per sample.

    Example:
      >>> import numpy as np, rgdiff
      >>> summary = rgdiff.metrics.summarize_rewards(np.array([0.0, 2.0, np.nan]))
      >>> print({name: round(number, 4) for name, number in summary.items()})
      {'reward_mean': 1.0, 'reward_se': 1.0, 'reward_median': 1.0, 'reward_top_decile': 2.0, 'infeasible': 1}
    """
    rewards = np.asarray(rewards, np.float64)
    if rewards.ndim != 1:
        raise ValueError(f"rewards have shape {rewards.shape}: expected [B], one number per sample")
    feasible = np.sort(rewards[~np.isnan(rewards)])
    n = len(feasible)
    error = feasible.std(ddof=1) / np.sqrt(n) if n > 1 else np.nan
    if lineages is not None and n > 1:
        import jax.numpy as jnp

        from rgdiff.resampling import standard_error

        error = standard_error(jnp.asarray(rewards - feasible.mean(), jnp.float32), jnp.asarray(lineages))
    return {
        "reward_mean": float(feasible.mean()) if n else float("nan"),
        "reward_se": float(error),
        "reward_median": float(np.median(feasible)) if n else float("nan"),
        "reward_top_decile": float(feasible[-((n + 9) // 10) :].mean()) if n else float("nan"),
        "infeasible": len(rewards) - n,
    }


def classifier_accuracy(classifier: Callable[[Any], Any], x: Any, y: Any, batch: int = 1024) -> float:
    """Compute the share of examples whose largest logit is at their label; logits with NaN count as wrong.

    Args:
      classifier: maps x [B, ...] to logits [B, classes].
      x: examples [N, ...].
      y: integer labels [N].
      batch: examples per call, to bound memory.

    Returns:
      The share, in [0, 1].

    Raises:
      ValueError: when there is not one label per example.

    Example:
      >>> import numpy as np, rgdiff
      >>> rgdiff.metrics.classifier_accuracy(lambda x: x, np.eye(4), np.array([0, 1, 2, 0]))
      0.75
    """
    labels = np.asarray(y)
    if labels.shape != (len(x),) or not len(x):
        raise ValueError(
            f"y has shape {labels.shape}: expected one label for each of {len(x)} examples, and one at least"
        )
    logits = np.concatenate([np.asarray(classifier(x[i : i + batch])) for i in range(0, len(x), batch)])
    right = (logits.argmax(-1) == labels) & ~np.isnan(logits).any(-1)
    return float(right.mean())


def kmer_frequencies(tokens: Any, classes: int, k: int = 3) -> np.ndarray:
    """Count the k-mers of sequences, as shares of all their windows.

    Args:
      tokens: class numbers [N, L].
      classes: K, number of letters.
      k: length of a window.

    Returns:
      Shares [K^k], in C order; they sum to 1.

    Raises:
      ValueError: for tokens that are not whole numbers in 0..classes-1, or k outside 1..L.

    Example:
      >>> import numpy as np, rgdiff
      >>> print(rgdiff.metrics.kmer_frequencies(np.array([[0, 1, 1, 1, 0]]), classes=2, k=2))  # 00, 01, 10, 11
      [0.   0.25 0.25 0.5 ]
    """
    tokens = _tokens(tokens, "tokens")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < classes:
        raise ValueError(f"expected tokens in 0..{classes - 1}, found {tokens.min()}..{tokens.max()}")
    if not 1 <= k <= tokens.shape[1]:
        raise ValueError(f"k={k}: expected 1..{tokens.shape[1]}, the length of the sequences")
    windows = np.lib.stride_tricks.sliding_window_view(tokens, k, axis=1).reshape(-1, k)
    counts = np.bincount(windows @ classes ** np.arange(k - 1, -1, -1), minlength=classes**k)
    return counts / len(windows)


def kmer_correlation(a: Any, b: Any, classes: int, k: int = 3) -> float:
    """Correlate (Pearson) the k-mer counts of two sets of sequences.

    Args:
      a, b: class numbers [N, L]; sizes and lengths may differ.
      classes: K, number of letters.
      k: length of a window.

    Returns:
      The correlation, in [-1, 1]; NaN where one set has all k-mers equally often.

    Raises:
      ValueError: as for `kmer_frequencies`.

    References: DRAKES, arXiv:2410.13643 (3-mers of samples against those of the most active training sequences).

    Example:
      >>> import numpy as np, rgdiff
      >>> a, b = np.array([[0, 0, 1]]), np.array([[1, 1, 0]])  # 1-mers (2, 1) / 3 and (1, 2) / 3
      >>> print(f"{rgdiff.metrics.kmer_correlation(a, b, classes=2, k=1):.4f}")
      -1.0000
    """
    p, q = kmer_frequencies(a, classes, k), kmer_frequencies(b, classes, k)
    p, q = p - p.mean(), q - q.mean()
    norm = np.sqrt((p @ p) * (q @ q))
    return float(p @ q / norm) if norm > 0 else float("nan")


def sequence_diversity(tokens: Any) -> float:
    """Average the share of differing positions over all pairs of different samples.

    It is 1 - the mean pairwise cosine of one-hot sequences, as in SVDD, arXiv:2408.08252 (its diversity of DNA and RNA).

    Args:
      tokens: class numbers [N, L].

    Returns:
      The share, in [0, 1]; 0 for copies of one sequence.

    Raises:
      ValueError: for fewer than two sequences.

    Example:
      >>> import numpy as np, rgdiff
      >>> rgdiff.metrics.sequence_diversity(np.array([[0, 1, 2, 3], [0, 1, 2, 0]]))
      0.25
    """
    tokens = _tokens(tokens, "tokens", 2)
    n = len(tokens)
    same = 0.0
    for column in tokens.T:
        counts = np.unique(column, return_counts=True)[1].astype(np.float64)
        same += (counts * (counts - 1)).sum()
    return float(1 - same / (n * (n - 1) * tokens.shape[1]))


def novelty(tokens: Any, known: Any) -> float:
    """Return the share of samples that are not among the known sequences.

    Args:
      tokens: samples, class numbers [N, L].
      known: class numbers [M, L].

    Returns:
      The share, in [0, 1].

    Raises:
      ValueError: for sequences of different lengths.

    Example:
      >>> import numpy as np, rgdiff
      >>> rgdiff.metrics.novelty(np.array([[0, 1], [1, 1]]), np.array([[0, 1]]))
      0.5
    """
    tokens, known = _tokens(tokens, "tokens"), _tokens(known, "known")
    if tokens.shape[1] != known.shape[1]:
        raise ValueError(f"expected sequences of one length, got {tokens.shape[1]} and {known.shape[1]}")
    seen = {row.tobytes() for row in known}
    return float(np.mean([row.tobytes() not in seen for row in tokens]))


def unique(tokens: Any) -> float:
    """Return the number of different samples over the number of samples.

    Args:
      tokens: class numbers [N, L].

    Returns:
      The share, in (0, 1].

    Example:
      >>> import numpy as np, rgdiff
      >>> rgdiff.metrics.unique(np.array([[0, 1], [0, 1]]))
      0.5
    """
    tokens = _tokens(tokens, "tokens")
    return len({row.tobytes() for row in tokens}) / len(tokens)


def histogram_distance(samples: Any, values: Any, probabilities: Any, bins: int = 50) -> float:
    """Compute the total variation between the histogram of sampled rewards and that of an exact distribution.

    d = 1/2 sum_b |share of samples in bin b - probability of bin b|, over equal bins of the range of both; in [0, 1].

    Args:
      samples: rewards [N] of samples; NaN is left out.
      values, probabilities: rewards [n] of all sequences and their probabilities.
      bins: number of bins.

    Returns:
      The distance, in [0, 1].

    Raises:
      ValueError: for no sample, or values and probabilities of different shapes.

    Note: N exact samples keep a distance of about sum_b sqrt(p_b (1 - p_b) / (2 pi N)): compare at equal N.

    Example:
      >>> import rgdiff
      >>> rgdiff.metrics.histogram_distance([0.0, 1.0, 1.0, 1.0], [0.0, 1.0], [0.5, 0.5], bins=2)
      0.25
    """
    samples, values, probabilities = (np.asarray(a, np.float64) for a in (samples, values, probabilities))
    samples = samples[~np.isnan(samples)]
    if not len(samples) or values.shape != probabilities.shape:
        raise ValueError(
            f"expected samples, and values and probabilities of one shape, got {len(samples)} samples, "
            f"{list(values.shape)} and {list(probabilities.shape)}"
        )
    values, probabilities = values[~np.isnan(values)], probabilities[~np.isnan(values)]
    both = np.concatenate([samples, values])
    edges = np.histogram_bin_edges(both, bins)
    ours = np.histogram(samples, edges)[0] / len(samples)
    exact = np.histogram(values, edges, weights=probabilities)[0] / probabilities.sum()
    return float(0.5 * np.abs(ours - exact).sum())


def _tokens(tokens: Any, name: str, least: int = 1) -> np.ndarray:
    """Return class numbers as int32 [N, L]."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or len(tokens) < least or not tokens.shape[1] or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"{name} are {tokens.dtype}{list(tokens.shape)}: expected class numbers [N, L] of at least {least} sequences"
        )
    return np.ascontiguousarray(tokens, np.int32)


def _features(x: Any, name: str, least: int) -> np.ndarray:
    """Return x as float64 [N, D], refusing what would make a number meaningless."""
    x = np.asarray(x, np.float64)
    if x.ndim < 2 or len(x) < least:
        raise ValueError(f"{name} has shape {x.shape}: expected features [N, ...] of at least {least} examples")
    x = x.reshape(len(x), -1)
    bad = int((~np.isfinite(x)).any(1).sum())
    if bad:
        raise ValueError(f"{name} has {bad} examples that are not finite: leave them out, and report how many")
    return x
