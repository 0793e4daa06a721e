"""One table over every public sampler and tuner: what any method of this library must keep to."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rgdiff import denoisers, guides, policies, processes, samplers, schedules, seiko, surrogates, tuners, values
from rgdiff.runtime.mesh import data_mesh
from rgdiff.samplers._loop import roll
from rgdiff.typing import Function, pytree, static
from tests.worlds.worlds import GaussianWorld, factorised

B = 8
TRACES = []  # one entry each time a network's Python body runs
ROWS = []  # rows of every network call that really runs


@pytree
class Net:
    """A small denoiser that counts its traces and, with `rows`, its calls."""

    params: Any
    rows: bool = static(default=False)

    def __call__(self, x, t, cond=None):
        TRACES.append(1)
        if self.rows:
            jax.debug.callback(lambda _: ROWS.append(x.shape[0]), jnp.float32(0))
        out = jnp.tanh(x @ self.params) * (1 - 0.5 * jnp.broadcast_to(t, x.shape[:1]).reshape(-1, *[1] * (x.ndim - 1)))
        return out if cond is None else out.at[..., 0].add(cond.reshape(-1, *[1] * (x.ndim - 2)))


def net(rows_in: int, rows_out: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (rows_in, rows_out)) * 0.5


def gaussian(eta=1.0):
    return processes.gaussian(schedules.linear_vp(), (2,), eta=eta)


def masked():
    return processes.masked(schedules.log_linear_mask(), 3, 3)


def gaussian_reward(x0, cond=None):
    return x0[:, 0] - 0.3 * x0[:, 1] ** 2


def masked_reward(x0, cond=None):
    return x0[..., 0].sum(-1) + 0.5 * x0[:, 0, 1]


def value_net(x, t, cond=None):
    return x.reshape(x.shape[0], -1)[:, :2].sum(-1) * (1 - t)


# Samplers: make(number, seed, net_type), `number` a dynamic number of the method
def ancestral_gaussian(number=0.5, seed=0, net_type=Net):
    return samplers.ancestral(gaussian(number), net_type(net(2, 2, seed)))


def ancestral_masked(number=0.5, seed=0, net_type=Net):
    return samplers.ancestral(masked(), net_type(net(4, 3, seed) * number))


def dpm_solver(number=0.5, seed=0, net_type=Net):
    return samplers.dpm_solver(gaussian(0.0), net_type(net(2, 2, seed) * number))


def svdd_pm_gaussian(number=0.5, seed=0, net_type=Net):
    denoiser = net_type(net(2, 2, seed))
    value = values.posterior_mean(gaussian_reward, gaussian(), denoiser)
    return samplers.svdd(gaussian(), denoiser, value, temperature=number, candidates=4, chunk=2, select_initial=True)


def svdd_pm_masked(number=0.5, seed=0, net_type=Net):
    denoiser = net_type(net(4, 3, seed))
    value = values.posterior_mean(masked_reward, masked(), denoiser)
    return samplers.svdd(masked(), denoiser, value, temperature=number, candidates=4)


def svdd_learned_gaussian(number=0.5, seed=0, net_type=Net):
    value = values.learned(value_net)
    return samplers.svdd(gaussian(), net_type(net(2, 2, seed)), value, temperature=number, candidates=4)


def svdd_learned_masked(number=0.5, seed=0, net_type=Net):
    value = values.learned(value_net, masked_reward, masked())
    return samplers.svdd(masked(), net_type(net(4, 3, seed)), value, temperature=number, candidates=4)


def svdd_window(number=0.5, seed=0, net_type=Net):
    denoiser = net_type(net(4, 3, seed))
    value = values.posterior_mean(masked_reward, masked(), denoiser)
    return samplers.svdd(masked(), denoiser, value, temperature=number, candidates=4, window=(0.0, 0.6))


def guided_gaussian(number=0.5, seed=0, net_type=Net):
    denoiser = net_type(net(2, 2, seed))
    guided = guides.classifier_guidance(denoiser, gaussian(), values.learned(value_net), number)
    return samplers.ancestral(gaussian(), guided, guide=guides.gradient_guide(value_net, number))


def best_of_n_masked(number=0.5, seed=0, net_type=Net):
    return samplers.best_of_n(ancestral_masked(number, seed, net_type), masked_reward, 3)


def smc_gaussian(number=0.5, seed=0, net_type=Net):
    denoiser = net_type(net(2, 2, seed))
    value = values.posterior_mean(gaussian_reward, gaussian(), denoiser)
    return samplers.smc(gaussian(), denoiser, value, temperature=number, adaptive=0.5, potential="max")


def smc_masked(number=0.5, seed=0, net_type=Net):
    value = values.learned(value_net, masked_reward, masked())
    return samplers.smc(masked(), net_type(net(4, 3, seed)), value, temperature=number, twist=number)


def svdd_distinct(number=0.5, seed=0, net_type=Net):
    denoiser = net_type(net(4, 3, seed))
    value = values.posterior_mean(masked_reward, masked(), denoiser)
    return samplers.svdd(masked(), denoiser, value, temperature=number, candidates=4, distinct=True, replace=0.3)


def event_driven(number=0.5, seed=0, net_type=Net):
    return samplers.event_driven(masked(), net_type(net(4, 3, seed) * number), rows=1)


def particles(method, number, seed, net_type, *times):
    value = values.learned(value_net, masked_reward, masked())
    return method(masked(), net_type(net(4, 3, seed)), value, *times, temperature=number)


def smc_islands(number=0.5, seed=0, net_type=Net):
    value = values.learned(value_net, masked_reward, masked())
    denoiser = net_type(net(4, 3, seed))
    return samplers.smc(masked(), denoiser, value, temperature=number, ess_threshold=1.0, islands=min(8, B // 2))


def fk_steering_smc(number=0.5, seed=0, net_type=Net):
    return particles(samplers.fk_steering, number, seed, net_type)


def tds_smc(number=0.5, seed=0, net_type=Net):
    return particles(samplers.tds, number, seed, net_type)


def das_smc(number=0.5, seed=0, net_type=Net):
    return particles(samplers.das, number, seed, net_type, masked().times(STEPS))


def resampled_smc(number=0.5, seed=0, net_type=Net):
    return samplers.resampled(smc_masked(number, seed, net_type), 2)


INDEPENDENT = [
    ancestral_gaussian, ancestral_masked, svdd_pm_gaussian, svdd_pm_masked, svdd_learned_gaussian, svdd_learned_masked, svdd_window,
    guided_gaussian, best_of_n_masked, dpm_solver,
]  # fmt: skip
PARTICLES = [smc_gaussian, smc_masked, smc_islands, fk_steering_smc, tds_smc, das_smc, resampled_smc]
SAVING = [svdd_distinct, event_driven]  # predictions are shared between equal states: fewer network calls than counted
SAMPLERS = [*INDEPENDENT, *PARTICLES, *SAVING]


def table_of(makers, *first):
    """All of them; those named first in the default suite, the others among the slow tests.

    Tests of one method run in one process, so that they share its compiled programs.
    """
    marks = lambda m: [pytest.mark.xdist_group(m.__name__)] + [pytest.mark.slow] * (m not in first)  # noqa: E731
    params = [pytest.param(m, marks=marks(m)) for m in makers]
    return pytest.mark.parametrize("make", params, ids=lambda f: f.__name__)


STEPS = 4
each_sampler = table_of(
    SAMPLERS, ancestral_gaussian, ancestral_masked, svdd_pm_gaussian, svdd_learned_masked, guided_gaussian, dpm_solver,
    best_of_n_masked, resampled_smc, svdd_window, *SAVING,
)  # fmt: skip


def builds(constructor) -> bool:
    """Whether it returns, by its annotation, a sampler or tuner (init and step) or an online method (rollout and update)."""
    if not inspect.isfunction(constructor):
        return False
    returned = str(inspect.signature(constructor).return_annotation)
    built = getattr(sys.modules[constructor.__module__], returned, None)
    return any(all(hasattr(built, name) for name in names) for names in (("init", "step"), ("rollout", "update")))


def constructors(package) -> list[str]:
    """Names of its public functions that build a sampler, a tuner or an online method."""
    names = getattr(package, "__all__", None) or [name for name in vars(package) if not name.startswith("_")]
    return [name for name in names if builds(getattr(package, name))]


def test_every_public_constructor_has_a_row():
    """A row is a function that names its constructor, or takes it as an argument."""
    for package, rows, count in ((samplers, SAMPLERS, 9), (tuners, TUNERS, 27), (seiko, TUNERS, 2)):
        public = constructors(package)
        assert len(public) >= count, public  # the search finds something
        named = {name for make in rows for name in make.__code__.co_names}
        assert set(public) <= named, f"no row in the contract table for {sorted(set(public) - named)}"


def keep_state(carry, info):
    while isinstance(carry, tuple):
        carry = carry[0]
    return carry


def close(a, b, **tolerance):
    tolerance = tolerance or {"rtol": 1e-5, "atol": 1e-6}
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, **tolerance), a, b)


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.first(2)
@table_of(SAMPLERS, ancestral_gaussian, ancestral_masked, svdd_pm_gaussian, svdd_learned_masked)
def test_sampler_jit_equals_no_jit(make):
    """`sample` is init, steps and final with keys folded by index, called one after another without jit."""
    sampler, key = make(), jax.random.key(0)
    times = sampler.process.times(3 if sampler.process.projects else 2)
    run = samplers.sample(sampler, key, B, times, keep=keep_state)
    carry = sampler.init(jax.random.fold_in(key, 0), B, times[0])
    before = jax.eval_shape(lambda: carry)
    for i in range(times.shape[0] - 1):
        carry, _ = sampler.step(jax.random.fold_in(key, 1 + i), carry, times[i], times[i + 1])
        close(keep_state(carry, {}), run.kept[i])
        assert jax.eval_shape(lambda c=carry: c) == before  # dtypes, shapes and structure are stable
    close(sampler.final(carry, times[-1])[0], run.x0)
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves((run, carry))}
    counting = (
        {"int32", "key<fry>"} if make in (*PARTICLES, event_driven, svdd_distinct) else set()
    )  # moves, calls; a key
    assert dtypes - counting == {"float32"}


@pytest.mark.first(5)
@each_sampler
def test_sampler_compiles_once(make):
    """Another key, temperature or eta, other parameters and other times run the same program."""
    sampler = make()
    times = sampler.process.times(STEPS)
    samplers.sample(sampler, jax.random.key(0), B, times)
    TRACES.clear()
    cond_free = samplers.sample(make(0.9, seed=1), jax.random.key(1), B, times)
    samplers.sample(make(0.2, seed=2), jax.random.key(1), B, sampler.process.times(STEPS) ** 1.1)
    assert TRACES == [] and np.all(np.isfinite(cond_free.x0))
    if make is ancestral_gaussian:  # the counter can count
        samplers.sample(sampler, jax.random.key(0), B + 1, times)
        assert TRACES


@pytest.mark.first(1)
@table_of(SAMPLERS, ancestral_gaussian, svdd_pm_masked, smc_gaussian)
def test_sampler_in_chunks_is_the_same_to_the_bit(make):
    sampler, key, done = make(), jax.random.key(0), []
    times = sampler.process.times(STEPS)
    moves = times.shape[0] - 1
    whole = samplers.sample(sampler, key, B, times, keep=keep_state)
    for chunk in (1, 3, 10) if make is ancestral_gaussian else (3 if moves == 4 else 2,):  # a last chunk of one move
        done.clear()
        pieces = samplers.sample(
            sampler, key, B, times, keep=keep_state, chunk=chunk, on_chunk=lambda i, n: done.append((i, n))
        )
        if make is svdd_learned_gaussian:  # XLA rounds its network apart in the two programs
            close(pieces, whole, rtol=1e-6, atol=1e-7)
        else:
            equal(pieces, whole)
        assert done == [(min(i, moves), moves) for i in range(chunk, moves + chunk, chunk)]


@pytest.mark.first(1)
@table_of(SAMPLERS, ancestral_masked, svdd_pm_gaussian, svdd_distinct)
def test_sampler_vmaps_over_keys(make):
    sampler, keys = make(), jax.random.split(jax.random.key(0), 3)
    times = sampler.process.times(STEPS)
    together = jax.vmap(lambda k: samplers.sample(sampler, k, B, times).x0)(keys)
    for i, key in enumerate(keys):
        close(together[i], samplers.sample(sampler, key, B, times).x0)


@pytest.mark.parametrize("chunk", [None, 2])
def test_a_batch_with_conditions_splits_over_devices(chunk):
    """Through the public door; the table over all methods is in test_mesh."""
    sampler, key, cond = ancestral_gaussian(), jax.random.key(0), jnp.linspace(-1, 1, 16)
    times = sampler.process.times(STEPS)
    one = samplers.sample(sampler, key, 16, times, cond, keep=keep_state, chunk=chunk)
    eight = samplers.sample(sampler, key, 16, times, cond, keep=keep_state, chunk=chunk, mesh=data_mesh())
    assert len(eight.x0.sharding.device_set) == 8 and len(one.x0.sharding.device_set) == 1
    close(eight, one)


@pytest.mark.slow
def test_problems_of_particles_split_over_devices_without_collectives():
    """Particles of one problem interact; problems do not, and each device keeps its own."""
    sampler, mesh = smc_gaussian(), data_mesh()
    times, keys = sampler.process.times(STEPS), jax.random.split(jax.random.key(0), 8)
    many = jax.jit(jax.vmap(lambda key: samplers.sample(sampler, key, B, times)))
    split = jax.device_put(keys, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    close(many(split), many(keys))
    program = many.lower(split).compile().as_text()
    assert "all-" not in program and "collective-permute" not in program


@pytest.mark.first(5)
@each_sampler
def test_sampler_counts_its_network_calls(make):
    """network_calls(moves) is the rows that reach the network, over the batch; at most, where copies cost nothing."""
    sampler = make(net_type=lambda params: Net(params, True))
    times = sampler.process.times(STEPS)
    samplers.sample(sampler, jax.random.key(0), B, times)  # a first run may trace; only calls that run are counted
    jax.effects_barrier()
    ROWS.clear()
    samplers.sample(sampler, jax.random.key(1), B, times).x0.block_until_ready()
    jax.effects_barrier()
    calls = sampler.network_calls(times.shape[0] - 1)
    assert 1 <= sum(ROWS) / B < calls if make in SAVING else sum(ROWS) / B == calls


def test_a_chain_is_the_same_in_a_head_and_a_tail():
    sampler, key = ancestral_gaussian(), jax.random.key(0)
    times = sampler.process.times(6)
    x = sampler.init(jax.random.fold_in(key, 0), B, times[0])
    whole, _ = roll(sampler, key, x, times)
    for cut in (0, 1, 4, 5):
        head, _ = roll(sampler, key, x, times[: cut + 1])
        tail, _ = roll(sampler, key, head, times[cut:], first=cut)
        close(tail, whole)


def test_samplers_with_one_network_call():
    """steps = 1 is the smallest chain: no move and a projection, or one move to data."""
    for make in (ancestral_gaussian, svdd_pm_gaussian, svdd_pm_masked):
        sampler = make()
        times = sampler.process.times(1)
        x0 = samplers.sample(sampler, jax.random.key(0), B, times, keep=keep_state).x0
        assert x0.shape[0] == B and np.all(np.isfinite(x0))
        equal(samplers.sample(sampler, jax.random.key(0), B, times, keep=keep_state, chunk=1).x0, x0)


# ---------------------------------------------------------------- tuners


def gaussian_model(params):
    return Net(params)


def draft(number=0.1):
    process = gaussian()
    reference = Net(net(2, 2, 5))
    return tuners.draft(
        gaussian_model,
        process,
        gaussian_reward,
        process.times(4),
        ADAM,
        batch=B,
        reference=reference,
        temperature=number,
    ), net(2, 2)


def draft_k(number=0.5):
    process = gaussian(number)
    return tuners.draft_k(gaussian_model, process, gaussian_reward, process.times(4), ADAM, k=2, batch=B), net(2, 2)


def draft_lv(number=0.5):
    process = gaussian(number)
    return tuners.draft_lv(gaussian_model, process, gaussian_reward, process.times(4), ADAM, n=2, batch=B), net(2, 2)


def draft_masked(number=0.5):
    process = processes.masked(schedules.log_linear_mask(), 3, 3, relaxation="gumbel", gumbel_temperature=number)
    return tuners.draft_k(gaussian_model, process, masked_reward, process.times(4), ADAM, k=3, batch=B), net(4, 3)


def refl_stopped(number=0.5):
    process = gaussian(number)
    tuner = tuners.refl(
        gaussian_model, process, gaussian_reward, process.times(4), ADAM, m=2, batch=B, heldout=gaussian_reward
    )
    return tuners.early_stopping(tuner, window=2, patience=9), net(2, 2)


def alignprop(number=0.5):
    process = gaussian()
    return tuners.alignprop(
        gaussian_model, process, gaussian_reward, process.times(4), ADAM, std=10 * number, batch=B, ema_decay=number
    ), net(2, 2)


def alignprop_subset(number=0.5):
    process = gaussian(number)
    return tuners.alignprop_subset(
        gaussian_model, process, gaussian_reward, process.times(4), ADAM, batch=B, ema_decay=number
    ), net(2, 2)


def draft_plus(number=0.5):
    process = gaussian(0.0)
    return tuners.draft_plus(
        gaussian_model, process, gaussian_reward, process.times(4), ADAM, k=2, batch=B, reference=Net(net(2, 2, 5)),
        weight=number,
    ), net(2, 2)  # fmt: skip


def drtune_budget(number=0.5):
    process = gaussian(number)
    return tuners.drtune(
        gaussian_model, process, gaussian_reward, process.times(4), ADAM, k=2, m=2, batch=B, micro_batches=2,
        reference=Net(net(2, 2, 5)), temperature=number, kl_budget=number,
    ), net(2, 2)  # fmt: skip


def drakes(number=0.5):
    process = processes.first_hitting(masked())
    return tuners.drakes(
        gaussian_model, process, masked_reward, process.times(), ADAM, batch=B, reference=Net(net(4, 3, 5)),
        temperature=number, estimator="reinmax",
    ), net(4, 3)  # fmt: skip


def drakes_score_function(number=0.5):
    return tuners.drakes(
        gaussian_model, masked(), masked_reward, masked().times(4), ADAM, batch=B, reference=Net(net(4, 3, 5)),
        temperature=number, estimator="score_function",
    ), net(4, 3)  # fmt: skip


def drakes_log_variance(number=0.5):
    return tuners.drakes(
        gaussian_model, masked(), masked_reward, masked().times(4), ADAM, batch=B, reference=Net(net(4, 3, 5)),
        temperature=number, estimator="log_variance",
    ), net(4, 3)  # fmt: skip


def adjoint_matching(number=0.5):
    return tuners.adjoint_matching(
        gaussian_model, gaussian(), gaussian_reward, gaussian().times(4), ADAM, batch=B, reference=Net(net(2, 2, 5)),
        temperature=number, late=2, drawn=1, loss_limit=10 * number, ema_decay=number,
    ), net(2, 2)  # fmt: skip


def elegant(number=0.5):
    """The main chain, begun at what another sampler draws."""
    process = processes.gaussian(schedules.flow(), (2,), eta=number)
    start = processes.initial_law(process, schedules.linear_vp())
    draw = samplers.drawing(samplers.ancestral(start, Net(net(2, 2, 7))), start.times(3))
    return tuners.elegant(
        gaussian_model, process, gaussian_reward, process.times(4), ADAM, batch=B, reference=Net(net(2, 2, 5)),
        temperature=number, initial=draw,
    ), net(2, 2)  # fmt: skip


def elegant_initial(number=0.5):
    start = processes.initial_law(gaussian(), schedules.linear_vp())
    value = value_model(net(2, 3))
    return tuners.initial_tuner(
        gaussian_model, start, value, start.times(3), ADAM, temperature=number, batch=B
    ), net(2, 2)  # fmt: skip


def elegant_value(number=0.5):
    return tuners.initial_value(value_model, gaussian(), gaussian().times(3), ADAM, temperature=number), net(2, 3)


def drakes_published(number=0.5):
    return tuners.drakes_published(
        gaussian_model, masked(), masked_reward, masked().times(4), ADAM, batch=B, reference=Net(net(4, 3, 5)),
        temperature=number, truncation=2, gumbel_temperature=number,
    ), net(4, 3)  # fmt: skip


def ddpo(number=0.5):
    process = gaussian(number)
    online = tuners.ddpo(
        gaussian_model, process, process.times(4), ADAM, batch=B, clip=number, epochs=2, minibatches=2,
        advantage=tuners.advantages.batch_normalised(), reference=Net(net(2, 2, 5)), temperature=number, kl_budget=number,
        kl_rate=number, ema_decay=number,
    )  # fmt: skip
    return tuners.as_tuner(online, gaussian_reward, heldout=gaussian_reward), net(2, 2)


def dpok(number=0.5):
    process = gaussian(number)
    online = tuners.dpok(
        gaussian_model, process, process.times(4), ADAM, batch=B, reference=Net(net(2, 2, 5)), temperature=number,
        value=value_model, value_params=net(2, 3), value_optimizer=ADAM, value_steps=2,
    )  # fmt: skip
    return tuners.as_tuner(online, gaussian_reward, noise=number), net(2, 2)


def filtered(number=0.5):
    process = gaussian()
    online = tuners.filtered(gaussian_model, process, process.times(4), ADAM, batch=B, fraction=number)
    return tuners.as_tuner(online, gaussian_reward), net(2, 2)


def reward_weighted(number=0.5):
    process = gaussian(number)
    online = tuners.reward_weighted(gaussian_model, process, process.times(4), ADAM, batch=B, temperature=number)
    return tuners.as_tuner(online, gaussian_reward), net(2, 2)


def sft_pg(number=0.5):
    process = gaussian(number)
    return tuners.sft_pg(
        gaussian_model, process, process.times(3), ADAM, batch=B, critic=critic_model, critic_params=net(2, 3, 4),
        critic_optimizer=ADAM, critic_steps=2, penalty=number,
    ), net(2, 2)  # fmt: skip


def critic_model(params):
    return lambda x0, cond=None: jnp.tanh(x0 @ params).sum(-1)


def gradient_guidance(number=0.5):
    refit = tuners.pretraining(gaussian_model, gaussian(), ADAM, ema_decay=number)
    return tuners.gradient_guidance(
        gaussian_model, gaussian(), gaussian_reward, gaussian().times(4), batch=B, target=guides.increment(number),
        refit=refit, updates=2, memory=2,
    ), net(2, 2)  # fmt: skip


FEW_STEP = policies.few_step(policies.variances((0.5, 0.5)), (2,))


def few_step(method, **options):
    """A tuner of DxDP's engine over two moves, and its parameters."""
    policy = policies.policy(FEW_STEP, gaussian_model)
    tuner = method(policy, FEW_STEP, value=value_model, batch=B, speed=jnp.ones(2), **options)
    return tuner, {"policy": policy.init(net(2, 2)), "value": net(2, 3)}


