"""What a shell completes: recipes, keys of a recipe, choices of groups, names that have a page. For argcomplete; without JAX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rgdiff.recipes import compose as recipe


def recipes(prefix: str, **_: Any) -> list[str]:
    """Return the recipes that begin with a prefix.

    Args:
      prefix: what is typed of the word.
    """
    return [name for name in recipe.names() if name.startswith(prefix)]


def topics(prefix: str, **_: Any) -> list[str]:
    """Return what `rgdiff explain` takes that begins with a prefix.

    Args:
      prefix: what is typed of the word.
    """
    from rgdiff.recipes import manual

    return [name for name in manual.topics() if name.startswith(prefix)]


def overrides(prefix: str, parsed_args: Any, **_: Any) -> list[str]:
    """Return the overrides of a recipe that begin with a prefix: `group=choice` and `key=` of what is chosen so far.

    Args:
      prefix: what is typed of the word.
      parsed_args: with `recipe`, and in `overrides` the words between.
    """
    return assignments(parsed_args.recipe, [one for one in parsed_args.overrides or [] if one != prefix], prefix)


def assignments(name: str, given: Sequence[str], prefix: str = "") -> list[str]:
    """Return the overrides of a recipe that begin with a prefix; none where the recipe does not compose.

    Args:
      name: of the recipe, or its file.
      given: overrides so far.
      prefix: what is typed of the word; after `=` choices of a group, and true or false, are offered.
    """
    from rgdiff.recipes.explain import settings

    try:
        files = recipe.sources(name, given)
    except Exception:  # of Hydra, of YAML, of files: a shell is not the place to hear of them
        return []
    values = {key: value for key, value, _ in settings(files)}
    choices = [(path.parent.name, package) for path, package in files if path.parent.name in recipe.GROUPS]
    groups = dict.fromkeys(of if package in ("", of) else f"{of}@{package}" for of, package in choices)
    key, equals, _ = prefix.partition("=")
    if not equals:
        keys = [
            key for key, value in values.items() if value and key.split(".")[0] != "defaults" and "_target_" not in key
        ]
        own = [key for key in dict.fromkeys([*recipe.COMMON, *groups, *keys]) if ".defaults" not in key]
        return [f"{key}=" for key in own if key.startswith(prefix)]
    boolean = ["true", "false"] if values.get(key) in ("true", "false") else []
    offered = recipe.names(key.split("@")[0]) if key in groups else boolean
    return [f"{key}={one}" for one in offered if f"{key}={one}".startswith(prefix)]
