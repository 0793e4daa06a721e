"""The worlds of the gradient-guidance paper (arXiv 2404.14743): a Gaussian on a subspace and a sphere; and their judge.

Reach the rest by module: `data`, `tasks` (what `reward/*.yaml` name), `judge`.
"""

from rgdiff.domains.subspace.data import VectorDomain, linear, sphere
from rgdiff.domains.subspace.judge import VectorJudge

__all__ = ["VectorDomain", "VectorJudge", "linear", "sphere"]
