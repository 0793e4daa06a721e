"""What convolutions of 3x3 taps gain on a CPU: Winograd's algorithm and one product with patches, against XLA's own and PyTorch.

    python -m benchmarks.studies.cpu_convolutions            # needs torch; a few minutes on one core

Sides take turns in one process on one core, and are compared before they are timed. Times are CPU time, medians of rounds; ratios
are the other side's time over ours within a round.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import statistics
import time
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed.harness import ROOT, machine
from benchmarks.speed.measures import weights
from benchmarks.speed.rows import BATCH, CHANNELS, SIDE
from rgdiff.nets import UNet, conv, winograd
from rgdiff.runtime.cpu import keep_memory

RESULTS = ROOT / "benchmarks" / "results"
CALLS = 5  # of the network in a chain
SHAPES = (
    (16, 16, 32, 32), (16, 16, 16, 16), (16, 8, 64, 64), (8, 8, 64, 64), (64, 4, 64, 64), (16, 4, 64, 64), (4, 8, 64, 64),
    (8, 8, 128, 128), (16, 8, 128, 128), (1, 32, 128, 128), (1, 32, 256, 256), (4, 16, 256, 256), (8, 16, 256, 256),
    (8, 16, 512, 256), (1, 64, 320, 320), (8, 8, 256, 256), (8, 4, 256, 256), (16, 4, 256, 256), (1, 16, 256, 256),
    (1, 16, 512, 512), (1, 32, 512, 512), (1, 32, 640, 640), (1, 32, 1280, 640), (1, 8, 1280, 1280), (1, 16, 1280, 1280),
)  # fmt: skip
Side = Callable[[], Any]


@contextlib.contextmanager
def always(answer: bool) -> Iterator[None]:
    """Compile as if Winograd's algorithm paid for all shapes; or with XLA's convolutions alone: no kernel read by one product either."""
    sizes = {} if answer else {"LARGE": 2**62, "HUGE": 2**62}
    with contextlib.ExitStack() as stack:
        stack.enter_context(unittest.mock.patch.object(winograd, "pays", lambda *shapes: answer))
        for name, size in sizes.items():
            stack.enter_context(unittest.mock.patch.object(conv, name, size))
        jax.clear_caches()
        yield
    jax.clear_caches()


def compiled(function: Any, *args: Any) -> tuple[Any, float]:
    """Compile, and return the program and the CPU seconds that it took."""
    began = time.process_time()
    program = jax.jit(function).lower(*args).compile()
    return program, time.process_time() - began


def rounds(sides: dict[str, Side], count: int) -> dict[str, list[float]]:
    """Run the sides in turn, once to warm up and `count` times; return CPU seconds."""
    took: dict[str, list[float]] = {name: [] for name in sides}
    for counted in [False] + [True] * count:
        for name, run in sides.items():
            began = time.process_time()
            run()
            if counted:
                took[name].append(time.process_time() - began)
    return took


def ratio(took: dict[str, list[float]], other: str, spread: bool = True) -> str:
    """Return the median (minimum-maximum) of the other side's time over ours."""
    each = [a / b for a, b in zip(took[other], took["ours"], strict=True)]
    return f"{statistics.median(each):.2f}" + (f" ({min(each):.2f}-{max(each):.2f})" if spread else "")


