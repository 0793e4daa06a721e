"""Two drivers of `Online` methods: with the reward in the same program, or with the reward on the host.

Given a JAX reward they make the same run: keys and rows of data depend on the key and the step's index alone, as in
`fit`, so a run that is interrupted and continued from its state is the same run too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import checks
from rgdiff.rewards import evaluate, failed, failures, from_host
from rgdiff.shards import Shards, by_rows, joined_rows, own_rows, shards_of, split
from rgdiff.tuners._loop import draw_rows, laid_out, layout_of, spread_out
from rgdiff.tuners.stopping import EarlyStopping
from rgdiff.typing import Array, Cond, Info, Key, Online, Params, Reward, RewardLike, callable_pytree, pytree, static


@pytree
class OnlineTuner:
    """A tuner for `fit`: rollout, reward and update in one program. Build it with `as_tuner`."""

    online: Any
    reward: Reward
    heldout: Reward | None = None
    noise: Array | None = None
    shards: Shards | None = static(default=None)

    @property
    def batch(self) -> int:
        return self.online.batch

    @property
    def process(self) -> Any:
        return self.online.process

    def init(self, params: Params) -> Any:
        return self.online.init(params)

    def step(self, key: Key, state: Any, batch: Cond = None) -> tuple[Any, Info]:
        """Take one step; `batch` are the conditions, or None."""
        key_rollout, key_update = jax.random.split(key)
        experience = self.online.rollout(key_rollout, state, batch)
        rewards = self._answers(key, experience)
        state, info = self.online.update(key_update, state, experience, rewards)
        if self.heldout is not None:
            info = info | {"heldout": feasible_mean(evaluate(self.heldout, experience.x0, experience.cond), rewards)}
        return state, info

    def gradients(self, params: Params, key: Key, cond: Cond = None) -> tuple[Params, Info]:
        """Return the gradient of a first step from `params` (see `gradient_statistics`)."""
        key_rollout, key_update = jax.random.split(key)
        state = self.online.init(params)
        experience = self.online.rollout(key_rollout, state, cond)
        rewards = self._answers(key, experience)
        return self.online.gradients(key_update, state, experience, rewards)

    def network_calls(self) -> int:
        """Calls of the tuned denoiser per sample and step, forward passes only."""
        return self.online.network_calls()

    def _answers(self, key: Key, experience: Any) -> Array:
        rewards = by_rows(evaluate, self.shards, (None, 0, 0))(self.reward, experience.x0, experience.cond)
        if self.noise is None:
            return rewards
        return rewards + self.noise * jax.random.normal(jax.random.fold_in(key, 2), rewards.shape)


def as_tuner(
    online: Online, reward: RewardLike, *, heldout: RewardLike | None = None, noise: float | None = None
) -> OnlineTuner:
    """Make an online method a tuner for `fit`, with a JAX reward (or `rewards.from_host`) in the same program.

    Args:
      online: from `ddpo`, `dpok`, `reward_weighted`, `filtered`, `seiko.seiko` or `seiko.steered`.
      reward: (x0 [B, ...], cond) -> [B]; NaN marks an infeasible sample.
      heldout: another reward, reported as info["heldout"] (see `early_stopping`).
      noise: standard deviation of Gaussian noise added to each reward, in the reward's unit, to simulate an experiment; None
        for none.

    Returns:
      A tuner for `fit`; state and info are the method's. Conditions are `fit`'s data.

    Raises:
      ValueError: for an object that is no online method, or one that is wrapped by `early_stopping` (wrap the tuner instead).

    Example:
      >>> import jax, jax.numpy as jnp, optax, rgdiff
      >>> process = rgdiff.processes.masked(rgdiff.schedules.log_linear_mask(), (1,), 2)  # one token of two letters
      >>> model = lambda w: lambda x, t, cond=None: jnp.zeros((len(x), 1, 2)) + w  # logits of p(x0)
      >>> method = rgdiff.tuners.ddpo(model, process, process.times(2), optax.sgd(1.0), batch=64)
      >>> tuner = rgdiff.tuners.as_tuner(method, lambda x0, cond=None: x0[:, 0, 1])
      >>> print(rgdiff.tuners.fit(tuner, jax.random.key(0), tuner.init(jnp.zeros(2)), 5).params.argmax())
      1
    """
    _three_parts(online)
    if isinstance(online, EarlyStopping):
        raise ValueError(
            "as_tuner takes the online method; stop the tuner instead: early_stopping(as_tuner(online, reward))"
        )
    heldout = None if heldout is None else callable_pytree(heldout, "a held-out reward")
    spread = None if noise is None else checks.positive("noise", noise, zero=True)
    return OnlineTuner(online, callable_pytree(reward, "a reward"), heldout, spread)


def fit_online(
    online: Online,
    key: Key,
    state: Any,
    steps: int,
    reward: Callable[..., Any],
    *,
    data: Any = None,
    batch: int | None = None,
    heldout: Callable[..., Any] | None = None,
    on_step: Callable[[Any, Info], None] | None = None,
    mesh: Any = None,
) -> Any:
    """Train until `state.step` is `steps`, calling the reward on the host between a compiled rollout and update.

    It ends earlier where `state.stopped` (`early_stopping`).

    Args:
      online: from `ddpo`, `dpok`, `reward_weighted`, `filtered`, `seiko.seiko`, `seiko.steered`, or `early_stopping` of one.
      key: a typed PRNG key; the same key must be given when a run is continued.
      state: from `online.init(params)` or a checkpoint; its buffers are donated.
      steps: the total number, so that continuing an interrupted run is the same call.
      reward: any Python function (x0 as NumPy [B, ...], cond as NumPy [B, ...] or None) -> B numbers, or (numbers, valid); NaN or
        valid = False marks an infeasible sample. It may take any time.
      data: conditions, a pytree of arrays [N, ...]; every step gets `batch` rows of it, drawn as in `fit`.
      batch: rows per step, where there are data.
      heldout: another such function, reported as info["heldout"].
      on_step: called as (state, info) after every step, info on the host. Copy the parts of the state that you keep: the next
        step donates it.
      mesh: devices over which the rows of every batch are split, as in `fit`.

    Returns:
      The final state.

    Raises:
      RewardFailure: where the reward raises, or returns something else than B numbers; its `state` is that of before
        the step, from which the same call continues.
      ValueError: for an object that is no online method, data without `batch`, a missing held-out reward.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rgdiff
      >>> process = rgdiff.processes.masked(rgdiff.schedules.log_linear_mask(), (1,), 2)  # one token of two letters
      >>> model = lambda w: lambda x, t, cond=None: jnp.zeros((len(x), 1, 2)) + w  # logits of p(x0)
      >>> method = rgdiff.tuners.ddpo(model, process, process.times(2), optax.sgd(1.0), batch=64)
      >>> reward = lambda x0, cond: [float(row[0, 1]) for row in x0]  # plain Python on NumPy
      >>> state = rgdiff.tuners.fit_online(method, jax.random.key(0), method.init(jnp.zeros(2)), 5, reward)
      >>> print(state.params.argmax())
      1
    """
    _three_parts(online.tuner if isinstance(online, EarlyStopping) else online)
    checks.key(key)
    checks.state(state)
    if isinstance(online, EarlyStopping) and online.metric == "heldout" and heldout is None:
        raise ValueError("early_stopping watches the held-out reward; give fit_online(heldout=...), or another metric")
    steps = checks.at_least("steps", steps, 0)
    if data is not None:
        checks.rows(data, batch)
    shards = shards_of(mesh)
    online, state, data = spread_out(online, state, data, batch, shards)
    layout = layout_of(state, shards)
    for step in range(int(state.step), steps):
        if getattr(state, "stopped", False):
            break
        with failures(online) as settle:  # a value inside the method may be made of a host reward
            experience = settle(_rollout(online, key, state, data, batch, shards), state, step)
        rewards = _on_host(reward, experience, shards, state, step)
        judged = None if heldout is None else _on_host(heldout, experience, shards, state, step)
        state, info = _update(online, key, state, experience, rewards, judged, layout)
        if on_step is not None:
            on_step(state, jax.device_get(info))
    return state


def feasible_mean(values: Array, rewards: Array) -> Array:
    """Return the mean of values over examples whose reward is finite; NaN where none is.

    Args:
      values, rewards: [B] each.
    """
    feasible = jnp.isfinite(rewards)
    mean = jnp.sum(jnp.where(feasible, values, 0.0)) / jnp.maximum(feasible.sum(), 1)
    return jnp.where(feasible.any(), mean, jnp.nan)


def minibatch_rows(key: Key, batch: int, epochs: int, minibatches: int) -> Array:
    """Return the rows of every optimiser step, [epochs * minibatches, batch / minibatches]: others in every epoch.

    Each step has one of every `minibatches` consecutive rows, at random: of groups and conditions all have their shares, and of a
    batch that is split over devices each takes its own.

    Args:
      key: a PRNG key, of the orders.
      batch, epochs, minibatches: B, passes over it, and parts of each pass.
    """
    if minibatches == 1:
        return jnp.broadcast_to(jnp.arange(batch), (epochs, batch))
    few = jnp.arange(batch).reshape(batch // minibatches, minibatches)
    shuffled = lambda key: jax.random.permutation(key, few, axis=1, independent=True).T  # noqa: E731
    return jax.vmap(shuffled)(jax.random.split(key, epochs)).reshape(epochs * minibatches, batch // minibatches)


def _on_host(reward: Callable[..., Any], experience: Any, shards: Shards | None, state: Any, step: int) -> Any:
    """Rewards [B]; of several processes each asks for its own rows, and where one fails all do."""
    rewards, error = None, None
    try:
        rewards = from_host(reward).answers(*own_rows((experience.x0, experience.cond)))  # type: ignore[attr-defined]
    except Exception as raised:
        error = raised
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import process_allgather

        if np.any(process_allgather(np.asarray(error is not None))) and error is None:
            error = ValueError("the reward failed in another process")
    if error is not None:
        raise failed(error, state, step) from error
    return joined_rows(rewards, jax.tree.leaves(experience.x0)[0], shards)  # type: ignore[arg-type]


def _keys(key: Key, step: Array) -> tuple[Key, Key, Key]:
    """The keys of a step's rows, rollout and update: those of `fit` with `OnlineTuner`."""
    key_batch, key_step = jax.random.split(jax.random.fold_in(key, step))
    return key_batch, *jax.random.split(key_step)


