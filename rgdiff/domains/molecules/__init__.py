"""Molecules as graphs: released priors by path, properties by RDKit, and the judge that draws them.

Reach the rest by module: `chemistry`, `rewards`, `data`, `tasks` (what `reward/*.yaml` name), `judge`.
"""

from rgdiff.domains.molecules.data import MoleculeDomain, molecules
from rgdiff.domains.molecules.judge import MoleculeJudge

__all__ = ["MoleculeDomain", "MoleculeJudge", "molecules"]
