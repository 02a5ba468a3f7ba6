"""GPTQ: round a weight column by column, and let the columns still to come make up for each error (arXiv:2210.17323).

With H = E[x xᵀ] of the layer's inputs and U upper triangular, UᵀU = (H + λI)⁻¹, column i is rounded to ŵ_i and

    w_j ← w_j - (w_i - ŵ_i) / U_ii · U_ij    for all j > i.

`gptq_round` is that step alone, for any grid of one scale and offset per group; `GPTQ` is the quantiser, on the grid
from the least to the largest weight of each group as it was before any error came in, so that columns may be taken in
any order.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fairtrial.methods.arguments import require
from fairtrial.methods.quantization.packing import PackedLinear, group_size
from fairtrial.methods.quantization.quantize import Found, Want, check_groups, check_rounding, fit_range

BLOCK = 128  # so many columns are finished before the rest of the matrix hears of their errors
FACTORS = 5  # damping is multiplied by ten at most so often, less one
TINY = 1e-15  # the smallest size of a divisor


class Feedback(NamedTuple):
    """How errors are passed on.

    Attributes:
        order: in which columns are rounded.
        factor: U, for the columns in that order.
    """

    order: Int[Tensor, " i"]
    factor: Float[Tensor, "i i"]


def error_feedback(hessian: Float[Tensor, "i i"], *, percdamp: float = 0.01, act_order: bool = True) -> Feedback:
    """Order of the columns, and the factor that passes errors on, in float64.

    Args:
        hessian: mean of x xᵀ over the inputs.
        percdamp: λ over the mean of the diagonal, more than 0; where that does not make the matrix positive definite
            in floating point, ten times as much, up to 10,000 times.
        act_order: begin with the inputs of largest mean square.

    Raises:
        ValueError: `percdamp` is out of range, or no such damping suffices.
    """
    require(0 < percdamp < float("inf"), "percdamp", percdamp, "positive")
    h = hessian.double()
    diagonal = h.diagonal()
    order = (
        torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(h), device=h.device)
    )
    mean = diagonal.mean()
    unit = torch.eye(len(h), dtype=h.dtype, device=h.device)
    if mean == 0:  # inputs that are all 0 do not tell columns apart
        return Feedback(order, unit)
    h = h[order][:, order]
    for power in range(FACTORS):
        lower, failed = torch.linalg.cholesky_ex(h + percdamp * 10**power * mean * unit)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and factor.isfinite().all():
                return Feedback(order, factor)
    raise ValueError(
        f"hessian must be positive semidefinite and finite; no percdamp from {percdamp} on makes it definite"
    )


def round_half_up(x: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """The nearest whole number, and of two equally near ones the larger."""
    return torch.floor(x + 0.5)


def divisor(scale: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """The scale, but for what is too small to divide by."""
    return torch.where(scale.abs() < TINY, torch.full_like(scale, TINY).copysign(scale), scale)


def gptq_round(
    weight: Float[Tensor, "o i"],
    scale: Float[Tensor, "o g"],
    offset: Float[Tensor, "o g"],
    feedback: Feedback,
    lowest: int,
    highest: int,
) -> Float[Tensor, "o i"]:
    """The whole numbers from `lowest` to `highest` that GPTQ chooses for levels scale · number + offset.

    Args:
        weight: to be rounded.
        scale: of each group of columns; negative ones are allowed.
        offset: the level of the number 0.
        feedback: as `error_feedback` gives it.
        lowest, highest: the range of the numbers.
    """
    order, factor = feedback.order, feedback.factor.to(weight.dtype)
    size = weight.shape[1] // scale.shape[1]
    # a row for each column of the weight, so that what a step touches lies together
    left = weight.t()[order]
    scales, offsets, groups = divisor(scale).t().contiguous(), offset.t().contiguous(), (order // size).tolist()
    numbers = torch.empty_like(left)
    for start in range(0, len(left), BLOCK):
        end = min(start + BLOCK, len(left))
        errors = torch.empty_like(left[start:end])
        for i in range(start, end):
            s, z = scales[groups[i]], offsets[groups[i]]
            numbers[i] = round_half_up((left[i] - z) / s).clamp_(lowest, highest)
            errors[i - start] = (left[i] - torch.addcmul(z, numbers[i], s)) / factor[i, i]
            left[i:end].addr_(factor[i, i:end], errors[i - start], alpha=-1)
        left[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    return numbers[torch.argsort(order)].t().contiguous()


@dataclass(frozen=True)
class GPTQ:
    """Rounding with error feedback on the grid that `RoundToNearest` has.

    Args:
        bits: of a code, from 1 to 8.
        group_size: weights along the input that share scale and offset; -1 for the whole row.
        percdamp: added to the diagonal of the Hessian, as a part of its mean; more than 0.
        act_order: begin with the inputs of largest mean square.
        scale_dtype: what scales and offsets are held in.

    Raises:
        ValueError: an argument lies outside its range; when quantising, the group size does not divide a layer.
    """

    bits: int = 4
    group_size: int = 64
    percdamp: float = 0.01
    act_order: bool = True
    scale_dtype: torch.dtype = torch.float16

    wants: ClassVar[frozenset[Want]] = frozenset({"hessian"})

    def __post_init__(self) -> None:
        check_rounding(self.bits, self.group_size)
        require(0 < self.percdamp < float("inf"), "percdamp", self.percdamp, "positive")

    def check(self, name: str, layer: nn.Linear) -> None:
        check_groups(name, layer, self.group_size)

    @torch.no_grad()
    def quantize(self, name: str, layer: nn.Linear, found: Found) -> PackedLinear:
        assert found.hessian is not None
        weight = layer.weight.float()
        grouped = weight.view(len(weight), -1, group_size(layer.in_features, self.group_size))
        grid = fit_range(grouped, self.bits).held_in(self.scale_dtype)
        feedback = error_feedback(found.hessian, percdamp=self.percdamp, act_order=self.act_order)
        codes = gptq_round(weight, grid.scale, grid.offset, feedback, 0, 2**self.bits - 1).to(torch.uint8)
        scale, offset = grid.scale.to(self.scale_dtype), grid.offset.to(self.scale_dtype)
        return PackedLinear(codes, scale, offset, self.bits, layer.bias)
