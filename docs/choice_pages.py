"""Pages that help choosing a method: what the evidence on record says of quality, time and memory.

Evidence names a measurement by its quantity and then by what it was measured of: 'test accuracy, AdamP'. Quantities
that two or more share make a picture; what is known of time and of memory is shown even where it stands alone. Where a
paper's evidence has quality and memory of the same arms, one stands against the other in a picture more.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from fairtrial.catalog import Catalogue, Finding, Measurement
from fairtrial.methods.registry import Entry, index
from fairtrial.report.axes import Axis, better_on_log, padded, tick_text
from fairtrial.report.frames import bottom_ticks, frame
from fairtrial.report.svg import element, line, picture, shortened, text
from layout import filled
from paper_pages import STANDINGS, short_title

# "loss above the whole cache's" is a quality of what it was measured of, and no difference between two
_difference = re.compile(r"\b(above(?! [\w ]+'s(?:,|$))|less|gain|fall)\b")


@dataclass(frozen=True)
class Guide:
    """A page on one choice.

    Attributes:
        address: of the page.
        title: the question that it answers.
        about: what it shows, in a sentence.
        family: of the papers.
        slot: that the methods take.
        baselines: what stands beside a method where it was measured alike.
        kinds: patterns by which a quantity is recognised, in the order in which they are tried.
        order: of the kinds on the page.
    """

    address: str
    title: str
    about: str
    family: str
    slot: str
    baselines: tuple[str, ...]
    kinds: Mapping[str, re.Pattern[str]]
    order: tuple[str, ...] = ("quality", "step time", "memory")

    def entries(self) -> list[Entry]:
        return [entry for entry in index() if entry.slot == self.slot]

    def kind_of(self, quantity: str) -> str | None:
        return next((kind for kind, pattern in self.kinds.items() if pattern.search(quantity)), None)


OPTIMIZERS = Guide(
    "papers/which_optimizer.md",
    "Which optimizer?",
    "What was measured here of optimizers, and of what their papers set them against, on small networks.",
    "optimizers",
    "optimizer",
    ("AdamW", "Adam", "SGD"),
    {
        "step time": re.compile(r"^step( time)?\b(?! size)"),
        "memory": re.compile(r"\bstates?\b|\bbytes of\b|\bmemory\b"),
        "quality": re.compile(r"\b(accuracy|loss|perplexity)\b"),
    },
)
CACHES = Guide(
    "papers/smaller_cache.md",
    "A smaller cache",
    "What was measured here of caches of keys and values that keep less, on SmolLM2 and smaller language models.",
    "kvcache",
    "cache",
    ("DynamicCache", "full cache"),
    {
        "step time": re.compile(r"\btime\b|\bseconds\b|\bFLOPs\b"),
        "memory": re.compile(r"\b(bytes|bits of a number|memory|size of the cache|share kept|budget)\b"),
        "quality": re.compile(r"\b(perplexity|nats|NLL|error|recall|mass|accuracy|loss|found|cosine)\b"),
    },
)
BITS = Guide(
    "papers/fewer_bits.md",
    "Fewer bits",
    "What was measured here of weights and activations in fewer bits, on small models.",
    "quantization",
    "quantizer",
    ("RoundToNearest", "round to nearest", "float"),
    {
        "step time": re.compile(r"\btime\b|\bseconds\b"),
        "memory": re.compile(r"\bbits per weight\b|\baverage bits\b|\bbytes\b|\bmemory\b"),
        "quality": re.compile(r"\b(perplexity|nats|bits per byte|error|accuracy|loss|cosine|KL)\b"),
    },
)
GUIDES = OPTIMIZERS, CACHES, BITS


@dataclass
class Figure:
    """A quantity, measured of several optimizers in one way.

    Attributes:
        paper: whose claims it was measured for.
        kind: what it says something about: 'quality', 'step time' or 'memory'.
        quantity: as the evidence names it.
        unit: what it counts.
        findings: on the claims.
        measured: by what they are of, in the order of the evidence.
    """

    paper: str
    kind: str
    quantity: str
    unit: str
    findings: list[Finding] = field(default_factory=list)
    measured: dict[str, Measurement] = field(default_factory=dict)

    @property
    def more_is_better(self) -> bool:
        up = re.search(r"\b(accuracy|recall|mass|found|cosine)\b", self.quantity)
        return bool(up or _difference.search(self.quantity))

    @property
    def seeds(self) -> int:
        return max(len(finding.seeds) for finding in self.findings)


def pages(catalogue: Catalogue) -> dict[str, str]:
    """Markdown by address."""
    return {guide.address: page(catalogue, guide, figures(catalogue, guide)) for guide in GUIDES}


def page(catalogue: Catalogue, guide: Guide, found: Sequence[Figure]) -> str:
    entries = guide.entries()
    names = {name for entry in entries for name in called(catalogue, entry)}
    papers = [figure.paper for figure in found]
    return filled(
        "choice.md.j2",
        catalogue=catalogue,
        guide=guide,
        short_title=short_title,
        chart=lambda figure: chart(figure, names),
        tradeoffs=[(paper, pair) for paper in dict.fromkeys(papers) for pair in tradeoffs(found, paper)],
        tradeoff_chart=lambda pair: tradeoff_chart(pair[0], pair[1], names),
        counts={entry.paper: _counts(catalogue, entry.paper) for entry in entries},
        methods=[(entry, list(standings(called(catalogue, entry), found, guide.baselines))) for entry in entries],
        kinds=[(kind, [figure for figure in found if figure.kind == kind]) for kind in guide.order],
    )


def called(catalogue: Catalogue, entry: Entry) -> set[str]:
    """What evidence calls a method: by its own name, or by its paper's."""
    return {entry.name, short_title(catalogue[entry.paper])}


