"""The figures of the calibrations on record, as tables for the guide's page on them."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fairtrial.trial.fingerprint import ROOT
from layout import counted, filled, plain, table

RECORDED = ROOT / "trial" / "calibrations"
MARK = "<!-- figures -->"

Row = Mapping[str, Any]


def with_figures(page: str, folder: Path = RECORDED) -> str:
    """The page, with the tables of every calibration in the folder in place of the mark."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    tables = {"false_verdicts": false_verdicts, "power": power, "coverage": coverage, "savings": savings}
    return page.replace(MARK, filled("calibration.md.j2", calibrations=found, **tables))


def false_verdicts(rows: Sequence[Row]) -> str:
    return _crossed(["pool", "seeds"], rows, _pool_and_seeds, _methods, _share)


def power(rows: Sequence[Row]) -> str:
    """With several methods for the pool as measured only."""
    shown = [row for row in rows if row["pool"] == "as measured" or row["methods"] == 1]

    def of_computed(row: Row) -> str:
        return _share(row) + ("" if row["computed"] is None else f" ({100 * row['computed']:.0f})")

    def case(row: Row) -> list[str]:
        return [*_pool_and_seeds(row), _methods(row)]

    return _crossed(["pool", "seeds", ""], shown, case, lambda row: f"effect {row['effect']:g}", of_computed)


def coverage(rows: Sequence[Row]) -> str:
    def pool(row: Row) -> list[str]:
        wide = "" if row["spread"] == 1 else f", a method that spreads {row['spread']} × as far"
        return [plain(row["pool"]) + wide]

    return _crossed(["pool"], rows, pool, lambda row: f"{_seeds(row)} seeds", _share)


def savings(rows: Sequence[Row]) -> str:
    heads = ["effect", "budget", "found", "half of all ended by", "a fixed number that finds as many", "ratio"]
    return table(
        heads,
        [
            [
                f"{row['effect']:g}",
                f"{row['budget']} seeds",
                _share(row),
                f"{row['median_seeds']:g} seeds",
                f"{row['fixed_seeds']} seeds",
                f"{row['ratio']:.0%}",
            ]
            for row in rows
        ],
    )


def _crossed(
    heads: Sequence[str],
    rows: Sequence[Row],
    down: Callable[[Row], Sequence[str]],
    across: Callable[[Row], str],
    shown: Callable[[Row], str],
) -> str:
    """A table with a line for every case `down`, and a column for every one `across`."""
    cells = {(tuple(down(row)), across(row)): shown(row) for row in rows}
    lines, columns = dict.fromkeys(line for line, _ in cells), dict.fromkeys(column for _, column in cells)
    return table(
        [*heads, *columns], [[*line, *(cells.get((line, column), "") for column in columns)] for line in lines]
    )


def _pool_and_seeds(row: Row) -> list[str]:
    return [plain(row["pool"]), _seeds(row)]


def _seeds(row: Row) -> str:
    return f"{row['seeds']}" if row["design"] == "fixed" else f"up to {row['seeds']}"


def _methods(row: Row) -> str:
    return counted(row["methods"], "method")


def _share(row: Row) -> str:
    """'4.9 % [4.5, 5.3]', without a place to break the line within the interval."""
    low, high = 100 * row["low"], 100 * row["high"]
    return plain(f"{100 * row['rate']:.1f} % [{low:.1f}, {high:.1f}]").replace(", ", ",\N{NO-BREAK SPACE}")
