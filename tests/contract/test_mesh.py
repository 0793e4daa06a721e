"""One table over every public sampler and tuner on 8 simulated devices: the numbers of one, an eighth of the work, few collectives."""

from __future__ import annotations

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rgdiff import denoisers, processes, samplers, schedules, shards, tuners
from rgdiff.runtime import planning
from rgdiff.runtime.mesh import data_mesh, device_mesh, shard_params
from rgdiff.samplers._loop import _whole
from rgdiff.tuners._loop import _advance, layout_of, spread_out
from tests.contract import test_contract as contract

ROWS = 64
WIDE = jnp.cos(jnp.arange(4 * 512.0).reshape(4, 512))
SHARE = 0.20  # of one device's floating-point operations


def collectives(program: str) -> dict[str, int]:
    """Count the collectives of a compiled program by kind: those in a loop apart, and of them those in a branch."""
    where = lambda looped, branched: " in a loop" * looped + " in a branch" * branched  # noqa: E731
    return {kind + where(*at): count for (kind, *at), count in planning.places(program).items()}


def test_collectives_are_counted_where_they_are():
    """The counter can count: sums over devices outside of loops, inside, and in a branch inside."""
    mesh = data_mesh()
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def run(x):
        def step(total, turn):
            total = jax.lax.cond(turn > 2, lambda: total + jnp.sum(x**3 + total), lambda: total)
            return total * jnp.mean(x * total), None

        return x.sum(), jax.lax.scan(step, jnp.float32(1), jnp.arange(4))[0]

    x = jax.device_put(jnp.arange(16.0), rows)
    found = collectives(jax.jit(run).lower(x).compile().as_text())
    assert found == {"all-reduce": 1, "all-reduce in a loop": 1, "all-reduce in a loop in a branch": 1}
    assert not collectives(jax.jit(lambda x: x + 1).lower(x).compile().as_text())


@pytest.fixture
def wide(monkeypatch):
    """The contract's methods with batches of 64 and networks that outweigh what is computed on every device."""
    more = lambda h: h + 0.01 * jnp.tanh(h @ WIDE[: h.shape[-1]]) @ WIDE[: h.shape[-1]].T  # noqa: E731
    net, value = contract.Net.__call__, contract._value
    monkeypatch.setattr(contract, "B", ROWS)
    monkeypatch.setattr(contract.Net, "__call__", lambda self, x, t, cond=None: more(net(self, x, t, cond)))
    monkeypatch.setattr(contract, "_value", lambda p, x, t, cond=None: value(p, x, t) + 0.1 * more(x @ p).sum(-1))


# Where particles of one problem, or the samples of a batch, compete, devices exchange values [N] at every move, and states only where
# some are replaced: at moves that resample (in a branch).
MOVES = {"all-gather in a loop": 3, "all-gather in a loop in a branch": 5}
EXCHANGES = {
    "smc_gaussian": {"all-gather in a loop": 2, "all-gather in a loop in a branch": 6, "all-gather": 2},
    "smc_masked": MOVES,
    "smc_islands": {"all-reduce in a loop": 5, "all-reduce": 12},  # sums of weights; no state leaves its island
    "fk_steering_smc": MOVES | {"all-gather in a loop": 2},
    "tds_smc": MOVES,
    "das_smc": MOVES,
    "resampled_smc": MOVES | {"all-reduce": 1},  # the samples that are kept
    "svdd_distinct": {"all-gather in a loop": 4},  # replace > 0
}
ROUNDED = {
    "svdd_pm_gaussian",
    "smc_gaussian",
    "smc_masked",
    "tds_smc",
    "resampled_smc",
}  # tanh of other vectors, other last bits
WEIGHED = {"das_smc"}  # states are equal, and the last bits of weights and of their sums are not

