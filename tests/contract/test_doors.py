"""What a user's reward, value, denoiser or data gives is checked where it comes in, and what a black box raises reaches the user."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rgdiff import (
    denoisers,
    guides,
    policies,
    processes,
    rewards,
    samplers,
    schedules,
    seiko,
    surrogates,
    tuners,
    typing,
    values,
)
from rgdiff.samplers._loop import _whole
from rgdiff.typing import pytree
from tests.worlds.worlds import GaussianWorld, factorised

W = GaussianWorld([0.0], [[1.0]], steps=4)
PLANE = GaussianWorld([0.0, 0.0], np.eye(2), steps=4)
M = factorised()
KEY = jax.random.key(0)
SGD = optax.sgd(0.1)
ZERO = jnp.zeros(2)
FEW = policies.few_step(policies.variances(), (1,))
POLICY = policies.policy(FEW, lambda p: lambda x, t, cond=None: p * x)


def sample(sampler, batch=8, times=W.times, **options):
    return samplers.sample(sampler, KEY, batch, times, **options)


def ancestral(**options):
    return samplers.ancestral(W.process, W.denoiser, **options)


def posterior_mean(reward):
    return values.posterior_mean(reward, W.process, W.denoiser)


def fit(tuner, params=ZERO, **options):
    return tuners.fit(tuner, KEY, tuner.init(params), 1, **options)


def ddpo(**options):
    return tuners.ddpo(W.model, W.process, W.times, SGD, batch=8, **options)


def draft(reward=W.reward, **options):
    return tuners.draft(W.model, W.process, reward, W.times, SGD, batch=8, **options)


def gradient_guidance(reward):
    return tuners.gradient_guidance(W.model, W.process, reward, W.times, batch=8)


def dxdp(reward, value=lambda p: lambda x, t, cond=None: p * x[:, 0]):
    return fit(tuners.dxdp(POLICY, FEW, reward, value, batch=8), {"policy": POLICY.init(1.0), "value": jnp.float32(1)})


def rounds(**options):
    steer = lambda reward: samplers.svdd(W.process, W.denoiser, posterior_mean(reward), candidates=2)  # noqa: E731
    surrogate = surrogates.gaussian_process(surrogates.rbf(2.0), noise=0.1)
    return seiko.steered(W.process, W.times, surrogate, steer, prior=W.denoiser, batch=8, capacity=8, **options)


# ---------------------------------------------------------------- rewards


REWARDED = {
    "smc": lambda r: sample(samplers.smc(W.process, W.denoiser, posterior_mean(r))),
    "smc's target": lambda r: sample(samplers.smc(W.process, W.denoiser, posterior_mean(W.reward), reward=r)),
    "tds": lambda r: sample(samplers.tds(W.process, W.denoiser, posterior_mean(r))),
    "svdd": lambda r: sample(samplers.svdd(W.process, W.denoiser, posterior_mean(r), candidates=2)),
    "best of n": lambda r: sample(samplers.best_of_n(ancestral(), r, 2)),
    "the score": lambda r: sample(samplers.ancestral(W.process, guides.reward_guidance(W.denoiser, W.process, r))),
    "lgd": lambda r: sample(samplers.ancestral(W.process, guides.lgd_mc(W.denoiser, W.process, r, KEY, draws=2))),
    "the kernel": lambda r: sample(ancestral(guide=guides.gradient_guide(posterior_mean(r), 1.0))),
    "masked": lambda r: sample(
        samplers.svdd(M.process, M.denoiser, values.learned(lambda x, t, cond: x[:, 0, 0], r, M.process), candidates=2),
        times=M.times,
    ),
    "draft": lambda r: fit(draft(r)),
    "draft's held-out": lambda r: fit(draft(heldout=r)),
    "ddpo": lambda r: fit(tuners.as_tuner(ddpo(), r)),
    "ddpo's held-out": lambda r: fit(tuners.as_tuner(ddpo(), W.reward, heldout=r)),
    "gradient guidance": lambda r: fit(gradient_guidance(r)),
    "dxdp": dxdp,
    "seiko": lambda r: fit(tuners.as_tuner(rounds(), r), None),
    "rollouts": lambda r: tuners.rollouts(KEY, W.process, W.denoiser, W.times, r, 8),
    "a sum": lambda r: rewards.score(rewards.weighted_sum([r, W.reward], [1.0, 1.0]), jnp.zeros((8, 1))),
    "an ensemble": lambda r: rewards.score(rewards.ensemble([W.reward, r]), jnp.zeros((8, 1))),
}


@pytest.mark.first(4)
@pytest.mark.parametrize("method", REWARDED.values(), ids=list(REWARDED))
def test_a_reward_that_is_no_float_per_example_is_named(method):
    """[B, 1] would broadcast to [B, B] (log Z 45 for -1.7), a batch's mean divides every gradient by B."""

    def column(x0, cond=None):
        return x0.reshape(x0.shape[0], -1)[:, :1] * 1.0

    def mean(x0, cond=None):
        return jnp.mean(x0)

    for reward, got in ((column, r"float32\[\d+, 1\]; drop the last axis"), (mean, r"float32\[\]; do not sum")):
        with pytest.raises(
            ValueError, match=rf"the reward {reward.__name__} must return one float per.*got {got}"
        ) as error:
            method(reward)
        assert "\n" not in str(error.value)


