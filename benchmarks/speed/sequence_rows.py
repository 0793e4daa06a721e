"""The sides of `svdd-sequences`: SVDD on masked sequences with the convolutional network of the released code, ours and PyTorch's.

As in `benchmarks.speed.rows`: `export` hands over parameters and the random numbers of one run, `check` repeats it. Compared
is the candidate chosen in every move. The best one is chosen, as in the released code.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from benchmarks.speed.measures import (
    SEED,
    flat,
    forward_flops,
    nested,
    planned_memory,
    ready_torch,
    torch_memory,
    weights,
)
from benchmarks.speed.rows import Case

CANDIDATES, CLASSES, CHUNK = 10, 4, 1  # CHUNK: candidates of every sequence evaluated at once by ours
DILATIONS = (1,) * 8 + (4,) * 4 + (16,) * 4 + (64,) * 4
DENOISER: dict[str, Any] = {"out": CLASSES, "width": 128, "dilations": DILATIONS, "kernel": 9}
SCORER: dict[str, Any] = {"out": 1, "width": 64, "dilations": (1,) * 4, "kernel": 9}
SHARPNESS = 0.1  # scale of the last layer: as in DNA's priors, tokens are nearly uniform and copies are no commoner


def draw(net: Any, x: Any) -> Any:
    """Random parameters of a network for inputs like x."""
    import jax
    import jax.numpy as jnp

    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), x, jnp.float32(0))["params"])
    return jax.tree.map(jnp.asarray, weights(shapes))


class Ours:
    """Our side of a case, on JAX's default device."""

    def __init__(self, case: Case):
        import jax
        import jax.numpy as jnp

        from rgdiff import denoisers, processes, samplers, schedules, values
        from rgdiff.nets import ConvNet1D

        jax.config.update("jax_default_matmul_precision", "highest")  # float32 on both sides, on every device
        self.case, self.net, self.scorer = case, ConvNet1D(**DENOISER), ConvNet1D(**SCORER)
        self.process = processes.masked(schedules.log_linear_mask(), case.length, CLASSES)
        self.times = self.process.times(case.moves)
        self.x = jnp.zeros((case.batch, case.length, CLASSES + 1))
        self.params = {"denoiser": draw(self.net, self.x), "scorer": draw(self.scorer, self.x[..., :-1])}
        self.params["denoiser"]["out"]["kernel"] *= SHARPNESS
        denoiser = denoisers.from_linen(self.net, self.params["denoiser"])
        reward = jax.tree_util.Partial(self._score, self.params["scorer"])
        if case.value == "pm":
            value = values.posterior_mean(reward, self.process, denoiser, plug_in="mode")
        else:
            network = denoisers.from_function(lambda params, x, t, cond: self._score(params, x), self.params["scorer"])
            value = values.learned(network, reward, self.process)
        options = {"distinct": True, "timeless": True, "chunk": CHUNK} if case.distinct else {}
        self.sampler = samplers.svdd(
            self.process, denoiser, value, candidates=CANDIDATES, selection="argmax", **options
        )

    def _score(self, params: Any, x: Any, cond: Any = None) -> Any:
        """One number a sequence; the mask, if there is one, is a row of zeros."""
        out: Any = self.scorer.apply({"params": params}, x[..., :CLASSES], 0.0)
        return out.mean((1, 2))

    @functools.cached_property
    def program(self) -> Any:
        """The compiled block: (sampler, key, times) -> tokens after every move [T, B, L] and states evaluated [T]."""
        import jax
        import jax.numpy as jnp

        from rgdiff import samplers

        many = self.case.batch * CANDIDATES

        def keep(carry: Any, info: Any) -> Any:
            return jnp.argmax(carry.x, -1).astype(jnp.int8), info["evaluations"].sum() if self.case.distinct else many

        run = jax.jit(lambda s, key, times: samplers.sample(s, key, self.case.batch, times, keep=keep).kept)
        return run.lower(self.sampler, jax.random.key(0), self.times).compile()

    @functools.cached_property
    def compared(self) -> tuple[np.ndarray, np.ndarray]:
        """The run that both sides make."""
        import jax

        path, evaluated = self.program(self.sampler, jax.random.key(SEED + 2), self.times)
        return np.asarray(path), np.asarray(evaluated)

    @functools.cached_property
    def flops(self) -> float:
        """Of the compared run: one prediction of the denoiser for each evaluated state (PM) or each state of the chain (MC)."""
        case, evaluated = self.case, self.compared[1]
        predict = lambda params, x: self.net.apply({"params": params}, x, 0.0)  # noqa: E731
        denoiser = forward_flops(predict, self.params["denoiser"], self.x) / case.batch
        scorer = forward_flops(self._score, self.params["scorer"], self.x) / case.batch
        predictions = evaluated[:-1].sum() + case.batch if case.value == "pm" else case.moves * case.batch
        return float(predictions * denoiser + evaluated.sum() * scorer)

    @property
    def note(self) -> str:
        return f", {self.compared[1].sum() / (self.case.moves * self.case.batch * CANDIDATES):.0%} of candidates"

    def block(self, seed: int) -> None:
        import jax

        jax.block_until_ready(self.program(self.sampler, jax.random.key(seed), self.times))

    def memory(self) -> dict[str, float]:
        return planned_memory(self.program, lambda: self.block(0))

    def export(self) -> dict[str, Any]:
        """Parameters, the chances to move, the tokens of one run and the uniform and Gumbel numbers behind every candidate."""
        import jax
        import jax.numpy as jnp

        key, case = jax.random.key(SEED + 2), self.case
        shape = (case.batch, case.length)

        @jax.jit
        def draws(move: Any) -> Any:
            keys = jax.random.split(jax.random.split(jax.random.fold_in(key, 1 + move))[0], CANDIDATES)
            events, tokens = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
            return (
                jax.vmap(lambda k: jax.random.uniform(k, shape))(events),
                jax.vmap(lambda k: jax.random.gumbel(k, (*shape, CLASSES)))(tokens),
            )

        uniform, gumbel = zip(*(draws(move) for move in range(case.moves)), strict=True)
        rate = self.process.schedule.rate(self.times)
        out = flat(self.params) | {"moving": (rate[:-1] - rate[1:]) / rate[:-1], "path": self.compared[0]}
        out |= {"uniform": jnp.stack(uniform), "gumbel": jnp.stack(gumbel)}
        return {name: np.asarray(value) for name, value in out.items()}


