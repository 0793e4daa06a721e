"""Sequential Monte Carlo towards p_pre(x) exp(r(x)/tau)/Z: FK steering, TDS and DAS are settings of it.

The batch is the particles of one problem; many problems are `vmap`. Log-weights accumulate between resamplings, and
everything that belongs to a particle is re-indexed with it. Whatever the potentials on the way, their product is made
exp(r(x0)/tau) at the end, so weighted averages and the estimate of Z are right as the number of particles grows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from rgdiff import checks, rewards
from rgdiff.guides.tilt import TILTS, scaled, tilt
from rgdiff.resampling import SCHEMES, ess, log_mean_exp, log_normalize
from rgdiff.rewards import differentiable
from rgdiff.samplers._evaluate import evaluate, shares
from rgdiff.typing import (
    Array,
    Cond,
    Denoiser,
    Guide,
    Info,
    Key,
    Move,
    Process,
    Reward,
    State,
    Value,
    callable_pytree,
    pytree,
    static,
)

POTENTIALS = ("difference", "max", "sum", "terminal")
LARGEST = 1e37  # values over tau are kept below it, so that their differences stay finite


class Worth(NamedTuple):
    """What is known of particles at their time: value over tau [N], its gradient (twisted) and the prediction (shared)."""

    value: Array
    gradient: Any
    prediction: Any


class Particles(NamedTuple):
    """The particles of one problem.

    `log_weights` [N] since the last resampling, `log_z` of what was resampled away; `spent` [N] is the log of the
    product of a lineage's potentials, `history` [N] the running maximum or sum; `strength` in [0, 1] is the tempering.
    """

    x: State
    worth: Worth
    log_weights: Array
    log_z: Array
    spent: Array
    history: Array
    strength: Array
    move: Array


@pytree
class Smc:
    """Moves particles by a proposal, weighs and resamples them. Build it with `smc`, `fk_steering`, `tds` or `das`."""

    process: Process
    denoiser: Denoiser
    value: Value
    reward: Reward | None
    temperature: Array
    ess_threshold: Array
    twist: Array | None
    proposal: Guide | None
    tempering: Array | None
    adaptive: Array | None
    potential: str = static(default="difference")
    resampling: str = static(default="systematic")
    interval: int = static(default=1)
    shared: bool = static(default=False)
    tilts: str = static(default="token")

    def init(self, key: Key, batch: int, t: Array, cond: Cond = None) -> Particles:
        x = self.process.prior(batch).sample(key)
        zeros = jnp.zeros(batch)
        start = jnp.float32(1) if self.tempering is None else self.tempering[0]
        start = start if self.adaptive is None else jnp.float32(0)
        particles = Particles(x, self._worth(x, t, cond), zeros, jnp.float32(0), zeros, zeros, start, jnp.int32(0))
        if self.potential == "max":
            particles = particles._replace(history=jnp.full(batch, -jnp.inf))
        return self._weigh(particles, zeros, particles.worth, first=True)

    def step(self, key: Key, carry: Particles, t: Array, s: Array, cond: Cond = None) -> tuple[Particles, Info]:
        key_draw, key_resample = jax.random.split(key)
        carry, ancestors, resampled = self._resample(key_resample, carry)
        prediction = carry.worth.prediction if self.shared else self.denoiser(carry.x, t, cond)
        kernel = self.process.reverse(carry.x, t, s, prediction)
        proposal: Any = kernel
        if self.proposal is not None:
            proposal = self.proposal(kernel, Move(carry.x, t, s, cond, prediction))
        if self.twist is not None:
            proposal = tilt(proposal, scaled(carry.worth.gradient, self.twist * carry.strength), self.tilts)
        y = proposal.sample(key_draw)
        log_ratio = jnp.zeros_like(carry.log_weights)
        if proposal is not kernel:
            log_ratio = kernel.log_prob(y) - proposal.log_prob(y)
        worth = self._worth(y, s, cond)
        moved = carry._replace(x=y, move=carry.move + 1)
        moved = self._weigh(moved, log_ratio, worth)
        info = {
            "ess": ess(moved.log_weights),
            "log_weights": moved.log_weights,
            "log_z": moved.log_z + log_mean_exp(moved.log_weights),
            "value": worth.value * self.temperature,
            "strength": moved.strength,
            "ancestors": ancestors,
            "resampled": resampled,
            "infeasible": jnp.sum(worth.value == -jnp.inf),
        }
        return moved, info

    def final(self, carry: Particles, t: Array, cond: Cond = None) -> tuple[State, Info]:
        """Project the particles, and pay what the potentials on the way still owe: info has log_weights, log_z, ess, value."""
        prediction = carry.worth.prediction
        if self.process.projects and not self.shared:
            prediction = self.denoiser(carry.x, t, cond)
        x0 = self.process.finalize(carry.x, t, prediction)
        due = (
            carry.worth.value
            if self.reward is None
            else _finite(rewards.evaluate(self.reward, x0, cond) / self.temperature)
        )
        log_weights = carry.log_weights + _difference(due, carry.spent)
        info = {
            "log_weights": log_normalize(log_weights),
            "log_z": carry.log_z + log_mean_exp(log_weights),
            "ess": ess(log_weights),
            "value": due * self.temperature,
        }
        return x0, info

    def network_calls(self, moves: int) -> int:
        """Calls of the denoiser per particle over a chain of `moves` moves (the value's own network not counted)."""
        if not self.shared:
            return moves + self.process.projects
        return 1 + (moves if self.process.projects else moves - 1)

    def value_calls(self, moves: int) -> int:
        """Evaluations of the value per particle (with its gradient, where twisted)."""
        return 1 + moves

    def _worth(self, x: State, t: Array, cond: Cond) -> Worth:
        def run(x: State) -> tuple[Array, Any]:
            return evaluate(self.process, self.value, self.shared, x, t, cond)

        if self.twist is None:
            values, prediction = run(x)
            return Worth(_finite(values / self.temperature), None, prediction)
        values, back, prediction = jax.vjp(run, x, has_aux=True)
        gradient = jax.tree.map(lambda g: g / self.temperature, back(jnp.ones_like(values))[0])
        return Worth(_finite(values / self.temperature), gradient, prediction)

    def _weigh(self, particles: Particles, log_ratio: Array, worth: Worth, first: bool = False) -> Particles:
        """Multiply the weights by the proposal's ratio and by what the potentials have grown by."""
        index = particles.move
        log_weights = particles.log_weights + log_ratio
        due = jnp.bool_(True) if first else index % self.interval == 0
        history = particles.history
        if self.potential == "max":
            history = jnp.where(due, jnp.maximum(history, worth.value), history)
        elif self.potential == "sum":
            history = jnp.where(due, history + worth.value, history)
        reached = {"difference": worth.value, "terminal": jnp.zeros_like(history)}.get(self.potential, history)
        strength = particles.strength
        if self.tempering is not None and not first:
            strength = self.tempering[jnp.minimum(index, self.tempering.shape[0] - 1)]
        if self.adaptive is not None:
            strength = self._temper(log_weights, reached, particles.spent, strength)
        spent = jnp.where(due, _times(strength, reached), particles.spent)
        log_weights = log_weights + _difference(spent, particles.spent)
        return particles._replace(worth=worth, log_weights=log_weights, spent=spent, history=history, strength=strength)

    def _temper(self, log_weights: Array, reached: Array, spent: Array, strength: Array) -> Array:
        """The largest strength, from the present one to 1, that keeps the ESS at `adaptive` N (or the present one)."""
        enough = self.adaptive * reached.shape[0]  # type: ignore[operator]

        def keeps(level: Array) -> Array:
            return ess(log_weights + _difference(_times(level, reached), spent)) >= enough

        def halve(_: int, interval: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = interval
            middle = (low + high) / 2
            good = keeps(middle)
            return jnp.where(good, middle, low), jnp.where(good, high, middle)

        low, _ = jax.lax.fori_loop(0, 24, halve, (strength, jnp.float32(1)))
        return jnp.where(keeps(jnp.float32(1)), 1.0, low)

    def _resample(self, key: Key, carry: Particles) -> tuple[Particles, Array, Array]:
        count = carry.log_weights.shape[0]
        needed = ess(carry.log_weights) < self.ess_threshold * count
        ancestors = jnp.where(needed, SCHEMES[self.resampling](key, carry.log_weights), jnp.arange(count))
        per_particle = (carry.x, carry.worth, carry.spent, carry.history)
        x, worth, spent, history = jax.tree.map(lambda leaf: leaf[ancestors], per_particle)
        log_z = carry.log_z + jnp.where(needed, log_mean_exp(carry.log_weights), 0.0)
        log_weights = jnp.where(needed, 0.0, carry.log_weights)
        return Particles(x, worth, log_weights, log_z, spent, history, *carry[6:]), ancestors, needed


def _finite(scaled_values: Array) -> Array:
    """Values over tau with NaN (infeasible) as -inf and what float32 cannot subtract cut off."""
    values = jnp.where(jnp.isnan(scaled_values), -jnp.inf, jnp.minimum(scaled_values, LARGEST))
    return jnp.where(values < -LARGEST, -jnp.inf, values)


def _times(strength: Array, values: Array) -> Array:
    """strength * values, where -inf stays -inf at strength 0."""
    return jnp.where(values == -jnp.inf, -jnp.inf, strength * values)


def _difference(new: Array, old: Array) -> Array:
    """new - old; a lineage that was already worth nothing starts anew."""
    return jnp.where(old == -jnp.inf, new, new - jnp.where(old == -jnp.inf, 0.0, old))


def smc(
    process: Process,
    denoiser: Denoiser,
    value: Value,
    *,
    temperature: float = 1.0,
    potential: str = "difference",
    reward: Reward | None = None,
    resampling: str = "systematic",
    ess_threshold: float = 0.5,
    interval: int = 1,
    twist: float | None = None,
    proposal: Guide | None = None,
    tempering: Array | None = None,
    adaptive: float | None = None,
    tilts: str = "token",
) -> Smc:
    """Build a particle sampler of p_pre(x) exp(r(x)/tau)/Z; `sample(..., batch=N)` runs N particles of one problem.

    The weights are those of a Feynman-Kac model: at each move kernel/proposal times a potential, with v the value:

        difference   exp((v(y, s) - v(x, t)) / tau)        max   exp of what the maximum of v/tau so far grew by
        terminal     1, all at the end                     sum   exp of what the sum of v/tau grew by

    and at the end exp(r(x0)/tau) over the product of a lineage's potentials. `samples.info` has `log_weights` [N]
    (normalised), `log_z` (an estimate of log E_pre exp(r/tau), unbiased in Z), `ess` and `value` [N].

    Args:
      process: with a law (eta > 0).
      denoiser: of the prior. Where the value is `posterior_mean` of this same object, a particle costs one network call a move.
      value: (x, t, cond) -> [B], in the reward's unit.
      temperature: tau.
      potential: see above (FK steering, arXiv 2501.06848).
      reward: what the target is tilted by; without it the value at the last time, which for `posterior_mean` is the same.
      resampling: `multinomial`, `stratified`, `systematic` or `residual`.
      ess_threshold: resample when the effective sample size falls below this fraction of N; 1 always, 0 never.
      interval: moves between potentials (FK steering's schedule); the last is always paid.
      twist: propose from the kernel tilted by twist * gradient of v/tau (TDS, arXiv 2306.17775; DAS, 2501.05803); 1 is
        the twist of the target. One VJP of the value a move.
      proposal: any guide on the kernel, in place of or under the twist.
      tempering: [T + 1] strengths in [0, 1], one per time of the chain, that multiply v (DAS); see `das_tempering`.
      adaptive: the fraction of N at which the strength keeps the ESS, found by bisection; not with `tempering`.
      tilts: of a masked process, see `guides.gradient_guide`.

    Note:
      FK steering's released code drops the weights of moves at which it does not resample, and DAS's leaves the twist
      behind when it resamples; both bias the result. Here weights accumulate and everything rides with its particle.
      All-infeasible weights are resampled equally, with log_z = -inf.

    Raises:
      ValueError: for eta = 0, an unknown potential or scheme, a threshold outside [0, 1], strengths outside [0, 1].
    """
    checks.law(process, "smc")
    if adaptive is not None and tempering is not None:
        raise ValueError("adaptive finds the strengths that tempering would give: pass one of the two")
    for name, number in (("ess_threshold", ess_threshold), ("adaptive", adaptive)):
        if isinstance(number, (int, float)) and not 0 <= number <= 1:
            raise ValueError(f"{name} is a fraction of the particles in [0, 1], got {number!r}")
    if tempering is not None and not isinstance(tempering, Tracer):
        tempering = jnp.asarray(tempering, jnp.float32)
        if tempering.ndim != 1 or not bool(((tempering >= 0) & (tempering <= 1)).all()):
            raise ValueError(f"tempering is a vector of strengths in [0, 1], got {tempering}")
    denoiser = callable_pytree(denoiser, "a denoiser")
    if twist is not None:
        differentiable("a twisted proposal", value)
    return Smc(
        process,
        denoiser,
        callable_pytree(value, "a value"),
        None if reward is None else callable_pytree(reward, "a reward"),
        checks.positive("temperature", temperature),
        checks.positive("ess_threshold", ess_threshold, zero=True),
        None if twist is None else checks.positive("twist", twist, zero=True),
        None if proposal is None else callable_pytree(proposal, "a guide"),
        tempering,
        None if adaptive is None else checks.positive("adaptive", adaptive),
        checks.one_of("potential", potential, POTENTIALS),
        checks.one_of("resampling", resampling, SCHEMES),
        checks.at_least("interval", interval, 1),
        shares(value, denoiser),
        checks.one_of("tilts", tilts, TILTS),
    )


def das_tempering(times: Array, gamma: float = 0.008) -> Array:
    """Strengths min((1 + gamma)^i - 1, 1) at the i-th time of a chain, [T + 1] (DAS, arXiv 2501.05803, §4.2)."""
    return jnp.minimum((1 + gamma) ** jnp.arange(times.shape[0], dtype=jnp.float32) - 1, 1.0)


def fk_steering(process: Process, denoiser: Denoiser, value: Value, **options: Any) -> Smc:
    """FK steering as published (arXiv 2501.06848): the prior as proposal, the maximum potential, multinomial resampling."""
    settings: dict[str, Any] = {"potential": "max", "resampling": "multinomial"} | options
    return smc(process, denoiser, value, **settings)


def tds(process: Process, denoiser: Denoiser, value: Value, **options: Any) -> Smc:
    """TDS as published (arXiv 2306.17775, algorithm 1): the twisted proposal, systematic resampling at every move."""
    settings: dict[str, Any] = {"twist": 1.0, "ess_threshold": 1.0} | options
    return smc(process, denoiser, value, **settings)


def das(
    process: Process, denoiser: Denoiser, value: Value, times: Array, *, gamma: float = 0.008, **options: Any
) -> Smc:
    """DAS as published (arXiv 2501.05803, algorithm 1): twisted and tempered, resampling below half the particles."""
    settings: dict[str, Any] = {"twist": 1.0, "tempering": das_tempering(times, gamma)} | options
    return smc(process, denoiser, value, **settings)
