"""GradNormLoRP: weight normalisation with low-rank gradients (Huang et al. 2024, arXiv:2412.19616).

The authors' code has two forms of it, and both are here.

`WeightNormGaLoreAdamW` trains full matrices (theirs for fine-tuning). A weight W (m, n) is split into the direction of
its rows, v (m, n), and their lengths g (m, 1), at first W and its row norms. With v̂ = v / ‖v‖ by rows, the gradients at
W = g v̂ are

    ∇g = Σ_row ∇W ⊙ v̂,    ∇v = (g / ‖v‖) (∇W - ∇g v̂)

∇v goes through GaLore (see there) and ∇g through plain Adam, with one count of steps; both decay, and W is g v̂ again.
Rows are outputs: what the literature calls columns is meant for the transposed matrix. Of v only the row norms are
kept, as v = W ‖v‖ / g; a stored v would eat most of what the projection saves. So the state has 2 r max(m, n) numbers
for the moments, r min(m, n) for the subspace, and 4 m for ‖v‖, g and the moments of g, against AdamW's 2 m n. A row
that is 0 has no direction, and stays 0.

`gradnorm_lorp_model` trains adapters (theirs for pre-training): DoRA, W = m ⊙ (W₀ + s B A) / ‖W₀ + s B A‖ by rows with
s = alpha / r, by `peft`, whose matrices A and B are given to `GaLoreAdamW`.

The paper's equations were not at hand; what is here is the mathematics of the authors' code. Their optimizer departs
from it in two ways, which `reference=True` repeats for comparisons: at the start of every step it sets g to ‖v‖ and so
forgets the step that g has learnt, and it leaves the radial part in ∇v, which is then ∇W. Theirs also normalises
one-dimensional parameters, each as one row; here they are for a group of their own. In their pre-training script the
gradients' rank is 128 with adapters of rank 8, where a projection only rotates; here it has to be below the adapters'.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fairtrial.methods.arguments import require
from fairtrial.methods.optimizers.galore import GaLoreAdamW, State, adamw_, galore_param_groups, in_a_task
from fairtrial.methods.optimizers.torch_contract import scalars
from fairtrial.methods.registry import LogUniform, method

SHORTEST = 1e-12  # a row's norm as a divisor


@method(
    paper="gradnorm_lorp",
    slot="optimizer",
    search={"lr": LogUniform(1e-4, 1e-1)},
    bind=in_a_task,
)
class WeightNormGaLoreAdamW(GaLoreAdamW):
    """AdamW on the directions and lengths of a matrix's rows, on the directions in a leading subspace.

    Args:
        params: parameters or parameter groups, real and dense; all parameters of a group with `rank` or
            `weight_norm=True` are matrices. `galore_param_groups` makes them. All arguments can be set for each group.
        lr, betas, eps, weight_decay, correct_bias: as in `GaLoreAdamW`; the authors' lr for fine-tuning is 3e-5.
        rank: dimension of the directions' subspace, or a share of the shorter side within (0, 1); None projects
            nothing. The authors' for fine-tuning is 4 or 8.
        update_proj_gap, proj_type, fix_signs, maximize, foreach: as in `GaLoreAdamW`.
        scale: multiplies the projected update; the authors' for fine-tuning is 4.
        weight_norm: split the weights of a group without rank as well; a group with one always is.
        reference: repeat the authors' code in what departs from the mathematics, to compare with it.

    The defaults are the authors'.

    Raises:
        ValueError: an argument lies outside its range, a parameter of a group that is split is not a matrix, or a
            loaded state does not fit the parameters.
        RuntimeError: a gradient is sparse or complex.

    Warns:
        UserWarning: a rank exceeds the shorter side of a matrix.
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
        scale: float = 1.0,
        proj_type: str = "std",
        fix_signs: bool = False,
        weight_norm: bool = False,
        reference: bool = False,
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
            "weight_norm": weight_norm,
            "reference": reference,
            "maximize": maximize,
            "foreach": foreach,
        }
        Optimizer.__init__(self, params, defaults)

    def _check_shapes(self, group: Mapping[str, Any]) -> None:
        if is_split(group):
            for p in group["params"]:
                require(p.ndim == 2, "params", tuple(p.shape), "matrices in a group with rank or weight_norm")

    @staticmethod
    def state_shapes(group: Mapping[str, Any], p: Tensor, saved: Mapping[str, Tensor]) -> dict[str, Sequence[int]]:
        """GaLore's, with g, its moments and ‖v‖ by rows."""
        shapes = GaLoreAdamW.state_shapes(group, p, saved)
        if is_split(group):
            shapes |= dict.fromkeys(("g", "v_norm", "g_exp_avg", "g_exp_avg_sq"), (p.shape[0], 1))
        return shapes

    def _new_state(self, group: Mapping[str, Any], p: Tensor, grad: Tensor) -> State:
        state = super()._new_state(group, p, grad)
        if is_split(group):
            norms = row_norms(p)
            zeros = torch.zeros_like(norms)
            state |= {"g": norms, "v_norm": norms.clone(), "g_exp_avg": zeros, "g_exp_avg_sq": zeros.clone()}
        return state

    def _renewed(self, group: Mapping[str, Any], p: Tensor, grad: Tensor, state: State) -> State:
        return super()._renewed(group, p, split(p, grad, state, group["reference"]).grad_v, state)

    def _update(
        self, group: dict[str, Any], rates: Tensor, params: list[Tensor], grads: list[Tensor], states: list[State]
    ) -> None:
        if not is_split(group):
            super()._update(group, rates, params, grads, states)
            return
        *sizes, decay = scalars(rates)
        parts = [split(*found, group["reference"]) for found in zip(params, grads, states, strict=True)]
        bases = None
        if group["rank"] is not None:
            bases = [self._bases(group, state, p) for p, state in zip(params, states, strict=True)]
        directions, lengths = [part.v for part in parts], [part.g for part in parts]
        adamw_(group, sizes, decay, directions, [part.grad_v for part in parts], states, bases)
        adamw_(group, sizes, decay, lengths, [part.grad_g for part in parts], states, None, prefix="g_")
        for p, v, g, state in zip(params, directions, lengths, states, strict=True):
            norms = row_norms(v)
            torch.mul(v, g / norms.clamp(min=SHORTEST), out=p)
            state["g"].copy_(g)
            state["v_norm"].copy_(norms)


