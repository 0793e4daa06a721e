"""The DRaFT study's own arithmetic: steps to a target, ratios over seeds, and a learning rate that is a number of the state."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.studies.draft_study import Run, optimizer, ratios, reached


def run(at, heldout):
    return Run(np.zeros(1), np.array(at), np.array(heldout, float), 1.0, None)


def test_steps_to_the_target_are_interpolated_between_evaluations():
    assert reached(run([0, 4, 8], [-8.0, -2.0, -1.0]), -1.5) == 6
    assert reached(run([0, 4, 8], [-8.0, -1.5, -3.0]), -1.5) == 4  # the first time counts, whatever comes after
    assert reached(run([0, 4], [-8.0, -2.0]), -1.5) == np.inf


def test_ratios_are_geometric_means_and_say_what_was_not_reached():
    assert ratios([1.0, 2.0], [4.0, 2.0]) == "2 (1-4)"
    assert ratios([1.0, 2.0], [np.inf, 2.0]) == "not reached"


@pytest.mark.parametrize("rate", [1e-2, 1e-4])
def test_the_rate_in_the_state_is_the_first_step_of_adam(rate):
    state = optimizer().init({"w": jnp.zeros(3)})
    state[1].hyperparams["learning_rate"] = jnp.float32(rate)
    step, _ = optimizer().update({"w": jnp.array([0.1, -0.2, 0.3])}, state)
    np.testing.assert_allclose(step["w"], rate * np.array([-1, 1, -1]), rtol=1e-4)
