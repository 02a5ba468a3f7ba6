"""How a comparison is put into figures and sentences: terminal, page, Markdown and CSV say the same."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from fairtrial.contract import Metric, Outcome
from fairtrial.trial.comparison import Comparison, Judged
from fairtrial.trial.statistics import Difference, fewest_seeds

LISTED = 4  # names that a sentence lists before it only counts


def decimals(metric: Metric) -> int:
    """Digits after the point that show differences down to a tenth of the margin."""
    return max(2, 1 - math.floor(math.log10(metric.margin)))


def number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.4g}"


def signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}" if abs(value) < 1e6 else f"{value:+.4g}"


def interval(difference: Difference, digits: int) -> str:
    """'[-0.01, +0.02]', or nothing where no bounded interval reaches 95 %."""
    if not (math.isfinite(difference.low) and math.isfinite(difference.high)):
        return ""
    return f"[{signed(difference.low, digits)}, {signed(difference.high, digits)}]"


def p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} ×"


def size(count: int | None) -> str:
    """Bytes for people."""
    if count is None:
        return ""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, _ = value / 1000, units.pop(0)
    return f"{count} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def aim(metric: Metric) -> str:
    return "more is better" if metric.direction == "maximize" else "less is better"


def short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def tuned_to(judged: Judged) -> list[str]:
    """'optimizer.lr = 0.01', for every hyperparameter that tuning set."""
    return [
        f"{slot}.{key} = {short(value)}"
        for slot, params in judged.tuned.params.items()
        for key, value in params.items()
    ]


def reason(outcome: Outcome) -> str:
    """Why a run did not finish, in one line."""
    lines = (outcome.error or "").strip().splitlines()
    return lines[-1].strip() if lines else outcome.ended


def joined(names: Sequence[str]) -> str:
    """'a, b and c'; many names are only counted."""
    if len(names) > LISTED:
        return f"{len(names)} recipes"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def title(comparison: Comparison) -> str:
    baseline, *others = comparison.recipes
    return f"{joined([judged.name for judged in others])} against {baseline.name}"


def conclusion(comparison: Comparison) -> list[str]:
    """What a reader should take home: each verdict that was reached, and whose it is."""
    baseline = comparison.recipes[0].name
    phrases = {
        "better": f"better than {baseline}",
        "worse": f"worse than {baseline}",
        "equivalent": f"as good as {baseline} for all practical purposes",
        "undecided": "undecided",
    }
    sentences = []
    for said, phrase in phrases.items():
        names = [judged.name for judged in comparison.recipes if judged.verdict == said]
        if names:
            sentences.append(f"{joined(names)} {'is' if len(names) == 1 else 'are'} {phrase}.")
    return sentences


@dataclass(frozen=True)
class Note:
    """A sentence that belongs under a verdict table."""

    kind: Literal["method", "caution", "failure", "tuned"]
    text: str


def notes(comparison: Comparison) -> Iterator[Note]:
    """What a reader must know to read the table."""
    seeds, margin, unit = len(comparison.evaluation_seeds), comparison.metric.margin, comparison.metric.unit
    yield Note(
        "method",
        f"{comparison.trials} tuning runs each on validation data, then {seeds} fresh seeds each on test data. "
        f"Differences and costs are paired by seed with the baseline; a difference under {margin:g} "
        f"{unit} counts as equivalent.",
    )
    if not comparison.decidable:
        needed = fewest_seeds(len(comparison.recipes) - 1)
        yield Note(
            "caution",
            f"With {seeds} seeds no difference can be significant, however large: nothing is decided. "
            f"Use --seeds {needed} or more.",
        )
    for judged in comparison.recipes:
        yield from _failures(judged, comparison.metric)
        if judged.verdict == "undecided" and comparison.decidable:
            more = judged.seeds_to_decide
            yield Note(
                "caution",
                f"{judged.name}: undecided; about {more} seeds would probably decide it."
                if more
                else f"{judged.name}: undecided, and more than 10,000 seeds would probably be needed to decide it.",
            )
    for judged in comparison.recipes:
        if found := tuned_to(judged):
            yield Note("tuned", f"{judged.name} was tuned to " + ", ".join(found))


def _failures(judged: Judged, metric: Metric) -> Iterator[Note]:
    tried = [outcome for _, outcome in judged.tuned.history]
    lost = [outcome for outcome in tried if outcome.failed]
    if tried and not any(outcome.ended == "finished" for outcome in tried):
        because = f" ({reason(lost[0])})" if lost else ""
        yield Note(
            "failure",
            f"{judged.name}: none of its {len(tried)} tuning runs came through, so it was judged untuned, with its "
            f"methods' defaults{because}",
        )
    if judged.failed:
        first = next(outcome for outcome in judged.outcomes if outcome.failed)
        yield Note(
            "failure",
            f"{judged.name}: {judged.failed} of {len(judged.outcomes)} runs failed and count with the worst value, "
            f"{metric.worst:g} ({reason(first)})",
        )
