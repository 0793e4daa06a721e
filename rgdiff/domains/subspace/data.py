"""The gradient-guidance paper's worlds: Gaussian data on a linear subspace, and the unit sphere, with exact denoisers.

States are vectors [B, D]. Reports show, beside a reward, how much of theta . x lies in the data's support, since leaving the
support raises a linear reward easily. The fixed subspace and objectives of arXiv 2404.14743 are read from the
authors' files by path (`linear`, `sphere`); `judge` evaluates samples for a report.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff.processes import along
from rgdiff.schedules import GaussianSchedule
from rgdiff.typing import Array, Cond, Denoiser, Info, Key, pytree

SOURCE = "https://github.com/yukang123/GGDMOptim (simulations/data)"
TRAINING = 65_536  # examples, as the authors


@pytree
class SubspaceDenoiser:
    """E[x0 | x_t] = alpha A'A x of x0 = A'u, u ~ N(0, I), for a variance-preserving schedule; A [d, D], orthonormal rows.

    `shift` [T, D] makes it the affine family of algorithm 2: the noise implied at t = i/T moves by shift[i - 1], so that
    E[x0 | x_t] moves by -sigma/alpha times it. None is the exact denoiser.
    """

    schedule: GaussianSchedule
    basis: Array
    shift: Array | None = None

    def __call__(self, x: Array, t: Array, cond: Cond = None) -> Array:
        alpha, sigma = along(self.schedule.alpha(t), x), along(self.schedule.sigma(t), x)
        out = alpha * (x @ self.basis.T) @ self.basis
        if self.shift is None:
            return out
        steps = self.shift.shape[0]
        index = jnp.clip(jnp.round(t * steps).astype(jnp.int32) - 1, 0, steps - 1)
        return out - sigma / alpha * self.shift[index]


@pytree
class AffineFamily:
    """Parameters {"shift": [T, D]} to a `SubspaceDenoiser`: what algorithm 2's theory refits, started at the exact score."""

    schedule: GaussianSchedule
    basis: Array

    def __call__(self, params: Any) -> SubspaceDenoiser:
        return SubspaceDenoiser(self.schedule, self.basis, params["shift"])


@pytree
class SphereDenoiser:
    """E[x0 | x_t] = rho(kappa) x / |x| of data uniform on the unit sphere of R^D; kappa = alpha |x| / sigma^2.

    The posterior is von Mises-Fisher, rho = I_{D/2}(kappa) / I_{D/2-1}(kappa).
    """

    schedule: GaussianSchedule

    def __call__(self, x: Array, t: Array, cond: Cond = None) -> Array:
        scale = along(self.schedule.alpha(t) / self.schedule.sigma(t) ** 2, x)
        length = jnp.sqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-30))
        return bessel_ratio(x.shape[-1] / 2, scale * length) * x / length


def bessel_ratio(order: float, kappa: Array) -> Array:
    """Compute I_order(kappa) / I_{order-1}(kappa) for kappa >= 0; relative error below 6e-5, 1e-5 from order 32 up.

    Backwards by 1 / ratio_n = 2 n / kappa + ratio_{n+1}, from Amos' bound 16 orders up (Math. Comp. 28, 1974): its
    error shrinks by the squared ratio at every order, and is O(1 / kappa^2) where the ratio is near 1.

    Args:
      order: of the numerator, positive.
      kappa: any shape, >= 0.

    Returns:
      The shape of kappa, in [0, 1).
    """
    top = order + 16
    ratio = kappa / (top - 0.5 + jnp.sqrt((top + 0.5) ** 2 + kappa**2))
    for n in range(15, -1, -1):
        ratio = kappa / (2 * (order + n) + kappa * ratio)
    return ratio


@pytree
class SubspaceMeasure:
    """Beside the reward: theta . x, its part inside the subspace, |x inside|, and the mean of |x outside| / |x inside|."""

    basis: Array
    theta: Array

    def __call__(self, x0: Array) -> Info:
        inside = (x0 @ self.basis.T) @ self.basis
        norm = lambda x: jnp.linalg.norm(x, axis=-1)  # noqa: E731
        return {
            "theta_x": jnp.mean(x0 @ self.theta),
            "theta_x_inside": jnp.mean(inside @ self.theta),
            "inside": jnp.mean(norm(inside)),
            "off_support": jnp.mean(norm(x0 - inside) / (norm(inside) + 1e-8)),
        }


