"""Molecules as graphs: released priors by path, properties by RDKit, and the judge that draws them.

Reach the rest by module: `chemistry`, `rewards`, `data`, `tasks` (what `reward/*.yaml` name), `judge`. Nothing is imported before
it is used: `chemistry` runs in processes that need no JAX.
"""

from typing import TYPE_CHECKING

from rgdiff._lazy import submodules

if TYPE_CHECKING:
    from rgdiff.domains.molecules.data import MoleculeDomain, molecules
    from rgdiff.domains.molecules.judge import MoleculeJudge

__all__ = ["MoleculeDomain", "MoleculeJudge", "molecules"]
__getattr__, __dir__ = submodules(
    __name__,
    ["chemistry", "comparison", "data", "docking", "judge", "properties", "rewards", "tasks"],
    {"MoleculeDomain": "data", "MoleculeJudge": "judge", "molecules": "data"},
)
