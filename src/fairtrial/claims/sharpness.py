"""How sharp a minimum is: the loss a little uphill, and the largest curvature."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.tasks.samples import Part


def rise_uphill(model: nn.Module, part: Part, radius: float) -> float:
    """How much the cross entropy rises by a step of length `radius` along its gradient, in evaluation mode.

    The weights are restored.
    """
    params = _prepared(model)
    loss = _loss(model, part)
    gradients = torch.autograd.grad(loss, params)
    kept = [p.detach().clone() for p in params]
    norm = _norm(list(gradients))
    with torch.no_grad():
        torch._foreach_add_(params, torch._foreach_mul(gradients, float(radius / (norm + 1e-12))))
        above = _loss(model, part).item()
        torch._foreach_copy_(params, kept)
    return above - loss.item()


def top_curvature(model: nn.Module, part: Part, generator: torch.Generator, *, iterations: int = 15) -> float:
    """The eigenvalue of the cross entropy's Hessian that is largest in size, by power iteration, in evaluation mode."""
    params = _prepared(model)
    gradients = torch.autograd.grad(_loss(model, part), params, create_graph=True)
    v = [torch.randn(p.shape, generator=generator) for p in params]
    eigenvalue = 0.0
    for _ in range(iterations):
        v = list(torch._foreach_div(v, float(_norm(v) + 1e-12)))
        product = torch.autograd.grad(gradients, params, grad_outputs=v, retain_graph=True)
        eigenvalue = float(sum((a * b).sum().item() for a, b in zip(v, product, strict=True)))
        v = list(product)
    return eigenvalue


def _prepared(model: nn.Module) -> list[Tensor]:
    model.eval()
    return [p for p in model.parameters() if p.requires_grad]


def _loss(model: nn.Module, part: Part) -> Tensor:
    return F.cross_entropy(model(part.x), part.y.flatten())


def _norm(tensors: list[Tensor]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))
    return norm
