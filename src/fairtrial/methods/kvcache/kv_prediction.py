"""KV Prediction: a small model reads the prompt for a large one (Horton et al. 2024, arXiv:2410.08391).

What the auxiliary model caches for the prompt is mapped to what the base model would have cached, by a linear map with
bias for the keys and one for the values of every base layer i, on channels of all heads side by side,

    K̂_i = P_i^K(K^aux_ℓ(i)),    V̂_i = P_i^V(V^aux_ℓ(i)),

and the base model goes on from the last token of the prompt. Keys are those of before rotary embeddings and
normalisation, which the base then applies to them as its own. The base is frozen; auxiliary model and maps are trained
with

    CE(base) + CE(auxiliary) + Σ_i (mean |K̂_i - K_i| + mean |V̂_i - V_i|),

where the base's own keys and values are replaced by the predicted ones at every position, that of the query included.
In use, the last token of the prompt and those generated have the base's own.

As in the authors' code, predicted keys are compared with the base's after its normalisation, if it has one. Their
auxiliary loss has weight 0 by default and 1 in all of their configurations; here it is 1.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.methods.arguments import require

try:
    from transformers import DynamicCache
except ImportError as error:
    raise ImportError("key-value prediction needs an extra: pip install 'fairtrial[llm]'") from error

from fairtrial.methods.kvcache.rotary import head_width, turned
from fairtrial.methods.kvcache.rotated_keys import check_rotated_keys
from fairtrial.methods.whole import whole


def default_layer_map(n_base: int, n_aux: int) -> list[int]:
    """The auxiliary layer for each base layer: as many consecutive base layers for each, the first ones one more.

    Raises:
        ValueError: there are more auxiliary layers than base layers, or none.
    """
    require(whole(n_base, 1), "n_base", n_base, "a whole number of at least 1")
    require(whole(n_aux, 1, n_base), "n_aux", n_aux, f"a whole number from 1 to {n_base}, the layers of the base")
    share, more = divmod(n_base, n_aux)
    return [layer for layer in range(n_aux) for _ in range(share + (layer < more))]


def pruned_layer_map(n_base: int, keep: Sequence[int]) -> list[int]:
    """The same for an auxiliary model made of some layers of the base: the last one kept that is not behind.

    Raises:
        ValueError: the layers kept do not rise from 0 to at most the last.
    """
    check_kept(n_base, keep)
    return [sum(kept <= layer for kept in keep) - 1 for layer in range(n_base)]


def check_kept(n_layers: int, keep: Sequence[int]) -> None:
    rising = len(keep) > 0 and all(map(whole, keep)) and all(a < b for a, b in itertools.pairwise(keep))
    fits = rising and keep[0] == 0 and keep[-1] < n_layers
    require(fits, "keep", list(keep), f"whole numbers rising from 0, below {n_layers} layers")


def layer_pruned_copy(model: Any, keep: Sequence[int]) -> Any:
    """A copy of a causal language model of transformers that has only some of its layers, 0 among them.

    Raises:
        ValueError: the layers kept do not rise from 0 to at most the last.
    """
    check_kept(len(model.model.layers), keep)
    memo = {id(layer): None for i, layer in enumerate(model.model.layers) if i not in keep}
    pruned = copy.deepcopy(model, memo)
    pruned.model.layers = nn.ModuleList([pruned.model.layers[i] for i in keep])
    for i, layer in enumerate(pruned.model.layers):
        layer.self_attn.layer_idx = i
    pruned.config.num_hidden_layers = len(keep)
    kinds = getattr(pruned.config, "layer_types", None)
    if kinds is not None:
        pruned.config.layer_types = [kinds[i] for i in keep]
    return pruned


class KVPredictor(nn.Module):
    """Linear maps from what an auxiliary model caches to what the base model would cache.

    Args:
        aux_dims: channels of the keys (and of the values) of each auxiliary layer, all heads together.
        base_dims: the same for each base layer.
        base_heads: heads of keys (and of values) of each base layer.
        layer_map: the auxiliary layer for each base layer.

    Raises:
        ValueError: lengths differ, an entry of the map is out of range, or heads do not divide channels.
    """

    def __init__(
        self, aux_dims: Sequence[int], base_dims: Sequence[int], base_heads: Sequence[int], layer_map: Sequence[int]
    ) -> None:
        super().__init__()
        n_base, n_aux = len(base_dims), len(aux_dims)
        require(len(layer_map) == n_base, "layer_map", list(layer_map), f"of {n_base} layers of the base")
        fits = all(whole(layer, 0, n_aux - 1) for layer in layer_map)
        require(fits, "layer_map", list(layer_map), f"layers from 0 to {n_aux - 1}")
        for name, dims in (("aux_dims", aux_dims), ("base_dims", base_dims)):
            require(all(whole(d, 1) for d in dims), name, list(dims), "whole numbers of at least 1")
        fits = len(base_heads) == n_base and all(
            whole(h, 1) and d % h == 0 for d, h in zip(base_dims, base_heads, strict=True)
        )
        require(fits, "base_heads", list(base_heads), f"divisors of {list(base_dims)}")
        self.layer_map, self.base_heads = list(layer_map), list(base_heads)
        sizes = [(aux_dims[layer], d) for layer, d in zip(layer_map, base_dims, strict=True)]
        self.keys = nn.ModuleList([nn.Linear(*size) for size in sizes])
        self.values = nn.ModuleList([nn.Linear(*size) for size in sizes])

    def forward(
        self, keys: Sequence[Float[Tensor, "b t _"]], values: Sequence[Float[Tensor, "b t _"]]
    ) -> tuple[list[Float[Tensor, "b t _"]], list[Float[Tensor, "b t _"]]]:
        """Keys and values of the base layers, heads side by side, of those of the auxiliary layers."""
        predicted = (
            [transform(found[layer]) for transform, layer in zip(transforms, self.layer_map, strict=True)]
            for transforms, found in ((self.keys, keys), (self.values, values))
        )
        k, v = predicted
        return k, v

    def get_extra_state(self) -> Int[Tensor, " l"]:
        """The layer map, which is saved with the weights."""
        return torch.tensor(self.layer_map)

    def set_extra_state(self, state: Int[Tensor, " l"]) -> None:
        """Refuse weights for another layer map.

        Raises:
            ValueError: they are.
        """
        found = state.tolist()
        require(found == self.layer_map, "state", f"for the layer map {found}", f"for the layer map {self.layer_map}")


@contextmanager
def _hooked(modules: Sequence[nn.Module], hook: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """Call `hook(number, output)` after each of the modules; what it returns takes the output's place."""
    with ExitStack() as stack:
        for number, module in enumerate(modules):
            handle = module.register_forward_hook(lambda _, __, output, number=number: hook(number, output))
            stack.callback(handle.remove)
        yield


