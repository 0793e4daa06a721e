"""The command line: parse, build, run, write. `rgdiff run RECIPE [key=value …]`, `rgdiff list`, `rgdiff show RECIPE`.

Whatever is wrong with the input ends in one line on standard error and exit code 2, before anything is overwritten.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    import rgdiff

    parser = argparse.ArgumentParser(
        prog="rgdiff", description="Reward-guided diffusion: steer or fine-tune a prior by a reward."
    )
    parser.add_argument("--version", action="version", version=f"rgdiff {rgdiff.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run a recipe", description=(
        "Run a recipe. Common to all: out=DIR seed=N data_dir=DIR resume=true; groups: domain= prior= reward= method=."
    ))  # fmt: skip
    run.add_argument("recipe", help="a name from `rgdiff list`, or a YAML file")
    run.add_argument("overrides", nargs="*", metavar="key=value")
    run.add_argument(
        "--multirun",
        action="store_true",
        help="run all combinations of comma-separated values, each in out/0, out/1, …",
    )
    run.add_argument("--dry-run", action="store_true", help="check everything and print the plan; write nothing")
    show = commands.add_parser("show", help="print the resolved config of a recipe")
    show.add_argument("recipe")
    show.add_argument("overrides", nargs="*", metavar="key=value")
    commands.add_parser("list", help="list recipes, methods, rewards, priors and domains")
    arguments = parser.parse_args(options_first(sys.argv[1:] if argv is None else argv))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without some letter is no reason to stop
            stream.reconfigure(errors="replace")
    logging.basicConfig(format="rgdiff: %(message)s", level=logging.WARNING)
    try:
        if arguments.command == "list":
            print(listing())
        elif arguments.command == "show":
            print(shown(arguments.recipe, arguments.overrides), end="")
        else:
            work = sweep if arguments.multirun else run_recipe
            work(arguments.recipe, arguments.overrides, dry=arguments.dry_run)
    except KeyboardInterrupt:
        print("rgdiff: interrupted; go on with resume=true", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except (ValueError, OSError) as error:
        print(f"rgdiff: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def options_first(argv: Sequence[str]) -> list[str]:
    """Move --options before the arguments of a command: argparse takes no key=value after an option among them."""
    return [*argv[:1], *(a for a in argv[1:] if a.startswith("-")), *(a for a in argv[1:] if not a.startswith("-"))]


def listing() -> str:
    """Return the text of `rgdiff list`."""
    from rgdiff.runtime import recipe

    lines = []
    for title, group in (
        ("recipes", None),
        *((f"{g}s", g) for g in ("method", "value", "surrogate", "reward", "prior", "domain")),
    ):
        lines.append(title + ("" if group is None else f" ({group}=…)"))
        lines += [f"  {name:<23} {recipe.summary_of(name, group)}" for name in recipe.names(group)]
    return "\n".join(lines)


def say(text: str) -> None:
    """Print, unless nobody listens."""
    with contextlib.suppress(OSError, ValueError):
        print(text, flush=True)


def shown(name: str, overrides: Sequence[str]) -> str:
    """Return the resolved config as YAML, with the comments that explain its options."""
    from rgdiff.runtime.explain import explained

    return explained(name, overrides)


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """Expand comma-separated values into all combinations; each gets a numbered folder below `out`."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from rgdiff.runtime.folder import next_free

    choices, out = [], None
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "out":
            out = value
            continue
        several = [override]
        with contextlib.suppress(HydraException):  # what the grammar does not take is one value
            parsed = OverridesParser.create().parse_override(override)
            if parsed.is_sweep_override():
                several = [f"{key}={value}" for value in parsed.sweep_string_iterator()]
        choices.append(several)
    out = next_free("runs/sweep", "resume=true" in overrides) if out is None else out
    return [[*combination, f"out={out}/{i}"] for i, combination in enumerate(itertools.product(*choices))]


