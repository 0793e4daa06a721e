"""Gaussians and mixtures seen through y = A x0 + noise: posterior, evidence, conditional denoiser, soft value, in closed form.

The exact side is NumPy float64, written from the equations. Every world is a product of blocks of coordinates, each an
isotropic mixture with measurements of its own, so that a swiss roll (a curve times an interval) is one too. Quadratic
rewards are measurements up to a constant: r(x) = -|y - A x|^2 / (2 sigma^2).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import guides, processes
from rgdiff.typing import pytree
from tests.worlds.worlds import SCHEDULES, GaussianWorld, MixtureDenoiser

Array = np.ndarray


def _log_normal(r: Array, cov: Array) -> Array:
    """log N(r; 0, cov) over the last axis."""
    white = np.linalg.solve(np.linalg.cholesky(cov), r[..., None])[..., 0]
    return -0.5 * (white**2).sum(-1) - 0.5 * (np.linalg.slogdet(cov)[1] + r.shape[-1] * np.log(2 * np.pi))


def _log_sum_exp(x: Array) -> Array:
    top = x.max(-1, keepdims=True)
    return np.log(np.exp(x - top).sum(-1)) + top[..., 0]


M3 = [0.4, -0.3, 0.8]
C3 = [[0.9, 0.4, 0.1], [0.4, 0.7, -0.2], [0.1, -0.2, 0.5]]
A23 = np.array([[1.0, 0.5, -0.3], [0.0, 0.7, 0.6]])
Y2 = np.array([1.2, -0.4])


class Measured(GaussianWorld):
    """Gaussian data measured by y = A x0 + noise; under every linear guide the prediction is affine, and so is the chain."""

    def __init__(self, a, y, noise, *, guide="tmpd", v=1.0, m=M3, c=C3, **options):
        self.a, self.y, self.noise, self.guide, self.v = np.atleast_2d(a), np.atleast_1d(y), noise, guide, v
        super().__init__(m, c, **options)

    def gain(self, t, theta=(0.0, 1.0)):
        g, offset = super().gain(t, theta)
        alpha, sigma = self.reference.alpha(t), self.reference.sigma(t)
        if alpha == 0:  # nothing is known of x0, and nothing guided
            return g, offset
        weight, eye = sigma**2 / alpha, np.eye(len(self.y))
        of_measured = {
            "dps": 0 * eye,
            "pigdm": self.v * sigma**2 / (alpha**2 * self.v + sigma**2) * self.a @ self.a.T,
            "tmpd": weight * self.a @ g @ self.a.T,
            "dtmpd": weight * np.diag((self.a @ g @ self.a.T).sum(1)),
        }[self.guide]
        pull = weight * g.T @ self.a.T @ np.linalg.inv(of_measured + self.noise**2 * eye)
        return g - pull @ self.a @ g, offset + pull @ (self.y - self.a @ offset)

    def guided(self) -> Any:
        measurement = guides.linear(self.a, self.y, self.noise)
        build: Any = {
            "dps": guides.dps,
            "pigdm": lambda *operands: guides.pigdm(*operands, prior_variance=self.v),
            "tmpd": guides.tmpd,
            "dtmpd": lambda *operands: guides.tmpd(*operands, diagonal=True),
        }[self.guide]
        return build(self.denoiser, self.process, measurement)

    def posterior(self):
        gain = self.c @ self.a.T @ np.linalg.inv(self.a @ self.c @ self.a.T + self.noise**2 * np.eye(len(self.y)))
        return self.m + gain @ (self.y - self.a @ self.m), self.c - gain @ self.a @ self.c


class Mixture:
    """sum_k w_k N(m_k, std^2 I), and its posterior given y = A x0 + sigma * noise: again a mixture, of one covariance."""

    def __init__(self, weights, means, std: float, matrix, y, sigma: float):
        self.m, self.std = np.asarray(means, float), float(std)
        self.w = np.asarray(weights, float) / np.sum(weights)
        self.a, self.y, self.sigma = np.asarray(matrix, float), np.asarray(y, float), float(sigma)
        self.dim = self.m.shape[1]
        noise = self.sigma**2 * np.eye(len(self.y))
        joint = np.log(self.w) + _log_normal(self.y - self.m @ self.a.T, self.std**2 * self.a @ self.a.T + noise)
        self.log_evidence = float(_log_sum_exp(joint))
        self.posterior_w = np.exp(joint - self.log_evidence)
        self.posterior_cov = np.linalg.inv(np.eye(self.dim) / self.std**2 + self.a.T @ self.a / self.sigma**2)
        self.posterior_m = (self.m / self.std**2 + self.a.T @ self.y / self.sigma**2) @ self.posterior_cov

    @staticmethod
    def _denoise(x: Array, alpha: float, sigma: float, w: Array, m: Array, cov: Array) -> tuple[Array, Array]:
        """log p_t(x) and E[x0 | x_t = x] of the mixture w, m, cov."""
        noised = alpha**2 * cov + sigma**2 * np.eye(len(cov))
        residual = x[:, None] - alpha * m
        joint = np.log(w) + _log_normal(residual, noised)
        log_p = _log_sum_exp(joint)
        means = m + alpha * residual @ np.linalg.solve(noised, cov)
        return log_p, (np.exp(joint - log_p[:, None])[..., None] * means).sum(1)

    def denoise(self, x: Array, alpha: float, sigma: float) -> tuple[Array, Array]:
        return self._denoise(x, alpha, sigma, self.w, self.m, self.std**2 * np.eye(self.dim))

    def denoise_given_y(self, x: Array, alpha: float, sigma: float) -> tuple[Array, Array]:
        return self._denoise(x, alpha, sigma, self.posterior_w, self.posterior_m, self.posterior_cov)

    def moments(self, posterior: bool = True) -> tuple[Array, Array]:
        """Mean and covariance."""
        w, m = (self.posterior_w, self.posterior_m) if posterior else (self.w, self.m)
        cov = self.posterior_cov if posterior else self.std**2 * np.eye(self.dim)
        centred = m - w @ m
        return w @ m, cov + (w[:, None] * centred).T @ centred

    def expected_reward(self, posterior: bool = True) -> float:
        """E[-|y - A x|^2 / (2 sigma^2)]."""
        mean, cov = self.moments(posterior)
        residual = self.y - self.a @ mean
        return float(-(residual @ residual + np.trace(self.a @ cov @ self.a.T)) / (2 * self.sigma**2))

    def sample(self, rng: np.random.Generator, count: int) -> Array:
        """Draws of the posterior."""
        k = rng.choice(len(self.w), count, p=self.posterior_w)
        return self.posterior_m[k] + rng.normal(size=(count, self.dim)) @ np.linalg.cholesky(self.posterior_cov).T


@pytree
class SoftValue:
    """log p(y | x_t) of one block: log evidence + log p_t(x | y) - log p_t(x), in the eigenvectors of the posterior's covariance."""

    prior: MixtureDenoiser
    log_w: jax.Array
    m: jax.Array
    variances: jax.Array
    vectors: jax.Array
    log_evidence: jax.Array

    def __call__(self, x: jax.Array, t: jax.Array, cond: Any = None) -> jax.Array:
        schedule = self.prior.schedule
        alpha, sigma = (jnp.broadcast_to(f(t), x.shape[:1])[:, None] for f in (schedule.alpha, schedule.sigma))
        var = alpha**2 * self.variances + sigma**2  # [B, D]
        residual = (x @ self.vectors)[:, None] - alpha[..., None] * self.m  # [B, K, D]
        log_p = -0.5 * (residual**2 / var[:, None] + jnp.log(2 * jnp.pi * var)[:, None]).sum(-1)
        given = jax.nn.logsumexp(self.log_w + log_p, -1)
        return self.log_evidence + given - self.prior.log_density(x, t)


