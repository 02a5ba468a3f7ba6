"""The claims of the top-H paper: coherence and diversity when it is hot, and how near the greedy set is to the best.

SmolLM2-135M goes on from paragraphs of Python's documentation, instead of models of 4 to 8B on GSM8K and AlpacaEval.
Coherence is the surprise of the text under the model at temperature 1, diversity the share of different 2- and 3-grams
among the continuations of one opening. Every arm has the setting that the paper has, so that nothing is tuned.
"""

from dataclasses import dataclass
from statistics import fmean

import torch
from transformers import LogitsProcessor, MinPLogitsWarper, TemperatureLogitsWarper, TopPLogitsWarper

from fairtrial.catalog import Finding, Verdict
from fairtrial.claims.arms import Run, evaluate
from fairtrial.claims.generation import distinct, openings, write
from fairtrial.claims.measure import Measure, measured
from fairtrial.claims.paired import above_zero, gaps, surely_above
from fairtrial.methods.decoding.top_h import TopHLogitsProcessor, ecmm_bruteforce, top_h_mask

OPENINGS, SAMPLES, PROMPT, TOKENS, SEEDS = 2, 3, 12, 20, 8
TEMPERATURES = (1.0, 1.5, 2.0)
TOP_H, PARTIAL, MIN_P, TOP_P = "top-H 0.4", "top-H 0.4, partial sums", "min-p 0.1", "top-p 0.9"
ARMS = (TOP_H, PARTIAL, MIN_P, TOP_P)
SHARES, DISTRIBUTIONS, TOKENS_OF_EACH = (0.2, 0.4, 0.6, 0.8), 150, 8


def check(measure: Measure) -> list[Finding]:
    settings = {(arm, t): Setting(arm, t) for arm in ARMS for t in TEMPERATURES}
    found = evaluate(measure, texts_of, settings, seeds=SEEDS)
    return [_hot(found), _robust(found), _greedy(measure)]


@dataclass(frozen=True)
class Setting:
    """A sampler with its temperature."""

    arm: str
    temperature: float


@dataclass(frozen=True)
class Texts:
    """Means over the texts of a seed."""

    surprise: float
    distinct: float


Found = dict[tuple[str, float], list[Texts]]


def _surprise(found: Found, arm: str, temperature: float) -> list[float]:
    return [texts.surprise for texts in found[arm, temperature]]


def _distinct(found: Found, arm: str, temperature: float) -> list[float]:
    return [texts.distinct for texts in found[arm, temperature]]


def _hot(found: Found) -> Finding:
    hot = [t for t in TEMPERATURES if t > 1]
    below_top_p = gaps(_surprise(found, TOP_P, hot[-1]), _surprise(found, TOP_H, hot[-1]))
    more_surprising = {t: gaps(_surprise(found, TOP_H, t), _surprise(found, MIN_P, t)) for t in hot}
    less_diverse = {t: gaps(_distinct(found, MIN_P, t), _distinct(found, TOP_H, t)) for t in hot}
    tests = [below_top_p, *more_surprising.values(), *less_diverse.values()]
    significant = above_zero(*tests)
    reverse = above_zero(*([-x for x in test] for test in tests))
    better, n = significant[0], len(hot)
    dominated = any(
        dominates(significant[1 + i], significant[1 + n + i], reverse[1 + i], reverse[1 + n + i]) for i in range(n)
    )
    says: Verdict = "reproduced" if better and not dominated else "partly" if better else "not reproduced"
    return Finding(
        claim="high-temperature",
        verdict=says,
        criterion="At T = 2 the text is significantly less surprising than with top-p, and at neither 1.5 nor 2 min-p "
        "is significantly better in surprise or diversity without being significantly worse in the other (paired "
        "sign-flip tests, Holm over the five); partly if only the first holds.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(f"surprise at T = {t:g}, {arm}", _surprise(found, arm, t), "bits per token")
                for arm in ARMS
                for t in TEMPERATURES
            ),
            *(
                measured(f"different 2- and 3-grams at T = {t:g}, {arm}", _distinct(found, arm, t), "fraction")
                for arm in ARMS
                for t in TEMPERATURES
            ),
            measured(
                "surprise at T = 2, top-p above top-H", below_top_p, "bits per token", paper="GSM8K 39.35 against 2.65"
            ),
            *(
                measured(f"surprise at T = {t:g}, top-H above min-p", gap, "bits per token")
                for t, gap in more_surprising.items()
            ),
            *(
                measured(f"different 2- and 3-grams at T = {t:g}, min-p above top-H", gap, "fraction")
                for t, gap in less_diverse.items()
            ),
        ),
        note=f"{OPENINGS} openings of {PROMPT} tokens for each seed, {SAMPLES} continuations of {TOKENS} tokens of "
        "each. The verdict is on the published algorithm; the authors' code holds partial sums of the entropy to the "
        "bound, and is shown beside it.",
    )


