"""JAX's default random numbers, computed without a loop: the same bits, several times faster in small CPU programs.

On a CPU, JAX lowers threefry (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) to a loop of five
iterations, quick to compile but, at a few thousand numbers a call, costlier than the step of a sampler around it. Here
its twenty rounds are written out and fuse with what uses the numbers. Whoever wraps a key decides; nothing else changes.
"""

from __future__ import annotations

import math

import jax
import jax.extend.random
import jax.numpy as jnp

from rgdiff.typing import Array, Key

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def _threefry(key: Array, count: Array) -> tuple[Array, Array]:
    """Encrypt the counters (0, count) under a key [2]: two words each."""
    words = key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA)
    a, b = jnp.broadcast_to(words[0], count.shape), count + words[1]
    for group in range(5):
        for turn in ROTATIONS[group % 2]:
            a = a + b
            b = a ^ ((b << jnp.uint32(turn)) | (b >> jnp.uint32(32 - turn)))
        a, b = a + words[(group + 1) % 3], b + words[(group + 2) % 3] + jnp.uint32(group + 1)
    return a, b


def _count(shape: tuple[int, ...]) -> Array:
    return jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)


def _plain(key: Array) -> Key:
    return jax.random.wrap_key_data(key, impl="threefry2x32")


def _bits(key: Array, width: int, shape: tuple[int, ...]) -> Array:
    if width != 32 or math.prod(shape) >= 2**32:
        return jax.random.bits(_plain(key), shape, f"uint{width}")
    a, b = _threefry(key, _count(shape))
    return a ^ b


def _split(key: Array, shape: tuple[int, ...]) -> Array:
    return jnp.stack(_threefry(key, _count(shape)), -1)


def _fold_in(key: Array, data: Array | int) -> Array:
    return jnp.stack(_threefry(key, jnp.asarray(data).astype(jnp.uint32)))


UNROLLED = jax.extend.random.define_prng_impl(
    key_shape=(2,),
    seed=lambda seed: jax.random.key_data(jax.random.key(seed, impl="threefry2x32")),
    split=_split,
    random_bits=_bits,
    fold_in=_fold_in,
    name="threefry2x32_unrolled",
    tag="unrolled",
)


def unrolled(key: Key) -> Key:
    """Return a key that gives the numbers of `key`, faster in small CPU programs; any but a default key is returned as it is."""
    if str(jax.random.key_impl(key)) != "threefry2x32" or not jax.config.jax_threefry_partitionable:  # type: ignore[attr-defined]
        return key
    return jax.random.wrap_key_data(jax.random.key_data(key), impl=UNROLLED)