# Collectives of one step. The gradient of a network, with the sums of the report, is one all-reduce, outside of all loops: in a loop
# there are those of updates that are made in a loop themselves (minibatches, a critic's steps, T values, an inner tuning).
# The others are statistics of a batch that the gradient needs first: counts of feasible samples, baselines, spreads.
UPDATES = {"all-reduce in a loop": 1}
GRADIENTS = {
    "value_regression": {"all-reduce": 2},
    "value_soft_rollouts": {"all-reduce": 3},
    "value_temporal_difference": {"all-reduce": 3},
    "elegant_value": {"all-reduce": 3},
    "refl_stopped": {"all-reduce in a branch": 1},
    "drakes_score_function": {"all-reduce": 2},
    "drakes_log_variance": {"all-reduce": 2},
    "ddpo": UPDATES | {"all-reduce": 6},
    "dpok": UPDATES | {"all-reduce": 3},
    "reward_weighted": {"all-reduce": 5},
    "filtered": {"all-reduce": 3, "all-gather": 1},  # of rewards, which are ranked
    "sft_pg": UPDATES | {"all-reduce": 5},
    "gradient_guidance": {"all-reduce in a loop in a branch": 1, "all-reduce": 2},
    "dxdp": UPDATES | {"all-reduce": 2},
    "dxmi": UPDATES | {"all-reduce": 2},  # energy and policy; values in the loop
    "dxmi_released": UPDATES | {"all-reduce": 2},
    "gcd": {"all-reduce": 2},  # energy and policy
    "seiko_rounds": UPDATES | {"all-reduce": 3, "all-gather": 4},  # queries and answers, from which every device learns
    "seiko_steered": {"all-reduce": 3, "all-gather": 4, "all-gather in a branch": 1},
}


def test_the_tables_name_rows():
    assert {*EXCHANGES, *ROUNDED, *WEIGHED} <= {make.__name__ for make in contract.SAMPLERS}
    assert set(GRADIENTS) <= {make.__name__ for make in contract.TUNERS}


@pytest.mark.usefixtures("wide")
@contract.table_of(contract.SAMPLERS, contract.smc_masked)
def test_sampler_on_eight_devices(make):
    sampler, parts = make(), shards.shards_of(data_mesh())
    key, times = jax.random.key(0), sampler.process.times(contract.STEPS)
    one = _whole.lower(sampler, key, times, None, ROWS, contract.keep_state, None).compile()
    split = shards.on_mesh(sampler, parts)
    eight = _whole.lower(split, key, times, None, ROWS, contract.keep_state, parts).compile()
    alone, together = one(sampler, key, times, None), eight(split, key, times, None)
    if make.__name__ in ROUNDED:
        contract.close(alone, together, rtol=1e-6, atol=1e-6)
    elif make.__name__ in WEIGHED:
        contract.equal(alone[:2], together[:2])
        contract.close(alone[2], together[2], rtol=1e-6, atol=1e-6)
    else:
        contract.equal(alone, together)
    assert eight.cost_analysis()["flops"] <= SHARE * one.cost_analysis()["flops"]
    assert collectives(eight.as_text()) == EXCHANGES.get(make.__name__, {})


DENOISERS = {
    "predicts": lambda inner: denoisers.predicts("eps", inner, schedules.linear_vp()),
    "conditioned": lambda inner: denoisers.conditioned(inner, 0.5),
    "classifier_free": lambda inner: denoisers.classifier_free(inner, 3.0, null=0.0),
    "annealed": lambda inner: denoisers.annealed(inner, lambda x, t, cond=None: inner(-x, t, cond), 2.0),
    "clip_x0": lambda inner: denoisers.clip_x0(inner),
    "dynamic_threshold": lambda inner: denoisers.dynamic_threshold(inner),
    "edm_preconditioned": lambda inner: denoisers.edm_preconditioned(inner, schedules.linear_vp()),
    "discrete_time": lambda inner: denoisers.discrete_time(inner, 1000),
}


def test_no_wrapper_of_denoisers_is_missing():
    functions = {name: inspect.signature(f) for name, f in inspect.getmembers(denoisers, inspect.isfunction)}
    wrap = {name for name, of in functions.items() if of.return_annotation == "Denoiser" and not name.startswith("_")}
    assert wrap == set(DENOISERS)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("name", DENOISERS)
