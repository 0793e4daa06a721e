"""PyTorch twins of our U-Net, samplers and tuner: the same arithmetic, in the idiom of PyTorch.

`UNet` takes the parameters of `rgdiff.nets.UNet` (without attention and classes) through `load_linen`; `Chain` holds
the coefficients of a Gaussian process and its steps. Random numbers may be given, so that both sides can be compared
to rounding; without them PyTorch draws its own. Coefficients come from `rgdiff` as numbers; nothing else is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.speed.measures import in_mode

GROUPS = 8


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d}


class ResBlock(nn.Module):
    def __init__(self, inputs: int, features: int, embedding: int, axes: int = 2):
        super().__init__()
        conv, self.shape = CONVOLUTIONS[axes], (..., *(None,) * axes)
        self.norm1 = nn.GroupNorm(GROUPS, inputs)
        self.conv1 = conv(inputs, features, 3, padding=1)
        self.emb = nn.Linear(embedding, 2 * features)
        self.norm2 = nn.GroupNorm(GROUPS, features)
        self.conv2 = conv(features, features, 3, padding=1)
        self.skip = conv(inputs, features, 1) if inputs != features else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.emb(F.silu(emb))[self.shape].chunk(2, dim=1)
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.skip(x) + h


class Embedding(nn.Module):
    frequencies: Tensor

    def __init__(self, features: int, size: int):
        super().__init__()
        self.register_buffer("frequencies", 10000.0 ** (-torch.arange(size // 2) / (size // 2)), persistent=False)
        self.dense0 = nn.Linear(size, features)
        self.dense1 = nn.Linear(features, features)

    def forward(self, t: Tensor) -> Tensor:
        angles = 1000.0 * t[:, None] * self.frequencies
        h = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)
        return self.dense1(F.silu(self.dense0(h)))


class UNet(nn.Module):
    """`rgdiff.nets.UNet` in PyTorch: [B, C, H, W], or [B, C, L] with one axis, and times [B] to the same shape."""

    def __init__(
        self, channels: tuple[int, ...] = (32, 64, 64), blocks: int = 1, image_channels: int = 1, axes: int = 2
    ):
        super().__init__()
        conv = CONVOLUTIONS[axes]
        self.channels, self.blocks, first = channels, blocks, channels[0]
        self.emb = Embedding(4 * first, first)
        self.conv_in = conv(image_channels, first, 3, padding=1)
        last, width, skips = len(channels) - 1, first, [first]
        parts = {}
        for level, features in enumerate(channels):
            for i in range(blocks):
                parts[f"down{level}_res{i}"] = ResBlock(width, features, 4 * first, axes)
                width = features
                skips.append(width)
            if level < last:
                parts[f"down{level}_half"] = conv(width, features, 3, stride=2, padding=1)
                skips.append(width)
        for name in ("mid_res0", "mid_res1"):
            parts[name] = ResBlock(width, width, 4 * first, axes)
        for level in reversed(range(last + 1)):
            for i in range(blocks + 1):
                parts[f"up{level}_res{i}"] = ResBlock(width + skips.pop(), channels[level], 4 * first, axes)
                width = channels[level]
            if level > 0:
                parts[f"up{level}_double"] = conv(width, width, 3, padding=1)
        self.parts = nn.ModuleDict(parts)
        self.norm_out = nn.GroupNorm(GROUPS, width)
        self.conv_out = conv(width, image_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb = self.emb(t)
        h = self.conv_in(x)
        skips, last, parts = [h], len(self.channels) - 1, self.parts
        for level in range(last + 1):
            for i in range(self.blocks):
                h = parts[f"down{level}_res{i}"](h, emb)
                skips.append(h)
            if level < last:
                h = parts[f"down{level}_half"](h)
                skips.append(h)
        h = parts["mid_res1"](parts["mid_res0"](h, emb), emb)
        for level in reversed(range(last + 1)):
            for i in range(self.blocks + 1):
                h = parts[f"up{level}_res{i}"](torch.cat([h, skips.pop()], dim=1), emb)
            if level > 0:
                h = parts[f"up{level}_double"](F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(h)))


def _names(params: dict[str, Any]) -> Iterator[tuple[str, np.ndarray, str]]:
    """Yield (PyTorch name, our array, our name) for every leaf of a Linen network."""

    def walk(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
        if isinstance(tree, dict):
            for name in sorted(tree):
                yield from walk(tree[name], (*path, name))
        else:
            yield path, np.asarray(tree)

    for path, leaf in walk(params, ()):
        *parts, kind = path
        if parts[0] not in ("emb", "conv_in", "conv_out", "norm_out"):
            parts = ["parts", *parts]
        yield ".".join([*parts, "bias" if kind == "bias" else "weight"]), leaf, "/".join(path)


def _to_torch(leaf: np.ndarray, shape: torch.Size) -> np.ndarray:
    if leaf.ndim > 2:
        return np.moveaxis(leaf, (-1, -2), (0, 1))  # HWIO -> OIHW, WIO -> OIW
    return leaf.T.reshape(shape) if leaf.ndim == 2 else leaf  # Dense [I, O] -> Linear [O, I] or 1x1 convolution


@torch.no_grad()
def load_linen(net: nn.Module, params: dict[str, Any]) -> nn.Module:
    """Copy the parameters of a Linen network; every parameter on both sides must find its partner."""
    own = dict(net.named_parameters())
    for name, leaf, ours in _names(params):
        if name not in own:
            raise ValueError(f"no PyTorch parameter {name} for {ours}")
        target = own.pop(name)
        value = _to_torch(leaf, target.shape)
        if value.shape != tuple(target.shape):
            raise ValueError(f"{ours} {leaf.shape} does not fit {name} {tuple(target.shape)}")
        target.copy_(torch.tensor(np.ascontiguousarray(value)))
    if own:
        raise ValueError(f"PyTorch parameters without a partner: {sorted(own)}")
    return net


def in_our_order(net: nn.Module, params: dict[str, Any], read: Callable[[Tensor], Any]) -> list[np.ndarray]:
    """Return `read` of every parameter (itself, or its gradient) in the layout and order of the Linen tree's leaves."""
    own, out = dict(net.named_parameters()), []
    for name, leaf, _ in _names(params):
        value = read(own[name]).detach().cpu().numpy()
        if leaf.ndim > 2:
            value = np.moveaxis(value, (0, 1), (-1, -2))  # OIHW -> HWIO, OIW -> WIO
        elif leaf.ndim == 2:
            value = value.reshape(value.shape[:2]).T
        out.append(value.reshape(leaf.shape))
    return out


