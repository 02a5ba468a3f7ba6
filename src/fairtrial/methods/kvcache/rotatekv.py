"""RotateKV: keys and values of 2 bits, by rotations that spread outliers (Su et al. 2025, arXiv:2501.16383).

A few channels of the keys are much larger than the others and would take most of a quantiser's range. Keys as they were
before their rotary embeddings pass through three steps:

1. the Walsh-Hadamard transform of the joined channels of g heads, which is orthogonal, spreads outliers over all of
   them;
2. all channels are put in the order of their sums over calibration data, so that a group holds channels of like size;
3. each token is quantised in groups of channels: with x_max and x_min of a group multiplied by `clip`,
   Δ = (x_max - x_min) / (2^b - 1), z = round(-x_min / Δ), q = clamp(round(x/Δ) + z, 0, 2^b - 1), x̂ = Δ (q - z).

For attention all is undone, and the rotary embeddings are put on again, since they do not commute with the transform.
Values are transformed head by head, and quantised likewise. The tokens that the largest entries of a layer's input
belong to, in which massive activations make attention sinks, keep their keys and values as they are. All other tokens
are quantised at once, and attention over the prompt sees them so, too.

The authors' code divides by b² - 1 in place of 2^b - 1, which is the same for 2 and 4 bits; for 3 bits the latter is
followed. Their code quantises and goes on with floating-point numbers; here packed codes are held, with a scale and the
value of code 0 for each group in 16 bits. A group whose entries are equal gets the least scale that there is, in the
place of a division by zero.
"""

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from fairtrial.methods.arguments import require
from fairtrial.methods.kvcache.held import (
    HeldCache,
    HeldLayer,
    Shape,
    apart,
    check_crop,
    joined,
    last_removed,
    shape_of,
    together,
)
from fairtrial.methods.kvcache.rotary import Rotary
from fairtrial.methods.kvcache.rotated_keys import TOKENS, TOLERANCE, check_rotated_keys
from fairtrial.methods.kvcache.watched import decoder_layers, watched
from fairtrial.methods.quantization.hadamard import hadamard_transform
from fairtrial.methods.quantization.packing import pack, packed_width, unpack
from fairtrial.methods.registry import Uniform, method
from fairtrial.methods.whole import whole

UNQUANTISED = 16  # bits, with which everything is rotated and nothing is rounded


def rotate_keys(keys: Float[Tensor, "b h t d"], head_group: int) -> Float[Tensor, "b h t d"]:
    """The normalised Hadamard transform of the joined channels of `head_group` heads; it is its own inverse.

    Raises:
        ValueError: the heads do not come in such groups, or head_group · d is no power of two.
    """
    heads, width = keys.shape[1], keys.shape[3]
    check_head_group(head_group, heads, width)
    joint = together(keys).unflatten(-1, (-1, head_group * width))
    return apart(hadamard_transform(joint).flatten(-2), heads)


def check_head_group(head_group: int, heads: int, width: int) -> None:
    divides = whole(head_group, 1) and heads % head_group == 0
    require(divides, "head_group", head_group, f"a divisor of {heads} heads")
    size = head_group * width
    require(size & (size - 1) == 0, "head_group", head_group, f"such that times {width} channels it is a power of two")


def usual_head_group(heads: int) -> int:
    """The authors' 4, or the largest power of two below it that divides the heads."""
    return next(group for group in (4, 2, 1) if heads % group == 0)


