"""The claims of the GWQ paper: gradients find the weights that are worth keeping, and better than other criteria do.

The small language model of bytes instead of large ones. One passage of 256 bytes calibrates; groups of 64 and 1 % of
the weights kept, whatever names them, so that all masks cost the same bits. There is nothing to tune.
"""

from dataclasses import dataclass, replace

from fairtrial.catalog import Finding, Measurement, Verdict
from fairtrial.claims.arms import Run, evaluate
from fairtrial.claims.measure import Measure, measured, single
from fairtrial.claims.paired import above_zero, gaps
from fairtrial.claims.small_language_model import PASSAGES, Judged, exact, judged
from fairtrial.methods.quantization.gwq import GWQ
from fairtrial.tasks.streams import Streams

WIDTHS, GROUP, RATIO = (3, 4), 64, 0.01
SEEDS = 10
NONE, RANDOM, GRADIENT = "none", "random", "grad"
OTHERS = ("magnitude", "grad_weight", "hessian_diag")
NAMES = {
    NONE: "no weight kept",
    RANDOM: "random weights kept",
    GRADIENT: "kept by gradient",
    "magnitude": "kept by magnitude",
    "grad_weight": "kept by gradient times weight",
    "hessian_diag": "kept by diagonal Hessian times weight squared",
}


@dataclass(frozen=True)
class Setting:
    """What names the weights to be kept, and the bits of the others."""

    score: str
    bits: int


Found = dict[Setting, list[float]]


def check(measure: Measure) -> list[Finding]:
    settings = {setting: setting for score in NAMES for bits in WIDTHS for setting in [Setting(score, bits)]}
    judgements = evaluate(measure, quantised, settings, seeds=SEEDS)
    found = {setting: [judgement.perplexity for judgement in each] for setting, each in judgements.items()}
    held = {setting: each[0].bits_per_weight for setting, each in judgements.items()}
    whole = measured("perplexity of a byte, float", measure.map(exact, range(SEEDS)), "")
    return [_outliers(found, held, whole), _criteria(found, held, whole)]


def _outliers(found: Found, held: dict[Setting, float], whole: Measurement) -> Finding:
    rises, better = _compared(found, (RANDOM, NONE))
    return Finding(
        claim="gradient-outliers",
        verdict=_verdict(better),
        criterion="The test perplexity with weights kept by gradient is significantly lower than with as many random "
        "ones and with none (paired sign-flip test, Holm over both and both widths), at 3 and at 4 bits; partly if at "
        "one of them.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *_perplexities(found, (GRADIENT, RANDOM, NONE)),
            whole,
            *rises,
            *_bits(held, (GRADIENT, RANDOM, NONE)),
        ),
        note=f"Each seed has a passage of its own to calibrate with, and its own choice of {PASSAGES} test passages. "
        "Without kept weights the model takes fewer bits.",
    )


def _criteria(found: Found, held: dict[Setting, float], whole: Measurement) -> Finding:
    rises, better = _compared(found, OTHERS)
    return Finding(
        claim="gradient-over-hessian",
        verdict=_verdict(better),
        criterion="The test perplexity with weights kept by gradient is significantly lower than with each of the "
        "three other criteria (paired sign-flip test, Holm over them and both widths), at 3 and at 4 bits; partly if "
        "at one of them.",
        seeds=tuple(range(SEEDS)),
        measurements=(*_perplexities(found, (GRADIENT, *OTHERS)), whole, *rises, *_bits(held, (GRADIENT, *OTHERS))),
        note="The same runs. Large weights that are kept narrow the ranges of their groups, too.",
    )


def _compared(found: Found, others: tuple[str, ...]) -> tuple[list[Measurement], list[bool]]:
    """By how much perplexity rises with the others, and for each width whether it surely rises with all of them."""
    pairs = {
        Setting(other, bits): gaps(found[Setting(other, bits)], found[Setting(GRADIENT, bits)])
        for bits in WIDTHS
        for other in others
    }
    significant = dict(zip(pairs, above_zero(*pairs.values()), strict=True))
    rises = [
        measured(f"perplexity above that by gradient, {NAMES[pair.score]}, {pair.bits} bits", each, "difference")
        for pair, each in pairs.items()
    ]
    return rises, [all(significant[Setting(other, bits)] for other in others) for bits in WIDTHS]


def _verdict(better: list[bool]) -> Verdict:
    return "reproduced" if all(better) else "partly" if any(better) else "not reproduced"


def _perplexities(found: Found, scores: tuple[str, ...]) -> list[Measurement]:
    return [
        measured(f"perplexity of a byte, {NAMES[score]}, {bits} bits", found[Setting(score, bits)], "")
        for bits in WIDTHS
        for score in scores
    ]


def _bits(held: dict[Setting, float], scores: tuple[str, ...]) -> list[Measurement]:
    return [
        single(
            f"bits per weight, {NAMES[score]}, {bits} bits",
            held[Setting(score, bits)],
            "bits",
            paper="" if score == NONE else "below 4 in the average",
        )
        for bits in WIDTHS
        for score in scores
    ]


def quantised(run: Run[Setting]) -> Judged:
    """The model with its weights rounded around what is kept."""
    config = GWQ(run.setting.bits, GROUP, ratio=0.0 if run.setting.score == NONE else RATIO)
    if run.setting.score == RANDOM:
        config = replace(config, score=RANDOM, generator=Streams(run.seed)("method"))
    elif run.setting.score != NONE:
        config = replace(config, score=run.setting.score)
    return judged(config, run.seed, run.split, sequences=1, batch=1)
