"""Learning values: one trainer, by regression on rewards or by temporal differences, for the mean or the soft value.

Data are samples of the prior, noised afresh at every step, or whole chains of it (`rollouts`). Samplers use the values (SVDD,
guidance, SMC); `values.error_over_time` measures their error at each time.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rgdiff import checks
from rgdiff._settings import setting_of
from rgdiff.rewards import score
from rgdiff.samplers import ancestral, sample
from rgdiff.shards import Shards, bound, value_and_grad
from rgdiff.tuners._loop import TrainState, start, update
from rgdiff.tuners._pretraining import stratified_times
from rgdiff.typing import (
    Array,
    Cond,
    Denoiser,
    Info,
    Key,
    Params,
    Process,
    Reward,
    State,
    callable_pytree,
    pytree,
    static,
)
from rgdiff.values import backup, evaluate, regression_loss

LOSSES = ("soft", "squared")


@pytree
class ValueLearning:
    """Fits a value to rewards, or to its own values a move later. Build it with `value_regression` or `temporal_difference`."""

    model: Any
    process: Process
    ema_decay: Array
    bound: Array
    temperature: Array | None
    times: Array | None
    denoiser: Denoiser | None
    optimizer: Any = static()
    loss_name: str = static()
    candidates: int = static(default=0)
    shards: Shards | None = static(default=None)

    def init(self, params: Params) -> TrainState:
        return start(params, self.optimizer, average=True)

    def suits(self, data: Any) -> None:
        """Refuse data that are not examples of the process, or states of its chains, with a reward each."""
        path = isinstance(data, dict) and "path" in data
        checks.entries(data, "path" if path else "x0", "reward")
        if not path:
            checks.examples("data['x0']", data["x0"], self.process)

    def step(self, key: Key, state: TrainState, batch: Any) -> tuple[TrainState, Info]:
        """Take one step on batch = {"x0" [B, ...] or "path" [B, T + 1, ...], "reward" [B]} and, optionally, "cond"."""
        loss, gradients = value_and_grad(self.loss, self.shards)(state.params, key, batch, state.average)
        state, info = update(state, gradients, self.optimizer, self.ema_decay)
        return state, {"loss": loss, "infeasible": jnp.sum(~jnp.isfinite(batch["reward"]))} | info

    def loss(self, params: Params, key: Key, batch: Any, target: Params | None = None) -> Array:
        """Mean loss over feasible examples and stratified times; `target` holds the parameters that next states are valued by."""
        key_state, key_next = jax.random.split(key)
        x, t, index = self._states(key_state, batch)
        size = jax.tree.leaves(x)[0].shape[0]
        cond, goal = batch.get("cond"), checks.per_example("data['reward'] must hold", batch["reward"], size)
        if self.denoiser is not None:
            following = self._backup(key_next, params if target is None else target, x, index, cond)
            goal = jnp.where(index == self.times.shape[0] - 1, goal, following)  # type: ignore[union-attr]
        feasible = jnp.isfinite(goal)
        goal, value = jnp.where(feasible, goal, 0.0), evaluate(bound(self.model, params, "a value"), x, t, cond)
        if self.loss_name == "squared":
            error = regression_loss(value, goal)
        else:
            error = regression_loss(value, goal, self.temperature, self.bound) * self._steady(value, goal, feasible)
        return jnp.sum(jnp.where(feasible, error, 0.0)) / jnp.maximum(jnp.sum(feasible), 1)

    def _steady(self, value: Array, goal: Array, feasible: Array) -> Array:
        """Weights that keep slopes of the order of 2 tau while values are far too low: one over the mean e^z of the *other* examples.

        Independent of an example's own goal, they leave the minimiser where it is; near it they are 1, as E e^z is.
        """
        z = (goal - value) / self.temperature  # type: ignore[operator]
        size = jnp.where(feasible, jnp.exp(jnp.minimum(z, self.bound)), 0.0)
        others = (jnp.sum(size) - size) / jnp.maximum(jnp.sum(feasible) - 1, 1)
        return jax.lax.stop_gradient(1 / jnp.maximum(others, 1.0))

    def _states(self, key: Key, batch: Any) -> tuple[State, Array, Array]:
        """One state per example at stratified times: x_t, t [B], and t's index in the grid [B] (where there is one)."""
        key_time, key_noise = jax.random.split(key)
        size = batch["reward"].shape[0]
        if self.times is None:
            if "path" in batch:
                raise ValueError("data with 'path' need the grid of their chains: build the tuner with times=")
            t, index = stratified_times(key_time, size), jnp.zeros(size, jnp.int32)
            return self.process.forward(batch["x0"], t).sample(key_noise), t, index
        cells = self.times.shape[0]
        index = jnp.minimum((cells * stratified_times(key_time, size, 0.0)).astype(jnp.int32), cells - 1)
        t = self.times[index]
        if "path" not in batch:
            return self.process.forward(batch["x0"], t).sample(key_noise), t, index
        length = jax.tree.leaves(batch["path"])[0].shape[1]
        if length != cells:
            raise ValueError(f"data['path'] must hold the {cells} states of times, [N, {cells}, ...], got {length}")
        at = jax.vmap(lambda row, i: row[i])
        return jax.tree.map(lambda leaf: at(leaf, index), batch["path"]), t, index

    def _backup(self, key: Key, target: Params, x: State, index: Array, cond: Cond) -> Array:
        """The backed-up value of M draws of the next state, [B]; at the end of the grid it means nothing."""
        index = jnp.minimum(index, self.times.shape[0] - 2)  # type: ignore[union-attr]
        t, s = self.times[index], self.times[index + 1]  # type: ignore[index]
        kernel = self.process.reverse(x, t, s, self.denoiser(x, t, cond))  # type: ignore[misc]
        # Draws of one example stay together, so that a batch split over devices is valued where it lies.
        rows = lambda leaf: leaf.swapaxes(0, 1).reshape(-1, *leaf.shape[2:])  # noqa: E731
        copies = lambda leaf: jnp.repeat(leaf, self.candidates, 0)  # noqa: E731
        y = jax.tree.map(rows, jax.vmap(kernel.sample)(jax.random.split(key, self.candidates)))
        values = evaluate(bound(self.model, target, "a value"), y, copies(s), jax.tree.map(copies, cond))
        return jax.lax.stop_gradient(backup(values.reshape(-1, self.candidates).T, self.temperature))


