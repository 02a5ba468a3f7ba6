"""The claims of the KV Prediction paper: better than the small model alone, and the first token comes sooner.

The base is the language model of bytes instead of OpenELM, and the auxiliary model two of its four layers. What is
trained gets the best of three learning rates on validation data. Time is measured on SmolLM2-135M with 8 of its 30
layers; it does not depend on training.
"""

import copy
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from fairtrial.catalog import Finding, Verdict
from fairtrial.claims.arms import Run, evaluate, tune
from fairtrial.claims.measure import Measure, measured, single
from fairtrial.claims.paired import above_zero, gaps
from fairtrial.contract import Diverged
from fairtrial.methods.kvcache.kv_prediction import (
    KVPredictionModel,
    block_sizes,
    layer_pruned_copy,
    ttft_flops,
    widths,
)
from fairtrial.tasks.post_training import bytes_of_text
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.trained import loaded

BASE, KEPT_LAYERS = "small-gpt", (0, 2)
PROMPT, CONTINUED = 96, 32
STEPS, BATCH, JUDGED = 120, 8, 96
RATES, TUNING_SEEDS, SEEDS = (3e-4, 1e-3, 3e-3), 1, 8
SMALL, PREDICTED, WITHOUT, WHOLE = "small model alone", "predicted cache", "predicted cache, no cache loss", "base"
TIMED, TIMED_LAYERS, LENGTHS, REPEATS, THREADS = "smollm2", 8, (96, 256, 512), 7, 2
WORST = 20.0  # nats


def check(measure: Measure) -> list[Finding]:
    grids = {arm: [Setting(arm, lr) for lr in RATES] for arm in (SMALL, PREDICTED, WITHOUT)}
    chosen = tune(measure, loss_of, grids, seeds=TUNING_SEEDS, score=lambda loss: -loss)
    found = evaluate(measure, loss_of, {**chosen, WHOLE: Setting(WHOLE, 0.0)}, seeds=SEEDS)
    rates = ", ".join(f"{arm} {setting.lr:g}" for arm, setting in chosen.items())
    times = measure.map(first_token_times, [LENGTHS])[0]
    return [_better(found, rates), _cache_loss(found, rates), _time(times)]


@dataclass(frozen=True)
class Setting:
    """What goes on from a prompt, and the learning rate that it was trained with."""

    arm: str
    lr: float


def made(arm: str) -> Any:
    """What is trained; the base where nothing is."""
    base: Any = copy.deepcopy(loaded(BASE).model)
    if arm == WHOLE:
        return base
    small = layer_pruned_copy(base, KEPT_LAYERS)
    if arm == SMALL:
        return small
    return KVPredictionModel(base, small, kv_weight=1.0 if arm == PREDICTED else 0.0)


def loss_of(run: Run[Setting]) -> float:
    """Nats per byte of what follows the prompts; the worst value where training diverged."""
    arm, streams = run.setting.arm, Streams(run.seed)
    with streams.globally("model"):
        model = made(arm)
    try:
        if arm != WHOLE:
            _train(model, run.setting.lr, streams)
    except Diverged:
        return WORST
    text = bytes_of_text(BASE, run.split, JUDGED, PROMPT + CONTINUED, streams("passages"))
    with torch.no_grad():
        return _continued(model, text)


def _train(model: Any, lr: float, streams: Streams) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS, eta_min=lr / 10)
    text = bytes_of_text(BASE, "calibration", STEPS * BATCH, PROMPT + CONTINUED, streams("order"))
    for batch in torch.split(text, BATCH):
        loss = model(batch, labels=batch).loss
        if not loss.isfinite():
            raise Diverged("the loss is no longer finite")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def _continued(model: Any, text: Int[Tensor, "n t"]) -> float:
    """The first byte is predicted from the prompt, each of the others with those before it at hand."""
    if isinstance(model, KVPredictionModel):
        cache = model.predicted_cache(text[:, : PROMPT - 1])
        logits = model.base(text[:, PROMPT - 1 : -1], past_key_values=cache).logits
    else:
        logits = model(text[:, :-1]).logits[:, PROMPT - 1 :]
    return float(F.cross_entropy(logits.flatten(0, 1), text[:, PROMPT:].flatten()))


def operations(model: KVPredictionModel, tokens: int) -> tuple[int, int]:
    """Until the first token: of the base by itself, and of the auxiliary model in its place."""
    sizes, aux_widths = (block_sizes(model.base), block_sizes(model.auxiliary)), widths(model.auxiliary)
    maps = [(aux_widths[i], d) for i, d in zip(model.predictor.layer_map, widths(model.base), strict=True)]
    return ttft_flops(tokens, sizes[0]), ttft_flops(tokens, *sizes, maps)