def projections(model: Any) -> tuple[list[nn.Module], list[nn.Module]]:
    """What makes keys and what makes values, in each layer.

    Raises:
        ValueError: the model has no such modules.
    """
    attention: list[Any] = [
        getattr(layer, "self_attn", None) for layer in getattr(getattr(model, "model", None), "layers", ())
    ]
    fits = bool(attention) and all(hasattr(a, "k_proj") and hasattr(a, "v_proj") for a in attention)
    require(fits, "model", type(model).__name__, "a causal language model with k_proj and v_proj in every layer")
    return [a.k_proj for a in attention], [a.v_proj for a in attention]


class Read(NamedTuple):
    """What a model makes of a text: scores, and keys and values of each layer, before rotary embeddings."""

    logits: Float[Tensor, "b _ v"]
    keys: list[Float[Tensor, "b t _"]]
    values: list[Float[Tensor, "b t _"]]


def read(model: Any, input_ids: Int[Tensor, "b t"], **options: Any) -> Read:
    """A plain forward pass, with what its projections give."""
    keys: list[Tensor] = []
    values: list[Tensor] = []
    of_keys, of_values = projections(model)
    with (
        _hooked(of_keys, lambda _, output: keys.append(output)),
        _hooked(of_values, lambda _, output: values.append(output)),
    ):
        logits = model(input_ids, use_cache=False, **options).logits
    return Read(logits, keys, values)


