"""The claims of the xKV paper: several layers share their tokens' coefficients, and lose less at equal bytes.

SmolLM2-135M instead of Llama-3.1-8B, on Python's documentation. A prompt's keys and values are computed once and handed
to caches of each group size, whose rank is the largest with which the cache is no larger than that of single layers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from fairtrial.catalog import Finding, Verdict
from fairtrial.claims.arms import Run, evaluate
from fairtrial.claims.kv_caches import logits_of, losses, part_of, passages
from fairtrial.claims.measure import Measure, measured, single
from fairtrial.claims.paired import above_zero, gaps, surely_above
from fairtrial.claims.smollm2 import smollm2
from fairtrial.methods.kvcache.held import shape_of, together
from fairtrial.methods.kvcache.rotary import Rotary
from fairtrial.methods.kvcache.xkv import XKVCache, group_layers, subspace_overlap, xkv_bytes

LENGTHS, CONTINUED, SEEDS = (1024, 2048), 64, 8
SIZES = (1, 2, 4, 8)
SHARES = {"keys": 1 / 8, "values": 3 / 16}  # of a layer's channels, for groups of one; the authors'
OVERLAP_RANK, EVERY = 24, 3  # an eighth of the channels; every third pair of neighbours
OF_INTEREST = 4


def check(measure: Measure) -> list[Finding]:
    settings = {length: Prompt(length) for length in LENGTHS}
    found = evaluate(measure, cut_prompt, settings, seeds=SEEDS)
    return [_gain(found), _alignment(found[max(LENGTHS)])]


@dataclass(frozen=True)
class Prompt:
    """A prompt of so many tokens."""

    tokens: int


@dataclass(frozen=True)
class Cut:
    """What cutting the cache of a prompt does.

    Attributes:
        error: relative squared error, mean of keys and values, by group size.
        loss: of the continued tokens in nats, by group size; 0 stands for the plain cache.
        part: of the plain cache's bytes, by group size.
        overlap: of the subspaces of neighbouring layers, mean over pairs, keys and values.
        cosine: of the tokens of neighbouring layers, likewise.
    """

    error: dict[int, float]
    loss: dict[int, float]
    part: dict[int, float]
    overlap: float
    cosine: float


def rank_of(tokens: int, layers: int, width: int, size: int, rank: int) -> int:
    """The largest rank of groups of a size with which all take no more bytes than single layers at the given rank."""
    budget = layers * xkv_bytes(tokens, width, 1, rank)
    each = sum(xkv_bytes(tokens, width, len(group), 1) for group in group_layers(layers, size))
    return min(budget // each, tokens)


def cut_prompt(run: Run[Prompt]) -> Cut:
    config, tokens = smollm2().model.config, run.setting.tokens
    layers, heads, head_width = shape_of(config)
    width = heads * head_width
    ids = passages(part_of(run.split), max(LENGTHS) + CONTINUED)[run.seed : run.seed + 1]
    ids = ids[:, -tokens - CONTINUED :]  # the same tokens continue prompts of either length
    plain = DynamicCache(config=config)
    logits_of(ids[:, :tokens], plain)
    keys, values = ([getattr(layer, name) for layer in plain.layers] for name in ("keys", "values"))
    caches = {}
    error, part = {}, {}
    for size in SIZES:
        ranks = {
            f"rank_{name[0]}": rank_of(tokens, layers, width, size, round(share * width))
            for name, share in SHARES.items()
        }
        cache = caches[size] = XKVCache(config, group_size=size, **ranks)
        for number, (k, v) in enumerate(zip(keys, values, strict=True)):
            cache.update(k, v, number)
        cut = [layer.prompt(heads) for layer in cache.layers]
        errors = [relative_error(whole, [pair[i] for pair in cut]) for i, whole in enumerate((keys, values))]
        error[size] = sum(errors) / 2
        part[size] = cache.nbytes / sum(x.nbytes for x in (*keys, *values))
    overlap, cosine = _neighbours(keys, values) if tokens == max(LENGTHS) else (0.0, 0.0)
    following = ids[:, tokens:]
    loss = {size: _continued(cache, following) for size, cache in {0: plain, **caches}.items()}
    return Cut(error, loss, part, overlap, cosine)


def relative_error(whole: list[Tensor], cut: list[Tensor]) -> float:
    """‖x - x̂‖² / ‖x‖² over all layers."""
    off = sum((x - y).square().sum() for x, y in zip(whole, cut, strict=True))
    return float(off / sum(x.square().sum() for x in whole))


def _continued(cache: Any, following: Tensor) -> float:
    """The mean loss of all continued tokens but the first, each of which sees those before it as they are."""
    return losses(logits_of(following[:, :-1], cache), following[:, 1:])[0]


def _neighbours(keys: list[Tensor], values: list[Tensor]) -> tuple[float, float]:
    rotary = Rotary(smollm2().model.config)
    bare = [rotary.take_off(k) for k in keys]
    pairs = [(x[i], x[i + 1]) for x in (bare, values) for i in range(0, len(x) - 1, EVERY)]
    overlaps = [float(subspace_overlap(x, y, OVERLAP_RANK)) for x, y in pairs]
    return sum(overlaps) / len(pairs), sum(token_cosine(x, y) for x, y in pairs) / len(pairs)


def token_cosine(x: Float[Tensor, "b h t d"], y: Float[Tensor, "b h t d"]) -> float:
    """The mean cosine of a token's keys (or values) in two layers, over all heads together."""
    return float(torch.nn.functional.cosine_similarity(together(x), together(y), dim=-1).mean())


