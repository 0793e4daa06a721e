"""SVDD: soft value-based decoding (arXiv 2408.08252). Draw M candidates from the kernel, keep one in proportion to exp(v/tau).

Nothing is differentiated and nothing is trained, so the reward may be a black box. The samples do not interact; as M
grows the law tends to p_pre(x) exp(r(x)/tau)/Z when v is the exact soft value, with an error of order 1/M.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rgdiff import checks
from rgdiff.typing import (
    Array,
    Cond,
    Denoiser,
    Info,
    Key,
    Process,
    State,
    Value,
    callable_pytree,
    pytree,
    same_callable,
    static,
)
from rgdiff.values import PosteriorMean

SELECTIONS = ("soft", "argmax")


class Carry(NamedTuple):
    """The state x_t, and the denoiser's prediction there when the value has already computed it."""

    x: State
    prediction: Any


@pytree
class Svdd:
    """Draws M candidates per move and keeps one. Build it with `svdd`."""

    process: Process
    denoiser: Denoiser
    value: Value
    temperature: Array
    candidates: int = static()
    chunk: int = static()
    selection: str = static(default="soft")
    select_initial: bool = static(default=False)
    shared: bool = static(default=False)

    def init(self, key: Key, batch: int, t: Array, cond: Cond = None) -> Carry:
        key_draw, key_select = jax.random.split(key)
        prior = self.process.prior(batch)
        if self.select_initial:
            return self._choose(key_select, self._draw(key_draw, prior), t, cond)[0]
        x = prior.sample(key_draw)
        return Carry(x, self.denoiser(x, t, cond) if self.shared else None)

    def step(self, key: Key, carry: Carry, t: Array, s: Array, cond: Cond = None) -> tuple[Carry, Info]:
        key_draw, key_select = jax.random.split(key)
        prediction = carry.prediction if self.shared else self.denoiser(carry.x, t, cond)
        kernel = self.process.reverse(carry.x, t, s, prediction)
        return self._choose(key_select, self._draw(key_draw, kernel), s, cond)

    def final(self, carry: Carry, t: Array, cond: Cond = None) -> tuple[State, Info]:
        prediction = carry.prediction
        if self.process.projects and not self.shared:
            prediction = self.denoiser(carry.x, t, cond)
        return self.process.finalize(carry.x, t, prediction), {}

    def network_calls(self, moves: int) -> int:
        """Calls of the denoiser per sample over a chain of `moves` moves (the value's own network not counted)."""
        if not self.shared:
            return moves + self.process.projects
        first = self.candidates if self.select_initial else 1
        return first + self.candidates * (moves if self.process.projects else moves - 1)

    def value_calls(self, moves: int) -> int:
        """Evaluations of the value per sample."""
        return self.candidates * (moves + self.select_initial)

    def _draw(self, key: Key, kernel: Any) -> State:
        return jax.vmap(kernel.sample)(jax.random.split(key, self.candidates))

    def _choose(self, key: Key, candidates: State, t: Array, cond: Cond) -> tuple[Carry, Info]:
        """Weigh candidates [M, B, ...] at time t and keep one per example."""
        values, predictions = self._evaluate(candidates, t, cond)
        log_weights = log_soft_weights(values, self.temperature)
        if self.selection == "soft":
            index = jax.random.categorical(key, log_weights, axis=0)
        else:
            index = jnp.argmax(log_weights, axis=0)
        # Indexed per example, not by (index, arange): a batch split over devices stays where it is.
        pick = lambda leaf: jax.vmap(lambda column, i: column[i], in_axes=(1, 0))(leaf, index)  # noqa: E731
        info = {
            "value": pick(values),
            "values": values,
            "candidates": candidates,
            "log_weights": log_weights,
            "kl": self._selection_kl(log_weights, pick(log_weights)),
            "infeasible": jnp.sum(jnp.isnan(values), axis=0),
        }
        return Carry(jax.tree.map(pick, candidates), jax.tree.map(pick, predictions)), info

    def _selection_kl(self, log_weights: Array, won: Array) -> Array:
        """Estimate of KL(selected || kernel), nats [B]: log w_won / mean w; for argmax, its exact value without ties."""
        if self.selection == "soft":
            return won - jax.nn.logsumexp(log_weights, 0) + jnp.log(self.candidates)
        return jnp.full_like(won, jnp.log(self.candidates) - (self.candidates - 1) / self.candidates)

    def _evaluate(self, candidates: State, t: Array, cond: Cond) -> tuple[Array, Any]:
        """Values [M, B], and predictions [M, B, ...] where the value shares the denoiser; `chunk` candidates at a time."""
        pieces = self.candidates // self.chunk
        batch = jax.tree.leaves(candidates)[0].shape[1]

        # Rows of one example stay together, so that a batch split over devices is evaluated where it lies.
        def fold(leaf: Array) -> Array:
            leaf = jnp.moveaxis(leaf.reshape(pieces, self.chunk, *leaf.shape[1:]), 1, 2)
            return leaf.reshape(pieces, batch * self.chunk, *leaf.shape[3:])

        def unfold(leaf: Array) -> Array:
            leaf = jnp.moveaxis(leaf.reshape(pieces, batch, self.chunk, *leaf.shape[2:]), 2, 1)
            return leaf.reshape(self.candidates, batch, *leaf.shape[3:])

        conds = jax.tree.map(lambda c: jnp.repeat(c, self.chunk, axis=0), cond)

        def evaluate(x: State) -> tuple[Array, Any]:
            if not self.shared:
                return self.value(x, t, conds), None
            value: PosteriorMean = self.value  # type: ignore[assignment]
            predict = lambda: self.denoiser(x, t, conds)  # noqa: E731
            if not self.process.projects:  # at t = 0 nothing is masked: the prediction is not looked at
                shapes = jax.eval_shape(predict)
                blank = lambda: jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), shapes)  # noqa: E731
                prediction = jax.lax.cond(t > 0, predict, blank)
            else:
                prediction = predict()
            return value.given(x, t, prediction, conds), prediction

        folded = jax.tree.map(fold, candidates)
        if pieces == 1:
            out = jax.tree.map(lambda leaf: leaf[None], evaluate(jax.tree.map(lambda leaf: leaf[0], folded)))
        else:
            out = jax.lax.map(evaluate, folded)
        return jax.tree.map(unfold, out)


