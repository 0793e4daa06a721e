"""One chain as a tuner sees it: which network calls keep their gradient, and the cost of each move against references.

`Chain` is a sampler for `rgdiff.samplers._loop.roll`; the carry holds the state and the index of the next network call.
Its `Plan` says which calls keep their gradient; the tuners combine the rewards and the costs.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from rgdiff import checks
from rgdiff.correctors import CorrectedProcess
from rgdiff.graphs import GraphProcess
from rgdiff.processes import GaussianProcess, ProductProcess, along
from rgdiff.samplers._ancestral import projection_kl
from rgdiff.samplers._projection import projecting
from rgdiff.typing import Array, Cond, Denoiser, Info, Key, Process, State, callable_pytree, pytree, static

PENALTIES = ("kl", "eps_mse")


def weighed_references(reference: Any, temperature: Any) -> tuple[tuple[Denoiser, ...], Array]:
    """Return references as a tuple and their weights [n], of one reference, several, or None."""
    plain = lambda value: isinstance(value, (list, tuple)) and not hasattr(value, "_fields")  # noqa: E731
    each = lambda value: [] if value is None else list(value) if plain(value) else [value]  # noqa: E731
    references, weights = each(reference), each(temperature)
    if len(references) != len(weights):
        raise ValueError(
            "a KL term needs both reference= (a denoiser) and temperature=, one for each; "
            f"got {len(references)} and {len(weights)}"
        )
    numbers = [checks.positive("temperature", weight, zero=True) for weight in weights]
    denoisers = tuple(callable_pytree(one, "a denoiser") for one in references)
    return denoisers, jnp.stack(numbers) if numbers else jnp.zeros(0)


def budget_of(kl_budget: Any, references: Any, weights: Any) -> Array | None:
    """Return the budget of the KL to the first reference, checked, or None."""
    if kl_budget is None:
        return None
    if not (references and (isinstance(weights, Tracer) or (np.asarray(weights) > 0).all())):
        raise ValueError(
            "kl_budget needs a KL term, whose weight it multiplies: give reference= and temperature= above 0"
        )
    return checks.positive("kl_budget", kl_budget)


def towards_budget(weights: Array, kl: Array, budget: Array, rate: Array) -> Array:
    """Return the weights of the next step, times exp(rate * (kl / budget - 1)), clipped to exp(+-rate): dual ascent."""
    excess = jnp.clip(kl / budget - 1.0, -1.0, 1.0)
    return weights * jnp.exp(rate * jnp.where(jnp.isfinite(excess), excess, 0.0))


class Plan(NamedTuple):
    """The gradients of one chain of n network calls.

    Args:
      live: [n] bool, the calls that keep their gradient; the noise that the others predict is a constant, and gradients pass them
        along the state alone.
      cut: the state before call `cut` is a constant.
      end: the call whose prediction of x0 ends the chain; n where the chain runs to its own end.
    """

    live: Array
    cut: Array
    end: Array


class ChainCarry(NamedTuple):
    """The state and the index of the next network call."""

    x: State
    call: Array


def hold(tree: Any, live: Array | bool) -> Any:
    """Return the tree where `live`, and a constant of the same value where not."""
    if isinstance(live, bool):
        return tree if live else jax.lax.stop_gradient(tree)
    return jax.tree.map(lambda leaf: jnp.where(live, leaf, jax.lax.stop_gradient(leaf)), tree)


def along_state(process: Process, x: State, t: Array, prediction: State) -> State:
    """Return E[x0 | x_t] with the derivative it has for constant noise: (x - sigma eps)/alpha moves with x by 1/alpha.

    The scores of a correction are constant too: a corrected state moves with the state.
    """
    if isinstance(process, CorrectedProcess):
        moved = lambda at, x: at + (x - jax.lax.stop_gradient(x))  # noqa: E731
        at = jax.tree.map(moved, prediction["at"], x["state"])
        return {"at": at, "prediction": along_state(process.process, at, t, prediction["prediction"])}
    if isinstance(process, (ProductProcess, GraphProcess)):
        return {name: along_state(part, x[name], t, prediction[name]) for name, part in process.parts.items()}
    if isinstance(process, GaussianProcess):
        alpha = along(process.schedule.alpha(t), x)
        some = alpha > 0  # at alpha = 0 the state says nothing of x0
        return prediction + (x - jax.lax.stop_gradient(x)) * jnp.where(some, 1 / jnp.where(some, alpha, 1.0), 0.0)
    return prediction


@pytree
class Chain:
    """Draws y ~ p(x_s | x_t), with the gradients of a plan.

    Args:
      process, denoiser: of the chain.
      references: denoisers to which the moves are compared.
      plan: None where all calls follow `live`; otherwise `live` is ignored.
      live: whether calls keep their gradient.
      pathwise: draw with `rsample`; otherwise states are constants and info has the `log_prob` [B] of every draw.
      early: the plan may end the chain early, with the prediction of x0 at its last state.
      input_gradient: keep the gradient of each call's predicted noise to its input.
      penalty: info["penalty"] [n, B] is the cost of every move to each reference: its KL in nats, or the mean
        squared difference of the predicted noise.
      penalize_dead: calls that are not live keep the gradient of their penalty, at constant states; else theirs is 0.
    """

    process: Process
    denoiser: Denoiser
    references: tuple[Denoiser, ...] = ()
    plan: Plan | None = None
    live: bool = static(default=True)
    pathwise: bool = static(default=True)
    input_gradient: bool = static(default=True)
    early: bool = static(default=False)
    penalty: str = static(default="kl")
    penalize_dead: bool = static(default=True)

    def init(self, key: Key, batch: int, t: Array, cond: Cond = None) -> ChainCarry:
        return ChainCarry(self.process.prior(batch).sample(key), jnp.int32(0))

    def step(self, key: Key, carry: ChainCarry, t: Array, s: Array, cond: Cond = None) -> tuple[ChainCarry, Info]:
        x, call = carry
        if self.plan is None:
            y, info = self._move(key, x, t, s, cond, self.live)
            return ChainCarry(y, call + 1), info
        cut, end, live = self.plan.cut, self.plan.end, self.plan.live[call]
        x = hold(x, call != cut)
        if self.references and self.penalize_dead:
            go = lambda x: self._move(key, x, t, s, cond, live)  # noqa: E731
        else:
            go = lambda x: jax.lax.cond(  # noqa: E731
                live,
                lambda x: self._move(key, x, t, s, cond, True),
                lambda x: self._move(key, x, t, s, cond, False),
                x,
            )
        if self.early:
            nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(go, x)[1])
            y, info = jax.lax.cond(call < end, go, lambda x: (x, nothing), x)
        else:
            y, info = go(x)
        return ChainCarry(y, call + 1), info

    def final(self, carry: ChainCarry, t: Array, cond: Cond = None) -> tuple[State, Info]:
        """Project to data where the process projects or the plan may end the chain early, else drop the mask.

        The projection has a penalty too (`samplers.projection_kl`), or a tuner would change the last call for free.
        """
        x, live = carry.x, self.live
        if self.plan is not None:
            end = jnp.minimum(self.plan.end, len(self.plan.live) - 1)
            x, live = hold(x, end != self.plan.cut), self.plan.live[end]
        if not self.early and not self.process.projects:
            return self.process.finalize(x, t, None), self._priced(jnp.zeros((len(self.references), _rows(x))))
        prediction = self._predict(self.denoiser, x, t, cond, live)
        project = self.process.finalize if self.process.projects else self.process.mean
        x0 = project(x, t, self._seen(x, t, prediction, live))

        def kl(prediction: State, other: State, at: State) -> Array:
            return projection_kl(self.process, at, t, prediction, other)

        return x0, self._priced(self._penalties(kl, x, t, cond, prediction, live) if self.references else None)

    def merged(self) -> Chain | None:
        """Return the chain whose projection is one more move (`samplers._projection`); None where it cannot be."""
        process = projecting(self.process) if self.pathwise and not self.early else None
        return None if process is None else dataclasses.replace(self, process=process)

    def _move(
        self, key: Key, x: State, t: Array, s: Array, cond: Cond, live: Array | bool
    ) -> tuple[State, dict[str, Array]]:
        """Return the next state, and the move's penalties and log-probability."""
        x = hold(x, self.pathwise)
        prediction = self._predict(self.denoiser, x, t, cond, live)
        kernel = self.process.reverse(x, t, s, self._seen(x, t, prediction, live))
        constant = not self.pathwise or (self.plan is None and not self.live)
        y = kernel.sample(key) if constant else kernel.rsample(key)
        info = {} if self.pathwise else {"log_prob": kernel.log_prob(y)}
        if not self.references:
            return y, info

        def kl(prediction: State, other: State, at: State) -> Array:
            return self.process.reverse(at, t, s, prediction).kl(self.process.reverse(at, t, s, other))

        return y, info | self._priced(self._penalties(kl, x, t, cond, prediction, live))

    def _predict(self, denoiser: Denoiser, x: State, t: Array, cond: Cond, live: Array | bool) -> State:
        if live is False and not (self.references and self.penalize_dead):
            denoiser = jax.lax.stop_gradient(denoiser)
        return denoiser(hold(hold(x, self.input_gradient), live), t, cond)

    def _seen(self, x: State, t: Array, prediction: State, live: Array | bool) -> State:
        """Return the prediction as the chain differentiates it: where its input has no gradient, its *noise* is held constant."""
        if live is True and self.input_gradient:
            return prediction
        if self.plan is None and live is False:  # the head: constants throughout
            return hold(prediction, False)
        held = along_state(self.process, x, t, hold(prediction, live))
        if live is True or live is False or not self.input_gradient:
            return held
        return jax.tree.map(lambda a, b: jnp.where(live, a, b), prediction, held)

    def _penalties(self, kl: Any, x: State, t: Array, cond: Cond, prediction: State, live: Array | bool) -> Array:
        """Return penalties [n, B]. At a live call the state keeps its gradient; at another one it is a constant, and the prediction has a
        gradient if `penalize_dead`.
        """
        at = hold(x, live)
        if not self.penalize_dead:
            if live is False:  # no work for what does not count
                return jnp.zeros((len(self.references), _rows(x)))
            prediction = hold(prediction, live)

        def eps_mse(prediction: Array, other: Array, at: Array) -> Array:
            difference = self.process.eps(at, t, prediction) - self.process.eps(at, t, other)  # type: ignore[attr-defined]
            return jnp.mean(difference.reshape(difference.shape[0], -1) ** 2, -1)

        cost = kl if self.penalty == "kl" else eps_mse
        others = (self._predict(reference, x, t, cond, live) for reference in self.references)
        return jnp.stack([cost(prediction, other, at) for other in others])

    def _priced(self, penalty: Array | None) -> dict[str, Array]:
        return {} if penalty is None or not self.references else {"penalty": penalty}


def _rows(x: State) -> int:
    return jax.tree.leaves(x)[0].shape[0]
