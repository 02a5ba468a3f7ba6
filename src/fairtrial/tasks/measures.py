"""What tasks measure: functions of a model's outputs and the targets."""

import math

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def accuracy(output: Float[Tensor, "n c"], target: Int[Tensor, " n"]) -> float:
    """The part of samples whose highest score is that of their class."""
    return (output.argmax(1) == target).sum().item() / len(target)


def cross_entropy(output: Float[Tensor, "n c"], target: Int[Tensor, " n"]) -> float:
    """Mean of -log softmax(output)_target, in nats."""
    return F.cross_entropy(output, target).item()


def bits(output: Float[Tensor, "n c"], target: Int[Tensor, " n"]) -> float:
    """Mean of -log2 softmax(output)_target: the bits that an ideal code would need for a target."""
    return cross_entropy(output, target) / math.log(2)


def root_mean_squared_error(output: Float[Tensor, " n"], target: Float[Tensor, " n"]) -> float:
    """Square root of the mean of (output - target)²."""
    return math.sqrt(F.mse_loss(output, target).item())


def mean_absolute_error(output: Float[Tensor, " n"], target: Float[Tensor, " n"]) -> float:
    """Mean of |output - target|."""
    return F.l1_loss(output, target).item()
