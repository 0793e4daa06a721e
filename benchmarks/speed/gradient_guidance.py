"""The sides of `gradient-guidance`: rounds of algorithm 1 with the exact score or a 1-D U-Net, ours and PyTorch's.

As in `benchmarks.speed.rows`: `export` hands over the random numbers of one round and its samples, `check` repeats it. A block
is ROUNDS rounds (one with the network, which predicts v) of B = 32 chains of T = 200 DDPM steps on a 16-dimensional
subspace of R^64, each round ending in the query of the reward's gradient; under G_loss PyTorch takes one vector-Jacobian
product a step, as we do.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from benchmarks.speed.measures import flat, forward_flops, nested, ready_torch, weights

CHANNELS = (16, 32, 64)
BATCH, STEPS, DIMENSIONS, INNER, ROUNDS, SEED = 32, 200, 64, 16, 5, 0
NOISE, DELTA, PEAK, AT = 0.1, 0.2, 10.0, 3.0


def constants() -> tuple[np.ndarray, np.ndarray]:
    """A basis [16, 64] and a theta with a ninth of it inside, as in the paper."""
    q = np.linalg.qr(np.random.default_rng(SEED).normal(size=(DIMENSIONS, DIMENSIONS)))[0].T
    return q[:INNER].astype(np.float32), (0.11 * q[0] + np.sqrt(1 - 0.11**2) * q[-1]).astype(np.float32)


class Ours:
    """Our side of a case (`method` g or g_loss, `network` or the exact score), on JAX's default device."""

    note = ""

    def __init__(self, case: Any):
        import jax
        import jax.numpy as jnp

        from rgdiff import denoisers, guides, processes, schedules, tuners
        from rgdiff.domains.subspace.data import Parabola, SubspaceDenoiser
        from rgdiff.nets import UNet

        jax.config.update("jax_default_matmul_precision", "highest")
        self.jax, (basis, theta) = jax, constants()
        self.process = processes.gaussian(schedules.cosine_ddpm(STEPS), (DIMENSIONS,))
        schedule = self.process.schedule
        denoiser: Any = SubspaceDenoiser(schedule, jnp.asarray(basis))
        self.rounds, self.params = 1 if case.network else ROUNDS, {}
        if case.network:
            net, row = UNet(channels=CHANNELS), jnp.zeros((BATCH, DIMENSIONS))
            shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), row, jnp.float32(1))["params"])
            self.params = jax.tree.map(jnp.asarray, weights(shapes))
            network = denoisers.from_linen(net, self.params)
            self.operations = forward_flops(network, row, jnp.float32(1))
            denoiser = denoisers.predicts("v", network, schedule)
        else:  # products with the basis only
            self.operations = 2.0 * 2 * BATCH * DIMENSIONS * INNER
        self.times = self.process.times(STEPS)
        self.tuner = tuners.gradient_guidance(
            lambda params: denoiser,
            self.process,
            Parabola(jnp.asarray(theta), jnp.float32(PEAK), jnp.float32(AT)),
            self.times,
            batch=BATCH,
            guidance=case.method,
            target=guides.increment(DELTA),
            noise=NOISE,
        )
        self.state = tuners.fit(
            self.tuner, jax.random.key(SEED), self.tuner.init(jnp.zeros(())), 1 if case.network else 3
        )

    @functools.cached_property
    def program(self) -> Any:
        """The compiled rounds: (key, state) -> state, without the loop's bookkeeping on the host."""

        def rounds(key: Any, state: Any) -> Any:
            keys = self.jax.random.split(key, self.rounds)
            return self.jax.lax.scan(lambda state, key: self.tuner.step(key, state), state, keys)[0]

        key = self.jax.random.key(SEED)
        return self.jax.jit(rounds).lower(key, self.state).compile()

    @property
    def flops(self) -> float:
        """Of a block: the denoiser's, and as many again for its product under G_loss."""
        return self.rounds * STEPS * (2 if self.tuner.guidance == "g_loss" else 1) * self.operations

    def block(self, seed: int) -> None:
        self.state = self.jax.block_until_ready(self.program(self.jax.random.key(seed), self.state))

    def memory(self) -> dict[str, float]:
        return {"temporaries": float(self.program.memory_analysis().temp_size_in_bytes)}

    def export(self) -> dict[str, Any]:
        """One round: coefficients per call, its query, its random numbers, its samples and the query at them."""
        jax, schedule, t = self.jax, self.process.schedule, self.times
        jnp = jax.numpy
        s = jnp.append(t[1:], t[-1])
        shrink = jnp.sqrt(-jnp.expm1(schedule.log_snr(t) - schedule.log_snr(s)))
        std = schedule.sigma(s) * shrink
        direction = jnp.sqrt(schedule.sigma(s) ** 2 - std**2)
        key = jax.random.key(SEED + 2)
        chain = jax.random.split(key)[1]
        draws = [jax.random.normal(jax.random.fold_in(chain, i), (BATCH, DIMENSIONS)) for i in range(STEPS)]
        after, _ = jax.jit(self.tuner.step)(key, self.state)
        out = {
            "table": jnp.stack([t, schedule.alpha(t), schedule.sigma(t), schedule.alpha(s), std, direction], 1),
            "gradient": self.state.gradient,
            "target": self.state.target,
            "noise": jnp.stack(draws),
            "x0": after.x0,
            "gradient_after": after.gradient,
        }
        return {name: np.asarray(value) for name, value in (out | flat(self.params)).items()}


