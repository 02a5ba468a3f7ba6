"""The claims of the PrefixKV paper: budgets from one threshold lose less than equal budgets, and than other eviction.

SmolLM2-135M instead of LLaVA, on Python's documentation. A prompt is read once; for each rule its tokens are dropped
from a copy of the cache, and the tokens that follow are scored in one go, without dropping any more.
"""

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fairtrial.catalog import Finding, Verdict
from fairtrial.claims.arms import Run, evaluate
from fairtrial.claims.kv_caches import logits_of, losses, part_of, passages
from fairtrial.claims.measure import Measure, measured
from fairtrial.claims.paired import above_zero, gaps, surely_below
from fairtrial.claims.smollm2 import smollm2
from fairtrial.methods.kvcache.prefixkv import PrefixKVCache, prefix_budgets, prefix_mask
from fairtrial.tasks.streams import Streams

PROMPT, CONTINUED, SEEDS = 512, 64, 20
MEASURED_AHEAD = 10  # prompts
KEPT = (0.2, 0.4, 0.6, 0.8)
DECISIVE = (0.2, 0.4)  # the budgets at which equal ones are compared with
SINKS, ENDS = 4, 2  # of the window; tokens that budgets always keep
WINDOW, RANDOM = "sinks and window", "random"
EQUAL, SEARCHED, AHEAD = "equal budgets", "searched budgets", "budgets measured ahead"
NEAR, FAR = 0.02, 0.05


def check(measure: Measure) -> list[Finding]:
    ahead = measure.map(budgets_of, range(MEASURED_AHEAD))
    shares = tuple(
        tuple(sum(found[i][layer] for found in ahead) / len(ahead) for layer in range(len(ahead[0][i])))
        for i in range(len(KEPT))
    )
    found = evaluate(measure, shortened, {"prompt": Setting(shares)}, seeds=SEEDS)["prompt"]
    return [_budgets(found), _rules(found), _ahead(found)]


@dataclass(frozen=True)
class Setting:
    """The share that each layer forgets, measured ahead, for each budget."""

    shares: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Shortened:
    """What dropping tokens of a prompt does.

    Attributes:
        whole: loss of the tokens that follow with the whole cache, in nats per token.
        loss: by rule and share kept.
        part: of the whole cache's bytes, likewise.
        retained: the least share of attention that a layer retains, likewise.
    """

    whole: float
    loss: dict[tuple[str, float], float]
    part: dict[tuple[str, float], float]
    retained: dict[tuple[str, float], float]


class Read(PrefixKVCache):
    """A whole prompt, and the attention that its tokens have received."""

    importance: Float[Tensor, "l t"]

    def shorten(self, importance: Tensor, mask: Tensor | None) -> None:
        super().shorten(importance, mask)
        self.importance = importance[:, 0]


def read(ids: Int[Tensor, "1 t"]) -> Read:
    cache = Read(smollm2().model.config, 1.0)
    logits_of(ids, cache)
    return cache


def budgets_of(number: int) -> list[list[float]]:
    """The share that each layer forgets of a prompt of the training part, for each budget."""
    importance = read(passages("training", PROMPT)[number : number + 1]).importance
    return [(prefix_budgets(importance, kept, protect=ENDS).double() / PROMPT).tolist() for kept in KEPT]


def kept_tokens(
    rule: str, share: float, importance: Float[Tensor, "l t"], ahead: tuple[float, ...], seed: int
) -> Bool[Tensor, "l t"]:
    """Which tokens a rule keeps in each layer; all rules keep as many in total, but for rounding."""
    layers, tokens = importance.shape
    equal = torch.full((layers,), round((1 - share) * tokens))
    if rule == WINDOW:
        places = torch.arange(tokens)
        return ((places < SINKS) | (places >= SINKS + equal[0])).expand(layers, -1)
    if rule == RANDOM:
        drawn = torch.rand(layers, tokens, generator=Streams(seed)("method"))
        return prefix_mask(drawn, equal)
    forget = {
        EQUAL: equal,
        SEARCHED: prefix_budgets(importance, share, protect=ENDS),
        AHEAD: (torch.tensor(ahead, dtype=torch.float64) * tokens).round().long(),
    }
    return prefix_mask(importance, forget[rule])


@torch.no_grad()
def shortened(run: Run[Setting]) -> Shortened:
    ids = passages(part_of(run.split), PROMPT + CONTINUED + 1)[run.seed : run.seed + 1]
    cache = read(ids[:, :PROMPT])
    importance = cache.importance
    loss, part, retained = {}, {}, {}
    for share, ahead in zip(KEPT, run.setting.shares, strict=True):
        for rule in (EQUAL, SEARCHED, AHEAD, WINDOW, RANDOM):
            kept = kept_tokens(rule, share, importance, ahead, run.seed)
            short = copy.deepcopy(cache)
            for layer, tokens in zip(short.layers, kept, strict=True):
                layer.keep(tokens[None])
            part[rule, share] = short.nbytes / cache.nbytes
            loss[rule, share] = _continued(short, ids)
            retained[rule, share] = float(((importance * kept).sum(-1) / importance.sum(-1)).min())
    return Shortened(_continued(cache, ids), loss, part, retained)


