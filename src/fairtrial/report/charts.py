"""A comparison's pictures, as SVG that takes its colours from the page.

A recipe has its number in a disc and its verdict's colour wherever it is drawn; the baseline is grey and dashed. What
lies beyond an axis is drawn at its end, as an arrow.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from fairtrial.contract import Metric, Outcome
from fairtrial.report.axes import Axis, padded, reach, tick_text
from fairtrial.report.frames import LEFT, PANEL, RIGHT, bottom_ticks, frame
from fairtrial.report.svg import badge, element, line, path, picture, shortened, text
from fairtrial.report.wording import decimals, interval, number, p_value, signed
from fairtrial.trial.comparison import Comparison, Judged

SIGNS = {"better": "▲", "worse": "▼", "equivalent": "≈", "undecided": "?"}


def tone(judged: Judged) -> str:
    """The CSS class of a recipe's colour."""
    return judged.verdict or "baseline"


def paired(judged: Judged, baseline: Judged) -> list[float]:
    return [a - b for a, b in zip(judged.values, baseline.values, strict=False)]


# Paired differences ------------------------------------------------------------------------------------------------


def intervals(comparison: Comparison, wide: bool) -> Markup:
    """Mean paired differences with their intervals, the differences themselves, and the band that does not matter."""
    metric, (baseline, *others) = comparison.metric, comparison.recipes
    width, left, right, row, top = (860, 200, 670, 58, 34) if wide else (PANEL, 8, PANEL - 8, 78, 34)
    axis = _difference_axis(comparison, left, right)
    bottom = top + row * len(others)
    band = (axis(-metric.margin), axis(metric.margin))
    pieces = [
        element("rect", x=band[0], y=top - 6, width=band[1] - band[0], height=bottom - top + 6, class_="margin"),
        line(band[0], top - 6, band[0], bottom, "margin-edge"),
        line(band[1], top - 6, band[1], bottom, "margin-edge"),
        *bottom_ticks(axis, top - 6, bottom, 7 if wide else 5, lambda v: ("+" if v > 0 else "") + tick_text(v)),
        line(axis(0.0), top - 6, axis(0.0), bottom, "zero"),
        _band_label(band, left, right, top - 16, metric),
        *_directions(metric, left, right, top - 16),
        text((left + right) / 2, bottom + 34, f"difference in {metric.name} ({metric.unit})", "label", "middle"),
    ]
    for place, judged in enumerate(others, start=1):
        start = top + row * (place - 1)
        pieces.append(_interval_row(judged, baseline, place, metric, axis, start, wide))
    title = f"Mean paired differences in {metric.name} to {baseline.name}, with 95 % intervals"
    told = "; ".join(_difference_in_words(judged, metric) for judged in others)
    return picture(width, bottom + 42, title, told, *pieces, class_="wide-only" if wide else "narrow-only")


def _difference_axis(comparison: Comparison, left: float, right: float) -> Axis:
    baseline, *others = comparison.recipes
    found = [judged.difference for judged in others if judged.difference]
    core = [0.0, comparison.metric.margin, -comparison.metric.margin]
    core += [value for d in found for value in (d.mean, d.low, d.high) if math.isfinite(value)]
    low, high = reach(core, (value for judged in others for value in paired(judged, baseline)), 0.5)
    return Axis(*padded(low, high, 0.04), left, right)


def _band_label(band: tuple[float, float], left: float, right: float, y: float, metric: Metric) -> Markup:
    """What the band is, where there is room between the ends' hints."""
    middle = (band[0] + band[1]) / 2
    if middle - 85 < left + 50 or middle + 85 > right - 50:
        return Markup("")
    return text(middle, y, f"±{metric.margin:g}: too small to matter", "hint", "middle")


def _directions(metric: Metric, left: float, right: float, y: float) -> Iterator[Markup]:
    less, more = ("worse", "better") if metric.sign > 0 else ("better", "worse")
    yield text(left, y, f"← {less}", "hint")
    yield text(right, y, f"{more} →", "hint", "end")


