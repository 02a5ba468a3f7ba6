"""Top-H: as many of the most likely tokens as keep the entropy within a share of the whole (arXiv:2509.02510, 2025).

Of the next-token distribution p with entropy H(p) a set S of tokens is kept and renormalised to q_S = p_S / Γ_S with
the mass Γ_S = Σ_S p. The divergence from p depends on S through Γ_S alone and falls with it, so that the best set is

    max Γ_S   such that   H(q_S) ≤ α H(p),

which is hard to find. Algorithm 1 adds tokens in the order of their probability. With the partial entropy
h_k = -Σ_{i≤k} p_i log p_i of the first k of them, H(q_k) = h_k / Γ_k + log Γ_k never falls with k; the largest k within
the bound is kept, and always the first token.

The test of the authors' code has the same log Γ_k on both sides, so that it comes to h_k ≤ α h_n over the n = 100 most
likely tokens, without renormalising what is kept; `TopHLogitsWarper` of transformers has that test too, after
renormalising the n tokens. That is `criterion="partial"` here. Of N equally likely tokens it keeps α N, and Algorithm 1
keeps N^α. The default is the algorithm, which alone has the guarantee.

What is kept belongs to the tempered distribution. Where the logits are tempered first there is nothing more to do; but
`generate` applies its temperature after the processors that a person hands over. The processor can then be told the
temperature, and, as the authors' code does, leaves the logits that it keeps as they are.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fairtrial.methods.arguments import require
from fairtrial.methods.decoding.sampling import tempered
from fairtrial.methods.registry import Uniform, method
from fairtrial.methods.whole import require_whole

try:
    from transformers import LogitsProcessor
except ImportError as error:
    raise ImportError("top-H is a processor of transformers: pip install 'fairtrial[llm]'") from error

Criterion = Literal["renormalized", "partial"]

FIRST_LOOK = (
    1024  # that many of the most likely tokens nearly always suffice, and sorting them all takes ten times as long
)


@method(paper="top_h", slot="decoder", search={"alpha": Uniform(0.1, 0.9)})
class TopHLogitsProcessor(LogitsProcessor):
    """Keep the most likely tokens whose entropy stays within a share of the whole distribution's.

    Takes any batch, and beams.

    Args:
        alpha: that share, within (0, 1]; 1 keeps everything.
        criterion: which entropy is held to it: of the kept tokens, 'renormalized' (Algorithm 1), or their 'partial' sum
            (the authors' code).
        top_n: only so many of the most likely tokens are considered: for 'partial' 100 by default, else all. With
            'partial' they are renormalised and the bound is theirs.
        temperature: that is going to divide the logits afterwards, above 0; the kept set is that of the result. 1 if
            they have been tempered already.
        filter_value: what the logits of other tokens become, or the lowest number that their dtype has if this is lower
            and finite.
        min_tokens_to_keep: at least 1.

    The defaults are the paper's.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        alpha: float = 0.4,
        criterion: Criterion = "renormalized",
        top_n: int | None = None,
        *,
        temperature: float = 1.0,
        filter_value: float = -math.inf,
        min_tokens_to_keep: int = 1,
    ) -> None:
        check_share(alpha, criterion)
        if top_n is not None:
            require_whole("top_n", top_n)
        require(0 < temperature < math.inf, "temperature", temperature, "above 0 and finite")
        require(filter_value < math.inf, "filter_value", filter_value, "a number below infinity")
        require_whole("min_tokens_to_keep", min_tokens_to_keep)
        self.alpha, self.criterion = alpha, criterion
        self.top_n = 100 if top_n is None and criterion == "partial" else top_n
        self.temperature, self.filter_value = temperature, filter_value
        self.min_tokens_to_keep = min_tokens_to_keep

    def __call__(self, input_ids: Int[Tensor, "b t"], scores: Float[Tensor, "b v"]) -> Float[Tensor, "b v"]:
        logits = tempered(scores.to(torch.promote_types(scores.dtype, torch.float32)), self.temperature)
        n = min(self.top_n or scores.shape[-1], scores.shape[-1])
        if self.criterion == "partial":
            logits, tokens = logits.topk(n)
            kept = torch.zeros_like(scores, dtype=torch.bool)
            kept.scatter_(-1, tokens, top_h_mask(logits.softmax(-1), self.alpha, self.criterion))
        else:
            kept = _mask(logits.softmax(-1), self.alpha, self.criterion, n)
        if self.min_tokens_to_keep > 1:
            kept.scatter_(-1, scores.topk(min(self.min_tokens_to_keep, scores.shape[-1])).indices, True)
        fits = math.isinf(self.filter_value) or self.filter_value >= torch.finfo(scores.dtype).min
        return scores.masked_fill(~kept, self.filter_value if fits else torch.finfo(scores.dtype).min)


