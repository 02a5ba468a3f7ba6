"""Axes as they are drawn: lines, ticks and labels."""

from collections.abc import Callable, Iterator

from markupsafe import Markup

from fairtrial.report.axes import Axis, tick_text
from fairtrial.report.svg import line, text

PANEL = 360  # width of a small picture, in its own units; a column of the page is about as wide in pixels
LEFT, RIGHT = 52, PANEL - 18  # where its frame begins and ends


def frame(
    across: Axis, up: Axis, label: str, most: int, *, signs: bool = False, times: bool = False, whole: bool = False
) -> Iterator[Markup]:
    yield from left_ticks(up, across.start, across.end, signs)

    def worded(value: float) -> str:
        return f"{tick_text(value)}×" if times else tick_text(value)

    yield line(across.start, up.start, across.end, up.start, "axis")
    for value in across.ticks(most, whole):
        yield text(across(value), up.start + 16, worded(value), "tick", "middle")
        yield line(across(value), up.start, across(value), up.start + 4, "axis")
    yield text((across.start + across.end) / 2, up.start + 36, label, "label", "middle")


def left_ticks(up: Axis, left: float, right: float, signs: bool = False) -> Iterator[Markup]:
    for value in up.ticks(5):
        yield line(left, up(value), right, up(value), "grid")
        sign = "+" if signs and value > 0 else ""
        yield text(left - 6, up(value) + 4, (sign + tick_text(value)).replace("-", "−"), "tick", "end")


def bottom_ticks(
    axis: Axis, top: float, bottom: float, most: int, worded: Callable[[float], str], *, whole: bool = False
) -> Iterator[Markup]:
    yield line(axis.start, bottom, axis.end, bottom, "axis")
    for value in axis.ticks(most, whole):
        yield line(axis(value), top, axis(value), bottom, "grid")
        yield text(axis(value), bottom + 16, worded(value).replace("-", "−"), "tick", "middle")