def test_a_reward_of_the_right_shape_gives_the_right_number():
    """E exp(x) = sqrt(e) under N(0, 1), whose chain has mean 0 and the variance of `law`: with [:, 0] as the line says."""
    variance = W.law()[1][0, 0]
    out = sample(samplers.smc(W.process, W.denoiser, posterior_mean(lambda x0, cond=None: x0[:, 0])), 20_000)
    np.testing.assert_allclose(out.info["log_z"], variance / 2, atol=0.03)  # four standard errors


def _fails(x0, cond=None):
    raise KeyError("no such molecule")


def _numpy(x0, cond=None):
    return np.asarray(x0)[:, 0]


def _branches(x0, cond=None):
    return x0[:, 0] if x0.sum() > 0 else -x0[:, 0]


@pytest.mark.parametrize("method", [REWARDED[name] for name in ("svdd", "best of n", "draft", "ddpo", "rollouts")])
@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (_fails, "the reward _fails raised KeyError: 'no such molecule'"),
        (_numpy, "make it a black box with rewards.from_host"),
        (_branches, "make it a black box with rewards.from_host"),
        (lambda x0, cond=None: x0[:, 0] > 0, r"bool\[\d+\]; convert it with .astype"),
        (lambda x0, cond=None: (x0[:, 0], x0[:, 0] > 0), "goes through rewards.where_valid"),
    ],
)
def test_a_reward_that_cannot_be_compiled_says_so_in_one_line(method, reward, words):
    with pytest.raises(rewards.RewardFailure, match=words) as error:
        method(reward)
    assert isinstance(error.value, ValueError) and "\n" not in str(error.value)


def test_a_reward_or_a_denoiser_may_have_no_condition():
    """reward(x0) and denoiser(x, t) give the samples of (x0, cond) and (x, t, cond), share a prediction, and do not recompile."""
    short, long = lambda x0: x0[:, 0], lambda x0, cond=None: x0[:, 0]  # noqa: E731
    network = lambda x, t: W.denoiser(x, t)  # noqa: E731

    def steered(reward, denoiser):
        return samplers.svdd(
            W.process, denoiser, values.posterior_mean(reward, W.process, denoiser), candidates=2, temperature=0.5
        )

    once = sample(steered(short, network)).x0
    programs = _whole._cache_size()
    again = sample(steered(short, network)).x0
    assert _whole._cache_size() == programs and steered(short, network).shared
    np.testing.assert_array_equal(once, again)
    np.testing.assert_array_equal(once, sample(steered(long, lambda x, t, cond=None: W.denoiser(x, t))).x0)
    np.testing.assert_array_equal(
        sample(samplers.best_of_n(ancestral(), short, 2)).x0, sample(samplers.best_of_n(ancestral(), long, 2)).x0
    )
    labels = jnp.zeros(8, jnp.int32)
    np.testing.assert_array_equal(sample(samplers.best_of_n(ancestral(), short, 2), cond=labels).x0.shape, (8, 1))
    with pytest.raises(ValueError, match="takes no cond, and got one"):
        sample(samplers.ancestral(W.process, network), cond=labels)
    host = lambda x0: x0[:, 0]  # noqa: E731
    np.testing.assert_array_equal(rewards.score(rewards.from_host(host), jnp.arange(3.0)[:, None]), [0, 1, 2])


# ---------------------------------------------------------------- values, critics, energies


def _regression(reward, model=lambda p: lambda x, t, cond=None: p[0] * x[:, 0]):
    tuner = tuners.value_regression(model, W.process, SGD)
    return fit(tuner, data={"x0": jnp.zeros((16, 1)), "reward": reward}, batch=8)


