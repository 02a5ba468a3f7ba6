"""Mixup: a batch mixed with a permutation of itself (Zhang et al., ICLR 2018, arXiv:1710.09412).

    x ← λ x + (1 - λ) x[π],    y ← λ onehot(y) + (1 - λ) onehot(y[π]),    λ ~ Beta(α, α)

with one λ and one permutation π for the whole batch. This is the mixing that the methods for mixed samples start from.
"""

import math

import torch
from jaxtyping import Float, Int
from scipy.special import betaincinv
from torch import Tensor

from fairtrial.methods.arguments import require


class Mixup:
    """Batch transform from (x, integer classes) to (mixed x, soft labels), which torch's cross entropy takes.

    Args:
        num_classes: number of classes.
        alpha: α > 0 of the Beta distribution: near 0 hardly anything is mixed, at 1 every λ is equally likely, large
            values mix half and half.

    λ is found by inverting the Beta distribution at one uniform number, so transforms that differ only in `alpha` draw
    the same permutations. With a generator on a device other than the CPU, a call waits for that device.
    """

    def __init__(self, num_classes: int, alpha: float = 1.0) -> None:
        require(num_classes >= 2, "num_classes", num_classes, "at least 2")
        require(0 < alpha < math.inf, "alpha", alpha, "above 0 and finite")
        self.num_classes, self.alpha = num_classes, alpha

    def __call__(
        self, x: Float[Tensor, "n *shape"], y: Int[Tensor, " n"], generator: torch.Generator
    ) -> tuple[Float[Tensor, "n *shape"], Float[Tensor, "n c"]]:
        """Mixed x of shape (n, ...) and soft labels (n, classes) of its dtype; x and y themselves stay.

        Raises:
            ValueError: x is empty or not floating-point, or y does not hold one class index for each row of x.
        """
        require(x.is_floating_point(), "x", x.dtype, "a floating-point tensor")
        require(x.ndim >= 1 and x.shape[0] > 0, "x", tuple(x.shape), "of shape (n, ...) with at least one sample")
        require(not y.is_floating_point() and not y.is_complex(), "y", y.dtype, "integer class indices")
        require(y.shape == x.shape[:1], "y", tuple(y.shape), f"of shape {(x.shape[0],)}, one per row")
        if y.device.type == "cpu":
            low, high = int(y.min()), int(y.max())
            require(low >= 0 and high < self.num_classes, "y", f"{low}..{high}", f"within 0..{self.num_classes - 1}")
        n, y = x.shape[0], y.long()[:, None]
        u = torch.rand((), dtype=torch.float64, generator=generator, device=generator.device)
        lam = float(betaincinv(self.alpha, self.alpha, u.item()))
        order = torch.randperm(n, generator=generator, device=generator.device).to(x.device)
        labels = x.new_zeros(n, self.num_classes)
        labels.scatter_(1, y, lam).scatter_add_(1, y[order], x.new_full((n, 1), 1.0 - lam))
        return torch.lerp(x[order], x, lam), labels

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_classes={self.num_classes}, alpha={self.alpha})"
