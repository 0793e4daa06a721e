"""Sequential Monte Carlo towards p_pre(x) exp(r(x)/tau)/Z: FK steering, TDS and DAS are settings of it.

The batch is the particles of one problem; many problems are `vmap`. Log-weights accumulate between resamplings, and
every array of a particle is permuted with it. The intermediate potentials are positive, and the last one makes
their product exp(r(x0)/tau), so that weighted averages and the estimate of Z converge as the number of particles grows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from rgdiff import checks, rewards
from rgdiff._settings import setting_of
from rgdiff.denoisers import says_enough
from rgdiff.guides.inverse import Likelihood, likelihood
from rgdiff.guides.measurements import is_measurement
from rgdiff.guides.tilt import TILTS, scaled, tilt
from rgdiff.resampling import SCHEMES, ess, log_mean_exp, log_normalize, share_gains
from rgdiff.rewards import differentiable
from rgdiff.samplers._evaluate import evaluate, shares
from rgdiff.shards import Shards, split, whole
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
    Reward,
    RewardLike,
    State,
    Value,
    ValueLike,
    callable_pytree,
    pytree,
    static,
)

POTENTIALS = ("difference", "max", "sum", "terminal")
LARGEST = 1e37  # values over tau are kept below it, so that their differences stay finite


class Evaluation(NamedTuple):
    """The value at the particles' states, over tau [N], -inf if infeasible; its gradient (twisted) and the prediction (shared)."""

    value: Array
    gradient: Any
    prediction: Any


