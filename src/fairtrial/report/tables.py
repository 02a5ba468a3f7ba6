"""Comparisons, papers, runs and evidence as tables for a terminal. Looking papers up must not wait for the bench."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fairtrial.catalog import Catalogue, Measurement, Paper
from fairtrial.contract import Slot, Task

if TYPE_CHECKING:
    from fairtrial.trial.comparison import Comparison, Judged
    from fairtrial.trial.store import Stored

COLOURS = {
    "better": "green",
    "worse": "red",
    "equivalent": "cyan",
    "undecided": "yellow",
    "reproduced": "green",
    "partly": "yellow",
    "not reproduced": "red",
    "not testable here": "bright_black",
    "not checked": "bright_black",
    "checked": "green",
    "available": "cyan",
    "listed": "bright_black",
}


def coloured(word: str) -> Text:
    return Text(word, style=COLOURS.get(word, ""))


def table(*columns: str, right: Iterable[str] = ()) -> Table:
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    aligned = set(right)
    for column in columns:
        made.add_column(column, justify="right" if column in aligned else "left", overflow="fold")
    return made


def verdict_table(comparison: "Comparison") -> RenderableType:
    """The table of a comparison, and under it what a reader must know to read it."""
    metric = comparison.metric
    digits = max(2, 1 - math.floor(math.log10(metric.margin)))
    head = f"{comparison.task}: {metric.name} ({metric.unit}, {_aim(metric.direction)})"
    made = table(
        "recipe",
        metric.name,
        "difference [95 % interval]",
        "p (Holm)",
        "verdict",
        "step time",
        "peak memory",
        "optimizer state",
        "failed",
        right=(metric.name, "p (Holm)", "step time", "peak memory", "optimizer state", "failed"),
    )
    for judged in comparison.recipes:
        made.add_row(*_verdict_row(judged, digits))
    return Group(Text(head, style="bold"), Text(), made, Text(), *_notes(comparison))


def _aim(direction: str) -> str:
    return "more is better" if direction == "maximize" else "less is better"


def _verdict_row(judged: "Judged", digits: int) -> list[RenderableType]:
    costs, difference = judged.costs, judged.difference
    if difference is None:
        change, p, said = Text("baseline"), "", Text()
    else:
        interval = f" [{difference.low:+.{digits}f}, {difference.high:+.{digits}f}]"
        change = Text(f"{difference.mean:+.{digits}f}" + (interval if math.isfinite(difference.low) else ""))
        p = "<0.001" if difference.p_holm < 0.001 else f"{difference.p_holm:.3f}"
        said = coloured(judged.verdict or "")
    return [
        Text(judged.name),
        f"{judged.mean:.{digits}f}",
        change,
        p,
        said,
        _ratio(costs.step_time_ratio),
        _ratio(costs.peak_memory_ratio),
        size(costs.optimizer_state_bytes),
        str(judged.failed) if judged.failed else "",
    ]


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} ×"


def size(count: int | None) -> str:
    """Bytes for people."""
    if count is None:
        return ""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, _ = value / 1000, units.pop(0)
    return f"{count} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def _notes(comparison: "Comparison") -> Iterator[Text]:
    seeds, margin = len(comparison.evaluation_seeds), comparison.metric.margin
    tuned = f"{comparison.trials} tuning runs on validation data"
    if len(comparison.tuning_seeds) < seeds:
        how = f"Each recipe was tuned once, by {tuned}, and run on {seeds} fresh seeds, on test data. Verdicts speak "
        how += "of the configurations that this tuning happened to find, not of the methods."
    else:
        how = f"{seeds} fresh seeds; for each of them a tuning of its own, by {tuned}, and a run of its best "
        how += "configuration on test data."
    yield Text(
        f"{how} Differences and costs are paired by seed with the baseline; a difference under {margin:g} "
        f"({comparison.metric.unit}) counts as equivalent.",
        style="dim",
    )
    if not comparison.decidable:
        needed = comparison.fewest_seeds
        yield Text(
            f"With {seeds} seeds no difference can be significant, however large: nothing is decided. "
            f"Use --seeds {needed} or more.",
            style="yellow",
        )
    if comparison.until_decided:
        stopped = comparison.until_decided
        yield Text(f"Stopped after {seeds} of {stopped.budget} seeds: {stopped.runs} runs, {stopped.saved} saved.")
    for judged in comparison.recipes:
        if judged.failed:
            first = next(outcome for outcome in judged.outcomes if outcome.failed)
            reason = (first.error or first.ended).strip().splitlines()[-1]
            yield Text(
                f"{judged.name}: {judged.failed} of {seeds} runs failed and count with the worst value, "
                f"{comparison.metric.worst:g} ({reason})",
                style="red",
            )
        if judged.verdict == "undecided" and comparison.decidable:
            more = judged.seeds_to_decide
            yield Text(
                f"{judged.name}: undecided; about {more} seeds would probably decide it."
                if more
                else f"{judged.name}: undecided, and more than 10,000 seeds would probably be needed to decide it.",
                style="yellow",
            )
    for judged in comparison.recipes:
        by_slot = judged.tuned.params.items()
        tuned_to = [f"{slot}.{key} = {_short(value)}" for slot, params in by_slot for key, value in params.items()]
        if tuned_to:
            yield Text(f"{judged.name} did best on validation data with " + ", ".join(tuned_to), style="dim")


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def paper_lines(catalogue: Catalogue, papers: Sequence[Paper]) -> Iterator[Text]:
    """A line for each paper; a table of all of them would take longer to lay out than to look up."""
    slugs = max(len(paper.slug) for paper in papers)
    families = max(len(paper.family) for paper in papers)
    for paper in papers:
        status = catalogue.status(paper.slug)
        yield Text.assemble(
            f"{paper.slug:{slugs}}  {paper.family:{families}}  {paper.date.year}  ",
            (f"{status:9}", COLOURS[status]),
            f"  {paper.title}",
        )


def task_table(tasks: Sequence[Task]) -> RenderableType:
    made = table("task", "metric", "margin", "slots", right=("margin",))
    for task in tasks:
        metric = task.metric
        described = f"{metric.name} ({metric.unit}, {_aim(metric.direction)})"
        made.add_row(task.name, described, f"{metric.margin:g}", ", ".join(task.slots))
    return made


def slot_table(slots: Iterable[Slot]) -> RenderableType:
    made = table("slot", "default", "methods")
    for slot in slots:
        made.add_row(slot.name, str(slot.default), ", ".join(slot.options.names()))
    return made


def run_table(runs: "Sequence[Stored]") -> RenderableType:
    made = table("recorded", "task", "seed", "split", "ended", "value", "seconds", "choices", right=("seed", "value"))
    for run in runs:
        choices = ", ".join(
            f"{slot}={choice['name']}" + (_parameters(choice["params"]) if choice["params"] else "")
            for slot, choice in run.choices.items()
        )
        outcome = run.outcome
        made.add_row(
            run.recorded[:19].replace("T", " "),
            run.task,
            str(run.seed),
            run.split,
            outcome.ended,
            f"{outcome.value:.4g}",
            f"{outcome.seconds:.2f}",
            choices,
        )
    return made


def _parameters(params: dict[str, object]) -> str:
    return "(" + ", ".join(f"{key}={_short(value)}" for key, value in params.items()) + ")"


def measurement_table(measurements: Sequence[Measurement]) -> RenderableType:
    made = table("measured here", "value", "95 % interval", "unit", "in the paper", right=("value",))
    for m in measurements:
        value = "" if m.value is None else f"{m.value:.4g}"
        interval = "" if m.low is None or m.high is None else f"[{m.low:.4g}, {m.high:.4g}]"
        made.add_row(m.name, value, interval, m.unit, m.paper)
    return made
