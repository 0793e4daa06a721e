"""Priors of recipes: a network, a schedule and how it is trained; trained once, cached by content, and reused.

It assumes a domain with `shape` and `train_x`. What is sampled from a prior, and how it is tuned, is left to
`rgdiff.recipes.outcome`.
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
import numpy as np

from rgdiff import checks, denoisers, processes, tuners
from rgdiff.exact.enumeration import Factorised
from rgdiff.runtime.checkpoint import load_params, save_params
from rgdiff.runtime.run import Run
from rgdiff.typing import Denoiser, Model, Params, Process, pytree, static


@pytree
class PriorModel:
    """Parameters to denoiser: the network's prediction as x0, clipped to the data's range where asked."""

    schedule: Any
    network: Any = static()
    prediction: str = static()
    value_range: tuple[float, float] | None = static(default=None)
    classes: int | None = static(default=None)
    guidance: float = 1.0

    def __call__(self, params: Params) -> Denoiser:
        network = denoisers.from_linen(self.network, params)
        denoiser = denoisers.predicts(self.prediction, network, self.schedule)
        if self.classes is not None:
            denoiser = denoisers.classifier_free(denoiser, self.guidance, self.classes)
        return denoiser if self.value_range is None else denoisers.clip_x0(denoiser, *self.value_range)


@pytree
class FactorisedModel:
    """Logits [L, K] of independent positions to their exact denoiser."""

    def __call__(self, params: Params) -> Denoiser:
        return Factorised(params)


@dataclasses.dataclass(frozen=True)
class Prior:
    """A prior ready for use: `model(params)` denoises under `process`, in chains over `times`."""

    process: Process
    times: jax.Array
    model: Model
    params: Params
    settings: Any
    shape: tuple[int, ...]
    classes: int | None = None

    def conditions(self, count: int) -> jax.Array | None:
        """Return the labels [count] that samples of a conditional prior are drawn with, every class in turn."""
        return None if self.classes is None else jnp.arange(count) % self.classes

    @property
    def denoiser(self) -> Denoiser:
        return self.model(self.params)

    def with_eta(self, eta: float | None) -> Process:
        """Return the process with another eta."""
        return self.settings.process(self.shape, eta)


def unconditional(settings: Any, what: str, instead: str) -> None:
    """Refuse the settings of a conditional prior, before it is trained."""
    if getattr(settings, "guidance", None) is not None:
        raise ValueError(f"{what} is not offered for a conditional prior; {instead}")


def initial(network: Any, key: jax.Array, shape: tuple[int, ...]) -> Params:
    """Draw a Linen network's parameters for states [B, *shape] without running it."""
    blank, t = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, *shape), (1,)))
    return network.lazy_init(key, blank, t)["params"]


def state_shape(process: Process) -> tuple[int, ...]:
    """Return the shape of one noised example, as a network sees it; a masked one has the mask as a further class."""
    return jax.eval_shape(lambda: process.prior(1).sample(jax.random.key(0))).shape[1:]


@dataclasses.dataclass(frozen=True)
class TrainedPrior:
    """What priors with a network share: how their parameters are found."""

    network: Any
    schedule: Any
    steps: int
    checkpoint: str | None
    train: dict[str, Any]

    unseen = ("steps", "checkpoint")  # settings that training does not see: priors that differ in them alone are one

    def digest(self, identity: Any) -> str:
        """Return the name of the cache entry: a hash of what training sees of the settings."""
        seen = {name: value for name, value in identity["prior"].items() if name not in self.unseen}
        identity = identity | {"prior": seen, "conditional": self.train.get("null") is not None}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

    def parameters(self, run: Run, model: Model, process: Process, domain: Any, identity: Any) -> Params:
        """Load the parameters from the checkpoint or the cache, or train and cache them.

        Args:
          identity: the run's domain, prior and seed as plain values; the hash of what training sees of them, all but `unseen`,
            names the cache entry.
        """
        key = run.key("prior")
        like = initial(self.network, jax.random.fold_in(key, 0), state_shape(process))
        if self.checkpoint is not None:
            run.say(f"prior: parameters from {self.checkpoint}")
            return load_params(self.checkpoint, like)
        digest = self.digest(identity)
        cached = run.cache / "priors" / digest
        if cached.exists():
            run.say(f"prior: trained earlier, from {cached}")
            return load_params(cached, like)
        options = dict(self.train)
        steps, batch = options.pop("steps"), options.pop("batch")
        tuner = tuners.pretraining(model, process, **options)
        data = {"x0": jnp.asarray(domain.train_x)}
        if options.get("null") is not None:
            data["cond"] = jnp.asarray(domain.train_y)
        params = run.fit("prior", tuner, key, like, steps, data=data, batch=batch).best
        cached.parent.mkdir(parents=True, exist_ok=True)
        save_params(cached, params, meta={"identity": identity})
        return params


@dataclasses.dataclass(frozen=True)
class GaussianPrior(TrainedPrior):
    """The settings of a Gaussian prior. Build it with `gaussian_prior`."""

    prediction: str
    eta: float
    clip: bool
    guidance: float | None = None

    unseen = (*TrainedPrior.unseen, "eta", "clip", "guidance")  # whether there are conditions is seen

    def process(self, shape: tuple[int, ...], eta: float | None = None) -> Process:
        """Return the process on examples of this shape, with the prior's own eta or another."""
        return processes.gaussian(self.schedule, shape, eta=self.eta if eta is None else eta)

    def obtain(self, run: Run, domain: Any, identity: Any) -> Prior:
        """Make the prior ready; `identity` as in `parameters`."""
        model = PriorModel(self.schedule, self.network, self.prediction)
        process = self.process(domain.shape)
        settings, classes = self, None
        if self.guidance is not None:
            classes = getattr(domain, "classes", None)
            if classes is None or getattr(self.network, "classes", classes) != classes:
                raise ValueError(
                    f"a conditional prior needs a domain with labels and a network for its {classes} classes, "
                    f"got prior.network.classes={getattr(self.network, 'classes', None)}"
                )
            settings = dataclasses.replace(self, train={**self.train, "null": classes})
        params = settings.parameters(run, model, process, domain, identity)
        clipped = dataclasses.replace(model, value_range=domain.value_range) if self.clip else model
        if classes is not None:
            clipped = dataclasses.replace(clipped, classes=classes, guidance=self.guidance)
        return Prior(process, process.times(self.steps), clipped, params, self, domain.shape, classes)


