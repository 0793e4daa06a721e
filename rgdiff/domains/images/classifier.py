"""A small image classifier: two 3x3 convolutions of stride 2, a feature layer and logits, trained in one compiled scan.

Convolutions are matrix products over patches, so that gradients stay fast inside `lax.scan` on a CPU and forward-mode
differentiation works too. It assumes images in [-1, 1] with sides divisible by 4; splits, rewards and metrics are left
to their modules.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import tuners
from rgdiff.nets.init import normal
from rgdiff.typing import Array, Cond, Info, Key, Params, pytree, static


@pytree
class Classifier:
    """Classify images [B, H, W, C]: a callable pytree, smooth in the image, so that its gradient can guide."""

    params: Params

    def features(self, x: Array) -> Array:
        """Return the penultimate layer, [B, F], for Frechet distances and nearest neighbours."""
        h = x + 1  # background becomes zero, as the padding is
        for layer in ("conv1", "conv2"):
            h = jax.nn.gelu(_affine(self.params[layer], _patches(h)))
        return jax.nn.gelu(_affine(self.params["dense"], h.reshape(h.shape[0], -1)))

    def logits(self, x: Array) -> Array:
        """Return the logits of p(class | x), [B, classes]."""
        return _affine(self.params["head"], self.features(x))

    def __call__(self, x: Array, cond: Cond = None) -> Array:
        return self.logits(x)


def train_classifier(
    key: Key,
    x: Array | np.ndarray,
    y: Array | np.ndarray,
    classes: int,
    *,
    steps: int = 1000,
    batch: int = 128,
    learning_rate: float = 3e-3,
    noise: float = 0.5,
    shift: int = 1,
    width: int = 32,
    features: int = 64,
) -> Classifier:
    """Train a classifier by cross-entropy on shifted and noised images.

    Each example is moved by up to `shift` pixels and gets Gaussian noise of a standard deviation drawn uniformly from
    [0, noise]: the classifier stays sensible near the data, where samples and posterior means are.

    Args:
      key: PRNG key; the result is a function of it.
      x: images [N, H, W, C] in [-1, 1], H and W divisible by 4.
      y: integer labels [N] in 0..classes-1.
      classes: number of classes.
      steps: optimiser steps (AdamW, cosine decay from `learning_rate` to zero).
      batch: examples per step, drawn with replacement.
      learning_rate: highest learning rate.
      noise: largest standard deviation of the noise, in the units of x.
      shift: largest shift in pixels, filled with background.
      width: channels of the first convolution; the second has twice as many.
      features: size F of the feature layer.

    Returns:
      The trained classifier.

    Raises:
      ValueError: for shapes or labels that do not fit.
    """
    x, y = np.asarray(x, np.float32), np.asarray(y)
    if x.ndim != 4 or x.shape[1] % 4 or x.shape[2] % 4:
        raise ValueError(f"x has shape {x.shape}: expected images [N, H, W, C], H and W divisible by 4; pad them")
    if y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"y is {y.dtype}{y.shape}: expected one integer label for each of {len(x)} images")
    if not len(y) or y.min() < 0 or y.max() >= classes:
        raise ValueError(f"expected at least one label, all in 0..{classes - 1}: check y and classes")
    init_key, fit_key = jax.random.split(key)
    params = _init(init_key, x.shape[1:], classes, width, features)
    optimizer = tuners.adamw(learning_rate, decay_steps=steps, clip=None, weight_decay=1e-3)
    tuner = ClassifierTuner(jnp.asarray(noise, jnp.float32), optimizer, shift)
    data = {"x": jnp.asarray(x), "y": jnp.asarray(y, jnp.int32)}
    state = tuners.fit(tuner, fit_key, tuner.init(params), steps, data=data, batch=batch, chunk=steps)
    return Classifier(state.params)


@pytree
class ClassifierTuner:
    """Cross-entropy on augmented images, as a tuner for `rgdiff.tuners.fit`."""

    noise: Array
    optimizer: Any = static()
    shift: int = static()

    def init(self, params: Params) -> tuners.TrainState:
        return tuners.start(params, self.optimizer)

    def step(self, key: Key, state: tuners.TrainState, batch: Any) -> tuple[tuners.TrainState, Info]:
        def loss(params: Params) -> Array:
            log_p = jax.nn.log_softmax(Classifier(params).logits(augment(key, batch["x"], self.noise, self.shift)))
            return -jnp.take_along_axis(log_p, batch["y"][:, None], -1).mean()

        value, gradients = jax.value_and_grad(loss)(state.params)
        state, info = tuners.update(state, gradients, self.optimizer)
        return state, {"loss": value} | info


def augment(key: Key, x: Array, noise: Array | float, shift: int) -> Array:
    """Move each image by a random whole number of pixels up to `shift` and add noise of a random strength."""
    move_key, scale_key, noise_key = jax.random.split(key, 3)
    padded = jnp.pad(x, ((0, 0), (shift, shift), (shift, shift), (0, 0)), constant_values=-1.0)
    corners = jax.random.randint(move_key, (x.shape[0], 2), 0, 2 * shift + 1)
    moved = jax.vmap(lambda image, c: jax.lax.dynamic_slice(image, (c[0], c[1], 0), x.shape[1:]))(padded, corners)
    scale = noise * jax.random.uniform(scale_key, (x.shape[0], 1, 1, 1))
    return moved + scale * jax.random.normal(noise_key, x.shape)


def _init(key: Key, shape: tuple[int, ...], classes: int, width: int, features: int) -> Params:
    height, breadth, channels = shape
    sizes = {
        "conv1": (9 * channels, width),
        "conv2": (9 * width, 2 * width),
        "dense": (height // 4 * (breadth // 4) * 2 * width, features),
        "head": (features, classes),
    }
    keys = jax.random.split(key, len(sizes))
    return {
        name: {"w": normal(k, size, (2 / size[0]) ** 0.5), "b": jnp.zeros(size[1])}
        for k, (name, size) in zip(keys, sizes.items(), strict=True)
    }


def _affine(layer: Params, x: Array) -> Array:
    return x @ layer["w"] + layer["b"]


def _patches(x: Array) -> Array:
    """Gather the 3x3 neighbourhood of every second pixel, zero outside: [B, H, W, C] -> [B, H/2, W/2, 9 C]."""
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [x[:, i : i + height : 2, j : j + width : 2] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted, axis=-1)
