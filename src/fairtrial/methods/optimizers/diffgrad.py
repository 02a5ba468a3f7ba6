"""diffGrad: Adam slowed down where the gradient stays as it was (Dubey et al. 2019, arXiv:1909.11015).

The first moment is multiplied, element by element, by a friction coefficient: how much the gradient has changed since
the last step, through a sigmoid. With g_0 = 0,

    m ← β1 m + (1 - β1) g_t,    v ← β2 v + (1 - β2) g_t²
    ξ = 1 / (1 + exp(-|g_{t-1} - g_t|))
    θ ← θ - lr √(1 - β2^t) / (1 - β1^t) · ξ m / (√v + eps)

ξ lies between 1/2, for a gradient that does not change, and 1. It depends on the scale of the loss: where gradients are
small, as they mostly are in networks, ξ is hardly above 1/2, and diffGrad is Adam at half the rate. Compare it with
Adam at half the rate, or tune both.

The authors' first code kept a reference to the gradient's buffer and not a copy. With gradients zeroed in place, as
was usual, the change was 0 and ξ = 1/2 from the second step on, and with that the published results were obtained.
Their second version, which copies, is the method of the text and is followed here. As in both, eps is added to √v
before v's bias is corrected, unlike in `torch.optim.Adam`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, groupby
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fairtrial.methods.optimizers.adam import adam_state, adam_state_shapes, bias_corrections, check_adam
from fairtrial.methods.optimizers.torch_contract import batches, check_state, evaluate, scalars, with_gradient
from fairtrial.methods.registry import LogUniform, method

PORTION = 2**16  # elements


@method(paper="diffgrad", slot="optimizer", search={"lr": LogUniform(1e-4, 1e-1)})
class DiffGrad(Optimizer):
    """Adam with a first moment that is damped by up to a half where the gradient hardly changes.

    The gradient must be the one that counts: unscaled and clipped before `step`, as `torch.amp.GradScaler` does.

    Args:
        params: parameters or parameter groups, real and dense.
        lr: learning rate, at least 0.
        betas: decay rates of the two moments, each within [0, 1).
        eps: added to √v.
        weight_decay: at least 0; added to the gradient as weight_decay · θ, and so to the one that is remembered.
        decoupled_weight_decay: multiply θ by 1 - lr · weight_decay instead.
        maximize: ascend instead of descend.
        foreach: handle all tensors of a device and dtype together; `False` goes through them one by one with the same
            result and less memory.

    The defaults are the authors'.

    Raises:
        ValueError: an argument lies outside its range, or a loaded state does not fit the parameters.
        RuntimeError: a gradient is sparse or complex.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        foreach: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        check_adam(self.defaults | param_group)
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        check_state(self, state, diffgrad_state_shapes)
        super().__setstate__(state)

    @_disable_dynamo
    def _gather(self) -> list[tuple[dict[str, Any], Float[Tensor, "1"], tuple[list[Tensor], ...]]]:
        gathered = []
        for group, (params, grads) in zip(self.param_groups, with_gradient(self, elementwise=True), strict=True):
            for p in params:
                if not self.state[p]:
                    previous = torch.zeros_like(p, memory_format=torch.preserve_format)
                    self.state[p] = adam_state(p) | {"previous_grad": previous}
            names = ("exp_avg", "exp_avg_sq", "previous_grad", "step")
            lists = [[self.state[p][name] for p in params] for name in names]
            rate = torch.tensor([float(group["lr"])], dtype=torch.float64)
            for batch in batches(params, grads, *lists, foreach=group["foreach"]):
                gathered += [(group, rate, portion) for portion in portions(*batch)]
        return gathered

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters by their gradients; returns the loss of `closure`, called with gradients enabled."""
        loss = evaluate(closure)
        for group, rate, (params, grads, exp_avgs, exp_avg_sqs, previous_grads, steps) in self._gather():
            (lr,) = scalars(rate)
            if group["maximize"]:
                grads = list(torch._foreach_neg(grads))
            if group["weight_decay"] and group["decoupled_weight_decay"]:
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            elif group["weight_decay"]:
                grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
            diffgrad_(params, grads, exp_avgs, exp_avg_sqs, previous_grads, steps, lr=lr, group=group)
        return loss


def portions(*lists: list[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """Split parallel lists of tensors of one device: on the CPU into portions that stay in its cache.

    There, lists have no kernels of their own: a dozen operations, each over all tensors, would fetch every tensor from
    memory a dozen times.
    """
    if lists[0][0].device.type != "cpu":
        yield lists
        return
    ends = accumulate(p.numel() for p in lists[0])
    for _, numbered in groupby(enumerate(ends), lambda item: item[1] // PORTION):
        numbers = [i for i, _ in numbered]
        yield tuple(tensors[numbers[0] : numbers[-1] + 1] for tensors in lists)


def diffgrad_state_shapes(group: Mapping[str, Any], p: Tensor, saved: Mapping[str, Tensor]) -> dict[str, Sequence[int]]:
    return adam_state_shapes(group, p, saved) | {"previous_grad": p.shape}


def diffgrad_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    previous_grads: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float | Float[Tensor, ""],
    group: Mapping[str, Any],
) -> None:
    """One step of tensors of one device and dtype, without weight decay; all lists but `grads` are changed."""
    beta1, beta2 = group["betas"]
    torch._foreach_add_(steps, torch.ones(()), alpha=1.0)  # a plain 1 would be wrapped anew for every tensor
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    numerators = previous_grads  # whose memory serves until the gradients of this step are put there
    torch._foreach_sub_(numerators, grads)
    torch._foreach_abs_(numerators)
    torch._foreach_sigmoid_(numerators)
    torch._foreach_mul_(numerators, exp_avgs)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_add_(denominators, group["eps"])
    c1, c2 = bias_corrections(beta1, steps), bias_corrections(beta2, steps)
    sizes = [-lr * b**0.5 / a for a, b in zip(c1, c2, strict=True)]
    if isinstance(lr, Tensor):
        torch._foreach_mul_(numerators, sizes)
        torch._foreach_addcdiv_(params, numerators, denominators)
    else:
        torch._foreach_addcdiv_(params, numerators, denominators, sizes)
    torch._foreach_copy_(previous_grads, grads)