class Particles(NamedTuple):
    """The particles of one problem.

    `log_weights` [N]: since the last resampling. `log_z`: the estimate at the last resampling. `value` [N]: over tau, imputed
    where it is infeasible. `running` [N]: its running maximum or sum. `log_potential` [N]: log of the product of a lineage's
    potentials so far. `lineages` [N]: the initial particle that each descends from. `strength` in [0, 1]: of the tempering.
    `move`: number of the move. `gains` [N], by initial particle: the gain of its descendants' share of the weights between
    resamplings. The fields that are permuted by resampling come first.
    """

    x: State
    evaluation: Evaluation
    value: Array
    running: Array
    log_potential: Array
    lineages: Array
    log_weights: Array
    log_z: Array
    strength: Array
    move: Array
    gains: Array


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
    islands: int = static(default=1)
    shards: Shards | None = static(default=None)

    def init(self, key: Key, batch: int, t: Array, cond: Cond = None) -> Particles:
        checks.divides("islands", self.islands, batch)
        checks.one_problem(cond)
        x = self.process.prior(batch).sample(key)
        evaluation = self._evaluate(x, t, cond)
        zeros = jnp.zeros(batch, jnp.float32)
        running = jnp.full_like(zeros, -jnp.inf) if self.potential == "max" else zeros
        lineages = jnp.arange(batch, dtype=jnp.int32)
        strength = jnp.float32(self.adaptive is None) if self.tempering is None else self.tempering[0]
        particles = Particles(
            x=x,
            evaluation=evaluation,
            value=zeros,
            running=running,
            log_potential=zeros,
            lineages=lineages,
            log_weights=zeros,
            log_z=jnp.float32(0),
            strength=strength,
            move=jnp.int32(0),
            gains=zeros,
        )
        return self._weigh(particles, zeros, evaluation, says_enough(self.value, self.process, t))

    def step(self, key: Key, carry: Particles, t: Array, s: Array, cond: Cond = None) -> tuple[Particles, Info]:
        key_draw, key_resample = jax.random.split(key)
        carry, ancestors, resampled = self._resample(key_resample, carry)
        prediction = carry.evaluation.prediction if self.shared else self.denoiser(carry.x, t, cond)
        kernel = self.process.reverse(carry.x, t, s, prediction)
        proposal: Any = kernel
        if self.proposal is not None:
            proposal = self.proposal(kernel, Move(carry.x, t, s, cond, prediction))
        if self.twist is not None:
            strength = jnp.where(says_enough(self.value, self.process, t), self.twist * carry.strength, 0.0)
            proposal = tilt(proposal, scaled(carry.evaluation.gradient, strength), self.tilts)
        y = proposal.sample(key_draw)
        log_ratio = jnp.zeros_like(carry.log_weights)
        if proposal is not kernel:
            log_ratio = self._everybodys((kernel.log_prob(y) - proposal.log_prob(y)).astype(jnp.float32))
        evaluation = self._evaluate(y, s, cond)
        told = says_enough(self.value, self.process, s)
        moved = self._weigh(carry._replace(x=y, move=carry.move + 1), log_ratio, evaluation, told, 1 - s / t)
        moved = self.over_devices(moved)
        info = {
            "ess": ess(moved.log_weights),
            "log_weights": moved.log_weights,
            "log_z": moved.log_z + log_mean_exp(moved.log_weights),
            "value": evaluation.value * self.temperature,
            "strength": moved.strength,
            "ancestors": ancestors,
            "resampled": resampled,
            "infeasible": jnp.sum(evaluation.value == -jnp.inf),
        }
        return moved, info

    def final(self, carry: Particles, t: Array, cond: Cond = None) -> tuple[State, Info]:
        """Project the particles, and weigh them by the last potential: info as of `smc`."""
        prediction = carry.evaluation.prediction
        if self.process.projects and not self.shared:
            prediction = self.denoiser(carry.x, t, cond)
        x0 = self.process.finalize(carry.x, t, prediction)
        log_target = carry.evaluation.value
        if self.reward is not None:
            log_target = self._everybodys(self._scale(rewards.evaluate(self.reward, x0, cond)))
        log_weights = carry.log_weights + log_target - carry.log_potential
        log_z = carry.log_z + log_mean_exp(log_weights)
        error = jnp.sqrt(jnp.sum((carry.gains + share_gains(log_weights, carry.lineages)) ** 2))
        if self.islands > 1:  # they are independent
            shares = jnp.exp(log_normalize(log_weights)).reshape(self.islands, -1).sum(-1)
            error = jnp.sqrt(jnp.sum((shares - 1 / self.islands) ** 2) * self.islands / (self.islands - 1))
        info = {
            "log_weights": log_normalize(log_weights),
            "log_z": log_z,
            "log_z_se": jnp.where(log_z > -jnp.inf, error, jnp.nan),
            "lineages": carry.lineages,
            "ess": ess(log_weights),
            "value": log_target * self.temperature,
        }
        return x0, info

    def over_devices(self, carry: Particles) -> Particles:
        """Split states, predictions and gradients over the devices; weights and the like [N] are everybody's, a move's few numbers."""
        evaluation = carry.evaluation
        x, gradient, prediction = split((carry.x, evaluation.gradient, evaluation.prediction), self.shards)
        rest = carry._replace(x=None, evaluation=evaluation._replace(gradient=None, prediction=None))
        numbers = self._everybodys(rest)
        evaluation = numbers.evaluation._replace(gradient=gradient, prediction=prediction)
        return numbers._replace(x=x, evaluation=evaluation)

    def _everybodys(self, numbers: Any) -> Any:
        """Weights [N] on every device, so that all resample alike; those of islands stay with their particles."""
        return (whole if self.islands == 1 else split)(numbers, self.shards)

    def network_calls(self, moves: int) -> int:
        """Calls of the denoiser per particle over a chain of `moves` moves (the value's own network not counted)."""
        if not self.shared:
            return moves + self.process.projects
        return 1 + (moves if self.process.projects else moves - 1)

    def value_calls(self, moves: int) -> int:
        """Evaluations of the value per particle (with its gradient, where twisted)."""
        return 1 + moves

    def _scale(self, values: Array) -> Array:
        """Values over tau, with the infeasible (NaN) as -inf and what float32 cannot subtract cut off."""
        values = values.astype(jnp.float32) / self.temperature
        values = jnp.where(jnp.isnan(values), -jnp.inf, jnp.minimum(values, LARGEST))
        return jnp.where(values < -LARGEST, -jnp.inf, values)

    def _evaluate(self, x: State, t: Array, cond: Cond) -> Evaluation:
        def run(x: State) -> tuple[Array, Any]:
            return evaluate(self.process, self.value, self.shared, x, t, cond)

        if self.twist is None:
            values, prediction = run(x)
            return Evaluation(self._everybodys(self._scale(values)), None, prediction)
        values, back, prediction = jax.vjp(run, x, has_aux=True)
        gradient = jax.tree.map(lambda g: g / self.temperature, back(jnp.ones_like(values))[0])
        return Evaluation(self._everybodys(self._scale(values)), gradient, prediction)

    def _weigh(
        self, particles: Particles, log_ratio: Array, evaluation: Evaluation, told: Array, progress: Array | None = None
    ) -> Particles:
        """Multiply the weights by the proposal's ratio and by the potential, by which exp(strength * reached) has grown.

        The potential is 1 unless `told`: where the state says too little of x0 for the value to be more than error.
        `progress` is (t - s) / t of a move, the part of what was left of the chain; at the beginning it is None.
        """
        index = particles.move
        evaluates = told if progress is None else told & (index % self.interval == 0)
        value = jnp.where(told, _imputed(evaluation.value, particles.value, particles.log_weights), particles.value)
        running = particles.running
        if self.potential == "max":
            running = jnp.where(evaluates, jnp.maximum(running, value), running)
        elif self.potential == "sum":
            running = jnp.where(evaluates, jnp.clip(running + value, -LARGEST, LARGEST), running)
        reached = {"difference": value, "terminal": jnp.zeros_like(value)}.get(self.potential, running)
        strength = particles.strength
        if self.tempering is not None and progress is not None:
            strength = self.tempering[jnp.minimum(index, self.tempering.shape[0] - 1)]
        if self.adaptive is not None and progress is not None:
            log_weights = particles.log_weights + log_ratio
            tempered = self._temper(
                log_weights, particles.log_potential, reached, self.adaptive ** (self.interval * progress)
            )
            strength = jnp.where(evaluates, tempered, strength)
        log_potential = jnp.where(evaluates, strength * reached, particles.log_potential)
        return particles._replace(
            evaluation=evaluation,
            value=value,
            running=running,
            log_potential=log_potential,
            log_weights=particles.log_weights + log_ratio + log_potential - particles.log_potential,
            strength=strength,
        )

    def _temper(self, log_weights: Array, log_potential: Array, reached: Array, least: Array) -> Array:
        """The largest strength in [0, 1] at which the potential keeps the conditional ESS at `least` N, or that which keeps most.

        The conditional ESS of potentials G under normalised weights W is N (sum W G)^2 / sum W G^2. It is evaluated on a
        grid that closes in on the strength.
        """
        normalized = log_normalize(log_weights)

        def kept(strength: Array) -> Array:
            growth = strength * reached - log_potential
            total, square = (jax.nn.logsumexp(normalized + power * growth) for power in (1, 2))
            return jnp.exp(2 * total - square)

        def closer(_: int, bounds: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            levels = jnp.linspace(bounds[0], bounds[1], 17)
            share = jax.vmap(kept)(levels)
            enough = share >= least
            best = jnp.where(enough.any(), 16 - jnp.argmax(enough[::-1]), jnp.argmax(share))
            low = jnp.where(enough.any(), best, jnp.maximum(best - 1, 0))
            return levels[low], levels[jnp.minimum(best + 1, 16)], levels[best]

        return jax.lax.fori_loop(0, 5, closer, (jnp.float32(0), jnp.float32(1), jnp.float32(0)))[2]

    def _resample(self, key: Key, carry: Particles) -> tuple[Particles, Array, Array]:
        count = carry.log_weights.shape[0]
        if self.islands > 1:
            return self._resample_islands(key, carry)
        needed = ess(carry.log_weights) < self.ess_threshold * count

        def exchange() -> tuple[Particles, Array]:
            ancestors = SCHEMES[self.resampling](key, carry.log_weights)
            moved = jax.tree.map(lambda leaf: leaf[ancestors], carry[:6])  # the fields that are permuted
            resampled = Particles(
                *moved,
                log_weights=jnp.zeros_like(carry.log_weights),
                log_z=carry.log_z + log_mean_exp(carry.log_weights),
                strength=carry.strength,
                move=carry.move,
                gains=carry.gains + share_gains(carry.log_weights, carry.lineages),
            )
            return self.over_devices(resampled), ancestors.astype(jnp.int32)

        stay = lambda: (carry, jnp.arange(count, dtype=jnp.int32))  # noqa: E731
        resampled, ancestors = jax.lax.cond(needed, exchange, stay)  # devices exchange particles only where they must
        return resampled, ancestors, needed

    def _resample_islands(self, key: Key, carry: Particles) -> tuple[Particles, Array, Array]:
        """Resample every island by itself, where its own ESS is low; its particles go on with their mean weight."""
        apart = lambda leaf: leaf.reshape(self.islands, -1, *leaf.shape[1:])  # noqa: E731
        log_weights = apart(carry.log_weights)
        size = log_weights.shape[1]
        needed = jax.vmap(ess)(log_weights) < self.ess_threshold * size

        def exchange() -> tuple[Particles, Array]:
            drawn = jax.vmap(SCHEMES[self.resampling])(jax.random.split(key, self.islands), log_weights)
            chosen = jnp.where(needed[:, None], drawn, jnp.arange(size))
            move = lambda leaf: jax.vmap(lambda own, i: own[i])(apart(leaf), chosen).reshape(leaf.shape)  # noqa: E731
            mean = jax.vmap(log_mean_exp)(log_weights)[:, None]
            moved = Particles(*jax.tree.map(move, carry[:6]), *carry[6:])  # type: ignore[call-arg]
            weights = jnp.where(needed[:, None], mean, log_weights).reshape(-1)
            ancestors = (chosen + size * jnp.arange(self.islands)[:, None]).reshape(-1)
            return self.over_devices(moved._replace(log_weights=weights)), ancestors.astype(jnp.int32)

        stay = lambda: (carry, jnp.arange(size * self.islands, dtype=jnp.int32))  # noqa: E731
        resampled, ancestors = jax.lax.cond(needed.any(), exchange, stay)
        return resampled, ancestors, needed.any()


def _imputed(values: Array, previous: Array, log_weights: Array) -> Array:
    """Values [N] whose infeasible ones have grown from the previous ones as the others did in the mean: a potential of no say."""
    feasible = values > -jnp.inf
    weights = jnp.where(feasible, jnp.exp(log_normalize(jnp.where(feasible, log_weights, -jnp.inf))), 0.0)
    growth = jnp.sum(weights * jnp.where(feasible, values - previous, 0.0))
    return jnp.where(feasible, values, jnp.clip(previous + growth, -LARGEST, LARGEST))


def smc(
    process: Process,
    denoiser: DenoiserLike,
    value: ValueLike,
    *,
    temperature: float = 1.0,
    potential: str = "difference",
    reward: RewardLike | None = None,
    resampling: str = "systematic",
    ess_threshold: float = 0.5,
    interval: int = 1,
    twist: float | None = None,
    proposal: Guide | None = None,
    tempering: Array | None = None,
    adaptive: float | None = None,
    tilts: str = "token",
    islands: int = 1,
) -> Smc:
    """Build a particle sampler of p_pre(x) exp(r(x)/tau)/Z; `sample(..., batch=N)` runs N particles of one problem.

    The weights are those of a Feynman-Kac model: each move contributes kernel/proposal times a potential, with v the value:

        difference   exp((v(y, s) - v(x, t)) / tau)        max   exp of the increase of the maximum of v/tau so far
        terminal     1; all of the weight is at the end    sum   exp of the increase of the sum of v/tau

    and the end contributes exp(r(x0)/tau) over the product of a lineage's potentials. Where v is infeasible (NaN or -inf) before
    the end, it is taken to have changed as that of the other particles did in the mean, so that the lineage goes on and may end
    feasible; r(x0) itself, where infeasible, has weight 0.

    Args:
      process: with eta > 0.
      denoiser: of the prior. Where the value is `posterior_mean` of this same object, a particle costs one network call a move.
      value: (x, t, cond) -> [B], in the reward's unit; or a measurement (`guides.linear`, `guides.inpainting`), which
        stands for `guides.likelihood` of it with data of variance 1, and for the reward.
      temperature: tau, in the reward's unit.
      potential: `difference`, `max`, `sum` or `terminal`; `smc` has their equations (FK steering, arXiv 2501.06848).
      reward: r of the target, (x0, cond) -> [B]. Without it r is the value at the last time, which for `posterior_mean` is the
        reward at the projection, and for `guides.likelihood` its measurement.
      resampling: `multinomial`, `stratified`, `systematic` or `residual`.
      ess_threshold: resample when the effective sample size falls below this fraction of N; 1 always, 0 never.
      interval: moves between potentials (FK steering's schedule); the end always contributes.
      twist: propose from the kernel tilted by twist * gradient of v/tau (TDS, arXiv 2306.17775; DAS, 2501.05803); 1 is
        the twist of the target. One VJP of the value a move. The value must then be near the soft value
        tau log E[exp(r(x0)/tau) | x_t] in its gradient too: see the note of `smc`.
      proposal: any guide on the kernel, in place of or under the twist.
      tempering: [T + 1] strengths in [0, 1], one per time of the chain, that multiply v (DAS); see `das_tempering`.
      adaptive: choose the strengths: at each move from t to s the largest in [0, 1] at which the potential keeps the
        conditional ESS (Zhou, Johansen and Aston, arXiv 1303.3123) at adaptive^((t - s) / t) of N, so that the rest of a chain
        keeps at least that fraction. The strength begins at 0 and may fall. In (0, 1]; 0.5 is a good start, a smaller one for
        targets far from the prior. Not with `tempering`.
      tilts: of a masked process, see `guides.gradient_guide`.
      islands: groups of consecutive particles, of N / islands each, that resample by themselves, so that none moves from one to
        another: over several devices, as many as there are or a multiple. Z stays unbiased. The weights of islands differ, and the
        effective sample size falls with their spread: few large islands lose little.

    Returns:
      The sampler. `samples.info` has `log_weights` [N] (normalised); `log_z`, an estimate of log E_pre exp(r/tau), unbiased in Z,
      and `log_z_se`, its standard error; `lineages` [N], from which `resampling.standard_error` computes that of any mean; `ess`
      and `value` [N]. Errors are estimated from the spread of the particles: they do not include a mode that all lineages miss.

    Raises:
      ValueError: for eta = 0, an unknown potential or scheme, a threshold outside [0, 1], strengths outside [0, 1]; in `sample`, for
        conditions (particles share theirs: `denoisers.conditioned`).

    Note:
      A twist shifts the mean of a step by std^2 times the gradient of v/tau. The soft value of a measurement with noise sigma is
      log N(y; A E[x0 | x_t], A Cov[x0 | x_t] A^T + sigma^2 I), of curvature 1 / (v_t + sigma^2) at most. The plain posterior mean
      leaves out v_t, the variance of x0 given x_t, and has curvature 1 / sigma^2: at small sigma its twist overshoots at every step
      as DPS does (`guides.dps`), and log Z is wrong (-41 nats for -2.0 at sigma = 0.1 and 50 steps, -1e27 at 0.03).

      FK steering's released code drops the weights of moves at which it does not resample, and DAS's does not permute the twist
      when it resamples; both bias the result. Here weights accumulate and every field is resampled with its particle.
      Where the value is noise, potentials kill particles by chance, and log Z comes out too low by more than log_z_se says. So it is
      with `posterior_mean` of a network that predicts eps or the score near t = 1, where its error is divided by alpha: there
      potentials are 1 and the twist is 0 (`denoisers.says_enough`). Where log Z still changes with the number of particles, take
      adaptive=0.5 or `tempering`.

      If all x0 are infeasible, their weights are equal and log_z = -inf. Do not mark infeasible samples by a large negative
      reward: potentials of e^-1000 end lineages that might have become feasible, at any number of particles.

    References: Feynman-Kac models and twisted SMC: arXiv 2306.17775, 2501.06848, 2501.05803.

    Example:
      >>> import jax, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.linear_vp(), (1,), variance="fixed_large")
      >>> denoiser = lambda x, t, cond: x * process.schedule.alpha(t)  # exact for N(0, 1)
      >>> value = rgdiff.values.posterior_mean(lambda x0, cond: x0[:, 0], process, denoiser)
      >>> samples = rgdiff.samplers.sample(
      ...     rgdiff.samplers.smc(process, denoiser, value), jax.random.key(0), 4096, process.times(16)
      ... )
      >>> abs(float(samples.info["log_z"]) - 0.478) < 0.1  # log E exp(x0) = alpha^2 / 2 at the last time
      True
    """
    checks.law(process, "smc")
    if is_measurement(value):
        value = likelihood(denoiser, process, value)  # type: ignore[arg-type]
    if isinstance(value, Likelihood) and reward is None:
        reward = value.reward
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
        process=process,
        denoiser=denoiser,
        value=callable_pytree(value, "a value"),
        reward=None if reward is None else callable_pytree(reward, "a reward"),
        temperature=checks.positive("temperature", temperature),
        ess_threshold=checks.positive("ess_threshold", ess_threshold, zero=True),
        twist=None if twist is None else checks.positive("twist", twist, zero=True),
        proposal=None if proposal is None else callable_pytree(proposal, "a guide"),
        tempering=tempering,
        adaptive=None if adaptive is None else checks.positive("adaptive", adaptive),
        potential=checks.one_of("potential", potential, POTENTIALS),
        resampling=checks.one_of("resampling", resampling, SCHEMES),
        interval=checks.at_least("interval", interval, 1),
        shared=shares(value, denoiser),
        tilts=checks.one_of("tilts", tilts, TILTS),
        islands=checks.at_least("islands", islands, 1),
    )