def _roll_out(online: Any, key: Key, state: Any, data: Any, batch: int | None, shards: Shards | None) -> Any:
    key_batch, key_rollout, _ = _keys(key, state.step)
    cond = draw_rows(key_batch, data, batch, shards)
    experience = online.rollout(key_rollout, state, cond)
    if shards is None:
        return experience
    return experience._replace(x0=split(experience.x0, shards), cond=split(experience.cond, shards))


def _improve(
    online: Any,
    key: Key,
    state: Any,
    experience: Any,
    rewards: Array,
    judged: Array | None,
    layout: tuple[Any, ...] | None,
) -> tuple[Any, Info]:
    figures = {} if judged is None else {"heldout": feasible_mean(judged, rewards)}
    key = _keys(key, state.step)[2]
    if isinstance(online, EarlyStopping):
        state, info = online.update(key, state, experience, rewards, figures)
    else:
        state, info = online.update(key, state, experience, rewards)
        info |= figures
    return laid_out(state, layout), info


def _three_parts(online: Any) -> None:
    hint = "a tuner with a step goes to fit as it is" if callable(getattr(online, "step", None)) else "see tuners.ddpo"
    checks.driven("an online method", online, ("init", "rollout", "update"), hint)


_rollout = jax.jit(_roll_out, static_argnames=("batch", "shards"))
_update = jax.jit(_improve, static_argnames=("layout",), donate_argnames=("state",))