def difference(a: Any, b: Any) -> float:
    """Return the relative L2 difference of two results of one structure."""
    pairs = [(np.asarray(x), np.asarray(y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]
    return float(np.sqrt(sum(((x - y) ** 2).sum() for x, y in pairs) / sum((y**2).sum() for _, y in pairs)))


def same(a: Any, b: Any) -> float:
    """Return their difference.

    Raises:
      RuntimeError: above 1e-4: the sides do different work.
    """
    size = difference(a, b)
    if not size < 1e-4:
        raise RuntimeError(f"results differ by {size:.1e}, more than 1e-4")
    return size


def case() -> tuple[jax.Array, Any, Any, Any]:
    """Return images, parameters of the U-Net of `benchmarks.speed`, its calls in a scan (params, x) -> x, and a loss of them."""
    net = UNet(channels=CHANNELS)
    x = jax.random.normal(jax.random.key(0), (BATCH, SIDE, SIDE, 1))
    time_ = jnp.float32(0.5)
    params = jax.tree.map(jnp.asarray, weights(jax.eval_shape(lambda: net.init(jax.random.key(0), x, time_)["params"])))

    def chain(params: Any, x: Any) -> Any:
        step = lambda x, _: (jnp.tanh(net.apply({"params": params}, x, time_)), None)  # noqa: E731
        return jax.lax.scan(step, x, None, length=CALLS)[0]

    return x, params, chain, lambda params, x: jnp.square(chain(params, x)).mean()


def network(count: int) -> list[str]:
    """Return the table of the U-Net of `benchmarks.speed`, called in a scan: forward beside PyTorch, and the gradient in all weights."""
    import torch

    from benchmarks.speed import torch_twins

    x, params, chain, loss = case()
    twin = torch_twins.load_linen(torch_twins.UNet(CHANNELS), params)
    images, times = torch.tensor(np.asarray(x)).permute(0, 3, 1, 2).contiguous(), torch.full((BATCH,), 0.5)

    def eager() -> Any:
        y = images
        with torch.no_grad():
            for _ in range(CALLS):
                y = torch.tanh(twin(y, times))
        return y.permute(0, 2, 3, 1).numpy()

    lines = [
        f"| {CALLS} calls in a scan, {BATCH} images | side | compiling, CPU s | CPU ms a call | ratio | difference |",
        "|---|---|---|---|---|---|",
    ]
    for title, function in (("forward", chain), ("with the gradient in the weights", jax.grad(loss))):
        ours, made = compiled(function, params, x)
        with always(False):
            xla, made_plain = compiled(function, params, x)
        run = lambda program: lambda: jax.block_until_ready(program(params, x))  # noqa: E731
        sides: dict[str, Side] = {"ours": run(ours), "XLA's convolutions": run(xla)}
        compiling = {"ours": f"{made:.1f}", "XLA's convolutions": f"{made_plain:.1f}"}
        if title == "forward":
            sides["PyTorch eager"] = eager
        differences = {name: same(side(), sides["ours"]()) for name, side in sides.items()}
        took = rounds(sides, count)
        for name, times_ in took.items():
            each = statistics.median(times_) / CALLS * 1e3
            lines.append(
                f"| {title} | {name} | {compiling.get(name, '')} | {each:.1f} | {ratio(took, name)} | {differences[name]:.0e} |"
            )
            print(lines[-1], flush=True)
    return lines


def convolutions(count: int) -> list[str]:
    """Return the table of one convolution of every shape, also where the rule leaves it to XLA: in a loop, where a kernel's transform is made once, and once."""
    lines = [
        "| images | side | channels | ours here | taken by the rule | ratio in a loop | ratio once |",
        "|---|---|---|---|---|---|---|",
    ]
    random = np.random.default_rng(0)
    for images, side, inputs, outputs in SHAPES:
        x = jnp.asarray(random.standard_normal((images, side, side, inputs), np.float32))
        kernel = jnp.asarray(random.standard_normal((3, 3, inputs, outputs), np.float32) / np.sqrt(9 * inputs))
        length = int(np.clip(1.5e9 / (18 * x.size * outputs), 2, 60))

        def loop(x: Any, kernel: Any, length: int = length) -> Any:
            step = lambda x, _: (jnp.tanh(conv.conv(x, kernel)[..., : x.shape[-1]]), None)  # noqa: E731
            return jax.lax.scan(step, x, None, length=length)[0]

        shapes = x.shape, kernel.shape, (1, 1), (1, 1), ((1, 1), (1, 1))
        pays, huge = winograd.pays(*shapes), kernel.size >= conv.HUGE
        huge = huge and 4 * x.size <= inputs * outputs
        by, taken = ("one product", "yes") if huge else ("Winograd", "yes" if pays else "no")
        cells = []
        for function in (loop, lambda x, kernel: conv.conv(x, kernel)):
            if function is loop and outputs < inputs:  # its output is no input
                cells.append("")
                continue
            with contextlib.nullcontext() if huge else always(True):
                ours = compiled(function, x, kernel)[0]
            with always(False):
                xla = compiled(function, x, kernel)[0]
            run = lambda program, x=x, kernel=kernel: lambda: jax.block_until_ready(program(x, kernel))  # noqa: E731
            sides = {"ours": run(ours), "XLA": run(xla)}
            same(sides["ours"](), sides["XLA"]())
            cells.append(ratio(rounds(sides, count), "XLA", spread=False))
        lines.append(f"| {images} | {side} | {inputs} -> {outputs} | {by} | {taken} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def input_gradient(count: int) -> list[str]:
    """Return the row of a released network with the gradient in its input, batch 1: the lower half's kernels are large, its pixels few."""
    from benchmarks.studies.pretrained_speed import CIFAR
    from rgdiff.pretrained.unet import UNet2DModel

    net = UNet2DModel(CIFAR)
    x, t = jax.random.normal(jax.random.key(0), (1, 32, 32, 3)), jnp.full(1, 501.0)
    params = jax.tree.map(jnp.asarray, weights(jax.eval_shape(lambda: net.init(jax.random.key(0), x, t)["params"])))
    function = jax.grad(lambda x, params: jnp.square(net.apply({"params": params}, x, t)).mean())
    ours, made = compiled(function, x, params)
    with always(False):
        xla, made_plain = compiled(function, x, params)
    run = lambda program: lambda: jax.block_until_ready(program(x, params))  # noqa: E731
    sides = {"ours": run(ours), "XLA's convolutions": run(xla)}
    size = same(sides["XLA's convolutions"](), sides["ours"]())
    took = rounds(sides, count)
    lines = ["| side | compiling, CPU s | CPU s | ratio | difference |", "|---|---|---|---|---|"]
    for name, compiling in (("ours", made), ("XLA's convolutions", made_plain)):
        each = f"{statistics.median(took[name]):.3f} | {ratio(took, name)} | {0 if name == 'ours' else size:.0e}"
        lines.append(f"| {name} | {compiling:.1f} | {each} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11, help="rounds of every case")
    count = parser.parse_args().repeats
    keep_memory()  # both sides: else what a program frees is mapped anew in its next run
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    import torch

    torch.set_num_threads(1)
    about = [f"- {name}: {value}" for name, value in machine().items()]
    text = [
        "# 3x3 convolutions on a CPU",
        "",
        f"`python -m benchmarks.studies.cpu_convolutions --repeats {count}`, {datetime.date.today()}: one core, CPU time; "
        "medians, and medians (minimum-maximum) of each round's ratios",
        "",
        *about,
        f"- jax {jax.__version__}, torch {torch.__version__}",
        "",
        "## The U-Net of benchmarks.speed",
        "",
        *network(count),
        "",
        "## CIFAR-10's DDPM, batch 1, with the gradient in its input",
        "",
        *input_gradient(count),
        "",
        "## One convolution, against XLA's",
        "",
        *convolutions(count),
        "",
    ]
    kind = "amd" if winograd.on_amd() else "intel" if "Intel" in machine()["machine"] else "other"
    (RESULTS / f"cpu-convolutions-{kind}.md").write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()
