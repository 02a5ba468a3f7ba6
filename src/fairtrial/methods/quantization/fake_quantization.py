"""What trainings with rounded weights and activations share: gradients past the rounding, and layers to replace."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.methods.arguments import require
from fairtrial.methods.quantization.quantize import put_in_places, skipped


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(value: Tensor, path: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def straight_through(value: Float[Tensor, "*s"], path: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """`value` bit for bit, whose gradient goes to `path`; `path + (value - path).detach()` would round it anew."""
    result: Tensor = _StraightThrough.apply(value, path)
    return result


def round_through(x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """x rounded to whole numbers, with the gradient of x."""
    return straight_through(x.detach().round(), x)


def round_by_largest(x: Float[Tensor, "*b i"], bits: int) -> Float[Tensor, "*b i"]:
    """Rows rounded to 2^bits even levels from -m to m, their largest magnitude, with the gradient of x."""
    wide = at_least_float32(x.detach())
    step = 2 * (wide.abs().amax(-1, keepdim=True) + 1e-8) / (2**bits - 1)
    places = (wide / step + 0.5).round().clamp(1 - 2 ** (bits - 1), 2 ** (bits - 1))
    return straight_through(((places - 0.5) * step).to(x.dtype), x)


def at_least_float32(x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """What scales are computed in: in float16 squares overflow, and what keeps a scale above 0 is 0."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class StraightThroughLinear(nn.Linear):
    """A linear layer whose weights and inputs are rounded row by row: the plainest training with few bits.

    Args:
        layer: whose Parameters it takes.
        weight_bits, act_bits: from 1 to 8.

    Raises:
        ValueError: bits are out of range.
    """

    def __init__(self, layer: nn.Linear, weight_bits: int, act_bits: int) -> None:
        for name, bits in (("weight_bits", weight_bits), ("act_bits", act_bits)):
            require(type(bits) is int and 1 <= bits <= 8, name, bits, "a whole number from 1 to 8")
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.weight_bits, self.act_bits = weight_bits, act_bits

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        return F.linear(round_by_largest(x, self.act_bits), round_by_largest(self.weight, self.weight_bits), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight_bits={self.weight_bits}, act_bits={self.act_bits}"


def straight_through_linear(
    model: nn.Module, weight_bits: int = 4, act_bits: int = 4, *, skip: Sequence[str] = ("lm_head",)
) -> nn.Module:
    """Replace the linear layers of a model by `StraightThroughLinear`s with the same Parameters.

    Args:
        model: changed in place.
        weight_bits, act_bits: from 1 to 8.
        skip: names of layers that stay as they are, whole or their last part.

    Returns:
        The model, or the new layer if the model is itself a linear one.

    Raises:
        ValueError: there is nothing to replace, or an argument lies outside its range.
    """
    return replace_linear_layers(model, lambda layer: StraightThroughLinear(layer, weight_bits, act_bits), skip=skip)


def replace_linear_layers(
    model: nn.Module, make: Callable[[nn.Linear], nn.Module], *, skip: Sequence[str] = ()
) -> nn.Module:
    """Put what `make` returns in the place of every `nn.Linear` that is no subclass; returns the model.

    Args:
        model: changed in place.
        make: of the layer that takes the place of one.
        skip: names of layers that are left alone, whole or their last part.

    Raises:
        ValueError: there is nothing to replace.
    """
    named = list(model.named_modules(remove_duplicate=False))
    places = [(n, m) for n, m in named if type(m) is nn.Linear and not skipped(n, skip)]
    if not places:
        but = f" but {', '.join(skip)}" if skip else ""
        raise ValueError(f"model must have an nn.Linear to replace, got {type(model).__name__} without any{but}")
    return replace_layers(model, places, make)


def replace_layers(
    model: nn.Module, places: Sequence[tuple[str, nn.Module]], make: Callable[[Any], nn.Module]
) -> nn.Module:
    """Put what `make` returns in the place of layers; returns the model.

    A layer in several places of the model is made once.

    Args:
        model: changed in place.
        places: names in the model, with the layers there.
        make: of the layer that takes the place of one.
    """
    made = {layer: make(layer) for layer in dict.fromkeys(layer for _, layer in places)}
    return put_in_places(model, {name: made[layer] for name, layer in places})


def output_layer(model: nn.Module) -> tuple[str, ...]:
    """The name of the last linear layer, which is the output's in most models; nothing if it is the only one."""
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    return tuple(names[-1:]) if len(names) > 1 else ()
