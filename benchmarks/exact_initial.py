"""Gaussian chains that remember where they began: tuning with a frozen law of x_T, and with one that is tuned too (ELEGANT).

Flow with eta = 0.5: little noise on the way, so x_T tells much of x0 and a frozen start leaves a bias. Linear-Gaussian worlds
have it in closed form (`tests.controlled`), a mixture by quadrature. `rows` trains and compares; tests/test_elegant.py
uses the same worlds and the same training.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rgdiff import denoisers, nets, processes, samplers, schedules, tuners
from tests import controlled
from tests.worlds import GaussianWorld, MixtureWorld, Quadratic, ddim

ALPHA = 0.5
LAST = 0.03  # the chains end there, at an SNR of 1,000: changing the projection is dear
BINS = np.linspace(-3.5, 3.5, 57)


def remember(world: Any) -> Any:
    """End a world's chain at LAST, or half a step from the end where steps are smaller."""
    world.times = jnp.append(world.times, min(LAST, 0.5 * float(world.times[-1])))
    world.grid = np.asarray(world.times, float)
    return world


def gaussian(steps: int = 8, quadratic: bool = False, dim: int = 1) -> GaussianWorld:
    m, c = [0.5, -0.3][:dim], np.array([[0.6, 0.2], [0.2, 0.4]])[:dim, :dim]
    q = np.array([[1.0, 0.3], [0.3, 0.5]])[:dim, :dim] if quadratic else None
    b = [0.8, 0.4][:dim]
    return remember(GaussianWorld(m, c, schedule="flow", steps=steps, eta=0.5, b=b, q=q, temperature=ALPHA))


class Networks(NamedTuple):
    """Functions (params, x, t, cond) and their first parameters: of the main denoiser's change, the initial chain's, and the value."""

    main: tuple[Callable[..., Any], Any]
    initial: Callable[[Any], tuple[Callable[..., Any], Any]]
    value: tuple[Callable[..., Any], Any]


def per_call(times: Any, dim: int) -> tuple[Callable[..., Any], Any]:
    """gain_i x + shift_i at call i: with it a Gaussian chain can represent every shift, so also the best ones."""

    def network(params: Any, x: jax.Array, t: jax.Array, cond: Any = None) -> jax.Array:
        i = jnp.argmin(jnp.abs(times - t))
        return x @ params["gain"][i].T + params["shift"][i]

    return network, {"gain": jnp.zeros((len(times), dim, dim)), "shift": jnp.zeros((len(times), dim))}


def quadratic_value(params: Any, x: jax.Array, t: jax.Array, cond: Any = None) -> jax.Array:
    return params["c"] + x @ params["h"] - 0.5 * jnp.sum((x @ params["p"]) * x, -1)


def affine(world: Any) -> Networks:
    dim = world.dim
    value = {"c": jnp.zeros(()), "h": jnp.zeros(dim), "p": jnp.zeros((dim, dim))}
    return Networks(per_call(world.times, dim), lambda times: per_call(times, dim), (quadratic_value, value))


def perceptrons(world: Any, width: int = 64) -> Networks:
    def linen(module: Any, key: int) -> tuple[Callable[..., Any], Any]:
        params = module.init(jax.random.key(key), jnp.zeros((1, 1)), jnp.ones(1))["params"]
        return lambda p, x, t, cond=None: denoisers.from_linen(module, p)(x, jnp.broadcast_to(t, x.shape[:1])), params

    net = nets.MLP((width, width))
    return Networks(linen(net, 1), lambda times: linen(net, 2), linen(nets.ValueMLP((width, width)), 3))


def _model(network: Callable[..., Any]) -> Any:
    return lambda params: denoisers.from_function(network, params)


def _fit(tuner: Any, params: Any, seed: int, steps: int, **options: Any) -> Any:
    return tuners.fit(tuner, jax.random.key(seed), tuner.init(params), steps, chunk=steps, **options).best


def _adam(rate: float, steps: int) -> Any:
    return optax.adam(optax.cosine_decay_schedule(rate, steps), b2=0.99)


def tune_main(
    world: Any,
    networks: Networks,
    draw: Any = None,
    *,
    seed: int = 0,
    steps: int = 400,
    rate: float = 0.02,
    batch: int = 256,
) -> tuple[Any, Any]:
    """The main chain, begun at the prior's x_T or at `draw`: its tuner and parameters."""
    change, params = networks.main

    def network(params: Any, x: jax.Array, t: jax.Array, cond: Any = None) -> jax.Array:
        return world.denoiser(x, t) + change(params, x, t)

    tuner = tuners.elegant(
        _model(network), world.process, world.reward, world.times, _adam(rate, steps), reference=world.denoiser,
        kl_weight=ALPHA, initial=draw, batch=batch, remat="none",
    )  # fmt: skip
    return tuner, _fit(tuner, params, seed, steps)


