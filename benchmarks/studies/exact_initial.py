"""Gaussian chains that remember where they began: tuning with a frozen law of x_T, and with one that is tuned too (ELEGANT).

Flow with eta = 0.5: little noise on the way, so x_T tells much of x0 and a frozen start leaves a bias. Linear-Gaussian worlds
have it in closed form (`tests.worlds.controlled`), a mixture by quadrature (`rgdiff.exact.quadrature`). `rows` trains and compares; tests/test_elegant.py
uses the same worlds and the same training.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rgdiff import denoisers, nets, processes, samplers, schedules, tuners
from rgdiff.exact.quadrature import Line, laws, line
from tests.worlds import controlled
from tests.worlds.worlds import GaussianWorld, MixtureWorld, Quadratic

ALPHA = 0.5
LAST = 0.03  # the chains end there, at an SNR of 1,000: changing the projection is dear
BINS = np.linspace(-3.5, 3.5, 57)
MOVES = 20  # of the chain that draws x_T, in the mixture


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

    network.scalar_time = True  # one call, one time
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
    alpha: float = ALPHA,
) -> tuple[Any, Any]:
    """The main chain, begun at the prior's x_T or at `draw`: its tuner and parameters."""
    change, params = networks.main

    def network(params: Any, x: jax.Array, t: jax.Array, cond: Any = None) -> jax.Array:
        return world.denoiser(x, t) + change(params, x, t)

    network.scalar_time = True
    tuner = tuners.elegant(
        _model(network), world.process, world.reward, world.times, _adam(rate, steps), reference=world.denoiser,
        temperature=alpha, initial=draw, batch=batch, remat="none",
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
    tuner = tuners.initial_value(_model(network), world.process, world.times, _adam(rate, steps), temperature=ALPHA)
    value = denoisers.from_function(network, _fit(tuner, params, seed, steps, data=data, batch=1024))
    process = processes.initial_law(world.process, schedules.linear_vp())
    times = process.times(moves)
    network, params = networks.initial(times)
    tuner = tuners.initial_tuner(
        _model(network), process, value, times, _adam(rate, steps), temperature=ALPHA, time=world.times[0], batch=256,
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


def _highest(x: np.ndarray, worth: np.ndarray, means: np.ndarray, price: float) -> tuple[np.ndarray, np.ndarray]:
    """Maximise worth(y) - price/2 (y - mean)^2 over y for every mean: y, and the maximum (a parabola through the best three points)."""
    objective = worth[None] - 0.5 * price * (x[None] - means[:, None]) ** 2
    i, rows = np.clip(objective.argmax(1), 1, len(x) - 2), np.arange(len(means))
    low, middle, high = (objective[rows, i + d] for d in (-1, 0, 1))
    bend = low - 2 * middle + high
    step = np.clip(0.5 * (low - high) / np.where(bend < 0, bend, -1.0), -1, 1)
    return x[i] + step * (x[1] - x[0]), middle - 0.25 * (low - high) * step


def best_shifts(chain: Line, value: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """The best a chain can do by moving the means of its kernels, and leaving their widths: new means, value of x_T.

    A tuned denoiser does no more. `value` is the worth of the last state; dynamic programming, backwards.
    """
    means = []
    for mean, std in zip(chain.means[::-1], chain.stds[::-1], strict=True):
        shifted, value = _highest(chain.x, chain.kernel(chain.x, std) @ value, mean, ALPHA / std**2)
        means.append(shifted)
    return means[::-1], value


def best_law(world: Any, chain: Line, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x0 and its probabilities under the best shifts from a law of x_T: what tuning can reach, projection included."""
    rewards = np.asarray(world.reward(jnp.asarray(chain.x[:, None], jnp.float32)), float)
    x0, value = _highest(chain.x, rewards, chain.x0, ALPHA * chain.snr)
    for mean, std in zip(best_shifts(chain, value)[0], chain.stds, strict=True):
        start = start @ chain.kernel(mean, std)
    return x0, start


def best_start(world: Any, value: np.ndarray, x: np.ndarray, moves: int) -> np.ndarray:
    """The law of x_T, on x, of the best shifts of the chain that draws it, rewarded by `value` on x."""
    process = processes.initial_law(world.process, schedules.linear_vp())
    chain = line(process, tuners.standard_normal(process), process.times(moves), points=len(x), width=float(x[-1]))
    law = chain.start
    for mean, std in zip(best_shifts(chain, value)[0], chain.stds, strict=True):
        law = law @ chain.kernel(mean, std)
    return law


def binned(x0: np.ndarray, p: np.ndarray | None = None) -> np.ndarray:
    """Probabilities of the BINS."""
    return np.histogram(x0, BINS, weights=np.full(len(x0), 1 / len(x0)) if p is None else p)[0]


def moments(p: np.ndarray) -> tuple[float, float]:
    middle = 0.5 * (BINS[1:] + BINS[:-1])
    mean = float(p @ middle)
    return mean, float(p @ (middle - mean) ** 2)


# ---------------------------------------------------------------- the tables


def spread(values: list[float], digits: int = 3) -> str:
    """Mean and standard error over seeds."""
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{np.mean(values):.{digits}f} ({error:.{digits}f})"


def trained(world: Any, train: Callable[[int], tuple[Any, Any]], seeds: int) -> tuple[list[Any], list[str], float]:
    """Train a process and its denoiser from each seed: laws of their samples, means and variances as cells, seconds a seed."""
    reached, begun = [], time.perf_counter()
    for seed in range(seeds):
        x = drawn(*train(seed), world.times, seed=seed)
        reached.append(controlled.Law(x.mean(0), np.cov(x.T).reshape(world.dim, world.dim)))
    seconds = (time.perf_counter() - begun) / seeds
    columns = np.array([law.mean for law in reached]), np.array([np.diag(law.cov) for law in reached])
    return reached, [" ".join(spread(list(column)) for column in part.T) for part in columns], seconds


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
            exact = controlled.best(world, ALPHA)

            def train(seed: int, world: Any = world, start: str = start) -> tuple[Any, Any]:
                nonlocal exact
                draw = None
                if start == "tuned":
                    draw, _, alphas = tune_initial(world, affine(world), seed=seed, moves=40, samples=100_000)
                    exact = controlled.best(world, ALPHA, controlled.initial(world, ALPHA, alphas))
                tuner, params = tune_main(world, affine(world), draw, seed=seed, steps=800)
                return tuner.process, tuner.model(params)

            reached, cells, seconds = trained(world, train, seeds)
            kls = [controlled.divergence(law, target) for law in reached]
            out.append(
                f"| {name} | {start}, trained | {cells[0]} | {cells[1]} | {vector(exact.mean)} | {vector(np.diag(exact.cov))} | "
                f"{spread(kls, 4)} | {controlled.divergence(exact, target):.4f} | {seconds:.0f} |"
            )
            print(out[-1], flush=True)
            write(out)


def policy_gradient_rows(seeds: int, write: Callable[[list[str]], None]) -> None:
    """Policy gradients and the reward's gradient under the same path KL, to the best law that begins at the prior's x_T."""
    out = [
        "| world | method | mean | variance | exact mean | exact variance | KL to the best, nats | chains | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    steps, batch = 4000, 512
    for name, world in (("1-D, linear", gaussian(8)), ("1-D, quadratic, T = 8", gaussian(8, True))):
        networks, exact = affine(world), controlled.best(world, ALPHA)
        change, params = networks.main
        worth, first = networks.value

        def network(
            params: Any, x: jax.Array, t: jax.Array, cond: Any = None, world: Any = world, change: Any = change
        ):
            return world.denoiser(x, t) + change(params, x, t)

        common = (_model(network), world.process, world.times, _adam(0.02, steps))
        kl: dict[str, Any] = {"batch": batch, "reference": world.denoiser, "temperature": ALPHA}
        value = {"value": _model(worth), "value_params": first, "value_optimizer": _adam(0.02, steps)}
        methods = {
            "DDPO-SF": tuners.ddpo(*common, **kl),
            "DDPO-IS, clip 0.2, 2 epochs": tuners.ddpo(*common, **kl, clip=0.2, epochs=2),
            "DPOK": tuners.dpok(*common, **kl, **value),
        }
        tuned = {method: tuners.as_tuner(online, world.reward) for method, online in methods.items()}
        tuned["DRaFT"] = tuners.draft(*common[:2], world.reward, *common[2:], **kl)
        for method, tuner in tuned.items():
            model = _model(network)
            train = lambda seed, tuner=tuner: (world.process, model(_fit(tuner, params, seed, steps)))  # noqa: B023, E731
            reached, cells, seconds = trained(world, train, seeds)
            kls = [controlled.divergence(law, exact) for law in reached]
            out.append(
                f"| {name} | {method} | {cells[0]} | {cells[1]} | {float(exact.mean[0]):.3f} | {float(exact.cov[0, 0]):.3f} | "
                f"{spread(kls, 5)} | {steps * batch:,} | {seconds:.0f} |"
            )
            print(out[-1], flush=True)
            write(out)


def mixture_rows(seeds: int, write: Callable[[list[str]], None]) -> None:
    """The same for a mixture of two, by histograms of 200,000 samples; the exact laws have no sampling error."""
    world = mixture()
    chain = line(world.process, world.denoiser, world.times)
    exact = laws(chain, world.reward, ALPHA)
    target = binned(exact.x0, exact.tilted)
    some = target > 1e-9

    def apart(p: np.ndarray) -> tuple[float, float]:
        q = np.where(some, p, 0.0)
        here = q > 0
        return 0.5 * float(np.abs(p - target).sum()), float(q[here] @ np.log(q[here] / target[here]))

    noise = np.random.default_rng(0).multinomial(200_000, target / target.sum()) / 200_000
    out = [
        "Exact rows are by quadrature. A tuned denoiser moves the means of kernels and leaves their widths; the best that this can do",
        "(best shifts, by dynamic programming) falls short of tilted kernels by O(1/T), here T = 16.",
        "",
        "| law of x0 | mean | variance | TV to p* | KL to p*, nats | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, p in (
        ("the prior's chain", binned(exact.x0, exact.prior)),
        ("p*: p exp(r/alpha)/Z", target),
        ("frozen, kernels tilted (exact)", binned(exact.x0, exact.frozen)),
        ("frozen, best shifts (exact)", binned(*best_law(world, chain, chain.start))),
        ("tuned, best shifts (exact)", binned(*best_law(world, chain, best_start(world, exact.value, chain.x, MOVES)))),
        ("200,000 draws of p* itself", noise),
    ):
        (mean, variance), (tv, kl) = moments(p), apart(p)
        out.append(f"| {name} | {mean:.3f} | {variance:.3f} | {tv:.4f} | {kl:.4f} | |")
    for start in ("frozen", "tuned"):
        figures, begun = [], time.perf_counter()
        for seed in range(seeds):
            networks, draw = perceptrons(world), None
            if start == "tuned":
                draw = tune_initial(world, networks, seed=seed, moves=MOVES, steps=800, rate=3e-3, samples=50_000)[0]
            tuner, params = tune_main(world, networks, draw, seed=seed, steps=3000, rate=3e-3)
            p = binned(drawn(tuner.process, tuner.model(params), world.times, seed=seed)[:, 0])
            figures.append((*moments(p), *apart(p)))
        columns = " | ".join(spread(list(column), 4) for column in np.array(figures).T)
        out.append(f"| {start}, trained | {columns} | {(time.perf_counter() - begun) / seeds:.0f} |")
        print(out[-1], flush=True)
        write(out)