def dxdp(number=0.5):
    return few_step(tuners.dxdp, reward=gaussian_reward, temperature=number)


def dxmi(number=0.5):
    return few_step(tuners.dxmi, decay_steps=9.0, temperature=number, energy_limit=1e6)


def dxmi_released(number=0.5):
    return few_step(tuners.dxmi_released, dim=2, entropy_weight=number, energy_limit=1e6)


def gcd(number=0.5):
    return few_step(tuners.gcd, decay_steps=9.0, temperature=number, energy_limit=1e6)


def langevin_energy(number=0.5):
    return tuners.langevin_energy(energy_model, (2,), ADAM, batch=B, moves=2, chains=2 * B, restart=number), net(2, 3)


def energy_model(params):
    return lambda x, cond=None: _value(params, x, None)


def reward_backprop(number=0.5):
    process = gaussian(number)
    return tuners.reward_backprop(gaussian_model, process, gaussian_reward, process.times(3), ADAM, batch=B), net(2, 2)


RIDGE = surrogates.ridge(surrogates.with_constant)
PRIOR = Net(net(2, 2, 5))


def _anchored(reward, **kl):
    return tuners.draft_k(gaussian_model, gaussian(), reward, gaussian().times(2), ADAM, k=1, batch=B, **kl)


def _best(reward):
    return samplers.best_of_n(samplers.ancestral(gaussian(), PRIOR), reward, 2)


