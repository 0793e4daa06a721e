"""PyTorch twin of the published relaxed scheme of DRAKES, over `torch_sequences.ConvNet1D`, in the idiom of PyTorch.

States are soft one-hots [B, L, K + 1], the mask last. The published KL term is zero wherever a state is hard, which is so at
all moves but the last `live`; `Drakes` evaluates it either there alone, from the chain's own logits, or, as released, at
every move, in a second loop over the stored states that calls both networks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.speed.measures import in_mode
from benchmarks.speed.torch_twins import device


class Drakes:
    """The loss of one batch: minus the mean reward plus kl_weight times the published penalty.

    Args:
      denoiser, reference: [B, L, K + 1] -> logits [B, L, K]; the reference has no gradient of its own.
      scorer: [B, L, K] -> [B, L, 1], averaged over positions: the reward.
      rate: [T + 1], the rate of masking at the times of the chain.
      live: moves at the end that are relaxed and keep their gradient.
      released: evaluate the penalty at every move, in a loop of its own.
      remat: checkpoint every relaxed move.
      compiled: compile whole steps, networks and draw, with torch.compile.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        reference: nn.Module,
        scorer: nn.Module,
        rate: Tensor,
        *,
        live: int,
        kl_weight: float,
        temperature: float = 1.0,
        released: bool = False,
        remat: bool = False,
        compiled: bool = False,
        mode: str | None = None,
    ):
        wrap: Callable = (lambda f: in_mode(f, mode, dynamic=False)) if compiled else (lambda f: f)
        self.denoiser, self.reference = denoiser, reference.requires_grad_(False)
        self.scorer = scorer.requires_grad_(False)
        self.moves = [row.unbind() for row in torch.stack([rate[:-1], (rate[1:] / rate[:-1]).log()], 1)]
        self.live, self.kl_weight, self.temperature, self.released = live, kl_weight, temperature, released
        self.hard, self.penalty, self.reward = wrap(self._hard), wrap(self._penalty), wrap(self._reward)
        soft, priced = wrap(self._soft), wrap(self._priced)
        keep = lambda f: lambda *a: checkpoint(f, *a, use_reentrant=False)  # noqa: E731
        self.soft, self.priced = (keep(soft), keep(priced)) if remat else (soft, priced)

    def _noisy(self, logits: Tensor, gumbel: Tensor, log_stay: Tensor) -> Tensor:
        """log q + Gumbel, [B, L, K + 1]: tokens with the probability to move, the mask with that to stay."""
        log_move = torch.log(-torch.expm1(log_stay))
        log_p = F.log_softmax(logits, -1) + log_move
        return torch.cat([log_p, log_stay.expand(*log_p.shape[:-1], 1)], -1) + gumbel

    def _hard(self, x: Tensor, gumbel: Tensor, rate: Tensor, log_stay: Tensor) -> Tensor:
        drawn = self._noisy(self.denoiser(x), gumbel, log_stay).argmax(-1)
        return torch.where(x[..., -1:] > 0.5, F.one_hot(drawn, x.shape[-1]).to(x.dtype), x)

    def _mix(self, x: Tensor, logits: Tensor, gumbel: Tensor, log_stay: Tensor) -> Tensor:
        masked = x[..., -1:]
        drawn = F.softmax(self._noisy(logits, gumbel, log_stay) / self.temperature, -1)
        return (1 - masked) * x + masked * drawn

    def _soft(self, x: Tensor, gumbel: Tensor, rate: Tensor, log_stay: Tensor) -> Tensor:
        return self._mix(x, self.denoiser(x), gumbel, log_stay)

    def _kl(self, x: Tensor, logits: Tensor, others: Tensor, rate: Tensor) -> Tensor:
        """Sum over positions and tokens of c x_k (p'_k - p_k + p_k log(p_k / p'_k)) / rate where the mask prevails, [B]."""
        log_p, log_other = F.log_softmax(logits, -1), F.log_softmax(others, -1)
        p = log_p.exp()
        each = (x[..., :-1] * (log_other.exp() - p + p * (log_p - log_other))).sum(-1)
        undecided = x.argmax(-1) == x.shape[-1] - 1
        return torch.where(undecided, (1 - x[..., -1]) * each, 0.0).sum(-1) / rate

    def _penalty(self, x: Tensor, rate: Tensor) -> Tensor:
        return self._kl(x, self.denoiser(x), self.reference(x), rate)

    def _priced(self, x: Tensor, gumbel: Tensor, rate: Tensor, log_stay: Tensor) -> tuple[Tensor, Tensor]:
        """A relaxed move and its penalty from one prediction."""
        logits = self.denoiser(x)
        return self._mix(x, logits, gumbel, log_stay), self._kl(x, logits, self.reference(x), rate)

    def _reward(self, x: Tensor) -> Tensor:
        """Of the hard tokens, with the gradient of the soft ones."""
        soft = x[..., :-1]
        hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
        return self.scorer(soft + (hard - soft).detach()).mean((1, 2))

    def loss(self, batch: int, length: int, classes: int, gumbel: Tensor | None = None) -> Tensor:
        """`gumbel` [T, B, L, K + 1] replaces PyTorch's own numbers."""
        mask = torch.full((batch, length), classes, device=device())
        x = F.one_hot(mask, classes + 1).float()
        noise = lambda i: -torch.empty_like(x).exponential_().log() if gumbel is None else gumbel[i]  # noqa: E731
        cut, visited, penalties = len(self.moves) - self.live, [], []
        with torch.no_grad():
            for i, row in enumerate(self.moves[:cut]):
                visited.append(x)
                x = self.hard(x, noise(i), *row)
        for i, row in enumerate(self.moves[cut:], cut):
            visited.append(x)
            if self.released:
                x = self.soft(x, noise(i), *row)
            else:
                x, penalty = self.priced(x, noise(i), *row)
                penalties.append(penalty)
        if self.released:
            penalties = [self.penalty(x, row[0]) for x, row in zip(visited, self.moves, strict=True)]
        return (self.kl_weight * torch.stack(penalties).sum(0) - self.reward(x)).mean()
