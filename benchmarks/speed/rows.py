"""What is measured: for every row the two sides, ours and PyTorch's, as objects with `check`, `block` and `memory`.

A side is built inside its own process (`benchmarks.speed.worker`), so JAX and PyTorch are imported lazily. `export` of our
side hands over parameters, coefficients, the random numbers of one run and its result; `check` of the other side
repeats that run with them and returns the largest relative error. `block` is what is timed: one whole sampling run or
one training step, from its random numbers to a finished (synchronised) result. Here are the cases and the sides of images;
`benchmarks.speed.tuner_rows` extends them to more tuners; `benchmarks.speed.sequence_rows` and `benchmarks.speed.drakes_rows` have the sides
of sequences, `benchmarks.speed.gradient_guidance` those of its rounds, `benchmarks.speed.surrogate_rows` those of refits, `benchmarks.speed.seiko_rows`
those of rounds of queries.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from benchmarks.speed.measures import (
    SEED,
    flat,
    forward_flops,
    nested,
    planned_memory,
    ready_torch,
    torch_memory,
    weights,
)

BATCH, SIDE, STEPS = 16, 16, 50
CHANNELS = (32, 64, 64)
CANDIDATES, TEMPERATURE = 8, 0.1
OPTIMIZER: dict[str, Any] = {"learning_rate": 1e-4, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01}


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table.

    Args:
      method: of `tuners`: draft_lv, alignprop, refl or ddpo; of `surrogates`, how ours fits its heads: vmap or loop;
        of `gradient-guidance`, g or g_loss; of `seiko`, digits or tfbind8.
      network: of `gradient-guidance`: a 1-D U-Net in place of the exact score.
      live, remat: network calls with gradients (DRaFT; 1 where the method says); whether activations are computed again.
      reuse, loop, channels_last: other ways to write the PyTorch side, against the same of ours. The winner's
        prediction is kept; one call of the networks per candidate (or head); the layout of convolutions (sequences).
      value, length, batch, moves: of sequences: `pm` or `mc`, L, B, T.
      released: of `drakes`: the PyTorch side evaluates the KL at every move, in a loop of its own.
      distinct: of sequences: whether ours evaluates one of each kind of candidate only.
      tolerance: the largest difference of results with which a case is measured.
    """

    row: str
    name: str
    method: str = ""
    live: int = 0
    remat: bool = False
    reuse: bool = True
    loop: bool = False
    channels_last: bool = False
    value: str = ""
    length: int = 0
    batch: int = 0
    moves: int = 0
    released: bool = False
    distinct: bool = True
    network: bool = False
    tolerance: float = 1e-4


def _sequences(length: int, batch: int, moves: int) -> tuple[Case, ...]:
    """The lines of one shape. Differences are the fraction of positions that are chosen otherwise, over all moves."""
    shape = f"L={length} B={batch} T={moves}"
    case = functools.partial(
        Case, "svdd-sequences", length=length, batch=batch, moves=moves, reuse=False, tolerance=0.01
    )
    return (
        case(f"PM {shape}", value="pm", reuse=True),
        case(f"PM {shape}, channels last", value="pm", reuse=True, channels_last=True),
        case(f"PM {shape}, M + 1 calls", value="pm"),
        case(f"PM {shape}, candidate loop", value="pm", loop=True),
        case(f"MC {shape}", value="mc"),
        case(f"MC {shape}, channels last", value="mc", channels_last=True),
        case(f"MC {shape}, candidate loop", value="mc", loop=True),
    )


def _drakes(length: int, batch: int, moves: int, live: int) -> tuple[Case, ...]:
    shape = f"L={length} B={batch} T={moves} K={live}"
    case = functools.partial(Case, "drakes", live=live, length=length, batch=batch, moves=moves)
    return (
        case(shape),
        case(f"{shape}, channels last", channels_last=True),
        case(f"{shape}, recomputed", remat=True),
        case(f"{shape}, as released", released=True),
    )


