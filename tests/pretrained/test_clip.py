"""CLIP beside transformers' and, in open_clip's layout, beside a small model of torch's own attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgdiff.pretrained import clip, weights
from rgdiff.pretrained.config import Config
from tests.pretrained import parity

LAYERS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**LAYERS, "vocab_size": 50, "max_position_embeddings": 9, "bos_token_id": 48, "pad_token_id": 0}
VISION = {**LAYERS, "image_size": 12, "patch_size": 4}


def ids(end: int) -> np.ndarray:
    """Return two sequences whose end tokens are at different places; the rest is padded with the end token."""
    out = np.random.RandomState(0).randint(1, 48, (2, 9))
    out[:, 0], out[0, 4:], out[1, 7:] = 48, end, end
    return out


def torch_text(config):
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**config))


def torch_text_projection(config):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(CLIPTextConfig(**config))


def torch_vision(config):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(CLIPVisionConfig(**config))


def torch_clip(config):
    from transformers import CLIPConfig, CLIPModel

    return CLIPModel(CLIPConfig(**config))


def call_text(module, inputs):
    out = module(inputs["input_ids"], output_hidden_states=True)
    return out.last_hidden_state, out.pooler_output, *out.hidden_states


def call_text_projection(module, inputs):
    text = module.text_model(inputs["input_ids"], output_hidden_states=True)
    return text.last_hidden_state, text.pooler_output, *text.hidden_states, module(inputs["input_ids"]).text_embeds


def call_vision(module, inputs):
    pixels = inputs["pixel_values"].permute(0, 3, 1, 2)
    out = module.vision_model(pixels, output_hidden_states=True)
    return out.last_hidden_state, out.pooler_output, *out.hidden_states, module(pixels).image_embeds


def call_clip(module, inputs):
    out = module(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"].permute(0, 3, 1, 2))
    return out.logits_per_image, out.logits_per_text, out.text_embeds, out.image_embeds


CASES = [
    parity.Case(
        name="clip_text",
        config={**TEXT, "eos_token_id": 2},
        network=clip.CLIPTextModel,
        inputs={"input_ids": ids(49)},
        build=torch_text,
        call=call_text,
        wrt=None,
        rename=clip.rename,
    ),
    parity.Case(
        name="clip_text_projection",
        config={**TEXT, "eos_token_id": 47, "hidden_act": "gelu", "projection_dim": 12},
        network=clip.CLIPTextModelWithProjection,
        inputs={"input_ids": ids(47)},
        build=torch_text_projection,
        call=call_text_projection,
        wrt=None,
        rename=clip.rename,
    ),
    parity.Case(
        name="clip_vision",
        config={**VISION, "projection_dim": 12},
        network=clip.CLIPVisionModelWithProjection,
        inputs={"pixel_values": parity.normal(1, 2, 12, 12, 3)},
        build=torch_vision,
        call=call_vision,
        wrt="pixel_values",
        rename=clip.rename,
    ),
    parity.Case(
        name="clip",
        config={
            "text_config": {**TEXT, "eos_token_id": 2, "hidden_act": "gelu"},
            "vision_config": {**VISION, "hidden_act": "gelu"},
            "projection_dim": 12,
        },
        network=clip.CLIPModel,
        inputs={"input_ids": ids(49), "pixel_values": parity.normal(1, 3, 12, 12, 3)},
        build=torch_clip,
        call=call_clip,
        wrt="pixel_values",
        rename=clip.rename,
    ),
]


def sized(width: int, layers: int, heads: int, **others) -> dict:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": heads, **others}


CLIP_L = sized(768, 12, 12, projection_dim=768)
TOKENS = {"input_ids": parity.spec(1, 77, dtype=jnp.int32)}
PIXELS = {"pixel_values": parity.spec(1, 224, 224, 3)}
FULL = [
    parity.Full("clip-l-text", CLIP_L, clip.CLIPTextModel, TOKENS, torch_text, clip.rename),
    parity.Full(
        "clip-l-vision",
        sized(1024, 24, 16, projection_dim=768, patch_size=14),
        clip.CLIPVisionModelWithProjection,
        PIXELS,
        torch_vision,
        clip.rename,
    ),
    parity.Full(
        "openclip-bigg-text",  # SDXL's second text encoder
        sized(1280, 32, 20, projection_dim=1280, hidden_act="gelu"),
        clip.CLIPTextModelWithProjection,
        TOKENS,
        torch_text_projection,
        clip.rename,
    ),
    parity.Full(
        "openclip-h",  # PickScore's
        {
            "text_config": sized(1024, 24, 16, hidden_act="gelu", eos_token_id=2),
            "vision_config": sized(1280, 32, 16, hidden_act="gelu", patch_size=14),
            "projection_dim": 1024,
        },
        clip.CLIPModel,
        TOKENS | PIXELS,
        torch_clip,
        clip.rename,
    ),
]


test_golden, test_torch, test_keys, test_bfloat16, test_remat = parity.table(CASES, FULL)


def test_bad_input_is_refused():
    for change, message in (
        ({"hidden_act": "tanh"}, "CLIPTextModel does not support hidden_act = 'tanh', only 'quick_gelu', 'gelu'"),
        ({"rotary": True}, "CLIPTextModel does not know the setting rotary = True"),
    ):
        with pytest.raises(ValueError, match=message):
            clip.CLIPTextModel(Config(TEXT | change))
    with pytest.raises(ValueError, match="expected None or 'block'"):
        clip.CLIPTextModel(Config(TEXT), remat="stage")
    with pytest.raises(ValueError, match=r"pixel_values are \[1, 8, 8, 3\], expected \[B, 12, 12, 3\]"):
        parity.structure(clip.CLIPVisionModelWithProjection(Config(VISION)), {"pixel_values": jnp.zeros((1, 8, 8, 3))})
    with pytest.raises(ValueError, match="input_ids have 10 tokens, the model 9"):
        parity.structure(clip.CLIPTextModel(Config(TEXT)), {"input_ids": jnp.zeros((1, 10), int)})


def test_a_scalar_is_written_and_read_as_one(tmp_path):
    weights.write(tmp_path / "model.safetensors", {"logit_scale": jnp.asarray(2.5)})
    tensors = weights.find(tmp_path)
    assert tensors["logit_scale"].shape == ()
    read = weights.read(tensors, {"logit_scale": jax.ShapeDtypeStruct((), jnp.float32)})
    assert read["logit_scale"].shape == () and read["logit_scale"] == 2.5


def open_clip_shapes() -> dict[str, tuple[int, ...]]:
    """Return a small model's keys and shapes in open_clip's layout, text 16 wide and images 24, embedded in 12."""
    out = {"logit_scale": (), "positional_embedding": (9, 16), "text_projection": (16, 12)}
    out |= {"token_embedding.weight": (50, 16), "ln_final.weight": (16,), "ln_final.bias": (16,)}
    out |= {"visual.class_embedding": (24,), "visual.positional_embedding": (10, 24), "visual.proj": (24, 12)}
    out |= {"visual.conv1.weight": (24, 3, 4, 4)}
    out |= {f"visual.{norm}.{leaf}": (24,) for norm in ("ln_pre", "ln_post") for leaf in ("weight", "bias")}
    for prefix, width in (("", 16), ("visual.", 24)):
        for i in range(2):
            block = f"{prefix}transformer.resblocks.{i}"
            out |= {f"{block}.{norm}.{leaf}": (width,) for norm in ("ln_1", "ln_2") for leaf in ("weight", "bias")}
            out |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
            for name, (rows, columns) in (
                ("attn.out_proj", (width, width)),
                ("mlp.c_fc", (2 * width, width)),
                ("mlp.c_proj", (width, 2 * width)),
            ):
                out |= {f"{block}.{name}.weight": (rows, columns), f"{block}.{name}.bias": (rows,)}
    return out


def open_clip_forward(state, tokens, pixels):
    """Return both normalised embeddings as open_clip computes them, by torch's own attention."""
    import torch
    import torch.nn.functional as F

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def blocks(x, prefix, mask):
        for i in range(2):
            name = f"{prefix}transformer.resblocks.{i}"
            attention = torch.nn.MultiheadAttention(x.shape[-1], 2, batch_first=True).double()
            start = f"{name}.attn."
            attention.load_state_dict({k.removeprefix(start): v for k, v in state.items() if k.startswith(start)})
            h = norm(x, f"{name}.ln_1")
            x = x + attention(h, h, h, need_weights=False, attn_mask=mask)[0]
            x = x + linear(F.gelu(linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")), f"{name}.mlp.c_proj")
        return x

    x = state["token_embedding.weight"][tokens] + state["positional_embedding"]
    mask = torch.full((9, 9), float("-inf"), dtype=torch.float64).triu(1)
    x = norm(blocks(x, "", mask), "ln_final")
    text = x[torch.arange(len(x)), tokens.argmax(-1)] @ state["text_projection"]
    h = F.conv2d(pixels.permute(0, 3, 1, 2), state["visual.conv1.weight"], stride=4).flatten(2).transpose(1, 2)
    h = torch.cat([state["visual.class_embedding"].expand(len(h), 1, -1), h], 1) + state["visual.positional_embedding"]
    h = blocks(norm(h, "visual.ln_pre"), "visual.", None)
    image = norm(h[:, 0], "visual.ln_post") @ state["visual.proj"]
    return F.normalize(text, dim=-1).detach(), F.normalize(image, dim=-1).detach()


@pytest.mark.slow
def test_open_clip_layout(tmp_path):
    torch = pytest.importorskip("torch", reason="compares with torch's attention")
    from safetensors.numpy import save_file

    torch.set_num_threads(1)
    state = parity.tiny_weights(open_clip_shapes())
    state = {key: np.asarray(value, np.float32) for key, value in state.items()}
    save_file(state, tmp_path / "model.safetensors")
    vision = {**VISION, "hidden_size": 24, "intermediate_size": 48}
    sides = {"text_config": {**TEXT, "eos_token_id": 2}, "vision_config": vision}
    sides = {side: {**config, "hidden_act": "gelu"} for side, config in sides.items()}
    net = clip.CLIPModel(Config({**sides, "projection_dim": 12}))
    inputs = {"input_ids": ids(49), "pixel_values": parity.normal(1, 3, 12, 12, 3)}
    tensors = clip.from_open_clip(weights.find(tmp_path))
    params = weights.read(tensors, parity.structure(net, inputs), rename=clip.rename)
    out = net.apply({"params": params}, **inputs)
    exact = {key: torch.tensor(value, dtype=torch.float64) for key, value in state.items()}
    text, image = open_clip_forward(
        exact, torch.tensor(inputs["input_ids"]), torch.tensor(inputs["pixel_values"]).double()
    )
    np.testing.assert_allclose(out.text_embeds, text.numpy(), atol=3e-6)
    np.testing.assert_allclose(out.image_embeds, image.numpy(), atol=3e-6)
    weights.write(tmp_path / "again.safetensors", params)
    written = {name: one.shape for name, one in weights.index(tmp_path / "again.safetensors").items()}
    assert written == parity.shapes_of(params) and written["logit_scale"] == ()
    np.testing.assert_allclose(out.logits_per_image, np.exp(state["logit_scale"]) * (image @ text.T).numpy(), atol=1e-5)
