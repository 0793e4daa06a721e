"""The programs that a recipe compiles, as shapes: `rgdiff plan` compiles them for any device and runs none.

They are built as a run builds them, by the same constructors and for the same drivers (`samplers.sample`, `tuners.fit`), of a prior with
shapes in place of parameters. A method whose parts ask for more than a prior and a reward says itself what it compiles: `programs`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rgdiff import checks, samplers
from rgdiff.nets import lora_merge
from rgdiff.recipes import compose as recipe
from rgdiff.recipes.methods.steering import PriorSampling
from rgdiff.recipes.plan import parts
from rgdiff.recipes.priors import TrainedPrior
from rgdiff.recipes.typing import ReadyPrior
from rgdiff.rewards import HostReward, Task
from rgdiff.runtime import planning
from rgdiff.runtime.planning import Call
from rgdiff.samplers import _loop as sampling
from rgdiff.tuners import _loop as tuning
from rgdiff.tuners import online
from rgdiff.tuners.online import OnlineTuner
from rgdiff.typing import Array, Cond, Params, pytree


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program of a recipe.

    Args:
      name: of the method, and which of its programs it is.
      unit: what one call of it does.
      batch: rows at once, as the recipe has them.
      call: batch -> the program, as shapes.
      parameters: of the network that it calls, or tunes.
      network_calls: a row, forward passes only, or None.
    """

    name: str
    unit: str
    batch: int
    call: Callable[[int], Call]
    parameters: int
    network_calls: int | None = None


@pytree
class StandIn:
    """A differentiable reward in place of one that a run trains first: the mean of each example."""

    def __call__(self, x0: Any, cond: Cond = None) -> Array:
        means = [leaf.reshape(leaf.shape[0], -1).mean(1) for leaf in jax.tree.leaves(x0)]
        return jnp.stack(means).sum(0)


class Nobody:
    """Stands in for a run where a prior that needs no training is made ready."""

    def key(self, phase: str) -> Array:
        return jax.random.key(0)

    def say(self, text: str) -> None:
        """Say nothing."""


KEY = jax.eval_shape(lambda: jax.random.key(0))


def count(tree: Any) -> int:
    """Return the numbers in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape"))


def conditions(prior: ReadyPrior) -> Callable[[int], Cond]:
    """Return batch -> the shapes of a prior's conditions."""
    every = lambda conds, batch: dataclasses.replace(prior, conds=conds).conditions(batch)  # noqa: E731
    return lambda batch: jax.eval_shape(functools.partial(every, batch=batch), prior.conds)


def chain(name: str, sampler: Any, times: Array, rows: int, cond: Callable[[int], Cond], params: Params) -> Program:
    """Return the program of `samplers.sample`.

    Args:
      name: of the program.
      sampler: from a constructor of `rgdiff.samplers`, of shapes.
      times: [T + 1].
      rows: samples.
      cond: batch -> conditions.
      params: of the network.
    """
    calls = sampler.network_calls(len(times) - 1)

    def call(batch: int) -> Call:
        given = (sampler, KEY, times, cond(batch))
        static = {"batch": batch, "keep": None, "shards": None}
        return Call(sampling._whole, given, static, frozenset({3}))

    return Program(name, f"a chain of {len(times) - 1} moves", rows, call, count(params), calls)


def step(name: str, tuner: Callable[[int], Any], params: Params, batch: int, data: Any, rows: Any) -> Program:
    """Return the program of a step of `tuners.fit`.

    Args:
      name: of the program.
      tuner: batch -> the tuner, of shapes.
      params: that are tuned.
      batch: chains a step.
      data: of `fit`, or None.
      rows: batch -> rows of data a step, or None.
    """

    def call(batch: int) -> Call:
        made = tuner(batch)
        state = jax.eval_shape(lambda made, params: made.init(params), made, params)
        static = {"count": 1, "batch": rows(batch), "shards": None, "layout": None}
        return Call(tuning._advance, (made, KEY, state, data), static, frozenset({3}), 2)

    made = tuner(batch)
    calls = made.network_calls() if hasattr(made, "network_calls") else None
    return Program(name, "a step", batch, call, count(params), calls)


