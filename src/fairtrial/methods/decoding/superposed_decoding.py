"""Superposed decoding: k drafts from one forward pass a token (Shen et al. 2024, arXiv:2405.18400).

All drafts of a prompt share one cache and one next-token distribution. What the model is fed is the mixture of the
embeddings of their last tokens, weighted by how likely the drafts are,

    e = Σ_d w_d E[x_d],   w = softmax(λ),

with log-scores λ_d. Of p = softmax(logits / T) with a very sharp T = 0.06 the most likely tokens are kept and
renormalised to p̂, and n-gram models tell which of them goes on from which draft:

    g_d(v) = Σ_n w_n P_n(v | last n tokens of draft d)
    ℓ_d(v) = (1 - α) log p̂(v) + α log g_d(v)

where an unseen context contributes 0, and a draft that no candidate goes on from has (1 - α) log p̂(v) less a penalty.
Without n-grams ℓ is log p̂ for all drafts. The 2k best of λ_d + ℓ_d(v) are taken as in beam search: those that end the
text may enter the pool of finished drafts, the k best others live on. At first all drafts are the prompt, so that only
one is expanded. At the end the k drafts of lowest perplexity exp(-λ / length) remain, finished or not.

Differences from the authors' code: where an n-gram's context would begin before the prompt it contributes 0, and not
the shorter context's probability again; p̂ is kept as a logarithm, so that a candidate far below the first does not
vanish at this temperature; finished drafts count at the end, whose perplexities a product of 0 and infinity makes NaN
there; prompts of several lengths are padded on the left; and a step with fewer possible continuations than k keeps
fewer drafts instead of impossible ones.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from fairtrial.methods.arguments import require
from fairtrial.methods.decoding.sampling import Continuation, end_tokens, padding_token, tempered
from fairtrial.methods.registry import Integer, Uniform, method
from fairtrial.methods.whole import require_whole, whole

NOWHERE = -1  # in a context: there is no token
FORMAT = "fairtrial n-grams 1"


class NGramInterpolator:
    """A weighted sum of n-gram models, counted from token ids.

    The n-grams of each length are kept as one sorted list: an n-gram's number among those of its length, and the token
    that follows it, are the key of an (n + 1)-gram. Looking up is searching these lists, for any number of contexts
    together; a saved model is opened without reading them to memory.

    Args:
        orders: numbers n of tokens in the contexts: 1 for bigrams.
        weights: of each; they need not add up to 1.

    The defaults are the paper's.

    Raises:
        ValueError: orders and weights do not fit each other or are out of range.
    """

    keys: list[Int[Tensor, " _"]]
    counts: list[Int[Tensor, " _"]]
    totals: list[Int[Tensor, " _"]]

    def __init__(
        self,
        orders: Sequence[int] = (1, 2, 3, 4, 5),
        weights: Sequence[float] = (0.01, 0.04, 0.15, 0.18, 0.12),
    ) -> None:
        fits = len(orders) > 0 and all(whole(n, 1) for n in orders)
        require(fits, "orders", orders, "one or more whole numbers from 1")
        require(len(set(orders)) == len(orders), "orders", orders, "different from each other")
        require(len(weights) == len(orders), "weights", weights, f"one for each of {len(orders)} orders")
        require(all(0 <= weight < math.inf for weight in weights), "weights", weights, "at least 0 and finite")
        self.orders, self.weights = tuple(orders), tuple(weights)
        self.base, self.keys, self.counts, self.totals = 0, [], [], []

    def fit(self, token_sequences: Iterable[Int[Tensor, " _"]] | Int[Tensor, " _"]) -> "NGramInterpolator":
        """Count the n-grams of texts, given one by one or as a single text; returns itself.

        Raises:
            ValueError: there is no text of two tokens, or a token id is negative or no whole number.
        """
        texts = [token_sequences] if isinstance(token_sequences, Tensor) else list(token_sequences)
        for text in texts:
            fits = text.ndim == 1 and not text.is_floating_point() and not text.is_complex()
            require(fits, "token_sequences", f"{tuple(text.shape)} of {text.dtype}", "texts (t,) of whole token ids")
        gap = torch.tensor([NOWHERE])
        tokens = torch.cat([piece for text in texts for piece in (text.long().cpu(), gap)] or [gap])
        longest = max((len(text) for text in texts), default=0)
        require(longest >= 2, "token_sequences", f"{longest} tokens at most", "texts of at least 2 tokens")
        lowest = min(int(text.min()) for text in texts if len(text))
        require(lowest >= 0, "token_sequences", f"token id {lowest}", "of token ids from 0")
        self.base, self.keys, self.counts, self.totals = int(tokens.max()) + 1, [], [], []
        number, size = tokens, self.base
        for length in range(1, max(self.orders) + 1):
            following = F.pad(tokens[length:], (0, min(length, len(tokens))), value=NOWHERE)
            there = (number >= 0) & (following >= 0)
            keys, inverse, counts = torch.unique(
                number[there] * self.base + following[there], return_inverse=True, return_counts=True
            )
            totals = torch.zeros(size, dtype=torch.long).index_add_(0, keys // self.base, counts)
            self.keys.append(keys)
            self.counts.append(counts)
            self.totals.append(totals)
            size = len(keys)
            number = torch.full_like(tokens, NOWHERE).masked_scatter(there, inverse)
        return self

    def prob(self, context: Int[Tensor, "*b n"], token: Int[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        """g(token | context) for each of the tokens.

        Args:
            context: the last tokens before, the latest at the end; -1 where there is none.
            token: candidates.

        Raises:
            ValueError: nothing has been counted.
        """
        require(bool(self.keys), "prob", "a model without counts", "called after fit")
        device = token.device
        context, token = context.long().cpu(), token.long().cpu()
        total = torch.zeros(token.shape)
        for order, weight in zip(self.orders, self.weights, strict=True):
            if order > context.shape[-1] or not len(self.keys[order - 1]):
                continue
            node = context[..., -order]
            node = node.where(node < self.base, NOWHERE)
            for place in range(1, order):
                node = self._find(place - 1, node, context[..., place - order])
            found = self._find(order - 1, node[..., None].expand(token.shape), token)
            count = self.counts[order - 1][found.clamp(min=0)] * (found >= 0)
            seen = self.totals[order - 1][node.clamp(min=0)].clamp(min=1)
            total += weight * (count / seen[..., None])
        return total.to(device)

    def _find(self, level: int, node: Int[Tensor, "*b"], token: Int[Tensor, "*b"]) -> Int[Tensor, "*b"]:
        """The numbers of the n-grams that go on with these tokens; -1 for those that do not occur."""
        keys = self.keys[level]
        wanted = node * self.base + token
        place = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
        found = (keys[place] == wanted) & (node >= 0) & (token >= 0) & (token < self.base)
        return place.where(found, NOWHERE)

    def save(self, path: str | Path) -> None:
        """Write the counts to a file."""
        state = {"keys": self.keys, "counts": self.counts, "totals": self.totals}
        torch.save({"format": FORMAT, "orders": self.orders, "weights": self.weights, "base": self.base, **state}, path)

    @classmethod
    def load(cls, path: str | Path) -> "NGramInterpolator":
        """Open a saved model; its counts stay on disk until they are looked up.

        Raises:
            ValueError: the file holds something else, or is damaged.
        """
        try:
            state = torch.load(path, mmap=True, weights_only=True)
        except FileNotFoundError:
            raise
        except (OSError, RuntimeError, UnpicklingError) as error:
            raise ValueError(f"{path} is damaged, or no file of n-grams: {str(error).splitlines()[0]}") from None
        found = state.get("format") if isinstance(state, dict) else None
        if found != FORMAT:
            raise ValueError(f"{path} must hold {FORMAT!r}, got {found!r}")
        model = cls(state["orders"], state["weights"])
        model.base, model.keys, model.counts, model.totals = (
            state[name] for name in ("base", "keys", "counts", "totals")
        )
        return model


class Drafts(NamedTuple):
    """What `superposed_generate` returns, the draft of lowest perplexity first.

    Attributes:
        sequences: prompts and continuations, padded on the right behind an end token.
        scores: log-scores λ, sums over the continuation; -inf where there are fewer drafts.
        lengths: new tokens of each.
    """

    sequences: Int[Tensor, "b k _"]
    scores: Float[Tensor, "b k"]
    lengths: Int[Tensor, "b k"]

    @property
    def perplexities(self) -> Float[Tensor, "b k"]:
        return (-self.scores / self.lengths).exp()


def superposition_weights(
    log_scores: Float[Tensor, "b k"], tokens: Int[Tensor, "b k"], vocab: int
) -> Float[Tensor, "b v"]:
    """How much of each token's embedding is in the mixture: softmax of the log-scores, equal tokens added up."""
    weights = _weights(log_scores)
    return weights.new_zeros(len(tokens), vocab).scatter_add_(1, tokens, weights)