def check_share(alpha: float, criterion: str) -> None:
    require(0 < alpha <= 1, "alpha", alpha, "within (0, 1]")
    require(criterion in ("renormalized", "partial"), "criterion", criterion, "'renormalized' or 'partial'")


def top_h_mask(
    probs: Float[Tensor, "*b n"], alpha: float = 0.4, criterion: Criterion = "renormalized"
) -> Bool[Tensor, "*b n"]:
    """Which tokens top-H keeps.

    Args:
        probs: distributions, each adding up to 1.
        alpha: share of the entropy, within (0, 1].
        criterion: 'renormalized' or 'partial'.

    Raises:
        ValueError: `alpha` or `criterion` is neither.
    """
    check_share(alpha, criterion)
    return _mask(probs, alpha, criterion, probs.shape[-1])


def _mask(probs: Float[Tensor, "*b n"], alpha: float, criterion: str, top_n: int) -> Bool[Tensor, "*b n"]:
    """The kept ones among the `top_n` most likely tokens; the bound is of all."""
    if alpha == 1:  # not left to sums of rounded numbers
        return torch.zeros_like(probs, dtype=torch.bool).scatter_(-1, probs.topk(top_n).indices, True)
    bound = -alpha * torch.special.xlogy(probs, probs).sum(-1, keepdim=True)
    for looked_at in (min(FIRST_LOOK, top_n), top_n):
        likely, tokens = probs.topk(looked_at)
        entropy = -torch.special.xlogy(likely, likely).cumsum(-1)
        if criterion == "renormalized":
            mass = likely.cumsum(-1)
            entropy = entropy / mass + mass.log()
        beyond = ((entropy > bound) | (likely == 0)).cumsum(-1) > 0
        if looked_at == top_n or bool(beyond[..., -1].all()):
            break
    beyond[..., 0] = False
    return torch.zeros_like(probs, dtype=torch.bool).scatter(-1, tokens, ~beyond)


def ecmm_bruteforce(probs: Float[Tensor, " n"], alpha: float) -> Bool[Tensor, " n"]:
    """The set of largest mass whose renormalised entropy is within α H(p), out of all 2^n - 1 (n up to 16).

    Raises:
        ValueError: `alpha` is out of range, or there are too many tokens.
    """
    check_share(alpha, "renormalized")
    n = len(probs)
    require(1 <= n <= 16, "probs", f"{n} tokens", "of 1 to 16 tokens")
    numbers = torch.arange(1, 2**n, device=probs.device)
    sets = torch.bitwise_and(numbers[:, None] >> torch.arange(n, device=probs.device), 1).bool()
    mass = sets.to(probs.dtype) @ probs
    terms = -torch.special.xlogy(probs, probs)
    entropy = (sets.to(probs.dtype) @ terms) / mass + mass.log()
    rounding = 8 * torch.finfo(probs.dtype).eps
    allowed = (entropy <= alpha * terms.sum() + rounding) | (sets.sum(-1) == 1)
    return sets[mass.where(allowed, mass.new_tensor(-1.0)).argmax()]
