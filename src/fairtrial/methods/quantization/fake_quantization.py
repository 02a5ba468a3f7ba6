"""What trainings with rounded weights and activations share: gradients past the rounding, and layers to replace."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fairtrial.methods.quantization.quantize import skipped


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


def replace_linear_layers(
    model: nn.Module, make: Callable[[nn.Linear], nn.Module], *, skip: Sequence[str] = ()
) -> nn.Module:
    """Put what `make` returns in the place of every `nn.Linear` that is no subclass; returns the model.

    A layer in several places of the model is made once.

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
    made = {layer: make(layer) for layer in dict.fromkeys(layer for _, layer in places)}
    for name, layer in places:
        if not name:
            return made[layer]
        model.set_submodule(name, made[layer])
    return model


def output_layer(model: nn.Module) -> tuple[str, ...]:
    """The name of the last linear layer, which is the output's in most models; nothing if it is the only one."""
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    return tuple(names[-1:]) if len(names) > 1 else ()