def sweep(name: str, overrides: Sequence[str], dry: bool = False) -> None:
    """Run all combinations, one after the other, and write sweep.csv above their folders: what was swept, and every figure.

    All are checked before the first one runs.
    """
    import csv

    from rgdiff.runtime.folder import write_atomic
    from rgdiff.runtime.pages import table
    from rgdiff.runtime.run import Diverged

    combinations = expand(overrides)
    given = [{o.partition("=")[0]: o.partition("=")[2] for o in combination} for combination in combinations]
    swept = [key for key in given[0] if key != "out" and len({settings.get(key) for settings in given}) > 1]
    labels = [", ".join(f"{key}={settings[key]}" for key in swept) or "as it is" for settings in given]
    page = Path(given[0]["out"]).expanduser().parent / "sweep.csv"
    if page.exists() and "resume=true" not in overrides:
        raise ValueError(f"{page.parent} already holds a sweep; give resume=true to go on with it, or another out")
    for label, combination in zip(labels, combinations, strict=True):
        try:
            prepare(name, combination, dry=True)
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from error
    rows: list[dict[str, Any]] = []
    shown: dict[str, dict[str, Any]] = {}
    priors: dict[str, Any] = {}
    for number, (label, combination) in enumerate(zip(labels, combinations, strict=True), 1):
        say(f"{number} of {len(combinations)}: {label}")
        settings: dict[str, Any] = dict(given[number - 1])
        try:
            rows.append(settings | run_recipe(name, combination, dry))
        except Diverged as failure:  # the other combinations are worth having
            rows.append(settings | failure.summary | {"stopped": str(failure)})
        if dry:
            continue
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(page, buffer.getvalue().encode())
        for method, row in rows_of(rows[-1]).items():
            if method != "prior":
                shown[f"{label}: {method}"] = row
            elif row.get("reward_mean") != priors.get("reward_mean"):  # else it is the one that was shown
                shown[f"{label}: prior" if priors else "prior"] = priors = row
    if dry:
        return
    say(table(shown))
    say(f"table: {page}")
    if stopped := [row for row in rows if "stopped" in row]:
        raise ValueError(
            f"{len(stopped)} of {len(rows)} runs stopped, the first: {stopped[0]['stopped']}; see sweep.csv"
        )


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
    from rgdiff.runtime.folder import alone

    prepared = prepare(name, overrides, dry)
    if dry:
        from rgdiff.runtime.plan import described

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
        if (prepared.out / "summary.json").exists():
            return told_again(prepared.out)
        return execute(prepared)


def prepare(name: str, overrides: Sequence[str], dry: bool = False) -> Prepared:
    """Compose, check and build a run as far as nothing is trained; nothing is written, but with `dry` not even a cache is made.

    Raises:
      ValueError: for whatever is wrong with it, naming the key.
    """
    from rgdiff.runtime import recipe
    from rgdiff.runtime.folder import RunFolder, next_free
    from rgdiff.runtime.priors import cache_path, open_cache
    from rgdiff.runtime.run import use_compilation_cache

    config, chosen = recipe.composed(name, overrides)
    trusted = recipe.trusted_modules(overrides)
    recipe.check_common(config, name)
    recipe.check(config, trusted)
    methods = recipe.methods_of(config, chosen)
    out = Path(config["out"] or f"runs/{Path(name).stem}")
    if not any(override.startswith("out=") for override in overrides):
        named, out = out, next_free(out, config["resume"])
        if out != named and not config["resume"] and not dry:
            unfinished = "" if (named / "summary.json").exists() else ", not finished: resume=true goes on with it"
            say(f"{named} holds a run{unfinished}; this one goes into {out}")
    config["out"] = str(out)
    RunFolder.check(out, config, config["resume"])

    check_devices()
    cache = cache_path(config.get("cache_dir"))
    if not dry:
        cache = open_cache(config.get("cache_dir"))
        use_compilation_cache(cache)  # before anything is compiled
    domain = recipe.build(config["domain"], trusted)
    settings = recipe.build(config["prior"], trusted)
    built = {key: recipe.build(value, trusted) for key, value in methods.items()}
    if strangers := sorted(set(config.get("rewards") or {}) - set(built)):
        raise ValueError(f"rewards.{strangers[0]} guides no method of this recipe, which has {', '.join(built)}")
    if hasattr(settings, "check"):
        settings.check(domain)
    for key, method in built.items():
        try:
            method.check(settings, domain.shape)
        except (TypeError, ValueError) as error:  # TypeError: an option that the method does not take, or lacks
            raise ValueError(f"{key}: {error}") from error
    prepared = Prepared(name, overrides, config, trusted, out.absolute(), cache, methods, domain, settings, built)

    def untrained(settings: Any) -> Any:
        """Build a reward that needs no training."""
        return (
            None
            if recipe.needs(settings, trusted) & {"judge", "key"}
            else recipe.build(settings, trusted, domain=domain)
        )

    tasks_of(prepared, lambda _, settings: untrained(settings))
    return prepared


