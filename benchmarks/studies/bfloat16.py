"""What networks in bfloat16 change, where the answer in float32 or in closed form is known; kernels, weights and rewards stay float32.

    python -m benchmarks.studies.bfloat16

Exact laws: a masked chain of a convolutional network, by enumeration, and a Gaussian chain with the exact denoiser, whose inputs and
predictions are rounded to bfloat16. Then a U-Net of random weights: gradients of tuners, and log-probabilities of moves.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.speed.harness import machine
from benchmarks.speed.measures import weights
from rgdiff import denoisers, nets, processes, samplers, schedules, tuners, values
from rgdiff.exact import enumeration
from rgdiff.typing import pytree
from tests.worlds.worlds import GaussianWorld

RESULTS = Path(__file__).parents[1] / "results" / "bfloat16.md"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
DRAWS = 100_000


class Row(NamedTuple):
    world: str
    quantity: str
    exact: str
    float32: str
    bfloat16: str


@pytree
class Rounded:
    """A denoiser whose inputs and predictions are rounded to bfloat16."""

    denoiser: Any

    def __call__(self, x: Any, t: Any, cond: Any = None) -> Any:
        to = lambda a: a.astype(jnp.bfloat16).astype(jnp.float32)  # noqa: E731
        return to(self.denoiser(to(x), t, cond))


def masked() -> Iterator[Row]:
    """The exact law of a chain of tokens, by enumeration of what the network says of every state."""
    process = processes.masked(schedules.log_linear_mask(), (4,), 3)
    times = process.times(8)
    shapes = nets.ConvNet1D(out=3, width=32, dilations=(1, 1), kernel=3)
    like = jax.eval_shape(lambda: shapes.init(jax.random.key(0), jnp.zeros((1, 4, 4)), jnp.zeros(1))["params"])
    params = jax.tree.map(jnp.asarray, weights(like))
    reward = lambda x0, cond=None: x0[..., 0].sum(-1) - x0[:, 0, 1]  # noqa: E731
    rewards = enumeration.all_rewards(reward, 4, 3)
    laws, means = {}, {}
    for name, dtype in DTYPES.items():
        denoiser = denoisers.from_linen(shapes.clone(dtype=dtype), params)
        laws[name] = enumeration.chain_law(process, denoiser, times)
        value = values.posterior_mean(reward, process, denoiser)
        sampler = samplers.svdd(process, denoiser, value, temperature=0.5, candidates=8)
        x0 = samplers.sample(sampler, jax.random.key(1), DRAWS // 4, times).x0
        means[name] = float(np.mean(reward(np.asarray(x0))))
    f32, bf16 = laws.values()
    tilted = [enumeration.tilted(law, rewards, 0.5).probabilities for law in (f32, bf16)]
    world = "tokens [4, 3], CNN of 32 channels, 8 moves"
    yield Row(world, "total variation of the prior's law, enumerated", "0", "0", f"{np.abs(f32 - bf16).sum() / 2:.1e}")
    yield Row(
        world,
        "total variation of the tilted law, enumerated",
        "0",
        "0",
        f"{np.abs(tilted[0] - tilted[1]).sum() / 2:.1e}",
    )
    kl = float(np.sum(f32 * np.log(f32 / bf16)))
    yield Row(world, "KL(float32 || bfloat16), nats a sample", "0", "0", f"{kl:.1e}")
    yield Row(
        world,
        f"E r under SVDD, M = 8 ({DRAWS // 4:,} draws)",
        "",
        f"{means['float32']:.3f}",
        f"{means['bfloat16']:.3f}",
    )


def gaussian() -> Iterator[Row]:
    """A Gaussian world: its moments and log Z in closed form."""
    world = GaussianWorld([0.5, -0.3], [[0.8, 0.2], [0.2, 0.5]], steps=20, b=[0.7, 0.4])
    name = "Gaussian in two dimensions, 20 calls"
    denoise = {"float32": world.denoiser, "bfloat16": Rounded(world.denoiser)}
    exact = world.push(world.prior(), 0, len(world.grid) - 1, world.theta)
    mean, cov = world.project(exact, world.theta)
    told: dict[str, dict[str, str]] = {}
    for dtype, denoiser in denoise.items():
        x0 = np.asarray(
            samplers.sample(samplers.ancestral(world.process, denoiser), jax.random.key(2), DRAWS, world.times).x0,
            float,
        )
        value = values.posterior_mean(world.reward, world.process, denoiser)
        out = samplers.sample(samplers.smc(world.process, denoiser, value), jax.random.key(3), DRAWS, world.times)
        told[dtype] = {
            "mean": f"{x0.mean(0)[0]:.4f} +- {x0.std(0)[0] / np.sqrt(DRAWS):.4f}",
            "variance": f"{x0.var(0)[0]:.4f} +- {x0.var(0)[0] * np.sqrt(2 / DRAWS):.4f}",
            "log Z by SMC": f"{float(out.info['log_z']):.4f} +- {float(out.info['log_z_se']):.4f}",
        }
    known = {"mean": f"{mean[0]:.4f}", "variance": f"{cov[0, 0]:.4f}", "log Z by SMC": f"{world.log_z():.4f}"}
    for quantity, value in known.items():
        yield Row(name, quantity, value, told["float32"][quantity], told["bfloat16"][quantity])


def network() -> Iterator[Row]:
    """Gradients and log-probabilities of a U-Net, relative to float32's."""
    process = processes.gaussian(schedules.cosine_vp(), (16, 16, 1))
    times, name = process.times(10), "U-Net 16/32 on 16 x 16, 10 calls"
    net = nets.UNet(channels=(16, 32))
    like = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((1, 16, 16, 1)), jnp.zeros(1))["params"])
    params = jax.tree.map(jnp.asarray, weights(like))
    reward = lambda x0, cond=None: -jnp.square(x0 - 0.3).mean((1, 2, 3))  # noqa: E731

    def model(dtype: Any) -> Any:
        own = net.clone(dtype=dtype)
        return lambda p: denoisers.predicts("v", denoisers.from_linen(own, p), process.schedule)

    models = {name: model(dtype) for name, dtype in DTYPES.items()}
    deterministic = processes.gaussian(schedules.cosine_vp(), (16, 16, 1), eta=0.0)
    makers = {
        "DRaFT-LV": lambda model: tuners.draft_lv(model, deterministic, reward, times, optax.sgd(1.0), batch=8),
        "DRaFT-K, K = 5": lambda model: tuners.draft_k(
            model, deterministic, reward, times, optax.sgd(1.0), k=5, batch=8
        ),
        "DDPO": lambda model: tuners.as_tuner(tuners.ddpo(model, process, times, optax.sgd(1.0), batch=8), reward),
    }
    for method, make in makers.items():
        found = [
            jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(_gradient(make(model), params))])
            for model in models.values()
        ]
        cosine = float(jnp.vdot(*found) / jnp.linalg.norm(found[0]) / jnp.linalg.norm(found[1]))
        size = float(jnp.linalg.norm(found[1]) / jnp.linalg.norm(found[0]))
        yield Row(
            name,
            f"gradient of {method}: cosine to float32's; its length over that one's",
            "",
            "1; 1",
            f"{cosine:.5f}; {size:.4f}",
        )
    method = tuners.ddpo(models["float32"], process, times, optax.sgd(1.0), batch=64)
    path = method.rollout(jax.random.key(5), method.init(params)).path

    def log_prob(model: Any) -> Any:
        x, t, s, y = path[4], times[4], times[5], path[5]
        return process.reverse(x, t, s, model(params)(x, t)).log_prob(y)

    shift = np.abs(np.asarray(log_prob(models["bfloat16"]) - log_prob(models["float32"])))
    yield Row(
        name,
        "log-probability of a move of 256 dimensions: mean, largest shift, nats",
        "",
        "0",
        f"{shift.mean():.3f}, {shift.max():.3f}",
    )


def _gradient(tuner: Any, params: Any) -> Any:
    key = jax.random.key(4)
    if hasattr(tuner, "gradients"):
        return jax.jit(lambda p: tuner.gradients(p, key)[0])(params)
    return jax.jit(jax.grad(lambda p: tuner.loss(p, key)[0]))(params)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    rows = [*masked(), *gaussian(), *network()]
    body = [f"| {' | '.join(row)} |" for row in rows]
    print("\n".join(body))
    text = ["# Networks in bfloat16 beside exact laws", "", *(f"- {name}: {value}" for name, value in machine().items()),
            "- command: python -m benchmarks.studies.bfloat16", "",
            "| world | quantity | exact | float32 | bfloat16 |", "|---|---|---|---|---|", *body]  # fmt: skip
    given.out.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
