"""Adapters in PEFT's files: what is written comes back, and PEFT itself computes the same outputs with them."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from rgdiff import denoisers
from rgdiff.nets import LoRAModel, lora_init, lora_merge
from rgdiff.runtime.adapters import load_peft, save_peft


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):  # [B, H, W, C]
        x = nn.Conv(6, (3, 3), name="conv")(x)
        x = nn.silu(x).mean((1, 2))
        return nn.Dense(4, name="head")(x)


def adapted():
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 3))
    params = Small().init(jax.random.key(1), x)["params"]
    adapter = lora_init(jax.random.key(2), params, 2)
    adapter = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(3), leaf.shape), adapter)
    return x, params, adapter


def test_adapter_round_trip(tmp_path):
    _, params, adapter = adapted()
    save_peft(tmp_path, adapter, params, scale=0.5)
    loaded, scale = load_peft(tmp_path, params)
    assert scale == 0.5 and set(loaded) == {"conv/kernel", "head/kernel"}
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 2 and config["lora_alpha"] == 1.0 and set(config["target_modules"]) == {"conv", "head"}


def test_peft_computes_the_same(tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    x, params, adapter = adapted()
    save_peft(tmp_path, adapter, params, scale=0.7)

    class Twin(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 6, 3, padding=1)
            self.head = torch.nn.Linear(6, 4)

        def forward(self, x):
            return self.head(torch.nn.functional.silu(self.conv(x)).mean((2, 3)))

    twin = Twin()
    as_torch = lambda a: torch.from_numpy(np.array(a))  # noqa: E731
    twin.load_state_dict(
        {
            "conv.weight": as_torch(params["conv"]["kernel"]).permute(3, 2, 0, 1),
            "conv.bias": as_torch(params["conv"]["bias"]),
            "head.weight": as_torch(params["head"]["kernel"]).T,
            "head.bias": as_torch(params["head"]["bias"]),
        }
    )
    model = peft.PeftModel.from_pretrained(twin, str(tmp_path))
    with torch.no_grad():
        theirs = model(as_torch(x).permute(0, 3, 1, 2)).numpy()
    plain = Small().apply({"params": params}, x)
    ours = Small().apply({"params": lora_merge(params, adapter, 0.7)}, x)
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-5)
    assert np.abs(ours - plain).max() > 0.1


def numbered(shapes):
    """Parameters 0, 1, 2, ... / 10 - 0.3 in PyTorch's order, given in PyTorch's shapes."""
    return {
        name: (np.arange(np.prod(shape)).reshape(shape) / 10 - 0.3).astype(np.float32) for name, shape in shapes.items()
    }


def sines(shapes):
    return {name: np.sin(np.arange(np.prod(s)) + 1.0).reshape(s).astype(np.float32) for name, s in shapes.items()}


def write(folder, tensors, **config):
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "loftq_config": {}} | config
    (folder / "adapter_config.json").write_text(json.dumps(config))


def two_layers(ranks):
    """Two Linear layers as PEFT names them: parameters here, and an adapter's tensors there."""
    weights = numbered({"0.weight": (4, 3), "0.bias": (4,), "1.weight": (2, 4), "1.bias": (2,)})
    params = {"body": {i: {"kernel": weights[f"{i}.weight"].T, "bias": weights[f"{i}.bias"]} for i in "01"}}
    shapes = {}
    for i, (out, into) in enumerate(((4, 3), (2, 4))):
        shapes[f"body.{i}.lora_A.weight"], shapes[f"body.{i}.lora_B.weight"] = (ranks[i], into), (out, ranks[i])
    return params, sines(shapes)


def two_layers_apply(params, x):
    for i in "01":
        x = x @ params["body"][i]["kernel"] + params["body"][i]["bias"]
    return x


