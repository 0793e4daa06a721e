"""The door for networks: Linen modules, NNX models and plain functions become denoisers; predictions become canonical.

A denoiser is a callable pytree (x, t, cond) -> E[x0 | x_t] for continuous leaves, or logits of p(x0 | x_t) for
discrete ones, in float32 whatever the network computes in, with its parameters inside. What a network predicts (eps,
v, score, velocity) is undone here, once, so that everything above works with x0; guidance that acts on the prediction
(classifier-free, clipping, thresholding) wraps a denoiser into a denoiser.

Samplers call a denoiser with one time t [], losses with a time per example [B]. A network that came through `from_linen`,
`from_nnx` or `from_function` always sees t [B]. `discrete_time` gives it the step's number in place of t.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from rgdiff import checks
from rgdiff.processes import along
from rgdiff.schedules import GaussianSchedule, level
from rgdiff.typing import Array, Cond, Denoiser, Params, State, callable_pytree, pytree, static

PREDICTIONS = ("x0", "eps", "v", "score", "velocity", "logits", "probabilities")


@pytree
class Network:
    """A function apply(params, rest, x, t, cond) with its parameters; returns float32. Bind the function once: a new one recompiles.

    `rest` is state that no tuner moves: BatchNorm's statistics, keys. t reaches the function as [B], unless it has an
    attribute `scalar_time` that is true: then as it comes, since one time for all examples costs it less.
    """

    params: Params
    apply: Callable[..., Any] = static()
    rest: Any = None
    scalar_time: bool = static(default=False)

    def __call__(self, x: State, t: Array, cond: Cond = None) -> State:
        out = self.apply(self.params, self.rest, x, t if self.scalar_time else per_row(t, x), cond)
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), out)


def per_row(t: Array | float, x: State) -> Array:
    """Return a time, [] or [B], as one per example of the state x: [B], float32 (integers stay integers)."""
    batch = jax.tree.leaves(x)[0].shape[0]
    t = jnp.asarray(t)
    if t.shape not in ((), (batch,)):
        raise ValueError(f"t must be one time, or one per example [{batch}], got shape {list(t.shape)}")
    t = t if jnp.issubdtype(t.dtype, jnp.integer) else t.astype(jnp.float32)
    return jnp.broadcast_to(t, (batch,))


SWITCHES = ("train", "training", "deterministic")  # arguments that networks have in a condition's place


def _takes_cond(function: Callable[..., Any], before: int) -> bool:
    """Whether a function has an argument for cond after `before` arguments, x and t."""
    try:
        arguments = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a builtin without a signature
        return True
    if any(a.kind is a.VAR_POSITIONAL for a in arguments):
        return True
    placed = [a for a in arguments if a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD)]
    return len(placed) > before + 2 and placed[before + 2].name not in SWITCHES


def _inputs(takes_cond: bool, x: State, t: Array, cond: Cond) -> tuple[Any, ...]:
    """Return what a network is called with: (x, t, cond), or (x, t) where it has no argument for cond."""
    if takes_cond:
        return x, t, cond
    if cond is not None:
        raise ValueError(
            "the network is called as (x, t) and takes no cond; pass cond=None, or give it a third argument"
        )
    return x, t


@dataclasses.dataclass(frozen=True)
class _FunctionApply:
    """Calls a plain function (params, x, t, cond)."""

    function: Callable[..., Any]
    takes_cond: bool

    def __call__(self, params: Params, rest: Any, x: State, t: Array, cond: Cond) -> State:
        return self.function(params, *_inputs(self.takes_cond, x, t, cond))


@dataclasses.dataclass(frozen=True)
class _LinenApply:
    """Calls a Linen module; equal for equal modules, so that rebuilding the same module does not recompile."""

    module: Any
    takes_cond: bool

    def __call__(self, params: Params, rest: Any, x: State, t: Array, cond: Cond) -> State:
        return self.module.apply({"params": params, **(rest or {})}, *_inputs(self.takes_cond, x, t, cond))


@dataclasses.dataclass(frozen=True)
class _NnxApply:
    """Calls a split NNX model, made anew from pure arrays at each call; its graph definition is the structure."""

    graph: Any
    takes_cond: bool

    def __call__(self, params: Params, rest: Any, x: State, t: Array, cond: Cond) -> State:
        from flax import nnx

        model = nnx.merge(self.graph, params, rest)
        held = lambda: jax.tree_util.tree_leaves_with_path(nnx.state(model, nnx.Not(nnx.Param)))  # noqa: E731
        before = held()
        out = model(*_inputs(self.takes_cond, x, t, cond))
        after = dict(held())
        if moved := [path for path, leaf in before if after.get(path) is not leaf]:
            name = jax.tree_util.keystr(moved[0], simple=True, separator="/").removesuffix("/value")
            raise ValueError(
                f"the NNX network changes its own {name!r} when it is called (Dropout, or BatchNorm in training); "
                "call model.eval() before it is handed over"
            )
        return out


def from_function(function: Callable[..., Any], params: Params) -> Network:
    """Take a plain function and its parameters as a network.

    Args:
      function: (params, x, t, cond) -> prediction, or (params, x, t); t is [B].
      params: any pytree.
    """
    if not callable(function):
        raise ValueError(f"a network must be a function (params, x, t, cond) -> prediction, got {function!r}")
    scalar_time = getattr(function, "scalar_time", False)
    return Network(params, _FunctionApply(function, _takes_cond(function, 1)), scalar_time=scalar_time)


def from_linen(module: Any, params: Params) -> Network:
    """Take a Flax Linen module as a network.

    Args:
      module: called as module.apply({"params": params}, x, t, cond), or (x, t) where it has no third argument; t is [B].
      params: what `module.init` returned, or its "params" alone. Other collections, e.g. "batch_stats", are handed to
        the module and never trained.
    """
    if not hasattr(module, "apply") or not hasattr(module, "init"):
        raise ValueError(
            f"from_linen expects a flax.linen.Module, got {type(module).__name__}; see from_nnx, from_function"
        )
    rest = None
    if isinstance(params, Mapping) and "params" in params:
        params, rest = params["params"], {name: held for name, held in params.items() if name != "params"} or None
    apply = _LinenApply(module, _takes_cond(type(module).__call__, 1))
    return Network(params, apply, rest, getattr(module, "scalar_time", False))


@pytree
class LinenModel:
    """A Linen module as a model: params -> network, what a tuner differentiates.

    `rest` holds the collections that are not trained, e.g. {"batch_stats": ...}.
    """

    module: Any = static()
    rest: Any = None

    def __call__(self, params: Params) -> Network:
        return dataclasses.replace(from_linen(self.module, params), rest=self.rest)


@pytree
class NnxModel:
    """An NNX module as a model: params -> network, what a tuner differentiates. Build it with `nnx_model`."""

    apply: Callable[..., Any] = static()
    rest: Any = None

    def __call__(self, params: Params) -> Network:
        return Network(params, self.apply, self.rest)


def nnx_model(module: Any) -> tuple[NnxModel, Params]:
    """Split a Flax NNX module into a model and its parameters, for tuners: `fit(tuner_of(model), ..., params)`.

    Args:
      module: called as module(x, t, cond), or (x, t) where it has no third argument; t is [B]. It must not change its own
        state when it is called: `module.eval()` first.

    Returns:
      The model (params -> network) and the arrays of its `nnx.Param`, nested dicts by attribute. Everything else (running
      statistics, keys, counts) stays in the model and is never trained. `nnx.update(module, params)` writes tuned ones back.
    """
    from flax import nnx

    if not isinstance(module, nnx.Module):
        raise ValueError(f"expected a flax.nnx.Module, got {type(module).__name__}; see from_linen, from_function")
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    apply = _NnxApply(graph, _takes_cond(type(module).__call__, 1))
    return NnxModel(apply, nnx.to_pure_dict(rest)), nnx.to_pure_dict(params)


def from_nnx(module: Any) -> Network:
    """Take a Flax NNX module as a network with its own parameters; see `nnx_model`, which tuners need."""
    model, params = nnx_model(module)
    return model(params)


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


@pytree
class LogOf:
    """Logits of a network that returns probabilities [B, ..., K]; -inf where one is 0."""

    network: Denoiser

    def __call__(self, x: State, t: Array, cond: Cond = None) -> State:
        safe_log = lambda p: jnp.where(p > 0, jnp.log(jnp.where(p > 0, p, 1.0)), -jnp.inf)  # noqa: E731
        return jax.tree.map(safe_log, self.network(x, t, cond))


def predicts(prediction: str, network: Denoiser, schedule: GaussianSchedule | None = None) -> Denoiser:
    """Make a network that predicts `prediction` (x0, eps, v, score, velocity, logits, probabilities) a denoiser.

    Args:
      prediction: of the network. For tokens: `logits` [B, ..., K], unnormalised and without one for the mask, or
        `probabilities` [B, ..., K], whose logarithm is taken. Probabilities given as logits are as good as uniform.
      network: (x, t, cond) -> prediction.
      schedule: of the process; not needed for x0 and tokens.

    Raises:
      ValueError: for an unknown prediction, a missing schedule, or velocity with another schedule than flow.

    Note:
      Where alpha is 0 (zero terminal SNR: the flow and cosine schedules at t = 1) eps and score say nothing of x0, and a grid
      that begins there is refused: begin it below, e.g. times = 0.99 * process.times(steps). x0, v and velocity do.
    """
    from rgdiff.schedules import Flow

    checks.one_of("prediction", prediction, PREDICTIONS)
    network = callable_pytree(network, "a network")
    if schedule is not None:
        checks.schedule(schedule, f"a network that predicts {prediction}")
    if prediction == "probabilities":
        return LogOf(network)
    if prediction in ("x0", "logits"):
        return network
    if schedule is None:
        raise ValueError(f"a network that predicts {prediction} needs its schedule; pass schedule=process.schedule")
    if prediction == "velocity" and not isinstance(schedule, Flow):
        raise ValueError(f"velocity belongs to the flow schedule, got {type(schedule).__name__}; use v, eps or score")
    return Predicts(network, schedule, prediction)


def needs_signal(method: Any, times: Array, params: Params = None) -> None:
    """Refuse a grid that begins where nothing of x0 is left for a network that predicts eps or the score.

    Args:
      method: a denoiser, or what holds one (a sampler); with `params` a model, which is looked at and not run.
      times: [T + 1].
    """
    found: list[tuple[str, GaussianSchedule]] = []

    def look(method: Any) -> None:
        for part in jax.tree.leaves(method, is_leaf=lambda part: isinstance(part, Predicts)):
            if isinstance(part, Predicts) and part.prediction in ("eps", "score"):
                found.append((part.prediction, part.schedule))

    if params is None:
        look(method)
    else:
        jax.eval_shape(lambda params: look(method(params)), checks.params(params))
    for prediction, schedule in found:
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((schedule, times))):
            continue
        levels = checks.log_snr(schedule, times)
        if not isinstance(levels, Tracer) and np.asarray(levels)[0] == -np.inf:
            raise ValueError(
                f"times begin at {float(times[0]):g}, where nothing of x0 is left (alpha = 0) and a prediction of {prediction} "
                "does not say what it is; begin below, e.g. 0.99 * process.times(steps), or take a network of v or x0"
            )


@pytree
class DiscreteTime:
    """Hands a network the number of its step in place of t. Build it with `discrete_time`."""

    network: Denoiser
    steps: int = static()

    def __call__(self, x: State, t: Array, cond: Cond = None) -> State:
        return self.network(x, level(per_row(t, x), self.steps), cond)


def discrete_time(network: Denoiser, steps: int) -> Denoiser:
    """Let a network of integer steps 0 ... T - 1 be called at times t in [0, 1]: it sees round(t T) - 1, int32 [B].

    t = (i + 1)/T is step i, as in `schedules.tabulated(alpha_bar)`: on each of its grids the network sees the step whose
    alpha_bar the process uses. A time between two steps goes to the nearest, one below 1/T to step 0.

    Args:
      network: (x, step, cond) -> prediction, step 0 next to the data.
      steps: T, of the chain that the network was trained on; 1,000 in DDPM.
    """
    return DiscreteTime(callable_pytree(network, "a network"), checks.at_least("steps", steps, 1))


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
    schedule = checks.schedule(schedule, "edm_preconditioned")
    return EdmPreconditioned(callable_pytree(network, "a network"), schedule, checks.positive("sigma_data", sigma_data))


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
        return jax.tree.map(lambda o: _between(o[batch:], o[:batch], self.scale), out)


def _between(a: Array, b: Array, weight: Array) -> Array:
    """a + weight (b - a); where one that has a weight is -inf (a token that is forbidden), -inf."""
    forbidden = ((a == -jnp.inf) & (weight != 1)) | ((b == -jnp.inf) & (weight != 0))
    a, b = (jnp.where(leaf == -jnp.inf, 0.0, leaf) for leaf in (a, b))
    return jnp.where(forbidden, -jnp.inf, a + weight * (b - a))


def classifier_free(denoiser: Denoiser, scale: float, null: Any) -> Denoiser:
    """Guide a conditional denoiser (arXiv 2207.12598): scale 1 is the conditional model, 0 the unconditional one.

    On predictions of x0 this equals the published combination of eps or scores (both are affine in x0). On logits it
    combines log-probabilities, p(x0|c)^scale p(x0)^(1 - scale) per token; a token that either of them forbids (logit -inf)
    is forbidden, but for the one whose exponent is 0.

    Args:
      null: the condition that means none, a scalar or a pytree like `cond` (for class labels: the number of classes).
    """
    return ClassifierFree(callable_pytree(denoiser, "a denoiser"), jnp.asarray(scale, jnp.float32), null)


@pytree
class Annealed:
    """Goes from one denoiser to another along the chain: d(x, t) + t^power (base(x, t) - d(x, t))."""

    denoiser: Denoiser
    base: Denoiser
    power: Array

    def __call__(self, x: State, t: Array, cond: Cond = None) -> State:
        out, base = self.denoiser(x, t, cond), self.base(x, t, cond)
        weight = jnp.asarray(t, jnp.float32) ** self.power
        return jax.tree.map(lambda d, b: _between(d, b, along(weight, d)), out, base)


def annealed(denoiser: Denoiser, base: Denoiser, power: float = 1.0) -> Denoiser:
    """Sample with the prior while noise is high and with the tuned denoiser at the end: annealed guidance (DRaFT+).

    The weight of the prior is t^power, all of it at t = 1; power 0 is the prior throughout, a large one the tuned
    denoiser. On predictions of x0 this equals the published interpolation of eps. Costs one call of each a step.
    """
    denoiser, base = (callable_pytree(one, "a denoiser") for one in (denoiser, base))
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
    return ClipX0(callable_pytree(denoiser, "a denoiser"), jnp.float32(low), jnp.float32(high))


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
    denoiser = callable_pytree(denoiser, "a denoiser")
    return DynamicThreshold(denoiser, jnp.float32(percentile), checks.positive("floor", floor))
