"""`rgdiff explain` and `rgdiff list`: what a method, reward, value, surrogate, prior, domain or recipe is, on one page each.

Nothing is written down for them alone. A page is read from the config (its options and their comments, and the header lines
`# needs:` and `# cost:`), from the docstring of the constructor that it names, and from `rgdiff/docs`. JAX is not imported.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from rgdiff.recipes import compose as recipe
from rgdiff.recipes.constructors import Constructor, read
from rgdiff.recipes.explain import settings

WIDTH, HEIGHT = 100, 60  # of a page: columns, and lines that it stays below
DOCS = Path(__file__).resolve().parents[1] / "docs"
NEEDS = (  # what a method's `# needs:` begins with: what the reader has
    "a differentiable reward",
    "any reward, a black box too",
    "an expensive reward",
    "no reward but data",
)
ENGINES = "tuners", "samplers", "guides"  # modules whose functions a method's `setting` or `guide` names
NAMED = re.compile(r"\b(?:rgdiff\.)?((?:tuners|samplers|guides|seiko|policies)\.[a-z]\w*)")  # in a sentence
ARXIV = re.compile(r"\b\d{4}\.\d{5}\b")
PAPERS = re.compile(r" \([^()]*\d{4}\.\d{5}[^()]*\)")  # in brackets
CALLS = "T is the number of network calls of the prior's chain, prior.steps"


def listing(group: str | None = None) -> str:
    """Return the text of `rgdiff list`: recipes by domain, methods by what they need, and the other groups, or one group alone."""
    sections: dict[str, list[tuple[str, str | None]]] = {}
    if group is None:
        for name in sorted(recipe.names(), key=lambda name: name != "quickstart"):  # first where one begins
            domain = chosen(name).get("domain")
            sections.setdefault(f"recipes on {domain}" if domain else "recipes", []).append((name, None))
    if group in (None, "method"):
        methods = {name: header(name, "method")["needs"] for name in recipe.names("method")}
        for need in NEEDS:
            mine = [name for name, told in methods.items() if told.startswith(need)]
            sections[f"methods for {need} (method=…)"] = [(name, "method") for name in mine]
    for other in recipe.GROUPS if group is None else [group]:
        if other != "method":
            sections[f"{other}s ({other}=…)"] = [(name, other) for name in recipe.names(other)]
    lines = []
    for head, entries in sections.items():
        width = max(len(name) for name, _ in entries)
        summaries = {name: recipe.summary_of(name, of) for name, of in entries}
        lines += [head, *(f"  {name:<{width}} {brief(text, WIDTH - 3 - width)}" for name, text in summaries.items())]
    return "\n".join([*lines, "", "`rgdiff explain NAME` says more of each."])


def brief(summary: str, width: int) -> str:
    """Shorten a summary to a width: without its paper, then by whole clauses, then by words.

    Args:
      summary: one line.
      width: columns.
    """
    short = PAPERS.sub("", summary)
    if len(short) <= width:
        return short
    ends = [match.start() for match in re.finditer(r"[,;:] | \(", short) if width / 2 < match.start() < width]
    return f"{short[: ends[-1]]}…" if ends else textwrap.shorten(short, width, placeholder="…")


def page(name: str) -> str:
    """Return the page of a name: of a recipe, of a choice of a group (GROUP=NAME where several have the name), of a group, of the docs.

    Raises:
      ValueError: for an unknown name, with the nearest ones.
    """
    group, _, choice = name.rpartition("=")
    known = names()
    places = [one for one in known if one == (group or None, choice) or (not group and one[1] == choice)]
    if len(places) > 1:
        several = {full(of, one): brief(recipe.summary_of(one, of), 60) for of, one in places}
        return "\n".join([f"{name} names:", *(f"  rgdiff explain {key:<18} {text}" for key, text in several.items())])
    if not places and not group and (DOCS / f"{name}.md").is_file():
        return (DOCS / f"{name}.md").read_text(encoding="utf-8").rstrip()
    if not places and not group and name.removesuffix("s") in recipe.GROUPS:
        return listing(name.removesuffix("s"))
    if not places:
        near = difflib.get_close_matches(name, topics(), n=3, cutoff=0.5)
        nearest = f"; the nearest names are {', '.join(near)}" if near else ""
        raise ValueError(f"nothing is called {name!r}{nearest}; `rgdiff list` shows all names")
    [(group, choice)] = places
    return _recipe(choice) if group is None else _choice(choice, group)


def names() -> list[tuple[str | None, str]]:
    """Return every (group, name) that has a page; the group of recipes is None."""
    return [(group, name) for group in (None, *recipe.GROUPS) for name in recipe.names(group)]


def topics() -> list[str]:
    """Return all that `rgdiff explain` takes: names, GROUP=NAME, groups, pages of the docs."""
    docs = (path.stem for path in DOCS.glob("*.md"))
    return sorted({*(name for _, name in names()), *(full(*one) for one in names()), *recipe.GROUPS, *docs})


def full(group: str | None, name: str) -> str:
    """Return how a choice is named beyond doubt."""
    return name if group is None else f"{group}={name}"


def header(name: str, group: str | None = None) -> dict[str, str]:
    """Return the lines `# KEY: text` at the head of a config, or of the nearest that it begins with, by KEY.

    Args:
      name: of a recipe or of a choice.
      group: of the choice.
    """
    found: dict[str, str] = {}
    for path in reversed([*_extended(recipe.config_dir() / (group or "") / f"{name}.yaml")]):
        for line in _head(path):
            key, mark, text = line.lstrip("# ").partition(": ")
            if mark and key in ("needs", "cost"):
                found[key] = text
    return found


def chosen(name: str, group: str | None = None) -> dict[str, str]:
    """Return the choices of groups that a config names in its defaults, by key: `domain`, `method@methods.x`, `value@value`.

    Args:
      name: of a recipe or of a choice.
      group: of the choice.
    """
    found: dict[str, str] = {}
    for path in reversed([*_extended(recipe.config_dir() / (group or "") / f"{name}.yaml")]):
        for one in _defaults(path):
            if isinstance(one, dict):
                found |= {str(key).removeprefix("override ").lstrip("/"): str(value) for key, value in one.items()}
    return found


def _extended(path: Path) -> Iterator[Path]:
    """A config's file, then those of its folder that it begins with, the nearest first."""
    yield path
    for one in reversed(_defaults(path)):
        if isinstance(one, str) and one != "_self_" and "@" not in one:
            yield from _extended(path.with_name(f"{one}.yaml"))


