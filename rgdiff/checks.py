"""Checks at the public door: one clear line each, raised when a method is built or a run begins, never inside a loop.

They look at structure and at concrete numbers only, so a traced value passes; what can go wrong inside a compiled
program (NaN rewards, non-finite gradients) is counted there and reported by the loops. What a user's reward, value or
denoiser returns is looked at while a program is traced (`per_example`, `prediction`), which costs nothing when it runs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from rgdiff.typing import shown


def key(value: Any) -> None:
    """Refuse anything but one new-style PRNG key."""
    if not isinstance(value, jax.Array) or not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        raise ValueError(
            f"key must be a typed PRNG key, got {shown(value)}; make one with jax.random.key(seed), "
            "or wrap a legacy key with jax.random.wrap_key_data"
        )
    if value.shape != ():
        raise ValueError(f"key must be a single key, got an array of keys with shape {value.shape}; vmap over it")


def schedule(value: Any, what: str, *, masks: bool = False) -> Any:
    """Return `value` if it is a noise schedule: alpha and sigma, or with `masks` a rate of masking."""
    wanted, instead = (("rate",), "log_linear_mask") if masks else (("alpha", "sigma"), "linear_vp")
    if not all(hasattr(value, name) for name in wanted):
        hint = "pass process.schedule" if hasattr(value, "schedule") else f"make one with schedules.{instead}()"
        kind = "a mask schedule" if masks else "a Gaussian noise schedule"
        raise ValueError(f"{what} needs {kind}, got {type(value).__name__}; {hint}")
    return value


def noising_process(value: Any, method: str) -> Any:
    """Return `value` if it is a process: it has a prior and reverse kernels."""
    if not (hasattr(value, "reverse") and hasattr(value, "prior")):
        make = "masked" if hasattr(value, "rate") else "gaussian"
        hint = f"processes.{make}(schedule, shape, ...) makes one" + (" of it" if hasattr(value, "times") else "")
        raise ValueError(f"{method} needs a process, got {type(value).__name__}; {hint}")
    return value


def law(process: Any, method: str) -> None:
    """Refuse a process whose reverse steps are points: `method` needs a law (log_prob, KL or a second draw)."""
    if not noising_process(process, method).stochastic:
        raise ValueError(
            f"{method} needs a reverse kernel with a law, but the process has eta = 0; build it with eta > 0"
        )


def optimizer(value: Any, name: str = "optimizer") -> Any:
    """Return an optax transformation; refuse anything else."""
    if not (callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))):
        raise ValueError(
            f"{name} must be an optax transformation, e.g. optax.adam(1e-3) or tuners.adamw(1e-3), got {shown(value)}"
        )
    return value


def params(value: Any) -> Any:
    """Return parameters; refuse a module, or anything but arrays, in their place."""
    if any(base.__name__ == "Module" and base.__module__.startswith("flax.") for base in type(value).__mro__):
        raise ValueError(
            f"params must be the parameters, a pytree of arrays, got the module {type(value).__name__}; give those inside it, "
            "e.g. from_nnx(module).params or module.init(...)['params']"
        )
    for leaf in jax.tree.leaves(value):
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, float, int)):
            raise ValueError(f"params must be a pytree of arrays, got {shown(leaf)} in it")
    return value


def at_least(name: str, value: Any, least: int) -> int:
    """Return `value` as an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)


def divides(name: str, parts: Any, batch: int) -> int:
    """Return `parts` as an int of at least 1; refuse one that does not divide the batch."""
    if batch % at_least(name, parts, 1):
        raise ValueError(f"{name} must divide the batch of {batch}, got {parts}")
    return int(parts)


def divided(name: str, batch: int | None, shards: Any) -> None:
    """Refuse a batch that cannot be split evenly over the devices of a mesh."""
    if shards is not None and batch is not None and batch % shards.count:
        raise ValueError(f"{name} must be a multiple of the {shards.count} devices that split it, got {batch}")


def positive(name: str, value: Any, *, zero: bool = False) -> jax.Array:
    """Return `value` as a float32 scalar; refuse a concrete one that is not positive and finite."""
    if not isinstance(value, Tracer):  # NumPy's comparisons, not JAX's: under `jit` those of a constant are traced too
        number = np.asarray(value, np.float32)
        if not np.isfinite(number).all() or (number < 0).any() or (not zero and (number == 0).any()):
            raise ValueError(f"{name} must be a finite number {'>=' if zero else '>'} 0, got {value!r}")
    return jnp.asarray(value, jnp.float32)


def one_of(name: str, value: Any, allowed: Iterable[Any]) -> Any:
    """Return `value` if it is among `allowed`, else name the nearest."""
    allowed = list(allowed)
    if value not in allowed:
        near = difflib.get_close_matches(str(value), [str(a) for a in allowed], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}{hint}")
    return value


def shape(name: str, value: Any, expected: tuple[int | None, ...]) -> None:
    """Refuse an array whose shape is not `expected` (None matches any size)."""
    got = tuple(np.shape(value))
    if len(got) != len(expected) or any(e is not None and e != g for e, g in zip(expected, got, strict=True)):
        wanted = "[" + ", ".join("any" if e is None else str(e) for e in expected) + "]"
        raise ValueError(f"{name} must have shape {wanted}, got {list(got)}")


