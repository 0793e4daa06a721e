"""Say what fell between two files of results: `python -m benchmarks.compare OLD NEW`.

OLD and NEW are tables as benchmarks/results holds them, or folders of such files, of which those with the same name are compared.
Rows are the same when their words are (case, side); what is compared is every column with `ratio` in its head, where more is
better for rgdiff. Exits with 1 where a ratio fell by more than the tolerance, and with 2 where nothing could be compared.

    git show main:benchmarks/results/pretrained-speed.md > /tmp/old.md
    python -m benchmarks.compare /tmp/old.md benchmarks/results/pretrained-speed.md --tolerance .1
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

NUMBER = re.compile(r"[-+]?\d*\.?\d+(e[-+]?\d+)?")


class Change(NamedTuple):
    """A ratio of a row in two files; `what` is the row's words and the column."""

    what: str
    old: float
    new: float

    def fell(self, tolerance: float) -> bool:
        return self.new < (1 - tolerance) * self.old


def tables(text: str) -> Iterator[list[list[str]]]:
    """Yield the tables of a Markdown text: rows of cells, the head first, without the line of dashes."""
    rows: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif rows:
            yield [row for row in rows if not all(set(cell) <= set("-: ") and cell for cell in row)]
            rows = []


def ratios(text: str) -> dict[str, float]:
    """Return {words of the row, column: the number its cell begins with} of every column of ratios.

    A row's words are its first cells, up to the first column that is a measurement in the head's table.
    """
    found: dict[str, float] = {}
    for head, *rows in tables(text):
        columns = [i for i, title in enumerate(head) if "ratio" in title.lower()]
        words = next((i for i in range(len(head)) if rows and all(NUMBER.match(row[i]) for row in rows)), len(head))
        for row in rows:
            for i in columns:
                if len(row) == len(head) and (number := NUMBER.match(row[i])):
                    found[" | ".join([*row[:words], head[i]])] = float(number[0])
    return found


def changes(old: str, new: str) -> list[Change]:
    """Return the ratios that two texts have in common, what fell most first."""
    before, after = ratios(old), ratios(new)
    both = [Change(what, before[what], after[what]) for what in before if what in after]
    return sorted(both, key=lambda change: change.new / change.old if change.old else 1.0)


def pairs(old: Path, new: Path) -> list[tuple[Path, Path]]:
    """Return the files to compare: the two given, or those of one name in two folders."""
    if old.is_dir() != new.is_dir():
        raise SystemExit(f"compare takes two files or two folders; got {old} and {new}")
    if not old.is_dir():
        return [(old, new)]
    return [(path, new / path.name) for path in sorted(old.glob("*.md")) if (new / path.name).is_file()]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.05, help="how far a ratio may fall (default .05)")
    given = parser.parse_args(arguments)
    count = fallen = 0
    for old, new in pairs(given.old, given.new):
        for change in changes(old.read_text(encoding="utf-8"), new.read_text(encoding="utf-8")):
            count, fell = count + 1, change.fell(given.tolerance)
            fallen += fell
            mark = "fell" if fell else "rose" if change.new > (1 + given.tolerance) * change.old else "same"
            print(f"{mark}  {change.old:g} -> {change.new:g}  {new.name}: {change.what}")
    print(f"{fallen} of {count} common ratios fell by more than {given.tolerance:.0%}")
    return 2 if not count else int(fallen > 0)


if __name__ == "__main__":
    sys.exit(main())
