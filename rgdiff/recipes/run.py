"""One recipe from its config to its report: prepared and refused as a whole first, then run. `rgdiff.cli` calls it.

Whatever is wrong with the input is a ValueError of one line, raised before a folder is claimed or anything is trained.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rgdiff.runtime.progress import say


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run that is composed, checked, and built as far as nothing is trained, for a folder that may take it."""

    name: str
    overrides: Sequence[str]
    config: dict[str, Any]
    trusted: set[str]
    out: Path
    cache: Path | None
    methods: dict[str, Any]  # settings as plain values, by name
    domain: Any
    settings: Any  # of the prior
    built: dict[str, Any]  # the methods


def run_recipe(name: str, overrides: Sequence[str], dry: bool = False) -> dict[str, Any]:
    """Run one recipe and write its folder; return the summary. A method that diverges is left out, and raises at the end.

    A run that is finished already is told again and not repeated. With `dry` its plan is printed and nothing is written.
    """
    from rgdiff.runtime.distributed import agreed, first
    from rgdiff.runtime.folder import alone

    try:
        prepared = prepare(name, overrides, dry)
    except (ValueError, OSError):
        if not first():  # what is wrong with the input is wrong in all processes, and told by one
            raise SystemExit(2) from None
        raise
    if dry:
        from rgdiff.recipes.plan import described

        say(
            described(
                prepared.config,
                prepared.out,
                prepared.cache,
                prepared.domain,
                prepared.settings,
                prepared.built,
                prepared.methods,
            )
        )
        return {}
    with alone(prepared.out):
        if agreed((prepared.out / "summary.json").exists()):
            return told_again(prepared.out)
        return execute(prepared)


def prepare(name: str, overrides: Sequence[str], dry: bool = False) -> Prepared:
    """Compose, check and build a run as far as nothing is trained; nothing is written, but with `dry` not even a cache is made.

    Raises:
      ValueError: for whatever is wrong with it, naming the key.
    """
    from rgdiff.checks import divided
    from rgdiff.recipes import compose as recipe
    from rgdiff.runtime import distributed
    from rgdiff.runtime.cache import cache_path, open_cache
    from rgdiff.runtime.cpu import keep_memory, use_quick_compilation
    from rgdiff.runtime.folder import RunFolder, next_free
    from rgdiff.runtime.progress import announce
    from rgdiff.runtime.run import use_compilation_cache
    from rgdiff.shards import shards_of

    use_quick_compilation()
    keep_memory()
    distributed.join(recipe.distributed(overrides))
    config, chosen = recipe.composed(name, overrides)
    given = [override.partition("=")[0] for override in overrides]
    if "domain" in given and (
        taken := [f"{g}={chosen[g]}" for g in ("prior", "reward") if chosen[g] and g not in given]
    ):
        say(
            f"domain={chosen['domain']} with {' and '.join(taken)}; `rgdiff explain domain={chosen['domain']}` has others"
        )
    trusted = recipe.trusted_modules(overrides)
    recipe.check_common(config, name)
    recipe.check(config, trusted)
    methods = recipe.methods_of(config, chosen)
    out = Path(config["out"] or f"runs/{Path(name).stem}")
    if not any(override.startswith("out=") for override in overrides):
        named, out = out, Path(distributed.shared(str(next_free(out, config["resume"]))))
        if out != named and not config["resume"] and not dry:
            unfinished = "" if (named / "summary.json").exists() else ", not finished: resume=true goes on with it"
            say(f"{named} holds a run{unfinished}; this one goes into {out}")
    config["out"] = str(out)
    distributed.on_first(lambda: RunFolder.check(out, config, config["resume"]))

    check_devices()
    shards = shards_of(mesh_of(config))
    divided("prior.train.batch", (config["prior"].get("train") or {}).get("batch"), shards)
    for key, settings in methods.items():
        divided(f"{key}: batch", settings.get("batch"), shards)
    cache = cache_path(config.get("cache_dir"))
    if not dry:
        cache = open_cache(config.get("cache_dir"))
        use_compilation_cache(cache)  # before anything is compiled
    announce("loading the data…")
    domain = recipe.build(config["domain"], trusted)
    announce(None)
    settings = recipe.build(config["prior"], trusted, domain=domain)
    built = {key: recipe.build(value, trusted) for key, value in methods.items()}
    if strangers := sorted(set(config.get("rewards") or {}) - set(built)):
        raise ValueError(f"rewards.{strangers[0]} guides no method of this recipe, which has {', '.join(built)}")
    settings.check(domain)
    for key, method in built.items():
        if not callable(getattr(method, "run", None)):
            raise ValueError(f"{key}: {methods[key]['_target_']} is no method; `rgdiff list` shows them")
        try:
            method.check(settings, domain.shape)
        except (TypeError, ValueError) as error:  # TypeError: an option that the method does not take, or lacks
            raise ValueError(f"{key}: {error}") from error
    prepared = Prepared(name, overrides, config, trusted, out.absolute(), cache, methods, domain, settings, built)

    def untrained(settings: Any) -> Any:
        """Build a reward that needs no training and no decoder of the domain's."""
        later = recipe.needs(settings, trusted) & {"judge", "key"} or hasattr(type(domain), "decoder")
        return None if later else recipe.build(settings, trusted, domain=domain)

    tasks_of(prepared, lambda _, settings: untrained(settings))
    return prepared


