"""PrefixKV: tokens dropped after the prompt, with a budget for each layer (Wang et al. 2024, arXiv:2412.03409).

A layer's tokens are ranked by the attention that they receive over the prompt, averaged over heads,

    I_j = Σ_i P_ij,    C(n) = (the n largest of I) / Σ I,

and what a layer keeps is a prefix of that order. One threshold p decides for all layers: a layer keeps the fewest n
tokens with C(n) ≥ p, so that those whose attention is spread out keep more. p is found by bisection, such that all
layers together forget the wanted number of tokens. The first tokens and the last are always kept. While decoding goes
on, a layer that holds more than its share of all tokens so far drops what stands at a fixed place near the end of what
it kept of the prompt. Keys keep the rotary embedding of their place in the text.

The authors search on a few samples and average the shares over them (`calibrate_prefix_ratios`); the cache also
searches anew for every prompt, as their code does while it measures. That code calls `ratio` the share that is
forgotten, the paper the share kept: here `keep_ratio` is kept and `ratios` are forgotten. Its bisection has no end
where no threshold comes near enough; here it halves 64 times at most. Sums favour early tokens, which more queries can
see, in both. There is one sequence to a batch there; here each has budgets of its own, and padding on the left is not
counted.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fairtrial.methods.arguments import require
from fairtrial.methods.kvcache.attention import AttendingCache
from fairtrial.methods.kvcache.held import HeldLayer, Shape, check_crop, joined, last_removed, shape_of
from fairtrial.methods.registry import method
from fairtrial.methods.whole import whole

HALVINGS = 64
QUERIES_AT_ONCE = 128


def prefix_budgets(
    importance: Float[Tensor, "l t"],
    keep_ratio: float | None = None,
    *,
    target: int | None = None,
    protect: int = 2,
    tol: int = 5,
    rescale: bool = True,
) -> Int[Tensor, " l"]:
    """How many tokens each layer forgets.

    Args:
        importance: attention that each token receives in each layer, at least 0.
        keep_ratio: share of all l · t entries that is kept, within (0, 1]; or else
        target: how many entries are forgotten.
        protect: tokens of a layer that are kept in any case.
        tol: the threshold is good enough where the total differs from the target by less than this.
        rescale: multiply the layers' numbers so that the total is the target, but for rounding down.

    The defaults are the authors'.

    Raises:
        ValueError: an argument lies outside its range, the importance of a layer is not finite or all 0, there are no
            more tokens than protected ones, or not exactly one of `keep_ratio` and `target` is given.
    """
    layers, tokens = importance.shape
    require((keep_ratio is None) != (target is None), "keep_ratio, target", (keep_ratio, target), "one of the two")
    require(whole(protect, 0), "protect", protect, "a whole number of at least 0")
    require(tokens > protect, "importance", f"of {tokens} tokens", f"of more than protect = {protect} tokens")
    require(whole(tol, 1), "tol", tol, "a whole number of at least 1")
    if keep_ratio is not None:
        require_kept(keep_ratio)
    most = layers * tokens - 1
    require(target is None or whole(target, 0, most), "target", target, f"a whole number from 0 to {most}")
    wanted = (1 - keep_ratio) * layers * tokens if keep_ratio is not None else target or 0
    ranked = importance.double().sort(descending=True).values
    total = ranked.sum(-1, keepdim=True)
    fits = bool(((ranked >= 0).all() & (total > 0).all() & total.isfinite().all()).item())
    require(fits, "importance", "other numbers", "finite, at least 0, and above 0 somewhere in every layer")
    cumulative = (ranked / total).cumsum(-1)

    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        threshold = (low + high) / 2
        kept = torch.searchsorted(cumulative, cumulative.new_full((layers, 1), threshold)).squeeze(-1) + 1
        forget = (tokens - kept - protect).clamp_min(0)
        found = int(forget.sum())
        if abs(found - wanted) < tol:
            break
        low, high = (threshold, high) if found > wanted else (low, threshold)
    if rescale and found:
        forget = (forget.double() * wanted / found).long().clamp_max(tokens - protect)
    return forget


def require_kept(keep_ratio: float) -> None:
    require(0 < keep_ratio <= 1, "keep_ratio", keep_ratio, "within (0, 1]")


def prefix_mask(
    importance: Float[Tensor, "*b t"],
    forget: Int[Tensor, "*b"],
    start: int = 1,
    protect_last: int = 1,
    padding: Int[Tensor, "*#b"] | None = None,
) -> Bool[Tensor, "*b t"]:
    """Which tokens stay; as `select_prefix`, with a number of its own for each row, and padding on the left dropped."""
    tokens = importance.shape[-1]
    places = torch.arange(tokens, device=importance.device)
    padding = importance.new_zeros((), dtype=torch.long) if padding is None else padding[..., None]
    always = (places < padding + start) | (places >= tokens - protect_last)
    ranked = importance.masked_fill(always, math.inf).masked_fill(places < padding, -math.inf)
    rank = ranked.argsort(dim=-1, stable=True).argsort(-1)
    return rank >= padding + forget[..., None]


def select_prefix(
    importance: Float[Tensor, "*b t"], forget: int, start: int = 1, protect_last: int = 1
) -> Int[Tensor, "*b k"]:
    """The places of the tokens that stay, in order.

    Args:
        importance: attention that each token receives.
        forget: how many of the least important tokens go.
        start: first tokens that stay in any case.
        protect_last: last tokens that stay in any case.

    Raises:
        ValueError: fewer than `forget` tokens may go.
    """
    tokens = importance.shape[-1]
    most = tokens - start - protect_last
    fits = whole(start, 0) and whole(protect_last, 0) and most >= 0
    require(fits, "start, protect_last", (start, protect_last), f"whole numbers within {tokens} tokens")
    require(whole(forget, 0, most), "forget", forget, f"a whole number from 0 to {most}")
    rows = importance.shape[:-1]
    kept = prefix_mask(importance, torch.full(rows, forget, device=importance.device), start, protect_last)
    return kept.nonzero()[:, -1].reshape(*rows, tokens - forget)


def attention_received(
    query: Float[Tensor, "b h t d"],
    key: Float[Tensor, "b k t d"],
    mask: Tensor | None = None,
    scaling: float | None = None,
) -> Float[Tensor, "b t"]:
    """What each token receives of the attention of all queries, averaged over heads: column sums of softmax(q kᵀ).

    Args:
        query: of h heads, a multiple of k.
        key: as many tokens.
        mask: true where a query sees a key, or what is added to the scores; by default queries see what is before them.
            A query that sees nothing counts for nothing.
        scaling: of the scores, by default 1/√d.
    """
    heads, tokens = query.shape[1:3]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    grouped = query.float().unflatten(1, (key.shape[1], -1)) * scaling
    keys = key.float().transpose(-1, -2)[:, :, None]
    places = torch.arange(tokens, device=query.device)
    received = query.new_zeros((query.shape[0], tokens), dtype=torch.float32)
    for first in range(0, tokens, QUERIES_AT_ONCE):
        rows = slice(first, first + QUERIES_AT_ONCE)
        scores = grouped[..., rows, :] @ keys
        part = (places[rows, None] >= places)[None, None] if mask is None else mask[..., rows, :tokens]
        part = part[:, :, None]
        scores = scores.masked_fill(~part, -math.inf) if part.dtype == torch.bool else scores + part
        received += scores.softmax(-1).nan_to_num(0.0).sum((1, 2, 3))
    return received / heads


class PrefixKVLayer(HeldLayer):
    """The tokens that a layer keeps, left-padded where sequences of a batch keep different numbers of them.

    Attributes:
        keys, values: of the kept tokens.
        positions: their places in the text, or -1 where there is no token.
        padding: of each sequence on the left of the prompt.
        ratios: the share of its tokens that each sequence forgets.
        place: where tokens are dropped while decoding goes on.
    """

    parts: ClassVar = ("keys", "values", "positions", "padding", "ratios", "place")
    positions: Tensor | None
    padding: Tensor | None
    ratios: Tensor | None
    place: Tensor | None

    def shapes(self, number: int) -> list[dict[str, Shape]]:
        tokens, noted = f"tokens of layer {number}", ("padding", "ratios", "place")
        kept: Shape = ("sequences", self.heads, tokens, self.width)
        return [
            {"keys": kept, "values": kept, "positions": ("sequences", tokens)},
            dict.fromkeys(noted, ("sequences",)),
        ]

    def hold(self, tensors: Any) -> None:
        super().hold(tensors)
        self.seen = 0 if self.positions is None else int(self.positions.max()) + 1  # the last token is always kept
        self.ragged = self.positions is not None and bool((self.positions < 0).any())

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether no sequence has dropped a token that is not padding."""
        if self.positions is None:
            return True
        padding = 0 if self.padding is None else self.padding
        return bool(((self.positions >= 0).sum(-1) + padding == self.seen).all())

    def get_seq_length(self) -> int:
        return self.seen

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        batch, _, new, _ = key_states.shape
        following = torch.arange(self.seen, self.seen + new, dtype=torch.int32, device=key_states.device)
        following = following.expand(batch, new)
        self.keys, self.values = joined([self.keys, key_states]), joined([self.values, value_states])
        self.positions = following.clone() if self.positions is None else torch.cat([self.positions, following], -1)
        self.seen, self.is_initialized = self.seen + new, True
        return self.keys, self.values

    def seen_by(self, mask: Tensor | None) -> Tensor | None:
        """The columns of a mask over the whole text that belong to the tokens of this layer."""
        positions = self.positions
        untouched = self.keys is not None and self.keys.shape[-2] == self.seen
        if positions is None or (not self.ragged and (mask is None or untouched)):
            return mask
        alive = (positions >= 0)[:, None, None]
        if mask is None:  # for a single query, which sees all that there is
            return alive
        columns = positions.clamp_min(0).long()[:, None, None]
        mask = mask.expand(len(positions), -1, -1, -1)
        found = mask.gather(-1, columns.expand(-1, *mask.shape[1:3], -1))
        return found & alive if found.dtype == torch.bool else found.masked_fill(~alive, torch.finfo(found.dtype).min)

    def keep(self, kept: Bool[Tensor, "b t"]) -> None:
        """Drop the other tokens."""
        if self.keys is None or self.values is None or self.positions is None:
            return
        lengths = kept.sum(-1)
        shortest, longest = int(lengths.min()), int(lengths.max())
        self.ragged = shortest < longest
        order = kept.int().argsort(dim=-1, stable=True)[:, kept.shape[-1] - longest :]
        self.positions = torch.where(kept, self.positions, -1).gather(-1, order)
        columns = order[:, None, :, None]
        self.keys, self.values = (
            x.gather(2, columns.expand(-1, x.shape[1], -1, x.shape[3])) for x in (self.keys, self.values)
        )

    def shorten(
        self, kept: Bool[Tensor, "b t"], ratios: Tensor, padding: Tensor, distance: int, start_size: int
    ) -> None:
        """Drop what is not kept of the prompt, and note what is to go on by."""
        lengths = kept.sum(-1)
        place = lengths + distance
        self.place = torch.where(place >= 1, place, lengths // 2).clamp_min(start_size)
        self.ratios, self.padding = ratios, padding
        if self.ragged or not bool(kept.all()):
            self.keep(kept)

    def trim(self) -> None:
        """Drop what is more than the layer's share of all tokens so far."""
        if self.positions is None or self.ratios is None or self.padding is None or self.place is None:
            return
        alive = self.positions >= 0
        lengths, tokens = alive.sum(-1), self.seen - self.padding
        surplus = (lengths - tokens * (1 - self.ratios)).long()
        surplus = torch.minimum(surplus, lengths - 1 - self.place).clamp_min(0)  # the last token stays
        if bool(surplus.any()):
            rank, first = alive.cumsum(-1) - 1, self.place[:, None]
            self.keep(alive & ((rank < first) | (rank >= first + surplus[:, None])))

    def crop(self, tokens_to_remove: int) -> None:
        tokens = check_crop(tokens_to_remove, self.seen)
        if not tokens:
            return
        if tokens == self.seen:
            self.reset()
            return
        self.keys, self.values = last_removed(self.keys, tokens), last_removed(self.values, tokens)
        self.positions = self.positions[:, :-tokens].clone() if self.positions is not None else None
        self.seen -= tokens


@method(
    paper="prefixkv",
    slot="cache",
    bind=lambda setting: {"config": setting.config},
)
class PrefixKVCache(AttendingCache):
    """A cache that keeps the most important tokens of a prompt, more of them in layers of flat attention.

    To be used within `with cache.attached_to(model):`. The first tokens that it is handed are the prompt, over which
    attention is exact; tokens are dropped when the last layer has read it. A prompt of no more tokens than are always
    kept is not shortened then, and all layers keep the same share of what follows. Sequences of a batch are each
    shortened by themselves. It can be cropped as long as nothing has been dropped.

    Args:
        config: of the model; all of its layers have full attention.
        keep_ratio: share of the entries of all layers that is kept, within (0, 1].
        ratios: the share that each layer forgets, within [0, 1), measured ahead by `calibrate_prefix_ratios`; they
            take the place of `keep_ratio` and of the search.
        start_size: first tokens that are always kept, as is the last one.
        distance: where tokens are dropped while decoding goes on: this many, below 0, from the end of what was kept of
            the prompt, or in the middle of it if it is shorter than that, and never among the first `start_size`.

    `start_size` and `distance` are the authors'.

    Raises:
        ValueError: an argument lies outside its range, or the model is not like that.
    """

    def __init__(
        self,
        config: Any,
        keep_ratio: float = 0.5,
        *,
        ratios: Sequence[float] | None = None,
        start_size: int = 1,
        distance: int = -25,
    ) -> None:
        n_layers, heads, width = shape_of(config)
        require_kept(keep_ratio)
        require(whole(start_size, 0), "start_size", start_size, "a whole number of at least 0")
        require(whole(distance, most=-1), "distance", distance, "a whole number below 0")
        if ratios is not None:
            ratios = [float(ratio) for ratio in ratios]
            fits = len(ratios) == n_layers and all(0 <= ratio < 1 for ratio in ratios)
            require(fits, "ratios", ratios, f"{n_layers} numbers within [0, 1)")
        super().__init__([PrefixKVLayer(heads, width) for _ in range(n_layers)])
        self.keep_ratio, self.ratios, self.start_size, self.distance = keep_ratio, ratios, start_size, distance
        self.settings = {
            "keep_ratio": keep_ratio,
            "ratios": ratios,
            "start_size": start_size,
            "distance": distance,
            "channels": heads * width,
        }
        self._importance: list[Tensor] = []

    def reset(self) -> None:
        super().reset()
        self._importance.clear()

    def crop(self, tokens_to_remove: int) -> None:
        if not self.is_croppable:
            raise ValueError("tokens that would be needed have been dropped: this cache cannot be cropped")
        super().crop(tokens_to_remove)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        number: int = module.layer_idx  # type: ignore[assignment]
        layer: PrefixKVLayer = self.layers[number]
        mask = layer.seen_by(attention_mask)
        output, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
        if layer.ratios is not None:
            layer.trim()
            return output, None
        if number == 0:
            self._importance.clear()  # of a prompt that was not read to its end
        with torch.no_grad():
            self._importance.append(attention_received(query, key, mask, options.get("scaling")))
            if number == len(self.layers) - 1:
                importance = torch.stack(self._importance)
                self._importance.clear()
                self.shorten(importance, mask)
        return output, None

    def shorten(self, importance: Float[Tensor, "l b t"], mask: Tensor | None) -> None:
        """Drop what is not kept of the prompt, once all layers have read it.

        Args:
            importance: attention that each token has received in each layer.
            mask: of that attention.
        """
        layers, batch, tokens = importance.shape
        padding = torch.zeros(batch, dtype=torch.long, device=importance.device)
        if mask is not None:  # what the last query does not see
            hidden = ~mask[:, 0, -1, :tokens] if mask.dtype == torch.bool else mask[:, 0, -1, :tokens] < 0
            padding = hidden.sum(-1).expand(batch).clone()
        budgets = [self._budgets(importance[:, i, int(pad) :]) for i, pad in enumerate(padding)]
        forget, ratios = (torch.stack(found, -1) for found in zip(*budgets, strict=True))
        kept = prefix_mask(importance, forget, self.start_size, padding=padding.expand(layers, batch))
        for layer, *found in zip(self.layers, kept, ratios, strict=True):
            layer.shorten(*(x.clone() for x in found), padding.clone(), self.distance, self.start_size)

    def _budgets(self, importance: Float[Tensor, "l t"]) -> tuple[Int[Tensor, " l"], Float[Tensor, " l"]]:
        """How many tokens of a prompt each layer forgets, and what share it forgets of those that follow."""
        (layers, tokens), protect = importance.shape, self.start_size + 1
        most = max(0, tokens - protect)
        if self.ratios is not None:
            ratios = torch.tensor(self.ratios, dtype=torch.float64, device=importance.device)
            return (ratios * tokens).round().long().clamp_max(most), ratios
        if not most or self.keep_ratio == 1:
            ratios = torch.full((layers,), 1 - self.keep_ratio, dtype=torch.float64, device=importance.device)
            return torch.zeros_like(ratios, dtype=torch.long), ratios
        forget = prefix_budgets(importance, self.keep_ratio, protect=protect)
        return forget, forget.double() / tokens


def calibrate_prefix_ratios(
    model: Any, samples: Iterable[Int[Tensor, "_ _"]], keep_ratio: float, start_size: int = 1
) -> list[float]:
    """The share that each layer forgets, by a search on every sample, averaged over them; for `PrefixKVCache`.

    Args:
        model: a causal language model of transformers.
        samples: token ids without padding, of more tokens than are always kept; the authors take ten.
        keep_ratio: share of the entries of all layers that is kept, within (0, 1].
        start_size: as for the cache.

    Raises:
        ValueError: there are no samples, one is too short, `keep_ratio` is out of range, or the model is or has an
            encoder.
    """
    require(whole(start_size, 0), "start_size", start_size, "a whole number of at least 0")
    found = []
    for sample in samples:
        tokens = sample.shape[1]
        require(tokens > start_size + 1, "samples", f"one of {tokens} tokens", f"of more than {start_size + 1} tokens")
        cache = PrefixKVCache(model.config, keep_ratio, start_size=start_size)
        with torch.no_grad(), cache.attached_to(model):
            model(sample, past_key_values=cache, use_cache=True, logits_to_keep=1)
        found.append(torch.stack([layer.ratios for layer in cache.layers]).mean(-1))
    require(bool(found), "samples", "none", "at least one")
    return torch.stack(found).mean(0).tolist()
