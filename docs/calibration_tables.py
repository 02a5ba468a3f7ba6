"""The figures of the calibrations on record, as tables for the guide's page on them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from fairtrial import tasks
from fairtrial.report import recorded
from fairtrial.report.calibration import conclusion
from fairtrial.trial.figures import AS_MEASURED, Case, Coverage, Detection, FalseVerdicts, Saving, Share
from layout import counted, filled, plain, table

MARK = "<!-- figures -->"

Figure = TypeVar("Figure", bound=Case)


def with_figures(page: str, folder: Path = recorded.FOLDER) -> str:
    """The page, with the tables of every calibration in the folder in place of the mark."""
    if MARK not in page:
        return page
    found = [recorded.read(path) for path in sorted(folder.glob("*.json"))]
    tables = {function.__name__: function for function in (conclusion, stale, false_verdicts, power, coverage, savings)}
    return page.replace(MARK, filled("calibration.md.j2", records=found, **tables))


def stale(record: recorded.Recorded) -> bool:
    """Whether the code has changed since: of the task, of its baseline, or of what draws and judges."""
    task = record.calibration.pool.task
    return record.fingerprint != recorded.recorded(record.calibration, tasks.load(task), task).fingerprint


def false_verdicts(found: Sequence[FalseVerdicts]) -> str:
    return _crossed(["pool", "seeds"], found, _pool_and_seeds, _methods, lambda case: _share(case.share))


def power(found: Sequence[Detection]) -> str:
    """With several methods for the pool as measured only."""
    shown = [case for case in found if case.pool == AS_MEASURED or case.methods == 1]

    def place(case: Detection) -> list[str]:
        return [*_pool_and_seeds(case), _methods(case)]

    def of_computed(case: Detection) -> str:
        return _share(case.share) + ("" if case.computed is None else f" ({100 * case.computed:.0f})")

    return _crossed(["pool", "seeds", ""], shown, place, lambda case: f"effect {case.effect:g}", of_computed)


def coverage(found: Sequence[Coverage]) -> str:
    def pool(case: Coverage) -> list[str]:
        wide = "" if case.spread == 1 else f", a method that spreads {case.spread} × as far"
        return [plain(case.pool) + wide]

    return _crossed(["pool"], found, pool, lambda case: f"{_seeds(case)} seeds", lambda case: _share(case.share))


def savings(found: Sequence[Saving]) -> str:
    return table(
        ["effect", "budget", "found", "half of all ended by", "a fixed number that finds as many", "ratio"],
        [
            [
                f"{saving.effect:g}{' (clear)' if saving.clear else ''}",
                f"{saving.budget} seeds",
                _share(saving.share),
                f"{saving.median_seeds:g} seeds",
                f"{saving.fixed_seeds} seeds",
                f"{100 * saving.ratio:.0f} %",
            ]
            for saving in found
        ],
    )


def _crossed(
    heads: Sequence[str],
    found: Sequence[Figure],
    down: Callable[[Figure], Sequence[str]],
    across: Callable[[Figure], str],
    shown: Callable[[Figure], str],
) -> str:
    """A table with a line for every case `down`, and a column for every one `across`."""
    cells = {(tuple(down(case)), across(case)): shown(case) for case in found}
    lines, columns = dict.fromkeys(line for line, _ in cells), dict.fromkeys(column for _, column in cells)
    return table(
        [*heads, *columns], [[*line, *(cells.get((line, column), "") for column in columns)] for line in lines]
    )


def _pool_and_seeds(case: Case) -> list[str]:
    return [plain(case.pool), _seeds(case)]


def _seeds(case: Case) -> str:
    return f"{case.seeds}" if case.design == "fixed" else f"up to {case.seeds}"


def _methods(case: FalseVerdicts | Detection) -> str:
    return counted(case.methods, "method")


def _share(share: Share) -> str:
    """Without a place to break the line within the interval."""
    return plain(str(share)).replace(", ", ",\N{NO-BREAK SPACE}")
