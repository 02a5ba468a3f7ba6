import json
import re
import tomllib
from datetime import date, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fuzzing import fuzz

from fairtrial.catalog import FAMILIES, CatalogError, Claim, Paper, records

RECORD = """\
slug = "toy_loss"
family = "losses"
title = "Toy  Loss"
arxiv = "1604.08859"
date = 2016-04-29
authors = 2
code = "https://github.com/someone/toy-loss"
summary = \"\"\"
A loss
of two lines.\"\"\"
definition = "verified"

[[claims]]
id = "is-fast"
statement = "It is fast."
figure = "40 times"
figure_source = "abstract"
protocol = "Time it."

[[claims]]
id = "scales"
statement = "It scales."
figure = "1e9 classes"
figure_source = "unverified"
untestable = "needs 1e9 classes"
"""


def parse(text: str) -> Paper:
    return records.parse(text, "toy_loss.toml")


def test_record():
    assert parse(RECORD) == Paper(
        slug="toy_loss",
        family="losses",
        title="Toy Loss",
        date=date(2016, 4, 29),
        authors=2,
        summary="A loss of two lines.",
        definition="verified",
        claims=(
            Claim("is-fast", "It is fast.", "40 times", "abstract", protocol="Time it."),
            Claim("scales", "It scales.", "1e9 classes", "unverified", untestable="needs 1e9 classes"),
        ),
        arxiv="1604.08859",
        code="https://github.com/someone/toy-loss",
    )


def test_testable():
    assert [claim.testable for claim in parse(RECORD).claims] == [True, False]


@pytest.mark.parametrize("field", ["arxiv", "code"])
def test_optional_fields(field: str):
    assert getattr(parse(re.sub(f"{field} = .*\n", "", RECORD)), field) is None


@pytest.mark.parametrize(
    "field", ["slug", "family", "title", "date", "authors", "definition", "id", "statement", "figure", "figure_source"]
)
def test_missing_fields(field: str):
    with pytest.raises(CatalogError, match=rf"^toy_loss.toml: (claims\[0\]\.)?{field} is missing$"):
        parse(re.sub(f"^{field} = .*\n", "", RECORD, flags=re.MULTILINE))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('slug = "toy_loss"', 'slug = "toy-loss"', "slug must be in snake case, as 'z_loss', got 'toy-loss'"),
        ('slug = "toy_loss"', 'slug = "joy_loss"', "slug must be the file's name, 'toy_loss', got 'joy_loss'"),
        ('family = "losses"', 'family = "loss"', "family must be one of 'losses', .*, got 'loss'"),
        ('family = "losses"', "family = []", "family must be one of .*, got an array of 0"),
        ("Toy  Loss", " \\t", r"title must be a text that is not empty, got ' \\t'"),
        ("Toy  Loss", "Toy\\u0000Loss", "title must be a text that is not empty, without control characters"),
        ('title = "Toy  Loss"', "title.toy = 1", "title must be a text that is not empty, got a table"),
        ("2016-04-29", '"2016-04-29"', "date must be a date without time or quotes, as 2016-04-29, got '2016-04-29'"),
        ("2016-04-29", "2016-04-29T10:00:00", "date must be a date .*, got 2016-04-29 10:00:00"),
        ("2016-04-29", "10:00:00", "date must be a date .*, got 10:00:00"),
        ("2016-04-29", "2016-02-30", "not valid TOML"),
        ("authors = 2", "authors = 0", "authors must be a whole number from 1 to .*, got 0"),
        ("authors = 2", "authors = true", "authors must be a whole number .*, got True"),
        ("authors = 2", "authors = 2.0", "authors must be a whole number .*, got 2.0"),
        ("authors = 2", f"authors = 0x{'f' * 9999}", "authors must be a whole number .*, got a huge number"),
        ("authors = 2", f"authors = {'9' * 9999}", "not valid TOML"),
        ("authors = 2", f"authors = {'[' * 9999}", "not valid TOML"),
        ("authors = 2", "author = 2", "unknown field 'author'; did you mean authors?"),
        ("authors = 2", f"authors{'.a' * 2000} = 2", "authors must be a whole number .*, got a table"),
        ("verified", "guessed", "definition must be one of 'verified', 'partly', 'memory', got 'guessed'"),
        (
            "1604.08859",
            "1604.08859v2",
            "arxiv must be an arXiv id without version, as '1604.08859', got '1604.08859v2'",
        ),
        ("1604.08859", "1613.08859", "arxiv must be"),
        ("https://", "ftp://", "code must be an http or https address, got 'ftp://github.com"),
        ("https://", "javascript:", "code must be an http or https address"),
        ("someone/toy", 'some\\"one/toy', "code must be an http or https address"),
        ('"scales"', '"is-fast"', r"claims\[1\].id must be unique within the paper, got 'is-fast'"),
        ('"scales"', '"It scales"', r"claims\[1\].id must be in kebab case"),
        ("unverified", "rumour", r"claims\[1\].figure_source must be one of .*, got 'rumour'"),
        ("untestable", "untestible", r"unknown field claims\[1\].'untestible'; did you mean untestable?"),
        ("untestable = ", 'protocol = "-"\nuntestable = ', r"claims\[1\].protocol or untestable .*, got both"),
        ('protocol = "Time it."', "", r"claims\[0\].protocol or untestable .*, got neither"),
        (RECORD[RECORD.index("[[claims]]") :], "claims = []", "claims must hold at least one claim"),
        (RECORD[RECORD.index("[[claims]]") :], "claims = 3", "claims must be an array, got 3"),
        (RECORD[RECORD.index("[[claims]]") :], "claims = [3]", r"claims\[0\] must be a table, got 3"),
        (RECORD[RECORD.index("[[claims]]") :], "", "claims is missing"),
    ],
)
def test_refused_fields(old: str, new: str, message: str):
    assert RECORD.count(old) >= 1
    with pytest.raises(CatalogError, match=f"^toy_loss.toml: {message}") as refusal:
        parse(RECORD.replace(old, new, 1))
    assert len(str(refusal.value)) < 500


