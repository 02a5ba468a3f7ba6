"""StableMax and ⊥Grad: training on after everything is memorised (Prieto et al. 2025, arXiv:2501.04697).

A network without regularisation that fits its training data goes on lowering the loss by scaling up its logits. In
float32 the softmax then rounds loss and gradient of one sample after the other to exactly zero (*softmax collapse*,
from a gap between logits of some 16.7 on), and learning stops before it generalises. Two remedies:

**StableMax** grows linearly instead of exponentially:

    StableMax(x)_i = s(x_i) / Σ_j s(x_j),    s(x) = x + 1 for x ≥ 0, 1 / (1 - x) for x < 0

It is the softmax of sign(x) log(1 + |x|), which is how it is computed here; it is not invariant under shifts.

**⊥Grad** takes from the gradient g of every tensor w its part along w, and gives the rest the length of g:

    g⊥ = g - ⟨w, g⟩ / ⟨w, w⟩ w,    g ← g⊥ ‖g‖ / ‖g⊥‖

The text presents the projection alone; the rescaling is in the authors' code and is followed, `rescale=False` leaves it
out. Each tensor is taken by itself, biases too. Where g lies along w, g⊥ is round-off, and rescaled it is a step of
full size into a random direction. A stationary point is one where every gradient lies along its tensor, and need not be
a minimum.

Four differences from the authors' code. A tensor of a single element keeps its gradient, of which nothing would be left
but the sign of a rounding error. Gradients in `p.grad` are put back after the step, and one that a closure
gives is projected, where theirs projects before the closure gives a new one. Constants of 1e-30 that keep denominators
from 0 are exact here, so that half precision does without them too: a tensor of zeros, or a gradient of zeros, stays.
The loss is computed in float64, as theirs, and returned in the dtype of its input.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fairtrial.methods.arguments import require
from fairtrial.methods.losses.classification import check_reduction, check_scores, reduce
from fairtrial.methods.optimizers.pieces import dots, pieces
from fairtrial.methods.optimizers.torch_contract import batches, check_state, evaluate, with_gradient
from fairtrial.methods.registry import LogUniform, method


def log_stablemax(x: Float[Tensor, "*shape"], dim: int = -1) -> Float[Tensor, "*shape"]:
    """Logarithms of the probabilities of `stablemax`."""
    # by halves, since the derivative of sign(x) log(1 + |x|) at 0 is 1 and not what autograd makes of |x|
    log_s = torch.where(x < 0, -torch.log1p(-x.clamp(max=0)), torch.log1p(x.clamp(min=0)))
    return log_s.log_softmax(dim)


def stablemax(x: Float[Tensor, "*shape"], dim: int = -1) -> Float[Tensor, "*shape"]:
    """Probabilities along `dim`, proportional to x + 1 for x ≥ 0 and 1 / (1 - x) for x < 0."""
    return log_stablemax(x, dim).exp()


@method(paper="grokking_stability", slot="loss")
class StableMaxCrossEntropyLoss(nn.Module):
    """Cross entropy of `stablemax`, of scores (n, classes) and class indices (n,).

    Args:
        reduction: 'none', 'mean' or 'sum'.
        dtype: what it is computed in; float64, as by the authors, keeps small losses from becoming 0.
    """

    def __init__(self, *, reduction: str = "mean", dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        check_reduction(reduction)
        require(dtype in (torch.float32, torch.float64), "dtype", dtype, "torch.float32 or torch.float64")
        self.reduction, self.dtype = reduction, dtype

    def forward(self, input: Float[Tensor, "n c"], target: Int[Tensor, " n"]) -> Float[Tensor, "..."]:
        check_scores(input, target)
        loss = F.nll_loss(log_stablemax(input.to(self.dtype)), target.long(), reduction="none")
        return reduce(loss, self.reduction).to(input.dtype)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, dtype={self.dtype}"


@method(
    paper="grokking_stability",
    slot="optimizer",
    search={"lr": LogUniform(1e-4, 1e-1)},
    bind=lambda setting: {"base_optimizer_cls": torch.optim.AdamW, "weight_decay": 0.0},  # the paper's networks
)
class OrthoGrad(Optimizer):
    """⊥Grad: any optimizer, given gradients without their part along the weights.

    It shares parameter groups and state with the optimizer it wraps, so that schedules, gradient scalers and
    checkpoints work as with that one alone. Only the gradients are orthogonal: AdamW's steps, for one, are not.

    Args:
        params: parameters or parameter groups, real and dense.
        base_optimizer_cls: a `torch.optim.Optimizer` whose step works without a closure, such as SGD or AdamW.
        lr: its learning rate, at least 0; by default torch's for SGD and AdamW.
        rescale: give the projected gradient the length of the whole one; can be set for each group.
        base_kwargs: further arguments of the wrapped optimizer.

    Attributes:
        base_optimizer: the wrapped optimizer.

    Raises:
        TypeError: `base_optimizer_cls` is no optimizer, or one that saves more than groups and state.
        ValueError: an argument lies outside its range, or a loaded state does not fit the parameters.
        RuntimeError: a gradient is sparse or complex.
    """

    def __init__(
        self,
        params: ParamsT,
        base_optimizer_cls: type[Optimizer] = torch.optim.SGD,
        lr: float | Tensor = 1e-3,
        *,
        rescale: bool = True,
        **base_kwargs: Any,
    ) -> None:
        if not (isinstance(base_optimizer_cls, type) and issubclass(base_optimizer_cls, Optimizer)):
            raise TypeError(f"base_optimizer_cls must be a torch.optim.Optimizer class, got {base_optimizer_cls!r}")
        if base_optimizer_cls.state_dict is not Optimizer.state_dict:
            raise TypeError(f"base_optimizer_cls must have torch's own state_dict, got {base_optimizer_cls.__name__}")
        super().__init__(params, {"lr": lr, "rescale": rescale})
        make: Any = base_optimizer_cls
        self.base_optimizer: Optimizer = make(self.param_groups, lr=lr, **base_kwargs)
        self.defaults |= self.base_optimizer.defaults
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        lr, rescale = (param_group.setdefault(name, self.defaults[name]) for name in ("lr", "rescale"))
        require(0 <= float(lr) < math.inf, "lr", lr, "at least 0 and finite")
        require(isinstance(rescale, bool), "rescale", rescale, "True or False")
        if "base_optimizer" in self.__dict__:
            self.base_optimizer.add_param_group(param_group)
        else:
            super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"base_optimizer": self.base_optimizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "base_optimizer" in state:  # a copy or a pickle
            super().__setstate__(state)
        else:
            check_state(self, state, self._state_shapes)
            self.base_optimizer.__setstate__(state)
        self._share()

    def _state_shapes(
        self, group: Mapping[str, Any], p: Tensor, saved: Mapping[str, Tensor]
    ) -> Mapping[str, Sequence[int]]:
        """The shapes of what the wrapped optimizer keeps of a parameter: what it makes for one of zeros."""
        like = torch.zeros_like(p, requires_grad=True)
        like.grad = torch.zeros_like(p)
        make: Any = type(self.base_optimizer)
        optimizer = make([{**group, "params": [like]}])
        optimizer.step()
        return {name: value.shape for name, value in optimizer.state[like].items()}

    @_disable_dynamo
    def _gather(self) -> list[tuple[bool, tuple[list[Tensor], ...]]]:
        pairs = zip(self.param_groups, with_gradient(self), strict=True)
        whole = [(g["rescale"], batch) for g, lists in pairs for batch in batches(*lists, foreach=True)]
        return [(rescale, piece) for rescale, batch in whole for piece in pieces(batch)]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters by their projected gradients; returns the loss of `closure`.

        The closure is called once, with gradients enabled. `torch.compile` takes the projection, not what the wrapped
        optimizer does.
        """
        loss = evaluate(closure)
        given = [(params, grads, without_radial_part(params, grads, r)) for r, (params, grads) in self._gather()]
        self._base_step(given)
        return loss

    @_disable_dynamo
    def _base_step(self, given: list[tuple[list[Tensor], list[Tensor], list[Tensor]]]) -> None:
        try:
            for params, _, projected in given:
                for p, g in zip(params, projected, strict=True):
                    p.grad = g
            self.base_optimizer.step()
        finally:
            for params, grads, _ in given:
                for p, g in zip(params, grads, strict=True):
                    p.grad = g


