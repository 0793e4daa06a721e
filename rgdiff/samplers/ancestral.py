"""Ancestral sampling: draw from the reverse kernel at every move. DDPM, DDIM(eta), EDM, flow and masked chains alike."""

from __future__ import annotations

from typing import Any

import jax

from rgdiff import checks
from rgdiff.typing import Array, Cond, Denoiser, Info, Key, Process, State, callable_pytree, pytree, static


@pytree
class Ancestral:
    """Draws y ~ p(x_s | x_t). Build it with `ancestral`."""

    process: Process
    denoiser: Denoiser
    reference: Denoiser | None = None
    differentiable: bool = static(default=False)

    def init(self, key: Key, batch: int, t: Array, cond: Cond = None) -> State:
        return self.process.prior(batch).sample(key)

    def step(self, key: Key, x: State, t: Array, s: Array, cond: Cond = None) -> tuple[State, Info]:
        kernel = self.process.reverse(x, t, s, self.denoiser(x, t, cond))
        info = {}
        if self.reference is not None:
            info["kl"] = kernel.kl(self.process.reverse(x, t, s, self.reference(x, t, cond)))
        return (kernel.rsample(key) if self.differentiable else kernel.sample(key)), info

    def final(self, x: State, t: Array, cond: Cond = None) -> tuple[State, Info]:
        prediction = self.denoiser(x, t, cond) if self.process.projects else None
        return self.process.finalize(x, t, prediction), {}

    def network_calls(self, moves: int) -> int:
        """Calls of the denoiser per sample over a chain of `moves` moves."""
        return moves + self.process.projects


def ancestral(
    process: Process, denoiser: Denoiser, *, reference: Denoiser | None = None, differentiable: bool = False
) -> Ancestral:
    """Build the plain sampler of a prior: DDPM (arXiv 2006.11239), DDIM (2010.02502), EDM (2206.00364), MDLM (2406.07524).

    Args:
      process: its eta says how stochastic the steps are.
      denoiser: (x, t, cond) -> prediction.
      reference: another denoiser; info["kl"] [B] is then the KL in nats of each step to the reference's step, and its
        sum over moves the path KL. Needs eta > 0.
      differentiable: draw with `rsample`, so that gradients flow through the chain.
    """
    if reference is not None:
        checks.law(process, "a KL to a reference")
        reference = callable_pytree(reference, "a denoiser")
    return Ancestral(process, callable_pytree(denoiser, "a denoiser"), reference, differentiable)


def path_kl(carry: Any, info: Info) -> jax.Array:
    """Keep function: the KL of every move to the reference, nats; sum over moves for the path KL."""
    return info["kl"]
