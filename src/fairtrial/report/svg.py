"""SVG elements; whatever is put into one is escaped."""

import re

from markupsafe import Markup, escape

Attribute = str | int | float | None

# Control characters, those that turn the direction of writing around, and halves of characters.
_unfit = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Without the characters that a page must not hold."""
    return _unfit.sub("\ufffd", text)


def element(tag: str, *inside: str | Markup, **attributes: Attribute) -> Markup:
    """`element("text", "a < b", x=1.25, text_anchor="end")`; attributes that are None are left out."""
    written = "".join(
        f' {_name(name)}="{escape(_plain(value))}"' for name, value in attributes.items() if value is not None
    )
    content = "".join(piece if isinstance(piece, Markup) else escape(visible(piece)) for piece in inside)
    return Markup(f"<{tag}{written}>{content}</{tag}>")


def _name(name: str) -> str:
    return {"class_": "class", "viewBox": "viewBox"}.get(name, name.replace("_", "-"))


def _plain(value: str | int | float) -> str:
    if isinstance(value, float):
        return f"{round(value, 2) + 0.0:g}" if abs(value) < 1e4 else f"{value:.1f}"
    return visible(str(value))


def picture(width: int, height: float, title: str, description: str, *inside: Markup, class_: str = "") -> Markup:
    """A whole drawing with the name and description that screen readers give."""
    return element(
        "svg",
        element("title", title),
        element("desc", description),
        *inside,
        viewBox=f"0 0 {width} {height:.0f}",
        role="img",
        class_=class_ or None,
    )


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def text(x: float, y: float, content: str, class_: str = "", anchor: str = "start") -> Markup:
    return element("text", content, x=x, y=y, class_=class_ or None, text_anchor=None if anchor == "start" else anchor)


def path(points: list[tuple[float, float]], class_: str, closed: bool = False) -> Markup:
    steps = " ".join(f"{_plain(float(x))},{_plain(float(y))}" for x, y in points)
    return element("path", d=f"M{steps.replace(' ', ' L')}" + ("Z" if closed else ""), class_=class_)


def badge(x: float, y: float, number: int, class_: str) -> Markup:
    """A recipe's number in a disc: how it is found again from picture to picture."""
    return element(
        "g",
        element("circle", cx=x, cy=y, r=9, class_="disc"),
        text(x, y + 4, str(number), "number", "middle"),
        class_=f"badge {class_}",
    )


def shortened(content: str, most: int) -> str:
    return content if len(content) <= most else content[: most - 1] + "…"