def tune_initial(
    world: Any,
    networks: Networks,
    *,
    seed: int = 0,
    moves: int = 12,
    steps: int = 400,
    rate: float = 0.03,
    samples: int = 20_000,
) -> tuple[Any, Any, np.ndarray]:
    """The chain that draws x_T: value by regression on the prior's rollouts, then its own tuner. draw, value, alphas of its grid."""
    network, params = networks.value
    key = jax.random.key(100 + seed)
    data = tuners.rollouts(key, world.process, world.denoiser, world.times, world.reward, samples)
    data = {"path": data["path"][:, :1], "reward": data["reward"]}
    tuner = tuners.initial_value(_model(network), world.process, world.times, _adam(rate, steps), kl_weight=ALPHA)
    value = denoisers.from_function(network, _fit(tuner, params, seed, steps, data=data, batch=1024))
    process = processes.initial_law(world.process, schedules.linear_vp())
    times = process.times(moves)
    network, params = networks.initial(times)
    tuner = tuners.initial_tuner(
        _model(network), process, value, times, _adam(rate, steps), kl_weight=ALPHA, time=world.times[0], batch=256,
        remat="none",
    )  # fmt: skip
    params = _fit(tuner, params, seed, steps)
    draw = samplers.drawing(samplers.ancestral(process, tuner.model(params)), times)
    return draw, value, np.array([process.schedule.alpha(t) for t in times], float)


def drawn(process: Any, denoiser: Any, times: Any, count: int = 200_000, seed: int = 0) -> np.ndarray:
    key = jax.random.key(700 + seed)
    return np.asarray(samplers.sample(samplers.ancestral(process, denoiser), key, count, times).x0, float)


# ---------------------------------------------------------------- the mixture, by quadrature


def mixture(steps: int = 16) -> Any:
    world: Any = remember(MixtureWorld(schedule="flow", steps=steps, eta=0.5))
    world.reward = Quadratic(jnp.float32([-0.6]), jnp.float32([[0.3]]))
    return world


def mixture_laws(world: Any, points: int = 1501) -> dict[str, np.ndarray]:
    """Probabilities of the BINS of x0: of the prior's chain, tilted, and with the path tilted and x_T the prior's."""
    x = np.linspace(-6, 6, points)
    start = np.exp(-0.5 * x**2) / np.exp(-0.5 * x**2).sum()
    kernels = []
    for t, s in itertools.pairwise(world.grid):
        a, c, std = ddim(world.reference, t, s, world.eta)
        x0 = world.posterior_mean(x, t)
        mean = a * x0 + c * (x - world.reference.alpha(t) * x0) / world.reference.sigma(t)
        kernel = np.exp(-0.5 * ((x[None] - mean[:, None]) / std) ** 2)
        kernels.append(kernel / kernel.sum(1, keepdims=True))
    x0 = world.posterior_mean(x, world.grid[-1])
    tilt = np.exp(np.asarray(world.reward(jnp.asarray(x0[:, None], jnp.float32)), float) / ALPHA)
    value = tilt
    for kernel in reversed(kernels):
        value = kernel @ value
    prior, frozen = start, start / value
    for kernel in kernels:
        prior, frozen = prior @ kernel, frozen @ kernel
    out = {"prior": prior, "tilted": prior * tilt / (prior @ tilt), "frozen": frozen * tilt}
    return {name: np.histogram(x0, BINS, weights=p)[0] for name, p in out.items()}


def moments(p: np.ndarray) -> tuple[float, float]:
    middle = 0.5 * (BINS[1:] + BINS[:-1])
    mean = float(p @ middle)
    return mean, float(p @ (middle - mean) ** 2)


# ---------------------------------------------------------------- the tables


def spread(values: list[float], digits: int = 3) -> str:
    """Mean and standard error over seeds."""
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{np.mean(values):.{digits}f} ({error:.{digits}f})"


