"""What caches of compressed keys and values have in common: tensors by name, to be counted, saved and picked from.

A cache that needs more of the model than the keys and values that `update` is handed has `attached_to(model)`, a
context manager within which it is used.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

try:
    from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs
except ImportError as error:
    raise ImportError("caches need an extra: pip install 'fairtrial[llm]'") from error

from fairtrial.methods.arguments import require
from fairtrial.methods.kvcache.rotary import head_width
from fairtrial.methods.whole import whole

VERSION = 1

Shape = tuple[int | str, ...]


class HeldLayer(CacheLayerMixin):
    """A layer of a cache that holds tensors by name, with the batch as their first dimension.

    Args:
        heads: of the keys and values that it is handed.
        width: channels of a head.

    Attributes:
        parts: the names of attributes that are a tensor, or None where there is none yet.
    """

    parts: ClassVar[tuple[str, ...]]
    is_sliding = False
    supports_early_init = False

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.reset()

    def shapes(self, number: int) -> list[dict[str, Shape]]:
        """What the layer of a number may hold: in groups, of which there are all tensors or none, and their shapes.

        A size is a number, or has a name; sizes of one name are the same in all layers of a cache.
        """
        raise NotImplementedError

    def held(self) -> dict[str, Tensor]:
        """The tensors that there are."""
        found = {name: getattr(self, name) for name in self.parts}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def hold(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the place of what is held."""
        for name in self.parts:
            setattr(self, name, tensors.get(name))
        self.is_initialized = bool(tensors)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.hold({})

    def reorder_cache(self, beam_idx: Int[Tensor, " b"]) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.hold({name: tensor.repeat_interleave(repeats, 0) for name, tensor in self.held().items()})

    def batch_select_indices(self, indices: Tensor) -> None:
        self.hold({name: tensor[indices.to(tensor.device)] for name, tensor in self.held().items()})