@pytest.mark.parametrize("arxiv", ["1312.6120", "2403.03507", "cs/0102003", "cs.LG/0102003", "cond-mat/9901001"])
def test_arxiv_ids(arxiv: str):
    assert parse(RECORD.replace("1604.08859", arxiv)).arxiv == arxiv


def test_load(tmp_path: Path):
    (tmp_path / "toy_loss.toml").write_text(RECORD)
    (tmp_path / "a_loss.toml").write_text(RECORD.replace('"toy_loss"', '"a_loss"'))
    (tmp_path / "notes.txt").write_text("no record")
    assert [paper.slug for paper in records.load(tmp_path)] == ["a_loss", "toy_loss"]


def test_bytes_that_are_no_text(tmp_path: Path):
    (tmp_path / "toy_loss.toml").write_bytes(RECORD.encode() + b"# caf\xe9")
    with pytest.raises(CatalogError, match="^toy_loss.toml: not UTF-8"):
        records.load(tmp_path)


def matches(paper: Paper, text: str) -> bool:
    """Whether a paper says what its record says, read by other means."""
    table = tomllib.loads(text)
    said = [table, *table["claims"]]
    read = [vars(paper), *map(vars, paper.claims)]
    return len(said) == len(read) and all(
        type(value) is type(fields[name])
        and (" ".join(value.split()) if isinstance(value, str) else value) == fields[name]
        for table, fields in zip(said, read, strict=True)
        for name, value in table.items()
        if name != "claims"
    )


def parse_or_refuse(text: str) -> None:
    """Refuse with the file's name, or read what the record says; no other exception."""
    refusal, paper = "", None
    try:
        paper = parse(text)
    except CatalogError as error:
        refusal = str(error)
    assert (paper and matches(paper, text) and repr(paper)) or refusal.startswith("toy_loss.toml: ")