PATTERNS = {"rank_pattern": {"body.1": 2}, "alpha_pattern": {"1": 5}}
# (scale, ranks, fields of adapter_config, output for x = [1, 2, 3]) of PEFT 0.21.2 with torch 2.13.0
THEIRS = {
    "plain": (2.0, (4, 4), {}, (5.892785, 0.7929523)),
    "use_rslora": (4.0, (4, 4), {"use_rslora": True}, (16.499847, 1.388155)),
    "patterns": (2.0, (4, 2), PATTERNS, (3.578878, -14.162250)),
    "patterns, use_rslora": (4.0, (4, 2), PATTERNS | {"use_rslora": True}, (-1.003138, -24.690889)),
    "orthogonal": (1.0, (2, 2), {"r": 2, "lora_alpha": 2, "init_lora_weights": "orthogonal"}, (2.828874, -1.437389)),
    "mica": (1.0, (2, 2), {"r": 2, "lora_alpha": 2, "init_lora_weights": "mica"}, (2.828874, -1.437389)),
}


@pytest.mark.parametrize("case", THEIRS)
def test_scales_are_those_of_peft(tmp_path, case):
    expected, ranks, fields, output = THEIRS[case]
    params, tensors = two_layers(ranks)
    x = np.float32([[1, 2, 3]])
    np.testing.assert_allclose(two_layers_apply(params, x), [[-0.28, 2.3]], rtol=1e-5)
    write(tmp_path, tensors, **fields)
    adapter, scale = load_peft(tmp_path, params)
    assert scale == expected
    np.testing.assert_allclose(two_layers_apply(lora_merge(params, adapter, scale), x), [output], rtol=1e-5, atol=2e-5)
    save_peft(tmp_path / "again", adapter, params, scale=scale)
    again, scale = load_peft(tmp_path / "again", params)
    np.testing.assert_allclose(two_layers_apply(lora_merge(params, again, scale), x), [output], rtol=1e-5, atol=2e-5)


def test_tables_and_transposed_layers_are_those_of_peft(tmp_path):
    """An Embedding and transformers' Conv1D, whose weight is stored [in, out] (fan_in_fan_out); outputs of PEFT 0.21.2."""
    weights = numbered({"table": (5, 3), "weight": (3, 2), "bias": (2,)})
    params = {"table": {"embedding": weights["table"]}, "head": {"kernel": weights["weight"], "bias": weights["bias"]}}
    apply = lambda p: p["table"]["embedding"][jnp.array([1, 4])] @ p["head"]["kernel"] + p["head"]["bias"]  # noqa: E731
    np.testing.assert_allclose(apply(params), [[-0.29, -0.16], [-0.56, -0.16]], atol=1e-6)
    shapes = {"head.lora_A.weight": (2, 3), "head.lora_B.weight": (2, 2)}
    shapes |= {"table.lora_embedding_A": (2, 5), "table.lora_embedding_B": (3, 2)}
    theirs = [[-0.5916768, 0.1736898], [-0.6626135, 2.2121468]]
    write(tmp_path, sines(shapes), r=2, lora_alpha=3, fan_in_fan_out=True)
    adapter, scale = load_peft(tmp_path, params)
    np.testing.assert_allclose(apply(lora_merge(params, adapter, scale)), theirs, rtol=2e-5)
    save_peft(tmp_path / "again", adapter, params, scale=scale)
    again, _ = load_peft(tmp_path / "again", params)
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


REFUSED = {
    "bias": "all",
    "modules_to_save": ["head"],
    "use_dora": True,
    "lora_bias": True,
    "use_qalora": True,
    "layer_replication": [[0, 1]],
    "target_parameters": ["weight"],
    "trainable_token_indices": [1],
    "alora_invocation_tokens": [1],
    "init_lora_weights": "pissa_niter_4",
    "peft_type": "ADALORA",
    "kasa_config": {"beta": 1},
    "a_field_of_tomorrow": 1,
}


@pytest.mark.parametrize("field", REFUSED)
def test_configurations_that_ask_for_more_are_refused_by_name(tmp_path, field):
    params, tensors = two_layers((4, 4))
    write(tmp_path, tensors, **{field: REFUSED[field]})
    with pytest.raises(ValueError, match=field):
        load_peft(tmp_path, params)


