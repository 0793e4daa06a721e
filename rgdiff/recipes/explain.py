"""A resolved config as YAML with the comments that explain its options, taken from the files that it was composed of.

A comment belongs to the key on its line; the first line of a choice's file belongs to the choice. Where several files
explain one key, the last that was composed does, as for values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from rgdiff.recipes import compose as recipe

WIDTH = 100  # columns that values and their comments share, where a value leaves room


def explained(name: str, overrides: Sequence[str]) -> str:
    """Return the resolved config of a recipe as YAML, with comments."""
    text = yaml.safe_dump(recipe.compose(name, overrides), sort_keys=False, allow_unicode=True, width=1000)
    comments = {key: comment for key, _, comment in settings(recipe.sources(name, overrides)) if comment}
    lines = text.splitlines()
    told = {line: comments[path] for path, line, *_ in _keys(yaml.compose(text)) if path in comments}
    column = min(max((len(lines[line]) for line in told), default=0), WIDTH - 60) + 2
    for line, comment in told.items():
        lines[line] = f"{lines[line]:<{column - 2}}  # {comment}"
    return "\n".join(lines) + "\n"


def settings(files: Iterable[tuple[Path, str]]) -> Iterator[tuple[str, str, str]]:
    """Yield the keys that files set, in order: each with its value as written ("" for a part with keys) and its comment, or "".

    Args:
      files: as `compose.sources` returns them.
    """
    for path, package in files:
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        if not path.stem.startswith("_"):  # a choice: its first line says what it is
            of, first = (package, 0) if "@package" not in lines[0] else (path.parent.name, 1)
            if of and lines[first].startswith("#") and lines[first].strip("# "):
                yield of, "", lines[first].lstrip("# ")
        for key, line, column, value in _keys(yaml.compose(text)):
            _, mark, comment = lines[line][column:].partition(" #")
            parts = isinstance(value, yaml.MappingNode) and value.value
            written = "" if parts else text[value.start_mark.index : value.end_mark.index]
            yield f"{package}.{key}" if package else key, written, comment.strip() if mark else ""


def _keys(node: Any, prefix: str = "") -> Iterator[tuple[str, int, int, Any]]:
    """Yield every key's path, its line, the column where it and a value on its line end, and the value's node."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = f"{prefix}{key.value}"
            end = value.end_mark if value.end_mark.line == key.end_mark.line else key.end_mark
            yield path, key.start_mark.line, end.column, value
            yield from _keys(value, f"{path}.")
