"""How a comparison is put into figures and sentences: terminal, page, Markdown and CSV say the same."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import TYPE_CHECKING, Any, Literal

from fairtrial.contract import Metric, Outcome
from fairtrial.report.runs import tuned_once, tunings_of

if TYPE_CHECKING:
    from fairtrial.trial.comparison import Comparison, Judged
    from fairtrial.trial.statistics import Difference
    from fairtrial.trial.tuning import Tuned

LISTED = 4  # names that a sentence lists before it only counts


def decimals(metric: Metric) -> int:
    """Digits after the point that show differences down to a tenth of the margin."""
    return max(2, 1 - math.floor(math.log10(metric.margin)))


def number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.4g}"


def signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}" if abs(value) < 1e6 else f"{value:+.4g}"


def interval(difference: "Difference", digits: int) -> str:
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


def tuned_to(tunings: Sequence["Tuned"]) -> list[str]:
    """'optimizer.lr = 0.01', for every hyperparameter that was tuned; over several tunings, their middle and range."""
    found: dict[str, list[Any]] = {}
    for tuned in tunings:
        for slot, params in tuned.params.items():
            for key, value in params.items():
                found.setdefault(f"{slot}.{key}", []).append(value)
    return [f"{name} = {_over_tunings(values)}" for name, values in found.items()]


def _over_tunings(values: Sequence[Any]) -> str:
    if all(value == values[0] for value in values):
        return short(values[0])
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return f"{short(median_low(values))} ({short(min(values))} to {short(max(values))})"
    kinds = Counter(short(value) for value in values)
    return ", ".join(f"{kind} ({times} of {len(values)})" for kind, times in kinds.most_common())


def untuned(tunings: Sequence["Tuned"]) -> list["Tuned"]:
    """Tunings of which no run came through, so that the defaults stood."""
    return [t for t in tunings if t.history and not any(outcome.ended == "finished" for _, outcome in t.history)]


def reason(outcome: Outcome) -> str:
    """Why a run did not finish, in one line."""
    lines = (outcome.error or "").strip().splitlines()
    return lines[-1].strip() if lines else outcome.ended


def joined(names: Sequence[str]) -> str:
    """'a, b and c'; many names are only counted."""
    if len(names) > LISTED:
        return f"{len(names)} recipes"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def ranges(numbers: Sequence[int]) -> str:
    """'0–4, 7' for 0, 1, 2, 3, 4, 7."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ", ".join(f"{first}" if first == last else f"{first}–{last}" for first, last in parts)


def title(comparison: "Comparison") -> str:
    baseline, *others = comparison.recipes
    return f"{joined([judged.name for judged in others])} against {baseline.name}"


def conclusion(comparison: "Comparison") -> list[str]:
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


def notes(comparison: "Comparison") -> Iterator[Note]:
    """What a reader must know to read the table."""
    yield Note("method", how_it_was_done(comparison))
    seeds = len(comparison.evaluation_seeds)
    if tuned_once(comparison):
        told = "Each recipe was tuned once, for all seeds: verdicts speak of the configurations that this tuning "
        yield Note("caution", told + "happened to find, not of the methods.")
    if not comparison.decidable:
        yield Note(
            "caution",
            f"With {seeds} seeds no difference can be significant, however large: nothing is decided. "
            f"Use --seeds {comparison.fewest_seeds} or more.",
        )
    for judged in comparison.recipes:
        yield from _failures(comparison, judged)
        if judged.verdict == "undecided" and comparison.decidable:
            more = judged.seeds_to_decide
            yield Note(
                "caution",
                f"{judged.name}: undecided; about {more} seeds would probably decide it."
                if more
                else f"{judged.name}: undecided, and more than 10,000 seeds would probably be needed to decide it.",
            )
    for judged in comparison.recipes:
        if found := tuned_to(tunings_of(comparison, judged)):
            yield Note("tuned", f"{judged.name} was tuned to " + ", ".join(found))


def how_it_was_done(comparison: "Comparison") -> str:
    seeds, metric, stopping = len(comparison.evaluation_seeds), comparison.metric, comparison.until_decided
    tuned = f"by {comparison.trials} tuning runs on validation data"
    if tuned_once(comparison):
        how = f"Each recipe was tuned once, {tuned}, and run on {seeds} fresh seeds, on test data."
    else:
        how = f"{seeds} fresh seeds; for each of them a tuning of its own, {tuned}, and a run of its best "
        how += "configuration on test data."
    if stopping is not None:
        how += f" Recipes got seeds until they were decided, {stopping.budget} at most: {stopping.runs} runs, "
        how += f"{stopping.saved} fewer than the budget."
        if early := [judged for judged in comparison.recipes if len(judged.outcomes) < seeds]:
            counts = ", ".join(f"{judged.name} {len(judged.outcomes)}" for judged in early)
            how += f" A mean is over a recipe's own seeds, where they are fewer: {counts}."
    return (
        f"{how} Differences and costs are paired by seed with the baseline; a difference under {metric.margin:g} "
        f"({metric.unit}) counts as equivalent."
    )


def _failures(comparison: "Comparison", judged: "Judged") -> Iterator[Note]:
    tunings = tunings_of(comparison, judged)
    if lost := untuned(tunings):
        first = next((outcome for _, outcome in lost[0].history if outcome.failed), None)
        because = f" ({reason(first)})" if first else ""
        which = "its tuning" if len(tunings) == 1 else f"{len(lost)} of its {len(tunings)} tunings"
        yield Note("failure", f"{judged.name}: no run of {which} came through, so its methods' defaults stood{because}")
    if judged.failed:
        first = next(outcome for outcome in judged.outcomes if outcome.failed)
        yield Note(
            "failure",
            f"{judged.name}: {judged.failed} of {len(judged.outcomes)} runs failed and count with the worst value, "
            f"{comparison.metric.worst:g} ({reason(first)})",
        )
