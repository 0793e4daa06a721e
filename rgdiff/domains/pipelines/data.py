"""A diffusers folder as a domain: the shape of its states, and its pictures."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import assets, checks
from rgdiff.domains.images.data import to_uint8
from rgdiff.pretrained import folders
from rgdiff.pretrained.pipelines import Decoder, Pretrained
from rgdiff.typing import Array

DECODED = 8  # pictures at once


@functools.lru_cache(maxsize=2)
def opened(folder: str, dtype: str, remat: str | None, size: tuple[int, int] | None) -> Pretrained:
    """Read a folder once for all parts of a run that need it.

    Args:
      folder, dtype, remat, size: as `pipeline` has them.

    Returns:
      What `rgdiff.pretrained.from_diffusers` makes of it.
    """
    return folders.from_diffusers(folder, dtype=jnp.dtype(dtype), remat=remat, size=size)


def shaped(folder: str, dtype: str, remat: str | None, size: tuple[int, int] | None) -> Pretrained:
    """Return what `opened` does, with shapes in place of weights, which need not be there.

    Args:
      folder, dtype, remat, size: as `pipeline` has them.
    """
    return folders.from_diffusers(folder, dtype=jnp.dtype(dtype), remat=remat, size=size, weights=False)


@dataclasses.dataclass(frozen=True)
class PipelineDomain:
    """States of a pipeline and their pictures. Build it with `pipeline`.

    Nothing is read but settings until `pretrained` is asked for.
    """

    folder: str
    dtype: str = "float32"
    remat: str | None = None
    size: tuple[int, int] | None = None
    value_range: tuple[float, float] | None = None

    @property
    def pretrained(self) -> Pretrained:
        return opened(self.folder, self.dtype, self.remat, self.size)

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """Of one state, [h, w, C]."""
        return folders.state_shape(self.folder, self.size)

    def pixels(self, x0: Any) -> np.ndarray:
        """Return states as pictures [N, H, W, C] in [-1, 1], some at a time."""
        decode = self.pretrained.decode
        if decode is None:
            return np.asarray(x0)
        parts = [x0[i : i + DECODED] for i in range(0, len(x0), DECODED)]
        return np.concatenate([np.asarray(_decode(decode, jnp.asarray(part))) for part in parts])

    def decode(self, x0: Any) -> np.ndarray:
        """Return states as 8-bit pictures [N, H, W, C]."""
        return to_uint8(self.pixels(x0))

    @property
    def decoder(self) -> Decoder | None:
        """What makes pictures of states; None where they are pictures."""
        return self.pretrained.decode


@jax.jit
def _decode(decode: Any, x0: Array) -> Array:
    return decode(x0)


def pipeline(
    folder: str, dtype: str = "float32", remat: str | None = None, size: Sequence[int] | None = None
) -> PipelineDomain:
    """Open a diffusers folder as a domain.

    Args:
      folder: of a pipeline, see `rgdiff.pretrained.from_diffusers`; `package:NAME` is one that comes with the package.
      dtype: of the networks, float32 or bfloat16.
      remat: what the denoising network computes again in the backward pass: stage, block, or null.
      size: [h, w] of states; the network's own by default.

    Returns:
      The domain.

    Raises:
      ValueError: for a folder that is none, or an unknown dtype.
    """
    checks.one_of("domain.dtype", dtype, ("float32", "bfloat16"))
    if size is not None and len(size) != 2:
        raise ValueError(f"domain.size is [h, w], got {list(size)}")
    high_wide = None if size is None else (int(size[0]), int(size[1]))
    place = str(assets.resolved(folder))
    folders.state_shape(place, high_wide)  # refuses a folder that is none
    return PipelineDomain(place, dtype, remat, high_wide)