def seiko_rounds(number=0.5):
    online = seiko.seiko(
        gaussian_model, gaussian(), gaussian().times(2), RIDGE, _anchored, prior=PRIOR, temperature=number, batch=B,
        capacity=6 * B, steps=2,
    )  # fmt: skip
    return tuners.as_tuner(online, gaussian_reward), net(2, 2)


def seiko_steered(number=0.5):
    online = seiko.steered(
        gaussian(), gaussian().times(2), RIDGE, _best, prior=PRIOR, batch=B, capacity=6 * B, noise=number
    )
    return tuners.as_tuner(online, gaussian_reward), None


def pretraining_gaussian(number=0.9):
    return tuners.pretraining(gaussian_model, gaussian(), ADAM, ema_decay=number), net(2, 2)


def pretraining_masked(number=0.9):
    return tuners.pretraining(gaussian_model, masked(), ADAM, ema_decay=number), net(4, 3)


def value_model(params):
    return values.learned(denoisers.from_function(_value, params))


def _value(params, x, t, cond=None):
    TRACES.append(1)
    return jnp.tanh(x @ params).sum(-1)


def value_regression(number=0.9):
    return tuners.value_regression(value_model, gaussian(), ADAM, ema_decay=number), net(2, 3)


def value_soft_rollouts(number=0.9):
    times = gaussian().times(3)
    return tuners.value_regression(value_model, gaussian(), ADAM, temperature=number, times=times), net(2, 3)


