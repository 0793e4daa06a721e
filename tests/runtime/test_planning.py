"""Planning: what is read off compiled programs, against closed forms; TPUs by libtpu's compiler, where it is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgdiff.runtime import planning
from rgdiff.runtime.planning import Call, Figures

libtpu = pytest.mark.skipif(
    find_spec("libtpu") is None, reason="TPU programs are compiled by libtpu: pip install libtpu"
)
SQUARE = jax.ShapeDtypeStruct((64, 64), jnp.float32)


def test_operations_are_those_of_products_and_convolutions():
    a = np.ones((8, 16), np.float32)

    def loss(w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), a, None, length=5)[0].sum()

    count = lambda f, *x: planning.operations(jax.make_jaxpr(f)(*x).jaxpr)  # noqa: E731
    w = np.ones((16, 16), np.float32)
    assert count(loss, w) == 5 * 2 * 8 * 16 * 16
    assert count(jax.grad(loss), w) == 3 * 5 * 2 * 8 * 16 * 16  # two products back for each forward
    image, kernel = np.ones((2, 9, 9, 3), np.float32), np.ones((3, 3, 3, 7), np.float32)
    names = ("NHWC", "HWIO", "NHWC")
    convolve = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "VALID", dimension_numbers=names)  # noqa: E731
    assert count(convolve, image, kernel) == 2 * 2 * 7 * 7 * 7 * 27
    dear = lambda x, go: jax.lax.cond(go, lambda x: x @ x, lambda x: x, x)  # noqa: E731
    assert count(dear, w, True) == 2 * 16**3


def test_a_plan_on_the_cpu(tmp_path, monkeypatch):
    program = jax.jit(lambda a, b: (a @ b, a + 1), donate_argnums=0)
    here = planning.target("cpu")
    found = planning.figures(Call(program, (SQUARE, jax.ShapeDtypeStruct((64, 64), jnp.float32))), here, tmp_path)
    assert found.arguments == 2 * 4 * 64 * 64
    assert 0 <= found.outputs - found.arguments < 64  # the tuple's own pointers
    assert found.aliased == 4 * 64 * 64 and found.flops == 2 * 64**3
    assert found.peak == found.arguments + found.outputs - found.aliased + found.temporaries + found.code
    assert found.fits(None) is None and found.fits(found.peak) and not found.fits(found.peak - 1)
    assert found.collectives == {}
    # One object in two places is one buffer.
    assert planning.figures(Call(program, (SQUARE, SQUARE)), here).arguments == 4 * 64 * 64
    first = jax.jit(lambda a, b: a @ a)  # and one that is not read is none
    assert planning.figures(Call(first, (SQUARE, SQUARE)), here).arguments == 4 * 64 * 64

    def refuse(*_):
        raise AssertionError("compiled again")

    monkeypatch.setattr(planning, "_compiled", refuse)
    again = planning.figures(Call(program, (SQUARE, jax.ShapeDtypeStruct((64, 64), jnp.float32))), here, tmp_path)
    assert again == found
    with pytest.raises(AssertionError, match="compiled again"):  # another program is another entry
        planning.figures(Call(jax.jit(lambda a: a @ a), (SQUARE,)), here, tmp_path)


def test_targets_are_checked(monkeypatch):
    with pytest.raises(ValueError, match="target must be one of"):
        planning.target("v9x:4x4")

    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(planning, "version", missing)
    with pytest.raises(ValueError, match=r"needs libtpu.*pip install 'rgdiff\[tpu\]'"):
        planning.target("v5e:4x4")


def test_the_largest_that_fits():
    for most in (0, 1, 2, 3, 1000, 2**20):
        assert planning.largest(lambda n, most=most: n <= most) == most
    assert planning.largest(lambda n: True, 100) == 100


@libtpu
def test_a_gradient_on_eight_tpus():
    """The batch is split, and its gradient is summed once; inside a loop that updates, once in the loop."""
    pod = planning.target("v5e:2x4")
    assert pod.devices == 8 and pod.memory == 16 * planning.GIB
    loss = lambda w, x: jnp.square(jnp.tanh(x @ w)).mean()  # noqa: E731
    given = SQUARE, jax.ShapeDtypeStruct((256, 64), jnp.float32)
    found = planning.figures(Call(jax.jit(jax.grad(loss)), given, {}, frozenset({1})), pod)
    assert found.collectives == {"all-reduce": [1, 0]}
    assert found.seconds is not None and found.fits(pod.memory)
    assert found.arguments < 4 * (64 * 64 + 256 * 64)  # an eighth of the rows
    descend = lambda w, x: jax.lax.fori_loop(0, 4, lambda _, w: w - jax.grad(loss)(w, x), w)  # noqa: E731
    inside = planning.figures(Call(jax.jit(descend), given, {}, frozenset({1})), pod)
    assert inside.collectives == {"all-reduce": [0, 1]} and inside.seconds is None


@libtpu
def test_what_does_not_fit_is_refused_by_the_compiler():
    one = planning.target("v5p")
    assert one.devices == 1 and one.memory == 95 * planning.GIB
    large = jax.ShapeDtypeStruct((200_000, 200_000), jnp.float32)
    found = planning.figures(Call(jax.jit(lambda a: (a @ a).sum()), (large,)), one)
    assert found.refused and found.fits(one.memory) is False and isinstance(found, Figures)
    with pytest.raises(ValueError, match="libtpu has no such topology"):
        planning.target("v5e:3x5")
