"""Values: callables (x_t, t, cond) -> [B], the expected reward to go in the reward's own unit.

`posterior_mean` turns a reward and a denoiser into a value without training, `learned` takes a network trained by
`rgdiff.tuners.value_regression`. Methods that already hold the denoiser's prediction pass it on (`given`), so that no
network is called twice with the same input.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rgdiff import checks
from rgdiff.processes import MaskedProcess
from rgdiff.typing import Array, Cond, Denoiser, Process, Reward, State, Value, callable_pytree, pytree, static


@pytree
class PosteriorMean:
    """v(x_t) = r(E[x0 | x_t]). Build it with `posterior_mean`."""

    reward: Reward
    process: Process
    denoiser: Denoiser
    mode: bool = static(default=False)

    def __call__(self, x: State, t: Array, cond: Cond = None) -> Array:
        return self.given(x, t, self.denoiser(x, t, cond), cond)

    def given(self, x: State, t: Array, prediction: State, cond: Cond = None) -> Array:
        """Return the value when the denoiser's prediction at (x, t) is already known: no network call."""
        if self.mode:
            prediction = jax.tree.map(_sharpen, prediction)
        return self.reward(self.process.mean(x, t, prediction), cond)


def _sharpen(logits: Array) -> Array:
    """Logits whose softmax is the one-hot argmax."""
    return jnp.where(jax.nn.one_hot(jnp.argmax(logits, -1), logits.shape[-1], dtype=bool), 0.0, -jnp.inf)


def posterior_mean(reward: Reward, process: Process, denoiser: Denoiser, *, plug_in: str = "mean") -> PosteriorMean:
    """Evaluate the reward at the posterior mean of x0 (SVDD-PM, arXiv 2408.08252; DPS, arXiv 2209.14687).

    Args:
      plug_in: `mean`, or `mode` for discrete states: the most probable token at each masked position in place of a
        point of the simplex, which is what the released SVDD code does.
    """
    checks.one_of("plug_in", plug_in, ("mean", "mode"))
    if plug_in == "mode" and not isinstance(process, MaskedProcess):
        raise ValueError("plug_in='mode' is for masked processes; a Gaussian posterior mean needs plug_in='mean'")
    return PosteriorMean(
        callable_pytree(reward, "a reward"), process, callable_pytree(denoiser, "a denoiser"), plug_in == "mode"
    )


@pytree
class Learned:
    """A network (x_t, t, cond) -> [B] or [B, 1] as a value. Build it with `learned`."""

    network: Denoiser

    def __call__(self, x: State, t: Array, cond: Cond = None) -> Array:
        out = self.network(x, t, cond)
        return out.reshape(out.shape[0])


@pytree
class EndsAtReward:
    """The value for t > 0 and the reward itself at t = 0, where a masked chain ends; only one of the two is called."""

    value: Value
    reward: Reward
    process: Process

    def __call__(self, x: State, t: Array, cond: Cond = None) -> Array:
        at_end = lambda: self.reward(self.process.finalize(x, t, None), cond)  # noqa: E731
        return jax.lax.cond(t > 0, lambda: self.value(x, t, cond), at_end)


def learned(network: Denoiser, reward: Reward | None = None, process: Process | None = None) -> Value:
    """Take a network with one output per example as a value (SVDD-MC).

    Args:
      reward, process: for a masked process, whose chain reaches t = 0: the last selection is then by the reward itself.
    """
    value = Learned(callable_pytree(network, "a value network"))
    if reward is None:
        return value
    if process is None or process.projects:
        raise ValueError(
            "learned(network, reward=...) is for masked processes and needs process=; leave reward out otherwise"
        )
    return EndsAtReward(value, callable_pytree(reward, "a reward"), process)
