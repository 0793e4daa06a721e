"""Molecules as graphs, with released priors by path, or as strings; properties by RDKit, and the judges that draw them.

Reach the rest by module: `chemistry`, `rewards`, `data`, `smiles`, `tasks` (what `reward/*.yaml` name), `judge`. Nothing is imported before
it is used: `chemistry` runs in processes that need no JAX.
"""

from typing import TYPE_CHECKING

from rgdiff._lazy import submodules

if TYPE_CHECKING:
    from rgdiff.domains.molecules.data import MoleculeDomain, molecules
    from rgdiff.domains.molecules.judge import MoleculeJudge, SmilesJudge
    from rgdiff.domains.molecules.smiles import SmilesDomain

__all__ = ["MoleculeDomain", "MoleculeJudge", "SmilesDomain", "SmilesJudge", "molecules"]
__getattr__, __dir__ = submodules(
    __name__,
    ["chemistry", "comparison", "data", "docking", "judge", "properties", "rewards", "smiles", "tasks"],
    {
        "MoleculeDomain": "data",
        "MoleculeJudge": "judge",
        "SmilesDomain": "smiles",
        "SmilesJudge": "judge",
        "molecules": "data",
    },
)
