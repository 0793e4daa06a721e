"""Train the small text-to-image pipeline that comes with the package, and write it as a diffusers folder.

    python -m rgdiff.recipes.train_pipeline OUT [--steps 4000] [--seed 0]

Pictures are MNIST's digits in one of five colours, 16 x 16 x 3, and their texts say so: "a red three". An autoencoder makes
8 x 8 x 4 latents of them; a U-Net with cross-attention learns eps on these, together with a CLIP text model of one layer.
The folder has the layout of Stable Diffusion 1, so that whatever reads this one reads those.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import denoisers, tuners
from rgdiff.domains.images import data as images
from rgdiff.pretrained.autoencoder import AutoencoderKL
from rgdiff.pretrained.clip import CLIPTextModel
from rgdiff.pretrained.config import Config
from rgdiff.pretrained.folders import Part, save_pipeline
from rgdiff.pretrained.schedulers import read_scheduler, scaled_time
from rgdiff.pretrained.unet import UNet2DConditionModel
from rgdiff.typing import Array, Params

COLOURS = {"red": (1, 0.2, 0.2), "green": (0.2, 1, 0.2), "blue": (0.3, 0.4, 1), "yellow": (1, 1, 0.2), "white": (1, 1, 1)}  # fmt: skip
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LENGTH = 6  # tokens: start, a, colour, digit, end, end
SCHEDULER = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000,
    "clip_sample": False, "set_alpha_to_one": False, "prediction_type": "epsilon", "timestep_spacing": "trailing",
}  # fmt: skip
UNET = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": [32, 64], "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 4, "cross_attention_dim": 32, "norm_num_groups": 8,
}  # fmt: skip
VAE = {
    "in_channels": 3, "out_channels": 3, "block_out_channels": [16, 32], "layers_per_block": 1, "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2, "norm_num_groups": 8,
    "sample_size": 16,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": LENGTH, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "model_type": "clip_text_model",
}  # fmt: skip


def vocabulary() -> tuple[dict[str, int], list[str]]:
    """Return CLIP's tables for these words: tokens -> ids, and merges; byte-pair encoding until every word is one token."""
    words = [[*word[:-1], f"{word[-1]}</w>"] for word in ("a", *COLOURS, *DIGITS)]
    letters = sorted({letter.removesuffix("</w>") for word in words for letter in word})
    tokens, merges = [*letters, *(f"{letter}</w>" for letter in letters)], []
    while pairs := Counter(pair for word in words for pair in zip(word, word[1:], strict=False)):
        first, second = max(sorted(pairs), key=lambda pair: pairs[pair])
        merges.append(f"{first} {second}")
        tokens.append(first + second)
        for word in words:
            for i in range(len(word) - 2, -1, -1):
                if word[i : i + 2] == [first, second]:
                    word[i : i + 2] = [first + second]
    return {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}, merges


def ids_of(words: list[str], table: dict[str, int]) -> list[int]:
    """Return the token ids [LENGTH] of words that are tokens, as the tokenizer makes them."""
    end = table["<|endoftext|>"]
    ids = [table["<|startoftext|>"], *(table[f"{word}</w>"] for word in words)]
    return ids + [end] * (LENGTH - len(ids))


