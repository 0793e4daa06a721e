"""The command line: parse, build, run, write. `rgdiff run RECIPE [key=value …]`, `rgdiff list`, `rgdiff show RECIPE`.

Whatever is wrong with the input ends in one line on standard error and exit code 2, before anything is overwritten.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
from collections.abc import Sequence
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
    show = commands.add_parser("show", help="print the resolved config of a recipe")
    show.add_argument("recipe")
    show.add_argument("overrides", nargs="*", metavar="key=value")
    commands.add_parser("list", help="list recipes, methods, rewards, priors and domains")
    arguments = parser.parse_args(options_first(sys.argv[1:] if argv is None else argv))
    logging.basicConfig(format="rgdiff: %(message)s", level=logging.WARNING)
    try:
        if arguments.command == "list":
            print(listing())
        elif arguments.command == "show":
            print(shown(arguments.recipe, arguments.overrides), end="")
        else:
            if arguments.multirun:
                sweep(arguments.recipe, arguments.overrides)
            else:
                run_recipe(arguments.recipe, arguments.overrides)
    except KeyboardInterrupt:
        print("rgdiff: interrupted; go on with resume=true", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except (ValueError, OSError) as error:
        print(f"rgdiff: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        from rgdiff.runtime.progress import announce

        announce(None)
    return 0


def options_first(argv: Sequence[str]) -> list[str]:
    """Move --options before the arguments of a command: argparse takes no key=value after an option among them."""
    return [*argv[:1], *(a for a in argv[1:] if a.startswith("-")), *(a for a in argv[1:] if not a.startswith("-"))]


def listing() -> str:
    """Return the text of `rgdiff list`."""
    from rgdiff.recipes import compose as recipe

    lines = []
    for title, group in (
        ("recipes", None),
        *((f"{g}s", g) for g in ("method", "value", "surrogate", "reward", "prior", "domain")),
    ):
        lines.append(title + ("" if group is None else f" ({group}=…)"))
        lines += [f"  {name:<23} {recipe.summary_of(name, group)}" for name in recipe.names(group)]
    return "\n".join(lines)


def shown(name: str, overrides: Sequence[str]) -> str:
    """Return the resolved config as YAML."""
    from omegaconf import OmegaConf

    from rgdiff.recipes import compose as recipe

    return OmegaConf.to_yaml(OmegaConf.create(recipe.compose(name, overrides)))


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """Expand comma-separated values into all combinations; each gets a numbered folder below `out`."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    choices, out = [], "runs/sweep"
    for override, parsed in zip(overrides, OverridesParser.create().parse_overrides(list(overrides)), strict=True):
        key = override.partition("=")[0]
        if key == "out":
            out = override.partition("=")[2]
        elif parsed.is_sweep_override():
            choices.append([f"{key}={value}" for value in parsed.sweep_string_iterator()])
        else:
            choices.append([override])
    return [[*combination, f"out={out}/{i}"] for i, combination in enumerate(itertools.product(*choices))]


def sweep(name: str, overrides: Sequence[str]) -> None:
    """Run all combinations, one after the other, and write sweep.csv above their folders: what was swept, and every figure."""
    import csv
    import io

    from rgdiff.runtime.folder import write_atomic
    from rgdiff.runtime.run import Diverged

    combinations = expand(overrides)
    swept = [{o.partition("=")[0]: o.partition("=")[2] for o in combination} for combination in combinations]
    rows: list[dict[str, Any]] = []
    for combination, settings in zip(combinations, swept, strict=True):
        try:
            rows.append(settings | run_recipe(name, combination))
        except Diverged as failure:  # the other combinations are worth having
            rows.append(settings | failure.summary | {"stopped": str(failure)})
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(Path(settings["out"]).parent / "sweep.csv", buffer.getvalue().encode())
    if stopped := [row for row in rows if "stopped" in row]:
        raise ValueError(
            f"{len(stopped)} of {len(rows)} runs stopped, the first: {stopped[0]['stopped']}; see sweep.csv"
        )