@torch.no_grad()
def calibrate_channel_order(
    model: nn.Module, calibration: Iterable[Int[Tensor, "_ _"]], head_group: int | None = None
) -> Int[Tensor, "l n"]:
    """For each layer the channels of its rotated keys, in the rising order of their sums over all tokens.

    Args:
        model: of transformers, with rotary embeddings and full attention.
        calibration: batches of token ids without padding.
        head_group: heads that are rotated together; by default 4, or 2 or 1 where 4 does not divide them.

    Raises:
        ValueError: there are no data, the keys are not finite, or the model or the head group does not fit.
    """
    from transformers import DynamicCache

    config: Any = model.config
    n_layers, heads, width = shape_of(config)
    head_group = usual_head_group(heads) if head_group is None else head_group
    check_head_group(head_group, heads, width)
    rotary, sums = Rotary(config), torch.zeros(n_layers, heads, width, dtype=torch.float64)
    tokens = 0
    for ids in calibration:
        cache: Any = DynamicCache(config=config)
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for total, layer in zip(sums, cache.layers, strict=True):
            total += rotary.take_off(layer.keys.float()).sum((0, 2), dtype=torch.float64).to(total.device)
        tokens += ids.numel()
    require(tokens > 0, "calibration", tokens, "at least one token")
    require(bool(sums.isfinite().all()), "calibration", "keys that are not finite", "data that give finite keys")
    rotated = rotate_keys(sums[:, :, None], head_group)  # the transform is linear: of the sums as of the keys
    return together(rotated)[:, 0].argsort(dim=-1, stable=True)


class Quantized(NamedTuple):
    """Codes with what they stand for, scale · code + offset in groups of neighbours."""

    codes: UInt8[Tensor, "*b n"]
    scale: Float[Tensor, "*b g"]
    offset: Float[Tensor, "*b g"]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "*b n"]:
        scale, offset = self.scale.to(dtype)[..., None], self.offset.to(dtype)[..., None]
        grouped = self.codes.unflatten(-1, (scale.shape[-2], -1)).to(dtype)
        return torch.addcmul(offset, grouped, scale).flatten(-2)


def quantize_per_token(
    x: Float[Tensor, "*b n"],
    bits: int,
    group_size: int,
    clip: float = 1.0,
    *,
    held_in: torch.dtype | None = None,
) -> Quantized:
    """Round groups of neighbours to 2^bits levels between clip · min and clip · max.

    Zero points may lie outside the codes, so that groups of one sign keep their range.

    Args:
        x: tokens, each with n channels.
        bits: from 1 to 8.
        group_size: channels that share a scale.
        clip: within (0, 1].
        held_in: the dtype of scale and offset, by default that of x.

    Raises:
        ValueError: an argument lies outside its range, or the group size does not divide n.
    """
    require(whole(bits, 1, 8), "bits", bits, "a whole number from 1 to 8")
    require(0 < clip <= 1, "clip", clip, "within (0, 1]")
    n = x.shape[-1]
    require(whole(group_size, 1) and n % group_size == 0, "group_size", group_size, f"a divisor of {n} channels")
    dtype = held_in or x.dtype
    grouped = x.unflatten(-1, (-1, group_size))
    high, low = grouped.amax(-1, keepdim=True) * clip, grouped.amin(-1, keepdim=True) * clip
    least = max(1e-8, torch.finfo(dtype).tiny)
    scale = ((high - low) / (2**bits - 1)).clamp_min(least).to(dtype)
    zero = torch.round(-low / scale.to(x.dtype))
    codes = (torch.round(grouped / scale.to(x.dtype)) + zero).clamp_(0, 2**bits - 1)
    offset = (-zero * scale.to(x.dtype)).to(dtype)
    return Quantized(codes.to(torch.uint8).flatten(-2), scale.squeeze(-1), offset.squeeze(-1))


def sink_tokens(hidden: Float[Tensor, "b t d"], k: int = 20) -> Int[Tensor, "b s"]:
    """The tokens that the k largest magnitudes of a layer's input belong to.

    Returns:
        Their places in rising order, for each sequence as many as the sequence with most has; others repeat their
        first.

    Raises:
        ValueError: k is below 1.
    """
    require(whole(k, 1), "k", k, "a whole number of at least 1")
    tokens, width = hidden.shape[1:]
    found = hidden.abs().flatten(1).topk(min(k, tokens * width), -1).indices // width
    chosen = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device).scatter_(1, found, True)
    counts = chosen.sum(-1, keepdim=True)
    places = chosen.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, : int(counts.max())]
    return torch.where(torch.arange(places.shape[1], device=hidden.device) < counts, places, places[:, :1])


