"""AdamP and SGDP: momentum optimizers that do not let scale-invariant weights grow (Heo et al. 2021, arXiv:2006.08217).

A weight w that a normalisation follows does not change the loss by its length. Momentum makes that length grow much
faster than plain gradient descent would, and the effective step lr/‖w‖² shrinks with it. Both optimizers take the
part along w out of their update u (Algorithms 1 and 2),

    u ← u - ŵ (ŵ·u),    ŵ = w / (‖w‖ + eps),    whenever |cos(w, g)| < delta / √D

with the gradient g, not the momentum, in the test. Test and projection work on the rows of a view of w with D columns:
first the output channels, where the largest cosine of all rows decides, then, if that test fails, the whole tensor as
a single row. Where either holds, the decoupled weight decay is multiplied by `wd_ratio`. Tensors of fewer than two
dimensions are never projected. A zero gradient counts as orthogonal.

Without the projection the squared length of a scale-invariant weight grows up to 1 + 2β/(1 - β) times as much as with
it: 19-fold at β = 0.9.

The authors' SGDP without Nesterov momentum projects the stored momentum along with the update, because the two share
their memory. In the paper's algorithm the momentum is left alone, and so it is here. Cosines are those of today's
`torch.nn.functional.cosine_similarity`, on which the authors' code rests: each norm, not their product, is held to at
least eps.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fairtrial.methods.arguments import require
from fairtrial.methods.optimizers.adam import adam_direction, adam_state, adam_state_shapes, check_adam
from fairtrial.methods.optimizers.torch_contract import (
    batches,
    check_rates,
    check_state,
    descend_,
    evaluate,
    scalars,
    with_gradient,
)
from fairtrial.methods.registry import LogUniform, method


@method(paper="adamp", slot="optimizer", search={"lr": LogUniform(1e-4, 1e-1)})
class AdamP(Optimizer):
    """AdamW whose update loses its part along scale-invariant weights (Algorithm 2).

    Args:
        params: parameters or parameter groups, real and dense.
        lr: learning rate, at least 0.
        betas: decay rates of the two moments, each within [0, 1).
        eps: added to √v̂, to ‖w‖ in the projection, and the least norm in the cosine.
        weight_decay: decoupled decay, at least 0; a step multiplies w by 1 - lr · weight_decay.
        delta: how near to orthogonal weight and gradient must be; 0 never projects and leaves AdamW.
        wd_ratio: share of the weight decay that projected weights get, within [0, 1].
        nesterov: use Nesterov momentum.
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
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        maximize: bool = False,
        foreach: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        check_adam(self.defaults | param_group)
        check_projection(self.defaults | param_group)
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        check_state(self, state, adam_state_shapes)
        super().__setstate__(state)

    @_disable_dynamo
    def _gather(self) -> list[tuple[dict[str, Any], Tensor, tuple[list[Tensor], ...]]]:
        gathered = []
        for group, (params, grads) in zip(self.param_groups, with_gradient(self), strict=True):
            for p in params:
                if not self.state[p]:
                    self.state[p] = adam_state(p)
            lists = [[self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq", "step")]
            lr = float(group["lr"])
            rates = torch.tensor([lr, lr * group["weight_decay"]], dtype=torch.float64)
            gathered += [(group, rates, batch) for batch in batches(params, grads, *lists, foreach=group["foreach"])]
        return gathered

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters by their gradients; returns the loss of `closure`, called with gradients enabled."""
        loss = evaluate(closure)
        for group, rates, (params, grads, exp_avgs, exp_avg_sqs, steps) in self._gather():
            if group["maximize"]:
                grads = list(torch._foreach_neg(grads))
            workspace = list(torch._foreach_mul(grads, params))
            invariance = scale_invariance(workspace, params, grads, group)
            updates = adam_direction(
                grads,
                exp_avgs,
                exp_avg_sqs,
                steps,
                betas=group["betas"],
                eps=group["eps"],
                nesterov=group["nesterov"],
                out=workspace,
            )
            remove_radial_part_(updates, params, invariance, group)
            decay_and_descend_(params, updates, invariance, group, rates)
        return loss


@method(
    paper="adamp",
    slot="optimizer",
    search={"lr": LogUniform(1e-3, 1.0)},
    # The paper's usual rate, for there is no default; and without momentum there is nothing to slow down.
    bind=lambda setting: {"lr": 0.1, "momentum": 0.9},
)
class SGDP(Optimizer):
    """SGD with momentum whose update loses its part along scale-invariant weights (Algorithm 1).

    With `buf ← momentum · buf + (1 - dampening) g` from a buffer of zeros, unlike torch's SGD, which starts at g.

    Args:
        params: parameters or parameter groups, real and dense.
        lr: learning rate, at least 0.
        momentum: within [0, 1).
        dampening: of the momentum.
        weight_decay: decoupled decay, at least 0; a step multiplies w by 1 - lr · weight_decay / (1 - momentum), which
            is in the long run what SGD's coupled decay comes to.
        nesterov, eps, delta, wd_ratio, maximize, foreach: as in `AdamP`; delta = 0 leaves SGD.

    The defaults are the authors'.

    Raises:
        ValueError: an argument lies outside its range, or a loaded state does not fit the parameters.
        RuntimeError: a gradient is sparse or complex.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        maximize: bool = False,
        foreach: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "eps": eps,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = self.defaults | param_group
        check_rates(group)
        require(0 <= group["momentum"] < 1, "momentum", group["momentum"], "within [0, 1)")
        require(abs(group["dampening"]) < math.inf, "dampening", group["dampening"], "finite")
        check_projection(group)
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        check_state(self, state, lambda group, p, saved: {"momentum_buffer": p.shape})
        super().__setstate__(state)

    @_disable_dynamo
    def _gather(self) -> list[tuple[dict[str, Any], Tensor, tuple[list[Tensor], ...]]]:
        gathered = []
        for group, (params, grads) in zip(self.param_groups, with_gradient(self), strict=True):
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"momentum_buffer": torch.zeros_like(p, memory_format=torch.preserve_format)}
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            lr = float(group["lr"])
            rates = torch.tensor([lr, lr * group["weight_decay"] / (1 - group["momentum"])], dtype=torch.float64)
            gathered += [(group, rates, batch) for batch in batches(params, grads, buffers, foreach=group["foreach"])]
        return gathered

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters by their gradients; returns the loss of `closure`, called with gradients enabled."""
        loss = evaluate(closure)
        for group, rates, (params, grads, buffers) in self._gather():
            momentum = group["momentum"]
            if group["maximize"]:
                grads = list(torch._foreach_neg(grads))
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, grads, alpha=1 - group["dampening"])
            invariance = scale_invariance(list(torch._foreach_mul(grads, params)), params, grads, group)
            if group["nesterov"]:
                updates = list(torch._foreach_add(grads, buffers, alpha=momentum))
            else:  # the momentum itself is not to be projected
                updates = list(buffers)
                for i, hit in zip(invariance.at, invariance.hits, strict=True):
                    updates[i] = buffers[i] if hit is False else buffers[i].clone()
            remove_radial_part_(updates, params, invariance, group)
            decay_and_descend_(params, updates, invariance, group, rates)
        return loss


def check_projection(group: Mapping[str, Any]) -> None:
    require(group["delta"] >= 0, "delta", group["delta"], "at least 0")
    require(0 <= group["wd_ratio"] <= 1, "wd_ratio", group["wd_ratio"], "within [0, 1]")


class ScaleInvariance(NamedTuple):
    """What the test has found for the tensors of two or more dimensions among the parameters.

    Its answers are bools; where no value is to be waited for, on other devices than the CPU and under `torch.compile`,
    they are numbers 0 or 1 of shape ().
    """

    at: list[int]  # positions in the list of parameters
    hits: list[bool | Float[Tensor, ""]]  # whether the test fired
    by_channel: list[bool | Float[Tensor, ""]]  # and whether for the channels, or else for the whole tensor
    channel_norms: list[Float[Tensor, " out"]]  # of the weights
    norms: list[Float[Tensor, ""]]


def scale_invariance(
    products: list[Tensor], params: list[Tensor], grads: list[Tensor], group: Mapping[str, Any]
) -> ScaleInvariance:
    """Test every tensor of two or more dimensions, by output channel and as a whole; `products` are g ⊙ w."""
    delta, eps = group["delta"], group["eps"]
    at = [i for i, p in enumerate(params) if p.ndim > 1]
    if not at:
        return ScaleInvariance([], [], [], [], [])
    matrices = [params[i] for i in at]
    dtype = torch.promote_types(params[0].dtype, torch.float32)
    dots = [products[i].sum(rest(p), dtype=dtype) for i, p in zip(at, matrices, strict=True)]
    g_rows = [torch.linalg.vector_norm(grads[i], dim=rest(p), dtype=dtype) for i, p in zip(at, matrices, strict=True)]
    w_rows = [torch.linalg.vector_norm(p, dim=rest(p), dtype=dtype) for p in matrices]
    g_norms, w_norms = torch._foreach_norm(g_rows), torch._foreach_norm(w_rows)

    # one cosine for every channel of every tensor, then one for every tensor
    inner = torch.cat([*dots, torch.stack([dot.sum() for dot in dots])]).abs()
    lengths = [torch.cat([*xs, torch.stack(x)]).clamp(min=eps) for xs, x in ((g_rows, g_norms), (w_rows, w_norms))]
    *channels, whole = (inner / (lengths[0] * lengths[1])).split([*map(len, matrices), len(at)])
    limits = [[delta * (len(p) / p.numel()) ** 0.5 for p in matrices], [delta / p.numel() ** 0.5 for p in matrices]]
    peaks = torch.stack([torch.stack([cosines.amax() for cosines in channels]), whole])
    fires = peaks < torch.tensor(limits, dtype=dtype, device=whole.device)

    readable = fires.device.type == "cpu" and not torch.compiler.is_compiling()
    hits: list[Any] = fires.any(0).tolist() if readable else list(fires.any(0).to(dtype).unbind())
    by_channel: list[Any] = fires[0].tolist() if readable else list(fires[0].to(dtype).unbind())
    return ScaleInvariance(at, hits, by_channel, w_rows, list(w_norms))


def remove_radial_part_(
    updates: list[Tensor], params: list[Tensor], invariance: ScaleInvariance, group: Mapping[str, Any]
) -> None:
    """u ← u - ŵ (ŵ·u) where the test has fired, by the channels of u or for u as a whole."""
    for i, hit, by_channel, channel_norms, norm in zip(*invariance, strict=True):
        if hit is not False:
            u, w = updates[i], params[i]
            dots = (u * w).sum(rest(w), dtype=norm.dtype)
            length = choose(by_channel, channel_norms, norm) + group["eps"]
            along = choose(by_channel, dots, dots.sum()) / length.square()
            along = choose(hit, along, torch.zeros_like(along)).to(w.dtype)
            u.addcmul_(along.view(-1, *[1] * (w.ndim - 1)), w, value=-1)


def choose(condition: bool | Float[Tensor, ""], x: Tensor, y: Tensor) -> Tensor:
    """x if the condition holds, else y."""
    if isinstance(condition, Tensor):
        return torch.where(condition > 0, x, y)
    return x if condition else y


def decay_and_descend_(
    params: list[Tensor],
    updates: list[Tensor],
    invariance: ScaleInvariance,
    group: Mapping[str, Any],
    rates: Float[Tensor, "2"],
) -> None:
    """w ← w (1 - decay · r) - lr u with rates (lr, decay); r is wd_ratio for what was projected and 1 for the rest."""
    lr, decay = scalars(rates)
    if group["weight_decay"]:
        matrices = [params[i] for i in invariance.at]
        if matrices:
            shares = [1 - (1 - group["wd_ratio"]) * hit for hit in invariance.hits]
            torch._foreach_mul_(matrices, [1 - decay * share for share in shares])
        vectors = [p for p in params if p.ndim <= 1]
        if vectors:
            torch._foreach_mul_(vectors, 1 - decay)
    descend_(params, updates, lr)


def rest(w: Tensor) -> tuple[int, ...]:
    """All dimensions but that of the output channels."""
    return tuple(range(1, w.ndim))
