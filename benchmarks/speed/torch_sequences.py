"""PyTorch twins of our convolutional network for sequences and of SVDD on masked sequences, in the idiom of PyTorch.

`ConvNet1D` takes the parameters of `rgdiff.nets.ConvNet1D` (without time and classes) through `torch_twins.load_linen`;
`Decoder` holds the two networks and the chain. States are integer tokens [B, L], the mask last. Random numbers may be
given, so that both sides can be compared choice by choice; without them PyTorch draws its own.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.speed.measures import in_mode
from benchmarks.speed.torch_twins import device


class Conv(nn.Conv1d):
    """A convolution of [B, L, I] that keeps the length.

    Args:
      channels_last: run as a two-dimensional convolution in the channels-last layout, for which oneDNN has faster
        dilated kernels on a CPU; otherwise nn.Conv1d between two transpositions, as the released network has it.
    """

    def __init__(self, inputs: int, features: int, kernel: int, dilation: int = 1, channels_last: bool = False):
        super().__init__(inputs, features, kernel, dilation=dilation, padding=(kernel - 1) // 2 * dilation)
        self.channels_last = channels_last
        if channels_last:
            self.weight.data = self.weight.data.transpose(1, 2).contiguous().transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        if not self.channels_last:
            return super().forward(x).transpose(1, 2)
        padding, dilation = (0, int(self.padding[0])), (1, self.dilation[0])
        y = F.conv2d(x[:, :, None], self.weight[:, :, None], self.bias, padding=padding, dilation=dilation)
        return y[:, :, 0].transpose(1, 2)


class Embedding(nn.Module):
    """What is left of the time without time conditioning: a layer on the features of t = 0, (1, ..., 1, 0, ..., 0)."""

    features: Tensor

    def __init__(self, width: int, size: int = 128):
        super().__init__()
        self.register_buffer("features", torch.arange(size).lt(size // 2).float(), persistent=False)
        self.dense0 = nn.Linear(size, width)

    def forward(self) -> Tensor:
        return F.relu(self.dense0(self.features))


class ConvNet1D(nn.Module):
    """`rgdiff.nets.ConvNet1D` in PyTorch: [B, L, inputs] to [B, L, out]."""

    def __init__(
        self, inputs: int, out: int, width: int, dilations: tuple[int, ...], kernel: int, channels_last: bool = False
    ):
        super().__init__()
        self.layers = len(dilations)
        self.emb = Embedding(width)
        self.conv_in = Conv(inputs, width, kernel, channels_last=channels_last)
        parts = {}
        for i, dilation in enumerate(dilations):
            parts[f"emb{i}"] = nn.Linear(width, width)
            parts[f"norm{i}"] = nn.LayerNorm(width)
            parts[f"conv{i}"] = Conv(width, width, kernel, dilation, channels_last)
        self.parts = nn.ModuleDict(parts | {"head": nn.Linear(width, width), "out": nn.Linear(width, out)})

    def forward(self, x: Tensor) -> Tensor:
        emb, h, parts = self.emb(), F.relu(self.conv_in(x)), self.parts
        for i in range(self.layers):
            h = h + F.relu(parts[f"conv{i}"](parts[f"norm{i}"](h + parts[f"emb{i}"](emb))))
        return parts["out"](F.relu(parts["head"](h)))


class Decoder:
    """SVDD with the best candidate kept, on masked sequences.

    Args:
      denoiser: [R, L, K + 1] -> logits [R, L, K].
      scorer: [R, L, K] -> [R, L, 1], averaged over positions: the reward, and the value of SVDD-MC. The mask is a row of zeros.
      moving: [T], the probability that a masked position moves.
      plug_in: SVDD-PM (the reward of the most probable sequence) instead of SVDD-MC (the scorer on the candidate).
      compiled: compile both networks with torch.compile.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        scorer: nn.Module,
        moving: np.ndarray,
        classes: int,
        *,
        plug_in: bool,
        compiled: bool = False,
        mode: str | None = None,
    ):
        wrap: Callable = (lambda f: in_mode(f, mode, dynamic=False)) if compiled else (lambda f: f)
        self.denoiser, self.scorer = wrap(denoiser), wrap(scorer)
        self.moving, self.mask, self.plug_in = [float(p) for p in moving], classes, plug_in

    def _predict(self, x: Tensor) -> Tensor:
        return self.denoiser(F.one_hot(x, self.mask + 1).float())

    def _score(self, x: Tensor) -> Tensor:
        return self.scorer(F.one_hot(x, self.mask + 1)[..., :-1].float()).mean((1, 2))

    def _evaluate(self, y: Tensor, last: bool) -> tuple[Tensor, Tensor | None]:
        """Values [R] of candidates [R, L] and, where they were needed, the logits behind them."""
        if not self.plug_in or last:
            return self._score(y), None
        logits = self._predict(y)
        return self._score(torch.where(y == self.mask, logits.argmax(-1), y)), logits

    def svdd(
        self,
        batch: int,
        length: int,
        candidates: int,
        *,
        reuse: bool,
        loop: bool,
        uniform: Tensor | None = None,
        gumbel: Tensor | None = None,
        path: Tensor | None = None,
    ) -> Tensor:
        """Decode `batch` sequences and return their tokens after every move, [T, B, L].

        Args:
          reuse: SVDD-PM keeps the winner's logits for the next move (M calls of the denoiser a move); without it the
            denoiser is called again on the winner and on finished candidates too (M + 1), as the released code does.
          loop: call the networks for one candidate of each sequence after another, as the released code does, instead
            of once on all.
          uniform, gumbel: [T, M, B, L] and [T, M, B, L, K], in place of PyTorch's own.
          path: [T, B, L], states to go on from after every move instead of the chosen ones, so that a tie that rounding
            breaks otherwise is one other choice, not another chain. Where all choices are these, the chains are equal.
        """
        x = torch.full((batch, length), self.mask, device=device())
        rows, chosen, logits = torch.arange(batch, device=x.device), [], None
        with torch.inference_mode():
            for i, moving in enumerate(self.moving):
                if logits is None or not reuse:
                    logits = self._predict(x)
                shape = (candidates, *logits.shape)
                g = -torch.empty(shape, device=x.device).exponential_().log() if gumbel is None else gumbel[i]
                u = torch.rand(shape[:-1], device=x.device) if uniform is None else uniform[i]
                y = torch.where((x == self.mask) & (u < moving), (logits + g).argmax(-1), x)
                last = reuse and i + 1 == len(self.moving)
                if loop:
                    pieces = [self._evaluate(candidate, last) for candidate in y]
                    values, winners = torch.stack([piece[0] for piece in pieces]), None
                else:
                    flat, predictions = self._evaluate(y.flatten(0, 1), last)
                    values, winners = flat.view(candidates, batch), predictions
                best = values.argmax(0)
                x = y[best, rows]
                logits = None if winners is None else winners.view(shape)[best, rows]
                chosen.append(x)
                if path is not None and not x.equal(path[i]):
                    x, logits = path[i], None
        return torch.stack(chosen)
