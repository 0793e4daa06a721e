"""Points in the plane whose log density is known, and thin curves; rewards on them; and their judge.

Reach the rest by module: `data`, `tasks` (what `reward/*.yaml` name), `judge`.
"""

from rgdiff.domains.planar.data import PlanarDomain, curve, planar
from rgdiff.domains.planar.judge import PlanarJudge

__all__ = ["PlanarDomain", "PlanarJudge", "curve", "planar"]
