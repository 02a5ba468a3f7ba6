"""SmolLM2 at inference: how well it predicts, finds and continues text with another cache or another decoder."""

import copy
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from fairtrial.contract import Costs, Diverged, Metric
from fairtrial.tasks.trained import TrainedTask, Trial, cache_slot, held, median_seconds, prepared

SCORED = 256  # tokens at the end of a passage that are predicted from the compressed cache
PLACES = ("harbour", "library", "castle", "garden")
DEPTHS = (0.1, 0.35, 0.6, 0.85)


def prefilled(trial: Trial, cache: Any, ids: Int[Tensor, "1 t"]) -> Any:
    """The cache after the model has read the tokens."""
    trial.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def decode_time(trial: Trial, cache: Any, token: Int[Tensor, "1 1"]) -> float:
    """Median seconds for one more token; the cache grows by those whose time is taken."""
    return median_seconds(lambda: trial.model(token, past_key_values=cache, use_cache=True))


def perplexity(trial: Trial) -> tuple[float, dict[str, float], Costs]:
    """Nats per token of the last 256, read in one go after the cache has been filled with what is before them."""
    ids, cache = trial.passages, trial.parts["cache"]
    with prepared(cache, trial.model):
        prefilled(trial, cache, ids[:, :-SCORED])
        logits = trial.model(ids[:, -SCORED:-1], past_key_values=cache, use_cache=True).logits[0]
        if not logits.isfinite().all():
            raise Diverged("the model's scores are no longer finite")
        nats = F.cross_entropy(logits.float(), ids[0, -SCORED + 1 :]).item()
        size = held(cache)
        seconds = decode_time(trial, cache, ids[:, -1:])
    tokens = ids.shape[1] - 1
    figures = {"perplexity": float(torch.tensor(nats).exp()), "cache bytes per token": size / tokens}
    return nats, figures, Costs(step_time=seconds, peak_memory=size)


def retrieval(trial: Trial) -> tuple[float, dict[str, float], Costs]:
    """The share of numbers, each hidden in a passage of its own, that greedy decoding gives back digit for digit."""
    tokenizer, found = trial.setting.tokenizer, {}
    codes = torch.randint(1000, 10_000, (len(DEPTHS),), generator=trial.streams("codes")).tolist()
    for place, code, depth, passage in zip(PLACES, codes, DEPTHS, trial.passages, strict=True):
        at = round(depth * len(passage))
        fact = torch.tensor(tokenizer(f"\n\nThe code of the {place} is {code}.\n\n").input_ids)
        question = torch.tensor([tokenizer(f"\n\nThe code of the {place} is").input_ids])
        cache = copy.deepcopy(trial.parts["cache"])
        with prepared(cache, trial.model):
            prefilled(trial, cache, torch.cat([passage[:at], fact, passage[at:]])[None])
            size = held(cache)
            answer = tokenizer.decode(greedy(trial, cache, question, 6))
            seconds = decode_time(trial, cache, question[:, -1:])
        found[f"found at depth {depth}"] = float(answer.strip().startswith(str(code)))
    return sum(found.values()) / len(found), found, Costs(step_time=seconds, peak_memory=size)


def greedy(trial: Trial, cache: Any, ids: Int[Tensor, "1 t"], count: int) -> Int[Tensor, " c"]:
    """The most likely tokens after those in the cache and the given ones."""
    taken = []
    for _ in range(count):
        ids = trial.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
        taken.append(ids[0])
    return torch.cat(taken)


def _perplexity(name: str, length: int) -> TrainedTask:
    return TrainedTask(
        name=name,
        version=1,
        metric=Metric("nats per token", "minimize", "nats per token", margin=0.01, worst=10.8),
        measure=perplexity,
        slots={"cache": cache_slot()},
        model="smollm2",
        passages=1,
        length=length,
    )


smollm2_perplexity = _perplexity("smollm2-perplexity", 2048)
smollm2_perplexity_8k = _perplexity("smollm2-perplexity-8k", 8192)
smollm2_retrieval = TrainedTask(
    name="smollm2-retrieval",
    version=1,
    metric=Metric("facts found", "maximize", "fraction", margin=0.05, worst=0.0),
    measure=retrieval,
    slots={"cache": cache_slot()},
    model="smollm2",
    passages=len(DEPTHS),
    length=768,
)