def logits(prediction: Any, x: Any) -> Any:
    """Return a masked denoiser's prediction at states x [B, ..., K + 1] as float32 logits of the K tokens, [B, ..., K]; refuse another shape."""
    wanted = (*x.shape[:-1], x.shape[-1] - 1)
    if jnp.shape(prediction) != wanted:
        hint = ", without one for the mask: logits[..., :-1]" if jnp.shape(prediction) == x.shape else ""
        raise ValueError(
            f"a denoiser of {wanted[-1]} tokens must return logits {list(wanted)}, got {list(jnp.shape(prediction))}{hint}"
        )
    return jnp.asarray(prediction, jnp.float32)


def times(value: Any, process: Any) -> jax.Array:
    """Return a time grid as float32 [T + 1]; refuse one that does not decrease within [0, 1] or ends at the wrong place."""
    if callable(value) or isinstance(value, str):
        raise ValueError(f"times must be a vector [T + 1], got {shown(value)}; use process.times(steps)")
    noising_process(process, "a time grid")
    grid = jnp.asarray(value, jnp.float32)
    if grid.ndim != 1 or grid.shape[0] < 1:
        raise ValueError(f"times must be a vector [T + 1], got shape {list(grid.shape)}; use process.times(steps)")
    if grid.shape[0] - 1 < (moves := getattr(process, "moves", 0)):
        raise ValueError(
            f"one event at a time takes {moves} moves (positions), got {grid.shape[0] - 1}; use process.times()"
        )
    if isinstance(grid, Tracer):
        return grid
    concrete = np.asarray(grid)
    if not ((concrete >= 0).all() and (concrete <= 1).all() and (np.diff(concrete) < 0).all()):
        raise ValueError("times must decrease strictly within [0, 1] (1 is noise); use process.times(steps)")
    if getattr(process, "ends_at_zero", not process.projects) and concrete[-1] != 0:
        raise ValueError(f"times of a masked process must end at 0, got {concrete[-1]:g}; use process.times(steps)")
    if (own := getattr(process, "levels", None)) is not None and concrete.shape[0] != own.steps + 1:
        raise ValueError(f"a few-step process makes its {own.steps} moves and no others; use process.times()")
    _every_move_has_noise(grid, process)
    return grid


def _every_move_has_noise(grid: jax.Array, process: Any) -> None:
    """Refuse a grid with a move of a Gaussian process that is a point: to t = 0, or between two times of one noise level."""
    for part in getattr(process, "parts", {}).values():
        _every_move_has_noise(grid, part)
    schedule: Any = getattr(process, "schedule", None)
    if not hasattr(schedule, "log_snr") or isinstance(levels := log_snr(schedule, grid), Tracer):
        return
    levels = np.asarray(levels)
    if process.projects and levels[-1] == np.inf:
        raise ValueError(
            f"times of a Gaussian process must end above {float(grid[-1]):g}, where no noise is left and the last move would be "
            "a point; leave that time out (times[:-1]): the projection to data is the step to it"
        )
    if not (rises := np.diff(levels) > 0).all():
        t, s = np.asarray(grid)[np.argmin(rises) :][:2]
        raise ValueError(
            f"every move must lower the noise, but the schedule has one level at the times {t:g} and {s:g}; "
            "use process.times(steps)"
        )


@jax.jit
def log_snr(schedule: Any, times: jax.Array) -> jax.Array:
    """The schedule's log_snr, in one call."""
    return schedule.log_snr(times)


def per_example(what: str, out: Any, batch: int) -> jax.Array:
    """Return `out` as float32 [B]; refuse anything else, which broadcasting would turn into wrong numbers.

    Args:
      what: the culprit and its verb, "the reward f must return".
    """
    shape, dtype = getattr(out, "shape", None), getattr(out, "dtype", None)
    if shape == (batch,) and dtype is not None and jnp.issubdtype(dtype, jnp.floating):
        return jnp.asarray(out, jnp.float32)
    got = type(out).__name__ if shape is None else f"{dtype}{list(shape)}"
    hint = {
        (batch,): "; convert it with .astype(jnp.float32)",
        (batch, 1): "; drop the last axis with [:, 0]",
        (): "; do not sum or average over the examples",
    }.get(shape, "")
    if isinstance(out, tuple) and len(out) == 2:
        hint = "; one that returns (values, valid) goes through rewards.where_valid"
    raise ValueError(f"{what} one float per example, [{batch}], got {got}{hint}")


def conditions(cond: Any, batch: int) -> None:
    """Refuse conditions that have not a row for each of `batch` examples."""
    for leaf in jax.tree.leaves(cond):
        if jnp.ndim(leaf) < 1 or jnp.shape(leaf)[0] != batch:
            raise ValueError(f"cond must have a leading axis of {batch} examples, got shape {list(jnp.shape(leaf))}")


def one_problem(cond: Any) -> None:
    """Refuse conditions of particles: resampling moves states away from the rows that they were drawn under."""
    if cond is not None:
        raise ValueError(
            "the particles of one problem share their condition: leave cond out, and give it to the denoiser (denoisers.conditioned)"
        )