class Torch:
    """PyTorch's side, eager or with the step compiled."""

    def __init__(self, case: Any, given: dict[str, Any], compiled: bool, threads: int, mode: str | None):
        self.torch = torch = ready_torch(threads)
        self.given, self.look_ahead, self.net = given, case.method == "g_loss", None
        self.rounds = 1 if case.network else ROUNDS
        if case.network:
            from benchmarks.speed.torch_twins import UNet, load_linen

            self.net = load_linen(UNet(CHANNELS, axes=1), nested(given)).requires_grad_(False)
        basis, theta = constants()
        self.basis, self.theta = torch.tensor(basis), torch.tensor(theta)
        self.table = given["table"].astype(float).tolist()
        self.step = torch.compile(self._step, mode=mode) if compiled else self._step
        self.query = torch.tensor(given["gradient"]), torch.tensor(given["target"])

    def _predict(self, x: Any, t: float, alpha: float, sigma: float) -> Any:
        if self.net is None:
            return alpha * (x @ self.basis.T) @ self.basis
        times = self.torch.full(x.shape[:1], t)
        return alpha * x - sigma * self.net(x[:, None], times)[:, 0]

    def _step(self, x: Any, gradient: Any, target: Any, t: float, alpha: float, sigma: float) -> Any:
        """The guided prediction of x0."""
        torch, variance = self.torch, sigma**2
        if self.look_ahead:
            x = x.detach().requires_grad_()
            prediction = self._predict(x, t, alpha, sigma)
            look = (gradient * prediction).sum(1)
            (direction,) = torch.autograd.grad(look.sum(), x)
            prediction, look = prediction.detach(), look.detach()
            strength = alpha**2 / (alpha**2 * NOISE**2 + variance * (direction**2).sum(1))
        else:
            prediction = self._predict(x, t, alpha, sigma)
            look, direction = (gradient * prediction).sum(1), gradient
            strength = alpha / (NOISE**2 + variance * (direction**2).sum(1))
        return prediction + (variance / alpha * strength * (target - look))[:, None] * direction

    def round(self, noise: Any = None) -> Any:
        """Sample under the last query and query at the samples; returns x0."""
        torch, (gradient, target) = self.torch, self.query
        draw = lambda i: torch.randn(BATCH, DIMENSIONS) if noise is None else noise[i]  # noqa: E731
        x = draw(0)
        for i, (t, alpha, sigma, alpha_s, std, direction) in enumerate(self.table):
            x0 = self.step(x, gradient, target, t, alpha, sigma)
            if i < STEPS - 1:
                x = alpha_s * x0 + direction / sigma * (x - alpha * x0) + std * draw(i + 1)
        x = x0.detach().requires_grad_()
        reward = PEAK - (x @ self.theta - AT) ** 2
        (gradient,) = torch.autograd.grad(reward.sum(), x)
        self.query = gradient, DELTA + (gradient * x0).sum(1)
        return x0

    def check(self) -> float:
        x0 = self.round(self.torch.tensor(self.given["noise"]))
        relative = lambda got, want: float(np.linalg.norm(got - want) / np.linalg.norm(want))  # noqa: E731
        query = relative(self.query[0].numpy(), self.given["gradient_after"])
        return max(relative(x0.numpy(), self.given["x0"]), query)

    def block(self, seed: int) -> None:
        for _ in range(self.rounds):
            self.round()

    def memory(self) -> dict[str, float]:
        return {}
