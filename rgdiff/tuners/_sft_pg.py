"""SFT-PG: shortcut fine-tuning of a few-step sampler by policy gradient, its reward a critic that tells data from samples.

The critic f maximises an integral probability metric, E_data f - E_samples f over a class of smooth functions; the
sampler's policy gradient raises E_samples f. Data come through `fit(data={"x0": ...}, batch=...)`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rgdiff import checks
from rgdiff._settings import setting_of
from rgdiff.shards import Shards, bound, value_and_grad
from rgdiff.tuners._loop import TrainState, start, update
from rgdiff.tuners.policy_gradient import PolicyGradient, ddpo
from rgdiff.typing import (
    Array,
    Cond,
    Info,
    Key,
    Model,
    Params,
    Process,
    State,
    callable_pytree,
    name_of,
    pytree,
    static,
)

CONSTRAINTS = ("gradient_penalty", "weight_clipping")


@pytree
class ShortcutTuning:
    """A tuner for `fit`. Build it with `sft_pg`. Its state's `extra` is (the policy's own, the critic's TrainState)."""

    policy: PolicyGradient
    critic: Any
    critic_params: Params
    penalty: Array
    bound: Array
    critic_optimizer: Any = static()
    constraint: str = static()
    critic_steps: int = static()
    project: bool = static(default=True)
    shards: Shards | None = static(default=None)

    @property
    def batch(self) -> int:
        return self.policy.batch

    @property
    def process(self) -> Process:
        return self.policy.process

    def init(self, params: Params) -> TrainState:
        state = self.policy.init(params)
        return state._replace(extra=(state.extra, start(self.critic_params, self.critic_optimizer)))

    def suits(self, data: Any) -> None:
        """Refuse data that are not examples of the process."""
        checks.entries(data, "x0")
        checks.examples("data['x0']", data["x0"], self.process)

    def step(self, key: Key, state: TrainState, batch: Any) -> tuple[TrainState, Info]:
        """Take one step on batch = {"x0": data [M, ...]} and, optionally, "cond" [M, ...], for which samples are then drawn."""
        key_rollout, key_critic, key_update = jax.random.split(key, 3)
        own, critic = state.extra
        state = state._replace(extra=own)
        experience = self.policy.rollout(key_rollout, state, batch.get("cond"))
        critic, info = self._learn(key_critic, critic, batch["x0"], experience.x0, batch.get("cond"), experience.cond)
        f = lambda x0, cond=None: _judge(self.critic(critic.params), x0, cond)  # noqa: E731
        rewards = f(experience.x0, experience.cond)
        state, more = self.policy.update(key_update, state, experience, rewards, f if self.project else None)
        more.pop("reward")  # the critic's own unit means nothing; `ipm` does
        return state._replace(extra=(state.extra, critic)), info | more

    def network_calls(self) -> int:
        return self.policy.network_calls()

    def _learn(
        self, key: Key, critic: TrainState, data: State, samples: State, cond: Cond, sample_cond: Cond
    ) -> tuple[TrainState, Info]:
        """Take `critic_steps` optimiser steps of the critic, and report its metric after them."""

        def metric(params: Params) -> Array:
            f = lambda x0, cond: _judge(bound(self.critic, params, "a critic"), x0, cond)  # noqa: E731
            return jnp.mean(f(data, cond)) - jnp.mean(f(samples, sample_cond))

        def loss(params: Params, key: Key) -> Array:
            value = -metric(params)
            if self.constraint == "gradient_penalty":
                value += self.penalty * self._steepness(params, key, data, samples, cond)
            return value

        def one(critic: TrainState, key: Key) -> tuple[TrainState, None]:
            new, _ = update(critic, value_and_grad(loss, self.shards)(critic.params, key)[1], self.critic_optimizer)
            if self.constraint == "weight_clipping":
                new = new._replace(params=jax.tree.map(lambda p: jnp.clip(p, -self.bound, self.bound), new.params))
            return new, None

        critic, _ = jax.lax.scan(one, critic, jax.random.split(key, self.critic_steps))
        return critic, {"ipm": metric(critic.params), "critic_skipped": critic.skipped}

    def _steepness(self, params: Params, key: Key, data: State, samples: State, cond: Cond) -> Array:
        """E (|grad f| - 1)^2 at random points between pairs of data and samples."""
        rows = min(jax.tree.leaves(tree)[0].shape[0] for tree in (data, samples))
        u = jax.random.uniform(key, (rows,))

        def between(a: Array, b: Array) -> Array:
            share = u.reshape(-1, *[1] * (a.ndim - 1))
            return share * a[:rows] + (1 - share) * b[:rows]

        points = jax.tree.map(between, data, samples)
        cond = jax.tree.map(lambda c: c[:rows], cond)
        slope = jax.grad(lambda x: jnp.sum(_judge(bound(self.critic, params, "a critic"), x, cond)))(points)
        square = sum(jnp.sum(leaf.reshape(rows, -1) ** 2, -1) for leaf in jax.tree.leaves(slope))
        return jnp.mean((jnp.sqrt(square + 1e-12) - 1) ** 2)