def value_regression(
    model: Any,
    process: Process,
    optimizer: Any,
    *,
    temperature: float | None = None,
    times: Array | None = None,
    bound: float = 10.0,
    ema_decay: float = 0.999,
) -> ValueLearning:
    """Learn a value by regression on the rewards of samples of the prior (SVDD-MC, arXiv 2408.08252, §4 and algorithm 3).

        v(x_t, t) = E[r(x0) | x_t],   or with a temperature   temperature * log E[exp(r(x0)/temperature) | x_t]

    The second, the soft value, is the one whose tilt of every move gives p(x0) exp(r(x0)/temperature)/Z. `values.regression_loss`
    gives the losses.

    Data for `fit` are {"x0": [N, ...], "reward": [N]}, noised afresh at every step, or {"path": [N, T + 1, ...], "reward": [N]},
    states of chains as `rollouts` returns them; with "cond", a pytree of [N, ...], where the value is conditional.
    Examples whose reward is not finite are left out: the value is that of feasible outcomes.

    Args:
      model: params -> value, (x [B, ...], t [B], cond) -> [B], e.g. `lambda p: values.learned(from_linen(nets.ValueMLP(), p))`.
      process: any noising process.
      optimizer: an optax transformation.
      temperature: in the reward's unit, dynamic; None for the mean.
      times: the grid [T + 1] of the chains. Without it samples are noised to all times from 1e-3 to 1.
      bound: nats; rewards further above the value than bound * temperature count linearly (soft only).
      ema_decay: decay of the averaged parameters, `state.best`.

    Returns:
      A tuner for `fit(data=...)`; `model(state.best)` is the value for `samplers.svdd`, `guides` and `samplers.smc`. info: loss,
      infeasible, gradient_norm, skipped.

    Raises:
      ValueError: for an argument that is no noising process, numbers out of range; when it runs, for paths without `times`.

    Note:
      The released code regresses the reward itself, whatever its temperature: the mean, a lower bound of the soft value.
      It rolls the prior out, its image variant noises data: noising samples of an *exact* prior gives the pairs
      (x_t, x0) of its rollouts in law; the chain of a trained prior, or of few steps, has values of its own.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.cosine_vp(), (1,))
      >>> model = lambda c: lambda x, t, cond=None: c + 0 * x[:, 0]  # a network in practice
      >>> tuner = rgdiff.tuners.value_regression(model, process, optax.sgd(0.25))
      >>> data = {"x0": jnp.zeros((2, 1)), "reward": jnp.array([1.0, 1.0])}
      >>> state = rgdiff.tuners.fit(tuner, jax.random.key(0), tuner.init(jnp.float32(0)), 20, data=data, batch=16)
      >>> print(f"{state.params:.2f}")
      1.00
    """
    checks.noising_process(process, "value_regression")
    soft = temperature is not None
    return ValueLearning(
        model=callable_pytree(model, "model (params -> value)"),
        process=process,
        ema_decay=checks.positive("ema_decay", ema_decay, zero=True),
        bound=checks.positive("bound", bound),
        temperature=checks.positive("temperature", temperature) if soft else None,
        times=None if times is None else checks.times(times, process),
        denoiser=None,
        optimizer=checks.optimizer(optimizer),
        loss_name="soft" if soft else "squared",
    )