def _dpok(value):
    options = {"reference": W.denoiser, "temperature": 1.0, "value_params": jnp.float32(1), "value_optimizer": SGD}
    return fit(
        tuners.as_tuner(tuners.dpok(W.model, W.process, W.times, SGD, batch=8, value=value, **options), W.reward)
    )


def _dxmi(value):
    tuner = tuners.dxmi(POLICY, FEW, value, decay_steps=10, batch=8)
    params = {"policy": POLICY.init(1.0), "value": jnp.float32(1)}
    return fit(tuner, params, data={"x0": jnp.zeros((16, 1))}, batch=8)


def _sft_pg(critic):
    tuner = tuners.sft_pg(
        W.model, W.process, W.times, SGD, batch=8, critic=critic, critic_params=jnp.float32(1), critic_optimizer=SGD
    )
    return fit(tuner, data={"x0": jnp.zeros((16, 1))}, batch=8)


def _langevin(energy):
    tuner = tuners.langevin_energy(energy, (1,), SGD, batch=8, moves=1, chains=8)
    return fit(tuner, jnp.float32(1), data={"x0": jnp.zeros((16, 1))}, batch=8)


def _error_over_time(value):
    data = {"path": jnp.zeros((8, len(W.times), 1)), "reward": jnp.zeros(8)}
    return values.error_over_time(value, W.times, data)


COLUMN = lambda x, t, cond=None: x[:, :1]  # noqa: E731
VALUED = {
    "data's reward": (lambda: _regression(jnp.zeros((16, 1))), r"data\['reward'\] must hold"),
    "a value learnt": (lambda: _regression(jnp.zeros(16), lambda p: lambda x, t, cond=None: p[0] * x), "the value"),
    "svdd": (lambda: sample(samplers.svdd(W.process, W.denoiser, COLUMN, candidates=2)), "the value"),
    "smc": (lambda: sample(samplers.smc(W.process, W.denoiser, COLUMN)), "the value"),
    "a guide": (lambda: sample(ancestral(guide=guides.gradient_guide(COLUMN, 1.0))), "the value"),
    "classifier guidance": (
        lambda: sample(samplers.ancestral(W.process, guides.classifier_guidance(W.denoiser, W.process, COLUMN))),
        "the value",
    ),
    "dpok": (lambda: _dpok(lambda p: lambda x, t, cond=None: p * x), "the value"),
    "dxdp": (lambda: dxdp(W.reward, lambda p: lambda x, t, cond=None: p * x), "the value"),
    "dxmi": (lambda: _dxmi(lambda p: lambda x, t, cond=None: p * x), "the value"),
    "sft_pg": (lambda: _sft_pg(lambda p: lambda x0, cond=None: p * x0), "the critic"),
    "langevin": (lambda: _langevin(lambda p: lambda x, cond=None: p * x), "the energy"),
    "measured": (lambda: _error_over_time(COLUMN), "the value"),
    "rollouts": (
        lambda: values.error_over_time(
            lambda x, t, cond=None: x[:, 0],
            W.times,
            {"path": jnp.zeros((8, len(W.times), 1)), "reward": jnp.zeros((8, 1))},
        ),
        r"rollouts\['reward'\] must hold",
    ),
}


@pytest.mark.parametrize("case", VALUED.values(), ids=list(VALUED))
def test_a_value_that_is_no_float_per_example_is_named(case):
    call, words = case
    with pytest.raises(ValueError, match=words + r".*one float per example, \[\d+\], got float32\[\d+, 1\]"):
        call()


# ---------------------------------------------------------------- denoisers


SHAPES = {
    "column": lambda x, t, cond=None: x[:, :1],
    "row": lambda x, t, cond=None: jnp.zeros(2),
    "number": lambda x, t, cond=None: jnp.float32(0),
    "flat": lambda x, t, cond=None: x.reshape(-1),
}


