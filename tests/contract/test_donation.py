"""Drivers of training donate their state: parameters and moments exist once while a step runs."""

from __future__ import annotations

import jax
import pytest

from rgdiff import tuners
from rgdiff.tuners import _loop, online
from tests.contract import test_contract as contract
from tests.contract.test_contract import B
from tests.contract.test_x64 import named


def size(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def aliased(lowered):
    return lowered.compile().memory_analysis().alias_size_in_bytes


@pytest.mark.parametrize("name", named(contract.TUNERS, {}))
@pytest.mark.first(1)
def test_fit_donates_its_state(name):
    make = named(contract.TUNERS, {})[name]
    tuner, params = make()
    state, data = tuner.init(params), contract.data_of(make)
    rows = None if data is None else B
    step = _loop._advance.lower(tuner, jax.random.key(0), state, data, count=2, batch=rows)
    inner = getattr(state, "state", state)  # of early stopping
    held = [getattr(inner, part, None) for part in ("params", "opt_state", "average")]
    assert aliased(step) >= max(size(held), 1)


def test_fit_online_donates_its_state():
    process = contract.gaussian()
    method = tuners.ddpo(contract.gaussian_model, process, process.times(3), contract.ADAM, batch=B)
    state, key = method.init(contract.net(2, 2)), jax.random.key(0)
    experience = jax.eval_shape(lambda state: method.rollout(key, state), state)
    rewards = jax.ShapeDtypeStruct((B,), "float32")
    update = online._update.lower(method, key, state, experience, rewards, None, layout=None)
    assert aliased(update) >= size((state.params, state.opt_state))
