"""The claims of the mirostat paper: surprise stays at its target while fixed samplers drift, and repetition follows it.

SmolLM2-135M goes on from paragraphs of Python's documentation, instead of GPT-2. Every text is written on from an
opening of its own and counts as one observation. Targets and settings of the fixed samplers are given, so that nothing
is tuned.
"""

from dataclasses import dataclass
from statistics import correlation, fmean

from transformers import LogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from fairtrial.catalog import Finding, Verdict
from fairtrial.claims.generation import openings, repeated, write
from fairtrial.claims.measure import Measure, measured, single
from fairtrial.claims.paired import above_zero
from fairtrial.methods.decoding.mirostat import MirostatLogitsProcessor

TEXTS, PROMPT, TOKENS, PART = 8, 12, 300, 100
TARGETS, COUNTS, MASSES = (2.0, 3.0, 4.0), (5, 50, 500), (0.4, 0.8, 0.95)
NEAR, WITHIN = 0.15, 0.3


def check(measure: Measure) -> list[Finding]:
    arms = [
        *(Arm(f"mirostat {version}", target) for version in (1, 2) for target in TARGETS),
        *(Arm("top-k", count) for count in COUNTS),
        *(Arm("top-p", mass) for mass in MASSES),
    ]
    texts = dict(zip(arms, measure.map(texts_of, arms), strict=True))
    return [_tracking(texts), _repetition(texts)]


@dataclass(frozen=True)
class Arm:
    """A sampler and its one setting: target in bits, number of tokens, or mass."""

    sampler: str
    value: float

    def __str__(self) -> str:
        return f"{self.sampler}, {self.value:g}"


@dataclass(frozen=True)
class Texts:
    """For each text, the mean surprise of each part in bits, and the share of 4-grams that it had before."""

    parts: tuple[tuple[float, ...], ...]
    repeated: tuple[float, ...]

    @property
    def surprises(self) -> list[float]:
        return [fmean(parts) for parts in self.parts]

    @property
    def drifts(self) -> list[float]:
        """The last part's mean surprise less the first's."""
        return [parts[-1] - parts[0] for parts in self.parts]


def _tracking(texts: dict[Arm, Texts]) -> Finding:
    errors = {arm: fmean(found.surprises) - arm.value for arm, found in texts.items() if arm.sampler == "mirostat 1"}
    narrow = [Arm("top-k", COUNTS[0]), Arm("top-p", MASSES[0])]
    wide = [Arm("top-k", COUNTS[-1]), Arm("top-p", MASSES[-1])]
    falls = [[-drift for drift in texts[arm].drifts] for arm in narrow]
    significant = above_zero(*falls, *(texts[arm].drifts for arm in wide))
    drift = any(significant[: len(narrow)]) and any(significant[len(narrow) :])
    worst = max(abs(error) for error in errors.values())
    says: Verdict = "reproduced" if worst < NEAR and drift else "partly" if worst <= WITHIN else "not reproduced"
    return Finding(
        claim="target-tracking",
        verdict=says,
        criterion=f"The mean surprise of version 1 is within {NEAR} bits of every target, and from the first to the "
        f"last {PART} tokens the surprise falls significantly with top-k 5 or top-p 0.4 and rises significantly with "
        f"top-k 500 or top-p 0.95 (sign-flip tests, Holm over the four); partly if within {WITHIN} bits.",
        seeds=tuple(range(TEXTS)),
        measurements=(
            *(
                measured(f"mean surprise, {arm}", found.surprises, "bits", paper=_target(arm))
                for arm, found in texts.items()
            ),
            *(
                measured(f"surprise, last {PART} tokens above the first, {arm}", found.drifts, "bits")
                for arm, found in texts.items()
            ),
        ),
        note=f"{TEXTS} texts of {TOKENS} tokens, as many observations. Version 2, which is not the paper's, is shown "
        "beside version 1.",
    )


def _target(arm: Arm) -> str:
    return f"{arm.value:g}" if arm.sampler.startswith("mirostat") else ""


def _repetition(texts: dict[Arm, Texts]) -> Finding:
    surprises = [fmean(found.surprises) for found in texts.values()]
    shares = [fmean(found.repeated) for found in texts.values()]
    r = correlation(surprises, shares) if len(set(shares)) > 1 else 0.0
    says: Verdict = "reproduced" if r < -0.8 else "partly" if r < -0.5 else "not reproduced"
    return Finding(
        claim="repetition",
        verdict=says,
        criterion="Over all samplers the correlation of repeated 4-grams with the mean surprise is below -0.8; partly "
        "if below -0.5.",
        seeds=tuple(range(TEXTS)),
        measurements=(
            single("correlation of repetition with surprise, over samplers", r, "correlation", paper="nearly linear"),
            *(measured(f"repeated 4-grams, {arm}", found.repeated, "fraction") for arm, found in texts.items()),
        ),
        note=f"{len(texts)} samplers: two versions of mirostat, top-k and top-p, each with three settings.",
    )


def processor_of(arm: Arm) -> LogitsProcessor:
    match arm.sampler:
        case "mirostat 1":
            return MirostatLogitsProcessor(arm.value)
        case "mirostat 2":
            return MirostatLogitsProcessor(arm.value, version=2)
        case "top-k":
            return TopKLogitsWarper(int(arm.value))
        case _:
            return TopPLogitsWarper(arm.value)


def texts_of(arm: Arm) -> Texts:
    """Write all texts in one batch, each from an opening of its own."""
    texts, surprises = write(openings(TEXTS, PROMPT, seed=0), [processor_of(arm)], tokens=TOKENS, seed=0)
    parts = surprises.view(TEXTS, -1, PART).mean(-1).tolist()
    return Texts(tuple(map(tuple, parts)), tuple(repeated(text) for text in texts.tolist()))
