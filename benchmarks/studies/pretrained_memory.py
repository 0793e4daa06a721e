"""What tuning a released network needs in memory: `python -m benchmarks.studies.pretrained_memory`.

Nothing is compiled and no weights are made: the program of a gradient is traced at full size, and what its forward pass hands to its
backward pass is counted. Writes benchmarks/results/pretrained-memory.md.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from benchmarks.speed.harness import machine
from rgdiff.nets import lora_init, lora_merge
from rgdiff.pretrained.autoencoder import AutoencoderKL
from rgdiff.pretrained.unet import UNet2DConditionModel
from rgdiff.typing import shown

RESULTS = Path(__file__).parents[1] / "results" / "pretrained-memory.md"
TARGET = r"attn\d/to_(q|k|v|out\.0)/kernel"
RANK = 4
DTYPE = jnp.bfloat16
REMAT = (None, "stage", "block")
GIB = 2**30
DEVICES, USED = (16, 40, 80), 0.9  # GB, and the part of it that a program may have
CALLS = (1, 5)
ROWS = 2  # of the network per image: classifier-free guidance has two
CHECKPOINTS = {"checkpoint", "remat", "remat2"}


def spec(*shape: int, dtype: Any = DTYPE) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def cross(down: str, up: str) -> dict[str, Any]:
    names = {"D": "{}Block2D", "C": "CrossAttn{}Block2D"}
    return {
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": [names[letter].format("Down") for letter in down],
        "up_block_types": [names[letter].format("Up") for letter in up],
    }


SD15 = cross("CCCD", "DCCC") | {
    "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768, "attention_head_dim": 8,
}  # fmt: skip
SDXL = cross("DCC", "CCD") | {
    "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4}


class Work(NamedTuple):
    """A network, how it is called and what of it is adapted."""

    name: str
    make: Callable[[str | None], Any]  # remat -> Linen module
    inputs: dict[str, Any]  # of which `x` or `z` is differentiated
    image: str  # that one
    method: str | None = None
    target: str | None = TARGET


class Figures(NamedTuple):
    """Bytes. kept: between the passes of one call; piece: what the largest recomputed piece has at a time."""

    weights: int
    adapted: int
    adapter: int
    kept: int
    piece: int


def unet(name: str, config: dict[str, Any], side: int, **inputs: Any) -> Work:
    known = {"x": spec(1, side, side, 4), "t": spec(1, dtype=jnp.float32)}
    return Work(name, lambda remat: UNet2DConditionModel(config, DTYPE, remat), known | inputs, "x")


def decoder(name: str, side: int) -> Work:
    inputs = {"z": spec(1, side, side, 4)}
    return Work(name, lambda remat: AutoencoderKL(VAE, DTYPE, remat), inputs, "z", "decode", None)


WORK = {
    "sd15": unet("SD 1.5 at 512", SD15, 64, context=spec(1, 77, 768)),
    "sdxl": unet(
        "SDXL at 1024", SDXL, 128, context=spec(1, 77, 2048),
        added={"text_embeds": spec(1, 1280), "time_ids": spec(1, 6, dtype=jnp.float32)},
    ),
    "vae512": decoder("decoder at 512", 64),
    "vae1024": decoder("decoder at 1024", 128),
}  # fmt: skip


def size(tree: Any) -> int:
    """Return the bytes of arrays or shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def handed_over(function: Callable[..., Any], free: Any, fixed: Any) -> int:
    """Return the bytes that the forward pass of function(free, fixed) makes and its backward pass in `free` needs.

    What is an argument anyway is not counted, and neither is one array twice.
    """

    def residuals(free: Any, fixed: Any) -> Any:
        return jax.tree.leaves(jax.vjp(lambda free: function(free, fixed), free)[1])

    jaxpr = jax.make_jaxpr(residuals)(free, fixed).jaxpr
    arguments = {id(var) for var in jaxpr.invars}
    made = {id(var): var.aval for var in jaxpr.outvars if id(var) not in arguments}
    return size(list(made.values()))


