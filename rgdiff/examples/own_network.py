"""Your own network: a Flax NNX module with 1,000 integer steps, steered, fine-tuned and given a LoRA adapter.

Run it: `python -m rgdiff.examples.own_network`

The network stands for the one that you have: DDPM's betas, a prediction of eps, called as net(x, step) with step 0 ... 999. It
is trained here in seconds on a mixture of two Gaussians, because then everything that follows has a closed form.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from rgdiff import denoisers, guides, nets, processes, samplers, schedules, tuners, values

STEPS = 1000
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, STEPS))  # DDPM's betas
CENTRES, STD = np.array([[-1.5, 0.0], [1.5, 0.0]]), 0.5  # the data: two Gaussians of equal weight
BEST, TEMPERATURE = np.array([1.0, 1.0]), 0.5


class Net(nnx.Module):
    """A network as you may have it: it knows nothing of rgdiff."""

    def __init__(self, rngs: nnx.Rngs, width: int = 128):
        self.enter = nnx.Linear(2 + 16, width, rngs=rngs)
        self.hidden = nnx.Linear(width, width, rngs=rngs)
        self.leave = nnx.Linear(width, 2, rngs=rngs)

    def __call__(self, x, step):  # x [B, 2], step int32 [B]
        angles = (step[:, None] + 1) / STEPS * jnp.pi * 2.0 ** jnp.arange(-1, 7)
        h = jnp.concatenate([x, jnp.sin(angles), jnp.cos(angles)], -1)
        return self.leave(nnx.silu(self.hidden(nnx.silu(self.enter(h)))))


def trained(updates: int = 3000, batch: int = 256) -> Net:
    """Train the network by the DDPM loss. Nothing of rgdiff is in here."""
    net = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, optax.adam(optax.cosine_decay_schedule(3e-3, updates)), wrt=nnx.Param)
    centres, alpha_bar = jnp.asarray(CENTRES, jnp.float32), jnp.asarray(ALPHA_BAR, jnp.float32)

    def loss(net, key):
        keys = jax.random.split(key, 4)
        x0 = jax.random.choice(keys[0], centres, (batch,)) + STD * jax.random.normal(keys[1], (batch, 2))
        step, eps = jax.random.randint(keys[2], (batch,), 0, STEPS), jax.random.normal(keys[3], (batch, 2))
        a = alpha_bar[step][:, None]
        return jnp.mean((net(jnp.sqrt(a) * x0 + jnp.sqrt(1 - a) * eps, step) - eps) ** 2)

    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def train(carry, key):
        net, optimizer = carry
        optimizer.update(net, nnx.grad(loss)(net, key))
        return carry

    train((net, optimizer), jax.random.split(jax.random.key(0), updates))
    return net


def reward(x0, cond=None):
    """r(x0) = -|x0 - BEST|^2 / 2: at most 0. It has a gradient; `black_box` has one that has none."""
    return -0.5 * jnp.sum((x0 - BEST) ** 2, -1)


def closed_form(temperature: float) -> tuple[float, float]:
    """E[r] and log Z of p(x) exp(r(x) / temperature) / Z, p the mixture."""
    total = (
        STD**2 + temperature
    )  # exp(r / temperature) is a Gaussian of variance `temperature` around BEST, but for its constant
    apart = ((CENTRES - BEST) ** 2).sum(-1)
    weights = (
        0.5 * temperature / total * np.exp(-0.5 * apart / total)
    )  # times (temperature / total)^(D / 2), with D = 2
    variance = STD**2 * temperature / total
    left = apart * (temperature / total) ** 2  # of the squared distance of a component's centre
    return float(-0.5 * (weights / weights.sum()) @ (left + 2 * variance)), float(np.log(weights.sum()))


def main() -> None:
    """Run the tutorial; what it says is asserted."""
    net = trained()

    # 1. The door. Three facts make a network a denoiser (x, t) -> E[x0 | x_t]: how it is called (from_nnx), what its time is
    #    (discrete_time: t in [0, 1] becomes the step), and what it predicts. A fourth helps: where the data can be (clip_x0). Near
    #    t = 1 the error of a predicted eps is divided by alpha = 0.006, and no method is steered by it (`denoisers.says_enough`).
    schedule = schedules.tabulated(ALPHA_BAR)
    process = processes.gaussian(schedule, (2,))  # the shape of one example
    times = process.times(50)  # 50 of the 1,000 steps
    as_x0 = lambda network: denoisers.predicts("eps", denoisers.discrete_time(network, STEPS), schedule)  # noqa: E731
    denoiser = denoisers.clip_x0(as_x0(denoisers.from_nnx(net)), -4.0, 4.0)

    prior_reward, _ = closed_form(1e9)  # a reward of no weight: the prior itself
    target_reward, log_z = closed_form(TEMPERATURE)
    print(f"closed form     E[r] of the prior {prior_reward:.2f}, of the target {target_reward:.2f}, log Z {log_z:.2f}")
    draw = lambda sampler: samplers.sample(sampler, jax.random.key(1), 2048, times)  # noqa: E731
    mean = lambda sampler: float(reward(draw(sampler).x0).mean())  # noqa: E731
    report = lambda name, value: print(f"{name:15s} E[r] {value:.2f}")  # noqa: E731

    report("prior", got := mean(samplers.ancestral(process, denoiser)))
    assert abs(got - prior_reward) < 0.15  # the network and 50 steps for 1,000 cost some hundredths

    # 2. Steering: the network stays as it is. `value` estimates the reward to go; given the same `denoiser` object, each candidate
    #    costs one network call and no second one.
    value = values.posterior_mean(reward, process, denoiser)
    report("svdd", got := mean(samplers.svdd(process, denoiser, value, temperature=TEMPERATURE, candidates=8)))
    assert abs(got - target_reward) < 0.2

    # SMC's samples have weights, and an estimate of log Z comes with its standard error. `adaptive` weighs the value less where it
    # would kill particles, for less variance. The docstring of `smc` says more.
    particles = draw(samplers.smc(process, denoiser, value, temperature=TEMPERATURE, adaptive=0.5))
    weights = jnp.exp(particles.info["log_weights"])  # they sum to 1
    report("smc", got := float(weights @ reward(particles.x0)))
    print(f"{'':15s} log Z {particles.info['log_z']:.2f} +- {particles.info['log_z_se']:.2f}")
    assert abs(got - target_reward) < 0.15 and abs(float(particles.info["log_z"]) - log_z) < 0.15

    # DPS adds the reward's gradient to the score. scale = 1 / temperature. It leaves out the variance of x0 given x_t, so that its
    # samples are too narrow: their reward is above the target's.
    x0 = draw(samplers.ancestral(process, guides.dps(denoiser, process, reward, scale=1 / TEMPERATURE))).x0
    report("dps", got := float(reward(x0).mean()))
    spread = (STD**2 * TEMPERATURE / (STD**2 + TEMPERATURE)) ** 0.5
    print(f"{'':15s} std of x0[1] {x0[:, 1].std():.2f}, of the target {spread:.2f}")
    assert target_reward < got < 0 and float(x0[:, 1].std()) < spread

    # 3. Fine-tuning needs the parameters apart from the network: a model maps parameters to a denoiser.
    network, params = denoisers.nnx_model(net)
    model = lambda params: denoisers.clip_x0(as_x0(network(params)), -4.0, 4.0)  # noqa: E731
    adam = tuners.adamw(1e-3)
    tuned = lambda model, params: mean(samplers.ancestral(process, model(params)))  # noqa: E731

    # DRaFT-LV differentiates the reward through the last network call. Without a reference it maximises the reward alone.
    tuner = tuners.draft_lv(model, process, reward, times, adam, batch=64)
    state = tuners.fit(tuner, jax.random.key(2), tuner.init(params), 100)
    report("draft_lv", got := tuned(model, state.best))
    assert got > target_reward

    # DDPO takes no gradient of the reward. With the prior as reference, E[r] - temperature * path KL is at most temperature * log Z.
    held = {"reference": denoiser, "temperature": TEMPERATURE}
    tuner = tuners.as_tuner(tuners.ddpo(model, process, times, adam, batch=128, **held), reward)
    state = tuners.fit(tuner, jax.random.key(3), tuner.init(params), 100)
    report("ddpo", got := tuned(model, state.best))
    assert abs(got - target_reward) < 0.25

    # 4. A LoRA adapter: the same model, but only two thin factors of every kernel are trained.
    adapter = nets.lora_init(jax.random.key(4), params, rank=4)
    lora = nets.LoRAModel(params, model)
    tuner = tuners.draft_k(lora, process, reward, times, tuners.adamw(2e-2), k=25, batch=32, **held)
    state = tuners.fit(tuner, jax.random.key(5), tuner.init(adapter), 100)
    sampler = samplers.ancestral(process, lora(state.best), reference=denoiser)
    samples = samplers.sample(sampler, jax.random.key(1), 2048, times, keep=samplers.path_kl)
    got, kl = float(reward(samples.x0).mean()), float(samplers.total_path_kl(samples).mean())
    report("draft_k + LoRA", got)
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    print(f"{'':15s} path KL {kl:.2f} nats; {count(adapter)} parameters of {count(params)}")
    print(
        f"{'':15s} E[r] - temperature * KL {got - TEMPERATURE * kl:.2f}, at most temperature * log Z = {TEMPERATURE * log_z:.2f}"
    )
    assert abs(got - target_reward) < 0.25 and got - TEMPERATURE * kl < TEMPERATURE * log_z + 0.05

    # Tuned parameters go back into your module, and the rest of your code does not change.
    nnx.update(net, nets.lora_merge(params, state.best))


if __name__ == "__main__":
    main()
