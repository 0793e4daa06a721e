"""Analytic worlds: a process, an exact denoiser, a reward, and what the sampler's own T-step chain does with them.

Everything exact is NumPy float64 and written from the equations, not from the library: schedules are restated here,
chains are pushed through by linear-Gaussian algebra, by quadrature or by enumeration. A chain of finitely many moves
does not have the data law; every expected number below is of the chain, and the tests check the rate at which it tends
to the data's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import denoisers, processes, schedules
from rgdiff.typing import pytree, static

Array = np.ndarray


# ---------------------------------------------------------------- schedules, restated


@dataclass(frozen=True)
class Reference:
    """alpha and sigma of a schedule in float64, and the library's schedule."""

    build: Callable[[], Any]
    alpha: Callable[[float], float]
    sigma: Callable[[float], float]
    prior_std: float


def _vp_alpha(t: float) -> float:
    return float(np.exp(-0.5 * (0.1 * t + 0.5 * 19.9 * t**2)))


def _ve_sigma(low: float, high: float) -> Callable[[float], float]:
    return lambda t: float((low ** (1 / 7) + t * (high ** (1 / 7) - low ** (1 / 7))) ** 7)


SCHEDULES = {
    "linear_vp": Reference(schedules.linear_vp, _vp_alpha, lambda t: float(np.sqrt(1 - _vp_alpha(t) ** 2)), 1.0),
    "cosine_vp": Reference(
        schedules.cosine_vp, lambda t: float(np.cos(np.pi / 2 * t)), lambda t: float(np.sin(np.pi / 2 * t)), 1.0
    ),
    "karras_ve": Reference(lambda: schedules.karras_ve(0.01, 20.0), lambda t: 1.0, _ve_sigma(0.01, 20.0), 20.0),
    "flow": Reference(schedules.flow, lambda t: 1.0 - t, lambda t: float(t), 1.0),
}

MASK_SCHEDULES = {
    "log_linear": (schedules.log_linear_mask, lambda t: float(t)),
    "cosine": (schedules.cosine_mask, lambda t: float(1 - np.cos(np.pi / 2 * t))),
}


def ddim(reference: Reference, t: float, s: float, eta: float) -> tuple[float, float, float]:
    """x_s = a x0 + c eps + std z: DDIM's (arXiv 2010.02502, eq. 12 and 16) coefficients a, c, std."""
    at, st, a, ss = reference.alpha(t), reference.sigma(t), reference.alpha(s), reference.sigma(s)
    posterior = ss**2 * (1 - (at * ss / (a * st)) ** 2)
    std = min(eta * np.sqrt(posterior), ss)
    return a, float(np.sqrt(ss**2 - std**2)), float(std)


# ---------------------------------------------------------------- Gaussian data


@pytree
class AffineDenoiser:
    """E[x0 | x_t] of N(m, C) data, scaled and shifted by theta: scale * (m + alpha C (alpha^2 C + sigma^2)^-1 (x - alpha m)) + shift."""

    schedule: Any
    m: jax.Array
    spectrum: tuple[jax.Array, jax.Array]  # eigenvalues and eigenvectors of C
    scale: jax.Array
    shift: jax.Array

    def __call__(self, x: jax.Array, t: jax.Array, cond: Any = None) -> jax.Array:
        t = jnp.broadcast_to(t, x.shape[:1])
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        values, vectors = self.spectrum
        z = (x - alpha[:, None] * self.m) @ vectors
        gain = alpha[:, None] * values / (alpha[:, None] ** 2 * values + sigma[:, None] ** 2)
        return self.scale * (self.m + (gain * z) @ vectors.T) + self.shift


@pytree
class Quadratic:
    """r(x) = <b, x> - x' Q x / 2."""

    b: jax.Array
    q: jax.Array

    def __call__(self, x: jax.Array, cond: Any = None) -> jax.Array:
        return x @ self.b - 0.5 * jnp.sum((x @ self.q) * x, -1)