def _gain(found: dict[int, list[Cut]]) -> Finding:
    longest = found[max(LENGTHS)]
    less_error = gaps([cut.error[1] for cut in longest], [cut.error[OF_INTEREST] for cut in longest])
    less_loss = gaps([cut.loss[1] for cut in longest], [cut.loss[OF_INTEREST] for cut in longest])
    error, loss = above_zero(less_error, less_loss)
    says: Verdict = "reproduced" if error and loss else "partly" if error else "not reproduced"
    return Finding(
        claim="cross-layer-gain",
        verdict=says,
        criterion=f"With prompts of {max(LENGTHS)} tokens, groups of {OF_INTEREST} layers have both a lower relative "
        "squared error and a lower loss of the tokens that follow than single layers at equal bytes (paired sign-flip "
        "test, Holm over the two); partly if only the error is lower.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            measured(f"error, single layers above groups of {OF_INTEREST}", less_error, "relative squared error"),
            measured(f"loss, single layers above groups of {OF_INTEREST}", less_loss, "nats per token"),
            *(
                measurement
                for length, cuts in found.items()
                for size in SIZES
                for measurement in (
                    measured(
                        f"error, {length} tokens, groups of {size}",
                        [cut.error[size] for cut in cuts],
                        "relative squared error",
                    ),
                    measured(
                        f"loss above the plain cache's, {length} tokens, groups of {size}",
                        [cut.loss[size] - cut.loss[0] for cut in cuts],
                        "nats per token",
                        paper="accuracy on RULER +2.7 %, at up to 6.8 times the compression" if size == 4 else "",
                    ),
                    single(
                        f"bytes, {length} tokens, groups of {size}", cuts[0].part[size], "part of the plain cache's"
                    ),
                )
            ),
        ),
        note="Errors are the mean of keys and values. Ranks of single layers are an eighth (keys) and three sixteenths "
        "(values) of their channels, as in the paper; those of groups follow from equal bytes, bases included.",
    )


def _alignment(cuts: list[Cut]) -> Finding:
    overlap, cosine = [cut.overlap for cut in cuts], [cut.cosine for cut in cuts]
    level = OVERLAP_RANK / max(LENGTHS)
    above_cosine, above_random = surely_above(gaps(overlap, cosine), 0.0), surely_above(overlap, level)
    says: Verdict = "not reproduced"
    if above_random:
        says = "reproduced" if above_cosine else "partly"
    return Finding(
        claim="subspace-alignment",
        verdict=says,
        criterion="The mean overlap of the leading token subspaces of neighbouring layers is above both the mean "
        "cosine of their tokens and the overlap of random subspaces (95 % intervals of the mean over prompts); partly "
        "if only above the latter.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            measured(f"overlap of subspaces of rank {OVERLAP_RANK}", overlap, "part of the rank"),
            measured("cosine of tokens", cosine, "cosine"),
            single("overlap of random subspaces", level, "part of the rank"),
        ),
        note=f"Keys before rotary embeddings and values, of every third pair of neighbours; {max(LENGTHS)} tokens.",
    )