def value_temporal_difference(number=0.9):
    denoiser, times = Net(net(4, 3)), masked().times(2)
    return tuners.temporal_difference(
        masked_value_model, masked(), denoiser, times, ADAM, temperature=number, candidates=2
    ), net(4, 3)


def masked_value_model(params):
    return values.learned(denoisers.from_function(_masked_value, params), masked_reward, masked())


def _masked_value(params, x, t, cond=None):
    return _value(params, x, t).sum(-1)


ADAM = optax.adam(1e-2)
TUNERS = [
    draft, draft_k, draft_lv, draft_masked, pretraining_gaussian, pretraining_masked, value_regression,
    value_soft_rollouts, value_temporal_difference, refl_stopped, alignprop, alignprop_subset, draft_plus, drtune_budget, drakes,
    drakes_score_function, drakes_log_variance, drakes_published, elegant, elegant_initial, elegant_value, ddpo, dpok,
    reward_weighted, filtered, sft_pg, gradient_guidance, dxdp, dxmi, dxmi_released, gcd, langevin_energy, reward_backprop,
    seiko_rounds, seiko_steered, adjoint_matching,
]  # fmt: skip
each_tuner = table_of(TUNERS, ddpo, draft_k, draft_masked, pretraining_masked, value_regression, refl_stopped, drakes)


