"""Denoisers of networks: Linen modules, NNX models and plain functions become denoisers, and their predictions become x0.

A denoiser is a callable pytree (x, t, cond) -> E[x0 | x_t] for continuous leaves, or logits of p(x0 | x_t) for
discrete ones, in float32 whatever the network computes in, with its parameters inside. Predictions of eps, v, score or
velocity are converted here, once, so that the rest of the library works with x0; guidance that acts on the prediction
(classifier-free, clipping, thresholding) maps a denoiser to a denoiser.

Samplers call a denoiser with one time t [], losses with a time per example [B]. A network made by `from_linen`,
`from_nnx` or `from_function` is always called with t [B]. `discrete_time` passes it the step's number in place of t.
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
from rgdiff.processes import GaussianProcess, along
from rgdiff.schedules import GaussianSchedule, level
from rgdiff.shards import in_turn
from rgdiff.typing import Array, Cond, Denoiser, DenoiserLike, Params, Process, State, callable_pytree, pytree, static

SIGNAL = 0.1  # the least alpha / sigma at which E[x0 | x_t] of a network that predicts eps or the score steers
PREDICTIONS = ("x0", "eps", "v", "score", "velocity", "logits", "probabilities")


@pytree
class Network:
    """A function apply(params, rest, x, t, cond) with its parameters; returns float32. Create the function once: a new one recompiles.

    `rest` is state that no tuner updates: BatchNorm's statistics, keys. t reaches the function as [B], unless it has a true
    attribute `scalar_time`: then t is passed as it comes, since one time for all examples is cheaper.
    """

    params: Params
    apply: Callable[..., Any] = static()
    rest: Any = None
    scalar_time: bool = static(default=False)

    def __call__(self, x: State, t: Array, cond: Cond = None) -> State:
        out = self.apply(self.params, self.rest, x, t if self.scalar_time else per_row(t, x), cond)
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), out)


def per_row(t: Array | float, x: State) -> Array:
    """Return a time as one per example of the state: [B], float32 (integers stay integers).

    Args:
      t: [] or [B].
      x: the state, leaves [B, ...].

    Returns:
      [B].

    Raises:
      ValueError: for another shape.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> print(rgdiff.denoisers.per_row(0.5, jnp.zeros((3, 2))))
      [0.5 0.5 0.5]
    """
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
    """Make a network of a plain function and its parameters.

    Args:
      function: (params, x, t, cond) -> prediction, or (params, x, t); t is [B].
      params: any pytree.

    Returns:
      The network, (x, t, cond) -> prediction.

    Raises:
      ValueError: for something that cannot be called.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> network = rgdiff.denoisers.from_function(lambda params, x, t: params * x, jnp.float32(3.0))
      >>> print(network(jnp.ones((1, 2)), 0.5))
      [[3. 3.]]
    """
    if not callable(function):
        raise ValueError(f"a network must be a function (params, x, t, cond) -> prediction, got {function!r}")
    scalar_time = getattr(function, "scalar_time", False)
    return Network(params, _FunctionApply(function, _takes_cond(function, 1)), scalar_time=scalar_time)


def from_linen(module: Any, params: Params) -> Network:
    """Make a network of a Flax Linen module and its parameters.

    Args:
      module: called as module.apply({"params": params}, x, t, cond), or (x, t) where it has no third argument; t is [B].
      params: what `module.init` returned, or its "params" alone. Other collections, e.g. "batch_stats", are passed to
        the module and never trained.

    Returns:
      The network, (x, t, cond) -> prediction.

    Raises:
      ValueError: for something that is not a Linen module.

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> module, x = rgdiff.nets.MLP(features=(8,)), jnp.ones((1, 2))
      >>> params = module.init(jax.random.key(0), x, jnp.zeros(1))
      >>> print(rgdiff.denoisers.from_linen(module, params)(x, 0.5))  # the last layer is zero at first
      [[0. 0.]]
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
    """A Linen module as a model: params -> network. A tuner differentiates it in the parameters.

    Args:
      module: as for `from_linen`.
      rest: the collections that are not trained, e.g. {"batch_stats": ...}; None if there are none.

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> module, x = rgdiff.nets.MLP(features=(8,)), jnp.ones((1, 2))
      >>> params = module.init(jax.random.key(0), x, jnp.zeros(1))["params"]
      >>> rgdiff.denoisers.LinenModel(module)(params)(x, 0.5).shape
      (1, 2)
    """

    module: Any = static()
    rest: Any = None

    def __call__(self, params: Params) -> Network:
        return dataclasses.replace(from_linen(self.module, params), rest=self.rest)


