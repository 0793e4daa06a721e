"""What every domain's judge shares: rewards of samples, their summaries, the costs of a method, and what it adds to a report.

A judge measures an outcome: its samples `x0`, its costs, and what a method knows of itself (`log_z`, `temperature`).
Figures of a domain's own, and models that judge, are left to the domain's tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from rgdiff import metrics, rewards
from rgdiff.rewards import Task
from rgdiff.typing import Reward


class Judge:
    """Measures samples of examples [*shape]. A domain's judge fills in `row` and what of the rest it has."""

    def __init__(self, shape: tuple[int, ...]):
        self._shape = shape

    def check(self, task: Task) -> None:
        """Refuse a reward that does not give one float per example."""
        blank = jnp.zeros((2, *self._shape), jnp.float32)
        rewards.check(task.reward, blank)
        rewards.check(task.heldout, blank)

    def rewards(self, reward: Reward, x0: np.ndarray) -> np.ndarray:
        """Return the rewards [N] of samples."""
        return np.asarray(rewards.score(reward, jnp.asarray(x0)))

    def row(self, outcome: Any, task: Task, prior: Any = None) -> dict[str, Any]:
        """Return the figures of one method, flat; `prior` is the prior it sampled from."""
        return self.reward_figures(outcome.x0, task) | self.costs(outcome)

    def reward_figures(self, x0: np.ndarray, task: Task) -> dict[str, Any]:
        """Summarise samples under the guiding reward and under the held-out one."""
        held = metrics.summarize_rewards(self.rewards(task.heldout, x0))
        row: dict[str, Any] = metrics.summarize_rewards(self.rewards(task.reward, x0))
        return row | {f"heldout_{name}": held[name] for name in ("reward_mean", "reward_median", "reward_top_decile")}

    def costs(self, outcome: Any) -> dict[str, Any]:
        """Return path KL, network calls and seconds."""
        names = ("kl", "network_calls", "tuning_network_calls", "seconds", "compile_seconds")
        return {name: getattr(outcome, name) for name in names}

    def pictures(self, samples: Mapping[str, np.ndarray], task: Task) -> list[tuple[str, np.ndarray, list[float]]]:
        """Return (title, 8-bit pictures [N, H, W, C], their rewards) for the report."""
        return []

    def logos(self, outcomes: Mapping[str, Any], task: Task, prior: Any) -> list[tuple[str, str, np.ndarray]]:
        """Return (title, letters, frequencies [L, K]) of sequence logos for the report."""
        return []

    def histograms(self, outcomes: Mapping[str, Any], task: Task, prior: Any) -> list[tuple[str, np.ndarray, Any]]:
        """Return (title, rewards of samples, the exact law as (rewards, probabilities) or None) for the report."""
        return [(f"{key}: reward", self.rewards(task.reward, outcome.x0), None) for key, outcome in outcomes.items()]

    def notes(self, task: Task) -> list[str]:
        """Return what a reader of the report should know."""
        return []
