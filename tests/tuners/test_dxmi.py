"""DxMI against closed forms: the energy's fixed point and its bias, linear-Gaussian data, released units; divergence is caught; seeds vmap."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rgdiff import denoisers, samplers, tuners
from rgdiff.runtime.checkpoint import Checkpoints
from rgdiff.runtime.folder import RunFolder
from rgdiff.runtime.run import PATIENCE, Run
from rgdiff.tuners.energy_model import contrast
from tests.test_policies import affine_model, law
from tests.tuners.test_dxdp import POLICY, PROCESS, blank, riccati, value_model

EDGES = np.linspace(-3, 3, 13)


def parabolas():
    """Parameters of values with one row more: the energy's, at t = 0."""
    return {"policy": blank()["policy"], "value": {k: jnp.zeros(4) for k in "cqp"}}


def with_energy(params, x, t, cond=None):
    """Row i of move i, the fourth at t = 0."""
    i = jnp.round((1 - t) * 3).astype(jnp.int32)
    return params["c"][i] + params["q"][i] * x[:, 0] + params["p"][i] * x[:, 0] ** 2


def model(params):
    return denoisers.from_function(with_energy, params)


def binned(params):
    return denoisers.from_function(_binned, params)


def _binned(params, x, t, cond=None):
    """A constant in each of 14 bins."""
    return params[jnp.searchsorted(jnp.asarray(EDGES, jnp.float32), x[:, 0])]


@pytest.mark.slow
def test_the_energys_fixed_point_and_what_it_leaves_between_data_and_samples():
    """For laws p and q that stand still, E = -(p - q) / (2 gamma (p + q)) in every bin, so p/q = (1 - 2 gamma E)/(1 + 2 gamma E)."""
    gamma = 0.7
    tuner = tuners.dxmi(
        POLICY, PROCESS, binned, energy=binned, gamma=gamma, learning_rate=0.0, energy_learning_rate=0.02, decay_steps=1200, batch=1000,
        ema_decay=None,
    )  # fmt: skip
    params = {"policy": parabolas()["policy"], "value": jnp.zeros(14), "energy": jnp.zeros(14)}
    data = np.random.default_rng(0).normal(0.5, 1.0, (100_000, 1)).astype(np.float32)
    state = tuners.fit(tuner, jax.random.key(0), tuner.init(params), 1200, data={"x0": data}, batch=1000, chunk=400)
    mean, variance = law(params["policy"]["network"], POLICY.sigma(params["policy"]))
    sampler = samplers.ancestral(PROCESS, POLICY(params["policy"]))
    drawn = np.asarray(samplers.sample(sampler, jax.random.key(1), 200_000, PROCESS.times()).x0)
    assert abs(drawn.var() / variance - 1) < 0.02 and abs(drawn.mean() - mean) < 0.01
    p, q = (np.histogram(x, np.concatenate([[-np.inf], EDGES, [np.inf]]))[0] / len(x) for x in (data, drawn))
    energy = np.asarray(state.params["energy"], float)
    some = p + q > 0.02
    assert some.sum() > 8
    np.testing.assert_allclose(energy[some], -((p - q) / (2 * gamma * (p + q)))[some], atol=0.025)
    left = (1 - 2 * gamma * energy) / (1 + 2 * gamma * energy)
    np.testing.assert_allclose(left[some], (p / q)[some], rtol=0.15)


