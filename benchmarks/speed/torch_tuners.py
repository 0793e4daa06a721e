"""PyTorch twins of tuners on images: DRaFT-LV, ReFL and DDPO over `torch_twins.Chain`, in the idiom of PyTorch.

Calls without a gradient run under no_grad. AlignProp with a given suffix is `Chain.draft_loss` with checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.speed.measures import in_mode
from benchmarks.speed.torch_twins import Chain

Reward = Callable[[Tensor], Tensor]


def _until(chain: Chain, x: Tensor, call: int) -> Tensor:
    """The state before a call, without gradients."""
    with torch.no_grad():
        for row in chain.rows[:call]:
            x = chain.move_ode(x, *row)
    return x


def refl_loss(chain: Chain, x: Tensor, reward: Reward, call: int) -> Tensor:
    """Minus the mean reward of what one call predicts; nothing runs after it."""
    return -reward(chain.predict(_until(chain, x, call), *chain.rows[call][:3])).mean()


def draft_lv_loss(chain: Chain, x: Tensor, reward: Reward, n: int, noise: Tensor | None = None) -> Tensor:
    """Minus the sum of the rewards of the last prediction and of n noisings of it, predicted in one batch; `noise` [n, B, ...]."""
    last = chain.rows[-1][:3]
    _, alpha, sigma = last
    x0 = chain.predict(_until(chain, x, len(chain.rows) - 1), *last)
    z = torch.randn(n, *x.shape, device=x.device) if noise is None else noise
    again = chain.predict((alpha * x0.detach() + sigma * z).flatten(0, 1), *last)
    return -(reward(x0).sum() + reward(again).sum()) / x.shape[0]


class Ddpo:
    """DDPO's score function on one batch of ancestral chains; the gradients of the moves are accumulated one by one.

    Every move is an action, the projection at the end is none. The advantage is the reward less the mean of the others'.
    """

    def __init__(self, chain: Chain, compiled: bool = False, mode: str | None = None):
        self.chain = chain
        self.surrogate = in_mode(self._surrogate, mode, dynamic=False) if compiled else self._surrogate

    def _surrogate(self, x: Tensor, y: Tensor, advantage: Tensor, *row: Tensor) -> Tensor:
        chain = self.chain
        law = torch.distributions.Normal(chain.kernel(x, chain._predict(x, *row[:3]), row), row[4], validate_args=False)
        return -(advantage * law.log_prob(y).sum((1, 2, 3))).mean()

    def backward(self, x: Tensor, reward: Reward, noise: Tensor | None = None) -> float:
        """Add up the policy gradient of one batch from x_T; returns minus the mean reward. `noise` [T - 1, B, ...]."""
        chain, path = self.chain, [x]
        with torch.no_grad():
            for i, row in enumerate(chain.rows[:-1]):
                path.append(chain.move(path[-1], torch.randn_like(x) if noise is None else noise[i], *row))
            rewards = reward(chain.predict(path[-1], *chain.rows[-1][:3]))
            advantage = (rewards - rewards.mean()) * len(rewards) / max(len(rewards) - 1, 1)
        for x, y, row in zip(path[:-1], path[1:], chain.rows[:-1], strict=True):
            self.surrogate(x, y, advantage, *row).backward()
        return -rewards.mean().item()