def without_radial_part(params: list[Tensor], grads: list[Tensor], rescale: bool) -> list[Tensor]:
    """g - ⟨w, g⟩ / ⟨w, w⟩ w for each tensor, or that at the length of g, as new tensors of one device and dtype."""
    dtype = torch.promote_types(params[0].dtype, torch.float32)
    lengths = torch._foreach_norm(params, 2, dtype)
    along = [
        (-dot / w.square()).where((w > 0) & (p.numel() > 1), 0.0).to(p.dtype)
        for p, dot, w in zip(params, dots(params, grads, dtype), lengths, strict=True)
    ]
    projected = list(torch._foreach_mul(params, along))
    torch._foreach_add_(projected, grads)
    if rescale:
        wanted, found = torch._foreach_norm(grads, 2, dtype), torch._foreach_norm(projected, 2, dtype)
        torch._foreach_mul_(projected, [torch.where(b == 0, 0.0, a / b) for a, b in zip(wanted, found, strict=True)])
    return projected


def softmax_collapse_fraction(logits: Float[Tensor, "n c"], target: Int[Tensor, " n"]) -> float:
    """The part of the samples whose cross entropy in float32 is exactly 0, so that they have no gradient any more."""
    check_scores(logits, target)
    return (F.cross_entropy(logits.float(), target.long(), reduction="none") == 0).double().mean().item()


