"""DxMI: a few-step sampler and an energy model of data, each trained against the other, by maximum-entropy inverse reinforcement learning.

The energy is lowered on data and raised on samples; the sampler is tuned to it by `dxdp`'s engine. `dxmi` is the paper's
algorithm with defaults that do not diverge, `dxmi_released` follows the configuration of the public code.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from rgdiff import checks
from rgdiff._settings import setting_of
from rgdiff.shards import bound, value_and_grad
from rgdiff.tuners._dxdp import settings, sigmoid_time_cost
from rgdiff.tuners._loop import TrainState
from rgdiff.tuners._max_ent import Ablation, MaximumEntropy, Paths, Togo
from rgdiff.tuners.energy_model import contrast
from rgdiff.typing import Array, Cond, Info, Params, Process, callable_pytree, pytree, static
from rgdiff.values import AtTime


@pytree
class InverseLearning(MaximumEntropy):
    """A tuner for `fit(data={"x0": ...})`. Build it with `dxmi` or `dxmi_released`."""

    energy_model: Any = None
    gamma: Array = 1.0  # type: ignore[assignment]
    last_gamma: Array = 1.0  # type: ignore[assignment]
    energy_limit: Array = 100.0  # type: ignore[assignment]
    energy_steps: int = static(default=1)

    advice = "energies or speeds ran away: raise gamma (0 bounds nothing) or lower the rates"

    def init(self, params: Params) -> TrainState:
        """Begin from {"policy": ..., "value": ...}, and "energy" where it has a network of its own."""
        wanted = {"policy", "value"} | ({"energy"} if self.energy_model is not None else set())
        if set(params) != wanted:
            raise ValueError(f"dxmi trains parameters {sorted(wanted)}, got {sorted(params)}")
        return super().init(params)

    def suits(self, data: Any) -> None:
        """Refuse data that are not examples of the process."""
        checks.entries(data, "x0")
        checks.examples("data['x0']", data["x0"], self.process)

    def togo(self, params: Params) -> Togo:
        energy = (
            None
            if self.energy_model is None
            else AtTime(bound(self.energy_model, params["energy"], "an energy of states"), jnp.float32(0))
        )
        return Togo(bound(self.value, params["value"], "a value"), energy, self.ablation.timeless)

    def energy(self, params: Params) -> AtTime:
        """The energy (x, cond) -> [B] of a state's parameters: V at t = 0, or the separate network; exp(-E / tau) is a density."""
        return AtTime(self.togo(params), jnp.float32(0))

    def _learn_energy(self, carry: Any, step: Array, paths: Paths, batch: Any, cond: Cond) -> tuple[Any, Info, Array]:
        """One or more steps of the energy on data and the ends of the chains."""
        name = "value" if self.energy_model is None else "energy"
        samples = self.process.finalize(paths.x[-1], self.times[-1], None)
        rate = self._rate(self.rates.energy, step)
        gamma = self.last_gamma + self._rate(self.gamma - self.last_gamma, step)

        def loss(part: Params, params: Params) -> tuple[Array, Info]:
            return contrast(self.energy(params | {name: part}), batch["x0"], samples, gamma, cond)

        params, opt_state = carry
        first = None
        for _ in range(self.energy_steps):
            grad = value_and_grad(loss, self.shards, has_aux=True)
            (error, info), gradients = grad(params[name], params)
            first = (error, info) if first is None else first
            part, opt = self._descend(params[name], opt_state[name], gradients, rate)
            params, opt_state = params | {name: part}, opt_state | {name: opt}
        error, info = first  # type: ignore[misc]
        bounded = info.pop("energy_square") <= 2 * self.energy_limit**2
        return (params, opt_state), {"energy_loss": error} | info, bounded