def _continued(cache: PrefixKVCache, ids: Int[Tensor, "1 t"]) -> float:
    return losses(logits_of(ids[:, PROMPT:-1], cache), ids[:, PROMPT + 1 :])[0]


def _of(found: list[Shortened], rule: str, share: float) -> list[float]:
    return [each.loss[rule, share] for each in found]


def _budgets(found: list[Shortened]) -> Finding:
    less = {share: gaps(_of(found, EQUAL, share), _of(found, SEARCHED, share)) for share in DECISIVE}
    better = above_zero(*less.values())
    says: Verdict = "reproduced" if all(better) else "partly" if any(better) else "not reproduced"
    whole = [each.whole for each in found]
    return Finding(
        claim="adaptive-budgets",
        verdict=says,
        criterion="The loss of the tokens that follow is significantly lower with searched than with equal budgets at "
        "both 20 and 40 % (paired sign-flip test over prompts, Holm over the two); partly at one.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(f"loss, equal above searched budgets, {share:.0%}", gap, "nats per token")
                for share, gap in less.items()
            ),
            *(
                measured(
                    f"loss above the whole cache's, {rule}, {share:.0%}",
                    gaps(_of(found, rule, share), whole),
                    "nats per token",
                )
                for share in KEPT
                for rule in (EQUAL, SEARCHED)
            ),
            *(
                measured(
                    f"bytes, {rule}, {share:.0%}",
                    [each.part[rule, share] for each in found],
                    "part of the whole cache's",
                )
                for share in KEPT
                for rule in (EQUAL, SEARCHED)
            ),
            *(
                measured(
                    f"least attention retained, {rule}, {share:.0%}",
                    [each.retained[rule, share] for each in found],
                    "fraction",
                )
                for share in KEPT
                for rule in (EQUAL, SEARCHED)
            ),
        ),
        note="A layer's tokens are ranked alike with both budgets. The factor of the perplexity is the exponential of "
        "the loss above the whole cache's.",
    )


def _rules(found: list[Shortened]) -> Finding:
    pairs = [(rule, share) for share in KEPT for rule in (WINDOW, RANDOM)]
    less = {pair: gaps(_of(found, *pair), _of(found, SEARCHED, pair[1])) for pair in pairs}
    better = dict(zip(pairs, above_zero(*less.values()), strict=True))
    both = [better[WINDOW, share] and better[RANDOM, share] for share in KEPT]
    says: Verdict = "reproduced" if all(both) else "partly" if sum(both) >= len(KEPT) / 2 else "not reproduced"
    return Finding(
        claim="better-than-other-eviction",
        verdict=says,
        criterion="The loss of the tokens that follow is significantly lower with searched budgets than both with "
        "sinks and a window and with random tokens, at 20, 40, 60 and 80 % (paired sign-flip test over prompts, Holm "
        "over the eight); partly if at half of the budgets or more.",
        seeds=tuple(range(SEEDS)),
        measurements=tuple(
            measured(f"loss, {rule} above searched budgets, {share:.0%}", gap, "nats per token")
            for (rule, share), gap in less.items()
        ),
        note=f"The window keeps the first {SINKS} tokens and the last ones.",
    )


def _ahead(found: list[Shortened]) -> Finding:
    above = {share: gaps(_of(found, AHEAD, share), _of(found, SEARCHED, share)) for share in KEPT}
    ratios = {share: [float(torch.tensor(gap).exp()) - 1 for gap in found] for share, found in above.items()}
    within = [all(surely_below(found, bound) for found in ratios.values()) for bound in (NEAR, FAR)]
    says: Verdict = "reproduced" if within[0] else "partly" if within[1] else "not reproduced"
    return Finding(
        claim="offline-ratios",
        verdict=says,
        criterion="The perplexity of the tokens that follow is at most 2 % higher with budgets measured ahead than "
        "with those searched for the prompt, at each of the four shares (95 % interval of the mean over prompts); "
        "partly if at most 5 %.",
        seeds=tuple(range(SEEDS)),
        measurements=tuple(
            measured(f"perplexity, measured ahead above searched, {share:.0%}", found, "fraction")
            for share, found in ratios.items()
        ),
        note=f"Shares averaged over {MEASURED_AHEAD} prompts of other text.",
    )
