"""Energy models by themselves: trained with Langevin chains, and the constant that makes one a density.

An energy is (x, cond) -> [B] in nats, exp(-energy) an unnormalised density; the one that `dxmi` learns with temperature tau
is one after division by tau. `langevin_energy` is the classical method, the baseline of DxMI; `log_partition` estimates log Z
by the library's particle sampler.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import checks, processes, samplers, schedules, values
from rgdiff.resampling import log_mean_exp
from rgdiff.samplers._loop import roll
from rgdiff.shards import Shards, bound, in_turn, split, value_and_grad
from rgdiff.tuners._elegant import standard_normal
from rgdiff.tuners._loop import TrainState, start, update
from rgdiff.typing import Array, Cond, Info, Key, Params, callable_pytree, name_of, pytree, static


@pytree
class Langevin:
    """Moves x <- x - h grad E(x) + sqrt(2 h) z, one a call, whatever the times: a sampler's step for `roll`."""

    energy: Any
    step_size: Array

    def step(self, key: Key, x: Array, t: Array, s: Array, cond: Cond = None) -> tuple[Array, Info]:
        gradient = jax.grad(lambda x: jnp.sum(self.energy(x, cond)))(x)
        return x - self.step_size * gradient + jnp.sqrt(2 * self.step_size) * jax.random.normal(key, x.shape), {}


@pytree
class LangevinEnergy:
    """A tuner for `fit(data={"x0": ...})`. Build it with `langevin_energy`."""

    model: Any
    step_size: Array
    restart: Array
    spread: Array
    gamma: Array
    ema_decay: Array | None
    optimizer: Any = static()
    shape: tuple[int, ...] = static()
    batch: int = static()
    moves: int = static()
    chains: int = static()
    shards: Shards | None = static(default=None)

    def init(self, params: Params) -> TrainState:
        noise = self.spread * jax.random.normal(jax.random.key(0), (self.chains, *self.shape))
        return start(params, self.optimizer, average=self.ema_decay is not None, extra=noise)

    def suits(self, data: Any) -> None:
        """Refuse data of another shape."""
        checks.entries(data, "x0")
        checks.shape("data['x0']", data["x0"], (None, *self.shape))

    def energy(self, params: Params) -> Any:
        """The energy (x, cond) -> [B] of parameters, e.g. `state.best`."""
        return self.model(params)

    def step(self, key: Key, state: TrainState, batch: Any) -> tuple[TrainState, Info]:
        """Move some chains, raise the energy there and lower it on batch = {"x0": [B, ...]}."""
        key_rows, key_restart, key_noise, key_move = jax.random.split(key, 4)
        few = self._few(state.extra)
        chosen = jax.random.randint(key_rows, (self.batch,), 0, few.shape[1])
        pick = jax.vmap(lambda column, i: column[i])
        again = jax.random.bernoulli(key_restart, self.restart, (self.batch,) + (1,) * len(self.shape))
        noise = self.spread * jax.random.normal(key_noise, (self.batch, *self.shape))
        begin = jnp.where(again, noise, pick(few, chosen))
        sampler = Langevin(callable_pytree(self.model(state.params), "an energy"), self.step_size)
        chains, _ = roll(sampler, key_move, begin, jnp.linspace(1.0, 0.0, self.moves + 1))  # type: ignore[arg-type]
        chains = jax.lax.stop_gradient(chains)
        grad = value_and_grad(self.loss, self.shards, has_aux=True)
        (loss, info), gradients = grad(state.params, batch["x0"], chains)
        info.pop("energy_square")
        lost = ~jnp.isfinite(chains).reshape(self.batch, -1).all(-1).reshape(again.shape)
        state, more = update(state, gradients, self.optimizer, self.ema_decay)
        moved = jnp.where(lost, noise, chains)
        here = (jnp.arange(few.shape[1]) == chosen[:, None]).reshape(*few.shape[:2], *(1,) * len(self.shape))
        state = state._replace(extra=jnp.where(here, moved[:, None], few).reshape(state.extra.shape))
        return state, {"loss": loss} | info | more

    def over_devices(self, state: TrainState) -> TrainState:
        return state._replace(extra=split(state.extra, self.shards))

    def _few(self, chains: Array) -> Array:
        """The chains [B, chains / B, ...], one of each row of which is moved in a step."""
        return chains.reshape(self.batch, -1, *self.shape)

    def loss(self, params: Params, data: Array, chains: Array) -> tuple[Array, Info]:
        """The contrast of data and chains at these parameters."""
        return contrast(bound(self.model, params, "an energy"), data, chains, self.gamma)


