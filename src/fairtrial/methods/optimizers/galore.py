"""GaLore: AdamW with moments of a low-rank projection of each gradient (Zhao et al. 2024, arXiv:2403.03507).

Of a gradient G (m, n) only its part in a subspace of dimension r goes through Adam (Algorithm 2). Every
`update_proj_gap` steps T, the first included, the subspace is that of the r leading singular vectors of G, on the side
of the shorter dimension: U[:, :r] = P if m < n, else Vᵀ[:r] = Q. With k = 1, 2, … counting the weight's own steps,

    R = Pᵀ G (r, n)   or   G Qᵀ (m, r)
    M ← β1 M + (1 - β1) R,    V ← β2 V + (1 - β2) R²
    N = M / (√V + eps)
    W ← W - lr √(1 - β2ᵏ) / (1 - β1ᵏ) · scale · (P N or N Q)
    W ← W - lr · weight_decay · W

All weights are trained, and the state of a projected one shrinks from 2mn numbers to 2nr + mr for m ≤ n. The moments
are neither reset nor rotated when the subspace changes. As the update is multiplied by `scale`, lr is to be some 4 to
10 times AdamW's; the decay is not scaled. eps is added before the bias correction, as in the AdamW that `transformers`
once had and the authors took.

Only parameter groups with a `rank` are projected, all others get that AdamW: embeddings, norms and the output layer
need it. `galore_param_groups` makes the groups.

Differences from the authors' code. Bases are tensors of the state, not objects with a step of their own. The SVD of
float64 gradients is done in float64, not in float32. The side of a basis is remembered, not guessed from the low-rank
matrix, where 'reverse_std' goes wrong once r exceeds the shorter side. A gradient that is not finite when a new
subspace is due is left out, and with it the step of that weight; at other steps it passes through, as in torch's own.
Singular vectors have no sign of their own, and as the moments survive a change of the subspace, two SVD routines can
lead to different runs: `fix_signs` decides the signs. Tensors of more than two dimensions are not projected.

The optimizer state alone shrinks, not the gradients. To have only one gradient alive at a time, give each parameter an
optimizer of its own and call it from `Tensor.register_post_accumulate_grad_hook`; that is the same without clipping.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fairtrial.methods.arguments import require
from fairtrial.methods.optimizers.adam import adam_state_shapes, check_adam
from fairtrial.methods.optimizers.frugal import frugal_param_groups
from fairtrial.methods.optimizers.gradient_projection import (
    Bases,
    basis_shapes,
    check_gradient_projection,
    descend_projected_,
    leading_subspace,
    low_rank_shape,
    project,
    project_back,
)
from fairtrial.methods.optimizers.torch_contract import batches, check_state, evaluate, scalars, with_gradient
from fairtrial.methods.registry import LogUniform, method

State = dict[str, Tensor]


def in_a_task(setting: Any) -> dict[str, Any]:
    """The groups of a task's model, a quarter of the shorter side as rank, and ten subspaces in a run.

    With new ones every few steps the moments, which are kept, would never belong to the present one.
    """
    gap = max(1, setting.total_steps // 10)
    return {"params": galore_param_groups(setting.model), "rank": 0.25, "update_proj_gap": gap}


@method(
    paper="galore",
    slot="optimizer",
    search={"lr": LogUniform(4e-4, 4e-1)},  # AdamW's, divided by the scale
    bind=in_a_task,
)
class GaLoreAdamW(Optimizer):
    """AdamW in the leading subspace of the gradients of groups with a `rank`; plain AdamW elsewhere.

    Args:
        params: parameters or parameter groups, real and dense; all parameters of a group with a rank are matrices.
            `galore_param_groups` makes them. All arguments can be set for each group.
        lr: learning rate, at least 0; the authors' is 0.01 for 60M to 1B parameters at scale 0.25.
        betas: decay rates of the two moments, each within [0, 1).
        eps: added to √V before the bias correction.
        weight_decay: decoupled decay, at least 0, applied after the step; it multiplies w by 1 - lr · weight_decay.
        correct_bias: correct the moments' bias towards 0.
        rank: dimension of the subspace, or a share of the shorter side within (0, 1); None projects nothing. What
            exceeds the shorter side is cut down to it, with a warning.
        update_proj_gap: steps T from one subspace to the next.
        scale: α, multiplies the projected update.
        proj_type: 'std' compresses the shorter dimension, 'reverse_std' the longer; 'left' or 'right'; 'full' both,
            with moments (r, r).
        fix_signs: make the first of the entries of largest modulus of every singular vector positive.
        maximize: ascend instead of descend.
        foreach: handle all tensors of a device and dtype together; `False` goes through them one by one with the same
            result and less memory.

    The defaults are the authors', who take ranks 128, 256, 256 and 512 for models of 60M, 130M, 350M and 1B parameters,
    of widths 512, 768, 1024 and 2048. For fine-tuning they take rank 4 or 8 with scale 4.

    Raises:
        ValueError: an argument lies outside its range, a parameter of a group with a rank is not a matrix, or a loaded
            state does not fit the parameters.
        RuntimeError: a gradient is sparse or complex.

    Warns:
        UserWarning: a rank exceeds the shorter side of a matrix, or no group has a rank, which leaves AdamW.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        *,
        rank: int | float | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        fix_signs: bool = False,
        maximize: bool = False,
        foreach: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "correct_bias": correct_bias,
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "proj_type": proj_type,
            "fix_signs": fix_signs,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)
        warn_of_no_rank(self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        check_adam(self.defaults | param_group)
        check_gradient_projection(self.defaults | param_group)
        super().add_param_group(param_group)
        try:
            self._check_shapes(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise
        warn_of_high_rank(self.param_groups[-1])

    def __setstate__(self, state: dict[str, Any]) -> None:
        check_state(self, state, self.state_shapes)
        super().__setstate__(state)

    @staticmethod
    def state_shapes(group: Mapping[str, Any], p: Tensor, saved: Mapping[str, Tensor]) -> dict[str, Sequence[int]]:
        """The shapes of a parameter's state: a step count, two moments, and its bases."""
        if group["rank"] is None:
            return adam_state_shapes(group, p, saved)
        part = low_rank_shape(p.shape, group)
        return {"step": (), "exp_avg": part, "exp_avg_sq": part, **basis_shapes(p.shape, group)}

    def _check_shapes(self, group: Mapping[str, Any]) -> None:
        if group["rank"] is not None:
            for p in group["params"]:
                require(p.ndim == 2, "params", tuple(p.shape), "matrices in a group with a rank")

    @_disable_dynamo
    def _gather(self) -> list[tuple[dict[str, Any], Tensor, list[Tensor], list[Tensor], list[State]]]:
        """Renew the subspaces that are due, count the step, and return batches.

        Each is a group, the step sizes of its parameters with lr · weight_decay at the end, params, grads and states.
        """
        gathered = []
        for group, (params, grads) in zip(self.param_groups, with_gradient(self), strict=True):
            if group["maximize"] and grads:
                grads = list(torch._foreach_neg(grads))
            ready = [self._is_ready(group, p, grad) for p, grad in zip(params, grads, strict=True)]
            lists = ([x for x, is_ready in zip(xs, ready, strict=True) if is_ready] for xs in (params, grads))
            for ps, gs in batches(*lists, foreach=group["foreach"]):
                states = [self.state[p] for p in ps]
                steps = [state["step"] for state in states]
                torch._foreach_add_(steps, torch.ones(()), alpha=1.0)
                lr = float(group["lr"])
                rates = [*(lr * bias_correction(group, step) for step in steps), lr * group["weight_decay"]]
                gathered.append((group, torch.tensor(rates, dtype=torch.float64), ps, gs, states))
        return gathered

    def _is_ready(self, group: Mapping[str, Any], p: Tensor, grad: Tensor) -> bool:
        """Whether a parameter can take its step, given its state and, where that is due, a new subspace.

        It cannot when a subspace would have to be made of a gradient that is not finite.
        """
        state: State = self.state.get(p, {})
        if group["rank"] is not None and (not state or int(state["step"]) % self._gap(group, state) == 0):
            if not grad.isfinite().all():
                return False
            self.state[p] = self._renewed(group, p, grad, state or self._new_state(group, p, grad))
        elif not state:
            self.state[p] = self._new_state(group, p, grad)
        return True

    def _new_state(self, group: Mapping[str, Any], p: Tensor, grad: Tensor) -> State:
        """A step count, on the CPU as torch keeps it, and two moments, all of them 0."""
        if group["rank"] is None:
            like = torch.zeros_like(p, memory_format=torch.preserve_format)
        else:
            like = grad.new_zeros(low_rank_shape(p.shape, group))
        return {"step": torch.zeros((), dtype=torch.float32), "exp_avg": like, "exp_avg_sq": torch.zeros_like(like)}

    def _gap(self, group: Mapping[str, Any], state: State) -> int:
        gap: int = group["update_proj_gap"]
        return gap

    def _renewed(self, group: Mapping[str, Any], p: Tensor, grad: Tensor, state: State) -> State:
        """The state with the subspace of the present gradient."""
        return state | {side: basis.to(p.dtype) for side, basis in leading_subspace(grad, group).items()}

    def _bases(self, group: Mapping[str, Any], state: State, p: Tensor) -> Bases:
        return {side: state[side] for side in ("left", "right") if side in state}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters by their gradients; returns the loss of `closure`, called with gradients enabled."""
        loss = evaluate(closure)
        for batch in self._gather():
            self._update(*batch)
        return loss

    def _update(
        self, group: dict[str, Any], rates: Tensor, params: list[Tensor], grads: list[Tensor], states: list[State]
    ) -> None:
        *sizes, decay = scalars(rates)
        bases = None
        if group["rank"] is not None:
            bases = [self._bases(group, state, p) for p, state in zip(params, states, strict=True)]
        adamw_(group, sizes, decay, params, grads, states, bases)


def adamw_(
    group: Mapping[str, Any],
    sizes: list[Any],
    decay: Any,
    weights: list[Tensor],
    grads: list[Tensor],
    states: list[State],
    bases: list[Bases] | None,
    prefix: str = "",
) -> None:
    """A step of AdamW on the weights, in place: in the subspaces of the bases, or as it is without any.

    Args:
        group: with `betas`, `eps`, `scale` and `weight_decay`.
        sizes: of the step of each weight, bias correction included: numbers, or tensors under `torch.compile`.
        decay: lr · weight_decay.
        weights, grads: equally long lists, of one device and dtype.
        states: with the moments, whose names begin with `prefix`.
        bases: of each weight.
        prefix: tells these moments from others of the same state.
    """
    beta1, beta2 = group["betas"]
    if bases is not None:
        grads = [project(grad, basis) for grad, basis in zip(grads, bases, strict=True)]
        sizes = [size * group["scale"] for size in sizes]
    exp_avgs, exp_avg_sqs = ([state[prefix + name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_add_(denominators, group["eps"])
    directions = list(torch._foreach_div(exp_avgs, denominators))
    torch._foreach_mul_(directions, sizes)
    if bases is None:
        torch._foreach_sub_(weights, directions)
    else:
        for weight, direction, basis in zip(weights, directions, bases, strict=True):
            descend_projected_(weight, direction, basis)
    if group["weight_decay"]:
        torch._foreach_mul_(weights, 1 - decay)


def bias_correction(group: Mapping[str, Any], step: Float[Tensor, ""]) -> float:
    """√(1 - β2ᵏ) / (1 - β1ᵏ), or 1 without correction."""
    (beta1, beta2), k = group["betas"], step.item()
    return math.sqrt(1 - beta2**k) / (1 - beta1**k) if group["correct_bias"] else 1.0


def warn_of_no_rank(groups: Sequence[Mapping[str, Any]]) -> None:
    if all(group["rank"] is None for group in groups):
        warnings.warn("no parameter group has a rank, so this is AdamW: see galore_param_groups", stacklevel=3)


def warn_of_high_rank(group: Mapping[str, Any]) -> None:
    """A rank above the shorter side is no compression of that matrix at all."""
    rank = group["rank"]
    low = [tuple(p.shape) for p in group["params"] if isinstance(rank, int) and min(p.shape) < rank]
    if low:
        warnings.warn(f"rank {rank} exceeds the shorter side of {len(low)} matrices, as {low[0]}", stacklevel=4)


class GaLoreProjector:
    """The projection by itself, for optimizers of one's own: it renews its subspace as steps go by.

    Args:
        rank: dimension r of the subspace, or a share of the shorter side within (0, 1).
        update_proj_gap: steps from one subspace to the next.
        scale: multiplies what is projected back; the optimizer's is 0.25.
        proj_type, fix_signs: as in `GaLoreAdamW`.

    Raises:
        ValueError: an argument lies outside its range.
    """

    def __init__(
        self,
        rank: int | float,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        proj_type: str = "std",
        fix_signs: bool = False,
    ) -> None:
        require(rank is not None, "rank", rank, "a number")
        self._group: dict[str, Any] = {
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "proj_type": proj_type,
            "fix_signs": fix_signs,
        }
        check_gradient_projection(self._group)
        self.bases: dict[str, Tensor] = {}

    @torch.no_grad()
    def project(self, grad: Float[Tensor, "m n"], step: int) -> Float[Tensor, "a b"]:
        """The low-rank gradient; at steps 0, T, 2T, … it is that gradient's own subspace from then on."""
        if not self.bases or step % self._group["update_proj_gap"] == 0:
            self.bases = {side: basis.to(grad.dtype) for side, basis in leading_subspace(grad, self._group).items()}
        return project(grad, self.bases)

    @torch.no_grad()
    def project_back(self, low_rank: Float[Tensor, "a b"]) -> Float[Tensor, "m n"]:
        """scale · P N, N Q or P N Q.

        Raises:
            ValueError: nothing has been projected yet.
        """
        require(bool(self.bases), "low_rank", tuple(low_rank.shape), "given after a first gradient was projected")
        scale: float = self._group["scale"]
        return project_back(low_rank, self.bases) * scale


def galore_param_groups(
    model: nn.Module,
    rank: int | float | None = None,
    targets: str | type[nn.Module] | Sequence[str | type[nn.Module]] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for `GaLoreAdamW`: the trainable parameters of a model, split in those to project and others.

    Args:
        model: its parameters keep their order in each group.
        rank: of the group to project; None leaves it to the optimizer's own argument.
        targets: which matrices are projected: those whose name a regular expression is found in, or that a module of a
            type owns itself. By default the weights of all `nn.Linear` but the last one, taken to be the output layer,
            and those shared with an embedding. In a model with the names of LLaMA's these are the same as the authors'
            ("attn", "mlp").

    Returns:
        A group with rank=None and one to project; a group without parameters is left out.

    Raises:
        ValueError: no parameter fits the targets.
    """
    groups = frugal_param_groups(model, targets)
    chosen = {id(p) for group in groups if group["projectable"] for p in group["params"] if p.ndim == 2}
    params = [p for p in model.parameters() if p.requires_grad]
    others: dict[str, Any] = {"params": [p for p in params if id(p) not in chosen], "rank": None}
    projected: dict[str, Any] = {"params": [p for p in params if id(p) in chosen]}
    if rank is not None:
        projected["rank"] = rank
    return [group for group in (others, projected) if group["params"]]
