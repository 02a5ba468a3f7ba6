"""Mirostat: sampling with feedback, so that the average surprise of a text stays at a target (Basu et al. 2021,
arXiv:2007.14966).

The surprise of a token x is S(x) = -log2 p(x), in bits, under the model's whole distribution. Each sequence has a limit
μ, at first 2τ for a target of τ bits. A step sorts p_1 ≥ p_2 ≥ … and (Algorithm 1)

    ŝ = Σ t_i b_i / Σ t_i²,   t_i = ln((i + 1) / i),   b_i = ln(p_i / p_{i+1}),   i = 1 … m
    k = (ε 2^μ / (1 - N^-ε))^(1/ŝ),   ε = ŝ - 1

fits Zipf's law to the m + 1 most likely of N tokens and takes the k whose last token would have surprise μ. The token
is sampled from the first round(k) + 1, as in the authors' code, and the limit follows: μ ← μ - η (S(x) - τ). So the
errors add up to (μ_0 - μ_T) / η, and the mean surprise goes to τ. Where even the likeliest tokens exceed τ the limit
would sink for ever; it is held at -10, where k is 1.

The authors' code takes N = 50000 whatever the vocabulary; here it is the vocabulary. Version 2 is not in the paper but
in wide use since llama.cpp had it: it keeps all tokens with S ≤ μ, at least one, without any fit, at η = 0.1. Open
implementations differ in whether its S is taken before or after truncation; here it is before, as in version 1.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fairtrial.methods.arguments import require
from fairtrial.methods.decoding.sampling import end_tokens, growing
from fairtrial.methods.registry import LogUniform, Uniform, method
from fairtrial.methods.whole import require_whole, whole

try:
    from transformers import LogitsProcessor
except ImportError as error:
    raise ImportError("mirostat is a processor of transformers: pip install 'fairtrial[llm]'") from error

LOWEST = -10.0  # of the limit μ
BIT = math.log(2)


@method(paper="mirostat", slot="decoder", search={"tau": Uniform(1.0, 6.0), "eta": LogUniform(0.03, 1.0)})
class MirostatLogitsProcessor(LogitsProcessor):
    """Keep so many tokens that the average surprise of what is sampled goes to a target.

    It follows every sequence of a batch by itself. A processor sees a token only when the next one is asked for: the
    limits are updated then, from `input_ids[:, -1]`. A call of another shape than the next one would have begins anew.
    What processors before it have removed is no part of the distribution; a temperature after it changes what is
    sampled, not what counts as surprising. With an assistant model a rejected token begins anew too: leave it off.

    Args:
        tau: target in bits, above 0.
        eta: learning rate of the limit, at least 0; by default 1 for version 1, 0.1 for version 2.
        m: terms in the fit of Zipf's law, fewer than there are tokens; version 1 only.
        version: 1, the paper's, or 2.

    Attributes:
        mu: limit of each sequence in bits, None before the first call.

    The defaults are the authors'; llama.cpp's target for version 2 is 5.

    Raises:
        ValueError: an argument is out of range, `input_ids` do not go on from the call before, as with beam search, or
            scores are no distribution.
    """

    mu: Float[Tensor, " b"] | None

    def __init__(self, tau: float = 3.0, eta: float | None = None, m: int = 100, version: Literal[1, 2] = 1) -> None:
        require(0 < tau < math.inf, "tau", tau, "above 0 and finite")
        require(eta is None or 0 <= eta < math.inf, "eta", eta, "None, or at least 0 and finite")
        require_whole("m", m)
        require(whole(version) and version in (1, 2), "version", version, "1 or 2")
        self.tau, self.m, self.version = tau, m, version
        self.eta = {1: 1.0, 2: 0.1}[version] if eta is None else eta
        self.reset()

    def reset(self) -> None:
        """Forget the texts so far."""
        self.mu = None
        self._so_far: Tensor | None = None
        self._surprises: Tensor | None = None

    def __call__(self, input_ids: Int[Tensor, "b t"], scores: Float[Tensor, "b v"]) -> Float[Tensor, "b v"]:
        self._follow(input_ids)
        wide = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
        surprises = wide.log_softmax(-1) / -BIT
        if bool(surprises.isnan().any()):
            raise ValueError("scores must be a distribution in each row, got NaN, infinity or no token at all")
        if self.mu is None:
            self.mu = surprises.new_full((len(scores),), 2 * self.tau)
        self._surprises = surprises
        if self.version == 2:
            removed = surprises > self.mu.clamp(min=surprises.amin(-1))[:, None]
        else:
            removed = self._beyond_k(surprises)
        return scores.masked_fill(removed, -math.inf)

    def observe(self, input_ids: Int[Tensor, "b t"]) -> Float[Tensor, " b"]:
        """Update the limits by the token sampled last, at the end of `input_ids`; returns its surprise in bits.

        The next call does so by itself. Nobody calls after the last token.

        Raises:
            ValueError: nothing has been sampled since the last update, or the sequences are others.
        """
        if self._so_far is None or self._surprises is None or self.mu is None:
            raise ValueError("observe must come after a call, got none since the last update")
        if input_ids.shape[1] != self._so_far.shape[1] + 1 or not torch.equal(input_ids[:, :-1], self._so_far):
            raise ValueError(
                "input_ids must go on from the sequences before, got others: beam search is not possible with "
                "mirostat, and new prompts need reset()"
            )
        found = self._surprises.gather(1, input_ids[:, -1:])[:, 0]
        self.mu = (self.mu - self.eta * (found - self.tau)).clamp(min=LOWEST) if self.eta else self.mu
        self._surprises = None
        return found

    def _follow(self, input_ids: Tensor) -> None:
        before = self._so_far
        if before is not None and input_ids.shape != (len(before), before.shape[1] + 1):
            self.reset()
        elif before is not None and self._surprises is not None:
            self.observe(input_ids)
        self._so_far = input_ids

    def _beyond_k(self, surprises: Float[Tensor, "b v"]) -> Tensor:
        vocabulary = surprises.shape[-1]
        require(self.m < vocabulary, "m", self.m, f"below the {vocabulary} tokens of the vocabulary")
        s = _fit(-BIT * surprises.topk(self.m + 1, largest=False).values)
        assert self.mu is not None
        counts = mirostat_k(s, self.mu, vocabulary).round() + 1
        most = min(int(counts.max()), vocabulary)
        ranks = torch.arange(most, device=counts.device)
        tokens = surprises.topk(most, largest=False).indices
        removed = torch.ones_like(surprises, dtype=torch.bool)
        return removed.scatter_(-1, tokens, ranks >= counts[:, None])


def zipf_exponent(probs: Float[Tensor, "*b n"], m: int = 100) -> Float[Tensor, "*b"]:
    """The exponent of Zipf's law by least squares on the m + 1 most likely tokens; zeros among them are left out.

    Raises:
        ValueError: there are no m + 1 tokens.
    """
    require_whole("m", m)
    require(m < probs.shape[-1], "m", m, f"from 1 to {probs.shape[-1] - 1}, one below the number of tokens")
    return _fit(probs.topk(m + 1).values.log())


def _fit(log_probs: Float[Tensor, "*b m1"]) -> Float[Tensor, "*b"]:
    """ŝ of the likeliest tokens in order; 1 where fewer than two of them are possible."""
    ranks = torch.arange(1, log_probs.shape[-1], dtype=log_probs.dtype, device=log_probs.device)
    there = log_probs[..., 1:].isfinite()
    t = torch.where(there, (1 / ranks).log1p(), 0)
    b = torch.where(there, log_probs[..., :-1] - log_probs[..., 1:], 0)
    return torch.where(there.any(-1), (t * b).sum(-1) / t.square().sum(-1), 1)


def mirostat_k(s: Float[Tensor, "*b"], mu: Float[Tensor, "*b"], vocab: int) -> Float[Tensor, "*b"]:
    """How many tokens have a surprise of at most `mu` bits under Zipf's law with exponent `s`, before rounding.

    Computed in logarithms; at most `vocab`.
    """
    require_whole("vocab", vocab, 2)
    size = math.log(vocab)
    s = s.clamp(max=torch.finfo(s.dtype).max)  # of logits so far apart that their fit overflows
    excess = s - 1
    # ε / (1 - N^-ε), which is 1 / ln N at ε = 0
    ratio = torch.where(excess == 0, 1 / size, excess / -torch.expm1(-excess * size))
    log_k = (ratio.log() + mu * BIT) / s.clamp(min=1e-6)  # no tail at all if the likeliest are equally likely
    return log_k.clamp(max=size).exp()


def zipf_cross_entropy(s: float, vocab: int, k: int) -> float:
    """Mean surprise in bits, under Zipf's law over `vocab` tokens, of a token sampled from the first k.

    Raises:
        ValueError: `k` is not among the tokens, or `s` is below 0.
    """
    require(0 <= s < math.inf, "s", s, "at least 0 and finite")
    require_whole("vocab", vocab)
    require_whole("k", k)
    require(k <= vocab, "k", k, f"from 1 to {vocab}")
    ranks = torch.arange(1, vocab + 1, dtype=torch.float64)
    weights = ranks.pow(-s)
    surprises = s * ranks.log2() + weights.sum().log2()
    return float((weights[:k] * surprises[:k]).sum() / weights[:k].sum())


class Observed(NamedTuple):
    """What `mirostat_generate` returns.

    Attributes:
        tokens: prompts and continuations.
        surprises: of each new token in bits; NaN behind the end of a sequence.
    """

    tokens: Int[Tensor, "b _"]
    surprises: Float[Tensor, "b _"]


def mirostat_generate(
    model: Any,
    input_ids: Int[Tensor, "b t"],
    attention_mask: Int[Tensor, "b t"] | None = None,
    *,
    max_new_tokens: int,
    tau: float = 3.0,
    eta: float | None = None,
    m: int = 100,
    version: Literal[1, 2] = 1,
    temperature: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    streamer: Any = None,
) -> Observed:
    """Sample with mirostat and report the surprises.

    Args:
        model: a causal language model of `transformers`.
        input_ids: prompts, padded on the left; they do not count.
        attention_mask: 0 where there is padding; nowhere by default.
        max_new_tokens: of each sequence.
        tau, eta, m, version: as of `MirostatLogitsProcessor`.
        temperature: that divides the logits of the kept tokens.
        eos_token_id: one or several; by default those of the model's `generation_config`, and none for `()`.
        generator: to draw from; by default the global one.
        streamer: as of `generate`.

    Raises:
        ValueError: as of `MirostatLogitsProcessor` and `sample`.
    """
    processor = MirostatLogitsProcessor(tau, eta, m, version)
    tokens, surprises = input_ids, []
    for tokens in growing(
        model,
        input_ids,
        attention_mask,
        max_new_tokens=max_new_tokens,
        processors=[processor],
        temperature=temperature,
        eos_token_id=eos_token_id,
        generator=generator,
        streamer=streamer,
    ):
        surprises.append(processor.observe(tokens))
    ends = torch.isin(tokens[:, input_ids.shape[1] :], end_tokens(model, eos_token_id)).int()
    return Observed(tokens, torch.stack(surprises, 1).masked_fill(ends.cumsum(1) > ends, math.nan))