@pytree
class NnxModel:
    """An NNX module as a model: params -> network. A tuner differentiates it in the parameters. Build it with `nnx_model`."""

    apply: Callable[..., Any] = static()
    rest: Any = None

    def __call__(self, params: Params) -> Network:
        return Network(params, self.apply, self.rest)


def nnx_model(module: Any) -> tuple[NnxModel, Params]:
    """Split a Flax NNX module into a model and its parameters, for tuners: `fit(tuner_of(model), ..., params)`.

    Args:
      module: called as module(x, t, cond), or (x, t) where it has no third argument; t is [B]. It must not change its own
        state when it is called: call `module.eval()` first.

    Returns:
      The model (params -> network) and the arrays of its `nnx.Param`, nested dicts by attribute. Everything else (running
      statistics, keys, counts) stays in the model and is never trained. `nnx.update(module, params)` writes tuned ones back.

    Raises:
      ValueError: for something that is not an NNX module; at a call, for a module that changes its own state.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> from flax import nnx
      >>> class Double(nnx.Module):
      ...     def __init__(self): self.weight = nnx.Param(jnp.float32(2.0))
      ...     def __call__(self, x, t): return self.weight[...] * x
      >>> model, params = rgdiff.denoisers.nnx_model(Double())
      >>> print(model(params)(jnp.ones((1, 2)), 0.5))
      [[2. 2.]]
    """
    from flax import nnx

    if not isinstance(module, nnx.Module):
        raise ValueError(f"expected a flax.nnx.Module, got {type(module).__name__}; see from_linen, from_function")
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    apply = _NnxApply(graph, _takes_cond(type(module).__call__, 1))
    return NnxModel(apply, nnx.to_pure_dict(rest)), nnx.to_pure_dict(params)


def from_nnx(module: Any) -> Network:
    """Make a network of a Flax NNX module with its own parameters. Tuners need `nnx_model` instead.

    Args:
      module: as for `nnx_model`.

    Returns:
      The network, (x, t, cond) -> prediction.

    Raises:
      ValueError: for something that is not an NNX module.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> from flax import nnx
      >>> class Double(nnx.Module):
      ...     def __init__(self): self.weight = nnx.Param(jnp.float32(2.0))
      ...     def __call__(self, x, t): return self.weight[...] * x
      >>> print(rgdiff.denoisers.from_nnx(Double())(jnp.ones((1, 2)), 0.5))
      [[2. 2.]]
    """
    model, params = nnx_model(module)
    return model(params)


def to_x0(prediction: str, schedule: GaussianSchedule, x: Array, t: Array, out: Array) -> Array:
    """Convert a network's output into E[x0 | x_t].

    eps: (x - sigma eps) / alpha; v = alpha eps - sigma x0 (arXiv 2202.00512): alpha x - sigma v, over alpha^2 + sigma^2;
    score: (x + sigma^2 score) / alpha; velocity = d x_t / dt of the flow schedule, eps - x0: x - t velocity.

    Args:
      prediction: x0, eps, v, score or velocity.
      schedule: of the process.
      x: the state x_t [B, ...].
      t: [] or [B].
      out: the network's output [B, ...].

    Returns:
      E[x0 | x_t], [B, ...].

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> x0, eps, schedule = jnp.array([[2.0]]), jnp.array([[1.0]]), rgdiff.schedules.flow()
      >>> x, t = 0.75 * x0 + 0.25 * eps, jnp.float32(0.25)
      >>> print(rgdiff.denoisers.to_x0("eps", schedule, x, t, eps), rgdiff.denoisers.to_x0("velocity", schedule, x, t, eps - x0))
      [[2.]] [[2.]]
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
    """A denoiser of x0 made of a network that predicts `prediction`. Build it with `predicts`."""

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


def predicts(prediction: str, network: DenoiserLike, schedule: GaussianSchedule | None = None) -> Denoiser:
    """Make a denoiser of a network that predicts x0, eps, v, score, velocity, logits or probabilities.

    Args:
      prediction: the name of the network's output. For tokens: `logits` [B, ..., K], unnormalised and without one for the mask,
        or `probabilities` [B, ..., K], whose logarithm is taken. Probabilities passed as logits are close to uniform.
      network: (x, t, cond) -> prediction.
      schedule: of the process; not needed for x0 and tokens.

    Returns:
      The denoiser, (x, t, cond) -> E[x0 | x_t] [B, ...], or logits [B, ..., K] for tokens.

    Raises:
      ValueError: for an unknown prediction, a missing schedule, or velocity with another schedule than flow.

    Note:
      Where alpha is 0 (zero terminal SNR: the flow and cosine schedules at t = 1) eps and the score do not determine x0, and a
      grid that begins there is refused: begin it below, e.g. times = 0.99 * process.times(steps). x0, v and velocity do.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> network = lambda x, t, cond: jnp.ones_like(x)  # eps = 1
      >>> denoiser = rgdiff.denoisers.predicts("eps", network, rgdiff.schedules.flow())
      >>> print(denoiser(jnp.array([[1.0]]), jnp.float32(0.5)))  # (1 - 0.5 eps) / 0.5
      [[1.]]
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


