"""LoRA adapters: fine-tune two of them by DRaFT-K, turn one up and down, and mix both.

Run it: `python -m rgdiff.examples.lora_mixing`

An adapter is a small change of the parameters, so that its scale is a dial between the prior (0) and what was tuned (1), and two
rewards can be weighed after the tuning. Each setting is shown as two numbers: the reward, and the path KL to the prior, its price.
"""

import jax
import jax.numpy as jnp

from rgdiff import denoisers, nets, processes, samplers, schedules, tuners

TEMPERATURE = 0.5


def right(x0, cond=None):
    """r(x0) = x0[0]. The data are N(0, I): the optimum of E[r] - temperature * KL is N((1 / temperature, 0), I)."""
    return x0[:, 0]


def up(x0, cond=None):
    """r(x0) = x0[1]."""
    return x0[:, 1]


def main() -> None:
    """Run the tutorial; what it says is asserted."""
    # 1. A prior: a small network trained on 2-D data. Any `model`, parameters -> denoiser, does.
    process = processes.gaussian(schedules.cosine_vp(), (2,))
    times = process.times(20)
    network = nets.MLP(features=(64, 64))
    params = network.init(jax.random.key(0), jnp.zeros((1, 2)), jnp.zeros(1))["params"]
    linen = denoisers.LinenModel(network)
    model = lambda params: denoisers.predicts("v", linen(params), process.schedule)  # noqa: E731
    data = {"x0": jax.random.normal(jax.random.key(1), (20_000, 2))}
    tuner = tuners.pretraining(model, process, tuners.adamw(2e-3), target="v", ema_decay=0.99)
    params = tuners.fit(tuner, jax.random.key(2), tuner.init(params), 1000, data=data, batch=256).best
    prior = model(params)

    # 2. Two adapters, one for each reward. `LoRAModel` maps an adapter to a denoiser; the tuner sees nothing else. These change the
    #    last layer alone, so that the prediction is linear in them. Adapters of all layers (the default target) say more, but
    #    multiply each other: there half of A may give a fifth of its reward, and B may undo A.
    lora = nets.LoRAModel(params, model)

    def tuned(reward, seed: int) -> nets.lora.Adapter:
        adapter = nets.lora_init(jax.random.key(seed), params, rank=2, target="^out/kernel")
        tuner = tuners.draft_k(
            lora,
            process,
            reward,
            times,
            tuners.adamw(2e-2, decay_steps=150),
            k=20,
            batch=64,
            reference=prior,
            temperature=TEMPERATURE,
        )
        return tuners.fit(tuner, jax.random.key(seed), tuner.init(adapter), 150).best

    a, b = tuned(right, 3), tuned(up, 4)

    def measure(name: str, adapter: nets.lora.Adapter, scale: float = 1.0) -> tuple[float, float, float]:
        denoiser = nets.LoRAModel(params, model, scale=scale)(adapter)  # another scale compiles nothing anew
        sampler = samplers.ancestral(process, denoiser, reference=prior)
        samples = samplers.sample(sampler, jax.random.key(5), 4096, times, keep=samplers.path_kl)
        means = right(samples.x0).mean(), up(samples.x0).mean(), samplers.total_path_kl(samples).mean()
        out = float(means[0]), float(means[1]), float(means[2])
        print(f"{name:16s} right {out[0]:5.2f}  up {out[1]:5.2f}  path KL {out[2]:5.2f} nats")
        return out

    # 3. The dial: the reward grows with the scale, its price with the square of it. The objective E[r] - temperature * KL is at
    #    most temperature * log Z = 1 / (2 temperature). A was tuned to be best at scale 1.
    dial = {scale: measure(f"{scale:g} A", a, scale) for scale in (0.0, 0.5, 1.0, 1.5)}
    reward, kl = ({scale: out[i] for scale, out in dial.items()} for i in (0, 2))
    objective = {scale: reward[scale] - TEMPERATURE * kl[scale] for scale in dial}
    print(
        "objective by scale:",
        ", ".join(f"{value:.2f}" for value in objective.values()),
        f"(at most {0.5 / TEMPERATURE:.2f})",
    )
    assert kl[0.0] == 0 and abs(reward[0.0]) < 0.1  # the prior
    assert abs(reward[0.5] / reward[1.0] - 0.5) < 0.1 and abs(kl[0.5] / kl[1.0] - 0.25) < 0.1
    assert max(objective, key=lambda scale: objective[scale]) == 1.0 and objective[1.0] < 0.5 / TEMPERATURE

    # 4. Mixtures: `lora_sum` adds adapters exactly, its rank is the sum of the ranks. Rewards that do not conflict add up, and so do
    #    their prices.
    half = measure("0.5 A + 0.5 B", nets.lora_sum([(a, 0.5), (b, 0.5)]))
    both = measure("A + B", nets.lora_sum([(a, 1.0), (b, 1.0)]))
    none = measure("A - A", nets.lora_sum([(a, 1.0), (a, -1.0)]))
    assert abs(half[0] - reward[0.5]) < 0.15 and abs(both[0] - reward[1.0]) < 0.2 and both[1] > 1
    assert abs(both[2] / half[2] - 4) < 1 and none[2] < 1e-6


if __name__ == "__main__":
    main()
