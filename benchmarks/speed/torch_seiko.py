"""PyTorch twins of the parts of a SEIKO round: a bootstrap ensemble's refit, and reward gradients under two KL anchors.

`Ensemble` is that of `rgdiff.surrogates` with all heads in batched products; `Images` and `Sequences` draw queries and tune, over
`torch_twins.Chain` and `torch_sequences.ConvNet1D`. Random numbers may be given; without them PyTorch draws its own.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.speed.measures import in_mode
from benchmarks.speed.torch_twins import Chain, device

Reward = Callable[[Tensor], Tensor]
Parameters = dict[str, Tensor]


def heads(params: Parameters, x: Tensor) -> Tensor:
    """`rgdiff.nets.ValueMLP` of every head at t = 0, whose embedding is computed once for all rows: [B, D] or [H, B, D] to [H, B]."""
    layer = lambda name, h: torch.baddbmm(params[f"{name}/bias"][:, None], h, params[f"{name}/kernel"])  # noqa: E731
    count, size = params["emb/dense0/kernel"].shape[:2]
    time = torch.arange(size, device=x.device).lt(size // 2).to(x.dtype)  # cosines and sines of 0
    time = time.expand(count, 1, size)
    emb = F.silu(layer("emb/dense1", F.silu(layer("emb/dense0", time))))
    h = x.expand(count, *x.shape[-2:])
    for i in range(sum(name.startswith("dense") and name.endswith("bias") for name in params)):
        h = F.silu(layer(f"dense{i}", h) + emb @ params[f"emb{i}/kernel"])
    return layer("out", h)[..., 0]


class Ensemble:
    """Heads with randomised priors, fitted to answers; the highest head is the optimistic reward.

    Args:
      first, fixed: parameters [H, ...] by name, of the heads before a fit and of the priors.
      prior: the scale of the latter, in standard deviations of the answers.
      clip: largest norm of the gradient of one head.
    """

    def __init__(
        self,
        first: Parameters,
        fixed: Parameters,
        *,
        prior: float,
        rate: float,
        clip: float,
        compiled: bool = False,
        mode: str | None = None,
    ):
        wrap: Callable = (lambda f: in_mode(f, mode)) if compiled else (lambda f: f)
        self.first, self.fixed, self.prior, self.rate, self.clip = first, fixed, prior, rate, clip
        self.heads = wrap(heads)
        self.params, self.offset, self.scale = first, torch.zeros(()), torch.ones(())

    def fit(self, x: Tensor, y: Tensor, rows: Tensor) -> None:
        """Fit every head anew to answers y [N] at x [N, D], one step of AdamW on each of `rows` [steps, H, B]."""
        self.offset, self.scale = y.mean(), y.std(correction=0)
        target = (y - self.offset) / self.scale
        with torch.no_grad():
            target = target - self.prior * self.heads(self.fixed, x)  # [H, N]
        params = {name: p.clone().requires_grad_() for name, p in self.first.items()}
        leaves = list(params.values())
        optimizer = torch.optim.AdamW(leaves, self.rate, weight_decay=0.0, fused=True)
        for row in rows:
            optimizer.zero_grad(set_to_none=True)
            (self.heads(params, x[row]) - target.gather(1, row)).square().mean(-1).sum().backward()
            grads: list[Any] = [p.grad for p in leaves]
            norm = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0).sqrt()
            shrink = (self.clip / norm).clamp(max=1.0)
            for g in grads:
                g.mul_(shrink.view(-1, *[1] * (g.ndim - 1)))
            optimizer.step()
        self.params = {name: p.detach() for name, p in params.items()}

    def standardised(self, x: Tensor) -> Tensor:
        """What every head predicts, in deviations of the answers: [B, D] to [H, B]."""
        return self.heads(self.params, x) + self.prior * self.heads(self.fixed, x)

    def upper(self, x: Tensor) -> Tensor:
        return self.offset + self.scale * self.standardised(x).amax(0)


class Tuning(abc.ABC):
    """What both kinds of chain share: the networks, and the inner steps of a round.

    Args:
      net, anchors: the tuned network and those that are not to be left, the pre-trained and the last round's.
      weights: of the KL to each anchor, in the reward's unit per nat.
      optimizer: options of AdamW; clip: largest norm of the gradient.
    """

    def __init__(
        self,
        net: nn.Module,
        anchors: Sequence[nn.Module],
        weights: Sequence[float],
        optimizer: dict[str, Any],
        clip: float,
    ):
        self.net, self.anchors, self.weights = net, [anchor.requires_grad_(False) for anchor in anchors], weights
        self.optimizer, self.clip = optimizer, clip

    def restart(self) -> None:
        """Make the last round's model the current one."""
        self.net.load_state_dict(self.anchors[-1].state_dict())

    @abc.abstractmethod
    def features(self, x0: Tensor) -> Tensor:
        """What the ensemble sees of samples, [B, D]."""

    @abc.abstractmethod
    def queries(self, count: int, **given: Tensor) -> Tensor:
        """Draw from the current model."""

    @abc.abstractmethod
    def loss(self, batch: int, reward: Reward, **given: Tensor) -> Tensor:
        """Minus the objective of one batch, a mean."""

    def improve(self, steps: int, batch: int, reward: Reward) -> None:
        """Take `steps` of a new optimiser."""
        parameters = list(self.net.parameters())
        optimizer = torch.optim.AdamW(parameters, **self.optimizer, weight_decay=0.0, fused=True)
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            self.loss(batch, reward).backward()
            nn.utils.clip_grad_norm_(parameters, self.clip)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)


