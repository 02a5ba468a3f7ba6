"""Training with large batches as well as with small ones (Hoffer, Hubara and Soudry 2017, arXiv:1705.08741).

Large batches generalise worse because they make fewer updates, so says the paper: the distance of the weights from
their start grows like the logarithm of the number of updates. Of a batch of B samples in place of b it asks

- a learning rate √(B/b) times as high, which keeps the covariance of the updates (`sqrt_lr`),
- gradients clipped to norm 5 (`torch.nn.utils.clip_grad_norm_`),
- *ghost batch normalisation*: each of the K = max(1, ⌊B/b⌋) parts of the batch, in order, is normalised by statistics
  of its own, (x - μ_k) / √(σ²_k + ε), and the running statistics take in one part after the other,
- *regime adaptation*: as many updates in each phase of training as with small batches, which is ⌈B/b⌉ times as many
  epochs (`adapt_regime`).

`WeightDistance` records the distance and fits the logarithm to it, and a power beside.

The authors' code sends the parts through the whole network one by one and averages their gradients, which is the same
for a network whose samples meet in batch normalisation alone. It makes its parts with `torch.chunk`, whose last may be
as small as a single sample; here their sizes differ by one at most, and none is smaller than the ghost size. Its
distance is that of the first tensor; here, as in the text, that of all weights. Gradient noise in place of a
higher rate, which the text has as an alternative, is not in the code, and not here.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fairtrial.methods.arguments import require
from fairtrial.methods.registry import Integer, method

Array = NDArray[np.float64]


def _check_ghost_size(ghost_batch_size: int) -> None:
    whole = isinstance(ghost_batch_size, int) and ghost_batch_size >= 2
    require(whole, "ghost_batch_size", ghost_batch_size, "a whole number of at least 2")


class _GhostBatchNorm(_BatchNorm):
    """What both have in common; what else is a batch normalisation's is its second base's."""

    def __init__(
        self,
        num_features: int,
        ghost_batch_size: int = 128,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        _check_ghost_size(ghost_batch_size)
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.ghost_batch_size = ghost_batch_size

    def forward(self, input: Float[Tensor, "n c ..."]) -> Float[Tensor, "n c ..."]:
        if not self.training:
            return super().forward(input)
        parts = input.tensor_split(max(1, len(input) // self.ghost_batch_size))
        return torch.cat([super(_GhostBatchNorm, self).forward(x) for x in parts])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ghost_batch_size={self.ghost_batch_size}"


class GhostBatchNorm1d(_GhostBatchNorm, nn.BatchNorm1d):
    """`nn.BatchNorm1d` that in training normalises every part of about `ghost_batch_size` samples by itself.

    Inputs are of shape (n, c) or (n, c, length). A batch of n samples has max(1, ⌊n / ghost_batch_size⌋) parts of
    consecutive samples; their sizes differ by at most one. Fewer than twice the ghost size are one part: ordinary batch
    normalisation, as is evaluation. Running statistics, also cumulative ones, go through the parts in order.

    Args:
        num_features: c.
        ghost_batch_size: samples in a part, at least 2; the authors take 128.
        eps, momentum, affine, track_running_stats: as in `nn.BatchNorm1d`.

    Raises:
        ValueError: the ghost size is below 2, or in training there is a single value for each feature.
    """


class GhostBatchNorm2d(_GhostBatchNorm, nn.BatchNorm2d):
    """`nn.BatchNorm2d`, of inputs (n, c, height, width), that does as `GhostBatchNorm1d`."""


_GHOSTS: dict[type[nn.Module], type[_GhostBatchNorm]] = {
    nn.BatchNorm1d: GhostBatchNorm1d,
    GhostBatchNorm1d: GhostBatchNorm1d,
    nn.BatchNorm2d: GhostBatchNorm2d,
    GhostBatchNorm2d: GhostBatchNorm2d,
}


@method(
    paper="ghost_batch_norm",
    slot="layer",
    search={"ghost_batch_size": Integer(4, 64, log=True)},
    # at the default of 128 a batch of the size that small tasks have would be a single part
    bind=lambda setting: {"ghost_batch_size": max(2, setting.batch_size // 4)},
)
def convert_ghost_batchnorm(model: nn.Module, ghost_batch_size: int = 128) -> nn.Module:
    """Put ghost batch normalisation in the place of every `nn.BatchNorm1d` and `nn.BatchNorm2d`.

    Weights, running statistics and modes are taken over, the tensors themselves, so that an optimizer made before
    still holds them. Other normalisations stay; a model without batch normalisation comes back as it was.

    Args:
        model: changed in place, but for one that is a batch normalisation itself.
        ghost_batch_size: samples in a part, at least 2.

    Returns:
        The model, or what takes its place.
    """
    _check_ghost_size(ghost_batch_size)
    ghost = _GHOSTS.get(type(model))
    if ghost is None:
        for name, child in model.named_children():
            setattr(model, name, convert_ghost_batchnorm(child, ghost_batch_size))
        return model
    converted = ghost.__new__(ghost)
    converted.__dict__.update(model.__dict__)
    converted.ghost_batch_size = ghost_batch_size
    return converted


def sqrt_lr(base_lr: float, batch: int, base_batch: int = 128) -> float:
    """The paper's rate for a batch: base_lr √(batch / base_batch), which keeps lr² / batch."""
    _check_batches(base_lr, batch, base_batch)
    return base_lr * math.sqrt(batch / base_batch)


