"""Linear decay, and schedules refined by the gradient norms of an earlier run (Defazio et al. 2023, arXiv:2310.07831).

Weights w_1 … w_T > 0 say how much each step of a run of T steps counts. The rates

    η_t = w_t (w_{t+1} + … + w_T) / (w_1 + … + w_T),    so that η_T = 0,

carry the weighted average regret of those weights over to the last iterate. Where nothing is known of the gradients the
weights are equal, and η_t ∝ 1 - t/T: linear decay is best in the worst case. Where the norms G_t of a first run are
known, the weights that make the bound least give the *refined* schedule for a second run of as many steps:

    w_t = 1 / G_t²  with l2 norms, for SGD;    w_t = 1 / G_t  with l1 norms, for Adam,

of norms smoothed by a running median. It holds a warm-up where gradients shrink at first, and its fall at the end is
due to the tail of the weights. Norms are those of the mini-batch gradient as it is used, before any clipping. The peak
rate is tuned anew for it.

`optimize_schedule` makes another bound on the last iterate least, numerically; the authors plot it beside the closed
form, which is the method.

The authors' function divides by w_T in place of the sum of the weights, which multiplies all rates by one number. Here
it is the sum, as the bound has it; normalised to a maximum of 1 both are the same.
"""

import math
import warnings
from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import median_filter
from scipy.optimize import fmin_l_bfgs_b
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fairtrial.methods.arguments import require
from fairtrial.methods.registry import method

Array = NDArray[np.float64]

_EXPONENTS = {"sgd": -2.0, "adam": -1.0}  # of the gradient norms in the weights


def _checked(values: ArrayLike, name: str, fewest: int) -> Array:
    array = np.asarray(values, dtype=np.float64)
    require(array.ndim == 1 and array.size >= fewest, name, array.shape, f"a sequence of at least {fewest} numbers")
    bad = array[~((array > 0) & (array < math.inf))]
    require(bad.size == 0, name, bad[:1].tolist(), "above 0 and finite throughout")
    return array