def das_tempering(times: Array, gamma: float = 0.008) -> Array:
    """Return DAS's tempering: strengths min((1 + gamma)^i - 1, 1) at the i-th time of a chain (arXiv 2501.05803, §4.2).

    Args:
      times: [T + 1] of the chain.
      gamma: growth of the strength per move.

    Returns:
      Strengths [T + 1], in [0, 1].

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> print(rgdiff.samplers.das_tempering(jnp.array([1.0, 0.6, 0.3, 0.0]), gamma=0.5))  # 0, 0.5, 1.25, ...
      [0.  0.5 1.  1. ]
    """
    return jnp.minimum((1 + gamma) ** jnp.arange(times.shape[0], dtype=jnp.float32) - 1, 1.0)


@setting_of(smc, defaults={"potential": "max", "resampling": "multinomial"})
def fk_steering(process: Process, denoiser: DenoiserLike, value: ValueLike, **options: Any) -> Smc:
    """Build FK steering as published (arXiv 2501.06848): the prior as proposal, the maximum potential, multinomial resampling.

    Returns:
      The sampler, as `smc`.

    Example:
      >>> import jax, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.linear_vp(), (1,), variance="fixed_large")
      >>> denoiser = lambda x, t, cond: x * process.schedule.alpha(t)  # exact for N(0, 1)
      >>> value = rgdiff.values.posterior_mean(lambda x0, cond: x0[:, 0], process, denoiser)
      >>> sampler = rgdiff.samplers.fk_steering(process, denoiser, value, interval=4)
      >>> samples = rgdiff.samplers.sample(sampler, jax.random.key(0), 4096, process.times(16))
      >>> abs(float(samples.info["log_z"]) - 0.478) < 0.1  # log E exp(x0) = alpha^2 / 2 at the last time
      True
    """
    return smc(process, denoiser, value, **options)


