"""DxDP, diffusion by dynamic programming: a few-step sampler tuned to a known reward without backpropagation through time.

The engine is `_max_ent`; here are its options with their meaning, which `dxmi` shares, and the costs of time.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rgdiff import checks
from rgdiff._settings import setting_of
from rgdiff.rewards import differentiable
from rgdiff.tuners._max_ent import Ablation, MaximumEntropy, Rates
from rgdiff.typing import Array, Process, RewardLike, callable_pytree


@functools.cache
def adam(b1: float = 0.9, b2: float = 0.999) -> Any:
    """Adam without its learning rate, which is a number of the tuner: changing it does not compile again."""
    import optax

    return optax.scale_by_adam(b1, b2)


def sigmoid_time_cost(steps: int, scale: float = 1.0) -> Array:
    """Return the released cost of each move, which sums to about `scale`.

        cost_i = scale [sig(T // 2 - i) - sig(T // 2 - i - 1)],  i = 0 .. T - 1

    Args:
      steps: T, the number of moves.
      scale: sum of the costs as T grows, in the reward's unit.

    Returns:
      Costs [T], for `time_cost` of `dxdp` and `dxmi`.

    Raises:
      ValueError: for fewer than one move.

    Example:
      >>> import rgdiff
      >>> print(*[f"{cost:.2f}" for cost in rgdiff.tuners.sigmoid_time_cost(4)])  # the middle costs most
      0.15 0.23 0.23 0.15
    """
    i = checks.at_least("steps", steps, 1) // 2 - jnp.arange(steps)
    return scale * (jax.nn.sigmoid(i * 1.0) - jax.nn.sigmoid(i - 1.0))


def settings(
    model: Any,
    process: Process,
    value: Any,
    times: Array | None = None,
    *,
    batch: int = 256,
    temperature: float = 0.05,
    velocity_temperature: float | None = None,
    learning_rate: float = 1e-3,
    sigma_learning_rate: float | None = None,
    value_learning_rate: float | None = None,
    energy_learning_rate: float | None = None,
    decay_steps: float = float("inf"),
    warmup: int = 0,
    clip: float = 0.1,
    time_cost: float | Array = 0.0,
    velocity_decay: float = 0.99,
    speed: Array | None = None,
    ablation: Ablation | Mapping[str, Any] = Ablation(),  # noqa: B008 - a tuple of constants
    ema_decay: float | None = 0.999,
    target_decay: float | None = None,
    limit: float = 10.0,
    optimizer: Any = None,
) -> dict[str, Any]:
    """Check the options that `dxdp` and `dxmi` share, and return the fields of the engine.

    The sampler aims at p(x) proportional to exp(r(x) / temperature), with no prior in it, or with r = -E, and comes as near as
    its few Gaussian moves can.

    Args:
      model: params -> denoiser of `process`, (x [B, ...], t, cond) -> [B, ...]: a `policies.policy`, or any model whose kernels
        are Gaussian.
      process: a law at every move and no projection at the end: from `policies.few_step`.
      value: params -> V, (x [B, ...], t, cond) -> [B], a cost to go in the reward's unit.
      times: the grid [T + 1] of moves, `process.times()` by default.
      batch: B, chains an iteration.
      temperature: tau, the reward's unit per nat, for a whole example. All terms of the bound are kept, so that E V at the first
        time is an upper bound of -tau log of the integral of exp(r / tau), up to the prior's entropy.
      velocity_temperature: weight of the quadratic cost, the same unit; `temperature` by default.
      learning_rate, sigma_learning_rate, value_learning_rate, energy_learning_rate: of Adam for the policy's network, its log
        sigma, V and a separate energy; the first by default. They decay as a cosine to 0 at `decay_steps`.
      decay_steps: iterations of that decay; infinity for constant rates.
      warmup: iterations without a policy step. A pre-trained policy needs them: V is random at first.
      clip: largest norm of the policy's gradient.
      time_cost: one number or one per move [T], e.g. `sigmoid_time_cost(T)`, reward's unit; added to the targets of V.
      velocity_decay: decay of the running mean s_t^2 of squared moves.
      speed: first values of s_t^2 [T], squared data units; by default those of 4,096 chains.
      ablation: an `Ablation`, or a dict of some of its fields.
      ema_decay: decay of averaged parameters (`state.best`), or None.
      target_decay: take the targets of V from an average of its parameters with this decay; None: from V itself.
      limit: an iteration in which a speed s_t exceeds `limit` times its first, or anything is not finite, is undone and counted
        (info `skipped`, `diverged`); `runtime.Run.fit` stops after 20 of them and keeps the last good state.
      optimizer: an optax scaling of gradients without a learning rate; Adam by default.

    Returns:
      A dict of the fields of `MaximumEntropy`, all but the reward.

    Raises:
      ValueError: for eta = 0, a process that projects, unknown names, numbers out of range.
    """
    checks.law(process, "maximum-entropy policy improvement")
    if process.projects:
        raise ValueError(
            "a chain that ends with a projection has no law of its last state; "
            "make it a few-step process: policies.few_step(policies.levels(process.schedule, T), process.shape)"
        )
    grid = checks.times(process.times() if times is None else times, process)  # type: ignore[call-arg]
    moves = grid.shape[0] - 1
    costs = jnp.asarray(time_cost, jnp.float32)
    if costs.shape not in ((), (moves,)):
        raise ValueError(f"time_cost is one number or one per move, [{moves}], got shape {list(costs.shape)}")
    if speed is not None:
        checks.shape("speed", speed, (moves,))
        speed = checks.positive("speed", speed)
    if not isinstance(ablation, Ablation):
        for name in ablation:
            checks.one_of("a name in ablation", name, Ablation._fields)
        ablation = Ablation(**ablation)
    number = lambda name, given, default: checks.positive(name, default if given is None else given, zero=True)  # noqa: E731
    decay = jnp.asarray(decay_steps, jnp.float32)
    return {
        "model": callable_pytree(model, "model (params -> denoiser)"),
        "process": process,
        "value": callable_pytree(value, "value (params -> cost to go)"),
        "times": grid,
        "temperature": checks.positive("temperature", temperature, zero=True),
        "velocity_temperature": number("velocity_temperature", velocity_temperature, temperature),
        "time_cost": jnp.broadcast_to(costs, (moves,)),
        "rates": Rates(
            number("learning_rate", learning_rate, 0.0),
            number("sigma_learning_rate", sigma_learning_rate, learning_rate),
            number("value_learning_rate", value_learning_rate, learning_rate),
            number(
                "energy_learning_rate",
                energy_learning_rate,
                learning_rate if value_learning_rate is None else value_learning_rate,
            ),
        ),
        "decay_steps": decay,
        "warmup": checks.positive("warmup", warmup, zero=True),
        "clip": checks.positive("clip", clip),
        "velocity_decay": checks.positive("velocity_decay", velocity_decay, zero=True),
        "speed": speed,
        "ema_decay": None if ema_decay is None else checks.positive("ema_decay", ema_decay, zero=True),
        "target_decay": None if target_decay is None else checks.positive("target_decay", target_decay, zero=True),
        "limit": checks.positive("limit", limit),
        "optimizer": adam() if optimizer is None else checks.optimizer(optimizer),
        "batch": checks.at_least("batch", batch, 1),
        "ablation": ablation.checked(),
    }


@setting_of(settings)
def dxdp(
    model: Any, process: Process, reward: RewardLike, value: Any, times: Array | None = None, **options: Any
) -> MaximumEntropy:
    """Tune a few-step sampler towards p(x) proportional to exp(r(x) / temperature) by dynamic programming (arXiv 2407.00626, algorithm 1).

    There is no prior in the target. A few Gaussian moves, each of one variance, come as near to that law as they can; the bound
    below says how near. With the auxiliary law N(x_t, s_t^2) of x_t given x_{t+1}, the costs to go obey the soft Bellman equation

        V_T = -r,   V_t(x) = min over pi of E[V_{t+1}(y) + tau (log pi(y | x) + |y - x|^2 / 2 s_t^2 + D/2 log 2 pi s_t^2)],

    y ~ pi(. | x), t counting moves. An iteration draws chains; s_t^2 is a running mean of their squared move per dimension (the
    paper's adaptive velocity; once it has settled, the quadratic cost is tau/2 per dimension); every V_t takes one step
    towards the right-hand side of the present policy; and the policy takes one step down its gradient, through one move and
    V_{t+1} alone.

    Args:
      reward: (x0 [B, ...], cond) -> [B], differentiable, known.
      value: params -> V, (x [B, ...], t, cond) -> [B], a cost in the reward's unit: `lambda p: from_linen(nets.ValueMLP(), p)`. It
        is not evaluated at t = 0, where minus the reward is the cost.

    Returns:
      A tuner for `fit`; parameters are {"policy": ..., "value": ...}. `tuner.model(params["policy"])` is the denoiser to sample
      with, for `params = state.best`, `tuner.togo(params)` the cost to go; `state.extra.speed` is s_t^2. info: reward, loss (of V),
      policy_loss, gradient_norm, running_cost, skipped, diverged.

    Raises:
      ValueError: for eta = 0, a process that projects, a black box, or options out of range. A reward that is not finite where
        chains end undoes the iteration; give it a lower bound.

    Note:
      Released code means both regularisers per dimension: its tau is D times ours. It draws B of the T B transitions at
      random; one move of each chain has the same law of one transition, and independent ones.

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> from rgdiff import policies, tuners
      >>> process = policies.few_step(policies.variances([0.5, 0.5]), (1,))  # two moves
      >>> policy = policies.policy(process, lambda w: lambda x, t, cond=None: w + 0 * x)  # each moves x by w
      >>> value = lambda c: lambda x, t, cond=None: c * x[:, 0]
      >>> tuner = tuners.dxdp(policy, process, lambda x, cond=None: -x[:, 0] ** 2, value, batch=16, speed=jnp.ones(2))
      >>> params = {"policy": policy.init(jnp.zeros(1)), "value": jnp.float32(0)}
      >>> state = tuners.fit(tuner, jax.random.key(0), tuner.init(params), 5)
      >>> print(int(state.step), int(state.skipped), state.extra.speed.shape)
      5 0 (2,)
    """
    differentiable("dxdp", reward)
    return MaximumEntropy(
        reward=callable_pytree(reward, "a reward"), **settings(model, process, value, times, **options)
    )
