"""Tasks on sequences, and their judge: what `reward/*.yaml` name, and how samples of any method are measured and shown.

Where all sequences can be enumerated, samples stand beside the exact law that the method aims at: the tilted law of the
prior's own chain. A learned reward is judged by a twin trained on the other half of the measurements. Rewards
themselves are in `sequence_rewards`, figures in `rgdiff.metrics`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import metrics, tuners
from rgdiff.domains.drawing import Logo
from rgdiff.domains.judging import BaseJudge
from rgdiff.domains.sequences.data import SequenceDomain
from rgdiff.domains.sequences.oracle import Oracle, train_oracle
from rgdiff.exact import enumeration
from rgdiff.processes import MaskedProcess
from rgdiff.rewards import Task
from rgdiff.typing import Key

_bound = jax.jit(tuners.masked_bound)

BOUNDED = 256  # samples whose likelihood is estimated
BEST = 0.1  # share of the measured sequences that count as the best


class SequenceJudge(BaseJudge):
    """Measures samples of a sequence domain; learned rewards are judged by an oracle of its own half of the measurements."""

    def __init__(self, domain: SequenceDomain, key: Key):
        super().__init__(domain, key)
        self._known: tuple[Any, np.ndarray] | None = None
        self._train = domain.train_x.argmax(-1)

    def check(self, task: Task) -> None:
        if task.target is not None:
            raise ValueError("a reward with a class target is for images; choose a reward on sequences")
        super().check(task)

    def oracle(self, **settings: Any) -> Oracle:
        """Train an oracle on the judge's half of the measurements; settings as `oracle.train_oracle`."""
        return train_oracle(self._key, self.domain.judge_x, self.domain.judge_y, **settings)

    def law(self, prior: Any) -> np.ndarray | None:
        """Return the law [K^L] of the prior's own chain, or None where it is not a masked one or too large to enumerate."""
        length, classes = self.domain.shape
        if not isinstance(prior.process, MaskedProcess) or not enumeration.enumerable(length, classes):
            return None
        if self._known is None or self._known[0] is not prior:
            self._known = prior, enumeration.chain_law(prior.process, prior.denoiser, prior.times)
        return self._known[1]

    def exact(self, outcome: Any, task: Task, prior: Any) -> tuple[np.ndarray, enumeration.Tilted] | None:
        """Return all rewards [K^L] and the law that a method aims at, or None where it is not known.

        A method without a temperature is compared with the prior's own law.
        """
        law = self.law(prior)
        if law is None:
            return None
        every = enumeration.all_rewards(task.reward, *self.domain.shape)
        temperature = np.inf if outcome.temperature is None else float(outcome.temperature)
        return every, enumeration.tilted(law, every, temperature)

    def row(self, outcome: Any, task: Task, prior: Any = None) -> dict[str, Any]:
        """Return the figures of one method, flat.

        Rewards under both rewards; where the exact law is known, its mean reward, log Z and KL and the distance of the
        histograms; log-likelihood under the prior (mean over samples of the bound on it, nats per sequence);
        k-mer correlations with the training set and with the best measured tenth, diversity, unique and novel shares; costs.
        """
        x0, tokens = self._letters(outcome.x0)
        classes = self.domain.shape[1]
        row = self.reward_figures(x0, task, outcome.lineages)
        exact = self.exact(outcome, task, prior)
        if exact is not None:
            every, law = exact
            row["exact_reward_mean"] = law.reward_mean
            if outcome.temperature is not None:
                row |= {"exact_log_z": law.log_z, "exact_kl": law.kl}
            row["histogram_distance"] = metrics.histogram_distance(
                self.rewards(task.reward, x0), every, law.probabilities
            )
        if isinstance(prior.process, MaskedProcess):
            bound = _bound(self._key, prior.process, prior.denoiser, jnp.asarray(x0[:BOUNDED]))
            row["log_likelihood"] = -float(np.mean(bound))
        row["kmer_correlation"] = metrics.kmer_correlation(tokens, self._train, classes, self._k)
        if self._best is not None:
            row["kmer_correlation_best"] = metrics.kmer_correlation(tokens, self._best, classes, self._k)
        row["diversity"] = metrics.sequence_diversity(tokens)
        row["unique"] = metrics.unique(tokens)
        row["novelty"] = metrics.novelty(tokens, self._train)
        return row | self.costs(outcome)

    def scores(self, x0: np.ndarray, task: Task) -> np.ndarray:
        """Return the guiding rewards [N] of the samples' letters."""
        return self.rewards(task.reward, self._letters(x0)[0])

    def spread(self, outcome: Any, task: Task) -> dict[str, float]:
        """Return the standard errors of the prior's figures."""
        return {"kl": 0.0, "diversity": metrics.jackknife(metrics.sequence_diversity, self._letters(outcome.x0)[1])}

    def show_each(self, x0: np.ndarray) -> list[str]:
        """Return lines of letters."""
        return self.domain.alphabet.decode(np.asarray(x0))

    def show_all(self, samples: Mapping[Any, np.ndarray], task: Task) -> dict[Any, Logo]:
        """Return letter frequencies."""
        letters = self.domain.alphabet.letters
        return {title: Logo(letters, self._letters(x0)[0].mean(0, dtype=np.float64)) for title, x0 in samples.items()}

    def show_exact(self, outcome: Any, task: Task, prior: Any) -> dict[str, Logo]:
        """Return the letter frequencies of the exact law, where it is known."""
        length, classes = self.domain.shape
        exact = self.exact(outcome, task, prior)
        if exact is None:
            return {}
        joint = exact[1].probabilities.reshape((classes,) * length)
        marginals = [joint.sum(tuple(j for j in range(length) if j != i)) for i in range(length)]
        return {"exact law": Logo(self.domain.alphabet.letters, np.stack(marginals))}

    def references(self, task: Task) -> dict[str, np.ndarray]:
        """Return the training sequences."""
        return {"training sequences": self.domain.train_x}

    def reward_law(self, outcome: Any, task: Task, prior: Any) -> tuple[np.ndarray, np.ndarray] | None:
        """Return all rewards and their probabilities under the exact law, where it is known."""
        exact = self.exact(outcome, task, prior)
        return None if exact is None else (exact[0], exact[1].probabilities)

    def notes(self, task: Task) -> list[str]:
        """Return what a reader of the report should know."""
        notes = [
            "log_likelihood: mean over samples of the bound on log p under the prior, estimated without bias, nats per sequence. "
            f"kmer_correlation: of {self._k}-mer counts with the training sequences; _best: with the best measured tenth. "
            "diversity: mean share of differing positions over pairs. novelty: share not among the training sequences.",
            "exact_…: of the tilted law of the prior's own chain at the method's temperature, by enumeration, where all "
            "sequences can be enumerated. kl: path KL to the prior in nats per sample; for SVDD the estimate of its "
            "selections' KL. network_calls: per sample. seconds: without compilation.",
        ]
        if isinstance(task.reward, Oracle) and isinstance(task.heldout, Oracle):
            of_guide = correlation(self.rewards(task.reward, self.domain.judge_x), self.domain.judge_y)
            of_judge = correlation(self.rewards(task.heldout, self.domain.guide_x), self.domain.guide_y)
            notes.append(
                "The guiding oracle and the judging one are trained on disjoint halves of the measurements; each one's "
                f"correlation with measurements it has not seen: {of_guide:.3f} and {of_judge:.3f}."
            )
        return notes

    @property
    def _k(self) -> int:
        return min(3, self.domain.shape[0])

    @functools.cached_property
    def _best(self) -> np.ndarray | None:
        """The best tenth of the measured sequences, [n, L]."""
        y = np.concatenate([self.domain.guide_y, self.domain.judge_y])
        if not len(y):
            return None
        x = np.concatenate([self.domain.guide_x, self.domain.judge_x])
        return x[np.argsort(-y, kind="stable")[: max(1, round(BEST * len(y)))]].argmax(-1)

    def _letters(self, x0: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return samples as one-hot float32 [N, L, K] and as class numbers [N, L]: the most probable letters."""
        tokens = np.asarray(x0).argmax(-1)
        return np.eye(self.domain.shape[1], dtype=np.float32)[tokens], tokens


def correlation(a: Any, b: Any) -> float:
    """Pearson's correlation of two vectors."""
    return float(np.corrcoef(np.asarray(a, np.float64), np.asarray(b, np.float64))[0, 1])
