"""Surrogates: beliefs about an expensive reward, learnt from its answers, with their uncertainty."""

from rgdiff.surrogates._calibration import Coverage, calibration, coverage
from rgdiff.surrogates._deep_features import deep_features
from rgdiff.surrogates._ensemble import ensemble
from rgdiff.surrogates._feasibility import feasibility, feasibility_network
from rgdiff.surrogates._gaussian_process import gaussian_process
from rgdiff.surrogates._ridge import ridge
from rgdiff.surrogates.beliefs import Belief, Optimistic, Surrogate, greedy, thompson
from rgdiff.surrogates.covariances import rbf, tanimoto
from rgdiff.surrogates.features import flatten, fourier, pairs, with_constant
from rgdiff.surrogates.observations import Observations, append, empty

__all__ = [
    "Belief",
    "Coverage",
    "Observations",
    "Optimistic",
    "Surrogate",
    "append",
    "calibration",
    "coverage",
    "deep_features",
    "empty",
    "ensemble",
    "feasibility",
    "feasibility_network",
    "flatten",
    "fourier",
    "gaussian_process",
    "greedy",
    "pairs",
    "rbf",
    "ridge",
    "tanimoto",
    "thompson",
    "with_constant",
]
