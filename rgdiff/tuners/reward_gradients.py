"""Reward gradients in Gaussian chains, each name as its paper has it: DRaFT, DRaFT-K, -LV, -plus, ReFL, AlignProp, DRTune.

Each is a setting of the one engine (`reward_backprop`, whose options they all take) with its citation and, where public
code does something else than the paper, a note. Without `reference=` they maximise E[r(x0)] alone; with it and
`temperature=` they aim at p(x0) exp(r(x0)/temperature)/Z, as exactly as `reward_backprop` says and the truncation allows.
"""

from __future__ import annotations

from typing import Any

from rgdiff import checks
from rgdiff._settings import setting_of
from rgdiff.tuners import plans
from rgdiff.tuners._reward_backprop import RewardBackprop, reward_backprop
from rgdiff.typing import Array, DenoiserLike, Model, Process, RewardLike


@setting_of(reward_backprop, fixed=("truncation",))
def draft(
    model: Model, process: Process, reward: RewardLike, times: Array, optimizer: Any, **options: Any
) -> RewardBackprop:
    """DRaFT: maximise E[r(x0)] by the gradient through the whole chain (arXiv 2309.17400, algorithm 1).

    Returns:
      A tuner for `fit`; `state.best` holds the tuned parameters. State and info are those of `reward_backprop`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.cosine_vp(), (1,))
      >>> model = lambda w: lambda x, t, cond=None: w + 0 * x  # predicts x0 = w; the reward's gradient is 1
      >>> reward = lambda x0, cond=None: x0[:, 0]
      >>> tuner = rgdiff.tuners.draft(model, process, reward, process.times(4), optax.sgd(0.5), batch=2)
      >>> print(rgdiff.tuners.fit(tuner, jax.random.key(0), tuner.init(jnp.zeros(1)), 2).params)
      [1.]
    """
    return reward_backprop(model, process, reward, times, optimizer, truncation=None, **options)


@setting_of(reward_backprop, fixed=("truncation",))
def draft_k(
    model: Model,
    process: Process,
    reward: RewardLike,
    times: Array,
    optimizer: Any,
    *,
    k: int = 1,
    dynamic: bool = False,
    **options: Any,
) -> RewardBackprop:
    """DRaFT-K: maximise E[r(x0)] by the gradient through the last k network calls (arXiv 2309.17400, §3).

    States before those calls are constants.

    Args:
      k: number of network calls at the end of the chain that keep their gradient, at most all of them.
      dynamic: make k a number of the one program, so that changing it does not compile again; calls without gradient are
        then branches of one scan in place of a scan of their own.

    Returns:
      A tuner for `fit`; `state.best` holds the tuned parameters. State and info are those of `reward_backprop`.

    Raises:
      ValueError: for k below 1 or above the chain's number of calls, and as `reward_backprop`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.cosine_vp(), (1,))
      >>> model = lambda w: lambda x, t, cond=None: w + 0 * x  # predicts x0 = w; the reward's gradient is 1
      >>> reward = lambda x0, cond=None: x0[:, 0]
      >>> tuner = rgdiff.tuners.draft_k(model, process, reward, process.times(4), optax.sgd(0.5), batch=2, k=2)
      >>> print(rgdiff.tuners.fit(tuner, jax.random.key(0), tuner.init(jnp.zeros(1)), 2).params)
      [1.]
    """
    truncation = plans.last(k) if dynamic else k
    return reward_backprop(model, process, reward, times, optimizer, truncation=truncation, **options)


