"""The page: its parts in order, the tables of all numbers, and the file."""

from __future__ import annotations

import importlib.resources
import json
import os
from collections.abc import Mapping
from typing import Any

from rgdiff.domains.drawing import Logo
from rgdiff.runtime import tables
from rgdiff.runtime.folder import write_atomic
from rgdiff.runtime.report import figures, pictures
from rgdiff.runtime.report.contents import Report, Whole
from rgdiff.runtime.report.words import escaped, folded, named, round_up

_COMMAND = 160  # characters of the command at the head of the page


def write_report(path: str | os.PathLike[str], report: Report) -> None:
    """Write the report as one HTML file; `config` is text (YAML) or a dict.

    Raises:
      ValueError: if a picture batch is not uint8 [N, H, W, C] with C in (1, 3, 4), or lengths or shapes do not match.
    """
    write_atomic(path, render(report).encode())


def render(report: Report) -> str:
    """Return the report as HTML text."""
    letters: set[str] = set()
    sections: dict[str, tuple[str, str]] = {}  # id -> (heading, body)
    panels = [panel for card in report.cards for one in (*card.sets, *card.more) for panel in one]
    logos = [panel.drawing for panel in panels if isinstance(panel, Whole) and isinstance(panel.drawing, Logo)]
    top = round_up(max((float(pictures.information(logo).max()) for logo in logos), default=0.0))
    if report.cards:
        planes = all(
            any(isinstance(p, Whole) and not isinstance(p.drawing, Logo) for p in one)
            for c in report.cards
            for one in c.sets
        )
        body = "".join(pictures.card(card, top, letters) for card in report.cards)
        body = f"<div class=pairs>{body}</div>" if planes else body
        sections["samples"] = "Samples", pictures.compared(report.compared) + body if report.compared else body
    if report.plots and not report.cards:  # the page opens with what there is to see
        sections["figures"] = "Figures", figures.drawn(report.plots, 0)
    if report.words:
        items = "".join(f"<li>{named(name, text)}</li>" for name, text in report.words)
        sections["words"] = "In words", f"<ul class=words>{items}</ul>"
    if report.links:
        items = "".join(f'<li><a href="{escaped(to)}">{escaped(name)}</a></li>' for name, to in report.links.items())
        sections["runs"] = "Runs", f"<ul class=words>{items}</ul>"
    if report.plots and report.cards:
        sections["figures"] = "Figures", figures.drawn(report.plots, 0)
    said = f" · <code>{escaped(tables.shorten(report.command, _COMMAND))}</code>" if report.command else ""
    parts = [f"<header><h1>{escaped(report.title)}</h1><p class=quiet>{escaped(report.date)}{said}</p>"]
    parts += [f"<p class=warning>{escaped(warning)}</p>" for warning in report.warnings]
    if len(sections) > 1:
        parts.append(f"<nav>{' '.join(f'<a href=#{key}>{head}</a>' for key, (head, _) in sections.items())}</nav>")
    parts.append("</header>")
    parts += [f"<section id={key}><h2>{head}</h2>{body}</section>" for key, (head, body) in sections.items()]
    if report.more:
        parts.append(folded("More figures", figures.drawn(report.more, len(report.plots))))
    if report.table:
        parts.append(folded("All numbers", _table(report.table)))
    if report.notes:
        parts.append(folded("Notes", "".join(f"<p>{escaped(note)}</p>" for note in report.notes), "notes"))
    if report.config is not None or report.command:
        config = report.config if isinstance(report.config, str) else json.dumps(report.config, indent=2, default=str)
        said = f"<pre class=command>{escaped(report.command)}</pre>" if report.command else ""
        said += f"<pre>{escaped(config)}</pre>" if report.config is not None else ""
        parts.append(folded("Command and resolved config", said))
    if versions := [f"{name} {value}" for name, value in report.versions.items() if value is not None]:
        parts.append(folded("Versions", f"<p class=quiet>{escaped(' · '.join(versions))}</p>"))
    style = importlib.resources.files("rgdiff.runtime.report").joinpath("style.css").read_text(encoding="utf-8")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(report.title)}</title><style>{style}</style>"
    )
    outlines = "".join(
        f'<path id="{pictures.letter_id(letter)}" d="{pictures.glyph(letter)}"/>' for letter in sorted(letters)
    )
    defined = f'<svg width="0" height="0" class=defs><defs>{outlines}</defs></svg>' if outlines else ""
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{defined}<main>\n'
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def _table(table: Mapping[str, Mapping[str, Any]]) -> str:
    """A table for every kind of figure, methods down; what a column means stands under its table, and on its heading."""
    out = ""
    for heading, names in tables.grouped(table).items():
        columns = [tables.column(name) for name in names]
        head = ""
        for column in columns:
            unit = f"<i>{escaped(column.unit)}</i>" if column.unit else ""
            head += f'<th title="{escaped(column.meaning or column.label)}">{escaped(column.label)}{unit}</th>'
        body = ""
        for method, row in table.items():
            cells = ""
            for name in names:
                value = row.get(name)
                side = " class=word" if isinstance(value, str) else ""
                cells += f"<td{side}>{escaped(_said(name, value))}</td>"
            body += f"<tr><th>{escaped(method)}</th>{cells}</tr>"
        meanings = "".join(
            f"<dt>{escaped(c.label)}</dt><dd>{escaped(c.meaning)}</dd>"
            for c in columns
            if c.meaning and c.meaning != c.label
        )
        out += (
            f"<h3>{escaped(heading)}</h3><div class=scroll><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
            + (f"<dl>{meanings}</dl>" if meanings else "")
        )
    return out


def _said(name: str, value: Any) -> str:
    return f"over-optimised: {value}" if name == "over_optimised" and value else tables.number(value)
