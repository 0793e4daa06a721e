"""Numbers from a Gaussian mixture, whose laws are known by quadrature; and their judge.

Reach the rest by module: `data`, `tasks` (what `reward/*.yaml` name), `judge`.
"""

from rgdiff.domains.mixture.data import MixtureDomain, mixture
from rgdiff.domains.mixture.judge import MixtureJudge

__all__ = ["MixtureDomain", "MixtureJudge", "mixture"]