def check_devices() -> None:
    """Refuse to go on where JAX has no device."""
    import jax

    try:
        jax.devices()
    except RuntimeError as error:
        named = os.environ.get("JAX_PLATFORMS")
        instead = (
            f"JAX_PLATFORMS is {named}; unset it, or install that platform" if named else "see the installation of JAX"
        )
        raise ValueError(f"JAX finds no device: {str(error).splitlines()[0]} ({instead})") from None


def tasks_of(prepared: Prepared, make: Callable[[str, Any], Any]) -> tuple[Any, dict[str, Any]]:
    """Make the rewards, and refuse those that do not fit the domain, the prior or a method.

    Args:
      make: the name of a phase and the settings of a reward -> its task, or None where it is not made yet.

    Returns:
      The task of the recipe, and that of every method.
    """
    from rgdiff.rewards import Task
    from rgdiff.runtime.plan import parts

    def made(phase: str, settings: Any) -> Any:
        task = make(phase, settings)
        if task is not None:
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
        elif not isinstance(own, Task) or own.conditional != task.conditional:
            raise ValueError(f"rewards.{key} must be a reward of the kind of `reward`, e.g. reward@rewards.{key}=digit")
        else:
            tasks[key] = task._replace(reward=own.reward)
    for key, method in prepared.built.items():
        if (own := tasks[key]) is not None:
            try:
                if hasattr(method, "suits"):
                    method.suits(own)
                parts(method, prepared.settings, prepared.domain.shape, own)
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
    import numpy as np

    from rgdiff.runtime import recipe
    from rgdiff.runtime.folder import RunFolder
    from rgdiff.runtime.methods import Ancestral
    from rgdiff.runtime.pages import table, write_pages
    from rgdiff.runtime.run import Diverged, Run, phase_key

    config, domain, built = prepared.config, prepared.domain, prepared.built
    say(f"{prepared.name}: {', '.join(built)}; into {prepared.out}")
    count, seed = config["samples"], config["seed"]

    # The judge and the rewards: whatever they refuse is refused before the folder is a run's.
    judge = domain.evaluator(phase_key(seed, "judge"))

    def make(phase: str, settings: Any) -> Any:
        task = recipe.build(settings, prepared.trusted, domain=domain, judge=judge, key=phase_key(seed, phase))
        judge.check(task)
        return task

    task, tasks = tasks_of(prepared, make)
    assert prepared.cache is not None
    fresh = not (prepared.out / "config.yaml").exists()
    folder = RunFolder.create(prepared.out, config, resume=config["resume"])
    run = Run(folder, seed, prepared.cache)
    try:
        # Run: the prior, then every method beside it.
        prior = prepared.settings.obtain(run, domain, config["prior"])
        outcomes = {"prior": Ancestral().run(run, "prior_samples", prior, task, count)}
        stopped: dict[str, str] = {}
        for key, method in built.items():
            try:
                outcome = method.run(run, key, prior, tasks[key], count)
                finite = np.isfinite(outcome.x0).reshape(len(outcome.x0), -1).all(-1).sum()
                if finite < 2:
                    raise Diverged(
                        f"{key}: {finite} of {len(outcome.x0)} samples are finite; lower its learning rate or its scale"
                    )
                outcomes[key] = outcome
            except Diverged as failure:  # the others are worth having
                stopped[key] = str(failure)
                run.say(stopped[key])
    except BaseException:
        if fresh and folder.empty:  # nothing was made in it: the corrected command may have it
            run.log.close()
            folder.forget()
        raise

    # Write: numbers, samples, report, and last the summary, which marks the run as finished.
    rows = {key: judge.row(outcome, task, prior) | outcome.figures for key, outcome in outcomes.items()}
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
    run.say(table(rows))
    run.say(f"report: {folder.path / 'report.html'}")
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

    from rgdiff.runtime.pages import table
    from rgdiff.runtime.run import Diverged

    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    say(table(rows_of(summary)))
    say(f"finished before; report: {out / 'report.html'}")
    if stopped := [reason for name, reason in summary.items() if name.endswith("/stopped")]:
        raise Diverged("; ".join(stopped), summary)
    return summary


if __name__ == "__main__":
    sys.exit(main())
