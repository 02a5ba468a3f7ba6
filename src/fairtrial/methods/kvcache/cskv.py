"""CSKV: keys and values in fewer channels, and the latest tokens as they are (Wang et al. 2024, arXiv:2409.10593).

The weights W of k_proj and v_proj are factorised, W ≈ B A with A: C × d. Of a token with the attention's input x the
cache holds the narrow feature u = A x, and makes B u of it when attention needs the key (before its rotary embedding)
or the value. The latest tokens also have their exact keys and values.

Factors start from an activation-aware decomposition: with a_j the mean magnitude of input channel j, summed over
calibration batches, and S = diag((a + 1e-6)^α), α = 1/2, of S Wᵀ = U Σ Vᵀ the first C singular values are kept,

    A = (S⁻¹ U_C Σ_C^½)ᵀ,    B = (Σ_C^½ V_Cᵀ)ᵀ,

which minimises ‖(B A - W) S‖_F. They are then trained to rebuild keys and values: Σ_layers MSE(B A x, W x), where x is
the input in the model as it is. So layers do not depend on each other, and they are trained one by one.

A cache has a window of w tokens. Tokens in full windows are held by their features only, and those after the last full
window exactly, too; in the step that fills a window its tokens are still exact. Attention over the prompt sees exact
keys and values. Features of full windows may be quantised, keys per channel over the window's tokens, values per token
over the channels of a head: Δ = max(max - min, 1e-5) / (2^b - 1), z = clamp(round(-min / Δ), 0, 2^b - 1),
û = Δ (clamp(round(u/Δ) + z, 0, 2^b - 1) - z).

The paper has a recent window of fixed length. The authors' code is followed, in which its length goes from 0 to w - 1
and starts anew. Their code computes x Wᵀ and x Aᵀ in one product; here the model stays as it is, and the features are
computed beside it. They refuse projections with a bias, which here is added to what the factors rebuild.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.methods.arguments import require
from fairtrial.methods.kvcache.held import HeldCache, HeldLayer, Shape, check_crop, joined, last_removed, shape_of
from fairtrial.methods.kvcache.rotary import turned
from fairtrial.methods.kvcache.rotated_keys import check_rotated_keys, rotary_embedding
from fairtrial.methods.kvcache.watched import decoder_layers, watched
from fairtrial.methods.quantization.packing import pack, packed_width, unpack
from fairtrial.methods.registry import LogUniform, method
from fairtrial.methods.whole import whole

LEAST_RANGE = 1e-5

# Factors -----------------------------------------------------------------------------------------------------------


def asvd_factorize(
    weight: Float[Tensor, "o i"], act_abs_mean: Float[Tensor, " i"] | None, rank: int, alpha: float = 0.5
) -> tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]:
    """A and B whose product is nearest to the weight, input channels weighted by (act_abs_mean + 1e-6)^alpha.

    Args:
        weight: of a linear layer.
        act_abs_mean: mean magnitudes of its input channels, up to a common factor; without, all count alike.
        rank: from 1 to min(o, i).
        alpha: how much the magnitudes count; 0 for not at all.

    Raises:
        ValueError: the rank is out of range, alpha is not finite, or magnitudes are negative or not finite.
    """
    most = min(weight.shape)
    require(whole(rank, 1, most), "rank", rank, f"a whole number from 1 to {most}")
    require(math.isfinite(alpha), "alpha", alpha, "finite")
    wide = weight.double()
    scale = torch.ones_like(wide[0])
    if act_abs_mean is not None:
        fits = bool((act_abs_mean >= 0).all() and act_abs_mean.isfinite().all())
        require(fits, "act_abs_mean", act_abs_mean, "finite and at least 0")
        scale = (act_abs_mean.double() + 1e-6) ** alpha
    u, s, vt = torch.linalg.svd(scale[:, None] * wide.T, full_matrices=False)
    root = s[:rank].sqrt()
    down, up = (u[:, :rank] * root / scale[:, None]).T, (root[:, None] * vt[:rank]).T
    return down.to(weight.dtype).contiguous(), up.to(weight.dtype).contiguous()


class CSKVProjection(nn.Module):
    """x ↦ B A x + bias in the place of a linear layer, through C channels.

    Args:
        linear: the layer whose weight is factorised; it is not kept.
        rank: C.
        act_abs_mean: of its inputs, as in `asvd_factorize`.

    Raises:
        ValueError: the rank is out of range.
    """

    bias: Tensor | None

    def __init__(self, linear: nn.Linear, rank: int, act_abs_mean: Float[Tensor, " i"] | None = None) -> None:
        super().__init__()
        down, up = asvd_factorize(linear.weight.detach(), act_abs_mean, rank)
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def compress(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b r"]:
        """A x"""
        return F.linear(x, self.down)

    def rebuild(self, u: Float[Tensor, "*b r"]) -> Float[Tensor, "*b o"]:
        """B u + bias"""
        return F.linear(u, self.up, self.bias)

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        return self.rebuild(self.compress(x))


class CSKVFactors(nn.Module):
    """The factors of all layers of a model.

    Attributes:
        keys: one `CSKVProjection` for each layer's k_proj.
        values: one for each layer's v_proj.
        heads: of keys and values.
    """

    keys: Sequence[CSKVProjection]
    values: Sequence[CSKVProjection]

    def __init__(self, keys: Iterable[CSKVProjection], values: Iterable[CSKVProjection], heads: int) -> None:
        super().__init__()
        self.keys, self.values, self.heads = nn.ModuleList(keys), nn.ModuleList(values), heads  # type: ignore[assignment]


def factorize_cskv(
    model: nn.Module,
    k_density: float = 0.25,
    v_density: float = 0.75,
    calibration: Iterable[Int[Tensor, "_ _"]] = (),
) -> CSKVFactors:
    """Factors for the keys and values of a model of transformers, which stays as it is.

    Args:
        model: with linear `k_proj` and `v_proj` in each attention, and full attention; what it caches of keys is the
            output of `k_proj`, turned by rotary embeddings.
        k_density: the share of a head's channels that is left to keys, rounded to a whole number for each head.
        v_density: likewise for values.
        calibration: batches of token ids, by whose activations inputs are weighted; without any they count alike.

    The defaults are those of the authors' script.

    Raises:
        ValueError: a density is not within (0, 1] or leaves no channel, or the model is not like that.
    """
    n_layers, heads, width = shape_of(model.config)
    ranks = []
    for name, density in (("k_density", k_density), ("v_density", v_density)):
        require(0 < density <= 1 and round(density * width) >= 1, name, density, "within (0, 1], one channel at least")
        ranks.append(round(density * width) * heads)
    attentions = _attentions(model)
    require(
        len(attentions) == n_layers, "model", f"{len(attentions)} attentions", f"with one in {n_layers} layers each"
    )
    check_rotated_keys(model, [attention.k_proj for attention in attentions])
    means = _mean_magnitudes(model, list(calibration))
    keys, values = (
        [CSKVProjection(getattr(a, name), rank, means.get(number)) for number, a in enumerate(attentions)]
        for name, rank in zip(("k_proj", "v_proj"), ranks, strict=True)
    )
    return CSKVFactors(keys, values, heads)


def _attentions(model: nn.Module) -> list[Any]:
    attentions = [layer.self_attn for _, layer in sorted(decoder_layers(model).items())]
    for attention in attentions:
        linear = all(isinstance(getattr(attention, name, None), nn.Linear) for name in ("k_proj", "v_proj"))
        require(linear, "model", type(attention).__name__, "with linear k_proj and v_proj in each attention")
    return attentions


@torch.no_grad()
def attention_inputs(model: nn.Module, batches: Iterable[Int[Tensor, "_ _"]]) -> Iterator[list[Float[Tensor, "b t d"]]]:
    """For each batch of token ids the input of each attention.

    Raises:
        ValueError: an input is not finite.
    """
    attentions = _attentions(model)
    for number, ids in enumerate(batches):
        seen: dict[int, Tensor] = {}

        def see(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], seen: dict[int, Tensor] = seen) -> None:
            seen[module.layer_idx] = (args[0] if args else kwargs["hidden_states"]).detach()

        handles = [attention.register_forward_pre_hook(see, with_kwargs=True) for attention in attentions]
        try:
            model(ids, use_cache=False, logits_to_keep=1)
        finally:
            for handle in handles:
                handle.remove()
        found = [seen[i] for i in range(len(attentions))]
        finite = all(bool(x.isfinite().all()) for x in found)
        require(finite, "batches", f"activations of batch {number} that are not finite", "data that give finite ones")
        yield found


def _mean_magnitudes(model: nn.Module, batches: list[Tensor]) -> dict[int, Tensor]:
    """Of each layer's attention inputs: the mean over tokens, summed over batches."""
    sums: dict[int, Tensor] = {}
    for inputs in attention_inputs(model, batches):
        for number, x in enumerate(inputs):
            sums[number] = sums.get(number, 0) + x.double().abs().mean((0, 1))
    return sums


