"""The sides of `drakes`: a training step of the published relaxed scheme on masked sequences, ours and PyTorch's.

As in `benchmarks.speed.rows`: `export` hands over parameters, the Gumbel numbers of one run, its loss and its gradient; `check`
repeats it. Networks are those of `benchmarks.speed.sequence_rows`; the reference differs from the tuned denoiser in its last
layer, or the KL term would be zero at the first step.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from benchmarks.speed import sequence_rows
from benchmarks.speed.measures import SEED, flat, forward_flops, nested, planned_memory, ready_torch, torch_memory
from benchmarks.speed.rows import OPTIMIZER, Case, gradient_error
from benchmarks.speed.sequence_rows import CLASSES

KL_WEIGHT, TEMPERATURE = 0.01, 1.0


class Ours:
    """Our side of a case, on JAX's default device."""

    note = ""

    def __init__(self, case: Case):
        import jax
        import jax.numpy as jnp
        import optax

        from rgdiff import denoisers, processes, schedules, tuners
        from rgdiff.nets import ConvNet1D

        jax.config.update("jax_default_matmul_precision", "highest")  # float32 on both sides, on every device
        self.case, self.net = case, ConvNet1D(**sequence_rows.DENOISER)
        self.scorer = ConvNet1D(**sequence_rows.SCORER)
        self.process = processes.masked(schedules.log_linear_mask(), case.length, CLASSES)
        self.times = self.process.times(case.moves)
        self.x = jnp.zeros((case.batch, case.length, CLASSES + 1))
        denoiser = sequence_rows.draw(self.net, self.x)
        denoiser["out"]["kernel"] *= sequence_rows.SHARPNESS
        reference = denoiser | {"out": denoiser["out"] | {"kernel": denoiser["out"]["kernel"][::-1]}}
        scorer = sequence_rows.draw(self.scorer, self.x[..., :-1])
        self.params = {"denoiser": denoiser, "reference": reference, "scorer": scorer}
        self.tuner = tuners.drakes_published(
            lambda params: denoisers.from_linen(self.net, params),
            self.process,
            jax.tree_util.Partial(self._score, scorer),
            self.times,
            optax.adamw(**OPTIMIZER),
            reference=denoisers.from_linen(self.net, reference),
            temperature=KL_WEIGHT,
            truncation=case.live,
            gumbel_temperature=TEMPERATURE,
            batch=case.batch,
            remat="everything" if case.remat else "none",
        )
        self.state = self.tuner.init(denoiser)

    def _score(self, params: Any, x: Any, cond: Any = None) -> Any:
        out: Any = self.scorer.apply({"params": params}, x, 0.0)
        return out.mean((1, 2))

    @functools.cached_property
    def program(self) -> Any:
        """The compiled block: (key, state) -> (state, info)."""
        import jax

        step = jax.jit(lambda key, state: self.tuner.step(key, state), donate_argnums=1)
        return step.lower(jax.random.key(SEED), self.state).compile()

    @functools.cached_property
    def flops(self) -> float:
        """Of what the result needs: T calls of the denoiser and K of the reference, and at the K live moves two forwards
        for the denoiser's gradient, one for that of the reference's input, and a recomputation of both."""
        case = self.case
        predict = lambda params, x: self.net.apply({"params": params}, x, 0.0)  # noqa: E731
        call = forward_flops(predict, self.params["denoiser"], self.x)
        score = forward_flops(self._score, self.params["scorer"], self.x[..., :-1])
        return (case.moves + case.live * (4 + 2 * case.remat)) * call + 2 * score

    def block(self, seed: int) -> None:
        import jax

        self.state, info = self.program(jax.random.key(seed), self.state)
        jax.block_until_ready((self.state, info))

    def memory(self) -> dict[str, float]:
        return planned_memory(self.program, lambda: self.block(0))

    def export(self) -> dict[str, Any]:
        import jax
        import jax.numpy as jnp

        key = jax.random.key(SEED + 2)
        chain = jax.random.split(key)[0]
        draw = jax.jit(lambda move: jax.random.gumbel(jax.random.fold_in(chain, 1 + move), self.x.shape))
        grad = jax.jit(jax.value_and_grad(lambda params: self.tuner.loss(params, key)[0]))
        loss, gradients = grad(self.params["denoiser"])
        out = flat(self.params) | {"rate": self.process.schedule.rate(self.times), "loss": loss}
        out |= {"gumbel": jnp.stack([draw(move) for move in range(self.case.moves)])}
        out |= {f"gradient/{i:04d}": g for i, g in enumerate(jax.tree.leaves(gradients))}
        return {name: np.asarray(value) for name, value in out.items()}


class Torch:
    """PyTorch's side of a case, eager or compiled, on CUDA where there is one."""

    def __init__(self, case: Case, given: dict[str, Any], compiled: bool, threads: int, mode: str | None):
        from benchmarks.speed import torch_drakes, torch_twins
        from benchmarks.speed import torch_sequences as twins

        torch = ready_torch(threads)
        self.case, self.torch, self.twins, self.given = case, torch, torch_twins, given
        self.device, self.params = torch_twins.device(), nested(given)

        def load(name: str, inputs: int, options: dict[str, Any]) -> Any:
            net = twins.ConvNet1D(inputs, **options, channels_last=case.channels_last).to(self.device)
            return torch_twins.load_linen(net, self.params[name])

        self.net = load("denoiser", CLASSES + 1, sequence_rows.DENOISER)
        self.drakes = torch_drakes.Drakes(
            self.net,
            load("reference", CLASSES + 1, sequence_rows.DENOISER),
            load("scorer", CLASSES, sequence_rows.SCORER),
            torch.tensor(given["rate"], device=self.device),
            live=case.live,
            kl_weight=KL_WEIGHT,
            temperature=TEMPERATURE,
            released=case.released,
            remat=case.remat,
            compiled=compiled,
            mode=mode,
        )
        o = OPTIMIZER
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), o["learning_rate"], (o["b1"], o["b2"]), o["eps"], o["weight_decay"], fused=True
        )

    def check(self) -> float:
        """Repeat our run with our random numbers; the largest relative error of loss and gradient."""
        gumbel = self.torch.tensor(self.given["gumbel"], device=self.device)
        loss = self.drakes.loss(self.case.batch, self.case.length, CLASSES, gumbel)
        loss.backward()
        got = self.twins.in_our_order(self.net, self.params["denoiser"], lambda p: p.grad)
        self.optimizer.zero_grad()
        return gradient_error(loss.item(), got, self.given)

    def block(self, seed: int, batch: int | None = None) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.drakes.loss(batch or self.case.batch, self.case.length, CLASSES).backward()
        self.optimizer.step()
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()

    def memory(self) -> dict[str, float]:
        return torch_memory(self.block, lambda: self.optimizer.zero_grad(set_to_none=True))
