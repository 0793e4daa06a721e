"""What a run would do, told without doing it: folder, data, prior, methods, their steps and network calls.

Everything is built as for a run, on shapes alone; nothing is trained, sampled or written.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rgdiff import guides, samplers
from rgdiff.recipes.compose import COUNTS
from rgdiff.recipes.outcome import nothing
from rgdiff.recipes.priors import TrainedPrior
from rgdiff.recipes.typing import ReadyPrior
from rgdiff.recipes.values import LikelihoodValue, PosteriorMeanValue
from rgdiff.rewards import Task


def described(
    config: dict[str, Any],
    out: Path,
    cache: Path | None,
    domain: Any,
    settings: Any,
    methods: dict[str, Any],
    plain: dict[str, Any],
) -> str:
    """Return the plan of a run as text.

    Args:
      config: resolved.
      out, cache: the run's folder, and where trained priors are kept, if anywhere.
      domain, settings, methods: built, of the latter two the settings.
      plain: the settings of the methods as plain values, by name.
    """
    process = settings.process(domain.shape)
    calls = samplers.ancestral(process, nothing).network_calls(len(process.times(settings.steps)) - 1)
    examples = f", {len(domain.train_x):,} to train on" if hasattr(domain, "train_x") else ""
    rows = [
        ("folder", f"{out}{', which holds a run to go on with' if (out / 'config.yaml').exists() else ''}"),
        ("domain", f"{_name(config['domain'])}: examples of shape {list(domain.shape)}{examples}"),
        (
            "prior",
            f"{_name(config['prior'])}: {_trained(config['prior'], cache, domain, settings)}; {calls} network calls a sample",
        ),
        ("reward", _name(config["reward"])),
        ("samples", f"{config['samples']:,} of the prior and of every method"),
    ]
    for name, method in methods.items():
        counts = ", ".join(f"{key} {value:,}" for key, value in _counts(plain[name]))
        told = [counts, *_network_calls(method, settings, domain.shape, config["samples"])]
        rows.append((name, f"{_name(plain[name])}: " + "; ".join(filter(None, told))))
    width = max(len(title) for title, _ in rows)
    return "\n".join(f"{title:<{width}}  {text}" for title, text in rows)


def _name(settings: dict[str, Any]) -> str:
    """A constructor's name, and the setting of it where it has one."""
    name = settings["_target_"].rpartition(".")[2]
    return f"{name} {settings['setting']}" if settings.get("setting") else name


def _trained(plain: dict[str, Any], cache: Path | None, domain: Any, settings: Any) -> str:
    """How the prior comes by its parameters."""
    if not isinstance(settings, TrainedPrior):
        return "nothing is trained"
    count = f"{sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(settings.like(domain))):,} parameters"
    if settings.checkpoint is not None:
        return f"{count} from {settings.checkpoint}"
    if cache is not None and settings.kept(cache, plain, domain).exists():
        return f"{count}, trained earlier"
    return f"{count}, trained in {settings.train['steps']:,} steps of {settings.train['batch']}"


def _counts(settings: Any, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Numbers of things in a method's settings: steps, batch, candidates and the like."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _counts(value, f"{prefix}{key}.")
        elif key in COUNTS and key != "chunk" and value is not None:
            yield f"{prefix}{key}", value


def stand_in(settings: Any, shape: tuple[int, ...]) -> ReadyPrior:
    """Return a prior of stand-ins for what is trained.

    Args:
      settings: of the prior.
      shape: of an example.
    """
    process = settings.process(shape)
    return ReadyPrior(process, process.times(settings.steps), nothing, None, settings, shape)


def parts(
    method: Any, prior: ReadyPrior, task: Task, *, model: Any = nothing, denoiser: Any = nothing, **more: Any
) -> dict[str, Any]:
    """Build a method's `tuner` and `sampler` for a reward; nothing is run, so that parameters may be shapes or missing.

    Their constructors refuse a reward that they cannot use, e.g. a black box where its gradient is needed.

    Args:
      method: of a recipe. What its `tuner(...)` and `sampler(...)` ask for is given by name; one that asks for something
        else is left out. A method that has the reward tuned by another's settings names them `tunes`.
      prior: of shapes, or of stand-ins (`stand_in`).
      task: with the reward.
      model: of the tuned parameters.
      denoiser: of the prior.
      more: further parts, by name.
    """
    method = getattr(method, "tunes", method)
    process = prior.with_eta(method.eta) if hasattr(method, "eta") else prior.process
    given = {"process": process, "times": prior.times, "task": task, "reward": task.reward, "key": jax.random.key(0)}
    given |= {"model": model, "denoiser": denoiser, "reference": denoiser, **more}
    if isinstance(
        getattr(method, "value", None), PosteriorMeanValue | LikelihoodValue
    ):  # the others are trained or enumerated
        given["value"] = method.value.obtain(None, "", prior, task, denoiser, method.temperature)[0]
    elif hasattr(getattr(method, "value", None), "shapes") and prior.params is not None:
        given["value"] = method.value.shapes(prior, task)
    built = {}
    for kind in ("tuner", "sampler"):
        if build := getattr(method, kind, None):
            wanted = inspect.signature(build).parameters
            if all(name in given for name in wanted):
                built[kind] = build(**{name: given[name] for name in wanted})
    return built


def _network_calls(method: Any, settings: Any, shape: tuple[int, ...], count: int) -> Iterator[str]:
    """Network calls of tuning and sampling, where a method's parts tell them."""
    reward = guides.inpainting(jnp.ones(shape), jnp.zeros(shape), 1.0)  # for methods of measurements too
    built = parts(method, stand_in(settings, shape), Task(reward, reward))
    if "tuner" in built:
        one = getattr(method, "tunes", method)
        yield f"{built['tuner'].network_calls() * one.batch * one.steps:,} network calls to tune"
    if "sampler" in built:
        calls = built["sampler"].network_calls(len(settings.process(shape).times(settings.steps)) - 1)
        yield f"{calls * getattr(method, 'particles', count) / count:,.0f} network calls a sample"
