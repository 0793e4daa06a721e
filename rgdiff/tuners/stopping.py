"""Early stopping as part of the state: a tuner that watches one of its own figures and keeps its best parameters.

Everything is in the state, so a stopped, killed and resumed run is the same run; after the stop a step changes nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rgdiff import checks
from rgdiff.typing import Array, Info, Key, Params, Tuner, pytree, static


class StoppingState(NamedTuple):
    """The state of `early_stopping`.

    Args:
      inner: the tuner's own state.
      best: the best parameters so far.
      best_value: their figure, the mean over a window.
      total, finite, count: sum of the figure over the current window, its finite terms, and the steps in it.
      stale: windows since the best one.
      stopped: whether it has stopped, bool.
    """

    inner: Any
    best: Params
    best_value: Array
    total: Array
    finite: Array
    count: Array
    stale: Array
    stopped: Array

    @property
    def step(self) -> Array:
        return self.inner.step

    @property
    def skipped(self) -> Array:
        return self.inner.skipped

    @property
    def params(self) -> Params:
        return self.inner.params


@pytree
class EarlyStopping:
    """Stops a tuner. Build it with `early_stopping`."""

    tuner: Any
    limit: Array
    metric: str = static()
    limited: str = static()
    window: int = static()
    patience: int = static()

    def init(self, params: Params) -> StoppingState:
        inner, low = self.tuner.init(params), jnp.float32(-jnp.inf)
        best = jax.tree.map(lambda p: jnp.array(p, copy=True), inner.best)
        zero = jnp.int32(0)
        return StoppingState(
            inner=inner,
            best=best,
            best_value=low,
            total=jnp.float32(0),
            finite=zero,
            count=zero + 0,
            stale=zero + 0,
            stopped=jnp.bool_(False),
        )

    def suits(self, data: Any) -> None:
        """What the tuner refuses, refuse."""
        if hasattr(self.tuner, "suits"):
            self.tuner.suits(data)

    def step(self, key: Key, state: StoppingState, batch: Any = None) -> tuple[StoppingState, Info]:
        return self._unless_stopped(state, lambda: self._watch(state, *self.tuner.step(key, state.inner, batch)))

    def _unless_stopped(self, state: StoppingState, go: Any) -> tuple[StoppingState, Info]:
        empty = jax.tree.map(
            lambda a: (
                jnp.full(a.shape, jnp.nan, a.dtype)
                if jnp.issubdtype(a.dtype, jnp.floating)
                else jnp.zeros(a.shape, a.dtype)
            ),
            jax.eval_shape(go)[1],
        )
        stay = state._replace(inner=state.inner._replace(step=state.inner.step + 1))
        return jax.lax.cond(
            state.stopped, lambda: (stay, empty | {"skipped": state.skipped, "stopped": jnp.int32(1)}), go
        )

    def rollout(self, key: Key, state: StoppingState, cond: Any = None) -> Any:
        """That of an online method."""
        return self.tuner.rollout(key, state.inner, cond)

    def update(
        self, key: Key, state: StoppingState, experience: Any, rewards: Array, figures: Info | None = None
    ) -> tuple[StoppingState, Info]:
        """That of an online method; `figures` join those that may be watched."""

        def go() -> tuple[StoppingState, Info]:
            inner, info = self.tuner.update(key, state.inner, experience, rewards)
            return self._watch(state, inner, info | (figures or {}))

        return self._unless_stopped(state, go)

    def gradients(self, params: Params, key: Key, cond: Any = None) -> tuple[Params, Info]:
        """Those of the tuner that is watched (see `gradient_statistics`)."""
        return self.tuner.gradients(params, key, cond)

    @property
    def batch(self) -> int:
        return self.tuner.batch

    def network_calls(self) -> int:
        return self.tuner.network_calls()

    def _watch(self, state: StoppingState, inner: Any, info: Info) -> tuple[StoppingState, Info]:
        if missing := {self.metric, self.limited} - {*info, ""}:
            raise ValueError(f"the tuner reports {sorted(info)}; early_stopping asks for {sorted(missing)}")
        value = jnp.asarray(info[self.metric], jnp.float32)
        total = state.total + jnp.where(jnp.isfinite(value), value, 0.0)
        finite, count = state.finite + jnp.isfinite(value), state.count + 1
        full = count == self.window
        mean = total / jnp.maximum(finite, 1)
        better = full & (finite > 0) & (mean > state.best_value)
        # The parameters of before this step made this window's last figure. Before any figure the newest are as good.
        none = jnp.isneginf(state.best_value)
        keep = lambda made, new, old: jnp.where(better, made, jnp.where(none, new, old))  # noqa: E731
        best = jax.tree.map(keep, state.inner.best, inner.best, state.best)
        stale = jnp.where(better, 0, state.stale + full)
        over = jnp.bool_(False) if not self.limited else full & (info[self.limited] > self.limit)
        stopped = (stale >= self.patience) | over
        state = StoppingState(
            inner=inner,
            best=best,
            best_value=jnp.where(better, mean, state.best_value),
            total=jnp.where(full, 0.0, total),
            finite=jnp.where(full, 0, finite),
            count=jnp.where(full, 0, count),
            stale=stale,
            stopped=stopped,
        )
        return state, info | {"stopped": stopped.astype(jnp.int32)}


def early_stopping(
    tuner: Tuner,
    metric: str = "heldout",
    *,
    window: int = 10,
    patience: int = 3,
    limited: str = "",
    limit: float = float("inf"),
) -> EarlyStopping:
    """Stop a tuner when a figure it reports no longer rises, and return the parameters at which it was highest.

    Args:
      tuner: whose info has `metric`; give `reward_backprop(heldout=...)` for the held-out reward. Or an online method, for
        `fit_online(heldout=...)`.
      metric: name of the figure in info.
      window: steps over which the figure is averaged, those where it is finite; a window without a finite figure is no new best.
      patience: windows without a new best before the stop.
      limited, limit: stop also when this figure exceeds the limit at the end of a window, e.g. limited="kl"; "" for none.

    Returns:
      A tuner for `fit` (or an online method for `fit_online`). `state.best` are the best parameters (averaged ones where the tuner
      averages), `state.best_value` their figure, `state.stopped` whether it has stopped; `fit` ends there.

    Raises:
      ValueError: for window or patience below 1; when it runs, for a figure that the tuner does not report.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.cosine_vp(), (1,))
      >>> model = lambda w: lambda x, t, cond=None: w + 0 * x
      >>> reward, heldout = lambda x0, cond=None: x0[:, 0], lambda x0, cond=None: -((x0[:, 0] - 1) ** 2)
      >>> tuner = rgdiff.tuners.draft(model, process, reward, process.times(2), optax.sgd(0.5), batch=2, heldout=heldout)
      >>> stopping = rgdiff.tuners.early_stopping(tuner, window=1, patience=2)
      >>> state = rgdiff.tuners.fit(stopping, jax.random.key(0), stopping.init(jnp.zeros(1)), 50)
      >>> print(state.best, bool(state.stopped))  # the held-out reward is highest at 1
      [1.] True
    """
    return EarlyStopping(
        tuner,
        jnp.float32(limit),
        metric,
        limited,
        checks.at_least("window", window, 1),
        checks.at_least("patience", patience, 1),
    )
