"""Wrong input ends in one clear line before any compile; wrong numbers inside a run are contained and counted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rgdiff import checks, denoisers, guides, policies, processes, rewards, samplers, schedules, tuners, values
from rgdiff.typing import pytree
from tests.contract import test_contract as contract
from tests.worlds.worlds import GaussianWorld, factorised

W = GaussianWorld([0.0], [[1.0]])
POINTS = GaussianWorld([0.0], [[1.0]], eta=0.0)
M = factorised()
KEY = jax.random.key(0)
ANCESTRAL = samplers.ancestral(W.process, W.denoiser)
SGD = optax.sgd(0.1)
BLACK_BOX = rewards.from_host(lambda x0, cond: x0[:, 0])
SEEN = guides.linear(jnp.eye(1), jnp.ones(1), 0.1)
EVENTS = processes.first_hitting(processes.masked(schedules.log_linear_mask(), 4, 3))


def draft(**options):
    return tuners.reward_backprop(
        **(
            {"model": W.model, "process": W.process, "reward": W.reward, "times": W.times, "optimizer": SGD, "batch": 4}
            | options
        )
    )


def sample(**options):
    return samplers.sample(**({"sampler": ANCESTRAL, "key": KEY, "batch": 4, "times": W.times} | options))


def svdd(**options):
    return samplers.svdd(**({"process": W.process, "denoiser": W.denoiser, "value": W.value} | options))


REFUSED = {
    "legacy key": (lambda: sample(key=jax.random.PRNGKey(0)), "wrap_key_data"),
    "seed as a key": (lambda: sample(key=0), "jax.random.key"),
    "many keys": (lambda: sample(key=jax.random.split(KEY, 2)), "vmap"),
    "legacy key in fit": (lambda: tuners.fit(draft(), jax.random.PRNGKey(0), None, 1), "wrap_key_data"),
    "no batch": (lambda: sample(batch=0), "batch must be an integer of at least 1"),
    "cond of another batch": (lambda: sample(cond=jnp.zeros(3)), "leading axis of 4"),
    "scalar cond": (lambda: sample(cond=jnp.float32(1)), "leading axis of 4"),
    "cond inside a pytree": (lambda: sample(cond={"a": jnp.zeros(4), "b": jnp.zeros((2, 4))}), "leading axis of 4"),
    "increasing times": (lambda: sample(times=W.times[::-1]), "decrease strictly"),
    "repeated times": (lambda: sample(times=jnp.array([0.9, 0.5, 0.5])), "decrease strictly"),
    "times above 1": (lambda: sample(times=jnp.array([2.0, 0.5])), "within"),
    "NaN times": (lambda: sample(times=jnp.array([1.0, jnp.nan, 0.1])), "decrease strictly"),
    "a number of steps as times": (lambda: sample(times=10), "vector"),
    "masked times not ending at 0": (
        lambda: sample(sampler=samplers.ancestral(M.process, M.denoiser), times=jnp.array([1.0, 0.1])),
        "must end at 0",
    ),
    "sampling chunk 0": (lambda: sample(chunk=0), "chunk"),
    "a denoiser that is no function": (lambda: samplers.ancestral(W.process, jnp.zeros(3)), "must be callable"),
    "svdd at eta 0": (lambda: svdd(process=POINTS.process), "eta > 0"),
    "KL at eta 0": (lambda: samplers.ancestral(POINTS.process, W.denoiser, reference=W.denoiser), "eta > 0"),
    "KL tuning at eta 0": (
        lambda: tuners.draft(
            W.model, POINTS.process, W.reward, W.times, SGD, batch=4, reference=W.denoiser, temperature=1.0
        ),
        "eta > 0",
    ),
    "no candidates": (lambda: svdd(candidates=0), "candidates"),
    "chunk not dividing M": (lambda: svdd(candidates=16, chunk=5), "divide the 16"),
    "temperature 0": (lambda: svdd(temperature=0.0), "temperature must be a finite number > 0"),
    "NaN temperature": (lambda: svdd(temperature=float("nan")), "temperature"),
    "unknown selection": (lambda: svdd(selection="sotf"), "did you mean 'soft'"),
    "negative eta": (lambda: processes.gaussian(schedules.flow(), (1,), eta=-0.1), "eta must be"),
    "unknown relaxation": (
        lambda: processes.masked(schedules.log_linear_mask(), 3, 3, relaxation="gumbell"),
        "did you mean 'gumbel'",
    ),
    "one class": (lambda: processes.masked(schedules.log_linear_mask(), 3, 1), "classes"),
    "empty product": (lambda: processes.product(), "at least one"),
    "sigma_min above sigma_max": (lambda: schedules.karras_ve(2.0, 1.0), "below sigma_max"),
    "no steps": (lambda: W.process.times(0), "steps"),
    "unknown prediction": (lambda: denoisers.predicts("epsilon", W.denoiser), "must be one of"),
    "prediction without schedule": (lambda: denoisers.predicts("eps", W.denoiser), "process.schedule"),
    "velocity of VP": (lambda: denoisers.predicts("velocity", W.denoiser, W.schedule), "belongs to the flow"),
    "a process for a schedule": (lambda: denoisers.predicts("v", W.denoiser, W.process), "pass process.schedule"),
    "a process for EDM's schedule": (
        lambda: denoisers.edm_preconditioned(W.denoiser, W.process),
        "edm_preconditioned needs a Gaussian noise schedule, got GaussianProcess; pass process.schedule",
    ),
    "a process in a process": (lambda: processes.gaussian(W.process, (1,)), "pass process.schedule"),
    "a mask schedule for a Gaussian one": (
        lambda: processes.gaussian(schedules.cosine_mask(), (1,)),
        "a Gaussian process needs a Gaussian noise schedule, got CosineMask",
    ),
    "a Gaussian schedule for a mask one": (lambda: processes.masked(W.schedule, 3, 3), "schedules.log_linear_mask()"),
    "a process for a few-step policy's schedule": (lambda: policies.levels(W.process, 3), "pass process.schedule"),
    "a schedule for a process": (
        lambda: samplers.ancestral(W.schedule, W.denoiser),
        "ancestral sampling needs a process, got LinearVP; processes.gaussian(schedule, shape, ...) makes one of it",
    ),
    "a mask schedule for a process": (
        lambda: samplers.ancestral(schedules.cosine_mask(), W.denoiser),
        "got CosineMask; processes.masked(schedule, shape, ...)",
    ),
    "swapped process and denoiser": (lambda: samplers.ancestral(W.denoiser, W.process), "got AffineDenoiser"),
    "svdd of a schedule": (lambda: svdd(process=W.schedule), "svdd needs a process, got LinearVP"),
    "a guide of a schedule": (lambda: guides.dps(W.denoiser, W.schedule, SEEN), "dps needs a process, got LinearVP"),
    "a tuner of a schedule": (lambda: draft(process=W.schedule), "needs a process, got LinearVP"),
    "a value of a schedule": (
        lambda: values.posterior_mean(W.reward, W.schedule, W.denoiser),
        "posterior_mean needs a process, got LinearVP",
    ),
    "a value's regression of a schedule": (
        lambda: tuners.value_regression(W.model, W.schedule, SGD),
        "value_regression needs a process, got LinearVP",
    ),
    "a product of schedules": (lambda: processes.product(x=W.schedule), "product(x=...) needs a process, got LinearVP"),
    "a number as a network": (lambda: denoisers.predicts("x0", 3), "a network must be callable"),
    "a string as a denoiser": (lambda: denoisers.clip_x0("net"), "a denoiser must be callable"),
    "from_linen of a function": (lambda: denoisers.from_linen(lambda x: x, {}), "flax.linen.Module"),
    "from_nnx of a function": (lambda: denoisers.from_nnx(lambda x: x), "flax.nnx.Module"),
    "clip upside down": (lambda: denoisers.clip_x0(W.denoiser, 1.0, -1.0), "low < high"),
    "percentile 0": (lambda: denoisers.dynamic_threshold(W.denoiser, 0.0), "percentile"),
    "mode of a Gaussian": (lambda: values.posterior_mean(W.reward, W.process, W.denoiser, plug_in="mode"), "masked"),
    "learned reward without process": (lambda: values.learned(W.denoiser, W.reward), "process="),
    "sum of nothing": (lambda: rewards.weighted_sum([], []), "as many weights"),
    "product of nothing": (lambda: rewards.product([]), "at least one reward"),
    "threshold without a limit": (lambda: rewards.threshold(W.reward), "needs low, high, or both"),
    "threshold upside down": (lambda: rewards.threshold(W.reward, 2.0, 1.0), "low=2.0 is above high=1.0"),
    "from_host of a number": (lambda: rewards.from_host(3), "from_host expects"),
    "black box by gradient": (lambda: draft(reward=BLACK_BOX), "needs the reward's gradient, which a black box"),
    "black box in a sum": (lambda: draft(reward=rewards.weighted_sum([W.reward, BLACK_BOX], [1, 1])), "black box"),
    "black box in a value": (
        lambda: guides.gradient_guide(values.posterior_mean(BLACK_BOX, W.process, W.denoiser), 1.0),
        "black box",
    ),
    "black box and DPS": (
        lambda: guides.classifier_guidance(
            W.denoiser, W.process, values.posterior_mean(BLACK_BOX, W.process, W.denoiser), 1.0
        ),
        "black box",
    ),
    "black box and the gradient of a reward": (
        lambda: guides.reward_guidance(W.denoiser, W.process, BLACK_BOX),
        "reward_guidance needs the reward's gradient, which a black box",
    ),
    "black box and DPS of a likelihood": (
        lambda: guides.dps(W.denoiser, W.process, rewards.ensemble([W.reward, BLACK_BOX])),
        "dps needs the reward's gradient, which a black box",
    ),
    "black box as a guide's term": (
        lambda: guides.guided(W.denoiser, W.process, BLACK_BOX),
        "a guide on the prediction needs the reward's gradient",
    ),
    "black box as a policy's cost": (
        lambda: policies.value_guidance(values.posterior_mean(BLACK_BOX, W.process, W.denoiser)),
        "value_guidance needs the reward's gradient",
    ),
    "black box as a measurement": (
        lambda: guides.pigdm(W.denoiser, W.process, BLACK_BOX),
        "pigdm needs a measurement, guides.linear(...) or guides.inpainting(...), got HostReward",
    ),
    "a reward as a measurement": (lambda: guides.tmpd(W.denoiser, W.process, W.reward), "tmpd needs a measurement"),
    "black box and LGD": (lambda: guides.lgd_mc(W.denoiser, W.process, BLACK_BOX, KEY, draws=2), "black box"),
    "black box and TDS": (
        lambda: samplers.tds(W.process, W.denoiser, values.posterior_mean(BLACK_BOX, W.process, W.denoiser)),
        "black box",
    ),
    "a budget of nothing": (lambda: draft(reference=W.denoiser, temperature=0.0, kl_budget=1.0), "above 0"),
    "too few events": (lambda: checks.times(jnp.float32([1, 0.5, 0]), EVENTS), "takes 4 moves (positions), got 2"),
    "repeated events": (
        lambda: samplers.ancestral(EVENTS, W.denoiser, time_travel=2),
        "one event at a time ends when its moves are used up",
    ),
    "SVDD-R of conditions": (
        lambda: sample(sampler=svdd(replace=0.1), cond=jnp.zeros(4, jnp.int32)),
        "away from their conditions",
    ),
    "a measurement of other rows": (
        lambda: guides.linear(jnp.eye(1), jnp.zeros((8, 1)), 0.1)(jnp.zeros((32, 1))),
        "y has a row for each of 8 examples, got 32",
    ),
    "truncation too large": (lambda: draft(truncation=7), "at most the chain's 6"),
    "truncation 0": (lambda: draft(truncation=0), "truncation"),
    "no terms": (lambda: draft(on_trajectory=False), "renoised >= 1"),
    "KL without reference": (lambda: draft(temperature=1.0), "reference="),
    "reference without weight": (lambda: draft(reference=W.denoiser), "temperature="),
    "negative KL weight": (lambda: draft(temperature=-1.0, reference=W.denoiser), "temperature"),
    "unknown reduce": (lambda: draft(reduce="man"), "did you mean 'mean'"),
    "unknown remat": (lambda: draft(remat="evrything"), "did you mean 'everything'"),
    "unknown target": (lambda: tuners.pretraining(W.model, W.process, SGD, target="epss"), "did you mean 'eps'"),
    "unknown weighting": (
        lambda: tuners.pretraining(W.model, W.process, SGD, weighting="minsnr"),
        "did you mean 'min_snr'",
    ),
    "pretraining of a product": (
        lambda: tuners.pretraining(W.model, processes.product(x=W.process), SGD),
        "ProductProcess",
    ),
    "data without batch": (lambda: fit_pretraining(data={"x0": jnp.zeros((5, 1))}), "needs batch="),
    "ragged data": (
        lambda: fit_pretraining(data={"x0": jnp.zeros((5, 1)), "cond": jnp.zeros(4)}, batch=2),
        "leading axis",
    ),
}


def fit_pretraining(**options):
    tuner = tuners.pretraining(W.model, W.process, SGD)
    return tuners.fit(tuner, KEY, tuner.init(jnp.zeros(2)), 1, **options)


@pytest.mark.parametrize("case", REFUSED.values(), ids=list(REFUSED))
def test_wrong_input_is_refused_in_one_line(case):
    call, words = case
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)


def test_nothing_is_traced_before_a_refusal():
    def denoiser(x, t, cond=None):
        raise AssertionError("the denoiser was traced")

    with pytest.raises(ValueError, match="decrease"):
        samplers.sample(samplers.ancestral(W.process, denoiser), KEY, 4, W.times[::-1])


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (lambda x0, cond: x0, r"\[4, 1\]"),
        (lambda x0, cond: x0.sum(), r"float32\[\]"),
        (lambda x0, cond: x0[:, 0] > 0, "bool"),
        (lambda x0, cond: {"a": x0[:, 0]}, "dict"),
    ],
)
def test_a_reward_of_the_wrong_shape_is_refused(reward, words):
    with pytest.raises(ValueError, match=words):
        rewards.check(reward, jnp.zeros((4, 1)))
    rewards.check(W.reward, jnp.zeros((4, 1)))


def test_checks_shape():
    checks.shape("x", jnp.zeros((2, 3)), (None, 3))
    with pytest.raises(ValueError, match=r"x must have shape \[any, 4\], got \[2, 3\]"):
        checks.shape("x", jnp.zeros((2, 3)), (None, 4))


# ---------------------------------------------------------------- rewards of the host


def test_host_rewards_work_compiled_and_failures_become_nan():
    def fails(x0, cond):
        raise RuntimeError("a molecule did not parse")

    good = rewards.from_host(lambda x0, cond: x0[:, 0] * 2 + (0 if cond is None else cond))
    x0 = jnp.arange(4.0)[:, None]
    np.testing.assert_array_equal(jax.jit(good)(x0), [0, 2, 4, 6])
    np.testing.assert_array_equal(jax.jit(good)(x0, jnp.ones(4)), [1, 3, 5, 7])
    np.testing.assert_array_equal(jax.vmap(good)(jnp.stack([x0, x0 + 1])), [[0, 2, 4, 6], [2, 4, 6, 8]])
    assert np.isnan(jax.jit(rewards.from_host(fails))(x0)).all()
    assert np.isnan(jax.jit(rewards.from_host(lambda x0, cond: x0))(x0)).all()  # the wrong shape
    np.testing.assert_array_equal(jax.grad(lambda x: good(x).sum())(x0), 0.0)
    both = rewards.weighted_sum([good, lambda x0, cond: jnp.where(x0[:, 0] > 2, jnp.nan, 1.0)], [1.0, 10.0])
    np.testing.assert_array_equal(jax.jit(both)(x0), [10, 12, 14, np.nan])


def test_a_reward_may_say_which_samples_are_valid():
    x0 = jnp.arange(4.0)[:, None]
    pair = lambda x0, cond=None: (2 * x0[:, 0], x0[:, 0] > 1)  # noqa: E731
    for reward in (rewards.where_valid(pair), rewards.from_host(pair)):
        np.testing.assert_array_equal(jax.jit(reward)(x0), [np.nan, np.nan, 4, 6])
    gradient = jax.grad(lambda x: jnp.nansum(rewards.where_valid(pair)(x)))(x0)
    np.testing.assert_array_equal(gradient[:, 0], [0, 0, 2, 2])


def test_svdd_with_a_host_reward_of_nan_batches_gives_finite_samples():
    calls = []

    def sometimes(x0, cond):
        calls.append(1)
        return np.full(len(x0), np.nan) if len(calls) % 2 else x0[:, 0]

    value = values.posterior_mean(rewards.from_host(sometimes), W.process, W.denoiser)
    run = sample(sampler=svdd(value=value, candidates=4), keep=lambda carry, info: info["infeasible"])
    assert np.all(np.isfinite(run.x0)) and set(np.unique(run.kept)) == {0, 4}


# ---------------------------------------------------------------- values that are not numbers, inside svdd


@pytree
class Split:
    """`right` for states right of 0 (for tokens: always), `left` else; both dynamic, so that all cases share a program."""

    right: jax.Array
    left: jax.Array

    def __call__(self, x, t, cond=None):
        return jnp.where(x[:, 0] > 0, self.right, self.left) if x.ndim == 2 else jnp.full(x.shape[0], self.right)


def split(right, left):
    return Split(jnp.float32(right), jnp.float32(left))


def keep_all(carry, info):
    return info["value"], info["values"], info["infeasible"], info["log_weights"], carry.x


def run_svdd(value, selection, world=W):
    sampler = samplers.svdd(world.process, world.denoiser, value, candidates=5, selection=selection, temperature=0.1)
    run = samplers.sample(sampler, KEY, 200, world.times, keep=keep_all)
    assert np.all(np.isfinite(run.x0))
    return [np.asarray(part) for part in run.kept]


@pytest.mark.parametrize("selection", ["soft", "argmax"])
def test_an_infeasible_candidate_is_never_kept_while_a_feasible_one_exists(selection):
    """Candidates right of 0 are NaN: the winner is left of 0 wherever any candidate is, whatever its value."""
    for low in (0.0, -np.inf, -1e30):
        chosen, every, infeasible, _, x = run_svdd(split(np.nan, low), selection)
        np.testing.assert_array_equal(infeasible, np.isnan(every).sum(1))
        some = infeasible < 5
        assert some.any() and (infeasible > 0).any()
        assert not np.isnan(chosen[some]).any() and np.all(x[..., 0][some] <= 0)


@pytest.mark.parametrize("selection", ["soft", "argmax"])
@pytest.mark.parametrize("world", [W, M], ids=["gaussian", "masked"])
def test_constant_values_give_finite_samples_of_the_prior(selection, world):
    for number in (np.nan, -np.inf, np.inf, 0.0, 1e30, -1e30, 3e38):
        np.testing.assert_array_equal(run_svdd(split(number, number), selection, world)[3], 0.0)


def test_huge_values_select_and_stay_finite():
    for high, low in ((1e30, -1e30), (3e38, -3e38), (np.inf, 0.0), (0.0, -np.inf)):
        chosen, every, *_ = run_svdd(split(high, low), "soft")
        np.testing.assert_array_equal(chosen, every.max(1))


@pytest.mark.parametrize("make", contract.PARTICLES, ids=lambda f: f.__name__)
def test_particles_have_no_conditions_of_their_own(make):
    """Resampling would leave a particle under the condition of another one: refused by all of them, with the way out."""
    sampler, batch = make(), 8
    with pytest.raises(ValueError, match=r"leave cond out.*denoisers\.conditioned"):
        samplers.sample(sampler, KEY, batch, sampler.process.times(contract.STEPS), jnp.arange(float(batch)))
