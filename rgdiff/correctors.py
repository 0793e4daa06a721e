"""Correctors as part of a move: Langevin steps at the present noise level before the kernel, for any process and any sampler.

The chain's state carries the noise of its next correction: x becomes {"state": x, "noise": z}, z standard normal. The corrected
state is then a *function* of the state, C(x, z, t), which the denoiser applies, and a move is the inner kernel at C(x, z, t) times
fresh noise. The law of a move is thus known exactly. SVDD draws every candidate with a correction of its own, the weights of SMC,
log-probabilities, path KL and gradients need no change, and no sampler knows of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rgdiff import checks
from rgdiff.kernels import Product
from rgdiff.processes import along
from rgdiff.typing import (
    Array,
    Cond,
    Denoiser,
    DenoiserLike,
    Key,
    Params,
    Process,
    State,
    callable_pytree,
    pytree,
    static,
    wrap_field,
)

STEP_SIZES = ("sigma", "per_sample", "batch_mean")


@pytree
class WithNoise:
    """A law of states and, apart from it, standard normal noise for the corrections that come: the beginning of a chain."""

    kernel: Any
    process: Process
    steps: int = static()

    def sample(self, key: Key) -> State:
        return self._draw(key, self.kernel.sample)

    def rsample(self, key: Key) -> State:
        return self._draw(key, self.kernel.rsample)

    def _draw(self, key: Key, draw: Any) -> State:
        key_state, key_noise = jax.random.split(key)
        x = draw(key_state)
        return {"state": x, "noise": _noise(self.process, x, self.steps).sample(key_noise)}

    def log_prob(self, x: State) -> Array:
        noise = _noise(self.process, x["state"], self.steps)
        return self.kernel.log_prob(x["state"]) + noise.log_prob(x["noise"])


def _noise(process: Any, x: State, steps: int) -> Product:
    return Product({str(step): process.noise(x) for step in range(steps)})


@pytree
class CorrectedProcess:
    """A process whose states carry the noise of their correction. Build it with `corrected`."""

    process: Any
    steps: int = static()

    @property
    def parts(self) -> dict[str, Any]:
        return {"state": self.process}

    @property
    def shape(self) -> tuple[int, ...]:
        return self.process.shape

    @property
    def stochastic(self) -> bool:
        return self.process.stochastic

    @property
    def projects(self) -> bool:
        return self.process.projects

    def times(self, steps: int) -> Array:
        return self.process.times(steps)

    def prior(self, batch: int) -> Any:
        return WithNoise(self.process.prior(batch), self.process, self.steps)

    def forward(self, x0: State, t: Array) -> Product:
        kernel = self.process.forward(x0, t)
        like = kernel.sample(jax.random.key(0))  # its form and its mask are read
        return Product({"state": kernel, "noise": _noise(self.process, like, self.steps)})

    def renoise(self, x: State, s: Array, t: Array) -> Product:
        kernel = self.process.renoise(x["state"], s, t)
        return Product({"state": kernel, "noise": _noise(self.process, x["state"], self.steps)})

    def reverse(self, x: State, t: Array, s: Array, prediction: State) -> Product:
        kernel = self.process.reverse(prediction["at"], t, s, prediction["prediction"])
        return Product({"state": kernel, "noise": _noise(self.process, x["state"], self.steps)})

    def mean(self, x: State, t: Array, prediction: State) -> State:
        return self.process.mean(prediction["at"], t, prediction["prediction"])

    def finalize(self, x: State, t: Array, prediction: State) -> State:
        return self.process.finalize(prediction["at"], t, prediction["prediction"])


@pytree
class Corrected:
    """A denoiser at the corrected state. Build it with `corrected`; a tuner's denoiser takes the place of `denoiser`."""

    denoiser: Denoiser
    corrector: Denoiser
    process: Any
    snr: Array
    scale: Array
    steps: int = static()
    step_size: str = static(default="sigma")

    def __call__(self, x: State, t: Array, cond: Cond = None) -> State:
        at, drawn = x["state"], jax.lax.stop_gradient(x["noise"])  # a guide moves no correction's draw
        for step in range(self.steps):
            score = self.process.score(at, t, self.corrector(at, t, cond))
            at = self._langevin(self.process, at, t, score, drawn[str(step)])
        return {"at": at, "prediction": self.denoiser(at, t, cond)}

    def _langevin(self, process: Any, x: State, t: Array, score: State, noise: State) -> State:
        if isinstance(x, dict):  # what has no score is carried along
            parts = process.parts
            return x | {n: self._langevin(parts[n], x[n], t, score[n], noise[n]) for n in score}
        ratio = along(process.schedule.sigma(t), x) if self.step_size == "sigma" else self._ratio(score, noise)
        step = 2 * (self.snr * ratio) ** 2
        return x + step * score + self.scale * jnp.sqrt(2 * step) * noise

    def _ratio(self, score: Array, noise: Array) -> Array:
        """|z| / |s| of every example, or of the batch means."""
        axes = tuple(range(1, score.ndim))
        ours, theirs = (jnp.sqrt(jnp.sum(leaf**2, axes, keepdims=True)) for leaf in (noise, score))
        if self.step_size == "batch_mean":
            ours, theirs = ours.mean(0), theirs.mean(0)
        some = theirs > 0  # a graph of one node has no edges
        return jnp.where(some, ours / jnp.where(some, theirs, 1.0), 0.0)


