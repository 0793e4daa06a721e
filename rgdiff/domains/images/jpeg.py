"""Size of a picture as a JPEG file in kB: a differentiable estimate, and the true size on the host.

The file is the baseline format that libjpeg writes by default: YCbCr with chroma at half resolution, 8 x 8 cosine transforms,
quantisation by the standard tables scaled by quality, run lengths and the standard Huffman code. All of it but rounding is
smooth already. Rounding is replaced by its mean under noise: a coefficient is at least m in size with a probability, and the
expected length of the code follows exactly, by a recursion over the run of zeros.
"""

from __future__ import annotations

import dataclasses
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import checks
from rgdiff.domains.images.data import to_uint8
from rgdiff.rewards import from_host
from rgdiff.typing import Array, Cond, Reward, pytree, static

# T.81, tables K.1 and K.2, of quality 50, in zigzag order: luminance, chrominance.
STEPS = (
    "16 11 12 14 12 10 16 14 13 14 18 17 16 19 24 40 26 24 22 22 24 49 35 37 29 40 58 51 61 60 57 51 "
    "56 55 64 72 92 78 64 68 87 69 55 56 80 109 81 87 95 98 103 104 103 62 77 113 121 112 100 120 92 101 103 99",
    "17 18 18 24 21 24 47 26 26 47 99 66 56 66" + " 99" * 50,
)
# T.81, tables K.3 to K.6: bits of the code of a difference of DC coefficients by its category, and bits of the code of an AC
# coefficient by the run of zeros before it (0 to 15, a row) and its category (1 to 10); a row's missing entries are 16.
DC_CODE = ("2 3 3 3 3 3 4 5 6 7 8 9", "2 2 2 3 4 5 6 7 8 9 10 11")
AC_CODE = (
    "2 2 3 4 5 7 8 10,4 5 7 9 11,5 8 10 12,6 9 12,6 10,7 11,7 12,8 12,9 15,9,9,10,10,11,16,16",
    "2 3 4 5 5 6 7 9 10 12,4 6 8 9 11 12,5 8 10 12 15,5 8 10 12,6 9,6 10,7 11,7 11,8,9,9,9,9,11,14,15",
)
END, SIXTEEN_ZEROS = (4, 2), (11, 10)  # bits of the two codes that stand for zeros alone
HEADERS = {1: 330, 3: 625}  # bytes around the coded data, by channels
STUFFED = 1 + 1 / 256  # a byte of eight ones is followed by a byte of zeros


@pytree
class JPEGSize:
    """`sign` times the estimated size in kB; see `compressibility`."""

    sign: Array
    softness: Array
    quality: int = static()

    def __call__(self, x0: Array, cond: Cond = None) -> Array:
        return self.sign * size(x0, self.quality, self.softness)


def compressibility(quality: int = 95, softness: float = 0.05) -> Reward:
    """Reward small files: r(x) = -(estimated kB of a JPEG file), differentiable.

    Args:
      quality: libjpeg's, 1 to 100; static.
      softness: of rounding, > 0, see `size`; dynamic.

    Returns:
      The reward, on images [B, H, W, 1 or 3] in [-1, 1].

    Raises:
      ValueError: for another quality, or a softness that is not positive.

    References: Black et al. 2023, arXiv:2305.13301, section 5.1, has the size itself, of PIL at quality 95 (`exact`).
      Clark et al. 2023, arXiv:2309.17400, has a differentiable reward of the same aim.

    Example:
      >>> import jax.numpy as jnp
      >>> from rgdiff.domains.images import jpeg
      >>> stripes = jnp.where(jnp.arange(16) % 2 > 0, 1.0, -1.0)[None, None, :, None] * jnp.ones((1, 16, 1, 1))
      >>> reward = jpeg.compressibility()
      >>> print(bool(reward(0 * stripes)[0] > reward(stripes)[0]))
      True
    """
    return _sized(-1.0, quality, softness)


def incompressibility(quality: int = 95, softness: float = 0.05) -> Reward:
    """Reward large files: r(x) = estimated kB of a JPEG file, differentiable; otherwise as `compressibility`.

    Args:
      quality: libjpeg's, 1 to 100; static.
      softness: of rounding, > 0; dynamic.

    Returns:
      The reward, on images [B, H, W, 1 or 3] in [-1, 1].

    Raises:
      ValueError: as `compressibility`.
    """
    return _sized(1.0, quality, softness)


