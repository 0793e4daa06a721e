"""Settings of an engine: a named constructor that passes further keywords on shows them, with types, defaults and meaning.

The engine's parameters are written down once, in the engine. `inspect.signature` and `help` of a setting then name all of
them, and an unknown keyword is refused by the setting's own name.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def setting_of(
    engine: Callable[..., Any], *, fixed: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
) -> Callable[[F], F]:
    """Decorate `setting(..., **options)`: its options are the keywords of `engine`, less those it has itself and `fixed`.

    Args:
      engine: whose keyword-only parameters, and their entries under Args, the setting takes over.
      fixed: keywords of the engine that the setting gives itself.
      defaults: other defaults than the engine's, which the setting receives among its options.
    """
    defaults = dict(defaults or {})

    def decorate(setting: F) -> F:
        own = inspect.signature(setting)
        parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        taken = {p.name for p in parameters} | set(fixed)
        more = [
            p.replace(default=defaults.get(p.name, p.default))
            for p in inspect.signature(engine).parameters.values()
            if p.kind is p.KEYWORD_ONLY and p.name not in taken
        ]
        signature = own.replace(parameters=[*parameters, *more])
        names = list(signature.parameters)
        nearest = difflib.get_close_matches

        def call(*args: Any, **options: Any) -> Any:
            for name in options:
                if name not in signature.parameters:
                    near = nearest(name, names, n=1)
                    hint = f"; did you mean {near[0]!r}?" if near else f"; it takes {', '.join(names)}"
                    raise TypeError(f"{setting.__name__}() got an unexpected keyword argument {name!r}{hint}")
            return setting(*args, **(defaults | options))

        # In the setting's own module, so that doctest finds its example there.
        call = types.FunctionType(call.__code__, setting.__globals__, call.__name__, None, call.__closure__)
        functools.update_wrapper(call, setting)
        call.__signature__ = signature  # type: ignore[attr-defined]
        call.__doc__ = joined(setting.__doc__, engine.__doc__, set(names) - set(arguments(setting.__doc__)))
        return call  # type: ignore[return-value]

    return decorate


def arguments(doc: str | None) -> dict[str, str]:
    """Return the entries under Args of a docstring: each name -> its text, indented as it stands."""
    lines = inspect.cleandoc(doc or "").splitlines()
    if "Args:" not in lines:
        return {}
    entries: dict[str, str] = {}
    names: list[str] = []
    for line in lines[lines.index("Args:") + 1 :]:
        if line and not line.startswith(" "):
            break
        head = re.match(r"  ([\w*]+(?:, [\w*]+)*):(?: |$)", line)
        if head:
            names = head.group(1).split(", ")
            entries |= dict.fromkeys(names, line)
        else:
            for name in names:
                entries[name] += "\n" + line
    return {name: text.rstrip() for name, text in entries.items()}


def joined(doc: str | None, engine: str | None, names: Iterable[str]) -> str:
    """Return a docstring whose Args also hold the engine's entries of these names, at their end."""
    wanted = [text for name, text in arguments(engine).items() if name in set(names)]
    known = set(arguments(doc).values())
    more = "\n".join(text for text in dict.fromkeys(wanted) if text not in known)
    lines = inspect.cleandoc(doc or "").splitlines()
    if not more:
        return "\n".join(lines)
    if "Args:" not in lines:
        section = next(
            (
                i
                for i, line in enumerate(lines)
                if re.fullmatch(r"(Returns|Raises|Note|Source|Example|References):", line)
            ),
            len(lines),
        )
        return "\n".join(
            [
                *lines[:section],
                *([""] if lines[:section] and lines[section - 1] else []),
                "Args:",
                more,
                "",
                *lines[section:],
            ]
        ).rstrip()
    at = lines.index("Args:") + 1
    while at < len(lines) and (not lines[at] or lines[at].startswith(" ")):
        at += 1
    while not lines[at - 1]:
        at -= 1
    return "\n".join([*lines[:at], more, *lines[at:]])
