"""A calibration as tables for a terminal."""

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from fairtrial.report.tables import table
from fairtrial.report.wording import decimals, number
from fairtrial.trial.figures import (
    AS_MEASURED,
    Calibration,
    Case,
    Coverage,
    Detection,
    FalseVerdicts,
    Saving,
)

BOUNDS = (
    "false verdicts at most 5 % (upper ends 6.5 %), coverage 95 ± 1.5 % (over all looks at least 95 %), "
    "power as computed ± 10 points, clear effects in at most 60 % of the runs"
)


def calibration_tables(calibration: Calibration) -> RenderableType:
    """Every figure with its 95 % interval, what is not as it should be, and at the end whether everything is."""
    return Group(
        *_head(calibration),
        *_titled(
            "False verdicts on methods that are the baseline itself, by number of seeds; 'up to': until decided",
            _false_verdicts(calibration.false_verdicts),
        ),
        *_titled(
            "Planted effects found, in standard deviations of the paired difference; in parentheses what was computed",
            _power(calibration.power),
        ),
        *_titled("Intervals that hold the truth", _coverage(calibration.coverage)),
        *_titled("What looking again and again saves, with one method", _savings(calibration.savings)),
        Text(),
        *(Text(f"Not as it should be: {miss}", style="red") for miss in calibration.misses),
        Text(conclusion(calibration), style="red" if calibration.misses else "green"),
    )


def conclusion(calibration: Calibration) -> str:
    """One line that says whether every figure is within its bounds."""
    misses, judged = len(calibration.misses), calibration.judged
    if not misses:
        return f"Every one of {judged} figures is within its bounds: {BOUNDS}."
    return f"{misses} of {judged} figures {'is' if misses == 1 else 'are'} NOT within bounds: {BOUNDS}."


def _head(calibration: Calibration) -> Iterator[Text]:
    pool, digits = calibration.pool, decimals(calibration.pool.metric) + 1
    tuned = f", each tuned for itself by {pool.trials} runs" if pool.trials else ""
    yield Text(f"{pool.task}: {len(pool.values)} runs of the baseline{tuned}", style="bold")
    failed = f"; {pool.failed} of them failed" if pool.failed else ""
    yield Text(
        f"{pool.metric.name} {number(pool.mean, digits)} on average, standard deviation "
        f"{number(pool.standard_deviation, digits)}, {pool.distinct} different values{failed}. "
        f"{calibration.comparisons} comparisons for each figure, {calibration.with_effect} for each with a planted "
        "effect; 95 % intervals."
    )


def _titled(title: str, content: RenderableType) -> tuple[RenderableType, ...]:
    return Text(), Text(title, style="bold"), content


def _seeds(case: Case) -> str:
    return str(case.seeds) if case.design == "fixed" else f"up to {case.seeds}"


def _false_verdicts(found: Sequence[FalseVerdicts]) -> RenderableType:
    counts = sorted({case.methods for case in found})
    made = table("pool", "seeds", *(f"{count} method{'s' * (count > 1)}" for count in counts))
    shares = {(case.pool, _seeds(case), case.methods): str(case.share) for case in found}
    cases = dict.fromkeys((case.pool, _seeds(case)) for case in found)
    for row in _without_repeats((*case, *(shares[*case, count] for count in counts)) for case in cases):
        made.add_row(*row)
    return made


def _power(found: Sequence[Detection]) -> RenderableType:
    """With several methods for the pool as measured only: the other shapes' are in the JSON document."""
    shown = [case for case in found if case.pool == AS_MEASURED or case.methods == 1]
    effects = sorted({case.effect for case in shown})
    made = table("pool", "seeds", "methods", *(f"{effect:g}" for effect in effects), right=("methods",))
    shares = {(case.pool, _seeds(case), str(case.methods), case.effect): _found(case) for case in shown}
    cases = dict.fromkeys((case.pool, _seeds(case), str(case.methods)) for case in shown)
    for row in _without_repeats((*case, *(shares[*case, effect] for effect in effects)) for case in cases):
        made.add_row(*row)
    return made


def _found(case: Detection) -> str:
    return f"{case.share}" + ("" if case.computed is None else f" ({100 * case.computed:.0f})")


def _coverage(found: Sequence[Coverage]) -> RenderableType:
    designs = list(dict.fromkeys(_seeds(case) for case in found))
    made = table("pool", *(f"{seeds} seeds" for seeds in designs))
    shares = {(case.pool, case.spread, _seeds(case)): str(case.share) for case in found}
    for pool, spread in dict.fromkeys((case.pool, case.spread) for case in found):
        what = pool if spread == 1 else f"{pool}, a method that spreads {spread} × as far"
        made.add_row(what, *(shares[pool, spread, seeds] for seeds in designs))
    return made


def _savings(savings: Sequence[Saving]) -> RenderableType:
    made = table("effect", "up to", "found", "half of all ended by", "fixed number that finds as many", "of the runs")
    for saving in savings:
        made.add_row(
            f"{saving.effect:g}" + (" (clear)" if saving.clear else ""),
            f"{saving.budget} seeds",
            str(saving.share),
            f"{saving.median_seeds:g} seeds [{saving.median_low:g}, {saving.median_high:g}]",
            f"{saving.fixed_seeds} seeds",
            f"{100 * saving.ratio:.0f} %",
        )
    return made


def _without_repeats(rows: Iterable[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """The first cell only where it differs from the one above."""
    above = ""
    for first, *others in rows:
        yield ("" if first == above else first), *others
        above = first
