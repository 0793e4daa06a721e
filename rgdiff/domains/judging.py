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
from rgdiff.domains.drawing import Logo, Plane
from rgdiff.rewards import Task
from rgdiff.typing import Key, Reward


class BaseJudge:
    """Measures samples of a domain. A domain's judge fills in `row` and what of the rest it has.

    Args:
      domain: what is judged; `shape` is that of one example.
      key: PRNG key of what the judge trains or draws.
    """

    pictured = True  # whether a method's samples say something of it

    def __init__(self, domain: Any, key: Key):
        self.domain = domain
        self._key = key

    def check(self, task: Task) -> None:
        """Refuse a reward that does not give one float per example."""
        blank = jnp.zeros((2, *self.domain.shape), jnp.float32)
        rewards.check(task.reward, blank)
        rewards.check(task.heldout, blank)

    def rewards(self, reward: Reward, x0: np.ndarray) -> np.ndarray:
        """Return the rewards [N] of samples."""
        return np.asarray(rewards.score(reward, jnp.asarray(x0)))

    def row(self, outcome: Any, task: Task, prior: Any = None) -> dict[str, Any]:
        """Return the figures of one method, flat; `prior` is the prior it sampled from."""
        return self.reward_figures(outcome.x0, task, outcome.lineages) | self.costs(outcome)

    def reward_figures(self, x0: np.ndarray, task: Task, lineages: np.ndarray | None = None) -> dict[str, Any]:
        """Summarise samples under the guiding reward and under the held-out one; those of one lineage are not independent."""
        held = metrics.summarize_rewards(self.rewards(task.heldout, x0))
        row: dict[str, Any] = metrics.summarize_rewards(self.rewards(task.reward, x0), lineages)
        return row | {f"heldout_{name}": held[name] for name in ("reward_mean", "reward_median", "reward_top_decile")}

    def costs(self, outcome: Any) -> dict[str, Any]:
        """Return path KL, network calls and seconds."""
        names = ("kl", "network_calls", "tuning_network_calls", "seconds", "compile_seconds")
        return {name: getattr(outcome, name) for name in names}

    def scores(self, x0: np.ndarray, task: Task) -> np.ndarray | None:
        """Return the guiding rewards [N] by which the report names the best, the median and the worst; None names none."""
        return self.rewards(task.reward, x0)

    def spread(self, outcome: Any, task: Task) -> dict[str, float]:
        """Return the figures by which a method is called over-optimised, each with its standard error in the prior's samples.

        See `rgdiff.runtime.naturalness`; a figure that is left out calls nobody.
        """
        return {"kl": 0.0}

    def show_each(self, x0: np.ndarray) -> Any:
        """Return how single samples are drawn: 8-bit pictures [N, H, W, C], or an SVG text or a line of letters for each; or None."""
        return None

    def show_all(self, samples: Mapping[Any, np.ndarray], task: Task) -> dict[Any, Logo | Plane]:
        """Return one drawing for each of several sets of samples, on a common scale; empty if only single samples are drawn."""
        return {}

    def show_exact(self, outcome: Any, task: Task, prior: Any) -> dict[str, Logo | Plane]:
        """Return drawings of the exact law that a method aims at, by title, where it is known."""
        return {}

    def references(self, task: Task) -> dict[str, np.ndarray]:
        """Return data that stand beside the prior's samples, by title."""
        return {}

    def rows_of(self, count: int, task: Task, prior: Any) -> dict[str, range]:
        """Return the places of each condition's samples among `count`, by its name, where a report compares methods condition by condition."""
        return {}

    def reward_law(self, outcome: Any, task: Task, prior: Any) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the exact law of the reward that a method aims at, (rewards, probabilities), where it is known."""
        return None

    def histograms(self, outcomes: Mapping[str, Any], task: Task, prior: Any) -> list[tuple[Any, ...]]:
        """Return arguments of `rgdiff.runtime.report.Histogram` that the report opens with, where samples are numbers."""
        return []

    def curves(self, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str, str, dict[str, Any]]]:
        """Return figures made of the table: title -> (label of x, label of y, method -> (x, y))."""
        return {}

    def notes(self, task: Task) -> list[str]:
        """Return what a reader of the report should know."""
        return []
