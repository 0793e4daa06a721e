"""Graphs of several sizes as states: packing, masks in kernels, and that absent entries are no part of any law."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgdiff import checks, graphs, kernels, processes, samplers, schedules

N, F = 4, 2


def process(sizes=(2, 3, 3, 4), **options):
    nodes = processes.gaussian(schedules.linear_vp(0.1, 1.0), (N, F), **options)
    edges = processes.gaussian(schedules.geometric_ve(0.2, 1.0), (6,), **options)
    return graphs.process(nodes, edges, sizes)


def some(batch=5):
    law = process()
    return law, jax.jit(law.prior(batch).sample)(jax.random.key(1))


def zero(x, t, cond=None):
    return {"nodes": jnp.zeros_like(x["nodes"]), "edges": jnp.zeros_like(x["edges"])}


def test_packing_is_undone_and_adjacencies_are_symmetric():
    _, x = some()
    packed = graphs.packed(x)
    adjacency = packed[..., F:-1]
    assert packed.shape == (5, N, F + N + 1)
    np.testing.assert_array_equal(adjacency, adjacency.swapaxes(1, 2))
    for name, leaf in graphs.unpacked(packed).items():
        np.testing.assert_array_equal(leaf, x[name])


def test_sizes_have_the_frequencies_of_the_data():
    sizes = process().prior(20_000).sample(jax.random.key(0))["mask"].sum(-1)
    np.testing.assert_allclose(
        np.bincount(sizes.astype(int), minlength=5) / 20_000, [0, 0, 0.25, 0.5, 0.25], atol=0.015
    )


def test_a_masked_kernel_is_the_kernel_of_the_entries_that_there_are():
    law, x = some()
    t, s = jnp.float32(0.8), jnp.float32(0.5)
    ours, theirs = law.reverse(x, t, s, zero(x, t)), law.reverse(x, t, s, jax.tree.map(jnp.ones_like, zero(x, t)))
    y = ours.sample(jax.random.key(2))
    where = graphs.there(x["mask"])
    log_prob, kl, entropy = 0.0, 0.0, 0.0
    for name, part in law.parts.items():
        std = float(ours.parts[name].std)
        keep = np.broadcast_to(where[name], y[name].shape).reshape(5, -1)
        flat = lambda leaf, keep=keep: np.where(keep, np.asarray(leaf, float).reshape(5, -1), 0)  # noqa: E731
        mean, other = flat(ours.parts[name].mean), flat(theirs.parts[name].mean)
        count = keep.sum(-1)
        log_prob += -0.5 * ((flat(y[name]) - mean) ** 2).sum(-1) / std**2 - count * np.log(std * np.sqrt(2 * np.pi))
        kl += 0.5 * ((mean - other) ** 2).sum(-1) / std**2
        entropy += count * np.log(std * np.sqrt(2 * np.pi * np.e))
        assert not np.asarray(y[name]).reshape(5, -1)[~keep].any()
        assert part.stochastic
    np.testing.assert_allclose(ours.log_prob(y), log_prob, rtol=1e-4)
    np.testing.assert_allclose(ours.kl(theirs), kl, rtol=1e-4)
    np.testing.assert_allclose(ours.entropy(), entropy, rtol=1e-4)
    assert ours.log_prob(y | {"mask": jnp.ones_like(y["mask"])})[0] == -jnp.inf or x["mask"][0].all()


@pytest.mark.slow
def test_what_a_denoiser_says_of_absent_entries_is_not_looked_at():
    law, x = some()
    where = graphs.there(x["mask"])
    wild = {name: jnp.where(where[name], leaf, 1e9) for name, leaf in zero(x, 1.0).items()}
    a, b = (
        law.reverse(x, jnp.float32(0.8), jnp.float32(0.5), p).sample(jax.random.key(0)) for p in (wild, zero(x, 1.0))
    )
    jax.tree.map(np.testing.assert_array_equal, a, b)
    np.testing.assert_array_equal(law.mean(x, 0.5, wild), law.mean(x, 0.5, zero(x, 1.0)))


@pytest.mark.slow
def test_the_prior_knows_its_log_probability():
    law, x = some(3)
    count = np.asarray(x["mask"].sum(-1), int)
    numbers = count * F + count * (count - 1) // 2
    squares = sum(np.asarray(x[name]).reshape(3, -1).__pow__(2).sum(-1) for name in ("nodes", "edges"))
    expected = np.log(np.array([0.25, 0.5, 0.25])[count - 2]) - 0.5 * squares - 0.5 * numbers * np.log(2 * np.pi)
    np.testing.assert_allclose(law.prior(3).log_prob(x), expected, rtol=1e-4)


@pytest.mark.slow
def test_chains_end_in_packed_graphs_and_have_a_path_kl():
    law = process()
    one = lambda x, t, cond=None: jax.tree.map(jnp.ones_like, zero(x, t))  # noqa: E731
    sampler = samplers.ancestral(law, one, reference=zero)
    out = samplers.sample(sampler, jax.random.key(0), 6, law.times(5), keep=samplers.path_kl)
    mask = np.asarray(out.x0[..., -1])
    np.testing.assert_array_equal(out.x0[..., :F], np.broadcast_to(mask[..., None], (6, N, F)))
    kl, size = np.asarray(samplers.total_path_kl(out)), mask.sum(-1)
    assert kl[size == size.max()].min() > kl[size == size.min()].max() or size.max() == size.min()


def test_data_are_checked_and_noised_with_their_masks():
    law, x = some()
    data = graphs.packed(x)
    checks.examples("data", data, law)
    noised = law.forward(data, jnp.float32(0.5)).sample(jax.random.key(0))
    np.testing.assert_array_equal(noised["mask"], x["mask"])


@pytest.mark.slow
def test_points_stay_masked():
    law, x = process(eta=0.0), some()[1]
    kernel = law.reverse(x, jnp.float32(0.8), jnp.float32(0.5), zero(x, 0.8))
    assert isinstance(kernel.parts["nodes"], kernels.PointMass)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"nodes": processes.masked(schedules.log_linear_mask(), 4, 2)}, "nodes must be a Gaussian process"),
        ({"nodes": processes.gaussian(schedules.linear_vp(), (4,))}, r"nodes are states \[N, F\]"),
        ({"edges": processes.gaussian(schedules.linear_vp(), (5,))}, r"edges of 4 nodes are states \[6\]"),
        ({"sizes": [5]}, "numbers of nodes in 1 ... 4"),
        ({"sizes": []}, "at least one"),
    ],
)
def test_what_does_not_fit_is_refused(change, said):
    parts = {**process().parts, "sizes": [3]}
    with pytest.raises(ValueError, match=said):
        graphs.process(**(parts | change))


def test_a_geometric_schedule_is_the_limit_of_karras():
    ours, theirs = schedules.geometric_ve(0.2, 1.0), schedules.karras_ve(0.2, 1.0, 2000.0)
    t = jnp.linspace(0, 1, 5)
    np.testing.assert_allclose(ours.sigma(t), 0.2 * 5**t, rtol=1e-5)
    np.testing.assert_allclose(ours.sigma(t), theirs.sigma(t), rtol=2e-2)
    np.testing.assert_allclose(ours.log_snr(t), -2 * np.log(ours.sigma(t)), atol=1e-5)
    with pytest.raises(ValueError, match="below sigma_max"):
        schedules.geometric_ve(1.0, 1.0)


@pytest.mark.first(1)
@pytest.mark.parametrize("rows", [2, 3])
def test_graphs_by_size_have_the_same_results_and_gradients(rows):
    """In any order of sizes; what is left out of a small graph is nothing that it reads."""
    rng = np.random.default_rng(0)
    size, nodes = np.array([5, 2, 3, 5, 1, 4, 2]), 5
    mask = (np.arange(nodes) < size[:, None]).astype(np.float32)
    x = {"nodes": rng.normal(size=(7, nodes, 2)), "edges": rng.normal(size=(7, 10)), "mask": mask}
    x = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in x.items()}
    where = graphs.there(x["mask"])
    seen = []

    def function(x):
        where = graphs.there(x["mask"])
        edges = jnp.where(where["edges"], x["edges"], 0.0)
        near = graphs.matrix(edges, x["mask"].shape[1]) @ jnp.where(where["nodes"], x["nodes"], 0.0)
        seen.append(near.shape)
        return {"nodes": near**2, "edges": graphs.triangle(jnp.einsum("bnf,bmf->bnm", near, near)) * edges}

    sized = graphs.by_size(function, (2, 3, 5), rows)
    clean = lambda out: {name: jnp.where(where[name], out[name], 0.0) for name in out}  # noqa: E731
    for ours, plain in zip(*(jax.tree.leaves(clean(f(x))) for f in (sized, function)), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6)
    assert {shape[1] for shape in seen} == {2, 3, 5}
    loss = lambda f: lambda e: sum(jnp.sum(leaf) for leaf in clean(f(x | {"edges": e})).values())  # noqa: E731
    gradient = jax.grad(loss(function))(x["edges"])
    assert np.abs(gradient).max() > 0.1
    np.testing.assert_allclose(jax.grad(loss(sized))(x["edges"]), gradient, rtol=1e-4, atol=1e-5)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="numbers of nodes that increase"):
        graphs.by_size(lambda x: x, (3, 2))
    with pytest.raises(ValueError, match="the last width must be the graphs' 3 nodes, got 2"):
        graphs.by_size(lambda x: x, (2,))(graphs.unpacked(jnp.zeros((1, 3, 5))))