@setting_of(smc, defaults={"twist": 1.0, "ess_threshold": 1.0})
def tds(process: Process, denoiser: DenoiserLike, value: ValueLike, **options: Any) -> Smc:
    """Build TDS as published (arXiv 2306.17775, algorithm 1): the twisted proposal, systematic resampling at every move.

    For a measurement the value is its likelihood with the variance of x0 given x_t, not its plain posterior mean:
    `tds(process, denoiser, guides.linear(a, y, sigma))`, or with data of variance v
    `tds(process, denoiser, guides.likelihood(denoiser, process, measurement, prior_variance=v))`.

    Returns:
      The sampler, as `smc`.

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.linear_vp(), (1,), variance="fixed_large")
      >>> denoiser = lambda x, t, cond: x * process.schedule.alpha(t)  # exact for N(0, 1)
      >>> sampler = rgdiff.samplers.tds(process, denoiser, rgdiff.guides.linear(jnp.eye(1), jnp.ones(1), sigma=1.0))
      >>> samples = rgdiff.samplers.sample(sampler, jax.random.key(0), 1024, process.times(16))
      >>> abs(float(samples.info["log_z"]) - (-1.5155)) < 0.05  # log N(1; 0, 1 + 1)
      True
    """
    return smc(process, denoiser, value, **options)


