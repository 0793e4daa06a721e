"""Convolutions that are fast on a CPU, and whose gradients stay fast inside `lax.scan`.

It holds one convolution of channel-last arrays in any number of spatial dimensions, with a hand-written
reverse rule, and the Flax layer that uses it. It assumes [B, *spatial, I] inputs, [*window, I, O] kernels and
reverse-mode differentiation (any order; forward-mode, `jax.jvp` and `jax.linearize` included, stops at a
`custom_vjp`). Grouped and transposed convolutions are left to `jax.lax`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rgdiff.nets import winograd
from rgdiff.nets.init import lecun_normal
from rgdiff.typing import Array

Ints = tuple[int, ...]
Pads = tuple[tuple[int, int], ...]
Shapes = tuple[Ints, Ints]  # of x and of the kernel
LARGE, HUGE = 2**16, 2**22  # numbers of a kernel
Padding = str | Sequence[tuple[int, int]]


def conv(
    x: Array, kernel: Array, *, stride: int | Ints = 1, dilation: int | Ints = 1, padding: Padding = "SAME"
) -> Array:
    """Convolve channel-last arrays: y[b, p] = sum_k x[b, p * stride + k * dilation - low] kernel[k].

    The values are those of `lax.conv_general_dilated`. On a CPU, float32 images and kernels of 3x3 taps take Winograd's algorithm
    where it pays (`rgdiff.nets.winograd`; relative errors about 1e-6). XLA:CPU rewrites only convolutions of the canonical
    layout b01f_01io->b01f to its fast routine when they stand in a loop, and JAX's own gradients of a
    convolution are not of that layout; here both gradients are written as canonical convolutions with
    explicit transposes. On other platforms the gradients are JAX's own: the branch is taken when the program
    is lowered for a device (`lax.platform_dependent`), not by the process's default backend, so a CPU program
    in a GPU process is right too.

    Args:
      x: [B, *spatial, I].
      kernel: [*window, I, O], of x's dtype.
      stride: distance of output positions, one number or one per spatial axis.
      dilation: distance of kernel taps, one number or one per spatial axis.
      padding: "SAME", "VALID", or (low, high) per spatial axis.

    Returns:
      [B, *spatial', O].

    Raises:
      ValueError: when ranks, channels or padding do not fit together.

    Note:
      Under `vmap` the parameter gradient is taken per mapped element (a grouped convolution), then summed,
      where JAX's own joins the mapped axis to the batch.

    Example:
      >>> import jax.numpy as jnp
      >>> from rgdiff.nets.conv import conv
      >>> x, kernel = jnp.arange(4.0).reshape(1, 4, 1), jnp.ones((2, 1, 1))
      >>> print(conv(x, kernel, padding="VALID").ravel())  # sums of neighbours
      [1. 3. 5.]
    """
    spatial = x.ndim - 2
    if spatial < 1 or kernel.ndim != x.ndim or kernel.shape[-2] != x.shape[-1]:
        raise ValueError(f"conv takes x [B, *spatial, I] and kernel [*window, I, O]; got {x.shape}, {kernel.shape}")
    strides, dilations = _per_axis(stride, spatial, "stride"), _per_axis(dilation, spatial, "dilation")
    if isinstance(padding, str):
        window = [(k - 1) * d + 1 for k, d in zip(kernel.shape, dilations, strict=False)]
        padding = lax.padtype_to_pads(x.shape[1:-1], window, strides, padding)
    pads = tuple((int(low), int(high)) for low, high in padding)
    if len(pads) != spatial:
        raise ValueError(f"padding needs one (low, high) per spatial axis ({spatial}); got {pads}")
    kernel, pads = _live_taps(x, kernel, strides, dilations, pads)
    return _conv(x, kernel, strides, dilations, pads)


def _live_taps(x: Array, kernel: Array, strides: Ints, dilations: Ints, pads: Pads) -> tuple[Array, Pads]:
    """Cut off the kernel's taps that fall on padding at every output position: at L = 50 and dilation 64 all but one of 9."""
    kept, cut = [], []
    for size, taps, stride, dilation, (low, high) in zip(
        x.shape[1:-1], kernel.shape, strides, dilations, pads, strict=False
    ):
        reach = ((size + low + high - (taps - 1) * dilation - 1) // stride) * stride  # of the last output position
        first = min(max(0, -(-(low - reach) // dilation)), taps - 1)
        last = max(min(taps - 1, (size - 1 + low) // dilation), first)
        kept.append(slice(first, last + 1))
        cut.append((low - first * dilation, high - (taps - 1 - last) * dilation))
    return kernel[tuple(kept)], tuple(cut)


def _per_axis(value: int | Ints, axes: int, name: str) -> Ints:
    values = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(values) != axes or min(values) < 1:
        raise ValueError(f"{name} is one positive integer, or one per spatial axis ({axes}); got {value}")
    return values


def _plain(x: Array, kernel: Array, strides: Ints, dilations: Ints, pads: Pads) -> Array:
    axes = "0123456789"[: x.ndim - 2]
    labels = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    return lax.conv_general_dilated(x, kernel, strides, pads, rhs_dilation=dilations, dimension_numbers=labels)


def _fast(x: Array, kernel: Array, strides: Ints, dilations: Ints, pads: Pads) -> Array:
    """The same, on a CPU in the way that is fastest for the shapes."""
    plain = functools.partial(_plain, strides=strides, dilations=dilations, pads=pads)
    if _winograd(x.shape, kernel.shape, x.dtype, strides, dilations, pads):
        other = winograd.convolve
    elif kernel.size >= HUGE and 4 * x.size <= x.shape[-1] * kernel.shape[-1]:
        other = functools.partial(_by_patches, strides=strides, dilations=dilations, pads=pads)
    else:
        return plain(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=other, default=plain)


def _by_patches(x: Array, kernel: Array, strides: Ints, dilations: Ints, pads: Pads) -> Array:
    """The same by one product with the kernel as it lies: for few pixels most of the time goes into reading a huge kernel."""
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0)])
    window, taps = kernel.shape[:-2], []
    for tap in np.ndindex(window):
        first = [k * d for k, d in zip(tap, dilations, strict=True)]
        last = [size - (n - 1 - k) * d for k, n, d, size in zip(tap, window, dilations, x.shape[1:-1], strict=True)]
        taps.append(lax.slice(x, (0, *first, 0), (len(x), *last, x.shape[-1]), (1, *strides, 1)))
    patches = jnp.stack(taps, -2)
    return patches.reshape(*patches.shape[:-2], -1) @ kernel.reshape(-1, kernel.shape[-1])


def _winograd(x: Ints, kernel: Ints, dtype: Any, strides: Ints, dilations: Ints, pads: Pads) -> bool:
    return dtype == jnp.float32 and winograd.pays(x, kernel, strides, dilations, pads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _convolve(x: Array, kernel: Array, strides: Ints, dilations: Ints, pads: Pads, shapes: Shapes) -> Array:
    return _fast(x, kernel, strides, dilations, pads)


def _forward(x: Any, kernel: Any, strides: Ints, dilations: Ints, pads: Pads, shapes: Shapes):
    """Keep what the gradients that are asked for need: no x where the kernel is frozen (LoRA, a gradient in x)."""
    kept = x.value if kernel.perturbed else None, kernel.value if x.perturbed else None
    return _fast(x.value, kernel.value, strides, dilations, pads), kept


def _backward(
    strides: Ints, dilations: Ints, pads: Pads, shapes: Shapes, kept: tuple[Array | None, Array | None], dy: Any
) -> tuple[Array | None, Array | None]:
    if isinstance(dy, jax.custom_derivatives.SymbolicZero):
        return None, None
    x, kernel = kept
    like = [jax.ShapeDtypeStruct(shape, dy.dtype) for shape in shapes]
    dx = dkernel = None
    fast = _winograd(*shapes, dy.dtype, strides, dilations, pads)
    if kernel is not None:
        slow = functools.partial(_input_gradient, shapes[0], strides=strides, dilations=dilations, pads=pads)
        dx = lax.platform_dependent(
            kernel,
            dy,
            cpu=winograd.input_gradient if fast else slow,
            default=lambda kernel, dy: jax.linear_transpose(
                lambda x: _plain(x, kernel, strides, dilations, pads), like[0]
            )(dy)[0],
        )
    if x is not None:
        dkernel = lax.platform_dependent(
            x,
            dy,
            cpu=winograd.kernel_gradient
            if fast
            else lambda x, dy: _kernel_gradient(x, shapes[1], dy, strides, dilations, pads),
            default=lambda x, dy: jax.linear_transpose(
                lambda kernel: _plain(x, kernel, strides, dilations, pads), like[1]
            )(dy)[0],
        )
    return dx, dkernel


_convolve.defvjp(_forward, _backward, symbolic_zeros=True)


def _conv(x: Array, kernel: Array, strides: Ints, dilations: Ints, pads: Pads) -> Array:
    return _convolve(x, kernel, strides, dilations, pads, (x.shape, kernel.shape))


# Both gradients are members of the family itself (strides and dilations trade places in the second), so that
# gradients of gradients take the same path.


def _input_gradient(shape: Ints, kernel: Array, dy: Array, strides: Ints, dilations: Ints, pads: Pads) -> Array:
    """dx[n] = sum_k spread[n + low - k * dilation] kernel[k]^T; spread is dy, stride - 1 zeros between."""
    spatial = range(dy.ndim - 2)
    if kernel.size >= LARGE and dy.size <= 2 * dy.shape[-1] ** 2:
        return _input_gradient_by_taps(shape, kernel, dy, strides, dilations, pads)
    taps = jnp.swapaxes(jnp.flip(kernel, tuple(spatial)), -1, -2)
    if max(strides) > 1:
        dy = lax.pad(dy, jnp.zeros((), dy.dtype), [(0, 0, 0), *((0, 0, s - 1) for s in strides), (0, 0, 0)])
    reach = [(kernel.shape[i] - 1) * dilations[i] for i in spatial]
    back = tuple((reach[i] - pads[i][0], shape[i + 1] - dy.shape[i + 1] + pads[i][0]) for i in spatial)
    return _conv(dy, taps, (1,) * len(strides), dilations, back)


def _input_gradient_by_taps(shape: Ints, kernel: Array, dy: Array, strides: Ints, dilations: Ints, pads: Pads) -> Array:
    """The same by one product for every tap: for few pixels, turning a large kernel round takes longer than the convolution."""
    flat, rows = kernel.reshape(-1, *kernel.shape[-2:]), dy.reshape(-1, dy.shape[-1])
    high, every = jnp.promote_types(dy.dtype, jnp.float32), jnp.broadcast_to(rows, (len(flat), *rows.shape))
    products = jnp.einsum("kno,kio->kni", every, flat, preferred_element_type=high)
    dx: Any = 0.0
    for tap, product in zip(np.ndindex(kernel.shape[:-2]), products, strict=True):
        inner = []
        for k, size, out, stride, dilation, (low, _) in zip(
            tap, shape[1:-1], dy.shape[1:-1], strides, dilations, pads, strict=True
        ):
            first = k * dilation - low  # the input under the first output
            inner.append((first, size - first - (out - 1) * stride - 1, stride - 1))
        product = product.reshape(*dy.shape[:-1], -1)
        dx = dx + lax.pad(product, jnp.zeros((), high), [(0, 0, 0), *inner, (0, 0, 0)])
    return dx.astype(dy.dtype)


def _kernel_gradient(x: Array, shape: Ints, dy: Array, strides: Ints, dilations: Ints, pads: Pads) -> Array:
    """dkernel[k] = sum_{b, p} x[b, p * stride + k * dilation - low]^T dy[b, p]; I is the batch."""
    spatial = range(x.ndim - 2)
    inner = tuple(i + 1 for i in spatial)
    x, dy = jnp.swapaxes(x, 0, -1), jnp.transpose(dy, (*inner, 0, x.ndim - 1))
    reach = [(shape[i] - 1) * dilations[i] + (dy.shape[i] - 1) * strides[i] + 1 for i in spatial]
    fit = tuple((pads[i][0], reach[i] - x.shape[i + 1] - pads[i][0]) for i in spatial)
    return jnp.transpose(_conv(x, dy, dilations, strides, fit), (*inner, 0, x.ndim - 1))


class Conv(nn.Module):
    """Apply a convolution with bias to [B, *spatial, I]; returns [B, *spatial', O].

    Args:
      features: output channels O.
      kernel_size: window, one length per spatial axis.
      strides, dilation: one number or one per spatial axis.
      padding: "SAME", "VALID", or (low, high) per spatial axis.
      zero_init: start at zero, so that the output is zero at first.
      before: a cheap function of the inputs whose result is convolved. Reverse mode keeps the inputs alone and
        computes it again, so that a normalisation and a nonlinearity cost no memory.
      dtype: of the computation and the output; parameters are float32.

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> net = rgdiff.nets.Conv(features=4, kernel_size=(3,), strides=2)
      >>> jax.eval_shape(net.init_with_output, jax.random.key(0), jnp.zeros((1, 8, 2)))[0].shape
      (1, 4, 4)
    """

    features: int
    kernel_size: Ints
    strides: int | Ints = 1
    dilation: int | Ints = 1
    padding: Any = "SAME"
    zero_init: bool = False
    before: Callable[..., Array] | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *inputs: Array) -> Array:
        init = nn.initializers.zeros if self.zero_init else lecun_normal
        kernel = self.param("kernel", init, (*self.kernel_size, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        kernel, bias = kernel.astype(self.dtype), bias.astype(self.dtype)

        def run(kernel: Array, *inputs: Array) -> Array:
            x = inputs[0] if self.before is None else self.before(*inputs)
            x = x.astype(self.dtype)
            return conv(x, kernel, stride=self.strides, dilation=self.dilation, padding=self.padding)

        return (run if self.before is None else jax.checkpoint(run))(kernel, x, *inputs) + bias
