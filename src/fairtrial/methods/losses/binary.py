"""What the losses of binary classification share: one set of input checks."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from fairtrial.methods.arguments import require


def check_logits(input: Float[Tensor, "..."], target: Shaped[Tensor, "..."]) -> None:
    """Refuse anything but logits of shape (n,), n ≥ 1, with a target in {0, 1} for each; of any dtype.

    The values of `target` are looked at on the CPU only: elsewhere that would wait for the device, and under
    `torch.compile` it would break the graph.
    """
    require(input.ndim == 1, "input", tuple(input.shape), "logits of shape (n,)")
    require(input.shape[0] > 0, "input", tuple(input.shape), "logits of at least one sample")
    require(input.is_floating_point(), "input", input.dtype, "a floating-point tensor")
    require(target.shape == input.shape, "target", tuple(target.shape), f"of shape {tuple(input.shape)}, as input")
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = target[(target != 0) & (target != 1)]
        require(len(wrong) == 0, "target", wrong[:1].tolist(), "0 or 1 everywhere")