@pytree
class SphereMeasure:
    """Beside the reward: theta . x, that of x / |x|, |x|, and the signed mean of |x| - 1."""

    theta: Array

    def __call__(self, x0: Array) -> Info:
        length = jnp.linalg.norm(x0, axis=-1)
        return {
            "theta_x": jnp.mean(x0 @ self.theta),
            "theta_x_inside": jnp.mean(x0 @ self.theta / jnp.maximum(length, 1e-8)),
            "inside": jnp.mean(length),
            "off_support": jnp.mean(length - 1),
        }


class VectorDomain:
    """Data in R^D whose denoiser is known. `constants` are the paper's thetas and centres, float32."""

    value_range = None

    def __init__(self, constants: dict[str, np.ndarray], basis: np.ndarray | None):
        self.constants, self.basis = constants, None if basis is None else jnp.asarray(basis, jnp.float32)
        self.shape = (len(constants["theta_1"]),)

    @property
    def train_x(self) -> np.ndarray:
        """65,536 examples for training a network, the same on every machine."""
        return np.asarray(self.data(jax.random.key(0), TRAINING))

    def data(self, key: Key, count: int) -> Array:
        """Draw examples [count, D]."""
        if self.basis is not None:
            return jax.random.normal(key, (count, self.basis.shape[0])) @ self.basis
        x = jax.random.normal(key, (count, *self.shape))
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    def family(self, schedule: GaussianSchedule, steps: int) -> tuple[Any, Any]:
        """Return a model and the parameters at which it is the exact denoiser."""
        if self.basis is None:
            return _Constant(SphereDenoiser(schedule)), jnp.zeros(())
        return AffineFamily(schedule, self.basis), {"shift": jnp.zeros((steps, *self.shape))}

    def measure(self, theta: Array) -> Any:
        """Return what to report beside the reward: x0 -> dict of numbers."""
        return SphereMeasure(theta) if self.basis is None else SubspaceMeasure(self.basis, theta)


@pytree
class _Constant:
    """A model without parameters."""

    denoiser: Denoiser

    def __call__(self, params: Any) -> Denoiser:
        return self.denoiser


def _load(name: str, data_dir: str | os.PathLike | None) -> dict[str, np.ndarray]:
    folder = data_dir or os.environ.get("RGDIFF_DATA")
    path = Path(folder or ".").expanduser() / f"ggdm_{name}_hyperparameters.npz"
    if folder is None or not path.is_file():
        where = "data_dir and RGDIFF_DATA are unset" if folder is None else f"looked at {path}"
        raise FileNotFoundError(
            f"the paper's constants are missing: {where}; put {path.name} there, made from {SOURCE}"
        )
    with np.load(path) as stored:
        return {key: np.asarray(stored[key], np.float32) for key in stored.files}


def linear(data_dir: str | os.PathLike | None = None) -> VectorDomain:
    """Load the paper's linear subspace: D = 64, d = 16, theta_1 inside it, theta_2 nine parts outside to one inside.

    Args:
      data_dir: folder of ggdm_linear_hyperparameters.npz; the environment variable RGDIFF_DATA when None.

    Returns:
      The domain.

    Raises:
      FileNotFoundError: for a missing file, with its address.

    References: arXiv 2404.14743, §E.1.
    """
    stored = _load("linear", data_dir)
    size = stored["A"].shape[1]
    constants = {name: stored[name].reshape(size) for name in ("theta_1", "theta_2", "b_2")}
    return VectorDomain(constants | {"b_1": np.full(size, stored["b_1"])}, stored["A"])


def sphere(data_dir: str | os.PathLike | None = None) -> VectorDomain:
    """Load the paper's unit sphere of R^64 (which it calls the unit ball) and its theta.

    Args:
      data_dir: folder of ggdm_ball_hyperparameters.npz; the environment variable RGDIFF_DATA when None.

    Returns:
      The domain.

    Raises:
      FileNotFoundError: for a missing file, with its address.

    References: arXiv 2404.14743, §E.1.
    """
    return VectorDomain({"theta_1": _load("ball", data_dir)["theta"].reshape(-1)}, None)