anything = st.text(st.characters(codec=None), max_size=60)
syntax = ['"', '"""', "'", "\n", "=", "[", "]", "[[", "]]", "{", "}", ",", ".", "#", "\\", "\\u0000", "\\uD800", "\r\n"]
pieces = ["[[claims]]", "[claims]", "claims = []", "slug", "date = ", "1979-05-27T07:32:00Z", "07:32:00", "nan", "-inf"]
extremes = [
    "true",
    "0xff",
    "1_000",
    "1e400",
    "9" * 5000,
    "[" * 3000,
    "a." * 999,
    "\ud800",
    "\ufeff",
    "\x00",
    "\u202e",
    "🙂",
]
fragments = st.sampled_from(syntax + pieces + extremes)


@fuzz(100)
@given(anything)
def test_random_text(text: str):
    parse_or_refuse(text)


@fuzz(400)
@given(st.data())
def test_mutated_records(data: st.DataObject):
    text = RECORD
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        stop = min(len(text), start + data.draw(st.integers(0, 30)))
        text = text[:start] + data.draw(fragments | anything) + text[stop:]
    parse_or_refuse(text)


values = st.one_of(
    st.text(max_size=20).map(lambda text: json.dumps(text, ensure_ascii=False)),
    st.integers().map(str),
    st.floats().map(repr),
    st.booleans().map(lambda truth: str(truth).lower()),
    st.dates(date(1, 1, 1)).map(str),
    st.times().map(lambda time: time.isoformat("seconds")),
    st.datetimes().map(lambda moment: moment.isoformat("T", "seconds")),
    st.sampled_from(["[]", "{}", "[[]]", "{a = 1}", '["a"]', "[{}]"]),
)
lines = [line for line in RECORD.splitlines() if " = " in line and '"""' not in line]


@fuzz(400)
@given(st.lists(st.sampled_from(lines), max_size=3), values)
def test_mistyped_values(changed: list[str], value: str):
    text = RECORD
    for line in changed:
        text = text.replace(line, f"{line.partition(' = ')[0]} = {value}")
    parse_or_refuse(text)


class TestShipped:
    def test_number(self, shipped):
        assert len(shipped) == 190
        assert {path.stem for path in records.PAPERS.iterdir()} == set(shipped)

    def test_families(self, shipped):
        assert {paper.family for paper in shipped.values()} == set(FAMILIES)
        assert len(FAMILIES) == 22

    def test_no_paper_twice(self, shipped):
        for papers_own in (lambda paper: paper.arxiv or paper.slug, lambda paper: paper.title.casefold()):
            assert len({papers_own(paper) for paper in shipped.values()}) == len(shipped)

    def test_titles(self, shipped):
        for paper in shipped.values():
            assert 10 <= len(paper.title) <= 200, paper.slug
            assert not paper.title.endswith((".", ",", ":")), paper.slug
            assert not paper.title.split()[0].islower(), paper.slug  # 'xKV' is a name

    def test_dates(self, shipped):
        for paper in shipped.values():
            assert date(1990, 1, 1) <= paper.date <= date.today(), paper.slug
            if re.match("[0-9]{4}[.]", paper.arxiv or ""):
                month = date(2000 + int(paper.arxiv[:2]), int(paper.arxiv[2:4]), 1)
                # Ids are given out when a paper is announced, a few days after it was sent in.
                assert month - timedelta(days=7) <= paper.date <= month + timedelta(days=31), paper.slug

    def test_authors(self, shipped):
        for paper in shipped.values():
            assert 1 <= paper.authors <= 100, paper.slug

    def test_texts(self, shipped):
        for paper in shipped.values():
            assert 60 <= len(paper.summary) <= 1000, paper.slug
            for claim in paper.claims:
                for text in (claim.statement, claim.protocol or claim.untestable):
                    assert len(text) >= 10, (paper.slug, claim.id)