def train_cskv(
    factors: CSKVFactors,
    model: nn.Module,
    batches: Iterable[Int[Tensor, "_ _"]],
    *,
    lr: float = 5e-5,
    steps: int = 100,
    k_bits: int | None = None,
    v_bits: int | None = None,
    window: int = 32,
) -> list[float]:
    """Train the factors in place to rebuild the keys and values of the model, by AdamW with a rate that falls to 0.

    The model is run once over the batches, whose attention inputs are kept meanwhile: of each token d numbers for each
    layer. A step takes a batch, and begins again after the last.

    Args:
        factors: of this model.
        model: stays as it is.
        batches: of token ids.
        lr: the first learning rate; the authors', who train 7B models. Small ones take 1e-3.
        steps: of each layer.
        k_bits: train with quantised features of keys, a batch being cut to whole windows.
        v_bits: likewise for values.
        window: of the quantiser of keys.

    Returns:
        The loss of each step, summed over layers.

    Raises:
        ValueError: an argument lies outside its range, there is no batch, or the factors are of another model.
    """
    require(0 < lr < math.inf, "lr", lr, "finite and above 0")
    require(whole(steps, 1), "steps", steps, "a whole number of at least 1")
    _check_window(window, k_bits, v_bits)
    _check_factors(factors, model)
    inputs = list(attention_inputs(model, batches))
    require(bool(inputs), "batches", len(inputs), "at least one")
    short = k_bits is not None and min(x[0].shape[1] for x in inputs) < window
    require(not short, "batches", "shorter than a window", f"of at least {window} tokens")
    losses = [0.0] * steps
    for number, attention in enumerate(_attentions(model)):
        pair = ((factors.keys[number], attention.k_proj, k_bits), (factors.values[number], attention.v_proj, v_bits))
        with torch.enable_grad():
            optimizer = torch.optim.AdamW([p for f, _, _ in pair for p in f.parameters()], lr, weight_decay=0.0)
            for step in range(steps):
                x = inputs[step % len(inputs)][number]
                if k_bits is not None:
                    x = x[:, : x.shape[1] // window * window]
                loss = torch.zeros((), dtype=torch.float32, device=x.device)
                for (factor, linear, bits), keys in zip(pair, (True, False), strict=True):
                    u = factor.compress(x)
                    if bits is not None:
                        u = (
                            fake_quantize_keys(u, bits, window)
                            if keys
                            else fake_quantize_values(u, bits, factors.heads)
                        )
                    with torch.no_grad():
                        target = linear(x)
                    loss = loss + F.mse_loss(factor.rebuild(u).float(), target.float())
                optimizer.zero_grad()
                loss.backward()
                optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
                optimizer.step()
                losses[step] += loss.item()
    return losses


def _check_factors(factors: CSKVFactors, model: nn.Module) -> None:
    attentions = _attentions(model)
    for name, found in (("k_proj", factors.keys), ("v_proj", factors.values)):
        shapes = [(factor.up.shape[0], factor.down.shape[1]) for factor in found]
        wanted = [tuple(getattr(attention, name).weight.shape) for attention in attentions]
        of_which, of_what = (f"of {len(each)} {name} with weights {sorted(set(each))}" for each in (shapes, wanted))
        require(shapes == wanted, "factors", of_which, of_what)


# Quantised features ------------------------------------------------------------------------------------------------


def _grid(grouped: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Δ and z along the last dimension, Δ as it is held in a dtype."""
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale = ((high - low).clamp_min(LEAST_RANGE) / (2**bits - 1)).to(dtype).to(grouped.dtype)
    return scale, torch.round(-low / scale).clamp_(0, 2**bits - 1)


def _codes(grouped: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return (torch.round(grouped / scale) + zero).clamp_(0, 2**bits - 1)


def _fake_quantize(grouped: Tensor, bits: int) -> Tensor:
    """û, with the gradient of u where u lies between the least and the largest level, and none elsewhere."""
    with torch.no_grad():
        scale, zero = _grid(grouped, bits, grouped.dtype)
        rounded = scale * (_codes(grouped, scale, zero, bits) - zero)
        inside = (grouped > -zero * scale) & (grouped < (2**bits - 1 - zero) * scale)
    passed = torch.where(inside, grouped, grouped.detach())
    return rounded + passed - passed.detach()


def fake_quantize_keys(u: Float[Tensor, "b t r"], bits: int, window: int) -> Float[Tensor, "b t r"]:
    """Features of keys on their levels: per channel, over each window of tokens.

    Raises:
        ValueError: t is no multiple of the window, or the bits are out of range.
    """
    _check_window(window, bits)
    require(u.shape[1] % window == 0, "u", tuple(u.shape), f"of whole windows of {window} tokens")
    grouped = u.unflatten(1, (-1, window)).mT
    return _fake_quantize(grouped, bits).mT.flatten(1, 2)


def fake_quantize_values(u: Float[Tensor, "b t r"], bits: int, heads: int = 1) -> Float[Tensor, "b t r"]:
    """Features of values on their levels: per token, over the channels of each head.

    Raises:
        ValueError: the channels do not belong to so many heads alike, or the bits are out of range.
    """
    _check_window(1, bits)
    require(whole(heads, 1) and u.shape[2] % heads == 0, "heads", heads, f"a divisor of {u.shape[2]} channels")
    return _fake_quantize(u.unflatten(2, (heads, -1)), bits).flatten(2)


def _check_window(window: int, *bits: int | None) -> None:
    require(whole(window, 1), "window", window, "a whole number of at least 1")
    for each in bits:
        require(each is None or whole(each, 1, 8), "bits", each, "a whole number from 1 to 8, or None")


# The cache ---------------------------------------------------------------------------------------------------------


class CSKVLayer(HeldLayer):
    """What a layer holds: features of full windows, maybe quantised, then both features and exact keys and values."""

    parts: ClassVar = (
        "key_features", "key_scale", "key_zero", "value_features", "value_scale", "value_zero",
        "key_pending", "value_pending", "keys", "values", "positions",
    )  # fmt: skip
    is_croppable = False  # what a window's tokens were exactly is lost when it is full
    key_features: Tensor | None
    value_features: Tensor | None
    key_pending: Tensor | None
    value_pending: Tensor | None
    positions: Tensor | None  # of all tokens, in the first layer for all

    def __init__(self, cache: "CSKVCache", number: int) -> None:
        self.seen: tuple[Tensor, Tensor] | None = None
        heads = cache.factors.heads
        super().__init__(heads, cache.factors.keys[number].up.shape[0] // heads)
        self.cache, self.number = cache, number

    def reset(self) -> None:
        super().reset()
        self.seen = None

    def shapes(self, number: int) -> list[dict[str, Shape]]:
        factors, exact = self.cache.factors, ("sequences", self.heads, "tokens after them", self.width)
        full: dict[str, Shape] = {}
        rest: dict[str, Shape] = {"keys": exact, "values": exact}
        for name, factor, bits, scaled in (
            ("key", factors.keys[number], self.cache.k_bits, ("windows", factors.keys[number].down.shape[0])),
            ("value", factors.values[number], self.cache.v_bits, ("tokens in full windows", self.heads)),
        ):
            channels = factor.down.shape[0]
            width = channels if bits is None else packed_width(channels, bits)
            full[f"{name}_features"] = ("sequences", "tokens in full windows", width)
            if bits is not None:
                full |= dict.fromkeys((f"{name}_scale", f"{name}_zero"), ("sequences", *scaled))
            rest[f"{name}_pending"] = ("sequences", "tokens after them", channels)
        positions: dict[str, Shape] = {"positions": ("sequences", "positions", 1)}
        return [full, rest, positions] if number == 0 else [full, rest]

    def get_seq_length(self) -> int:
        return sum(x.shape[1] for x in (self.key_features, self.key_pending) if x is not None)

    @torch.no_grad()
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.seen is None:
            raise ValueError(
                "features are made of the attention's inputs: use it within `with cache.attached_to(model)`"
            )
        hidden, positions = self.seen
        tokens = (key_states.shape[0], key_states.shape[2])
        fits = tuple(hidden.shape[:2]) == tokens
        require(
            fits, "key_states", tokens, f"of the {tuple(hidden.shape[:2])} sequences and tokens of the layer's input"
        )
        new = positions.expand(tokens).to(torch.int32)[..., None]
        keys, values = self._rebuilt(key_states.dtype)
        self.seen, self.is_initialized = None, True
        if self.number == 0:
            self.positions = joined([self.positions, new])
        factors = self.cache.factors
        self.key_pending = joined([self.key_pending, factors.keys[self.number].compress(hidden)])
        self.value_pending = joined([self.value_pending, factors.values[self.number].compress(hidden)])
        self.keys, self.values = joined([self.keys, key_states]), joined([self.values, value_states])
        keys, values = joined([keys, self.keys]), joined([values, self.values])
        self._move_full_windows()
        return keys, values

    def _move_full_windows(self) -> None:
        """Of the tokens in full windows only features are kept."""
        pending = 0 if self.key_pending is None else self.key_pending.shape[1]
        full = pending // self.cache.window * self.cache.window
        if not full or self.key_pending is None or self.value_pending is None:
            return
        self._store("key", self.key_pending[:, :full], self.cache.k_bits)
        self._store("value", self.value_pending[:, :full], self.cache.v_bits)
        for name in ("key_pending", "value_pending", "keys", "values"):
            rest = getattr(self, name)[..., full:, :]
            setattr(self, name, rest.clone() if pending > full else None)

    def _store(self, name: str, u: Float[Tensor, "b t r"], bits: int | None) -> None:
        new = {"features": u.clone()}
        if bits is not None:
            held_in = torch.bfloat16 if u.dtype == torch.bfloat16 else torch.float16
            grouped = self._grouped(name, u.float())
            scale, zero = _grid(grouped, bits, held_in)
            codes = self._ungrouped(name, _codes(grouped, scale, zero, bits)).to(torch.uint8)
            packed = pack(codes.flatten(0, 1), bits).unflatten(0, codes.shape[:2])
            new = {"features": packed, "scale": scale[..., 0].to(held_in), "zero": zero[..., 0].to(torch.uint8)}
        for part, tensor in new.items():
            setattr(self, f"{name}_{part}", joined([getattr(self, f"{name}_{part}"), tensor]))

    def _grouped(self, name: str, u: Tensor) -> Tensor:
        """Entries that share a scale along the last dimension: (b, windows, r, w) of keys, (b, t, h, r/h) of values."""
        grouped: Tensor = (
            u.unflatten(1, (-1, self.cache.window)).mT
            if name == "key"
            else u.unflatten(2, (self.cache.factors.heads, -1))
        )
        return grouped

    def _ungrouped(self, name: str, grouped: Tensor) -> Tensor:
        return grouped.mT.flatten(1, 2) if name == "key" else grouped.flatten(2)

    def _features(self, name: str, bits: int | None, channels: int, dtype: torch.dtype) -> Float[Tensor, "b t r"]:
        held: Tensor = getattr(self, f"{name}_features")
        if bits is None:
            return held
        codes = unpack(held.flatten(0, 1), bits, channels).unflatten(0, held.shape[:2]).float()
        scale, zero = (getattr(self, f"{name}_{part}").float()[..., None] for part in ("scale", "zero"))
        return self._ungrouped(name, scale * (self._grouped(name, codes) - zero)).to(dtype)

    def _rebuilt(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Keys and values of the full windows."""
        if self.key_features is None:
            return None, None
        factors = self.cache.factors
        found = []
        for name, factor, bits in (
            ("key", factors.keys[self.number], self.cache.k_bits),
            ("value", factors.values[self.number], self.cache.v_bits),
        ):
            u = self._features(name, bits, factor.down.shape[0], dtype)
            found.append(factor.rebuild(u).unflatten(-1, (factors.heads, -1)).transpose(1, 2))
        cos, sin = self.cache.angles(self.key_features.shape[1], found[0])
        return turned(found[0], cos, sin), found[1]

    def crop(self, tokens_to_remove: int) -> None:
        for name in ("key_pending", "value_pending", "keys", "values", "positions"):
            setattr(self, name, last_removed(getattr(self, name), -tokens_to_remove))


class CSKVCache(HeldCache):
    """A cache of narrow features, with exact keys and values for the tokens since the last full window.

    It is used within `with cache.attached_to(model):`.

    Args:
        factors: of the model, as `factorize_cskv` makes and `train_cskv` trains them. They belong to the model, not to
            what the cache holds, and are saved by their own `state_dict`.
        window: tokens; with 1 only the current token is exact.
        k_bits: of the features of keys in full windows, from 1 to 8; None leaves them as they are.
        v_bits: of those of values.

    Raises:
        ValueError: an argument lies outside its range.
    """

    def __init__(
        self, factors: CSKVFactors, window: int = 32, k_bits: int | None = None, v_bits: int | None = None
    ) -> None:
        _check_window(window, k_bits, v_bits)
        self.factors, self.window, self.k_bits, self.v_bits = factors, window, k_bits, v_bits
        self._embedding: nn.Module | None = None
        self._angles: tuple[Tensor, Tensor] | None = None
        super().__init__(layers=[CSKVLayer(self, i) for i in range(len(factors.keys))])
        channels = [factors.keys[0].down.shape[0], factors.values[0].down.shape[0]]
        self.settings = {"window": window, "k_bits": k_bits, "v_bits": v_bits, "channels": channels}

    def __deepcopy__(self, memo: dict[int, Any]) -> "CSKVCache":
        """A copy of what is held, with the same factors; it is not attached."""
        copied = type(self).__new__(type(self))
        memo |= {id(self): copied, id(self.factors): self.factors}
        copied.__dict__ = copy.deepcopy(self.__dict__ | {"_embedding": None, "_angles": None}, memo)
        return copied

    @contextmanager
    def attached_to(self, model: nn.Module) -> Iterator[None]:
        """Within, the cache is told the inputs of the model's attentions, and rotates keys as the model does.

        Raises:
            ValueError: the model has no rotary embeddings, or other layers than the factors.
        """
        attentions = dict(enumerate(_attentions(model)))
        count = len(self.layers)
        require(len(attentions) == count, "model", f"{len(attentions)} layers", f"one of {count} layers")
        embedding = rotary_embedding(model)

        def see(number: int, hidden: Tensor, kwargs: Any) -> None:
            positions = kwargs.get("position_ids")
            if positions is None:
                start = self.layers[number].get_seq_length()
                positions = torch.arange(start, start + hidden.shape[1], device=hidden.device)[None]
            self.layers[number].seen = (hidden, positions)

        before, self._embedding = self._embedding, embedding
        try:
            with watched(self, attentions, see):
                yield
        finally:
            self._embedding = before
            for layer in self.layers:
                layer.seen = None

    def check_state(self, state: Mapping[str, Any]) -> dict[str, int]:
        sizes = super().check_state(state)
        names = ("tokens in full windows", "tokens after them", "positions")
        full, rest, positions = (sizes.get(name, 0) for name in names)
        windows = sizes.get("windows", full // self.window)
        got = f"{full} tokens in {windows} full windows"
        require(full == windows * self.window, "state", got, f"with windows of {self.window} tokens")
        got = f"{positions} positions"
        require(positions == full + rest, "state", got, f"with one for each of {full + rest} tokens")
        return sizes

    def angles(self, tokens: int, like: Tensor) -> tuple[Float[Tensor, "b 1 t r"], Float[Tensor, "b 1 t r"]]:
        """Cosines and sines for the first tokens, the same for all layers."""
        positions = self.layers[0].positions
        if self._angles is None and self._embedding is not None and positions is not None:
            cos, sin = self._embedding(like, positions[:, :tokens, 0].long())
            self._angles = cos[:, None], sin[:, None]
        if self._angles is None:
            raise ValueError(
                "keys are rotated by the model's embeddings: use it within `with cache.attached_to(model)`"
            )
        return self._angles

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx == 0:
            self._angles = None
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == len(self.layers) - 1:
            self._angles = None
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, none of which may lie in a full window."""
        pending = self.layers[0].key_pending
        check_crop(tokens_to_remove, 0 if pending is None else pending.shape[1])
        super().crop(tokens_to_remove)


@contextmanager
def enable_cskv(
    model: nn.Module,
    k_density: float = 0.25,
    v_density: float = 0.75,
    window: int = 32,
    calibration: Iterable[Int[Tensor, "_ _"]] = (),
) -> Iterator[CSKVCache]:
    """A cache for the model with factors that are not trained, ready within the context, after which nothing is left.

    Args:
        model, k_density, v_density, calibration: as in `factorize_cskv`.
        window: as in `CSKVCache`.

    Raises:
        ValueError: an argument lies outside its range, or the model does not fit.
    """
    _check_window(window)
    cache = CSKVCache(factorize_cskv(model, k_density, v_density, calibration), window)
    with cache.attached_to(model):
        yield cache


@method(
    paper="cskv",
    slot="cache",
    search={"lr": LogUniform(1e-4, 1e-2)},
    bind=lambda setting: {"model": setting.model, "calibration": setting.calibration},
)
def cskv_cache(
    model: nn.Module,
    calibration: Sequence[Int[Tensor, "_ _"]],
    *,
    k_density: float = 0.25,
    v_density: float = 0.75,
    window: int = 32,
    k_bits: int | None = None,
    v_bits: int | None = None,
    lr: float = 1e-3,
    steps: int = 100,
) -> CSKVCache:
    """A cache with factors that start from an activation-aware decomposition and are trained, on the same data.

    Args:
        model, calibration, k_density, v_density: as in `factorize_cskv`.
        window, k_bits, v_bits: as in `CSKVCache`.
        lr: of the training, for models of 100 million weights; the authors' for 7B models is 5e-5.
        steps: of the training; 0 for none.

    Raises:
        ValueError: an argument lies outside its range, or the model does not fit.
    """
    _check_window(window, k_bits, v_bits)
    require(whole(steps, 0), "steps", steps, "a whole number of at least 0")
    factors = factorize_cskv(model, k_density, v_density, calibration)
    if steps:
        train_cskv(factors, model, calibration, lr=lr, steps=steps, k_bits=k_bits, v_bits=v_bits, window=window)
    return CSKVCache(factors, window, k_bits, v_bits)
