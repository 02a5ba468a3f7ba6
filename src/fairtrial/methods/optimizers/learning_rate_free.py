"""Optimizers that find their own learning rate, as the hyperparameter-free study compares them (arXiv:2505.24005).

Kasimbeg et al. (2025) give every optimizer a single configuration for all workloads. Here are the two methods of their
field that take a few lines; the way of scoring stands in `time_to_target`. `lr` is in both the multiplier of the rate
that they find, 1 by default, and what a schedule moves.

DoG, distance over gradients (Ivgi et al. 2023, arXiv:2302.12022), for parameters θ that start at θ_0:

    r̄_t = max(r_ε, max_{i ≤ t} ‖θ_i - θ_0‖),    G_t = Σ_{i ≤ t} ‖g_i‖²,    r_ε = reps_rel (1 + ‖θ_0‖)
    θ_{t+1} = θ_t - lr r̄_t / √(G_t + eps) g_t

The norms are those of all parameters together, as in the paper and in optax; the authors' code has one for each
parameter group. With `per_tensor` every tensor has its own, which is their L-DoG. They advise to evaluate an average of
the iterates, `polynomial_average`, or else to let the rate decay.

Prodigy (Mishchenko and Defazio 2023, arXiv:2306.06101, Algorithm 4), with η = lr d c, where c is 1 or Adam's bias
correction √(1 - β2^k) / (1 - β1^k), and with an estimate d of ‖θ_0 - θ*‖_∞ that starts at d0 and never shrinks:

    num ← β3 num + d η / d0 ⟨g, θ_0 - θ⟩,    s ← β3 s + d η / d0 g
    m ← β1 m + (1 - β1) d g,    v ← β2 v + (1 - β2) d² g²
    d' = max(d, d_coef num / ‖s‖_1)
    θ ← (1 - weight_decay η) θ - η m / (√v + d' eps)

so that a step still has the old d in η, and the new one besides eps. The bias correction is off by default as in the
authors' code; optax always has it. They let the groups' rates differ in being 0 only, and neither moves a tensor nor
its decay where all gradients are 0. Here a group has any rate of its own in η, and a decay of its own always.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fairtrial.methods.arguments import require
from fairtrial.methods.optimizers.adam import adam_state, adam_state_shapes, bias_corrections, check_adam
from fairtrial.methods.optimizers.pieces import dots as inner_products
from fairtrial.methods.optimizers.pieces import pieces
from fairtrial.methods.optimizers.torch_contract import batches, check_rates, check_state, evaluate, with_gradient
from fairtrial.methods.registry import LogUniform, method


class _OneEstimate(Optimizer):
    """Keeps numbers of shape () in the state of every tensor, at single precision at least."""

    numbers: tuple[str, ...]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state dict."""
        saved = [state_dict["state"].get(i, {}) for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        super().load_state_dict(state_dict)
        # torch has cast the numbers to the dtypes of the parameters, in which half a precision is lost
        for p, state in zip(params, saved, strict=True):
            for name in self.numbers if state else ():
                self.state[p][name] = state[name].to(p.device, copy=True)

    def _known(self, group: Mapping[str, Any]) -> list[Tensor]:
        """The parameters of a group that have had a gradient."""
        return [p for p in group["params"] if self.state.get(p)]


@method(paper="learning_rate_free", slot="optimizer", search={"lr": LogUniform(0.2, 5.0)})
class Prodigy(_OneEstimate):
    """Adam whose rate is an estimate, from the gradients so far, of how far away the solution is.

    The estimate is one for all parameter groups. A gradient that is not finite holds it where it is from then on.

    Args:
        params: parameters or parameter groups, real and dense.
        lr: multiplier of the estimated rate, at least 0; the authors advise a schedule from 1 to 0 and no other value.
        betas: decay rates of the two moments, each within [0, 1).
        beta3: decay rate of the estimate's sums, within [0, 1); √β2 if None.
        eps: added to √v after multiplication by d, at least 0.
        weight_decay: decoupled decay, at least 0, multiplied by η like the step: one that suits AdamW with its rate of
            1e-3 need not suit here.
        d0: the first estimate, above 0 and smaller than the truth.
        d_coef: multiplies the estimate, above 0.
        use_bias_correction: Adam's, in η. It counts the steps of the tensor that has had most of them.
        safeguard_warmup: d in place of η in s, so that the low rates of a warm-up leave the estimate alone.
        maximize: ascend instead of descend.
        foreach: handle all tensors of a device and dtype together; `False` goes through them one by one with the same
            result and less memory.

    The defaults are the authors'.

    Raises:
        ValueError: an argument lies outside its range, or a loaded state does not fit the parameters.
        RuntimeError: a gradient is sparse or complex, or a parameter is a DTensor.
    """

    numbers = ("d", "numerator")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        maximize: bool = False,
        foreach: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "beta3": beta3,
            "eps": eps,
            "weight_decay": weight_decay,
            "d0": d0,
            "d_coef": d_coef,
            "use_bias_correction": use_bias_correction,
            "safeguard_warmup": safeguard_warmup,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = self.defaults | param_group
        check_adam(group)
        beta3 = group["beta3"]
        require(beta3 is None or 0 <= beta3 < 1, "beta3", beta3, "None or within [0, 1)")
        for name in ("d0", "d_coef"):
            require(0 < group[name] < math.inf, name, group[name], "above 0 and finite")
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        check_state(self, state, prodigy_state_shapes)
        super().__setstate__(state)

    @_disable_dynamo
    def _gather(self) -> tuple[list[tuple[dict[str, Any], Tensor, tuple[list[Tensor], ...]]], list[Tensor], Tensor]:
        """Batches: the group, its rate, (params, grads, *state); the estimates; and the number of this step."""
        pairs = with_gradient(self)
        for group, (params, _) in zip(self.param_groups, pairs, strict=True):
            for p in params:
                if not self.state[p]:
                    self.state[p] = adam_state(p) | {
                        "initial": p.detach().clone(memory_format=torch.preserve_format),
                        "grad_sum": torch.zeros_like(p, memory_format=torch.preserve_format),
                        "d": number(group["d0"], p),
                        "numerator": number(0.0, p),
                    }
        gathered = []
        for group, (params, grads) in zip(self.param_groups, pairs, strict=True):
            names = ("exp_avg", "exp_avg_sq", "grad_sum", "initial", "numerator")
            lists = [[self.state[p][name] for p in params] for name in names]
            rate = torch.tensor(float(group["lr"]), dtype=torch.float64)
            for batch in batches(params, grads, *lists, foreach=group["foreach"]):
                gathered += [(group, rate, piece) for piece in pieces(batch)]
        for step in [self.state[p]["step"] for params, _ in pairs for p in params]:
            step += 1
        known = [self.state[p] for group in self.param_groups for p in self._known(group)]
        count = torch.stack([state["step"] for state in known]).amax() if known else torch.zeros(())
        return gathered, [state["d"] for state in known], count

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters by their gradients; returns the loss of `closure`, called with gradients enabled."""
        loss = evaluate(closure)
        gathered, estimates, count = self._gather()
        if not gathered:
            return loss
        d = total(estimates, torch.amax)
        etas = [rate.to(d) * d * correction(group, count).to(d) for group, rate, _ in gathered]
        dots: list[Tensor] = []
        lengths: list[Tensor] = []
        for (group, _, (params, grads, exp_avgs, exp_avg_sqs, sums, initials, numerators)), eta in zip(
            gathered, etas, strict=True
        ):
            beta1, beta2 = group["betas"]
            beta3 = math.sqrt(beta2) if group["beta3"] is None else group["beta3"]
            scaled = [
                x.to(params[0].dtype)  # those without dimensions have taken the dtype of d
                for x in torch._foreach_mul(grads, (-d if group["maximize"] else d).to(params[0].device))
            ]
            torch._foreach_lerp_(exp_avgs, scaled, 1 - beta1)
            torch._foreach_mul_(exp_avg_sqs, beta2)
            torch._foreach_addcmul_(exp_avg_sqs, scaled, scaled, 1 - beta2)
            weight = ((d if group["safeguard_warmup"] else eta) / group["d0"]).to(params[0].device)
            torch._foreach_mul_(sums, beta3)
            torch._foreach_add_(sums, torch._foreach_mul(scaled, weight))
            lengths += torch._foreach_norm(sums, 1, dtype=numerators[0].dtype)
            inner = inner_products(scaled, list(torch._foreach_sub(initials, params)), numerators[0].dtype)
            torch._foreach_mul_(numerators, beta3)
            torch._foreach_add_(numerators, torch._foreach_mul(inner, (eta / group["d0"]).to(params[0].device)))
            dots += torch._foreach_mul(numerators, group["d_coef"])
        # 0 / 0 before the first gradient that is not 0 is no estimate, and nor is anything that is not finite
        new = torch.fmax(d, (total(dots, torch.sum) / total(lengths, torch.sum)).nan_to_num(math.nan, math.nan))
        for (group, _, (params, _, exp_avgs, exp_avg_sqs, *_)), eta in zip(gathered, etas, strict=True):
            denominators = torch._foreach_sqrt(exp_avg_sqs)
            torch._foreach_add_(denominators, (new * group["eps"]).to(denominators[0]))
            torch._foreach_div_(denominators, (-eta).to(params[0].device))
            if group["weight_decay"]:
                torch._foreach_mul_(params, (1 - group["weight_decay"] * eta).to(params[0].device))
            torch._foreach_addcdiv_(params, exp_avgs, denominators)
        for estimate in estimates:
            estimate.copy_(new)
        return loss


def prodigy_state_shapes(group: Mapping[str, Any], p: Tensor, saved: Mapping[str, Tensor]) -> dict[str, Sequence[int]]:
    """Adam's state, θ_0, s, d and the share of a tensor in num."""
    return {**adam_state_shapes(group, p, saved), "initial": p.shape, "grad_sum": p.shape, "d": (), "numerator": ()}


def correction(group: Mapping[str, Any], count: Float[Tensor, ""]) -> Tensor:
    """c in step number `count`."""
    if not group["use_bias_correction"]:
        return torch.ones((), dtype=torch.float64)
    first, second = (
        torch.as_tensor(bias_corrections(beta, [count])[0], dtype=torch.float64) for beta in group["betas"]
    )
    return second.sqrt() / first


@method(paper="learning_rate_free", slot="optimizer", search={"lr": LogUniform(0.3, 3.0)})
class DoG(_OneEstimate):
    """SGD with a rate of the largest distance from the start over the root of all squared gradients' sum.

    Args:
        params: parameters or parameter groups, real and dense.
        lr: multiplier of the rate, at least 0; the authors advise against any but 1.
        reps_rel: r_ε relative to 1 + ‖θ_0‖, above 0; the authors advise 1e-4 before batch normalisation.
        weight_decay: coupled, at least 0: weight_decay · θ is added to the gradient.
        eps: added to G, at least 0.
        per_tensor: norms for each tensor instead of those of all tensors together, L-DoG. Otherwise a gradient that
            is not finite reaches all parameters.
        maximize: ascend instead of descend.
        foreach: handle all tensors of a device and dtype together; `False` goes through them one by one with the same
            result and less memory.

    The defaults are the authors'.

    Raises:
        ValueError: an argument lies outside its range, or a loaded state does not fit the parameters.
        RuntimeError: a gradient is sparse or complex, or a parameter is a DTensor.
    """

    numbers = ("distance", "sum")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        reps_rel: float = 1e-6,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        per_tensor: bool = False,
        *,
        maximize: bool = False,
        foreach: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "reps_rel": reps_rel,
            "weight_decay": weight_decay,
            "eps": eps,
            "per_tensor": per_tensor,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = self.defaults | param_group
        check_rates(group)
        require(0 < group["reps_rel"] < math.inf, "reps_rel", group["reps_rel"], "above 0 and finite")
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        check_state(self, state, lambda group, p, saved: {"initial": p.shape, "distance": (), "sum": ()})
        super().__setstate__(state)

    @_disable_dynamo
    def _gather(self) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
        """Batches of all that has ever had a gradient: the group, (params, θ_0, r̄, G); and of what has one: the group,
        its rate, (params, grads, G)."""
        pairs = with_gradient(self)
        new = [(group, p) for group, (params, _) in zip(self.param_groups, pairs, strict=True) for p in params]
        new = [(group, p) for group, p in new if not self.state[p]]
        for _, p in new:
            self.state[p] = {
                "initial": p.detach().clone(memory_format=torch.preserve_format),
                "distance": number(0.0, p),
                "sum": number(0.0, p),
            }
        known, gathered = [], []
        for group, (params, grads) in zip(self.param_groups, pairs, strict=True):
            found = self._known(group)
            lists = [[self.state[p][name] for p in found] for name in ("initial", "distance", "sum")]
            known += [(group, batch) for batch in batches(found, *lists, foreach=group["foreach"])]
            rate = torch.tensor(float(group["lr"]), dtype=torch.float64)
            sums = [self.state[p]["sum"] for p in params]
            gathered += [(group, rate, batch) for batch in batches(params, grads, sums, foreach=group["foreach"])]
        if new:
            lengths = [(group, norms(initials, distances)) for group, (_, initials, distances, _) in known]
            shared = [length for group, found in lengths if not group["per_tensor"] for length in found]
            whole = total(shared, torch.linalg.vector_norm) if shared else torch.zeros(())
            for group, p in new:
                start, distance = self.state[p]["initial"], self.state[p]["distance"]
                length = norms([start], [distance])[0] if group["per_tensor"] else whole
                distance.copy_(group["reps_rel"] * (1 + length))
        return known, gathered

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters by their gradients; returns the loss of `closure`, called with gradients enabled."""
        loss = evaluate(closure)
        known, gathered = self._gather()
        if not gathered:
            return loss
        directions = [
            torch._foreach_add(grads, params, alpha=-decay if group["maximize"] else decay) if decay else grads
            for group, _, (params, grads, _) in gathered
            for decay in [group["weight_decay"]]
        ]

        shared_gaps: list[Tensor] = []
        shared_distances: list[Tensor] = []
        shared_squares: list[Tensor] = []
        shared_sums: list[Tensor] = []
        for group, (params, initials, distances, sums) in known:
            gaps = norms(torch._foreach_sub(params, initials), distances)
            if group["per_tensor"]:
                torch._foreach_maximum_(distances, gaps)
            else:
                shared_gaps += gaps
                shared_distances += distances
                shared_sums += sums
        for (group, _, (_, _, sums)), gradients in zip(gathered, directions, strict=True):
            squares = torch._foreach_pow(norms(gradients, sums), 2)
            if group["per_tensor"]:
                torch._foreach_add_(sums, squares)
            else:
                shared_squares += squares
        if shared_squares:
            distance = total(shared_distances, torch.amax)
            distance = torch.maximum(distance, total(shared_gaps, torch.linalg.vector_norm))
            spread_(distance, shared_distances)
            spread_(total(shared_sums, torch.amax) + total(shared_squares, torch.sum), shared_sums)

        for (group, rate, (params, _, sums)), gradients in zip(gathered, directions, strict=True):
            distances = [self.state[p]["distance"] for p in params]
            rates = torch._foreach_div(distances, torch._foreach_sqrt(torch._foreach_add(sums, group["eps"])))
            torch._foreach_mul_(rates, -rate if group["maximize"] else rate)
            scales = [scale.to(p.dtype) for p, scale in zip(params, rates, strict=True)]
            torch._foreach_addcmul_(params, gradients, scales, value=-1)
        return loss


def number(value: float, like: Tensor) -> Float[Tensor, ""]:
    """A number beside a tensor, of its precision but at least single."""
    return torch.tensor(value, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def norms(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> list[Float[Tensor, ""]]:
    """Their norms, in the precision of the numbers `like`."""
    return list(torch._foreach_norm(list(tensors), 2, dtype=like[0].dtype))


def total(values: Sequence[Float[Tensor, ""]], reduce: Callable[[Tensor], Tensor]) -> Float[Tensor, ""]:
    """What `reduce` makes of the values of all devices and precisions, in the highest of these."""
    dtype = torch.float64 if any(value.dtype == torch.float64 for value in values) else values[0].dtype
    return reduce(torch.stack([value.to(values[0].device, dtype) for value in values]))


def spread_(value: Float[Tensor, ""], numbers: Iterable[Float[Tensor, ""]]) -> None:
    """Write the value into every number."""
    for entry in numbers:
        entry.copy_(value)


def polynomial_average(gamma: float = 8.0) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    """The average that DoG's authors advise (Shamir and Zhang 2013), as `avg_fn` of `swa_utils.AveragedModel`.

        θ̄_t = (1 - w) θ̄_{t-1} + w θ_t,    w = (γ + 1) / (γ + t)

    so that the last iterates count most, and γ = 0 is the plain mean.

    Args:
        gamma: γ, at least 0; the authors' default.

    Raises:
        ValueError: gamma is negative, NaN or infinite.
    """
    require(0 <= gamma < math.inf, "gamma", gamma, "at least 0 and finite")

    def average(averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
        """θ̄_t of θ̄_{t-1} and θ_t, where `count` is t - 1."""
        steps = torch.as_tensor(count, dtype=torch.promote_types(averaged.dtype, torch.float32)) + 1
        return averaged + (current - averaged) * ((gamma + 1) / (gamma + steps))

    return average
