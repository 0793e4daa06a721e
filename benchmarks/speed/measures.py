"""What the sides of every row share: weights and their way into a file, operations of a call, memory, PyTorch's settings.

JAX and PyTorch are imported lazily: each runs in processes of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

SEED = 0


def forward_flops(function: Any, *args: Any) -> float:
    """Operations of one call, as XLA counts them."""
    import jax

    cost = jax.jit(function).lower(*args).compile().cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    return float((cost or {}).get("flops", float("nan")))


def planned_memory(program: Any, run: Callable[[], None]) -> dict[str, float]:
    """Bytes beyond the arguments: XLA's plan for temporaries, and on an accelerator its peak, which is read after the program has run."""
    import jax

    if jax.devices()[0].memory_stats():
        run()
    out = {"temporaries": float(program.memory_analysis().temp_size_in_bytes)}
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        out["device peak"] = float(stats["peak_bytes_in_use"])
    return out


def weights(shapes: Any) -> Any:
    """Random numbers of the usual size, off zero (and scales off one) everywhere, or a wrong transplant could pass."""
    import jax

    random = np.random.default_rng(SEED)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        z = random.standard_normal(leaf.shape, np.float32)
        if path[-1].key == "kernel":
            return z / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))
        return np.float32(path[-1].key == "scale") + np.float32(0.1) * z

    return jax.tree_util.tree_map_with_path(draw, shapes)


def flat(params: Any, name: str = "params") -> dict[str, Any]:
    """Nested parameters as {"name/layer/kernel": array}, for a file; `nested` is the way back."""
    import jax

    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {"/".join([name, *(k.key for k in path)]): leaf for path, leaf in leaves}


def nested(given: dict[str, Any], name: str = "params") -> dict[str, Any]:
    params: dict[str, Any] = {}
    for key, value in given.items():
        first, *path = key.split("/")
        if first == name:
            node = params
            for part in path[:-1]:
                node = node.setdefault(part, {})
            node[path[-1]] = value
    return params


def in_mode(function: Callable[..., Any], mode: str | None, **options: Any) -> Callable[..., Any]:
    """torch.compile in a mode. Where it captures CUDA graphs their outputs are cloned: the next call writes over them."""
    import torch

    made = torch.compile(function, mode=mode, **options)
    if mode not in ("reduce-overhead", "max-autotune"):
        return made

    def run(*args: Any) -> Any:
        if not torch.is_grad_enabled():  # a pending backward pass still reads what its forward passes have written
            torch.compiler.cudagraph_mark_step_begin()
        return torch.utils._pytree.tree_map(lambda leaf: leaf.clone() if torch.is_tensor(leaf) else leaf, made(*args))

    return run


def ready_torch(threads: int) -> Any:
    """Import PyTorch and set threads, float32 everywhere, and the seed."""
    import torch

    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(SEED)
    return torch


def torch_memory(block: Callable[..., None], forget: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Bytes that block(seed, batch=...) needs beyond parameters and optimiser state; `forget` drops gradients.

    On a CPU in a fresh process: the peak of the resident set over its size after a block of one example, which has
    loaded libraries and made the optimiser's state; and the peak of what the allocator held, from the profiler.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    if torch.cuda.is_available():
        block(0)
        torch.cuda.synchronize()
        forget()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        block(1)
        return {"allocator": float(torch.cuda.max_memory_allocated() - before)}
    block(0, batch=1)
    forget()
    before = _status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    block(1)
    out = {"resident": _status("VmHWM") - before}
    forget()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        block(2)
    events: Any = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = np.cumsum([event.nbytes() for event in events if event.name() == "[memory]"])
    return out | {"allocator": float(held.max(initial=0))}


def _status(field: str) -> float:
    with open("/proc/self/status") as file:
        return next(float(line.split()[1]) * 1024 for line in file if line.startswith(field))