def figures(catalogue: Catalogue, guide: Guide) -> list[Figure]:
    """What the evidence on papers of the family, or with such a method, holds, in the order of the catalogue."""
    with_one = {entry.paper for entry in guide.entries()}
    found: list[Figure] = []
    for slug in catalogue:
        evidence = catalogue.evidence(slug) if catalogue[slug].family == guide.family or slug in with_one else None
        own: list[Figure] = []
        for finding in evidence.findings if evidence else ():
            for (kind, quantity, unit), measured in _by_quantity(finding.measurements, guide).items():
                alike = [figure for figure in own if (figure.quantity, figure.unit) == (quantity, unit)]
                figure = next((figure for figure in alike if _same(figure.measured, measured)), None)
                if figure is None:
                    figure = Figure(slug, kind, quantity, unit)
                    own.append(figure)
                figure.findings.append(finding)
                figure.measured |= measured
        found += [figure for figure in own if figure.kind != "quality" or len(figure.measured) > 1]
    return found


def _by_quantity(
    measurements: Iterable[Measurement], guide: Guide
) -> dict[tuple[str, str, str], dict[str, Measurement]]:
    """Those of a kind that have a value, by what they are of; differences in quality are left out."""
    found: dict[tuple[str, str, str], dict[str, Measurement]] = {}
    for measurement in measurements:
        quantity, _, whose = measurement.name.partition(", ")
        kind = guide.kind_of(quantity)
        if kind is None or measurement.value is None:
            continue
        if kind == "quality" and (not whose or _difference.search(measurement.name)):
            continue
        named = (quantity, whose) if whose else (kind, quantity)
        found.setdefault((kind, named[0], measurement.unit), {})[named[1]] = measurement
    return found


def tradeoffs(found: Sequence[Figure], paper: str) -> Iterator[tuple[Figure, Figure]]:
    """Pairs of a paper's figures, memory and quality, that were measured of at least three of the same arms."""
    own = [figure for figure in found if figure.paper == paper]
    for memory in (figure for figure in own if figure.kind == "memory"):
        for quality in (figure for figure in own if figure.kind == "quality"):
            if len(memory.measured.keys() & quality.measured.keys()) > 2:
                yield memory, quality


def _same(known: Mapping[str, Measurement], new: Mapping[str, Measurement]) -> bool:
    """Whether both hold the same runs of something, and nothing that contradicts it."""
    shared = known.keys() & new.keys()
    ends = [[(m.value, m.low, m.high) for m in (known[whose], new[whose])] for whose in shared]
    return bool(ends) and all(a == b for a, b in ends)