def contrast(energy: Any, data: Array, samples: Array, gamma: Array, cond: Cond = None) -> tuple[Array, Info]:
    """Return mean E(data) - mean E(samples) + gamma (mean E(data)^2 + mean E(samples)^2), and the parts' means.

    Both batches are evaluated in one call.

    Args:
      energy: (x [B, ...], cond) -> [B].
      data, samples: [B, ...] each.
      gamma: weight of the squares, per unit of energy.
      cond: conditions [B, ...] of both, or None.
    """
    count = len(data)
    if len(samples) == count:
        join = in_turn
        part = lambda both: tuple(both.reshape(count, 2).T)  # noqa: E731
    else:
        join = lambda a, b: jnp.concatenate([a, b])  # noqa: E731
        part = lambda both: (both[:count], both[count:])  # noqa: E731
    twice, both = jax.tree.map(lambda c: join(c, c), cond), join(data, samples)
    low, high = part(checks.per_example(f"the energy {name_of(energy)} must return", energy(both, twice), len(both)))
    square = jnp.mean(low**2) + jnp.mean(high**2)
    info = {"energy_data": jnp.mean(low), "energy_samples": jnp.mean(high), "energy_square": square}
    return jnp.mean(low) - jnp.mean(high) + gamma * square, info


def langevin_energy(
    model: Any,
    shape: tuple[int, ...],
    optimizer: Any,
    *,
    batch: int = 256,
    moves: int = 20,
    step_size: float = 0.01,
    chains: int = 8192,
    restart: float = 0.05,
    spread: float = 1.0,
    gamma: float = 0.01,
    ema_decay: float | None = 0.999,
) -> LangevinEnergy:
    """Train an energy model by maximum likelihood, its own samples drawn by persistent Langevin chains.

        min over E of  E_data[E] - E_chains[E] + gamma (E_data[E^2] + E_chains[E^2]),   x <- x - h grad E(x) + sqrt(2 h) z

    Data come through `fit(data={"x0": [N, ...]}, batch=...)`.

    Args:
      model: params -> energy, (x [B, ...], cond) -> [B], nats.
      shape: of one example.
      optimizer: an optax gradient transformation.
      batch: B, chains moved a step: one of every `chains` / B that persist, at random.
      moves: Langevin moves a step.
      step_size: h, squared data units.
      chains: number of persistent chains, a multiple of `batch`.
      restart: probability with which a chain begins anew, at noise.
      spread: standard deviation of that noise, data units.
      gamma: keeps energies near 0, per nat.
      ema_decay: decay of the averaged parameters, `state.best`; None keeps no average.

    Returns:
      A tuner for `fit`; `tuner.energy(state.best)` is the energy, `state.extra` [chains, ...] the chains. info: loss, energy_data,
      energy_samples, gradient_norm, skipped.

    Raises:
      ValueError: for chains that are no multiple of the batch, or numbers out of range.

    Note:
      Du and Mordatch (arXiv 1903.08689, algorithm 1) move by a step of 10 with noise of .005, which samples no exp(-E), and
      gamma is 1; here moves are Langevin's own, so that energies are in nats. Moves are not corrected: of a quadratic energy of
      precision a the chains have variance 1 / (a (1 - h a / 2)).

    References: persistent chains, Tieleman 2008; noise restarts and gamma, arXiv 1903.08689; Langevin moves, arXiv 1904.09770.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rgdiff
      >>> model = lambda mean: lambda x, cond=None: jnp.sum((x - mean) ** 2, -1) / 2  # N(mean, 1)
      >>> tuner = rgdiff.tuners.langevin_energy(
      ...     model, (1,), optax.sgd(0.2), batch=64, chains=64, step_size=0.1, gamma=0.0, ema_decay=None)
      >>> data = {"x0": jnp.full((8, 1), 2.0)}
      >>> state = rgdiff.tuners.fit(tuner, jax.random.key(0), tuner.init(jnp.zeros(1)), 50, data=data, batch=64)
      >>> print(abs(state.params - 2) < 0.3)
      [ True]
    """
    batch = checks.at_least("batch", batch, 1)
    restart_, chains = checks.positive("restart", restart, zero=True), checks.at_least("chains", chains, batch)
    if chains % batch:
        raise ValueError(f"chains must be a multiple of the batch of {batch}, got {chains}")
    if not 0 <= restart <= 1:
        raise ValueError(f"restart is a probability, got {restart!r}")
    return LangevinEnergy(
        model=callable_pytree(model, "model (params -> energy)"),
        step_size=checks.positive("step_size", step_size),
        restart=restart_,
        spread=checks.positive("spread", spread),
        gamma=checks.positive("gamma", gamma, zero=True),
        ema_decay=None if ema_decay is None else checks.positive("ema_decay", ema_decay, zero=True),
        optimizer=checks.optimizer(optimizer),
        shape=tuple(int(d) for d in shape),
        batch=batch,
        moves=checks.at_least("moves", moves, 1),
        chains=chains,
    )