@pytree
class CorrectedModel:
    """A model whose denoisers are all corrected by one of them, the prior's: parameters -> corrected denoiser, for tuners.

    Args:
      model: params -> denoiser.
      of: from `corrected`.
    """

    model: Any
    of: Corrected

    def __post_init__(self):
        wrap_field(self, "model", "model (params -> denoiser)")

    def __call__(self, params: Params) -> Corrected:
        return dataclasses.replace(self.of, denoiser=callable_pytree(self.model(params), "a denoiser"))


def corrected(
    process: Process,
    denoiser: DenoiserLike,
    *,
    steps: int = 1,
    snr: float = 0.2,
    scale: float = 1.0,
    step_size: str = "sigma",
    corrector: DenoiserLike | None = None,
) -> tuple[CorrectedProcess, Corrected]:
    """Make Langevin corrections a part of every move: x' = x + e s(x) + scale sqrt(2e) z, before the kernel.

    s is the score at x_t that the corrector's prediction implies. Use the result in place of the process and the denoiser in any
    sampler, value or tuner. Step sizes, of every part of a state by itself:

        sigma        e = 2 (snr sigma_t)^2
        per_sample   e = 2 (snr |z| / |s|)^2, norms of one example (arXiv 2011.13456, algorithms 4 and 5)
        batch_mean   the same with norms averaged over the batch, as published; it couples the samples of a batch

    Args:
      process: Gaussian, or a product or graph with Gaussian parts.
      denoiser: (x, t, cond) -> prediction.
      steps: n, corrections a move; each costs a call of the corrector.
      snr: of the step size, no unit.
      scale: of the correction's noise; 1 is Langevin's. GDSS takes 0.9 (ZINC250k) and 0.7 (QM9).
      step_size: `sigma`, `per_sample` or `batch_mean`.
      corrector: the denoiser whose score corrects, by default `denoiser`. A path KL between two denoisers is the chains' own
        where both are corrected by the same one: give the prior's to both.

    Returns:
      The process and the denoiser. Their samples x0 are those of the given process.

    Raises:
      ValueError: for a process without a score, no correction, or a number that is not positive.

    Note:
      SVDD, SMC and path KL know the law of a corrected move exactly, whatever the step. The correction itself leaves p(x_t) unchanged
      up to an error of order snr^2 with `sigma`. A step that depends on the state and on z does not, however small: with
      `per_sample` the squared norm of D numbers comes out too large by a few parts in D (`scale` below 1 acts against it), with
      `batch_mean` this shrinks with the batch. The published step's further factor, alpha of one of 1,000 steps, is above 0.999 and
      left out. One call of the corrected denoiser is n + 1 network calls.

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> from rgdiff import correctors
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.linear_vp(), (2,))
      >>> denoiser = lambda x, t, cond: x * process.schedule.alpha(t)  # N(0, 1)
      >>> sampler = rgdiff.samplers.ancestral(*correctors.corrected(process, denoiser, steps=2))
      >>> rgdiff.samplers.sample(sampler, jax.random.key(0), 3, process.times(4)).x0.shape
      (3, 2)
    """
    checks.law(process, "a corrector")
    parts = getattr(process, "parts", {"": process}).values()
    if not all(hasattr(part, "score") for part in (process, *parts)):
        raise ValueError("a Langevin corrector needs a process with a score: Gaussian, or with Gaussian parts alone")
    steps = checks.at_least("steps", steps, 1)
    denoiser = callable_pytree(denoiser, "a denoiser")
    return CorrectedProcess(process, steps), Corrected(
        denoiser,
        denoiser if corrector is None else callable_pytree(corrector, "a denoiser"),
        process,
        checks.positive("snr", snr),
        checks.positive("scale", scale, zero=True),
        steps,
        checks.one_of("step_size", step_size, STEP_SIZES),
    )
