"""Priors of recipes, named by `prior/*.yaml`: a network, a schedule and how it is trained; or a law that is known.

A trained prior is trained once, cached by content, and reused. Sampling and tuning it is left to the methods.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import assets, checks, denoisers, processes, schedules, tuners
from rgdiff.exact.enumeration import Factorised
from rgdiff.recipes.typing import Domain, Prior, ReadyPrior, Shape
from rgdiff.runtime.checkpoint import CheckpointError, check_params, load_params, save_params
from rgdiff.runtime.distributed import agreed
from rgdiff.runtime.run import Run, phase_key
from rgdiff.typing import Denoiser, Model, Params, Process, pytree, static

log = logging.getLogger("rgdiff")

FRESH = 10_000  # points that a law is drawn for, beside those a prior learns from


@pytree
class PriorModel:
    """Parameters -> denoiser: the network's prediction as x0, clipped to the data's range where asked.

    Args:
      schedule: Gaussian, of `rgdiff.schedules`.
      network: a Linen module (x, t, cond) -> [B, ...].
      prediction: `eps`, `v`, `x0`, ..., see `rgdiff.denoisers.predicts`.
      value_range: lowest and highest value of the data, or None.
      classes: number of classes of a conditional prior, or None.
      guidance: scale of classifier-free guidance, no unit.
    """

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
    """Logits [L, K] of independent positions -> their exact denoiser."""

    def __call__(self, params: Params) -> Denoiser:
        return Factorised(params)


def needs_data(prior: Prior) -> None:
    """Refuse the settings of a prior that does not give its data to methods, or is conditional, before it is trained.

    Args:
      prior: settings.
    """
    if not getattr(prior, "gives_data", False):
        raise ValueError(
            "this method learns from data, which Gaussian priors hand on, e.g. prior=planar_mlp or prior=unet, "
            "and prior=pipeline on domain=pictures"
        )
    unconditional(prior, "a method that learns from data", "choose a prior without prior.guidance")


def offers(domain: Any, name: str, what: str) -> None:
    """Refuse a domain that lacks what a prior needs of it, before anything is trained."""
    if not hasattr(domain, name):
        raise ValueError(
            f"this prior needs a domain with {what}; choose another prior or domain, `rgdiff list` shows them"
        )


def unconditional(prior: Prior, what: str, instead: str) -> None:
    """Refuse the settings of a conditional prior, before it is trained.

    Args:
      prior: settings.
      what: the setting that needs an unconditional prior, for the message.
      instead: the advice of the message.
    """
    if getattr(prior, "several", getattr(prior, "guidance", None) is not None):
        raise ValueError(f"{what} is not offered for a conditional prior; {instead}")


def initial(network: Any, key: jax.Array, shape: Any) -> Params:
    """Draw a Linen network's parameters for states [B, *shape] without running it.

    Args:
      network: a Linen module, called as (x, t).
      key: a typed PRNG key.
      shape: of one example; of a state with several parts, a dict of them.
    """
    spec = lambda s: jax.ShapeDtypeStruct((1, *s), jnp.float32)  # noqa: E731
    blank = jax.tree.map(spec, shape, is_leaf=lambda part: isinstance(part, tuple))
    return network.lazy_init(key, blank, spec(()))["params"]


def state_shape(process: Process) -> Any:
    """Return the shape of one noised example, as a network sees it; a masked one has the mask as a further class.

    Of a state with several parts it is a dict of their shapes.

    Args:
      process: any.
    """
    one = jax.eval_shape(lambda: process.prior(1).sample(jax.random.key(0)))
    return jax.tree.map(lambda leaf: leaf.shape[1:], one)


def prediction_shape(network: Any, shape: Shape) -> tuple[int, ...]:
    """Return the shape that a Linen network makes of one state of `shape`, without running it.

    Raises:
      ValueError: if it does not take such a state.
    """
    blank, t = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, *shape), (1,)))
    try:
        out = jax.eval_shape(lambda x, t: network.init_with_output(jax.random.key(0), x, t)[0], blank, t)
        return tuple(out.shape[1:])
    except Exception as error:  # whatever a network does with a state that it is not for
        reason = (" ".join(str(error).split()) or type(error).__name__)[:160]
        raise ValueError(
            f"prior.network does not take a state of shape {list(shape)}: {reason}; choose another prior, `rgdiff list` shows them"
        ) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedPrior(Prior):
    """The shared part of priors with a network: how their parameters are found.

    Args:
      network: a Linen module called as (x, t, cond).
      schedule: of `rgdiff.schedules`.
      train: steps, batch and the arguments of `rgdiff.tuners.pretraining`.
      steps: network calls of a sampling chain.
      checkpoint: parameters in place of training: an Orbax folder or a .safetensors file of your own, or `package:NAME`, a file
        that comes with rgdiff.
      seed: of training, apart from the run's: runs of several seeds share one prior.
    """

    network: Any
    schedule: Any
    train: dict[str, Any]
    steps: int
    checkpoint: str | None = None
    seed: int = 0

    unseen = ("steps", "checkpoint")  # settings that training does not see: priors that differ in them alone are one

    def check(self, domain: Any) -> None:
        """Refuse what does not fit each other or the domain, before anything is trained: steps, network, checkpoint, training."""
        process = self.process(domain.shape)  # type: ignore[attr-defined]
        _chain(process, self.steps)
        shape = state_shape(process)
        if (found := prediction_shape(self.network, shape)) != tuple(domain.shape):
            out = f"; give prior.network.out={domain.shape[-1]}" if hasattr(self.network, "out") else ""
            raise ValueError(
                f"prior.network returns {list(found)} for a state of shape {list(shape)}, expected {list(domain.shape)}{out}"
            )
        like = jax.eval_shape(lambda key: initial(self.network, key, shape), jax.random.key(0))
        self.model()(like)
        if self.checkpoint is not None:
            check_params(assets.resolved(self.checkpoint), like)
        else:
            offers(domain, "train_x", "examples to train a prior on")
            self.tuner(self.model(), process)

    def model(self) -> Model:
        """Return what the parameters are of: a map from them to a denoiser."""
        return denoisers.LinenModel(self.network)

    def kept(self, cache: Path, identity: Any, domain: Any) -> Path:
        """Return where the parameters are kept in the cache once they are trained."""
        return cache / "priors" / self.digest(identity, domain)

    def digest(self, identity: Any, domain: Any) -> str:
        """Return the name of the cache entry: a hash of what training sees of the settings, and of the data.

        Args:
          run: for the key, the cache and the log.
          model: params -> denoiser.
          process: of the prior.
          domain: with train_x, and train_y for a conditional prior.
          identity: the prior's settings as plain values; the hash of what training sees of them, all but `unseen`, and of the
            data names the cache entry.
        """
        seen = {name: value for name, value in identity.items() if name not in self.unseen} | {"seed": self.seed}
        conditional = self.train.get("null") is not None
        told = hashlib.sha256(json.dumps({"prior": seen, "conditional": conditional}, sort_keys=True).encode())
        if not type(self.network).__module__.startswith("rgdiff."):  # a user's, who may change it
            with contextlib.suppress(OSError, TypeError):
                told.update(inspect.getsource(type(self.network)).encode())
        for part in (domain.train_x, domain.train_y) if conditional else (domain.train_x,):
            array = np.ascontiguousarray(part)
            told.update(f"{array.dtype}{array.shape}".encode())
            told.update(array.tobytes())
        return told.hexdigest()[:16]

    def tuner(self, model: Any, process: Process) -> Any:
        """Build the trainer."""
        options = {name: value for name, value in self.train.items() if name not in ("steps", "batch")}
        try:
            return tuners.pretraining(model, process, **options)
        except TypeError as error:  # an option that it does not take, or lacks
            raise ValueError(f"prior.train: {error}") from None

    def parameters(self, run: Run, model: Model, process: Process, domain: Any, identity: Any) -> Params:
        """Load the parameters from the checkpoint or the cache, or train and cache them; `identity` as in `digest`."""
        key = phase_key(self.seed, "prior")
        like = initial(self.network, jax.random.fold_in(key, 0), state_shape(process))
        if self.checkpoint is not None:
            run.say(f"prior: parameters from {self.checkpoint}")
            return load_params(assets.resolved(self.checkpoint), like)
        cached = self.kept(run.cache, identity, domain)
        if agreed(cached.exists()):
            try:
                params = load_params(cached, like)
                run.say(f"prior: trained earlier, from {cached}")
                return params
            except CheckpointError as error:
                run.say(f"prior: trained again, for the cached one cannot be used ({error})")
        data = {"x0": jnp.asarray(domain.train_x)}
        if self.train.get("null") is not None:
            data["cond"] = jnp.asarray(domain.train_y)
        steps, batch = self.train["steps"], self.train["batch"]
        params = run.fit("prior", self.tuner(model, process), key, like, steps, data=data, batch=batch).best
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            save_params(cached, params, meta={"identity": identity})
        except (CheckpointError, OSError) as error:
            log.warning("the prior was not kept for other runs: %s", " ".join(str(error).split()))
        return params


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianPrior(TrainedPrior):
    """A Gaussian prior. It gives its data to methods that learn from data.

    Args:
      network, schedule, train, checkpoint: as in `TrainedPrior`.
      prediction: of the network (`rgdiff.denoisers.predicts`).
      steps: network calls of a sampling chain.
      eta: of sampling.
      clip: clip predictions of x0 to the data's range when sampling.
      guidance: scale of classifier-free guidance by the domain's labels, which then condition the prior; null for none.
    """

    prediction: str
    steps: int = 25
    eta: float = 1.0
    clip: bool = True
    guidance: float | None = None

    unseen = (*TrainedPrior.unseen, "eta", "clip", "guidance")  # whether there are conditions is seen

    @property
    def gives_data(self) -> bool:
        """Whether methods may learn from its data; a prior that comes with the package comes without."""
        return not (self.checkpoint or "").startswith(assets.PREFIX)

    def check(self, domain: Any) -> None:
        """Refuse what does not fit each other or the domain, before anything is trained."""
        TrainedPrior.check(self.conditioned(self.conditional(domain)), domain)

    def kept(self, cache: Path, identity: Any, domain: Any) -> Path:
        """Return where the parameters are kept in the cache once they are trained."""
        return TrainedPrior.kept(self.conditioned(self.conditional(domain)), cache, identity, domain)

    def model(self) -> PriorModel:
        """Return what the parameters are of, without a clip and a condition."""
        return PriorModel(self.schedule, self.network, self.prediction)

    def conditioned(self, classes: int | None) -> GaussianPrior:
        """Return the settings with a null class for training without a condition, where there are classes."""
        return self if classes is None else dataclasses.replace(self, train={**self.train, "null": classes})

    def conditional(self, domain: Any) -> int | None:
        """Return the number of classes that the prior is conditioned on, or None."""
        if self.guidance is None:
            return None
        classes = getattr(domain, "classes", None)
        if classes is None or getattr(self.network, "classes", classes) != classes:
            raise ValueError(
                f"a conditional prior needs a domain with labels and a network for its {classes} classes, "
                f"got prior.network.classes={getattr(self.network, 'classes', None)}"
            )
        return classes

    def process(self, shape: Shape, eta: float | None = None) -> Process:
        """Return the process on examples of this shape, with the prior's own eta or another."""
        return processes.gaussian(self.schedule, shape, eta=self.eta if eta is None else eta)

    def obtain(self, run: Run, domain: Domain, identity: Mapping[str, Any]) -> ReadyPrior:
        """Make the prior ready; `identity` as in `parameters`."""
        model = self.model()
        process = self.process(domain.shape)
        classes = self.conditional(domain)
        params = self.conditioned(classes).parameters(run, model, process, domain, identity)
        clipped = dataclasses.replace(model, value_range=domain.value_range) if self.clip else model
        if classes is not None:
            clipped = dataclasses.replace(clipped, classes=classes, guidance=self.guidance)
        drawn: Any = domain
        fresh = drawn.data(run.key("fresh"), FRESH) if hasattr(domain, "data") else getattr(domain, "heldout_x", None)
        return ReadyPrior(
            process=process,
            times=process.times(self.steps),
            model=clipped,
            params=params,
            settings=self,
            shape=domain.shape,
            classes=classes,
            data=getattr(domain, "train_x", None),
            fresh=fresh,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedPrior(TrainedPrior):
    """A masked prior of sequences (MDLM, arXiv 2406.07524), whose network maps [B, L, K + 1] to logits [B, L, K].

    Args:
      network, schedule, train, checkpoint: as in `TrainedPrior`.
      steps: moves of a sampling chain.
      order: `independent` positions in `steps` moves, or `first_hitting`, one position a move (`processes.first_hitting`).
    """

    steps: int = 32
    order: str = "independent"

    unseen = (*TrainedPrior.unseen, "order")

    def process(self, shape: Shape, eta: float | None = None) -> Process:
        """Return the process on one-hot examples of this shape, (L, K)."""
        return _masked(self.schedule, shape, eta, self.order)

    def obtain(self, run: Run, domain: Domain, identity: Mapping[str, Any]) -> ReadyPrior:
        """Make the prior ready; `identity` as in `parameters`."""
        process = self.process(domain.shape)
        model = self.model()
        params = self.parameters(run, model, process, domain, identity)
        return ReadyPrior(process, process.times(self.steps), model, params, self, domain.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactorisedPrior(Prior):
    """A masked prior of independent positions, whose exact denoiser is known: letter frequencies of the training data.

    Args:
      schedule: a mask schedule of `rgdiff.schedules`.
      steps: moves of a sampling chain.
      pseudocount: added to the count of every letter at every position.
      uniform: all letters alike, whatever the data.
      order: as in `MaskedPrior`.
    """

    schedule: Any
    steps: int = 16
    pseudocount: float = 1.0
    uniform: bool = False
    order: str = "independent"

    def __post_init__(self) -> None:
        if not self.uniform and not self.pseudocount > 0:
            raise ValueError(f"pseudocount must be > 0, so that no letter is impossible, got {self.pseudocount!r}")

    def check(self, domain: Domain) -> None:
        """Refuse what does not fit the domain."""
        _chain(self.process(domain.shape), self.steps)

    def process(self, shape: Shape, eta: float | None = None) -> Process:
        """Return the process on one-hot examples of this shape, (L, K)."""
        return _masked(self.schedule, shape, eta, self.order)

    def obtain(self, run: Run, domain: Domain, identity: Mapping[str, Any]) -> ReadyPrior:
        """Count the letters of the training sequences; nothing is trained."""
        process = self.process(domain.shape)
        counts = np.asarray(domain.train_x).sum(0, dtype=np.float64) + self.pseudocount
        p = np.ones_like(counts) if self.uniform else counts
        logits = jnp.asarray(np.log(p / p.sum(-1, keepdims=True)), jnp.float32)
        return ReadyPrior(process, process.times(self.steps), FactorisedModel(), logits, self, domain.shape)


def _chain(process: Process, steps: int) -> None:
    """Refuse a number of network calls that the process does not take."""
    checks.times(process.times(checks.at_least("prior.steps", steps, 1)), process)


def _masked(schedule: Any, shape: Shape, eta: float | None, order: str) -> Process:
    if eta is not None:
        raise ValueError(f"eta is for Gaussian priors, and this one is masked; give method.eta=null instead of {eta}")
    if len(shape) < 2:
        raise ValueError(
            f"this prior is of sequences, and the domain's examples have shape {list(shape)}; choose another"
        )
    process = processes.masked(schedule, shape[:-1], shape[-1])
    first = checks.one_of("prior.order", order, ("independent", "first_hitting")) == "first_hitting"
    return processes.first_hitting(process) if first else process


@dataclasses.dataclass(frozen=True, kw_only=True)
class VectorPrior(GaussianPrior):
    """A Gaussian prior with a network on a domain whose exact denoiser is known, to which it is compared.

    Args:
      network, schedule, train, checkpoint, prediction, steps, eta, clip, guidance: as in `GaussianPrior`.
    """

    def check(self, domain: Domain) -> None:
        offers(domain, "family", "an exact denoiser: subspace, sphere or mixture")
        super().check(domain)

    def obtain(self, run: Run, domain: Any, identity: Mapping[str, Any]) -> ReadyPrior:
        """Train or load the prior, and measure its eps-error on fresh data, beside that of the exact denoiser (the Bayes error)."""
        prior = super().obtain(run, domain, identity)
        x0, key = domain.data(run.key("prior_error_data"), 8192), run.key("prior_error")
        error = lambda model, params: float(  # noqa: E731
            jax.jit(tuners.pretraining(model, prior.process, None, grid=self.steps).loss)(params, key, x0)
        )
        figures = {
            "prior_eps_error": error(prior.model, prior.params),
            "exact_eps_error": error(*domain.family(self.schedule, self.steps)),
        }
        run.say("prior: " + ", ".join(f"{name} {value:.5f}" for name, value in figures.items()))
        return dataclasses.replace(prior, figures=figures)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactPrior(Prior):
    """The exact denoiser of a domain that has one, under any Gaussian schedule; nothing is trained.

    Args:
      schedule: Gaussian, of `rgdiff.schedules`.
      steps: network calls of a sampling chain.
      eta: of sampling.
    """

    schedule: Any
    steps: int = 200
    eta: float = 1.0

    def check(self, domain: Domain) -> None:
        offers(domain, "family", "an exact denoiser: subspace, sphere or mixture")
        self.process(domain.shape).times(self.steps)

    def process(self, shape: Shape, eta: float | None = None) -> Process:
        """Return the process on examples of this shape, with the prior's own eta or another."""
        return processes.gaussian(self.schedule, shape, eta=self.eta if eta is None else eta)

    def obtain(self, run: Run, domain: Any, identity: Mapping[str, Any]) -> ReadyPrior:
        """Make the prior."""
        process = self.process(domain.shape)
        model, params = domain.family(self.schedule, self.steps)
        return ReadyPrior(process, process.times(self.steps), model, params, self, domain.shape)


@pytree
class ConstantModel:
    """A model without parameters.

    Args:
      denoiser: returned for any parameters.
    """

    denoiser: Denoiser

    def __call__(self, params: Params) -> Denoiser:
        return self.denoiser


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneClassPrior(Prior):
    """The standard normal law, which needs no training, with the problems of `domain=anomaly`.

    Args:
      steps: network calls of a sampling chain.
    """

    steps: int = 10

    gives_data = True

    def check(self, domain: Domain) -> None:
        offers(domain, "problems", "one-class problems: domain=anomaly")

    @property
    def schedule(self) -> Any:
        return schedules.cosine_vp()

    def process(self, shape: Shape, eta: float | None = None) -> Process:
        """Return the process on examples of this shape."""
        return processes.gaussian(self.schedule, shape, eta=1.0 if eta is None else eta)

    def obtain(self, run: Run, domain: Any, identity: Mapping[str, Any]) -> ReadyPrior:
        """Make the prior."""
        process: Any = self.process(domain.shape)
        model = ConstantModel(tuners.standard_normal(process))
        return ReadyPrior(process, process.times(self.steps), model, None, self, domain.shape, problems=domain.problems)
