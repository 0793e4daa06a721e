"""Convolutions of 3x3 taps with a quarter of the multiplications, for a CPU: Winograd's F(4x4, 3x3) in plain XLA operations.

Four outputs of a filter of three taps are A((G g) * (B d)): six multiplications of the transformed taps g and inputs d instead
of twelve, and a tile of 4x4 outputs takes 36 instead of 144. The transforms evaluate polynomials at 0, +-5/8, +-3/2 and infinity;
the usual 0, +-1, +-2 and infinity double the rounding error.

The arrangement is what XLA:CPU runs fast: products of matrices, and elementwise loops whose last axis is the channels, so that
they vectorise. Columns are transformed by one product, which pads them too, and rows by one loop. In a `lax.scan` the
transforms of a fixed kernel are made once, before the loop. `rgdiff.nets.conv` decides, by `pays`, where this is used.

References:
  Fast algorithms for convolutional neural networks (arXiv:1509.09308).
"""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from rgdiff.typing import Array

SIDE, TAPS = 4, 3  # of a tile of outputs, of a kernel
POINTS = (0.0, 0.625, -0.625, 1.5, -1.5)
FREQUENCIES = len(POINTS) + 1  # the last is at infinity


def transforms() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return A [4, 6], G [6, 3] and B [6, 6], of outputs, taps and inputs, by the rule of Cook and Toom; float64."""
    a, g, b = np.zeros((SIDE, FREQUENCIES)), np.zeros((FREQUENCIES, TAPS)), np.zeros((FREQUENCIES, FREQUENCIES))
    for i, point in enumerate(POINTS):
        others = np.delete(POINTS, i)
        a[:, i] = point ** np.arange(SIDE)
        g[i] = point ** np.arange(TAPS) / np.prod(point - others)
        b[i, :-1] = np.poly(others)[::-1]
    a[-1, -1] = g[-1, -1] = 1.0
    b[-1] = np.poly(POINTS)[::-1]
    return a, g, b


OUTPUTS, KERNEL, INPUTS = transforms()
BOTH_AXES = np.kron(KERNEL, KERNEL)  # [36, 9]


def pays(
    x: tuple[int, ...], kernel: tuple[int, ...], strides: tuple[int, ...], dilations: tuple[int, ...], pads: tuple
) -> bool:
    """Whether a convolution of these shapes is one that this module computes, and computes faster than XLA does on this CPU.

    Below 75 million floating-point operations a call saves too little to pay for compiling. Transformed kernels have four
    times the numbers: large ones leave the cache, and need more tiles to be worth reading. How many was measured on an AMD EPYC and
    an Intel Xeon (benchmarks/results/cpu-convolutions-*.md); other CPUs take Intel's rule, which asks for more.
    """
    if len(x) != 4 or kernel[:2] != (TAPS, TAPS) or x[1] % SIDE or x[2] % SIDE or min(kernel[2:]) < 16:
        return False
    tiles, size = x[0] * x[1] * x[2] // SIDE**2, kernel[2] * kernel[3]
    fit = strides == dilations == (1, 1) and pads == ((1, 1), (1, 1))
    enough = min(max(size / 4096, 8), 64) if on_amd() else min(size / 128, 128)
    return fit and tiles >= max(2**18 / size, enough)


@functools.cache
def on_amd() -> bool:
    """Whether this process runs on a CPU of AMD's, as Linux says; False where it is not known."""
    with contextlib.suppress(OSError):
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(errors="replace")
    return False


def convolve(x: Array, kernel: Array) -> Array:
    """Convolve [B, H, W, I] with [3, 3, I, O], padded by one pixel: [B, H, W, O]; H and W are multiples of 4."""
    both = jnp.tensordot(BOTH_AXES.astype(x.dtype), kernel.reshape(TAPS**2, *kernel.shape[2:]), 1)
    products = jnp.einsum("fni,fio->fno", _inputs(x), both)
    return _outputs(products, x.shape)