def test_denoisers_of_denoisers_move_no_rows(name):
    """Conditional chains of every wrapper: the numbers of one device, and no collective."""
    parts, cond = shards.shards_of(data_mesh()), None if name == "conditioned" else jnp.cos(jnp.arange(float(ROWS)))
    sampler = samplers.ancestral(contract.gaussian(1.0), DENOISERS[name](contract.Net(contract.net(2, 2))))
    key, times = jax.random.key(0), sampler.process.times(contract.STEPS)
    one = _whole.lower(sampler, key, times, cond, ROWS, contract.keep_state, None).compile()
    split, rows = shards.on_mesh(sampler, parts), shards.placed(cond, parts, rows=True)
    eight = _whole.lower(split, key, times, rows, ROWS, contract.keep_state, parts).compile()
    alone, together = one(sampler, key, times, cond), eight(split, key, times, rows)
    if name == "classifier_free":  # tanh of other vectors, other last bits
        contract.close(alone, together, rtol=1e-6, atol=1e-6)
    else:
        contract.equal(alone, together)
    assert eight.cost_analysis()["flops"] <= SHARE * one.cost_analysis()["flops"]
    assert collectives(eight.as_text()) == {}


@pytest.mark.first(1)
@pytest.mark.usefixtures("wide")
@contract.table_of(contract.TUNERS, contract.draft_k, contract.ddpo)
def test_tuner_on_eight_devices(make):
    parts, (tuner, params) = shards.shards_of(data_mesh()), make()
    data = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf])[:96], contract.data_of(make))
    key, state, batch = jax.random.key(0), tuner.init(params), None if data is None else ROWS
    copy = lambda: jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)  # noqa: E731 - steps take their state's buffers
    one = _advance.lower(tuner, key, state, data, 1, batch, None, None).compile()
    given = spread_out(tuner, copy(), data, batch, parts)
    layout = layout_of(given[1], parts)
    eight = _advance.lower(given[0], key, *given[1:], 1, batch, parts, layout).compile()
    alone, together = one(tuner, key, copy(), data), eight(given[0], key, *given[1:])
    contract.close(alone, together, rtol=1e-5, atol=1e-5)
    assert layout_of(together[0], parts) == layout
    assert eight.cost_analysis()["flops"] <= SHARE * one.cost_analysis()["flops"]
    assert collectives(eight.as_text()) == GRADIENTS.get(make.__name__, {"all-reduce": 1})


def linear(params):
    return lambda x, t, cond=None: jnp.tanh(x @ params["a"]) @ params["b"] + params["c"]


def wide_tuner():
    """A tuner of a network that is worth splitting, and its parameters."""
    process = processes.gaussian(schedules.cosine_vp(), (4,))
    key = jax.random.key(0)
    params = {
        "a": 0.1 * jax.random.normal(key, (4, 8192)),
        "b": 0.01 * jax.random.normal(key, (8192, 4)),
        "c": jnp.ones(4),
    }
    reward = lambda x, cond=None: -jnp.sum(x**2, -1)  # noqa: E731
    return tuners.draft_k(linear, process, reward, process.times(4), optax.sgd(1e-4), k=2, batch=8), params


@pytest.mark.slow
def test_parameters_and_batches_split_over_axes_of_any_names():
    """Parameters over fsdp and tensor stay where they are; axes of other names are named; the numbers are those of one device."""
    tuner, params = wide_tuner()
    fit = lambda params, mesh: tuners.fit(tuner, jax.random.key(1), tuner.init(params), 3, mesh=mesh)  # noqa: E731
    alone, mesh = fit(params, None).params, device_mesh(data=2, fsdp=2, tensor=2)
    split = shard_params(params, mesh)
    specs = {"a": PartitionSpec("tensor", "fsdp"), "b": PartitionSpec("fsdp", "tensor"), "c": PartitionSpec()}
    assert {name: leaf.sharding.spec for name, leaf in split.items()} == specs
    tuned = fit(split, mesh).params
    assert {name: leaf.sharding.spec for name, leaf in tuned.items()} == specs
    contract.close(tuned, alone, rtol=1e-5, atol=1e-6)
    named = shard_params(params, mesh, lambda name, shape: PartitionSpec("tensor") if name == "c" else None)
    assert named["c"].sharding.spec == PartitionSpec("tensor")
    other = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    contract.close(fit(params, NamedSharding(other, PartitionSpec(("x", "y")))).params, alone, rtol=1e-5, atol=1e-6)


