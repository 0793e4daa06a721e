"""The reference networks and the convolution under them."""

from __future__ import annotations

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from rgdiff import graphs
from rgdiff.domains.molecules import chemistry
from rgdiff.nets import MLP, ConvNet1D, DiT, GraphNet, Transformer, UNet, ValueMLP, ValueResNet, time_features
from rgdiff.nets.conv import conv
from rgdiff.nets.transformer import rotary
from rgdiff.tuners import ema_update

KEY = jax.random.key(0)


def normal(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)


def reference(x, w, stride, dilation, padding):
    axes = "HW"[: x.ndim - 2]
    n = x.ndim - 2
    labels = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    return lax.conv_general_dilated(
        x, w, (stride,) * n, padding, rhs_dilation=(dilation,) * n, dimension_numbers=labels
    )


def close(a, b, tolerance=2e-6):
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert u.shape == v.shape and u.dtype == v.dtype
        assert np.max(np.abs(u - v)) <= tolerance * np.max(np.abs(v))


CASES = [
    # spatial, kernel, stride, dilation, padding
    ((8, 8), (3, 3), 1, 1, "SAME"),
    ((8, 8), (3, 3), 2, 1, ((1, 1), (1, 1))),
    ((7, 9), (3, 3), 2, 1, "SAME"),
    ((9, 8), (2, 4), 1, 1, "SAME"),
    ((9, 8), (2, 4), 2, 1, ((1, 2), (0, 1))),
    ((8, 8), (1, 1), 2, 1, ((0, 0), (0, 0))),
    ((6, 6), (1, 1), 1, 1, ((1, 1), (2, 0))),
    ((12, 11), (3, 3), 2, 4, ((4, 4), (4, 4))),
    ((12, 11), (3, 3), 1, 4, "VALID"),
    ((10, 10), (3, 3), 3, 2, ((-1, 5), (2, 2))),
    ((50,), (9,), 1, 1, "SAME"),
    ((50,), (9,), 1, 4, "SAME"),
    ((50,), (9,), 2, 4, "SAME"),
    ((50,), (9,), 1, 16, "SAME"),
    ((50,), (9,), 1, 64, "SAME"),
    ((5, 40), (3, 9), 1, 16, ((20, 20), (60, 70))),
    ((50,), (1,), 1, 1, "SAME"),
    ((51,), (4,), 2, 3, ((3, 1),)),
]


@pytest.mark.parametrize("case", CASES)
def test_conv_values_and_gradients_are_those_of_lax(case):
    spatial, window, stride, dilation, padding = case
    x, w = normal(3, *spatial, 5), normal(*window, 5, 4)
    y_ref = jax.eval_shape(lambda x, w: reference(x, w, stride, dilation, padding), x, w)
    dy = normal(*y_ref.shape)

    @jax.jit
    def both(x, w, dy):
        y, pull = jax.vjp(lambda x, w: conv(x, w, stride=stride, dilation=dilation, padding=padding), x, w)
        y_ref, pull_ref = jax.vjp(lambda x, w: reference(x, w, stride, dilation, padding), x, w)
        return (y, *pull(dy)), (y_ref, *pull_ref(dy))

    close(*both(x, w, dy))


def chain_loss(op, x, w):
    """A scan of rematerialised convolutions, so that both gradients pass through the loop."""

    @jax.checkpoint
    def body(h, _):
        return jnp.tanh(op(h, w)), None

    return jnp.sum(lax.scan(body, x, None, length=3)[0] ** 2)


def test_conv_in_scan_checkpoint_jit_and_vmap():
    x = jax.random.normal(KEY, (2, 6, 6, 4))
    w = 0.3 * jax.random.normal(KEY, (3, 3, 4, 4))
    ours = jax.grad(lambda x, w: chain_loss(conv, x, w), (0, 1))
    theirs = jax.grad(lambda x, w: chain_loss(lambda x, w: reference(x, w, 1, 1, "SAME"), x, w), (0, 1))
    ours, theirs = jax.jit(ours), jax.jit(theirs)
    close(ours(x, w), theirs(x, w), 1e-5)
    xs, ws = jnp.stack([x, 2 * x, -x]), jnp.stack([w, w, 0.5 * w])
    loop = jax.tree.map(lambda *a: jnp.stack(a), *[theirs(x, w) for x, w in zip(xs, ws, strict=True)])
    close(jax.vmap(ours)(xs, ws), loop, 1e-5)
    total = jax.grad(lambda w: jnp.sum(jax.vmap(lambda x: chain_loss(conv, x, w))(xs)))(w)
    close(total, sum(theirs(x, w)[1] for x in xs), 1e-5)


