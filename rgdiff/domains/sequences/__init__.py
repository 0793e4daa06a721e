"""DNA, RNA and protein sequences of one length, from files or enumerated; rewards on them; and their judge.

Reach the rest by module: `data`, `tasks` (what `reward/*.yaml` name), `judge`.
"""

from rgdiff.domains.sequences.data import SequenceDomain, sequences, tfbind8, utr
from rgdiff.domains.sequences.judge import SequenceJudge

__all__ = ["SequenceDomain", "SequenceJudge", "sequences", "tfbind8", "utr"]
