"""Ancestral sampling: draw from the reverse kernel at every move. DDPM, DDIM(eta), EDM, flow and masked chains alike.

A guide may tilt each kernel before the draw, and moves may be repeated after noising back (time travel). Guides on the
prediction need no support here: they make another denoiser (`rgdiff.guides.score`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rgdiff import checks
from rgdiff.processes import MaskedProcess, ProductProcess
from rgdiff.samplers._loop import Samples, without_gradient
from rgdiff.samplers._projection import projecting
from rgdiff.typing import (
    Array,
    Cond,
    Denoiser,
    DenoiserLike,
    Guide,
    Info,
    Key,
    Move,
    Process,
    State,
    callable_pytree,
    pytree,
    static,
)


@pytree
class Ancestral:
    """Draws y ~ p(x_s | x_t). Build it with `ancestral`."""

    process: Process
    denoiser: Denoiser
    reference: Denoiser | None = None
    guide: Guide | None = None
    window: Array | None = None
    time_travel: int = static(default=1)
    differentiable: bool = static(default=False)

    def init(self, key: Key, batch: int, t: Array, cond: Cond = None) -> State:
        return self.process.prior(batch).sample(key)

    def step(self, key: Key, x: State, t: Array, s: Array, cond: Cond = None) -> tuple[State, Info]:
        if self.time_travel == 1:
            return self._move(key, x, t, s, cond)
        key_first, key_again = jax.random.split(key)

        def again(i: Array, y: State) -> State:
            key_back, key_move = jax.random.split(jax.random.fold_in(key_again, i))
            x = self.process.renoise(y, s, t).sample(key_back)  # type: ignore[attr-defined]
            return self._move(key_move, x, t, s, cond)[0]

        y, info = self._move(key_first, x, t, s, cond)
        return jax.lax.fori_loop(1, self._repeats(t), again, y), info

    def _move(self, key: Key, x: State, t: Array, s: Array, cond: Cond) -> tuple[State, Info]:
        prediction = self.denoiser(x, t, cond)
        kernel = self.process.reverse(x, t, s, prediction)
        if self.guide is not None:
            kernel = self.guide(kernel, Move(x, t, s, cond, prediction))
        info = {}
        if self.reference is not None:
            info["kl"] = kernel.kl(self.process.reverse(x, t, s, self.reference(x, t, cond)))
        return (kernel.rsample(key) if self.differentiable else without_gradient(kernel).sample(key)), info

    def merged(self) -> Ancestral | None:
        """Return the sampler whose projection is one more move (`samplers._projection`); None where it cannot be."""
        process = projecting(self.process) if self.guide is None and self.time_travel == 1 else None
        return None if process is None else dataclasses.replace(self, process=process)

    def _repeats(self, t: Array) -> Array:
        """How often a move from t is made."""
        if self.window is None:
            return jnp.full(jnp.shape(t), self.time_travel)
        return jnp.where((self.window[0] <= t) & (t <= self.window[1]), self.time_travel, 1)

    def final(self, x: State, t: Array, cond: Cond = None) -> tuple[State, Info]:
        if not self.process.projects:
            return self.process.finalize(x, t, None), {}
        prediction, info = self.denoiser(x, t, cond), {}
        if self.reference is not None:
            info["kl"] = projection_kl(self.process, x, t, prediction, self.reference(x, t, cond))
        return self.process.finalize(x, t, prediction), info

    def network_calls(self, moves: int, times: Array | None = None) -> int:
        """Calls of the denoiser per sample over a chain of `moves` moves, on `times` if it is not the process' own grid.

        A guide's own calls of a network are not counted.
        """
        if times is None:
            times = self.process.times(moves + self.process.projects)
        return int(self._repeats(times[:-1]).sum()) + self.process.projects


def ancestral(
    process: Process,
    denoiser: DenoiserLike,
    *,
    reference: DenoiserLike | None = None,
    guide: Guide | None = None,
    time_travel: int = 1,
    window: tuple[float, float] | None = None,
    differentiable: bool | None = None,
) -> Ancestral:
    """Build the plain sampler of a prior: DDPM (arXiv 2006.11239), DDIM (2010.02502), EDM (2206.00364), MDLM (2406.07524).

    Args:
      process: its eta sets the noise of the steps.
      denoiser: (x, t, cond) -> prediction.
      reference: another denoiser; info["kl"] [B] is then the KL in nats of each step to the reference's step. Its
        sum over moves, with that of the projection in the info of `sample`, is the path KL. Needs eta > 0.
      guide: (kernel, move) -> kernel, e.g. `rgdiff.guides.gradient_guide`; tilts each step. Needs eta > 0.
      time_travel: how often each move is made: before every repetition x_s is noised back to x_t. This is the time
        travel of FreeDoM (arXiv 2303.09833, algorithm 2) and the self-recurrence of universal guidance (2302.07121).
      window: (low, high), the times t whose moves are repeated; all by default. May change without a recompilation.
      differentiable: draw with `rsample`, so that gradients flow through the chain: by default where that costs nothing and
        is exact, in Gaussian chains whose moves are made once. True for tokens, whose gradient is the relaxation's; False refuses.

    Returns:
      The sampler.

    Raises:
      ValueError: for a reference or a guide with eta = 0; for repeated moves with a reference or a gradient (a repeated
        move has no density, and its loop has no reverse mode), or of a first-hitting chain.

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.linear_vp(), (2,))
      >>> sampler = rgdiff.samplers.ancestral(process, lambda x, t, cond: jnp.full_like(x, 3.0))  # data at one point
      >>> print(rgdiff.samplers.sample(sampler, jax.random.key(0), 1, process.times(4)).x0)
      [[3. 3.]]
    """
    checks.noising_process(process, "ancestral sampling")
    time_travel = checks.at_least("time_travel", time_travel, 1)
    if differentiable is None:
        parts = process.parts.values() if isinstance(process, ProductProcess) else [process]
        differentiable = time_travel == 1 and not any(isinstance(part, MaskedProcess) for part in parts)
    if time_travel > 1 and (reference is not None or differentiable):
        raise ValueError(
            "a chain with time_travel > 1 has no path KL and no gradient; leave out reference, differentiable"
        )
    if time_travel > 1 and hasattr(process, "moves"):
        raise ValueError("a chain of one event at a time ends when its moves are used up; leave out time_travel")
    if window is not None and (time_travel == 1 or len(window) != 2):
        raise ValueError("window is a pair (low, high) of times whose moves are repeated; it needs time_travel > 1")
    if reference is not None:
        checks.law(process, "a KL to a reference")
        reference = callable_pytree(reference, "a denoiser")
    if guide is not None:
        checks.law(process, "a guide on the kernel")
        guide = callable_pytree(guide, "a guide")
    return Ancestral(
        process,
        callable_pytree(denoiser, "a denoiser"),
        reference,
        guide,
        None if window is None else jnp.asarray(window, jnp.float32),
        time_travel,
        bool(differentiable),
    )


def projection_kl(process: Process, x: State, t: Array, prediction: State, reference: State) -> Array:
    """Return the KL of two projections of x_t, noised back to t: in a Gaussian process 1/2 SNR(t) |x0 - x0'|^2.

    A projection is no draw and has no distribution of its own. This is the KL of one further move from t. Without it, a tuner
    could change the last network call at no KL.

    Args:
      process: of the chain.
      x: the state x_t, leaves [B, ...].
      t: the last time, [].
      prediction, reference: the two denoisers' predictions at x_t.

    Returns:
      [B], nats.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.flow(), (1,))
      >>> x, t = jnp.zeros((1, 1)), jnp.float32(0.5)  # SNR = 1
      >>> print(rgdiff.samplers.projection_kl(process, x, t, jnp.full((1, 1), 2.0), jnp.zeros((1, 1))))  # 2^2 / 2
      [2.]
    """
    ours, theirs = (process.forward(process.mean(x, t, p), t) for p in (prediction, reference))
    return ours.kl(theirs)


def path_kl(carry: Any, info: Info) -> jax.Array:
    """Keep the KL of every move to the reference, nats: a function for `sample(..., keep=path_kl)` (see `total_path_kl`).

    Args:
      carry: the sampler's carry, not read.
      info: of one move of `ancestral(..., reference=...)`.

    Returns:
      [B], nats.
    """
    return info["kl"]


def total_path_kl(samples: Samples) -> jax.Array:
    """Sum the path KL to the reference of samples drawn with `keep=path_kl`: all moves and the projection.

    Args:
      samples: of `ancestral(..., reference=...)`.

    Returns:
      [B], nats.

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.flow(), (1,))
      >>> tuned, prior = lambda x, t, cond: jnp.ones_like(x), lambda x, t, cond: jnp.zeros_like(x)
      >>> sampler = rgdiff.samplers.ancestral(process, tuned, reference=prior)
      >>> samples = rgdiff.samplers.sample(
      ...     sampler, jax.random.key(0), 1, jnp.array([0.75, 0.5]), keep=rgdiff.samplers.path_kl
      ... )
      >>> print(f"{rgdiff.samplers.total_path_kl(samples)[0]:.4f}")  # (SNR(0.5) - SNR(0.75)) / 2 + SNR(0.5) / 2, SNR = 1, 1/9
      0.9444
    """
    return samples.kept.sum(0) + samples.info.get("kl", 0.0)
