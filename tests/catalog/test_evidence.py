import json
import math
import re
from copy import deepcopy
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fuzzing import fuzz

from fairtrial.catalog import VERDICTS, CatalogError, Evidence, Finding, Machine, Measurement, evidence

TABLE: dict[str, Any] = {
    "schema": 1,
    "paper": "toy_loss",
    "date": "2026-11-22",
    "fingerprint": "0123456789abcdef",
    "seconds": 12.5,
    "machine": {"class": "x86-64 virtual machine", "cpus": 2, "memory_gib": 24.0},
    "versions": {"fairtrial": "0.1.0", "python": "3.11.7", "torch": "2.9.0"},
    "findings": [
        {
            "claim": "is-fast",
            "verdict": "reproduced",
            "criterion": "more than 10 times",
            "seeds": [0, 1, 2],
            "note": "",
            "measurements": [
                {"name": "ratio", "value": 12.0, "low": 11.0, "high": 13.5, "unit": "×", "paper": "40"},
                {"name": "loss", "value": None, "low": None, "high": None, "unit": "", "paper": ""},
            ],
        }
    ],
}
EVIDENCE = Evidence(
    paper="toy_loss",
    date=date(2026, 11, 22),
    fingerprint="0123456789abcdef",
    seconds=12.5,
    machine=Machine("x86-64 virtual machine", cpus=2, memory_gib=24.0),
    versions={"python": "3.11.7", "torch": "2.9.0", "fairtrial": "0.1.0"},
    findings=(
        Finding(
            claim="is-fast",
            verdict="reproduced",
            criterion="more than 10 times",
            seeds=(0, 1, 2),
            measurements=(Measurement("ratio", 12.0, 11.0, 13.5, "×", "40"), Measurement("loss", None)),
        ),
    ),
)


def changed(place: str, value: Any) -> dict[str, Any]:
    """The table with another value at a place as messages name it; `...` removes the field."""
    table = deepcopy(TABLE)
    *way, last = [int(step) if step.isdigit() else step for step in re.findall(r"\w+", place)]
    at: Any = table
    for step in way:
        at = at[step]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return table


def parse(table: Any) -> Evidence:
    return evidence.parse(json.dumps(table), "toy_loss.json")


def test_parse():
    assert parse(TABLE) == EVIDENCE


def test_write(tmp_path: Path):
    path = tmp_path / "evidence" / "toy_loss.json"
    evidence.write(EVIDENCE, path)
    text = path.read_text(encoding="utf-8")
    assert text == json.dumps(TABLE, indent=2, ensure_ascii=False) + "\n"
    assert evidence.read(path) == EVIDENCE
    assert list(path.parent.iterdir()) == [path]
    evidence.write(evidence.read(path), path)
    assert path.read_text(encoding="utf-8") == text


def test_load(tmp_path: Path):
    assert evidence.load(tmp_path / "nowhere") == {}
    evidence.write(EVIDENCE, tmp_path / "toy_loss.json")
    (tmp_path / ".toy_loss.json.123").write_text("{")  # left by a process that was killed
    assert evidence.load(tmp_path) == {"toy_loss": EVIDENCE}


def test_numbers_of_numpy_are_numbers(tmp_path: Path):
    measured = Measurement("ratio", np.float32(0.5), np.float64(0.25), np.int64(1))
    finding = replace(EVIDENCE.findings[0], seeds=tuple(np.arange(3)), measurements=(measured,))
    evidence.write(replace(EVIDENCE, findings=(finding,)), tmp_path / "toy_loss.json")
    (read,) = evidence.read(tmp_path / "toy_loss.json").findings
    assert (read.seeds, read.measurements) == ((0, 1, 2), (Measurement("ratio", 0.5, 0.25, 1.0),))


