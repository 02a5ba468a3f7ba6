"""The papers: one TOML record each in `papers/`, read with every field checked."""

import re
import tomllib
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Literal, get_args

from .fields import CatalogError, Fields

Family = Literal[
    "losses",
    "optimizers",
    "schedules",
    "data",
    "layers",
    "adapters",
    "quantization",
    "kvcache",
    "decoding",
    "unlearning",
    "distillation",
    "alignment",
    "federated",
    "search",
    "diffusion",
    "interpretability",
    "robustness",
    "dynamics",
    "scaling",
    "decisions",
    "science",
    "systems",
]
Definition = Literal["verified", "partly", "memory"]
FigureSource = Literal["abstract", "paper", "code", "summary", "memory", "unverified"]

FAMILIES: tuple[Family, ...] = get_args(Family)
DEFINITIONS: tuple[Definition, ...] = get_args(Definition)
FIGURE_SOURCES: tuple[FigureSource, ...] = get_args(FigureSource)

PAPERS = Path(__file__).parent / "papers"

SLUG = re.compile(r"[a-z0-9]+(_[a-z0-9]+)*")
CLAIM_ID = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
ARXIV = re.compile(r"[0-9]{2}(0[1-9]|1[0-2])\.[0-9]{4,5}|[a-z-]+(\.[A-Z]{2})?/[0-9]{7}")
URL = re.compile(r"https?://[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)+(:[0-9]+)?(/[!#-;=?-~]*)?")


@dataclass(frozen=True)
class Claim:
    """A statement of a paper that a measurement here can bear out or not.

    Attributes:
        id: its name within the paper.
        statement: what the paper says, in our own words.
        figure: the paper's number for it.
        figure_source: where the number was read.
        protocol: how it is measured here, and what counts as reproduced; None if it cannot be.
        untestable: why it cannot be measured here; None if it can.
    """

    id: str
    statement: str
    figure: str
    figure_source: FigureSource
    protocol: str | None = None
    untestable: str | None = None

    @property
    def testable(self) -> bool:
        return self.untestable is None


@dataclass(frozen=True)
class Paper:
    """A catalogue record.

    Attributes:
        slug: the paper's one address: the name of its files.
        family: the folder of methods that it belongs to.
        title: as published.
        date: of the first version.
        authors: how many.
        summary: what it proposes, in our own words.
        definition: whether the method's definition was verified in the paper or its code, partly, or is from memory.
        claims: what it says that a measurement could bear out.
        arxiv: its id there.
        code: the authors' own.
    """

    slug: str
    family: Family
    title: str
    date: date
    authors: int
    summary: str
    definition: Definition
    claims: tuple[Claim, ...]
    arxiv: str | None = None
    code: str | None = None


_paper_fields = tuple(Paper.__dataclass_fields__)
_claim_fields = tuple(Claim.__dataclass_fields__)


def load(folder: Path = PAPERS) -> tuple[Paper, ...]:
    """All records, in order of slug."""
    return tuple(_read(path) for path in sorted(folder.glob("*.toml")))


def _read(path: Path) -> Paper:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CatalogError(f"{path.name}: not UTF-8: {error}") from None
    return parse(text, path.name)


def parse(text: str, file: str) -> Paper:
    """The paper that a record describes; `file` is the record's name, and must be the slug's."""
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # tomllib lets through int's own ValueError for endless digits
        raise CatalogError(f"{file}: not valid TOML: {error}") from None
    record = Fields(table, file)
    record.allow(_paper_fields)
    slug = record.matching("slug", SLUG, "in snake case, as 'z_loss'")
    if slug != Path(file).stem:
        raise record.refused("slug", slug, f"the file's name, {Path(file).stem!r}")
    return Paper(
        slug=slug,
        family=record.one_of("family", FAMILIES),
        title=record.text("title"),
        date=_date(record),
        authors=record.whole("authors", 1, 99_999),
        summary=record.text("summary"),
        definition=record.one_of("definition", DEFINITIONS),
        claims=_claims(record),
        arxiv=record.matching("arxiv", ARXIV, "an arXiv id without version, as '1604.08859'")
        if "arxiv" in table
        else None,
        code=record.matching("code", URL, "an http or https address") if "code" in table else None,
    )


def _date(record: Fields) -> date:
    value = record.value("date")
    if not isinstance(value, date) or isinstance(value, datetime):
        raise record.refused("date", value, "a date without time or quotes, as 2016-04-29")
    return value


def _claims(record: Fields) -> tuple[Claim, ...]:
    claims: dict[str, Claim] = {}
    for fields in record.inner_array("claims"):
        claim = _claim(fields)
        if claim.id in claims:
            raise fields.refused("id", claim.id, "unique within the paper")
        claims[claim.id] = claim
    if not claims:
        raise record.error("claims", "must hold at least one claim")
    return tuple(claims.values())


def _claim(fields: Fields) -> Claim:
    fields.allow(_claim_fields)
    if ("protocol" in fields.table) == ("untestable" in fields.table):
        found = "both" if "protocol" in fields.table else "neither"
        raise fields.error("protocol", f"or untestable must be given, exactly one of them, got {found}")
    return Claim(
        id=fields.matching("id", CLAIM_ID, "in kebab case, as 'output-layer-cost'"),
        statement=fields.text("statement"),
        figure=fields.text("figure"),
        figure_source=fields.one_of("figure_source", FIGURE_SOURCES),
        protocol=fields.text("protocol") if "protocol" in fields.table else None,
        untestable=fields.text("untestable") if "untestable" in fields.table else None,
    )