def data_of(make):
    if make in (pretraining_gaussian, sft_pg, dxmi, dxmi_released, gcd, langevin_energy):
        return {"x0": jax.random.normal(jax.random.key(9), (50, 2))}
    if make is pretraining_masked:
        return {"x0": jax.nn.one_hot(jax.random.randint(jax.random.key(9), (50, 3), 0, 3), 3)}
    if make is value_regression:
        return {"x0": jax.random.normal(jax.random.key(9), (50, 2)), "reward": jnp.arange(50.0) / 50}
    if make is elegant_value:
        return {"path": jax.random.normal(jax.random.key(9), (50, 1, 2)), "reward": jnp.arange(50.0) / 50}
    if make is value_soft_rollouts:
        return {"path": jax.random.normal(jax.random.key(9), (50, 3, 2)), "reward": jnp.arange(50.0) / 50}
    if make is value_temporal_difference:
        return data_of(pretraining_masked) | {"reward": jnp.arange(50.0) / 50}
    return None


def train(make, steps, state=None, number=None, key=0, **options):
    tuner, params = make() if number is None else make(number)
    data = data_of(make)
    state = tuner.init(params) if state is None else state
    batch = None if data is None else B
    return tuners.fit(tuner, jax.random.key(key), state, steps, data=data, batch=batch, **options)


