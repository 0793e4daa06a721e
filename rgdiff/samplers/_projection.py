"""The last network call of a chain, which projects to data, as one more move of its loop: from the last time to itself.

A program then holds the network once, where it would hold it in the loop and after it, and compiles sooner. Samples, path KL and
gradients are the same, up to rounding. It is for Gaussian chains, products and graphs of them, and corrected ones.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from rgdiff import graphs
from rgdiff.correctors import CorrectedProcess
from rgdiff.kernels import Gaussian, PointMass
from rgdiff.processes import GaussianProcess, ProductProcess
from rgdiff.typing import Array, Key, Process, Sampler, State, pytree


@pytree
class MoveOrProjection:
    """A move's kernel or, where `last`, the projection x0, whose KL is that of the two predictions noised back to t."""

    last: Array
    move: Gaussian | PointMass
    x0: Array
    noised: Gaussian

    def sample(self, key: Key) -> Array:
        return jnp.where(self.last, self.x0, self.move.sample(key))

    def rsample(self, key: Key) -> Array:
        return jnp.where(self.last, self.x0, self.move.rsample(key))

    def kl(self, other: Any) -> Array:
        return jnp.where(self.last, self.noised.kl(other.noised), self.move.kl(other.move))

    def within(self, where: Array) -> MoveOrProjection:
        """Return the law of a state that has these entries alone: the others are 0."""
        x0 = jnp.where(where, self.x0, 0.0)
        return MoveOrProjection(self.last, self.move.within(where), x0, self.noised.within(where))


@pytree
class ProjectingProcess(GaussianProcess):
    """A Gaussian process whose kernel from t to t is the projection."""

    def reverse(self, x: Array, t: Array, s: Array, prediction: Array) -> Any:
        """Return p(x_s | x_t), or the projection where s = t: a kernel from t to t has a KL of 0/0, and that from (1 + t) / 2 stands in."""
        last = s >= t
        move = super().reverse(x, jnp.where(last, (1 + t) / 2, t), jnp.where(last, t, s), prediction)
        noised = self.forward(self.mean(x, t, prediction), t)
        return MoveOrProjection(last, move, self.finalize(x, t, prediction), noised)


def projecting(process: Process) -> Any:
    """Return a process whose kernels from t to t are projections, or None of one that has a part of another kind than Gaussian."""
    if type(process) is GaussianProcess:
        return ProjectingProcess(**{field.name: getattr(process, field.name) for field in dataclasses.fields(process)})
    if type(process) in (ProductProcess, graphs.GraphProcess):
        parts = {name: projecting(part) for name, part in process.parts.items()}  # type: ignore[attr-defined]
        return None if None in parts.values() else dataclasses.replace(process, parts=parts)  # type: ignore[type-var]
    if type(process) is CorrectedProcess:
        inner = projecting(process.process)
        return None if inner is None else dataclasses.replace(process, process=inner)
    return None


def arrived(process: Any, x: State) -> State:
    """Return x0 of the state after the last move of a projecting process: as `finalize` gives it."""
    if isinstance(process, CorrectedProcess):
        return arrived(process.process, x["state"])
    return graphs.packed(x) if isinstance(process, graphs.GraphProcess) else x


def merged(sampler: Sampler, times: Array) -> tuple[Any, Array]:
    """Return a sampler and a grid of one more move, after which `arrived` finds x0; the same two of a chain that cannot be so arranged."""
    arranged = getattr(sampler, "merged", lambda: None)
    if times.shape[0] <= 2 or (moving := arranged()) is None:  # a chain of one move holds no loop
        return sampler, times
    return moving, jnp.append(times, times[-1])