CASES = (
    Case("ancestral", "ancestral"),
    Case("svdd", "svdd"),
    Case("svdd", "svdd, M + 1 calls", reuse=False),
    Case("draft", "draft K=1", live=1),
    Case("draft", "draft K=5", live=5),
    Case("draft", "draft K=5, recomputed", live=5, remat=True),
    Case("draft", "draft K=50", live=50),
    Case("draft", "draft K=50, recomputed", live=50, remat=True),
    *_sequences(50, 16, 32),
    dataclasses.replace(_sequences(50, 16, 32)[0], name="PM L=50 B=16 T=32, every candidate", distinct=False),
    *_sequences(200, 8, 32),
    *_sequences(50, 16, 128),
    Case("tuners", "draft_lv n=2", "draft_lv", live=1),
    Case("tuners", "alignprop K=9, recomputed", "alignprop", live=9, remat=True),
    Case("tuners", "refl", "refl", live=1),
    Case("tuners", "ddpo", "ddpo", live=1),
    *_drakes(50, 8, 32, 12),
    Case("gradient-guidance", "g", "g"),
    Case("gradient-guidance", "g_loss", "g_loss"),
    Case("gradient-guidance", "g, 1-D U-Net", "g", network=True),
    Case("gradient-guidance", "g_loss, 1-D U-Net", "g_loss", network=True),
    Case("dxmi", "T=5 B=256", reuse=False),
    Case("dxmi", "T=5 B=256, one embedded time"),
    Case("surrogates", "8 heads by vmap", "vmap", loop=True),
    Case("surrogates", "8 heads by vmap, batched products", "vmap"),
    Case("surrogates", "8 heads in a loop", "loop", loop=True),
    Case("seiko", "digits", "digits", live=5),
    Case("seiko", "tfbind8", "tfbind8"),
    Case("seiko", "tfbind8, channels last", "tfbind8", channels_last=True),
)


def reward(x0: Any, cond: Any = None) -> Any:
    """The toy reward: left-right symmetry, and pixels near +-1/2."""
    asymmetry = ((x0 - x0[:, :, ::-1]) ** 2).mean((1, 2, 3))
    return -asymmetry - ((x0**2 - 0.25) ** 2).mean((1, 2, 3))


def table(process: Any, times: Any) -> Any:
    """The coefficients of a Gaussian chain's network calls, for `torch_twins.Chain`: [T, 6]."""
    import jax.numpy as jnp

    schedule, t, s = process.schedule, times, jnp.append(times[1:], times[-1])
    sigma_s, std = schedule.sigma(s), jnp.zeros_like(t)
    if process.stochastic:
        shrink = jnp.sqrt(-jnp.expm1(schedule.log_snr(t) - schedule.log_snr(s)))
        std = sigma_s * jnp.minimum(process.eta * shrink, 1.0)
    direction = jnp.sqrt(jnp.maximum(sigma_s**2 - std**2, 0.0)) if process.stochastic else sigma_s
    return jnp.stack([t, schedule.alpha(t), schedule.sigma(t), schedule.alpha(s), std, direction], 1)


