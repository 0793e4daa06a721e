"""A campaign as a user's script has it; tests/test_campaign.py kills it between ask and tell: `python -m tests.runtime.laboratory FOLDER STOP`."""

from __future__ import annotations

import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rgdiff import denoisers, processes, schedules, seiko, surrogates, tuners
from rgdiff.runtime.campaign import Campaign, open_campaign

QUERIES = [6, 4, 5]
PROCESS = processes.first_hitting(processes.masked(schedules.log_linear_mask(), 2, 3))
TIMES = PROCESS.times()
ADAM = optax.adam(3e-2)
PRIOR = jnp.zeros((16, 2, 3))


def logits(params, x, t, cond=None):
    return params[jnp.argmax(x, -1) @ jnp.array([4, 1])]


def model(params):
    return denoisers.from_function(logits, params)


def inner(reward, **kl):
    return tuners.drakes(model, PROCESS, reward, TIMES, ADAM, batch=32, estimator="log_variance", **kl)


def opened(folder, queries=QUERIES, seed=0, steps=12, alpha=0.2) -> Campaign:
    surrogate = surrogates.ridge(surrogates.pairs, noise=0.1)
    method = seiko.seiko(
        model, PROCESS, TIMES, surrogate, inner, prior=model(PRIOR), temperature=alpha, batch=4, capacity=15
    )
    return open_campaign(folder, method, PRIOR, queries, seed=seed, steps=steps)


def measure(x0) -> np.ndarray:
    """The laboratory: the letters' sum as a number, and no value at all for the same letter twice."""
    tokens = np.argmax(x0, -1)
    return np.where(tokens[:, 0] == tokens[:, 1], np.nan, tokens.sum(-1))


def main(folder: str, stop: int) -> None:
    """Answer round by round; die by SIGKILL after `stop` events, an event being an `ask` or a `tell`."""
    campaign, events = opened(folder), 0

    def event() -> None:
        nonlocal events
        events += 1
        if events > stop:
            os.kill(os.getpid(), signal.SIGKILL)

    while not campaign.done:
        ids, x0 = campaign.ask()
        event()
        half = len(ids) // 2
        campaign.tell(ids[half:], measure(x0)[half:])  # the later ones first
        event()
        campaign.tell(ids[:half], measure(x0)[:half])
    x0 = jax.device_get(campaign.sample(8))
    np.savez(os.path.join(folder, "result.npz"), params=campaign.state.params, x0=x0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
