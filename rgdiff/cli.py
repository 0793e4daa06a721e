"""The command line: parse, build, run, write. `rgdiff run RECIPE [key=value …]`, `rgdiff plan RECIPE`, `rgdiff list`, `rgdiff explain NAME`, ….

Whatever is wrong with the input ends in one line on standard error and exit code 2, before anything is overwritten.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
from collections.abc import Sequence

TRY = """Reward-guided diffusion: steer or fine-tune a prior by a reward. Three commands to try:

  rgdiff run quickstart --dry-run    # the plan of a first run: digits, steered by SVDD and tuned by DRaFT
  rgdiff list                        # recipes, and methods by what you have
  rgdiff explain svdd                # one page on a method, reward, prior, domain or recipe

`rgdiff --help` has all commands."""


def command_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, with what completes its arguments in a shell."""
    import rgdiff
    from rgdiff.recipes import completion

    parser = argparse.ArgumentParser(
        prog="rgdiff", description="Reward-guided diffusion: steer or fine-tune a prior by a reward."
    )
    parser.add_argument("--version", action="version", version=f"rgdiff {rgdiff.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    run = commands.add_parser("run", help="run a recipe", description=(
        "Run a recipe. Common to all: out=DIR seed=N data_dir=DIR resume=true; groups: domain= prior= reward= method=."
    ))  # fmt: skip
    plan = commands.add_parser("plan", help="compile a recipe's programs for any device and run none", description=(
        "Compile a recipe's programs for a device and print what each needs of it: bytes, operations, collectives. Nothing is run. "
        "target=v5e:4x4 (v4, v5e, v5p, v6e with a topology, or alone for one chip), cpu, or here (the default); "
        "largest=true finds the largest batch that fits."
    ))  # fmt: skip
    show = commands.add_parser("show", help="print the resolved config of a recipe")
    for command in (run, plan, show):
        recipe = command.add_argument("recipe", help="a name from `rgdiff list`, or a YAML file")
        recipe.completer = completion.recipes  # type: ignore[attr-defined]
        overrides = command.add_argument("overrides", nargs="*", metavar="key=value")
        overrides.completer = completion.overrides  # type: ignore[attr-defined]
    run.add_argument(
        "--multirun",
        action="store_true",
        help="run all combinations of comma-separated values, each in out/0, out/1, …",
    )
    run.add_argument("--dry-run", action="store_true", help="check everything and print the plan; write nothing")
    commands.add_parser("list", help="list recipes by domain, methods by what they need, and all else")
    explain = commands.add_parser("explain", help="print one page on a name of the list, or a page of the docs")
    name = explain.add_argument("name", help="e.g. svdd, reward=digit, quickstart, methods, commands, measured")
    name.completer = completion.topics  # type: ignore[attr-defined]
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    from rgdiff.runtime.progress import announce

    parser = command_parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what could come next
        import argcomplete  # pyright: ignore[reportMissingImports]

        argcomplete.autocomplete(parser)
    arguments = parser.parse_args(options_first(sys.argv[1:] if argv is None else argv))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without some letter is no reason to stop
            stream.reconfigure(errors="replace")
    logging.basicConfig(format="rgdiff: %(message)s", level=logging.WARNING)
    try:
        if arguments.command is None:
            print(TRY)
        elif arguments.command == "list":
            print(listing())
        elif arguments.command == "explain":
            print(explained(arguments.name))
        elif arguments.command == "show":
            print(shown(arguments.recipe, arguments.overrides), end="")
        elif arguments.command == "plan":
            announce("loading JAX and the recipe…")
            from rgdiff.recipes.programs import plan

            plan(arguments.recipe, arguments.overrides)
        else:
            announce("loading JAX and the recipe…")
            from rgdiff.recipes.run import run_recipe
            from rgdiff.recipes.sweep import sweep

            work = sweep if arguments.multirun else run_recipe
            work(arguments.recipe, arguments.overrides, dry=arguments.dry_run)
    except KeyboardInterrupt as stop:
        print("rgdiff: interrupted; go on with resume=true", file=sys.stderr)
        return 128 + getattr(stop, "signal", signal.SIGINT)  # the usual code of a process that a signal ended
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
    from rgdiff.recipes import manual

    return manual.listing()


def explained(name: str) -> str:
    """Return the page of a name."""
    from rgdiff.recipes import manual

    return manual.page(name)


def shown(name: str, overrides: Sequence[str]) -> str:
    """Return the resolved config as YAML, with the comments that explain its options."""
    from rgdiff.recipes.explain import explained

    return explained(name, overrides)


if __name__ == "__main__":
    sys.exit(main())