def _of_noise(method: Any) -> list[Predicts]:
    """Return the denoisers inside a method whose network predicts eps or the score."""
    parts = jax.tree.leaves(method, is_leaf=lambda part: isinstance(part, Predicts))
    return [part for part in parts if isinstance(part, Predicts) and part.prediction in ("eps", "score")]


def says_enough(method: Any, process: Process, t: Array) -> Array:
    """Return whether x_t says enough of x0 for a method to be steered by a network's prediction of it.

    It does where alpha_t >= sigma_t / 10, and everywhere unless a network inside the method predicts eps or the score. Such a
    network's E[x0 | x_t] = (x_t - sigma_t eps) / alpha_t contains its error times sigma_t / alpha_t, 156 at the first of DDPM's
    steps; a value is then mostly error, and its gradient diverges. Little is lost by not steering there: the KL of two laws of x_t is
    at most (alpha_t / sigma_t)^2 / 2 times the squared Wasserstein distance of their laws of x0, 0.005 nats for a distance of 1.

    Args:
      method: a denoiser, or an object that holds one (a value).
      process: of the chain; only a Gaussian one is looked at.
      t: [] or [B].

    Returns:
      bool, the shape of t.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.linear_vp(), (1,))
      >>> network = lambda x, t, cond: x
      >>> of_eps, of_v = (rgdiff.denoisers.predicts(name, network, process.schedule) for name in ("eps", "v"))
      >>> t = jnp.array([1.0, 0.5])
      >>> print(rgdiff.denoisers.says_enough(of_eps, process, t), rgdiff.denoisers.says_enough(of_v, process, t))
      [False  True] [ True  True]
    """
    if not isinstance(process, GaussianProcess) or not _of_noise(method):
        return jnp.ones(jnp.shape(t), bool)
    return process.schedule.alpha(t) >= SIGNAL * process.schedule.sigma(t)


def needs_signal(method: Any, times: Array, params: Params = None) -> None:
    """Refuse a grid that begins at alpha = 0 for a network that predicts eps or the score, which do not determine x0 there.

    Args:
      method: a denoiser, or an object that holds one (a sampler); with `params` a model, which is traced and not run.
      times: [T + 1].
      params: of the model; None for a denoiser or a sampler.

    Raises:
      ValueError: for such a grid.
    """
    found: list[Predicts] = []
    if params is None:
        found += _of_noise(method)
    else:
        jax.eval_shape(lambda params: found.extend(_of_noise(method(params))), checks.params(params))
    for prediction, schedule in ((part.prediction, part.schedule) for part in found):
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
    """Passes the number of its step to a network in place of t. Build it with `discrete_time`."""

    network: Denoiser
    steps: int = static()

    def __call__(self, x: State, t: Array, cond: Cond = None) -> State:
        return self.network(x, level(per_row(t, x), self.steps), cond)


def discrete_time(network: DenoiserLike, steps: int) -> Denoiser:
    """Let a network of integer steps 0 ... T - 1 be called at times t in [0, 1]: it gets round(t T) - 1, int32 [B].

    t = (i + 1)/T is step i, as in `schedules.tabulated(alpha_bar)`: on each of its grids the network gets the step whose
    alpha_bar the process uses. A time between two steps is rounded to the nearest, one below 1/T to step 0.

    Args:
      network: (x, step, cond) -> prediction, step 0 next to the data.
      steps: T, of the chain that the network was trained on; 1,000 in DDPM.

    Returns:
      The network, (x, t, cond) -> prediction.

    Raises:
      ValueError: for fewer than one step.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> network = rgdiff.denoisers.discrete_time(lambda x, step, cond: step, 1000)
      >>> print(network(jnp.zeros((2, 1)), 1.0), network(jnp.zeros((2, 1)), 0.001))
      [999 999] [0 0]
    """
    return DiscreteTime(callable_pytree(network, "a network"), checks.at_least("steps", steps, 1))


