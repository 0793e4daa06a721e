"""Values and predictions of many states (candidates, particles) at once; each network is called once.

Where the value is the posterior mean of the sampler's own denoiser, the prediction is computed here and returned for use
in the next move. In discrete diffusion most candidates are copies; `distinct` evaluates one of each kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rgdiff.typing import Array, Cond, Denoiser, Process, State, Value, same_callable
from rgdiff.values import PosteriorMean
from rgdiff.values import evaluate as evaluate_value

Evaluate = Callable[[State, Cond], tuple[Array, Any]]


def shares(value: Value, denoiser: Denoiser) -> bool:
    """Whether the value's prediction is the denoiser's."""
    return isinstance(value, PosteriorMean) and same_callable(value.denoiser, denoiser)


def evaluate(process: Process, value: Any, shared: bool, x: State, t: Array, cond: Cond) -> tuple[Array, Any]:
    """Return values [R] of states [R, ...] at time t, and the denoiser's predictions where they are shared (else None)."""
    if not shared:
        return evaluate_value(value, x, t, cond), None
    predict = lambda: value.denoiser(x, t, cond)  # noqa: E731
    if process.projects:
        prediction = predict()
    else:  # at t = 0 nothing is masked: the prediction is not looked at
        shapes = jax.eval_shape(predict)
        blank = lambda: jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), shapes)  # noqa: E731
        prediction = jax.lax.cond(t > 0, predict, blank)
    return value.given(x, t, prediction, cond), prediction


def first_equal(tokens: Array) -> Array:
    """Return, for tokens [M, B, ...], the least index of a state of the same example equal to it, [M, B]."""
    tokens = tokens.reshape(*tokens.shape[:2], -1)
    equal = (tokens[:, None] == tokens[None]).all(-1)  # [M, M, B]
    return jnp.argmax(equal, axis=1)


def distinct(
    run: Callable[[State, Cond], Any], states: State, conds: Cond, source: Array, needed: Array, rows: int
) -> tuple[Any, Array]:
    """Evaluate `run` on the needed rows alone, `rows` of them at a time, and give every row the result of its source.

    Args:
      states: leaves [R, ...]; conds likewise.
      source: [R], the row whose result this row takes; a source that is not needed must not be anyone's.
      needed: [R], bool.

    Returns:
      The results, leaves [R, ...], and how many calls of `run` were made. Their number is decided while running: steps
      in which nothing is needed cost none.
    """
    total = needed.shape[0]
    pad = -total % rows
    order = jnp.concatenate([jnp.argsort(~needed, stable=True), jnp.zeros(pad, int)])
    calls = -(-jnp.sum(needed) // rows)
    take = lambda tree, where: jax.tree.map(lambda leaf: leaf[where], tree)  # noqa: E731
    shapes = jax.eval_shape(lambda: run(take(states, order[:rows]), take(conds, order[:rows])))
    blank = jax.tree.map(lambda s: jnp.zeros((total, *s.shape[1:]), s.dtype), shapes)

    def some(carry: tuple[Array, Any]) -> tuple[Array, Any]:
        done, out = carry
        where = jax.lax.dynamic_slice_in_dim(order, done * rows, rows)
        where = jnp.where(done * rows + jnp.arange(rows) < total, where, total)  # beyond the end: dropped
        results = run(take(states, where), take(conds, where))
        return done + 1, jax.tree.map(lambda o, r: o.at[where].set(r, mode="drop"), out, results)

    calls_made, out = jax.lax.while_loop(lambda carry: carry[0] < calls, some, (jnp.int32(0), blank))
    return take(out, source), calls_made


def refresh(
    denoiser: Denoiser, prediction: Any, x: State, t: Array, cond: Cond, stale: Array, rows: int | None = None
) -> Any:
    """Return the denoiser's predictions at x [B, ...], calling it only for the stale [B], `rows` (a quarter) of them at a time."""
    batch = stale.shape[0]
    rows = min(rows or max(1, -(-batch // 4)), batch)
    run = lambda x, cond: denoiser(x, t, cond)  # noqa: E731
    new, _ = distinct(run, x, cond, jnp.arange(batch), stale, rows)
    keep = lambda new, old: jnp.where(stale.reshape(batch, *(1,) * (new.ndim - 1)), new, old)  # noqa: E731
    return jax.tree.map(keep, new, prediction)
