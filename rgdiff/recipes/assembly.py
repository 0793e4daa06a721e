"""How a method of a recipe builds a sampler or a tuner: the constructor by its name, its parts by theirs, its options as they are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from rgdiff import checks


def named(module: ModuleType, name: str, key: str, *needed: str) -> Callable[..., Any]:
    """Return a public constructor of a module that takes all the parameters `needed`.

    Raises:
      ValueError: for another name; `key` is the config's.
    """
    found = {n: getattr(module, n) for n in module.__all__ if callable(getattr(module, n))}
    fitting = [n for n, constructor in found.items() if takes(constructor, *needed)]
    return found[checks.one_of(key, name, fitting)]


def takes(constructor: Callable[..., Any], *names: str) -> bool:
    """Whether a constructor has all these parameters."""
    if inspect.isclass(constructor):
        return False
    return set(names) <= set(inspect.signature(constructor).parameters)


def assemble(constructor: Callable[..., Any], options: Mapping[str, Any], **parts: Any) -> Any:
    """Call a constructor with its options, and with those of the parts that it takes and that are not None."""
    accepted = inspect.signature(constructor).parameters
    given = {name: part for name, part in parts.items() if name in accepted and part is not None}
    return constructor(**{**given, **options})