def _interval_row(
    judged: Judged, baseline: Judged, place: int, metric: Metric, axis: Axis, start: float, wide: bool
) -> Markup:
    difference, digits = judged.difference, decimals(metric)
    assert difference is not None
    middle = start + (20 if wide else 38)
    figures = f"{signed(difference.mean, digits)} {interval(difference, digits)}".replace("-", "−")
    if wide:
        words = [
            badge(12, middle, place, ""),
            *(
                text(30, middle + 4 + 17 * n, shortened(part, 20), "name")
                for n, part in enumerate(_two_lines(judged.name, 20))
            ),
            text(690, middle - 3, f"{SIGNS[judged.verdict or 'undecided']} {judged.verdict}", "verdict"),
            text(690, middle + 14, figures, "figures"),
        ]
    else:
        words = [
            badge(10, start + 12, place, ""),
            text(26, start + 16, shortened(judged.name, 24), "name"),
            text(PANEL - 6, start + 16, f"{SIGNS[judged.verdict or 'undecided']} {judged.verdict}", "verdict", "end"),
        ]
    pieces = [
        line(0, start - 3, 860 if wide else PANEL, start - 3, "rule") if place > 1 else Markup(""),
        element("title", _difference_in_words(judged, metric)),
        *words,
        *_strip(paired(judged, baseline), axis, middle + 13),
        *_bar(difference.low, difference.high, axis, middle),
        path(_diamond(axis(difference.mean), middle, 6.5), "mean", closed=True),
    ]
    return element("g", *pieces, class_=f"row {tone(judged)}")


def _two_lines(name: str, most: int) -> list[str]:
    """A long name broken at a blank near its middle; what is still too long is for the caller to shorten."""
    if len(name) <= most or " " not in name:
        return [name]
    blanks = [place for place, character in enumerate(name) if character == " "]
    middle = min(blanks, key=lambda place: abs(place - len(name) / 2))
    return [name[:middle], name[middle + 1 :]]


def _bar(low: float, high: float, axis: Axis, y: float) -> Iterator[Markup]:
    """The interval; an end that is nowhere is an arrow, and the bar dashed."""
    bounded = math.isfinite(low) and math.isfinite(high)
    yield line(axis(low), y, axis(high), y, "interval" if bounded else "interval unbounded")
    for end in (low, high):
        if math.isfinite(end):
            yield line(axis(end), y - 5, axis(end), y + 5, "interval")
        else:
            outwards = 1 if end > 0 else -1
            tip = axis(end)
            points = [(tip, y), (tip - 8 * outwards, y - 5), (tip - 8 * outwards, y + 5)]
            yield path(points, "tip", closed=True)


def _strip(values: Sequence[float], axis: Axis, y: float) -> Iterator[Markup]:
    """One dot for each value; equal ones stand below each other, the closer the more there are."""
    columns: dict[int, list[float]] = {}
    for value in sorted(values):
        columns.setdefault(round(axis(value) / 4), []).append(value)
    for column in columns.values():
        step = min(4.0, 14 / len(column))
        for level, value in enumerate(column):
            x, down = axis(value), y + step * level
            if outwards := axis.beyond(value):
                points = [(x, down), (x - 5 * outwards, down - 3), (x - 5 * outwards, down + 3)]
                yield path(points, "dot", closed=True)
            else:
                yield element("circle", cx=x, cy=down, r=2.2, class_="dot")


def _diamond(x: float, y: float, r: float) -> list[tuple[float, float]]:
    return [(x, y - r), (x + r, y), (x, y + r), (x - r, y)]


def _difference_in_words(judged: Judged, metric: Metric) -> str:
    difference, digits = judged.difference, decimals(metric)
    assert difference is not None
    bounds = interval(difference, digits) or "no bounded interval"
    return (
        f"{judged.name}: {signed(difference.mean, digits)} {bounds}, p {p_value(difference.p_holm)}, {judged.verdict}"
    )