class Predicted(NamedTuple):
    """What a `KVPredictionModel` gives for a text.

    Attributes:
        logits: of the base, from predicted keys and values.
        aux_logits: of the auxiliary model.
        keys, values: predicted, for each base layer.
        target_keys, target_values: the base's own, where they have been asked for.
        loss: where labels have been given.
    """

    logits: Float[Tensor, "b t v"]
    aux_logits: Float[Tensor, "b t v"]
    keys: list[Float[Tensor, "b t _"]]
    values: list[Float[Tensor, "b t _"]]
    target_keys: list[Float[Tensor, "b t _"]]
    target_values: list[Float[Tensor, "b t _"]]
    loss: Float[Tensor, ""] | None


class KVPredictionModel(nn.Module):
    """A frozen base model whose prompts are read by an auxiliary model.

    Args:
        base: a causal language model of transformers with rotary embeddings, as Llama is; its parameters are frozen.
            Its keys may be normalised before they are turned by halves of each head, but not changed otherwise.
        auxiliary: a smaller one of the same vocabulary.
        predictor: from one to the other; by default new maps along `default_layer_map`.
        kv_weight: of the error of keys and values in the loss.
        z_weight: of the mean square of log Σ exp of the scores in the loss; 1e-4 where the authors use it.

    Raises:
        ValueError: the models have not the same vocabulary, are not like that, or do not fit the predictor.
    """

    def __init__(
        self,
        base: Any,
        auxiliary: Any,
        predictor: KVPredictor | None = None,
        *,
        kv_weight: float = 1.0,
        z_weight: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = base.config.vocab_size, auxiliary.config.vocab_size
        require(sizes[0] == sizes[1], "auxiliary", f"of {sizes[1]} tokens", f"of the base's {sizes[0]} tokens")
        for name, weight in (("kv_weight", kv_weight), ("z_weight", z_weight)):
            require(0 <= weight < math.inf, name, weight, "finite and at least 0")
        base_dims, aux_dims = widths(base), widths(auxiliary)
        if predictor is None:
            layer_map = default_layer_map(len(base_dims), len(aux_dims))
            heads = [d // head_width(base.config) for d in base_dims]
            predictor = KVPredictor(aux_dims, base_dims, heads, layer_map)
            predictor.to(next(base.parameters()))
        linears: Any = predictor.keys
        found = [(p.in_features, p.out_features) for p in linears]
        inside = max(predictor.layer_map) < len(aux_dims) and len(found) == len(base_dims)
        fits = inside and found == [(aux_dims[i], d) for i, d in zip(predictor.layer_map, base_dims, strict=True)]
        require(fits, "predictor", found, f"from {aux_dims} to {base_dims} channels")
        self.base, self.auxiliary, self.predictor = base, auxiliary, predictor
        self.kv_weight, self.z_weight = kv_weight, z_weight
        of_keys, _ = projections(base)
        check_rotated_keys(base, of_keys, self._normed)
        base.requires_grad_(False)

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        attention_mask: Int[Tensor, "b t"] | None = None,
        labels: Int[Tensor, "b t"] | None = None,
    ) -> Predicted:
        """The form of training: the base looks at predicted keys and values only.

        Args:
            input_ids: of whole sequences.
            attention_mask: 0 where there is padding.
            labels: the input itself, or -100 where a token is not to be predicted; they make the loss be computed,
                which takes another pass through the base for its own keys and values.
        """
        options = padding_options(input_ids, attention_mask)
        aux = read(self.auxiliary, input_ids, **options)
        keys, values = self.predictor(aux.keys, aux.values)
        of_keys, of_values = projections(self.base)
        with _hooked(of_keys, lambda i, _: keys[i]), _hooked(of_values, lambda i, _: values[i]):
            logits = self.base(input_ids, use_cache=False, **options).logits
        target = Read(logits, [], [])
        loss = None
        if labels is not None:
            with torch.no_grad():
                target = read(self.base, input_ids, **options)
            normed = [self._normed(i, k) for i, k in enumerate(keys)]
            own = [self._normed(i, k) for i, k in enumerate(target.keys)]
            loss = kv_prediction_loss(
                logits,
                aux.logits,
                labels,
                (normed, values),
                (own, target.values),
                attention_mask,
                kv_weight=self.kv_weight,
                z_weight=self.z_weight,
            )
        return Predicted(logits, aux.logits, keys, values, target.keys, target.values, loss)

    def _normed(self, layer: int, keys: Float[Tensor, "b t n"]) -> Float[Tensor, "b t n"]:
        """As the base normalises the keys of a layer, if it does."""
        norm = getattr(self.base.model.layers[layer].self_attn, "k_norm", None)
        if norm is None:
            return keys
        per_head = keys.unflatten(-1, (self.predictor.base_heads[layer], -1))
        weight = getattr(norm, "weight", None)
        over_all = weight is not None and weight.shape[-1] != per_head.shape[-1]
        found: Tensor = norm(keys) if over_all else norm(per_head).flatten(-2)
        return found

    def predicted_cache(
        self, input_ids: Int[Tensor, "b t"], attention_mask: Int[Tensor, "b t"] | None = None
    ) -> DynamicCache:
        """What the base model is to have cached after these tokens, from the auxiliary model alone."""
        options = padding_options(input_ids, attention_mask)
        options.setdefault("position_ids", torch.arange(input_ids.shape[1], device=input_ids.device)[None])
        aux = read(self.auxiliary, input_ids, logits_to_keep=1, **options)
        keys, values = self.predictor(aux.keys, aux.values)
        cos, sin = (x[:, None] for x in self.base.model.rotary_emb(values[0], options["position_ids"]))
        cache = DynamicCache(config=self.base.config)
        for i, (heads, *found) in enumerate(zip(self.predictor.base_heads, keys, values, strict=True)):
            found[0] = self._normed(i, found[0])
            key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in found)
            cache.update(turned(key, cos, sin), value, i)
        return cache

    @torch.no_grad()
    def generate(
        self, input_ids: Int[Tensor, "b t"], attention_mask: Int[Tensor, "b t"] | None = None, **options: Any
    ) -> Any:
        """As the base's `generate`, which is handed all options; the auxiliary model reads all but the last token.

        Raises:
            ValueError: the prompt is shorter than 2 tokens.
        """
        tokens = input_ids.shape[1]
        require(tokens >= 2, "input_ids", f"{tokens} tokens", "a prompt of at least 2 tokens")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        cache = self.predicted_cache(input_ids[:, :-1], mask[:, :-1])
        config = options.get("generation_config") or self.base.generation_config
        names = ("num_beams", "num_return_sequences")
        copies = max(options.get(name) or getattr(config, name, None) or 1 for name in names)
        if copies > 1:
            cache.batch_repeat_interleave(copies)
        return self.base.generate(input_ids, attention_mask=mask, past_key_values=cache, **options)