@pytree
class TabulatedQuadratic:
    """tau (c_i + <h_i, x> - x' P_i x / 2) at the grid time nearest to t: a soft value."""

    times: jax.Array
    c: jax.Array
    h: jax.Array
    p: jax.Array
    temperature: jax.Array

    def __call__(self, x: jax.Array, t: jax.Array, cond: Any = None) -> jax.Array:
        i = jnp.argmin(jnp.abs(self.times - t))
        out = self.c[i] + x @ self.h[i] - 0.5 * jnp.sum((x @ self.p[i]) * x, -1)
        return self.temperature * out


class GaussianWorld:
    """Data N(m, C), a chain of `steps` network calls, the reward <b, x> - x'Qx/2, and theta = (shift, scale) of the denoiser."""

    def __init__(
        self, m, c, *, schedule="linear_vp", steps=6, eta=1.0, b=None, q=None, temperature=1.0, theta=(0.0, 1.0)
    ):  # noqa: E501
        self.m, self.c = np.atleast_1d(np.asarray(m, float)), np.atleast_2d(np.asarray(c, float))
        self.dim = self.m.shape[0]
        self.reference, self.eta, self.temperature, self.theta = SCHEDULES[schedule], eta, temperature, theta
        self.b = np.ones(self.dim) if b is None else np.atleast_1d(np.asarray(b, float))
        self.q = np.zeros((self.dim, self.dim)) if q is None else np.atleast_2d(np.asarray(q, float))
        self.schedule = self.reference.build()
        self.process = processes.gaussian(self.schedule, (self.dim,), eta=eta)
        self.times = self.process.times(steps)
        self.grid = np.asarray(self.times, float)
        self.denoiser = self.model(jnp.asarray(theta, jnp.float32))
        self.reward = Quadratic(jnp.asarray(self.b, jnp.float32), jnp.asarray(self.q, jnp.float32))

    def model(self, theta: jax.Array) -> AffineDenoiser:
        f32 = lambda a: jnp.asarray(a, jnp.float32)  # noqa: E731
        values, vectors = np.linalg.eigh(self.c)
        spectrum = f32(values), f32(vectors)
        return AffineDenoiser(self.schedule, f32(self.m), spectrum, f32(theta[1]), f32(theta[0]))

    def gain(self, t: float, theta) -> tuple[Array, Array]:
        """The denoiser at t as x -> G x + g."""
        alpha, sigma = self.reference.alpha(t), self.reference.sigma(t)
        g = alpha * self.c @ np.linalg.inv(alpha**2 * self.c + sigma**2 * np.eye(self.dim))
        return theta[1] * g, theta[1] * (self.m - alpha * g @ self.m) + theta[0]

    def move(self, t: float, s: float, theta) -> tuple[Array, Array, float]:
        """x_s = A x_t + d + std z."""
        a, c, std = ddim(self.reference, t, s, self.eta)
        alpha, sigma = self.reference.alpha(t), self.reference.sigma(t)
        g, offset = self.gain(t, theta)
        matrix = a * g + c / sigma * (np.eye(self.dim) - alpha * g)
        return matrix, a * offset - c * alpha / sigma * offset, std

    def prior(self) -> tuple[Array, Array]:
        return np.zeros(self.dim), self.reference.prior_std**2 * np.eye(self.dim)

    def push(self, law, first: int, last: int, theta) -> tuple[Array, Array]:
        """Mean and covariance after moves first..last-1."""
        mean, cov = law
        for i in range(first, last):
            matrix, offset, std = self.move(self.grid[i], self.grid[i + 1], theta)
            mean, cov = matrix @ mean + offset, matrix @ cov @ matrix.T + std**2 * np.eye(self.dim)
        return mean, cov

    def project(self, law, theta) -> tuple[Array, Array]:
        g, offset = self.gain(self.grid[-1], theta)
        return g @ law[0] + offset, g @ law[1] @ g.T

    def law(self, theta=None) -> tuple[Array, Array]:
        """Mean and covariance of the chain's x0."""
        theta = self.theta if theta is None else theta
        return self.project(self.push(self.prior(), 0, len(self.grid) - 1, theta), theta)

    def expected_reward(self, law) -> float:
        mean, cov = law
        return float(self.b @ mean - 0.5 * (mean @ self.q @ mean + np.trace(self.q @ cov)))

    def truncated(self, theta_head, theta, live: int) -> float:
        """E r(x0) when the calls before the last `live` use theta_head: its derivative in theta is DRaFT-K's gradient."""
        moves = len(self.grid) - 1
        cut = moves + 1 - live
        law = self.push(self.push(self.prior(), 0, cut, theta_head), cut, moves, theta)
        return self.expected_reward(self.project(law, theta))

    def renoised(self, theta_chain, theta) -> float:
        """E r of the one-call denoising of the chain's x0, noised to the last time."""
        mean, cov = self.law(theta_chain)
        alpha, sigma = self.reference.alpha(self.grid[-1]), self.reference.sigma(self.grid[-1])
        return self.expected_reward(self.project((alpha * mean, alpha**2 * cov + sigma**2 * np.eye(self.dim)), theta))

    def path_kl(self, theta, other, theta_states=None, frozen_before: int = 0) -> float:
        """E sum of KL(N(A x + d, std) || N(A' x + d', std)) along the chain of theta, against a reference denoiser's affine maps.

        Before move `frozen_before` the states come from theta_states (constants), as a truncated gradient sees them.
        """
        mean, cov = self.prior()
        total = 0.0
        for i in range(len(self.grid) - 1):
            t, s = self.grid[i], self.grid[i + 1]
            matrix, offset, std = self.move(t, s, theta)
            other_matrix, other_offset, _ = other.move(t, s, other.theta)
            dm = matrix - other_matrix
            shift = dm @ mean + offset - other_offset
            total += (shift @ shift + np.trace(dm @ cov @ dm.T)) / (2 * std**2)
            used = theta_states if i < frozen_before and theta_states is not None else theta
            mean, cov = self.push((mean, cov), i, i + 1, used)
        # the projection: x0 and the reference's, noised back to the last time
        alpha, sigma = self.reference.alpha(self.grid[-1]), self.reference.sigma(self.grid[-1])
        (g, offset), (other_g, other_offset) = self.gain(self.grid[-1], theta), other.gain(self.grid[-1], other.theta)
        dg, shift = g - other_g, (g - other_g) @ mean + offset - other_offset
        total += 0.5 * (alpha / sigma) ** 2 * (shift @ shift + np.trace(dg @ cov @ dg.T))
        return float(total)

    def log_value(self) -> list[tuple[float, Array, Array]]:
        """log E[exp(r(x0)/tau) | x_t] = c + <h, x> - x'Px/2 at every grid time."""
        g, offset = self.gain(self.grid[-1], self.theta)
        b, q = self.b / self.temperature, self.q / self.temperature
        out = [self._through(g, offset, 0.0, (0.0, b, q))]
        for i in reversed(range(len(self.grid) - 1)):
            out.append(self._through(*self.move(self.grid[i], self.grid[i + 1], self.theta), out[-1]))
        return out[::-1]

    def _through(self, matrix, offset, std, form) -> tuple[float, Array, Array]:
        """log E exp(form(matrix x + offset + std z)) as a form of x."""
        c, h, p = form
        inverse = np.linalg.inv(np.eye(self.dim) + std**2 * p)
        c = c + 0.5 * np.linalg.slogdet(inverse)[1] + 0.5 * std**2 * h @ inverse @ h
        h, p = inverse.T @ h, p @ inverse
        c = c + h @ offset - 0.5 * offset @ p @ offset
        return c, matrix.T @ (h - p @ offset), matrix.T @ p @ matrix

    def log_z(self) -> float:
        mean, cov = self.prior()
        return self._through(np.zeros((self.dim, self.dim)), mean, np.sqrt(cov[0, 0]), self.log_value()[0])[0]

    def tilted(self) -> tuple[Array, Array]:
        """Mean and covariance of p(x0) exp(r(x0)/tau) / Z, p the chain's law."""
        mean, cov = self.law()
        precision = np.linalg.inv(cov) + self.q / self.temperature
        covariance = np.linalg.inv(precision)
        return covariance @ (np.linalg.solve(cov, mean) + self.b / self.temperature), covariance

    @property
    def value(self) -> TabulatedQuadratic:
        c, h, p = (jnp.asarray(np.stack(part), jnp.float32) for part in zip(*self.log_value(), strict=True))
        return TabulatedQuadratic(self.times, c, h, p, jnp.float32(self.temperature))

    def statistic(self, x0: jax.Array) -> jax.Array:
        return x0[:, 0]

    def tilted_statistic(self) -> float:
        return float(self.tilted()[0][0])


