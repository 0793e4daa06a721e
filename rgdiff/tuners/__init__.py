"""Training methods, driven by one loop: `fit(tuner, key, state, steps)`."""

from rgdiff.rewards import RewardFailure
from rgdiff.tuners import advantages
from rgdiff.tuners._adjoint_matching import adjoint_matching
from rgdiff.tuners._drakes import drakes, drakes_published
from rgdiff.tuners._dxdp import dxdp, sigmoid_time_cost
from rgdiff.tuners._dxmi import dxmi, dxmi_released
from rgdiff.tuners._elegant import elegant, initial_tuner, initial_value, standard_normal
from rgdiff.tuners._gcd import gcd
from rgdiff.tuners._gradient_guidance import GuidanceState, gradient_guidance
from rgdiff.tuners._loop import TrainState, fit, start, update
from rgdiff.tuners._pretraining import masked_bound, pretraining
from rgdiff.tuners._reward_backprop import reward_backprop
from rgdiff.tuners._sft_pg import sft_pg
from rgdiff.tuners.diagnostics import gradient_statistics
from rgdiff.tuners.ema import ema_update
from rgdiff.tuners.energy_model import langevin_energy, log_partition
from rgdiff.tuners.online import as_tuner, fit_online
from rgdiff.tuners.optimizers import adamw, float32_master
from rgdiff.tuners.policy_gradient import ddpo, dpok
from rgdiff.tuners.reward_gradients import (
    alignprop,
    alignprop_subset,
    draft,
    draft_k,
    draft_lv,
    draft_plus,
    drtune,
    refl,
)
from rgdiff.tuners.stopping import StoppingState, early_stopping
from rgdiff.tuners.value_learning import rollouts, temporal_difference, value_regression
from rgdiff.tuners.weighted_regression import filtered, reward_weighted

__all__ = [
    "GuidanceState",
    "RewardFailure",
    "StoppingState",
    "TrainState",
    "adamw",
    "adjoint_matching",
    "advantages",
    "alignprop",
    "alignprop_subset",
    "as_tuner",
    "ddpo",
    "dpok",
    "draft",
    "draft_k",
    "draft_lv",
    "draft_plus",
    "drakes",
    "drakes_published",
    "drtune",
    "dxdp",
    "dxmi",
    "dxmi_released",
    "early_stopping",
    "elegant",
    "ema_update",
    "filtered",
    "fit",
    "fit_online",
    "float32_master",
    "gcd",
    "gradient_guidance",
    "gradient_statistics",
    "initial_tuner",
    "initial_value",
    "langevin_energy",
    "log_partition",
    "masked_bound",
    "pretraining",
    "refl",
    "reward_backprop",
    "reward_weighted",
    "rollouts",
    "sft_pg",
    "sigmoid_time_cost",
    "standard_normal",
    "start",
    "temporal_difference",
    "update",
    "value_regression",
]
