"""QZO: fine-tune a quantised network by its scales alone, without gradients (Shang et al. 2025, arXiv:2505.13430).

A quantised layer has the weights W = Δ ⊙ q: integer codes q, less a zero point, and a scale Δ for each group of them.
The codes stay. All scales of the network are perturbed together and follow the slope of the loss (Q-SPSA), which is
clipped, lest one outlier throw them (directional derivative clipping):

    d = [L(Δ + εz) - L(Δ - εz)] / 2ε,    z ~ N(0, I)
    Δ ← max(Δ - lr · clip(d, -C, C) z, floor)

It is the scalar d that is clipped, so that a step moves Δ by no more than lr C |z|. Neither gradients nor optimizer
states are kept, and z is drawn anew from its seed: beyond the quantised weights there is nothing to store.

The authors' repository holds no code yet. The paper's text keeps scales at 0 or above, a public trainer derived from it
at 1e-7 or above; the latter is the default, since a scale of 0 is deaf to all of its codes.

ε is absolute: 1e-3 shakes scales of 1e-2 by a tenth. Scales must be float32: half precision would swallow ε.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import ParamsT

from fairtrial.methods.arguments import require
from fairtrial.methods.optimizers.mezo import ZerothOrder


class QZO(ZerothOrder):
    """MeZO on the scales of a quantised network, with the slope clipped and the scales kept above a floor.

    `step(closure)` takes a function that gives the loss, as `MeZO`'s. Other parameters of the network, biases or norms,
    can be trained along as a group with `floor=None`; they stay as they are if not given, as the authors have it.

    Args:
        scales: parameters or parameter groups: the list of `scale_parameters(model)`.
        lr: learning rate, at least 0.
        eps: ε, above 0, the same in all groups.
        clip: C, above 0; `math.inf` never clips.
        floor: least value of a scale, or None.
        weight_decay: decoupled decay, at least 0; meant for groups of other parameters.
        seed: of the run, within [0, 2³²).

    Attributes:
        clipped_steps: in how many steps |d| was above C. Others as in `MeZO`; `last_directional_derivative` is that
            before clipping.

    The defaults are those of the derived trainer.

    Raises:
        ValueError: an argument lies outside its range, there are no scales, or a loaded state is of another optimizer.
    """

    def __init__(
        self,
        scales: ParamsT,
        lr: float | Tensor,
        eps: float = 1e-3,
        clip: float = 100.0,
        floor: float | None = 1e-7,
        weight_decay: float = 0.0,
        *,
        seed: int = 0,
    ) -> None:
        require(clip > 0, "clip", clip, "above 0")
        self.clip, self.clipped_steps = clip, 0
        super().__init__(scales, {"lr": lr, "eps": eps, "floor": floor, "weight_decay": weight_decay}, seed)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        floor = (self.defaults | param_group)["floor"]
        require(floor is None or 0 <= floor < math.inf, "floor", floor, "at least 0 and finite, or None")
        super().add_param_group(param_group)

    def _progress(self) -> dict[str, Any]:
        return super()._progress() | {"clip": self.clip, "clipped_steps": self.clipped_steps}

    @property
    def clipped_fraction(self) -> float:
        """Share of the steps in which d was clipped, among those not skipped; 0 before the first."""
        taken = self.steps - self.skipped_steps
        return self.clipped_steps / taken if taken else 0.0

    def _followed(self, slope: float) -> float:
        self.clipped_steps += abs(slope) > self.clip
        return max(-self.clip, min(self.clip, slope))

    def _descend(self, p: Tensor, z: Tensor, slope: float, group: dict[str, Any]) -> None:
        super()._descend(p, z, slope, group)
        if group["floor"] is not None:
            p.clamp_(min=group["floor"])


class QuantizedLinear(nn.Module):
    """A linear layer with integer codes and a floating-point scale for each group of them: W = scales ⊙ (codes - zero).

    Made by `QuantizedLinear.of(linear, …)`. Weights are rounded to the nearest code.

    Attributes:
        codes: (out, in), int8.
        scales: (out, groups), float32, for `group_size` inputs each, fewer in the last group where that does not
            divide. They require no gradient unless asked to, and then get one.
        zero_points: (out, groups), int8, or None for symmetric codes.
        bias: (out,) or None, as it was in the layer.
    """

    codes: Int8[Tensor, "out in_features"]
    zero_points: Int8[Tensor, "out groups"] | None

    def __init__(
        self,
        codes: Int8[Tensor, "out in_features"],
        scales: Float[Tensor, "out groups"],
        zero_points: Int8[Tensor, "out groups"] | None,
        bias: Float[Tensor, " out"] | None,
        group_size: int,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.group_size = group_size
        self.register_buffer("codes", codes)
        self.register_buffer("zero_points", zero_points)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bias = bias

    @classmethod
    @torch.no_grad()
    def of(cls, linear: nn.Linear, bits: int = 4, group_size: int = 128, symmetric: bool = True) -> "QuantizedLinear":
        """Round the weights of a layer, whose bias is shared; arguments and errors as in `quantize_linear_`."""
        check_quantization(bits, group_size)
        out, wide = linear.weight.shape
        size = min(group_size, wide)
        padded = F.pad(linear.weight.float(), (0, -wide % size)).view(out, -1, size)  # zeros widen no range
        highest = 2 ** (bits - 1) - 1
        if symmetric:
            zero = None
            scales = padded.abs().amax(2) / highest
        else:
            low, high = padded.amin(2).clamp(max=0.0), padded.amax(2).clamp(min=0.0)
            scales = (high - low) / (2**bits - 1)
        scales = torch.where(scales > 0, scales, 1.0)  # all weights 0, and so all codes
        codes = padded / scales[..., None]
        if not symmetric:
            zero = (-highest - 1 - low / scales).round().to(torch.int8)
            codes = codes + zero[..., None]
        codes = codes.round().clamp(-highest - 1, highest).to(torch.int8).view(out, -1)[:, :wide]
        return cls(codes.contiguous(), scales, zero, linear.bias, size)

    @property
    def weight(self) -> Float[Tensor, "out in_features"]:
        """The weights that the codes stand for, (out, in), float32."""
        codes = self.codes.to(self.scales.dtype)
        if self.zero_points is not None:
            codes = codes - self._spread(self.zero_points)
        return self._spread(self.scales) * codes

    def _spread(self, of_groups: Tensor) -> Tensor:
        return of_groups.repeat_interleave(self.group_size, 1)[:, : self.in_features]

    def forward(self, input: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out"]:
        return F.linear(input, self.weight.to(input.dtype), self.bias)

    def extra_repr(self) -> str:
        groups = self.scales.shape[1]
        return f"in_features={self.in_features}, out_features={self.out_features}, groups={groups}"


def check_quantization(bits: int, group_size: int) -> None:
    require(bits in range(2, 9), "bits", bits, "a whole number within 2..8")
    require(isinstance(group_size, int) and group_size >= 1, "group_size", group_size, "a whole number of at least 1")


def quantize_linear_(model: nn.Module, bits: int = 4, group_size: int = 128, symmetric: bool = True) -> nn.Module:
    """Replace every `nn.Linear` of a model by a `QuantizedLinear`, rounding to the nearest code.

    Args:
        model: changed in place; subclasses of `nn.Linear` are left alone, for what they compute is not known.
        bits: of a code, 2 to 8; it is kept in eight whatever its number.
        group_size: weights of a row that share a scale.
        symmetric: scales from the largest weight of a group, which gets the code 2^(bits-1) - 1; otherwise from the
            smallest and the largest, with a zero point between them.

    Returns:
        The model, or the new layer if the model is itself an `nn.Linear`.

    Raises:
        ValueError: an argument lies outside its range, or there is no such layer.
    """
    check_quantization(bits, group_size)
    if type(model) is nn.Linear:
        return QuantizedLinear.of(model, bits, group_size, symmetric)
    named = [(name, layer) for name, layer in model.named_modules(remove_duplicate=False) if type(layer) is nn.Linear]
    require(bool(named), "model", type(model).__name__, "a model with an nn.Linear")
    quantized = {layer: QuantizedLinear.of(layer, bits, group_size, symmetric) for _, layer in named}
    for name, layer in named:
        model.set_submodule(name, quantized[layer])
    return model


def scale_parameters(model: nn.Module) -> Iterator[Tensor]:
    """The scales of a quantised model, in the order of its modules: what `QZO` trains.

    Those of `QuantizedLinear`, and of any other module that keeps a floating-point tensor `scales`, as GPTQ's layers
    do. Of models quantised otherwise hand the scales to `QZO` yourself, always in the same order: directions depend on
    it.
    """
    for module in model.modules():
        scales = getattr(module, "scales", None)
        if isinstance(scales, Tensor) and scales.is_floating_point():
            yield scales