def _judge(critic: Any, x0: State, cond: Cond) -> Array:
    """f(x0, cond), checked. [B]"""
    return checks.per_example(
        f"the critic {name_of(critic)} must return", critic(x0, cond), jax.tree.leaves(x0)[0].shape[0]
    )


@setting_of(ddpo)
def sft_pg(
    model: Model,
    process: Process,
    times: Array,
    optimizer: Any,
    *,
    batch: int,
    critic: Any,
    critic_params: Params,
    critic_optimizer: Any,
    critic_steps: int = 5,
    constraint: str = "gradient_penalty",
    penalty: float = 10.0,
    bound: float = 0.01,
    project: bool = True,
    **options: Any,
) -> ShortcutTuning:
    """SFT-PG: bring the samples of a short chain nearer to data in an integral probability metric (arXiv 2301.13362).

        min over the sampler, max over f of  E_data[f] - E_samples[f],  f constrained to be smooth

    Data come through `fit(data={"x0": [N, ...]}, batch=...)`, with "cond" [N, ...] where there are conditions. The target is
    the data's law itself, not a tilted one.

    Args:
      times: the grid [T + 1] of the short chain, e.g. `process.times(10)`.
      batch: B, samples a step; `fit` has its own `batch`, the rows of data. With conditions the two are one number.
      critic: params -> f, (x0 [B, ...], cond) -> [B], high on data.
      critic_params: f's first parameters.
      critic_optimizer, critic_steps: f's own optax transformation, and its steps a batch, before the policy's.
      constraint: `gradient_penalty` (penalty * E(|grad f| - 1)^2 between data and samples: Wasserstein-1, arXiv
        1704.00028) or `weight_clipping` (every parameter within +-bound).
      penalty: weight of the gradient penalty.
      bound: largest absolute value of f's parameters under `weight_clipping`.
      project: add the critic's gradient through the projection to data, which is no draw.

    Returns:
      A tuner for `fit`; `state.best` holds the sampler's parameters, `state.extra[1].params` the critic's. info: ipm (the
      metric after the critic's steps), critic_skipped, infeasible, gradient_norm, skipped.

    Raises:
      ValueError: for repeats other than 1, an unknown constraint, and as `ddpo`.

    Note:
      Released settings are clip=0.1, epochs=10; the paper's baseline is advantage=learnt_baseline(...). The paper's last step
      draws with standard deviation 1e-3 and has a policy gradient like the others. Ours is the limit of none, a projection, in
      which that gradient becomes the critic's own through it.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.cosine_vp(), (1,))
      >>> model = lambda w: lambda x, t, cond=None: w + 0 * x  # samples are w, data 1
      >>> tuner = rgdiff.tuners.sft_pg(
      ...     model, process, process.times(3), optax.sgd(0.05), batch=16, critic=lambda a: lambda x, cond=None: a * x[:, 0],
      ...     critic_params=jnp.float32(0), critic_optimizer=optax.sgd(0.02))
      >>> data = {"x0": jnp.ones((16, 1))}
      >>> print(rgdiff.tuners.fit(tuner, jax.random.key(0), tuner.init(jnp.zeros(1)), 5, data=data, batch=16).params > 0)
      [ True]
    """
    policy = ddpo(model, process, times, optimizer, batch=batch, **options)
    if policy.repeats != 1:
        raise ValueError("sft_pg draws one sample for each row of the data's conditions; leave out repeats")
    return ShortcutTuning(
        policy=policy,
        critic=callable_pytree(critic, "critic (params -> f(x0, cond))"),
        critic_params=critic_params,
        penalty=checks.positive("penalty", penalty, zero=True),
        bound=checks.positive("bound", bound),
        critic_optimizer=checks.optimizer(critic_optimizer, "critic_optimizer"),
        constraint=checks.one_of("constraint", constraint, CONSTRAINTS),
        critic_steps=checks.at_least("critic_steps", critic_steps, 1),
        project=bool(project),
    )