def mesh_of(config: dict[str, Any]) -> Any:
    """Return the mesh that a config asks for: none by default, but all devices of several processes."""
    from rgdiff.runtime.distributed import several
    from rgdiff.runtime.mesh import device_mesh

    sizes = config["mesh"]
    return device_mesh(**(sizes or {})) if sizes is not None or several() else None


def check_devices() -> None:
    """Refuse to go on where JAX has no device."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # jax 0.10 asserts
        named = os.environ.get("JAX_PLATFORMS")
        instead = (
            f"JAX_PLATFORMS is {named}; unset it, or install that platform" if named else "see the installation of JAX"
        )
        raise ValueError(
            f"JAX finds no device: {(str(error) or type(error).__name__).splitlines()[0]} ({instead})"
        ) from None


def tasks_of(prepared: Prepared, make: Callable[[str, Any], Any]) -> tuple[Any, dict[str, Any]]:
    """Make the rewards, and refuse those that do not fit the domain, the prior or a method.

    Args:
      make: the name of a phase and the settings of a reward -> its task, or None where it is not made yet.

    Returns:
      The task of the recipe, and that of every method.
    """
    from rgdiff.recipes.plan import parts, stand_in
    from rgdiff.rewards import Task

    def made(phase: str, settings: Any) -> Any:
        task = make(phase, settings)
        if task is not None:
            if not isinstance(task, Task):
                raise ValueError(f"{settings['_target_']} is no reward; `rgdiff list` shows them")
            check_reward(task.reward, prepared.domain.shape)
            check_reward(task.heldout, prepared.domain.shape)
        return task

    config = prepared.config
    task = made("reward", config["reward"])
    tasks = dict.fromkeys(prepared.built, task)
    for key, settings in (config.get("rewards") or {}).items():  # guides of their own, judged alike
        own = made(f"{key}_reward", settings)
        if own is None or task is None:
            tasks[key] = None
        elif own.conditional != task.conditional:
            raise ValueError(f"rewards.{key} must be a reward of the kind of `reward`, e.g. reward@rewards.{key}=digit")
        else:
            tasks[key] = task._replace(reward=own.reward)
    for key, method in prepared.built.items():
        if (own := tasks[key]) is not None:
            try:
                method.suits(own)
                parts(method, stand_in(prepared.settings, prepared.domain.shape), own)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from error
    if task is not None and task.conditional and getattr(prepared.settings, "guidance", None) is None:
        raise ValueError("this reward is of a sample's label; choose a conditional prior, e.g. prior=unet_conditional")
    return task, tasks


def check_reward(reward: Any, shape: tuple[int, ...]) -> None:
    """Refuse a reward that fails on samples of this shape, or gives something else than one float each; it is not run."""
    import jax.numpy as jnp

    from rgdiff import rewards

    try:
        rewards.check(reward, jnp.zeros((2, *shape), jnp.float32))
    except ValueError:
        raise
    except Exception as error:  # of the user's function, whatever it is
        line = " ".join(str(error).split())[:160]
        host = "; a NumPy function needs reward.host=true" if "Tracer" in type(error).__name__ else ""
        raise ValueError(
            f"the reward, called as (x0 [B, {', '.join(map(str, shape))}], cond), raised {type(error).__name__}: {line}{host}"
        ) from error


def execute(prepared: Prepared) -> dict[str, Any]:
    """Train, sample and write what was prepared; nobody else is in its folder."""
    import jax

    from rgdiff.recipes import compose as recipe
    from rgdiff.recipes.methods.steering import PriorSampling
    from rgdiff.recipes.outcome import without_divergence
    from rgdiff.recipes.pages import write_pages
    from rgdiff.runtime.distributed import meet
    from rgdiff.runtime.folder import RunFolder
    from rgdiff.runtime.naturalness import marked
    from rgdiff.runtime.progress import announce
    from rgdiff.runtime.run import Diverged, Run, phase_key
    from rgdiff.runtime.tables import table

    config, domain, built = prepared.config, prepared.domain, prepared.built
    say(f"{prepared.name}: {', '.join(built)}; into {prepared.out}")
    count, seed = config["samples"], config["seed"]

    # The judge and the rewards: whatever they refuse is refused before the folder is a run's.
    announce("making the judge and the reward, and training what of them is learned…")
    judge = recipe.build(config["judge"], prepared.trusted, domain=domain, key=phase_key(seed, "judge"))

    def make(phase: str, settings: Any) -> Any:
        task = recipe.build(settings, prepared.trusted, domain=domain, judge=judge, key=phase_key(seed, phase))
        task = task.through(getattr(domain, "decoder", None))  # rewards see pictures, where states are latents
        judge.check(task)
        return task

    task, tasks = tasks_of(prepared, make)
    assert prepared.cache is not None
    fresh = not (prepared.out / "config.yaml").exists()
    folder = RunFolder.create(prepared.out, config, resume=config["resume"])
    run = Run(folder, seed, prepared.cache, prepared.name, mesh_of(config), config["profile"])
    try:
        # Run: the prior, then every method beside it.
        announce("making the prior…")
        prior = prepared.settings.obtain(run, domain, config["prior"])
        announce(None)
        outcomes = {"prior": PriorSampling().run(run, "prior_samples", prior, task, count)}
        stopped: dict[str, str] = {}
        for key, method in built.items():
            try:
                outcome = method.run(run, key, prior, tasks[key], count)
                outcomes[key] = without_divergence(run, key, prior, outcome)
            except Diverged as failure:  # the others are worth having
                stopped[key] = str(failure)
                run.say(stopped[key])
    except BaseException:
        if fresh and folder.empty:  # nothing was made in it: the corrected command may have it
            run.log.close()
            folder.forget()
        raise

    # Write: numbers, samples, report, and last the summary, which marks the run as finished.
    announce("measuring the samples and drawing the page…")
    rows = {key: judge.row(outcome, task, prior) | outcome.figures for key, outcome in outcomes.items()}
    counts = {key: len(jax.tree.leaves(outcome.x0)[0]) for key, outcome in outcomes.items()}
    rows = marked(rows, judge.spread(outcomes["prior"], task), counts)
    summary = {f"{key}/{metric}": value for key, row in rows.items() for metric, value in row.items()}
    for key, row in rows.items():
        run.log.rewind(f"{key}_summary", 0)
        run.log.write(f"{key}_summary", 0, {f"total_{m}" if m == "seconds" else m: v for m, v in row.items()})
    folder.write_samples(**{key: outcome.x0 for key, outcome in outcomes.items()})
    rows |= {f"{key} (stopped)": {} for key in stopped}
    write_pages(
        run, config, prepared.overrides, prepared.name, judge, task, prior, outcomes, rows, list(stopped.values())
    )
    run.log.close()
    folder.write_summary(summary | {f"{key}/stopped": reason for key, reason in stopped.items()})
    announce(None)
    run.say(table(rows))
    run.say(f"report: {folder.path / 'report.html'}")
    meet()
    if stopped:
        raise Diverged("; ".join(stopped.values()), summary)
    return summary


def rows_of(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the figures of a summary by method, as the tables have them."""
    rows: dict[str, dict[str, Any]] = {}
    for name, value in summary.items():
        method, mark, metric = name.partition("/")
        if mark and metric != "stopped":
            rows.setdefault(method, {})[metric] = value
    return rows


def told_again(out: Path) -> dict[str, Any]:
    """Print what a finished run has come to, and return its summary."""
    import json

    from rgdiff.runtime.run import Diverged
    from rgdiff.runtime.tables import table

    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    say(table(rows_of(summary)))
    say(f"finished before; report: {out / 'report.html'}")
    if stopped := [reason for name, reason in summary.items() if name.endswith("/stopped")]:
        raise Diverged("; ".join(stopped), summary)
    return summary