class Chain:
    """The moves of a Gaussian chain for a network that predicts eps or v; images are [B, C, H, W].

    Args:
      net: (x, t) -> eps, or v where `prediction` says so (variance-preserving schedules).
      table: [T, 6], one row a network call: t, alpha_t, sigma_t, then alpha_s, std of the step and what is left of
        sigma_s for the direction; the last row projects to data and its three last numbers are not used.
      compiled: compile one whole step, network and kernel, with torch.compile.
    """

    def __init__(
        self,
        net: nn.Module,
        table: np.ndarray,
        compiled: bool = False,
        mode: str | None = None,
        prediction: str = "eps",
    ):
        self.net, self.prediction = net, prediction
        self.rows = [row.unbind() for row in torch.tensor(table, dtype=torch.float32, device=device())]
        wrap = (lambda f: in_mode(f, mode, dynamic=False)) if compiled else (lambda f: f)
        self.predict, self.move, self.move_ode = wrap(self._predict), wrap(self._move), wrap(self._move_ode)
        self.kernel = self._kernel  # a dozen elementwise operations on one state

    def _predict(self, x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        out = self.net(x, t.expand(x.shape[0]))
        return (x - sigma * out) / alpha if self.prediction == "eps" else alpha * x - sigma * out

    def _kernel(self, x: Tensor, x0: Tensor, row: tuple[Tensor, ...]) -> Tensor:
        _, alpha, sigma, alpha_s, _, direction = row
        return alpha_s * x0 + direction * ((x - alpha * x0) / sigma)

    def _move(self, x: Tensor, noise: Tensor, *row: Tensor) -> Tensor:
        return self._kernel(x, self._predict(x, *row[:3]), row) + row[4] * noise

    def _move_ode(self, x: Tensor, *row: Tensor) -> Tensor:
        return self._kernel(x, self._predict(x, *row[:3]), row)

    def ancestral(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Sample from x_T; `noise` [T - 1, B, ...] replaces PyTorch's own."""
        with torch.inference_mode():
            for i, row in enumerate(self.rows[:-1]):
                x = self.move(x, torch.randn_like(x) if noise is None else noise[i], *row)
            return self.predict(x, *self.rows[-1][:3])

    def svdd(
        self,
        x: Tensor,
        reward: Callable[[Tensor], Tensor],
        candidates: int,
        temperature: float,
        reuse: bool,
        noise: Tensor | None = None,
        gumbel: Tensor | None = None,
    ) -> Tensor:
        """SVDD-PM: draw M candidates a move, keep one in proportion to exp(r(x0)/tau).

        `reuse` keeps the winner's prediction for the next move (M network calls a move); without it the network is
        called again on the winner (M + 1), as straightforward code does. noise is [T - 1, M, B, ...] and gumbel
        [T - 1, M, B].
        """
        batch = x.shape[0]
        with torch.inference_mode():
            prediction = self.predict(x, *self.rows[0][:3]) if reuse else x  # without reuse: never read
            for i, row in enumerate(self.rows[:-1]):
                x0 = prediction if reuse else self.predict(x, *row[:3])
                z = torch.randn(candidates, *x.shape, device=x.device) if noise is None else noise[i]
                y = self.kernel(x, x0, row) + row[4] * z
                predictions = self.predict(y.flatten(0, 1), *self.rows[i + 1][:3])
                logits = reward(predictions).view(candidates, batch) / temperature
                g = -torch.empty_like(logits).exponential_().log() if gumbel is None else gumbel[i]
                winner = (logits + g).argmax(0), torch.arange(batch, device=x.device)
                x = y[winner]
                prediction = predictions.view(y.shape)[winner]
            return prediction if reuse else self.predict(x, *self.rows[-1][:3])

    def draft_loss(self, x: Tensor, reward: Callable[[Tensor], Tensor], live: int, remat: bool) -> Tensor:
        """Minus the mean reward of DDIM samples, with gradients through the last `live` network calls."""
        move, predict = self.move_ode, self.predict
        cut = len(self.rows) - live
        with torch.no_grad():
            for row in self.rows[: min(cut, len(self.rows) - 1)]:
                x = move(x, *row)
        if remat:
            move = lambda *a: checkpoint(self.move_ode, *a, use_reentrant=False)  # noqa: E731
            predict = lambda *a: checkpoint(self.predict, *a, use_reentrant=False)  # noqa: E731
        for row in self.rows[cut:-1]:
            x = move(x, *row)  # type: ignore[arg-type]
        return -reward(predict(x, *self.rows[-1][:3])).mean()  # type: ignore[arg-type]


def reward(x0: Tensor) -> Tensor:
    """The toy reward of `benchmarks.speed.rows.reward`: left-right symmetry, and a mean square near 1/4."""
    asymmetry = (x0 - x0.flip(3)).square().mean((1, 2, 3))
    return -asymmetry - (x0.square() - 0.25).square().mean((1, 2, 3))


def images(x: np.ndarray) -> Tensor:
    """[..., B, H, W, C] to [..., B, C, H, W] on the device."""
    return torch.tensor(np.ascontiguousarray(np.moveaxis(x, -1, -3)), device=device())
