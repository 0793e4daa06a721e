"""The engine of reward gradients: every plan against finite differences in float64, what must not change it, what holds it back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rgdiff import denoisers, processes, samplers, schedules, tuners
from rgdiff.rewards import ensemble
from rgdiff.tuners import plans
from rgdiff.tuners._chain import Plan
from rgdiff.typing import pytree
from tests.worlds.worlds import SCHEDULES, GaussianWorld, ddim

SGD = optax.sgd(1e-3)
THETA = np.array([0.2, 0.9])
f32 = lambda a: jnp.asarray(a, jnp.float32)  # noqa: E731


def world(eta=0.0, schedule="linear_vp", steps=5):
    return GaussianWorld(
        [0.7, -0.4], [[0.5, 0.3], [0.3, 0.9]], schedule=schedule, steps=steps, eta=eta, b=[1.0, 0.5],
        q=[[0.6, 0.1], [0.1, 0.3]], theta=THETA,
    )  # fmt: skip


def held_chain(w, x, theta, plan, input_gradient):
    """Mean reward of a DDIM chain as a function of theta, in which all that the plan holds is recorded at THETA.

    Float64 and written from the equations: dead calls predict the recorded noise, live ones see the recorded state where
    the input has no gradient, and the state at the cut is the recorded one.
    """
    live, cut, end = np.asarray(plan.live), int(plan.cut), min(int(plan.end), len(w.grid) - 1)

    def eps_of(x, t, theta):
        g, offset = w.gain(t, theta)
        return (x - w.reference.alpha(t) * (x @ g.T + offset)) / w.reference.sigma(t)

    recorded, state = x, x
    for i in range(end + 1):
        t = w.grid[i]
        if i == cut:
            state = recorded
        base = eps_of(recorded, t, THETA)
        eps = base
        if live[i]:
            eps = eps_of(state if input_gradient else recorded, t, theta)
        alpha, sigma = w.reference.alpha(t), w.reference.sigma(t)
        x0, base_x0 = (state - sigma * eps) / alpha, (recorded - sigma * base) / alpha
        if i == end:
            return float(np.mean(x0 @ w.b - 0.5 * np.sum((x0 @ w.q) * x0, -1)))
        a, c, _ = ddim(w.reference, t, w.grid[i + 1], 0.0)
        state, recorded = a * x0 + c * eps, a * base_x0 + c * base
    raise AssertionError


@pytree
class Fixed:
    """A plan that is always the same."""

    plan: Plan
    early: bool = True

    def __call__(self, key, calls):
        return self.plan


PLANS = {
    "suffix": ([0, 0, 1, 1, 1], 2, 5, True),
    "subset": ([1, 0, 1, 0, 1], 0, 5, True),
    "subset, last call dead": ([0, 1, 1, 0, 0], 0, 5, True),
    "late": ([0, 0, 0, 1, 0], 3, 3, True),
    "spaced, no input gradient": ([0, 1, 0, 1, 0], 0, 4, False),
    "spaced, ended between live calls": ([1, 0, 1, 0, 1], 0, 3, False),
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.first(1)
def test_every_plan_has_the_gradient_it_says(name):
    live, cut, end, input_gradient = PLANS[name]
    plan = Plan(jnp.asarray(live, bool), jnp.int32(cut), jnp.int32(end))
    w, key = world(), jax.random.key(3)
    tuner = tuners.reward_backprop(
        w.model, w.process, w.reward, w.times, SGD, batch=6, truncation=Fixed(plan), input_gradient=input_gradient
    )
    x = w.process.prior(6).sample(jax.random.fold_in(jax.random.split(key)[0], 0))
    step, unit = 1e-5, np.eye(2)
    f = lambda theta: held_chain(w, np.asarray(x, float), theta, plan, input_gradient)  # noqa: E731
    exact = np.array([(f(THETA + step * u) - f(THETA - step * u)) / (2 * step) for u in unit])
    got, info = jax.jit(tuner.gradients)(f32(THETA), key)
    assert np.linalg.norm(exact) > 1e-2
    np.testing.assert_allclose(-np.asarray(got), exact, rtol=2e-3, atol=2e-3 * np.linalg.norm(exact))
    np.testing.assert_allclose(info["reward"], f(THETA), rtol=1e-4)


NAMED = {
    "refl": (tuners.refl, {"m": 3}),
    "alignprop": (tuners.alignprop, {"std": 2.0}),
    "alignprop_subset": (tuners.alignprop_subset, {}),
    "drtune": (tuners.drtune, {"k": 2, "m": 2}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ("refl", "alignprop") else n for n in NAMED]
)
@pytest.mark.slow
def test_named_settings_have_the_gradient_of_the_plan_they_draw(name):
    w, (setting, options) = world(), NAMED[name]
    tuner, calls = setting(w.model, w.process, w.reward, w.times, SGD, batch=6, **options), len(w.grid)
    gradient, drawn, step = jax.jit(tuner.gradients), set(), 1e-5
    for seed in range(6):
        key = jax.random.key(seed)
        chain = jax.random.split(key)[0]
        plan = tuner.plan(jax.random.fold_in(chain, calls + 1), calls)
        x = np.asarray(w.process.prior(6).sample(jax.random.fold_in(chain, 0)), float)
        f = lambda theta, x=x, plan=plan: held_chain(w, x, theta, plan, tuner.input_gradient)  # noqa: E731
        exact = np.array([(f(THETA + step * u) - f(THETA - step * u)) / (2 * step) for u in np.eye(2)])
        assert (np.linalg.norm(exact) > 1e-2) == bool(plan.live.any())  # `alignprop_subset` may draw none
        got = -np.asarray(gradient(f32(THETA), key)[0])
        np.testing.assert_allclose(got, exact, rtol=2e-3, atol=2e-3 * np.linalg.norm(exact))
        drawn.add((tuple(np.asarray(plan.live).tolist()), int(plan.cut), int(plan.end)))
    assert len(drawn) > 1


@pytest.mark.slow
def test_alignprop_pays_the_kl_of_the_truncation_it_draws():
    w = world(eta=1.0)
    kl = {"reference": w.model(f32([0.0, 1.0])), "temperature": 0.3}
    tuner, calls = tuners.alignprop(w.model, w.process, w.reward, w.times, SGD, batch=8, std=2.0, **kl), len(w.grid)
    gradient, lengths = jax.jit(tuner.gradients), set()
    for seed in range(3):
        key = jax.random.key(seed)
        plan = tuner.plan(jax.random.fold_in(jax.random.split(key)[0], calls + 1), calls)
        k = int(plan.live.sum())
        static = tuners.draft_k(w.model, w.process, w.reward, w.times, SGD, k=k, batch=8, **kl)
        got, expected = gradient(f32(THETA), key), static.gradients(f32(THETA), key)
        np.testing.assert_allclose(got[0], expected[0], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(got[1]["kl"], expected[1]["kl"], rtol=1e-5)
        lengths.add(k)
    assert len(lengths) > 1


@pytest.mark.slow
def test_projection_weighs_the_last_calls_kl():
    """KL of the projection: SNR / 2 |x0 - x0_ref|^2; of a shift in both dimensions SNR shift^2, whose derivative is 2 SNR shift."""
    w, shift, temperature = world(eta=1.0), 0.3, 0.5
    reference = w.model(f32([THETA[0] + shift, THETA[1]]))
    gradients, kls = {}, []
    for factor in (0.0, 0.25):
        tuner = tuners.draft_k(
            w.model, w.process, w.reward, w.times, SGD, k=1, batch=8, reference=reference, temperature=temperature,
            projection=factor,
        )  # fmt: skip
        gradient, info = tuner.gradients(f32(THETA), jax.random.key(0))
        gradients[factor] = np.asarray(gradient)
        kls.append(float(info["kl"]))
    snr = (SCHEDULES["linear_vp"].alpha(w.grid[-1]) / SCHEDULES["linear_vp"].sigma(w.grid[-1])) ** 2
    paid = gradients[0.25] - gradients[0.0]
    np.testing.assert_allclose(paid[0], -2 * temperature * 0.25 * snr * shift, rtol=1e-3)
    np.testing.assert_allclose(kls, kls[0])  # all of it is reported


@pytest.mark.parametrize("temperature", [None, pytest.param(0.3, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_dynamic_truncation_is_the_static_one_and_compiles_once(temperature):
    w, traces = world(eta=1.0), []

    def model(theta):
        traces.append(1)
        return w.model(theta)

    options = {} if temperature is None else {"reference": w.model(f32([0.0, 1.0])), "temperature": temperature}
    grad = jax.jit(lambda tuner, theta: tuner.gradients(theta, jax.random.key(0)))
    make = lambda k, **more: tuners.draft_k(model, w.process, w.reward, w.times, SGD, k=k, batch=8, **options, **more)  # noqa: E731
    dynamic = {}
    for k in (1, 3, 5):
        dynamic[k] = grad(make(k, dynamic=True), f32(THETA))
        if k == 1:
            traces.clear()
    assert not traces
    for k, (gradient, info) in dynamic.items():
        other, other_info = jax.jit(make(k).gradients)(f32(THETA), jax.random.key(0))
        np.testing.assert_allclose(gradient, other, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(info["reward"], other_info["reward"], rtol=1e-5)


@pytest.mark.slow
def test_refl_of_the_last_call_is_draft_1():
    w = world(eta=1.0)
    same = [
        make(w.model, w.process, w.reward, w.times, SGD, batch=8).gradients(f32(THETA), jax.random.key(0))[0]
        for make in (lambda *a, **o: tuners.refl(*a, m=1, **o), lambda *a, **o: tuners.draft_k(*a, k=1, **o))
    ]
    np.testing.assert_allclose(*same, rtol=1e-5)


@pytest.mark.slow
def test_plans_have_their_published_laws():
    keys = jax.random.split(jax.random.key(0), 20_000)
    live = jax.vmap(lambda k: plans.suffix()(k, 50).live.sum())(keys)
    # Simulated from the released code's rule by the survey that read it: 9.1 +- 4.5 live calls, K = 1 in 3 %.
    assert abs(live.mean() - 9.1) < 0.15 and abs(live.std() - 4.5) < 0.15 and abs((live == 1).mean() - 0.03) < 0.006
    subset = jax.vmap(lambda k: plans.Subset()(k, 50).live)(keys)
    np.testing.assert_allclose(subset.mean(0), np.arange(1, 51) / 51, atol=0.015)
    ends = jax.vmap(lambda k: plans.late(20)(k, 50).end)(keys)
    np.testing.assert_allclose(np.bincount(ends, minlength=50)[30:] / 20_000, 1 / 20, atol=0.006)
    assert ends.min() == 30
    spaced = jax.vmap(lambda k: plans.spaced(5, 1)(k, 50).live)(keys)
    assert np.all(spaced.sum(1) == 5) and np.all(spaced.any(0))
    np.testing.assert_array_equal(np.diff(np.nonzero(spaced[0])[0]), 10)


@pytest.mark.slow
def test_micro_batches_are_the_mean_of_their_gradients():
    """Also where samples are infeasible: every feasible example of the whole batch counts alike."""
    w = world(eta=1.0)
    reward = lambda x0, cond=None: jnp.where(x0[:, 0] > 1.6, jnp.nan, w.reward(x0))  # noqa: E731
    options = {"reference": w.model(f32([0.0, 1.0])), "temperature": 0.3}
    key, count, batch = jax.random.key(1), 4, 32
    split = tuners.draft(w.model, w.process, reward, w.times, SGD, batch=batch, micro_batches=count, **options)
    small = tuners.draft(w.model, w.process, reward, w.times, SGD, batch=batch // count, **options)
    got, info = jax.jit(split.gradients)(f32(THETA), key)
    one = jax.jit(small.gradients)
    parts = [one(f32(THETA), k) for k in jax.random.split(key, count)]
    feasible = np.array([batch // count - int(i["infeasible"]) for _, i in parts])
    assert len(set(feasible.tolist())) > 1 and feasible.min() > 0
    expected = np.average([g for g, _ in parts], axis=0, weights=feasible)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert int(info["infeasible"]) == batch - feasible.sum()
    np.testing.assert_allclose(info["kl"], np.mean([i["kl"] for _, i in parts]), rtol=1e-5)


@pytest.mark.slow
def test_accumulation_by_optax_is_one_step_of_the_mean():
    w = world(eta=1.0)
    tuner = tuners.draft(w.model, w.process, w.reward, w.times, optax.MultiSteps(optax.sgd(0.1), 3), batch=4)
    state, gradients = tuner.init(f32(THETA)), []
    for i in range(3):
        np.testing.assert_array_equal(state.params, f32(THETA))
        gradients.append(tuner.gradients(state.params, jax.random.key(i))[0])
        state, _ = tuner.step(jax.random.key(i), state)
    np.testing.assert_allclose(state.params, THETA - 0.1 * np.mean(gradients, 0), rtol=1e-5)


def test_offloaded_residuals_change_no_gradient():
    w = world(eta=1.0)
    grads = []
    for remat in ("everything", "offload"):
        tuner = tuners.draft(w.model, w.process, w.reward, w.times, SGD, batch=4, remat=remat)
        grads.append(jax.jit(tuner.gradients)(f32(THETA), jax.random.key(0))[0])
    np.testing.assert_allclose(*grads, rtol=1e-6)


@pytest.mark.slow
def test_several_references_have_a_weight_each():
    w = world(eta=1.0)
    references = [w.model(f32(t)) for t in ([0.0, 1.0], [0.5, 0.7])]

    def gradient(**options):
        tuner = tuners.draft(w.model, w.process, w.reward, w.times, SGD, batch=8, **options)
        return tuner.gradients(f32(THETA), jax.random.key(0))

    plain, _ = gradient()
    each = [gradient(reference=r, temperature=1.0) for r in references]
    both, info = gradient(reference=references, temperature=[0.2, 0.7])
    expected = plain + 0.2 * (each[0][0] - plain) + 0.7 * (each[1][0] - plain)
    np.testing.assert_allclose(both, expected, rtol=1e-4)
    np.testing.assert_allclose([info["kl"], info["kl_2"]], [i["kl"] for _, i in each], rtol=1e-5)


@pytest.mark.slow
def test_draft_plus_pays_the_squared_difference_of_noise_at_live_calls():
    w, shift = world(eta=0.0), 0.3
    reference = w.model(f32([THETA[0] + shift, THETA[1]]))
    tuner = tuners.draft_plus(
        w.model, w.process, w.reward, w.times, SGD, reference=reference, weight=2.0, k=1, batch=16
    )
    gradient, info = tuner.gradients(f32(THETA), jax.random.key(0))
    t = w.grid
    snr = [(SCHEDULES["linear_vp"].alpha(s) / SCHEDULES["linear_vp"].sigma(s)) ** 2 for s in t]
    np.testing.assert_allclose(
        info["eps_mse"], shift**2 * snr[-1], rtol=1e-3
    )  # of the live call alone; x0 differs by the shift
    plain, _ = tuners.draft_k(w.model, w.process, w.reward, w.times, SGD, k=1, batch=16).gradients(
        f32(THETA), jax.random.key(0)
    )
    # d/dshift of 2 * snr * |shift difference|^2 / 2 dimensions, both of which move, at the last call alone
    np.testing.assert_allclose((gradient - plain)[0], -2.0 * 2 * snr[-1] * shift, rtol=1e-3)


def test_a_kl_budget_is_kept():
    w = world(eta=1.0)
    tuner = tuners.draft(
        w.model, w.process, w.reward, w.times, optax.adam(0.01), batch=64, reference=w.model(f32([0.0, 1.0])),
        temperature=0.1, kl_budget=0.5, kl_rate=0.02,
    )  # fmt: skip
    kls = []
    state = tuners.fit(
        tuner,
        jax.random.key(0),
        tuner.init(f32([0.0, 1.0])),
        1000,
        chunk=250,
        on_chunk=lambda s, i: kls.append(i["kl"]),
    )
    assert abs(np.mean(kls[-1]) - 0.5) < 0.05 and abs(float(state.extra[0]) / 0.1 - 1) > 0.2, (kls[-1], state.extra)


@pytree
class Scripted:
    """A tuner that reports prepared figures; its parameters count its steps."""

    values: jax.Array

    def init(self, params):
        return tuners.start(params, SGD)

    def step(self, key, state, batch=None):
        value = self.values[state.step]
        state = state._replace(params=state.params + 1, step=state.step + 1)
        return state, {"heldout": value, "kl": state.params, "skipped": state.skipped, "gradient_norm": value}


def test_early_stopping_keeps_the_best_and_ends_the_run():
    values = f32([1, 1, 3, 3, 5, 5, 2, 2, 4, 4, 9, 9, 9, 9])
    tuner = tuners.early_stopping(Scripted(values), window=2, patience=2)
    seen = []
    state = tuners.fit(
        tuner, jax.random.key(0), tuner.init(jnp.float32(0)), 14, chunk=3, on_chunk=lambda s, i: seen.append(i)
    )
    # the windows' means are 1 3 5 2 4: two without a new best, stopped after step 10; the 9s are never seen
    assert bool(state.stopped) and float(state.best_value) == 5 and float(state.params) == 10
    assert float(state.best) == 5  # the parameters that made the best window's last figure: after 5 steps
    assert len(seen) == 4 and np.isnan(seen[-1]["heldout"][1:]).all()
    again = tuners.fit(tuner, jax.random.key(0), tuner.init(jnp.float32(0)), 7, chunk=3)
    again = tuners.fit(tuner, jax.random.key(0), again, 14, chunk=5)
    for name in ("best", "best_value", "stopped"):
        assert getattr(again, name) == getattr(state, name)
    limited = tuners.early_stopping(Scripted(values), window=2, patience=9, limited="kl", limit=3.5)
    assert float(tuners.fit(limited, jax.random.key(0), limited.init(jnp.float32(0)), 14, chunk=2).params) == 4
    # NaN figures are left out of their window's mean; a window of nothing else is never the best
    holes = f32([-5, np.nan, np.nan, np.nan, -6, -6, np.nan, np.nan])
    tuner = tuners.early_stopping(Scripted(holes), window=2, patience=9)
    state = tuners.fit(tuner, jax.random.key(0), tuner.init(jnp.float32(0)), 8, chunk=2)
    assert float(state.best_value) == -5 and float(state.best) == 1
    early = tuners.fit(tuner, jax.random.key(0), tuner.init(jnp.float32(0)), 1, chunk=1)
    assert float(early.best) == 1 == float(early.params)  # no window is full: the newest
    with pytest.raises(ValueError, match=r"asks for \['frechet'\]"):
        tuners.fit(tuners.early_stopping(Scripted(values), "frechet"), jax.random.key(0), state, 20)


@pytest.mark.parametrize(("bad", "renoised"), [(np.nan, 0), (-np.inf, 2)])
@pytest.mark.slow
def test_infeasible_samples_do_not_enter_the_gradient_even_where_their_own_is_nan(bad, renoised):
    """r = sqrt(x - m), infeasible with a derivative of NaN below m: as the mean over the others of a reward that is sane."""
    w = world(eta=1.0)
    middle = float(
        jnp.median(
            samplers.sample(samplers.ancestral(w.process, w.model(f32(THETA))), jax.random.key(1), 256, w.times).x0
        )
    )
    rough = lambda x: jnp.where(x > middle, jnp.sqrt(x - middle), bad * jnp.sqrt(x - middle) ** 0)  # noqa: E731
    root = lambda x0, cond=None: rough(x0[:, 0])  # noqa: E731
    inside = lambda x: jnp.sqrt(jnp.where(x > middle, x - middle, 1.0))  # noqa: E731
    sane = lambda x0, cond=None: jnp.where(x0[:, 0] > middle, inside(x0[:, 0]), jnp.nan)  # noqa: E731
    make = lambda reward: tuners.reward_backprop(  # noqa: E731
        w.model, w.process, reward, w.times, SGD, batch=64, renoised=renoised
    )
    got, info = make(root).gradients(f32(THETA), jax.random.key(0))
    expected, _ = make(sane).gradients(f32(THETA), jax.random.key(0))
    assert 0 < int(info["infeasible"]) < 64 and np.isfinite(info["reward"])
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    slope = jax.grad(rough)(middle - 1.0)
    assert np.isnan(slope)  # what would have spoilt it


@pytest.mark.slow
def test_gradient_statistics_against_numpy():
    """Independent batches: mean, variance and their ratio, and that a batch four times as large has a quarter of the variance."""
    w = world(eta=1.0)
    make = lambda batch: tuners.draft_k(w.model, w.process, w.reward, w.times, SGD, k=2, batch=batch)  # noqa: E731
    key, draws = jax.random.key(0), 512
    got = tuners.gradient_statistics(make(4), key, f32(THETA), draws)
    alone = tuners.gradient_statistics(make(4), key, f32(THETA), draws, chunk=1)  # without vmap
    np.testing.assert_allclose(alone, got, rtol=1e-4)
    stopped = tuners.early_stopping(make(4))  # a tuner that may stop has the same gradients
    gradients = jax.jit(jax.vmap(lambda k: stopped.gradients(f32(THETA), k)[0]))(jax.random.split(key, draws))
    g = np.asarray(gradients, float)
    variance = g.var(0, ddof=1).sum()
    np.testing.assert_allclose(got.variance, variance, rtol=1e-3)
    np.testing.assert_allclose(got.squared_mean, (g.mean(0) ** 2).sum() - variance / draws, rtol=1e-3)
    np.testing.assert_allclose(got.snr, got.squared_mean / got.variance, rtol=1e-5)
    larger = tuners.gradient_statistics(make(16), key, f32(THETA), draws)
    np.testing.assert_allclose(larger.variance_per_example, got.variance_per_example, rtol=0.3)
    np.testing.assert_allclose(larger.squared_mean, got.squared_mean, rtol=0.1)


def test_ensembles_against_numpy():
    parts = [lambda x0, cond=None, k=k: x0[:, 0] * k for k in (1.0, 2.0, 4.0)]
    x0 = f32([[1.0], [-2.0], [0.0]])
    values = np.stack([np.asarray(p(x0)) for p in parts])
    for reduce, expected in (
        ("mean", values.mean(0)), ("min", values.min(0)), ("lower", values.mean(0) - 0.5 * values.std(0)),
    ):  # fmt: skip
        np.testing.assert_allclose(ensemble(parts, reduce, caution=0.5)(x0), expected, rtol=1e-6)
    slope = jax.grad(lambda x: ensemble(parts, "lower")(x).sum())(jnp.zeros((1, 1)))
    assert np.isfinite(slope).all()  # all agree there: the spread has no derivative


def test_annealed_guidance_goes_from_the_prior_to_the_tuned():
    tuned, prior = (lambda x, t, c=None: 2 * x), (lambda x, t, c=None: -x)
    x = f32([[1.0], [3.0]])
    both = denoisers.annealed(tuned, prior, 2.0)
    np.testing.assert_allclose(both(x, jnp.float32(1.0)), -x)
    np.testing.assert_allclose(both(x, jnp.float32(0.0)), 2 * x)
    np.testing.assert_allclose(both(x, f32([0.5, 1.0])), [[2 - 0.25 * 3], [-3.0]])


def test_gradients_pass_both_branches_of_classifier_free_guidance():
    """Per-example conditions, scale 3: against finite differences of the same chain."""
    process = processes.gaussian(schedules.linear_vp(), (2,), eta=0.0)
    times, cond = process.times(4), jnp.arange(6) % 2

    def network(params, x, t, cond):  # 2 classes and the null one, params [3, 2]
        return 0.5 * jnp.tanh(x) + params[cond]

    model = lambda params: denoisers.classifier_free(denoisers.from_function(network, params), 3.0, 2)  # noqa: E731
    reward = lambda x0, cond: jnp.where(cond == 0, x0[:, 0], -(x0[:, 1] ** 2))  # noqa: E731
    params = f32(np.random.default_rng(0).normal(size=(3, 2)) * 0.3)
    tuner = tuners.draft(model, process, reward, times, SGD, batch=6)
    loss = jax.jit(lambda p: tuner.loss(p, jax.random.key(0), cond)[0])
    got = np.asarray(jax.grad(loss)(params))
    step = 1e-2
    for index in np.ndindex(3, 2):
        unit = np.zeros((3, 2), np.float32)
        unit[index] = step
        numeric = (loss(params + unit) - loss(params - unit)) / (2 * step)
        np.testing.assert_allclose(got[index], numeric, rtol=2e-2, atol=2e-3)
    assert np.abs(got[2]).min() > 1e-3  # the unconditional branch


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_budget": 1.0}, "kl_budget needs a KL term"),
        (
            {"kl_budget": 1.0, "penalty": "eps_mse", "reference": lambda x, t, c=None: x, "temperature": 1.0},
            "is of a KL",
        ),
        ({"micro_batches": 3}, "must divide the batch of 8"),
        ({"gradient": "score_function", "truncation": 2}, "takes the whole chain"),
        ({"gradient": "score_function", "micro_batches": 8}, "at least 2 samples"),
        ({"reference": [lambda x, t, c=None: x] * 2, "temperature": [1.0]}, "got 2 and 1"),
        ({"truncation": 9}, "at most the chain's 5 network calls"),
        ({"remat": "all"}, "remat must be one of"),
    ],
)
def test_settings_that_exclude_each_other(options, message):
    w = world(eta=1.0)
    with pytest.raises(ValueError, match=message):
        tuners.reward_backprop(w.model, w.process, w.reward, w.times, SGD, batch=8, **options)