@torch.no_grad()
def fuse_rotatekv(model: nn.Module, orders: Int[Tensor, "l n"], head_group: int | None = None) -> nn.Module:
    """Put the rotations, and the order of the keys' channels, into the weights, in place; returns the model.

    Values turn with v_proj and back with o_proj. Keys come out of k_proj rotated and reordered, and only a
    `RotateKVCache` with `fused=True` and the same order undoes that: the model must be run with such a cache from the
    first token on, and without padding.

    Args:
        model: of transformers, with linear `k_proj`, `v_proj` and `o_proj` in each attention; what it caches of keys is
            the output of `k_proj`, turned by rotary embeddings, and nothing but attention lies between the other two.
        orders: as `calibrate_channel_order` gives them.
        head_group: that they were found with.

    Raises:
        ValueError: the model, the orders or the head group do not fit each other; nothing is changed then.
    """
    n_layers, heads, width = shape_of(model.config)
    head_group = usual_head_group(heads) if head_group is None else head_group
    check_head_group(head_group, heads, width)
    require(width & (width - 1) == 0, "model", f"heads of {width} channels", "with a power of two of them")
    check_order(orders, n_layers, heads * width)
    attentions: list[Any] = [layer.self_attn for _, layer in sorted(decoder_layers(model).items())]
    for attention in attentions:
        parts = [getattr(attention, name, None) for name in ("k_proj", "v_proj", "o_proj")]
        linear = all(isinstance(part, nn.Linear) for part in parts)
        require(linear, "model", type(attention).__name__, "with linear k_proj, v_proj and o_proj in each attention")
    check_rotated_keys(model, [attention.k_proj for attention in attentions])
    _check_plain_values(model, attentions, width)
    for attention, order in zip(attentions, orders, strict=True):
        for tensor in (attention.k_proj.weight, attention.k_proj.bias):  # (n, …) and (n,)
            if tensor is not None:
                rows = _rotated_rows(tensor, head_group * width)
                tensor.copy_(rows[order.to(rows.device)])
        for tensor in (attention.v_proj.weight, attention.v_proj.bias):
            if tensor is not None:
                tensor.copy_(_rotated_rows(tensor, width))
        attention.o_proj.weight.copy_(_rotated_rows(attention.o_proj.weight.T, width).T)
    return model