def smooth_norms(grad_norms: ArrayLike, smoothing: float = 0.1) -> Float[np.ndarray, " steps"]:
    """The running median of a sequence of gradient norms.

    The window has width 2 ⌊⌊smoothing · T⌋ / 2⌋ + 1. Before its first norm the sequence goes on with that, and beyond
    its end as its mirror image, so that the final decay of a schedule is not distorted.

    Args:
        grad_norms: T norms, above 0.
        smoothing: width of the window as a fraction of T, within [0, 1].

    Raises:
        ValueError: no norm or one that is not above 0 and finite, or `smoothing` out of its range.
    """
    norms = _checked(grad_norms, "grad_norms", 1)
    require(0 <= smoothing <= 1, "smoothing", smoothing, "within [0, 1]")
    width = 2 * (int(smoothing * norms.size + 1e-9) // 2) + 1
    mirrored = np.pad(norms, (0, 2 * width), mode="reflect")
    smooth: Array = median_filter(mirrored, size=width, mode="nearest")[: norms.size]
    return smooth


def refined_schedule(
    grad_norms: ArrayLike,
    kind: Literal["sgd", "adam"] | None = "sgd",
    weights: ArrayLike | None = None,
    smoothing: float = 0.1,
    normalize: bool = True,
) -> Float[np.ndarray, " steps"]:
    """Rates for a run of T steps from the gradient norms of an earlier one, for `RefinedLR`.

    Args:
        grad_norms: T norms, at least 2, above 0: l2 norms for 'sgd', l1 norms for 'adam'.
        kind: the optimizer's, which decides the weights: 1/G² for 'sgd', also with momentum, 1/G for 'adam'; None if
            `weights` are given.
        weights: T weights in place of those of `kind`, above 0; they are not smoothed.
        smoothing: see `smooth_norms`; 0 takes the norms as they are.
        normalize: scale the rates so that the largest is 1. Otherwise they have the scale of the weights.

    The defaults are the authors'. The last rate is 0, so that T - 1 steps change anything. Scaling all norms leaves the
    normalised schedule as it is.

    Raises:
        ValueError: norms or weights that are too few or not above 0 and finite, not as many weights as norms, both
            `kind` and `weights` given or neither, or `smoothing` out of its range.
    """
    norms = _checked(grad_norms, "grad_norms", 2)
    require(kind in (*_EXPONENTS, None), "kind", kind, "'sgd', 'adam' or None")
    require((kind is None) == (weights is not None), "weights", weights, "given if kind is None, and only then")
    if weights is not None:
        w = _checked(weights, "weights", 2)
        require(w.size == norms.size, "weights", w.size, f"{norms.size} numbers, as many as norms")
    elif kind is not None:
        smooth = smooth_norms(norms, smoothing)
        w = (smooth / smooth.min() if normalize else smooth) ** _EXPONENTS[kind]
    tails = np.cumsum(w[::-1])[::-1]
    rates: Array = w * np.append(tails[1:], 0.0) / tails[0]
    return rates / rates.max() if normalize else rates


class RefinedLR(LRScheduler):
    """The base rate times a schedule's entry for each optimizer step; step it once after every one.

    Args:
        optimizer: its groups' rates are the base rates, the peaks of a normalised schedule.
        schedule: a factor, at least 0, for each of the T optimizer steps, as `refined_schedule` gives it.
        last_epoch: number of the last step taken, when a run is resumed without a state dict.

    After T steps the rate is 0. One more is an error: a refined schedule belongs to a run of a certain length.

    Raises:
        ValueError: an empty schedule or a factor that is negative or not finite; or, on a step, its end was passed.
    """

    def __init__(self, optimizer: Optimizer, schedule: ArrayLike, last_epoch: int = -1) -> None:
        factors = np.asarray(schedule, dtype=np.float64)
        require(factors.ndim == 1 and factors.size > 0, "schedule", factors.shape, "a sequence of at least one factor")
        bad = factors[~((factors >= 0) & (factors < math.inf))]
        require(bad.size == 0, "schedule", bad[:1].tolist(), "at least 0 and finite throughout")
        self.schedule: list[float] = factors.tolist()
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        total = len(self.schedule)
        require(self.last_epoch <= total, "schedule", f"{total} factors", "as long as the run, which is past its end")
        factor = self.schedule[self.last_epoch] if self.last_epoch < total else 0.0
        return [base * factor for base in self.base_lrs]


@method(
    paper="refined_schedule",
    slot="schedule",
    bind=lambda setting: {"total_steps": setting.total_steps},
)
class LinearDecayLR(LRScheduler):
    """Linear decay to 0, after a linear warm-up if wanted; step it once after every optimizer step.

    With the steps numbered t = 1 … T and a warm-up of W the factor of the base rate is min(t / W, (T - t) / (T - W)),
    and without warm-up 1 - t/T: the first step stands one below the peak, and the last has rate 0.

    Args:
        optimizer: its groups' rates are the base rates.
        total_steps: T, at least 1.
        warmup_steps: W, within 0..T - 1.
        last_epoch: number of the last step taken, counted from 0, when a run is resumed without a state dict.

    Past the end the rate stays 0, and a step further than that warns once.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, last_epoch: int = -1) -> None:
        require(isinstance(total_steps, int) and total_steps > 0, "total_steps", total_steps, "a whole number above 0")
        before = isinstance(warmup_steps, int) and 0 <= warmup_steps < total_steps
        require(before, "warmup_steps", warmup_steps, f"a whole number within 0..{total_steps - 1}")
        self.total_steps, self.warmup_steps = total_steps, warmup_steps
        self._warned = False
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        if self.last_epoch > self.total_steps and not self._warned:
            self._warned = True
            warnings.warn(
                f"LinearDecayLR is past its end, {self.total_steps} steps: the rate stays 0",
                stacklevel=4,  # the caller of step()
            )
        t = min(self.last_epoch + 1, self.total_steps)
        rise = t / self.warmup_steps if t < self.warmup_steps else 1.0
        factor = min(rise, (self.total_steps - t) / (self.total_steps - self.warmup_steps))
        return [base * factor for base in self.base_lrs]


class GradNormRecorder:
    """Norms of the whole gradient, one for each call of `record`: what `refined_schedule` asks of a first run.

    Args:
        params: the parameters, as an optimizer takes them.
        p: 2 for SGD, 1 for Adam.

    Raises:
        ValueError: no parameters, or another p.
    """

    def __init__(self, params: Iterable[Tensor], p: Literal[1, 2] = 2) -> None:
        require(p in (1, 2), "p", p, "1 or 2")
        self.params, self.p = list(params), p
        require(len(self.params) > 0, "params", self.params, "at least one parameter")
        self._recorded: list[Tensor] = []

    @torch.no_grad()
    def record(self) -> None:
        """Take the norm of the present gradient; call it after `backward` and before any clipping.

        Raises:
            ValueError: no parameter has a gradient.
        """
        grads = [param.grad for param in self.params if param.grad is not None]
        require(len(grads) > 0, "params", "parameters without gradient", "called for after backward()")
        norms = [
            torch.linalg.vector_norm(grad, self.p, dtype=torch.promote_types(grad.dtype, torch.float32))
            for grad in grads
        ]
        self._recorded.append(torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms]), self.p))

    @property
    def norms(self) -> Float[np.ndarray, " steps"]:
        """What was recorded so far. The one place that waits for the device."""
        return np.array(torch.stack(self._recorded).tolist() if self._recorded else [], dtype=np.float64)


def last_iterate_bound(
    rates: Float[Tensor, " steps"], grad_norms: Float[Tensor, " steps"], D: float = 1.0
) -> Float[Tensor, ""]:
    """A bound on f(x_T) - f* after steps at the rates η_1 … η_{T-1} from a start at distance D; differentiable.

    With S_k = η_k + … + η_T it is

        (D² + Σ η_t² G_t²) / (2 S_1) + ½ Σ_{k<T} η_k / (S_k S_{k+1}) Σ_{t≥k} η_t² G_t².

    x_T stands before step T: η_T weighs its gradient in the proof, and is the rate of no step.
    """
    spent = (rates * grad_norms).square().flip(0).cumsum(0).flip(0)
    left = rates.flip(0).cumsum(0).flip(0)
    return (D**2 + spent[0]) / (2 * left[0]) + (rates[:-1] * spent[:-1] / (left[:-1] * left[1:])).sum() / 2


class OptimizedSchedule(NamedTuple):
    """The rates that make `last_iterate_bound` least.

    Attributes:
        rates: of shape (T,), the last of them 0, for `RefinedLR` with a base rate of 1.
        unused: what stands for the last rate in the bound.
        bound: its least value.
    """

    rates: Array
    unused: float
    bound: float


def optimize_schedule(grad_norms: ArrayLike, D: float = 1.0) -> OptimizedSchedule:
    """Find the rates that make `last_iterate_bound` least, from a constant D/√T by L-BFGS-B.

    Args:
        grad_norms: T norms, at least 2, above 0, smoothed if they are of a stochastic run.
        D: distance of the start from the minimum, above 0.

    Raises:
        ValueError: an argument is out of its range.
        RuntimeError: the minimiser has not converged.
    """
    norms = _checked(grad_norms, "grad_norms", 2)
    require(0 < D < math.inf, "D", D, "above 0 and finite")
    T, scale = norms.size, norms.mean()
    relative = torch.from_numpy(norms / scale)  # and for D = 1: rates and bound are proportional to D / G and D G

    def bound(values: Array) -> tuple[float, Array]:
        rates = torch.tensor(values, requires_grad=True)
        value = last_iterate_bound(rates, relative)
        (gradient,) = torch.autograd.grad(value, rates)
        return value.item(), gradient.numpy()

    rates, least, report = fmin_l_bfgs_b(
        bound, np.full(T, T**-0.5), bounds=[(1e-8, None)] * T, m=20, factr=100.0, pgtol=1e-10, maxfun=100_000
    )
    if report["warnflag"]:
        raise RuntimeError(f"the schedule could not be optimised: {report['task']}")
    rates = rates * (D / scale)
    return OptimizedSchedule(np.append(rates[:-1], 0.0), float(rates[-1]), float(least * D * scale))