def split(x: Any, parts: Any) -> list[Any]:
    """Cut states [B, D] into the parts' coordinates."""
    dims = [part.m.shape[1] for part in parts]
    return [x[:, end - dim : end] for dim, end in zip(dims, np.cumsum(dims), strict=True)]


@pytree
class JoinedDenoiser:
    """E[x0 | x_t] of independent blocks."""

    parts: tuple[MixtureDenoiser, ...]

    def __call__(self, x: jax.Array, t: jax.Array, cond: Any = None) -> jax.Array:
        pieces = zip(self.parts, split(x, self.parts), strict=True)
        return jnp.concatenate([part(piece, t) for part, piece in pieces], 1)


@pytree
class JoinedValue:
    """log p(y | x_t) of independent blocks."""

    parts: tuple[SoftValue, ...]

    def __call__(self, x: jax.Array, t: jax.Array, cond: Any = None) -> jax.Array:
        return sum(part(piece, t) for part, piece in zip(self.parts, split(x, self.parts), strict=True))  # type: ignore[return-value]


class MeasuredWorld:
    """Independent blocks, each measured by itself; the library's process, denoiser, measurement and soft value beside the exact law."""

    def __init__(self, *blocks: Mixture, schedule: str = "linear_vp", eta: float = 1.0):
        self.blocks, self.reference = blocks, SCHEDULES[schedule]
        self.dim = sum(block.dim for block in blocks)
        self.schedule = self.reference.build()
        self.process = processes.gaussian(self.schedule, (self.dim,), eta=eta)
        f32 = lambda a: jnp.asarray(a, jnp.float32)  # noqa: E731
        denoisers, values = [], []
        for block in blocks:
            std = jnp.full(len(block.w), block.std, jnp.float32)
            denoisers.append(MixtureDenoiser(self.schedule, f32(np.log(block.w)), f32(block.m), std))
            variances, vectors = np.linalg.eigh(block.posterior_cov)
            log_w = np.log(np.maximum(block.posterior_w, 1e-300))
            posterior = f32(log_w), f32(block.posterior_m @ vectors), f32(variances), f32(vectors)
            values.append(SoftValue(denoisers[-1], *posterior, f32(block.log_evidence)))
        self.denoiser, self.value = JoinedDenoiser(tuple(denoisers)), JoinedValue(tuple(values))
        self.a, self.y, self.sigma = _block_diagonal(blocks), np.concatenate([b.y for b in blocks]), blocks[0].sigma
        self.measurement = guides.linear(self.a, self.y, self.sigma)
        self.log_evidence = sum(block.log_evidence for block in blocks)
        self.log_z = self.log_evidence + 0.5 * len(self.y) * np.log(2 * np.pi * self.sigma**2)
        """log E exp(r(x0)) with r = -|y - A x0|^2 / (2 sigma^2)."""

    def expected_reward(self, posterior: bool = True) -> float:
        return sum(block.expected_reward(posterior) for block in self.blocks)

    def mean(self) -> Array:
        """E[x0 | y]."""
        return np.concatenate([block.moments()[0] for block in self.blocks])

    def prior_variance(self) -> float:
        """Variance of x0, averaged over coordinates."""
        return sum(np.trace(block.moments(False)[1]) for block in self.blocks) / self.dim

    def sample(self, rng: np.random.Generator, count: int) -> Array:
        """Draws of p(x0 | y)."""
        return np.concatenate([block.sample(rng, count) for block in self.blocks], 1)

    def denoise(self, x: Array, t: float, *, given_y: bool = False) -> Array:
        """E[x0 | x_t] or E[x0 | x_t, y]."""
        alpha, sigma = self.reference.alpha(t), self.reference.sigma(t)
        pieces = zip(self.blocks, split(x, self.blocks), strict=True)
        return np.concatenate(
            [(b.denoise_given_y if given_y else b.denoise)(piece, alpha, sigma)[1] for b, piece in pieces], 1
        )

    def log_value(self, x: Array, t: float) -> Array:
        """log p(y | x_t)."""
        alpha, sigma = self.reference.alpha(t), self.reference.sigma(t)
        pieces = zip(self.blocks, split(x, self.blocks), strict=True)
        differences = [b.denoise_given_y(p, alpha, sigma)[0] - b.denoise(p, alpha, sigma)[0] for b, p in pieces]
        return np.asarray(self.log_evidence + sum(differences))


