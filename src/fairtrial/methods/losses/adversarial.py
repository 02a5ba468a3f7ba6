"""The worst perturbation of inputs within a ball, searched for by projected gradient ascent (Madry et al. 2018)."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fairtrial.methods.arguments import require
from fairtrial.methods.evaluation import evaluating


def check_ball(epsilon: float, steps: int, step_size: float | None, norm: str) -> None:
    require(0 <= epsilon < math.inf, "epsilon", epsilon, "at least 0 and finite")
    require(steps >= 1, "steps", steps, "at least 1")
    require(step_size is None or 0 < step_size < math.inf, "step_size", step_size, "above 0 and finite, or None")
    require(norm in ("linf", "l2"), "norm", norm, "'linf' or 'l2'")


def worst_inputs(
    model: nn.Module,
    objective: Callable[[Tensor], Tensor],
    x: Float[Tensor, "n ..."],
    *,
    epsilon: float,
    steps: int,
    step_size: float | None = None,
    norm: str = "linf",
    generator: torch.Generator | None = None,
) -> Float[Tensor, "n ..."]:
    """Inputs within `epsilon` of `x` that make an objective of the model's outputs large.

    The start is drawn uniformly from the box of the ball's radius and brought into the ball. The model is in evaluation
    mode meanwhile, as in TRADES, so that neither dropout nor running statistics take part; its modes are put back
    afterwards. The inputs' range is not looked at: perturbed pixels may leave it.

    Args:
        model: maps inputs to outputs, sample by sample.
        objective: of the outputs, one value for each sample.
        x: inputs, not changed.
        epsilon: radius of the ball, in units of x.
        steps: how many steps of ascent.
        step_size: length of a step in the norm of the ball; epsilon / 4 by default.
        norm: 'linf' or 'l2', of each sample.
        generator: what the start is drawn from; torch's global one by default.
    """
    check_ball(epsilon, steps, step_size, norm)
    clean = x.detach()
    length = epsilon / 4 if step_size is None else step_size
    device = clean.device if generator is None else generator.device
    uniform = torch.rand(clean.shape, generator=generator, device=device, dtype=clean.dtype).to(clean.device)
    delta = _projected(epsilon * (2 * uniform - 1), epsilon, norm)
    with evaluating(model), torch.enable_grad():
        for _ in range(steps):
            moved = (clean + delta).requires_grad_()
            (gradient,) = torch.autograd.grad(objective(model(moved)).sum(), moved)
            delta = _projected(delta + length * _direction(gradient, norm), epsilon, norm)
    return clean + delta


def _lengths(delta: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
    lengths: Tensor = torch.linalg.vector_norm(delta.flatten(1), dim=1)
    return lengths.view(-1, *[1] * (delta.ndim - 1))


def _direction(gradient: Float[Tensor, "n ..."], norm: str) -> Float[Tensor, "n ..."]:
    """Where a step of length 1 gains most."""
    if norm == "linf":
        return gradient.sign()
    lengths = _lengths(gradient)
    return gradient / lengths.masked_fill(lengths == 0, 1.0)


def _projected(delta: Float[Tensor, "n ..."], epsilon: float, norm: str) -> Float[Tensor, "n ..."]:
    if norm == "linf":
        return delta.clamp(-epsilon, epsilon)
    lengths = _lengths(delta)
    return delta * (epsilon / lengths.masked_fill(lengths == 0, 1.0)).clamp(max=1.0)