def test_conv_second_order():
    x = jax.random.normal(KEY, (2, 7, 7, 3))
    w = jax.random.normal(KEY, (3, 3, 3, 3))

    def penalty(op, w):
        return jnp.sum(jax.grad(lambda x: jnp.sum(jnp.sin(op(x, w))))(x) ** 2)

    ours = jax.jit(jax.grad(lambda w: penalty(lambda x, w: conv(x, w, stride=2), w)))(w)
    theirs = jax.jit(jax.grad(lambda w: penalty(lambda x, w: reference(x, w, 2, 1, "SAME"), w)))(w)
    close(ours, theirs, 1e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the canonical layout matters on XLA:CPU")
@pytest.mark.parametrize("shape, window", [((4, 8, 8, 16), (3, 3)), ((4, 32, 16), (9,))])
def test_gradients_in_a_scan_compile_to_canonical_convolutions(shape, window):
    x, w = jnp.ones(shape), jnp.ones((*window, 16, 16))
    grad = jax.jit(jax.grad(lambda x, w: chain_loss(conv, x, w), (0, 1)))
    labels = re.findall(r"dim_labels=([\w>-]+)", grad.lower(x, w).compile().as_text() or "")
    axes = "01"[: len(window)]
    assert len(labels) >= 3  # forward, input gradient, kernel gradient
    assert set(labels) == {f"b{axes}f_{axes}io->b{axes}f"}


@pytest.mark.parametrize(
    "call",
    [
        lambda: conv(jnp.ones((2, 8, 3)), jnp.ones((3, 4, 5))),
        lambda: conv(jnp.ones((2, 8, 3)), jnp.ones((3, 3, 5)), stride=0),
        lambda: conv(jnp.ones((2, 8, 3)), jnp.ones((3, 3, 5)), padding=((1, 1), (1, 1))),
    ],
)
def test_conv_refuses(call):
    with pytest.raises(ValueError, match="got"):
        call()


def onehot(batch, length, tokens):
    return jax.nn.one_hot(jax.random.randint(KEY, (batch, length), 0, tokens + 1), tokens + 1)


SMALL = {"channels": (8, 16), "attention": (1,)}
NETS = {
    "unet": (lambda **k: UNet(**SMALL, out_channels=2, **k), normal(3, 4, 6, 1), (3, 4, 6, 2)),
    "mlp": (lambda **k: MLP((16, 8), **k), jax.random.normal(KEY, (3, 5)), (3, 5)),
    "mlp_shape": (lambda **k: MLP((16,), out=(4, 2), **k), onehot(3, 4, 2), (3, 4, 2)),
    "value": (lambda **k: ValueMLP((16,), **k), jax.random.normal(KEY, (3, 4, 2)), (3,)),
    "value_resnet": (lambda **k: ValueResNet((8, 16), **k), normal(3, 8, 4, 2), (3,)),
    "graph": (lambda **k: GraphNet(16, 2, **k), jnp.abs(jax.random.normal(KEY, (3, 4, 7))), (3,)),
    "conv1d": (
        lambda **k: ConvNet1D(4, width=16, dilations=(1, 4), time_conditioning=True, **k),
        onehot(3, 12, 4),
        (3, 12, 4),
    ),
    "transformer": (
        lambda **k: Transformer(4, width=16, depth=1, heads=2, **k),
        onehot(3, 10, 4),
        (3, 10, 4),
    ),
    "dit": (
        lambda **k: DiT(width=16, depth=1, heads=2, **k),
        jax.random.normal(KEY, (3, 8, 4, 2)),
        (3, 8, 4, 2),
    ),
}
LAST = {
    "unet": ("conv_out",),
    "mlp": ("out",),
    "mlp_shape": ("out",),
    "value": ("mlp", "out"),
    "value_resnet": ("out",),
    "graph": ("out",),
    "conv1d": ("out",),
    "transformer": ("trunk", "out"),
    "dit": ("trunk", "out"),
}
T = jnp.array([0.1, 0.5, 0.9])


def randomised(net, x):
    """Random parameters everywhere, so that zero-initialised layers hide nothing."""
    shapes, rng = jax.eval_shape(net.init, KEY, x, 0.5)["params"], np.random.default_rng(0)

    def draw(p):
        scale = 0.2 if len(p.shape) < 2 else 1 / np.sqrt(np.prod(p.shape[:-1]))
        return jnp.asarray(scale * rng.standard_normal(p.shape), jnp.float32)

    return jax.tree.map(draw, shapes)


fast_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)  # compiles in half the time