def _block_diagonal(blocks: Any) -> Array:
    out = np.zeros((sum(len(b.y) for b in blocks), sum(b.dim for b in blocks)))
    row = column = 0
    for block in blocks:
        out[row : row + len(block.y), column : column + block.dim] = block.a
        row, column = row + len(block.y), column + block.dim
    return out


def grid_of_nine(**options: Any) -> MeasuredWorld:
    """Nine modes on {-4, 0, 4}^2, variance 0.3, r = -x^2 / 100 - y^2 (DAS, arXiv 2501.05803)."""
    means = [(a, b) for a in (-4, 0, 4) for b in (-4, 0, 4)]
    matrix = np.diag(np.sqrt([2 / 100, 2]))
    return MeasuredWorld(Mixture(np.ones(9), means, np.sqrt(0.3), matrix, np.zeros(2), 1.0), **options)


def ring_of_eight(**options: Any) -> MeasuredWorld:
    """Eight modes on a circle of radius 4, variance 0.3, r = -x^2 - (y - 1)^2 / 10 (DAS, arXiv 2501.05803)."""
    angles = np.arange(8) * np.pi / 4
    means = 4 * np.stack([np.cos(angles), np.sin(angles)], 1)
    matrix = np.diag(np.sqrt([2, 2 / 10]))
    return MeasuredWorld(Mixture(np.ones(8), means, np.sqrt(0.3), matrix, matrix @ np.array([0, 1]), 1.0), **options)