# ---------------------------------------------------------------- Gaussian mixtures


@pytree
class MixtureDenoiser:
    """E[x0 | x_t] of a mixture of N(m_k, std_k^2 I)."""

    schedule: Any
    log_w: jax.Array
    m: jax.Array
    std: jax.Array

    def log_density(self, x: jax.Array, t: jax.Array) -> jax.Array:
        """log p_t(x), [B]."""
        return jax.nn.logsumexp(self._parts(x, t)[0], -1)

    def _parts(self, x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        alpha, sigma = (
            jnp.broadcast_to(f(t), x.shape[:1])[:, None] for f in (self.schedule.alpha, self.schedule.sigma)
        )
        var = alpha**2 * self.std**2 + sigma**2  # [B, K]
        residual = x[:, None] - alpha[..., None] * self.m  # [B, K, D]
        dim = x.shape[-1]
        joint = self.log_w - 0.5 * (residual**2).sum(-1) / var - 0.5 * dim * jnp.log(2 * jnp.pi * var)
        mean = self.m + (alpha * self.std**2 / var)[..., None] * residual
        return joint, mean

    def __call__(self, x: jax.Array, t: jax.Array, cond: Any = None) -> jax.Array:
        joint, mean = self._parts(x, t)
        return (jax.nn.softmax(joint)[..., None] * mean).sum(1)


class MixtureWorld:
    """A 1-D mixture embedded along a direction of R^dim (the other coordinates N(0, spread^2)); its chain by quadrature.

    Noise is isotropic, so the chain factorises along and across the direction.
    """

    def __init__(self, *, dim=1, schedule="linear_vp", steps=8, eta=1.0, angle=0.6):
        self.weights, self.centres, self.spread = np.array([0.3, 0.7]), np.array([-1.5, 1.0]), 0.4
        self.reference, self.eta, self.dim = SCHEDULES[schedule], eta, dim
        self.schedule = self.reference.build()
        self.process = processes.gaussian(self.schedule, (dim,), eta=eta)
        self.times = self.process.times(steps)
        self.grid = np.asarray(self.times, float)
        self.direction = np.ones(1) if dim == 1 else np.array([np.cos(angle), np.sin(angle)])
        self.denoiser = MixtureDenoiser(
            self.schedule,
            jnp.log(jnp.asarray(self.weights, jnp.float32)),
            jnp.asarray(self.centres[:, None] * self.direction, jnp.float32),
            jnp.asarray([self.spread] * 2, jnp.float32),
        )

    def posterior_mean(self, x: Array, t: float) -> Array:
        alpha, sigma = self.reference.alpha(t), self.reference.sigma(t)
        var = alpha**2 * self.spread**2 + sigma**2
        residual = x[:, None] - alpha * self.centres
        log_joint = np.log(self.weights) - 0.5 * residual**2 / var
        p = np.exp(log_joint - log_joint.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        return (p * (self.centres + alpha * self.spread**2 / var * residual)).sum(1)

    def points(self, points: int = 1001) -> tuple[Array, Array]:
        """x0 at quadrature points along the direction, and their probabilities."""
        width = 6 * max(self.reference.prior_std, 1.0)
        x = np.linspace(-width, width, points)
        weight = np.exp(-0.5 * (x / self.reference.prior_std) ** 2)
        weight /= weight.sum()
        state = x
        for t, s in itertools.pairwise(self.grid):
            alpha, sigma = self.reference.alpha(t), self.reference.sigma(t)
            a, c, std = ddim(self.reference, t, s, self.eta)
            x0 = self.posterior_mean(state, t)
            mean = a * x0 + c * (state - alpha * x0) / sigma
            if std == 0:
                state = mean
                continue
            kernel = np.exp(-0.5 * ((x[None] - mean[:, None]) / std) ** 2)
            weight = weight @ (kernel / kernel.sum(1, keepdims=True))
        return self.posterior_mean(state, self.grid[-1]), weight

    def expect(self, f: Callable[[Array], Array]) -> float:
        x0, weight = self.points()
        return float(weight @ f(x0))

    def across(self) -> float:
        """Standard deviation of the chain's x0 across the direction: data N(0, spread^2)."""
        world = GaussianWorld([0.0], [[self.spread**2]], steps=2, eta=self.eta)
        world.reference, world.grid = self.reference, self.grid
        return float(np.sqrt(world.law()[1][0, 0]))


# ---------------------------------------------------------------- categorical data


@pytree
class TableDenoiser:
    """Logits by lookup of the state's code; table [(K+1)^L, L, K]."""

    table: jax.Array
    classes: int = static()

    def __call__(self, x: jax.Array, t: jax.Array, cond: Any = None) -> jax.Array:
        return self.table[codes(x)]


@pytree
class TableReward:
    """Reward by lookup of the tokens; [K^L]."""

    table: jax.Array

    def __call__(self, x: jax.Array, cond: Any = None) -> jax.Array:
        return self.table[codes(x)]


@pytree
class TableValue:
    """A value by lookup of time and state; [T + 1, (K+1)^L]."""

    times: jax.Array
    table: jax.Array

    def __call__(self, x: jax.Array, t: jax.Array, cond: Any = None) -> jax.Array:
        return self.table[jnp.argmin(jnp.abs(self.times - t))][codes(x)]


def codes(x: jax.Array) -> jax.Array:
    """Index of one-hot states [B, L, K'] in C order over K'^L."""
    length, classes = x.shape[1:]
    return jnp.argmax(x, -1) @ jnp.asarray([classes**i for i in reversed(range(length))])


class CategoricalWorld:
    """Tokens with the joint law `joint` [K] * L; denoiser by enumeration (exact, or any `table`); chain over (K+1)^L states."""

    def __init__(
        self,
        joint,
        *,
        schedule="log_linear",
        steps=5,
        reward=None,
        temperature=1.0,
        table=None,
        relaxation="straight_through",
    ):  # noqa: E501
        self.joint = np.asarray(joint, float) / np.sum(joint)
        self.length, self.classes = self.joint.ndim, self.joint.shape[0]
        self.states = np.array(list(itertools.product(range(self.classes + 1), repeat=self.length)))
        self.data = np.array(list(itertools.product(range(self.classes), repeat=self.length)))
        build, self.rate = MASK_SCHEDULES[schedule]
        self.process = processes.masked(build(), self.length, self.classes, relaxation=relaxation)
        self.times = self.process.times(steps)
        self.grid = np.asarray(self.times, float)
        self.table = self.conditionals() if table is None else np.asarray(table, float)
        self.denoiser = TableDenoiser(jnp.asarray(np.log(self.table), jnp.float32), self.classes)
        rng = np.random.default_rng(7)
        self.rewards = rng.normal(size=self.classes**self.length) if reward is None else np.asarray(reward, float)
        self.reward, self.temperature = TableReward(jnp.asarray(self.rewards, jnp.float32)), temperature

    def conditionals(self) -> Array:
        """p(token i | unmasked tokens), [(K+1)^L, L, K]; positive where the position is already known, and unused there."""
        flat = self.joint.reshape(-1)
        out = np.full((len(self.states), self.length, self.classes), 1 / self.classes)
        for n, state in enumerate(self.states):
            known = state < self.classes
            fits = (self.data[:, known] == state[known]).all(1) * flat
            for i in np.flatnonzero(~known):
                out[n, i] = np.bincount(self.data[:, i], fits, self.classes) / fits.sum()
        return out

    def transition(self, t: float, s: float, table: Array | None = None) -> Array:
        """p(x_s | x_t) over all states."""
        table = self.table if table is None else table
        stay = self.rate(s) / self.rate(t)
        out = np.ones((len(self.states), len(self.states)))
        for i in range(self.length):
            token = np.concatenate([(1 - stay) * table[:, i], np.full((len(self.states), 1), stay)], 1)
            copies = np.eye(self.classes + 1)[self.states[:, i]]
            position = np.where((self.states[:, i] == self.classes)[:, None], token, copies)
            out *= position[:, self.states[:, i]]
        return out

    def laws(self) -> list[Array]:
        """The chain's law over all states at every grid time."""
        law = (self.states == self.classes).all(1).astype(float)
        out = [law]
        for t, s in itertools.pairwise(self.grid):
            out.append(out[-1] @ self.transition(t, s))
        return out

    @property
    def unmasked(self) -> Array:
        """Which states have no mask; in the order of `data`."""
        return (self.states < self.classes).all(1)

    def law(self) -> Array:
        """The chain's law of x0, [K^L]."""
        return self.laws()[-1][self.unmasked]

    def log_value(self) -> list[Array]:
        """log E[exp(r(x0)/tau) | x_t] at every grid time, over all states (0 at the end where a mask is left)."""
        end = np.ones(len(self.states))
        end[self.unmasked] = np.exp(self.rewards / self.temperature)
        out = [end]
        for t, s in reversed(list(itertools.pairwise(self.grid))):
            out.append(self.transition(t, s) @ out[-1])
        return [np.log(v) for v in reversed(out)]

    def log_z(self) -> float:
        return float(self.log_value()[0][-1])

    def tilted(self) -> Array:
        p = self.law() * np.exp(self.rewards / self.temperature)
        return p / p.sum()

    @property
    def value(self) -> TableValue:
        return TableValue(self.times, jnp.asarray(self.temperature * np.stack(self.log_value()), jnp.float32))

    def statistic(self, x0: jax.Array) -> jax.Array:
        return self.reward(x0)

    def tilted_statistic(self) -> float:
        return float(self.tilted() @ self.rewards)

    def frequencies(self, x0: jax.Array) -> Array:
        return np.bincount(np.asarray(codes(x0)), minlength=self.classes**self.length) / x0.shape[0]

    def path_kl(self, other: Array) -> float:
        """E sum KL(p(x_s | x_t) || q(x_s | x_t)) with q's token table `other`, by enumeration."""
        total = 0.0
        for law, (t, s) in zip(self.laws(), itertools.pairwise(self.grid), strict=False):
            p, q = self.transition(t, s), self.transition(t, s, other)
            ratio = np.log(np.where(p > 0, p, 1)) - np.log(np.where(p > 0, q, 1))
            total += law @ (p * ratio).sum(1)
        return float(total)


def factorised(steps: int = 5, **options: Any) -> CategoricalWorld:
    """Three independent tokens of three classes."""
    p = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.25, 0.25, 0.5]])
    return CategoricalWorld(np.einsum("i,j,k->ijk", *p), steps=steps, **options)


