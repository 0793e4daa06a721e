"""When a method is over-optimised: its samples have left the prior's neighbourhood for the sake of the reward.

A figure counts where the domain's judge gives its standard error in the prior's own samples (`Judge.spread`). The limits
are these constants; whoever wants others changes them here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rgdiff.metrics import share_error

# Path KL to the prior, nats per sample. The best of N samples of the prior has a KL of log N - 1 + 1/N: 20 nats are a choice among
# 10^9 of them, and what is rarer than that among the prior's samples is not the prior's any more.
KL = 20.0
# Frechet distance, in multiples of the prior's own to the same real data.
FRECHET = 3.0
# Diversity of samples, and recall of real data, as shares of the prior's own. A prior of ten classes that is steered to one of them
# keeps about 0.6 of its diversity.
DIVERSITY = RECALL = 1 / 3
# Shares of samples that are what they should be at all, as shares of the prior's own: those that have a reward, that lie where the
# data's density is not 0, that are molecules. A reward is a mean over those alone, so that a method may raise it by losing the others.
FEASIBLE = IN_SUPPORT = VALID = 2 / 3
# A limit is widened by so many standard errors of the prior's own figure: few samples accuse nobody.
ERRORS = 3.0
SHARES = {  # figure -> (its least share of the prior's own, what it is called)
    "diversity": (DIVERSITY, "its diversity"),
    "recall": (RECALL, "its recall of the real data"),
    "feasible": (FEASIBLE, "its share of feasible samples"),
    "in_support": (IN_SUPPORT, "its share of samples in the data's support"),
    "valid": (VALID, "its share of valid samples"),
}


def over_optimised(row: Mapping[str, Any], prior: Mapping[str, Any], spread: Mapping[str, float]) -> str | None:
    """Return in what a method has left the prior's neighbourhood, in words, or None if in nothing.

    It has, where its path KL is above `KL` nats, its Frechet distance above `FRECHET` times the prior's, or one of `SHARES` below its
    limit times the prior's, all but the first by more than `ERRORS` standard errors of the prior's figure.

    Args:
      row: figures of the method.
      prior: figures of the prior's own samples, as many.
      spread: the figures that count, each with its standard error in the prior's samples; NaN stands for an unknown one, and accuses nobody.
    """
    reasons = []
    for name, error in spread.items():
        value, own = _number(row.get(name)), 0.0 if name == "kl" else _number(prior.get(name))
        if value is None or own is None or math.isnan(error):
            continue
        slack = ERRORS * error
        if name == "kl" and value > KL + slack:
            reasons.append(f"its path KL to the prior is {_short(value)} nats, more than {KL:g}")
        elif name == "frechet" and value > FRECHET * own + slack:
            times = f"{_short(value / own)} times the prior's {_short(own)}" if own else "the prior's is 0"
            reasons.append(f"its Fréchet distance is {_short(value)}, {times}")
        elif name in SHARES and value < SHARES[name][0] * own - slack:
            reasons.append(
                f"{SHARES[name][1]} is {_short(value)}, {_short(100 * value / own)} % of the prior's {_short(own)}"
            )
    return "; ".join(reasons) or None


def marked(
    rows: Mapping[str, Mapping[str, Any]], spread: Mapping[str, float], counts: Mapping[str, int] | None = None
) -> dict[str, dict[str, Any]]:
    """Return the rows of a run, by method, with `over_optimised` where a method is; the first row is the prior's.

    Args:
      rows: figures by method.
      spread: as `over_optimised`; where it is empty nobody is called.
      counts: numbers of samples by method, of which `infeasible` is a part, which then counts too.
    """
    first = next(iter(rows))
    full = {key: dict(row) for key, row in rows.items()}
    if counts and spread:
        for key, row in full.items():
            row["feasible"] = 1 - (_number(row.get("infeasible")) or 0) / counts[key]
        spread = {**spread, "feasible": share_error(full[first]["feasible"], counts[first])}
    out = {}
    for key, row in rows.items():
        reason = None if key == first else over_optimised(full[key], full[first], spread)
        out[key] = dict(row) | ({} if reason is None else {"over_optimised": reason})
    return out


def _number(value: Any) -> float | None:
    """Return a finite or infinite number, or None for what is missing or NaN."""
    if value is None or isinstance(value, str):
        return None
    return None if math.isnan(float(value)) else float(value)


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