def log_soft_weights(values: Array, temperature: Array) -> Array:
    """values / temperature with the largest at 0, [M, B]; NaN (infeasible) gets -inf, and a column without a number is uniform.

    Subtracting the maximum first keeps huge values (1e30, inf) from turning into NaN.
    """
    infeasible = jnp.isnan(values)
    values = jnp.where(infeasible, -jnp.inf, values)
    best = jnp.max(values, axis=0, keepdims=True)
    log_weights = jnp.where(values == best, 0.0, (values - best) / temperature)
    return jnp.where(infeasible & ~infeasible.all(axis=0), -jnp.inf, log_weights)


def svdd(
    process: Process,
    denoiser: Denoiser,
    value: Value,
    *,
    temperature: float = 1.0,
    candidates: int = 16,
    chunk: int | None = None,
    selection: str = "soft",
    select_initial: bool = False,
) -> Svdd:
    """Build SVDD, arXiv 2408.08252 algorithm 1: SVDD-PM with `values.posterior_mean`, SVDD-MC with `values.learned`.

    Args:
      process: with a law (eta > 0).
      denoiser: of the prior. Where the value is `posterior_mean` of this same object, each candidate costs one network
        call and the winner's prediction is the next step's: M calls a move, not M + 1.
      value: (x, t, cond) -> [B], in the reward's unit.
      temperature: tau in the reward's unit; the target is p_pre(x) exp(r(x)/tau)/Z.
      candidates: M.
      chunk: candidates evaluated at once (a divisor of M; all by default), to bound memory.
      selection: `soft`, or `argmax`: the best candidate, whatever the temperature.
      select_initial: also select x_T among M draws of the prior.

    Note:
      The released code takes the argmax at every step and does not read its temperature; that is
      selection="argmax". The paper's theorem selects the initial draw too, the released code does not.

    Raises:
      ValueError: for eta = 0, M < 1, a chunk that does not divide M, a temperature that is not positive.
    """
    checks.law(process, "svdd")
    candidates = checks.at_least("candidates", candidates, 1)
    chunk = candidates if chunk is None else checks.at_least("chunk", chunk, 1)
    if candidates % chunk:
        raise ValueError(f"chunk must divide the {candidates} candidates, got {chunk}")
    checks.one_of("selection", selection, SELECTIONS)
    denoiser = callable_pytree(denoiser, "a denoiser")
    shared = isinstance(value, PosteriorMean) and same_callable(value.denoiser, denoiser)
    return Svdd(
        process,
        denoiser,
        callable_pytree(value, "a value"),
        checks.positive("temperature", temperature),
        candidates,
        chunk,
        selection,
        select_initial,
        shared,
    )