def run(net, params, x, t, cond=None):
    return jax.jit(net.apply)({"params": params}, x, t, cond)


@pytest.mark.first(3)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ("unet", "dit", "graph"))) for n in NETS]
)
def test_net_contract(name):
    build, x, shape = NETS[name]
    net = build(classes=3)
    labels = jnp.array([0, 1, 2])
    params = randomised(net, x)
    apply = fast_jit(lambda p, x, t, c: net.apply({"params": p}, x, t, c))
    y = apply(params, x, T, labels)
    assert y.shape == shape and y.dtype == jnp.float32
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(jax.eval_shape(net.init, KEY, x, T)))
    size = jnp.max(jnp.abs(y))
    none = apply(params, x, T, None)
    np.testing.assert_allclose(apply(params, x, T, jnp.full(3, 3)), none, rtol=1e-5, atol=1e-5)
    others = apply(params, x, 1 - T, labels)  # the middle time is the same in T and 1 - T: examples do not mix
    np.testing.assert_allclose(others[1], y[1], rtol=1e-5, atol=1e-5)
    for other in (none, others):
        assert jnp.min(jnp.max(jnp.abs(other - y).reshape(3, -1), 1)[jnp.array([0, 2])]) > 1e-3 * size
    changed = apply(params, x.at[0].set(x[1]), T, labels)
    np.testing.assert_allclose(changed[1:], y[1:], rtol=1e-5, atol=1e-5)
    assert jnp.max(jnp.abs(changed[0] - y[0])) > 1e-3 * size

    @jax.jit  # of the initialisation, only the last layer is compiled
    def last_layer(key):
        flat = flatten_dict(net.init(key, x, T)["params"])
        return {path: leaf for path, leaf in flat.items() if path[:-1] == LAST[name]}

    last = last_layer(KEY)
    assert len(last) == 2  # kernel and bias
    started = unflatten_dict({**flatten_dict(params), **last})
    np.testing.assert_array_equal(apply(started, x, T, labels), 0.0)

    grads = fast_jit(jax.grad(lambda p, x: jnp.sum(net.apply({"params": p}, x, T, labels) ** 2), (0, 1)))(params, x)
    for g in jax.tree.leaves(grads):
        assert jnp.all(jnp.isfinite(g))
    assert jnp.max(jnp.abs(grads[1])) > 0

    low = fast_jit(build(classes=3, dtype=jnp.bfloat16).apply)({"params": params}, x, T, labels)
    assert low.shape == shape and low.dtype == jnp.float32
    assert 1e-4 < jnp.linalg.norm(low - y) / jnp.linalg.norm(y) < 0.1  # computed in bfloat16, no worse than that


@pytest.mark.parametrize("name", ["mlp"])
def test_net_without_jit_with_numbers_for_time_and_class(name):
    build, x, _ = NETS[name]
    net = build(classes=3)
    variables = {"params": randomised(net, x)}
    for t, cond in [(0.3, 1), (0.3, None)]:
        full = jax.jit(net.apply)(variables, x, jnp.full(3, t), None if cond is None else jnp.full(3, cond))
        np.testing.assert_allclose(net.apply(variables, x, t, cond), full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETS)