@setting_of(reward_backprop, fixed=("truncation", "renoised"))
def draft_lv(
    model: Model,
    process: Process,
    reward: RewardLike,
    times: Array,
    optimizer: Any,
    *,
    n: int = 2,
    on_trajectory: bool = True,
    reduce: str = "sum",
    **options: Any,
) -> RewardBackprop:
    """DRaFT-LV: DRaFT-1 plus n noisings of the final sample, each denoised in one call (arXiv 2309.17400, §3.3).

    The final sample is held constant and noised to the time of the last network call; the gradient has less variance.

    Args:
      n: noisings of each final sample.
      on_trajectory: keep the term of the chain's own sample beside the n renoised ones.
      reduce: `sum` or `mean` over these terms.

    Returns:
      A tuner for `fit`; `state.best` holds the tuned parameters. State and info are those of `reward_backprop`.

    Note:
      Public re-implementations disagree: some replace the chain's own term (on_trajectory=False) or average
      (reduce="mean"). The default is the paper's box: both, summed, with the final sample held constant.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.cosine_vp(), (1,))
      >>> model = lambda w: lambda x, t, cond=None: w + 0 * x  # predicts x0 = w; the reward's gradient is 1 + n
      >>> reward = lambda x0, cond=None: x0[:, 0]
      >>> tuner = rgdiff.tuners.draft_lv(model, process, reward, process.times(4), optax.sgd(0.5), batch=2, n=2)
      >>> print(rgdiff.tuners.fit(tuner, jax.random.key(0), tuner.init(jnp.zeros(1)), 2).params)
      [3.]
    """
    return reward_backprop(
        model,
        process,
        reward,
        times,
        optimizer,
        truncation=1,
        renoised=checks.at_least("n", n, 1),
        on_trajectory=on_trajectory,
        reduce=reduce,
        **options,
    )


@setting_of(reward_backprop, fixed=("truncation", "penalty", "penalize", "temperature", "kl_budget", "kl_rate"))
def draft_plus(
    model: Model,
    process: Process,
    reward: RewardLike,
    times: Array,
    optimizer: Any,
    *,
    reference: DenoiserLike,
    k: int = 1,
    weight: float = 0.1,
    **options: Any,
) -> RewardBackprop:
    """DRaFT+: DRaFT-K with a penalty on the squared difference of the predicted noise to the prior's.

        max over params of  E[r(x0)] - weight * sum over the last k calls of mean |eps - eps_reference|^2

    Its annealed guidance at sampling time is `rgdiff.denoisers.annealed`.

    Args:
      reference: the prior's denoiser, (x, t, cond) -> E[x0 | x_t].
      k: number of network calls at the end of the chain that keep their gradient and are penalised.
      weight: of the penalty, in the reward's unit.

    Returns:
      A tuner for `fit`; `state.best` holds the tuned parameters. State and info are those of `reward_backprop`.

    Note:
      NeMo-Aligner calls the term a KL; it carries no weight of the schedule and DDIM has no law. A path KL in nats is
      `draft_k(..., reference=, temperature=)` with eta > 0.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.cosine_vp(), (1,), eta=0.0)
      >>> model = lambda w: lambda x, t, cond=None: w + 0 * x
      >>> tuner = rgdiff.tuners.draft_plus(
      ...     model, process, lambda x0, cond=None: x0[:, 0], process.times(4), optax.sgd(0.5), batch=2,
      ...     reference=model(0.0), weight=0.0)  # without a weight it is DRaFT-1, the gradient is 1
      >>> print(rgdiff.tuners.fit(tuner, jax.random.key(0), tuner.init(jnp.zeros(1)), 2).params)
      [1.]
    """
    return reward_backprop(
        model,
        process,
        reward,
        times,
        optimizer,
        truncation=k,
        reference=reference,
        temperature=weight,
        penalty="eps_mse",
        penalize="live",
        **options,
    )


@setting_of(reward_backprop, fixed=("truncation",))
def refl(
    model: Model, process: Process, reward: RewardLike, times: Array, optimizer: Any, *, m: int = 20, **options: Any
) -> RewardBackprop:
    """ReFL: reward the x0 predicted by one call, drawn among the last m (arXiv 2304.05977, algorithm 1).

    States before that call are constants. m = 1 is DRaFT-1.

    Args:
      m: the call is drawn uniformly among the last m; clipped to the chain's number of calls.

    Returns:
      A tuner for `fit`; `state.best` holds the tuned parameters. State and info are those of `reward_backprop`.

    Note:
      The paper's pre-training loss is left out, as in the released code. Put the paper's relu(2 - r) into the reward.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.cosine_vp(), (1,))
      >>> model = lambda w: lambda x, t, cond=None: w + 0 * x  # predicts x0 = w; the reward's gradient is 1
      >>> reward = lambda x0, cond=None: x0[:, 0]
      >>> tuner = rgdiff.tuners.refl(model, process, reward, process.times(4), optax.sgd(0.5), batch=2, m=2)
      >>> print(rgdiff.tuners.fit(tuner, jax.random.key(0), tuner.init(jnp.zeros(1)), 2).params)
      [1.]
    """
    return reward_backprop(model, process, reward, times, optimizer, truncation=plans.late(m), **options)


