"""The vocabulary: what a pytree of this library is to JAX."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from rgdiff import policies, processes, rewards, schedules
from rgdiff.typing import pytree, static


@pytree
class One:
    number: Any
    name: str = static(default="a")


@pytree
class Other:
    number: Any
    name: str = static(default="a")


def test_two_classes_with_the_same_fields_are_two_structures():
    """In jaxlib 0.10 those of `register_dataclass` compare equal, and one's compiled program is sometimes run for the other."""
    alike = [One(1.0), Other(1.0), One(1.0, "b")]
    bare = [schedules.cosine_vp(), schedules.flow(), schedules.log_linear_mask(), schedules.cosine_mask()]
    ranges = [schedules.linear_vp(), rewards.weighted_sum([jnp.sum], [1.0]), processes.gaussian(schedules.flow(), (2,))]
    for objects in (alike, bare, [*ranges, processes.gaussian(schedules.cosine_vp(), (2,)), policies.variances()]):
        for a, b in itertools.combinations(map(jax.tree.structure, objects), 2):
            assert a != b
    assert jax.tree.structure(One(1.0)) == jax.tree.structure(One(jnp.ones(3)))
    assert jax.tree.structure(schedules.flow()) == jax.tree.structure(schedules.flow())
    with pytest.raises(ValueError):
        jax.tree.map(lambda a, b: a, One(1.0), Other(1.0))


def test_a_pytree_comes_back_whole_and_names_its_leaves():
    node = One({"w": jnp.ones(2)}, "c")
    leaves, structure = jax.tree.flatten(node)
    back = jax.tree.unflatten(structure, leaves)
    assert type(back) is One and back.name == "c" and back.number["w"] is leaves[0]
    [(path, _)] = jax.tree_util.tree_leaves_with_path(node)
    assert jax.tree_util.keystr(path) == ".number['w']"
    process = processes.initial_law(processes.gaussian(schedules.flow(), (2,)), schedules.linear_vp())
    again = jax.tree.unflatten(*reversed(jax.tree.flatten(process)))
    assert type(again) is processes.InitialProcess and again.shape == (2,) and again.variance == "fixed_large"
