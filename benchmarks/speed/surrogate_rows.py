"""The sides of `surrogates`: a refit of a bootstrap ensemble, all heads by `vmap` or one after another, ours and PyTorch's.

As in `benchmarks.speed.rows`: `export` hands over the data, the first parameters, the rows that every step of a short fit draws, and
its predictions; `check` repeats that fit. A block is a whole refit: HEADS networks of 3 x 128, OBSERVATIONS answers, STEPS
steps of Adam. Ours by `vmap` is one program; in a loop it is one compiled program a step, called from Python.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from benchmarks.speed.measures import SEED, flat, forward_flops, nested, planned_memory, ready_torch

HEADS, STEPS, BATCH, OBSERVATIONS, DIMENSIONS = 8, 300, 64, 1024, 32
FEATURES = (128, 128, 128)
RATE, CHECKED = 1e-3, 20


def data() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(SEED)
    x = random.standard_normal((OBSERVATIONS, DIMENSIONS), np.float32)
    return x, np.sin(x[:, 0]) + x[:, 1] * x[:, 2] + 0.1 * random.standard_normal(OBSERVATIONS, np.float32)


@functools.cache
def network() -> Any:
    import flax.linen as nn

    class Perceptron(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            for i, size in enumerate(FEATURES):
                x = nn.silu(nn.Dense(size, name=f"dense{i}")(x))
            return nn.Dense(1, name=f"dense{len(FEATURES)}")(x)[:, 0]

    return Perceptron()


class Ours:
    """Our side of a case (`method` vmap or loop), on JAX's default device."""

    note = ""

    def __init__(self, case: Any):
        import jax
        import jax.numpy as jnp
        import optax

        from rgdiff import surrogates

        jax.config.update("jax_default_matmul_precision", "highest")
        self.case, self.jax, self.optimizer = case, jax, optax.adam(RATE)
        x, y = (jnp.asarray(a) for a in data())
        self.observations = surrogates.append(surrogates.empty(x, OBSERVATIONS), 0, x, y)

    def ensemble(self, steps: int) -> Any:
        from rgdiff import surrogates

        return surrogates.ensemble(network(), self.optimizer, heads=HEADS, steps=steps, batch=BATCH)

    @functools.cached_property
    def program(self) -> Any:
        """The compiled refit (key, observations) -> belief; or one step of one head, (key, counts, state) -> state."""
        key = self.jax.random.key(SEED)
        if self.case.method == "vmap":
            surrogate = self.ensemble(STEPS)
            return self.jax.jit(surrogate.fit).lower(key, self.observations).compile()
        head = self.jax.tree.map(lambda leaf: leaf[0], self._begin(key))
        return self._step.lower(*head).compile()

    @functools.cached_property
    def _begin(self) -> Any:
        """key -> (key, counts, state) of every head, as `Ensemble.fit` draws them."""
        jax = self.jax
        from rgdiff.surrogates import networks

        def begin(key: Any) -> Any:
            key_init, _, key_resample, key_fit = jax.random.split(key, 4)
            split = lambda k: jax.random.split(k, HEADS)  # noqa: E731
            params = jax.vmap(lambda k: networks.initial(k, network(), self.observations.x0))(split(key_init))
            counts = jax.vmap(networks.bootstrap, (0, None))(split(key_resample), self.observations.answered)
            return split(key_fit), counts, jax.vmap(lambda c, p: self._fitting(c).init(p))(counts, params)

        return jax.jit(begin)

    def _fitting(self, counts: Any) -> Any:
        from rgdiff.surrogates import networks

        o = self.observations
        target = (o.values - o.mean) / o.std
        return networks.Fitting(o.x0, target, 0 * target, counts, network(), self.optimizer, BATCH)

    @functools.cached_property
    def _step(self) -> Any:
        from rgdiff.tuners._loop import train

        step = lambda key, counts, state: train(self._fitting(counts), key, state, None, 1, None)[0]  # noqa: E731
        return self.jax.jit(step, donate_argnums=2)

    def refit(self, key: Any, steps: int) -> list[Any]:
        """Fit head after head, a program a step; returns their parameters."""
        every = self._begin(key)
        params = []
        for head in range(HEADS):
            key, counts, state = self.jax.tree.map(lambda leaf: leaf[head], every)  # noqa: B023
            for _ in range(steps):
                state = self.program(key, counts, state)
            params.append(state.params)
        return params

    @property
    def flops(self) -> float:
        params = self.jax.tree.map(lambda leaf: leaf[0], self._begin(self.jax.random.key(SEED))[2].params)
        forward = lambda p, x: network().apply({"params": p}, x)  # noqa: E731
        return 3 * HEADS * STEPS * forward_flops(forward, params, self.observations.x0[:BATCH])

    def block(self, seed: int) -> None:
        key = self.jax.random.key(seed)
        if self.case.method == "vmap":
            self.jax.block_until_ready(self.program(key, self.observations))
        else:
            self.jax.block_until_ready(self.refit(key, STEPS))

    def memory(self) -> dict[str, float]:
        return planned_memory(self.program, lambda: self.block(0))

    def export(self) -> dict[str, Any]:
        """Data, first parameters, the rows of CHECKED steps of every head, and the heads' standardised predictions after them."""
        jax, o = self.jax, self.observations
        jnp, key = jax.numpy, jax.random.key(SEED + 2)
        keys, counts, states = self._begin(key)

        def rows(key: Any, counts: Any, step: Any) -> Any:
            ticket = jax.random.randint(jax.random.split(jax.random.fold_in(key, step))[1], (BATCH,), 0, counts.sum())
            return jnp.searchsorted(jnp.cumsum(counts), ticket, side="right")

        drawn = jax.vmap(lambda k, c: jax.vmap(lambda i: rows(k, c, i))(jnp.arange(CHECKED)))(keys, counts)
        if self.case.method == "vmap":
            belief = jax.jit(self.ensemble(CHECKED).fit)(key, o)
            params = belief.heads.params
        else:
            params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *self.refit(key, CHECKED))
        out = jax.vmap(lambda p: network().apply({"params": p}, o.x0))(params)
        target = (o.values - o.mean) / o.std
        given = {"x": o.x0, "target": target, "rows": drawn, "prediction": out} | flat(states.params)
        return {name: np.asarray(value) for name, value in given.items()}


