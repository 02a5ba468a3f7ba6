"""What the classification losses share: one set of input checks and torch's `reduction` argument."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fairtrial.methods.arguments import require


def check_reduction(reduction: str) -> None:
    require(reduction in ("none", "mean", "sum"), "reduction", reduction, "'none', 'mean' or 'sum'")


def reduce(loss: Float[Tensor, "*n"], reduction: str) -> Float[Tensor, "..."]:
    """Apply torch's `reduction` to the losses of single samples."""
    if reduction == "mean":
        return loss.mean()
    if reduction == "sum":
        return loss.sum()
    return loss


def check_scores(
    input: Float[Tensor, "..."], target: Int[Tensor, "..."], *, min_classes: int = 2, name: str = "target"
) -> None:
    """Refuse anything but scores of shape (n, classes), n ≥ 1, with one class index for each row.

    The values of `target` are looked at on the CPU only: elsewhere that would wait for the device, and under
    `torch.compile` it would break the graph.
    """
    require(input.ndim == 2, "input", tuple(input.shape), "scores of shape (n, classes)")
    require(input.shape[0] > 0, "input", tuple(input.shape), "scores of at least one sample")
    require(input.shape[1] >= min_classes, "input", tuple(input.shape), f"scores of at least {min_classes} classes")
    require(input.is_floating_point(), "input", input.dtype, "a floating-point tensor")
    require(not target.is_floating_point() and not target.is_complex(), name, target.dtype, "integer class indices")
    require(target.shape == input.shape[:1], name, tuple(target.shape), f"of shape {(input.shape[0],)}, one per row")
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(target.min()), int(target.max())
        require(low >= 0 and high < input.shape[1], name, f"{low}..{high}", f"within 0..{input.shape[1] - 1}")


def at_least_float32(input: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Half-precision scores are computed with in float32; float32 and float64 stay as they are."""
    return input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
