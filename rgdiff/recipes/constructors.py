"""What the source of a constructor says of it: description, arguments, defaults. Nothing is imported, so that help comes at once."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from rgdiff._settings import arguments
from rgdiff.recipes.kinds import KINDS

ROOT = Path(__file__).resolve().parents[1]  # of the package
SECTION = re.compile(r"\n(Args|Returns|Raises|Example|Note|Source|References):\n")


class Constructor(NamedTuple):
    """A function or class of rgdiff, as its source has it.

    Attributes:
      path: the dotted path that it was asked for by.
      about: its docstring before Args, and for a setting of an engine that of the engine.
      entries: argument -> its entry under Args, on one line.
      defaults: argument -> its default as written, of arguments that have one.
      keywords: names of those that are given by keyword only.
      plain: names of those whose annotation is of plain kinds: numbers, words, lists.
    """

    path: str
    about: str
    entries: dict[str, str]
    defaults: dict[str, str]
    keywords: frozenset[str]
    plain: frozenset[str]


@functools.cache
def read(path: str) -> Constructor | None:
    """Return what the source says of a constructor, or None where a dotted path leads to none of rgdiff."""
    found = _definition(path)
    if found is None:
        return None
    module, node = found
    doc = ast.get_docstring(node) or ""
    about = SECTION.split(f"{doc}\n")[0].strip()
    entries = {name: _entry(text) for name, text in arguments(doc).items()}
    if isinstance(node, ast.ClassDef):
        bases = [read(f"{module}.{base.id}") for base in node.bases if isinstance(base, ast.Name)]
        fields = [one for one in node.body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)]
        annotated = {one.target.id: one.annotation for one in fields}  # type: ignore[union-attr]
        defaults = {one.target.id: ast.unparse(one.value) for one in fields if one.value}  # type: ignore[union-attr]
        made = Constructor(path, about, entries, defaults, frozenset(annotated), _plain(annotated))
        for base in filter(None, bases):  # what a class inherits is told where it is defined
            made = made._replace(
                entries=made.entries | base.entries,
                defaults=base.defaults | made.defaults,
                keywords=base.keywords | made.keywords,
                plain=base.plain | made.plain,
            )
        return made
    given = node.args
    positional = given.args[len(given.args) - len(given.defaults) :]
    pairs = [*zip(positional, given.defaults, strict=True), *zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    defaults = {arg.arg: ast.unparse(value) for arg, value in pairs if value is not None}
    annotated = {arg.arg: arg.annotation for arg in (*given.args, *given.kwonlyargs)}
    keywords = frozenset(arg.arg for arg in given.kwonlyargs)
    made = Constructor(path, about, entries, defaults, keywords, _plain(annotated))
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "setting_of":
            made = _with_engine(made, module, decorator, {arg.arg for arg in given.args} | keywords)
    return made


def _definition(path: str) -> tuple[str, ast.FunctionDef | ast.ClassDef] | None:
    """The module and the node in which a dotted path ends, followed through imports."""
    module, _, name = path.rpartition(".")
    for node in _body(module):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _definition(f"{node.module}.{alias.name}")
    return None


@functools.cache
def _body(module: str) -> list[ast.stmt]:
    package, *parts = module.split(".")
    path = ROOT.joinpath(*parts)
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8")).body if package == "rgdiff" and file.is_file() else []


def _with_engine(made: Constructor, module: str, decorator: ast.Call, own: set[str]) -> Constructor:
    """A setting with the keywords of its engine (`rgdiff._settings.setting_of`)."""
    engine = read(f"{module}.{ast.unparse(decorator.args[0])}")
    if engine is None:
        return made
    fixed, changed = set(), {}
    for one in decorator.keywords:
        if one.arg == "fixed":
            fixed = set(ast.literal_eval(one.value))
        elif isinstance(one.value, ast.Dict):  # defaults
            pairs = zip(one.value.keys, one.value.values, strict=True)
            changed = {key.value: ast.unparse(value) for key, value in pairs if isinstance(key, ast.Constant)}
    taken = engine.keywords - fixed - own
    return made._replace(
        about=f"{made.about}\n\n{engine.about}",
        entries={name: text for name, text in engine.entries.items() if name in taken | own} | made.entries,
        defaults={name: text for name, text in (engine.defaults | changed).items() if name in taken} | made.defaults,
        keywords=taken | made.keywords,
        plain=(engine.plain & taken) | made.plain,
    )


def _plain(annotated: Mapping[str, ast.expr | None]) -> frozenset[str]:
    words = {name: set(re.findall(r"\w+", ast.unparse(node))) for name, node in annotated.items() if node is not None}
    return frozenset(name for name, found in words.items() if found <= {*KINDS, "None"})


def _entry(text: str) -> str:
    """An entry under Args without its names, on one line."""
    return " ".join(text.partition(":")[2].split())
