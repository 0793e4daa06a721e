"""The host memory that reading a pipeline takes at its peak: `python -m benchmarks.studies.pretrained_load`.

Folders of zeros are written at full width, one large file and several small ones, and read in a process of its own, whose peak (VmHWM,
file pages that are mapped included) is compared with the bytes of the largest file, and with those of what it becomes. Writes
benchmarks/results/pretrained-load.md. Linux only.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff.pretrained import weights
from rgdiff.pretrained.autoencoder import AutoencoderKL
from rgdiff.pretrained.clip import CLIPTextModel
from rgdiff.pretrained.config import Config
from rgdiff.pretrained.folders import WEIGHTS
from rgdiff.pretrained.unet import UNet2DConditionModel

RESULTS = Path(__file__).parents[1] / "results" / "pretrained-load.md"
MB = 1e6
SCHEDULER = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
UNET = {
    "in_channels": 4, "out_channels": 4, "sample_size": 8, "cross_attention_dim": 64, "attention_head_dim": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
VAE = {
    "block_out_channels": [32, 32], "latent_channels": 4, "sample_size": 16, "norm_num_groups": 8,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
}  # fmt: skip
TEXT = {
    "vocab_size": 2000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
# What is stored, what it becomes, and how many devices share it.
CASES = (
    ("F32", "float32", 1),
    ("BF16", "bfloat16", 1),
    ("BF16", "float32", 1),
    ("F32", "bfloat16", 1),
    ("F32", "float32", 4),
)


class Figures(NamedTuple):
    """Bytes: of the largest file and of what it becomes, of all parameters, the peak above what was there before, and what stays."""

    file: int
    becomes: int
    params: int
    peak: int
    kept: int


def zeros(file: Path, network: Any, inputs: tuple[Any, ...], stored: str) -> None:
    """Write a network's file of zeros, which takes no room on disk: a header, and a hole."""
    like = jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]
    header, end = {}, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(like):
        shape = leaf.shape[::-1] if path[-1].key == "kernel" and leaf.ndim == 2 else leaf.shape
        shape = (*leaf.shape[:1:-1], *leaf.shape[:2]) if path[-1].key == "kernel" and leaf.ndim == 4 else shape
        begin, end = end, end + leaf.size * np.dtype(weights.DTYPES[stored]).itemsize
        header[weights.key(path)] = {"dtype": stored, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    file.parent.mkdir(parents=True)
    with open(file, "wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.truncate(8 + len(text) + end)


def write(folder: Path, width: int, stored: str) -> Path:
    """Write a pipeline of the kind of Stable Diffusion 1: its U-Net has `width` and twice as many channels."""
    spec = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct((1, *shape), dtype)  # noqa: E731
    unet = UNET | {"block_out_channels": [width, 2 * width]}
    parts: Mapping[str, tuple[Any, Any, tuple[Any, ...], str]] = {
        "unet": (UNet2DConditionModel(Config(unet)), unet | {"_class_name": "UNet2DConditionModel"}, (spec(8, 8, 4), spec(), spec(77, 64)), WEIGHTS),
        "vae": (AutoencoderKL(Config(VAE)), VAE | {"_class_name": "AutoencoderKL"}, (spec(16, 16, 3),), WEIGHTS),
        "text_encoder": (CLIPTextModel(Config(TEXT)), TEXT | {"architectures": ["CLIPTextModel"]}, (spec(77, dtype=jnp.int32),), "model.safetensors"),
    }  # fmt: skip
    index = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    for name, (network, config, inputs, file) in parts.items():
        zeros(folder / name / file, network, inputs, stored)
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"} | index))
    return folder


READ = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rgdiff import pretrained
from rgdiff.pretrained import autoencoder, clip, folders, unet

folder, dtype, devices = sys.argv[1], sys.argv[2], int(sys.argv[3])
jnp.ones(8).block_until_ready()

def place(path, shape):
    axis = next((i for i, n in enumerate(shape) if n % devices == 0), None)
    return NamedSharding(mesh, PartitionSpec(*("split" if i == axis else None for i in range(len(shape)))))

mesh = Mesh(np.array(jax.devices()[:devices]), ("split",))
told = lambda name: next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(name))
read = lambda: pretrained.from_diffusers(folder, dtype=jnp.dtype(dtype), sharding=place if devices > 1 else None)
before = told("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
prior = read()
trees = [prior.params, prior.decode.params, *(one.params for one in prior.text.values())]
leaves = [leaf for tree in trees for leaf in jax.tree.leaves(tree)]
size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
shares = [len(leaf.sharding.device_set) for leaf in jax.tree.leaves(prior.params)]
held = max(sum(s.data.nbytes for leaf in jax.tree.leaves(prior.params) for s in leaf.addressable_shards if s.device == d) for d in mesh.devices)
print(json.dumps([size(prior.params), size(trees), told("VmHWM") - before, told("VmRSS") - before, min(shares), held]))
"""


def measure(folder: Path, dtype: str, devices: int = 1) -> Figures:
    """Read a folder in a process of its own."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-c", READ, str(folder), dtype, str(devices)]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False)
    if run.returncode:
        raise RuntimeError(run.stderr[-2000:])
    becomes, params, peak, kept, shares, held = json.loads(run.stdout.splitlines()[-1])
    assert shares == devices and held < 1.05 * becomes / devices, "a leaf is not split"
    file = max(one.stat().st_size for one in folder.rglob("*.safetensors"))
    return Figures(file, becomes, params, peak, kept)


INTRODUCTION = """# Host memory of reading a pipeline

MB. A U-Net in one file, an autoencoder and a text encoder in small ones, all zeros, read by `pretrained.from_diffusers` in a process of
its own. *peak*: of resident memory above what was there before, with the pages of files that are mapped (which the system may take back).
On a CPU the parameters themselves are in host memory, so that the peak is at least theirs; with an accelerator they leave it one by one.
A file that is read in a wider type becomes larger than itself: its ratio is to what it becomes. About 85 MB of every peak are the traced
programs of the networks' shapes, whatever the size.
"""
HEAD = ["| stored | read as | devices | largest file | it becomes | all parameters | peak | of the larger of file and becomes |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip


def row(stored: str, dtype: str, devices: int, found: Figures) -> str:
    numbers = " | ".join(f"{n / MB:.0f}" for n in (found.file, found.becomes, found.params, found.peak))
    ratio = found.peak / max(found.file, found.becomes)
    return f"| {stored} | {dtype} | {devices} | {numbers} | {ratio:.2f} |"


def main() -> None:
    from benchmarks.speed.harness import machine

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=512, help="channels of the U-Net's first stage")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    facts = machine() | {
        "command": f"python {shlex.join(['-m', 'benchmarks.studies.pretrained_load', *sys.argv[1:]])}",
        "date": datetime.date.today().isoformat(),
        "jax": f"{jax.__version__} on {jax.devices()[0].device_kind}",
    }
    lines = [INTRODUCTION, *(f"- {key}: {value}" for key, value in facts.items()), "", *HEAD]
    for stored, dtype, devices in CASES:
        with tempfile.TemporaryDirectory() as place:
            lines.append(
                row(stored, dtype, devices, measure(write(Path(place) / "sd", options.width, stored), dtype, devices))
            )
        print(lines[-1], flush=True)
    options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