def _sized(sign: float, quality: int, softness: float) -> Reward:
    return JPEGSize(jnp.float32(sign), checks.positive("softness", softness), _quality(quality))


@dataclasses.dataclass(frozen=True)
class TrueSize:
    """Map images [B, H, W, 1 or 3], on the host, to `sign` times the kB of PIL's JPEG file; NaN where a pixel is not finite."""

    sign: float
    quality: int

    def __call__(self, x0: np.ndarray, cond: Cond = None) -> np.ndarray:
        finite = np.isfinite(x0).reshape(len(x0), -1).all(1)
        sizes = [len(encode(image, self.quality)) / 1000 for image in to_uint8(x0)]
        return np.where(finite, self.sign * np.asarray(sizes, np.float32), np.float32(np.nan))


def exact(quality: int = 95, *, larger: bool = False) -> Reward:
    """Reward by the true size in kB of the JPEG file that PIL writes. A black box on the host, without gradient.

    Args:
      quality: libjpeg's, 1 to 100.
      larger: reward large files; small ones by default.

    Returns:
      The reward, on images [B, H, W, 1 or 3] in [-1, 1].

    Raises:
      ValueError: for another quality, or where Pillow is not installed.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise ValueError("the true size of a JPEG file needs Pillow: pip install pillow") from None
    return from_host(TrueSize(1.0 if larger else -1.0, _quality(quality)))


def encode(image: np.ndarray, quality: int = 95) -> bytes:
    """Return the JPEG file that PIL writes.

    Args:
      image: uint8 [H, W, 1 or 3].
      quality: libjpeg's, 1 to 100.
    """
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def size(x: Array, quality: int = 95, softness: float | Array = 0.05) -> Array:
    """Return the estimated size of JPEG files in kB (1,000 bytes), headers included; smooth inside of [-1, 1].

    It is the mean code length where a quantised coefficient c reaches a size m = 1, 2, 4, ... with probability
    sigmoid((|c| - m + 1/2) / (softness m)), each independently. As softness goes to 0, this is rounding; a softer one has a
    gradient at more pixels and counts more bits.

    Args:
      x: images [B, H, W, 1 or 3] in [-1, 1], grey or RGB; clipped to it first.
      quality: libjpeg's, 1 to 100.
      softness: > 0, without unit.

    Returns:
      [B].

    Raises:
      ValueError: for another shape or quality.
    """
    if x.ndim != 4 or x.shape[-1] not in HEADERS:
        raise ValueError(f"a JPEG file holds images [B, H, W, 1 or 3], got shape {list(x.shape)}")
    steps = _steps(_quality(quality))
    levels = (jnp.clip(x, -1, 1) + 1) * 127.5
    if x.shape[-1] == 1:
        bits = _bits(_padded(levels[..., 0], 8), 0, steps, softness, 1)
    else:
        luma, *chroma = jnp.moveaxis(_ycc(levels), -1, 0)
        bits = _bits(_padded(luma, 8), 0, steps, softness, 2)
        for plane in chroma:
            plane = _padded(plane, 16)
            half = plane.reshape(-1, plane.shape[1] // 2, 2, plane.shape[2] // 2, 2).mean((2, 4))
            bits += _bits(half, 1, steps, softness, 1)
    return (HEADERS[x.shape[-1]] + STUFFED * bits / 8) / 1000


def _ycc(levels: Array) -> Array:
    """RGB to YCbCr, both in 0..255 (JFIF)."""
    red, green, blue = jnp.moveaxis(levels, -1, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return jnp.stack([luma, (blue - luma) / 1.772 + 128, (red - luma) / 1.402 + 128], -1)


def _padded(plane: Array, side: int) -> Array:
    """Repeat the last row and column until `side` divides both."""
    return jnp.pad(plane, ((0, 0), (0, -plane.shape[1] % side), (0, -plane.shape[2] % side)), mode="edge")


def _bits(plane: Array, table: int, steps: tuple[np.ndarray, ...], softness: float | Array, side: int) -> Array:
    """Return the expected bits of a plane [B, H, W], [B]; squares of `side` x `side` blocks follow one another in the file."""
    batch, high, wide = plane.shape
    order, missing = _order(high // 8, wide // 8, side)
    blocks = plane.reshape(batch, high // 8, 8, wide // 8, 8).transpose(0, 1, 3, 2, 4).reshape(batch, -1, 64)
    blocks = blocks[:, order] - 128
    matrix = jnp.asarray(_cosines() / steps[table], blocks.dtype)
    values = jnp.matmul(blocks, matrix, precision=jax.lax.Precision.HIGHEST)
    means, *waves = jnp.moveaxis(values, -1, 0)
    code, first = _code(AC_CODE[table]), _lengths(DC_CODE[table])
    change = jnp.diff(means, axis=1, prepend=0.0)
    bits = first[0] + _reaches(change, len(first) - 1, softness) @ np.diff(first).astype(change.dtype)

    def coefficient(carry: tuple[Array, Array, Array], value: Array) -> tuple[tuple[Array, Array, Array], None]:
        runs, sixteens, bits = carry  # probability of a run of zeros, modulo 16; mean number of whole sixteens in it
        reached = _reaches(value, code.shape[1], softness)
        some = reached[..., 0]
        bits += jnp.sum((runs @ code.astype(runs.dtype)) * reached, -1) + some * sixteens * SIXTEEN_ZEROS[table]
        zero = 1 - some
        sixteens = zero * (sixteens + runs[..., -1])
        runs = zero[..., None] * jnp.roll(runs, 1, -1)
        return (runs.at[..., 0].add(some), sixteens, bits), None

    start = jnp.zeros((*means.shape, 16), means.dtype).at[..., 0].set(1.0)
    carry = (start, jnp.zeros_like(means), bits)
    carry, _ = jax.lax.scan(jax.checkpoint(coefficient), carry, jnp.stack(waves))
    last = _reaches(waves[-1], 1, softness)[..., 0]
    return jnp.sum(carry[2] + END[table] * (1 - last), -1) + missing * (first[0] + END[table])


def _order(rows: int, columns: int, side: int) -> tuple[np.ndarray, int]:
    """Return the blocks in the file's order, squares of `side` squared after one another, and how many empty ones complete them."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    whole = -(-rows // side) * -(-columns // side) * side**2
    return np.lexsort((column, row, column // side, row // side)), whole - rows * columns


def _reaches(value: Array, count: int, softness: float | Array) -> Array:
    """Return the probabilities that a value is rounded to 1, 2, 4, ... or more in size, [..., count]."""
    least = 2.0 ** np.arange(count, dtype=value.dtype)
    up, down = (jax.nn.sigmoid((v[..., None] - least + 0.5) / (softness * least)) for v in (value, -value))
    return up + down


def _quality(quality: int) -> int:
    if isinstance(quality, bool) or quality not in range(1, 101):
        raise ValueError(f"quality={quality!r}: expected a whole number, 1 (smallest file) to 100")
    return int(quality)


@functools.cache
def _steps(quality: int) -> tuple[np.ndarray, ...]:
    """Return the quantisation steps [64] of luminance and chrominance in zigzag order, as libjpeg scales them."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    tables = (np.array(text.split(), int) for text in STEPS)
    return tuple(np.clip((table * percent + 50) // 100, 1, 255) for table in tables)


@functools.cache
def _cosines() -> np.ndarray:
    """Return the orthonormal cosine transform of 8 x 8 pixels: [64 pixels, 64 frequencies in zigzag order]."""
    k = np.arange(8)
    one = np.cos(np.pi * (2 * k[:, None] + 1) * k / 16) * np.where(k > 0, 0.5, np.sqrt(0.125))
    diagonal = lambda at: (sum(at), at[0] if sum(at) % 2 else at[1])  # noqa: E731
    zigzag = sorted(np.ndindex(8, 8), key=diagonal)
    return np.stack([np.outer(one[:, row], one[:, column]).reshape(-1) for row, column in zigzag], -1)


def _lengths(text: str) -> np.ndarray:
    """Bits of a code and of the number after it, by category."""
    code = np.array(text.split(), int)
    return code + np.arange(len(code))


@functools.cache
def _code(text: str) -> np.ndarray:
    """Bits that each category adds to the one below it, [16 runs, 10]."""
    rows = [np.array([*map(int, row.split()), *[16] * 10][:10]) + np.arange(1, 11) for row in text.split(",")]
    return np.diff(np.stack(rows), axis=1, prepend=0)
