"""GCD, the predecessor of DxMI: energy and sampler in one game, the sampler's gradient taken through all of its steps.

DxMI adds the costs to go and the auxiliary law, which this baseline lacks: here the energy's own gradient passes along the
whole chain, and the entropy of the samples is bounded by that of the last step.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from rgdiff._settings import setting_of
from rgdiff.samplers._loop import roll
from rgdiff.shards import bound
from rgdiff.tuners._dxmi import InverseLearning, dxmi
from rgdiff.tuners._max_ent import Paths, _Walk
from rgdiff.typing import Array, Cond, Info, Key, Params, Process, pytree


@pytree
class _Flow(_Walk):
    """The chain of a policy with its gradient; info has the entropy of every step, [B] nats."""

    def step(self, key: Key, x: Array, t: Array, s: Array, cond: Cond = None) -> tuple[Array, Info]:
        kernel: Any = self.process.reverse(x, t, s, self.denoiser(x, t, cond))
        return kernel.rsample(key), {"entropy": kernel.entropy()}


@pytree
class Contrastive(InverseLearning):
    """A tuner for `fit(data={"x0": ...})`. Build it with `gcd`."""

    def network_calls(self) -> int:
        return 2 * (self.times.shape[0] - 1)

    def _learn_values(self, key: Key, carry: Any, *_: Any) -> tuple[Any, Info]:
        """There are no costs to go."""
        return carry, {"loss": jnp.float32(0)}

    def policy_loss(
        self, policy: Params, key: Key, params: Params, paths: Paths, speed: Array, shift: Array, cond: Cond = None
    ) -> Array:
        """Mean of E(x_T) - tau H(pi(x_T | x_{T-1})) over fresh chains, reparameterised from their first state."""
        flow = _Flow(self.process, bound(self.model, policy, "a denoiser"))
        x, entropies = roll(flow, key, paths.x[0], self.times, cond, keep=lambda _, info: info["entropy"])  # type: ignore[arg-type]
        x0 = self.process.finalize(x, self.times[-1], None)
        return jnp.mean(self.energy(params)(x0, cond) - self.temperature * entropies[-1])


@setting_of(dxmi)
def gcd(
    model: Any, process: Process, value: Any, times: Array | None = None, *, decay_steps: float, **options: Any
) -> Contrastive:
    """Train a sampler and an energy against each other without dynamic programming (GCD, arXiv 2312.03397).

        min over E, max over pi of  E_data[E] - E_pi[E] + tau H(pi(x_T | x_{T-1})) + gamma (E_data[E^2] + E_pi[E^2])

    Data come through `fit(data={"x0": [N, ...]}, batch=B)`. Options that concern costs to go and speeds have no effect, except
    that speeds are still watched for divergence.

    Args:
      value: params -> the energy, (x [B, ...], t, cond) -> [B], evaluated at t = 0 alone.

    Returns:
      A tuner for `fit`, as `dxmi`; parameters are {"policy": ..., "value": ...}.

    Raises:
      ValueError: as `dxmi`.

    Note:
      Conditioning lowers entropy, so H(x_T) >= H(x_T | x_{T-1}): the bound that a chain gives without an auxiliary law. The
      abstract names the game and not the estimator of the entropy; that of the paper's experiments may differ.

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> from rgdiff import policies, tuners
      >>> process = policies.few_step(policies.variances([0.5, 0.5]), (1,))  # two moves
      >>> policy = policies.policy(process, lambda w: lambda x, t, cond=None: w + 0 * x)  # each moves x by w
      >>> value = lambda c: lambda x, t, cond=None: c * x[:, 0]
      >>> tuner = tuners.gcd(policy, process, value, decay_steps=5, batch=16, speed=jnp.ones(2))
      >>> params = {"policy": policy.init(jnp.zeros(1)), "value": jnp.float32(0)}
      >>> data = {"x0": jnp.ones((32, 1))}
      >>> state = tuners.fit(tuner, jax.random.key(0), tuner.init(params), 5, data=data, batch=16)
      >>> print(tuner.energy(state.best)(jnp.ones((3, 1))).shape, int(state.skipped))
      (3,) 0
    """
    tuner = dxmi(model, process, value, times, decay_steps=decay_steps, **options)
    return Contrastive(**{name: getattr(tuner, name) for name in tuner.__dataclass_fields__})  # type: ignore[attr-defined]
