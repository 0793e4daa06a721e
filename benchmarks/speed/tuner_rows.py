"""The sides of `tuners`: DRaFT-LV, AlignProp, ReFL and DDPO on the images of `benchmarks.speed.rows`, whose sides these extend.

What is drawn at random in the method itself is fixed on both sides, so that both do the same work: AlignProp's suffix (of
`live` calls, its mean length) and ReFL's call. A block is one training step: gradients, AdamW, and for DDPO the rollout.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.speed import rows
from benchmarks.speed.measures import SEED
from benchmarks.speed.rows import Case

RENOISED = 2  # DRaFT-LV's n


def late() -> int:
    """The index of ReFL's call, the mean of those it draws: with m = 20, 10 of 50 calls before the end."""
    return rows.STEPS - max(rows.STEPS // 5, 2)


def prediction(case: Case) -> str:
    """What the network is taken to predict: from random weights as eps chains grow to x0 of some 300, and z = (y - mean) / std
    of a draw, which DDPO's gradient is made of, loses three digits; as v they stay small."""
    return "v" if case.method == "ddpo" else "eps"


class Ours(rows.Ours):
    """Our side of a case, on JAX's default device."""

    @property
    def prediction(self) -> str:
        return prediction(self.case)

    @property
    def eta(self) -> float:
        return 1.0 if self.case.method == "ddpo" else 0.0

    def _tuner(self, model: Any, optimizer: Any) -> Any:
        from rgdiff import tuners
        from rgdiff.tuners import plans

        case, batch = self.case, rows.BATCH
        if case.method == "ddpo":
            return tuners.as_tuner(tuners.ddpo(model, self.process, self.times, optimizer, batch=batch), rows.reward)
        options = (model, self.process, rows.reward, self.times, optimizer)
        if case.method == "draft_lv":
            return tuners.draft_lv(*options, n=RENOISED, batch=batch, remat="everything" if case.remat else "none")
        # One program for every plan: what it stores of calls that turn out dead is least if it stores states alone.
        plan = plans.last(case.live) if case.method == "alignprop" else _only(late(), rows.STEPS)
        return tuners.reward_backprop(*options, truncation=plan, batch=batch, remat="everything")

    def _loss_and_gradient(self, key: Any) -> tuple[Any, Any]:
        """Under DDPO, whose loss has no value of interest, minus the mean reward stands for it."""
        import jax

        if self.case.method != "ddpo":
            return super()._loss_and_gradient(key)
        gradients, info = jax.jit(self.tuner.gradients)(self.params, key)
        return -info["reward"], gradients

    def _calls(self) -> tuple[int, int]:
        """DDPO calls the network again at each of its moves, DRaFT-LV once for all noisings."""
        steps = rows.STEPS
        return {
            "draft_lv": (steps + RENOISED, 1 + RENOISED),
            "alignprop": (steps, self.case.live),
            "refl": (late() + 1, 1),
            "ddpo": (2 * steps - 1, steps - 1),
        }[self.case.method]

    def export(self) -> dict[str, Any]:
        """What `rows.Ours` exports, and the noise of the moves [T - 1, B, ...] (DDPO) or of the noisings [n, B, ...]."""
        import jax
        import jax.numpy as jnp

        out, key = super().export(), jax.random.key(SEED + 2)
        key_chain, key_extra = jax.random.split(key)
        keys = {
            "ddpo": lambda: [jax.random.fold_in(key_chain, 1 + i) for i in range(rows.STEPS - 1)],
            "draft_lv": lambda: list(jax.random.split(jax.random.split(key_extra)[0], RENOISED)),
        }.get(self.case.method)
        if keys is None:
            return out
        return out | {"noise": np.asarray(jnp.stack([jax.random.normal(k, out["x"].shape) for k in keys()]))}


def _only(call: int, calls: int) -> Any:
    """A plan of one call, which ends the chain."""
    import jax.numpy as jnp

    from rgdiff.tuners.plans import Plan
    from rgdiff.typing import pytree, static

    @pytree
    class Only:
        plan: Plan
        early: bool = static(default=True)

        def __call__(self, key: Any, calls: int) -> Plan:
            return self.plan

    return Only(Plan(jnp.arange(calls) == call, jnp.int32(call), jnp.int32(call)))


class Torch(rows.Torch):
    """PyTorch's side of a case, eager or compiled, on CUDA where there is one."""

    @property
    def prediction(self) -> str:
        return prediction(self.case)

    def __init__(self, case: Case, given: dict[str, Any], compiled: bool, threads: int, mode: str | None):
        from benchmarks.speed import torch_tuners

        super().__init__(case, given, compiled, threads, mode)
        self.tuners = torch_tuners
        self.ddpo = torch_tuners.Ddpo(self.chain, compiled, mode)

    def _backward(self, x: Any, noise: Any = None) -> float:
        if self.case.method == "alignprop":
            return super()._backward(x)
        if self.case.method == "ddpo":
            return self.ddpo.backward(x, self.twins.reward, noise)
        if self.case.method == "refl":
            loss = self.tuners.refl_loss(self.chain, x, self.twins.reward, late())
        else:
            loss = self.tuners.draft_lv_loss(self.chain, x, self.twins.reward, RENOISED, noise)
        loss.backward()
        return loss.item()
