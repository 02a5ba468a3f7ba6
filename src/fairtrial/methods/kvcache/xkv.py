"""xKV: one singular value decomposition for the caches of neighbouring layers (Chang et al. 2025, arXiv:2503.18893).

What neighbouring layers keep of a prompt spans nearly the same few directions over its tokens. So the keys of the G
layers of a group, T × d each with their heads side by side, are joined along channels and cut to rank R,

    [K¹, …, K^G] ≈ A [B¹, …, B^G],    A = U_R Σ_R ∈ R^(T×R),    Bⁱ ∈ R^(R×d),

and values alike. A is held once for the group: R (T + G d) numbers in the place of T G d. Keys are cut as they were
before their rotary embeddings, which are put on again when they are needed. Attention over the prompt sees exact keys
and values; a group is cut once the prompt has reached its last layer, and what is decoded later stays as it is.

In the authors' code attention hands over keys that have not been rotated; here the rotation is taken off those that any
model of transformers hands to its cache. Their code multiplies A and B out again, here A and B are what is held. The
decomposition is found through the smaller of the two Gram matrices, in float64.

MiniCache (`minicache_merge`), which the paper compares itself with, lets two layers share a direction per token, and
keeps the tokens whose directions differ most. The mask in xKV's code keeps those that differ least; the MiniCache paper
is followed here.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from fairtrial.methods.arguments import require
from fairtrial.methods.kvcache.held import (
    HeldCache,
    HeldLayer,
    Shape,
    check_crop,
    joined,
    last_removed,
    shape_of,
    together,
)
from fairtrial.methods.kvcache.rotary import Rotary
from fairtrial.methods.registry import Categorical, method
from fairtrial.methods.whole import whole


def group_layers(n_layers: int, group_size: int, start: int = 0, end: int | None = None) -> list[list[int]]:
    """Consecutive layers in groups; the last may be smaller.

    Args:
        n_layers: of the model.
        group_size: layers in a group.
        start: the first layer that is grouped.
        end: the layer after the last one, by default the number of layers.

    Raises:
        ValueError: an argument lies outside its range.
    """
    require(whole(n_layers, 1), "n_layers", n_layers, "a whole number of at least 1")
    require(whole(group_size, 1), "group_size", group_size, "a whole number of at least 1")
    end = n_layers if end is None else end
    require(whole(start) and whole(end), "start, end", (start, end), "whole numbers")
    require(0 <= start < end <= n_layers, "start, end", (start, end), f"rising, within {n_layers} layers")
    return [list(range(first, min(first + group_size, end))) for first in range(start, end, group_size)]


def cross_layer_svd(
    layers: Sequence[Float[Tensor, "b h t d"]], rank: int
) -> tuple[Float[Tensor, "b t r"], list[Float[Tensor, "b r n"]]]:
    """The best A, [Bⁱ] of a rank for the layers' keys (or values) joined along channels, for each sequence by itself.

    Args:
        layers: as caches hold them.
        rank: of the group as a whole, at most min(t, layers · h · d).

    Returns:
        Coefficients of the tokens, and for each layer a basis of n = h · d channels; over the group, bases are
        orthonormal. In the dtype of the layers.

    Raises:
        ValueError: there is no layer, the rank is out of range, or layers differ in shape.
    """
    require(bool(layers), "layers", len(layers), "at least one")
    shapes = {tuple(layer.shape) for layer in layers}
    require(len(shapes) == 1, "layers", sorted(shapes), "of one shape: as many heads, channels and tokens in each")
    x = torch.cat([together(layer) for layer in layers], -1).double()
    tokens, width = x.shape[1:]
    most = min(tokens, width)
    require(whole(rank, 1, most), "rank", rank, f"a whole number from 1 to {most}")
    if width <= tokens:
        basis = torch.linalg.eigh(x.mT @ x).eigenvectors[..., -rank:].flip(-1).mT
        coefficients = x @ basis.mT
    else:
        coefficients = torch.linalg.eigh(x @ x.mT).eigenvectors[..., -rank:].flip(-1)
        basis = coefficients.mT @ x
        lengths = basis.norm(dim=-1, keepdim=True)
        basis = basis / lengths.clamp_min(torch.finfo(x.dtype).tiny)
        coefficients = coefficients * lengths.mT
    dtype = layers[0].dtype
    parts = basis.to(dtype).split(width // len(layers), -1)
    return coefficients.to(dtype).contiguous(), [part.contiguous() for part in parts]


def reconstruct(
    coefficients: Float[Tensor, "b t r"], basis: Float[Tensor, "b r n"], heads: int
) -> Float[Tensor, "b {heads} t d"]:
    """A Bⁱ, as a cache holds the keys (or values) of a layer."""
    tokens: Tensor = (coefficients @ basis).unflatten(-1, (heads, -1))
    return tokens.transpose(1, 2)


def xkv_bytes(tokens: int, width: int, group_size: int, rank: int, element_size: int = 2) -> int:
    """Bytes of the keys (or values) of a group, R (T + G d) numbers; `width` is d, over all heads of a layer."""
    return rank * (tokens + group_size * width) * element_size


def subspace_overlap(x: Float[Tensor, "b h t d"], y: Float[Tensor, "b h t d"], rank: int) -> Float[Tensor, " b"]:
    """‖U_xᵀ U_y‖²_F / rank for the leading left singular vectors of two layers: 1 if they span the same directions.

    Two random subspaces of the R^t have rank / t on average.

    Raises:
        ValueError: the rank is out of range.
    """
    most = min(x.shape[2], x.shape[1] * x.shape[3])
    require(whole(rank, 1, most), "rank", rank, f"a whole number from 1 to {most}")
    left, right = (torch.linalg.svd(together(z), full_matrices=False).U[..., :rank] for z in (x, y))
    overlap: Tensor = (left.mT @ right).square().sum((-2, -1)) / rank
    return overlap


def slerp(x: Float[Tensor, "*b d"], y: Float[Tensor, "*b d"], t: float = 0.5) -> Float[Tensor, "*b d"]:
    """The direction at the share t of the way from x's to y's along the great circle, of length 1.

    Raises:
        ValueError: t is not within [0, 1].
    """
    require(0 <= t <= 1, "t", t, "within [0, 1]")
    x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    angle = angle_between(x, y)[..., None]
    mixed = torch.where(angle.sin() > 1e-6, ((1 - t) * angle).sin() * x + (t * angle).sin() * y, (1 - t) * x + t * y)
    return F.normalize(mixed, dim=-1)


def angle_between(x: Float[Tensor, "*b d"], y: Float[Tensor, "*b d"]) -> Float[Tensor, "*b"]:
    return F.cosine_similarity(x, y, dim=-1).clamp(-1, 1).acos()


def minicache_merge(
    x: Float[Tensor, "b h t d"], y: Float[Tensor, "b h t d"], t: float = 0.5, gamma: float = 0.05
) -> tuple[Float[Tensor, "b h t d"], Float[Tensor, "b h t d"], Bool[Tensor, "b h t"]]:
    """What MiniCache makes of the keys (or values) of two layers: a direction per token and head, and two lengths.

    Args:
        x: of the first layer.
        y: of the second layer.
        t: where the direction lies between theirs.
        gamma: tokens stay as they are if their angle is above max - gamma (max - min), over all tokens.

    Returns:
        What stands for x and for y, and which tokens stay as they are.

    Raises:
        ValueError: t or gamma is not within [0, 1].
    """
    require(0 <= t <= 1, "t", t, "within [0, 1]")
    require(0 <= gamma <= 1, "gamma", gamma, "within [0, 1]")
    angles = angle_between(x, y)
    kept = angles > angles.max() - gamma * (angles.max() - angles.min())
    direction = slerp(x, y, t)
    left, right = (torch.where(kept[..., None], z, direction * z.norm(dim=-1, keepdim=True)) for z in (x, y))
    return left, right, kept


class XKVLayer(HeldLayer):
    """What a layer holds: its bases, what came after the prompt, and for the first of a group the coefficients."""

    parts: ClassVar = ("key_coefficients", "value_coefficients", "key_basis", "value_basis", "keys", "values")
    is_croppable = True
    key_coefficients: Tensor | None
    value_coefficients: Tensor | None
    key_basis: Tensor | None
    value_basis: Tensor | None

    def __init__(
        self, group: list["XKVLayer"], rotary: Rotary, rank_k: int, rank_v: int, heads: int, width: int
    ) -> None:
        super().__init__(heads, width)
        self.group, self.rotary, self.rank_k, self.rank_v = group, rotary, rank_k, rank_v
        group.append(self)

    def shapes(self, number: int) -> list[dict[str, Shape]]:
        place = next(i for i, layer in enumerate(self.group) if layer is self)
        ranks = [f"rank_{which} from layer {number - place} on" for which in "kv"]
        bases: dict[str, Shape] = {
            f"{name}_basis": ("sequences", rank, self.heads * self.width)
            for name, rank in zip(("key", "value"), ranks, strict=True)
        }
        coefficients: dict[str, Shape] = {
            f"{name}_coefficients": ("sequences", "tokens of the prompt", rank)
            for name, rank in zip(("key", "value"), ranks, strict=True)
        }
        later: Shape = ("sequences", self.heads, "later tokens", self.width)
        return [bases | (coefficients if place == 0 else {}), {"keys": later, "values": later}]

    def get_seq_length(self) -> int:
        coefficients = self.group[0].key_coefficients if self.key_basis is not None else None
        return sum(x.shape[-2] for x in (coefficients, self.keys) if x is not None)

    @torch.no_grad()
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        first = self.get_seq_length() == 0
        self.is_initialized = True
        prompt_keys, prompt_values = self.prompt(key_states.shape[1])
        self.keys, self.values = joined([self.keys, key_states]), joined([self.values, value_states])
        keys, values = joined([prompt_keys, self.keys]), joined([prompt_values, self.values])
        if first and self is self.group[-1]:
            self._factorize()
        return keys, values

    def prompt(self, heads: int) -> tuple[Tensor | None, Tensor | None]:
        """What stands for the keys and values of the prompt, if there is one."""
        a_k, a_v = self.group[0].key_coefficients, self.group[0].value_coefficients
        if self.key_basis is None or self.value_basis is None or a_k is None or a_v is None:
            return None, None
        keys = self.rotary.put_on(reconstruct(a_k, self.key_basis, heads))
        return keys, reconstruct(a_v, self.value_basis, heads)

    def _factorize(self) -> None:
        """Cut the whole group, and drop what it held of the prompt."""
        keys = [self.rotary.take_off(layer.keys.float()) for layer in self.group if layer.keys is not None]
        values = [layer.values for layer in self.group if layer.values is not None]
        most = min(values[0].shape[2], len(values) * values[0].shape[1] * values[0].shape[3])
        key_coefficients, key_bases = cross_layer_svd(keys, min(self.rank_k, most))
        value_coefficients, value_bases = cross_layer_svd(values, min(self.rank_v, most))
        dtype = values[0].dtype
        for layer, key_basis, value_basis in zip(self.group, key_bases, value_bases, strict=True):
            layer.hold({"key_basis": key_basis.to(dtype), "value_basis": value_basis})
        self.group[0].key_coefficients = key_coefficients.to(dtype)
        self.group[0].value_coefficients = value_coefficients

    def crop(self, tokens_to_remove: int) -> None:
        tokens = check_crop(tokens_to_remove, self.get_seq_length())
        tail = min(tokens, 0 if self.keys is None else self.keys.shape[-2])
        self.keys, self.values = last_removed(self.keys, tail), last_removed(self.values, tail)
        if self is self.group[-1]:  # the others have been asked how long they are
            first = self.group[0]
            first.key_coefficients = last_removed(first.key_coefficients, tokens - tail)
            first.value_coefficients = last_removed(first.value_coefficients, tokens - tail)
            if first.key_coefficients is None and self.keys is None:
                for layer in self.group:
                    layer.reset()


@method(
    paper="xkv",
    slot="cache",
    search={"group_size": Categorical((1, 2, 4, 8))},
    bind=lambda setting: {"config": setting.config},
)
class XKVCache(HeldCache):
    """A cache whose prompt is cut to a low rank, several layers at once; what is decoded after it is held as it is.

    The first tokens that it is handed are the prompt. Ranks are cut to what a short prompt allows, which takes up to
    twice the room of a plain cache where they are of the size of the prompt and the group's width; the method is for
    prompts that are longer than that. Sequences of a batch are cut each by itself, padding included.

    Args:
        config: of the model; its layers have full attention and rotary embeddings.
        group_size: layers in a group.
        rank_k: of the keys of a whole group; by default an eighth of its width of G · d channels.
        rank_v: of the values of a whole group; by default three sixteenths of its width.

    The defaults are the shares that the authors use for Llama 3.1 8B (4 layers of 1024 channels, 512 and 768).

    Raises:
        ValueError: an argument lies outside its range, or the model is not like that.
    """

    def __init__(
        self, config: Any, *, group_size: int = 4, rank_k: int | None = None, rank_v: int | None = None
    ) -> None:
        n_layers, heads, head_width = shape_of(config)
        rotary, width = Rotary(config), heads * head_width
        groups = group_layers(n_layers, group_size)
        for name, rank in (("rank_k", rank_k), ("rank_v", rank_v)):
            most = group_size * width
            require(rank is None or whole(rank, 1, most), name, rank, f"a whole number from 1 to {most}")
        layers: list[Any] = []
        for numbers in groups:
            group: list[XKVLayer] = []
            share = len(numbers) * width
            ranks = rank_k or max(1, share // 8), rank_v or max(1, 3 * share // 16)
            layers += [XKVLayer(group, rotary, *ranks, heads, head_width) for _ in numbers]
        super().__init__(layers=layers)
        self.rotary = rotary
        self.settings = {"group_size": group_size, "rank_k": rank_k, "rank_v": rank_v, "channels": width}
