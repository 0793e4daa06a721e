"""Surrogates: what is believed of an expensive reward after some answers, with how sure that is."""

from rgdiff.surrogates.beliefs import Belief, Optimistic, Surrogate, greedy, thompson
from rgdiff.surrogates.ensemble import ensemble
from rgdiff.surrogates.features import flatten, fourier, pairs, with_constant
from rgdiff.surrogates.observations import Observations, append, empty
from rgdiff.surrogates.ridge import ridge

__all__ = [
    "Belief",
    "Observations",
    "Optimistic",
    "Surrogate",
    "append",
    "empty",
    "ensemble",
    "flatten",
    "fourier",
    "greedy",
    "pairs",
    "ridge",
    "thompson",
    "with_constant",
]