@pytest.mark.first(1)
@table_of(TUNERS, draft_lv, pretraining_masked, value_regression)
def test_tuner_jit_equals_no_jit(make):
    tuner, params = make()
    data = data_of(make)
    batch = None if data is None else jax.tree.map(lambda leaf: leaf[:B], data)
    state = tuner.init(params)
    plain, info = tuner.step(jax.random.key(0), state, batch)
    jitted, jitted_info = jax.jit(tuner.step)(jax.random.key(0), state, batch)
    close(plain, jitted, rtol=1e-4, atol=1e-5)
    close(info, jitted_info, rtol=1e-4, atol=1e-5)
    shapes = lambda tree: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]  # noqa: E731
    assert shapes(plain) == shapes(state) and jax.tree.structure(plain) == jax.tree.structure(state)
    trained = getattr(plain, "train", plain)  # rounds of gradient guidance hold a training state
    numbers = (trained.params, getattr(trained, "average", None), info)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(numbers)} <= {"float32", "int32"}


@pytest.mark.first(3)
@each_tuner
def test_tuner_compiles_once(make):
    train(make, 6, chunk=3)
    tuner, params = make(0.3)
    state = tuner.init(params)  # SEIKO reads the shapes of its networks here
    TRACES.clear()
    state = train(make, 6, state, chunk=3, number=0.3, key=1)
    assert TRACES == [] and int(state.step) == 6
    if make is draft_k:  # the counter can count
        train(make, 4, chunk=4)
        assert TRACES