class Torch:
    """PyTorch's side of a case, eager or compiled, on CUDA where there is one."""

    def __init__(self, case: Case, given: dict[str, Any], compiled: bool, threads: int, mode: str | None):
        from benchmarks.speed import torch_sequences as twins
        from benchmarks.speed import torch_twins

        torch = ready_torch(threads)
        self.case, self.torch, self.given, self.device = case, torch, given, torch_twins.device()
        params = nested(given)

        def load(name: str, inputs: int, options: dict[str, Any]) -> Any:
            net = twins.ConvNet1D(inputs, **options, channels_last=case.channels_last).to(self.device)
            return torch_twins.load_linen(net, params[name]).eval()

        self.decoder = twins.Decoder(
            load("denoiser", CLASSES + 1, DENOISER),
            load("scorer", CLASSES, SCORER),
            given["moving"],
            CLASSES,
            plug_in=case.value == "pm",
            compiled=compiled,
            mode=mode,
        )

    def _decode(self, batch: int, **given: Any) -> Any:
        case = self.case
        return self.decoder.svdd(batch, case.length, CANDIDATES, reuse=case.reuse, loop=case.loop, **given)

    def check(self) -> float:
        """Repeat every move of our run with our random numbers; the fraction of positions that are chosen otherwise."""
        given = {
            name: self.torch.tensor(self.given[name], device=self.device) for name in ("uniform", "gumbel", "path")
        }
        given["path"] = given["path"].long()
        return float((self._decode(self.case.batch, **given) != given["path"]).float().mean())

    def block(self, seed: int, batch: int | None = None) -> None:
        self._decode(batch or self.case.batch)
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()

    def memory(self) -> dict[str, float]:
        return torch_memory(self.block)
