"""Under jax_enable_x64 everything runs as it does without: states stay float32, whatever networks and rewards compute in.

Programs are traced, not compiled: a state whose type changes in a loop is refused there.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rgdiff import denoisers, guides, policies, processes, samplers, seiko, surrogates, tuners, values
from rgdiff.tuners import advantages
from rgdiff.typing import Function
from tests.contract import test_contract as contract
from tests.contract.test_contract import B, Net, gaussian, masked, value_net
from tests.worlds.worlds import GaussianWorld


@pytest.fixture(autouse=True)
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(params=["networks", pytest.param("rewards", marks=pytest.mark.slow)])
def double(request, monkeypatch):
    """Networks and their gradients, or rewards and energies, in float64; the others in float32."""
    wide = lambda name: lambda x0, cond=None: before[name](x0, cond).astype(jnp.float64)  # noqa: E731
    before = {name: getattr(contract, name) for name in ("gaussian_reward", "masked_reward", "net")}
    if request.param == "rewards":
        monkeypatch.setattr(contract, "net", lambda *shape: before["net"](*shape).astype(jnp.float32))
        monkeypatch.setattr(contract, "gaussian_reward", wide("gaussian_reward"))
        monkeypatch.setattr(contract, "masked_reward", wide("masked_reward"))


def particles(value=None, make=samplers.smc, **options):
    process, denoiser = gaussian(), Net(contract.net(2, 2))
    return make(
        process, denoiser, value or values.posterior_mean(contract.gaussian_reward, process, denoiser), **options
    )


def masked_svdd(**options):
    process, denoiser = masked(), Net(contract.net(4, 3))
    value = values.posterior_mean(contract.masked_reward, process, denoiser)
    return samplers.svdd(process, denoiser, value, candidates=4, **options)


GUIDE = guides.gradient_guide(value_net, 0.5)
MORE_SAMPLERS = {
    "differentiable": lambda: samplers.ancestral(gaussian(), Net(contract.net(2, 2)), differentiable=True, reference=Net(contract.net(2, 2))),
    "repeated": lambda: samplers.ancestral(gaussian(), Net(contract.net(2, 2)), time_travel=2, window=(0.2, 0.8)),
    "points": lambda: samplers.ancestral(gaussian(0.0), Net(contract.net(2, 2))),
    "masked, repeated": lambda: samplers.ancestral(masked(), Net(contract.net(4, 3)), time_travel=2, guide=guides.gradient_guide(_masked_value)),
    "first hitting": lambda: samplers.ancestral(processes.first_hitting(masked()), Net(contract.net(4, 3))),
    "event_driven": lambda: samplers.event_driven(masked(), Net(contract.net(4, 3))),
    "resampled": lambda: samplers.resampled(particles(), 3),
    "svdd, guided": lambda: samplers.svdd(gaussian(), Net(contract.net(2, 2)), value_net, candidates=4, chunk=2, proposal=GUIDE),
    "svdd, distinct in chunks": lambda: masked_svdd(distinct=True, chunk=2),
    "svdd, timeless": lambda: masked_svdd(distinct=True, timeless=True),
    "svdd, timeless, another value": lambda: samplers.svdd(
        masked(), Net(contract.net(4, 3)), values.learned(value_net, contract.masked_reward, masked()), candidates=4, distinct=True, timeless=True
    ),
    "smc, residual": lambda: particles(resampling="residual", potential="sum", interval=2, reward=contract.gaussian_reward),
    "smc, guided": lambda: particles(proposal=GUIDE, resampling="stratified"),
    "smc, another value": lambda: particles(value_net, resampling="multinomial", adaptive=0.5, twist=1.0),
    "fk_steering": lambda: particles(make=samplers.fk_steering),
    "tds": lambda: particles(make=samplers.tds),
    "das": lambda: particles(make=lambda *parts: samplers.das(*parts, gaussian().times(4))),
    "guides": lambda: samplers.ancestral(
        gaussian(), guides.lgd_mc(Net(contract.net(2, 2)), gaussian(), contract.gaussian_reward, jax.random.key(1), draws=2)
    ),
    "measurement": lambda: samplers.ancestral(
        gaussian(), guides.tmpd(Net(contract.net(2, 2)), gaussian(), guides.linear(jnp.ones((1, 2)), jnp.ones(1), 0.3))
    ),
    "few_step": lambda: samplers.ancestral(POLICY.process, POLICY(POLICY.init(0.1 * jnp.ones((1, 1))))),
}  # fmt: skip


def _masked_value(x, t, cond=None):
    return value_net(x, t, cond)


POLICY = policies.policy(policies.few_step(policies.variances((0.8, 0.5)), (1,)), lambda w: Net(w), reach=100.0)


def energy_model(params):
    return lambda x, t=0.0, cond=None: jnp.tanh(x * params).sum(-1)


def players(make, **options):
    tuner = make(POLICY, POLICY.process, energy_model, decay_steps=10, batch=B, **options)
    return tuner, {"policy": POLICY.init(0.1 * jnp.ones((1, 1))), "value": jnp.ones(())}


def rounds(**options):
    process = gaussian()
    surrogate = surrogates.ridge(lambda x0: x0, regularization=0.1, noise=0.1)
    return {"process": process, "times": process.times(3), "surrogate": surrogate, **options}


def seiko_rounds():
    inner = lambda reward, **kl: tuners.draft(  # noqa: E731
        contract.gaussian_model, gaussian(), reward, gaussian().times(3), contract.ADAM, batch=B, **kl
    )
    prior = {"prior": Net(contract.net(2, 2)), "temperature": 0.1, "batch": B, "capacity": 2 * B, "steps": 2}
    method = seiko.seiko(contract.gaussian_model, **rounds(inner=inner, **prior))
    return tuners.as_tuner(method, contract.gaussian_reward), contract.net(2, 2)


def steered_rounds():
    def steer(reward):
        process, denoiser = gaussian(), Net(contract.net(2, 2))
        value = values.posterior_mean(reward, process, denoiser)
        return samplers.resampled(samplers.smc(process, denoiser, value), 2)

    method = seiko.steered(**rounds(steer=steer, prior=Net(contract.net(2, 2)), batch=B, capacity=2 * B))
    return tuners.as_tuner(method, contract.gaussian_reward), contract.net(2, 2)


def ddpo(advantage, cond=None):
    times = gaussian().times(4)
    online = tuners.ddpo(contract.gaussian_model, gaussian(), times, contract.ADAM, batch=B, advantage=advantage)
    return tuners.as_tuner(online, contract.gaussian_reward), contract.net(2, 2)


def baseline(params):
    return lambda x, t, cond=None: x @ params


MORE_TUNERS = {
    "dxdp": lambda: (
        tuners.dxdp(POLICY, POLICY.process, gaussian_reward_1d, energy_model, speed=jnp.ones(2), batch=B, decay_steps=10),
        {"policy": POLICY.init(0.1 * jnp.ones((1, 1))), "value": jnp.ones(())},
    ),
    "dxmi": lambda: players(tuners.dxmi),
    "dxmi_released": lambda: players(tuners.dxmi_released, dim=1),
    "gcd": lambda: players(tuners.gcd),
    "langevin_energy": lambda: (
        tuners.langevin_energy(energy_model, (1,), contract.ADAM, batch=B, chains=2 * B, moves=2), jnp.ones(())
    ),
    "seiko": seiko_rounds,
    "steered": steered_rounds,
    "group_relative": lambda: ddpo(advantages.group_relative(4, 2.0)),
    "per_condition": lambda: ddpo(advantages.per_condition(2, buffer=16)),
    "learnt_baseline": lambda: ddpo(advantages.learnt_baseline(baseline, jnp.zeros(2), optax.sgd(0.1))),
}  # fmt: skip
CONDITIONED = ("per_condition",)


def gaussian_reward_1d(x0, cond=None):
    return -0.5 * jnp.sum(x0**2, -1).astype(jnp.float64)


def named(makers, more):
    return {make.__name__: make for make in makers} | more


def types(tree):
    return [
        (jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


@pytest.mark.parametrize("name", named(contract.SAMPLERS, MORE_SAMPLERS))
@pytest.mark.first(12)
def test_samplers_keep_their_types(name, double):
    """float64 networks, values and rewards; what comes out is float32, as without x64."""
    sampler = named(contract.SAMPLERS, MORE_SAMPLERS)[name]()
    times = sampler.process.times(*(() if name in ("first hitting", "few_step") else (3,)))
    keep = lambda carry, info: (carry, info)  # noqa: E731
    out = jax.eval_shape(lambda key: samplers.sample(sampler, key, B, times, keep=keep), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(out.x0)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", named(contract.TUNERS, MORE_TUNERS))
@pytest.mark.first(4)
def test_tuners_keep_their_types(name, double):
    tuner, params = named(contract.TUNERS, MORE_TUNERS)[name]()
    state = tuner.init(params)
    batch = (
        {"x0": jnp.ones((B, 1), jnp.float32)} if name in ("dxmi", "dxmi_released", "gcd", "langevin_energy") else None
    )
    if name in CONDITIONED:
        batch = jnp.zeros(B, jnp.int32)
    elif name not in MORE_TUNERS and (data := contract.data_of(named(contract.TUNERS, {})[name])) is not None:
        batch = jax.tree.map(lambda leaf: leaf[:B], data)
    after, _ = jax.eval_shape(tuner.step, jax.random.key(0), state, batch)
    assert types(after) == types(jax.eval_shape(lambda: state))


@pytest.mark.first(1)
@pytest.mark.parametrize("make", [samplers.smc, samplers.tds])
def test_particles_under_x64_are_right(make):
    """log Z of a linear reward in closed form, with a float64 reward."""
    world = GaussianWorld([0.5], [[0.8]], steps=5, b=[0.7])
    reward = lambda x0, cond=None: 0.7 * x0[:, 0].astype(jnp.float64)  # noqa: E731
    value = values.posterior_mean(Function(reward), world.process, world.denoiser)
    out = samplers.sample(make(world.process, world.denoiser, value), jax.random.key(0), 4000, world.times)
    assert out.info["log_z"].dtype == out.x0.dtype == jnp.float32
    assert abs(float(out.info["log_z"]) - world.log_z()) < 4 * float(out.info["log_z_se"]) < 0.1


def test_log_partition_and_linen_under_x64():
    energy = lambda x, cond=None: 0.5 * jnp.sum((x / 0.5) ** 2, -1).astype(jnp.float64)  # noqa: E731
    estimate = tuners.log_partition(jax.random.key(0), energy, (1,), detail=0.5, particles=256, steps=10, runs=2)
    assert abs(float(estimate.log_z) - 0.5 * np.log(2 * np.pi * 0.25)) < 0.1
    assert (
        denoisers.from_function(lambda p, x, t, cond=None: p * x, jnp.ones(()))(jnp.ones((2, 1)), 0.5).dtype
        == jnp.float32
    )
