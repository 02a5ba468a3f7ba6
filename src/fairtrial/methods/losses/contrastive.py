"""What the contrastive losses share: checks of two views of a batch, and cosine similarities in full precision."""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fairtrial.methods.arguments import require
from fairtrial.methods.losses.classification import at_least_float32


def check_temperature(temperature: float, name: str = "temperature") -> None:
    require(0 < temperature < math.inf, name, temperature, "above 0 and finite")


def check_embeddings(input: Float[Tensor, "..."], name: str, *, fewest: int = 2) -> None:
    """Refuse anything but finite embeddings of shape (n, d); values are looked at on the CPU only."""
    require(input.ndim == 2, name, tuple(input.shape), "embeddings of shape (n, d)")
    require(input.shape[0] >= fewest, name, tuple(input.shape), f"embeddings of at least {fewest} samples")
    require(input.shape[1] >= 1, name, tuple(input.shape), "embeddings of at least one dimension")
    check_finite(input, name)


def check_views(a: Float[Tensor, "..."], b: Float[Tensor, "..."], names: tuple[str, str], *, fewest: int = 2) -> None:
    """Refuse anything but two views of the same samples, row i of one with row i of the other."""
    check_embeddings(a, names[0], fewest=fewest)
    require(b.shape == a.shape, names[1], tuple(b.shape), f"of shape {tuple(a.shape)}, as {names[0]}")
    check_finite(b, names[1])


def check_finite(input: Float[Tensor, "..."], name: str) -> None:
    """Refuse integers, and on the CPU NaN and infinity: elsewhere looking would wait for the device."""
    require(input.is_floating_point(), name, input.dtype, "a floating-point tensor")
    if input.device.type == "cpu" and not torch.compiler.is_compiling():
        require(bool(input.isfinite().all()), name, "NaN or infinity", "finite")


def full_precision(input: Float[Tensor, "..."]) -> torch.autocast:
    """Switches autocast off: similarities are divided by small temperatures, for which half precision is too coarse."""
    return torch.autocast(input.device.type, enabled=False)


def unit(input: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """Rows of length 1, in float32 at least."""
    return F.normalize(at_least_float32(input), dim=-1)


def cosines(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Cosine similarities of all rows of one to all rows of the other, in float32 at least."""
    with full_precision(a):
        return unit(a) @ unit(b).T


def off_diagonal(square: Float[Tensor, "n n"]) -> Float[Tensor, "n n-1"]:
    """Each row without its entry on the diagonal."""
    n = square.shape[0]
    return square.flatten()[1:].view(n - 1, n + 1)[:, :-1].reshape(n, n - 1)


def similarities_of_views(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """For each row of `a` its cosine to the same row of `b` in column 0, then those to all the other rows of `b`."""
    square = cosines(a, b)
    return torch.cat([square.diagonal()[:, None], off_diagonal(square)], 1)


def symmetric_similarities(
    z1: Float[Tensor, "n d"], z2: Float[Tensor, "n d"], temperature: float
) -> tuple[Float[Tensor, " 2*n"], Float[Tensor, "2*n 2*n"]]:
    """Of all embeddings of both views as anchors: cosine to the positive, and cosines to all embeddings, both over τ.

    In the latter the anchor itself and its positive are -inf, so that each row has 2 (n - 1) negatives.
    """
    with full_precision(z1):
        first, second = unit(z1), unit(z2)
        rows = torch.cat([first, second])
        positive = (first * second).sum(1) / temperature
        square = (rows / temperature) @ rows.T  # the rows are divided, as they are fewer numbers
    same_sample = torch.eye(len(z1), dtype=torch.bool, device=z1.device).repeat(2, 2)
    return positive.repeat(2), square.masked_fill_(same_sample, -math.inf)