def padding_options(input_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Tensor]:
    """Arguments with which a model does not count padding on the left."""
    if attention_mask is None:
        return {}
    return {"attention_mask": attention_mask, "position_ids": (attention_mask.cumsum(-1) - 1).clamp_min(0)}


def widths(model: Any) -> list[int]:
    """Channels of the keys of each layer, all heads together.

    Raises:
        ValueError: the model has no k_proj and v_proj in every layer.
    """
    keys: Any = projections(model)[0]
    return [int(p.weight.shape[0]) for p in keys]


def kv_prediction_loss(
    logits: Float[Tensor, "b t v"],
    aux_logits: Float[Tensor, "b t v"],
    labels: Int[Tensor, "b t"],
    predicted: tuple[Sequence[Tensor], Sequence[Tensor]],
    target: tuple[Sequence[Tensor], Sequence[Tensor]],
    attention_mask: Int[Tensor, "b t"] | None = None,
    *,
    kv_weight: float = 1.0,
    z_weight: float = 0.0,
) -> Float[Tensor, ""]:
    """Cross entropy of both models, and the mean absolute error of keys and values, summed over layers.

    Args:
        logits: of the base; position i predicts label i + 1.
        aux_logits: of the auxiliary model.
        labels: tokens, or -100 where there is nothing to predict.
        predicted: keys and values, lists over layers of (b, t, n).
        target: the base's own.
        attention_mask: 0 where there is padding, whose keys and values are not compared.
        kv_weight, z_weight: see `KVPredictionModel`.
    """
    wanted = labels[:, 1:]
    if attention_mask is not None:
        wanted = wanted.masked_fill((attention_mask[:, 1:] == 0) | (attention_mask[:, :-1] == 0), -100)
    loss = logits.new_zeros((), dtype=torch.float32)
    for scores in (logits[:, :-1].float(), aux_logits[:, :-1].float()):
        loss = loss + F.cross_entropy(scores.flatten(0, 1), wanted.flatten())
        if z_weight:
            loss = loss + z_weight * scores[wanted != -100].logsumexp(-1).square().mean()
    if kv_weight:
        errors = [
            F.l1_loss(x, y) if attention_mask is None else F.l1_loss(x[attention_mask != 0], y[attention_mask != 0])
            for found, own in zip(predicted, target, strict=True)
            for x, y in zip(found, own, strict=True)
        ]
        loss = loss + kv_weight * torch.stack(errors).sum()
    return loss