def halves(name: str, tuner: Callable[[int], Any], params: Params, batch: int, data: Any, rows: Any) -> list[Program]:
    """Return the two programs of `tuners.fit_online`, between which a black box is asked; as `step`."""

    def made(batch: int) -> tuple[Any, Any, Any]:
        method = tuner(batch).online
        state = jax.eval_shape(lambda method, params: method.init(params), method, params)
        experience = jax.eval_shape(
            lambda *given: online._roll_out(*given, batch=rows(batch), shards=None), method, KEY, state, data
        )
        return method, state, experience

    def rollout(batch: int) -> Call:
        method, state, _ = made(batch)
        return Call(
            online._rollout, (method, KEY, state, data), {"batch": rows(batch), "shards": None}, frozenset({3}), 2
        )

    def update(batch: int) -> Call:
        method, state, experience = made(batch)
        rewards = jax.ShapeDtypeStruct((batch,), jnp.float32)
        return Call(online._update, (method, KEY, state, experience, rewards, None), {"layout": None}, frozenset(), 2)

    size = count(params)
    return [
        Program(f"{name}, rollout", "a batch of chains", batch, rollout, size),
        Program(f"{name}, update", "a step", batch, update, size),
    ]


def of_method(name: str, method: Any, prior: ReadyPrior, task: Task, samples: int) -> Iterator[Program]:
    """Yield the programs of a method.

    Args:
      name: of the method in its recipe.
      method: its settings.
      prior: of shapes.
      task: with the reward.
      samples: of the recipe.
    """
    if hasattr(method, "programs"):
        yield from method.programs(name, prior, task, samples)
        return
    denoiser = prior.denoiser
    tunes = getattr(method, "tunes", method)
    params, model = prior.params, prior.model
    if hasattr(tunes, "first"):
        key = jax.random.key(0)
        params, model = jax.eval_shape(lambda: tunes.first(prior, key)), tunes.model(prior)

    def built(batch: int | None = None) -> dict[str, Any]:
        one = tunes if batch is None else dataclasses.replace(tunes, batch=batch)
        return parts(one, prior, task, model=model, denoiser=denoiser)

    made = built()
    if "tuner" in made:
        make = lambda batch: built(batch)["tuner"]  # noqa: E731
        inner = getattr(made["tuner"], "tuner", made["tuner"])
        host = isinstance(inner, OnlineTuner) and isinstance(inner.reward, HostReward)
        given = (params, tunes.batch, prior.every_condition, lambda batch: tunes.rows(prior, batch))
        yield from halves(name, make, *given) if host else [step(name, make, *given)]
        best = params if tunes.adapter is None else jax.eval_shape(lora_merge, prior.params, params)
        tuned = samplers.ancestral(prior.with_eta(tunes.eta), prior.model(best))
        yield chain(f"{name}, sampled", tuned, prior.times, samples, conditions(prior), prior.params)
    if "sampler" in made:
        rows = getattr(method, "particles", samples)
        yield chain(name, made["sampler"], prior.times, rows, conditions(prior), prior.params)


def programs(prepared: Any) -> tuple[list[Program], list[str]]:
    """Return the programs of a prepared recipe, and what is said of what is not among them.

    Args:
      prepared: from `rgdiff.recipes.run.prepare`.
    """
    domain, settings, config = prepared.domain, prepared.settings, prepared.config
    prior = (
        settings.shapes(domain) if hasattr(settings, "shapes") else settings.obtain(Nobody(), domain, config["prior"])
    )
    out: list[Program] = []
    notes: list[str] = []
    if isinstance(settings, TrainedPrior) and settings.checkpoint is None:
        out.append(training(settings, prior, domain))
    own = config.get("rewards") or {}
    task = reward(prepared, config["reward"], prior, notes)
    chains = parts(PriorSampling(), prior, task, denoiser=prior.denoiser)["sampler"]
    out.append(chain("prior", chains, prior.times, config["samples"], conditions(prior), prior.params))
    for name, method in prepared.built.items():
        guide = task._replace(reward=reward(prepared, own[name], prior, notes).reward) if name in own else task
        found = list(of_method(name, method, prior, guide, config["samples"]))
        out += found
        if not found:
            notes.append(f"{name} is not planned: what it compiles depends on what it trains first")
    return out, notes


def training(settings: Any, prior: ReadyPrior, domain: Any) -> Program:
    """Return the program of a step of the prior's own training."""
    settings = settings.conditioned(prior.classes) if hasattr(settings, "conditioned") else settings
    data = {"x0": domain.train_x} | ({"cond": domain.train_y} if prior.classes is not None else {})
    data = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, data))
    tuner = settings.tuner(settings.model(), prior.process)
    rows = settings.train["batch"]
    return step("prior, training", lambda batch: tuner, prior.params, rows, data, lambda batch: batch)


