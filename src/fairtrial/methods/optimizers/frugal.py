"""FRUGAL: Adam on a small part of every gradient, signSGD on the rest (Zmushko et al. 2024, arXiv:2411.07837).

A projection P splits the gradient of a weight in two (Algorithm 1). The state-full part goes through AdamW, whose
moments are as small as that part; the complement is followed without any state, so that the update has full rank:

    g_full = P(g),    r = g - P⁻¹(g_full)
    W ← W (1 - lr · weight_decay) - q lr (P⁻¹(m̂ / (√v̂ + eps)) + s sign(r))

with q = `proj_lr_scale` and s = `state_free_lr_scale`. Every `update_gap` steps P is drawn anew, before the update and,
for 'svd', from the gradient of that step; moments and bias correction start again. `density` is the share of the space
that P keeps, and so the share of AdamW's memory that remains. The projections:

- 'block': whole tensors, round(density · K) of the K in the group; the authors' choice for pre-training;
- 'columns', 'rows', 'randk': ⌊density · N⌋ of the columns, the rows, or the single entries of a matrix;
- 'svd', 'random': the leading singular directions, as in GaLore, or a random subspace, of dimension
  round(density · min(m, n)), on the shorter side.

Only groups marked `projectable` are treated so, all others get AdamW: embeddings, norms and the output layer need it.
`frugal_param_groups` makes the groups. GaLore is projection='svd', state_free='none', reset_state=False; BAdam is close
to projection='block', state_free='none'.

Two differences from the authors' code. The residual of 'svd' and 'random' is round-off wherever the gradient lies in
the subspace, and its sign would move those weights by a full step: entries up to `dead_zone` · max|g| count as zero,
and dead_zone = 0 gives the authors' rule. Their singular vectors are always float32, these are float64 for float64
weights. `block_order` is random by default as in the authors' optimizer; their pre-training script goes 'descending'.
"""

import re
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
from fairtrial.methods.optimizers.adam import adam_direction, adam_state, adam_state_shapes, check_adam
from fairtrial.methods.optimizers.torch_contract import (
    batches,
    check_state,
    descend_,
    evaluate,
    scalars,
    with_gradient,
)
from fairtrial.methods.registry import LogUniform, method

COORDINATES = ("columns", "rows", "randk")
PROJECTIONS = ("block", *COORDINATES, "svd", "random")
BLOCK_ORDERS = ("random", "ascending", "descending", "mirror")
STATE_FREE = ("sign", "sgd", "none")