def test_net_without_classes_refuses_a_cond(name):
    build, x, _ = NETS[name]
    with pytest.raises(ValueError, match="no classes"):
        jax.eval_shape(build().init, KEY, x, T, jnp.zeros(3, int))


def test_a_value_without_time_is_the_energy_network_of_the_papers_size():
    """Its 5,134,593 weights and biases, counted by hand from the layers; time is not read."""
    net, x = ValueResNet(timed=False), jnp.zeros((2, 32, 32, 3))
    params = jax.eval_shape(net.init, KEY, x, 0.5)["params"]
    block = lambda a, b: 9 * a * b + b + 9 * b * b + b  # noqa: E731
    stages = sum(block(a, b) + a * b + block(b, b) for a, b in ((128, 128), (128, 256), (256, 256)))
    assert sum(p.size for p in jax.tree.leaves(params)) == 9 * 3 * 128 + 128 + stages + 257 == 5_134_593
    with pytest.raises(ValueError, match="sides from 8 up"):
        jax.eval_shape(net.init, KEY, x[:, :4], 0.5)


@pytest.mark.parametrize("side, blocks", [(8, 1), (16, 2), (28, 1)])
def test_unet_sizes(side, blocks):
    net = UNet(blocks=blocks)
    x = jax.ShapeDtypeStruct((2, side, side, 1), jnp.float32)
    assert jax.eval_shape(lambda k, x: net.init_with_output(k, x, 0.5)[0], KEY, x).shape == x.shape


def test_unet_refuses():
    with pytest.raises(ValueError, match="multiples of 4"):
        jax.eval_shape(UNet().init, KEY, jnp.zeros((1, 10, 8, 1)), 0.5)
    with pytest.raises(ValueError, match="multiples of 8"):
        UNet((12,))
    with pytest.raises(ValueError, match="levels 0..2"):
        UNet(attention=(3,))
    with pytest.raises(ValueError, match="per example"):
        jax.eval_shape(UNet().init, KEY, jnp.zeros((2, 8, 8, 1)), jnp.zeros((2, 1)))
    with pytest.raises(ValueError, match="integer label"):
        jax.eval_shape(UNet(classes=3).init, KEY, jnp.zeros((2, 8, 8, 1)), 0.5, jnp.zeros((2,)))


@pytest.mark.slow
def test_unet_dropout_acts_in_training_only():
    net = UNet((8,), dropout=0.5)
    x = jnp.ones((2, 4, 4, 1))
    params = randomised(net, x)
    plain = run(UNet((8,)), params, x, 0.5)
    np.testing.assert_array_equal(run(net, params, x, 0.5), plain)
    y = jax.jit(lambda k: net.apply({"params": params}, x, 0.5, train=True, rngs={"dropout": k}))(KEY)
    assert jnp.max(jnp.abs(y - plain)) > 1e-3


def test_lists_from_a_config_give_the_same_hashable_module():
    assert hash(UNet([8, 16])) == hash(UNet((8, 16))) and UNet([8, 16]) == UNet((8, 16))  # type: ignore
    assert hash(MLP([8], out=[2])) == hash(MLP((8,), out=(2,)))  # type: ignore
    with pytest.raises(ValueError, match="shape per example"):
        MLP((8,), out=1)  # type: ignore


def test_conv1d_has_the_published_size_and_ignores_time():
    net = ConvNet1D(4)
    x = onehot(2, 16, 4)
    shapes = jax.eval_shape(net.init, KEY, x, 0.5)["params"]
    # conv 5->128 k9; 20 x (conv 128 k9, Linear, LayerNorm); a time Linear; head 128, 128 -> 4
    parts = (5 * 9 + 1) * 128 + 20 * ((9 * 128 + 1) * 128 + 129 * 128 + 256) + 129 * 128 + 129 * 128 + 129 * 4
    count = sum(np.prod(p.shape) for p in jax.tree.leaves(shapes))
    assert count == parts and abs(count - 3.33e6) < 5e3
    small = ConvNet1D(4, width=8, dilations=(1,))
    params = randomised(small, x)
    np.testing.assert_array_equal(run(small, params, x, 0.1), run(small, params, x, 0.9))


