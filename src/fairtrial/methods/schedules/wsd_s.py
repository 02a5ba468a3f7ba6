"""WSD-S: warm-up, stable and decay phases, with a restart at the full rate (Wen et al. 2024, arXiv:2410.05192).

A run has period ends `0 < e_1 < … < e_K`. Period k is spent at the base rate η but for its last `n_k` steps, in which
the rate falls to `η_min = r η` so that the inverse rate grows linearly, as is optimal on quadratics:

    1/η_t = (1 - τ)/η + τ/η_min,    τ = j/n_k in its j-th decayed step, j = 1..n_k,
    n_k = max(1, floor(p (e_k - e_{k-1})))

Every period end is a finished checkpoint, and training goes on from it, weights and optimizer state alike, at η again
(WSD-S). Plain WSD goes on from the state before the decay instead and pays for every decay twice; that is one `WSDLR`
for each budget, branched off at its `decay_starts[0]`. `CyclicCosineLR` is the baseline that the paper compares with.

The picture behind it: the loss is a river valley. A high rate makes way along the river and bounces between the hills;
decay removes the bouncing. `river_valley_expected_loss` is the smallest model of it, a straight river between two
parabolic hills with gradient noise; it is a distilled form of the paper's theory, which treats general valleys.

The schedule that the authors' group maintains in levanter counts j from 0 (with its inverse decay taking 1 for 0), so
that its last step stands one short of η_min. Here the last step of a period runs at η_min and the next at η. The first
warm-up step has rate 0 in both.
"""

import math
import warnings
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fairtrial.methods.arguments import require
from fairtrial.methods.registry import LogUniform, Uniform, method

# rate / base rate as a function of τ in (0, 1] and the floor r; each is r at τ = 1
_DECAYS: dict[str, Callable[[float, float], float]] = {
    "inverse": lambda tau, r: r / ((1.0 - r) * tau + r),
    "linear": lambda tau, r: 1.0 - (1.0 - r) * tau,
    "cosine": lambda tau, r: r + (1.0 - r) * 0.5 * (1.0 + math.cos(math.pi * tau)),
    "sqrt": lambda tau, r: 1.0 - (1.0 - r) * math.sqrt(tau),
}


def _check_period_ends(ends: Sequence[int], name: str) -> None:
    increasing = len(ends) > 0 and all(start < end for start, end in pairwise([0, *ends]))
    whole = all(isinstance(end, int) for end in ends)
    require(increasing and whole, name, ends, "strictly increasing whole numbers above 0, at least one")