def dominates(less_surprising: bool, more_diverse: bool, more_surprising: bool, less_diverse: bool) -> bool:
    """Whether an arm is significantly better in one of two respects and not significantly worse in the other."""
    return (less_surprising and not less_diverse) or (more_diverse and not more_surprising)


def _robust(found: Found) -> Finding:
    first, last = TEMPERATURES[0], TEMPERATURES[-1]
    rises = {arm: gaps(_surprise(found, arm, last), _surprise(found, arm, first)) for arm in ARMS}
    under_half = gaps([rise / 2 for rise in rises[TOP_P]], rises[TOP_H])
    under = gaps(rises[TOP_P], rises[TOP_H])
    half, smaller = surely_above(under_half, 0.0), surely_above(under, 0.0)
    says: Verdict = "reproduced" if half else "partly" if smaller else "not reproduced"
    return Finding(
        claim="temperature-robustness",
        verdict=says,
        criterion="From T = 1 to T = 2 the surprise rises by less than half as much as with top-p (95 % interval of "
        "the mean paired difference); partly if by less at all.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(f"rise of the surprise from T = 1 to 2, {arm}", rise, "bits per token", paper=paper)
                for (arm, rise), paper in zip(
                    rises.items(), ("AlpacaEval -3.78 points", "", "", "AlpacaEval -34.06 points"), strict=True
                )
            ),
            measured("half of top-p's rise less top-H's", under_half, "bits per token"),
        ),
    )


def _greedy(measure: Measure) -> Finding:
    ratios = dict(zip(SHARES, measure.map(ratios_of_mass, SHARES), strict=True))
    enough = [fmean(found) >= 0.9 for found in ratios.values()]
    says: Verdict = "reproduced" if all(enough) else "partly" if sum(enough) > len(enough) / 2 else "not reproduced"
    return Finding(
        claim="greedy-near-optimal",
        verdict=says,
        criterion="Over random distributions the mean ratio of the kept mass to that of the best set is at least 0.9 "
        "for each share of the entropy; partly if for more than half of the shares.",
        seeds=(),
        measurements=tuple(
            measured(f"kept mass over the best, share {share:g}", found, "ratio") for share, found in ratios.items()
        ),
        note=f"{DISTRIBUTIONS} distributions for each share, uniform on the simplex of {TOKENS_OF_EACH} tokens. Of so "
        "few the best set may leave out the second; the worst single ratios are "
        + ", ".join(f"{min(found):.2f}" for found in ratios.values())
        + ".",
    )


def processor_of(setting: Setting) -> list[LogitsProcessor]:
    """What comes before the temperature; min-p and top-p look at the tempered distribution, as in `generate`."""
    temperature = setting.temperature
    match setting.arm:
        case "top-H 0.4":
            return [TopHLogitsProcessor(temperature=temperature)]
        case "top-H 0.4, partial sums":
            return [TopHLogitsProcessor(criterion="partial", temperature=temperature)]
        case "min-p 0.1":
            warper: LogitsProcessor = MinPLogitsWarper(0.1)
        case _:
            warper = TopPLogitsWarper(0.9)
    return [TemperatureLogitsWarper(temperature), warper, TemperatureLogitsWarper(1 / temperature)]


def texts_of(run: Run[Setting]) -> Texts:
    """Write on from the seed's openings."""
    prompts = openings(OPENINGS, PROMPT, run.seed).repeat_interleave(SAMPLES, 0)
    setting = run.setting
    texts, surprises = write(
        prompts, processor_of(setting), tokens=TOKENS, seed=run.seed, temperature=setting.temperature
    )
    diversity = fmean(distinct(of_one.tolist(), n) for of_one in torch.split(texts, SAMPLES) for n in (2, 3))
    return Texts(surprises.mean().item(), diversity)


def ratios_of_mass(share: float) -> list[float]:
    """Mass that the greedy set keeps over that of the best set, of random distributions."""
    generator, ratios = torch.Generator().manual_seed(0), []
    for _ in range(DISTRIBUTIONS):
        p = torch.empty(TOKENS_OF_EACH, dtype=torch.float64).exponential_(generator=generator)
        p = p / p.sum()
        ratios.append((p[top_h_mask(p, share)].sum() / p[ecmm_bruteforce(p, share)].sum()).item())
    return ratios
