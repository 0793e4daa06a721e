"""A diffusers folder: read it, fine-tune it by a reward on pixels with LoRA, write the adapter in PEFT's form, and read it back.

Run it: `python -m rgdiff.examples.diffusers_folder`

The folder is a small one that comes with the package and draws coloured digits of 16 x 16 pixels from texts; its parts are those of
Stable Diffusion, and so is every line that follows but for the reward, which is of digits.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import nets, pretrained, rewards, samplers, tuners
from rgdiff.domains.pipelines import tasks
from rgdiff.runtime.adapters import load_peft, save_peft

FOLDER, PROMPTS = "package:digits_pipeline", ["a red five", "a green eight", "a blue nine", "a yellow two"]
STEPS, GUIDANCE = 12, 2.0  # network calls of a chain; the scale of classifier-free guidance
UPDATES, TEMPERATURE = 40, 0.2  # of tuning; of the objective E[r] - temperature * path KL
TARGET = (
    r"(attn\d/to_(q|k|v|out\.0)|ff/net\.\d(\.proj)?)/kernel"  # the layers that are adapted: attention and feed-forward
)


def main() -> None:
    """Run the tutorial; what it says is asserted."""
    # 1. The folder. The process is on the file's own noise levels; eta = 1 is DDPM's chain, whose path KL says how far tuning went.
    prior = pretrained.from_diffusers(FOLDER, eta=1.0)
    times = prior.times(STEPS)
    network, count = type(prior.model.network).__name__, sum(leaf.size for leaf in jax.tree.leaves(prior.params))
    print(f"{network} on latents {list(prior.shape)}: {count:,} numbers")

    # 2. Prompts are embedded once: a pytree of leaves [prompts, ...], which every method takes as `cond`. The model maps parameters
    #    to a denoiser under classifier-free guidance.
    cond = prior.embed(PROMPTS)
    model = prior.guided(GUIDANCE)
    reference = model(prior.params)

    # 3. A reward is any function of pixels [B, H, W, 3] in [-1, 1], here log p(three) by a classifier: threes, whatever the prompt says.
    #    `heldout` is a classifier trained on other images, which does not guide. `decoded` makes a reward on pixels one on latents; the
    #    decoder is computed again in the backward pass, and keeps no memory.
    task = tasks.digit(3)
    reward = rewards.decoded(task.reward, prior.decode)  # type: ignore[arg-type]

    # 4. An adapter: two thin factors of every kernel that TARGET names. The second is zero, so that it begins at the prior.
    adapter = nets.lora_init(jax.random.key(1), prior.params, 8, target=TARGET)
    rows = jax.tree.map(
        lambda leaf: jnp.tile(leaf, (16,) + (1,) * (leaf.ndim - 1)), cond
    )  # 64 samples, prompts in turn

    def drawn(name: str, adapter: nets.lora.Adapter, scale: float = 1.0) -> tuple[float, float, np.ndarray]:
        denoiser = nets.LoRAModel(prior.params, model, scale=scale)(adapter)  # one program for all adapters and scales
        sampler = samplers.ancestral(prior.process, denoiser, reference=reference)
        samples = samplers.sample(sampler, jax.random.key(2), 64, times, rows, keep=samplers.path_kl)
        pixels = prior.pictures(samples.x0)
        kl = float(samplers.total_path_kl(samples).mean())
        guided, held = (float(r(pixels).mean()) for r in (task.reward, task.heldout))
        print(f"{name:18s} log p(three) {guided:6.2f}, held out {held:6.2f}; path KL {kl:5.1f} nats")
        return held, kl, np.asarray(pixels)

    before, _, _ = drawn("prior", adapter)

    # 5. DRaFT-1: the reward's gradient through the decoder and the last network call alone. The path KL to the prior is a price, so
    #    that the digits remain digits.
    lora = nets.LoRAModel(prior.params, model)
    held = {"reference": reference, "temperature": TEMPERATURE}
    tuner = tuners.draft_k(lora, prior.process, reward, times, tuners.adamw(3e-3), k=1, batch=16, **held)
    tuned = tuners.fit(tuner, jax.random.key(3), tuner.init(adapter), UPDATES, data=cond, batch=16).best
    after, kl, pixels = drawn("tuned", tuned)
    assert after > before + 4 and 0 < kl < 40

    # 6. The adapter in PEFT's form: `PeftModel.from_pretrained(pipeline.unet, place)` reads it in PyTorch, and `load_peft` here.
    #    (`save_lora` writes the one file that diffusers' `load_lora_weights` wants, `pretrained.to_diffusers` a whole folder.)
    with tempfile.TemporaryDirectory() as place:
        save_peft(place, tuned, prior.params)
        print(", ".join(f"{file.name} ({file.stat().st_size:,} bytes)" for file in sorted(Path(place).iterdir())))
        back, scale = load_peft(place, prior.params)
    _, _, again = drawn("read back", back, scale)
    np.testing.assert_allclose(again, pixels, atol=1e-4)

    # 7. The scale is a dial between the prior and what was tuned.
    half, half_kl, _ = drawn("at half its scale", back, scale / 2)
    assert before < half < after and half_kl < kl


if __name__ == "__main__":
    main()
