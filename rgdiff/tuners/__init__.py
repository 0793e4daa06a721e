"""Training methods, driven by one loop: `fit(tuner, key, state, steps)`."""

from rgdiff.tuners._loop import TrainState, fit, start, update
from rgdiff.tuners.ema import ema_update
from rgdiff.tuners.optimizers import adamw
from rgdiff.tuners.pretraining import masked_bound, pretraining, value_regression
from rgdiff.tuners.reward_backprop import draft, draft_k, draft_lv, reward_backprop

__all__ = [
    "TrainState",
    "adamw",
    "draft",
    "draft_k",
    "draft_lv",
    "ema_update",
    "fit",
    "masked_bound",
    "pretraining",
    "reward_backprop",
    "start",
    "update",
    "value_regression",
]
