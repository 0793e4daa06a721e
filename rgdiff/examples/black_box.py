"""Your own black-box reward: plain NumPy on the host, no gradient, its queries counted; some samples cannot be evaluated.

Run it: `python -m rgdiff.examples.black_box`

The prior is N(0, I) in four dimensions, whose denoiser is known, and the reward is linear where it is defined, so that the
results have closed forms. A real simulator and a real network take their places, and nothing else changes.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import processes, rewards, samplers, schedules, tuners, values

DIMS, TEMPERATURE = 4, 0.5
BATCH, CANDIDATES, PARTICLES = 512, 8, 8192


class Simulator:
    """A black box: it takes one example at a time, it may have state, `if`s and failures. It counts its queries."""

    def __init__(self):
        self.queries = 0

    def one(self, x: np.ndarray) -> float:
        self.queries += 1
        if x[1] < 0:
            return float("nan")  # this simulation failed: infeasible. Do not return a large negative number instead.
        return float(x[0])

    def __call__(self, x0: np.ndarray, cond=None) -> np.ndarray:
        return np.array([self.one(x) for x in x0])


def best_feasible(count: int) -> float:
    """E[the largest of those feasible among `count`], given that one is: each is below x or infeasible with p = 1/2 + Phi(x)/2."""
    x = np.linspace(-8, 8, 4001)
    density = np.exp(-(x**2) / 2) / np.exp(-(x**2) / 2).sum()
    law = np.diff((0.5 + 0.5 * np.cumsum(density)) ** count)
    return float(x[1:] @ law / law.sum())


def main() -> None:
    """Run the tutorial; what it says is asserted."""
    # "fixed_large" is the variance of the moves that is exact for N(0, I). With your own network leave it out.
    process = processes.gaussian(schedules.linear_vp(), (DIMS,), variance="fixed_large")
    alpha, sigma = process.schedule.alpha, process.schedule.sigma
    model = lambda w: lambda x, t, cond=None: alpha(t) * x + sigma(t) ** 2 * w  # noqa: E731 - the exact denoiser of N(w, I)
    denoiser = model(jnp.zeros(DIMS))
    times = process.times(50)
    moves = len(times) - 1  # 49, and the last call projects to x0

    simulator = Simulator()
    reward = rewards.from_host(simulator)  # from here on it can be called within compiled programs

    def report(name: str, mean: float, expected: str, calls: int) -> None:
        print(f"{name:10s} E[r] {mean:5.2f} ({expected}), {simulator.queries:9,d} queries, {calls:9,d} network calls")
        simulator.queries = 0

    # 1. Best-of-N asks N times a sample, at the end of the chain.
    best = samplers.best_of_n(samplers.ancestral(process, denoiser), reward, CANDIDATES)
    x0 = samplers.sample(best, jax.random.key(0), BATCH, times).x0
    expected = best_feasible(CANDIDATES)
    assert simulator.queries == BATCH * CANDIDATES
    report(
        "best_of_n",
        got := float(x0[x0[:, 1] >= 0, 0].mean()),
        f"closed form {expected:.2f}",
        BATCH * best.network_calls(moves),
    )
    assert abs(got - expected) < 0.15
    # In 2^-8 of the groups all are infeasible. Then an infeasible sample comes back.
    assert float((x0[:, 1] < 0).mean()) < 0.02

    # 2. SVDD-PM asks at every move, for every candidate, what E[x0 | x_t] is worth. It aims at p(x) exp(r(x)/temperature)/Z, whose
    #    E[r] is 1 / temperature here, and stays below it by an error of order 1 / candidates.
    value = values.posterior_mean(reward, process, denoiser)
    svdd = samplers.svdd(process, denoiser, value, temperature=TEMPERATURE, candidates=CANDIDATES)
    x0 = samplers.sample(svdd, jax.random.key(1), BATCH, times).x0
    assert simulator.queries == BATCH * svdd.value_calls(moves)
    report("svdd", got := float(x0[:, 0].mean()), f"below {1 / TEMPERATURE:.2f}", BATCH * svdd.network_calls(moves))
    assert 1.3 < got < 1 / TEMPERATURE

    # 3. SMC asks once a particle and move, and corrects by weights what SVDD leaves: log Z = log E[exp(r / temperature)] over the
    #    feasible half is 1 / (2 temperature^2) + log 1/2, and the infeasible coordinate is that of the prior, above 0.
    smc = samplers.smc(process, denoiser, value, temperature=TEMPERATURE)
    particles = samplers.sample(smc, jax.random.key(2), PARTICLES, times)
    weights = jnp.exp(particles.info["log_weights"])
    got, x1 = float(weights @ particles.x0[:, 0]), float(weights @ particles.x0[:, 1])
    assert simulator.queries == PARTICLES * smc.value_calls(moves)
    report("smc", got, f"closed form {1 / TEMPERATURE:.2f}", PARTICLES * smc.network_calls(moves))
    log_z, exact = float(particles.info["log_z"]), 0.5 / TEMPERATURE**2 - np.log(2)
    print(f"{'':10s} log Z {log_z:.2f} +- {particles.info['log_z_se']:.2f} (closed form {exact:.2f})")
    print(f"{'':10s} E[x1] {x1:.2f} (closed form {np.sqrt(2 / np.pi):.2f})")
    assert abs(got - 1 / TEMPERATURE) < 0.3 and abs(log_z - exact) < 0.4 and abs(x1 - np.sqrt(2 / np.pi)) < 0.2

    # 4. DDPO asks once a sample and step, between two compiled programs: the reward may take hours, and is passed as it is. With
    #    the prior as reference the optimum is the same target, N((1 / temperature, 0, ...), I). Infeasible samples are left out.
    method = tuners.ddpo(
        model, process, times, tuners.adamw(0.2, decay_steps=100), batch=64, reference=denoiser, temperature=TEMPERATURE
    )
    steps, infeasible = 100, []
    state = tuners.fit_online(
        method,
        jax.random.key(3),
        method.init(jnp.zeros(DIMS)),
        steps,
        simulator,
        on_step=lambda state, info: infeasible.append(int(info["infeasible"])),
    )
    assert simulator.queries == steps * 64
    report(
        "ddpo", got := float(state.best[0]), f"closed form {1 / TEMPERATURE:.2f}", steps * 64 * method.network_calls()
    )
    print(f"{'':10s} {np.mean(infeasible):.0f} of 64 infeasible a step")
    assert abs(got - 1 / TEMPERATURE) < 0.3


if __name__ == "__main__":
    main()