@pytest.mark.parametrize("out", SHAPES.values(), ids=list(SHAPES))
def test_a_prediction_of_another_shape_is_named(out):
    """Each of them broadcasts, and gave samples, losses and gradients without a word."""
    process, times = PLANE.process, PLANE.times
    draw = lambda denoiser: sample(samplers.ancestral(process, denoiser), times=times)  # noqa: E731
    network = denoisers.from_function(lambda p, x, t, cond: out(x, t), {})
    model = lambda params: out  # noqa: E731
    guided = guides.guided(out, process, lambda at: jnp.zeros_like(at.x))
    pulled = guides.g_loss(out, process, jnp.ones((8, 2)), jnp.zeros(8))
    mixed = processes.product(x=process)
    for call in (
        lambda: draw(out),
        lambda: draw(network),
        lambda: draw(denoisers.predicts("eps", network, process.schedule)),
        lambda: draw(denoisers.edm_preconditioned(network, process.schedule)),
        lambda: draw(guided),
        lambda: draw(pulled),
        lambda: draw(samplers.drawing(samplers.ancestral(process, out), times).sampler.denoiser),
        lambda: sample(samplers.ancestral(mixed, lambda x, t, cond=None: {"x": out(x["x"], t)}), times=times),
        lambda: fit(tuners.draft(model, process, PLANE.reward, times, SGD, batch=8)),
        lambda: fit(tuners.as_tuner(tuners.ddpo(model, process, times, SGD, batch=8), PLANE.reward)),
        lambda: fit(tuners.pretraining(model, process, SGD), data={"x0": jnp.zeros((16, 2))}, batch=8),
    ):
        with pytest.raises(ValueError, match=r"must return a prediction of the state's shape \[8, 2\], got \["):
            call()


def test_a_few_step_chain_wants_a_law():
    with pytest.raises(ValueError, match="takes the law of the next state .*policies.policy"):
        sample(samplers.ancestral(FEW, lambda x, t, cond=None: x), times=FEW.times())


# ---------------------------------------------------------------- data


def pretrained(x0, process=PLANE.process, **more):
    model = lambda params: lambda x, t, cond=None: jnp.zeros((*x.shape[:-1], 3) if process is M.process else x.shape)  # noqa: E731
    return fit(tuners.pretraining(model, process, SGD), data={"x0": x0} | more, batch=8)


TOKENS = jax.nn.one_hot(jnp.zeros((16, M.length), jnp.int32), M.classes)
DATA = {
    "a column": (
        lambda: pretrained(jnp.zeros((16, 1))),
        r"must have the process' shape \[N, 2\], got float32\[16, 1\]",
    ),
    "a vector": (lambda: pretrained(jnp.zeros(16)), r"got float32\[16\]"),
    "an axis more": (lambda: pretrained(jnp.zeros((16, 2, 2))), r"got float32\[16, 2, 2\]"),
    "0 to 255": (lambda: pretrained(np.full((16, 2), 200, np.uint8)), "got uint8 with a root mean square of 200"),
    "0 to 255 in floats": (lambda: pretrained(np.full((16, 2), 200.0)), "by x / 127.5 - 1"),
    "none": (lambda: pretrained(jnp.zeros((0, 2))), "at least one"),
    "no array": (lambda: fit(tuners.pretraining(W.model, W.process, SGD)), "this tuner learns from data"),
    "another name": (
        lambda: fit(tuners.pretraining(W.model, W.process, SGD), data={"x": jnp.zeros((16, 1))}, batch=8),
        "no 'x0' among",
    ),
    "no dict": (
        lambda: fit(tuners.pretraining(W.model, W.process, SGD), data=jnp.zeros((16, 1)), batch=8),
        "must be a dict",
    ),
    "integer tokens": (lambda: pretrained(jnp.zeros((16, M.length), jnp.int32), M.process), r"jax.nn.one_hot\(tokens"),
    "the mask": (lambda: pretrained(jnp.zeros((16, M.length, M.classes + 1)), M.process), "leave the mask out"),
    "no single one": (lambda: pretrained(0.5 * TOKENS, M.process), "a single 1 among"),
    "the bound of integers": (
        lambda: tuners.masked_bound(KEY, M.process, M.denoiser, jnp.zeros((4, M.length), jnp.int32)),
        "one-hot tokens belong there",
    ),
    "a value's": (
        lambda: fit(
            tuners.value_regression(W.model, W.process, SGD),
            data={"x0": jnp.zeros((16, 2)), "reward": jnp.zeros(16)},
            batch=8,
        ),
        r"\[N, 1\], got float32\[16, 2\]",
    ),
    "a value's without rewards": (
        lambda: fit(tuners.value_regression(W.model, W.process, SGD), data={"x0": jnp.zeros((16, 1))}, batch=8),
        "no 'reward' among",
    ),
    "of an energy": (
        lambda: fit(
            tuners.langevin_energy(W.model, (1,), SGD, batch=8, chains=8), data={"x0": jnp.zeros((16, 2))}, batch=8
        ),
        r"\[any, 1\], got \[16, 2\]",
    ),
    "stopped early": (
        lambda: fit(
            tuners.early_stopping(tuners.pretraining(W.model, W.process, SGD), "loss"),
            data={"x0": jnp.zeros((16, 2))},
            batch=8,
        ),
        r"\[N, 1\], got float32\[16, 2\]",
    ),
    "conditions of another batch": (
        lambda: fit(draft(), data=jnp.zeros(16), batch=1),
        r"leading axis of 8 examples, got shape \[1\]",
    ),
}


