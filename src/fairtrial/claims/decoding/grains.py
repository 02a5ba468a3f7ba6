"""The claims of the GrAInS paper: attributed tokens against random ones, against plain differences, and fluency.

SmolLM2-135M-Instruct on 40 sentences about Python with a right and a wrong end, instead of TruthfulQA with 7 and 8B
models. Vectors and strengths are from one half of the sentences and judged on the other, either way round, so that each
sentence is one observation. As in the authors' scripts the last layer is steered, with principal components of what the
most and the least attributed tokens change. Its states need no layer after it: they are kept, and only the final norm
and the head are gone through again for every vector and strength. Vectors are of unit length, and the strength of every
arm is the best of the same four shares of the states' mean norm.
"""

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from fairtrial.catalog import Finding, Verdict
from fairtrial.claims.generation import openings
from fairtrial.claims.measure import Measure, measured, single
from fairtrial.claims.paired import above_zero, gaps, surely_below
from fairtrial.claims.python_questions import QUESTIONS, Question
from fairtrial.claims.smollm2 import smollm2
from fairtrial.methods.decoding.grains import (
    ablate_tokens,
    decoder_layers,
    last_states,
    padding_of,
    steer,
    steering_vector,
    token_attributions,
)

COUNT, K, STEPS, DRAWS = len(QUESTIONS), 3, 20, 20
STRENGTHS = (0.05, 0.1, 0.2, 0.4)  # shares of the mean norm
PASSAGES, LENGTH = 16, 60
NONE, GRAINS, MEAN, DIFFERENCE = "no steering", "GrAInS", "GrAInS, means", "mean difference of answers"
SETS, DIRECTIONS = "random tokens", "random direction"

Array = NDArray[np.float32]


def check(measure: Measure) -> list[Finding]:
    studied = measure.map(study, range(COUNT))
    answers = tuple(found.answers for found in studied)
    arms = {name: Arm(vectors, answers) for name, vectors in all_vectors(studied).items()}
    outcomes = dict(zip(arms, measure.map(outcome_of, arms.values()), strict=True))
    steered = {name: Steered(arms[name].vectors, outcomes[name].strengths) for name in (NONE, GRAINS, DIFFERENCE)}
    neutral = dict(zip(steered, measure.map(surprise_of_neutral_text, steered.values()), strict=True))
    return [_attributed(outcomes), _better(outcomes, neutral), _fluent(neutral)]


@dataclass(frozen=True)
class Answer:
    """The last layer's states from which an answer's tokens are predicted, and the tokens."""

    states: Array
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Studied:
    """What is known of a question in the last layer; arrays for the right and for the wrong answer.

    Attributes:
        answers: the right one and the wrong one.
        ends: states of the last token.
        most, least: what replacing the most and the least attributed tokens changes.
        drawn: the same for two random sets of each draw.
    """

    answers: tuple[Answer, Answer]
    ends: Array
    most: Array
    least: Array
    drawn: Array


@dataclass(frozen=True)
class Arm:
    """Vectors for the even and for the odd questions, None for no steering, and all answers."""

    vectors: Array | None
    answers: tuple[tuple[Answer, Answer], ...]


@dataclass(frozen=True)
class Outcome:
    """The preference for the right answer of each question, and the absolute strengths for either half."""

    margins: tuple[float, ...]
    strengths: tuple[float, float]


@dataclass(frozen=True)
class Steered:
    """Vectors and their strengths."""

    vectors: Array | None
    strengths: tuple[float, float]


def _attributed(outcomes: dict[str, Outcome]) -> Finding:
    means = {name: fmean(found.margins) for name, found in outcomes.items()}
    sets = [means[name] for name in outcomes if name.startswith(SETS)]
    directions = [means[name] for name in outcomes if name.startswith(DIRECTIONS)]
    above_sets, above_directions = means[GRAINS] > max(sets), means[GRAINS] > max(directions)
    says: Verdict = (
        "reproduced" if above_sets and above_directions else "partly" if above_directions else "not reproduced"
    )
    return Finding(
        claim="attributed-tokens",
        verdict=says,
        criterion="The mean preference for the right answer, on questions that neither vector nor strength has seen, "
        f"is above that of each of {DRAWS} draws of random tokens and of each of {DRAWS} random directions (by chance "
        f"at most once in {DRAWS + 1} each); partly if above all directions only.",
        seeds=(),
        measurements=(
            *(
                measured(f"preference, {name}", outcomes[name].margins, "nats per token")
                for name in (NONE, GRAINS, MEAN, DIFFERENCE)
            ),
            single(f"preference, {SETS}, highest of the draws", max(sets), "nats per token"),
            single(f"preference, {SETS}, mean of the draws", fmean(sets), "nats per token"),
            single(f"preference, {DIRECTIONS}, highest of the draws", max(directions), "nats per token"),
            single(f"preference, {DIRECTIONS}, mean of the draws", fmean(directions), "nats per token"),
        ),
        note=f"Preference is the mean log-probability of a right answer's tokens less that of the wrong one's. {COUNT} "
        f"questions, {K} tokens replaced in each sequence, {STEPS} nodes.",
    )


