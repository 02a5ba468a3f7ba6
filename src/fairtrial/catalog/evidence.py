"""The recorded measurements of papers' claims: one JSON file per paper in `evidence/`."""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from .fields import CatalogError, Fields
from .records import CLAIM_ID, SLUG

SCHEMA = 1
EVIDENCE = Path(__file__).parent / "evidence"

Verdict = Literal["reproduced", "partly", "not reproduced", "not testable here"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_FINGERPRINT = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Measurement:
    """A number measured for a claim.

    Attributes:
        name: what was measured, and of what: 'perplexity, AdamW'.
        value: None if there was none to be had.
        low: lower end of its interval, if it has one.
        high: upper end.
        unit: what it counts.
        paper: what the paper says of it.
    """

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    paper: str = ""


@dataclass(frozen=True)
class Finding:
    """What was found about one claim.

    Attributes:
        claim: its id.
        verdict: whether the claim was borne out.
        criterion: what had to be measured for that verdict.
        seeds: of the runs behind it; none where nothing is random.
        note: what a reader has to know besides.
        measurements: the numbers it rests on.
    """

    claim: str
    verdict: Verdict
    criterion: str
    seeds: tuple[int, ...] = ()
    note: str = ""
    measurements: tuple[Measurement, ...] = ()


@dataclass(frozen=True)
class Machine:
    """Where it was measured; `kind` describes it ('x86-64 virtual machine') and is `class` in the file."""

    kind: str
    cpus: int
    memory_gib: float


@dataclass(frozen=True)
class Evidence:
    """The recorded measurement of a paper's claims.

    Attributes:
        paper: its slug.
        date: when it was measured.
        fingerprint: of the code that it depends on; evidence is stale once the code's own differs.
        seconds: how long it took.
        machine: where.
        versions: of python, torch, fairtrial and whatever else had a part in it.
        findings: one per claim.
    """

    paper: str
    date: date
    fingerprint: str
    seconds: float
    machine: Machine
    versions: Mapping[str, str]
    findings: tuple[Finding, ...]


_measurement_fields = tuple(Measurement.__dataclass_fields__)
_finding_fields = tuple(Finding.__dataclass_fields__)
_evidence_fields = ("schema", *Evidence.__dataclass_fields__)


def load(folder: Path = EVIDENCE) -> dict[str, Evidence]:
    """All recorded evidence, by paper; none if there is no such folder."""
    return {path.stem: read(path) for path in sorted(folder.glob("*.json"))}


def read(path: Path) -> Evidence:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CatalogError(f"{path.name}: not UTF-8: {error}") from None
    return parse(text, path.name)


def parse(text: str, file: str) -> Evidence:
    """The evidence in a file's text; `file` is its name, and must be the paper's slug."""
    try:
        table = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CatalogError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(table, dict):
        raise CatalogError(f"{file}: must be a table of fields")
    return _evidence(Fields(table, file))


def write(evidence: Evidence, path: Path) -> None:
    """Write so that a reader sees the old file or the new one, whole; what could not be read back is refused."""
    checked = _evidence(Fields(as_table(evidence), path.name))
    text = json.dumps(as_table(checked), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number; null stands for a value that is not there")


def as_table(evidence: Evidence) -> dict[str, Any]:
    """The file's fields, in the file's order."""
    machine = evidence.machine
    return {
        "schema": SCHEMA,
        "paper": evidence.paper,
        "date": str(evidence.date),
        "fingerprint": evidence.fingerprint,
        "seconds": evidence.seconds,
        "machine": {"class": machine.kind, "cpus": machine.cpus, "memory_gib": machine.memory_gib},
        "versions": {name: evidence.versions[name] for name in sorted(evidence.versions)},
        "findings": [asdict(finding) for finding in evidence.findings],
    }


def _evidence(fields: Fields) -> Evidence:
    if fields.value("schema") != SCHEMA:  # before anything else: the other fields mean what the schema says
        raise fields.refused("schema", fields.value("schema"), f"{SCHEMA}, the one this version of fairtrial reads")
    fields.allow(_evidence_fields)
    paper = fields.matching("paper", SLUG, "a paper's slug")
    if paper != Path(fields.file).stem:
        raise fields.refused("paper", paper, f"the file's name, {Path(fields.file).stem!r}")
    return Evidence(
        paper=paper,
        date=_date(fields),
        fingerprint=fields.matching("fingerprint", _FINGERPRINT, "16 hexadecimal digits in lower case"),
        seconds=fields.number("seconds", low=0),
        machine=_machine(fields.inner("machine")),
        versions=_versions(fields.inner("versions")),
        findings=_findings(fields),
    )


def _date(fields: Fields) -> date:
    accepted = "a date, as '2026-11-22'"
    text = fields.matching("date", _DATE, accepted)
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise fields.refused("date", text, accepted) from None


def _machine(fields: Fields) -> Machine:
    fields.allow(("class", "cpus", "memory_gib"))
    return Machine(
        kind=fields.text("class"),
        cpus=fields.whole("cpus", 1, 1_000_000),
        memory_gib=fields.number("memory_gib", low=0),
    )


def _versions(fields: Fields) -> dict[str, str]:
    for name in ("python", "torch", "fairtrial"):
        fields.value(name)
    return {name: fields.text(name) for name in fields.table}


def _findings(fields: Fields) -> tuple[Finding, ...]:
    findings: dict[str, Finding] = {}
    for inner in fields.inner_array("findings"):
        finding = _finding(inner)
        if finding.claim in findings:
            raise inner.refused("claim", finding.claim, "unique within the file")
        findings[finding.claim] = finding
    if not findings:
        raise fields.error("findings", "must hold at least one finding")
    return tuple(findings.values())


def _finding(fields: Fields) -> Finding:
    fields.allow(_finding_fields)
    seeds = fields.array("seeds")
    numbered = Fields({f"seeds[{i}]": seed for i, seed in enumerate(seeds)}, fields.file, fields.place)
    return Finding(
        claim=fields.matching("claim", CLAIM_ID, "a claim's id"),
        verdict=fields.one_of("verdict", VERDICTS),
        criterion=fields.text("criterion"),
        seeds=tuple(numbered.whole(name, 0, 2**64 - 1) for name in numbered.table),
        note=fields.text("note", empty=True),
        measurements=tuple(_measurement(inner) for inner in fields.inner_array("measurements")),
    )


def _measurement(fields: Fields) -> Measurement:
    fields.allow(_measurement_fields)
    low, high = fields.number_or_null("low"), fields.number_or_null("high")
    if (math.inf if high is None else high) < (-math.inf if low is None else low):
        raise fields.refused("high", high, f"at least low, {low}")
    return Measurement(
        name=fields.text("name"),
        value=fields.number_or_null("value"),
        low=low,
        high=high,
        unit=fields.text("unit", empty=True),
        paper=fields.text("paper", empty=True),
    )