def _doubling_budgets(setting: Any) -> list[int]:
    """Period ends at a quarter, half and all of the steps: the paper's budgets (50, 100, 200 billion tokens) double."""
    return sorted({setting.total_steps // 4, setting.total_steps // 2, setting.total_steps} - {0})


@method(
    paper="wsd_s",
    slot="schedule",
    search={"decay_fraction": Uniform(0.05, 0.5), "min_lr_ratio": LogUniform(0.01, 0.5)},
    bind=lambda setting: {"checkpoints": _doubling_budgets(setting)},
)
class WSDSLR(LRScheduler):
    """WSD-S; step it once after every optimizer step.

    The rate is a closed form of `last_epoch`, the number of the coming optimizer step counted from 0. Leave the
    optimizer's moments alone at a restart.

    Args:
        optimizer: its groups' rates are the base rates.
        checkpoints: the period ends, in optimizer steps: strictly increasing, above 0.
        warmup_steps: length of the linear warm-up η t / warmup_steps of the first period; later ones have none.
        decay_fraction: p, the part of each period (not of the run) that is decayed, in (0, 1]; at least one step.
        min_lr_ratio: r, the floor as a fraction of the base rate, in (0, 1].
        decay: shape of the decay: 'inverse' (the paper's), 'linear', 'cosine' or 'sqrt'.
        last_epoch: number of the last step taken, when a run is resumed without a state dict.

    Attributes:
        period_ends: the checkpoints; save one when that many steps have been taken.
        decay_starts: the first decayed step of each period.

    The defaults are the paper's. Past the last period end the rate stays at the floor, and a step further than that
    warns once.

    Raises:
        ValueError: an argument is out of its range, or the warm-up reaches into the first decay.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        checkpoints: Sequence[int],
        warmup_steps: int = 0,
        decay_fraction: float = 0.1,
        min_lr_ratio: float = 0.1,
        decay: str = "inverse",
        last_epoch: int = -1,
    ) -> None:
        _check_period_ends(checkpoints, "checkpoints")
        require(0 < decay_fraction <= 1, "decay_fraction", decay_fraction, "in (0, 1]")
        require(0 < min_lr_ratio <= 1, "min_lr_ratio", min_lr_ratio, "in (0, 1]")
        require(decay in _DECAYS, "decay", decay, " or ".join(map(repr, _DECAYS)))
        self.period_ends = list(checkpoints)
        self.decay_starts = [
            end - max(1, int(decay_fraction * (end - start) + 1e-9)) for start, end in pairwise([0, *checkpoints])
        ]
        stable = f"within 0..{self.decay_starts[0]}, the steps before the first decay"
        require(0 <= warmup_steps <= self.decay_starts[0], "warmup_steps", warmup_steps, stable)
        self.warmup_steps, self.min_lr_ratio, self.decay = warmup_steps, min_lr_ratio, decay
        self._warned = False
        super().__init__(optimizer, last_epoch)

    def _factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if step >= self.period_ends[-1]:
            return self.min_lr_ratio
        period = bisect_right(self.period_ends, step)
        start, end = self.decay_starts[period], self.period_ends[period]
        if step < start:
            return 1.0
        return _DECAYS[self.decay]((step - start + 1) / (end - start), self.min_lr_ratio)

    def get_lr(self) -> list[float | Tensor]:
        if self.last_epoch > self.period_ends[-1] and not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self).__name__} is past its last period end, {self.period_ends[-1]} steps: "
                "the rate stays at its floor",
                stacklevel=4,  # the caller of step()
            )
        factor = self._factor(self.last_epoch)
        return [base * factor for base in self.base_lrs]


@method(
    paper="wsd_s",
    slot="schedule",
    search={"decay_fraction": Uniform(0.05, 0.5), "min_lr_ratio": LogUniform(0.01, 0.5)},
    bind=lambda setting: {"total_steps": setting.total_steps},
)
class WSDLR(WSDSLR):
    """Warm-up, stable and decay phases for one budget of `total_steps`; otherwise as `WSDSLR`.

    For a further budget go back to the state before step `decay_starts[0]` and continue with a schedule of more steps,
    `last_epoch=decay_starts[0] - 1`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_steps: int = 0,
        decay_fraction: float = 0.1,
        min_lr_ratio: float = 0.1,
        decay: str = "inverse",
        last_epoch: int = -1,
    ) -> None:
        require(isinstance(total_steps, int) and total_steps > 0, "total_steps", total_steps, "a whole number above 0")
        super().__init__(optimizer, [total_steps], warmup_steps, decay_fraction, min_lr_ratio, decay, last_epoch)


@method(
    paper="wsd_s",
    slot="schedule",
    search={"min_lr_ratio": LogUniform(0.01, 0.5)},
    bind=lambda setting: {"period_ends": _doubling_budgets(setting)},
)
class CyclicCosineLR(WSDSLR):
    """One full cosine decay to `min_lr_ratio` times the base rate in each period; otherwise as `WSDSLR`."""

    def __init__(
        self, optimizer: Optimizer, period_ends: Sequence[int], min_lr_ratio: float = 0.1, last_epoch: int = -1
    ) -> None:
        _check_period_ends(period_ends, "period_ends")
        super().__init__(optimizer, period_ends, 0, 1.0, min_lr_ratio, "cosine", last_epoch)


class RiverValleyLoss(NamedTuple):
    """Expected loss after the last step: what the hills add, what the river has gained, and their sum."""

    hill: Float[Tensor, "*batch"]
    river: Float[Tensor, "*batch"]
    total: Float[Tensor, "*batch"]


def river_valley_expected_loss(
    lrs: Float[Tensor, "*batch steps"], h: float, sigma: float, c: float, y0: float
) -> RiverValleyLoss:
    """Exact expected loss of SGD in a straight river valley, after steps at the rates `lrs`.

    The loss is `L(x, y) = -c x + h y²/2`; gradients of the hill coordinate y carry white noise of standard deviation
    `sigma`:

        x ← x + η c,    y ← (1 - η h) y - η σ ξ,    so    E y² ← (1 - η h)² E y² + η² σ²

    from x = 0, y = y0. At a constant rate the hill part settles at `η σ² / (2 (2 - η h))`; the river part is
    `-c² Σ η`. Differentiable in the rates.

    Args:
        lrs: rates of the steps, along the last dimension.
        h: curvature of the hills, above 0; the model is stable at rates below 2/h.
        sigma: standard deviation of the gradient noise, at least 0.
        c: slope of the river.
        y0: hill coordinate at the start.
    """
    require(lrs.ndim > 0 and lrs.is_floating_point(), "lrs", tuple(lrs.shape), "a tensor of rates, steps last")
    require(0 < h < math.inf, "h", h, "above 0 and finite")
    require(0 <= sigma < math.inf, "sigma", sigma, "at least 0 and finite")
    require(abs(c) < math.inf, "c", c, "finite")
    require(abs(y0) < math.inf, "y0", y0, "finite")
    shrink = (1.0 - lrs * h).square()
    # remaining[t] is what the steps from t on leave of E y², remaining[steps] = 1
    remaining = torch.cat([shrink.flip(-1).cumprod(-1).flip(-1), lrs.new_ones(*lrs.shape[:-1], 1)], -1)
    spread = remaining[..., 0] * y0**2 + sigma**2 * (lrs.square() * remaining[..., 1:]).sum(-1)
    hill, river = 0.5 * h * spread, -(c**2) * lrs.sum(-1)
    return RiverValleyLoss(hill, river, hill + river)
