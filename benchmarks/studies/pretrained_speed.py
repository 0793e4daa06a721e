"""Released networks at full size with random weights, beside diffusers on PyTorch: forward, and with the gradient in the input.

    python -m benchmarks.studies.pretrained_speed            # needs torch and diffusers; all of it, Stable Diffusion 1.5 too (14 GB)
    python -m benchmarks.studies.pretrained_speed --networks cifar [--usual-memory]

Both sides have the same weights and inputs, in float32, and take turns in one process; ratios are of each round, and medians
are shown, of CPU time on one core. PyTorch is eager, in its own layout and in channels_last.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed import harness
from rgdiff.pretrained import weights
from rgdiff.pretrained.config import read_config
from rgdiff.pretrained.unet import UNet2DConditionModel, UNet2DModel
from rgdiff.runtime.cpu import keep_memory

CIFAR = {
    "sample_size": 32, "in_channels": 3, "out_channels": 3, "block_out_channels": [128, 256, 256, 256], "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6,
}  # fmt: skip
STABLE = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}


def rounds(sides: dict[str, Callable[[], Any]], count: int) -> dict[str, list[float]]:
    """Run the sides in turn, once to warm up and `count` times; return CPU seconds."""
    for run in sides.values():
        run()
    took: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(count):
        for name, run in sides.items():
            began = time.process_time()
            run()
            took[name].append(time.process_time() - began)
    return took


def rows(title: str, took: dict[str, list[float]]) -> list[str]:
    """Return a table's rows: medians, and the medians of each round's ratios."""
    ours = took["ours"]
    out = []
    for name, times in took.items():
        ratios = [a / b for a, b in zip(times, ours, strict=True)]
        out.append(f"| {title} | {name} | {statistics.median(times):.3f} | {statistics.median(ratios):.2f} |")
        print(out[-1], flush=True)
    return out


def networks(kind: str, settings: dict[str, Any], inputs: tuple[np.ndarray, ...]) -> tuple[Any, Any, Any]:
    """Return diffusers' network with random weights, ours, and the same weights for it."""
    import diffusers
    import torch

    torch.manual_seed(0)
    theirs = getattr(diffusers, kind)(**settings).eval().requires_grad_(False)
    ours: Any = {"UNet2DModel": UNet2DModel, "UNet2DConditionModel": UNet2DConditionModel}[kind]
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        net = ours(read_config(Path(folder) / "config.json"))
        like = jax.eval_shape(lambda: net.init(jax.random.key(0), *inputs)["params"])
        params = weights.read(weights.find(Path(folder)), like)
    return theirs, net, params


def compare(
    title: str, kind: str, settings: dict[str, Any], shape: tuple[int, ...], count: int, gradient: bool
) -> list[str]:
    """Measure one network: forward, and with the gradient in its input."""
    import torch

    rng = np.random.default_rng(0)
    x, t = rng.standard_normal(shape).astype(np.float32), np.full(shape[0], 501.0, np.float32)
    more = () if kind == "UNet2DModel" else (rng.standard_normal((shape[0], 77, 768)).astype(np.float32),)
    theirs, net, params = networks(kind, settings, (x, t, *more))
    extra = [torch.tensor(one) for one in more]
    plain = torch.tensor(x).permute(0, 3, 1, 2).contiguous()
    last = plain.to(memory_format=torch.channels_last)
    step = torch.tensor(t)

    def forward(x: Any) -> Any:
        with torch.no_grad():
            return theirs(x, step, *extra).sample

    def backward(x: Any) -> Any:
        x = x.detach().requires_grad_(True)
        theirs(x, step, *extra).sample.square().sum().backward()
        return x.grad

    apply = lambda params, x: net.apply({"params": params}, x, t, *more)  # noqa: E731
    ours = jax.jit(apply)
    grad = jax.jit(lambda params, x: jax.grad(lambda x: jnp.square(apply(params, x)).sum())(x))
    got, want = np.asarray(ours(params, x)), forward(plain).permute(0, 2, 3, 1).numpy()
    print(f"{title}: outputs differ by {abs(got - want).max() / abs(want).max():.1e} of the largest", flush=True)
    sides = {
        "ours": lambda: jax.block_until_ready(ours(params, x)),
        "PyTorch": lambda: forward(plain),
        "PyTorch, channels_last": lambda: forward(last),
    }
    out = rows(f"{title}, forward", rounds(sides, count))
    if gradient:
        sides = {
            "ours": lambda: jax.block_until_ready(grad(params, x)),
            "PyTorch": lambda: backward(plain),
            "PyTorch, channels_last": lambda: backward(last),
        }
        out += rows(f"{title}, gradient in the input", rounds(sides, count))
    return out


def main() -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=("cifar", "sd"), default=["cifar", "sd"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="benchmarks/results/pretrained-speed[-usual-memory].md by default")
    parser.add_argument(
        "--usual-memory", action="store_true", help="leave the allocator as it is: what a program frees is mapped anew"
    )
    given = parser.parse_args()
    usual = " --usual-memory" * given.usual_memory
    out = given.out or harness.ROOT / "benchmarks" / "results" / f"pretrained-speed{usual[2:]}.md"
    if not usual:
        keep_memory()  # both sides
    about, body = [f"- {name}: {value}" for name, value in harness.machine().items()], []
    if "cifar" in given.networks:
        for batch in (1, 8):
            body += compare(
                f"CIFAR-10 DDPM, batch {batch}", "UNet2DModel", CIFAR, (batch, 32, 32, 3), given.rounds, True
            )
    if "sd" in given.networks:
        body += compare("SD 1.5, batch 1", "UNet2DConditionModel", STABLE, (1, 64, 64, 4), given.rounds, False)
    text = ["# Speed of released networks beside PyTorch, float32, random weights", "", *about,
            f"- command: python -m benchmarks.studies.pretrained_speed --networks {' '.join(given.networks)}{usual}", "",
            "One core. Ratios are the side's CPU seconds over ours in the same round: above 1, ours is faster. "
            + ("The allocator is as it is." if usual else "Both sides keep freed memory (`rgdiff.runtime.cpu.keep_memory`)."), "",
            "| what | side | CPU seconds (median) | ratio (median) |", "|---|---|---|---|", *body, ""]  # fmt: skip
    out.write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()
