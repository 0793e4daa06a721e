"""Checks at the public door: one clear line each, raised when a method is built or a run begins, never inside a loop.

They look at structure and at concrete numbers only, so a traced value passes; what can go wrong inside a compiled
program (NaN rewards, non-finite gradients) is counted there and reported by the loops.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def key(value: Any) -> None:
    """Refuse anything but one new-style PRNG key."""
    if not isinstance(value, jax.Array) or not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        raise ValueError(
            f"key must be a typed PRNG key, got {_describe(value)}; make one with jax.random.key(seed), "
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
    """Return a masked denoiser's prediction at states x [B, ..., K + 1] if it is logits of the K tokens, [B, ..., K]."""
    wanted = (*x.shape[:-1], x.shape[-1] - 1)
    if jnp.shape(prediction) != wanted:
        hint = ", without one for the mask: logits[..., :-1]" if jnp.shape(prediction) == x.shape else ""
        raise ValueError(
            f"a denoiser of {wanted[-1]} tokens must return logits {list(wanted)}, got {list(jnp.shape(prediction))}{hint}"
        )
    return prediction


def times(value: Any, process: Any) -> jax.Array:
    """Return a time grid as float32 [T + 1]; refuse one that does not decrease within [0, 1] or ends at the wrong place."""
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


def _describe(value: Any) -> str:
    if hasattr(value, "dtype"):
        return f"an array of {value.dtype}{list(value.shape)}"
    return f"{type(value).__name__} {value!r}"
