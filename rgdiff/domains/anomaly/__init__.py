"""One-class problems: learn from normal examples, tell anomalous ones apart; and their judge.

Reach the rest by module: `data`, `tasks` (what `reward/*.yaml` name), `judge`.
"""

from rgdiff.domains.anomaly.data import AnomalyDomain, one_class
from rgdiff.domains.anomaly.judge import AnomalyJudge

__all__ = ["AnomalyDomain", "AnomalyJudge", "one_class"]