def _better(found: dict[str, list[float]], rates: str) -> Finding:
    below, above = gaps(found[SMALL], found[PREDICTED]), gaps(found[PREDICTED], found[WHOLE])
    better, bounded = above_zero(below, above)
    on_average = sum(below) > 0
    says: Verdict = "reproduced" if better and bounded else "partly" if on_average else "not reproduced"
    model = made(PREDICTED)
    whole, predicted = operations(model, PROMPT)
    small = ttft_flops(PROMPT, block_sizes(model.auxiliary))
    return Finding(
        claim="better-than-small",
        verdict=says,
        criterion="The loss of 32 bytes after a prompt of 96 is significantly lower with the predicted cache than with "
        "the small model alone, and significantly higher than the base's (paired sign-flip test over seeds, Holm over "
        "the two); partly if it is lower on average only.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            measured("loss, small model above predicted cache", below, "nats per byte"),
            measured("loss, predicted cache above base", above, "nats per byte"),
            *(measured(f"loss, {arm}", found[arm], "nats per byte") for arm in (SMALL, PREDICTED, WHOLE)),
            *(
                single(f"operations to the first byte, {arm}", count / whole, "part of the base's")
                for arm, count in ((SMALL, small), (PREDICTED, predicted))
            ),
        ),
        note=f"{STEPS} steps of {BATCH} passages for all. Learning rates: {rates}. The maps and the base's one byte "
        "come on top of the small model's operations.",
    )


def _cache_loss(found: dict[str, list[float]], rates: str) -> Finding:
    below = gaps(found[WITHOUT], found[PREDICTED])
    (better,) = above_zero(below)
    says: Verdict = "reproduced" if better else "partly" if sum(below) > 0 else "not reproduced"
    return Finding(
        claim="cache-loss",
        verdict=says,
        criterion="The loss of 32 bytes after a prompt of 96 is significantly lower if the error of keys and values is "
        "part of the training loss (paired sign-flip test over seeds); partly if it is lower on average only.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            measured("loss, without above with the cache loss", below, "nats per byte"),
            *(measured(f"loss, {arm}", found[arm], "nats per byte") for arm in (WITHOUT, PREDICTED)),
        ),
        note=f"Learning rates: {rates}.",
    )


@dataclass(frozen=True)
class Times:
    """Until the first token: seconds and counted operations, of the base by itself and with the auxiliary model."""

    tokens: int
    seconds: tuple[float, float]
    operations: tuple[int, int]


@torch.no_grad()
def first_token_times(lengths: tuple[int, ...]) -> list[Times]:
    """Medians; the two take turns."""
    base: Any = copy.deepcopy(loaded(TIMED).model)
    count = len(base.model.layers)
    keep = [round(i * (count - 1) / (TIMED_LAYERS - 1)) for i in range(TIMED_LAYERS)]
    with Streams(0).globally("model"):
        model = KVPredictionModel(base, layer_pruned_copy(base, keep))
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        return [_timed(model, tokens) for tokens in lengths]
    finally:
        torch.set_num_threads(threads)


def _timed(model: KVPredictionModel, tokens: int) -> Times:
    ids = torch.randint(1000, (1, tokens), generator=Streams(0)("passages"))
    seconds = []
    for _ in range(REPEATS + 1):
        start = perf_counter()
        model.base(ids, logits_to_keep=1)
        middle = perf_counter()
        model.base(ids[:, -1:], past_key_values=model.predicted_cache(ids[:, :-1]))
        seconds.append((middle - start, perf_counter() - middle))
    whole, predicted = (median(column) for column in zip(*seconds[1:], strict=True))
    return Times(tokens, (whole, predicted), operations(model, tokens))


def _time(times: list[Times]) -> Finding:
    saved = [1 - each.seconds[1] / each.seconds[0] for each in times]
    counted = [1 - each.operations[1] / each.operations[0] for each in times]
    half = all(found >= expected / 2 for found, expected in zip(saved, counted, strict=True))
    says: Verdict = "reproduced" if half else "partly" if min(saved) > 0 else "not reproduced"
    return Finding(
        claim="first-token-time",
        verdict=says,
        criterion="The share of the time to the first token that is saved is at least half of the share of operations "
        "saved, at prompts of 96, 256 and 512 tokens (medians); partly if some time is saved at all of them.",
        measurements=tuple(
            measurement
            for each, found, expected in zip(times, saved, counted, strict=True)
            for measurement in (
                single(f"time saved, {each.tokens} tokens", found, "fraction"),
                single(f"operations saved, {each.tokens} tokens", expected, "fraction"),
                single(f"time to the first token, base, {each.tokens} tokens", each.seconds[0], "seconds"),
            )
        ),
        note=f"SmolLM2-135M with {TIMED_LAYERS} of its layers as auxiliary model, {THREADS} threads; the predictor is "
        "not trained, which changes no time.",
    )
