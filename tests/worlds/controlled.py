"""What reward tuning with a path KL can reach in linear-Gaussian chains: optimal control, and the tilt of every kernel.

A tuned denoiser moves the mean of every kernel and leaves its variance, so with a quadratic reward the best it can do in
T moves (`control`) falls short of p(x0) exp(r/alpha)/Z by O(1/T); with a linear one only the last projection departs from
it, by 1/SNR. NumPy float64, from the equations; states are those of `tests.worlds.worlds.GaussianWorld`.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from tests.worlds.worlds import GaussianWorld

Array = np.ndarray


class Form(NamedTuple):
    """c + <h, x> - x'Px/2, in the reward's unit."""

    c: float
    h: Array
    p: Array


class Law(NamedTuple):
    mean: Array
    cov: Array


class Move(NamedTuple):
    """y = matrix x + offset + u + std z, whose shift u is paid price/2 |u|^2; price / alpha |u|^2 / 2 is its KL in nats."""

    matrix: Array
    offset: Array
    std: float
    price: float


def moves(world: GaussianWorld, alpha: float) -> list[Move]:
    """The chain of the exact denoiser, the projection last: its shift is paid alpha SNR / 2 |u|^2."""
    out = []
    for t, s in itertools.pairwise(world.grid):
        matrix, offset, std = world.move(t, s, world.theta)
        out.append(Move(matrix, offset, std, alpha / std**2))
    gain, offset = world.gain(world.grid[-1], world.theta)
    snr = (world.reference.alpha(world.grid[-1]) / world.reference.sigma(world.grid[-1])) ** 2
    return [*out, Move(gain, offset, 0.0, alpha * snr)]


def initial_moves(alphas: Array, alpha: float, dim: int) -> list[Move]:
    """Moves that leave N(0, I) as it is: x_s = (alpha_t / alpha_s) x_t + sqrt(1 - (alpha_t / alpha_s)^2) z."""
    ratios = np.asarray(alphas[:-1]) / np.asarray(alphas[1:])
    return [Move(r * np.eye(dim), np.zeros(dim), np.sqrt(1 - r**2), alpha / (1 - r**2)) for r in ratios]


def control(chain: list[Move], end: Form) -> tuple[Form, list[tuple[Array, Array, float]]]:
    """Maximise E[end(x)] - sum of prices by shifts alone: the value at the beginning, and the controlled moves y = A x + d + std z."""
    form, out = end, []
    for matrix, offset, std, price in reversed(chain):
        eye = np.eye(len(form.h))
        solve = np.linalg.inv(form.p + price * eye)
        out.append((price * solve @ matrix, solve @ (price * offset + form.h), std))
        h, p = price * solve @ form.h, price * (eye - price * solve)
        c = form.c - 0.5 * std**2 * np.trace(form.p) + 0.5 * form.h @ solve @ form.h
        form = Form(c + h @ offset - 0.5 * offset @ p @ offset, matrix.T @ (h - p @ offset), matrix.T @ p @ matrix)
    return form, out[::-1]


def tilt(chain: list[Move], end: Form, alpha: float) -> tuple[Form, list[tuple[Array, Array, Array]]]:
    """Tilt every kernel to p(y | x) exp(v(y)/alpha): the soft value at the beginning, and the moves y = A x + d + N(0, cov)."""
    form, out = end, []
    for matrix, offset, std, _ in reversed(chain):
        inverse = np.linalg.inv(np.eye(len(form.h)) + std**2 * form.p / alpha)
        out.append((inverse @ matrix, inverse @ (offset + std**2 * form.h / alpha), std**2 * inverse))
        h, p = inverse.T @ form.h, form.p @ inverse
        c = form.c + 0.5 * alpha * np.linalg.slogdet(inverse)[1] + 0.5 * std**2 / alpha * form.h @ inverse @ form.h
        form = Form(c + h @ offset - 0.5 * offset @ p @ offset, matrix.T @ (h - p @ offset), matrix.T @ p @ matrix)
    return form, out[::-1]


def push(law: Law, chain: list) -> Law:
    """Push a law through moves (A, d, std or cov)."""
    for matrix, offset, noise in chain:
        cov = noise**2 * np.eye(len(offset)) if np.ndim(noise) == 0 else noise
        law = Law(matrix @ law.mean + offset, matrix @ law.cov @ matrix.T + cov)
    return law


def path_kl(law: Law, chain: list[Move], controlled: list, alpha: float) -> float:
    """Path KL, nats, of the controlled chain to the prior's, from the same law at the beginning."""
    total = 0.0
    for (matrix, offset, _, price), move in zip(chain, controlled, strict=True):
        change, shift = move[0] - matrix, (move[0] - matrix) @ law.mean + move[1] - offset
        total += 0.5 * price / alpha * (shift @ shift + np.trace(change @ law.cov @ change.T))
        law = push(law, [move])
    return float(total)


def tilted(law: Law, form: Form, alpha: float) -> Law:
    """p(x) exp(form(x)/alpha), renormalised."""
    precision = np.linalg.inv(law.cov)
    cov = np.linalg.inv(precision + form.p / alpha)
    return Law(cov @ (precision @ law.mean + form.h / alpha), cov)


def divergence(p: Law, q: Law) -> float:
    """KL(p || q), nats."""
    inverse, shift = np.linalg.inv(q.cov), p.mean - q.mean
    logs = np.linalg.slogdet(q.cov)[1] - np.linalg.slogdet(p.cov)[1]
    return float(0.5 * (np.trace(inverse @ p.cov) + shift @ inverse @ shift - len(shift) + logs))


def end(world: GaussianWorld) -> Form:
    return Form(0.0, world.b, world.q)


def prior(world: GaussianWorld) -> Law:
    return Law(*world.prior())


def frozen(world: GaussianWorld, alpha: float) -> Law:
    """The law of x0 when the path is tilted but x_T stays the prior's: what ELEGANT's initial law is there to mend."""
    return push(prior(world), tilt(moves(world, alpha), end(world), alpha)[1])


def best(world: GaussianWorld, alpha: float, start: Law | None = None) -> Law:
    """The law of x0 of the best shifts, from a given law of x_T (the prior's by default)."""
    return push(prior(world) if start is None else start, control(moves(world, alpha), end(world))[1])


def initial(world: GaussianWorld, alpha: float, alphas: Array) -> Law:
    """The law of x_T of the best shifts of the chain that draws it, rewarded by the exact soft value of x_T."""
    std = world.reference.prior_std
    value = tilt(moves(world, alpha), end(world), alpha)[0]
    chain = initial_moves(alphas, alpha, world.dim)
    start = Law(np.zeros(world.dim), np.eye(world.dim))
    mean, cov = push(start, control(chain, Form(value.c, std * value.h, std**2 * value.p))[1])
    return Law(std * mean, std**2 * cov)