@pytest.mark.first(2)
@each_tuner
def test_interrupted_and_continued_is_uninterrupted_to_the_bit(make):
    whole = train(make, 6, chunk=3)
    continued = train(make, 6, state=train(make, 3, chunk=3), chunk=3)
    equal(continued, whole)
    infos = []
    train(make, 6, chunk=3, on_chunk=lambda state, info: infos.append(info))
    assert len(infos) == 2 and all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(infos))


@pytest.mark.first(1)
@pytest.mark.parametrize("make", [draft_k, pretraining_gaussian], ids=lambda f: f.__name__)
def test_interrupted_anywhere_is_uninterrupted(make):
    """Off the chunks' bounds the programs differ, and with them the last bits of float32."""
    close(train(make, 6, state=train(make, 2, chunk=3), chunk=3), train(make, 6, chunk=3), rtol=1e-4, atol=1e-5)
    close(train(make, 6, chunk=1), train(make, 6, chunk=6), rtol=1e-4, atol=1e-5)


CONDITIONED = [
    draft, draft_k, draft_lv, draft_masked, refl_stopped, alignprop, alignprop_subset, draft_plus, drtune_budget, drakes,
    drakes_score_function, drakes_log_variance, drakes_published, ddpo, dpok, reward_weighted, filtered,
    adjoint_matching,
]  # fmt: skip


@table_of(CONDITIONED, drakes)
def test_every_network_call_gets_the_condition(make, monkeypatch):
    """One prompt in every row is the same run as networks that have the prompt built in: chains, references, values, data."""
    prompt = 0.7
    tuner, params = make()
    step = lambda cond: jax.jit(lambda key, state: tuner.step(key, state, cond))(jax.random.key(0), tuner.init(params))  # noqa: E731
    given, without = step(jnp.full(B, prompt)), step(None)
    plain = Net.__call__

    def built_in(self, x, t, cond=None):
        return plain(self, x, t, jnp.full(x.shape[0], prompt))

    monkeypatch.setattr(Net, "__call__", built_in)
    known = step(None)
    close(given[0].params, known[0].params, rtol=1e-4, atol=1e-5)
    close(given[1], known[1], rtol=1e-4, atol=1e-5)
    assert not np.allclose(given[1]["reward"], without[1]["reward"], rtol=1e-3)


