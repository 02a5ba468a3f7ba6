"""A comparison as text in the formats that people pass on: HTML, Markdown, CSV and JSON."""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from fairtrial.contract import BadInput
from fairtrial.report.origin import Origin
from fairtrial.report.page import page
from fairtrial.report.runs import runs_of, tunings_of
from fairtrial.report.svg import visible
from fairtrial.report.wording import (
    aim,
    conclusion,
    decimals,
    interval,
    notes,
    number,
    p_value,
    ratio,
    reason,
    signed,
    size,
    title,
)
from fairtrial.trial.comparison import Comparison, Judged


def as_text(comparison: Comparison, origin: Origin, form: str) -> str:
    """The comparison in one of `FORMATS`."""
    if form not in FORMATS:
        raise BadInput(f"no format {form!r}; there is: {', '.join(FORMATS)}")
    return FORMATS[form](comparison, origin)


# Markdown ----------------------------------------------------------------------------------------------------------


def markdown(comparison: Comparison, origin: Origin) -> str:
    """What the page says in words: the verdict table, what must be known to read it, failures, and the command."""
    metric = comparison.metric
    lines = [f"# {_plain(comparison.task)}: {_plain(title(comparison))}", ""]
    lines += [f"- {_plain(sentence)}" for sentence in conclusion(comparison)]
    lines += ["", f"{_plain(f'{metric.name} ({metric.unit}, {aim(metric)})')}", ""]
    heads = ["recipe", metric.name, "difference [95 % interval]", "p (Holm)", "verdict"]
    heads += ["step time", "peak memory", "optimizer state", "seeds", "failed"]
    lines += [_row(heads), _row_of_rules("lrlrlrrrrr")]
    lines += [_row(_cells(judged, decimals(metric))) for judged in comparison.recipes]
    lines += ["", *(f"- {_plain(note.text)}" for note in notes(comparison)), ""]
    failed = [run for run in runs_of(comparison) if run.outcome.failed]
    if failed:
        lines += ["## Failures", ""]
        lines += [
            f"- {_plain(f'{run.judged.name}, {run.label}: {run.outcome.ended} ({reason(run.outcome)})')}"
            for run in failed
        ]
        lines.append("")
    lines += ["## Get it again", "", *_fenced(origin.command), ""]
    lines += [f"- {_plain(f'{what}: {found}')}" for what, found in _facts(comparison, origin)]
    return "\n".join(lines) + "\n"


def _cells(judged: Judged, digits: int) -> list[str]:
    costs, difference = judged.costs, judged.difference
    change = f"{signed(difference.mean, digits)} {interval(difference, digits)}".strip() if difference else "baseline"
    return [
        judged.name,
        number(judged.mean, digits),
        change,
        p_value(difference.p_holm) if difference else "",
        judged.verdict or "",
        ratio(costs.step_time_ratio),
        ratio(costs.peak_memory_ratio),
        size(costs.optimizer_state_bytes),
        str(len(judged.outcomes)),
        str(judged.failed) if judged.failed else "",
    ]


def _facts(comparison: Comparison, origin: Origin) -> Iterator[tuple[str, str]]:
    yield "task", f"{comparison.task}, version {comparison.version}"
    yield "tuning seeds", ", ".join(map(str, comparison.tuning_seeds))
    yield "evaluation seeds", ", ".join(map(str, comparison.evaluation_seeds))
    yield from origin.environment.items()
    for judged, code in zip(comparison.recipes, origin.code, strict=False):
        yield f"code of {judged.name}", code


def _plain(content: str) -> str:
    """Text that Markdown takes as it stands, on one line."""
    flat = " ".join(visible(content).split())
    escaped = re.sub(r"([\\`*_{}\[\]<>|#~&!])", r"\\\1", flat)
    return re.sub(r"(?i)\b(https?|ftp|mailto|www)(?=[:.])", r"\1&#8203;", escaped)  # or GitHub makes links of them


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(_plain(cell) for cell in cells) + " |"


def _row_of_rules(sides: str) -> str:
    return "| " + " | ".join("---:" if side == "r" else "---" for side in sides) + " |"


def _fenced(content: str) -> list[str]:
    """As code, within a fence that is longer than any in it."""
    longest = max((len(found) for found in re.findall("`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}sh", visible(content), fence]


# CSV ---------------------------------------------------------------------------------------------------------------


def csv_text(comparison: Comparison, origin: Origin) -> str:
    """One row for each recipe, the baseline first; empty where there is no figure."""
    rows = [_record(comparison, place, origin) for place in range(len(comparison.recipes))]
    written = io.StringIO()
    writer = csv.DictWriter(written, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _inert(value) for key, value in row.items()} for row in rows)
    return written.getvalue()


def _record(comparison: Comparison, place: int, origin: Origin) -> dict[str, Any]:
    judged, metric = comparison.recipes[place], comparison.metric
    difference = judged.difference
    found = {key: _finite(value) for key, value in asdict(difference).items()} if difference else {}
    tuned = [{slot: dict(params) for slot, params in t.params.items()} for t in tunings_of(comparison, judged)]
    return {
        "task": comparison.task,
        "task_version": comparison.version,
        "metric": metric.name,
        "unit": metric.unit,
        "direction": metric.direction,
        "margin": metric.margin,
        "recipe": judged.name,
        "baseline": comparison.recipes[0].name,
        "seeds": len(judged.outcomes),
        "failed": judged.failed,
        "mean": judged.mean,
        "difference": found.get("mean"),
        "low": found.get("low"),
        "high": found.get("high"),
        "p": found.get("p"),
        "p_holm": found.get("p_holm"),
        "verdict": judged.verdict,
        "seeds_to_decide": judged.seeds_to_decide,
        **asdict(judged.costs),
        "values": json.dumps(judged.values),
        "choices": json.dumps(judged.recipe.as_json(), ensure_ascii=False),
        "tuned": json.dumps(tuned, ensure_ascii=False),
        "code": origin.code[place] if place < len(origin.code) else None,
        "command": origin.command,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _inert(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula gets an apostrophe in front."""
    return "'" + value if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


# JSON --------------------------------------------------------------------------------------------------------------


def json_text(comparison: Comparison, origin: Origin) -> str:
    """What `compare --json` prints, and where it comes from."""
    document = {**comparison.as_json(), "origin": asdict(origin)}
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


FORMATS: dict[str, Callable[[Comparison, Origin], str]] = {
    "html": page,
    "md": markdown,
    "csv": csv_text,
    "json": json_text,
}