def test_tensors_that_are_no_factors_are_refused_by_name(tmp_path):
    params, tensors = two_layers((4, 4))
    for more in ("body.0.base_layer.bias", "body.1.lora_magnitude_vector", "body.1.lora_B.bias", "head.weight"):
        write(tmp_path, tensors | {more: np.zeros(4, np.float32)})
        with pytest.raises(ValueError, match=f"{more}' is no low-rank factor"):
            load_peft(tmp_path, params)
    write(tmp_path, tensors, r=3)
    with pytest.raises(ValueError, match=r"'body.0' has lora_A.weight \[4, 3\].*rank 3"):
        load_peft(tmp_path, params)


def test_half_precision_becomes_float32(tmp_path):
    params, tensors = two_layers((4, 4))
    write(tmp_path, {name: tensor.astype(np.float16) for name, tensor in tensors.items()})
    adapter, _ = load_peft(tmp_path, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter)} == {jnp.dtype("float32")}


def test_ranks_that_differ(tmp_path):
    """Each module has its own rank and the same scale, also where one name ends as another does."""
    params = {"head": {"kernel": jnp.ones((3, 2))}, "deep": {"head": {"kernel": jnp.ones((2, 5))}}}
    parts = [lora_init(jax.random.key(i), {k: v}, 1 + i) for i, (k, v) in enumerate(params.items())]
    adapter = jax.tree.map(lambda leaf: leaf + 1.0, parts[0] | parts[1])
    save_peft(tmp_path, adapter, params, scale=0.7)
    loaded, scale = load_peft(tmp_path, params)
    assert scale == pytest.approx(0.7)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), loaded, adapter)


def test_nnx_adapters_have_the_names_of_linen(tmp_path):
    """LoRA of an NNX model: the same paths, the same outputs and the same file as of a Linen module with its weights."""
    from flax import nnx

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.down, self.layers = nnx.Linear(2, 4, rngs=rngs), nnx.List([nnx.Linear(4, 2, rngs=rngs)])
            self.drop = nnx.Dropout(0.5, rngs=rngs, deterministic=True)

        def __call__(self, x, t):
            return self.layers[0](self.drop(self.down(x)))

    def plain(params, x, t):
        layers = (params["down"], params["layers"][0])
        for layer in layers:
            x = x @ layer["kernel"] + layer["bias"]
        return x

    module = Nnx(nnx.Rngs(0))
    model, params = denoisers.nnx_model(module)
    adapter = lora_init(jax.random.key(0), params, 2)
    assert set(adapter) == {"down/kernel", "layers/0/kernel"}
    adapter = jax.tree.map(lambda leaf: leaf + 0.3, adapter)
    x, t = jax.random.normal(jax.random.key(1), (5, 2)), jnp.float32(0.5)
    ours = LoRAModel(params, model, 0.7)(adapter)(x, t)
    theirs = denoisers.from_function(plain, lora_merge(params, adapter, 0.7))(x, t)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    save_peft(tmp_path, adapter, params, scale=0.7)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {"down", "layers.0"}
    loaded, scale = load_peft(tmp_path, params)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)
    state = nnx.state(module, nnx.Param)  # parameters split by hand keep their names in the file
    save_peft(tmp_path / "state", lora_init(jax.random.key(0), state, 2), state)
    assert set(load_peft(tmp_path / "state", params)[0]) == {"down/kernel", "layers/0/kernel"}


def test_adapters_that_do_not_fit(tmp_path):
    _, params, adapter = adapted()
    with pytest.raises(ValueError, match="have no 'other/kernel'"):
        save_peft(tmp_path, {"other/kernel": adapter["head/kernel"]}, params)
    with pytest.raises(ValueError, match="holds no adapter_model"):
        load_peft(tmp_path / "nothing", params)
    save_peft(tmp_path, adapter, params)
    with pytest.raises(ValueError, match="does not fit a kernel"):
        load_peft(tmp_path, params | {"head": {"kernel": jnp.zeros((7, 4))}})
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not tensors at all")
    with pytest.raises(ValueError, match="is damaged"):
        load_peft(tmp_path, params)
