"""The judge of samples on the line: it compares them with exact laws by quadrature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rgdiff.domains.judging import BaseJudge
from rgdiff.exact import quadrature
from rgdiff.rewards import Task

BINS = 60  # of the compared histograms, over the prior's and the tilted law's range


class MixtureJudge(BaseJudge):
    """Measures samples on the line beside the exact laws of the prior's own chain, its tilt, and the tilt with a frozen start."""

    def laws(self, temperature: float | None, task: Task, prior: Any) -> quadrature.Laws:
        """Return the exact laws at a method's temperature; the tilt is the prior itself for a method without one."""
        chain = quadrature.line(prior.process, prior.denoiser, prior.times, points=1601)
        return quadrature.laws(chain, task.reward, 1e9 if temperature is None else temperature)

    def row(self, outcome: Any, task: Task, prior: Any = None) -> dict[str, Any]:
        """Return the figures of one method: rewards, moments, total variation to the exact law, costs."""
        laws, x = self.laws(outcome.temperature, task, prior), outcome.x0[:, 0]
        edges = _edges(laws)
        apart = lambda p: 0.5 * float(np.abs(p - np.histogram(laws.x0, edges, weights=laws.tilted)[0]).sum())  # noqa: E731
        mean = float(laws.tilted @ laws.x0)
        figures = self.reward_figures(outcome.x0, task, outcome.lineages)
        return (
            {k: v for k, v in figures.items() if not k.startswith("heldout")}
            | {"mean": float(x.mean()), "exact_mean": mean, "std": float(x.std())}
            | {"exact_std": float(laws.tilted @ (laws.x0 - mean) ** 2) ** 0.5}
            | {"distance": apart(np.histogram(x, edges)[0] / len(x))}
            | {"frozen_distance": apart(np.histogram(laws.x0, edges, weights=laws.frozen)[0])}
            | self.costs(outcome)
        )

    def histograms(self, outcomes: Mapping[str, Any], task: Task, prior: Any) -> list[tuple[Any, ...]]:
        """Return one picture for each temperature: all samples, the exact law, and the one predicted for a frozen start."""
        out = []
        for temperature in dict.fromkeys(o.temperature for o in outcomes.values() if o.temperature is not None):
            laws = self.laws(temperature, task, prior)
            shown = {k: o.x0[:, 0] for k, o in outcomes.items() if o.temperature in (None, temperature)}
            exact = {"exact: p(x) exp(r/α)/Z": laws.tilted, "predicted: frozen start": laws.frozen}
            lines = {name: (laws.x0, p) for name, p in exact.items()}
            out.append((f"Laws of x0 at temperature {temperature:g}", shown, lines, "x0", _edges(laws)))
        return out

    def notes(self, task: Task) -> list[str]:
        """Return what a reader of the report should know."""
        return [
            f"distance: total variation, over {BINS} bins, between samples and the exact law at the method's temperature, p(x) "
            "exp(r(x)/temperature)/Z with p the law of the prior's own chain, by quadrature (the prior's row: p itself). "
            "frozen_distance: the same for the law that is predicted if every kernel is tilted but x_T stays the prior's.",
            "kl: path KL to the prior in nats, that of the chain that draws x_T included. seconds: without compilation.",
        ]


def _edges(laws: quadrature.Laws) -> np.ndarray:
    """Bins over all but a thousandth of the prior's and the tilted law."""
    order = np.argsort(laws.x0)
    total = np.cumsum(0.5 * (laws.prior + laws.tilted)[order])
    low, high = (float(laws.x0[order][np.searchsorted(total, q)]) for q in (5e-4, 1 - 5e-4))
    return np.linspace(low, high, BINS + 1)