def test_conv1d_sees_what_its_dilations_reach():
    net = ConvNet1D(2, width=8, dilations=(4,), kernel=3)
    x = jax.random.normal(KEY, (1, 21, 3))
    params = randomised(net, x)
    dependence = jax.jacobian(lambda x: run(net, params, x, 0.5)[0, 10].sum())(x)
    seen = np.flatnonzero(np.abs(dependence).sum(axis=(0, 2)))
    np.testing.assert_array_equal(seen, [5, 6, 7, 9, 10, 11, 13, 14, 15])


@pytest.mark.first(1)
@pytest.mark.parametrize("axes", [1, 2])
def test_rotary_is_an_isometry_that_knows_differences_only(axes):
    q, k = jax.random.normal(KEY, (2, 1, 6, 2, 8))
    at = jax.random.normal(KEY, (6, axes)) * 3
    shifted = at + jnp.arange(1.0, axes + 1)
    np.testing.assert_allclose(jnp.linalg.norm(rotary(q, at), axis=-1), jnp.linalg.norm(q, axis=-1), rtol=1e-5)
    scores = [jnp.einsum("bqhd,bkhd->bhqk", rotary(q, p), rotary(k, p)) for p in (at, shifted, 2 * at)]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)
    assert jnp.max(jnp.abs(scores[0] - scores[2])) > 0.1
    np.testing.assert_allclose(rotary(q, jnp.zeros((6, axes))), q)


def test_dit_patches_are_put_back_in_place():
    net = DiT(patch=2, width=8, depth=1, heads=1)
    x = jax.random.normal(KEY, (1, 4, 6, 1))
    params = randomised(net, x)
    zero = jax.tree.map(jnp.zeros_like, params["trunk"]["block0"]["mod"])  # closed gates: a patch sees itself only
    params["trunk"]["block0"]["mod"] = zero
    dependence = jax.jacobian(lambda x: run(net, params, x, 0.5)[0, 2, 5, 0])(x)
    np.testing.assert_array_equal(np.argwhere(np.abs(dependence[0, :, :, 0]) > 0), [[2, 4], [2, 5], [3, 4], [3, 5]])


def test_transformer_knows_order():
    net = Transformer(2, width=8, depth=1, heads=1)
    x = onehot(1, 6, 2)
    params = randomised(net, x)
    y, flipped = (run(net, params, a, 0.5) for a in (x, x[:, ::-1]))
    assert jnp.max(jnp.abs(y - flipped[:, ::-1])) > 1e-3
    with pytest.raises(ValueError, match="multiple of"):
        Transformer(2, width=10, heads=4)
    with pytest.raises(ValueError, match="multiple of"):
        DiT(width=8, heads=4)


def test_time_features():
    t = np.array([0.0, 0.37, 1.0])
    w = 10000.0 ** (-np.arange(4) / 4)
    want = np.concatenate([np.cos(1000 * t[:, None] * w), np.sin(1000 * t[:, None] * w)], axis=-1)
    np.testing.assert_allclose(time_features(jnp.asarray(t), 8), want, atol=2e-4)
    with pytest.raises(ValueError, match="even"):
        time_features(jnp.zeros(3), 7)


def test_ema():
    average, params = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, -2.0])}
    np.testing.assert_allclose(ema_update(average, params, 0.75)["w"], [1.5, 1.0])
    np.testing.assert_allclose(ema_update(average, params, 0.999, 0)["w"], [2.8, -1.6], rtol=1e-6)  # d = 1 / 10
    np.testing.assert_allclose(ema_update(average, params, 0.5, 10**6)["w"], [2.0, 0.0], rtol=1e-6)


def test_group_norm_is_flax_group_norm_then_film():
    from rgdiff.nets.unet import GroupNorm

    x = 3 + 2 * normal(2, 4, 6, 16)
    params = {"scale": normal(16), "bias": normal(16) + 1}
    film = (normal(2, 16), normal(2, 16) - 1)
    reference = nn.GroupNorm(8, epsilon=1e-5).apply({"params": params}, x)
    np.testing.assert_allclose(GroupNorm().apply({"params": params}, x), reference, rtol=2e-5, atol=2e-5)
    modulated = reference * (1 + film[0])[:, None, None] + film[1][:, None, None]
    np.testing.assert_allclose(GroupNorm().apply({"params": params}, x, film), modulated, rtol=2e-5, atol=2e-5)


