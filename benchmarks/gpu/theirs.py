"""PyTorch's side: the same networks under bfloat16 autocast, channels_last, scaled_dot_product_attention; eager or torch.compile.

Chains and losses are those of `benchmarks.speed`'s twins; here are attention, the DiT and LoRA. A process of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.gpu.work import CANDIDATES, RANK, RATE, RENOISED, TEMPERATURE, Work
from benchmarks.speed import torch_tuners, torch_twins
from benchmarks.speed.torch_twins import GROUPS, device


class Attention(nn.Module):
    """`rgdiff.nets.unet.AttentionBlock`: heads of 32 channels over all positions."""

    def __init__(self, features: int):
        super().__init__()
        self.heads = features // 32 if features % 32 == 0 else 1
        self.norm, self.qkv = nn.GroupNorm(GROUPS, features), nn.Linear(features, 3 * features)
        self.out = nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        batch, features, *space = x.shape
        h = self.norm(x).flatten(2).transpose(1, 2)
        parts = self.qkv(h).view(batch, -1, 3, self.heads, features // self.heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(*parts.unbind(0)).transpose(1, 2).reshape(batch, -1, features)
        return x + self.out(h).transpose(1, 2).view(batch, features, *space)


class AttentiveBlock(nn.Module):
    """A residual block, then attention."""

    def __init__(self, block: nn.Module, features: int):
        super().__init__()
        self.block, self.attention = block, Attention(features)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.attention(self.block(x, emb))


def unet(
    shape: tuple[int, ...], channels: tuple[int, ...], blocks: int = 1, attention: tuple[int, ...] = ()
) -> nn.Module:
    """The twin of `rgdiff.nets.UNet`, with attention at some levels."""
    net = torch_twins.UNet(channels, blocks, shape[-1])
    last = len(channels) - 1
    names = [
        f"{way}{level}_res{i}"
        for level in attention
        for way, more in (("down", 0), ("up", 1))
        for i in range(blocks + more)
    ]
    names += ["mid_res0"] if last in attention else []
    for name in names:
        level = last if name.startswith("mid") else int(name[name.index("_") - 1])
        net.parts[name] = AttentiveBlock(net.parts[name], channels[level])
    return net


def unet_names(params: dict[str, Any]) -> dict[str, Any]:
    """Rename the attention blocks of our parameters to where this twin has them."""
    out: dict[str, Any] = {}
    for name, value in params.items():
        if "_attn" in name:
            owner = "mid_res0" if name.startswith("mid") else name.replace("_attn", "_res")
            out[owner] = {"block": params[owner], "attention": value}
    return {name: value for name, value in params.items() if "_attn" not in name} | out


class DiTBlock(nn.Module):
    """`rgdiff.nets.transformer.Block`."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.mod, self.qkv = heads, nn.Linear(width, 6 * width), nn.Linear(width, 3 * width)
        self.out, self.up, self.down = nn.Linear(width, width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h: Tensor, emb: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        scale1, shift1, gate1, scale2, shift2, gate2 = self.mod(F.silu(emb))[:, None].chunk(6, -1)
        norm = lambda x, scale, shift: F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift  # noqa: E731
        q, k, v = (a.view(*h.shape[:2], self.heads, -1) for a in self.qkv(norm(h, scale1, shift1)).chunk(3, -1))
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        mixed = (
            F.scaled_dot_product_attention(*(a.transpose(1, 2) for a in (q, k, v.to(q.dtype))))
            .transpose(1, 2)
            .reshape(h.shape)
        )
        h = h + gate1 * self.out(mixed)
        return h + gate2 * self.down(F.gelu(self.up(norm(h, scale2, shift2)), approximate="tanh"))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rgdiff.nets.transformer.rotary` on two axes: cos and sin are [T, 2, pairs]."""
    a, b = x.view(*x.shape[:-1], 2, 2, -1).unbind(-2)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -2).view(x.shape)


class DiT(nn.Module):
    """`rgdiff.nets.DiT` in PyTorch: [B, C, H, W] and times [B] to the same shape."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: tuple[int, ...], patch: int, width: int, depth: int, heads: int):
        super().__init__()
        high, wide, channels = shape[0] // patch, shape[1] // patch, shape[2]
        self.patch, self.grid, size = patch, (high, wide), patch * patch * channels
        self.emb = torch_twins.Embedding(width, 64)
        self.enter, self.mod, self.out = nn.Linear(size, width), nn.Linear(width, 2 * width), nn.Linear(width, size)
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        pairs = width // heads // 4
        places = torch.stack(torch.meshgrid(torch.arange(high), torch.arange(wide), indexing="ij"), -1).view(-1, 2)
        angles = places[:, :, None] * 10000.0 ** (-torch.arange(pairs) / pairs)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        batch, channels, p, (high, wide) = *x.shape[:2], self.patch, self.grid
        tokens = x.view(batch, channels, high, p, wide, p).permute(0, 2, 4, 3, 5, 1).reshape(batch, high * wide, -1)
        emb, h = self.emb(t), self.enter(tokens)
        for block in self.blocks:
            h = block(h, emb, self.cos, self.sin)
        scale, shift = self.mod(F.silu(emb))[:, None].chunk(2, -1)
        h = self.out(F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        return h.view(batch, high, wide, p, p, channels).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


@torch.no_grad()
def load_dit(net: DiT, params: dict[str, Any]) -> DiT:
    """Copy the parameters of ours; every one on both sides must find its partner."""
    own = dict(net.named_parameters())

    def walk(tree: Any, path: tuple[str, ...]) -> None:
        if isinstance(tree, dict):
            for name, value in tree.items():
                walk(value, (*path, name))
            return
        *parts, kind = [{"in": "enter"}.get(part, part) for part in path[1:]]
        parts = [f"blocks.{part[5:]}" if part.startswith("block") else part for part in parts]
        own.pop(".".join([*parts, "bias" if kind == "bias" else "weight"])).copy_(
            torch.tensor(np.asarray(tree).T.copy())
        )

    walk(params, ())
    if own:
        raise ValueError(f"PyTorch parameters without a partner: {sorted(own)}")
    return net


def network(work: Work) -> nn.Module:
    return (unet if work.kind == "unet" else DiT)(work.shape, **work.options)


def loaded(work: Work, params: dict[str, Any]) -> nn.Module:
    """The network with our parameters."""
    net = network(work)
    return torch_twins.load_linen(net, unet_names(params)) if work.kind == "unet" else load_dit(net, params)


class LowRank(nn.Module):
    """weight + (a b), reshaped: an adapter that is merged at every use, as ours."""

    def __init__(self, weight: Tensor):
        super().__init__()
        out = weight.shape[0]
        self.a = nn.Parameter(torch.randn(RANK, weight.numel() // out, device=weight.device) / RANK)
        self.b = nn.Parameter(torch.zeros(out, RANK, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.b @ self.a).view(weight.shape)


def adapted(net: nn.Module) -> list[nn.Parameter]:
    """Freeze a network and put an adapter on every kernel; returns what is trained."""
    net.requires_grad_(False)
    for module in list(net.modules()):
        if isinstance(module, nn.Linear | nn.Conv2d):
            parametrize.register_parametrization(module, "weight", LowRank(module.weight))
    return [p for p in net.parameters() if p.requires_grad]


class Half(nn.Module):
    """A network under autocast to bfloat16, in channels_last; returns float32."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.net(x, t).float()


class Side:
    """A network's rows, as `benchmarks.gpu.ours.Side`."""

    def __init__(self, work: Work, coefficients: dict[str, np.ndarray], compiled: bool):
        self.work, self.coefficients, self.compiled = work, coefficients, compiled
        self.mode = "reduce-overhead" if torch.cuda.is_available() else None  # CUDA graphs
        self.net = network(work).to(device(), memory_format=torch.channels_last)
        self.trained: list[nn.Parameter] | None = None
        self.made: dict[str, Any] = {}

    def start(self) -> Tensor:
        high, wide, channels = self.work.shape
        x = torch.randn(self.work.batch, channels, high, wide, device=device())
        return x.to(memory_format=torch.channels_last)

    def build(self, row: str) -> Any:
        work = self.work
        table = self.coefficients["eta0" if row.startswith("draft") else "eta1"]
        if row not in ("ancestral", "svdd") and self.trained is None:
            self.trained = adapted(self.net)
        chain = torch_twins.Chain(Half(self.net), table, self.compiled, self.mode, "v")
        if row == "ancestral":
            return lambda: chain.ancestral(self.start())
        if row == "svdd":
            return lambda: chain.svdd(self.start(), torch_twins.reward, CANDIDATES, TEMPERATURE, True)
        adam = torch.optim.AdamW(self.trained, RATE, fused=True)
        if row == "ddpo":
            policy = torch_tuners.Ddpo(chain, self.compiled, self.mode)
            loss = lambda: policy.backward(self.start(), torch_twins.reward)  # noqa: E731
        elif row == "draft_lv":
            loss = lambda: torch_tuners.draft_lv_loss(chain, self.start(), torch_twins.reward, RENOISED).backward()  # noqa: E731
        else:
            live = int(row[-1])
            loss = lambda: chain.draft_loss(self.start(), torch_twins.reward, live, work.remat).backward()  # noqa: E731

        def step() -> None:
            adam.zero_grad(set_to_none=True)
            loss()
            adam.step()

        return step

    def run(self, row: str) -> None:
        if row not in self.made:
            self.made[row] = self.build(row)
        self.made[row]()

    def wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def drop(self, row: str) -> None:
        self.made.pop(row, None)
        torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def memory() -> float | None:
    return float(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else None
