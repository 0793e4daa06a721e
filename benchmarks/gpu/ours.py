"""Our side: networks in bfloat16, every row one compiled program. A process of its own; writes one line of JSON a row."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.gpu.work import CANDIDATES, RANK, RATE, RENOISED, TEMPERATURE, Work
from benchmarks.speed import rows
from benchmarks.speed.measures import flat, weights
from rgdiff import denoisers, nets, processes, samplers, schedules, tuners, values

KINDS = {"unet": nets.UNet, "dit": nets.DiT}


def network(work: Work, dtype: Any) -> Any:
    return KINDS[work.kind](**work.options, dtype=dtype)


def parameters(work: Work) -> Any:
    """Random weights of the usual size, float32."""
    net = network(work, jnp.float32)
    given = jnp.zeros((1, *work.shape)), jnp.zeros(1)
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), *given)["params"])
    return jax.tree.map(jnp.asarray, weights(shapes))


class Side:
    """A network's rows. `run(row)` starts one, `wait()` waits for it; compiling is the first call's."""

    def __init__(self, work: Work, dtype: Any = jnp.bfloat16):
        self.work, self.net = work, network(work, dtype)
        self.schedule, self.params = schedules.linear_vp(), parameters(work)
        self.eta = {eta: processes.gaussian(self.schedule, work.shape, eta=eta) for eta in (0.0, 1.0)}
        self.times = self.eta[1.0].times(work.calls)
        self.made: dict[str, tuple[Any, Any]] = {}
        self.last: Any = None

    def model(self, params: Any) -> Any:
        return denoisers.predicts("v", denoisers.from_linen(self.net, params), self.schedule)

    def coefficients(self) -> dict[str, np.ndarray]:
        """What the other side's chains are made of, see `rows.table`."""
        return {f"eta{eta:.0f}": np.asarray(rows.table(process, self.times)) for eta, process in self.eta.items()}

    def forward(self) -> dict[str, np.ndarray]:
        """Weights, a state and what the network makes of it, for a comparison."""
        x = jax.random.normal(jax.random.key(1), (2, *self.work.shape))
        out = self.net.apply({"params": self.params}, x, jnp.full(2, 0.3))
        return {name: np.asarray(leaf) for name, leaf in ({"x": x, "out": out} | flat(self.params)).items()}

    def tuner(self, row: str) -> tuple[Any, Any]:
        """The tuner of a row and what it tunes: a LoRA adapter."""
        work, adapter = self.work, nets.lora_init(jax.random.key(2), self.params, RANK)
        model, adam = nets.LoRAModel(self.params, self.model), optax.adamw(RATE)
        options = {"batch": work.batch, "remat": "everything" if work.remat else "none"}
        given = (model, self.eta[0.0], rows.reward, self.times, adam)
        if row == "ddpo":
            method = tuners.ddpo(model, self.eta[1.0], self.times, adam, batch=work.batch)
            return tuners.as_tuner(method, rows.reward), adapter
        if row == "draft_lv":
            return tuners.draft_lv(*given, n=RENOISED, **options), adapter
        return tuners.draft_k(*given, k=int(row[-1]), **options), adapter

    def build(self, row: str) -> tuple[Any, Any]:
        """A function (key, state) -> (state, result) and the first state."""
        work, denoiser, process = self.work, self.model(self.params), self.eta[1.0]
        if row in ("ancestral", "svdd"):
            sampler = samplers.ancestral(process, denoiser)
            if row == "svdd":
                value = values.posterior_mean(rows.reward, process, denoiser)
                sampler = samplers.svdd(process, denoiser, value, temperature=TEMPERATURE, candidates=CANDIDATES)
            chain = jax.jit(lambda sampler, key, times: samplers.sample(sampler, key, work.batch, times).x0)
            return lambda key, state: (state, chain(sampler, key, self.times)), None
        tuner, adapter = self.tuner(row)
        step = jax.jit(lambda tuner, key, state: tuner.step(key, state), donate_argnums=2)
        return lambda key, state: step(tuner, key, state), tuner.init(adapter)

    def run(self, row: str) -> None:
        if row not in self.made:
            self.made[row] = self.build(row)
        step, state = self.made[row]
        state, self.last = step(jax.random.key(0), state)
        self.made[row] = step, state

    def wait(self) -> None:
        jax.block_until_ready(self.last)

    def drop(self, row: str) -> None:
        """Let go of a row's program and state."""
        self.made.pop(row, None)
        jax.clear_caches()

    def flops(self) -> float:
        """Operations of one forward pass of a batch, in matrix products and convolutions."""
        from rgdiff.runtime.planning import operations

        x = jax.ShapeDtypeStruct((self.work.batch, *self.work.shape), jnp.float32)
        forward = lambda p, x: self.net.apply({"params": p}, x, jnp.zeros(self.work.batch))  # noqa: E731
        return operations(jax.make_jaxpr(forward)(self.params, x).jaxpr)


def device() -> str:
    return jax.devices()[0].device_kind


def memory() -> float | None:
    """The most bytes that were in use so far."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def peak(size: int, repeats: int = 10) -> float:
    """The best rate of a product of matrices in bfloat16, operations a second."""
    import time

    a = jnp.ones((size, size), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    jax.block_until_ready(product(a))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(product(a))
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