@pytest.mark.parametrize("case", DATA.values(), ids=list(DATA))
def test_data_that_do_not_fit_are_refused(case):
    call, words = case
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


def test_data_that_fit_are_taken():
    """Noise of any scale that the schedule knows, and mixed states."""
    wide = processes.gaussian(schedules.karras_ve(0.01, 80.0), (2,))
    pretrained(np.full((16, 2), 60.0, np.float32), wide)
    pretrained(TOKENS, M.process)
    mixed = processes.product(x=W.process, c=M.process)
    tuner = tuners.value_regression(lambda p: lambda x, t, cond=None: p[0] * x["x"][:, 0], mixed, SGD)
    data = {"x0": {"x": jnp.zeros((16, 1)), "c": TOKENS}, "reward": jnp.zeros(16)}
    tuner.suits(data)
    with pytest.raises(ValueError, match=r"data\['x0'\]\['c'\] must have the process' shape"):
        tuner.suits(data | {"x0": {"x": jnp.zeros((16, 1)), "c": jnp.zeros((16, 2))}})
    with pytest.raises(ValueError, match="dict of"):
        tuner.suits(data | {"x0": jnp.zeros((16, 1))})


# ---------------------------------------------------------------- rewards of the host


def fails(x0, cond=None):
    raise RuntimeError("a molecule did not parse")


def column(x0, cond=None):
    return x0[:, :1]


HOSTED = {
    name: REWARDED[name] for name in ("smc", "smc's target", "svdd", "best of n", "ddpo", "rollouts", "a sum", "seiko")
}
HOSTED |= {
    "in chunks": lambda r: sample(samplers.best_of_n(ancestral(), r, 2), chunk=1),
    "a value": lambda r: sample(samplers.svdd(W.process, W.denoiser, posterior_mean(r), candidates=2), chunk=1),
    "held out": lambda r: fit(draft(heldout=r)),
    "scored": lambda r: rewards.score(r, jnp.zeros((8, 1))),
    "statistics": lambda r: tuners.gradient_statistics(tuners.as_tuner(ddpo(), r), KEY, ZERO, 2),
    "fit_online": lambda r: tuners.fit_online(ddpo(), KEY, ddpo().init(ZERO), 1, r.function),
    "fit_online of itself": lambda r: tuners.fit_online(ddpo(), KEY, ddpo().init(ZERO), 1, r),
}


@pytest.mark.parametrize("method", HOSTED.values(), ids=list(HOSTED))
@pytest.mark.first(1)
def test_what_a_host_reward_raises_reaches_the_user(method):
    """Not a table of NaN, nor samples of the prior."""
    with pytest.raises(
        rewards.RewardFailure, match="RuntimeError.*: a molecule did not parse; mark infeasible"
    ) as error:
        method(rewards.from_host(fails))
    assert isinstance(error.value.__cause__, RuntimeError) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"one number per sample, \[\d+\], got \[\d+, 1\]"):
        method(rewards.from_host(column))


def test_a_host_reward_that_failed_is_not_asked_again():
    asked = []

    def reward(x0, cond=None):
        asked.append(len(x0))
        raise OSError("the oracle is down")

    with pytest.raises(rewards.RewardFailure, match="the oracle is down"):
        sample(samplers.svdd(W.process, W.denoiser, posterior_mean(rewards.from_host(reward)), candidates=2))
    assert len(asked) == 1
    sample(ancestral())  # nobody's failure is anybody else's


def test_single_infeasible_samples_of_a_host_reward_are_no_failure():
    half = rewards.from_host(lambda x0, cond: np.where(x0[:, 0] > 0, np.nan, x0[:, 0]))
    out = sample(samplers.svdd(W.process, W.denoiser, posterior_mean(half), candidates=8), 64)
    assert np.isfinite(out.x0).all() and (np.asarray(out.x0) < 0.3).all()
    state = fit(tuners.as_tuner(ddpo(), half))
    assert int(state.step) == 1 and int(state.skipped) == 0