def _weights(log_scores: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
    """Softmax; equal where no draft is left."""
    return log_scores.masked_fill(log_scores.isneginf().all(1, keepdim=True), 0).softmax(1)


def superposed_generate(
    model: Any,
    input_ids: Int[Tensor, "b t"],
    attention_mask: Int[Tensor, "b t"] | None = None,
    *,
    num_drafts: int = 3,
    max_new_tokens: int,
    temperature: float = 0.06,
    n_candidates: int = 9,
    alpha: float | None = None,
    ngram: NGramInterpolator | None = None,
    penalty: float = 200.0,
    eos_token_id: int | Sequence[int] | None = None,
) -> Drafts:
    """Several drafts for each prompt, from as many model calls as there are new tokens.

    Nothing is drawn at random. Drafts may still change their past, as in beam search, so that there is nothing to
    stream.

    Args:
        model: a causal language model of `transformers` that takes `inputs_embeds`.
        input_ids: prompts, padded on the left.
        attention_mask: 0 where there is padding; nowhere by default.
        num_drafts: k; 1 without n-grams is greedy decoding.
        max_new_tokens: of each draft.
        temperature: that divides the logits, above 0.
        n_candidates: tokens kept of the shared distribution, more than drafts.
        alpha: weight of the n-gram models, within [0, 1]; 0.54 by default if there are any.
        ngram: the fitted models.
        penalty: for a draft that no candidate goes on from, at least 0.
        eos_token_id: one or several; by default those of the model's `generation_config`, and none for `()`.

    The defaults are the authors' for short completions.

    Raises:
        ValueError: an argument is out of range, `alpha` is given without `ngram`, the model has an encoder or gives
            scores that are not numbers, or prompts are padded on the right.
    """
    _check(num_drafts, temperature, n_candidates, alpha, ngram, penalty)
    require_whole("max_new_tokens", max_new_tokens)
    share = 0.0 if ngram is None else 0.54 if alpha is None else alpha
    ends = end_tokens(model, eos_token_id)
    pad = padding_token(model, ends)
    continuation = Continuation(model, input_ids, attention_mask)
    n_candidates = min(n_candidates, continuation.logits.shape[-1])
    batch, k = len(input_ids), num_drafts

    prompt = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, NOWHERE)
    live = Drafts(
        input_ids.new_zeros(batch, k, 0),
        continuation.logits.new_full((batch, k), -math.inf).index_fill_(1, input_ids.new_zeros(1), 0),
        input_ids.new_zeros(batch, k),
    )
    finished = Drafts(
        input_ids.new_full((batch, k, max_new_tokens), pad),
        continuation.logits.new_full((batch, k), -math.inf),
        input_ids.new_ones(batch, k),
    )
    for step in range(max_new_tokens):
        if step:
            embeddings = model.get_input_embeddings()(live.sequences[..., -1])
            weights = _weights(live.scores).to(embeddings.dtype)
            continuation.extend(inputs_embeds=(weights[:, None] @ embeddings))
        if bool((continuation.logits.isnan() | continuation.logits.isposinf()).any()):
            raise ValueError("the model gives scores that are not numbers")
        log_p, tokens = tempered(continuation.logits, temperature).topk(n_candidates)
        log_p = log_p.log_softmax(-1)
        own = (1 - share) * log_p if share < 1 else torch.zeros_like(log_p)  # of an impossible token 0 · ∞ would be NaN
        added = own[:, None].expand(-1, k, -1)
        if ngram is not None and share > 0:
            context = torch.cat([prompt[:, None].expand(-1, k, -1), live.sequences], 2)[..., -max(ngram.orders) :]
            support = ngram.prob(context, tokens[:, None].expand(-1, k, -1)).to(log_p.dtype)
            mixed = added + share * support.log()
            added = torch.where((support > 0).any(-1, keepdim=True), mixed, added - penalty)
        candidates = (live.scores[..., None] + added).flatten(1)
        scores, places = candidates.topk(min(2 * k, candidates.shape[1]))
        chosen = tokens.gather(1, places % n_candidates)
        origins = (places // n_candidates)[..., None].expand(-1, -1, step)
        sequences = torch.cat([live.sequences.gather(1, origins), chosen[..., None]], 2)
        ending = torch.isin(chosen, ends)
        live = _best(Drafts(sequences, scores.masked_fill(ending, -math.inf), torch.full_like(places, step + 1)), k)
        if len(ends):
            ended = F.pad(sequences, (0, max_new_tokens - step - 1), value=pad)
            pool = zip(
                finished,
                (ended, scores.masked_fill(~ending, -math.inf), torch.full_like(places, step + 1)),
                strict=True,
            )
            finished = _best(Drafts(*(torch.cat(both, 1) for both in pool)), k)
            if bool(live.scores.isneginf().all()):
                break
    grown = F.pad(live.sequences, (0, max_new_tokens - live.sequences.shape[2]), value=pad)
    both = zip((grown, live.scores, live.lengths), finished, strict=True)
    drafts = _best(Drafts(*(torch.cat(parts, 1) for parts in both)), k, by_length=True)
    longest = int(drafts.lengths.where(drafts.scores.isfinite(), 0).max())
    there = drafts.scores.isfinite()[..., None]
    texts = torch.cat([input_ids[:, None].expand(-1, k, -1), drafts.sequences.where(there, pad)[..., :longest]], 2)
    return Drafts(texts, drafts.scores, drafts.lengths)


def _check(
    num_drafts: int,
    temperature: float,
    n_candidates: int,
    alpha: float | None,
    ngram: NGramInterpolator | None,
    penalty: float,
) -> None:
    require_whole("num_drafts", num_drafts)
    require(0 < temperature < math.inf, "temperature", temperature, "above 0 and finite")
    require_whole("n_candidates", n_candidates)
    require(n_candidates > num_drafts, "n_candidates", n_candidates, f"above num_drafts, which is {num_drafts}")
    require(alpha is None or 0 <= alpha <= 1, "alpha", alpha, "within [0, 1]")
    require(alpha is None or ngram is not None, "alpha", alpha, "None where there is no ngram")
    require(0 <= penalty < math.inf, "penalty", penalty, "at least 0 and finite")


def _best(drafts: Drafts, k: int, *, by_length: bool = False) -> Drafts:
    """The k best by score, or by score for each token."""
    merit = drafts.scores / drafts.lengths if by_length else drafts.scores
    places = merit.topk(min(k, merit.shape[1])).indices
    of_sequences = places[..., None].expand(-1, -1, drafts.sequences.shape[2])
    return Drafts(
        drafts.sequences.gather(1, of_sequences), drafts.scores.gather(1, places), drafts.lengths.gather(1, places)
    )


_counted: Any = WeakIdKeyDictionary()


def counted(corpus: Int[Tensor, " n"]) -> NGramInterpolator:
    """The n-grams of a corpus with the default settings, counted once for as long as its tensor lives unchanged."""
    if corpus not in _counted:
        _counted[corpus] = NGramInterpolator().fit(corpus)
    model: NGramInterpolator = _counted[corpus]
    return model


@method(
    paper="superposed_decoding",
    slot="decoder",
    search={"num_drafts": Integer(2, 6), "alpha": Uniform(0.2, 0.8)},
    bind=lambda setting: {"ngram": counted(setting.corpus)},
)
@dataclass(frozen=True)
class SuperposedDecoding:
    """The best of several drafts, as a callable that continues prompts.

    Args:
        ngram: fitted n-gram models.
        num_drafts, alpha, temperature, n_candidates, penalty: as of `superposed_generate`, with the authors' defaults.

    Raises:
        ValueError: an argument is out of range, or `alpha` is given without `ngram`.
    """

    ngram: NGramInterpolator | None = None
    num_drafts: int = 3
    alpha: float | None = None
    temperature: float = 0.06
    n_candidates: int = 9
    penalty: float = 200.0

    def __post_init__(self) -> None:
        _check(self.num_drafts, self.temperature, self.n_candidates, self.alpha, self.ngram, self.penalty)

    def __call__(
        self,
        model: Any,
        input_ids: Int[Tensor, "b t"],
        attention_mask: Int[Tensor, "b t"] | None = None,
        max_new_tokens: int = 20,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "b _"]:
        """The draft of lowest perplexity for each prompt; nothing is drawn, whatever the generator."""
        drafts = superposed_generate(
            model,
            input_ids,
            attention_mask,
            num_drafts=self.num_drafts,
            max_new_tokens=max_new_tokens,
            temperature=self.temperature,
            n_candidates=self.n_candidates,
            alpha=self.alpha,
            ngram=self.ngram,
            penalty=self.penalty,
        )
        return drafts.sequences[:, 0]
