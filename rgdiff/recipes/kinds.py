"""Whether a plain value of a config is what a constructor's annotation asks for, as far as that is of plain kinds.

Annotations are read as text (`int | None`, `Sequence[float]`), and what is not plain in them fits anything.
"""

from __future__ import annotations

import ast
import inspect
import json
from typing import Any

KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {  # of annotations: as YAML has them, and in words
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "bool": (bool, "true or false"),
    "str": (str, "a word"),
    **dict.fromkeys(("dict", "Mapping"), (dict, "a mapping")),
    **dict.fromkeys(("Sequence", "list", "tuple"), (list, "a list")),
}
PLAIN = (int, float, bool, str)  # annotations that are types themselves


def of_kind(key: str, value: Any, parameter: inspect.Parameter) -> None:
    """Refuse a value of another kind than a parameter's annotation, e.g. `int | None`, as far as that is of plain kinds."""
    annotation = parameter.annotation
    text = annotation if isinstance(annotation, str) else annotation.__name__ if annotation in PLAIN else "Any"
    node = ast.parse(text, mode="eval").body
    known = isinstance(annotation, str) or annotation in PLAIN
    optional = "None" in text or parameter.default is None or not known
    if not (optional if value is None else _fits(value, node)):
        wanted = " or ".join(_words(node))
        raise ValueError(f"{key} must be {wanted or 'given'}, got {json.dumps(value, default=str)}")


def _words(kind: ast.expr) -> list[str]:
    """What an annotation of plain kinds asks for, in words."""
    match kind:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return [*_words(left), *_words(right)]
        case ast.Subscript(value=ast.Name(id=name), slice=inner) if name in KINDS:
            each = _words(_elements(inner)[-1])
            return [KINDS[name][1] + (f" whose every value is {each[0]}" if each else "")]
        case ast.Name(id=name) if name in KINDS:
            return [KINDS[name][1]]
    return []


def _fits(value: Any, kind: ast.expr) -> bool:
    """Whether a plain value is of an annotated kind; an annotation that is not of plain kinds fits anything."""
    match kind:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _fits(value, left) or _fits(value, right)
        case ast.Constant(value=None):
            return value is None
        case ast.Name(id=name) if name in KINDS:
            return isinstance(value, KINDS[name][0]) and (name == "bool" or not isinstance(value, bool))
        case ast.Subscript(value=ast.Name(id=name), slice=inner) if name in KINDS:
            if not isinstance(value, KINDS[name][0]):
                return False
            values, elements = (
                (value.values(), _elements(inner)[-1:]) if isinstance(value, dict) else (value, _elements(inner))
            )
            return all(any(_fits(one, of) for of in elements) for one in values)
    return True


def _elements(inner: ast.expr) -> list[ast.expr]:
    """What stands in the brackets of an annotation, dots aside."""
    elements = inner.elts if isinstance(inner, ast.Tuple) else [inner]
    return [one for one in elements if not (isinstance(one, ast.Constant) and one.value is ...)]
