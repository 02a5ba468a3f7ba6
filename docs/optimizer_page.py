"""The page that helps choosing an optimizer: what the evidence on record says of quality, step time and memory.

Evidence names a measurement by its quantity and then by what it was measured of: 'test accuracy, AdamP'. Quantities
that two or more share make a picture; what is known of a step's time and of memory is shown even where it stands alone.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from markupsafe import Markup

from fairtrial.catalog import Catalogue, Finding, Measurement
from fairtrial.methods.registry import Entry, index
from fairtrial.report.axes import Axis, padded, tick_text
from fairtrial.report.frames import bottom_ticks
from fairtrial.report.svg import element, line, picture, shortened, text
from layout import filled
from paper_pages import STANDINGS, short_title

ADDRESS = "papers/which_optimizer.md"
FAMILY = "optimizers"
BASELINES = ("AdamW", "Adam", "SGD")

Kind = Literal["quality", "step time", "memory"]

_KINDS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("step time", re.compile(r"^step( time)?\b(?! size)")),
    ("memory", re.compile(r"\bstates?\b|\bbytes of\b|\bmemory\b")),
    ("quality", re.compile(r"\b(accuracy|loss|perplexity)\b")),
)
_difference = re.compile(r"\b(above|less|gain)\b")


@dataclass
class Figure:
    """A quantity, measured of several optimizers in one way.

    Attributes:
        paper: whose claims it was measured for.
        kind: what it says something about.
        quantity: as the evidence names it.
        unit: what it counts.
        findings: on the claims.
        measured: by what they are of, in the order of the evidence.
    """

    paper: str
    kind: Kind
    quantity: str
    unit: str
    findings: list[Finding] = field(default_factory=list)
    measured: dict[str, Measurement] = field(default_factory=dict)

    @property
    def more_is_better(self) -> bool:
        return "accuracy" in self.quantity or bool(_difference.search(self.quantity))

    @property
    def seeds(self) -> int:
        return max(len(finding.seeds) for finding in self.findings)


def pages(catalogue: Catalogue) -> dict[str, str]:
    """Markdown by address."""
    found = figures(catalogue)
    return {ADDRESS: page(catalogue, found)}


def page(catalogue: Catalogue, found: Sequence[Figure]) -> str:
    entries = [entry for entry in index() if entry.slot == "optimizer"]
    return filled(
        "which_optimizer.md.j2",
        catalogue=catalogue,
        short_title=short_title,
        chart=chart,
        counts={entry.paper: _counts(catalogue, entry.paper) for entry in entries},
        optimizers=[(entry, list(standings(entry, found))) for entry in entries],
        kinds=[(kind, [figure for figure in found if figure.kind == kind]) for kind in get_args(Kind)],
    )


def figures(catalogue: Catalogue) -> list[Figure]:
    """What the evidence on papers of the family, or with an optimizer, holds, in the order of the catalogue."""
    with_one = {entry.paper for entry in index() if entry.slot == "optimizer"}
    found: list[Figure] = []
    for slug in catalogue:
        evidence = catalogue.evidence(slug) if catalogue[slug].family == FAMILY or slug in with_one else None
        own: list[Figure] = []
        for finding in evidence.findings if evidence else ():
            for (kind, quantity, unit), measured in _by_quantity(finding.measurements).items():
                alike = [figure for figure in own if (figure.quantity, figure.unit) == (quantity, unit)]
                figure = next((figure for figure in alike if _same(figure.measured, measured)), None)
                if figure is None:
                    figure = Figure(slug, kind, quantity, unit)
                    own.append(figure)
                figure.findings.append(finding)
                figure.measured |= measured
        found += [figure for figure in own if figure.kind != "quality" or len(figure.measured) > 1]
    return found


def _by_quantity(measurements: Iterable[Measurement]) -> dict[tuple[Kind, str, str], dict[str, Measurement]]:
    """Those of a kind that have a value, by what they are of; differences in quality are left out."""
    found: dict[tuple[Kind, str, str], dict[str, Measurement]] = {}
    for measurement in measurements:
        quantity, _, whose = measurement.name.partition(", ")
        kind = next((kind for kind, pattern in _KINDS if pattern.search(quantity)), None)
        if kind is None or measurement.value is None:
            continue
        if kind == "quality" and (not whose or _difference.search(measurement.name)):
            continue
        named = (quantity, whose) if whose else (kind, quantity)
        found.setdefault((kind, named[0], measurement.unit), {})[named[1]] = measurement
    return found


def _same(known: Mapping[str, Measurement], new: Mapping[str, Measurement]) -> bool:
    """Whether both hold the same runs of something, and nothing that contradicts it."""
    shared = known.keys() & new.keys()
    ends = [[(m.value, m.low, m.high) for m in (known[whose], new[whose])] for whose in shared]
    return bool(ends) and all(a == b for a, b in ends)


def _counts(catalogue: Catalogue, slug: str) -> str:
    found = Counter[str](standing.verdict for standing in catalogue.claims(slug))
    return ", ".join(f"{found[standing]} {standing}" for standing in STANDINGS if found[standing])


def standings(entry: Entry, found: Sequence[Figure]) -> Iterator[str]:
    """Of an optimizer, each quality that was measured, beside those of baselines measured alike."""
    for figure in found:
        for whose, measurement in figure.measured.items() if figure.kind == "quality" else ():
            name, _, where = whose.partition(", ")
            if name == entry.name:
                others = {base: figure.measured.get(f"{base}, {where}" if where else base) for base in BASELINES}
                known = [f"{base} {_number(other)}" for base, other in others.items() if other]
                own = f"{figure.quantity} {_number(measurement)}{f' ({where})' if where else ''}"
                yield ", ".join([own, *known])


def _number(measurement: Measurement) -> str:
    return f"{measurement.value:.4g}"


# Pictures ----------------------------------------------------------------------------------------------------------

WIDTH, LEFT, RIGHT, ROW = 700, 250, 545, 26


def chart(figure: Figure) -> Markup:
    """A line for each that it was measured of: the mean with its interval, where it has one."""
    ends = [v for m in figure.measured.values() for v in (m.low, m.value, m.high) if v is not None]
    if figure.kind != "quality":
        ends.append(0.0)  # what costs are seen from
    axis = Axis(*padded(min(ends), max(ends)), LEFT, RIGHT)
    bottom = 24 + ROW * len(figure.measured)
    pieces = [*bottom_ticks(axis, 18, bottom, 5, tick_text)]
    if len(figure.measured) > 1:
        hint, at, anchor = ("better →", RIGHT, "end") if figure.more_is_better else ("← better", LEFT, "start")
        pieces.append(text(at, 12, hint, "hint", anchor))
    names = {entry.name for entry in index() if entry.slot == "optimizer"}
    for place, (whose, measurement) in enumerate(figure.measured.items()):
        own = whose.partition(", ")[0] in names
        pieces.append(_row(whose, measurement, axis, 18 + ROW * (place + 0.5), "own" if own else "other"))
    unit = f" ({figure.unit})" if figure.unit else ""
    pieces.append(text((LEFT + RIGHT) / 2, bottom + 36, shortened(f"{figure.quantity}{unit}", 60), "label", "middle"))
    told = "; ".join(f"{whose}: {_with_interval(measurement)}" for whose, measurement in figure.measured.items())
    return picture(WIDTH, bottom + 44, f"{figure.quantity}{unit}", told, *pieces, class_="measured")


def _row(whose: str, measurement: Measurement, axis: Axis, y: float, class_: str) -> Markup:
    assert measurement.value is not None
    low, high = (measurement.value if end is None else end for end in (measurement.low, measurement.high))
    return element(
        "g",
        element("title", f"{whose}: {_with_interval(measurement)}"),
        text(LEFT - 12, y + 4, shortened(whose, 36), "name", "end"),
        line(axis(low), y, axis(high), y, "interval"),
        element("circle", cx=axis(measurement.value), cy=y, r=4.5, class_="mean"),
        text(RIGHT + 12, y + 4, _with_interval(measurement), "figures"),
        class_=class_,
    )


def _with_interval(measurement: Measurement) -> str:
    if measurement.low is None or measurement.high is None:
        return _number(measurement)
    return f"{_number(measurement)} [{measurement.low:.4g}, {measurement.high:.4g}]"
