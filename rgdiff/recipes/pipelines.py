"""The prior of recipes that is a released pipeline: `prior=pipeline`, under `domain=pipeline` or images of its states' shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import assets, checks, denoisers
from rgdiff.domains.pipelines import PipelineDomain, opened, shaped
from rgdiff.pretrained import folders, text
from rgdiff.recipes.typing import Domain, Prior, ReadyPrior, Shape
from rgdiff.runtime.run import Run
from rgdiff.typing import Denoiser, Params, Process, pytree


@pytree
class OneConditionModel:
    """Parameters -> denoiser under one condition, for methods on one problem."""

    model: Any
    condition: Any

    def __call__(self, params: Params) -> Denoiser:
        return denoisers.conditioned(self.model(params), self.condition)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelinePrior(Prior):
    """The denoising network of a diffusers folder, on its own schedule and grid; samples take its prompts or labels in turn.

    Args:
      folder: of the pipeline; the domain's, where that is one.
      dtype: of the networks, float32 or bfloat16.
      remat: what the denoising network computes again in the backward pass: stage, block, or null.
      prompts: a text or several, for a network that takes text.
      file: of prompts in their place, one a line or a JSON list.
      classes: in place of prompts, the labels that a class-conditional network is given.
      steps: network calls of a sampling chain.
      eta: of sampling: 0 is DDIM, 1 DDPM. Methods that need a law take 1.
      guidance: scale of classifier-free guidance, no unit; null or 1 for the conditional network alone.
      negative: the prompt of the unconditional call.
      domain: of the states; a recipe gives its own.
    """

    folder: str
    dtype: str = "float32"
    remat: str | None = None
    prompts: str | Sequence[str] | None = None
    file: str | None = None
    classes: Sequence[int] | None = None
    steps: int = 50
    eta: float = 0.0
    guidance: float | None = 7.5
    negative: str = ""
    domain: Any = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def gives_data(self) -> bool:
        """Whether methods may learn from data: the domain's, where it has any (domain=pictures)."""
        return hasattr(self.domain, "train_x")

    @property
    def names(self) -> list[str]:
        """The prompts, or the labels as words; none for an unconditional network."""
        if self.file is not None:
            return text.prompts(self.file)
        if self.prompts is not None:
            return [self.prompts] if isinstance(self.prompts, str) else list(self.prompts)
        return [f"label {label}" for label in self.classes or ()]

    @property
    def several(self) -> bool:
        """Whether samples differ in their conditions."""
        return len(self.names) > 1

    @property
    def guided(self) -> bool:
        return self.guidance is not None and self.guidance != 1

    def check(self, domain: Any) -> None:
        """Refuse a domain of other states, and settings that do not fit the network."""
        place = str(assets.resolved(self.folder))
        if isinstance(domain, PipelineDomain) and domain.folder != place:
            raise ValueError("prior.folder is not domain.folder; leave it to the domain's")
        own = folders.state_shape(place, getattr(domain, "size", None))
        if own != tuple(domain.shape):
            raise ValueError(
                f"the network in {self.folder} is for states {list(own)}, and the domain's are {list(domain.shape)}; "
                "choose domain=pipeline, or images of that size"
            )
        if sum(given is not None for given in (self.prompts, self.file, self.classes)) > 1:
            raise ValueError("give one of prior.prompts, prior.file and prior.classes")
        checks.at_least("prior.steps", self.steps, 1)
        self.process(domain.shape).times(self.steps)
        if self.guided and not self.names:
            raise ValueError("guidance needs a condition; give prior.prompts or prior.classes, or prior.guidance=null")

    def process(self, shape: Shape, eta: float | None = None) -> Process:
        """Return the process on examples of this shape, with the prior's own eta or another."""
        scheduler = folders.scheduler_of(assets.resolved(self.folder), shape)
        return scheduler.process(tuple(shape), self.eta if eta is None else eta)

    def obtain(self, run: Run, domain: Domain, identity: Mapping[str, Any]) -> ReadyPrior:
        """Read the folder, and embed the prompts."""
        run.say(f"prior: the pipeline in {self.folder}")
        own = opened(str(assets.resolved(self.folder)), self.dtype, self.remat, getattr(domain, "size", None))
        return self._ready(
            domain, own, *self._conditioned(own, self.names, self.negative), getattr(domain, "decoder", None)
        )

    def shapes(self, domain: Domain) -> ReadyPrior:
        """Return the prior with shapes in place of its parameters and embeddings; no weights are read, and they need not be there."""
        own = shaped(str(assets.resolved(self.folder)), self.dtype, self.remat, getattr(domain, "size", None))
        blank = {name: np.zeros((len(self.names), encoder.length), np.int32) for name, encoder in own.text.items()}
        negative = np.zeros(max((encoder.length for encoder in own.text.values()), default=0), np.int32)

        def embedded(params: Any) -> Any:
            text = {name: dataclasses.replace(encoder, params=params[name]) for name, encoder in own.text.items()}
            return self._conditioned(dataclasses.replace(own, text=text), blank, negative)

        model, conds = jax.eval_shape(embedded, {name: encoder.params for name, encoder in own.text.items()})
        plain = model.model if isinstance(model, OneConditionModel) else model
        if self.guided:  # embeddings are shapes; numbers are numbers
            plain = dataclasses.replace(plain, model=own.model, scale=jnp.float32(self.guidance))
        else:
            plain = own.model
        model = dataclasses.replace(model, model=plain) if isinstance(model, OneConditionModel) else plain
        return self._ready(domain, own, model, conds, own.decode)

    def _conditioned(self, own: Any, names: Any, negative: Any) -> tuple[Any, Any]:
        """Return the model under guidance, and the conditions of prompts or labels; or the model under the only one, and None."""
        model: Any = own.guided(float(self.guidance or 1), negative) if self.guided else own.model
        conds = None
        if self.classes is not None:
            conds = {"prompt": jnp.arange(len(self.classes)), **own.labelled(self.classes)}
        elif self.names:
            conds = own.embed(names)
        if conds is not None and not self.several:
            model, conds = OneConditionModel(model, jax.tree.map(lambda leaf: leaf[0], conds)), None
        return model, conds

    def _ready(self, domain: Domain, own: Any, model: Any, conds: Any, decode: Any) -> ReadyPrior:
        process = self.process(domain.shape)
        data, fresh = getattr(domain, "train_x", None), getattr(domain, "heldout_x", None)
        return ReadyPrior(
            process,
            process.times(self.steps),
            model,
            own.params,
            self,
            domain.shape,
            conds=conds,
            data=data,
            fresh=fresh,
            decode=decode,
        )