def input_gradient(kernel: Array, dy: Array) -> Array:
    """Return the gradient in the input, [B, H, W, I]: dy convolved with the kernel turned round, which is not written out."""
    both = jnp.tensordot(BOTH_AXES[:, ::-1].astype(dy.dtype), kernel.reshape(TAPS**2, *kernel.shape[2:]), 1)
    products = jnp.einsum("fno,fio->fni", _inputs(dy), both)
    return _outputs(products, dy.shape)


def kernel_gradient(x: Array, dy: Array) -> Array:
    """Return the gradient in the kernel, [3, 3, I, O], from the input and the output's cotangent."""
    products = jnp.einsum("fni,fno->fio", _inputs(x), _cotangents(dy))
    return jnp.tensordot(BOTH_AXES.T.astype(x.dtype), products, 1).reshape(TAPS, TAPS, *products.shape[1:])


def _inputs(x: Array) -> Array:
    """Return the transform of every tile's 6x6 inputs, [36, tiles, C]; the pixels beyond the border are zero."""
    tiles = x.shape[2] // SIDE
    columns = np.zeros((FREQUENCIES, tiles, x.shape[2] + 2))
    for tile in range(tiles):
        columns[:, tile, SIDE * tile : SIDE * tile + FREQUENCIES] = INPUTS
    rows = _columns(x, columns[:, :, 1:-1])
    beyond = jnp.zeros_like(rows[:, :1, 0])
    before = jnp.concatenate([beyond, rows[:, :-1, -1]], 1)
    after = jnp.concatenate([rows[:, 1:, 0], beyond], 1)
    return _rows([before, *(rows[:, :, i] for i in range(SIDE)), after], INPUTS)


def _cotangents(dy: Array) -> Array:
    """Return the transform of every tile's 4x4 cotangents, [36, tiles, C]: the transpose of `_outputs`."""
    rows = _columns(
        dy, np.einsum("of,ts->ftso", OUTPUTS, np.eye(dy.shape[2] // SIDE)).reshape(FREQUENCIES, -1, dy.shape[2])
    )
    return _rows([rows[:, :, i] for i in range(SIDE)], OUTPUTS.T)


def _outputs(products: Array, shape: tuple[int, ...]) -> Array:
    """Return [B, H, W, C], whose B, H and W are those of `shape`, from the products [36, tiles, C]."""
    batch, height, width, _ = shape
    outputs = OUTPUTS.astype(products.dtype)
    rows = jnp.tensordot(outputs, products.reshape(FREQUENCIES, FREQUENCIES, *products.shape[1:]), 1)
    rows = rows.reshape(SIDE, FREQUENCIES, batch, height // SIDE, width // SIDE, -1)
    each = (jnp.transpose(rows[:, i], (1, 2, 0, 3, 4))[:, :, :, :, None] for i in range(FREQUENCIES))
    y: Any = sum(row * outputs[:, i, None] for i, row in enumerate(each))
    return y.reshape(batch, height, width, -1)


def _columns(x: Array, matrix: np.ndarray) -> Array:
    """Transform columns by [6, W / 4, W]: [B, H, W, C] -> [B, H / 4, 4, 6, W / 4, C]."""
    batch, height, width, channels = x.shape
    each = jnp.broadcast_to(matrix.reshape(-1, width).astype(x.dtype), (batch * height, matrix[..., 0].size, width))
    rows = jnp.einsum("ntw,nwc->ntc", each, x.reshape(batch * height, width, channels))
    return rows.reshape(batch, height // SIDE, SIDE, *matrix.shape[:2], channels)


def _rows(taps: list[Array], matrix: np.ndarray) -> Array:
    """Transform rows, given apart, [B, H / 4, 6, W / 4, C] each, by [6, rows]: [36, tiles, C]."""
    taps = [jnp.transpose(tap, (2, 0, 1, 3, 4)) for tap in taps]
    made = [sum(float(factor) * tap for factor, tap in zip(row, taps, strict=True) if factor) for row in matrix]
    return jnp.stack(made).reshape(FREQUENCIES**2, -1, taps[0].shape[-1])