@dataclasses.dataclass(frozen=True)
class MaskedPrior(TrainedPrior):
    """The settings of a masked prior with a network. Build it with `masked_prior`."""

    order: str = "independent"

    unseen = (*TrainedPrior.unseen, "order")

    def process(self, shape: tuple[int, ...], eta: float | None = None) -> Process:
        """Return the process on one-hot examples of this shape, (L, K)."""
        return _masked(self.schedule, shape, eta, self.order)

    def obtain(self, run: Run, domain: Any, identity: Any) -> Prior:
        """Make the prior ready; `identity` as in `parameters`."""
        process = self.process(domain.shape)
        blank, t = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, *state_shape(process)), (1,)))
        out = jax.eval_shape(lambda x, t: self.network.init_with_output(jax.random.key(0), x, t)[0], blank, t)
        if out.shape != (1, *domain.shape):
            raise ValueError(
                f"prior.network returns {list(out.shape[1:])} for a sequence, expected logits {list(domain.shape)}; "
                f"give prior.network.out={domain.shape[-1]}"
            )
        model = denoisers.LinenModel(self.network)
        params = self.parameters(run, model, process, domain, identity)
        return Prior(process, process.times(self.steps), model, params, self, domain.shape)


@dataclasses.dataclass(frozen=True)
class FactorisedPrior:
    """The settings of a masked prior of independent positions. Build it with `factorised_prior`."""

    schedule: Any
    steps: int
    pseudocount: float
    uniform: bool
    order: str = "independent"

    def process(self, shape: tuple[int, ...], eta: float | None = None) -> Process:
        """Return the process on one-hot examples of this shape, (L, K)."""
        return _masked(self.schedule, shape, eta, self.order)

    def obtain(self, run: Run, domain: Any, identity: Any) -> Prior:
        """Count the letters of the training sequences; nothing is trained."""
        process = self.process(domain.shape)
        counts = np.asarray(domain.train_x).sum(0, dtype=np.float64) + self.pseudocount
        p = np.ones_like(counts) if self.uniform else counts
        logits = jnp.asarray(np.log(p / p.sum(-1, keepdims=True)), jnp.float32)
        return Prior(process, process.times(self.steps), FactorisedModel(), logits, self, domain.shape)


def _masked(schedule: Any, shape: tuple[int, ...], eta: float | None, order: str) -> Process:
    if eta is not None:
        raise ValueError(f"eta is for Gaussian priors, and this one is masked; give method.eta=null instead of {eta}")
    process = processes.masked(schedule, shape[:-1], shape[-1])
    first = checks.one_of("prior.order", order, ("independent", "first_hitting")) == "first_hitting"
    return processes.first_hitting(process) if first else process


def gaussian_prior(
    network: Any,
    schedule: Any,
    prediction: str,
    train: dict[str, Any],
    steps: int = 25,
    eta: float = 1.0,
    clip: bool = True,
    checkpoint: str | None = None,
    guidance: float | None = None,
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
      guidance: scale of classifier-free guidance by the domain's labels, which then condition the prior; null for none.
    """
    return GaussianPrior(network, schedule, steps, checkpoint, train, prediction, eta, clip, guidance)


def masked_prior(
    network: Any,
    schedule: Any,
    train: dict[str, Any],
    steps: int = 32,
    checkpoint: str | None = None,
    order: str = "independent",
) -> MaskedPrior:
    """Describe a masked prior of sequences (MDLM, arXiv 2406.07524).

    Args:
      network: a Linen module called as (x, t, cond) on [B, L, K + 1], returning logits [B, L, K].
      schedule: a mask schedule of `rgdiff.schedules`.
      train: steps, batch and the arguments of `rgdiff.tuners.pretraining`.
      steps: network calls of a sampling chain.
      checkpoint: parameters of your own, an Orbax folder or a .safetensors file, in place of training.
      order: `independent` positions in `steps` moves, or `first_hitting`, one position a move (`processes.first_hitting`).
    """
    return MaskedPrior(network, schedule, steps, checkpoint, train, order)


def factorised_prior(
    schedule: Any, steps: int = 16, pseudocount: float = 1.0, uniform: bool = False, order: str = "independent"
) -> FactorisedPrior:
    """Describe a masked prior of independent positions, whose exact denoiser is known: letter frequencies of the training data.

    Args:
      steps: of a sampling chain.
      pseudocount: added to the count of every letter at every position.
      uniform: all letters alike, whatever the data.
      order: as in `masked_prior`.
    """
    if not uniform and not pseudocount > 0:
        raise ValueError(f"pseudocount must be > 0, so that no letter is impossible, got {pseudocount!r}")
    return FactorisedPrior(schedule, steps, pseudocount, uniform, order)


def default_cache() -> Path:
    """Return the cache of trained priors and compiled programs: RGDIFF_CACHE, or rgdiff under the user's cache folder."""
    base = os.environ.get("RGDIFF_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rgdiff"