class Ours:
    """Our side of a case, on JAX's default device."""

    note = ""
    prediction = "eps"

    def __init__(self, case: Case):
        import jax
        import jax.numpy as jnp
        import optax

        from rgdiff import denoisers, processes, samplers, schedules, values
        from rgdiff.nets import UNet

        jax.config.update("jax_default_matmul_precision", "highest")  # float32 on both sides, on every device
        self.case, self.jax = case, jax
        schedule = schedules.linear_vp()
        self.process = processes.gaussian(schedule, (SIDE, SIDE, 1), eta=self.eta)
        self.times = self.process.times(STEPS)
        net = UNet(channels=CHANNELS)
        image = jnp.zeros((BATCH, SIDE, SIDE, 1))
        shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), image, jnp.float32(1))["params"])
        self.params = jax.tree.map(jnp.asarray, weights(shapes))
        self.net = net
        self.denoiser = denoisers.predicts(self.prediction, denoisers.from_linen(net, self.params), schedule)
        if case.live:
            model = lambda params: denoisers.predicts(self.prediction, denoisers.from_linen(net, params), schedule)  # noqa: E731
            self.tuner = self._tuner(model, optax.adamw(**OPTIMIZER))
            self.state = self.tuner.init(self.params)
        elif case.row == "svdd":
            value = values.posterior_mean(reward, self.process, self.denoiser)
            options = {"temperature": TEMPERATURE, "candidates": CANDIDATES}
            self.sampler = samplers.svdd(self.process, self.denoiser, value, **options)
        else:
            self.sampler = samplers.ancestral(self.process, self.denoiser)

    @property
    def eta(self) -> float:
        return 0.0 if self.case.live else 1.0

    def _tuner(self, model: Any, optimizer: Any) -> Any:
        from rgdiff import tuners

        options = {"batch": BATCH, "remat": "everything" if self.case.remat else "none"}
        return tuners.draft_k(model, self.process, reward, self.times, optimizer, k=self.case.live, **options)

    def _loss_and_gradient(self, key: Any) -> tuple[Any, Any]:
        import jax

        return jax.jit(jax.value_and_grad(lambda p: self.tuner.loss(p, key)[0]))(self.params)

    @functools.cached_property
    def program(self) -> Any:
        """The compiled block: (key, state) -> (state, info), or (sampler, key, times) -> x0."""
        import jax

        from rgdiff import samplers

        key = jax.random.key(SEED)
        if self.case.live:
            step = jax.jit(lambda key, state: self.tuner.step(key, state), donate_argnums=1)
            return step.lower(key, self.state).compile()
        run = jax.jit(lambda s, key, times: samplers.sample(s, key, BATCH, times).x0)
        return run.lower(self.sampler, key, self.times).compile()

    @functools.cached_property
    def flops(self) -> float:
        """Of one block: forward passes as XLA counts them; a gradient is two of them, a recomputation one."""
        import jax.numpy as jnp

        image = jnp.zeros((BATCH, SIDE, SIDE, 1))
        forward = lambda p, x, t: self.net.apply({"params": p}, x, t)  # noqa: E731
        calls, live = self._calls()
        return (calls + live * (2 + self.case.remat)) * forward_flops(forward, self.params, image, jnp.float32(1))

    def _calls(self) -> tuple[int, int]:
        """Network calls of a batch, forward, and how many of them have a gradient."""
        return (STEPS - 1) * CANDIDATES + 1 if self.case.row == "svdd" else STEPS, self.case.live

    def block(self, seed: int) -> None:
        key = self.jax.random.key(seed)
        if self.case.live:
            self.state, info = self.program(key, self.state)
            self.jax.block_until_ready((self.state, info))
        else:
            self.jax.block_until_ready(self.program(self.sampler, key, self.times))

    def memory(self) -> dict[str, float]:
        return planned_memory(self.program, lambda: self.block(0))

    def export(self) -> dict[str, Any]:
        """Everything the other side needs to repeat one run: see the module."""
        import jax
        import jax.numpy as jnp

        case, times, schedule = self.case, self.times, self.process.schedule
        out: dict[str, Any] = {"table": table(self.process, times)} | flat(self.params)
        key, shape = jax.random.key(SEED + 2), (BATCH, SIDE, SIDE, 1)
        key_chain = jax.random.split(key)[0] if case.live else key
        init = jax.random.fold_in(key_chain, 0)
        init = jax.random.split(init)[0] if case.row == "svdd" else init
        out["x"] = schedule.prior_std * jax.random.normal(init, shape)
        moves = [jax.random.fold_in(key_chain, 1 + i) for i in range(STEPS - 1)]
        if case.live:
            out["loss"], gradients = self._loss_and_gradient(key)
            out |= {f"gradient/{i:04d}": g for i, g in enumerate(jax.tree.leaves(gradients))}
        elif case.row == "svdd":
            pairs = [jax.random.split(k) for k in moves]
            draw = jax.jit(lambda k: jax.vmap(lambda k: jax.random.normal(k, shape))(jax.random.split(k, CANDIDATES)))
            out["noise"] = jnp.stack([draw(k) for k, _ in pairs])
            out["gumbel"] = jnp.stack([jax.random.gumbel(k, (CANDIDATES, BATCH)) for _, k in pairs])
        else:
            out["noise"] = jnp.stack([jax.random.normal(k, shape) for k in moves])
        if not case.live:
            out["x0"] = self.program(self.sampler, key, times)
        return {name: np.asarray(value) for name, value in out.items()}


