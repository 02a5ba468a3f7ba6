"""Equations as MathML, which browsers draw by themselves: no script, no fonts to fetch."""

import html
import re

from latex2mathml.converter import convert

_equation = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def rendered(page: str) -> str:
    """A page whose equations, as `pymdownx.arithmatex` leaves them, are drawn."""
    return _equation.sub(_drawn, page)


def _drawn(found: re.Match[str]) -> str:
    tag, bracket, latex = found.groups()
    drawn = convert(html.unescape(latex), display="block" if bracket == "[" else "inline")
    return f'<{tag} class="equation">{drawn}</{tag}>'
