"""The command line: parse, build, run, write. `rgdiff run RECIPE [key=value …]`, `rgdiff list`, `rgdiff show RECIPE`.

Whatever is wrong with the input ends in one line on standard error and exit code 2, before anything is overwritten.
"""

from __future__ import annotations

import argparse
import io
import logging
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    import rgdiff
    from rgdiff.runtime.progress import announce

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
            announce("loading JAX and the recipe…")
            from rgdiff.recipes.run import run_recipe
            from rgdiff.recipes.sweep import sweep

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
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = " ".join(str(error).split())[:160]
        advice = "ask for fewer samples, candidates or a smaller batch"
        print(f"rgdiff: out of memory; {advice} ({reason})", file=sys.stderr)
        return 2
    finally:
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
    """Return the resolved config as YAML, with the comments that explain its options."""
    from rgdiff.recipes.explain import explained

    return explained(name, overrides)


if __name__ == "__main__":
    sys.exit(main())