class HeldCache(Cache):
    """A cache of `HeldLayer`s that knows its size and can be saved.

    Attributes:
        settings: what the cache was made with; only one made alike loads what it saved.
        rotary: the `Rotary` with which its layers take rotary embeddings off and put them on, or None; its cosines are
            dropped after the last layer.
    """

    layers: list[Any]
    settings: dict[str, Any]
    rotary: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the cache holds."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.held().values())

    def state_dict(self) -> dict[str, Any]:
        """All that the cache holds, for `torch.save`; it can be loaded with `weights_only=True`."""
        layers = [layer.held() for layer in self.layers]
        return {"cache": type(self).__name__, "version": VERSION, "settings": self.settings, "layers": layers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what a cache made alike has saved.

        Raises:
            ValueError: it is another cache's, of another version, one's with other settings, or tensors are missing or
                have other shapes; nothing is changed.
        """
        self.check_state(state)
        for layer, tensors in zip(self.layers, state["layers"], strict=True):
            layer.hold(tensors)

    def check_state(self, state: Mapping[str, Any]) -> dict[str, int]:
        """Refuse what a cache made alike cannot have saved; returns the sizes that have names."""
        kind, version, name = state.get("cache"), state.get("version"), type(self).__name__
        require(kind == name, "state", kind, f"what a {name} has saved")
        require(version == VERSION, "state", f"version {version}", f"of version {VERSION}")
        for key in ("settings", "layers"):
            require(key in state, "state", sorted(state), f"what a {name} has saved, with {key}")
        settings, layers = state["settings"], state["layers"]
        require(settings == self.settings, "state", settings, f"of a cache with {self.settings}")
        require(isinstance(layers, list), "layers of the state", type(layers).__name__, "a list")
        require(len(layers) == len(self.layers), "state", f"{len(layers)} layers", f"of {len(self.layers)} layers")
        sizes: dict[str, int] = {}
        found = [
            _check_held(f"layer {i} of the state", tensors, layer.shapes(i), sizes)
            for i, (layer, tensors) in enumerate(zip(self.layers, layers, strict=True))
        ]
        for i, there in enumerate(found):
            alike = there == found[0][: len(there)]
            names = sorted(layers[i])
            require(alike, f"layer {i} of the state", names, f"with what goes with layer 0's {sorted(layers[0])}")
        return sizes

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As that of `transformers.Cache`.

        Raises:
            ValueError: keys and values are for another model, or of other sequences than those held; nothing is
                changed.
        """
        layer = self.layers[layer_idx]
        held = (tensor for each in (layer, *self.layers) for tensor in each.held().values())
        batch = next((len(tensor) for tensor in held), len(key_states))
        wanted = (batch, layer.heads, key_states.shape[2], layer.width)
        for name, states in (("key_states", key_states), ("value_states", value_states)):
            shape = tuple(states.shape)
            require(shape == wanted, name, shape, f"{wanted}: sequences, heads, tokens, channels")
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self.rotary is not None and layer_idx == len(self.layers) - 1:
            self.rotary.forget()
        return keys, values


def _check_held(name: str, tensors: Any, groups: list[dict[str, Shape]], sizes: dict[str, int]) -> list[bool]:
    """Refuse tensors that do not have the shapes; notes their sizes, and returns which of the groups there are."""
    by_name = isinstance(tensors, Mapping) and all(isinstance(tensor, Tensor) for tensor in tensors.values())
    require(by_name, name, type(tensors).__name__, "tensors by name")
    shapes = {part: shape for group in groups for part, shape in group.items()}
    unknown = [part for part in tensors if part not in shapes]
    require(not unknown, name, f"with {unknown}", f"of {list(shapes)}")
    for group in groups:
        missing = [part for part in group if part not in tensors]
        require(len(missing) in (0, len(group)), name, f"without {missing}", f"with all of {list(group)} or none")
    for part, tensor in tensors.items():
        shape = tuple(tensor.shape)
        wanted = tuple(sizes.get(size, size) if isinstance(size, str) else size for size in shapes[part])
        fits = len(shape) == len(wanted) and all(
            size == want if isinstance(want, int) else size >= 1 for size, want in zip(shape, wanted, strict=True)
        )
        require(fits, f"{part} in {name}", shape, f"of shape ({', '.join(map(str, wanted))})")
        sizes |= {key: size for key, size in zip(shapes[part], shape, strict=True) if isinstance(key, str)}
    return [next(iter(group)) in tensors for group in groups]


def shape_of(config: Any) -> tuple[int, int, int]:
    """Layers, heads of keys and values, and channels of a head, of a model by its configuration.

    Raises:
        ValueError: layers are not all of full attention.
    """
    config = config.get_text_config(decoder=True)
    kinds = sorted(set(get_layer_types_and_kwargs(config)[0]))
    require(kinds == ["full_attention"], "config", kinds, "of a model with full attention in all layers")
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return config.num_hidden_layers, heads, head_width(config)


def together(x: Float[Tensor, "b h t d"]) -> Float[Tensor, "b t n"]:
    """A token's heads one after the other."""
    return x.transpose(1, 2).flatten(2)


def apart(x: Float[Tensor, "b t n"], heads: int) -> Float[Tensor, "b {heads} t d"]:
    """The heads of `together` again."""
    tokens: Tensor = x.unflatten(-1, (heads, -1))
    return tokens.transpose(1, 2)


def joined(tensors: list[Tensor | None]) -> Tensor:
    """One after the other along the tokens, without those that there are not; a single one as it is."""
    found = [tensor for tensor in tensors if tensor is not None]
    return found[0] if len(found) == 1 else torch.cat(found, -2)


def last_removed(tensor: Tensor | None, tokens: int) -> Tensor | None:
    """Without its last tokens, in memory of its own; None where nothing is left."""
    if tensor is None or not tokens:
        return tensor
    left = tensor.shape[-2] - tokens
    return tensor[..., :left, :].clone() if left > 0 else None


def check_crop(tokens_to_remove: int, length: int) -> int:
    """How many tokens `crop` is to remove: it takes a number that is not above 0."""
    fits = whole(tokens_to_remove, -length, 0)
    require(fits, "tokens_to_remove", tokens_to_remove, f"a whole number from {-length} to 0")
    return -tokens_to_remove
