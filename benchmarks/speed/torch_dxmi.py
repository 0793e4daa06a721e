"""PyTorch twin of DxMI's iteration in the released configuration: the trainer's loops over time, in PyTorch's own idiom.

Rollout, speeds, one step of the energy, T of the values from the data end, one of the policy; one Adam for energy and values.
Noise is given or drawn. Networks embed the time of every row, as the released ones do, or of the batch (`shared_time`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Perceptron(nn.Module):
    """Three hidden layers of SiLU, each with a linear map of the time's features added: `benchmarks.studies.dxmi_2d.perceptron`."""

    w: Tensor

    def __init__(self, out: int, width: int = 128, times: int = 128, shared_time: bool = False):
        super().__init__()
        sizes = (2, width, width)
        self.x = nn.ModuleList([nn.Linear(size, width) for size in sizes])
        self.t = nn.ModuleList([nn.Linear(times, width, bias=False) for _ in sizes])
        self.out = nn.Linear(width, out)
        self.shared = shared_time
        self.register_buffer("w", 10_000.0 ** (-torch.arange(times // 2) / (times // 2)))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x [B, 2], t [] or [B]."""
        t = t.reshape(-1) if self.shared or t.ndim else t.expand(x.shape[0])
        angles = 1000.0 * t[:, None] * self.w
        e = torch.cat([angles.cos(), angles.sin()], -1)
        for of_x, of_t in zip(self.x, self.t, strict=True):
            x = F.silu(of_x(x) + of_t(e))
        return self.out(x)

    def load(self, params: Any) -> Perceptron:
        """Take the weights of our side."""
        with torch.no_grad():
            for i, layer in enumerate(params["hidden"]):
                self.x[i].weight.copy_(torch.tensor(layer["x"]).T)  # type: ignore[union-attr]
                self.x[i].bias.copy_(torch.tensor(layer["b"]))  # type: ignore[union-attr]
                self.t[i].weight.copy_(torch.tensor(layer["t"]).T)  # type: ignore[union-attr]
            self.out.weight.copy_(torch.tensor(params["out"]["x"]).T)
            self.out.bias.copy_(torch.tensor(params["out"]["b"]))
        return self


class Trainer:
    """The state of a run and its iteration; `options`: tau1, tau2 (per example), gamma, rates, clip, decay of speeds, time costs [T]."""

    def __init__(
        self, policy: Perceptron, value: Perceptron, log_sigma: Any, reach: float, speed: Any, options: dict[str, Any],
        compiled: bool = False, mode: str | None = None,
    ):  # fmt: skip
        self.o = options
        self.policy, self.value = policy, value
        self.start = torch.tensor(log_sigma)
        self.log_sigma = nn.Parameter(self.start.clone())
        self.reach, self.speed = math.log(reach), torch.tensor(speed)
        groups = [
            {"params": policy.parameters(), "lr": options["learning_rate"]},
            {"params": [self.log_sigma], "lr": options["sigma_learning_rate"]},
        ]
        self.policy_adam = torch.optim.Adam(groups, fused=True)
        self.value_adam = torch.optim.Adam(value.parameters(), lr=options["value_learning_rate"], fused=True)
        if compiled:
            self.policy, self.value = (torch.compile(net, mode=mode, dynamic=False) for net in (policy, value))
        self.moves = len(self.speed)
        self.times = torch.linspace(1.0, 0.0, self.moves + 1)
        self.zero = torch.zeros(())

    def sigma(self) -> Tensor:
        return (self.start + self.reach * torch.tanh((self.log_sigma - self.start) / self.reach)).exp()

    def iteration(self, data: Tensor, x: Tensor, noise: Tensor, again: Tensor, shift: int) -> dict[str, float]:
        """One iteration from x_1 [B, 2], noise of the chain [T, B, 2] and of the policy's step [T, rows, 2]."""
        o, path = self.o, [x]
        with torch.no_grad():
            sigma = self.sigma()
            for i in range(self.moves):
                path.append(path[-1] + self.policy(path[-1], self.times[i]) + sigma[i] * noise[i])
            squares = torch.stack([((b - a) ** 2).mean() for a, b in zip(path[:-1], path[1:], strict=True)])
            self.speed = o["velocity_decay"] * self.speed + (1 - o["velocity_decay"]) * squares
        energies = self.value(torch.cat([data, path[-1]]), self.zero)[:, 0]
        low, high = energies[: len(data)], energies[len(data) :]
        energy_loss = low.mean() - high.mean() + o["gamma"] * ((low**2).mean() + (high**2).mean())
        self._step(self.value_adam, energy_loss)
        errors = []
        for i in reversed(range(self.moves)):
            with torch.no_grad():
                goal = self.value(path[i + 1], self.zero)[:, 0] + o["time_cost"][i]
            error = F.mse_loss(self.value(path[i], self.zero)[:, 0], goal)
            self._step(self.value_adam, error)
            errors.append(error.detach())
        loss = self._policy_loss(path, again, shift)
        self.policy_adam.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [p for group in self.policy_adam.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, o["clip"])
        self.policy_adam.step()
        return {
            "energy_loss": energy_loss.item(), "loss": torch.stack(errors).mean().item(), "policy_loss": loss.item(),
            "gradient_norm": norm.item(),
        }  # fmt: skip

    def _policy_loss(self, path: list[Tensor], again: Tensor, shift: int) -> Tensor:
        """The mixed batch: every move's share of the chains, each row at its own time."""
        rows, batch = again.shape[1], path[0].shape[0]
        chosen = [(rows * i + torch.arange(rows) + shift) % batch for i in range(self.moves)]
        x = torch.cat([path[i][chosen[i]] for i in range(self.moves)])
        move = torch.arange(self.moves).repeat_interleave(rows)
        sigma = self.sigma()[move][:, None]
        y = x + self.policy(x, self.times[move]) + sigma * again.flatten(0, 1)
        running = ((y - x) ** 2).sum(-1) / (2 * self.speed[move])
        size = x.shape[-1]
        entropy = size * (sigma[:, 0].log() + 0.5 - 0.5 * self.speed[move].log())
        togo = self.value(y, self.zero)[:, 0]
        return (togo + self.o["tau2"] * running - self.o["tau1"] * entropy).mean()

    @staticmethod
    def _step(adam: Any, loss: Tensor) -> None:
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