def _counts(catalogue: Catalogue, slug: str) -> str:
    found = Counter[str](standing.verdict for standing in catalogue.claims(slug))
    return ", ".join(f"{found[standing]} {standing}" for standing in STANDINGS if found[standing])


def standings(names: set[str], found: Sequence[Figure], baselines: Sequence[str]) -> Iterator[str]:
    """Of a method, each quality that was measured, beside those of baselines measured alike."""
    for figure in found:
        for whose, measurement in figure.measured.items() if figure.kind == "quality" else ():
            name, _, where = whose.partition(", ")
            if name in names:
                others = {base: figure.measured.get(f"{base}, {where}" if where else base) for base in baselines}
                known = [f"{base} {_number(other)}" for base, other in others.items() if other]
                own = f"{figure.quantity} {_number(measurement)}{f' ({where})' if where else ''}"
                yield ", ".join([own, *known])


def _number(measurement: Measurement) -> str:
    return f"{measurement.value:.4g}"


# Pictures ----------------------------------------------------------------------------------------------------------

WIDTH, LEFT, RIGHT, ROW = 700, 250, 545, 26
NAMES, LABEL = 480, 14  # where names of points begin, and their height


def chart(figure: Figure, names: set[str]) -> Markup:
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


def tradeoff_chart(memory: Figure, quality: Figure, names: set[str]) -> Markup:
    """A point for each arm: what it keeps across, how good it is upwards; its name beside it, led to by a line."""
    arms = [arm for arm in quality.measured if arm in memory.measured]
    points = [(memory.measured[arm], quality.measured[arm]) for arm in arms]
    xs, ys = ([m.value for m in side if m.value is not None] for side in zip(*points, strict=True))
    spread = min(xs) > 0 and max(xs) > 8 * min(xs)
    bottom = max(270, 22 + LABEL * len(arms))
    across = Axis(*padded(min(xs), max(xs), 0.06, spread), 70, NAMES - 40, spread)
    tall = better_on_log(ys)
    up = Axis(*padded(min(ys), max(ys), 0.06, tall), bottom, 22, tall)
    unit = f" ({memory.unit})" if memory.unit and memory.unit not in memory.quantity else ""
    pieces = [*frame(across, up, shortened(f"{memory.quantity}{unit}", 60), 6)]
    pieces.append(text(70, 12, shortened(quality.quantity, 60), "label"))
    rows = sorted(zip(arms, xs, ys, strict=True), key=lambda row: (up(row[2]), -across(row[1])))
    for (arm, x, y), place in zip(rows, apart([up(y) for _, _, y in rows], 22, bottom), strict=True):
        pieces.append(
            element(
                "g",
                element("title", f"{arm}: {x:.4g}, {y:.4g}"),
                line(across(x), up(y), NAMES - 4, place, "leader"),
                element("circle", cx=across(x), cy=up(y), r=4.5, class_="mean"),
                text(NAMES, place + 4, shortened(arm, 38), "figures"),
                class_="own" if arm.partition(", ")[0] in names else "other",
            )
        )
    told = "; ".join(f"{arm}: {x:.4g}, {y:.4g}" for arm, x, y in zip(arms, xs, ys, strict=True))
    title = f"{quality.quantity} against {memory.quantity}"
    return picture(WIDTH, bottom + 48, title, told, *pieces, class_="measured")


def apart(wanted: Sequence[float], top: float, bottom: float) -> list[float]:
    """Places of labels from `top` to `bottom`, given what they are for in that order: near to it, none on another."""
    found: list[float] = []
    for at in wanted:
        found.append(max(at, found[-1] + LABEL if found else top))
    for place in reversed(range(len(found))):
        found[place] = min(found[place], found[place + 1] - LABEL if place + 1 < len(found) else bottom)
    return found


def _with_interval(measurement: Measurement) -> str:
    if measurement.low is None or measurement.high is None:
        return _number(measurement)
    return f"{_number(measurement)} [{measurement.low:.4g}, {measurement.high:.4g}]"
