"""One page that explains a comparison: a single HTML file that needs no network and no script."""

import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from fairtrial.contract import Metric
from fairtrial.report import charts, tuning_charts
from fairtrial.report.origin import Origin
from fairtrial.report.runs import Carried, runs_of, tuned_once, tunings_of
from fairtrial.report.svg import visible
from fairtrial.report.wording import (
    aim,
    conclusion,
    decimals,
    interval,
    notes,
    number,
    p_value,
    ranges,
    ratio,
    reason,
    signed,
    size,
    title,
    tuned_to,
    untuned,
)
from fairtrial.trial.comparison import Comparison, Judged

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Row:
    """A recipe as the page words it."""

    place: int
    name: str
    tone: str
    mean: str
    change: str
    interval: str
    p: str
    said: str
    sign: str
    costs: dict[str, str]
    failed: str
    seeds: str
    choices: str


@dataclass(frozen=True)
class Failure:
    """Runs of a recipe that failed for the same reason."""

    recipe: Row
    runs: str
    ended: str
    reason: str
    traceback: str


def page(comparison: Comparison, origin: Origin) -> str:
    """The whole page; equal input gives equal text."""
    metric = comparison.metric
    rows = [_row(place, judged, metric) for place, judged in enumerate(comparison.recipes)]
    runs = list(runs_of(comparison))
    absolute = [_absolute_costs(judged) for judged in comparison.recipes]
    known = [judged.difference for judged in comparison.recipes if judged.difference]
    costs = [
        charts.quality_against_cost(comparison, "step_time_ratio", "step time"),
        charts.quality_against_cost(comparison, "peak_memory_ratio", "peak memory"),
    ]
    return _template().render(
        c=comparison,
        origin=origin,
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        title=title(comparison),
        conclusion=conclusion(comparison),
        notes=list(notes(comparison)),
        aim=aim(metric),
        margin=f"{metric.margin:g}",
        worst=f"{metric.worst:g}",
        failed=sum(run.outcome.failed for run in runs),
        pruned=any(run.outcome.ended == "pruned" for run in runs),
        total=len(runs),
        recipes=rows,
        cost_labels=[label for label in rows[0].costs if any(row.costs[label] for row in rows)],
        uneven=len({row.seeds for row in rows}) > 1,
        by_seed=_by_seed(comparison),
        unbounded=any(not interval(difference, 2) for difference in known),
        intervals_wide=charts.intervals(comparison, wide=True),
        intervals_narrow=charts.intervals(comparison, wide=False),
        curves=_curves(comparison, rows),
        costs=[drawn for drawn in costs if drawn],
        absolute_labels=[label for label in absolute[0] if any(row[label] for row in absolute)],
        cost_rows=list(zip(rows, absolute, strict=True)) if any(any(row.values()) for row in absolute) else [],
        once=tuned_once(comparison),
        shown_tunings=tuning_charts.SHOWN,
        tuning=[(row, *_tuning(comparison, row.place)) for row in rows],
        failures=list(_failures(runs, rows)),
        tuning_seeds=ranges(comparison.tuning_seeds),
        evaluation_seeds=ranges(comparison.evaluation_seeds),
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        finalize=_shown,
    )
    return environment.get_template("page.html.j2")


