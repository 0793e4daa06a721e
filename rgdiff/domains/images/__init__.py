"""Images: real digits, MNIST or a user's files by path, digits that come with the package, or a user's own arrays; classifiers and rewards on them; and their judge.

Reach the rest by module: `data`, `tasks` (what `reward/*.yaml` name), `judge`.
"""

from rgdiff.domains.images.data import ImageDomain, custom, digits, mnist
from rgdiff.domains.images.files import pictures
from rgdiff.domains.images.judge import ImageJudge
from rgdiff.domains.images.reference import PretrainedImages, pretrained

__all__ = ["ImageDomain", "ImageJudge", "PretrainedImages", "custom", "digits", "mnist", "pictures", "pretrained"]