def prediction(out: Any, x: Any, what: str = "a denoiser") -> jax.Array:
    """Return a denoiser's prediction of the state x, in float32 at least; refuse one of another shape, which broadcasting would hide."""
    if not hasattr(out, "shape") or out.shape != x.shape:
        got = list(out.shape) if hasattr(out, "shape") else type(out).__name__
        raise ValueError(f"{what} must return a prediction of the state's shape {list(x.shape)}, got {got}")
    return out.astype(jnp.promote_types(x.dtype, jnp.float32))


def rows(data: Any, batch: int | None) -> None:
    """Refuse data that are not arrays with one leading axis of at least one example, and a missing `batch`."""
    leaves = jax.tree.leaves(data)
    if bad := [leaf for leaf in leaves if jnp.ndim(leaf) < 1]:
        raise ValueError(f"data must be arrays with a leading axis of examples, got {shown(bad[0])}")
    lengths = {jnp.shape(leaf)[0] for leaf in leaves}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"data must be arrays with one leading axis of examples, at least one, got lengths {sorted(lengths)}"
        )
    if batch is None:
        raise ValueError("fit(data=...) needs batch=, the rows per step")
    at_least("batch", batch, 1)


def entries(data: Any, *names: str) -> None:
    """Refuse training data that are no dict, or lack one of the names."""
    wanted = ", ".join(f'"{name}": [N, ...]' for name in names)
    if data is None:
        raise ValueError(f"this tuner learns from data: give fit(..., data={{{wanted}}}, batch=...)")
    if not isinstance(data, dict) or (missing := [name for name in names if name not in data]):
        got = shown(data) if not isinstance(data, dict) else f"no {missing[0]!r} among {sorted(data)}"
        raise ValueError(f"data must be a dict {{{wanted}}}, got {got}")


LARGEST_SCALE = 30.0  # data with a larger root mean square have not been scaled
LOOKED_AT = 1024  # rows of data whose numbers are looked at


def examples(name: str, x0: Any, process: Any) -> None:
    """Refuse data x0 [N, ...] that are not states of the process: another shape, tokens that are not one-hot, images in 0 ... 255."""
    parts = getattr(process, "parts", None)
    if parts is not None and not hasattr(process, "shape"):  # a graph's parts are one array
        if not isinstance(x0, dict) or set(x0) != set(parts):
            got = sorted(x0) if isinstance(x0, dict) else shown(x0)
            raise ValueError(f"{name} of a mixed process must be a dict of {sorted(parts)}, got {got}")
        for part in parts:
            examples(f"{name}[{part!r}]", x0[part], parts[part])
        return
    wanted, got, classes = tuple(process.shape), tuple(np.shape(x0)), getattr(process, "classes", None)
    kind = np.dtype(x0.dtype) if hasattr(x0, "dtype") else np.asarray(x0).dtype
    expected = wanted if classes is None else (*wanted, classes)
    if got[1:] != expected:
        extra = ""
        if classes is not None and got[1:] == wanted:
            extra = f"; one-hot tokens belong there: jax.nn.one_hot(tokens, {classes})"
        elif classes is not None and got[1:] == (*wanted, classes + 1):
            extra = "; leave the mask out"
        text = ", ".join(map(str, ("N", *expected)))
        raise ValueError(f"{name} must have the process' shape [{text}], got {kind}{list(got)}{extra}")
    if isinstance(x0, Tracer):
        return
    some = np.asarray(x0[:LOOKED_AT], np.float32)
    if classes is not None:
        if not (np.isin(some, (0, 1)).all() and (some.sum(-1) == 1).all()):
            raise ValueError(f"{name} must be one-hot tokens, a single 1 among {classes} numbers per position")
        return
    noise = float(np.max(getattr(process.prior(1), "std", 1.0)))
    scale, limit = float(np.sqrt(np.mean(some**2))), max(LARGEST_SCALE, noise)
    if not np.issubdtype(kind, np.floating) or scale > limit:
        raise ValueError(
            f"{name} must be floats of order 1 in both directions, got {kind} with a root mean square of {scale:.3g}; "
            "scale them, e.g. images in 0 ... 255 by x / 127.5 - 1"
        )


def driven(name: str, value: Any, parts: tuple[str, ...], hint: str) -> None:
    """Refuse what has not the functions that a driver calls."""
    if missing := [part for part in parts if not callable(getattr(value, part, None))]:
        raise ValueError(f"{name} has no {missing[0]}, got {shown(value)}; {hint}")


def state(value: Any) -> None:
    """Refuse a training state that is none, or whose buffers an earlier call took."""
    if not hasattr(value, "step"):
        raise ValueError(f"state must come from tuner.init(params) or an earlier fit, got {shown(value)}")
    if any(
        isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.is_deleted()
        for leaf in jax.tree.leaves(value)
    ):
        raise ValueError(
            "this state was given to an earlier fit, which took its buffers (it donates them); go on from the state that fit returned, "
            "or begin again with tuner.init(params)"
        )
