"""Training methods, driven by one loop: `fit(tuner, key, state, steps)`."""

from rgdiff.tuners._loop import TrainState, fit, start, update
from rgdiff.tuners.ema import ema_update
from rgdiff.tuners.gradient_guidance import GuidanceState, gradient_guidance
from rgdiff.tuners.optimizers import adamw
from rgdiff.tuners.pretraining import masked_bound, pretraining
from rgdiff.tuners.reward_backprop import draft, draft_k, draft_lv, reward_backprop
from rgdiff.tuners.value_learning import rollouts, temporal_difference, value_regression

__all__ = [
    "GuidanceState",
    "TrainState",
    "adamw",
    "draft",
    "draft_k",
    "draft_lv",
    "ema_update",
    "fit",
    "gradient_guidance",
    "masked_bound",
    "pretraining",
    "reward_backprop",
    "rollouts",
    "start",
    "temporal_difference",
    "update",
    "value_regression",
]
