"""Calibrations on record: a JSON file for each task, and one more for a task tuned, in `trial/calibrations/`."""

import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from fairtrial.catalog import CatalogError, Machine
from fairtrial.catalog.fields import Fields
from fairtrial.claims.check import machine
from fairtrial.contract import Metric, Task
from fairtrial.report.output import write_output
from fairtrial.trial import figures
from fairtrial.trial.comparison import source_of
from fairtrial.trial.figures import Calibration, Coverage, Detection, FalseVerdicts, Pool, Saving, Share
from fairtrial.trial.fingerprint import fingerprint

SCHEMA = 1
FOLDER = Path(figures.__file__).with_name("calibrations")

_drawing = ("fairtrial.trial.calibration", "fairtrial.trial.figures", "fairtrial.trial.tuning")
_conduct = ("fairtrial.trial.comparison", "fairtrial.trial.execute", "fairtrial.trial.store")  # changes no figure
_packages = ("fairtrial", "torch", "numpy", "scipy", "scikit-learn", "optuna")
_most = 2**63


@dataclass(frozen=True)
class Recorded:
    """A calibration, and where it came about.

    Attributes:
        date: when.
        fingerprint: of the code of the task, of its baseline, and of what draws comparisons and judges them.
        machine: where.
        versions: of python, fairtrial, and the libraries that figures depend on.
        calibration: what was found.
    """

    date: date
    fingerprint: str
    machine: Machine
    versions: Mapping[str, str]
    calibration: Calibration

    def as_json(self) -> dict[str, Any]:
        """The file's fields, in the file's order."""
        where = {"class": self.machine.kind, "cpus": self.machine.cpus, "memory_gib": self.machine.memory_gib}
        return {
            "schema": SCHEMA,
            "date": str(self.date),
            "fingerprint": self.fingerprint,
            "machine": where,
            "versions": dict(self.versions),
            **self.calibration.as_json(),
        }


def recorded(calibration: Calibration, task: Task, reference: str) -> Recorded:
    """A calibration of a task, made here and now."""
    options = [slot.options[slot.default.name] for slot in task.slots.values()]
    methods = [module for option in options for module in (option.factory.__module__, option.bind.__module__)]
    return Recorded(
        datetime.now(UTC).date(),
        fingerprint([source_of(task, reference), *methods, *_drawing], without=_conduct),
        machine(),
        {"python": platform.python_version(), **{package: version(package) for package in _packages}},
        calibration,
    )


def place(task: str, trials: int) -> Path:
    """The file of a task's calibration, tuned or not."""
    return FOLDER / f"{task}{'-tuned' if trials else ''}.json"


def write(found: Recorded) -> None:
    """Write the file, whole or not at all; what could not be read back is refused."""
    pool = found.calibration.pool
    path = place(pool.task, pool.trials)
    text = as_text(found)
    parse(text, path.name)
    write_output(path, text)


def as_text(found: Recorded) -> str:
    """JSON with each figure on a line of its own."""
    return "{\n" + ",\n".join(f'  "{key}": {_lines(value)}' for key, value in found.as_json().items()) + "\n}\n"


def _lines(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict | str):
        return "[\n" + ",\n".join(f"    {_line(row)}" for row in value) + "\n  ]"
    return _line(value)


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def read(path: Path) -> Recorded:
    try:
        return parse(path.read_text(encoding="utf-8"), path.name)
    except UnicodeDecodeError as error:
        raise CatalogError(f"{path.name}: not UTF-8: {error}") from None


def parse(text: str, file: str) -> Recorded:
    """The calibration in a file's text. What follows from other fields must be what it follows to be.

    Raises:
        CatalogError: names file and field, and what is wrong with it.
    """
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CatalogError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(table, dict):
        raise CatalogError(f"{file}: must be a table of fields")
    fields = Fields(table, file)
    if fields.value("schema") != SCHEMA:  # before anything else: the other fields mean what the schema says
        raise fields.refused("schema", fields.value("schema"), f"{SCHEMA}, the one this version of fairtrial reads")
    found = _recorded(fields)
    expected = found.as_json()
    fields.allow(expected)
    for name, value in expected.items():
        if fields.value(name) != value:
            raise fields.error(name, "is not what the counts and values in the file come to")
    pool = found.calibration.pool
    if file != place(pool.task, pool.trials).name:
        raise fields.refused("task", pool.task, f"the file's, {file}")
    return found


def _recorded(fields: Fields) -> Recorded:
    where, versions = fields.inner("machine"), fields.inner("versions")
    text = fields.matching("date", re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}"), "a date, as '2026-11-22'")
    try:
        day = date.fromisoformat(text)
    except ValueError:
        raise fields.refused("date", text, "a date, as '2026-11-22'") from None
    return Recorded(
        day,
        fields.matching("fingerprint", re.compile("[0-9a-f]{16}"), "16 hexadecimal digits in lower case"),
        Machine(where.text("class"), where.whole("cpus", 1, 1_000_000), where.number("memory_gib", low=0)),
        {name: versions.text(name) for name in versions.table},
        _calibration(fields),
    )


def _calibration(fields: Fields) -> Calibration:
    seconds = fields.inner("seconds")
    return Calibration(
        Pool(
            fields.text("task"),
            fields.whole("version", 0, _most),
            _metric(fields.inner("metric")),
            fields.whole("trials", 0, _most),
            fields.whole("first_seed", 0, _most),
            _values(fields),
            fields.whole("failed", 0, _most),
            seconds.number("runs", low=0),
        ),
        fields.whole("comparisons", 2, _most),
        fields.whole("with_effect", 1, _most),
        seconds.number("drawing", low=0),
        [FalseVerdicts(*_case(row), _methods(row)) for row in fields.inner_array("false_verdicts")],
        [
            Detection(*_case(row), _methods(row), row.number("effect"), row.number_or_null("computed"))
            for row in fields.inner_array("power")
        ],
        [Coverage(*_case(row), row.whole("spread", 1, 2)) for row in fields.inner_array("coverage")],
        [_saving(row) for row in fields.inner_array("savings")],
    )


def _metric(fields: Fields) -> Metric:
    return Metric(
        fields.text("name"),
        fields.one_of("direction", ("maximize", "minimize")),
        fields.text("unit"),
        fields.number("margin", low=1e-300),
        fields.number("worst"),
    )


def _values(fields: Fields) -> list[float]:
    numbered = Fields({f"values[{i}]": value for i, value in enumerate(fields.array("values"))}, fields.file)
    if len(numbered.table) < 2:
        raise fields.error("values", "must hold at least two")
    return [numbered.number(name) for name in numbered.table]


def _case(row: Fields) -> tuple[str, figures.Design, int, Share]:
    return row.text("pool"), row.one_of("design", get_args(figures.Design)), row.whole("seeds", 1, _most), _share(row)


def _share(row: Fields) -> Share:
    of = row.whole("of", 1, _most)
    return Share(row.whole("count", 0, of), of)


def _methods(row: Fields) -> int:
    return row.whole("methods", 1, _most)


def _saving(row: Fields) -> Saving:
    return Saving(
        row.number("effect"),
        row.whole("budget", 1, _most),
        row.number("median_seeds", low=1),
        row.number("median_low", low=1),
        row.number("median_high", low=1),
        row.whole("fixed_seeds", 1, _most),
        _share(row),
    )