def linear_lr(base_lr: float, batch: int, base_batch: int = 128) -> float:
    """The rule of later papers: base_lr · batch / base_batch."""
    _check_batches(base_lr, batch, base_batch)
    return base_lr * batch / base_batch


def adapt_regime(milestones: Sequence[int], epochs: int, batch: int, base_batch: int = 128) -> tuple[list[int], int]:
    """Milestones and number of epochs at which a large batch makes as many updates as a small one: ⌈B/b⌉ times."""
    _check_batches(0.0, batch, base_batch)
    require(epochs >= 1, "epochs", epochs, "at least 1")
    require(all(milestone >= 0 for milestone in milestones), "milestones", milestones, "at least 0")
    factor = math.ceil(batch / base_batch)
    return [factor * milestone for milestone in milestones], factor * epochs


def _check_batches(base_lr: float, batch: int, base_batch: int) -> None:
    require(0 <= base_lr < math.inf, "base_lr", base_lr, "at least 0 and finite")
    require(batch >= 1, "batch", batch, "at least 1")
    require(base_batch >= 1, "base_batch", base_batch, "at least 1")


class LogFit(NamedTuple):
    """intercept + slope · ln t, and the share of the distances' variance that it explains."""

    slope: float
    intercept: float
    r2: float


class PowerFit(NamedTuple):
    """factor · t^exponent, and the share of the distances' variance that it explains."""

    exponent: float
    factor: float
    r2: float


class WeightDistance:
    """The distance of a model's weights from where they are now, as training goes on.

    Args:
        model: its trainable parameters count, as one vector.

    Attributes:
        steps: the steps recorded.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        require(len(self._weights) > 0, "model", type(model).__name__, "one with trainable parameters")
        self._start = [p.detach().clone() for p in self._weights]
        self._recorded: list[Tensor] = []
        self.steps: list[int] = []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Record the distance after so many steps, at least 1, each number once."""
        require(step >= 1 and step not in self.steps[-1:], "step", step, "at least 1, each number once")
        apart = torch._foreach_sub(self._weights, self._start)
        norms = torch._foreach_norm(apart)
        self.steps.append(step)
        self._recorded.append(torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms])))

    @property
    def distances(self) -> Float[np.ndarray, " steps"]:
        """What was recorded; the one place that waits for the device."""
        return np.array(torch.stack(self._recorded).tolist() if self._recorded else [], dtype=np.float64)

    def fit_log(self) -> LogFit:
        """Least squares of the distances in 1 and ln t.

        Raises:
            ValueError: fewer than 3 steps have been recorded.
        """
        return fit_log(self._times(), self.distances)

    def fit_power(self) -> PowerFit:
        """Least squares of the distances in t^exponent with an exponent within [0, 2].

        Like the logarithm it has two parameters and is fitted to the distances themselves, not to their logarithms, so
        that r² of both may be compared.
        """
        return fit_power(self._times(), self.distances)

    def _times(self) -> Array:
        require(len(self.steps) >= 3, "steps", self.steps, "at least 3 recorded")
        return np.array(self.steps, dtype=np.float64)


def fit_log(steps: Array, distances: Array) -> LogFit:
    """See `WeightDistance.fit_log`."""
    slope, intercept = np.polyfit(np.log(steps), distances, 1)
    return LogFit(float(slope), float(intercept), _explained(distances, intercept + slope * np.log(steps)))


def fit_power(steps: Array, distances: Array) -> PowerFit:
    """See `WeightDistance.fit_power`."""

    def factor(exponent: float) -> float:
        powers = (steps / steps[-1]) ** exponent
        return float(powers @ distances / (powers @ powers))

    def missed(exponent: float) -> float:
        return float(np.square(distances - factor(exponent) * (steps / steps[-1]) ** exponent).sum())

    exponent = float(minimize_scalar(missed, bounds=(0.0, 2.0), method="bounded", options={"xatol": 1e-9}).x)
    fitted = factor(exponent) * (steps / steps[-1]) ** exponent
    return PowerFit(exponent, float(factor(exponent) * steps[-1] ** -exponent), _explained(distances, fitted))


def _explained(values: Array, fitted: Array) -> float:
    return float(1 - np.square(values - fitted).sum() / np.square(values - values.mean()).sum())