def nlm_alignment(model: nn.Module) -> float:
    """cos(-∇L, θ) over all parameters with a gradient: 1 where descent only scales up the weights, and so the logits.

    Raises:
        ValueError: no parameter has a gradient, or all weights or gradients are 0.
    """
    pairs = [(p.detach().flatten(), p.grad.flatten()) for p in model.parameters() if p.grad is not None]
    require(len(pairs) > 0, "model", type(model).__name__, "one with gradients: call backward first")
    weights, gradient = (torch.cat(parts).double() for parts in zip(*pairs, strict=True))
    lengths = float(weights.norm() * gradient.norm())
    require(lengths > 0, "model", "weights or gradients of 0", "one with weights and gradients")
    return -float(weights @ gradient) / lengths


class Parts(NamedTuple):
    """Samples and classes to train on, and others to test."""

    x: Shaped[Tensor, "n d"]
    y: Int[Tensor, " n"]
    x_test: Shaped[Tensor, "m d"]
    y_test: Int[Tensor, " m"]


def modular_addition(modulus: int, fraction: float, generator: torch.Generator) -> Parts:
    """All pairs (a, b) of numbers below the modulus, and (a + b) mod modulus.

    Args:
        modulus: p, at least 2; 113 in the paper.
        fraction: the part of the p² pairs to train on, between 0 and 1; 0.4 in the paper.
        generator: what decides which pairs those are.
    """
    require(modulus >= 2, "modulus", modulus, "at least 2")
    require(0 < fraction < 1, "fraction", fraction, "between 0 and 1")
    pairs = torch.cartesian_prod(torch.arange(modulus), torch.arange(modulus))
    order = torch.randperm(len(pairs), generator=generator)
    x, y = pairs[order], pairs[order].sum(1) % modulus
    count = int(fraction * len(pairs))
    return Parts(x[:count], y[:count], x[count:], y[count:])


def sparse_parity(
    generator: torch.Generator, *, samples: int = 2000, relevant: int = 3, noise: int = 40, fraction: float = 0.5
) -> Parts:
    """Rows of random bits 0 and 1, and the parity of the first few of them.

    Args:
        generator: what bits are drawn from.
        samples: how many rows, at least 2.
        relevant: bits whose parity is asked for, at least 1.
        noise: bits that do not matter, at least 0.
        fraction: the part of the rows to train on, between 0 and 1.

    The defaults are the authors'.
    """
    require(samples >= 2, "samples", samples, "at least 2")
    require(relevant >= 1, "relevant", relevant, "at least 1")
    require(noise >= 0, "noise", noise, "at least 0")
    require(0 < fraction < 1, "fraction", fraction, "between 0 and 1")
    bits = torch.randint(2, (samples, relevant + noise), generator=generator)
    x, y = bits.float(), bits[:, :relevant].sum(1) % 2
    count = int(fraction * samples)
    return Parts(x[:count], y[:count], x[count:], y[count:])
