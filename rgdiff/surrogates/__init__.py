"""Surrogates: what is believed of an expensive reward after some answers, and how sure that is."""

from rgdiff.surrogates.beliefs import Belief, Optimistic, Surrogate, greedy, thompson
from rgdiff.surrogates.calibration import Coverage, calibration, coverage
from rgdiff.surrogates.covariances import rbf, tanimoto
from rgdiff.surrogates.deep_features import deep_features
from rgdiff.surrogates.ensemble import ensemble
from rgdiff.surrogates.feasibility import feasibility, feasibility_network
from rgdiff.surrogates.features import flatten, fourier, pairs, with_constant
from rgdiff.surrogates.gaussian_process import gaussian_process
from rgdiff.surrogates.observations import Observations, append, empty
from rgdiff.surrogates.ridge import ridge

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