def test_the_energys_gradient_in_magnitude():
    """Moments of data and samples: d/dp of mean E = p x^2 is the difference of second moments, and 2 gamma p of fourth ones."""
    tuner = tuners.dxmi(POLICY, PROCESS, model, decay_steps=jnp.inf, gamma=0.3)
    params = parabolas()
    params["value"]["p"] = params["value"]["p"].at[3].set(0.4)
    x, y = (np.random.default_rng(i).normal(i, 1 + i, (500, 1)).astype(np.float32) for i in (0, 1))
    data, samples = jnp.asarray(x), jnp.asarray(y)
    loss = lambda value: contrast(tuner.energy(params | {"value": value}), data, samples, jnp.float32(0.3))[0]  # noqa: E731
    gradient = jax.grad(loss)(params["value"])
    mean = lambda k: (np.mean(x.astype(float) ** k), np.mean(y.astype(float) ** k))  # noqa: E731
    (a2, b2), (a4, b4), (a3, b3) = mean(2), mean(4), mean(3)
    np.testing.assert_allclose(gradient["p"], [0, 0, 0, a2 - b2 + 0.6 * 0.4 * (a4 + b4)], rtol=1e-4)
    (a1, b1) = mean(1)
    np.testing.assert_allclose(gradient["q"], [0, 0, 0, a1 - b1 + 0.6 * 0.4 * (a3 + b3)], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("separate", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_gaussian_data_are_learnt(separate):
    """Affine steps and a parabolic energy: samples take the mean and variance of the data, up to the bias of gamma tau."""
    tau, gamma, m, v = 0.05, 0.5, 0.8, 0.36
    energy = {"energy": model, "energy_steps": 2, "energy_learning_rate": 0.005} if separate else {}
    tuner = tuners.dxmi(
        POLICY,
        PROCESS,
        model,
        temperature=tau,
        gamma=gamma,
        learning_rate=0.01,
        decay_steps=2000,
        batch=256,
        clip=1.0,
        **energy,
    )
    params = parabolas() | ({"energy": parabolas()["value"]} if separate else {})
    data = m + np.sqrt(v) * np.random.default_rng(0).standard_normal((50_000, 1)).astype(np.float32)
    infos = []
    state = tuners.fit(
        tuner, jax.random.key(0), tuner.init(params), 2000, data={"x0": data}, batch=256, chunk=500,
        on_chunk=lambda state, info: infos.append(info),
    )  # fmt: skip
    policy = state.best["policy"]
    mean, variance = law(policy["network"], POLICY.sigma(policy))
    assert abs(mean - m) < 0.04 and abs(variance / v - 1) < 0.15, (mean, variance)
    part = {k: float(row[3]) for k, row in state.best["energy" if separate else "value"].items()}
    # The sampler is the optimal one for the energy that was learnt,
    _, _, k, var = riccati(np.asarray(state.extra.speed, float), 2 * part["p"], -0.5 * part["q"] / part["p"], tau)
    np.testing.assert_allclose(1 + policy["network"]["w"], k, atol=0.03)
    np.testing.assert_allclose(POLICY.sigma(policy) ** 2, var, rtol=0.04)
    # and the energy balances the weighted moments of data and samples: its loss is at rest.
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    sides = []
    for sign, at in ((1.0, data.mean() + data.std() * nodes), (-1.0, mean + np.sqrt(variance) * nodes)):
        energy = part["c"] + part["q"] * at + part["p"] * at**2
        by = weights / weights.sum() * (1 + sign * 2 * gamma * energy)
        sides.append([by @ at**i for i in range(3)])
    np.testing.assert_allclose(sides[0], sides[1], atol=0.02)
    assert int(state.skipped) == 0 and not np.concatenate([i["diverged"] for i in infos]).any()
    assert abs(np.mean(infos[-1]["running_cost"]) - 0.5) < 0.01  # speeds at rest
    grid = jnp.linspace(-1, 2.6, 50)[:, None]
    e = np.asarray(tuner.energy(state.best)(grid), float)
    assert abs(float(grid[e.argmin(), 0]) - m) < 0.25  # lowest near the data: it makes up for what the bound lacks, too
    counts = state.opt_state["energy" if separate else "value"].count
    assert int(counts) == 2000 * (2 if separate else 4)


@pytest.mark.slow
def test_without_gamma_the_game_diverges_is_stopped_and_what_was_good_is_kept(tmp_path):
    """gamma = 0 and large rates: iterations out of bounds are undone, the runner stops after PATIENCE of them, with what went before on disk."""
    tuner = tuners.dxmi(
        POLICY,
        PROCESS,
        model,
        decay_steps=jnp.inf,
        gamma=0.0,
        learning_rate=0.05,
        value_learning_rate=0.1,
        batch=64,
        energy_limit=20.0,
        clip=100.0,
    )
    data = {"x0": 2 + np.random.default_rng(0).standard_normal((1000, 1)).astype(np.float32)}
    infos = []
    state = tuners.fit(
        tuner, jax.random.key(0), tuner.init(parabolas()), 300, data=data, batch=64, chunk=25,
        on_chunk=lambda state, info: infos.append(info),
    )  # fmt: skip
    diverged = np.concatenate([i["diverged"] for i in infos])
    assert diverged.sum() == int(state.skipped) > PATIENCE and not diverged[:5].any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    e = np.asarray(tuner.energy(state.params)(jnp.asarray(data["x0"])))
    assert np.sqrt(np.mean(e**2)) < 60.0  # one step beyond the limit at most
    run = Run(RunFolder(tmp_path / "run", {}, {}), 0, tmp_path)
    with pytest.raises(ValueError, match=r"raise gamma .*the last good state that was saved is kept"):
        run.fit("dxmi", tuner, jax.random.key(0), parabolas(), 300, data=data, batch=64)
    with Checkpoints(run.folder.path / "checkpoints" / "dxmi") as kept:
        saved = kept.restore(tuner.init(parabolas()))[0]
    e = np.asarray(tuner.energy(saved.params)(jnp.asarray(data["x0"])))
    assert int(saved.skipped) > PATIENCE and np.sqrt(np.mean(e**2)) < 60.0


@pytest.mark.slow
def test_an_iteration_that_is_undone_changes_nothing_but_the_counts():
    tuner = tuners.dxmi(POLICY, PROCESS, model, decay_steps=jnp.inf, batch=16, target_decay=0.9)
    state = tuner.init(parabolas())
    step = jax.jit(tuner.step)
    for bad in (jnp.full((16, 1), jnp.nan), jnp.full((16, 1), 1e30)):
        after, info = step(jax.random.key(0), state, {"x0": bad})
        assert int(info["diverged"]) == 1 and int(after.skipped) == 1 and int(after.step) == 1
        same = lambda s: (s.params, s.opt_state, s.average, s.extra)  # noqa: E731
        jax.tree.map(np.testing.assert_array_equal, same(after), same(state))
    slow = tuners.dxmi(
        POLICY, PROCESS, model, decay_steps=jnp.inf, batch=16, limit=1.0, speed=jnp.full(3, 0.01), velocity_decay=0.9
    )
    after, info = slow.step(jax.random.key(0), slow.init(parabolas()), {"x0": jnp.ones((16, 1))})
    assert int(info["diverged"]) == 1  # its speeds run away
    np.testing.assert_array_equal(after.extra.speed, slow.speed)


def test_the_released_units_and_what_its_settings_mean():
    """tau1 log sigma and tau2 |dx|^2 / 2 s^2 are means over D dimensions there; values have no costs and no time; D = 2."""
    from rgdiff import policies
    from rgdiff.kernels import Gaussian

    process = policies.few_step(policies.variances((0.8, 0.5)), (2,))
    policy = policies.policy(process, affine_model)
    tuner = tuners.dxmi_released(policy, process, value_model, dim=2)
    x, y = (jax.random.normal(jax.random.key(i), (6, 2)) for i in (0, 1))
    speed = jnp.float32(0.3)

    def cost(sigma):
        return tuner.cost(Gaussian(x, jnp.full((6, 1), sigma)), x, y, speed)

    released = lambda sigma: 0.01 * jnp.mean((y - x) ** 2, -1) / (2 * speed) - 0.1 * jnp.log(sigma)  # noqa: E731
    apart = np.asarray(cost(0.7) - released(0.7))
    np.testing.assert_allclose(apart, apart[0], rtol=1e-5)  # a constant of tau and s^2 alone
    np.testing.assert_allclose(cost(0.2) - cost(0.7), released(0.2) - released(0.7), rtol=1e-5)
    sigmoid = 1 / (1 + np.exp(-np.array([2.0, 1.0, 0.0, -1.0, -2.0, -3.0])))
    np.testing.assert_allclose(tuners.sigmoid_time_cost(5), sigmoid[:5] - sigmoid[1:], rtol=1e-5)
    assert abs(float(tuners.sigmoid_time_cost(10).sum()) - 0.987) < 5e-4  # the figure of research/dxmi.md
    seen = []

    def spying(params, x, t, cond=None):
        seen.append(t)
        return jnp.zeros(x.shape[0]) + params

    spy = tuners.dxmi_released(policy, process, lambda p: denoisers.from_function(spying, p), dim=2, batch=4)
    togo = spy.togo({"value": jnp.float32(0)})
    togo(x, jnp.float32(0.5))
    assert not np.asarray(seen[-1]).any()


@pytest.mark.slow
def test_released_targets_are_values_of_the_drawn_states_and_time_costs_alone():
    """One iteration with plain gradient steps of a constant V: d/dc (c - y)^2 over the moves, with costs of time only."""
    cost = tuners.sigmoid_time_cost(3, 1.0)
    tuner = tuners.dxmi_released(
        POLICY,
        PROCESS,
        _constant,
        dim=1,
        learning_rate=0.0,
        value_learning_rate=0.1,
        energy_learning_rate=0.0,
        optimizer=optax.identity(),
        batch=8,
    )
    state = tuner.init({"policy": blank()["policy"], "value": jnp.float32(0.5)})
    state, _ = tuner.step(jax.random.key(0), state, {"x0": jnp.ones((8, 1))})
    c = 0.5
    for i in (2, 1, 0):
        c -= 0.1 * 2 * (c - (c + float(cost[i])))
    np.testing.assert_allclose(state.params["value"], c, rtol=1e-5)


def _constant(params):
    return denoisers.from_function(lambda p, x, t, cond=None: jnp.broadcast_to(p, x.shape[:1]), params)


@pytest.mark.slow
def test_seeds_in_one_program_are_seeds_one_after_another():
    """vmap over seeds: parameters, keys and data rows, the same numbers as each alone."""
    tuner = tuners.dxmi(POLICY, PROCESS, model, batch=16, decay_steps=10, warmup=1)
    data = jax.random.normal(jax.random.key(9), (3, 16, 1))
    start = lambda key: jax.tree.map(lambda p: p + 0.1 * jax.random.normal(key, p.shape), parabolas())  # noqa: E731
    keys = jax.random.split(jax.random.key(1), 3)

    def train(key, x0):
        state = tuner.init(start(key))
        return jax.lax.fori_loop(0, 4, lambda i, s: tuner.step(jax.random.fold_in(key, i), s, {"x0": x0})[0], state)

    together = jax.jit(jax.vmap(train))(keys, data)
    alone = [jax.jit(train)(key, x0) for key, x0 in zip(keys, data, strict=True)]
    each = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), together, each)
    assert float(jnp.std(together.params["value"]["p"], 0).min()) > 1e-3


