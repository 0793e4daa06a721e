"""DNA with an exact answer: a masked diffusion model of 6-mers, steered and fine-tuned, beside the enumerated distribution.

Run it: `python -m rgdiff.examples.dna_exact`

There are 4^6 = 4,096 sequences and 5^6 = 15,625 partly masked states, few enough to compute the law of a trained network's chain,
its tilt by a reward, and the reward to go of every state. What a method should give is therefore known, errors of the network
included. For longer sequences leave `rgdiff.exact` out; the methods are called in the same way.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import denoisers, nets, processes, resampling, samplers, schedules, tuners, values
from rgdiff.exact import enumeration

LETTERS, LENGTH, TEMPERATURE, BATCH = "ACGT", 6, 0.5, 2048
FOLLOWS = np.array(
    [[4, 1, 2, 1], [2, 3, 0.5, 3], [3, 2, 3, 1], [1, 2, 3, 3]]
)  # after A, C, G, T: "CG" is rare, as in genomes


def natural(count: int, seed: int = 0) -> np.ndarray:
    """Draw sequences of a Markov chain, one-hot [count, L, 4]: the data."""
    draws, law = np.random.default_rng(seed).random((count, LENGTH)), (FOLLOWS.T / FOLLOWS.sum(1)).T.cumsum(1)
    letters = np.zeros((count, LENGTH), int)
    letters[:, 0] = draws[:, 0] * 4
    for i in range(1, LENGTH):
        letters[:, i] = (draws[:, i, None] > law[letters[:, i - 1]]).sum(1)
    return np.eye(4, dtype=np.float32)[letters]


def reward(x0, cond=None):
    """The number of "CG" in a sequence, x0 one-hot [B, L, 4] -> [B]."""
    return jnp.sum(x0[:, :-1, LETTERS.index("C")] * x0[:, 1:, LETTERS.index("G")], -1)


def main() -> None:
    """Run the tutorial; what it says is asserted."""
    # 1. A prior. States are one-hot over four letters and the mask; the network returns logits for the letters. The chain of a
    #    first-hitting process unmasks one letter a move, and has no error of discretisation: L moves, the times are its own.
    masked = processes.masked(schedules.log_linear_mask(), LENGTH, classes=4)
    process = processes.first_hitting(masked)
    times = process.times()
    network = nets.MLP(features=(64, 64), out=(LENGTH, 4))
    params = network.init(jax.random.key(0), jnp.zeros((1, LENGTH, 5)), jnp.zeros(1))["params"]
    model = denoisers.LinenModel(network)  # params -> denoiser; logits need no `predicts`
    tuner = tuners.pretraining(model, masked, tuners.adamw(2e-3), ema_decay=0.99)
    state = tuners.fit(tuner, jax.random.key(1), tuner.init(params), 1000, data={"x0": natural(20_000)}, batch=256)
    params, prior = state.best, model(state.best)

    # 2. The exact answer: the law of the network's chain, the rewards of all sequences, and the tilt of one by the other.
    law = enumeration.chain_law(process, prior, times)
    rewards = enumeration.all_rewards(reward, LENGTH, 4)
    target = enumeration.tilted(law, rewards, TEMPERATURE)
    print(f"{'data':22s} E[r] {reward(natural(100_000, 1)).mean():.3f}")
    print(f"{'prior, exact':22s} E[r] {law @ rewards:.3f}")
    print(f"{'target, exact':22s} E[r] {target.reward_mean:.3f}, log Z {target.log_z:.3f}, KL {target.kl:.3f} nats")
    assert abs(law.sum() - 1) < 1e-6

    def draw(sampler, key: int):
        return samplers.sample(sampler, jax.random.key(key), BATCH, times)

    def report(name: str, scores, expected: float, below: float) -> float:
        """Print a mean reward with its standard error; it is the expected one, or at most `below` short of it."""
        mean, error = float(scores.mean()), float(scores.std()) / BATCH**0.5
        print(f"{name:22s} E[r] {mean:.3f} +- {error:.3f}")
        assert expected - below - 4 * error < mean < expected + 4 * error, name
        return expected - mean

    report("prior, sampled", reward(draw(samplers.ancestral(process, prior), 2).x0), float(law @ rewards), 0)

    # 3. SVDD with the exact value comes near the target as 1 / candidates. In practice the value is a guess: `posterior_mean` is
    #    the reward of the mean of all completions, a point that is no sequence. It is free, and here not far off.
    exact = enumeration.chain_value(process, prior, times, rewards, TEMPERATURE)
    guess = values.posterior_mean(reward, process, prior)

    def svdd(name: str, value, candidates: int, below: float) -> float:
        sampler = samplers.svdd(process, prior, value, temperature=TEMPERATURE, candidates=candidates)
        return report(f"svdd, {name}, M={candidates}", reward(draw(sampler, 3).x0), target.reward_mean, below)

    few, many = svdd("exact value", exact, 4, 0.3), svdd("exact value", exact, 32, 0.05)
    assert abs(many) < few / 4
    svdd("guess", guess, 32, 0.15)

    # 4. SMC reaches the target whatever the value: its weights correct the guess. Particles share ancestors, so that the error of
    #    their mean comes from lineages, and not from their spread alone.
    particles = draw(samplers.smc(process, prior, guess, temperature=TEMPERATURE), 4)
    info, scores = particles.info, reward(particles.x0)
    got, error = (
        jnp.exp(info["log_weights"]) @ scores,
        resampling.standard_error(scores, info["lineages"], info["log_weights"]),
    )
    print(f"{'smc, guess':22s} E[r] {got:.3f} +- {error:.3f}, log Z {info['log_z']:.3f} +- {info['log_z_se']:.3f}")
    assert abs(got - target.reward_mean) < 4 * error and abs(info["log_z"] - target.log_z) < 4 * info["log_z_se"]

    # 5. DRAKES fine-tunes the network. Its objective E[r] - temperature * path KL is at most temperature * log Z, and reaches it
    #    exactly where the tuned chain is the target. Both sides are computed, not sampled.
    tuner = tuners.drakes(
        model,
        process,
        reward,
        times,
        tuners.adamw(3e-3, decay_steps=300),
        batch=256,
        reference=prior,
        temperature=TEMPERATURE,
    )
    state = tuners.fit(tuner, jax.random.key(5), tuner.init(params), 300)
    tuned = enumeration.chain_law_and_kl(process, model(state.best), times, prior)
    mean, best = tuned.probabilities @ rewards, TEMPERATURE * target.log_z
    reached = mean - TEMPERATURE * tuned.path_kl
    print(f"{'drakes, exact':22s} E[r] {mean:.3f}, path KL {tuned.path_kl:.3f} nats")
    print(f"{'':22s} E[r] - temperature * KL {reached:.4f}, at most {best:.4f}")
    assert best - 0.02 < reached < best + 1e-4


if __name__ == "__main__":
    main()
