"""AdAdaGrad: batches that grow by a test on the gradients, with AdaGrad (Lau, Liu and Kolar 2024, arXiv:2402.11215).

From the gradients g_i of the b samples of a batch and their mean ḡ, with variances over b - 1, follows the batch size
that a test would have asked for:

    norm test              Σ_j Var(g_ij) / (η² ‖ḡ‖²)
    inner-product test     Var(⟨g_i, ḡ⟩) / (θ² ‖ḡ‖⁴)
    orthogonality test     Σ_j Var(r_ij) / (ν² ‖ḡ‖²),    r_i = g_i - ⟨g_i, ḡ⟩ ḡ / ‖ḡ‖²
    coordinate-wise test   max_j Var(g_ij) / (η² ḡ_j²)

The next batch has that many samples, rounded up, if that is more than now: batches never shrink. The augmented test is
the larger of the inner-product and the orthogonality test; the coordinate-wise one is what the theory for AdaGrad asks
for, and very cautious. Since ‖ḡ‖² of a batch exceeds that of the full gradient by the noise, one norm test multiplies
the batch by 1/η² at most, or about so. Learning-rate schedules must count samples, not steps.

The model is updated by AdaGrad (torch's `Adagrad`) or by AdaGrad-Norm, which has a single accumulator for all weights
(`AdaGradNorm`): v ← v + ‖g‖², x ← x - lr g / √v.

In the authors' code the inner products are those of single tensors, and their variances are added up; the text's
formula has the whole gradient, and so it is here unless `blockwise` is set. Their AdaGrad-Norm accumulates by output
row or filter, and its weight decay subtracts lr · weight_decay · *gradient*; here there is one accumulator, as in the
text, or one for each tensor, and the decay is that of the weights.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.func import functional_call, grad, vmap
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from torch.utils.data import Sampler

from fairtrial.methods.arguments import require
from fairtrial.methods.optimizers.torch_contract import (
    batches,
    check_rates,
    check_state,
    evaluate,
    scalars,
    with_gradient,
)
from fairtrial.methods.registry import LogUniform, method

PerSample = Mapping[str, Float[Tensor, "b ..."]] | Float[Tensor, "b p"]


@dataclass(frozen=True)
class BatchTest:
    """What a test of a batch's gradients says.

    Attributes:
        batch_size_required: the size that it asks for, not rounded; infinite where the mean gradient is 0.
        variance: what it rests on: of the gradients, summed over coordinates, of the inner products, or of the
            orthogonal parts, summed.
        grad_norm_sq: ‖ḡ‖².
    """

    batch_size_required: float
    variance: float
    grad_norm_sq: float


def norm_test(per_sample_grads: PerSample, eta: float) -> BatchTest:
    """The norm test.

    Args:
        per_sample_grads: gradients of b samples, at least 2, stacked along the first dimension: for each parameter by
            name, as `per_sample_gradients` gives them, or as a single matrix (b, p).
        eta: η, above 0; the authors take 0.1 to 0.5.

    Raises:
        ValueError: fewer than two samples, gradients that are not finite, or a parameter that is not above 0.
    """
    _check_parameter("eta", eta)
    moments = [_moments(grads) for grads in _blocks(per_sample_grads)]
    spread, squared = _sums(moments, "spread", "squared")
    return BatchTest(_required(spread, eta**2 * squared), spread, squared)


def inner_product_test(per_sample_grads: PerSample, theta: float, *, blockwise: bool = False) -> BatchTest:
    """The inner-product test.

    Args:
        per_sample_grads: see `norm_test`.
        theta: θ, above 0.
        blockwise: add up variances of the inner products of single tensors, as the authors' code does.
    """
    _check_parameter("theta", theta)
    moments = _joined([_moments(grads) for grads in _blocks(per_sample_grads)], blockwise)
    along, squared = _sums(moments, "along", "squared")
    return BatchTest(_required(along, theta**2 * squared**2), along, squared)


def augmented_test(per_sample_grads: PerSample, theta: float, nu: float, *, blockwise: bool = False) -> BatchTest:
    """The inner-product or the orthogonality test, whichever asks for more; the variance is of that one.

    Args:
        per_sample_grads: see `norm_test`.
        theta, nu: θ and ν, above 0.
        blockwise: project every tensor on its own mean gradient and add up, as the authors' code does.
    """
    _check_parameter("theta", theta)
    _check_parameter("nu", nu)
    moments = _joined([_moments(grads) for grads in _blocks(per_sample_grads)], blockwise)
    along, across, squared = _sums(moments, "along", "across", "squared")
    tests = (
        BatchTest(_required(along, theta**2 * squared**2), along, squared),
        BatchTest(_required(across, nu**2 * squared), across, squared),
    )
    return max(tests, key=lambda test: test.batch_size_required)


def coordinate_norm_test(per_sample_grads: PerSample, eta: float) -> BatchTest:
    """The norm test of every coordinate, of which the strictest counts; a coordinate of zeros asks for nothing.

    Args:
        per_sample_grads, eta: see `norm_test`.
    """
    _check_parameter("eta", eta)
    blocks = _blocks(per_sample_grads)
    spread, squared = _sums([_moments(grads) for grads in blocks], "spread", "squared")
    strictest = []
    for grads in blocks:
        variances, means = torch.var_mean(grads, 0)
        ratios = torch.where(variances > 0, variances / means.square(), torch.zeros_like(variances))
        strictest.append(ratios.amax().cpu())
    required = torch.stack(strictest).amax().item() / eta**2
    return BatchTest(required if squared > 0 else math.inf, spread, squared)


def _check_parameter(name: str, value: float) -> None:
    require(0 < value < math.inf, name, value, "above 0 and finite")


def _blocks(per_sample_grads: PerSample) -> list[Float[Tensor, "b p"]]:
    """The gradients as matrices, in float32 or better."""
    tensors = list(per_sample_grads.values()) if isinstance(per_sample_grads, Mapping) else [per_sample_grads]
    sizes = sorted({len(tensor) for tensor in tensors})
    fits = len(sizes) == 1 and sizes[0] >= 2
    require(fits, "per_sample_grads", f"gradients of {sizes} samples", "of at least 2 samples, as many for each tensor")
    return [
        t.detach().reshape(len(t), -1).to(torch.promote_types(t.dtype, torch.float32)) for t in tensors if t.numel()
    ]


@dataclass(frozen=True)
class _Moments:
    """Of the gradients of one tensor, or of all; numbers of shape ().

    Attributes:
        spread: Σ_j Var(g_ij).
        squared: ‖ḡ‖².
        inner: ⟨g_i, ḡ⟩ of each sample.
    """

    spread: Tensor
    squared: Tensor
    inner: Float[Tensor, " b"]

    @property
    def along(self) -> Tensor:
        """Var(⟨g_i, ḡ⟩)."""
        return self.inner.var()

    @property
    def across(self) -> Tensor:
        """Σ_j Var(r_ij), which is the spread without its part along ḡ; all of it where ḡ = 0."""
        share = torch.where(self.squared > 0, self.along / self.squared, torch.zeros_like(self.squared))
        return (self.spread - share).clamp(min=0)


def _moments(grads: Float[Tensor, "b p"]) -> _Moments:
    variances, means = torch.var_mean(grads, 0)
    return _Moments(variances.sum(), means.square().sum(), grads @ means)


def _joined(moments: list[_Moments], blockwise: bool) -> list[_Moments]:
    if blockwise:
        return moments
    device = moments[0].inner.device
    parts = zip(*((m.spread, m.squared, m.inner) for m in moments), strict=True)
    return [_Moments(*(torch.stack([part.to(device) for part in same]).sum(0) for same in parts))]


def _sums(moments: list[_Moments], *names: str) -> list[float]:
    """Their sums over tensors, read from the device at once."""
    device = moments[0].inner.device
    sums = [torch.stack([getattr(m, name).to(device) for m in moments]).sum() for name in names]
    found: list[float] = torch.stack(sums).tolist()
    require(all(map(math.isfinite, found)), "per_sample_grads", found, "finite")
    return found


def _required(variance: float, allowed: float) -> float:
    return variance / allowed if allowed > 0 else math.inf


def per_sample_gradients(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "b ..."] | Tensor,
    y: Tensor,
    *,
    chunk_size: int | None = None,
) -> dict[str, Float[Tensor, "b ..."]]:
    """The gradient of every sample's own loss in the trainable parameters, stacked, by name.

    Their mean is the gradient of the mean loss, so that one pass serves test and update.

    Args:
        model: samples must not meet in it.
        loss_fn: of outputs and targets of a batch of one.
        x: inputs, samples along the first dimension.
        y: targets.
        chunk_size: samples that go through the model at a time; all by default.

    Raises:
        ValueError: batch normalisation that takes its statistics from the batch.
    """
    require(len(x) == len(y), "y", len(y), f"{len(x)} targets, as many as inputs")
    for name, module in model.named_modules():
        mixes = isinstance(module, _NormBase) and (module.training or not module.track_running_stats)
        per_instance = isinstance(module, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d)
        if mixes and not per_instance:
            raise ValueError(
                f"model must keep samples apart, but {name or type(module).__name__} normalises over the batch: "
                "use evaluation mode, or GroupNorm"
            )
    chosen = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    held = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    held |= dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], sample: Tensor, target: Tensor) -> Tensor:
        return loss_fn(functional_call(model, (parameters, held), (sample[None],)), target[None])

    gradients = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different", chunk_size=chunk_size)
    found: dict[str, Tensor] = gradients(chosen, x, y)
    return found


class AdaptiveBatchSampler(Sampler[list[int]]):
    """A batch sampler whose `batch_size` may be set between two batches; each epoch is a permutation drawn anew.

    As `batch_sampler` of a DataLoader it wants `num_workers=0`: workers ask for batches ahead of time. The last batch
    of an epoch is what is left, but for a single sample, which is left out: it has no variance to test.

    Args:
        dataset_size: number of samples, at least 2.
        initial: the first batch size, within 2..maximum.
        maximum: the largest, at most `dataset_size`.
        seed: of the permutations.

    Attributes:
        batch_size: of the next batch.
        generator: what permutations are drawn from.
    """

    def __init__(self, dataset_size: int, initial: int, maximum: int, seed: int = 0) -> None:
        require(dataset_size >= 2, "dataset_size", dataset_size, "at least 2")
        require(2 <= maximum <= dataset_size, "maximum", maximum, f"within 2..{dataset_size}")
        self.dataset_size, self.maximum = dataset_size, maximum
        require(2 <= initial <= maximum, "initial", initial, f"within 2..{maximum}")
        self.batch_size = initial
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def batch_size(self) -> int:
        return self._batch_size

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        require(2 <= size <= self.maximum, "batch_size", size, f"within 2..{self.maximum}")
        self._batch_size = size

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.dataset_size, generator=self.generator).tolist()
        start = 0
        while self.dataset_size - start >= 2:
            end = start + self.batch_size
            yield order[start:end]
            start = end


class AdaptiveBatchSize:
    """The batch size as training goes on: raised when the test asks for it, and never lowered.

        sampler.batch_size = size.update(per_sample_grads)

    Args:
        test: of per-sample gradients: `partial(norm_test, eta=0.5)`.
        initial: the first batch size, within 2..maximum.
        maximum: the largest.
        interval: test after every so many steps; the authors after every one.
        growth_cap: the batch grows this many times at most in one test, above 1; without bound by default.

    Attributes:
        batch_size: of the next step.
        step: steps so far.
    """

    def __init__(
        self,
        test: Callable[[PerSample], BatchTest],
        initial: int,
        maximum: int,
        *,
        interval: int = 1,
        growth_cap: float | None = None,
    ) -> None:
        require(2 <= initial <= maximum, "initial", initial, f"within 2..{maximum}")
        require(interval >= 1, "interval", interval, "at least 1")
        require(growth_cap is None or 1 < growth_cap < math.inf, "growth_cap", growth_cap, "above 1 and finite")
        self.test, self.maximum, self.interval, self.growth_cap = test, maximum, interval, growth_cap
        self.batch_size, self.step = initial, 0

    @property
    def due(self) -> bool:
        """Whether the coming `update` tests; if not, it needs no gradients."""
        return (self.step + 1) % self.interval == 0

    def update(self, per_sample_grads: PerSample | None = None) -> int:
        """Count a step, test its gradients if that is due, and return the size of the next batch."""
        if self.due:
            require(per_sample_grads is not None, "per_sample_grads", per_sample_grads, "given when a test is due")
            assert per_sample_grads is not None
            limit = float(self.maximum)
            if self.growth_cap is not None:
                limit = min(limit, math.floor(self.growth_cap * self.batch_size))
            wanted = min(self.test(per_sample_grads).batch_size_required, limit)
            self.batch_size = max(self.batch_size, math.ceil(wanted))
        self.step += 1
        return self.batch_size


@method(paper="adadagrad", slot="optimizer", search={"lr": LogUniform(1e-2, 10.0)})
class AdaGradNorm(Optimizer):
    """AdaGrad with a single accumulator: v ← v + ‖g‖², x ← x (1 - lr · weight_decay) - lr g / (√v + eps).

    ‖g‖ is that of the whole gradient, over all parameter groups. A gradient that is not finite therefore reaches all
    parameters, unless `per_tensor` is set. A tensor counts the steps in which it had a gradient.

    Args:
        params: parameters or parameter groups, real and dense.
        lr: learning rate, at least 0; the authors' default.
        initial_accumulator: v before the first step, above 0; the authors' default.
        weight_decay: decoupled decay, at least 0.
        eps: added to √v, at least 0; the paper has none.
        per_tensor: an accumulator for each tensor, with the norm of its own gradient.
        maximize: ascend instead of descend.
        foreach: handle all tensors of a device and dtype together; `False` goes through them one by one with the same
            result and less memory.

    Raises:
        ValueError: an argument lies outside its range, or a loaded state does not fit the parameters.
        RuntimeError: a gradient is sparse or complex.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        initial_accumulator: float = 1e-2,
        weight_decay: float = 0.0,
        eps: float = 0.0,
        per_tensor: bool = False,
        *,
        maximize: bool = False,
        foreach: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "initial_accumulator": initial_accumulator,
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
        _check_parameter("initial_accumulator", group["initial_accumulator"])
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        check_state(self, state, lambda group, p, saved: {"sum": ()})
        super().__setstate__(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state dict."""
        saved = [state_dict["state"].get(i, {}) for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        super().load_state_dict(state_dict)
        # torch has cast the accumulators to the dtypes of the parameters, in which half a precision is lost
        for p, state in zip(params, saved, strict=True):
            if state:
                self.state[p]["sum"] = state["sum"].to(p.device, copy=True)

    @_disable_dynamo
    def _gather(self) -> tuple[list[tuple[bool, list[Tensor], list[Tensor]]], list[tuple[Any, ...]]]:
        """Gradients and accumulators by group, in order; and batches: the group, its rates, (params, grads, sums)."""
        ordered, gathered = [], []
        for group, (params, grads) in zip(self.param_groups, with_gradient(self), strict=True):
            for p in params:
                if not self.state[p]:
                    dtype = torch.promote_types(p.dtype, torch.float32)
                    start = torch.tensor(group["initial_accumulator"], dtype=dtype, device=p.device)
                    self.state[p] = {"sum": start}
            sums = [self.state[p]["sum"] for p in params]
            ordered.append((group["per_tensor"], grads, sums))
            lr = float(group["lr"])
            rates = torch.tensor([lr, lr * group["weight_decay"]], dtype=torch.float64)
            gathered += [(group, rates, batch) for batch in batches(params, grads, sums, foreach=group["foreach"])]
        return ordered, gathered

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters by their gradients; returns the loss of `closure`, called with gradients enabled."""
        loss = evaluate(closure)
        ordered, gathered = self._gather()
        accumulate_squared_norms_(ordered)
        for group, rates, (params, grads, sums) in gathered:
            lr, decay = scalars(rates)
            scales = torch._foreach_sqrt(sums)
            torch._foreach_add_(scales, group["eps"])
            torch._foreach_reciprocal_(scales)
            torch._foreach_mul_(scales, lr if group["maximize"] else -lr)
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - decay)
            torch._foreach_addcmul_(params, grads, [scale.to(p.dtype) for p, scale in zip(params, scales, strict=True)])
        return loss


def accumulate_squared_norms_(ordered: list[tuple[bool, list[Tensor], list[Tensor]]]) -> None:
    """v ← v + ‖g‖² for tensors of their own, v ← v + Σ ‖g‖² for the others, over all groups."""
    shared: list[tuple[Tensor, Tensor]] = []
    for per_tensor, grads, sums in ordered:
        squares = [
            torch.linalg.vector_norm(grad, dtype=total.dtype).square() for grad, total in zip(grads, sums, strict=True)
        ]
        if not per_tensor:
            shared += zip(squares, sums, strict=True)
        elif sums:
            torch._foreach_add_(sums, squares)
    if shared:
        first = shared[0][0]
        dtype = torch.float64 if any(square.dtype == torch.float64 for square, _ in shared) else torch.float32
        whole = torch.stack([square.to(first.device, dtype) for square, _ in shared]).sum()
        torch._foreach_add_([total for _, total in shared], [whole.to(total) for _, total in shared])