def _better(outcomes: dict[str, Outcome], neutral: dict[str, list[float]]) -> Finding:
    right = {
        name: [float(margin > 0) for margin in outcomes[name].margins] for name in (NONE, GRAINS, MEAN, DIFFERENCE)
    }
    gained = gaps(right[GRAINS], right[DIFFERENCE])
    above = gaps(neutral[GRAINS], neutral[DIFFERENCE])
    higher, worse = above_zero(gained)[0], above_zero(above)[0]
    says: Verdict = "reproduced" if higher and not worse else "partly" if fmean(gained) >= 0 else "not reproduced"
    return Finding(
        claim="better-than-mean-difference",
        verdict=says,
        criterion="The right answer is preferred significantly more often than with the mean difference of the "
        "answers' last states, and neutral text is not significantly more surprising (paired sign-flip tests over "
        "questions and over passages); partly if at least as often.",
        seeds=(),
        measurements=(
            *(measured(f"right answers, {name}", values, "fraction") for name, values in right.items()),
            measured(
                "right answers, GrAInS above mean difference",
                gained,
                "fraction",
                paper="TruthfulQA 0.1322 above no steering, 8B",
            ),
            measured("log perplexity of neutral text, GrAInS above mean difference", above, "nats per token"),
        ),
    )


def _fluent(neutral: dict[str, list[float]]) -> Finding:
    rise = gaps(neutral[GRAINS], neutral[NONE])
    little, bearable = (surely_below(rise, math.log(1 + share)) for share in (0.05, 0.15))
    says: Verdict = "reproduced" if little else "partly" if bearable else "not reproduced"
    return Finding(
        claim="fluency-kept",
        verdict=says,
        criterion="At the tuned strength the perplexity of neutral text is less than 5 % above that without steering "
        "(95 % interval of the mean paired difference of logarithms over passages); partly if less than 15 %.",
        seeds=(),
        measurements=(
            *(
                measured(f"log perplexity of neutral text, {name}", found, "nats per token")
                for name, found in neutral.items()
            ),
            measured("log perplexity of neutral text, GrAInS above no steering", rise, "nats per token"),
        ),
        note=f"{PASSAGES} passages of {LENGTH} tokens of Python's documentation, mean of the vectors of either half.",
    )


def study(place: int) -> Studied:
    """Attribute the preference in a question, and replace tokens: attributed ones and random ones."""
    model, tokenizer = smollm2()
    question: Question = QUESTIONS[place]
    found = token_attributions(model, tokenizer, *question, steps=STEPS)
    generator = torch.Generator().manual_seed(place)
    prompt, pad_id = len(tokenizer(question.prompt).input_ids), padding_of(tokenizer)
    answers, rows = [], []
    for scores, ids in ((found.scores_pos, found.ids_pos), (found.scores_neg, found.ids_neg)):
        places = [scores.topk(K).indices, scores.topk(K, largest=False).indices]
        for _ in range(DRAWS):
            places += torch.randperm(len(ids), generator=generator)[: 2 * K].view(2, K)
        ablated = torch.stack([ids, *(ablate_tokens(ids, chosen, pad_id) for chosen in places)])
        ends = last_states(model, ablated)[-1]
        rows.append(torch.cat([ends[:1], ends[:1] - ends[1:]]))
        states = hidden_states(ids[None])[0, prompt - 1 : -1]
        answers.append(Answer(states.numpy(), tuple(ids[prompt:].tolist())))
    ends, most, least, *drawn = torch.stack(rows, 1).numpy()
    return Studied((answers[0], answers[1]), ends, most, least, np.stack(drawn).reshape(DRAWS, 2, 2, -1))