def largest_piece(jaxpr: Any, fixed: set[int]) -> int:
    """Return the bytes that the largest recomputed piece of a program hands to its own backward pass, pieces inside included.

    Args:
      jaxpr: the program.
      fixed: ids of its variables that are not differentiated.
    """
    largest = 0
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if not hasattr(inner, "eqns") or len(inner.invars) != len(equation.invars):
                continue
            still = {id(a) for a, b in zip(inner.invars, equation.invars, strict=True) if id(b) in fixed}
            found = largest_piece(inner, still)
            if equation.primitive.name in CHECKPOINTS:
                found += _piece(inner, still)
            largest = max(largest, found)
    return largest


def _piece(jaxpr: Any, fixed: set[int]) -> int:
    shapes = [spec(*var.aval.shape, dtype=var.aval.dtype) for var in jaxpr.invars]
    free = [id(var) not in fixed and jnp.issubdtype(var.aval.dtype, jnp.floating) for var in jaxpr.invars]

    program = jaxpr_as_fun(ClosedJaxpr(jaxpr, []))

    def run(some: list[Any], others: list[Any]) -> Any:
        a, b = iter(some), iter(others)
        return program(*(next(a if one else b) for one in free))

    pick = lambda wanted: [shape for shape, one in zip(shapes, free, strict=True) if one is wanted]  # noqa: E731
    return handed_over(run, pick(True), pick(False))


def measure(work: Work, remat: str | None) -> Figures:
    """Return the figures of one call's gradient in the adapter and the image."""
    net = work.make(remat)
    init = net.init if work.method is None else lambda key, z: net.init(key, z, method=work.method)
    made = jax.eval_shape(lambda inputs: init(jax.random.key(0), **inputs), work.inputs)["params"]
    params = jax.tree.map(lambda leaf: spec(*leaf.shape), made)
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    adapter = {}
    if (target := work.target) is not None:
        adapter = jax.eval_shape(lambda p: lora_init(jax.random.key(0), p, RANK, target=target), params)
        merged = jax.eval_shape(lora_merge, params, adapter)
        assert jax.tree.map(shown, merged) == jax.tree.map(shown, params)
    adapted = {path: leaf for path, (_, leaf) in zip(paths, leaves, strict=True) if path in adapter}
    rest = {path: leaf for path, (_, leaf) in zip(paths, leaves, strict=True) if path not in adapter}

    def call(free: Any, fixed: Any) -> Any:
        """Adapted kernels are merged once a gradient, for all calls: here they are arguments, as the other weights are."""
        kernels, image = free
        others, inputs = fixed
        every = kernels | others
        values = jax.tree_util.tree_unflatten(tree, [every[path] for path in paths])
        return net.apply({"params": values}, **(inputs | {work.image: image}), method=work.method)

    inputs = {name: value for name, value in work.inputs.items() if name != work.image}
    free, fixed = (adapted, work.inputs[work.image]), (rest, inputs)
    jaxpr = jax.make_jaxpr(call)(free, fixed).jaxpr
    constants = {id(var) for var in jaxpr.invars[len(jax.tree.leaves(free)) :]}
    return Figures(
        size(params), size(adapted), size(adapter), handed_over(call, free, fixed), largest_piece(jaxpr, constants)
    )


class Total(NamedTuple):
    """Bytes of one DRaFT-K step: once, and for each image of the batch."""

    once: int
    each: int


def draft(network: Figures, decode: Figures, state: int, calls: int) -> Total:
    """Return what a DRaFT-K step needs: calls are recomputed one at a time, and so is the decoder, before them.

    Args:
      network: of one row of the network; a call has `ROWS` an image.
      decode: of one image.
      state: bytes of x_t; one is stored for each call.
      calls: K.
    """
    adam = 4 * network.adapter  # the adapter, its gradient and two moments
    once = (
        network.weights + decode.weights + 2 * network.adapted + adam
    )  # merged kernels, and the sum of their gradients
    return Total(once, calls * state + max(ROWS * (network.kept + network.piece), decode.kept + decode.piece))