def test_what_is_wrong_with_a_mesh_is_one_line():
    tuner, params = wide_tuner()
    fit = lambda mesh: tuners.fit(tuner, jax.random.key(1), tuner.init(params), 1, mesh=mesh)  # noqa: E731
    auto = (AxisType.Auto,) * 2
    two = jax.make_mesh((4, 2), ("x", "y"), axis_types=auto)
    explicit = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    for mesh, said in (
        (two, 'none named "data"; say which split the batch'),
        (explicit, "axes must be of type Auto: runtime.mesh.data_mesh"),
        ("data", "mesh must be a jax.sharding.Mesh"),
        (NamedSharding(two, PartitionSpec(None, "x")), "splits the leading axis alone"),
    ):
        with pytest.raises(ValueError, match=said):
            fit(mesh)
    with pytest.raises(ValueError, match="the tuner's batch must be a multiple of the 8 devices that split it, got 12"):
        odd = dataclasses.replace(tuner, batch=12)
        tuners.fit(odd, jax.random.key(1), odd.init(params), 1, mesh=data_mesh())
    training = tuners.pretraining(linear, tuner.process, optax.sgd(1e-4))
    with pytest.raises(ValueError, match="batch must be a multiple of the 8 devices that split it, got 12"):
        data = {"x0": jnp.ones((16, 4))}
        tuners.fit(training, jax.random.key(1), training.init(params), 1, data=data, batch=12, mesh=data_mesh())
    process, sampler = tuner.process, samplers.ancestral(tuner.process, linear(params))
    with pytest.raises(ValueError, match="batch must be a multiple of the 8 devices that split it, got 6"):
        samplers.sample(sampler, jax.random.key(0), 6, process.times(3), mesh=data_mesh())
    with pytest.raises(
        ValueError, match="mesh.dcn_data=1 x mesh.data=-1 x mesh.fsdp=3 x mesh.tensor=1 is not of the 8 devices"
    ):
        device_mesh(fsdp=3)


def test_rows_are_drawn_alike_from_equal_parts():
    """Each row is as probable as any other, also where parts are no whole rows, and each device draws from its own."""
    draw = jax.jit(jax.vmap(lambda key: shards.strata(key, 8, 20)))
    rows = np.asarray(draw(jax.random.split(jax.random.key(0), 20_000)))
    share = np.bincount(rows.reshape(-1), minlength=20) / rows.size
    assert np.abs(share - 1 / 20).max() < 5 * np.sqrt(1 / 20 / rows.size)
    assert (rows.reshape(-1, 4, 2) // 5 == np.arange(4)[:, None]).all()  # 4 devices have 5 rows and 2 draws each
    more = np.asarray(shards.strata(jax.random.key(1), 50, 7))  # more draws than rows
    assert more.min() == 0 and more.max() == 6 and (np.diff(more) >= 0).all()


def test_a_host_reward_is_asked_by_the_rows_of_every_device():
    """`fit_online` over a mesh is the same run, and the black box sees all rows in order."""
    process = contract.gaussian()
    method = tuners.ddpo(contract.gaussian_model, process, process.times(3), optax.sgd(1e-2), batch=16)
    seen: list[np.ndarray] = []

    def height(x0, cond):
        seen.append(x0)
        return x0[:, 1]

    fit = lambda mesh: tuners.fit_online(  # noqa: E731
        method, jax.random.key(0), method.init(contract.net(2, 2)), 2, height, mesh=mesh
    )
    alone, together = fit(None), fit(data_mesh())
    contract.close(together.params, alone.params)
    contract.close(seen[2:], seen[:2])
