"""The door for networks: Linen modules, NNX models and plain functions become denoisers; predictions become canonical.

A denoiser is a callable pytree (x, t, cond) -> E[x0 | x_t] for continuous leaves, or logits of p(x0 | x_t) for
discrete ones, in float32 whatever the network computes in, with its parameters inside. What a network predicts (eps,
v, score, velocity) is undone here, once, so that everything above works with x0; guidance that acts on the prediction
(classifier-free, clipping, thresholding) wraps a denoiser into a denoiser.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rgdiff import checks
from rgdiff.processes import along
from rgdiff.schedules import GaussianSchedule
from rgdiff.typing import Array, Cond, Denoiser, Params, State, pytree, static

PREDICTIONS = ("x0", "eps", "v", "score", "velocity", "logits")


@pytree
class Network:
    """A pure function apply(params, x, t, cond) with its parameters; returns float32. Bind the function once: a new one recompiles."""

    params: Params
    apply: Callable[..., Any] = static()

    def __call__(self, x: State, t: Array, cond: Cond = None) -> State:
        out = self.apply(self.params, x, t, cond)
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), out)


@dataclasses.dataclass(frozen=True)
class _LinenApply:
    """Calls a Linen module; equal for equal modules, so that rebuilding the same module does not recompile."""

    module: Any

    def __call__(self, params: Params, x: State, t: Array, cond: Cond) -> State:
        return self.module.apply({"params": params}, x, t, cond)


@dataclasses.dataclass(frozen=True)
class _NnxApply:
    """Calls a split NNX model; its graph definition is the structure."""

    graph: Any

    def __call__(self, params: Params, x: State, t: Array, cond: Cond) -> State:
        from flax import nnx

        return nnx.merge(self.graph, params)(x, t, cond)


def from_function(function: Callable[..., Any], params: Params) -> Network:
    """Take a plain function(params, x, t, cond) and its parameters as a network."""
    if not callable(function):
        raise ValueError(f"a network must be a function (params, x, t, cond) -> prediction, got {function!r}")
    return Network(params, function)


def from_linen(module: Any, params: Params) -> Network:
    """Take a Flax Linen module, called as module.apply({"params": params}, x, t, cond), as a network."""
    if not hasattr(module, "apply") or not hasattr(module, "init"):
        raise ValueError(
            f"from_linen expects a flax.linen.Module, got {type(module).__name__}; see from_nnx, from_function"
        )
    if isinstance(params, dict) and set(params) == {"params"}:
        params = params["params"]
    return Network(params, _LinenApply(module))


@pytree
class LinenModel:
    """A Linen module as a model: params -> network, what a tuner differentiates."""

    module: Any = static()

    def __call__(self, params: Params) -> Network:
        return from_linen(self.module, params)


def from_nnx(model: Any) -> Network:
    """Take a Flax NNX model, called as model(x, t, cond), as a network, through split and merge only."""
    from flax import nnx

    if not isinstance(model, nnx.Module):
        raise ValueError(
            f"from_nnx expects a flax.nnx.Module, got {type(model).__name__}; see from_linen, from_function"
        )
    graph, params = nnx.split(model)
    return Network(params, _NnxApply(graph))


def to_x0(prediction: str, schedule: GaussianSchedule, x: Array, t: Array, out: Array) -> Array:
    """Turn a network's output into E[x0 | x_t].

    eps: (x - sigma eps) / alpha; v = alpha eps - sigma x0 (arXiv 2202.00512): alpha x - sigma v, over alpha^2 + sigma^2;
    score: (x + sigma^2 score) / alpha; velocity = d x_t / dt of the flow schedule, eps - x0: x - t velocity.
    """
    out = checks.prediction(out, x, "a network")
    alpha, sigma = along(schedule.alpha(t), x), along(schedule.sigma(t), x)
    if prediction == "x0":
        return out
    if prediction == "eps":
        return (x - sigma * out) / alpha
    if prediction == "v":
        return (alpha * x - sigma * out) / (alpha**2 + sigma**2)
    if prediction == "score":
        return (x + sigma**2 * out) / alpha
    return x - sigma * out  # velocity, with alpha + sigma = 1


@pytree
class Predicts:
    """A network that predicts `prediction` becomes a denoiser of x0. Build it with `predicts`."""

    network: Denoiser
    schedule: GaussianSchedule
    prediction: str = static()

    def __call__(self, x: Array, t: Array, cond: Cond = None) -> Array:
        return to_x0(self.prediction, self.schedule, x, t, self.network(x, t, cond))


def predicts(prediction: str, network: Denoiser, schedule: GaussianSchedule | None = None) -> Denoiser:
    """Make a network that predicts `prediction` (x0, eps, v, score, velocity, logits) a denoiser.

    Raises:
      ValueError: for an unknown prediction, a missing schedule, or velocity with another schedule than flow.

    Note:
      Under the flow schedule alpha is 0 at t = 1, where eps and score say nothing of x0: begin the grid below 1, e.g.
      times = 0.99 * process.times(steps).
    """
    from rgdiff.schedules import Flow

    checks.one_of("prediction", prediction, PREDICTIONS)
    if prediction in ("x0", "logits"):
        return network
    if schedule is None:
        raise ValueError(f"a network that predicts {prediction} needs its schedule; pass schedule=process.schedule")
    if prediction == "velocity" and not isinstance(schedule, Flow):
        raise ValueError(f"velocity belongs to the flow schedule, got {type(schedule).__name__}; use v, eps or score")
    return Predicts(network, schedule, prediction)


@pytree
class EdmPreconditioned:
    """EDM's preconditioning (arXiv 2206.00364, table 1): x0 = c_skip x + c_out F(c_in x, t). The network sees t, not log sigma."""

    network: Denoiser
    schedule: GaussianSchedule
    sigma_data: Array

    def __call__(self, x: Array, t: Array, cond: Cond = None) -> Array:
        sigma = along(self.schedule.sigma(t), x)
        total = sigma**2 + self.sigma_data**2
        out = checks.prediction(self.network(x * jax.lax.rsqrt(total), t, cond), x, "a network")
        return self.sigma_data**2 / total * x + sigma * self.sigma_data * jax.lax.rsqrt(total) * out