@setting_of(reward_backprop, fixed=("truncation",))
def alignprop(
    model: Model,
    process: Process,
    reward: RewardLike,
    times: Array,
    optimizer: Any,
    *,
    mean: float = 42.0,
    std: float = 5.0,
    **options: Any,
) -> RewardBackprop:
    """AlignProp: the gradient through a random suffix of the chain, drawn anew at every step (arXiv 2310.03739).

    Args:
      mean, std: of the normal law of the first call that keeps its gradient, in fiftieths of the chain, truncated to [0, 50).

    Returns:
      A tuner for `fit`; `state.best` holds the tuned parameters. State and info are those of `reward_backprop`.

    Note:
      The published loss is |10 - r|; put it into the reward.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.cosine_vp(), (1,))
      >>> model = lambda w: lambda x, t, cond=None: w + 0 * x  # predicts x0 = w; the reward's gradient is 1
      >>> reward = lambda x0, cond=None: x0[:, 0]
      >>> tuner = rgdiff.tuners.alignprop(model, process, reward, process.times(4), optax.sgd(0.5), batch=2)
      >>> print(rgdiff.tuners.fit(tuner, jax.random.key(0), tuner.init(jnp.zeros(1)), 2).params)
      [1.]
    """
    return reward_backprop(model, process, reward, times, optimizer, truncation=plans.suffix(mean, std), **options)


@setting_of(reward_backprop, fixed=("truncation",))
def alignprop_subset(
    model: Model, process: Process, reward: RewardLike, times: Array, optimizer: Any, **options: Any
) -> RewardBackprop:
    """Keep the gradient of every call by itself, with probability i / (n + 1) for call i of n.

    AlignProp's first code and TRL use this rule under that name; it is no truncation. See `alignprop` for the paper's.

    Returns:
      A tuner for `fit`; `state.best` holds the tuned parameters. State and info are those of `reward_backprop`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.cosine_vp(), (1,))
      >>> model = lambda w: lambda x, t, cond=None: w + 0 * x  # predicts x0 = w; the reward's gradient is 1
      >>> reward = lambda x0, cond=None: x0[:, 0]
      >>> tuner = rgdiff.tuners.alignprop_subset(model, process, reward, process.times(4), optax.sgd(0.5), batch=2)
      >>> print(rgdiff.tuners.fit(tuner, jax.random.key(0), tuner.init(jnp.zeros(1)), 2).params)
      [1.]
    """
    return reward_backprop(model, process, reward, times, optimizer, truncation=plans.Subset(), **options)


@setting_of(reward_backprop, fixed=("truncation", "input_gradient"))
def drtune(
    model: Model,
    process: Process,
    reward: RewardLike,
    times: Array,
    optimizer: Any,
    *,
    k: int = 5,
    m: int = 20,
    **options: Any,
) -> RewardBackprop:
    """DRTune: backpropagate through k evenly spaced calls with detached inputs, and stop early (arXiv 2405.00760).

    The chain ends at a call drawn uniformly among the last m, whose prediction of x0 is rewarded.

    Args:
      k: number of calls that keep their gradient, at equal distances from a random first one.
      m: the chain ends at a call drawn among the last m.

    Returns:
      A tuner for `fit`; `state.best` holds the tuned parameters. State and info are those of `reward_backprop`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.cosine_vp(), (1,))
      >>> model = lambda w: lambda x, t, cond=None: w + 0 * x  # predicts x0 = w; the reward's gradient is positive
      >>> reward = lambda x0, cond=None: x0[:, 0]
      >>> tuner = rgdiff.tuners.drtune(model, process, reward, process.times(4), optax.sgd(0.5), batch=2, k=2, m=2)
      >>> print(rgdiff.tuners.fit(tuner, jax.random.key(0), tuner.init(jnp.zeros(1)), 2).params > 0)
      [ True]
    """
    plan = plans.spaced(k, m)
    return reward_backprop(model, process, reward, times, optimizer, truncation=plan, input_gradient=False, **options)
