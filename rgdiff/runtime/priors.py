"""Priors of recipes: a network, a schedule and how it is trained; trained once, cached by content, and reused.

It assumes a domain with `shape` and `training_data()`. What is sampled from a prior, and how it is tuned, is left to
`rgdiff.runtime.methods`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rgdiff import denoisers, processes, tuners
from rgdiff.runtime.checkpoint import load_params, save_params
from rgdiff.runtime.run import Run
from rgdiff.typing import Denoiser, Params, Process, pytree, static


@pytree
class PriorModel:
    """Parameters to denoiser: the network's prediction as x0, clipped to the data's range where asked."""

    schedule: Any
    network: Any = static()
    prediction: str = static()
    value_range: tuple[float, float] | None = static(default=None)

    def __call__(self, params: Params) -> Denoiser:
        network = denoisers.from_linen(self.network, params)
        denoiser = denoisers.predicts(self.prediction, network, self.schedule)
        return denoiser if self.value_range is None else denoisers.clip_x0(denoiser, *self.value_range)


@dataclasses.dataclass(frozen=True)
class Prior:
    """A prior ready for use: `model(params)` denoises under `process`, in chains over `times`."""

    process: Process
    times: jax.Array
    model: PriorModel
    params: Params
    settings: GaussianPrior
    shape: tuple[int, ...]

    @property
    def denoiser(self) -> Denoiser:
        return self.model(self.params)

    def with_eta(self, eta: float) -> Process:
        """Return the process with another eta."""
        return self.settings.process(self.shape, eta)


def initial(network: Any, key: jax.Array, shape: tuple[int, ...]) -> Params:
    """Draw a Linen network's parameters for states [B, *shape] without running it."""
    blank, t = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, *shape), (1,)))
    return network.lazy_init(key, blank, t)["params"]


@dataclasses.dataclass(frozen=True)
class GaussianPrior:
    """The settings of a Gaussian prior. Build it with `gaussian_prior`."""

    network: Any
    schedule: Any
    prediction: str
    steps: int
    eta: float
    clip: bool
    checkpoint: str | None
    train: dict[str, Any]

    def process(self, shape: tuple[int, ...], eta: float | None = None) -> Process:
        """Return the process on examples of this shape, with the prior's own eta or another."""
        return processes.gaussian(self.schedule, shape, eta=self.eta if eta is None else eta)

    def obtain(self, run: Run, domain: Any, identity: Any) -> Prior:
        """Load the prior from its checkpoint or the cache, or train it and cache it.

        Args:
          identity: plain values that the trained parameters depend on; their hash names the cache entry.
        """
        model = PriorModel(self.schedule, self.network, self.prediction)
        process = self.process(domain.shape)
        key = run.key("prior")
        like = initial(self.network, jax.random.fold_in(key, 0), domain.shape)
        if self.checkpoint is not None:
            run.say(f"prior: parameters from {self.checkpoint}")
            params = load_params(self.checkpoint, like)
        else:
            digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
            cached = run.cache / "priors" / digest
            if cached.exists():
                run.say(f"prior: trained earlier, from {cached}")
                params = load_params(cached, like)
            else:
                options = dict(self.train)
                steps, batch = options.pop("steps"), options.pop("batch")
                tuner = tuners.pretraining(model, process, **options)
                state = run.fit("prior", tuner, key, like, steps, data={"x0": jnp.asarray(domain.train_x)}, batch=batch)
                params = state.best
                cached.parent.mkdir(parents=True, exist_ok=True)
                save_params(cached, params, meta={"identity": identity})
        clipped = dataclasses.replace(model, value_range=domain.value_range) if self.clip else model
        return Prior(process, process.times(self.steps), clipped, params, self, domain.shape)


def gaussian_prior(
    network: Any,
    schedule: Any,
    prediction: str,
    train: dict[str, Any],
    steps: int = 25,
    eta: float = 1.0,
    clip: bool = True,
    checkpoint: str | None = None,
) -> GaussianPrior:
    """Describe a Gaussian prior.

    Args:
      network: a Linen module called as (x, t, cond).
      schedule: of `rgdiff.schedules`.
      prediction: what the network predicts (`rgdiff.denoisers.predicts`).
      train: steps, batch and the arguments of `rgdiff.tuners.pretraining`.
      steps: network calls of a sampling chain.
      eta: of sampling.
      clip: clip predictions of x0 to the data's range when sampling.
      checkpoint: parameters of your own, an Orbax folder or a .safetensors file, in place of training.
    """
    return GaussianPrior(network, schedule, prediction, steps, eta, clip, checkpoint, train)


def default_cache() -> Path:
    """Return the cache of trained priors and compiled programs: RGDIFF_CACHE, or rgdiff under the user's cache folder."""
    base = os.environ.get("RGDIFF_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rgdiff"
