"""Learned brightness of a protein's variants, in two copies that share no measurement, and the judge of protein sequences.

Each copy is a small ensemble of bottleneck networks, additive effects of mutations through a narrow non-linear readout
("global epistasis"), trained on one half of the measurements. What is predicted dark is infeasible: NaN.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from rgdiff.domains.proteins import blosum
from rgdiff.domains.proteins.data import ProteinDomain
from rgdiff.domains.proteins.rewards import Brightness, train_brightness
from rgdiff.domains.sequences.judge import SequenceJudge, correlation
from rgdiff.rewards import Task
from rgdiff.typing import Array, Reward


class ProteinJudge(SequenceJudge):
    """Measures samples of a protein's variants; brightness is judged by networks of the other half of the measurements."""

    domain: ProteinDomain

    def brightness(self, **settings: Any) -> Reward:
        """Train on the judge's half of the measurements; settings as `train_brightness`."""
        return train_brightness(self._key, self.domain.judge_x, self.domain.judge_y, **settings)

    def row(self, outcome: Any, task: Task, prior: Any = None) -> dict[str, Any]:
        """Return the figures of `SequenceJudge`; mutations and their BLOSUM62 distance; and what was measured of samples that are in the file."""
        tokens, wild = np.asarray(outcome.x0).argmax(-1), np.asarray(self.domain.wild)
        known = np.array([self._known_values.get(row.tobytes(), np.nan) for row in tokens.astype(np.uint8)])
        measured = np.isfinite(known)
        return {
            **super().row(outcome, task, prior),
            "mutations": float((tokens != wild).sum(-1).mean()),
            "blosum_distance": float(blosum.distance(tokens, wild).mean()),
            "measured": float(measured.mean()),
            "measured_mean": float(known[measured].mean()) if measured.any() else float("nan"),
        }

    @functools.cached_property
    def _known_values(self) -> dict[bytes, float]:
        """Measurements of all variants by their letters."""
        domain = self.domain
        x = np.concatenate([domain.guide_x, domain.judge_x]).argmax(-1).astype(np.uint8)
        y = np.concatenate([domain.guide_y, domain.judge_y])
        return {row.tobytes(): float(value) for row, value in zip(x, y, strict=True)}

    def notes(self, task: Task) -> list[str]:
        """Return what a reader of the report should know."""
        notes = [
            *super().notes(task),
            "mutations: mean number of letters that differ from the wild type; blosum_distance: the BLOSUM62 similarity that they lose. "
            "measured: share of the samples that are in the file; measured_mean: of what was measured of those.",
        ]
        if isinstance(task.reward, Brightness) and isinstance(task.heldout, Brightness):
            domain = self.domain
            guide = self.quality(task.reward.learned, domain.judge_x, domain.judge_y)
            judge = self.quality(task.heldout.learned, domain.guide_x, domain.guide_y)
            told, infeasible = "Spearman {spearman:.3f}, R2 {r2:.3f}", ""
            if np.isfinite(domain.dark):
                told += ", {right:.1%} on the right side of the dark threshold"
                infeasible = f"Infeasible: predicted below {domain.dark:.2f}. "
            notes.append(
                f"{infeasible}The guiding and the judging networks are trained on disjoint "
                f"halves; on measurements they have not seen: {told.format(**guide)}; {told.format(**judge)}."
            )
        return notes

    def quality(self, learned: Reward, x: np.ndarray, y: np.ndarray, batch: int = 1024) -> dict[str, float]:
        """Return Spearman's correlation, R2 and the share on the right side of the threshold, on measurements not trained on."""
        parts = [self.rewards(learned, x[i : i + batch].astype(np.float32)) for i in range(0, len(x), batch)]
        guess = np.concatenate(parts).astype(np.float64)
        return {
            "spearman": correlation(ranks(guess), ranks(y)),
            "r2": 1 - float(np.mean((guess - y) ** 2) / np.var(np.asarray(y, np.float64))),
            "right": float(np.mean((guess < self.domain.dark) == (y < self.domain.dark))),
        }


def ranks(values: Array | np.ndarray) -> np.ndarray:
    """Return ranks from 0 on, equal values sharing their mean rank."""
    _, member, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[member]
