"""The claims of the superposed decoding paper: how good the drafts are, what n-grams do for them, and what they cost.

SmolLM2-135M goes on from paragraphs of Python's documentation, instead of Llama-2-7B; n-grams are counted in the
paragraphs that no prompt comes from. Perplexity is that of the continuation under the model itself. Each prompt is one
observation. All settings are the paper's, so that nothing is tuned.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from fairtrial.catalog import Finding, Verdict
from fairtrial.claims.generation import openings, paragraphs
from fairtrial.claims.measure import Measure, measured, single
from fairtrial.claims.paired import above_zero, gaps, surely_above, surely_below
from fairtrial.claims.smollm2 import smollm2
from fairtrial.methods.decoding.sampling import sample
from fairtrial.methods.decoding.superposed_decoding import NGramInterpolator, superposed_generate

PROMPTS, PROMPT, TOKENS, DRAFTS, BATCH, REPEATS = 60, 15, 10, 3, 10, 8
NUCLEUS, ON_A_PAR, UNIT = 0.9, math.log(1.05), "nats per token"
WITH, WITHOUT, SAMPLES, GREEDY, BEAMS = "superposed", "superposed without n-grams", "nucleus 0.9", "greedy", "beams"


def check(measure: Measure) -> list[Finding]:
    arms = (WITH, WITHOUT, SAMPLES, GREEDY, BEAMS)
    pieces = [Piece(arm, start) for arm in arms for start in range(0, PROMPTS, BATCH)]
    found: dict[str, list[list[float]]] = {}
    for piece, logs in zip(pieces, measure.map(log_perplexities, pieces), strict=True):
        found.setdefault(piece.arm, []).extend(logs)
    return [_quality(found), _n_grams(found), _speed(measure)]


@dataclass(frozen=True)
class Piece:
    """An arm on some of the prompts."""

    arm: str
    start: int


def _quality(found: dict[str, list[list[float]]]) -> Finding:
    means = {arm: [sum(logs) / len(logs) for logs in rows] for arm, rows in found.items()}
    best = [min(logs) for logs in found[WITH]]
    mean_above, best_above = gaps(means[WITH], means[SAMPLES]), gaps(best, means[SAMPLES])
    says: Verdict = (
        "reproduced"
        if surely_below(mean_above, ON_A_PAR)
        else "partly"
        if surely_below(best_above, ON_A_PAR)
        else "not reproduced"
    )
    return Finding(
        claim="draft-quality",
        verdict=says,
        criterion="The drafts' perplexity, geometric mean over prompts and the three drafts, is less than 5 % above "
        "that of three nucleus samples (95 % interval of the mean paired difference of logarithms); partly if that of "
        "the best draft is.",
        seeds=(),
        measurements=(
            *(measured(f"log perplexity, mean of {arm}", logs, UNIT) for arm, logs in means.items()),
            measured("log perplexity, best draft", best, UNIT),
            measured("log perplexity, mean draft above nucleus", mean_above, UNIT, paper="about 0"),
            measured("log perplexity, best draft above nucleus", best_above, UNIT),
        ),
        note=f"{PROMPTS} prompts of {PROMPT} tokens, {TOKENS} new ones, {DRAFTS} drafts, {DRAFTS} beams, of which the "
        "best counts.",
    )


def _n_grams(found: dict[str, list[list[float]]]) -> Finding:
    later = range(1, DRAFTS)
    worse = {
        place: gaps([logs[place] for logs in found[WITHOUT]], [logs[place] for logs in found[WITH]]) for place in later
    }
    clearly = above_zero(*worse.values())
    says: Verdict = "reproduced" if all(clearly) else "partly" if any(clearly) else "not reproduced"
    return Finding(
        claim="ngram-filter",
        verdict=says,
        criterion="Without n-grams the perplexities of the second and of the third draft are significantly higher "
        "(paired sign-flip tests over prompts, Holm over the two); partly if one of them is.",
        seeds=(),
        measurements=(
            *(
                measured(f"log perplexity, draft {place + 1}, {arm}", [logs[place] for logs in found[arm]], UNIT)
                for arm in (WITH, WITHOUT)
                for place in range(DRAFTS)
            ),
            *(
                measured(f"log perplexity, draft {place + 1}, without above with n-grams", gap, UNIT)
                for place, gap in worse.items()
            ),
        ),
        note="Drafts in the order of the scores that the method gives them.",
    )


def _speed(measure: Measure) -> Finding:
    (timed,) = measure.map(seconds, [REPEATS])
    ratios = {name: [a / b for a, b in zip(timed[name], timed[WITH], strict=True)] for name in timed if name != WITH}
    times = ratios["one by one"]
    says: Verdict = (
        "reproduced" if surely_above(times, 2.0) else "partly" if surely_above(times, 1.0) else "not reproduced"
    )
    return Finding(
        claim="speed",
        verdict=says,
        criterion="Three drafts take less than half the seconds of three nucleus samples one by one, over repetitions "
        "in turn (95 % interval of the mean ratio above 2); partly if less than those.",
        seeds=(),
        measurements=(
            single("model calls, superposed", TOKENS, "calls"),
            single("model calls, samples one by one", DRAFTS * TOKENS, "calls"),
            *(
                measured(
                    f"seconds of {DRAFTS} samples {name} over superposed drafts",
                    found,
                    "ratio",
                    paper="at least 2.44" if name == "one by one" else "",
                )
                for name, found in ratios.items()
            ),
            *(single(f"seconds, median, {name}", median(found), "seconds") for name, found in timed.items()),
        ),
        note=f"One prompt, {TOKENS} tokens, one thread, {REPEATS} repetitions. Three samples in one batch read the "
        "weights as often as superposed decoding does.",
    )


def prompts() -> Int[Tensor, "n t"]:
    return openings(PROMPTS, PROMPT, seed=0)


def counted() -> NGramInterpolator:
    """N-grams of the paragraphs that the prompts are not from."""
    used = {tuple(ids) for ids in prompts().tolist()}
    others = [torch.tensor(ids) for ids in paragraphs(fewest_tokens=2) if tuple(ids[:PROMPT]) not in used]
    return NGramInterpolator().fit(others)


def log_perplexities(piece: Piece) -> list[list[float]]:
    """For each prompt of a piece, of each of its continuations."""
    given = prompts()[piece.start : piece.start + BATCH]
    texts = continuations(piece, given)
    rows = texts.flatten(0, 1)
    with torch.no_grad():
        logits = smollm2().model(rows, logits_to_keep=TOKENS + 1).logits[:, :-1]
    surprise = -logits.log_softmax(-1).gather(-1, rows[:, -TOKENS:, None])[..., 0].mean(1)
    found: list[list[float]] = surprise.view(texts.shape[:2]).tolist()
    return found


def continuations(piece: Piece, given: Int[Tensor, "b t"]) -> Int[Tensor, "b k _"]:
    """Prompts and what an arm goes on with, in the order of its own scores."""
    model = smollm2().model
    match piece.arm:
        case "superposed":
            return drafts(given, counted())
        case "superposed without n-grams":
            return drafts(given, None)
        case "nucleus 0.9":
            generator = torch.Generator().manual_seed(piece.start)
            return torch.stack([nucleus(given, generator) for _ in range(DRAFTS)], 1)
        case "greedy":
            likeliest = [TopKLogitsWarper(1)]
            return sample(model, given, max_new_tokens=TOKENS, processors=likeliest, eos_token_id=())[:, None]
        case _:
            options = {"min_new_tokens": TOKENS, "max_new_tokens": TOKENS, "num_beams": DRAFTS, "do_sample": False}
            best: Tensor = model.generate(given, attention_mask=torch.ones_like(given), **options)
            return best[:, None]


def drafts(given: Int[Tensor, "b t"], ngram: NGramInterpolator | None) -> Int[Tensor, "b k _"]:
    """Superposed ones; nothing ends them."""
    return superposed_generate(
        smollm2().model, given, num_drafts=DRAFTS, max_new_tokens=TOKENS, ngram=ngram, eos_token_id=()
    ).sequences


def nucleus(given: Int[Tensor, "b t"], generator: torch.Generator) -> Int[Tensor, "b _"]:
    return sample(
        smollm2().model,
        given,
        max_new_tokens=TOKENS,
        processors=[TopPLogitsWarper(NUCLEUS)],
        generator=generator,
        eos_token_id=(),
    )


def seconds(repeats: int) -> dict[str, list[float]]:
    """Of superposed drafts and of samples, one by one and in one batch, each timed in turn after a round unmeasured."""
    given, ngram, generator = prompts()[:1], counted(), torch.Generator().manual_seed(0)
    ways: dict[str, Callable[[], object]] = {
        WITH: lambda: drafts(given, ngram),
        "one by one": lambda: [nucleus(given, generator) for _ in range(DRAFTS)],
        "in one batch": lambda: nucleus(given.expand(DRAFTS, -1), generator),
    }
    timed: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(repeats + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if repetition:
                timed[name].append(time.perf_counter() - started)
    return timed