@dataclass(frozen=True)
class BlockSizes:
    """What a forward pass costs.

    Attributes:
        parameters: of all blocks, without embedding and output layer.
        attention_widths: query heads × channels of a head, of each layer.
    """

    parameters: int
    attention_widths: tuple[int, ...]


def block_sizes(model: Any) -> BlockSizes:
    """Of a causal language model of transformers."""
    layers, heads = model.model.layers, model.config.num_attention_heads
    parameters = sum(p.numel() for p in layers.parameters())
    return BlockSizes(parameters, (heads * head_width(model.config),) * len(layers))


def ttft_flops(
    tokens: int,
    base: BlockSizes,
    auxiliary: BlockSizes | None = None,
    map_sizes: Sequence[tuple[int, int]] = (),
) -> int:
    """Operations until the first token is there, two for each multiplication with an addition.

    2 T P + 4 T² Σ d for a model that reads T tokens, where causality is not made use of. With an auxiliary model that
    reads them instead: its own, 4 T Σ d_A d_B for the maps, and 2 P + 4 T Σ d for the base's one token. The output
    layer, which is needed once in both cases, is left out.

    Args:
        tokens: of the prompt.
        base: model.
        auxiliary: model, if there is one.
        map_sizes: channels of an auxiliary layer and of the base layer for each base layer.
    """
    require(whole(tokens, 1), "tokens", tokens, "a whole number of at least 1")

    def reading(model: BlockSizes) -> int:
        return 2 * tokens * model.parameters + 4 * tokens**2 * sum(model.attention_widths)

    if auxiliary is None:
        return reading(base)
    maps = 4 * tokens * sum(a * b for a, b in map_sizes)
    return reading(auxiliary) + maps + 2 * base.parameters + 4 * tokens * sum(base.attention_widths)
