"""Pages made from the catalogue: one for every paper, a list of them all, and a count of what held up.

What a page says comes from the record, the recorded evidence, and the docstrings of the method's and the claims' files;
how it is laid out stands in `templates/`.
"""

import ast
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from fairtrial import tasks
from fairtrial.catalog import FAMILIES, STATUSES, VERDICTS, Catalogue, Measurement, Paper
from fairtrial.claims.code import code_of
from fairtrial.contract import Task
from fairtrial.methods.registry import Categorical, Entry, Integer, LogUniform, Space, Uniform, addresses, index
from fairtrial.report.wording import ranges
from fairtrial.trial.fingerprint import ROOT
from layout import filled, plain, table

STANDINGS: tuple[str, ...] = (*VERDICTS, "not checked")  # where a claim may stand
MEASURED = ("reproduced", "partly", "not reproduced")
WORDS = {
    "STANDINGS": STANDINGS,
    "MEASURED": MEASURED,
    "STATUSES": {
        "listed": "the catalogue knows what it claims; its methods are not here yet",
        "available": "its methods are here",
        "checked": "its methods are here, and every claim that can be tested here has been measured",
    },
    "DEFINITIONS": {
        "verified": "What the method does was verified in the paper or its code.",
        "partly": "What the method does was verified in part; the rest is from memory.",
        "memory": "What the method does is from memory and not verified in the paper.",
    },
    "FIGURE_SOURCES": {
        "abstract": "in its abstract",
        "paper": "in its text",
        "code": "in its code",
        "summary": "in a summary of it",
        "memory": "from memory",
        "unverified": "not verified",
    },
}


def load() -> Catalogue:
    """The catalogue with all that is here: methods, evidence, and whether that is stale."""
    return Catalogue.load(addresses(), code_of)


@cache
def _methods() -> dict[str, list[Entry]]:
    by_paper: dict[str, list[Entry]] = {}
    for entry in index():
        by_paper.setdefault(entry.paper, []).append(entry)
    return by_paper


def pages(catalogue: Catalogue) -> dict[str, str]:
    """Markdown by address."""
    made = {"papers/index.md": index_page(catalogue), "papers/verdicts.md": verdict_page(catalogue)}
    return made | {f"papers/{slug}.md": paper_page(catalogue, slug) for slug in catalogue}


def paper_page(catalogue: Catalogue, slug: str) -> str:
    """What it is, how to use it, its claims beside the evidence, and how that was come by."""
    paper, methods, evidence = catalogue[slug], _methods().get(slug, []), catalogue.evidence(slug)
    return filled(
        "paper.md.j2",
        **WORDS,
        claim_title=claim_title,
        measured=measured,
        ranges=ranges,
        searched=searched,
        short_title=short_title,
        paper=paper,
        status=catalogue.status(slug),
        methods=methods,
        exports=catalogue.methods(slug),
        family=f"fairtrial.methods.{paper.family}",
        commands=comparisons(methods),
        claims=catalogue.claims(slug),
        evidence=evidence,
        stale=catalogue.stale(slug),
        setup=_docstring(ROOT / "claims" / paper.family / f"{slug}.py") if evidence else "",
        sources=[(path.relative_to(ROOT.parent), _docstring(path)) for path in _files(paper, methods)],
    )


def index_page(catalogue: Catalogue) -> str:
    """Every paper in a line, by family."""
    by_family = [(family, [p for p in catalogue.values() if p.family == family]) for family in FAMILIES]
    counts = Counter(map(catalogue.status, catalogue))

    def standings(paper: Paper) -> str:
        found = _standings(catalogue, paper)
        return ", ".join(f"{found[standing]} {standing}" for standing in STANDINGS if found[standing])

    return filled(
        "papers.md.j2",
        **WORDS,
        catalogue=catalogue,
        statuses=[(status, counts[status]) for status in reversed(STATUSES)],
        families=[(family, papers) for family, papers in by_family if papers],
        standings=standings,
    )


