"""SAM: sharpness-aware minimisation (Foret et al. 2021, arXiv:2010.01412), the baseline of cheaper ways to flat minima.

A base optimizer takes its step at w with the gradient of w + ε, the worst place nearby to first order:

    ε = ρ T² g / (‖T g‖ + 1e-12),    T = I, or diag |w| for adaptive SAM (Kwon et al. 2021, arXiv:2102.11600)

with the norm over all parameters. Every step needs the gradient twice and so takes about twice the time.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fairtrial.methods.arguments import require
from fairtrial.methods.optimizers.torch_contract import batches, evaluate, with_gradient


class SAM(Optimizer):
    """Any optimizer, with the gradient taken where the loss nearby is highest.

    `step(closure)` takes a function that clears the gradients, gives the loss and calls `backward`; it is called twice,
    at w and at w + ε. Batch normalisation then sees every batch twice. Learning-rate schedulers are given this
    optimizer; gradient scalers, which know of one backward pass only, cannot be used with it.

    Args:
        params: parameters or parameter groups, real and dense.
        base_optimizer: makes the optimizer that takes the steps, from `params` and `base_options`.
        rho: ρ, at least 0, which leaves the base optimizer; 0.05 is the paper's.
        adaptive: scale by the weights; ρ is then to be some ten times as large.
        base_options: arguments of the base optimizer.

    Raises:
        ValueError: `rho` is out of its range, there is no closure, or a loaded state is not of this optimizer.
        RuntimeError: a gradient is sparse or complex.
    """

    needs_closure = True

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Callable[..., Optimizer] = torch.optim.SGD,
        rho: float = 0.05,
        *,
        adaptive: bool = False,
        **base_options: Any,
    ) -> None:
        base = base_optimizer(params, **base_options)
        super().__init__(base.param_groups, {**base.defaults, "rho": rho, "adaptive": adaptive})
        self.base_optimizer = base
        base.param_groups, self.state = self.param_groups, base.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        chosen = {name: param_group.get(name, self.defaults[name]) for name in ("rho", "adaptive")}
        require(0 <= chosen["rho"] < math.inf, "rho", chosen["rho"], "at least 0 and finite")
        if hasattr(self, "base_optimizer"):  # whose list of groups is this one's
            self.base_optimizer.add_param_group(param_group | chosen)
        else:
            super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"base_optimizer": self.base_optimizer}

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's, with `rho` and `adaptive` in its groups; between two steps there is nothing else."""
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state dict of a SAM over the same base optimizer."""
        for group in state_dict["param_groups"]:
            missing = sorted(self.defaults.keys() - {"differentiable"} - group.keys())
            require(not missing, "state_dict", f"a parameter group without {missing}", "of SAM")
        self.base_optimizer.load_state_dict(state_dict)
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state

    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step, and return the loss at w."""
        if closure is None:
            raise ValueError("closure must be a function that gives the loss and calls backward, got None")
        loss = evaluate(closure)
        params, kept = self._ascend()
        try:
            evaluate(closure)
        finally:
            torch._foreach_copy_(params, kept)
        self.base_optimizer.step()
        return loss

    def _ascend(self) -> tuple[list[Tensor], list[Tensor]]:
        """w ← w + ε; returns the parameters that moved, and copies of what they were."""
        moved = []
        lengths: list[Tensor] = []
        for group, (params, grads) in zip(self.param_groups, with_gradient(self), strict=True):
            for p, g in batches(params, grads, foreach=True):
                scaled = torch._foreach_mul(g, torch._foreach_abs(p)) if group["adaptive"] else g
                lengths += torch._foreach_norm(scaled)
                moved.append((group, p, g))
        if not moved:
            return [], []
        kept = [p.clone() for _, params, _ in moved for p in params]
        norm = torch.stack([length.to(lengths[0].device, lengths[0].dtype) for length in lengths]).norm() + 1e-12
        for group, params, grads in moved:
            updates = list(torch._foreach_mul(grads, (group["rho"] / norm).to(params[0])))
            if group["adaptive"]:
                torch._foreach_mul_(updates, params)
                torch._foreach_mul_(updates, params)
            torch._foreach_add_(params, updates)
        return [p for _, params, _ in moved for p in params], kept