def test_training_goes_on_from_before_a_host_reward_failed():
    """The state of the failure continues to the very run that never failed."""
    broken = []

    def reward(x0, cond=None):
        if broken:
            raise OSError("the laboratory is closed")
        return x0[:, 0]

    tuner = tuners.as_tuner(ddpo(), rewards.from_host(reward))
    whole = tuners.fit(tuner, KEY, tuner.init(ZERO), 4, chunk=2)
    after_two = lambda state, infos: broken.append(1)  # noqa: E731
    with pytest.raises(rewards.RewardFailure, match="OSError at step 2: the laboratory is closed") as error:
        tuners.fit(tuner, KEY, tuner.init(ZERO), 4, chunk=2, on_chunk=after_two)
    assert error.value.step == 2 and int(error.value.state.step) == 2
    broken.clear()
    continued = tuners.fit(tuner, KEY, error.value.state, 4, chunk=2)
    jax.tree.map(np.testing.assert_array_equal, continued, whole)


@pytest.mark.first(1)
@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("raise OSError('the laboratory is closed')", "svdd: the reward raised OSError: the laboratory is closed"),
        ("return x0[:, :1]", "one number per sample, [16], got [16, 1]"),
    ],
)
def test_a_black_box_that_fails_ends_a_run_in_one_line(function, words, tmp_path, monkeypatch, capsys):
    """Exit code 2 and the text, not a table of NaN."""
    from rgdiff.cli import main

    monkeypatch.chdir(tmp_path)
    source = tmp_path / f"oracle_{len(words)}.py"
    source.write_text(f"def score(x0, cond=None):\n    {function}\n")
    argv = [
        "run",
        "steer",
        "domain=mixture",
        "prior=exact",
        "prior.steps=3",
        "samples=8",
        "method=svdd",
        "method.options.candidates=2",
    ]
    argv += [
        "reward=custom",
        f"reward.fn={source.stem}.score",
        "reward.host=true",
        "out=run",
        f"cache_dir={tmp_path / 'cache'}",
    ]
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("rgdiff: ") and words in line and "resume=true goes on" in line


# ---------------------------------------------------------------- gradients of samples


