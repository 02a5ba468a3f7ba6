"""Pictures of tuning: what every run came to, in order and over each hyperparameter."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from fairtrial.contract import Metric, Outcome
from fairtrial.report.axes import Axis, better_on_log, padded, reach, tick_text
from fairtrial.report.charts import tone
from fairtrial.report.frames import LEFT, PANEL, RIGHT, bottom_ticks, frame, left_ticks
from fairtrial.report.svg import element, line, path, picture, shortened, text
from fairtrial.report.wording import decimals, number, short
from fairtrial.trial.comparison import Judged
from fairtrial.trial.tuning import Tuned

SHOWN = 40  # tunings of a recipe that are drawn at most
TOP, BOTTOM = 16, 158


def value_axis(tunings: Sequence[Tuned], metric: Metric) -> Axis:
    """Holds the better half of the runs, and what does not lie far from it."""
    values = [outcome.value for tuned in tunings for _, outcome in tuned.history if not outcome.failed]
    ranked = sorted(values, key=lambda value: -metric.sign * value) or [metric.worst]
    better = ranked[: max(2, math.ceil(len(ranked) / 2))]
    return Axis(*padded(*reach(better, ranked, 3.0), 0.1), BOTTOM, TOP)


def tuning_history(judged: Judged, tunings: Sequence[Tuned], up: Axis, metric: Metric) -> Markup:
    """The value of every run of every tuning, and the best so far."""
    longest = max(len(tuned.history) for tuned in tunings)
    across = Axis(0.5, longest + 0.5, LEFT, RIGHT)
    marks = []
    for turn, tuned in enumerate(tunings):
        aside = 0.7 * ((turn + 0.5) / len(tunings) - 0.5)  # tunings stand side by side
        chosen = _chosen(tuned, metric)
        for place, (_, outcome) in enumerate(tuned.history, start=1):
            words = f"run {place}" + (f" of tuning {turn + 1}" if len(tunings) > 1 else "")
            x = across(place + aside)
            marks.append(_mark(outcome, x, up, metric, outcome is chosen, words, len(tunings) > 1))
    title = f"Tuning of {judged.name}: {metric.name} on validation data"
    pieces = [*frame(across, up, "tuning run", 8, whole=True), *_best_so_far(tunings, across, up, metric), *marks]
    return picture(PANEL, 202, title, _endings(tunings), *pieces, class_=tone(judged))


def _best_so_far(tunings: Sequence[Tuned], across: Axis, up: Axis, metric: Metric) -> Iterator[Markup]:
    """A line; with several tunings their median, and a band around the middle half of them."""
    longest = max(len(tuned.history) for tuned in tunings)
    best = np.full((len(tunings), longest), math.nan)
    for row, tuned in zip(best, tunings, strict=True):
        for place, (_, outcome) in enumerate(tuned.history):
            if outcome.ended == "finished":
                kept = [value for value in (row[place], outcome.value) if not math.isnan(value)]
                row[place:] = max(kept, key=lambda value: metric.sign * value)
    known = ~np.isnan(best).all(axis=0)
    if not known.any():
        return
    low, middle, high = np.nanquantile(best[:, known], [0.25, 0.5, 0.75], axis=0)
    places = np.flatnonzero(known) + 1

    def steps(values: Any) -> list[tuple[float, float]]:
        return [(across(at + side), up(float(v))) for at, v in zip(places, values, strict=True) for side in (-0.5, 0.5)]

    if len(tunings) > 1:
        yield path(steps(low) + steps(high)[::-1], "band", closed=True)
    yield path(steps(middle), "best")


def sensitivity(judged: Judged, tunings: Sequence[Tuned], name: str, up: Axis, metric: Metric) -> Markup:
    """The value of every tuning run over one of its hyperparameters."""
    tried = [
        (params[name], outcome, outcome is _chosen(tuned, metric))
        for tuned in tunings
        for params, outcome in tuned.history
        if name in params
    ]
    tried.sort(key=lambda found: found[2])  # the chosen on top
    across, at, ticks = _hyperparameter_axis([value for value, _, _ in tried])
    marks = [
        _mark(outcome, at(value), up, metric, chosen, f"{name} = {short(value)}", len(tunings) > 1)
        for value, outcome, chosen in tried
    ]
    scale = " (logarithmic)" if across.log else ""
    label = text((LEFT + RIGHT) / 2, BOTTOM + 38, f"{shortened(name, 40)}{scale}", "label", "middle")
    title = f"{judged.name}: {metric.name} on validation data over {name}"
    pieces = [*left_ticks(up, LEFT, RIGHT), *ticks, label, *marks]
    return picture(PANEL, 202, title, _endings(tunings), *pieces, class_=tone(judged))


def _hyperparameter_axis(values: Sequence[Any]) -> tuple[Axis, Callable[[Any], float], list[Markup]]:
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) == len(values) and all(math.isfinite(value) for value in numbers):
        log = better_on_log(numbers)
        axis = Axis(*padded(min(numbers), max(numbers), 0.06, log), LEFT, RIGHT, log)
        whole = all(isinstance(value, int) for value in numbers)
        return axis, axis, list(bottom_ticks(axis, TOP, BOTTOM, 5, tick_text, whole=whole))
    kinds = sorted({short(value) for value in values})
    axis = Axis(-0.5, len(kinds) - 0.5, LEFT, RIGHT)
    room = 44 // len(kinds) + 1
    named = [text(axis(n), BOTTOM + 16, shortened(kind, room), "tick", "middle") for n, kind in enumerate(kinds)]
    return axis, lambda value: axis(kinds.index(short(value))), [line(LEFT, BOTTOM, RIGHT, BOTTOM, "axis"), *named]


def _chosen(tuned: Tuned, metric: Metric) -> Outcome | None:
    """The run whose configuration was taken; of equals the first."""
    finished = [outcome for _, outcome in tuned.history if outcome.ended == "finished"]
    return max(finished, key=lambda outcome: metric.sign * outcome.value) if finished else None


def _mark(outcome: Outcome, x: float, up: Axis, metric: Metric, chosen: bool, label: str, many: bool) -> Markup:
    """A run: a dot that finished, an open triangle that was pruned, a cross that failed; ringed if it was chosen."""
    words = f"{label}: {metric.name} {number(outcome.value, decimals(metric))}, {outcome.ended}"
    r = 2.6 if many else 4.0
    if outcome.failed:
        y = up.start - r - 1 if metric.sign > 0 else up.end + r + 1
        shape = element("path", d=f"M{x - r:.1f},{y - r:.1f} l{2 * r:g},{2 * r:g} m0,{-2 * r:g} l{-2 * r:g},{2 * r:g}")
        kind = "cross"
    elif outwards := up.beyond(outcome.value):
        y = up(outcome.value)
        tip, base = y - 2 * outwards, y + 1.6 * r * outwards  # pixels count downwards
        shape = path([(x, tip), (x - r, base), (x + r, base)], "", closed=True)
        kind = "open" if outcome.ended == "pruned" else "finished"
    else:
        y = up(outcome.value)
        if outcome.ended == "pruned":
            shape = path([(x, y + 1.2 * r), (x - 1.2 * r, y - r), (x + 1.2 * r, y - r)], "", closed=True)
            kind = "open"
        else:
            shape, kind = element("circle", cx=x, cy=y, r=r), "finished"
    ring = element("circle", cx=x, cy=y, r=2 * r, class_="chosen") if chosen else Markup("")
    inside = [element("title", words + (", chosen" if chosen else "")), ring, shape]
    return element("g", *inside, class_=f"run {kind} fine" if many else f"run {kind}")


def _endings(tunings: Sequence[Tuned]) -> str:
    endings = Counter(outcome.ended for tuned in tunings for _, outcome in tuned.history)
    return ", ".join(f"{times} {ended}" for ended, times in endings.items())
