"""3x3 convolutions by Winograd's algorithm: exact in float64, near in float32, and only where they pay on a CPU."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from rgdiff.nets import winograd
from rgdiff.nets.conv import conv

PADS = ((1, 1), (1, 1))
SHAPE, KERNEL = (8, 16, 20, 20), (3, 3, 20, 84)  # 160 tiles


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def direct(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 1), PADS, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def padded(x, kernel):
    return conv(x, kernel, padding=PADS)


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2))


def three(function, x, kernel, dy):
    y, pull = jax.vjp(function, x, kernel)
    return (y, *pull(dy))


@pytest.fixture(scope="module")
def exact():
    """Inputs, kernel and cotangent, and the outputs and gradients of `lax` in float64."""
    given = normal(*SHAPE), normal(*KERNEL), normal(*SHAPE[:-1], KERNEL[-1])
    with jax.enable_x64(True):
        return given, [np.asarray(one) for one in three(direct, *map(jnp.asarray, given))]


@pytest.mark.slow
def test_the_algorithm_is_exact(exact):
    (x, kernel, dy), want = exact
    with jax.enable_x64(True):
        x, kernel, dy = map(jnp.asarray, (x, kernel, dy))
        got = winograd.convolve(x, kernel), winograd.input_gradient(kernel, dy), winograd.kernel_gradient(x, dy)
        assert max(map(relative, got, want)) < 1e-13


@pytest.mark.first(1)
@pytest.mark.parametrize("side", [4, 32])
def test_sides_of_one_tile_and_of_many(side):
    x, kernel = normal(2, side, 4, 3), normal(3, 3, 3, 5)
    with jax.enable_x64(True):
        assert relative(winograd.convolve(x, kernel), direct(x, kernel)) < 1e-13
        flipped = jnp.swapaxes(x, 1, 2)
        assert relative(winograd.convolve(flipped, kernel), direct(flipped, kernel)) < 1e-13


def test_float32_rounds_to_some_millionths(exact):
    given, want = exact
    got = jax.jit(lambda *given: three(padded, *given))(*(jnp.asarray(one, jnp.float32) for one in given))
    assert all(one.dtype == jnp.float32 for one in got)
    errors = [relative(one, other) for one, other in zip(got, want, strict=True)]
    assert max(errors) < 2e-6
    if jax.default_backend() == "cpu":  # more than the direct one has, or it was not this algorithm
        assert min(errors) > 3e-7


@pytest.mark.slow
def test_vmap_over_inputs_kernels_and_both():
    x, kernel = (jnp.asarray(one, jnp.float32) for one in (normal(2, *SHAPE), normal(2, *KERNEL)))
    dy = jnp.asarray(normal(*SHAPE[:-1], KERNEL[-1]), jnp.float32)
    for axes in ((0, None), (None, 0), (0, 0)):
        args = [one if axis == 0 else one[0] for one, axis in zip((x, kernel), axes, strict=True)]
        got = jax.jit(jax.vmap(lambda *args: three(padded, *args, dy), axes))(*args)
        want = jax.jit(jax.vmap(lambda *args: three(direct, *args, dy), axes))(*args)
        assert max(map(relative, got, want)) < 2e-6, axes


def test_gradients_of_gradients():
    x, kernel = (jnp.asarray(one, jnp.float32) for one in (normal(*SHAPE), 0.1 * normal(*KERNEL)))

    def penalty(function, x, kernel):
        both = jax.grad(lambda *args: jnp.sum(jnp.sin(function(*args))), (0, 1))(x, kernel)
        return sum(jnp.sum(one**2) for one in both)

    got, want = (jax.jit(jax.grad(lambda *args, f=f: penalty(f, *args), (0, 1)))(x, kernel) for f in (padded, direct))
    assert max(map(relative, got, want)) < 1e-5


def count(dtype, platform, shape=SHAPE, kernel=KERNEL):
    """Return the numbers of convolutions and of products of matrices in a forward pass with both gradients."""
    make = lambda shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    given = make(shape), make(kernel), make((*shape[:-1], kernel[-1]))
    traced = jax.jit(lambda *given: three(padded, *given)).trace(*given)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    return text.count("stablehlo.convolution"), text.count("stablehlo.dot_general")


def test_other_platforms_and_types_keep_the_direct_convolution():
    convolutions, products = count(jnp.float32, "cpu")
    assert convolutions == 0 and products > 0
    for platform in ("cuda", "tpu"):
        assert count(jnp.float32, platform) == (3, 0)
    assert count(jnp.bfloat16, "cpu") == (3, 0)
    with jax.enable_x64(True):
        assert count(jnp.float64, "cpu") == (3, 0)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_images_on_eight_devices_need_one_sum_of_kernel_gradients():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (("data",), ()))
    make = lambda shape, sharding: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)  # noqa: E731
    given = make(SHAPE, over), make(KERNEL, whole), make((*SHAPE[:-1], KERNEL[-1]), over)
    text = jax.jit(lambda *given: three(padded, *given)).lower(*given).compile().as_text() or ""
    collectives = re.findall(r"= \S+ (all-\w+|collective-\w+|reduce-scatter)\(", text)
    assert collectives == ["all-reduce"]


@pytest.mark.parametrize(
    "shape, kernel",
    [
        ((2, 16, 16, 32), (3, 3, 32, 32)),  # too little to do
        ((4, 32, 32, 128), (3, 3, 128, 8)),  # too few channels
        ((8, 18, 20, 20), KERNEL),  # no whole tiles
        ((1, 32, 32, 256), (3, 3, 256, 256)),  # a kernel that needs more tiles, on a CPU of Intel's
    ],
)
def test_small_work_keeps_the_direct_convolution(shape, kernel, monkeypatch):
    monkeypatch.setattr(winograd, "on_amd", lambda: False)
    convolutions, products = count(jnp.float32, "cpu", shape, kernel)
    assert convolutions == 3 and products == 0


@pytest.mark.parametrize(
    "side, channels, intel, amd",
    [
        (32, 256, False, True),
        (64, 320, True, True),
        (16, 256, False, True),
        (8, 256, False, False),
        (16, 512, False, False),
    ],
)
def test_the_rule_knows_the_kind_of_cpu(side, channels, intel, amd, monkeypatch):
    """One image: what benchmarks/results/cpu-convolutions-*.md found to gain there."""
    shapes = (1, side, side, channels), (3, 3, channels, channels)
    for kind, expected in ((False, intel), (True, amd)):
        monkeypatch.setattr(winograd, "on_amd", lambda kind=kind: kind)
        assert winograd.pays(*shapes, (1, 1), (1, 1), ((1, 1), (1, 1))) == expected


@pytest.mark.parametrize(
    "spatial, window, stride, dilation, padding",
    [
        ((4, 5), (3, 3), (1, 1), (1, 1), ((1, 1), (0, 2))),
        ((5, 4), (3, 2), (2, 1), (1, 1), ((0, 1), (1, 1))),
        ((7,), (3,), (3,), (2,), ((-1, 4),)),
    ],
)
def test_large_kernels_on_few_pixels(monkeypatch, spatial, window, stride, dilation, padding):
    monkeypatch.setattr("rgdiff.nets.conv.HUGE", 2**16)
    x, kernel = normal(2, *spatial, 200), normal(*window, 200, 160)
    axes = "HW"[: len(spatial)]
    labels = (f"N{axes}C", f"{axes}IO", f"N{axes}C")

    def reference(x):
        return lax.conv_general_dilated(
            x, jnp.asarray(kernel), stride, padding, rhs_dilation=dilation, dimension_numbers=labels
        )

    with jax.enable_x64(True):
        y, pull = jax.vjp(reference, jnp.asarray(x))
        dy = normal(*y.shape)
        want = y, *pull(jnp.asarray(dy))
    small = [jnp.asarray(one, jnp.float32) for one in (x, kernel, dy)]
    ours = lambda x: conv(x, small[1], stride=stride, dilation=dilation, padding=padding)  # noqa: E731
    program = jax.jit(lambda x, dy: (ours(x), *jax.vjp(ours, x)[1](dy)))
    assert max(map(relative, program(small[0], small[2]), want)) < 1e-6
    if jax.default_backend() == "cpu":
        assert "stablehlo.convolution" not in program.lower(small[0], small[2]).as_text()