@pytest.mark.first(2)
@pytest.mark.parametrize("eta", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("chunk", [None, 2])
def test_the_gradient_of_gaussian_samples_is_that_of_the_chain(eta, chunk):
    """Shifts of an affine denoiser move all samples alike, by the difference of two chains' means: exact in float64."""
    world = GaussianWorld([0.5, -1.0], [[1.0, 0.3], [0.3, 0.6]], steps=5, eta=eta)

    def mean(shift):
        sampler = samplers.ancestral(world.process, world.model((shift, 1.0)))
        return samplers.sample(sampler, KEY, 3, world.times, chunk=chunk).x0.mean(0)

    right = world.law((1.0, 1.0))[0] - world.law((0.0, 1.0))[0]
    np.testing.assert_allclose(jax.jacobian(mean)(jnp.float32(0)), right, rtol=1e-5)
    np.testing.assert_allclose(jax.jvp(mean, (jnp.float32(0),), (jnp.float32(1),))[1], right, rtol=1e-5)


def _closed(shift):
    return lambda x, t, cond=None: W.denoiser(x, t) + shift


UNDIFFERENTIATED = {
    "svdd": lambda s: samplers.svdd(W.process, _closed(s), posterior_mean(W.reward), candidates=2),
    "svdd's temperature": lambda s: samplers.svdd(W.process, W.denoiser, posterior_mean(W.reward), temperature=1 + s),
    "smc": lambda s: samplers.smc(W.process, _closed(s), posterior_mean(W.reward)),
    "smc's parameters": lambda s: samplers.smc(W.process, W.model((s, 1.0)), posterior_mean(W.reward)),
    "best of n": lambda s: samplers.best_of_n(samplers.ancestral(W.process, _closed(s)), W.reward, 2),
    "time travel": lambda s: samplers.ancestral(W.process, _closed(s), time_travel=2),
    "told not to": lambda s: samplers.ancestral(W.process, _closed(s), differentiable=False),
    "tokens": lambda s: samplers.ancestral(
        M.process, lambda x, t, cond=None: M.denoiser(x, t) + s * jnp.arange(M.classes)
    ),
}


@pytest.mark.first(4)
@pytest.mark.parametrize("make", UNDIFFERENTIATED.values(), ids=list(UNDIFFERENTIATED))
@pytest.mark.parametrize("chunk", [None, 2])
def test_a_gradient_that_would_be_cut_raises(make, chunk):
    times = M.times if make is UNDIFFERENTIATED["tokens"] else W.times
    total = lambda shift: samplers.sample(make(shift), KEY, 4, times, chunk=chunk).x0[:, 0].sum()  # noqa: E731
    with pytest.raises(ValueError, match="these samples have no gradient"):
        jax.grad(total)(0.0)


def test_samples_without_a_gradient_may_stand_in_a_loss():
    """Where the parameters come as constants nothing is differentiated, and nothing is refused."""
    draw = lambda shift: sample(UNDIFFERENTIATED["svdd"](jax.lax.stop_gradient(shift)), 4).x0.mean()  # noqa: E731
    np.testing.assert_allclose(jax.grad(lambda shift: shift * draw(shift))(2.0), draw(2.0), rtol=1e-6)


# ---------------------------------------------------------------- arguments in wrong places


def _donated(driver):
    state = driver(None)
    driver(state)
    return driver(state)


def _fit_again(state):
    return draft().init(ZERO) if state is None else tuners.fit(draft(), KEY, state, 1)


def _fit_online_again(state):
    return ddpo().init(ZERO) if state is None else tuners.fit_online(ddpo(), KEY, state, 1, lambda x0, cond: x0[:, 0])


def _module():
    from flax import nnx

    return nnx.Linear(1, 1, rngs=nnx.Rngs(0))


@pytree
class OneArgument:
    """A callable pytree of (x0) alone."""

    def __call__(self, x0):
        return x0[:, 0]


MISPLACED = {
    "an online method in fit": (lambda: fit(ddpo()), "as_tuner"),
    "a tuner in fit_online": (
        lambda: tuners.fit_online(draft(), KEY, draft().init(ZERO), 1, W.reward),
        "a tuner with a step goes to fit as it is",
    ),
    "a tuner in as_tuner": (lambda: tuners.as_tuner(draft(), W.reward), "an online method has no rollout"),
    "parameters as a state": (lambda: tuners.fit(draft(), KEY, ZERO, 1), "tuner.init"),
    "parameters as an online state": (lambda: tuners.fit_online(ddpo(), KEY, ZERO, 1, W.reward), "tuner.init"),
    "a state given away": (lambda: _donated(_fit_again), "took its buffers"),
    "an online state given away": (lambda: _donated(_fit_online_again), "took its buffers"),
    "a key first": (lambda: samplers.sample(KEY, ancestral(), 4, W.times), "sample(sampler, key, batch, times)"),
    "a key before the tuner": (lambda: tuners.fit(KEY, draft(), ZERO, 1), "a tuner has no init"),
    "a module as parameters": (lambda: draft().init(_module()), "got the module Linear"),
    "parameters of one part": (
        lambda: tuners.dxdp(POLICY, FEW, W.reward, lambda p: COLUMN).init(POLICY.init(1.0)),
        'a dict {"policy": ..., "value": ...}',
    ),
    "a function as parameters": (lambda: draft().init({"f": jnp.tanh}), "pytree of arrays"),
    "a rate as optimizer": (
        lambda: tuners.draft(W.model, W.process, W.reward, W.times, 1e-3, batch=8),
        "optax.adam(1e-3) or tuners.adamw(1e-3), got float 0.001",
    ),
    "a name as optimizer": (lambda: tuners.pretraining(W.model, W.process, "adam"), "got str 'adam'"),
    "a policy's": (lambda: tuners.ddpo(W.model, W.process, W.times, 1e-3, batch=8), "optax transformation"),
    "a value's": (lambda: tuners.value_regression(W.model, W.process, 1e-3), "optax transformation"),
    "a difference's": (
        lambda: tuners.temporal_difference(W.model, W.process, W.denoiser, W.times, 1e-3),
        "optax transformation",
    ),
    "an energy's": (lambda: tuners.langevin_energy(W.model, (1,), 1e-3), "optax transformation"),
    "a few-step sampler's": (
        lambda: tuners.dxdp(POLICY, FEW, W.reward, lambda p: COLUMN, optimizer=1e-3),
        "optax transformation",
    ),
    "a critic's": (
        lambda: tuners.sft_pg(
            W.model, W.process, W.times, SGD, batch=8, critic=W.model, critic_params=ZERO, critic_optimizer=1e-3
        ),
        "critic_optimizer must be an optax",
    ),
    "a baseline's": (lambda: tuners.advantages.learnt_baseline(W.model, ZERO, 1e-3), "optax transformation"),
    "a denoiser for a model": (
        lambda: tuners.draft(denoisers.clip_x0(W.denoiser), W.process, W.reward, W.times, SGD, batch=8),
        "model (params -> denoiser) is called with (params), and ClipX0(x, t, cond=None) cannot be",
    ),
    "a model for a denoiser": (
        lambda: samplers.ancestral(W.process, lambda params: W.denoiser),
        "(x, t, cond), and lambda(params)",
    ),
    "a denoiser for a reward": (
        lambda: values.posterior_mean(lambda x, t, cond=None: x, W.process, W.denoiser),
        "a reward is called with (x0, cond)",
    ),
    "a reward for a denoiser": (
        lambda: values.posterior_mean(W.reward, W.process, lambda x0, cond=None: x0),
        "a denoiser is called with (x, t, cond)",
    ),
    "a reward for a guide": (lambda: ancestral(guide=lambda x0: x0), "a guide is called with (kernel, move)"),
    "a reward for times": (
        lambda: tuners.draft(W.model, W.process, W.times, lambda x0, cond: x0, SGD, batch=8),
        "times must be a vector",
    ),
    "times for a reward": (lambda: draft(W.times), "a reward must be callable, got an array of float32[4]"),
    "a pytree of one argument": (lambda: draft(OneArgument()), "OneArgument(x0) cannot be"),
}


@pytest.mark.parametrize("case", MISPLACED.values(), ids=list(MISPLACED))
def test_what_stands_in_a_wrong_place_is_named(case):
    call, words = case
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 300


# ---------------------------------------------------------------- half precision


def test_predictions_in_half_precision_enter_in_float32():
    """A log-probability from a bfloat16 prediction is that of the same prediction in float32, to the bit."""
    half = lambda x, t, cond=None: W.denoiser(x, t).astype(jnp.bfloat16)  # noqa: E731
    full = lambda x, t, cond=None: half(x, t).astype(jnp.float32)  # noqa: E731
    x, t, s = jax.random.normal(KEY, (8, 1)), W.times[0], W.times[1]
    y = jax.random.normal(jax.random.key(1), (8, 1))
    log_prob = lambda d: W.process.reverse(x, t, s, d(x, t)).log_prob(y)  # noqa: E731
    assert log_prob(half).dtype == jnp.float32
    np.testing.assert_array_equal(log_prob(half), log_prob(full))
    out = sample(samplers.ancestral(W.process, half)).x0
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, sample(samplers.ancestral(W.process, full)).x0)
    half_reward = lambda x0, cond=None: x0[:, 0].astype(jnp.bfloat16)  # noqa: E731
    assert rewards.score(half_reward, x).dtype == jnp.float32