@setting_of(smc, fixed=("tempering",), defaults={"twist": 1.0})
def das(
    process: Process, denoiser: DenoiserLike, value: ValueLike, times: Array, *, gamma: float = 0.008, **options: Any
) -> Smc:
    """Build DAS as published (arXiv 2501.05803, algorithm 1): twisted and tempered, resampling below half the particles.

    Args:
      times: [T + 1] of the chain, `process.times(steps)`.
      gamma: growth of the tempering per move, see `das_tempering`.

    Returns:
      The sampler, as `smc`.

    Example:
      >>> import jax, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.linear_vp(), (1,), variance="fixed_large")
      >>> denoiser, times = lambda x, t, cond: x * process.schedule.alpha(t), process.times(16)  # exact for N(0, 1)
      >>> value = rgdiff.values.posterior_mean(lambda x0, cond: x0[:, 0], process, denoiser)
      >>> sampler = rgdiff.samplers.das(process, denoiser, value, times, gamma=0.1)
      >>> samples = rgdiff.samplers.sample(sampler, jax.random.key(0), 1024, times)
      >>> abs(float(samples.info["log_z"]) - 0.478) < 0.1  # log E exp(x0) = alpha^2 / 2 at the last time
      True
    """
    return smc(process, denoiser, value, tempering=das_tempering(times, gamma), **options)
