"""exp(x) - 1 without overflow, for losses that grow exponentially with a wrong score."""

import torch
from jaxtyping import Float
from torch import Tensor

LINEAR_BEYOND = 40.0  # exp(40) = 2e17: times any score still finite in float32 and bfloat16


def expm1_then_linear(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """exp(x) - 1, from x = 40 on along its tangent there, so that value and gradient stay finite."""
    capped = x.clamp(max=LINEAR_BEYOND)
    return torch.expm1(capped) + torch.exp(capped) * (x - capped)
