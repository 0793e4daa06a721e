"""The sides of `dxmi`: one iteration of the released configuration on points in the plane, T = 5, batch 256, the same perceptrons.

A block is ITERATIONS iterations. The comparison is of four figures (losses of energy, values and policy, and the norm of the
policy's gradient) over ten iterations from the same weights and noise.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from benchmarks.speed.measures import SEED, flat, forward_flops, nested, planned_memory, ready_torch, torch_memory
from benchmarks.speed.rows import Case

BATCH, ITERATIONS, COMPARED = 256, 20, 10
FIGURES = ("energy_loss", "loss", "policy_loss", "gradient_norm")
RATES: dict[str, Any] = {"learning_rate": 1e-4, "sigma_learning_rate": 1e-4, "value_learning_rate": 1e-4}


class Ours:
    """Our side, on JAX's default device."""

    note = ""

    def __init__(self, case: Case):
        import jax

        from benchmarks.studies import dxmi_2d
        from rgdiff import tuners
        from rgdiff.domains.planar import data as planar

        self.case, self.jax, self.bench = case, jax, dxmi_2d
        key_policy, key_value = jax.random.split(jax.random.key(SEED))
        self.network, self.critic = dxmi_2d.weights(key_policy, 2, 0.3), dxmi_2d.weights(key_value, 1)
        self.tuner = tuners.dxmi_released(dxmi_2d.POLICY, dxmi_2d.PROCESS, dxmi_2d.VALUE, dim=2, batch=BATCH, **RATES)
        self.state = self.tuner.init({"policy": dxmi_2d.POLICY.init(self.network), "value": self.critic})
        self.data = {"x0": planar.eight_gaussians().sample(jax.random.key(SEED + 1), 8192)}

    @functools.cached_property
    def program(self) -> Any:
        """The compiled block: (key, state, data) -> (state, infos)."""
        jax = self.jax
        return jax.jit(self._iterations, static_argnums=3).lower(
            jax.random.key(SEED), self.state, self.data, ITERATIONS
        ).compile()  # fmt: skip

    def _iterations(self, key: Any, state: Any, data: Any, count: int) -> Any:
        from rgdiff.tuners._loop import draw_rows

        def one(state: Any, key: Any) -> Any:
            key_rows, key = self.jax.random.split(key)
            return self.tuner.step(key, state, draw_rows(key_rows, data, BATCH))

        return self.jax.lax.scan(one, state, self.jax.random.split(key, count))

    @functools.cached_property
    def flops(self) -> float:
        """Of one block: forward passes as XLA counts them, a gradient two of them."""
        jax, bench = self.jax, self.bench
        one = lambda rows: forward_flops(  # noqa: E731
            bench.scalar, self.critic, jax.numpy.zeros((rows, 2)), jax.numpy.float32(0)
        )
        moves = 5
        return ITERATIONS * ((moves + 4 * moves + 6) * one(BATCH) + 3 * one(2 * BATCH))

    def block(self, seed: int) -> None:
        self.jax.block_until_ready(self.program(self.jax.random.key(seed), self.state, self.data))

    def memory(self) -> dict[str, float]:
        return planned_memory(self.program, lambda: self.block(0))

    def export(self) -> dict[str, Any]:
        """Weights, data and noise of COMPARED iterations, and their figures."""
        jax, jnp, tuner = self.jax, self.jax.numpy, self.tuner
        out: dict[str, Any] = flat(_by_name(self.network), "policy") | flat(_by_name(self.critic), "value")
        moves, rows = 5, -(-BATCH // 5)
        random: dict[str, list[Any]] = {name: [] for name in ("data", "x", "noise", "again")}
        figures, state, step = [], self.state, jax.jit(tuner.step)
        for n in range(COMPARED):
            key = jax.random.fold_in(jax.random.key(SEED + 2), n)
            random["data"].append(self.data["x0"][n * BATCH : (n + 1) * BATCH])
            key_path, _, key_policy = jax.random.split(key, 3)
            random["x"].append(jax.random.normal(jax.random.fold_in(key_path, 0), (BATCH, 2)))
            keys = [jax.random.fold_in(key_path, 1 + i) for i in range(moves)]
            random["noise"].append(jnp.stack([jax.random.normal(k, (BATCH, 2)) for k in keys]))
            random["again"].append(
                jax.vmap(lambda k: jax.random.normal(k, (rows, 2)))(jax.random.split(key_policy, moves))
            )
            state, info = step(key, state, {"x0": random["data"][-1]})
            figures.append([info[name] for name in FIGURES])
        out |= {name: jnp.stack(parts) for name, parts in random.items()}
        out |= {"figures": jnp.asarray(figures), "speed": self.state.extra.speed, "log_sigma": self.bench.POLICY.start}
        out |= {"time_cost": tuner.time_cost, "reach": jnp.exp(self.bench.POLICY.reach)}
        return {name: np.asarray(value) for name, value in out.items()}


def _by_name(params: Any) -> Any:
    """Layers by name, for a file."""
    return {"hidden": {str(i): layer for i, layer in enumerate(params["hidden"])}, "out": params["out"]}


class Torch:
    """PyTorch's side, eager or compiled, on the CPU."""

    def __init__(self, case: Case, given: dict[str, Any], compiled: bool, threads: int, mode: str | None):
        from benchmarks.speed import torch_dxmi

        self.torch, self.case, self.given = ready_torch(threads), case, given
        nets: list[Any] = []
        for name, out in (("policy", 2), ("value", 1)):
            params = nested(given, name)
            params["hidden"] = [params["hidden"][str(i)] for i in range(3)]
            nets.append(torch_dxmi.Perceptron(out, shared_time=case.reuse).load(params))
        options = {
            "entropy_weight": 0.05, "velocity_weight": 0.005, "gamma": 1.0, "clip": 0.1, "velocity_decay": 0.99,
            "time_cost": given["time_cost"].tolist(), **RATES,
        }  # fmt: skip
        reach = float(given["reach"])
        self.trainer = torch_dxmi.Trainer(
            nets[0], nets[1], given["log_sigma"], reach, given["speed"], options, compiled, mode
        )

    def check(self) -> float:
        """Repeat our iterations; the largest difference of a figure, relative to the figure's size over the iterations."""
        given = {name: self.torch.tensor(self.given[name]) for name in ("data", "x", "noise", "again")}
        got = []
        for n in range(COMPARED):
            data, x, noise, again = (given[name][n] for name in given)
            out = self.trainer.iteration(data, x, noise, again, n)
            got.append([out[name] for name in FIGURES])
        want = self.given["figures"]
        return float((np.abs(np.array(got) - want) / np.abs(want).max(0)).max())

    def block(self, seed: int, batch: int = BATCH) -> None:
        torch = self.torch
        rows, data = -(-batch // 5), torch.tensor(self.given["data"]).flatten(0, 1)
        for n in range(ITERATIONS):
            chosen = torch.randint(len(data), (batch,))
            noise, again = torch.randn(5, batch, 2), torch.randn(5, rows, 2)
            self.trainer.iteration(data[chosen], torch.randn(batch, 2), noise, again, n)

    def memory(self) -> dict[str, float]:
        return torch_memory(self.block)