class Torch:
    """PyTorch's side, eager or with the loss compiled: all heads in batched products, or (`case.loop`) one after another."""

    def __init__(self, case: Any, given: dict[str, Any], compiled: bool, threads: int, mode: str | None):
        self.torch, self.case, self.given = ready_torch(threads), case, given
        device = "cuda" if self.torch.cuda.is_available() else "cpu"
        tensor = lambda a: self.torch.tensor(np.asarray(a), device=device)  # noqa: E731
        self.x, self.target, params = tensor(given["x"]), tensor(given["target"]), nested(given)
        layers = [params[f"dense{i}"] for i in range(len(FEATURES) + 1)]
        self.first = [tensor(a) for layer in layers for a in (layer["kernel"], layer["bias"][:, None])]
        self.loss = self.torch.compile(self._loss, mode=mode) if compiled else self._loss

    def _network(self, params: list[Any], x: Any) -> Any:
        """[heads, B, D] -> [heads, B], or without the axis of heads."""
        last = len(params) - 2
        for i in range(0, len(params), 2):
            x = x @ params[i] + params[i + 1]
            x = x if i == last else self.torch.nn.functional.silu(x)
        return x[..., 0]

    def _loss(self, params: list[Any], x: Any, target: Any) -> Any:
        return ((self._network(params, x) - target) ** 2).mean(-1).sum()

    def _fit(self, params: list[Any], rows: Any) -> list[Any]:
        """Take a step of Adam on every one of `rows` [steps, (heads,) B]."""
        params = [p.detach().clone().requires_grad_() for p in params]
        optimizer = self.torch.optim.Adam(params, RATE, fused=True)
        for row in rows:
            optimizer.zero_grad(set_to_none=True)
            self.loss(params, self.x[row], self.target[row]).backward()
            optimizer.step()
        return params

    def refit(self, rows: Any) -> list[Any]:
        """Fit all heads to their rows [heads, steps, B]; returns stacked parameters."""
        if not self.case.loop:
            return self._fit(self.first, rows.swapaxes(0, 1))
        heads = [self._fit([p[head] for p in self.first], rows[head]) for head in range(HEADS)]
        return [self.torch.stack(leaves) for leaves in zip(*heads, strict=True)]

    def check(self) -> float:
        rows = self.torch.tensor(self.given["rows"].astype(np.int64), device=self.x.device)
        params = self.refit(rows)
        with self.torch.no_grad():
            got = self._network(params, self.x.expand(HEADS, *self.x.shape)).cpu().numpy()
        want = self.given["prediction"]
        return float(np.linalg.norm(got - want) / np.linalg.norm(want))

    def block(self, seed: int) -> None:
        """Draw every head's resample and its minibatches of it, and fit."""
        device = self.x.device
        resample = self.torch.randint(OBSERVATIONS, (HEADS, OBSERVATIONS), device=device)
        ticket = self.torch.randint(OBSERVATIONS, (HEADS, STEPS * BATCH), device=device)
        self.refit(resample.gather(1, ticket).reshape(HEADS, STEPS, BATCH))
        if self.x.is_cuda:
            self.torch.cuda.synchronize()

    def memory(self) -> dict[str, float]:
        return {}