def swiss_roll(points: int = 400, **options: Any) -> MeasuredWorld:
    """(u cos u, u sin u) / 2 with u uniform on [1.5, 4.5] pi, z uniform on [-3, 3], noise 0.3, r = -(x^2 + y^2) / 100 - z^2.

    The curve and the interval are midpoint rules far finer than the noise (DAS, arXiv 2501.05803).
    """
    u = 3 * np.pi * (0.5 + (np.arange(points) + 0.5) / points)
    curve = np.stack([u * np.cos(u), u * np.sin(u)], 1) / 2
    height = 6 * (np.arange(60) + 0.5) / 60 - 3
    return MeasuredWorld(
        Mixture(np.ones(points), curve, 0.3, np.sqrt(2 / 100) * np.eye(2), np.zeros(2), 1.0),
        Mixture(np.ones(60), height[:, None], 0.3, [[np.sqrt(2)]], [0.0], 1.0),
        **options,
    )


def lattice(dim: int, measured: int, *, std: float = 0.25, sigma: float = 0.3, seed: int = 0, **options: Any):
    """25 modes (i, j, i, j, ...), i, j in -2..2, of random weights, seen through `measured` random mixtures of the even coordinates.

    The shape of the mixtures of MCGDiff (arXiv 2308.07983), in units where the spread of the modes is of order one. What is seen fixes i and
    leaves five modes along j.
    """
    rng = np.random.default_rng(seed)
    means = np.array([[(i, j)[c % 2] for c in range(dim)] for i in range(-2, 3) for j in range(-2, 3)], float)
    matrix = rng.normal(size=(measured, dim)) / np.sqrt(dim)
    matrix[:, 1::2] = 0
    weights = rng.dirichlet(np.full(25, 5.0))
    y = matrix @ means[rng.choice(25, p=weights)] + sigma * rng.normal(size=measured)
    return MeasuredWorld(Mixture(weights, means, std, matrix, y, sigma), **options)
