"""Adapters in PEFT's files: what is written comes back, and PEFT itself computes the same outputs with them."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from rgdiff.nets import lora_init, lora_merge
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


def test_adapters_that_do_not_fit(tmp_path):
    _, params, adapter = adapted()
    with pytest.raises(ValueError, match="have no 'other/kernel'"):
        save_peft(tmp_path, {"other/kernel": adapter["head/kernel"]}, params)
    with pytest.raises(ValueError, match=r"one rank for all modules, got \[2, 3\]"):
        save_peft(tmp_path, adapter | lora_init(jax.random.key(0), {"head": params["head"]}, 3), params)
    with pytest.raises(ValueError, match="holds no adapter_model"):
        load_peft(tmp_path / "nothing", params)
    save_peft(tmp_path, adapter, params)
    with pytest.raises(ValueError, match="does not fit a kernel"):
        load_peft(tmp_path, params | {"head": {"kernel": jnp.zeros((7, 4))}})
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not tensors at all")
    with pytest.raises(ValueError, match="is damaged"):
        load_peft(tmp_path, params)