def test_a_network_of_graphs_sees_no_order_of_nodes_no_absent_ones_and_every_form_of_a_state():
    rng, order = np.random.default_rng(0), np.array([2, 0, 3, 1])
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], np.float32)
    edges = np.triu(rng.normal(size=(2, 4, 4)), 1) * mask[:, :, None] * mask[:, None]
    adjacency = edges + edges.swapaxes(1, 2)
    nodes = rng.normal(size=(2, 4, 2)) * mask[..., None]
    pack = lambda x, a, m: jnp.asarray(np.concatenate([x, a, m[..., None]], -1), jnp.float32)  # noqa: E731
    whole = pack(nodes, adjacency, mask)
    net, t = GraphNet(8, 2), jnp.full(2, 0.3)
    params = randomised(net, whole)
    out = net.apply({"params": params}, whole, t)
    turned = pack(nodes[:, order], adjacency[:, order][:, :, order], mask[:, order])
    np.testing.assert_allclose(net.apply({"params": params}, turned, t), out, rtol=1e-5)
    state = graphs.unpacked(whole)
    for form in (state, {"state": state, "noise": {}}):
        np.testing.assert_array_equal(net.apply({"params": params}, form, t), out)
    strange = pack(nodes + 9 * (1 - mask)[..., None], adjacency, mask)
    np.testing.assert_allclose(net.apply({"params": params}, strange, t), out, rtol=1e-5)


@pytest.mark.slow
def test_a_rounded_graph_network_sees_the_molecule_and_has_a_gradient():
    """Numbers whose reading is one molecule have its value, with the gradient at it; thresholds are those of the reader of graphs."""
    rng = np.random.default_rng(0)
    elements = (6, 7, 8, 9)
    nodes = rng.uniform(-0.4, 0.4, (2, 5, 4)) + np.asarray(jax.nn.one_hot(rng.integers(0, 4, (2, 5)), 4))
    nodes[:, 4] = rng.uniform(-0.5, 0.49, (2, 4))  # read as no atom
    edges = rng.integers(0, 4, (2, 10)) + rng.uniform(-0.49, 0.49, (2, 10))
    noised = {"nodes": jnp.asarray(nodes), "edges": jnp.asarray(edges), "mask": jnp.ones((2, 5))}
    packed = np.asarray(graphs.packed(noised))
    kinds, orders = np.zeros((2, 5, 4)), np.zeros((2, 5, 5))
    for row, graph in enumerate(packed):
        atoms, bonds = chemistry.discrete(graph, elements)
        assert len(atoms) == 4
        kinds[row, np.arange(4), atoms], orders[row, :4, :4] = 1, bonds
    mask = jnp.asarray([[1.0, 1, 1, 1, 0]] * 2)
    molecule = {"nodes": jnp.asarray(kinds), "edges": graphs.triangle(jnp.asarray(orders)), "mask": mask}
    params = randomised(GraphNet(8, 2), graphs.packed(molecule))
    value = lambda x, rounded: GraphNet(8, 2, rounded=rounded).apply({"params": params}, graphs.packed(x), jnp.zeros(2))  # noqa: E731
    np.testing.assert_allclose(value(noised, True), value(molecule, False), rtol=1e-5)
    assert np.abs(np.asarray(value(noised, True) - value(noised, False))).min() > 1e-3
    slope = lambda x, rounded: jax.grad(lambda x: value(x, rounded).sum())(x)["edges"]  # noqa: E731
    there = np.asarray(graphs.there(mask)["edges"])  # of bonds between atoms
    np.testing.assert_allclose(slope(noised, True)[there], slope(molecule, False)[there], rtol=1e-4, atol=1e-6)
    assert np.abs(slope(molecule, False)[there]).max() > 1e-3