@table_of([draft_k, draft_lv, draft_masked, adjoint_matching], draft_k, draft_lv, draft_masked)
def test_tuner_counts_its_network_calls(make):
    tuner, params = make()
    counting = dataclasses.replace(tuner, model=Function(_rows_model))
    loss = jax.jit(lambda p, k: counting.loss(p, k)[0])
    loss(params, jax.random.key(0)).block_until_ready()
    jax.effects_barrier()
    ROWS.clear()
    loss(params, jax.random.key(1)).block_until_ready()
    jax.effects_barrier()
    assert sum(ROWS) / B == tuner.network_calls()


def _rows_model(params):
    return Net(params, True)


@pytest.mark.first(2)
@each_tuner
def test_tuner_leaves_the_callers_parameters_alone(make):
    """`fit` donates its state, never what `init` was given."""
    tuner, params = make()
    before = jax.tree.map(np.array, params)
    train(make, 3, state=tuner.init(params), chunk=3)
    equal(params, before)


def test_steps_without_finite_gradients_are_skipped_and_counted():
    """A NaN gradient changes neither parameters, optimiser state nor average; the count goes up and training goes on."""
    process = gaussian()
    tuner = tuners.pretraining(gaussian_model, process, ADAM, ema_decay=0.9)
    state = tuner.init(net(2, 2))
    good, bad = {"x0": jnp.ones((B, 2))}, {"x0": jnp.full((B, 2), jnp.nan)}
    state, _ = tuner.step(jax.random.key(0), state, good)
    after, info = jax.jit(tuner.step)(jax.random.key(1), state, bad)
    equal((after.params, after.opt_state, after.average), (state.params, state.opt_state, state.average))
    assert int(after.skipped) == int(info["skipped"]) == 1 and int(after.step) == 2
    again, info = tuner.step(jax.random.key(2), after, good)
    assert int(info["skipped"]) == 1 and np.abs(again.params - after.params).max() > 0


def test_infeasible_rewards_are_left_out_and_counted():
    process = gaussian()
    reward = lambda x0, cond=None: jnp.where(x0[:, 0] > 0, x0[:, 1], jnp.nan)  # noqa: E731
    tuner = tuners.draft(gaussian_model, process, reward, process.times(3), ADAM, batch=64)
    params, key = net(2, 2), jax.random.key(0)
    loss, info = tuner.loss(params, key)
    x0 = samplers.sample(samplers.ancestral(process, Net(params)), jax.random.split(key)[0], 64, process.times(3)).x0
    ok = np.asarray(x0[:, 0] > 0)
    assert int(info["infeasible"]) == (~ok).sum() > 0
    np.testing.assert_allclose(-loss, np.asarray(x0[:, 1])[ok].mean(), rtol=1e-5)
    state, info = tuner.step(key, tuner.init(params))
    assert int(info["skipped"]) == 0 and np.all(np.isfinite(state.params))
    never = lambda x0, cond=None: jnp.full(x0.shape[0], jnp.nan)  # noqa: E731
    tuner = tuners.draft(gaussian_model, process, never, process.times(3), ADAM, batch=4)
    state, info = tuner.step(key, tuner.init(params))
    assert int(info["skipped"]) == 1 and int(info["infeasible"]) == 4 and np.isnan(info["reward"])
    equal(state.params, params)


def test_tracers_do_not_outlive_a_step():
    """Models that return closures over their parameters leak nothing."""
    process = gaussian()
    model = lambda params: lambda x, t, cond=None: jnp.tanh(x @ params)  # noqa: E731
    tuner = tuners.draft_k(model, process, gaussian_reward, process.times(3), ADAM, k=1, batch=4)
    with jax.checking_leaks():
        jax.jit(tuner.step)(jax.random.key(0), tuner.init(net(2, 2)))


def test_worlds_run_on_eight_devices_too():
    """The exact worlds of the law tests, sharded: the same tokens."""
    world = factorised()
    sampler = samplers.ancestral(world.process, world.denoiser)
    one = samplers.sample(sampler, jax.random.key(0), 64, world.times).x0
    equal(samplers.sample(sampler, jax.random.key(0), 64, world.times, mesh=data_mesh()).x0, one)
    world = GaussianWorld([0.5], [[0.6]])
    sampler = samplers.ancestral(world.process, world.denoiser)
    one = samplers.sample(sampler, jax.random.key(0), 64, world.times).x0
    close(samplers.sample(sampler, jax.random.key(0), 64, world.times, mesh=data_mesh()).x0, one)
