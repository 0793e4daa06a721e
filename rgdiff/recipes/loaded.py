"""A run's folder back in Python: its prior, what was tuned, its samples and figures.

Nothing is trained here and no file is unpickled. The prior is rebuilt from the saved config, its parameters are read from
the cache, from the checkpoint that the config names, or from the run's own checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rgdiff.nets import lora_merge
from rgdiff.recipes import compose as recipe
from rgdiff.recipes.typing import ReadyPrior
from rgdiff.runtime.adapters import load_peft
from rgdiff.runtime.cache import cache_path, open_cache
from rgdiff.runtime.checkpoint import Checkpoints, load_params
from rgdiff.runtime.folder import read_config
from rgdiff.runtime.metrics import read_metrics
from rgdiff.runtime.run import phase_key
from rgdiff.typing import Denoiser, Params, Process


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """What a run has left. Build it with `load`.

    Attributes:
      path: its folder.
      config: resolved, of plain values.
      summary: figures by "method/figure"; empty if the run is not finished.
      metrics: rows of the metrics log.
      samples: x0 [N, ...] by method, the prior's among them; empty if the run is not finished.
      domain: with the data.
      prior: `prior.model(params)` is a denoiser, `prior.params` are its own parameters, `prior.times` its chain's.
      tuned: parameters of `prior.model` by the method that tuned them; LoRA adapters are merged into the prior's.
    """

    path: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: dict[str, np.ndarray]
    domain: Any
    prior: ReadyPrior
    tuned: dict[str, Params]

    def denoiser(self, name: str = "prior") -> Denoiser:
        """Return the denoiser of the prior, or of a method that tuned it."""
        return self.prior.denoiser if name == "prior" else self.prior.model(self._known(name))

    def process(self, name: str = "prior") -> Process:
        """Return the process of the prior, or that which a method tuned and sampled under (its own eta)."""
        if name == "prior":
            return self.prior.process
        self._known(name)
        settings = (self.config.get("methods") or {}).get(name) or self.config.get("method") or {}
        return self.prior.with_eta(settings["eta"]) if "eta" in settings else self.prior.process

    def key(self, phase: str) -> jax.Array:
        """Return the PRNG key of a phase of the run: a method's samples are drawn with the key of its name."""
        return phase_key(self.config["seed"], phase)

    def _known(self, name: str) -> Params:
        if name not in self.tuned:
            raise ValueError(f"{name!r} tuned nothing in {self.path}; what did: {', '.join(self.tuned) or 'nothing'}")
        return self.tuned[name]


def load(
    folder: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    modules: Sequence[str] = (),
) -> LoadedRun:
    """Read a run's folder: its prior, tuned parameters, samples and figures; nothing is trained.

    Args:
      folder: that `rgdiff run` has written.
      data_dir: where the domain's files are now, if they were moved.
      cache_dir: where trained priors are kept, if it is not the run's nor the usual one.
      modules: your own, that the run used; no others are imported.

    Returns:
      The run; `run.samples["svdd"]`, `run.prior.denoiser`, `run.tuned["draft_lv"]`, `run.denoiser("draft_lv")`.

    Raises:
      ValueError: if there is no run, or its prior is found nowhere.
    """
    path = Path(folder).expanduser().absolute()
    if not (path / "config.yaml").is_file():
        raise ValueError(f"no run at {path}: it has no config.yaml")
    config = read_config(path / "config.yaml")
    if data_dir is not None and "data_dir" in config["domain"]:
        config["domain"]["data_dir"] = os.fspath(data_dir)
    trusted = set(modules)
    domain = recipe.build(config["domain"], trusted)
    settings = recipe.build(config["prior"], trusted, domain=domain)
    named = None if cache_dir is None else os.fspath(cache_dir)
    if named is None and (own := cache_path(config.get("cache_dir"))) is not None and own.is_dir():
        named = str(own)
    prior = settings.obtain(_Reader(path, config["seed"], open_cache(named)), domain, config["prior"])
    return LoadedRun(
        path=path,
        config=config,
        summary=json.loads(_text(path / "summary.json") or "{}"),
        metrics=read_metrics(path),
        samples=_arrays(path / "samples.npz"),
        domain=domain,
        prior=prior,
        tuned=_tuned(path, prior),
    )


class _Reader:
    """Stands in for a run while its prior is made ready: what was trained is read from the folder."""

    def __init__(self, path: Path, seed: int, cache: Path):
        self.path, self.cache, self._seed = path, cache, seed

    def key(self, phase: str) -> jax.Array:
        return phase_key(self._seed, phase)

    def say(self, text: str) -> None:
        """Say nothing."""

    def fit(self, phase: str, tuner: Any, key: jax.Array, params: Params, steps: int, **_: Any) -> Any:
        state = tuner.init(params)
        with Checkpoints(self.path / "checkpoints" / phase) as checkpoints:
            if steps and checkpoints.latest() != steps:
                raise ValueError(
                    f"the parameters of {self.path}'s {phase} are neither in {self.cache} nor, trained to their end, in its "
                    "checkpoints; name their cache with cache_dir=, or finish the run with resume=true"
                )
            return checkpoints.restore(state)[0] if steps else state


def _tuned(path: Path, prior: ReadyPrior) -> dict[str, Params]:
    """Parameters of the prior's model by the phase that tuned them."""
    tuned = {}
    for one in _folders(path / "tuned"):
        tuned[one.name] = load_params(one, prior.params)
    for one in _folders(path / "adapters"):
        adapter, scale = load_peft(one, prior.params)
        tuned[one.name] = lora_merge(prior.params, adapter, scale)
    return tuned


def _folders(path: Path) -> list[Path]:
    return sorted(one for one in path.iterdir() if one.is_dir() and one.name[0] != ".") if path.is_dir() else []


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}
