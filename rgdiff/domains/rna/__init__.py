"""RNA that folds: sequences of a length, their secondary structure by ViennaRNA as a reward, and their judge.

Reach the rest by module: `folding`, `data`, `tasks` (what `reward/*.yaml` name), `judge`. Nothing is imported before it is used:
`folding` runs in processes that need no JAX.
"""

from typing import TYPE_CHECKING

from rgdiff._lazy import submodules

if TYPE_CHECKING:
    from rgdiff.domains.rna.data import RnaDomain, rna
    from rgdiff.domains.rna.judge import FoldingJudge

__all__ = ["FoldingJudge", "RnaDomain", "rna"]
__getattr__, __dir__ = submodules(
    __name__, ["data", "folding", "judge", "tasks"], {"FoldingJudge": "judge", "RnaDomain": "data", "rna": "data"}
)
