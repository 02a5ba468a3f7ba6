"""Adam's direction m̂ / (√v̂ + eps) over lists of tensors, and the arguments and state that go with it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fairtrial.methods.arguments import require
from fairtrial.methods.optimizers.torch_contract import check_rates


def check_adam(group: Mapping[str, Any]) -> None:
    """Refuse a parameter group with a learning rate, betas, eps or weight decay that Adam has no meaning for."""
    check_rates(group)
    betas = group["betas"]
    require(len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "betas", betas, "two numbers within [0, 1)")


def adam_state(like: Tensor) -> dict[str, Tensor]:
    """A step count, on the CPU as torch keeps it, and two moments for a gradient shaped as `like`, all of them 0."""
    return {
        "step": torch.zeros((), dtype=torch.float32),
        "exp_avg": torch.zeros_like(like, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(like, memory_format=torch.preserve_format),
    }


def adam_state_shapes(group: Mapping[str, Any], p: Tensor, saved: Mapping[str, Tensor]) -> dict[str, Sequence[int]]:
    """The shapes of `adam_state(p)`."""
    return {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}


def adam_direction(
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    betas: tuple[float, float],
    eps: float,
    nesterov: bool = False,
    out: list[Tensor] | None = None,
) -> list[Tensor]:
    """Count a step, fold the gradients into the moments, in place, and return m̂ / (√v̂ + eps).

    Args:
        grads, exp_avgs, exp_avg_sqs: equally long lists of tensors of one device and dtype, equal shapes at each index.
        steps: as many tensors of shape (), on the CPU.
        nesterov: take β1 m + (1 - β1) g in place of m.
        out: tensors to write the result to, instead of new ones.
    """
    beta1, beta2 = betas
    torch._foreach_add_(steps, torch.ones(()), alpha=1.0)  # a plain 1 would be wrapped anew for every tensor
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    c1, c2 = bias_corrections(beta1, steps), bias_corrections(beta2, steps)
    if out is None:
        denominators = list(torch._foreach_sqrt(exp_avg_sqs))
    else:
        denominators = out
        torch._foreach_copy_(denominators, exp_avg_sqs)
        torch._foreach_sqrt_(denominators)
    # c1 goes into the denominator: c1 (√v / √c2 + eps)
    torch._foreach_mul_(denominators, [a / b**0.5 for a, b in zip(c1, c2, strict=True)])
    torch._foreach_add_(denominators, [eps * a for a in c1])
    numerators = torch._foreach_lerp(exp_avgs, grads, 1 - beta1) if nesterov else exp_avgs
    for numerator, denominator in zip(numerators, denominators, strict=True):
        torch.div(numerator, denominator, out=denominator)
    return denominators


def bias_corrections(beta: float, steps: Sequence[Tensor]) -> list[Any]:
    """1 - beta^step: numbers, or tensors under `torch.compile`, where every new number would be compiled anew."""
    if torch.compiler.is_compiling():
        log_beta = math.log(beta) if beta > 0 else -math.inf
        return [-torch.expm1(step * log_beta) for step in steps]
    return [1 - beta ** step.item() for step in steps]