# Learning curves ---------------------------------------------------------------------------------------------------

Band = tuple[NDArray[np.float64], NDArray[np.float64]]  # steps; quartiles × steps


def band(outcomes: Sequence[Outcome], worst: float) -> Band | None:
    """Quartiles over the runs at every step that one of them reported.

    A run that failed counts with the worst value from where it broke off, as it does in the end.
    """
    steps = np.array(sorted({step for outcome in outcomes for step, _ in outcome.curve}), dtype=np.float64)
    if not steps.size:
        return None
    rows = [_along(outcome, steps, worst) for outcome in outcomes]
    known = np.array([row for row in rows if row is not None])
    told = ~np.isnan(known).all(axis=0)
    return steps[told], np.nanquantile(known[:, told], [0.25, 0.5, 0.75], axis=0)


def _along(outcome: Outcome, steps: NDArray[np.float64], worst: float) -> NDArray[np.float64] | None:
    after = worst if outcome.failed else math.nan
    curve = [(step, value) for step, value in outcome.curve if math.isfinite(value)]
    if not curve:
        return np.full(steps.size, worst) if outcome.failed else None
    at, values = zip(*curve, strict=True)
    found: NDArray[np.float64] = np.interp(steps, at, values, left=math.nan, right=after)
    return found


def curve_reach(bands: Sequence[Band], worst: float) -> tuple[float, float]:
    """Ends that hold the second half of training, and what does not lie far from it."""
    last = max(float(steps[-1]) for steps, _ in bands)
    late = [value for steps, rows in bands for value in rows[:, steps >= last / 2].ravel() if value != worst]
    early = [value for _, rows in bands for value in rows.ravel() if value != worst]
    return padded(*reach(late or early or [worst], early, 1.0))


def learning_curve(
    judged: Judged, baseline: Judged, own: Band | None, base: Band | None, reached: tuple[float, float], metric: Metric
) -> Markup:
    """The median run and the middle half of the runs, of a recipe and of the baseline."""
    known = [found for found in (own, base) if found]
    last = max(float(steps[-1]) for steps, _ in known)
    first = min(float(steps[0]) for steps, _ in known)
    across = Axis(*((first, last) if first < last else padded(first, last)), LEFT, RIGHT)
    up = Axis(*reached, 178, 12)
    inner = [
        drawn
        for found, class_ in ((base, "baseline"), (own, tone(judged)))
        if found
        for drawn in _band_lines(found, across, reached, class_)
    ]
    title = f"Learning curves of {judged.name} and {baseline.name}"
    told = "; ".join(
        f"{who.name} ends at a median of {number(float(found[1][1, -1]), decimals(metric))}"
        for who, found in ((judged, own), (baseline, base))
        if found
    )
    return picture(
        PANEL,
        222,
        title,
        told,
        *frame(across, up, "training step", 5),
        element(
            "svg",
            *inner,
            x=LEFT,
            y=12,
            width=RIGHT - LEFT,
            height=166,
            viewBox=f"{LEFT} 12 {RIGHT - LEFT} 166",
            overflow="hidden",
        ),
    )


def _band_lines(found: Band, across: Axis, reached: tuple[float, float], class_: str) -> Iterator[Markup]:
    steps, (low, middle, high) = found
    up = Axis(*reached, 178, 12)

    def points(values: NDArray[np.float64]) -> list[tuple[float, float]]:
        return [(across(float(step)), _beyond(up, float(value))) for step, value in zip(steps, values, strict=True)]

    yield path(points(low) + points(high)[::-1], f"band {class_}", closed=True)
    yield path(points(middle), f"curve {class_}")
    if steps.size == 1:
        yield element("circle", cx=across(float(steps[0])), cy=up(float(middle[0])), r=3.5, class_=f"point {class_}")