def _shown(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _row(place: int, judged: Judged, metric: Metric) -> Row:
    digits, difference, costs = decimals(metric), judged.difference, judged.costs
    choices = ", ".join(f"{slot}={choice}" for slot, choice in judged.recipe.choices.items())
    return Row(
        place=place,
        name=judged.name,
        tone=charts.tone(judged),
        mean=number(judged.mean, digits).replace("-", "−"),
        change=signed(difference.mean, digits).replace("-", "−") if difference else "",
        interval=interval(difference, digits).replace("-", "−") if difference else "",
        p=p_value(difference.p_holm) if difference else "",
        said=judged.verdict or "",
        sign=charts.SIGNS.get(judged.verdict or "", ""),
        costs={
            "step time": ratio(costs.step_time_ratio),
            "peak memory": ratio(costs.peak_memory_ratio),
            "optimizer state": size(costs.optimizer_state_bytes),
        },
        failed=f"{judged.failed} of {len(judged.outcomes)}" if judged.failed else "",
        seeds=str(len(judged.outcomes)),
        choices=choices,
    )


def _by_seed(comparison: Comparison) -> list[tuple[int, list[str]]]:
    digits = decimals(comparison.metric)

    def value(judged: Judged, place: int) -> str:
        if place >= len(judged.outcomes):
            return ""
        outcome = judged.outcomes[place]
        worded = number(outcome.value, digits).replace("-", "−")
        return f"{worded} ({outcome.ended})" if outcome.failed else worded

    seeds = enumerate(comparison.evaluation_seeds)
    return [(seed, [value(judged, place) for judged in comparison.recipes]) for place, seed in seeds]


def _curves(comparison: Comparison, rows: Sequence[Row]) -> list[tuple[Row, Markup]]:
    """A picture for every method; none if no run reported anything on the way."""
    worst = comparison.metric.worst
    if not any(outcome.curve for judged in comparison.recipes for outcome in judged.outcomes):
        return []
    bands = [charts.band(judged.outcomes, worst) for judged in comparison.recipes]
    reached = charts.curve_reach([found for found in bands if found], worst)
    baseline = comparison.recipes[0]
    return [
        (row, charts.learning_curve(judged, baseline, own, bands[0], reached, comparison.metric))
        for row, judged, own in zip(rows[1:], comparison.recipes[1:], bands[1:], strict=True)
        if own or bands[0]
    ]


def _absolute_costs(judged: Judged) -> dict[str, str]:
    costs = [outcome.costs for outcome in judged.outcomes if not outcome.failed]

    def middle(name: str) -> float | None:
        found = [getattr(cost, name) for cost in costs if getattr(cost, name) is not None]
        return statistics.median_low(found) if found else None

    seconds, memory, state = middle("step_time"), middle("peak_memory"), middle("optimizer_state_bytes")
    parameters, whole = (
        middle("trainable_parameters"),
        [o.seconds for o in judged.outcomes if o.seconds and not o.failed],
    )
    return {
        "step time": "" if seconds is None else f"{seconds * 1000:.3g} ms",
        "peak memory": "" if memory is None else size(int(memory)),
        "optimizer state": "" if state is None else size(int(state)),
        "trained weights": "" if parameters is None else f"{parameters:,}",
        "whole run": f"{statistics.median_low(whole):.3g} s" if whole else "",
    }


def _tuning(comparison: Comparison, place: int) -> tuple[list[str], list[Markup]]:
    """What tuning a recipe came to, in words and pictures."""
    judged, metric = comparison.recipes[place], comparison.metric
    tunings = tunings_of(comparison, judged)
    if not any(tuned.history for tuned in tunings):
        return ["There was nothing to tune."], []
    found, lost = tuned_to(tunings), untuned(tunings)
    told = ["Tuned to " + ", ".join(found) + ("." if len(tunings) == 1 else "; medians and ranges over the tunings.")]
    if lost:
        which = "this tuning" if len(tunings) == 1 else f"{len(lost)} of {len(tunings)} tunings"
        told = (told if found else []) + [f"No run of {which} came through: the methods’ defaults stood."]
    if len(tunings) > tuning_charts.SHOWN:
        told.append(f"Drawn are the first {tuning_charts.SHOWN} of {len(tunings)} tunings.")
    drawn = [tuned for tuned in tunings[: tuning_charts.SHOWN] if tuned.history]
    names = list(dict.fromkeys(name for tuned in drawn for params, _ in tuned.history for name in params))
    up = tuning_charts.value_axis(drawn, metric)
    pictures = [tuning_charts.sensitivity(judged, drawn, name, up, metric) for name in names]
    return told, [tuning_charts.tuning_history(judged, drawn, up, metric), *pictures]


def _failures(runs: Sequence[Carried], rows: Sequence[Row]) -> Iterator[Failure]:
    """Failures alike are told once: those of a recipe and phase whose reasons differ in nothing but figures."""
    alike: dict[tuple[int, str, str, str], list[Carried]] = {}
    for run in runs:
        if run.outcome.failed:
            kind = re.sub(r"\d[\d.e+-]*", "#", reason(run.outcome))
            alike.setdefault((run.place, run.phase, run.outcome.ended, kind), []).append(run)
    for (place, _, ended, _), found in alike.items():
        error = (found[0].outcome.error or "").strip()
        yield Failure(
            rows[place],
            _which(found),
            ended,
            reason(found[0].outcome),
            error if "\n" in error else "",
        )


def _which(runs: Sequence[Carried]) -> str:
    """'seeds 0–3', '9 tuning runs, for seeds 0–2'."""
    seeds = sorted({run.serves for run in runs if run.serves is not None})
    of_seeds = f"seed{'s' if len(seeds) > 1 else ''} {ranges(seeds)}"
    if runs[0].phase == "evaluation":
        return of_seeds
    if not seeds:
        return f"tuning run{'s' if len(runs) > 1 else ''} {ranges([run.number for run in runs])}"
    return f"{len(runs)} tuning run{'s' if len(runs) > 1 else ''}, for {of_seeds}"