@pytree
class EdmPreconditioned:
    """EDM's preconditioning: x0 = c_skip x + c_out F(c_in x, t). Build it with `edm_preconditioned`."""

    network: Denoiser
    schedule: GaussianSchedule
    sigma_data: Array

    def __call__(self, x: Array, t: Array, cond: Cond = None) -> Array:
        sigma = along(self.schedule.sigma(t), x)
        total = sigma**2 + self.sigma_data**2
        out = checks.prediction(self.network(x * jax.lax.rsqrt(total), t, cond), x, "a network")
        return self.sigma_data**2 / total * x + sigma * self.sigma_data * jax.lax.rsqrt(total) * out


def edm_preconditioned(network: DenoiserLike, schedule: GaussianSchedule, *, sigma_data: float = 0.5) -> Denoiser:
    """Precondition a network F for a variance-exploding schedule: x0 = c_skip x + c_out F(c_in x, t) (EDM, arXiv 2206.00364, table 1).

    c_skip = s^2 / (sigma^2 + s^2),  c_out = sigma s / sqrt(sigma^2 + s^2),  c_in = 1 / sqrt(sigma^2 + s^2),  s = sigma_data.

    Args:
      network: F, (x, t, cond) -> [B, ...]. It gets t and not log sigma.
      schedule: of the process, with alpha = 1.
      sigma_data: standard deviation of the data, in its unit.

    Returns:
      The denoiser, (x, t, cond) -> E[x0 | x_t] [B, ...].

    Raises:
      ValueError: for a process in place of the schedule, or sigma_data <= 0.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> schedule = rgdiff.schedules.karras_ve(0.1, 1.0)
      >>> denoiser = rgdiff.denoisers.edm_preconditioned(lambda x, t, cond: 0 * x, schedule, sigma_data=1.0)
      >>> print(denoiser(jnp.ones((1, 1)), jnp.float32(1.0)).round(3))  # F = 0: the exact denoiser of N(0, 1), x / 2
      [[0.5]]
    """
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
        t = jnp.broadcast_to(jnp.asarray(t, jnp.float32), (batch,))
        both = self.denoiser(in_turn(x, x), in_turn(t, t), in_turn(cond, null))
        guided = lambda out: _between(out[:, 1], out[:, 0], self.scale)  # noqa: E731
        return jax.tree.map(lambda out: guided(out.reshape(batch, 2, *out.shape[1:])), both)


def _between(a: Array, b: Array, weight: Array) -> Array:
    """a + weight (b - a); where one that has a weight is -inf (a token that is forbidden), -inf."""
    forbidden = ((a == -jnp.inf) & (weight != 1)) | ((b == -jnp.inf) & (weight != 0))
    a, b = (jnp.where(leaf == -jnp.inf, 0.0, leaf) for leaf in (a, b))
    return jnp.where(forbidden, -jnp.inf, a + weight * (b - a))


def classifier_free(denoiser: DenoiserLike, scale: float, null: Any) -> Denoiser:
    """Guide a conditional denoiser: d(x, null) + scale (d(x, cond) - d(x, null)) (arXiv 2207.12598).

    Scale 1 is the conditional model, 0 the unconditional one. Both predictions come from one network call of 2B rows. On
    predictions of x0 this equals the published combination of eps or scores (both are affine in x0). On logits it
    combines log-probabilities, p(x0|c)^scale p(x0)^(1 - scale) per token; a token that either of them forbids (logit -inf)
    is forbidden, unless that one's exponent is 0.

    Args:
      denoiser: conditional, (x, t, cond) -> prediction.
      scale: the guidance's weight, without unit.
      null: the condition that means none, a scalar or a pytree like `cond` (for class labels: the number of classes).

    Returns:
      The denoiser; it needs a condition.

    Raises:
      ValueError: at a call without a condition.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> conditional = lambda x, t, cond: cond[:, None] * jnp.ones_like(x)
      >>> denoiser = rgdiff.denoisers.classifier_free(conditional, 3.0, null=0.0)
      >>> print(denoiser(jnp.zeros((1, 1)), 0.5, jnp.array([2.0])))  # 0 + 3 (2 - 0)
      [[6.]]
    """
    return ClassifierFree(callable_pytree(denoiser, "a denoiser"), jnp.asarray(scale, jnp.float32), null)


