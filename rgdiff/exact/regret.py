"""Exact rounds of online fine-tuning where all samples can be enumerated: the optimum of every round, and its regret.

Probabilities and rewards are NumPy arrays [n] over all samples, float64. With these a method's outer loop (its queries, its
surrogate, its steps) is measured apart from the tuning of a network in each round.
"""

from __future__ import annotations

import numpy as np


def anchored(rewards: np.ndarray, alpha: float, beta: float, prior: np.ndarray, previous: np.ndarray) -> np.ndarray:
    """Return the optimum of a round of online fine-tuning: argmax_p E_p[f] - alpha KL(p || prior) - beta KL(p || previous).

    It is proportional to exp(f/(alpha + beta)) prior^(alpha/(alpha + beta)) previous^(beta/(alpha + beta)) (arXiv 2402.16359,
    theorem 1). With beta = alpha (i - 1) in round i the rounds telescope to prior * exp(sum of all f / (alpha i)).

    Args:
      rewards: f [n], in the unit of alpha and beta times a nat; NaN has no weight.
      alpha, beta: weights of the two KLs, reward per nat, >= 0 and not both 0.
      prior, previous: probabilities [n].

    Returns:
      Probabilities [n].

    Raises:
      ValueError: for differing shapes, or weights that are negative or both 0.

    Example:
      >>> import numpy as np
      >>> from rgdiff.exact import regret
      >>> half = np.array([0.5, 0.5])
      >>> print(regret.anchored(np.log([1.0, 9.0]), 1.0, 1.0, half, half).round(4))  # 1 : sqrt(9)
      [0.25 0.75]
    """
    f, prior, previous = (np.asarray(each, np.float64) for each in (rewards, prior, previous))
    if not f.shape == prior.shape == previous.shape or f.ndim != 1:
        raise ValueError(
            f"expected rewards and two laws of one shape [n], got {f.shape}, {prior.shape}, {previous.shape}"
        )
    if not (alpha >= 0 and beta >= 0 and alpha + beta > 0):
        raise ValueError(f"alpha and beta must be >= 0 and one of them > 0, got {alpha} and {beta}")
    some = ~np.isnan(f)
    for weight, law in ((alpha, prior), (beta, previous)):
        some = some & ((law > 0) | (weight == 0))
    log = lambda law: np.log(np.where(some & (law > 0), law, 1.0))  # noqa: E731
    scores = (np.where(some, f, 0.0) + alpha * log(prior) + beta * log(previous)) / (alpha + beta)
    weights = np.where(some, np.exp(scores - scores[some].max()), 0.0)
    return weights / weights.sum()


def divergence(law: np.ndarray, other: np.ndarray) -> float:
    """Return KL(law || other) of two distributions.

    Args:
      law, other: probabilities [n].

    Returns:
      Nats; infinite where the other is 0 and the first is not.

    Example:
      >>> import numpy as np
      >>> from rgdiff.exact import regret
      >>> print(f"{regret.divergence(np.array([1.0, 0.0]), np.array([0.5, 0.5])):.4f}")  # log 2
      0.6931
    """
    law, other = np.asarray(law, np.float64), np.asarray(other, np.float64)
    some = law > 0
    with np.errstate(divide="ignore"):
        return float(law[some] @ (np.log(law[some]) - np.log(other[some])))


def objective(law: np.ndarray, rewards: np.ndarray, prior: np.ndarray, alpha: float) -> float:
    """Return J(p) = E_p[r] - alpha KL(p || prior), whose maximum over p is alpha * log Z of `enumeration.tilted`.

    Args:
      law: p [n], probabilities.
      rewards: r [n].
      prior: probabilities [n].
      alpha: weight of the KL, reward per nat.

    Returns:
      In the reward's unit.

    Example:
      >>> import numpy as np
      >>> from rgdiff.exact import regret
      >>> half, best, r = np.array([0.5, 0.5]), np.array([0.25, 0.75]), np.log([1.0, 3.0])
      >>> print(f"{regret.objective(best, r, half, alpha=1.0):.4f}")  # log Z = log((1 + 3) / 2)
      0.6931
    """
    return float(np.asarray(law, np.float64) @ np.asarray(rewards, np.float64)) - alpha * divergence(law, prior)