def gaussian_rows(seeds: int, write: Callable[[list[str]], None]) -> None:
    """Means, covariances and KL to the tilted law, beside the exact ones, for frozen and tuned starts."""
    out = [
        "| world | x_T | mean | variance | exact mean | exact variance | KL to p*, nats | exact | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    vector = lambda v, d=3: " ".join(f"{float(a):.{d}f}" for a in np.ravel(v))  # noqa: E731
    cases = [
        ("1-D, linear", gaussian(8)),
        ("1-D, quadratic, T = 8", gaussian(8, True)),
        ("1-D, quadratic, T = 32", gaussian(32, True)),
        ("2-D, linear", gaussian(8, dim=2)),
        ("2-D, quadratic, T = 32", gaussian(32, True, dim=2)),
    ]
    for name, world in cases:
        target, biased = controlled.Law(*world.tilted()), controlled.frozen(world, ALPHA)
        row = lambda what, law, world=world, name=name: (  # noqa: E731
            f"| {name} | {what} | | | {vector(law.mean)} | {vector(np.diag(law.cov))} | | "
            f"{controlled.divergence(law, controlled.Law(*world.tilted())):.4f} | |"
        )
        out += [row("p*: p exp(r/alpha)/Z", target), row("frozen, path tilted (predicted bias)", biased)]
        for start in ("frozen", "tuned"):
            reached, begun = [], time.perf_counter()
            for seed in range(seeds):
                draw, exact = None, controlled.best(world, ALPHA)
                if start == "tuned":
                    draw, _, alphas = tune_initial(world, affine(world), seed=seed, moves=40, samples=100_000)
                    exact = controlled.best(world, ALPHA, controlled.initial(world, ALPHA, alphas))
                tuner, params = tune_main(world, affine(world), draw, seed=seed, steps=800)
                x = drawn(tuner.process, tuner.model(params), world.times, seed=seed)
                reached.append(controlled.Law(x.mean(0), np.cov(x.T).reshape(world.dim, world.dim)))
            means, variances = (
                np.array([f(law) for law in reached]) for f in (lambda w: w.mean, lambda w: np.diag(w.cov))
            )
            kls = [controlled.divergence(law, target) for law in reached]
            cells = [" ".join(spread(list(column)) for column in part.T) for part in (means, variances)]
            seconds = (time.perf_counter() - begun) / seeds
            out.append(
                f"| {name} | {start}, trained | {cells[0]} | {cells[1]} | {vector(exact.mean)} | {vector(np.diag(exact.cov))} | "
                f"{spread(kls, 4)} | {controlled.divergence(exact, target):.4f} | {seconds:.0f} |"
            )
            print(out[-1], flush=True)
            write(out)


def mixture_rows(seeds: int, write: Callable[[list[str]], None]) -> None:
    """The same for a mixture of two, by histograms of 200,000 samples; the exact laws have no sampling error."""
    world = mixture()
    laws = mixture_laws(world)
    target = laws["tilted"]
    some = target > 1e-9

    def apart(p: np.ndarray) -> tuple[float, float]:
        q = np.where(some, p, 0.0)
        here = q > 0
        return 0.5 * float(np.abs(p - target).sum()), float(q[here] @ np.log(q[here] / target[here]))

    out = ["| law of x0 | mean | variance | TV to p* | KL to p*, nats | seconds |", "|---|---|---|---|---|---|"]
    for name, p in (
        ("the prior's chain", "prior"),
        ("p*: p exp(r/alpha)/Z", "tilted"),
        ("frozen, path tilted (predicted)", "frozen"),
    ):
        (mean, variance), (tv, kl) = moments(laws[p]), apart(laws[p])
        out.append(f"| {name} | {mean:.3f} | {variance:.3f} | {tv:.4f} | {kl:.4f} | |")
    noise = np.random.default_rng(0).multinomial(200_000, target / target.sum()) / 200_000
    out.append(
        f"| 200,000 draws of p* itself | {moments(noise)[0]:.3f} | {moments(noise)[1]:.3f} | {apart(noise)[0]:.4f} | {apart(noise)[1]:.4f} | |"
    )
    for start in ("frozen", "tuned"):
        figures, begun = [], time.perf_counter()
        for seed in range(seeds):
            networks, draw = perceptrons(world), None
            if start == "tuned":
                draw = tune_initial(world, networks, seed=seed, moves=20, steps=800, rate=3e-3, samples=50_000)[0]
            tuner, params = tune_main(world, networks, draw, seed=seed, steps=1000, rate=3e-3)
            x = drawn(tuner.process, tuner.model(params), world.times, seed=seed)[:, 0]
            p = np.histogram(x, BINS)[0] / len(x)
            figures.append((*moments(p), *apart(p)))
        columns = " | ".join(spread(list(column), 4) for column in np.array(figures).T)
        out.append(f"| {start}, trained | {columns} | {(time.perf_counter() - begun) / seeds:.0f} |")
        print(out[-1], flush=True)
        write(out)