@pytree
class Conditioned:
    """A denoiser whose every example has one condition. Build it with `conditioned`."""

    denoiser: Denoiser
    condition: Any

    def __call__(self, x: State, t: Array, cond: Cond = None) -> State:
        if cond is not None:
            raise ValueError("this denoiser has its condition already (denoisers.conditioned); pass cond=None")
        batch = jax.tree.leaves(x)[0].shape[0]
        repeat = lambda leaf: jnp.broadcast_to(leaf, (batch, *jnp.shape(leaf)))  # noqa: E731
        return self.denoiser(x, t, jax.tree.map(repeat, self.condition))


def conditioned(denoiser: DenoiserLike, condition: Any) -> Denoiser:
    """Give every example the same condition, so that a conditional denoiser is one of a single distribution.

    Methods on one problem (weighted particles, campaigns, learned values) take it as they take an unconditional prior.

    Args:
      denoiser: conditional, (x, t, cond) -> prediction.
      condition: one row of its conditions, a pytree of leaves [...] without the axis of examples.

    Returns:
      The denoiser; it is called without a condition.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> conditional = lambda x, t, cond: cond[:, None] * jnp.ones_like(x)
      >>> denoiser = rgdiff.denoisers.conditioned(conditional, 3.0)
      >>> print(denoiser(jnp.zeros((2, 1)), 0.5).ravel())
      [3. 3.]
    """
    return Conditioned(callable_pytree(denoiser, "a denoiser"), jax.tree.map(jnp.asarray, condition))


@pytree
class Annealed:
    """Interpolates two denoisers along the chain: d(x, t) + t^power (base(x, t) - d(x, t)). Build it with `annealed`."""

    denoiser: Denoiser
    base: Denoiser
    power: Array

    def __call__(self, x: State, t: Array, cond: Cond = None) -> State:
        out, base = self.denoiser(x, t, cond), self.base(x, t, cond)
        weight = jnp.asarray(t, jnp.float32) ** self.power
        return jax.tree.map(lambda d, b: _between(d, b, along(weight, d)), out, base)


def annealed(denoiser: DenoiserLike, base: DenoiserLike, power: float = 1.0) -> Denoiser:
    """Sample with the prior at high noise and with the tuned denoiser at the end: d + t^power (base - d).

    This is annealed guidance (DRaFT+). The weight of the prior is t^power, 1 at t = 1; power 0 is the prior throughout, a large
    one the tuned denoiser. On predictions of x0 it equals the published interpolation of eps. It calls both once a step.

    Args:
      denoiser: d, the tuned one.
      base: the prior's.
      power: exponent of t, >= 0.

    Returns:
      The denoiser.

    Raises:
      ValueError: for a negative power.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> tuned, prior = lambda x, t, cond: x + 1, lambda x, t, cond: x
      >>> denoiser = rgdiff.denoisers.annealed(tuned, prior, power=2.0)
      >>> print(denoiser(jnp.zeros((1, 1)), 0.5))  # 1 + 0.25 (0 - 1)
      [[0.75]]
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


def clip_x0(denoiser: DenoiserLike, low: float = -1.0, high: float = 1.0) -> Denoiser:
    """Clip predictions of x0 to the range of the data.

    Args:
      denoiser: (x, t, cond) -> E[x0 | x_t] [B, ...].
      low, high: the range, in data units.

    Returns:
      The denoiser.

    Raises:
      ValueError: for an empty range.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> denoiser = rgdiff.denoisers.clip_x0(lambda x, t, cond: x)
      >>> print(denoiser(jnp.array([[-3.0, 0.5]]), 0.5))
      [[-1.   0.5]]
    """
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


def dynamic_threshold(denoiser: DenoiserLike, percentile: float = 99.5, *, floor: float = 1.0) -> Denoiser:
    """Threshold predictions of x0 to [-floor, floor]: clip to s, then multiply by floor / s (Imagen, arXiv 2205.11487, §2.3).

    s is the percentile of |x0| over each example's coordinates, or `floor` where that is larger.

    Args:
      denoiser: (x, t, cond) -> E[x0 | x_t] [B, ...].
      percentile: in percent, in (0, 100].
      floor: half-width of the range of the data, in its unit.

    Returns:
      The denoiser.

    Raises:
      ValueError: for a percentile outside (0, 100], or a floor that is not positive.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> denoiser = rgdiff.denoisers.dynamic_threshold(lambda x, t, cond: x, percentile=100.0)
      >>> print(denoiser(jnp.array([[-4.0, 2.0]]), 0.5))  # s = 4
      [[-1.   0.5]]
    """
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile must be in (0, 100], got {percentile}")
    denoiser = callable_pytree(denoiser, "a denoiser")
    return DynamicThreshold(denoiser, jnp.float32(percentile), checks.positive("floor", floor))
