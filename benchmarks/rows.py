"""What is measured: for every row the two sides, ours and PyTorch's, as objects with `check`, `block` and `memory`.

A side is built inside its own process (`benchmarks.worker`), so JAX and PyTorch are imported lazily. `export` of our
side hands over parameters, coefficients, the random numbers of one run and its result; `check` of the other side
repeats that run with them and returns the largest relative error. `block` is what is timed: one whole sampling run or
one training step, from its random numbers to a finished (synchronised) result.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

BATCH, SIDE, STEPS, SEED = 16, 16, 50, 0
CHANNELS = (32, 64, 64)
CANDIDATES, TEMPERATURE = 8, 0.1
OPTIMIZER: dict[str, Any] = {"learning_rate": 1e-4, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table. `live`: network calls with gradients (DRaFT); `remat`: recompute activations."""

    row: str
    name: str
    live: int = 0
    remat: bool = False
    reuse: bool = True
    torch_only: bool = False  # another way to write the PyTorch side, measured against the same of ours


CASES = (
    Case("ancestral", "ancestral"),
    Case("svdd", "svdd"),
    Case("svdd", "svdd, M + 1 calls", reuse=False, torch_only=True),
    Case("draft", "draft K=1", live=1),
    Case("draft", "draft K=5", live=5),
    Case("draft", "draft K=5, recomputed", live=5, remat=True),
    Case("draft", "draft K=50", live=50),
    Case("draft", "draft K=50, recomputed", live=50, remat=True),
)


def calls(case: Case) -> int:
    """Forward passes over a batch of BATCH images, recomputation and gradients not counted."""
    if case.row == "svdd":
        return (STEPS - 1) * CANDIDATES + 1 + (0 if case.reuse else STEPS - 1)
    return STEPS


def forward_equivalents(case: Case) -> int:
    """The same with gradients: a backward pass is two forward passes, a recomputation one."""
    return calls(case) + case.live * (2 + case.remat)


def reward(x0: Any, cond: Any = None) -> Any:
    """The toy reward: left-right symmetry, and pixels near +-1/2."""
    asymmetry = ((x0 - x0[:, :, ::-1]) ** 2).mean((1, 2, 3))
    return -asymmetry - ((x0**2 - 0.25) ** 2).mean((1, 2, 3))


class Ours:
    """Our side of a case, on JAX's default device."""

    def __init__(self, case: Case):
        import jax
        import jax.numpy as jnp
        import optax

        from rgdiff import denoisers, processes, samplers, schedules, tuners, values
        from rgdiff.nets import UNet

        jax.config.update("jax_default_matmul_precision", "highest")  # float32 on both sides, on every device
        self.case, self.jax = case, jax
        schedule = schedules.linear_vp()
        self.process = processes.gaussian(schedule, (SIDE, SIDE, 1), eta=0.0 if case.live else 1.0)
        self.times = self.process.times(STEPS)
        net = UNet(channels=CHANNELS)
        image = jnp.zeros((BATCH, SIDE, SIDE, 1))
        shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), image, jnp.float32(1))["params"])
        self.params = jax.tree.map(jnp.asarray, _weights(shapes))
        self.net = net
        self.denoiser = denoisers.predicts("eps", denoisers.from_linen(net, self.params), schedule)
        if case.live:
            model = lambda params: denoisers.predicts("eps", denoisers.from_linen(net, params), schedule)  # noqa: E731
            options = {"batch": BATCH, "remat": "everything" if case.remat else "none"}
            self.tuner = tuners.draft_k(
                model, self.process, reward, self.times, optax.adamw(**OPTIMIZER), k=case.live, **options
            )
            self.state = self.tuner.init(self.params)
        elif case.row == "svdd":
            value = values.posterior_mean(reward, self.process, self.denoiser)
            options = {"temperature": TEMPERATURE, "candidates": CANDIDATES}
            self.sampler = samplers.svdd(self.process, self.denoiser, value, **options)
        else:
            self.sampler = samplers.ancestral(self.process, self.denoiser)

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
        """Of one forward pass, as XLA counts them."""
        import jax
        import jax.numpy as jnp

        forward = jax.jit(lambda p, x, t: self.net.apply({"params": p}, x, t))
        cost = forward.lower(self.params, jnp.zeros((BATCH, SIDE, SIDE, 1)), jnp.float32(1)).compile().cost_analysis()
        cost = cost[0] if isinstance(cost, list) else cost
        return float((cost or {}).get("flops", float("nan")))

    def block(self, seed: int) -> None:
        key = self.jax.random.key(seed)
        if self.case.live:
            self.state, info = self.program(key, self.state)
            self.jax.block_until_ready((self.state, info))
        else:
            self.jax.block_until_ready(self.program(self.sampler, key, self.times))

    def memory(self) -> dict[str, float]:
        """Bytes beyond the arguments: XLA's plan for temporaries, and on an accelerator its peak."""
        out = {"temporaries": float(self.program.memory_analysis().temp_size_in_bytes)}
        stats = self.jax.devices()[0].memory_stats()
        if stats and "peak_bytes_in_use" in stats:
            out["device peak"] = float(stats["peak_bytes_in_use"])
        return out

    def export(self) -> dict[str, Any]:
        """Everything the other side needs to repeat one run: see the module."""
        import jax
        import jax.numpy as jnp

        case, times, schedule = self.case, self.times, self.process.schedule
        t, s = times, jnp.append(times[1:], times[-1])
        alpha_s, sigma_s = schedule.alpha(s), schedule.sigma(s)
        std = jnp.zeros_like(t)
        if self.process.stochastic:
            shrink = jnp.sqrt(-jnp.expm1(schedule.log_snr(t) - schedule.log_snr(s)))
            fraction = jnp.minimum(self.process.eta * shrink, 1.0)
            std = sigma_s * fraction
        direction = jnp.sqrt(jnp.maximum(sigma_s**2 - std**2, 0.0)) if self.process.stochastic else sigma_s
        table = jnp.stack([t, schedule.alpha(t), schedule.sigma(t), alpha_s, std, direction], 1)
        out: dict[str, Any] = {"table": table}
        out |= {f"params/{'/'.join(k.key for k in path)}": leaf for path, leaf in _leaves(self.params)}
        key, shape = jax.random.key(SEED + 2), (BATCH, SIDE, SIDE, 1)
        key_chain = jax.random.split(key)[0] if case.live else key
        init = jax.random.fold_in(key_chain, 0)
        init = jax.random.split(init)[0] if case.row == "svdd" else init
        out["x"] = schedule.prior_std * jax.random.normal(init, shape)
        moves = [jax.random.fold_in(key_chain, 1 + i) for i in range(STEPS - 1)]
        if case.live:
            grad = jax.jit(jax.value_and_grad(lambda p: self.tuner.loss(p, key)[0]))
            out["loss"], gradients = grad(self.params)
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