class Split(NamedTuple):
    """A weight's directions and lengths by rows, as tensors that a step may change, and their gradients."""

    v: Float[Tensor, "m n"]
    g: Float[Tensor, "m 1"]
    grad_v: Float[Tensor, "m n"]
    grad_g: Float[Tensor, "m 1"]


def split(weight: Float[Tensor, "m n"], grad: Float[Tensor, "m n"], state: State, reference: bool) -> Split:
    """Directions, lengths and their gradients, given the gradient of the weight."""
    g, norms = state["g"], state["v_norm"]
    v = weight * torch.where(g == 0, 0.0, norms / g)
    norms = row_norms(v).clamp(min=SHORTEST)
    unit = v / norms
    grad_g = (grad * unit).sum(1, keepdim=True)
    if reference:
        return Split(v, row_norms(v), grad, grad_g)
    return Split(v, g.clone(), (grad - grad_g * unit).mul_(g / norms), grad_g)


def row_norms(weight: Float[Tensor, "m n"]) -> Float[Tensor, "m 1"]:
    wide = torch.promote_types(weight.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(weight, dim=1, keepdim=True, dtype=wide)
    return norms.to(weight.dtype)


def is_split(group: Mapping[str, Any]) -> bool:
    """Whether the weights of the group are split into directions and lengths."""
    return bool(group["weight_norm"] or group["rank"] is not None)


def gradnorm_lorp_model(
    model: nn.Module,
    r: int = 8,
    alpha: int = 16,
    dropout: float = 0.1,
    targets: Sequence[str] | None = None,
    *,
    rank: int = 4,
    modules_to_save: Sequence[str] = (),
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A model with DoRA adapters, which alone are trained, and their parameter groups for `GaLoreAdamW`.

    The adapters' matrices A and B have low-rank gradients, their lengths m plain AdamW. The model computes what it did
    before until it is trained. `merge_and_unload()` gives a model without adapters.

    Args:
        model: gets its adapters in place.
        r, alpha, dropout: of the adapters; the defaults are the authors'.
        targets: names of the linear layers that get adapters, or the ends of their names; by default all but the last
            one, taken to be the output layer.
        rank: of the gradients of A and B, at least 1 and below r.
        modules_to_save: names of modules that are trained in full, as a new output layer.

    Returns:
        A `peft.PeftModel`, and the groups.

    Raises:
        ValueError: the rank lies outside its range.
        ImportError: `peft` is not installed.
    """
    require(r >= 2, "r", r, "at least 2")
    require(isinstance(rank, int) and 1 <= rank < r, "rank", rank, f"a whole number from 1 to {r - 1}, below r")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("adapters need the package peft: pip install 'fairtrial[adapters]'") from error
    if targets is None:
        chosen = {id(p) for group in galore_param_groups(model) if "rank" not in group for p in group["params"]}
        linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        targets = [name for name, module in linears if id(module.weight) in chosen]
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(targets),
        modules_to_save=list(modules_to_save) or None,
        use_dora=True,
    )
    adapted = get_peft_model(model, config)
    return adapted, galore_param_groups(adapted, rank, r"\.lora_[AB]\.")