def _head(path: Path) -> Iterator[str]:
    """The comment that a config begins with."""
    return itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())


@functools.cache
def _defaults(path: Path) -> list[Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8")).get("defaults", [])


def _choice(name: str, group: str) -> str:
    """The page of a choice of a group; where it is long, options have a line each."""
    summary, told = recipe.summary_of(name, group), header(name, group)
    files = recipe.sources(name, group=group)
    own = list(settings(files[-1:]))
    values, comments = {key: "" for key, _, _ in own}, {key: "" for key, _, _ in own}  # its own come first
    for key, value, comment in settings([one for one in files if one[1] in ("", group)]):
        values[key], comments[key] = value or values.get(key, ""), comment or comments.get(key, "")
    library, takes = _library(values, comments, group)
    about = _paragraphs(library.about if library else "")
    cost, recipes = told.get("cost", ""), _users(name, group)
    facts = {
        "idea": _idea(library) if group == "method" else "",
        "needs": told.get("needs") or _fits(values, group),
        "cost": f"{cost} ({CALLS})" if re.search(r"\bT\b", cost) else cost,
        "papers": ", ".join(f"https://arxiv.org/abs/{one}" for one in _papers(summary, library)),
        "methods": ", ".join(_users(name, group, "method")) if group in ("value", "surrogate") else "",
        "recipes": ", ".join(recipes),
        "measured": "; ".join(_measured(name, summary)) if group in ("method", "surrogate") else "",
    }
    head = [*_wrapped(f"{group}={name}: {summary}"), "", *about, *([""] if about else [])]
    head += [line for key, text in facts.items() if text for line in _wrapped(f"{key:<10}{text}", rest=" " * 10)]
    options = [*_options(values, comments, group, library), *_shared(files, name, group)]
    place = f"{group}.options" if group == "method" else group
    further = _further(library, values, place) if library and takes else []
    example = f"{recipes[0] if recipes else f'steer {group}={name}'} --dry-run"
    tail = [*further, "", f"rgdiff run {example}   # the plan, in numbers; nothing is written"]
    for short in (False, True):
        rows = [line for setting, text in options for line in _option(setting, text, short=short)]
        lines = [*head, "", *(["options, with defaults", *rows] if rows else ["It has no options."]), *tail]
        if len(lines) < HEIGHT:
            break
    return "\n".join(lines)


def _recipe(name: str) -> str:
    """The page of a recipe: its head, its parts, and the keys that all recipes have."""
    head = [line[2:] for line in _head(recipe.config_dir() / f"{name}.yaml")]
    lines = [f"{name}: {head[0]}", *head[1:], "", "parts, each another with KEY=CHOICE (`rgdiff explain CHOICE`)"]
    parts = chosen(name)
    width = max(map(len, parts)) + 1
    for key, choice in parts.items():
        group = key.split("@")[0]
        summary = brief(recipe.summary_of(choice, group), WIDTH - width - 18)
        lines.append(f"  {key + '=':<{width}}{choice:<15} {summary}")
    files = [(recipe.config_dir() / f"{one}.yaml", "") for one in ("_run", name)]
    top = {key: (value, comment) for key, value, comment in settings(files) if value and "." not in key}
    lines += ["", "options, with defaults"]
    lines += [line for key in top if key != "defaults" for line in _option(f"{key}={top[key][0]}", top[key][1])]
    return "\n".join([*lines, "", f"rgdiff show {name}   # all keys, with comments"])


def _library(values: dict[str, str], comments: dict[str, str], group: str) -> tuple[Constructor | None, bool]:
    """The constructor that a choice stands for, and whether its arguments are the choice's options.

    A choice names a constructor. Where that is a class of `rgdiff.recipes.methods` it stands for one of the library: by its
    setting or guide, or for the one that the comment of its options or its docstring names.
    """
    maker = read(values.get(f"{group}._target_", ""))
    if group != "method" or maker is None:
        return maker, group != "domain"
    if setting := values.get("method.setting") or values.get("method.guide"):
        return next(filter(None, (read(f"rgdiff.{module}.{setting}") for module in ENGINES)), None), True
    of_options = f"{comments.get('method.options', '')} {maker.entries.get('options', '')}"
    for text, takes in ((of_options, True), (" ".join([*comments.values(), maker.about]), False)):
        for library in filter(None, (read(f"rgdiff.{found}") for found in NAMED.findall(text))):
            return library, takes
    return maker, False


def _paragraphs(about: str, most: int = 16) -> list[str]:
    """A docstring's description, its paragraphs filled, equations as they stand; cut after `most` lines."""
    lines: list[str] = []
    for block in filter(str.strip, re.split(r"\n\s*\n", about)):
        equation = block.startswith("    ") or max(map(len, block.splitlines())) < WIDTH - 40
        lines += block.splitlines() if equation else _wrapped(" ".join(block.split()))
    return [line.rstrip() for line in (lines if len(lines) <= most else [*lines[: most - 1], "…"])]


def _idea(library: Constructor | None) -> str:
    """What the table of the methods says of a function of the library."""
    if library is None:
        return ""
    name = library.path.rpartition(".")[2]
    for _, (_, idea), (_, here) in _rows("methods"):
        if re.search(rf"`(?:\w+\.)*{name}`", here):
            return idea
    return ""


def _measured(name: str, summary: str) -> Iterator[str]:
    """The rows of what has been measured that name a method, and the sentences."""
    label = summary.partition(":")[0] if ":" in summary else name
    wanted = {re.escape(one) for one in (name, name.replace("_", "-"), label) if len(one) < 30}
    pattern = re.compile(rf"(?<![\w-])(?:{'|'.join(wanted)})(?![\w-])", re.IGNORECASE)
    for row in _rows("measured"):
        (_, work), *cells = row
        if pattern.search(work):
            yield ", ".join([work, *(f"{title} {cell}" for title, cell in cells)])
    prose = " ".join(line for line in _lines("measured") if not line.startswith(("|", "#")))
    for sentence in re.split(r"(?<=[.;]) ", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", prose)):
        if pattern.search(sentence):
            yield sentence.rstrip(".;:")


def _lines(doc: str) -> list[str]:
    return (DOCS / f"{doc}.md").read_text(encoding="utf-8").splitlines()


def _rows(doc: str) -> Iterator[list[tuple[str, str]]]:
    """The rows of the tables of a page: pairs of a column's title and a cell."""
    titles: list[str] = []
    for line in _lines(doc):
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if titles and cells and not line.startswith("|-"):
            yield list(zip(titles, cells, strict=False))
        titles = titles or cells if cells else []


def _fits(values: dict[str, str], group: str) -> str:
    """The domains that a reward is for: those of its own package."""
    if group == "domain":
        return "its files, in data_dir=DIR or RGDIFF_DATA" if values.get("domain.data_dir") else ""
    package = re.match(r"rgdiff\.domains\.\w+\.", values.get(f"{group}._target_", ""))
    if not package:
        return ""
    folder = recipe.config_dir() / "domain"
    fitting = [name for name in recipe.names("domain") if package[0] in (folder / f"{name}.yaml").read_text("utf-8")]
    return " or ".join(f"domain={name}" for name in fitting)


def _papers(summary: str, library: Constructor | None) -> list[str]:
    return list(dict.fromkeys(ARXIV.findall(summary) or ARXIV.findall(library.about if library else "")))


def _users(name: str, group: str, of: str | None = None) -> list[str]:
    """Recipes, or choices of a group, that name a choice in their defaults."""
    uses = lambda other: any(key.split("@")[0] == group and one == name for key, one in chosen(other, of).items())  # noqa: E731
    return [other for other in recipe.names(of) if uses(other)]


def _options(
    values: dict[str, str], comments: dict[str, str], group: str, library: Constructor | None
) -> Iterator[tuple[str, str]]:
    """Every key with its default, and its comment or else its entry in the constructor's docstring."""
    for key, value in values.items():
        parent, _, last = key.rpartition(".")
        settled = key in (f"{group}._target_", f"{group}.setting", f"{group}.guide", f"{group}.defaults")
        if not key.startswith(f"{group}.") or value == "" or settled or (value == "{}" and _inside(key, values)):
            continue
        maker = library if parent.endswith(".options") else read(values.get(f"{parent}._target_", ""))
        entry = maker.entries.get(last, "") if maker else ""
        yield f"{key}={value}", comments[key] or re.split(r"(?<=[^.])\. ", entry)[0].rstrip(".")


def _inside(key: str, values: dict[str, str]) -> bool:
    return any(other.startswith(f"{key}.") for other in values)


def _shared(files: list[tuple[Path, str]], name: str, group: str) -> Iterator[tuple[str, str]]:
    """Every part whose keys are those of another page: the value, the surrogate, what is tuned."""
    for key, choice in chosen(name, group).items():
        other, _, package = key.partition("@")
        yield f"{other}@{group}.{package}={choice}", recipe.summary_of(choice, other)
    for path, package in files:
        if package not in ("", group) and path.parent.name == group:
            keys = [key.removeprefix(f"{package}.") for key, value, _ in settings([(path, package)]) if value]
            yield f"{package}.KEY=…", ", ".join(key for key in keys if "." not in key and key != "_target_")


def _option(setting: str, text: str, *, short: bool = True) -> list[str]:
    """An option and what it is: on one line, or on as many as the text takes."""
    column = max(len(setting) + 2, 36)
    if short:
        return [f"  {setting:<{column}}{brief(text, WIDTH - column - 2)}".rstrip()]
    return _wrapped(f"  {setting:<{column}}{text}", rest=" " * (column + 2))


def _further(library: Constructor, values: dict[str, str], place: str) -> list[str]:
    """Arguments of the library's constructor that the config leaves at their defaults."""
    known = {key.rpartition(".")[2] for key in values}
    more = ", ".join(f"{key}={text}" for key, text in library.defaults.items() if key in library.plain - known)
    head = ["", f"further, as +{place}.NAME=, of {library.path} (python -m pydoc has more)"]
    return [*head, *_wrapped(f"  {more}", rest="  ")] if more else []


def _wrapped(text: str, rest: str = "") -> list[str]:
    """A text in lines, the second and those after it indented."""
    return textwrap.wrap(text, WIDTH, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False)