def run_recipe(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Run one recipe and write its folder; return the summary. A method that diverges is left out, and raises at the end."""
    from rgdiff.runtime.progress import announce

    announce("loading JAX and the recipe…")
    from rgdiff.recipes import compose as recipe
    from rgdiff.recipes.methods.steering import PriorSampling
    from rgdiff.recipes.outcome import without_divergence
    from rgdiff.recipes.pages import table, write_pages
    from rgdiff.recipes.priors import default_cache
    from rgdiff.runtime.folder import RunFolder
    from rgdiff.runtime.naturalness import marked
    from rgdiff.runtime.run import Diverged, Run, use_compilation_cache

    # Parse: one resolved config, checked whole.
    config, chosen = recipe.composed(name, overrides)
    trusted = recipe.trusted_modules(overrides)
    recipe.check(config, trusted)
    methods = config.get("methods") or {chosen["method"] or "method": config["method"]}

    # Build: data, prior, reward; the folder only when these names and files are good.
    announce("loading the data…")
    domain = recipe.build(config["domain"], trusted)
    settings = recipe.build(config["prior"], trusted)
    built = {key: recipe.build(value, trusted) for key, value in methods.items()}
    if strangers := sorted(set(config.get("rewards") or {}) - set(built)):
        raise ValueError(f"rewards.{strangers[0]} guides no method of this recipe, which has {', '.join(built)}")
    for key, method in built.items():
        try:
            method.check(settings, domain.shape)
        except TypeError as error:  # an option that the method does not take, or lacks
            raise ValueError(f"{key}: {error}") from error
    cache = Path(config["cache_dir"]) if config.get("cache_dir") else default_cache()
    use_compilation_cache(cache)
    fresh = not (Path(config["out"]) / "config.yaml").exists()
    folder = RunFolder.create(config["out"], config, resume=bool(config["resume"]))
    run = Run(folder, int(config["seed"]), cache)
    count = int(config["samples"])

    # Run: the judge and the reward, the prior, then every method beside it.
    announce("making the judge and the reward, and training what of them is learned…")
    try:
        judge, task, tasks = judge_and_tasks(config, trusted, domain, settings, built, run)
    except ValueError:
        if fresh:  # nothing was made in it: the corrected command may have it
            folder.forget()
        raise
    announce("making the prior…")
    identity = {"domain": config["domain"], "prior": config["prior"], "seed": config["seed"]}
    prior = settings.obtain(run, domain, identity)
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

    # Write: numbers, samples, report.
    announce("measuring the samples and drawing the page…")
    rows = {key: judge.row(outcome, task, prior) | outcome.figures for key, outcome in outcomes.items()}
    rows = marked(rows, judge.spread(outcomes["prior"], task))
    summary = {f"{key}/{metric}": value for key, row in rows.items() for metric, value in row.items()}
    for key, row in rows.items():
        run.log.rewind(f"{key}_summary", 0)
        run.log.write(f"{key}_summary", 0, {f"total_{m}" if m == "seconds" else m: v for m, v in row.items()})
    folder.write_samples(**{key: outcome.x0 for key, outcome in outcomes.items()})
    rows |= {f"{key} (stopped)": {} for key in stopped}
    write_pages(run, config, overrides, name, judge, task, prior, outcomes, rows, list(stopped.values()))
    folder.write_summary(summary | {f"{key}/stopped": reason for key, reason in stopped.items()})
    run.log.close()
    announce(None)
    run.say(table(rows))
    run.say(f"report: {folder.path / 'report.html'}")
    if stopped:
        raise Diverged("; ".join(stopped.values()), summary)
    return summary


def judge_and_tasks(
    config: Any, trusted: set[str], domain: Any, settings: Any, built: dict[str, Any], run: Any
) -> tuple[Any, Any, Any]:
    """Train the judge and the rewards, and refuse those that do not fit the prior or a method: the judge, the task, and every method's."""
    from rgdiff.recipes import compose as recipe
    from rgdiff.rewards import Task

    judge = recipe.build(config["judge"], trusted, domain=domain, key=run.key("judge"))
    task = recipe.build(config["reward"], trusted, domain=domain, judge=judge, key=run.key("reward"))
    tasks = dict.fromkeys(built, task)
    for key, settings_of in (config.get("rewards") or {}).items():  # guides of their own, judged alike
        own = recipe.build(settings_of, trusted, domain=domain, judge=judge, key=run.key(f"{key}_reward"))
        if not isinstance(own, Task) or own.conditional != task.conditional:
            raise ValueError(f"rewards.{key} must be a reward of the kind of `reward`, e.g. reward@rewards.{key}=digit")
        tasks[key] = task._replace(reward=own.reward)
    for one in (task, *tasks.values()):
        judge.check(one)
    for key, method in built.items():
        if hasattr(method, "suits"):
            method.suits(tasks[key])
    if task.conditional and getattr(settings, "guidance", None) is None:
        raise ValueError("this reward is of a sample's label; choose a conditional prior, e.g. prior=unet_conditional")
    return judge, task, tasks


if __name__ == "__main__":
    sys.exit(main())
