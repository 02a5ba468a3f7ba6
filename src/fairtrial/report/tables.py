"""Comparisons, papers, runs and evidence as tables for a terminal. Looking papers up must not wait for the bench."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fairtrial.catalog import Catalogue, Measurement, Paper
from fairtrial.contract import Slot, Task
from fairtrial.report import wording
from fairtrial.report.wording import aim, short

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
NOTES = {"method": "dim", "caution": "yellow", "failure": "red", "tuned": "dim"}


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
    digits = wording.decimals(metric)
    head = f"{comparison.task}: {metric.name} ({metric.unit}, {aim(metric)})"
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
    notes = [Text(note.text, style=NOTES[note.kind]) for note in wording.notes(comparison)]
    return Group(Text(head, style="bold"), Text(), made, Text(), *notes)


def _verdict_row(judged: "Judged", digits: int) -> list[RenderableType]:
    costs, difference = judged.costs, judged.difference
    if difference is None:
        change, p = "baseline", ""
    else:
        change = f"{wording.signed(difference.mean, digits)} {wording.interval(difference, digits)}"
        p = wording.p_value(difference.p_holm)
    return [
        Text(judged.name),
        wording.number(judged.mean, digits),
        Text(change),
        p,
        coloured(judged.verdict or ""),
        wording.ratio(costs.step_time_ratio),
        wording.ratio(costs.peak_memory_ratio),
        wording.size(costs.optimizer_state_bytes),
        str(judged.failed) if judged.failed else "",
    ]


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
        described = f"{metric.name} ({metric.unit}, {aim(metric)})"
        made.add_row(task.name, described, f"{metric.margin:g}", ", ".join(task.slots))
    return made


def slot_table(slots: Iterable[Slot]) -> RenderableType:
    made = table("slot", "default", "methods")
    for slot in slots:
        made.add_row(slot.name, str(slot.default), ", ".join(slot.options.names()))
    return made


def run_lines(runs: "Sequence[Stored]") -> Iterator[str]:
    """A line for each run, under one of headings; a table of thousands would take longer to lay out than to read."""
    rows = [("recorded", "task", "seed", "split", "ended", "value", "seconds", "choices")]
    for run in runs:
        choices = ", ".join(
            f"{slot}={choice['name']}" + (_parameters(choice["params"]) if choice["params"] else "")
            for slot, choice in run.choices.items()
        )
        outcome, when = run.outcome, run.recorded[:19].replace("T", " ")
        measured = (outcome.ended, f"{outcome.value:.4g}", f"{outcome.seconds:.2f}")
        rows.append((when, run.task, str(run.seed), run.split, *measured, choices))
    recorded, task, seed, split, ended, value, seconds, _ = (
        max(map(len, column)) for column in zip(*rows, strict=True)
    )
    for row in rows:
        yield (
            f"{row[0]:{recorded}}  {row[1]:{task}}  {row[2]:>{seed}}  {row[3]:{split}}  {row[4]:{ended}}  "
            f"{row[5]:>{value}}  {row[6]:>{seconds}}  {row[7]}"
        )


def _parameters(params: dict[str, object]) -> str:
    return "(" + ", ".join(f"{key}={short(value)}" for key, value in params.items()) + ")"


def measurement_table(measurements: Sequence[Measurement]) -> RenderableType:
    made = table("measured here", "value", "95 % interval", "unit", "in the paper", right=("value",))
    for m in measurements:
        value = "" if m.value is None else f"{m.value:.4g}"
        interval = "" if m.low is None or m.high is None else f"[{m.low:.4g}, {m.high:.4g}]"
        made.add_row(m.name, value, interval, m.unit, m.paper)
    return made