def reward(prepared: Any, settings: Any, prior: ReadyPrior, notes: list[str]) -> Task:
    """Return the task of a reward on the prior's states; a stand-in, with a note, where it is trained in the run."""
    if recipe.needs(settings, prepared.trusted) & {"judge", "key"}:
        note = (
            f"{settings['_target_'].rpartition('.')[2]} is trained in a run: the mean of each example stands in for it"
        )
        notes += [] if note in notes else [note]
        task = Task(StandIn(), StandIn())
    else:
        task = recipe.build(settings, prepared.trusted, domain=prepared.domain)
    return task.through(prior.decode)


def plan(name: str, overrides: Sequence[str]) -> dict[str, planning.Figures]:
    """Compile a recipe's programs for a target, and print what each needs; the figures by the program's name.

    Args:
      name: of the recipe, or its file.
      overrides: of it; and `target=`, see `planning.target`, and `largest=true`.

    Raises:
      ValueError: for whatever is wrong with the recipe or the target.
    """
    from rgdiff.recipes.run import prepare
    from rgdiff.runtime.progress import announce, say

    own = {"target": "here", "largest": "false"}
    others = []
    for one in overrides:
        key, _, value = one.partition("=")
        if key in own:
            own[key] = value
        else:
            others.append(one)
    largest = checks.one_of("largest", own["largest"], ("true", "false")) == "true"
    target = planning.target(own["target"])
    prepared = prepare(name, others, dry=True)
    announce("building the programs, of shapes alone…")
    found, notes = programs(prepared)
    memory = "memory not known" if target.memory is None else f"{_bytes(target.memory)} each"
    announce(None)
    say(f"{name} on {target.kind}, {memory}; compiled, not run")
    out = {}
    for program in found:
        announce(f"compiling {program.name}…")
        call = program.call(program.batch)
        out[program.name] = figures = planning.figures(call, target, prepared.cache)
        lines = told(program, figures, target)
        if target.devices > 1 and not call.spread:
            lines.append("every device repeats all of this: its batch is that of one device")
        elif program.batch % target.devices:
            lines.append(f"a run on a mesh refuses this batch, which is no multiple of {target.devices} devices")
        if largest and target.memory is not None:
            most, each = largest_batch(program, target, prepared.cache)
            lines.append(f"largest batch that fits: {most or f'below {each}'}")
        announce(None)
        say("\n  ".join([head(program), *lines]))
    for note in notes:
        say(f"note: {note}")
    return out


def head(program: Program) -> str:
    """Return what a program is, in one line."""
    calls = "" if program.network_calls is None else f", {program.network_calls:,} network calls a row"
    return f"{program.name}: {program.unit}, batch {program.batch:,}{calls}, {program.parameters:,} parameters"


def told(program: Program, figures: planning.Figures, target: planning.Target) -> list[str]:
    """Return what a program needs, a few lines."""
    bound = figures.bound(target)
    at_least = "" if not bound else f"; at least {bound:.3g} s at {target.chip.flops:.3g} a second"  # type: ignore[union-attr]
    work = f"{figures.flops:.3g} operations in matrix products, of all devices together{at_least}"
    if figures.refused is not None:
        return [f"does not fit: {figures.refused}", work]
    fits = {True: ": it fits", False: ": it does not fit", None: ""}[figures.fits(target.memory)]
    parts = ("arguments", figures.arguments), ("temporaries", figures.temporaries), ("program", figures.code)
    lines = [
        f"peak {_bytes(figures.peak)} a device ({', '.join(f'{name} {_bytes(size)}' for name, size in parts)}){fits}",
        work,
        f"the compiler counts {figures.counted:.3g} operations and {figures.moved:.3g} bytes moved a device, the body of a loop once",
    ]
    if figures.collectives:
        kinds = (
            f"{kind} {out} outside of loops, {inside} inside" for kind, (out, inside) in figures.collectives.items()
        )
        lines.append(f"collectives: {'; '.join(kinds)}")
    elif target.devices > 1:
        lines.append("no collectives")
    if figures.seconds is not None:
        lines.append(f"the compiler's estimate: {figures.seconds:.3g} s")
    return lines


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"


def largest_batch(program: Program, target: planning.Target, cache: Path | None) -> tuple[int, int]:
    """Return the largest batch of a program that fits, and the number whose multiples were tried: what the method takes.

    Args:
      program: of a recipe.
      target: the devices.
      cache: of figures.
    """

    def fits(batch: int) -> bool | None:
        return planning.figures(program.call(batch), target, cache).fits(target.memory)

    each = target.devices
    try:
        program.call(each)
    except ValueError:  # minibatches, repeats: the recipe's own batch suits them
        each = program.batch
    return planning.largest(lambda times: fits(times * each), 2**20 // each) * each, each
