"""A resolved config as YAML with the comments that explain its options, taken from the files that it was composed of.

A comment belongs to the key on its line; the first line of a choice's file belongs to the choice. Where several files
explain one key, the last that was composed does, as for values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from rgdiff.recipes import compose as recipe

WIDTH = 100  # columns that values and their comments share, where a value leaves room


def explained(name: str, overrides: Sequence[str]) -> str:
    """Return the resolved config of a recipe as YAML, with comments."""
    text = yaml.safe_dump(recipe.compose(name, overrides), sort_keys=False, allow_unicode=True, width=1000)
    comments = dict(_comments(name, overrides))
    lines = text.splitlines()
    told = {line: comments[path] for path, line, _ in _keys(yaml.compose(text)) if path in comments}
    column = min(max((len(lines[line]) for line in told), default=0), WIDTH - 60) + 2
    for line, comment in told.items():
        lines[line] = f"{lines[line]:<{column - 2}}  # {comment}"
    return "\n".join(lines) + "\n"


def _comments(name: str, overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    for path, package in recipe.sources(name, overrides):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        if not path.stem.startswith("_"):  # a choice: its first line says what it is
            of, first = (package, 0) if "@package" not in lines[0] else (path.parent.name, 1)
            if of and lines[first].startswith("#") and lines[first].strip("# "):
                yield of, lines[first].lstrip("# ")
        for key, line, column in _keys(yaml.compose(text)):
            _, mark, comment = lines[line][column:].partition(" #")
            if mark and comment.strip():
                yield f"{package}.{key}" if package else key, comment.strip()


def _keys(node: Any, prefix: str = "") -> Iterator[tuple[str, int, int]]:
    """Yield every key's path, its line, and the column where it and a value on its line end."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = f"{prefix}{key.value}"
            end = value.end_mark if value.end_mark.line == key.end_mark.line else key.end_mark
            yield path, key.start_mark.line, end.column
            yield from _keys(value, f"{path}.")
