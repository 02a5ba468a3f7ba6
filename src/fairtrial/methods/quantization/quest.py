"""QuEST: training with weights and activations of 1 to 4 bits, stable at 1 (Panferov et al. 2025, arXiv:2502.05003).

Forward, for a row x along the dimension that a product sums over, with H the block-diagonal matrix of orthonormal
Walsh-Hadamard transforms, which makes the entries look Gaussian:

    x_h = x H,    s = a √mean(x_h²) + 1e-8,    Δ = 2s / (n - 1)
    x_q = Δ round(clamp(x_h, ±s) / Δ + 1/2) - Δ/2

with n = 2^b levels from -s to s, none of them 0, and the half-range a that has the least mean squared error for a
standard normal. Backward, "trust estimator": straight through the rounding, but only where its error is at most T of
the root mean square, T = a / (n - 1) being half a step. That leaves out just the entries beyond s + Δ/2:

    ∂x = (∂y ⊙ 1[|x_q - x_h| ≤ T √mean(x_h²)]) Hᵀ

s and the mask count as constants. A linear layer quantises its weights by rows and its inputs by tokens at every call.
Rotated alike, weights and inputs have the product that they had, so neither has to be turned back: 'half', as the
authors train.

The authors' matrix is rounded to bfloat16, by 9e-5 of its entries; here it is exact. Their mask compares with T times
the root mean square, here with T s / a, which differs by what keeps s above 0: rows of zeros keep their gradient. The
mask of their variant that is not centred has a slip where it clips; levels here are those of their straight-through
quantiser. Blocks are of 128 in their code; here any power of two.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.methods.arguments import require
from fairtrial.methods.quantization.fake_quantization import (
    at_least_float32,
    output_layer,
    replace_linear_layers,
    straight_through,
)
from fairtrial.methods.quantization.hadamard import hadamard_transform
from fairtrial.methods.registry import method

TERNARY = 1.585  # bits, for three levels
# The authors'. Those of 6 to 8 bits lie up to 0.04 below the exact ones: the error is flat there.
HALF_RANGES = {
    1: 0.7978845587140913,
    TERNARY: 1.2240089519030855,
    2: 1.4935346200015913,
    3: 2.051068354131873,
    4: 2.513930578568423,
    5: 2.9160938834961225,
    6: 3.276597282593217,
    7: 3.6010497188221655,
    8: 3.884938678807525,
}
Rotation = Literal["full", "half"]


def levels_of(bits: int | float, name: str = "bits") -> int:
    """The number of levels: 2^bits, or 3 for 1.585 bits."""
    whole = isinstance(bits, int) and 1 <= bits <= 16
    require(whole or bits == TERNARY, name, bits, f"a whole number from 1 to 16, or {TERNARY} for three levels")
    return 3 if bits == TERNARY else 2 ** int(bits)


def check_options(bits: int | float, trust: float | None, hadamard: Rotation | None, *, name: str = "bits") -> None:
    levels_of(bits, name)
    require(trust is None or trust >= 0, "trust", trust, "at least 0")
    require(hadamard in ("full", "half", None), "hadamard", hadamard, "'full', 'half' or None")


def check_block(width: int, block: int) -> None:
    fits = block >= 1 and block & (block - 1) == 0 and width % block == 0
    require(fits, "block", block, f"a power of two that divides the width {width}, such as {largest_block(width)}")


@cache
def gaussian_scale(bits: int | float) -> float:
    """The half-range a of the grid of 2^bits levels, in standard deviations; the authors' up to 8 bits.

    Args:
        bits: from 1 to 16, or 1.585 for three levels.

    Raises:
        ValueError: any other bits.
    """
    levels = levels_of(bits)
    return HALF_RANGES[bits] if bits in HALF_RANGES else best_half_range(levels)


def best_half_range(levels: int) -> float:
    """The a that minimises `gaussian_error(levels, a)`.

    Raises:
        ValueError: fewer than two levels.
    """
    from scipy.optimize import minimize_scalar

    require(levels >= 2, "levels", levels, "at least 2")
    found = minimize_scalar(lambda a: gaussian_error(levels, a), bounds=(0.1, 12.0), options={"xatol": 1e-9})
    return float(found.x)


def gaussian_error(levels: int, half_range: float) -> float:
    """E (z - Q(z))² of a standard normal z rounded to that many even levels from -half_range to half_range."""
    from scipy.stats import norm

    grid = np.linspace(-half_range, half_range, levels)
    edges = np.concatenate([[-np.inf], (grid[1:] + grid[:-1]) / 2, [np.inf]])
    share, first_moment = np.diff(norm.cdf(edges)), -np.diff(norm.pdf(edges))
    return float(1 - 2 * grid @ first_moment + grid**2 @ share)


def quest_quantize(
    x: Shaped[Tensor, "*b d"],
    bits: int | float,
    trust: float | None = None,
    *,
    hadamard: Rotation | None = "full",
    centered: bool = True,
    block: int = 128,
) -> Float[Tensor, "*b d"]:
    """Round rows to n levels each, with the gradient of the trust estimator.

    Args:
        x: rows along the last dimension.
        bits: of a level's number, from 1 to 16; 1.585 for three levels.
        trust: T, in root mean squares of the row; by default half a step. Infinity is the plain straight-through
            estimator.
        hadamard: 'full' rotates, rounds and rotates back; 'half' leaves the result rotated; None does not rotate.
        centered: levels on both sides of 0 alike. Else one of them is 0, and the lowest is -s (n - 2) / n.
        block: size of the rotation's blocks, a power of two that divides the last dimension.

    Raises:
        ValueError: an argument lies outside its range, or x is not of floating point.
    """
    require(x.is_floating_point(), "x", x.dtype, "of floating point")
    check_options(bits, trust, hadamard)
    n, a = levels_of(bits), gaussian_scale(bits)
    require(centered or n % 2 == 0, "centered", centered, "True for an odd number of levels")
    rotated = x if hadamard is None else rotate(x, block)
    with torch.no_grad():
        wide = at_least_float32(rotated)
        scale = a * wide.square().mean(-1, keepdim=True).sqrt() + 1e-8
        if centered:
            step = 2 * scale / (n - 1)
            shift = 0.0 if n % 2 else 0.5
            rounded = (torch.clamp(wide, -scale, scale) / step + shift).round_().sub_(shift).mul_(step)
        else:
            step = 2 * scale / n
            rounded = (torch.clamp(wide, -scale * (n - 2) / n, scale) / step).round_().mul_(step)
        trusted = (rounded - wide).abs_() <= scale * (1 / (n - 1) if trust is None else trust / a)
        value = (rotate(rounded, block) if hadamard == "full" else rounded).to(rotated.dtype)
    path = rotated * trusted
    return straight_through(value, rotate(path, block) if hadamard == "full" else path)


def rotate(x: Float[Tensor, "*b d"], block: int = 128) -> Float[Tensor, "*b d"]:
    """x H, with Walsh-Hadamard transforms of neighbouring entries; its own inverse."""
    check_block(d := x.shape[-1], block)
    return hadamard_transform(x.unflatten(-1, (d // block, block))).flatten(-2)


def largest_block(width: int, most: int = 128) -> int:
    """The largest power of two that divides a width and is at most another one."""
    return math.gcd(width, most)


class QuESTLinear(nn.Linear):
    """A linear layer whose weights and inputs are rounded at every call, in training and in evaluation alike.

    Args:
        in_features, out_features, bias: as in `nn.Linear`; the bias is not rounded.
        weight_bits: of the weights; the authors' 4.
        act_bits: of the inputs.
        trust: see `quest_quantize`, for both.
        hadamard: 'half' as in the authors' training; 'full' computes the same at two more rotations; None rotates
            nothing.
        block: of the rotation, which has to divide the inputs.

    Raises:
        ValueError: an argument lies outside its range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        weight_bits: int | float = 4,
        act_bits: int | float = 4,
        trust: float | None = None,
        hadamard: Rotation | None = "half",
        block: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_options(weight_bits, trust, hadamard, name="weight_bits")
        check_options(act_bits, trust, hadamard, name="act_bits")
        if hadamard is not None:
            check_block(in_features, block)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.weight_bits, self.act_bits, self.trust = weight_bits, act_bits, trust
        self.hadamard, self.block = hadamard, block

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        inputs = quest_quantize(x, self.act_bits, self.trust, hadamard=self.hadamard, block=self.block)
        weight = quest_quantize(self.weight, self.weight_bits, self.trust, hadamard=self.hadamard, block=self.block)
        return F.linear(inputs, weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight_bits={self.weight_bits}, act_bits={self.act_bits}"


@method(paper="quest", slot="layer", bind=lambda setting: {"skip": output_layer(setting.model)})
def quest_linear(
    model: nn.Module,
    weight_bits: int | float = 4,
    act_bits: int | float = 4,
    *,
    trust: float | None = None,
    hadamard: Rotation | None = "half",
    block: int = 128,
    skip: Sequence[str] = ("lm_head",),
) -> nn.Module:
    """Replace the linear layers of a fresh model by `QuESTLinear`s with the same Parameters.

    Args:
        model: changed in place.
        weight_bits, act_bits, trust, hadamard: as in `QuESTLinear`.
        block: the largest block of a rotation; layers whose input it does not divide get the largest power of two that
            does.
        skip: names of layers that stay as they are, whole or their last part. The authors keep embeddings and the
            output layer.

    Returns:
        The model, or the new layer if the model is itself a linear one.

    Raises:
        ValueError: there is nothing to replace, or an argument lies outside its range.
    """
    require(block >= 1 and block & (block - 1) == 0, "block", block, "a power of two")

    def make(layer: nn.Linear) -> QuESTLinear:
        twin = QuESTLinear(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            weight_bits=weight_bits,
            act_bits=act_bits,
            trust=trust,
            hadamard=hadamard,
            block=largest_block(layer.in_features, block),
            device="meta",
        )
        twin.weight, twin.bias = layer.weight, layer.bias
        return twin.train(layer.training)

    return replace_linear_layers(model, make, skip=skip)
