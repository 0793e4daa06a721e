"""Exact rounds of online fine-tuning where all samples can be enumerated: the optimum of every round, and its regret.

Laws and rewards are NumPy arrays [n] over all samples, float64. With these a method's outer loop (what it asks, what it learns,
how far it moves) is measured apart from how well a network is tuned in each round.
"""

from __future__ import annotations

import numpy as np


def anchored(rewards: np.ndarray, alpha: float, beta: float, prior: np.ndarray, previous: np.ndarray) -> np.ndarray:
    """Return argmax_p E_p[f] - alpha KL(p || prior) - beta KL(p || previous), [n].

    It is proportional to exp(f/(alpha + beta)) prior^(alpha/(alpha + beta)) previous^(beta/(alpha + beta)) (arXiv 2402.16359,
    theorem 1). With beta = alpha (i - 1) in round i the rounds telescope to prior * exp(sum of all f / (alpha i)).

    Args:
      rewards: f [n], in the unit of alpha and beta times a nat; NaN has no weight.
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
    """Return KL(law || other) of two laws [n], nats; infinite where the other is 0 and the first is not."""
    law, other = np.asarray(law, np.float64), np.asarray(other, np.float64)
    some = law > 0
    with np.errstate(divide="ignore"):
        return float(law[some] @ (np.log(law[some]) - np.log(other[some])))


def objective(law: np.ndarray, rewards: np.ndarray, prior: np.ndarray, alpha: float) -> float:
    """Return J(p) = E_p[r] - alpha KL(p || prior), whose maximum over p is alpha * log Z of `enumeration.tilted`."""
    return float(np.asarray(law, np.float64) @ np.asarray(rewards, np.float64)) - alpha * divergence(law, prior)