def test_a_clip_below_rounding_is_refused_or_warned_of():
    """D 2^-24 nats in float32; of a network in bfloat16 some .01 nats in every dimension."""
    wide = processes.gaussian(schedules.linear_vp(), (64, 64, 1))
    make = lambda **options: tuners.ddpo(W.model, wide, wide.times(4), SGD, batch=8, **options)  # noqa: E731
    with pytest.raises(
        ValueError, match="clip=0.0001 is below what float32 resolves .* of 4096 dimensions, 0.0002 nats"
    ):
        make(clip=1e-4)
    for good in ({"clip": 0.2}, {"clip": 1e-4, "per_dim": True}, {"clip": 1e-3}):
        make(**good)

    def model(params):
        def half(x, t, cond=None):
            return (x.astype(jnp.bfloat16) * params[0].astype(jnp.bfloat16)).astype(jnp.float32)

        return half

    def rollout(model, clip):
        online = tuners.ddpo(model, W.process, W.times, SGD, batch=8, clip=clip)
        jax.eval_shape(online.rollout, KEY, online.init(ZERO))

    with pytest.warns(UserWarning, match="half precision.*clip"):
        rollout(model, 1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rollout(model, 0.2)
        rollout(W.model, 1e-4)


def test_names_in_messages():
    assert typing.name_of(typing.callable_pytree(fails, "a reward")) == "fails"
    assert typing.name_of(lambda x: x) == "lambda" and typing.name_of(W.denoiser) == "AffineDenoiser"
    assert (
        typing.shown(jnp.zeros((2, 3))) == "an array of float32[2, 3]" and typing.shown(ancestral()) == "an Ancestral"
    )
    assert typing.shown("x" * 99) == "str '" + "x" * 58 + "…"