def _weights(shapes: Any) -> Any:
    """Random numbers of the usual size, off zero (and scales off one) everywhere, or a wrong transplant could pass."""
    import jax

    random = np.random.default_rng(SEED)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        z = random.standard_normal(leaf.shape, np.float32)
        if path[-1].key == "kernel":
            return z / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))
        return np.float32(path[-1].key == "scale") + np.float32(0.1) * z

    return jax.tree_util.tree_map_with_path(draw, shapes)


def _leaves(tree: Any) -> Any:
    import jax

    return jax.tree_util.tree_flatten_with_path(tree)[0]


class Torch:
    """PyTorch's side of a case, eager or compiled, on CUDA where there is one."""

    def __init__(self, case: Case, given: dict[str, Any], compiled: bool, threads: int, mode: str | None):
        import torch

        from benchmarks import torch_twins

        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
        torch.manual_seed(SEED)
        self.case, self.torch, self.twins, self.given = case, torch, torch_twins, given
        self.params: dict[str, Any] = {}
        for name, value in given.items():
            if name.startswith("params/"):
                *path, leaf = name.split("/")[1:]
                node = self.params
                for part in path:
                    node = node.setdefault(part, {})
                node[leaf] = value
        self.net = torch_twins.load_linen(torch_twins.UNet(CHANNELS).to(torch_twins.device()), self.params)
        self.chain = torch_twins.Chain(self.net, given["table"], compiled, mode)
        o = OPTIMIZER
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), o["learning_rate"], (o["b1"], o["b2"]), o["eps"], o["weight_decay"], fused=True
        )

    def _start(self, batch: int = BATCH) -> Any:
        return self.torch.randn(batch, 1, SIDE, SIDE, device=self.twins.device())

    def _svdd(self, x: Any, **given: Any) -> Any:
        return self.chain.svdd(x, self.twins.reward, CANDIDATES, TEMPERATURE, self.case.reuse, **given)

    def check(self) -> float:
        """Repeat our run with our random numbers; the largest relative error of samples, or of loss and gradients."""
        given, images = self.given, self.twins.images
        x = images(given["x"])
        if self.case.live:
            loss = self.chain.draft_loss(x, self.twins.reward, self.case.live, self.case.remat)
            loss.backward()
            got = self.twins.in_our_order(self.net, self.params, lambda p: p.grad)
            want = [given[name] for name in sorted(given) if name.startswith("gradient/")]
            self.optimizer.zero_grad()
            flat = lambda leaves: np.concatenate([np.ravel(leaf) for leaf in leaves])  # noqa: E731
            loss_error = abs(loss.item() / float(given["loss"]) - 1)
            return max(loss_error, _relative(flat(got), flat(want)))
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
            self.chain.draft_loss(x, self.twins.reward, self.case.live, self.case.remat).backward()
            self.optimizer.step()
        elif self.case.row == "svdd":
            self._svdd(x)
        else:
            self.chain.ancestral(x)
        if x.is_cuda:
            self.torch.cuda.synchronize()

    def memory(self) -> dict[str, float]:
        """Bytes a block needs beyond parameters and optimiser state.

        On a CPU in a fresh process: the peak of the resident set over its size after a block of one image, which has
        loaded libraries and made the optimiser's state; and the peak of what the allocator held, from the profiler.
        """
        torch = self.torch
        if torch.cuda.is_available():
            self.block(0)
            torch.cuda.synchronize()
            self.optimizer.zero_grad(set_to_none=True)
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.block(1)
            return {"allocator": float(torch.cuda.max_memory_allocated() - before)}
        self.block(0, batch=1)
        self.optimizer.zero_grad(set_to_none=True)
        before = _status("VmRSS")
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        self.block(1)
        out = {"resident": _status("VmHWM") - before}
        self.optimizer.zero_grad(set_to_none=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self.block(2)
        held = np.cumsum([e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"])
        return out | {"allocator": float(held.max(initial=0))}


def _relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def _status(field: str) -> float:
    with open("/proc/self/status") as file:
        return next(float(line.split()[1]) * 1024 for line in file if line.startswith(field))