class Torch:
    """PyTorch's side of a case, eager or compiled, on CUDA where there is one."""

    prediction = "eps"

    def __init__(self, case: Case, given: dict[str, Any], compiled: bool, threads: int, mode: str | None):
        from benchmarks.speed import torch_twins

        torch = ready_torch(threads)
        self.case, self.torch, self.twins, self.given = case, torch, torch_twins, given
        self.params = nested(given)
        self.net = torch_twins.load_linen(torch_twins.UNet(CHANNELS).to(torch_twins.device()), self.params)
        self.chain = torch_twins.Chain(self.net, given["table"], compiled, mode, self.prediction)
        o = OPTIMIZER
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), o["learning_rate"], (o["b1"], o["b2"]), o["eps"], o["weight_decay"], fused=True
        )

    def _start(self, batch: int = BATCH) -> Any:
        return self.torch.randn(batch, 1, SIDE, SIDE, device=self.twins.device())

    def _svdd(self, x: Any, **given: Any) -> Any:
        return self.chain.svdd(x, self.twins.reward, CANDIDATES, TEMPERATURE, self.case.reuse, **given)

    def _backward(self, x: Any, noise: Any = None) -> float:
        """Add up the gradients of one batch and return its loss."""
        loss = self.chain.draft_loss(x, self.twins.reward, self.case.live, self.case.remat)
        loss.backward()
        return loss.item()

    def check(self) -> float:
        """Repeat our run with our random numbers; the largest relative error of samples, or of loss and gradients."""
        given, images = self.given, self.twins.images
        x = images(given["x"])
        if self.case.live:
            loss = self._backward(x, images(given["noise"]) if "noise" in given else None)
            got = self.twins.in_our_order(self.net, self.params, lambda p: p.grad)
            self.optimizer.zero_grad()
            return gradient_error(loss, got, given)
        if self.case.row == "svdd":
            gumbel = self.torch.tensor(given["gumbel"], device=x.device)
            x0 = self._svdd(x, noise=images(given["noise"]), gumbel=gumbel)
        else:
            x0 = self.chain.ancestral(x, images(given["noise"]))
        return _relative(np.moveaxis(x0.cpu().numpy(), 1, -1), given["x0"])

    def block(self, seed: int, batch: int = BATCH) -> None:
        x = self._start(batch)
        if self.case.live:
            self.optimizer.zero_grad(set_to_none=True)
            self._backward(x)
            self.optimizer.step()
        elif self.case.row == "svdd":
            self._svdd(x)
        else:
            self.chain.ancestral(x)
        if x.is_cuda:
            self.torch.cuda.synchronize()

    def memory(self) -> dict[str, float]:
        return torch_memory(self.block, lambda: self.optimizer.zero_grad(set_to_none=True))


def gradient_error(loss: float, got: list[np.ndarray], given: dict[str, Any]) -> float:
    """The larger of the relative errors of the loss and of the whole gradient; leaves in the order of ours."""
    want = [given[name] for name in sorted(given) if name.startswith("gradient/")]
    flat = lambda leaves: np.concatenate([np.ravel(leaf) for leaf in leaves])  # noqa: E731
    return max(abs(loss / float(given["loss"]) - 1), _relative(flat(got), flat(want)))


def _relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