@setting_of(settings)
def dxmi(
    model: Any,
    process: Process,
    value: Any,
    times: Array | None = None,
    *,
    decay_steps: float,
    energy: Any = None,
    energy_steps: int = 1,
    gamma: float = 1.0,
    last_gamma: float | None = None,
    energy_limit: float | None = None,
    **options: Any,
) -> InverseLearning:
    """Train a few-step sampler and an energy E, q(x) proportional to exp(-E(x) / temperature), on data (arXiv 2407.00626, algorithm 1).

        min over E, max over pi of  E_data[E] - E_pi[E] + tau H(pi) + gamma (E_data[E^2] + E_pi[E^2])

    An iteration draws B chains, takes a step of E, then those of `dxdp` with r = -E. Data come through
    `fit(data={"x0": [N, ...]}, batch=B)`, with "cond" [N, ...] where sampler and energy are conditional.

    Args:
      value: params -> V, (x [B, ...], t, cond) -> [B]; at t = 0 it is the energy, and it is evaluated there only at data and
        ends of chains.
      batch: B, chains an iteration; the rows of data are `fit`'s own `batch`, the same number.
      decay_steps: iterations over which all rates fall to 0: as many as the run takes. With constant rates (infinity) sampler and
        energy orbit the solution.
      energy: params -> E, (x [B, ...], t, cond) -> [B], called at t = 0: a network of its own, with parameters "energy"; V is then
        not evaluated at t = 0. None: V at t = 0 is the energy.
      energy_steps: steps of Adam an iteration; several for an energy of its own, which otherwise lags behind the sampler.
      gamma: weight that keeps energies near 0, per unit of energy. At equilibrium E = -(p - q) / (2 gamma (p + q)) for data p and
        samples q: the sampler is off by p/q = (1 - 2 gamma E) / (1 + 2 gamma E), so that gamma tau must be small against 1 over the
        range of log p. With 0 it diverges.
      last_gamma: end value of gamma, which follows the cosine of the rates; gamma itself by default.
      energy_limit: an iteration with a root mean square energy above it is undone and counted, as in `dxdp`. At equilibrium
        energies are within 1 / (2 gamma): the default is two hundred times that, and 100 for a gamma above 1, or 0. A limit that a
        first overshoot passes is never left again: the iteration that is undone is the one that found it, not the one that made it.

    Returns:
      A tuner for `fit`. `tuner.model(params["policy"])` is the denoiser, `tuner.energy(params)` the energy (x, cond) -> [B],
      `tuner.togo(params)` all costs to go, for `params = state.best`. info: energy_loss, energy_data, energy_samples, and those of
      `dxdp` but the reward.

    Raises:
      ValueError: for parameters other than "policy", "value" (and "energy"), and as `dxdp`.

    Note:
      Give `warmup=300` for a pre-trained sampler. A gamma that falls takes some of its bias away and damps less: last_gamma = 0.5
      is the recipes' (benchmarks/results/dxmi-2d.md); with 0.3 the parameters of 8 Gaussians orbited at the end.

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> from rgdiff import policies, tuners
      >>> process = policies.few_step(policies.variances([0.5, 0.5]), (1,))  # two moves
      >>> policy = policies.policy(process, lambda w: lambda x, t, cond=None: w + 0 * x)  # each moves x by w
      >>> value = lambda c: lambda x, t, cond=None: c * x[:, 0]
      >>> tuner = tuners.dxmi(policy, process, value, decay_steps=5, batch=16, speed=jnp.ones(2))
      >>> params = {"policy": policy.init(jnp.zeros(1)), "value": jnp.float32(0)}
      >>> data = {"x0": jnp.ones((32, 1))}
      >>> state = tuners.fit(tuner, jax.random.key(0), tuner.init(params), 5, data=data, batch=16)
      >>> print(tuner.energy(state.best)(jnp.ones((3, 1))).shape, int(state.skipped))
      (3,) 0
    """
    gamma_ = checks.positive("gamma", gamma, zero=True)
    limit = 100.0 / jnp.where(gamma_ > 0, jnp.clip(gamma_, 1e-6, 1.0), 1.0) if energy_limit is None else energy_limit
    return InverseLearning(
        reward=None,
        **settings(model, process, value, times, decay_steps=decay_steps, **options),
        energy_model=None if energy is None else callable_pytree(energy, "energy (params -> E)"),
        gamma=gamma_,
        last_gamma=checks.positive("last_gamma", gamma if last_gamma is None else last_gamma, zero=True),
        energy_limit=checks.positive("energy_limit", limit),
        energy_steps=checks.at_least("energy_steps", energy_steps, 1),
    )


RELEASED = Ablation(timeless=True, regularized_values=False, resample=False, expectation="sampled")


@setting_of(
    dxmi,
    fixed=("temperature", "velocity_temperature"),
    defaults={"ablation": RELEASED, "ema_decay": None, "decay_steps": float("inf")},
)
def dxmi_released(
    model: Any,
    process: Process,
    value: Any,
    times: Array | None = None,
    *,
    dim: int,
    entropy_weight: float = 0.1,
    velocity_weight: float = 0.01,
    time_cost: float = 1.0,
    **options: Any,
) -> InverseLearning:
    """DxMI as the public code's CIFAR-10 configuration has it: one energy of x for all times, costs of moves for the policy alone.

    Args:
      dim: D, the number of dimensions of an example.
      entropy_weight, velocity_weight: tau_1 and tau_2, per dimension; temperature = entropy_weight / D and
        velocity_temperature = velocity_weight / D per example.
      time_cost: scale of `sigmoid_time_cost`, in the unit of the energy.

    Returns:
      A tuner for `fit(data={"x0": [N, ...]}, batch=B)`, as `dxmi`.

    Raises:
      ValueError: as `dxmi`.

    Note:
      tau_1 = 10 tau_2 has no optimum of sigma_t in a flat V: it grows until V's curvature stops it, or the policy's `reach`. The code
      takes next states as drawn by the chain and noise in the quadratic cost as drawn; and keeps no average. Its Adam is shared by
      energy and values, as ours is. Its rates are learning_rate=1e-7, sigma_learning_rate=1e-5, value_learning_rate=1e-5, without decay.

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> from rgdiff import policies, tuners
      >>> process = policies.few_step(policies.variances([0.5, 0.5]), (1,))  # two moves
      >>> policy = policies.policy(process, lambda w: lambda x, t, cond=None: w + 0 * x)  # each moves x by w
      >>> value = lambda c: lambda x, t, cond=None: c * x[:, 0]
      >>> tuner = tuners.dxmi_released(policy, process, value, dim=1, batch=16, speed=jnp.ones(2))
      >>> params = {"policy": policy.init(jnp.zeros(1)), "value": jnp.float32(0)}
      >>> data = {"x0": jnp.ones((32, 1))}
      >>> state = tuners.fit(tuner, jax.random.key(0), tuner.init(params), 5, data=data, batch=16)
      >>> print(tuner.energy(state.best)(jnp.ones((3, 1))).shape, int(state.skipped))
      (3,) 0
    """
    checks.law(process, "dxmi_released")
    steps = len(process.times() if times is None else times) - 1  # type: ignore[call-arg]
    dim = checks.at_least("dim", dim, 1)
    fixed = {
        "temperature": entropy_weight / dim,
        "velocity_temperature": velocity_weight / dim,
        "time_cost": sigmoid_time_cost(steps, time_cost),
    }
    return dxmi(model, process, value, times, **(fixed | options))