def _check_plain_values(model: Any, attentions: Sequence[Any], width: int) -> None:
    """Have a model read single tokens, which attend to themselves, and refuse it if o_proj is not handed their values.

    Raises:
        ValueError: values are normalised or clipped, or what attention makes of them is.
    """
    made: list[Tensor] = []
    handed: list[Tensor] = []
    with ExitStack() as stack:
        for attention in attentions:
            see = attention.v_proj.register_forward_hook(lambda module, args, output: made.append(output))
            stack.callback(see.remove)
            see = attention.o_proj.register_forward_pre_hook(lambda module, args: handed.append(args[0]))
            stack.callback(see.remove)
        model(torch.arange(TOKENS, device=next(model.parameters()).device)[:, None], use_cache=False)
    for number, (values, found) in enumerate(zip(made, handed, strict=True)):
        heads = values.unflatten(-1, (-1, width))
        own = heads.repeat_interleave(found.shape[-1] // values.shape[-1], -2).flatten(-2)
        off = (own - found).abs().max()
        fits = not bool(off > values.abs().max() * max(TOLERANCE, 4 * torch.finfo(values.dtype).eps))
        got = f"{type(model).__name__}, in which o_proj of layer {number} is handed something else"
        require(fits, "model", got, "one whose o_proj is handed what v_proj gives, weighted by attention")


def _rotated_rows(weight: Tensor, size: int) -> Tensor:
    """H W for blocks of `size` rows; H is symmetric."""
    columns = weight.double().movedim(0, -1).unflatten(-1, (-1, size))
    return hadamard_transform(columns).flatten(-2).movedim(-1, 0).to(weight.dtype)


def check_order(order: Tensor, n_layers: int, channels: int) -> None:
    shape = tuple(order.shape)
    require(shape == (n_layers, channels), "order", shape, f"of shape {(n_layers, channels)}: layers, channels")
    require(order.dtype == torch.long, "order", order.dtype, "of torch.long")
    rising = torch.arange(channels, device=order.device).expand_as(order)
    require(torch.equal(order.sort(-1).values, rising), "order", "rows that are no permutation", "permutations")


class RotateKVLayer(HeldLayer):
    """What a layer holds of its tokens: packed codes with scales and offsets, and the sinks' own keys and values."""

    parts: ClassVar = (
        "key_codes", "key_scale", "key_offset", "value_codes", "value_scale", "value_offset",
        "sink_at", "sink_keys", "sink_values",
    )  # fmt: skip
    is_croppable = True
    key_codes: Tensor | None
    value_codes: Tensor | None
    sink_at: Tensor | None
    sink_keys: Tensor | None
    sink_values: Tensor | None

    def __init__(self, cache: "RotateKVCache", order: Int[Tensor, " n"] | None) -> None:
        self.found_sinks: Tensor | None = None
        super().__init__(cache.heads, cache.head_width)
        self.cache, self.order = cache, order

    def reset(self) -> None:
        super().reset()
        self.found_sinks = None

    def shapes(self, number: int) -> list[dict[str, Shape]]:
        bits, channels, sinks = self.cache.bits, self.heads * self.width, f"sinks of layer {number}"
        width = channels if bits == UNQUANTISED else packed_width(channels, bits)
        coded: dict[str, Shape] = dict.fromkeys(("key_codes", "value_codes"), ("sequences", "tokens", width))
        if bits != UNQUANTISED:
            scaled = ("key_scale", "key_offset", "value_scale", "value_offset")
            coded |= dict.fromkeys(scaled, ("sequences", "tokens", channels // self.cache.group_size))
        exact: Shape = ("sequences", self.heads, sinks, self.width)
        return [coded, {"sink_at": ("sequences", sinks), "sink_keys": exact, "sink_values": exact}]

    def get_seq_length(self) -> int:
        return 0 if self.key_codes is None else self.key_codes.shape[1]

    @torch.no_grad()
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, dtype = self.get_seq_length(), key_states.dtype
        sinks = self._sinks(key_states) if start == 0 else None
        self.is_initialized = True
        keys = self.cache.rotary.take_off(key_states.float(), start)
        values = value_states.float()
        if not self.cache.fused:
            keys, values = rotate_keys(keys, self.cache.head_group), hadamard_transform(values)
        keys = together(keys)
        if self.order is not None and not self.cache.fused:
            keys = keys[..., self.order]
        self._append("key", keys, dtype)
        self._append("value", together(values), dtype)
        if sinks is not None:
            at = sinks[:, None, :, None].expand(-1, key_states.shape[1], -1, key_states.shape[3])
            self.sink_at = sinks.to(torch.int32)
            exact = self._turned_back(keys, key_states.shape[1]).to(dtype) if self.cache.fused else key_states
            self.sink_keys, self.sink_values = exact.gather(2, at), value_states.gather(2, at)
        return self._restored(key_states.shape[1], dtype)

    def _sinks(self, keys: Tensor) -> Tensor | None:
        """The places of the tokens that are held as they are."""
        if self.cache.sink_indices is not None:
            places = [place for place in self.cache.sink_indices if place < keys.shape[2]]
            return torch.tensor(places, device=keys.device).expand(len(keys), -1) if places else None
        if not self.cache.sinks:
            return None
        if self.found_sinks is None:
            raise ValueError(
                "sinks are found in the layers' inputs: use the cache within `with cache.attached_to(model)`"
            )
        found, self.found_sinks = self.found_sinks, None
        return found

    def _append(self, name: str, x: Float[Tensor, "b t n"], dtype: torch.dtype) -> None:
        bits, size = self.cache.bits, self.cache.group_size
        if bits == UNQUANTISED:
            new: dict[str, Tensor] = {"codes": x.to(dtype)}
        else:
            held_in = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
            codes, scale, offset = quantize_per_token(x, bits, size, self.cache.clip, held_in=held_in)
            packed = pack(codes.flatten(0, 1), bits).unflatten(0, x.shape[:2])
            new = {"codes": packed, "scale": scale, "offset": offset}
        for part, tensor in new.items():
            setattr(self, f"{name}_{part}", joined([getattr(self, f"{name}_{part}"), tensor]))

    def _read(self, name: str, channels: int) -> Float[Tensor, "b t n"]:
        codes: Tensor = getattr(self, f"{name}_codes")
        if self.cache.bits == UNQUANTISED:
            return codes.float()
        unpacked = unpack(codes.flatten(0, 1), self.cache.bits, channels).unflatten(0, codes.shape[:2])
        return Quantized(unpacked, getattr(self, f"{name}_scale"), getattr(self, f"{name}_offset")).dequantize()

    def _turned_back(self, keys: Float[Tensor, "b t n"], heads: int) -> Float[Tensor, "b {heads} t d"]:
        """All keys as attention needs them: order and rotation undone, rotary embeddings put on."""
        if self.order is not None:
            keys = keys[..., self.order.argsort()]
        back: Tensor = self.cache.rotary.put_on(rotate_keys(apart(keys, heads), self.cache.head_group))
        return back

    def _restored(self, heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values as attention needs them."""
        channels = heads * self.cache.head_width
        keys = self._turned_back(self._read("key", channels), heads).to(dtype)
        values = apart(self._read("value", channels), heads)
        values = (values if self.cache.fused else hadamard_transform(values)).to(dtype)
        if self.sink_at is not None and self.sink_keys is not None and self.sink_values is not None:
            at = self.sink_at.long()[:, None, :, None].expand_as(self.sink_keys)
            keys, values = keys.scatter(2, at, self.sink_keys), values.scatter(2, at, self.sink_values)
        return keys, values

    @torch.no_grad()
    def crop(self, tokens_to_remove: int) -> None:
        tokens, length = check_crop(tokens_to_remove, self.get_seq_length()), self.get_seq_length()
        if not tokens:
            return
        if tokens == length:
            self.reset()
            return
        if self.sink_at is not None and self.sink_keys is not None and self.sink_values is not None:
            # a sink that goes becomes one at the first token, with what stands there as it is
            keys, values = self._restored(self.sink_keys.shape[1], self.sink_keys.dtype)
            gone = self.sink_at >= length - tokens
            self.sink_at = self.sink_at.masked_fill(gone, 0)
            self.sink_keys = torch.where(gone[:, None, :, None], keys[:, :, :1], self.sink_keys)
            self.sink_values = torch.where(gone[:, None, :, None], values[:, :, :1], self.sink_values)
        for name in self.parts:
            if not name.startswith("sink"):
                setattr(self, name, last_removed(getattr(self, name), tokens))


@method(
    paper="rotatekv",
    slot="cache",
    search={"clip": Uniform(0.6, 1.0)},
    bind=lambda setting: {
        "config": setting.config,
        "order": calibrate_channel_order(setting.model, setting.calibration),
    },
)
class RotateKVCache(HeldCache):
    """A cache of rotated, reordered and quantised keys and values, in which a few tokens of the prompt stay exact.

    The sinks are looked for in the inputs of the model's layers, when the first tokens come: with sinks the cache is
    used within `with cache.attached_to(model):`, unless `sink_indices` says where they are.

    Args:
        config: of the model; its layers have full attention and rotary embeddings.
        bits: of a code, from 1 to 8; with 16 everything is rotated and held in the model's dtype.
        group_size: channels that share a scale, counted over all heads; by default the channels of a head.
        clip: by how much a group's range is cut; by default 0.8 for 2 bits or fewer and 1 for more.
        head_group: heads whose keys are rotated together; by default 4, or 2 or 1 where 4 does not divide them.
        order: of each layer's rotated channels, as `calibrate_channel_order` finds it with the same head group.
        sinks: how many of the largest entries of a layer's input say which tokens stay exact; 0 for none.
        sink_indices: places of the tokens that stay exact in every layer, if they are known.
        fused: the model's weights rotate and reorder, by `fuse_rotatekv`.

    The defaults are the authors', whose models have at least 8 heads of 128 channels.

    Raises:
        ValueError: an argument lies outside its range, or the model is not like that.
    """

    def __init__(
        self,
        config: Any,
        *,
        bits: int = 2,
        group_size: int | None = None,
        clip: float | None = None,
        head_group: int | None = None,
        order: Int[Tensor, "l n"] | None = None,
        sinks: int = 20,
        sink_indices: Sequence[int] | None = None,
        fused: bool = False,
    ) -> None:
        n_layers, heads, width = shape_of(config)
        known = whole(bits, 1) and (bits <= 8 or bits == UNQUANTISED)
        require(known, "bits", bits, "a whole number from 1 to 8, or 16")
        self.rotary, self.heads, self.head_width = Rotary(config), heads, width
        self.bits, self.sinks, self.fused = bits, sinks, fused
        self.group_size = width if group_size is None else group_size
        self.clip = (0.8 if bits <= 2 else 1.0) if clip is None else clip
        self.head_group = usual_head_group(heads) if head_group is None else head_group
        self.sink_indices = None if sink_indices is None else tuple(sink_indices)
        require(0 < self.clip <= 1, "clip", clip, "within (0, 1]")
        check_head_group(self.head_group, heads, width)
        require(width & (width - 1) == 0, "config", f"heads of {width} channels", "with a power of two of them")
        divides = whole(self.group_size, 1) and heads * width % self.group_size == 0
        require(divides, "group_size", group_size, f"a divisor of {heads * width} channels")
        require(whole(sinks, 0), "sinks", sinks, "a whole number of at least 0")
        places = all(whole(place, 0) for place in self.sink_indices or ())
        require(places, "sink_indices", sink_indices, "whole numbers of at least 0")
        if order is not None:
            check_order(order, n_layers, heads * width)
        super().__init__(layers=[RotateKVLayer(self, None if order is None else order[i]) for i in range(n_layers)])
        self.settings = {
            "bits": bits,
            "group_size": self.group_size,
            "head_group": self.head_group,
            "channels": heads * width,
            "order": None if order is None else hashlib.sha256(order.cpu().numpy().tobytes()).hexdigest()[:16],
            "fused": fused,
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the cache holds, the order of channels included."""
        return super().nbytes + sum(int(layer.order.nbytes) for layer in self.layers if layer.order is not None)

    def attached_to(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within, the cache finds the sinks in the inputs of the model's layers.

        Raises:
            ValueError: the model has other layers than the cache.
        """
        layers = decoder_layers(model)
        require(len(layers) == len(self.layers), "model", f"{len(layers)} layers", f"one of {len(self.layers)} layers")

        def see(number: int, hidden: Tensor, kwargs: Any) -> None:
            layer = self.layers[number]
            if self.sinks and self.sink_indices is None and layer.get_seq_length() == 0:
                layer.found_sinks = sink_tokens(hidden, self.sinks)

        return watched(self, layers, see)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.rotary.forget()