@pytest.mark.parametrize(
    ("unfit", "field"),
    [
        (replace(EVIDENCE, paper="joy_loss"), "paper"),
        (replace(EVIDENCE, seconds=math.nan), "seconds"),
        (
            replace(EVIDENCE, findings=(replace(EVIDENCE.findings[0], measurements=(Measurement("a", math.inf),)),)),
            "value",
        ),
        (replace(EVIDENCE, versions={"python": "3.11.7"}), "versions.torch"),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path: Path, unfit: Evidence, field: str):
    path = tmp_path / "toy_loss.json"
    evidence.write(EVIDENCE, path)
    with pytest.raises(CatalogError, match=f"^toy_loss.json: .*{field}"):
        evidence.write(unfit, path)
    assert evidence.read(path) == EVIDENCE
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "toy_loss.json"
    evidence.write(EVIDENCE, path)

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        evidence.write(replace(EVIDENCE, seconds=1.0), path)
    assert evidence.read(path) == EVIDENCE
    assert list(tmp_path.iterdir()) == [path]


finding, measurement = "findings[0].", "findings[0].measurements[0]."


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("schema", 2, "schema must be 1, the one this version of fairtrial reads, got 2"),
        ("schema", ..., "schema is missing"),
        ("paper", "joy_loss", "paper must be the file's name, 'toy_loss', got 'joy_loss'"),
        ("paper", "../toy_loss", "paper must be a paper's slug, got '../toy_loss'"),
        ("date", "22.11.2026", "date must be a date, as '2026-11-22', got '22.11.2026'"),
        ("date", "2026-02-30", "date must be a date"),
        ("date", 20261122, "date must be a date"),
        ("fingerprint", "0123456789ABCDEF", "fingerprint must be 16 hexadecimal digits in lower case"),
        ("seconds", -1, "seconds must be a finite number, at least 0, got -1"),
        ("seconds", "12", "seconds must be a finite number, at least 0, got '12'"),
        ("machine", None, "machine must be a table, got null"),
        ("machine.class", "", "machine.class must be a text that is not empty, got ''"),
        ("machine.cpus", 0, "machine.cpus must be a whole number"),
        ("machine.gpus", 1, "unknown field machine.'gpus'; did you mean cpus?"),
        ("versions.torch", ..., "versions.torch is missing"),
        ("versions.torch", 2.9, "versions.torch must be a text"),
        ("finding", [], "unknown field 'finding'; did you mean findings"),
        ("findings", [], "findings must hold at least one finding"),
        ("findings", TABLE["findings"] * 2, "findings[1].claim must be unique within the file, got 'is-fast'"),
        (f"{finding}claim", "Is fast", f"{finding}claim must be a claim's id"),
        (f"{finding}verdict", "true", f"{finding}verdict must be one of 'reproduced', 'partly', "),
        (f"{finding}criterion", " ", f"{finding}criterion must be a text that is not empty, got ' '"),
        (f"{finding}seeds", 3, f"{finding}seeds must be an array, got 3"),
        (f"{finding}seeds", [0, True], f"{finding}seeds[1] must be a whole number"),
        (f"{finding}seeds", [0.5], f"{finding}seeds[0] must be a whole number"),
        (f"{finding}note", None, f"{finding}note must be a text, got null"),
        (f"{finding}measurements", {}, f"{finding}measurements must be an array, got a table"),
        (f"{measurement}name", "", f"{measurement}name must be a text that is not empty"),
        (f"{measurement}value", "12", f"{measurement}value must be a finite number, got '12'"),
        (f"{measurement}value", 10**400, f"{measurement}value must be a finite number, got a huge number"),
        (f"{measurement}value", ..., f"{measurement}value is missing"),
        (f"{measurement}high", 1.0, f"{measurement}high must be at least low, 11.0, got 1.0"),
        (f"{measurement}paper", 40, f"{measurement}paper must be a text, got 40"),
    ],
)
def test_damaged_fields(place: str, value: Any, message: str):
    with pytest.raises(CatalogError, match="^" + re.escape(f"toy_loss.json: {message}")):
        parse(changed(place, value))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", json.dumps(TABLE)[:-1], "[" * 100_000, "9" * 5000, json.dumps(TABLE).replace("12.5", "NaN")],
)
def test_damaged_files(text: str):
    with pytest.raises(CatalogError, match="^toy_loss.json: "):
        evidence.parse(text, "toy_loss.json")


def test_bytes_that_are_no_text(tmp_path: Path):
    (tmp_path / "toy_loss.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CatalogError, match="^toy_loss.json: not UTF-8"):
        evidence.load(tmp_path)


texts = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=20)
names = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=20)
claim_ids = st.from_regex(r"[a-z0-9]+(-[a-z0-9]+)*", fullmatch=True)
numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def measurements(draw: st.DrawFn) -> Measurement:
    low, high = draw(numbers), draw(numbers)
    if low is not None and high is not None:
        low, high = sorted((low, high))
    return Measurement(draw(names), draw(numbers), low, high, draw(texts), draw(texts))


findings = st.builds(
    Finding,
    claim=claim_ids,
    verdict=st.sampled_from(VERDICTS),
    criterion=names,
    seeds=st.lists(st.integers(0, 2**64 - 1), max_size=4).map(tuple),
    note=texts,
    measurements=st.lists(measurements(), max_size=3).map(tuple),
)
recorded = st.builds(
    Evidence,
    paper=st.just("toy_loss"),
    date=st.dates(),
    fingerprint=st.from_regex(r"[0-9a-f]{16}", fullmatch=True),
    seconds=st.floats(0, 1e9),
    machine=st.builds(Machine, names, st.integers(1, 999), st.floats(0, 1e6)),
    versions=st.fixed_dictionaries({"python": names, "torch": names, "fairtrial": names, "transformers": names}),
    findings=st.lists(findings, min_size=1, max_size=3, unique_by=lambda finding: finding.claim).map(tuple),
)


@fuzz(50)
@given(recorded)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, evidence_: Evidence):
    path = tmp_path_factory.getbasetemp() / "toy_loss.json"
    evidence.write(evidence_, path)
    assert evidence.read(path) == evidence_


def places(value: Any, here: str = "") -> list[str]:
    """Every place of a table, as messages name it."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    named = [(f"{here}[{key}]" if isinstance(key, int) else f"{here}.{key}".lstrip("."), each) for key, each in inner]
    return [place for name, each in named for place in (name, *places(each, name))]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@fuzz(300)
@given(st.sampled_from(places(TABLE)), json_values | st.just(...))
def test_any_damage_is_refused_or_harmless(place: str, value: Any):
    table = changed(place, value)
    refusal, read = "", EVIDENCE
    try:
        read = parse(table)
    except CatalogError as error:
        refusal = str(error)
    spaced = isinstance(value, str) and changed(place, " ".join(value.split())) == TABLE
    harmless = table == TABLE or spaced or place in ("findings[0].note", "versions")
    assert refusal.startswith("toy_loss.json: ") or harmless or read != EVIDENCE