class Images(Tuning):
    """DRaFT-K under path KL to both anchors; calls before the last `live` pay theirs at constant states.

    Args:
      table, compiled, mode: of `Chain`; all networks predict v. shape: of one image, [C, H, W].
    """

    def __init__(
        self,
        net: nn.Module,
        anchors: Sequence[nn.Module],
        *shared: Any,
        table: np.ndarray,
        shape: tuple[int, ...],
        live: int,
        compiled: bool = False,
        mode: str | None = None,
    ):
        super().__init__(net, anchors, *shared)
        self.chain, *self.others = (Chain(one, table, compiled, mode, "v") for one in (net, *anchors))
        _, alpha, sigma, alpha_s, std, direction = np.asarray(table, np.float64).T
        # KL = price |x0 - x0'|^2; of the last call, which draws nothing, half its signal-to-noise ratio
        price = 0.5 * ((alpha_s - direction * alpha / sigma)[:-1] / std[:-1]) ** 2
        self.prices = [*price.tolist(), float(0.5 * (alpha[-1] / sigma[-1]) ** 2)]
        self.shape, self.cut = shape, len(self.prices) - live

    def _start(self, batch: int) -> Tensor:
        return torch.randn(batch, *self.shape, device=device())

    def features(self, x0: Tensor) -> Tensor:
        return x0.flatten(1)

    def queries(self, count: int, x: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        return self.chain.ancestral(self._start(count) if x is None else x, noise).clone()  # out of inference mode

    def loss(self, batch: int, reward: Reward, x: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        chain, x = self.chain, self._start(batch) if x is None else x
        paid, last, x0 = torch.zeros(batch, device=x.device), len(self.prices) - 1, x
        for i, row in enumerate(chain.rows):
            live = i >= self.cut
            x0 = chain.predict(x, *row[:3])
            with torch.set_grad_enabled(x.requires_grad):
                anchors = [other.predict(x, *row[:3]) for other in self.others]
            for weight, anchor in zip(self.weights, anchors, strict=True):
                paid = paid + weight * self.prices[i] * (x0 - anchor).square().sum((1, 2, 3))
            if i < last:
                z = torch.randn_like(x) if noise is None else noise[i]
                x = chain.kernel(x, x0 if live else x0.detach(), row) + row[4] * z
        return (paid - reward(x0)).mean()


class Sequences(Tuning):
    """The score function with sampled log-ratios (the log-variance gradient) on chains that unmask one position a move.

    Networks map one-hot states [B, L, K + 1], the mask last, to logits [B, L, K]. Samples are tokens [B, L].
    """

    def __init__(self, *shared: Any, length: int, classes: int, compiled: bool = False, mode: str | None = None):
        super().__init__(*shared)
        wrap: Callable = (lambda f: in_mode(f, mode, dynamic=False)) if compiled else (lambda f: f)
        self.length, self.classes = length, classes
        self.predict, *self.others = (wrap(one) for one in (self.net, *self.anchors))

    def _masked(self, batch: int) -> Tensor:
        return torch.full((batch, self.length), self.classes, device=device())

    def _move(
        self, x: Tensor, logits: Tensor, place: Tensor | None, token: Tensor | None
    ) -> tuple[Tensor, Any, Tensor]:
        """The state after an event, and which position [B] took which token [B]."""
        scores = -torch.empty(x.shape, device=x.device).exponential_().log() if place is None else place
        at = torch.arange(len(x), device=x.device), scores.masked_fill(x != self.classes, -torch.inf).argmax(1)
        noise = -torch.empty(logits[at].shape, device=x.device).exponential_().log() if token is None else token[at]
        drawn = (logits.detach()[at] + noise).argmax(-1)
        return x.index_put(at, drawn), at, drawn

    def features(self, x0: Tensor) -> Tensor:
        return F.one_hot(x0, self.classes).float().flatten(1)

    def queries(self, count: int, place: Tensor | None = None, token: Tensor | None = None) -> Tensor:
        """`place` [L, B, L] and `token` [L, B, L, K] are Gumbel numbers of every move."""
        x, given = self._masked(count), (lambda noise, i: None if noise is None else noise[i])
        with torch.inference_mode():
            for i in range(self.length):
                x = self._move(x, self.predict(self._one_hot(x)), given(place, i), given(token, i))[0]
        return x.clone()

    def loss(self, batch: int, reward: Reward, place: Tensor | None = None, token: Tensor | None = None) -> Tensor:
        """A surrogate with the right gradient; `reward` takes tokens."""
        x, given = self._masked(batch), (lambda noise, i: None if noise is None else noise[i])
        log_p, cost = torch.zeros(batch, device=x.device), torch.zeros(batch, device=x.device)
        for i in range(self.length):
            state = self._one_hot(x)
            logits = self.predict(state)
            x, at, drawn = self._move(x, logits, given(place, i), given(token, i))
            of = lambda logits: -F.cross_entropy(logits[at], drawn, reduction="none")  # noqa: B023, E731
            each = of(logits)
            with torch.no_grad():
                for weight, other in zip(self.weights, self.others, strict=True):
                    cost = cost + weight * (each - of(other(state)))
            log_p = log_p + each
        with torch.no_grad():
            paid = reward(x) - cost
            advantage = paid - (paid.sum() - paid) / max(batch - 1, 1)
        return -(advantage * log_p).mean()

    def _one_hot(self, x: Tensor) -> Tensor:
        return F.one_hot(x, self.classes + 1).float()
