"""A protein's measured variants, from files by path; learned brightness; and their judge.

Reach the rest by module: `data`, `tasks` (what `reward/*.yaml` name), `judge`.
"""

from rgdiff.domains.proteins.data import ProteinDomain, gfp, landscape
from rgdiff.domains.proteins.judge import ProteinJudge

__all__ = ["ProteinDomain", "ProteinJudge", "gfp", "landscape"]