@torch.no_grad()
def hidden_states(ids: Tensor) -> Float[Tensor, "n t d"]:
    """What the last layer gives out for every token, before the final norm."""
    model, seen = smollm2().model, []
    handle = decoder_layers(model)[-1].register_forward_hook(lambda module, args, output: seen.append(output))
    model(ids, logits_to_keep=1, use_cache=False)
    handle.remove()
    states: Tensor = seen[0] if isinstance(seen[0], Tensor) else seen[0][0]
    return states


@torch.no_grad()
def log_probs(states: Float[Tensor, "n d"], targets: Tensor, vector: Tensor | None, strength: float) -> Tensor:
    """Of each target, where the states are steered before the final norm."""
    model: Any = smollm2().model
    steered = states if vector is None else steer(states, vector, strength)
    logits: Tensor = model.lm_head(model.model.norm(steered))
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def all_vectors(studied: list[Studied]) -> dict[str, Array | None]:
    """The unit vectors of every arm: first from the odd questions, for the even ones, then the other way round."""
    width = studied[0].ends.shape[-1]
    generator = torch.Generator().manual_seed(0)
    vectors: dict[str, list[Tensor]] = {}
    for fitted in (studied[1::2], studied[::2]):
        most, least = (_rows([getattr(each, name) for each in fitted]) for name in ("most", "least"))
        ends = torch.from_numpy(np.stack([each.ends for each in fitted]))
        drawn = torch.from_numpy(np.stack([each.drawn for each in fitted], 2))
        made = {GRAINS: steering_vector(most) - steering_vector(least), MEAN: most.mean(0) - least.mean(0)}
        made[DIFFERENCE] = (ends[:, 0] - ends[:, 1]).mean(0)
        for draw in range(DRAWS):
            one, other = drawn[draw].flatten(1, 2)
            made[f"{SETS} {draw}"] = steering_vector(one) - steering_vector(other)
            made[f"{DIRECTIONS} {draw}"] = torch.randn(width, generator=generator)
        for name, vector in made.items():
            vectors.setdefault(name, []).append(vector / vector.norm())
    return {NONE: None} | {name: torch.stack(both).numpy() for name, both in vectors.items()}


def _rows(arrays: list[Array]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays))


def outcome_of(arm: Arm) -> Outcome:
    """Choose a strength on the questions that the vector is from, and judge it on the others."""
    margins, strengths = [0.0] * len(arm.answers), []
    for half in (0, 1):
        seen, unseen = arm.answers[1 - half :: 2], arm.answers[half::2]
        norm = fmean(float(np.linalg.norm(a.states, axis=1).mean()) for pair in seen for a in pair)
        vector = None if arm.vectors is None else torch.from_numpy(arm.vectors[half])
        chosen = 0.0
        if vector is not None:
            chosen = max((norm * share for share in STRENGTHS), key=lambda s: fmean(preferences(seen, vector, s)))
        strengths.append(chosen)
        margins[half::2] = preferences(unseen, vector, chosen)
    return Outcome(tuple(margins), (strengths[0], strengths[1]))


def preferences(pairs: tuple[tuple[Answer, Answer], ...], vector: Tensor | None, strength: float) -> list[float]:
    """Mean log-probability of the right answer's tokens less that of the wrong one's."""
    every = [answer for pair in pairs for answer in pair]
    states = torch.from_numpy(np.concatenate([answer.states for answer in every]))
    targets = torch.tensor([target for answer in every for target in answer.targets])
    found = log_probs(states, targets, vector, strength)
    means = [part.mean().item() for part in torch.split(found, [len(answer.targets) for answer in every])]
    return gaps(means[::2], means[1::2])


def surprise_of_neutral_text(arm: Steered) -> list[float]:
    """Log perplexity of each passage, the mean over both halves' vectors."""
    ids = openings(PASSAGES, LENGTH, seed=0)
    states, targets = hidden_states(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    halves = [None] if arm.vectors is None else torch.from_numpy(arm.vectors).unbind()
    found = [
        -log_probs(states, targets, vector, strength).view(PASSAGES, -1).mean(1)
        for vector, strength in zip(halves, arm.strengths, strict=False)
    ]
    return torch.stack(found).mean(0).tolist()
