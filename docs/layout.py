"""Markdown: templates, tables, and text that it takes as it stands."""

import re
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def filled(template: str, **values: Any) -> str:
    """A template of `templates/` with values; all have `badge`, `counted` and the filter `plain`."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = plain
    environment.globals.update(badge=badge, counted=counted)
    return environment


def plain(text: str) -> str:
    """On one line, with nothing in it that Markdown would take for its own."""
    flat = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_{}\[\]|#$~])", r"\\\1", flat)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[str] = ()) -> str:
    """Cells are Markdown; the columns named in `right` stand to the right."""
    rules = ["---:" if head in right else "---" for head in heads]
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, rules, *rows])


def badge(word: str) -> str:
    """A standing or a status, told by word and colour."""
    return f'<span class="badge {word.replace(" ", "-")}">{word}</span>'


def counted(number: int, what: str) -> str:
    """'1 seed', '2 seeds'."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