@method(
    paper="frugal",
    slot="optimizer",
    search={"lr": LogUniform(1e-4, 1e-1), "state_free_lr_scale": LogUniform(0.05, 1.0)},
    bind=lambda setting: {
        "params": frugal_param_groups(setting.model),
        "projection": "columns",  # a small network has too few tensors for blocks
        "generator": setting.generator,
    },
)
class FRUGAL(Optimizer):
    """AdamW on a part of the gradient of projectable weights, a stateless rule on the rest; plain AdamW elsewhere.

    Args:
        params: parameter groups, real and dense; those with `projectable=True` are split. `frugal_param_groups` makes
            them. All arguments but `generator` can be set for each group.
        lr: learning rate, at least 0; AdamW's is a good one.
        betas, eps, weight_decay: AdamW's, for both parts. The decay is scaled by lr alone.
        density: share ρ of the space that keeps a state, within [0, 1].
        update_gap: steps T from one drawing of the split to the next.
        projection: 'block', 'columns', 'rows', 'randk', 'svd' or 'random'.
        block_order: which tensors of the group are next with 'block': 'random'; 'ascending' or 'descending', the next
            ones from the front or the back; 'mirror', half of them from either end.
        state_free: the rule for the rest: 'sign', 'sgd' or 'none'.
        state_free_lr_scale: s, relative to the rate of the state-full part. 1 for pre-training, 0.1 for fine-tuning.
        proj_lr_scale: q, the rate of projectable weights relative to lr.
        reset_state: start moments and bias correction anew with every split; blocks always do.
        dead_zone: for 'svd' and 'random' with 'sign': residuals up to this share of the largest |g| count as 0. By
            default 64 times the machine epsilon of the weight's dtype, or of float32 for half precision.
        generator: what splits are drawn from; by default a private one with seed 0. Its state is part of the state
            dict, and loading one sets it.
        maximize: ascend instead of descend.
        foreach: handle all tensors of a device and dtype together; `False` goes through them one by one with the same
            result and less memory.

    The defaults are those of the authors' pre-training. At ρ = 0.25 a group of one or two tensors has no active block
    and so no state at all; 'columns', the authors' choice for fine-tuning, divides more finely.

    Raises:
        ValueError: an argument lies outside its range; a projectable parameter is not a matrix though 'columns',
            'rows', 'svd' and 'random' need one; 'mirror' would have an odd number of active blocks; or a loaded state
            does not fit the parameters.
        RuntimeError: a gradient is sparse or complex.

    Warns:
        UserWarning: no group is projectable, which leaves AdamW.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        density: float = 0.25,
        update_gap: int = 200,
        projection: str = "block",
        block_order: str = "random",
        state_free: str = "sign",
        state_free_lr_scale: float = 1.0,
        proj_lr_scale: float = 1.0,
        reset_state: bool = True,
        dead_zone: float | None = None,
        generator: torch.Generator | None = None,
        maximize: bool = False,
        foreach: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "projectable": False,
            "density": density,
            "update_gap": update_gap,
            "projection": projection,
            "block_order": block_order,
            "state_free": state_free,
            "state_free_lr_scale": state_free_lr_scale,
            "proj_lr_scale": proj_lr_scale,
            "reset_state": reset_state,
            "dead_zone": dead_zone,
            "maximize": maximize,
            "foreach": foreach,
            "steps": 0,
            "cursor": 0,
        }
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator
        super().__init__(params, defaults)
        if not any(group["projectable"] for group in self.param_groups):
            warnings.warn("no parameter group is projectable, so this is AdamW: see frugal_param_groups", stacklevel=2)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        check_frugal(self.defaults | param_group)
        super().add_param_group(param_group)
        try:
            check_projectable(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"generator": self.generator}

    def __setstate__(self, state: dict[str, Any]) -> None:
        check_state(self, state, frugal_state_shapes)
        super().__setstate__(state)

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict, and under 'generator' the state of the generator."""
        return super().state_dict() | {"generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state dict: the same splits now, and the same drawings of new ones later."""
        require("generator" in state_dict, "state_dict", sorted(state_dict), "of FRUGAL, with the key 'generator'")
        saved = [state_dict["state"].get(i, {}) for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        bases = {p: state.get("basis") for p, state in zip(params, saved, strict=False)}
        bases = {p: basis for p, basis in bases.items() if isinstance(basis, Tensor)}
        for p, basis in bases.items():
            fits = basis.is_floating_point() or basis.numel() == 0 or int(basis.max()) < p.numel()
            require(fits, "state_dict", basis, f"indices into a parameter of shape {tuple(p.shape)}")
        super().load_state_dict(state_dict)
        # torch has cast them to the dtypes of the parameters, but indices and float32 bases must stay what they are
        for p, basis in bases.items():
            self.state[p]["basis"] = basis.to(p.device)
        self.generator.set_state(state_dict["generator"].cpu())

    @_disable_dynamo
    def _gather(self) -> list[tuple[dict[str, Any], Tensor, tuple[list[Tensor], ...]]]:
        """Draw the splits that are due, and return batches: the group, its rate and decay, (params, grads, *state)."""
        gathered: list[tuple[dict[str, Any], Tensor, tuple[list[Tensor], ...]]] = []
        for group, (params, grads) in zip(self.param_groups, with_gradient(self), strict=True):
            lr, decay = float(group["lr"]), float(group["lr"]) * group["weight_decay"]
            scale = group["proj_lr_scale"] if group["projectable"] else 1.0
            if group["projectable"] and params:
                self._draw(group, params, grads)
            elif not group["projectable"]:
                for p in params:
                    self.state[p] = self.state.get(p) or adam_state(p)
            moments = ("exp_avg", "exp_avg_sq", "step", *(("basis",) if is_split(group) else ()))
            for has_state, names, s in ((True, moments, 1.0), (False, (), group["state_free_lr_scale"])):
                rates = torch.tensor([scale * s * lr, decay], dtype=torch.float64)
                pairs = [(p, g) for p, g in zip(params, grads, strict=True) if bool(self.state.get(p)) == has_state]
                lists = [[p for p, _ in pairs], [g for _, g in pairs]]
                lists += [[self.state[p][name] for p, _ in pairs] for name in names]
                gathered += [(group, rates, batch) for batch in batches(*lists, foreach=group["foreach"])]
        return gathered

    def _draw(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """Give the parameters of a projectable group their split where it is due, or where they have none yet."""
        due = group["steps"] % group["update_gap"] == 0
        if is_split(group):
            drawn = [
                (p, g, self._basis(g, group))
                for p, g in zip(params, grads, strict=True)
                if due or not self.state.get(p)
            ]
            for p, grad, basis in drawn:
                state, part = self.state.get(p), project(grad, basis, group).to(p.dtype)
                if group["reset_state"] or not state or state["exp_avg"].shape != part.shape:
                    state = adam_state(part)
                self.state[p] = state | {"basis": basis}
        elif due:
            active = set(self._active_blocks(group))
            for i, p in enumerate(group["params"]):
                self.state.pop(p, None)
                if i in active:
                    self.state[p] = adam_state(p)
        group["steps"] += 1

    def _active_blocks(self, group: dict[str, Any]) -> list[int]:
        """Positions in the group of the tensors that get a state now; moves the group's cursor."""
        total, order = len(group["params"]), group["block_order"]
        count = num_active_blocks(group)
        if order == "random":
            return self._choice(total, count).tolist()
        ring, taken = (max(total // 2, 1), count // 2) if order == "mirror" else (total, count)
        ahead = [(group["cursor"] + i) % ring for i in range(taken)]
        group["cursor"] = (group["cursor"] + taken) % ring
        behind = [total - 1 - i for i in ahead]
        return {"ascending": ahead, "descending": behind, "mirror": ahead + behind}[order]

    def _basis(self, grad: Tensor, group: Mapping[str, Any]) -> Tensor:
        """What the split of a gradient is described by: indices (k,), or orthonormal columns (min(m, n), rank)."""
        projection, density = group["projection"], group["density"]
        if projection in COORDINATES:
            total = {"columns": grad.shape[-1:], "rows": grad.shape[:1], "randk": grad.shape}[projection].numel()
            return self._choice(total, int(total * density)).to(grad.device)
        dtype = torch.promote_types(grad.dtype, torch.float32)
        m, n = grad.shape
        rank = round(min(m, n) * density)
        if projection == "svd":
            U, _, Vh = torch.linalg.svd(grad.to(dtype), full_matrices=False)
            leading: Tensor = Vh[:rank].T if m >= n else U[:, :rank]
            return leading.clone(memory_format=torch.contiguous_format)
        basis = torch.empty(min(m, n), rank, dtype=dtype, device=self.generator.device)
        return nn.init.orthogonal_(basis, generator=self.generator).to(grad.device)

    def _choice(self, total: int, count: int) -> Tensor:
        return torch.randperm(total, generator=self.generator, device=self.generator.device)[:count].clone()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters by their gradients; returns the loss of `closure`, called with gradients enabled."""
        loss = evaluate(closure)
        for group, rates, (params, grads, *state) in self._gather():
            lr, decay = scalars(rates)
            if group["maximize"]:
                grads = list(torch._foreach_neg(grads))
            updates = frugal_updates(group, grads, *state)
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - decay)
            descend_(params, updates, lr)
        return loss


def frugal_updates(
    group: Mapping[str, Any],
    grads: list[Tensor],
    exp_avgs: list[Tensor] | None = None,
    exp_avg_sqs: list[Tensor] | None = None,
    steps: list[Tensor] | None = None,
    bases: list[Tensor] | None = None,
) -> list[Tensor]:
    """The stateless rule for tensors without moments, AdamW for those without a basis, and both for split ones."""
    if exp_avgs is None or exp_avg_sqs is None or steps is None:
        return state_free_updates(grads, group["state_free"])
    adam = {"betas": group["betas"], "eps": group["eps"]}
    if bases is None:
        return adam_direction(grads, exp_avgs, exp_avg_sqs, steps, **adam)
    parts = [project(grad, basis, group) for grad, basis in zip(grads, bases, strict=True)]
    residuals = [residual(g, part, basis, group) for g, part, basis in zip(grads, parts, bases, strict=True)]
    parts = [part.to(m.dtype) for part, m in zip(parts, exp_avgs, strict=True)]
    directions = adam_direction(parts, exp_avgs, exp_avg_sqs, steps, **adam)
    updates = state_free_updates(residuals, group["state_free"])
    torch._foreach_mul_(updates, float(group["state_free_lr_scale"]))
    return [
        put_back_(update, direction, basis, group).to(grad.dtype)
        for update, direction, basis, grad in zip(updates, directions, bases, grads, strict=True)
    ]


def state_free_updates(residuals: list[Tensor], rule: str) -> list[Tensor]:
    """The direction of the stateless rule, as new tensors; sign(0) = 0."""
    if rule == "none":
        return [torch.zeros_like(r) for r in residuals]
    return list(torch._foreach_sign(residuals)) if rule == "sign" else [r.clone() for r in residuals]


def project(grad: Tensor, basis: Tensor, group: Mapping[str, Any]) -> Tensor:
    """P(g): (m, k) for columns, (k, n) for rows, (k,) for entries; (m, rank) or (rank, n) in a subspace."""
    if group["projection"] == "columns":
        return grad.index_select(1, basis)
    if group["projection"] == "rows":
        return grad.index_select(0, basis)
    if group["projection"] == "randk":
        return grad.flatten().index_select(0, basis)
    grad = grad.to(basis.dtype)
    return grad @ basis if grad.shape[0] >= grad.shape[1] else basis.T @ grad


def residual(
    grad: Float[Tensor, "*shape"], part: Tensor, basis: Tensor, group: Mapping[str, Any]
) -> Float[Tensor, "*shape"]:
    """g - P⁻¹(part) for part = P(g); with coordinates simply g, as `put_back_` replaces what P has taken."""
    if group["projection"] in COORDINATES:
        return grad
    lifted = part @ basis.T if grad.shape[0] >= grad.shape[1] else basis @ part
    rest = grad.to(basis.dtype) - lifted
    dead_zone = 64 * torch.finfo(basis.dtype).eps if group["dead_zone"] is None else group["dead_zone"]
    return rest.masked_fill_(rest.abs() <= dead_zone * grad.abs().amax(), 0.0)


def put_back_(
    update: Float[Tensor, "*shape"], direction: Tensor, basis: Tensor, group: Mapping[str, Any]
) -> Float[Tensor, "*shape"]:
    """Add P⁻¹(direction) to the update of the residual, in place."""
    if group["projection"] == "columns":
        return update.scatter_(1, basis.expand(len(update), -1), direction)  # on a CPU faster than index_copy_
    if group["projection"] == "rows":
        return update.index_copy_(0, basis, direction)
    if group["projection"] == "randk":
        return update.flatten().index_copy_(0, basis, direction).view(update.shape)
    direction = direction.to(basis.dtype)
    if update.shape[0] >= update.shape[1]:
        return update.addmm_(direction, basis.T)
    return update.addmm_(basis, direction)


def is_split(group: Mapping[str, Any]) -> bool:
    """Whether single tensors of the group are split, rather than none, or the group into whole tensors."""
    return bool(group["projectable"] and group["projection"] != "block")


def num_active_blocks(group: Mapping[str, Any]) -> int:
    density: float = group["density"]
    return round(len(group["params"]) * density)


def frugal_state_shapes(group: Mapping[str, Any], p: Tensor, saved: Mapping[str, Tensor]) -> dict[str, Sequence[int]]:
    """As `adam_state_shapes`; with a split the size of its basis decides, which a later `density` may not fit."""
    if not is_split(group):
        return adam_state_shapes(group, p, saved)
    k = saved["basis"].shape[-1] if "basis" in saved else 0
    if group["projection"] == "randk":
        part: tuple[int, ...] = (k,)
    elif group["projection"] == "columns" or (group["projection"] != "rows" and p.shape[0] >= p.shape[1]):
        part = (p.shape[0], k)
    else:
        part = (k, p.shape[1])
    basis = (k,) if group["projection"] in COORDINATES else (min(p.shape), k)
    return {"step": (), "exp_avg": part, "exp_avg_sq": part, "basis": basis}


def check_frugal(group: Mapping[str, Any]) -> None:
    """Refuse a parameter group with a hyperparameter outside its range."""
    check_adam(group)
    require(0 <= group["density"] <= 1, "density", group["density"], "within [0, 1]")
    gap = group["update_gap"]
    require(isinstance(gap, int) and gap >= 1, "update_gap", gap, "a whole number of at least 1")
    for name, accepted in (("projection", PROJECTIONS), ("block_order", BLOCK_ORDERS), ("state_free", STATE_FREE)):
        require(group[name] in accepted, name, group[name], f"one of {', '.join(accepted)}")
    for name in ("state_free_lr_scale", "proj_lr_scale"):
        require(0 <= group[name] < float("inf"), name, group[name], "at least 0 and finite")
    require(group["dead_zone"] is None or group["dead_zone"] >= 0, "dead_zone", group["dead_zone"], "at least 0")


def check_projectable(group: Mapping[str, Any]) -> None:
    """Refuse a projectable group whose parameters its projection cannot split."""
    if is_split(group) and group["projection"] != "randk":
        for p in group["params"]:
            require(p.ndim == 2, "params", tuple(p.shape), f"matrices where projection is {group['projection']!r}")
    if group["projectable"] and group["projection"] == "block" and group["block_order"] == "mirror":
        active = num_active_blocks(group)
        expected = "such that 'mirror' has an even number of active blocks"
        require(active % 2 == 0, "density", f"{group['density']}, for {active} active blocks", expected)


def frugal_param_groups(
    model: nn.Module, targets: str | type[nn.Module] | Sequence[str | type[nn.Module]] | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for `FRUGAL`: the trainable parameters of a model, split in projectable ones and others.

    Args:
        model: its parameters keep their order in each group.
        targets: which parameters of two or more dimensions are projectable: those whose name a regular expression is
            found in, or that a module of a type owns itself. By default, after the paper, the weights of all
            `nn.Linear` but the last one, taken to be the output layer, and those shared with an embedding.

    Returns:
        One group with projectable=False and one with projectable=True; a group without parameters is left out.

    Raises:
        ValueError: no parameter fits the targets.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if targets is None:
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
        kept = {id(module.weight) for module in [*linears[-1:], *embeddings]}
        projectable = {id(module.weight) for module in linears} - kept
    else:
        several = [targets] if isinstance(targets, str | type) else targets
        patterns, types = [t for t in several if isinstance(t, str)], tuple(t for t in several if isinstance(t, type))
        found = [p for name, p in named.items() if any(re.search(pattern, name) for pattern in patterns)]
        owned = [p for m in model.modules() if isinstance(m, types) for p in m.parameters(recurse=False)]
        projectable = {id(p) for p in [*found, *owned] if p.ndim >= 2}
        fits = any(id(p) in projectable for p in named.values())
        require(fits, "targets", targets, "a pattern or module type that some trainable matrix of the model fits")
    groups = [
        {"params": [p for p in named.values() if (id(p) in projectable) == wanted], "projectable": wanted}
        for wanted in (False, True)
    ]
    return [group for group in groups if group["params"]]
