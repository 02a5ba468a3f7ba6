"""SPSA and MeZO: descent without gradients, along random directions (Malladi et al. 2023, arXiv:2305.17333).

Two losses give the slope along a direction z ~ N(0, I), and a step follows it (Algorithm 1):

    d = [L(θ + εz) - L(θ - εz)] / 2ε,    θ ← θ - lr (d z + weight_decay · θ)

`d z` estimates the gradient: its mean is ∇L up to O(ε²), and for a quadratic loss E‖d z - ∇L‖² = (P + 1) ‖∇L‖² over P
parameters. The direction is drawn anew from its seed, tensor by tensor, whenever it is needed, so that no more memory
is in use than for a forward pass. What this shares with methods built on the same estimate are the functions here.

Directions come from a CPU generator, whatever device the parameters are on, in the order and dtype of the parameters:
equal seeds give equal directions everywhere. The authors' code draws from the global generator of the device.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from numpy.random import SeedSequence
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fairtrial.methods.arguments import require
from fairtrial.methods.optimizers.torch_contract import check_rates, check_state


def direction_seed(*numbers: int) -> int:
    """The seed of a direction, from whole numbers within [0, 2³²): of the run, the step, the sample, the machine, ….

    The numbers are hashed to the 32 bits that torch's CPU generator distinguishes.
    """
    for number in numbers:
        whole = isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**32
        require(whole, "numbers", number, "whole numbers within [0, 2**32)")
    return int(SeedSequence(numbers).generate_state(1)[0])


def directions(params: Iterable[Tensor], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Each parameter with its part of z ~ N(0, I), drawn when it is asked for."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        yield p, torch.randn(p.shape, dtype=p.dtype, generator=generator).to(p.device)


@torch.no_grad()
def perturb_(params: Iterable[Tensor], seed: int, scale: float) -> None:
    """θ ← θ + scale · z."""
    for p, z in directions(params, seed):
        p.add_(z, alpha=scale)


def losses_on_both_sides_(
    params: Sequence[Tensor], closure: Callable[[], Any], seed: int, eps: float
) -> tuple[float, float]:
    """L(θ + εz) and L(θ - εz). The parameters are left at θ - εz, or back at θ if the closure raises."""
    found, at = [], 0
    try:
        for side in (1, -1):
            perturb_(params, seed, (side - at) * eps)
            at = side
            found.append(float(closure()))
    except BaseException:
        perturb_(params, seed, -at * eps)
        raise
    return found[0], found[1]


@torch.no_grad()
def spsa_projected_grad(
    params: Iterable[Tensor],
    closure: Callable[[], Any],
    seed: int,
    eps: float = 1e-3,
    *,
    exact_restore: bool = False,
) -> float:
    """The slope of a loss along the direction of a seed, (L(θ + εz) - L(θ - εz)) / 2ε.

    Args:
        params: θ, real; perturbed in place and restored, for as long as this runs.
        closure: gives L, a number or a tensor with one element, for the parameters as they are; called without
            gradients. It must not draw anything: the two losses have to differ by the direction alone.
        seed: of the direction, `direction_seed(…)`.
        eps: ε, above 0.
        exact_restore: bring θ back from a copy. Without one no memory is needed, but θ + εz - 2εz + εz leaves a
            round-off of some ε machine epsilons.

    Raises:
        ValueError: `eps` is out of its range.
    """
    require(0 < eps < math.inf, "eps", eps, "above 0 and finite")
    params = list(params)
    kept = [p.clone() for p in params] if exact_restore else []
    try:
        above, below = losses_on_both_sides_(params, closure, seed, eps)
        if not exact_restore:
            perturb_(params, seed, eps)
    finally:
        if exact_restore:
            torch._foreach_copy_(params, kept)
    return (above - below) / (2 * eps)


class ZerothOrder(Optimizer):
    """What optimizers that follow the slope along a random direction share: all but the form of the step.

    Args:
        params: parameters or parameter groups.
        defaults: hyperparameters of the groups, with at least lr, eps and weight_decay.
        seed: of the run.

    Attributes:
        steps: taken so far, those that were skipped included.
        skipped_steps: how many changed nothing, since a loss was not finite.
        last_directional_derivative: d of the last step, NaN before the first.
    """

    def __init__(self, params: ParamsT, defaults: dict[str, Any], seed: int) -> None:
        direction_seed(seed)  # refuses what is no seed
        self.seed, self.steps, self.skipped_steps = seed, 0, 0
        self.last_directional_derivative = math.nan
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = self.defaults | param_group
        check_rates(group)
        require(group["eps"] > 0, "eps", group["eps"], "above 0")
        require(group["eps"] == self.defaults["eps"], "eps", group["eps"], f"{self.defaults['eps']} as in all groups")
        super().add_param_group(param_group)
        unfit = [p.dtype for p in self.param_groups[-1]["params"] if not p.is_floating_point()]
        if unfit:
            self.param_groups.pop()
            require(False, "params", unfit, "real floating-point tensors")

    def _progress(self) -> dict[str, Any]:
        """What a run goes on from, beside the groups."""
        names = ("seed", "steps", "skipped_steps", "last_directional_derivative")
        return {name: getattr(self, name) for name in names}

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | self._progress()

    def __setstate__(self, state: dict[str, Any]) -> None:
        check_state(self, state, lambda group, p, saved: {})
        super().__setstate__(state)

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict, and the seed and the counts of steps."""
        return super().state_dict() | self._progress()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state dict, with the directions that would have come next."""
        names = self._progress().keys()
        missing = sorted(names - state_dict.keys())
        require(not missing, "state_dict", f"one without {missing}", f"of {type(self).__name__}")
        super().load_state_dict({name: value for name, value in state_dict.items() if name not in names})
        for name in names:
            setattr(self, name, state_dict[name])

    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step, and return the mean of the two losses; where that is not finite, nothing has changed.

        Args:
            closure: gives the loss, without `backward`; called twice, without gradients. Nothing in it may be drawn at
                random: put the model into evaluation mode.
        """
        if closure is None:
            raise ValueError("closure must be a function that gives the loss, got None")
        groups = [group for group in self.param_groups for _ in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        eps, seed = self.param_groups[0]["eps"], direction_seed(self.seed, self.steps)
        above, below = losses_on_both_sides_(params, closure, seed, eps)
        slope = (above - below) / (2 * eps)
        finite = math.isfinite(slope)
        self.steps += 1
        self.skipped_steps += not finite
        self.last_directional_derivative = slope
        followed = self._followed(slope) if finite else 0.0
        for group, (p, z) in zip(groups, directions(params, seed), strict=True):
            p.add_(z, alpha=eps)  # back to θ
            if finite:
                self._descend(p, z, followed, group)
        return (above + below) / 2

    def _followed(self, slope: float) -> float:
        """The slope that the step follows."""
        return slope

    def _descend(self, p: Tensor, z: Tensor, slope: float, group: dict[str, Any]) -> None:
        """p ← (1 - lr · weight_decay) p - lr · slope · z."""
        lr = float(group["lr"])
        if group["weight_decay"]:
            p.mul_(1 - lr * group["weight_decay"])
        p.add_(z, alpha=-lr * slope)


class MeZO(ZerothOrder):
    """Steps along random directions by the slope of the loss, without gradients and without state.

    `step(closure)` takes a function that gives the loss and calls no `backward`. The directions of all steps follow
    from `seed` and the number of the step. `p.grad` is neither read nor written, so that parameters need not require
    gradients. Learning-rate schedulers work as with any optimizer.

    Args:
        params: parameters or parameter groups, real and dense.
        lr: learning rate, at least 0. The variance of the estimate grows with the number of parameters, and useful
            rates shrink with it: about 1e-7 to 1e-5 for language models.
        eps: ε, above 0, the same in all groups; 1e-3 is the authors'.
        weight_decay: decoupled decay, at least 0.
        seed: of the run, within [0, 2³²).

    Attributes:
        steps, skipped_steps, last_directional_derivative: as in `ZerothOrder`.

    Raises:
        ValueError: an argument lies outside its range, a parameter is not real floating-point, or a loaded state is of
            another optimizer.
    """

    def __init__(
        self, params: ParamsT, lr: float | Tensor, eps: float = 1e-3, weight_decay: float = 0.0, *, seed: int = 0
    ) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay}, seed)
