"""Event-driven masked sampling: the ancestral chain, with the network called only for examples in which a token appeared.

On a fine grid most moves of most examples change nothing (with L positions and T moves, a fraction exp(-L/T)). A
denoiser that does not depend on t then has the same prediction as before. The samples equal those of `ancestral` for the same key.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp

from rgdiff import checks
from rgdiff.processes import FirstHittingProcess, MaskedProcess
from rgdiff.samplers._evaluate import refresh
from rgdiff.shards import Shards, by_rows
from rgdiff.typing import Array, Cond, Denoiser, Info, Key, Process, State, callable_pytree, pytree, static


class EventCarry(NamedTuple):
    """The state and the denoiser's prediction there."""

    x: State
    prediction: Any


@pytree
class EventDriven:
    """Draws y ~ p(x_s | x_t) and predicts again where y differs from x_t. Build it with `event_driven`."""

    process: Process
    denoiser: Denoiser
    rows: int | None = static(default=None)
    shards: Shards | None = static(default=None)

    def init(self, key: Key, batch: int, t: Array, cond: Cond = None) -> EventCarry:
        x = self.process.prior(batch).sample(key)
        return EventCarry(x, self.denoiser(x, t, cond))

    def step(self, key: Key, carry: EventCarry, t: Array, s: Array, cond: Cond = None) -> tuple[EventCarry, Info]:
        x = self.process.reverse(carry.x, t, s, carry.prediction).sample(key)
        batch = x.shape[0]
        changed = (x != carry.x).reshape(batch, -1).any(-1)
        unfinished = x[..., -1].reshape(batch, -1).any(-1)
        needed = changed & unfinished
        again = by_rows(partial(refresh, rows=self.rows), self.shards, (None, 0, 0, None, 0, 0))
        prediction = again(self.denoiser, carry.prediction, x, s, cond, needed)
        carry = EventCarry(x, prediction)
        return carry, {"evaluations": needed.astype(jnp.int32)}

    def final(self, carry: EventCarry, t: Array, cond: Cond = None) -> tuple[State, Info]:
        return self.process.finalize(carry.x, t, None), {}

    def network_calls(self, moves: int) -> int:
        """Calls of the denoiser per sample over a chain of `moves` moves, at most; info["evaluations"] says how many there were."""
        positions = 1
        for size in self.process.shape:  # type: ignore[attr-defined]
            positions *= size
        return min(moves, positions)


def event_driven(process: Process, denoiser: Denoiser, *, rows: int | None = None) -> EventDriven:
    """Build the ancestral sampler of a masked prior that calls the network only after a state has changed.

    Args:
      process: masked.
      denoiser: (x, t, cond) -> logits, which must not depend on t (MDLM's `time_conditioning: False`, arXiv 2406.07524).
      rows: examples per network call, a quarter of the batch by default. Fewer rows compute fewer unneeded predictions; more
        rows are faster per row.

    Returns:
      The sampler; its info["evaluations"] counts the network's rows.

    Raises:
      ValueError: for a process that is not masked, or whose moves are events already (`processes.first_hitting`).

    Note:
      Examples share their network calls, those of one device among themselves.

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> process = rgdiff.processes.masked(rgdiff.schedules.log_linear_mask(), 3, classes=2)
      >>> logits = jnp.array([[9.0, -jnp.inf], [-jnp.inf, 9.0], [9.0, -jnp.inf]])  # tokens 0, 1, 0
      >>> sampler = rgdiff.samplers.event_driven(process, lambda x, t, cond: jnp.broadcast_to(logits, (*x.shape[:2], 2)))
      >>> print(rgdiff.samplers.sample(sampler, jax.random.key(0), 2, process.times(8)).x0.argmax(-1))
      [[0 1 0]
       [0 1 0]]
    """
    if not isinstance(process, MaskedProcess):
        raise ValueError("event_driven needs a masked process: every move of a continuous one changes the state")
    if isinstance(process, FirstHittingProcess):
        raise ValueError("a first-hitting chain has an event at every move; use ancestral")
    rows = None if rows is None else checks.at_least("rows", rows, 1)
    return EventDriven(process, callable_pytree(denoiser, "a denoiser"), rows)