def coloured(x: np.ndarray, labels: np.ndarray, table: dict[str, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Colour gray digits [N, H, W, 1] at random: pictures [N, H, W, 3] in [-1, 1], and the ids of their texts [N, LENGTH]."""
    chosen = np.random.default_rng(seed).integers(0, len(COLOURS), len(x))
    names, colours = list(COLOURS), np.asarray(list(COLOURS.values()), np.float32)
    pictures = (x + 1) * colours[chosen][:, None, None] - 1
    texts = [["a", names[c], DIGITS[d]] for c, d in zip(chosen, labels, strict=True)]
    return pictures.astype(np.float32), np.asarray([ids_of(words, table) for words in texts], np.int32)


def train_autoencoder(pictures: np.ndarray, steps: int, seed: int, batch: int = 32) -> Params:
    """Train the autoencoder: squared error, and 1e-4 times the KL of latents to N(0, 1), in nats a picture over its pixels."""
    import optax

    net: Any = AutoencoderKL(Config(VAE))
    key = jax.random.key(seed)
    params = net.lazy_init(key, jax.ShapeDtypeStruct((1, *pictures.shape[1:]), jnp.float32))["params"]
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(2e-3, steps)))

    def loss(params: Params, x: Array, key: Array) -> Array:
        mean, log_variance = net.apply({"params": params}, x, method="encode")
        z = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
        back = net.apply({"params": params}, z, method="decode")
        kl = 0.5 * jnp.sum(mean**2 + jnp.exp(log_variance) - 1 - log_variance) / x.size
        return jnp.mean((back - x) ** 2) + 1e-4 * kl

    @jax.jit
    def step(params: Params, state: Any, x: Array, key: Array) -> tuple[Params, Any, Array]:
        value, gradient = jax.value_and_grad(loss)(params, x, key)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    state, rng = optimizer.init(params), np.random.default_rng(seed)
    for i in range(steps):
        rows = rng.integers(0, len(pictures), batch)
        params, state, value = step(params, state, jnp.asarray(pictures[rows]), jax.random.fold_in(key, i))
        if i % 200 == 199:
            print(f"autoencoder: {i + 1}/{steps}, loss {float(value):.5f}", flush=True)
    return params


def text_settings() -> dict[str, Any]:
    """Return the settings of the text model."""
    table, _ = vocabulary()
    end = table["<|endoftext|>"]
    return TEXT | {"vocab_size": len(table), "eos_token_id": end, "bos_token_id": end - 1, "pad_token_id": end}


def write(out: Path, params: dict[str, Params], scale: float) -> None:
    """Write the folder, in half precision.

    Args:
      out: folder.
      params: of unet, vae and text_encoder.
      scale: factor of latents, one over their standard deviation.
    """
    table, merges = vocabulary()
    half = {name: jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), tree) for name, tree in params.items()}
    special = {
        "bos_token": "<|startoftext|>",
        **dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    }
    files = {
        "vocab.json": json.dumps(table).encode(),
        "merges.txt": ("#version: 0.2\n" + "\n".join(merges) + "\n").encode(),
        "tokenizer_config.json": json.dumps(
            {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, **special}
        ).encode(),
    }
    save_pipeline(out, "StableDiffusionPipeline", {
        "unet": Part("diffusers", "UNet2DConditionModel", UNET, half["unet"]),
        "vae": Part("diffusers", "AutoencoderKL", VAE | {"scaling_factor": scale}, half["vae"]),
        "text_encoder": Part("transformers", "CLIPTextModel", text_settings(), half["text_encoder"]),
        "tokenizer": Part("transformers", "CLIPTokenizer", {}, files=files),
        "scheduler": Part("diffusers", "DDIMScheduler", SCHEDULER),
    })  # fmt: skip


def train(out: Path, steps: int, autoencoder_steps: int, seed: int, data_dir: str | None) -> None:
    """Train both and write the folder."""
    began, domain = time.time(), images.mnist(data_dir, size=16)
    table, _ = vocabulary()
    pictures, ids = coloured(domain.train_x, domain.train_y, table, seed)
    vae, net = train_autoencoder(pictures, autoencoder_steps, seed), AutoencoderKL(Config(VAE))
    encode = jax.jit(lambda x: net.apply({"params": vae}, x, method="encode")[0])
    latents = np.concatenate([np.asarray(encode(jnp.asarray(part))) for part in np.array_split(pictures, 20)])
    scale = float(1 / latents.std())
    print(f"latents: standard deviation {latents.std():.3f}", flush=True)

    unet: Any = UNet2DConditionModel(Config(UNET))
    text: Any = CLIPTextModel(Config(text_settings()))
    scheduler = read_scheduler({"_class_name": "DDIMScheduler", **SCHEDULER})
    process = scheduler.process((8, 8, 4), eta=1.0)

    def model(params: Params) -> Any:
        def network(x: Array, t: Array, cond: Any = None) -> Array:  # cond: token ids
            context = text.apply({"params": params["text"]}, cond).last_hidden_state
            return unet.apply({"params": params["unet"]}, x, t, context)

        return denoisers.predicts("eps", scaled_time(network, scheduler.levels), scheduler.schedule)

    keys = jax.random.split(jax.random.key(seed), 3)
    x, t = jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    tokens, context = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32), jax.ShapeDtypeStruct((1, LENGTH, 32), jnp.float32)
    params = {
        "unet": unet.lazy_init(keys[0], x, t, context)["params"],
        "text": text.lazy_init(keys[1], tokens)["params"],
    }
    tuner = tuners.pretraining(
        model,
        process,
        tuners.adamw(1.5e-3, warmup=steps // 20, decay_steps=steps, clip=1.0),
        null=jnp.asarray(ids_of([], table)),
    )
    told: list[float] = []

    def on_chunk(state: Any, info: Any) -> None:
        told.append(float(np.mean(info["loss"])))
        if len(told) % 4 == 0:
            print(
                f"U-Net: {100 * len(told)}/{steps}, loss {np.mean(told[-4:]):.4f}, {time.time() - began:.0f} s",
                flush=True,
            )

    data = {"x0": jnp.asarray(latents * scale), "cond": jnp.asarray(ids)}
    state = tuners.fit(tuner, keys[2], tuner.init(params), steps, data=data, batch=32, chunk=100, on_chunk=on_chunk)
    best = state.best
    write(out, {"unet": best["unet"], "vae": vae, "text_encoder": best["text"]}, scale)
    print(f"{out}: {sum(f.stat().st_size for f in out.rglob('*') if f.is_file()):,} bytes, {time.time() - began:.0f} s")


def main() -> None:
    """Read the command line, and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to be written")
    parser.add_argument("--steps", type=int, default=4000, help="of the U-Net, in batches of 32")
    parser.add_argument("--autoencoder-steps", type=int, default=1200, help="in batches of 32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", default=None, help="of MNIST's files; RGDIFF_DATA by default")
    given = parser.parse_args()
    train(given.out, given.steps, given.autoencoder_steps, given.seed, given.data_dir)


if __name__ == "__main__":
    main()