def temporal_difference(
    model: Any,
    process: Process,
    denoiser: Denoiser,
    times: Array,
    optimizer: Any,
    *,
    temperature: float | None = None,
    candidates: int = 10,
    loss: str = "soft",
    bound: float = 10.0,
    ema_decay: float = 0.99,
) -> ValueLearning:
    """Learn a value by backing it up along the prior's chain: the soft Bellman equation of arXiv 2408.08252, §3.

        v(x, t) = temperature * log (1/M) sum_m exp(v'(y_m, s)/temperature),  y_m ~ p(. | x) at s

    v' has averaged parameters; at the last time of the grid v is the data's reward. Data are those of `value_regression`; the
    reward itself is not called.

    Args:
      model: params -> value, (x [B, ...], t [B], cond) -> [B], in the reward's unit.
      process: a process with a law at every move (eta > 0).
      denoiser: the prior's, (x, t, cond) -> E[x0 | x_t] or logits.
      times: the grid [T + 1] of the chain whose value is learnt.
      optimizer: an optax transformation.
      temperature: in the reward's unit, dynamic. None backs up the plain mean, the released code's CD-Q.
      candidates: M; each step costs one call of the denoiser and M of the value per example.
      loss: `soft` makes the backup exact for every M, as its minimiser takes the exponential average over draws of the
        next states too; `squared` leaves a bias of -temperature Var e / 2M, Var e the relative variance of exp(v/temperature), at
        every move. Without a temperature the loss is squared, and nothing is biased.
      bound: nats; backed-up values further above the value than bound * temperature count linearly (soft only).
      ema_decay: decay of the averaged parameters, which value the next states and are `state.best`.

    Returns:
      A tuner for `fit(data=...)`, as `value_regression`.

    Raises:
      ValueError: for eta = 0, M < 1, a grid without a move, an unknown loss.

    Note:
      The released CD-Q takes next states' values from the network that is trained; ours from its average, which is
      that network where ema_decay = 0. For a masked process, `values.learned(network, reward, process)` in the model
      ends at the reward itself, and the last backup then calls it; its NaN next states are left out of the mean.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.cosine_vp(), (1,))
      >>> model = lambda c: lambda x, t, cond=None: c + 0 * x[:, 0]
      >>> tuner = rgdiff.tuners.temporal_difference(
      ...     model, process, rgdiff.tuners.standard_normal(process), process.times(4), optax.adam(0.05), candidates=2, ema_decay=0.0)
      >>> data = {"x0": jnp.zeros((2, 1)), "reward": jnp.array([1.0, 1.0])}
      >>> state = rgdiff.tuners.fit(tuner, jax.random.key(0), tuner.init(jnp.float32(0)), 200, data=data, batch=16)
      >>> print(f"{state.params:.1f}")
      1.0
    """
    checks.law(process, "a temporal difference")
    times = checks.times(times, process)
    if times.shape[0] < 2:
        raise ValueError("a temporal difference needs a grid of at least one move; use process.times(steps)")
    checks.one_of("loss", loss, LOSSES)
    soft = temperature is not None
    return ValueLearning(
        model=callable_pytree(model, "model (params -> value)"),
        process=process,
        ema_decay=checks.positive("ema_decay", ema_decay, zero=True),
        bound=checks.positive("bound", bound),
        temperature=checks.positive("temperature", temperature) if soft else None,
        times=times,
        denoiser=callable_pytree(denoiser, "a denoiser"),
        optimizer=checks.optimizer(optimizer),
        loss_name=loss if soft else "squared",
        candidates=checks.at_least("candidates", candidates, 1),
    )


@setting_of(sample, fixed=("keep",))
def rollouts(
    key: Key,
    process: Process,
    denoiser: Denoiser,
    times: Array,
    reward: Reward,
    count: int,
    cond: Cond = None,
    **options: Any,
) -> dict[str, Any]:
    """Sample the prior's chain and reward the ends: data to learn a value from, or to hold out.

    Args:
      key: a typed PRNG key.
      process: of the chain.
      denoiser: the prior's, (x, t, cond) -> E[x0 | x_t] or logits.
      times: the grid [T + 1], from `process.times(steps)`.
      reward: (x0 [N, ...], cond) -> [N]; NaN marks an infeasible sample.
      count: N, number of chains.
      cond: a pytree of [N, ...], or None.
      on_chunk: called as (moves done, T) between compiled chunks of the chain.

    Returns:
      {"path": [N, T + 1, ...] states at all times of the grid, "x0": [N, ...], "reward": [N]}, and "cond" where given: the data of
      `value_regression`, `temporal_difference` and `initial_value`.

    Raises:
      ValueError: as `samplers.sample`.

    Example:
      >>> import jax, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.cosine_vp(), (2,))
      >>> data = rgdiff.tuners.rollouts(
      ...     jax.random.key(0), process, rgdiff.tuners.standard_normal(process), process.times(4), lambda x, cond=None: x[:, 0], 3)
      >>> print({name: leaf.shape for name, leaf in data.items()})
      {'path': (3, 4, 2), 'x0': (3, 2), 'reward': (3,)}
    """
    sampler = ancestral(process, denoiser)
    out = sample(sampler, key, count, times, cond, keep=_state, **options)
    first = sampler.init(jax.random.fold_in(key, 0), count, times[0], cond)  # what `sample` began with
    path = jax.tree.map(lambda a, b: jnp.moveaxis(jnp.concatenate([a[None], b]), 0, 1), first, out.kept)
    data = {"path": path, "x0": out.x0, "reward": score(reward, out.x0, cond)}
    return data if cond is None else data | {"cond": cond}


def _state(carry: State, info: Info) -> State:
    return carry