def images(total: Total, device: int) -> int:
    """Return the largest batch that fits a device of so many GB."""
    return max(0, int((USED * device * 1e9 - total.once) // total.each))


def report(names: list[str]) -> list[str]:
    """Return the lines of the tables."""
    found: dict[tuple[str, str | None], Figures] = {}
    lines = ["## One call, batch 1", "", "| network | recomputed | weights | adapted kernels | kept | largest piece |", "|---|---|---|---|---|---|"]  # fmt: skip
    gib = lambda n: f"{n / GIB:.2f}" if n >= GIB / 100 else f"{n / GIB:.3f}"  # noqa: E731
    for name in names:
        for remat in REMAT:
            one = found[name, remat] = measure(WORK[name], remat)
            shown_ = [
                WORK[name].name,
                remat or "nothing",
                gib(one.weights),
                gib(one.adapted),
                gib(one.kept),
                gib(one.piece),
            ]
            lines.append(f"| {' | '.join(shown_)} |")
            print(lines[-1], flush=True)
    heads = " | ".join(f"{device} GB" for device in DEVICES)
    lines += ["", "## DRaFT-K", "", f"| network, decoder | K | recomputed | once | each image | images in {heads} |", "|---" * (5 + len(DEVICES)) + "|"]  # fmt: skip
    for name, decode in (("sd15", "vae512"), ("sdxl", "vae1024")):
        if not {name, decode} <= set(names):
            continue
        state = WORK[name].inputs["x"].size * 4
        for calls in CALLS:
            for remat in REMAT:
                total = draft(found[name, remat], found[decode, remat], state, calls)
                fits = " | ".join(str(images(total, device)) for device in DEVICES)
                title = f"{WORK[name].name}, {WORK[decode].name}"
                lines.append(
                    f"| {title} | {calls} | {remat or 'nothing'} | {gib(total.once)} | {gib(total.each)} | {fits} |"
                )
                print(lines[-1], flush=True)
    return lines


INTRODUCTION = f"""# Memory of tuning released networks

GiB, bfloat16 weights and computation, LoRA of rank {RANK} on every attention's to_q, to_k, to_v and to_out.0 (TARGET in benchmarks/studies/pretrained_memory.py).
Counted from the traced program, not measured on a device: XLA may keep less by fusing, and more by fragmentation.

- *kept*: what the forward pass of one call hands to its backward pass, without weights and adapted kernels.
- *largest piece*: of the parts that the backward pass computes again (a stage, a block, the head, 1,024 queries of an attention), what
  the largest one has at a time, pieces inside it included. With nothing recomputed it is that of attention, 1,024 queries' scores; a
  GPU's fused kernel has none.
- *once*: weights of network and decoder, merged kernels and the sum of their gradients, the adapter with gradient and Adam's moments.
- *each image*: K states x_t (float32), and the larger of one call ({ROWS} rows: classifier-free guidance) and the decoder. The tuner's
  `remat="everything"` has one call at a time in memory, so that K hardly counts.
- *images*: the largest batch at {USED:.0%} of the device. The text encoders (embeddings are made before) and the reward are not in it.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(WORK), help=f"some of {', '.join(WORK)}")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    lines = report(arguments.only.split(","))
    facts = machine() | {
        "command": f"python {shlex.join(['-m', 'benchmarks.studies.pretrained_memory', *sys.argv[1:]])}",
        "date": datetime.date.today().isoformat(),
        "jax": f"{jax.__version__}, traced for {jax.devices()[0].device_kind}",
    }
    text = [INTRODUCTION, *(f"- {key}: {value}" for key, value in facts.items()), "", *lines]
    arguments.out.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
