"""Exact distributions of one-dimensional Gaussian chains by quadrature: the prior's, its tilt, and that of tilted kernels alone.

Kernels of any process and denoiser on states [B, 1] become matrices on a grid, so the distributions are those of the chain with
its own number of moves and not of its limit. It is the counterpart of `enumeration` for numbers; float64, on the host.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import checks
from rgdiff.processes import GaussianProcess
from rgdiff.rewards import score
from rgdiff.typing import DenoiserLike, RewardLike


class Line(NamedTuple):
    """A chain on a grid of states x [N], equally spaced; built by `line`.

    start [N]: probabilities of x_T. means [T, N], stds [T]: of its kernels. x0 [N]: the projection of every last state.
    snr: alpha^2 / sigma^2 at the projection.
    """

    x: np.ndarray
    start: np.ndarray
    means: np.ndarray
    stds: np.ndarray
    x0: np.ndarray
    snr: float

    def kernel(self, means: np.ndarray, std: float) -> np.ndarray:
        """Probabilities [N, N] of the next state given each row's mean."""
        log_p = -0.5 * ((self.x[None] - means[:, None]) / std) ** 2
        p = np.exp(log_p - log_p.max(1, keepdims=True))
        return p / p.sum(1, keepdims=True)


class Laws(NamedTuple):
    """Distributions over the projections x0 [N], as probabilities [N], and the soft value of x_T; computed by `laws`.

    prior: of the chain. tilted: p(x0) exp(r(x0)/alpha) / Z. frozen: every kernel tilted, x_T the prior's; tuning the kernels
    alone cannot reduce its KL to `tilted`. value [N]: alpha log E[exp(r(x0)/alpha) | x_T = x], in the
    reward's unit. log_z: nats.
    """

    x0: np.ndarray
    prior: np.ndarray
    tilted: np.ndarray
    frozen: np.ndarray
    value: np.ndarray
    log_z: float


def line(
    process: GaussianProcess, denoiser: DenoiserLike, times: Any, *, points: int = 1001, width: float = 6.0
) -> Line:
    """Discretise a one-dimensional chain on a grid of states.

    Args:
      process: Gaussian, on states [B, 1], eta > 0.
      denoiser: (x, t) -> E[x0 | x_t] [B, 1]; it is called without a condition.
      times: [T + 1], of the chain.
      points: N.
      width: half-width of the grid, in standard deviations of x_T or units of x0, whichever is larger.

    Returns:
      The chain on its grid.

    Raises:
      ValueError: for another shape, a chain with eta = 0, or a grid coarser than the chain's smallest noise.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> from rgdiff.exact import quadrature
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.linear_vp(), (1,))
      >>> denoiser = lambda x, t, cond=None: x * process.schedule.alpha(t)
      >>> chain = quadrature.line(process, denoiser, process.times(4), points=201)
      >>> print(chain.means.shape, f"{chain.start.sum():.4f}")
      (3, 201) 1.0000
    """
    if not isinstance(process, GaussianProcess) or process.shape != (1,):
        raise ValueError(
            f"quadrature needs a Gaussian process on states [B, 1], got shape {getattr(process, 'shape', None)}"
        )
    checks.law(process, "quadrature")
    times, points = checks.times(times, process), checks.at_least("points", points, 3)
    std = float(process.schedule.prior_std)
    x = np.linspace(-width, width, points) * max(std, 1.0)
    states = jnp.asarray(x[:, None], jnp.float32)

    @jax.jit
    def kernel(t: Any, s: Any) -> Any:
        law: Any = process.reverse(states, t, s, denoiser(states, t))
        return law.mean[:, 0], jnp.max(jnp.broadcast_to(law.std, law.mean.shape))

    moves = [kernel(t, s) for t, s in itertools.pairwise(times)]
    stds = np.array([move[1] for move in moves], float)
    spacing = x[1] - x[0]
    if stds.min() < spacing:
        raise ValueError(
            f"the chain's smallest noise, {stds.min():.2g}, is finer than the grid's {spacing:.2g}; "
            f"give points={int(points * spacing / stds.min()) + 2} or more"
        )
    t = times[-1]
    x0 = np.asarray(process.mean(states, t, denoiser(states, t)), float)[:, 0]
    start = np.exp(-0.5 * (x / std) ** 2)
    snr = float(process.schedule.alpha(t) / process.schedule.sigma(t)) ** 2
    return Line(x, start / start.sum(), np.array([move[0] for move in moves], float), stds, x0, snr)


def laws(chain: Line, reward: RewardLike, temperature: float) -> Laws:
    """Compute a chain's distribution of x0, its tilt by exp(r / temperature), and that of tilted kernels from the prior's x_T.

    Args:
      chain: from `line`.
      reward: x0 [N, 1] -> [N]; it is called without a condition.
      temperature: tau (alpha of the paper), in the reward's unit.

    Returns:
      Laws(x0, prior, tilted, frozen, value, log_z).

    Raises:
      ValueError: for a temperature that is not positive.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> from rgdiff.exact import quadrature
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.linear_vp(), (1,))
      >>> denoiser = lambda x, t, cond=None: x * process.schedule.alpha(t)
      >>> chain = quadrature.line(process, denoiser, process.times(4), points=201)
      >>> print(f"{quadrature.laws(chain, lambda x0, cond=None: 0 * x0[:, 0] + 2.0, 4.0).log_z:.4f}")  # log E exp(2 / 4)
      0.5000
    """
    rewards = np.asarray(score(reward, jnp.asarray(chain.x0[:, None], jnp.float32)), float)
    log_tilt = rewards / float(checks.positive("temperature", temperature))
    top = log_tilt.max()
    tilt = np.exp(log_tilt - top)
    kernels = [chain.kernel(mean, std) for mean, std in zip(chain.means, chain.stds, strict=True)]
    value = tilt
    for kernel in reversed(kernels):
        value = kernel @ value
    prior, frozen = chain.start, chain.start / value
    for kernel in kernels:
        prior, frozen = prior @ kernel, frozen @ kernel
    z = float(prior @ tilt)
    return Laws(
        chain.x0, prior, prior * tilt / z, frozen * tilt, temperature * (np.log(value) + top), float(np.log(z) + top)
    )