def verdict_page(catalogue: Catalogue) -> str:
    """How many claims were measured and what came of them, and each of these claims."""
    claims = [(paper, standing) for paper in catalogue.values() for standing in catalogue.claims(paper.slug)]
    found = Counter[str](standing.verdict for _, standing in claims)
    checked = [paper for paper in catalogue.values() if catalogue.evidence(paper.slug)]
    return filled(
        "verdicts.md.j2",
        **WORDS,
        short_title=short_title,
        claims=claims,
        counts={standing: found[standing] for standing in STANDINGS},
        measured=sum(found[verdict] for verdict in MEASURED),
        papers=[(paper, _standings(catalogue, paper)) for paper in checked],
    )


def _standings(catalogue: Catalogue, paper: Paper) -> Counter[str]:
    return Counter(standing.verdict for standing in catalogue.claims(paper.slug))


def comparisons(methods: Sequence[Entry]) -> list[str]:
    """Command lines; methods of one slot share one, on the first task that takes them and has another default."""
    found: dict[str, list[str]] = {}
    for entry in methods:
        slots = [(task.name, slot) for task in _tasks() for slot in task.slots.values()]
        others = [(task, slot) for task, slot in slots if entry.name != slot.default.name]
        taking = [(task, slot) for task, slot in others if entry.name in slot.options.names()]
        for task, slot in taking[:1]:
            found.setdefault(f"fairtrial compare {task} {slot.name}={slot.default}", []).append(entry.name)
    return [",".join([start, *names]) for start, names in found.items()]


@cache
def _tasks() -> list[Task]:
    return [tasks.load(name) for name in tasks.names()]


def _files(paper: Paper, methods: Sequence[Entry]) -> list[Path]:
    """Where the paper's methods stand: its own file, and others in which some are registered."""
    own = ROOT / "methods" / paper.family / f"{paper.slug}.py"
    return list(dict.fromkeys([*([own] if own.is_file() else []), *map(_file, methods)]))


def _file(entry: Entry) -> Path:
    return ROOT.joinpath(*entry.module.split(".")[1:]).with_suffix(".py")


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


# Wording -----------------------------------------------------------------------------------------------------------


def short_title(paper: Paper) -> str:
    """What stands before the colon of a title, if that is a name."""
    name, colon, _ = paper.title.partition(": ")
    return name if colon and len(name) <= 40 else paper.title


def claim_title(claim: str) -> str:
    """'Output layer cost' for the claim 'output-layer-cost'."""
    return claim.replace("-", " ").capitalize()


def searched(method: Entry) -> str:
    """The hyperparameters that a comparison tunes, and their ranges."""
    return ", ".join(f"`{name}` {_range(space)}" for name, space in method.load().search.items()) or "nothing"


def _range(space: Space) -> str:
    match space:
        case Uniform(low, high):
            return f"{low:g} to {high:g}"
        case LogUniform(low, high):
            return f"{low:g} to {high:g}, logarithmic"
        case Integer(low, high):
            return f"{low} to {high}, whole"
        case Categorical(options):
            return " or ".join(map(str, options))


def measured(measurements: Sequence[Measurement]) -> str:
    """A table, without the columns that nothing stands in."""
    columns = {
        "measured here": [plain(m.name) for m in measurements],
        "value": ["" if m.value is None else f"{m.value:.4g}" for m in measurements],
        "95 % interval": [_interval(m) for m in measurements],
        "unit": [plain(m.unit) for m in measurements],
        "in the paper": [plain(m.paper) for m in measurements],
    }
    used = {head: cells for head, cells in columns.items() if any(cells)}
    return table(list(used), zip(*used.values(), strict=True), right=["value"])


def _interval(m: Measurement) -> str:
    return (
        ""
        if m.low is None or m.high is None
        else plain(f"[{m.low:.4g}, {m.high:.4g}]").replace(" ", "\N{NO-BREAK SPACE}")
    )