def correlated(length: int = 3, classes: int = 3, steps: int = 4, **options: Any) -> CategoricalWorld:
    """Tokens with a random joint law, far from independent."""
    rng = np.random.default_rng(3)
    return CategoricalWorld(np.exp(1.5 * rng.normal(size=(classes,) * length)), steps=steps, **options)


# ---------------------------------------------------------------- mixed states


@pytree
class MixedDenoiser:
    """x0 = one number and one token: p(c), x | c ~ N(m_c, std^2). Exact predictions from (x_t, c_t)."""

    gaussian: MixtureDenoiser
    weights: jax.Array

    def __call__(self, x: Any, t: jax.Array, cond: Any = None) -> Any:
        joint, mean = self.gaussian._parts(x["x"], t)
        known, masked = x["c"][..., 0, :-1], x["c"][..., 0, -1:]
        posterior = jax.nn.softmax(joint)
        p = known + masked * posterior
        return {"x": (p[..., None] * mean).sum(1), "c": jnp.log(posterior)[:, None]}


class MixedWorld:
    """A class and a number that depends on it, noised together; the chain's law by quadrature x enumeration."""

    def __init__(self, *, schedule="linear_vp", steps=6, eta=1.0):
        self.weights, self.centres, self.spread = np.array([0.5, 0.3, 0.2]), np.array([-1.5, 0.0, 2.0]), 0.5
        self.reference, self.eta = SCHEDULES[schedule], eta
        self.schedule = self.reference.build()
        self.process = processes.product(
            x=processes.gaussian(self.schedule, (1,), eta=eta), c=processes.masked(schedules.log_linear_mask(), 1, 3)
        )
        self.times = self.process.times(steps)
        self.grid = np.asarray(self.times, float)
        f32 = lambda a: jnp.asarray(a, jnp.float32)  # noqa: E731
        self.denoiser = MixedDenoiser(
            MixtureDenoiser(
                self.schedule, jnp.log(f32(self.weights)), f32(self.centres)[:, None], f32([self.spread] * 3)
            ),
            f32(self.weights),
        )

    def _predict(self, x: Array, t: float) -> tuple[Array, Array]:
        """p(c | x_t) [N, 3], and E[x0 | x_t, c] for c = 0, 1, 2 and E[x0 | x_t] last, [N, 4]."""
        alpha, sigma = self.reference.alpha(t), self.reference.sigma(t)
        var = alpha**2 * self.spread**2 + sigma**2
        residual = x[:, None] - alpha * self.centres
        log_joint = np.log(self.weights) - 0.5 * residual**2 / var
        p = np.exp(log_joint - log_joint.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        mean = self.centres + alpha * self.spread**2 / var * residual
        return p, np.concatenate([mean, (p * mean).sum(1, keepdims=True)], 1)

    def moments(self, points: int = 801) -> Array:
        """P(c), E[x; c], E[x^2; c] of the chain's (x0, c0): [3, 3]."""
        x = np.linspace(-8, 8, points)
        weight = np.zeros((4, points))
        weight[3] = np.exp(-0.5 * x**2)
        weight[3] /= weight[3].sum()
        for t, s in itertools.pairwise(self.grid):
            p, predictions = self._predict(x, t)
            a, c, std = ddim(self.reference, t, s, self.eta)
            new = np.zeros_like(weight)
            for k in range(4):
                mean = a * predictions[:, k] + c * (
                    x - self.reference.alpha(t) * predictions[:, k]
                ) / self.reference.sigma(t)
                kernel = np.exp(-0.5 * ((x[None] - mean[:, None]) / std) ** 2)
                kernel /= kernel.sum(1, keepdims=True)
                if k < 3:
                    new[k] += weight[k] @ kernel
                else:
                    stay = s / t
                    new[3] += stay * weight[3] @ kernel
                    for j in range(3):
                        new[j] += (1 - stay) * (weight[3] * p[:, j]) @ kernel
            weight = new
        p, predictions = self._predict(x, self.grid[-1])
        out = np.zeros((3, 3))
        for j in range(3):
            for mass, value in ((weight[j], predictions[:, j]), (weight[3] * (p.argmax(1) == j), predictions[:, 3])):
                out[:, j] += [mass.sum(), mass @ value, mass @ value**2]
        return out


def assert_mean(samples: Any, expected: Any, *, errors: float = 4.0, slack: float = 0.0) -> None:
    """Means over the leading axis within `errors` standard errors of what they should be (plus float32 slack)."""
    samples, expected = np.asarray(samples, float), np.asarray(expected, float)
    error = samples.std(0) / np.sqrt(samples.shape[0])
    off = np.abs(samples.mean(0) - expected)
    assert np.all(off <= errors * error + slack), (
        f"means {samples.mean(0)} expected {expected}, standard errors {error}"
    )


def slope(x: Any, y: Any) -> float:
    """Least-squares slope of log y against log x."""
    return float(np.polyfit(np.log(np.asarray(x, float)), np.log(np.asarray(y, float)), 1)[0])


def eps_world(hidden: bool = False) -> tuple[Any, Any]:
    """N(0, I) in the plane under DDPM's betas: the process, and a network of eps that is 5 % off where alpha < sigma / 10.

    There its error in E[x0 | x_t] is multiplied by 10 to 156. `hidden` inside a function, no method knows that it predicts eps.
    """
    process = processes.gaussian(schedules.tabulated(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))), (2,))
    alpha, sigma = process.schedule.alpha, process.schedule.sigma
    network = lambda x, t, cond=None: sigma(t) * x * jnp.where(alpha(t) < 0.1 * sigma(t), 0.95, 1.0)  # noqa: E731
    denoiser = denoisers.predicts("eps", network, process.schedule)
    return process, (lambda x, t, cond=None: denoiser(x, t, cond)) if hidden else denoiser
