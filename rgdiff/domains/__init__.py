"""What the library is used on: each domain holds its data, its rewards and tasks, and the judge of its samples.

A domain assumes nothing of samplers and tuners: it hands out arrays and rewards. Data sets are read when they are asked
for, from ordinary packages or from files by path, and nothing is downloaded. A domain does not name its judge: its
config does (`configs/domain/*.yaml`).
"""

from typing import TYPE_CHECKING

from rgdiff._lazy import submodules

if TYPE_CHECKING:
    from rgdiff.domains import (
        anomaly,
        images,
        judging,
        mixture,
        molecules,
        pipelines,
        planar,
        proteins,
        rna,
        sequences,
        subspace,
    )

__all__ = [
    "anomaly",
    "images",
    "judging",
    "mixture",
    "molecules",
    "pipelines",
    "planar",
    "proteins",
    "rna",
    "sequences",
    "subspace",
]
__getattr__, __dir__ = submodules(__name__, __all__)