@pytest.mark.slow
def test_numbers_change_without_another_program():
    traces = []

    def counting(params, x, t, cond=None):
        traces.append(1)
        return with_energy(params, x, t)

    counted = lambda p: denoisers.from_function(counting, p)  # noqa: E731
    make = lambda **numbers: tuners.dxmi(POLICY, PROCESS, counted, batch=16, **({"decay_steps": jnp.inf} | numbers))  # noqa: E731
    data = {"x0": np.ones((50, 1), np.float32)}
    tuners.fit(make(), jax.random.key(0), make().init(parabolas()), 6, data=data, batch=16, chunk=3)
    assert traces
    traces.clear()
    other = make(
        temperature=0.2,
        gamma=0.3,
        last_gamma=0.1,
        learning_rate=2e-3,
        energy_learning_rate=1e-4,
        decay_steps=9,
        energy_limit=50.0,
    )
    tuners.fit(other, jax.random.key(1), other.init(parabolas()), 6, data=data, batch=16, chunk=3)
    assert not traces


@pytest.mark.slow
def test_gamma_falls_with_the_rates():
    """Half-way gamma is half-way to last_gamma: the gradient of a constant energy c is 4 gamma c."""
    tuner = tuners.dxmi(
        POLICY, PROCESS, _constant, gamma=1.0, last_gamma=0.2, learning_rate=0.0, energy_learning_rate=0.1, value_learning_rate=0.0, batch=8,
        optimizer=optax.identity(), decay_steps=100, ema_decay=None,
    )  # fmt: skip
    state = tuner.init({"policy": blank()["policy"], "value": jnp.float32(0.5)})
    state = state._replace(step=jnp.int32(50))
    state, _ = tuner.step(jax.random.key(0), state, {"x0": jnp.ones((8, 1))})
    np.testing.assert_allclose(state.params["value"], 0.5 - 0.05 * 4 * 0.6 * 0.5, rtol=1e-5)


def test_refusals():
    with pytest.raises(ValueError, match=r"trains parameters \['energy', 'policy', 'value'\]"):
        tuners.dxmi(POLICY, PROCESS, model, decay_steps=jnp.inf, energy=model).init(parabolas())
    with pytest.raises(ValueError, match="gamma must be a finite number >= 0"):
        tuners.dxmi(POLICY, PROCESS, model, decay_steps=jnp.inf, gamma=-1.0)
    with pytest.raises(ValueError, match="energy_steps must be an integer"):
        tuners.dxmi(POLICY, PROCESS, model, decay_steps=jnp.inf, energy_steps=0)
