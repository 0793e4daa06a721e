"""Pictures as released vision networks want them: resized as Pillow does, cropped and normalised, differentiably.

A resize is two small matrices, one an axis, computed once a shape. Pillow holds 8-bit pictures: it clips and rounds after each
axis. So does this, with `rounded`; without it values are clipped only, and are within 1/255 of Pillow's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff.pretrained.config import Config, read_config
from rgdiff.typing import Array, pytree, static

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's CLIP


def _bicubic(x: np.ndarray) -> np.ndarray:
    x, a = np.abs(x), -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


# Name -> what a number of `preprocessor_config.json` means, half of the filter's width, the filter.
FILTERS: dict[str, tuple[int, float, Callable[[np.ndarray], np.ndarray]]] = {
    "bilinear": (2, 1.0, lambda x: np.maximum(1 - np.abs(x), 0)),
    "bicubic": (3, 2.0, _bicubic),
}


@functools.cache
def resize_matrix(size: int, wanted: int, filter: str = "bicubic") -> np.ndarray:
    """Return the matrix that resizes an axis as Pillow does: the filter is widened where the axis shrinks, and sums to 1.

    Args:
      size: pixels of the axis.
      wanted: pixels after it.
      filter: `bicubic` (a = -1/2) or `bilinear`.

    Returns:
      [wanted, size], float64; not to be written to.

    Example:
      >>> from rgdiff.pretrained.preprocess import resize_matrix
      >>> print(resize_matrix(4, 2, "bilinear").round(3))
      [[0.429 0.429 0.143 0.   ]
       [0.    0.143 0.429 0.429]]
    """
    if filter not in FILTERS or size < 1 or wanted < 1:
        raise ValueError(
            f"resize {size} to {wanted} pixels by {filter!r}: expected sizes >= 1 and one of {', '.join(FILTERS)}"
        )
    _, half, weight = FILTERS[filter]
    scale = size / wanted
    wide = max(scale, 1.0)
    centre = (np.arange(wanted)[:, None] + 0.5) * scale
    first, last = (np.trunc(centre + side * half * wide + 0.5) for side in (-1, 1))
    pixel = np.arange(size)
    weights = np.where((pixel >= first) & (pixel < last), weight((pixel + 0.5 - centre) / wide), 0.0)
    matrix = weights / weights.sum(1, keepdims=True)
    matrix.flags.writeable = False
    return matrix


def rounded_to_8_bits(x: Array) -> Array:
    """Round numbers in [0, 1] to multiples of 1/255; the gradient is the identity's (straight-through).

    Args:
      x: any shape.

    Returns:
      The same shape.
    """
    return x + jax.lax.stop_gradient(jnp.round(x * 255) / 255 - x)


def resize(x: Array, shape: tuple[int, int], filter: str = "bicubic", *, rounded: bool = False) -> Array:
    """Resize pictures as Pillow does, the width first, with values clipped to [0, 1] after each axis.

    Args:
      x: [B, H, W, C] in [0, 1].
      shape: the height and width wanted.
      filter: `bicubic` or `bilinear`.
      rounded: round to 8 bits after each axis, straight-through, as Pillow does.

    Returns:
      [B, *shape, C] in [0, 1].

    Raises:
      ValueError: for an unknown filter or a shape without pixels.

    Example:
      >>> import jax.numpy as jnp
      >>> from rgdiff.pretrained.preprocess import resize
      >>> print(resize(jnp.ones((1, 6, 8, 3)), (3, 4)).shape)
      (1, 3, 4, 3)
    """
    for axis in (2, 1):
        if x.shape[axis] != shape[axis - 1]:
            matrix = jnp.asarray(resize_matrix(x.shape[axis], shape[axis - 1], filter), x.dtype)
            x = jnp.moveaxis(jnp.tensordot(matrix, x, (1, axis), precision=jax.lax.Precision.HIGHEST), 0, axis)
            x = jnp.clip(x, 0, 1)
            x = rounded_to_8_bits(x) if rounded else x
    return x


def centre_crop(x: Array, shape: tuple[int, int]) -> Array:
    """Return the middle of pictures; where it is half a pixel off, the part that is nearer to the top left, as transformers does.

    Args:
      x: [B, H, W, C].
      shape: the height and width wanted, at most H and W.

    Returns:
      [B, *shape, C].

    Raises:
      ValueError: for a shape that is larger than the pictures.
    """
    high, wide = x.shape[1] - shape[0], x.shape[2] - shape[1]
    if min(high, wide) < 0:
        raise ValueError(f"cannot crop pictures of {x.shape[1]} x {x.shape[2]} pixels to {shape[0]} x {shape[1]}")
    return x[:, high // 2 : high // 2 + shape[0], wide // 2 : wide // 2 + shape[1]]


@pytree
class Preprocess:
    """Pixels [B, H, W, C] in [-1, 1] to what a vision network reads: clipped, resized, cropped, normalised; see `from_config`.

    Args:
      mean, std: of each channel, in [0, 1].
      size: of the shorter side, or (height, width); None leaves the size as it is.
      crop: (height, width) of the middle that is kept, or None.
      filter: of the resize.
      rounded: round to 8 bits before the resize and after each axis of it, straight-through: what a picture's file would give.
    """

    mean: Array
    std: Array
    size: int | tuple[int, int] | None = static(default=224)
    crop: tuple[int, int] | None = static(default=(224, 224))
    filter: str = static(default="bicubic")
    rounded: bool = static(default=False)

    def __call__(self, x: Array) -> Array:
        """Return [B, h, w, 3]; a single channel is repeated."""
        if x.ndim != 4 or x.shape[-1] not in (1, 3):
            raise ValueError(f"a vision network reads pictures [B, H, W, 1 or 3], got shape {list(x.shape)}")
        x = jnp.clip((x + 1) / 2, 0, 1)
        x = rounded_to_8_bits(x) if self.rounded else x
        if self.size is not None:
            x = resize(x, _wanted(x.shape[1:3], self.size), self.filter, rounded=self.rounded)
        if self.crop is not None:
            x = centre_crop(x, self.crop)
        return (jnp.broadcast_to(x, (*x.shape[:3], 3)) - self.mean) / self.std


def _wanted(shape: tuple[int, ...], size: int | tuple[int, int]) -> tuple[int, int]:
    """The height and width after a resize of the shorter side to `size`; the longer is rounded down."""
    if isinstance(size, tuple):
        return size
    high, wide = shape
    return (size, int(size * wide / high)) if high <= wide else (int(size * high / wide), size)


def clip(size: int = 224, *, rounded: bool = False) -> Preprocess:
    """Return CLIP's own preprocessing: the shorter side to `size` by the bicubic filter, the middle square, OpenAI's mean and std.

    Args:
      size: pixels of a side, the network's `image_size`.
      rounded: round to 8 bits as Pillow does, straight-through.

    Returns:
      The callable, [B, H, W, 1 or 3] in [-1, 1] -> [B, size, size, 3].

    Example:
      >>> import jax.numpy as jnp
      >>> from rgdiff.pretrained import preprocess
      >>> print(preprocess.clip(16)(jnp.zeros((2, 32, 48, 3))).shape)
      (2, 16, 16, 3)
    """
    return Preprocess(jnp.asarray(CLIP_MEAN), jnp.asarray(CLIP_STD), size, (size, size), rounded=rounded)


READ = {
    "do_resize": True, "size": 224, "resample": 3, "do_center_crop": True, "crop_size": 224,
    "do_normalize": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
}  # fmt: skip
FIXED = {"do_rescale": True, "rescale_factor": 1 / 255}
HARMLESS = {
    "image_processor_type", "feature_extractor_type", "processor_class", "data_format", "return_tensors",
    "do_convert_rgb", "device", "disable_grouping",
}  # fmt: skip


def from_config(config: Config, *, rounded: bool = False) -> Preprocess:
    """Return the preprocessing that a `preprocessor_config.json` of a CLIP image processor describes.

    Args:
      config: its settings; those that it leaves out are CLIP's.
      rounded: round to 8 bits as Pillow does, straight-through.

    Returns:
      The callable, [B, H, W, 1 or 3] in [-1, 1] -> [B, h, w, 3].

    Raises:
      ValueError: for a setting that is not known or not supported.
    """
    c = config.settings("CLIPImageProcessor", READ, FIXED, HARMLESS)
    filters = {number: name for name, (number, _, _) in FILTERS.items()}
    if c["resample"] not in filters:
        raise ValueError(f"resample={c['resample']} is not supported: expected 3 (bicubic) or 2 (bilinear)")
    mean, std = (jnp.asarray(c[name]) for name in ("image_mean", "image_std")) if c["do_normalize"] else (0.0, 1.0)
    crop = _sides(c["crop_size"], "crop_size")
    return Preprocess(
        jnp.broadcast_to(jnp.asarray(mean, jnp.float32), 3),
        jnp.broadcast_to(jnp.asarray(std, jnp.float32), 3),
        _sides(c["size"], "size") if c["do_resize"] else None,
        ((crop, crop) if isinstance(crop, int) else crop) if c["do_center_crop"] else None,
        filters[c["resample"]],
        rounded,
    )


def _sides(value: int | Config, name: str) -> int | tuple[int, int]:
    """A side, or (height, width)."""
    if isinstance(value, int):
        return value
    if set(value) == {"shortest_edge"}:
        return value["shortest_edge"]
    if set(value) == {"height", "width"}:
        return value["height"], value["width"]
    raise ValueError(f"{name}={dict(value)} is not supported: expected shortest_edge, or height and width")


def from_folder(folder: Path, size: int = 224, *, rounded: bool = False) -> Preprocess:
    """Return the preprocessing of a model's folder: as its `preprocessor_config.json` says, or CLIP's own where it has none.

    Args:
      folder: of the model.
      size: the network's `image_size`, for a folder without the file.
      rounded: round to 8 bits as Pillow does, straight-through.

    Returns:
      The callable, [B, H, W, 1 or 3] in [-1, 1] -> [B, h, w, 3].

    Raises:
      ValueError: as `from_config`.
    """
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (file := folder / name).exists():
            config = read_config(file)
            return from_config(config.get("image_processor", config), rounded=rounded)
    return clip(size, rounded=rounded)