def edm_preconditioned(network: Denoiser, schedule: GaussianSchedule, *, sigma_data: float = 0.5) -> Denoiser:
    """Precondition a network for a variance-exploding schedule; `sigma_data` is the data's standard deviation."""
    return EdmPreconditioned(network, schedule, checks.positive("sigma_data", sigma_data))


@pytree
class ClassifierFree:
    """Classifier-free guidance: d(x, null) + scale (d(x, cond) - d(x, null)), both in one network call of 2B rows."""

    denoiser: Denoiser
    scale: Array
    null: Any

    def __call__(self, x: State, t: Array, cond: Cond = None) -> State:
        if cond is None:
            raise ValueError("classifier-free guidance needs cond (class labels [B], or a pytree of [B, ...])")
        batch = jax.tree.leaves(x)[0].shape[0]
        null = jax.tree.map(lambda c, n: jnp.broadcast_to(jnp.asarray(n, c.dtype), c.shape), cond, self.null)
        twice = lambda a, b: jax.tree.map(lambda u, w: jnp.concatenate([u, w]), a, b)  # noqa: E731
        t = jnp.broadcast_to(jnp.asarray(t, jnp.float32), (batch,))
        out = self.denoiser(twice(x, x), jnp.concatenate([t, t]), twice(cond, null))
        return jax.tree.map(lambda o: o[batch:] + self.scale * (o[:batch] - o[batch:]), out)


def classifier_free(denoiser: Denoiser, scale: float, null: Any) -> Denoiser:
    """Guide a conditional denoiser (arXiv 2207.12598): scale 1 is the conditional model, 0 the unconditional one.

    On predictions of x0 this equals the published combination of eps or scores (both are affine in x0). On logits it
    combines log-probabilities, p(x0|c)^scale p(x0)^(1 - scale) per token.

    Args:
      null: the condition that means none, a scalar or a pytree like `cond` (for class labels: the number of classes).
    """
    return ClassifierFree(denoiser, jnp.asarray(scale, jnp.float32), null)


@pytree
class Annealed:
    """Goes from one denoiser to another along the chain: d(x, t) + t^power (base(x, t) - d(x, t))."""

    denoiser: Denoiser
    base: Denoiser
    power: Array

    def __call__(self, x: State, t: Array, cond: Cond = None) -> State:
        out, base = self.denoiser(x, t, cond), self.base(x, t, cond)
        return jax.tree.map(lambda d, b: d + along(jnp.asarray(t, jnp.float32) ** self.power, d) * (b - d), out, base)


def annealed(denoiser: Denoiser, base: Denoiser, power: float = 1.0) -> Denoiser:
    """Sample with the prior while noise is high and with the tuned denoiser at the end: annealed guidance (DRaFT+).

    The weight of the prior is t^power, all of it at t = 1; power 0 is the prior throughout, a large one the tuned
    denoiser. On predictions of x0 this equals the published interpolation of eps. Costs one call of each a step.
    """
    return Annealed(denoiser, base, checks.positive("power", power, zero=True))


@pytree
class ClipX0:
    """Clip the prediction of x0 to [low, high]."""

    denoiser: Denoiser
    low: Array
    high: Array

    def __call__(self, x: Array, t: Array, cond: Cond = None) -> Array:
        return jnp.clip(self.denoiser(x, t, cond), self.low, self.high)


def clip_x0(denoiser: Denoiser, low: float = -1.0, high: float = 1.0) -> Denoiser:
    """Clip predictions of x0 to the range of the data."""
    if not low < high:
        raise ValueError(f"clip_x0 expects low < high, got {low} and {high}")
    return ClipX0(denoiser, jnp.float32(low), jnp.float32(high))


@pytree
class DynamicThreshold:
    """Imagen's dynamic thresholding (arXiv 2205.11487, §2.3): clip to the percentile of |x0|, then divide by it."""

    denoiser: Denoiser
    percentile: Array
    floor: Array

    def __call__(self, x: Array, t: Array, cond: Cond = None) -> Array:
        x0 = self.denoiser(x, t, cond)
        size = jnp.quantile(jnp.abs(x0).reshape(x0.shape[0], -1), self.percentile / 100, axis=-1)
        size = along(jnp.maximum(size, self.floor), x0)
        return jnp.clip(x0, -size, size) * (self.floor / size)


def dynamic_threshold(denoiser: Denoiser, percentile: float = 99.5, *, floor: float = 1.0) -> Denoiser:
    """Threshold predictions of x0 per example to the range [-floor, floor]; `percentile` is in percent."""
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile must be in (0, 100], got {percentile}")
    return DynamicThreshold(denoiser, jnp.float32(percentile), checks.positive("floor", floor))
