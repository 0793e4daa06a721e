"""Submodules that are imported when they are first used, and listed by `dir` before that."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def submodules(
    package: str, modules: Sequence[str], functions: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return a package's `__getattr__` and `__dir__`.

    Args:
      package: its name.
      modules: names of submodules.
      functions: name -> the submodule that holds it, for what is reached without naming the submodule.
    """
    functions = functions or {}

    def __getattr__(name: str) -> Any:
        if name in functions:
            return getattr(importlib.import_module(f"{package}.{functions[name]}"), name)
        if name in modules:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(sorted(listed()))}")

    def listed() -> list[str]:
        return sorted({*modules, *functions})

    return __getattr__, listed
