"""Images: real digits, MNIST by path, or a user's own; classifiers and rewards on them; and their judge.

Reach the rest by module: `data`, `tasks` (what `reward/*.yaml` name), `judge`.
"""

from rgdiff.domains.images.data import ImageDomain, custom, digits, mnist
from rgdiff.domains.images.judge import ImageJudge

__all__ = ["ImageDomain", "ImageJudge", "custom", "digits", "mnist"]