def _beyond(axis: Axis, value: float) -> float:
    """The pixel of a value on a linear axis, outside of it where the value is; cut off far out."""
    at = axis.start + (value - axis.low) / (axis.high - axis.low) * (axis.end - axis.start)
    return min(max(at, -9000.0), 9000.0)


# Quality against cost ----------------------------------------------------------------------------------------------


def quality_against_cost(comparison: Comparison, cost: str, label: str) -> Markup | None:
    """Mean differences with their intervals over a cost ratio; None if no recipe has that figure."""
    metric, others = comparison.metric, list(enumerate(comparison.recipes))[1:]
    shown = [(place, judged, getattr(judged.costs, cost)) for place, judged in others]
    shown = [(place, judged, ratio) for place, judged, ratio in shown if ratio and judged.difference]
    if not shown:
        return None
    ratios = [0.95, 1.05, *(ratio for _, _, ratio in shown)]  # what is the same should look the same
    log = max(ratios) / min(ratios) > 4
    across = Axis(*padded(min(ratios), max(ratios), 0.12, log), LEFT, RIGHT, log)
    base = _difference_axis(comparison, 0, 1)
    up = Axis(base.low, base.high, 214, 26)
    band = (up(metric.margin), up(-metric.margin))
    pieces = [
        element("rect", x=LEFT, y=band[0], width=RIGHT - LEFT, height=band[1] - band[0], class_="margin"),
        *frame(across, up, f"{label}, relative to the baseline", 5, signs=True, times=True),
        line(across(1.0), 26, across(1.0), 214, "zero"),
        line(LEFT, up(0.0), RIGHT, up(0.0), "zero"),
        text(LEFT, 16, f"{'↖' if metric.sign > 0 else '↙'} better and cheaper", "hint"),
    ]
    anchors = [(across(ratio), up(judged.difference.mean)) for _, judged, ratio in shown if judged.difference]
    keep_clear = [*anchors, (across(1.0), up(0.0))]
    bars = []
    points = []
    for (place, judged, ratio), (x, y), (bx, by) in zip(shown, anchors, _places(keep_clear, len(shown)), strict=True):
        assert judged.difference is not None
        words = f"{judged.name}: {ratio:.2f} × the baseline's {label}, {_difference_in_words(judged, metric)}"
        bars.append(line(x, up(judged.difference.low), x, up(judged.difference.high), f"interval thin {tone(judged)}"))
        drawn = [
            element("title", words),
            line(x, y, bx, by, "leader"),
            path(_diamond(x, y, 5), "mean", closed=True),
            badge(bx, by, place, ""),
        ]
        points.append(element("g", *drawn, class_=f"row {tone(judged)}"))
    pieces += bars
    pieces.append(element("circle", cx=across(1.0), cy=up(0.0), r=4.5, class_="point baseline"))
    title = f"Difference in {metric.name} against {label}, both relative to {comparison.recipes[0].name}"
    told = "; ".join(f"{judged.name}: {ratio:.2f} × the {label}" for _, judged, ratio in shown)
    return picture(PANEL, 258, title, told, *pieces, *points)


def _places(points: Sequence[tuple[float, float]], badges: int) -> list[tuple[float, float]]:
    """Where the first so many points' discs go: beside their point, clear of points and of each other."""
    taken: list[tuple[float, float]] = []
    for x, y in points[:badges]:
        best, room = (x + 16, y), -1.0
        for distance in (16, 24, 34):
            for turn in (0, 7, 1, 4, 3, 5, 2, 6):
                angle = turn * math.pi / 4
                at = (x + distance * math.cos(angle), y + distance * math.sin(angle))
                if not (LEFT + 10 <= at[0] <= RIGHT - 4 and 36 <= at[1] <= 204):
                    continue
                clear = min([math.dist(at, p) - 15 for p in points] + [math.dist(at, p) - 19 for p in taken])
                if clear > room:
                    best, room = at, clear
                if clear >= 0:
                    break
            if room >= 0:
                break
        taken.append(best)
    return taken
