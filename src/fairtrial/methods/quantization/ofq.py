"""OFQ: training transformers at 2 to 4 bits without oscillating weights (Liu et al. 2023, arXiv:2302.02210).

Trained with rounding, some weights jump to and fro between two levels for ever. Three remedies:

- StatsQ: the scale of a row of weights follows from the row, s = 2 mean|W|, and is not learned. With n = 2^(b-1)

      c = clamp(W / s, -1, 1),    v = n c - 1/2,    W_q = s (round(v) + 1/2) / n

  with levels s/n apart, none of them 0, and the gradient of W everywhere, where W is clipped too.
- CGA, confidence-guided annealing: after the training, a short one in which a weight may move only where its v lies
  within the boundary range of a threshold j + 1/2 between two levels, asked anew at every step.
- QKR: of query and key weights not each is rounded but, for each head, their product A_h = W_qᵀ W_k. The scores are
  x̂ Â_h x̂ᵀ / √d_h with the rounded input x̂. Biases of queries and keys are dropped.

Activations are rounded with a learned step (LSQ, Esser et al. 2020), between two learned shifts.

Where the paper's method and the authors' code differ, and what is done here: their quantiser of the product leaves the
gradient of frozen entries as it is, because it hangs it on the weights and not on v; here it is 0. Their steps are
learned for every token (those of values for every channel), which ties a model to one length; here there is one for the
tensor, or one for each channel. Codes are held within the levels, which theirs leave at 1 bit. Thresholds of CGA are
those between all levels, theirs those between the levels that the weights have.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.methods.arguments import require
from fairtrial.methods.quantization.fake_quantization import (
    at_least_float32,
    output_layer,
    replace_linear_layers,
    round_through,
    straight_through,
)
from fairtrial.methods.registry import method

BOUNDARY_RANGE = 0.005  # the authors'; 0.007 is as good


# Weights -----------------------------------------------------------------------------------------------------------


class StatsQuantizer(nn.Module):
    """Weights on 2^bits levels around 0, scaled by twice the mean magnitude of their channel.

    Args:
        bits: from 2 to 16.
        channel_axis: of the output channels; the mean is over all others. Heads by channels by inputs have 1.
        binary: allow 1 bit, which has the two levels ±s/2.
        boundary_range: if given, only weights so near to a threshold get a gradient; see `ConfidenceGuidedAnnealing`.
            It may be set later.

    Raises:
        ValueError: an argument lies outside its range.
    """

    def __init__(
        self, bits: int, channel_axis: int = 0, *, binary: bool = False, boundary_range: float | None = None
    ) -> None:
        super().__init__()
        require_bits(bits, 1 if binary else 2)
        require(boundary_range is None or 0 <= boundary_range <= 0.5, "boundary_range", boundary_range, "from 0 to 0.5")
        self.bits, self.channel_axis, self.boundary_range = bits, channel_axis, boundary_range

    def scale(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """s, of the weight's dimensions with size 1 but for the channels; at least 1e-8, and in float32 at least."""
        others = [axis for axis in range(weight.ndim) if axis != self.channel_axis % weight.ndim]
        return 2 * at_least_float32(weight.detach()).abs().mean(others, keepdim=True).clamp_min(5e-9)

    def position(self, weight: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """v, whose nearest whole number is the code."""
        n = 2 ** (self.bits - 1)
        return (weight.detach() / self.scale(weight)).clamp_(-1, 1 - 1e-6).mul_(n).sub_(0.5)

    def codes(self, weight: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """Whole numbers from -2^(bits-1) to 2^(bits-1) - 1, as floating-point ones."""
        n = 2 ** (self.bits - 1)
        return self.position(weight).round_().clamp_(-n, n - 1)

    def near_threshold(self, weight: Float[Tensor, "*s"], boundary_range: float) -> Bool[Tensor, "*s"]:
        """Whether v is within the range of a threshold between two levels."""
        n = 2 ** (self.bits - 1)
        above = self.position(weight).sub_(0.5)
        return (above - above.round().clamp_(-n, n - 2)).abs_() <= boundary_range

    def forward(self, weight: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        value = self.codes(weight).add_(0.5).mul_(self.scale(weight) / 2 ** (self.bits - 1)).to(weight.dtype)
        if self.boundary_range is not None:
            weight = torch.where(self.near_threshold(weight, self.boundary_range), weight, weight.detach())
        return straight_through(value, weight)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, channel_axis={self.channel_axis}"


def require_bits(bits: int, least: int, name: str = "bits") -> None:
    require(type(bits) is int and least <= bits <= 16, name, bits, f"a whole number from {least} to 16")


# Activations -------------------------------------------------------------------------------------------------------


class LSQActivation(nn.Module):
    """Rounding to multiples of a learned step a: a round(clamp(x / a, -Q_n, Q_p)).

    Q_n = 2^(b-1) and Q_p = 2^(b-1) - 1, unsigned 0 and 2^b - 1. The gradient in x passes within the range; that in a is
    round(x/a) - x/a there and -Q_n or Q_p outside, times 1 / √(N Q_p) with the number N of entries that share a. The
    step starts at 2 mean|x| / √Q_p of the first input that is not all zeros, unsigned at 4 mean|x| / √Q_p, as in the
    authors' code. A single signed bit has the two levels ±a, and Q_n = Q_p = 1.

    Args:
        bits: from 1 to 16.
        signed: whether there are levels below 0.
        channels: how many steps are learned: one, or one for each channel.
        axis: of the channels.

    Raises:
        ValueError: an argument lies outside its range.
    """

    def __init__(self, bits: int, signed: bool = True, *, channels: int = 1, axis: int = -1) -> None:
        super().__init__()
        require_bits(bits, 1)
        require(channels >= 1, "channels", channels, "at least 1")
        self.bits, self.signed, self.axis = bits, signed, axis
        half = 1 << (bits - 1)
        self.lowest, self.highest = (-half, max(half - 1, 1)) if signed else (0, 2 * half - 1)
        self.step = nn.Parameter(torch.ones(channels))
        self.started = False

    def get_extra_state(self) -> Any:
        return self.started

    def set_extra_state(self, state: Any) -> None:
        self.started = state

    def forward(self, x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        shape = [1] * x.ndim
        if len(self.step) > 1:
            shape[self.axis] = -1
        if not self.started and x.numel() > 0:
            self._start(x)
        shared = x.numel() // len(self.step)
        step = straight_through(self.step.detach().clamp_min(1e-5), self.step)
        step = _scaled_gradient(step, 1 / math.sqrt(max(shared, 1) * self.highest)).view(shape).to(x.dtype)
        place = (x / step).clamp(self.lowest, self.highest)
        if self.bits == 1 and self.signed:
            codes = straight_through(torch.where(place.detach() < 0, -1.0, 1.0).to(x.dtype), place)
        else:
            codes = round_through(place)
        return codes * step

    @torch.no_grad()
    def _start(self, x: Tensor) -> None:
        others = [axis for axis in range(x.ndim) if len(self.step) == 1 or axis != self.axis % x.ndim]
        magnitude = x.abs().mean(others) if others else x.abs()
        self.step.copy_((2 if self.signed else 4) * magnitude / math.sqrt(self.highest))
        self.started = bool(magnitude.any())

    def extra_repr(self) -> str:
        return f"bits={self.bits}, signed={self.signed}, channels={len(self.step)}"


def _scaled_gradient(x: Tensor, factor: float) -> Tensor:
    return straight_through(x.detach(), x * factor)


class ShiftedLSQ(nn.Module):
    """LSQ between two learned shifts of every channel, which start at 0."""

    def __init__(self, bits: int, width: int, signed: bool = True, *, channels: int = 1) -> None:
        super().__init__()
        self.before, self.after = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.lsq = LSQActivation(bits, signed, channels=channels)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        result: Tensor = self.lsq(x + self.before)
        return result + self.after


# Layers ------------------------------------------------------------------------------------------------------------


class StatsQLinear(nn.Linear):
    """A linear layer with StatsQ weights and LSQ inputs.

    Args:
        in_features, out_features, bias: as in `nn.Linear`.
        weight_bits: of the weights; None leaves them as they are.
        act_bits: of the inputs; None leaves them as they are.
        signed: whether inputs may be negative; not so after ReLU, and hardly after GELU.
        binary: allow weights of 1 bit, as in `StatsQuantizer`.

    Raises:
        ValueError: bits outside their range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        weight_bits: int | None = 2,
        act_bits: int | None = 2,
        signed: bool = True,
        binary: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.weight_quantizer = _weight_quantizer(weight_bits, binary=binary)
        self.input_quantizer = _input_quantizer(act_bits, in_features, signed=signed)

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        return F.linear(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)


def _weight_quantizer(bits: int | None, *, binary: bool = False) -> nn.Module:
    return nn.Identity() if bits is None else StatsQuantizer(bits, binary=binary)


def _input_quantizer(bits: int | None, width: int, *, signed: bool = True, channels: int = 1) -> nn.Module:
    return nn.Identity() if bits is None else ShiftedLSQ(bits, width, signed, channels=channels)


class QKReparamAttention(nn.Module):
    """Self-attention over all tokens whose scores come from one rounded matrix for each head (QKR).

    Args:
        dim: width of a token.
        heads: how many; they divide the width.
        weight_bits: of the products of query and key weights, of values and of the output; None leaves them.
        act_bits: of inputs, of Â_h x̂ᵀ, of values and of attention weights; None leaves them.
        bias: whether values and output have biases; queries and keys have none.

    Raises:
        ValueError: the heads do not divide the width, or bits outside their range.
    """

    def __init__(
        self, dim: int, heads: int, weight_bits: int | None = 2, act_bits: int | None = 2, *, bias: bool = True
    ) -> None:
        super().__init__()
        require(heads >= 1 and dim % heads == 0, "heads", heads, f"a divisor of dim {dim}")
        self.heads = heads
        self.query, self.key = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias)
        self.out = StatsQLinear(dim, dim, bias, weight_bits=weight_bits, act_bits=act_bits)
        self.product_quantizer, self.value_quantizer = _weight_quantizer(weight_bits), _weight_quantizer(weight_bits)
        self.inputs = _input_quantizer(act_bits, dim)
        self.keys = _input_quantizer(act_bits, heads * dim)
        self.values = _input_quantizer(act_bits, dim, channels=dim)
        self.shares = nn.Identity() if act_bits is None else LSQActivation(act_bits, signed=False)

    @classmethod
    def from_attention(
        cls, attention: nn.MultiheadAttention, weight_bits: int | None = 2, act_bits: int | None = 2
    ) -> "QKReparamAttention":
        """One with the weights of a trained attention, whose biases of queries and keys are dropped.

        Raises:
            ValueError: keys or values are of another width than queries, or the attention adds further ones, has
                dropout or wants the batch in its second dimension.
        """
        weight = attention.in_proj_weight
        plain = weight is not None and attention.bias_k is None and not attention.add_zero_attn
        require(plain, "attention", attention, "of queries, keys and values of one width, and no added ones")
        require(attention.batch_first, "attention", "batch_first=False", "one with batch_first=True, as this is")
        require(attention.dropout == 0, "attention", f"dropout={attention.dropout}", "without dropout: set it to 0")
        has_bias = attention.in_proj_bias is not None
        made = cls(attention.embed_dim, attention.num_heads, weight_bits, act_bits, bias=has_bias)
        made.to(weight.device, weight.dtype).train(attention.training)
        with torch.no_grad():
            for layer, part in zip((made.query, made.key, made.value), weight.chunk(3), strict=True):
                layer.weight.copy_(part)
            made.out.weight.copy_(attention.out_proj.weight)
            if has_bias:
                made.value.bias.copy_(attention.in_proj_bias.chunk(3)[2])
                made.out.bias.copy_(attention.out_proj.bias)
        return made

    def product(self) -> Float[Tensor, "h d d"]:
        """A_h = W_qᵀ W_k of every head, not rounded."""
        query, key = (layer.weight.unflatten(0, (self.heads, -1)) for layer in (self.query, self.key))
        return torch.bmm(query.transpose(1, 2), key)

    def forward(self, x: Float[Tensor, "*b t d"]) -> Float[Tensor, "*b t d"]:
        rounded = self.inputs(x)
        product = self.product()
        product = self.product_quantizer(product.flatten(0, 1)).view_as(product)
        keys = self.keys(torch.einsum("hdc,...tc->...thd", product, rounded).flatten(-2))
        scores = torch.einsum("...sd,...thd->...hst", rounded, keys.unflatten(-1, (self.heads, -1)))
        shares = self.shares(torch.softmax(scores * (x.shape[-1] // self.heads) ** -0.5, -1))
        values = self.values(F.linear(rounded, self.value_quantizer(self.value.weight), self.value.bias))
        heads = shares @ values.unflatten(-1, (self.heads, -1)).transpose(-3, -2)
        result: Tensor = self.out(heads.transpose(-3, -2).flatten(-2))
        return result


@method(paper="ofq", slot="layer", bind=lambda setting: {"skip": output_layer(setting.model)})
def statsq_linear(
    model: nn.Module,
    weight_bits: int = 2,
    act_bits: int = 2,
    *,
    unsigned: Sequence[str] = (),
    binary: bool = False,
    skip: Sequence[str] = ("lm_head",),
) -> nn.Module:
    """Replace the linear layers of a model by `StatsQLinear`s with the same Parameters.

    Attention that is to have QKR takes `QKReparamAttention.from_attention` first, whose weights are left alone here.

    Args:
        model: changed in place; best one that has been trained without rounding, as the authors start.
        weight_bits, act_bits: of all of them.
        unsigned: names of layers whose inputs are not negative, whole or their last part.
        binary: allow weights of 1 bit, as in `StatsQuantizer`.
        skip: names of layers that stay as they are, likewise.

    Returns:
        The model, or the new layer if the model is itself a linear one.

    Raises:
        ValueError: there is nothing to replace, or bits outside their range.
    """
    require_bits(weight_bits, 1 if binary else 2, "weight_bits")
    require_bits(act_bits, 1, "act_bits")
    names = {module: name for name, module in model.named_modules()}
    rounded = [name for module, name in names.items() if isinstance(module, QKReparamAttention)]
    factors = [f"{name}.{part}".lstrip(".") for name in rounded for part in ("query", "key", "value")]

    def make(layer: nn.Linear) -> StatsQLinear:
        name = names[layer]
        made = StatsQLinear(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            weight_bits=weight_bits,
            act_bits=act_bits,
            signed=not any(name == each or name.endswith(f".{each}") for each in unsigned),
            binary=binary,
        )
        made.to(layer.weight.device, layer.weight.dtype).train(layer.training)
        made.weight, made.bias = layer.weight, layer.bias
        return made

    return replace_linear_layers(model, make, skip=(*skip, *factors))


# Annealing ---------------------------------------------------------------------------------------------------------


class ConfidenceGuidedAnnealing:
    """From now on, steps of an optimizer move only those StatsQ weights that are near to a threshold (CGA).

    At every step, gradients of all others become 0 before it, and their values are put back after it, so that neither
    momentum nor weight decay moves them. The optimizer itself is changed by hooks: schedules and gradient scalers go on
    working with it.

    Args:
        optimizer: of the weights, and of whatever else is trained.
        quantised_params: weights whose rows `StatsQuantizer` rounds.
        bits: that it rounds them to.
        boundary_range: of v around a threshold, within [0, 0.5]; the authors'.
        products: quantisers of what is computed from weights, whose frozen entries have no gradient.

    Raises:
        ValueError: an argument lies outside its range; at a step, if it is given a closure.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        quantised_params: Sequence[Tensor],
        bits: int,
        boundary_range: float = BOUNDARY_RANGE,
        products: Sequence[StatsQuantizer] = (),
    ) -> None:
        require(0 <= boundary_range <= 0.5, "boundary_range", boundary_range, "from 0 to 0.5")
        self.optimizer, self.params = optimizer, list(quantised_params)
        self.quantizer, self.boundary_range = StatsQuantizer(bits), boundary_range
        trained = {p for group in optimizer.param_groups for p in group["params"]}
        known = bool(self.params) and all(p in trained for p in self.params)
        require(known, "quantised_params", f"{len(self.params)} tensors", "one or more of the optimizer's")
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []
        self._products = [(product, product.boundary_range) for product in products]
        for product in products:
            product.boundary_range = boundary_range
        self._hooks = [
            optimizer.register_step_pre_hook(self._freeze),
            optimizer.register_step_post_hook(self._restore),
        ]

    def step(self) -> None:
        """The optimizer's step."""
        self.optimizer.step()

    def remove(self) -> None:
        """Let all weights move again."""
        for hook in self._hooks:
            hook.remove()
        for product, before in self._products:
            product.boundary_range = before
        self._products = []

    @torch.no_grad()
    def _freeze(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        closure = next((value for value in (*args[1:], *kwargs.values()) if value is not None), None)
        require(closure is None, "closure", closure, "None: its gradients come too late to be frozen")
        self._kept = []
        for p in self.params:
            moves = self.quantizer.near_threshold(p, self.boundary_range)
            self._kept.append((p, moves, p.detach().clone()))
            if p.grad is not None:
                p.grad.mul_(moves)

    @torch.no_grad()
    def _restore(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for p, moves, before in self._kept:
            p.copy_(torch.where(moves, p, before))
        self._kept = []


def anneal(
    model: nn.Module, optimizer: torch.optim.Optimizer, boundary_range: float = BOUNDARY_RANGE
) -> ConfidenceGuidedAnnealing:
    """Begin CGA for all StatsQ weights of a model, those of attention with QKR included.

    A product of queries and keys has no values to put back: its frozen entries have no gradient.

    Raises:
        ValueError: the model has no StatsQ weights, they are of different bits, or the range is not within [0, 0.5].
    """
    params, products, bits = [], [], set()
    for module in model.modules():
        if isinstance(module, StatsQLinear) and isinstance(module.weight_quantizer, StatsQuantizer):
            params.append(module.weight)
            bits.add(module.weight_quantizer.bits)
        if isinstance(module, QKReparamAttention) and isinstance(module.value_quantizer, StatsQuantizer):
            params.append(module.value.weight)
            bits.add(module.value_quantizer.bits)
        if isinstance(module, QKReparamAttention) and isinstance(module.product_quantizer, StatsQuantizer):
            products.append(module.product_quantizer)
    require(len(bits) == 1, "model", sorted(bits), "of StatsQ weights of equal bits")
    return ConfidenceGuidedAnnealing(optimizer, params, bits.pop(), boundary_range, products)


class OscillationTracker:
    """How often each of some codes goes back: it changes, against the direction of its last change before.

    Attributes:
        frequency: of oscillation, a running mean over updates; None before the first.
        counts: oscillations of each so far.

    Args:
        momentum: weight of the newest update in the mean, within (0, 1].
    """

    def __init__(self, momentum: float = 0.01) -> None:
        require(0 < momentum <= 1, "momentum", momentum, "within (0, 1]")
        self.momentum = momentum
        self.frequency: Tensor | None = None
        self.counts: Tensor | None = None
        self._codes: Tensor | None = None
        self._direction: Tensor | None = None

    @torch.no_grad()
    def update(self, codes: Shaped[Tensor, "..."]) -> None:
        """Take the codes of the next step.

        Raises:
            ValueError: they are of another shape than the last ones.
        """
        now = codes.detach().to(torch.int32)
        if self._codes is None or self._direction is None or self.frequency is None or self.counts is None:
            self._direction, self.counts = torch.zeros_like(now), torch.zeros_like(now)
            self.frequency = torch.zeros(now.shape, device=now.device)
        else:
            require(now.shape == self._codes.shape, "codes", tuple(now.shape), f"of shape {tuple(self._codes.shape)}")
            change = torch.sign(now - self._codes)
            back = change * self._direction < 0
            self.frequency.lerp_(back.to(self.frequency.dtype), self.momentum)
            self.counts += back
            self._direction = torch.where(change != 0, change, self._direction)
        self._codes = now.clone()