class Partition(NamedTuple):
    """An estimate of log Z, Z = integral of exp(-E).

    Args:
      log_z: log of the mean of independent estimates of Z, nats.
      spread: standard deviation of their logs, nats.
    """

    log_z: Array
    spread: Array


@pytree
class Excess:
    """log of exp(-E(x)) over N(x; 0, scale^2 I) dx, at x = scale x0: the weight of particles of standard normal x0."""

    energy: Any
    scale: Array

    def __call__(self, x0: Array, cond: Cond = None) -> Array:
        size = math.prod(x0.shape[1:])
        square = jnp.sum(x0.reshape(x0.shape[0], -1) ** 2, -1)
        volume = size * (0.5 * math.log(2 * math.pi) + jnp.log(self.scale))
        return -self.energy(self.scale * x0, cond) + 0.5 * square + volume


def log_partition(
    key: Key,
    energy: Any,
    shape: tuple[int, ...],
    *,
    scale: float = 1.0,
    detail: float = 0.3,
    particles: int = 1024,
    steps: int = 50,
    twist: float | None = 1.0,
    runs: int = 4,
) -> Partition:
    """Estimate log Z of an energy, Z = integral of exp(-E), by sequential Monte Carlo from N(0, scale^2 I).

    Z itself is estimated without bias. Particles follow a diffusion that leaves the Gaussian as it is, drawn and resampled towards
    the energy at their posterior mean (`samplers.smc`, twisted) at strengths detail^2 / (detail^2 + (scale^2 - detail^2) sigma_t^2),
    which rise evenly in their logarithms to 1. For a Gaussian energy of standard deviation `detail` that is the exact potential: the
    estimate is then exact as steps shrink, in any number of dimensions.

    Args:
      key: a typed PRNG key.
      energy: (x [B, ...], cond) -> [B], nats; a plain function bound once, or a callable pytree.
      shape: of one example.
      scale: standard deviation of the Gaussian, in data units; it must reach wherever exp(-E) is not small.
      detail: standard deviation of the narrowest modes of exp(-E), data units, at most `scale`.
      particles, steps: of the sampler.
      twist: strength of its proposals, 1 for the whole gradient; None for none (an energy without a gradient).
      runs: independent estimates, at least 2. Where their spread is not small against 1 nat the estimate is not to be trusted.

    Returns:
      Partition: log_z, the log of the mean of the runs' estimates, nats; spread, the standard deviation of their logs.

    Raises:
      ValueError: for a detail outside (0, scale], fewer than 2 runs.

    References: normalising constants by sequential Monte Carlo, Del Moral, Doucet and Jasra 2006.

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> energy = lambda x, cond=None: jnp.sum(x**2, -1) / 2  # log Z = log(2 pi) = 1.838 in two dimensions
      >>> found = rgdiff.tuners.log_partition(jax.random.key(0), energy, (2,), particles=64, steps=5, runs=2)
      >>> print(f"{found.log_z:.3f}")
      1.838
    """
    shape = tuple(int(d) for d in shape)
    schedule = schedules.cosine_vp()
    process = processes.initial_law(processes.gaussian(schedule, shape), schedule)
    excess = Excess(callable_pytree(energy, "an energy"), checks.positive("scale", scale))
    if not 0 < detail <= scale:
        raise ValueError(f"detail is a standard deviation of at most scale = {scale!r}, got {detail!r}")
    denoiser = standard_normal(process)
    narrow = max((scale / detail) ** 2 - 1, 1e-2)
    rise = np.linspace(1.0, 0.0, checks.at_least("steps", steps, 1) + 1)
    sigma2 = np.clip(
        np.expm1(rise * np.log1p(narrow)) / narrow, 1e-8, 0.9998
    )  # strengths fall evenly in their logarithms
    times = jnp.asarray(2 / np.pi * np.arcsin(np.sqrt(sigma2)), jnp.float32)
    strengths = jnp.asarray(1 / (1 + narrow * sigma2), jnp.float32)
    value = values.posterior_mean(excess, process, denoiser)
    sampler = samplers.smc(process, denoiser, value, reward=excess, tempering=strengths, twist=twist)
    estimates = jnp.stack([
        samplers.sample(sampler, one, particles, times).info["log_z"]
        for one in jax.random.split(key, checks.at_least("runs", runs, 2))
    ])  # fmt: skip
    return Partition(log_mean_exp(estimates), jnp.std(estimates, ddof=1))
