"""Reward gradients in Gaussian chains, each name as its paper has it: DRaFT, DRaFT-K, -LV, -plus, ReFL, AlignProp, DRTune.

Each is a setting of the one engine (`reward_backprop`, whose options they all take) with its citation and, where public
code does something else than the paper, a note.
"""

from __future__ import annotations

from typing import Any

from rgdiff import checks
from rgdiff._settings import setting_of
from rgdiff.tuners import plans
from rgdiff.tuners._reward_backprop import RewardBackprop, reward_backprop
from rgdiff.typing import Array, Denoiser, Model, Process, Reward


@setting_of(reward_backprop, fixed=("truncation",))
def draft(
    model: Model, process: Process, reward: Reward, times: Array, optimizer: Any, **options: Any
) -> RewardBackprop:
    """DRaFT: the gradient through the whole chain (arXiv 2309.17400, algorithm 1)."""
    return reward_backprop(model, process, reward, times, optimizer, truncation=None, **options)


@setting_of(reward_backprop, fixed=("truncation",))
def draft_k(
    model: Model,
    process: Process,
    reward: Reward,
    times: Array,
    optimizer: Any,
    *,
    k: int = 1,
    dynamic: bool = False,
    **options: Any,
) -> RewardBackprop:
    """DRaFT-K: the gradient through the last k network calls, earlier states held constant (arXiv 2309.17400, §3).

    With `dynamic`, k is a number of the one program: changing it does not compile again.
    """
    truncation = plans.last(k) if dynamic else k
    return reward_backprop(model, process, reward, times, optimizer, truncation=truncation, **options)


@setting_of(reward_backprop, fixed=("truncation", "renoised"))
def draft_lv(
    model: Model,
    process: Process,
    reward: Reward,
    times: Array,
    optimizer: Any,
    *,
    n: int = 2,
    on_trajectory: bool = True,
    reduce: str = "sum",
    **options: Any,
) -> RewardBackprop:
    """DRaFT-LV: DRaFT-1 plus n noisings of the final sample to the last time, each denoised in one call (arXiv 2309.17400, §3.3).

    Note:
      Public re-implementations disagree: some replace the chain's own term (on_trajectory=False) or average
      (reduce="mean"). The default is the paper's box: both, summed, with the final sample held constant.
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


@setting_of(reward_backprop, fixed=("truncation", "penalty", "penalize", "kl_budget", "kl_rate"))
def draft_plus(
    model: Model,
    process: Process,
    reward: Reward,
    times: Array,
    optimizer: Any,
    *,
    reference: Denoiser,
    k: int = 1,
    weight: float = 0.1,
    **options: Any,
) -> RewardBackprop:
    """DRaFT+: DRaFT-K with the squared difference of the predicted noise to the prior's at the live calls.

    Its annealed guidance at sampling time is `rgdiff.denoisers.annealed`.

    Note:
      NeMo-Aligner calls the term a KL; it carries no weight of the schedule and DDIM has no law. A path KL in nats is
      `draft_k(..., reference=, temperature=)` with eta > 0.
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
    model: Model, process: Process, reward: Reward, times: Array, optimizer: Any, *, m: int = 20, **options: Any
) -> RewardBackprop:
    """ReFL: the reward of one call's prediction of x0, drawn among the last m calls; all before it is constant.

    arXiv 2304.05977, algorithm 1, without its pre-training loss (which the released code does not have either); m = 1 is
    DRaFT-1. Put the paper's relu(2 - r) into the reward.
    """
    return reward_backprop(model, process, reward, times, optimizer, truncation=plans.late(m), **options)


@setting_of(reward_backprop, fixed=("truncation",))
def alignprop(
    model: Model,
    process: Process,
    reward: Reward,
    times: Array,
    optimizer: Any,
    *,
    mean: float = 42.0,
    std: float = 5.0,
    **options: Any,
) -> RewardBackprop:
    """AlignProp: the gradient through a random suffix of the chain, drawn anew at every step (arXiv 2310.03739).

    `mean` and `std` of the first live call in fiftieths of the chain. The published loss is |10 - r|, a reward's business.
    """
    return reward_backprop(model, process, reward, times, optimizer, truncation=plans.suffix(mean, std), **options)


@setting_of(reward_backprop, fixed=("truncation",))
def alignprop_subset(
    model: Model, process: Process, reward: Reward, times: Array, optimizer: Any, **options: Any
) -> RewardBackprop:
    """What AlignProp's first code and TRL do under its name: every call by itself is live with probability i / (n + 1)."""
    return reward_backprop(model, process, reward, times, optimizer, truncation=plans.Subset(), **options)


@setting_of(reward_backprop, fixed=("truncation", "input_gradient"))
def drtune(
    model: Model,
    process: Process,
    reward: Reward,
    times: Array,
    optimizer: Any,
    *,
    k: int = 5,
    m: int = 20,
    **options: Any,
) -> RewardBackprop:
    """DRTune: k calls at equal distances, without their input's gradient, the chain ended at one of the last m (arXiv 2405.00760)."""
    plan = plans.spaced(k, m)
    return reward_backprop(model, process, reward, times, optimizer, truncation=plan, input_gradient=False, **options)
