"""K-FAC, natural-gradient steps by Kronecker factors, also for an LSTM that hedges (Enkhbayar 2024, arXiv:2411.15002).

For a linear map s = W ā of inputs ā = [a; 1], with g = ∂ℓ/∂s of a sample's loss ℓ, the Fisher block is approximated by
two small factors (Martens and Grosse 2015, arXiv:1503.05671), and the step goes along the damped inverse

    F ≈ A ⊗ S,    A = E[ā āᵀ],    S = E[g gᵀ],    U = (S + √λ/π I)⁻¹ ∇W (A + π √λ I)⁻¹,
    π² = (tr A / dim A) / (tr S / dim S),    W ← W - η ν U,    ν = min(1, √(κ / (η² Σ ⟨U, ∇W⟩)))

A map that is used at T places of a sample, as those of an LSTM at every time or of a convolution at every pixel, sums
its gradient over them. With `recurrent='expand'` the places count as independent, F ≈ T (A ⊗ S) with means over samples
and places, the factor T being laid into S. With 'reduce' inputs are averaged over the places of a sample and gradients
summed before the outer products, which is exact where all its inputs are the same.

The paper trains a policy of deep hedging by such steps, for which see `deep_hedging`. Objective, market parameters and
the recurrent K-FAC approximation are documented choices of this library; the paper's values could not be confirmed,
and no code of the author is known. Here, running means have the decay min(1 - 1/k, ema) in their k-th update, as those
of Martens and Grosse, and the clip of the step is per parameter group. It counts K-FAC's parameters only.
"""

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from torch.utils.hooks import RemovableHandle

from fairtrial.methods.arguments import require
from fairtrial.methods.optimizers.torch_contract import (
    batches,
    check_state,
    descend_,
    evaluate,
    scalars,
    with_gradient,
)
from fairtrial.methods.registry import LogUniform, method


class Factors(NamedTuple):
    """The Kronecker factors of a linear map from i inputs, the constant 1 of a bias included, to o outputs."""

    A: Float[Tensor, "i i"]
    S: Float[Tensor, "o o"]


def damped_inverses(factors: Factors, damping: float) -> Factors:
    """(A + π √λ I)⁻¹ and (S + √λ/π I)⁻¹; π is 1 where a trace is 0."""
    require(0 < damping < math.inf, "damping", damping, "above 0 and finite")
    mean_a, mean_s = (factor.diagonal().mean() for factor in factors)
    pi = torch.where((mean_a > 0) & (mean_s > 0), (mean_a / mean_s).sqrt(), torch.ones_like(mean_a))
    shifts = pi * math.sqrt(damping), math.sqrt(damping) / pi
    inverses = []
    for factor, shift in zip(factors, shifts, strict=True):
        damped = factor.clone()
        damped.diagonal().add_(shift)
        inverses.append(torch.cholesky_inverse(torch.linalg.cholesky_ex(damped).L))
    return Factors(*inverses)


def kl_clip_factor(product: Float[Tensor, ""], lr: float, kl_clip: float) -> Float[Tensor, ""]:
    """ν = min(1, √(κ / (η² ⟨U, ∇W⟩))): the step's KL divergence, to second order, is then at most κ/2."""
    return (kl_clip / (lr**2 * product.clamp(min=0.0))).sqrt().clamp(max=1.0)


class LayerRecord:
    """What a layer's factors need of the backward passes since the last step; a forward hook of the layer.

    The layer's calls in one backward pass are places of the same samples; several passes are of different samples.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, recurrent: str, recording: bool) -> None:
        self.layer, self.recurrent, self.recording = layer, recurrent, recording
        self.clear()

    def clear(self) -> None:
        self.passing = -1
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.sums: Factors | None = None
        self.samples = self.places = 0

    @_disable_dynamo
    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(self._receive, inputs[0].detach()))

    def _receive(self, a: Tensor, g: Tensor) -> None:
        if not self.recording:
            return
        passing = torch._C._current_graph_task_id()
        if passing != self.passing:
            self._fold()
            self.passing = passing
        self.pairs.append((a, g.detach()))

    @torch.no_grad()
    def _fold(self) -> None:
        """Turn the calls of one backward pass into outer products."""
        if not self.pairs:
            return
        dtype = torch.promote_types(self.pairs[0][1].dtype, torch.float32)
        both = [places_of(self.layer, a, g) for a, g in self.pairs]
        a, g = (torch.cat(parts, 1).to(dtype) for parts in zip(*both, strict=True))
        if self.layer.bias is not None:
            a = F.pad(a, (0, 1), value=1.0)
        if self.recurrent == "reduce":
            a, g = a.mean(1, keepdim=True), g.sum(1, keepdim=True)
        self.samples += len(a)
        self.places += len(a) * a.shape[1]
        a, g = a.flatten(0, 1), g.flatten(0, 1)
        found = Factors(a.T @ a, g.T @ g)
        self.sums = found if self.sums is None else Factors(*map(torch.add, self.sums, found))
        self.pairs = []

    def factors(self) -> Factors | None:
        """A and S of all samples, if there were any. Gradients are those of a mean over the first dimension."""
        self._fold()
        if self.sums is None or not self.places:
            return None
        return Factors(self.sums.A / self.places, self.sums.S * self.samples)


def places_of(layer: nn.Module, a: Tensor, g: Tensor) -> tuple[Float[Tensor, "n t i"], Float[Tensor, "n t o"]]:
    """Inputs and output gradients of a layer as those of a linear map at t places of n samples."""
    if isinstance(layer, nn.Conv2d):
        if a.ndim == 3:
            a, g = a[None], g[None]
        patches = F.unfold(a, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
        return patches.mT, g.flatten(2).mT
    n = len(a) if a.ndim > 1 else 1
    places = a.numel() // max(1, n * a.shape[-1])
    return a.reshape(n, places, a.shape[-1]), g.reshape(n, places, g.shape[-1])


def has_factors(module: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d]:
    """Whether a module is one whose weight K-FAC has factors for; subclasses may compute something else."""
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module) is nn.Linear


@method(
    paper="kfac_hedging",
    slot="optimizer",
    search={"lr": LogUniform(1e-3, 1.0), "damping": LogUniform(1e-4, 1.0)},
    bind=lambda setting: {"model": setting.model},
)
class KFAC(Optimizer):
    """Natural-gradient steps for every `nn.Linear`, `nn.Conv2d` and `KFACLSTM` of a model; SGD for what else it has.

    Use it as any optimizer: the factors come from the same backward passes as the gradients. The loss has to be a mean
    over the first dimension of the layers' inputs. Hooks on the model do the recording, for as long as the optimizer
    lives. A layer is left to SGD if its weight is used by another module too, if it is a convolution with groups,
    padding 'same' or other than by zeros, or as long as no backward pass has gone through it. A `torch.amp.GradScaler`
    scales S by the square of its scale and so is better done without.

    With `curvature='empirical'` the factors are those of the empirical Fisher matrix, of the loss's own gradients. With
    'ggn' they are those of the Gauss-Newton matrix, which `observe` records before `backward`.

    Where there is a process group, factors are averaged over it, as gradients are by DistributedDataParallel.

    Args:
        model: the model to be trained.
        params: its parameters or parameter groups, real and dense; by default all that require a gradient.
        lr: η, at least 0.
        damping: λ, above 0.
        ema: decay of the running means A and S, within [0, 1).
        t_cov: steps from one update of A and S to the next.
        t_inv: steps from one inversion to the next.
        kl_clip: κ, above 0; infinity leaves steps as they are.
        momentum: within [0, 1), of the steps.
        weight_decay: decoupled decay, at least 0; a step multiplies w by 1 - lr · weight_decay.
        recurrent: 'expand' or 'reduce', how layers used at several places are treated.
        curvature: 'empirical' or 'ggn'.
        maximize: ascend instead of descend.

    `damping`, `ema`, `t_cov` and `t_inv` are those of the group that a layer's weight is in; the clip takes a group's
    parameters together. The defaults are in common use for K-FAC; the paper's values could not be confirmed.

    Raises:
        ValueError: an argument lies outside its range, or a loaded state does not fit the parameters.
        RuntimeError: a gradient is sparse or complex, or curvature 'ggn' has never been observed.
    """

    def __init__(
        self,
        model: nn.Module,
        params: ParamsT | None = None,
        lr: float | Tensor = 1e-2,
        damping: float = 1e-2,
        ema: float = 0.95,
        t_cov: int = 1,
        t_inv: int = 10,
        kl_clip: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        recurrent: str = "expand",
        curvature: str = "empirical",
        maximize: bool = False,
    ) -> None:
        require(recurrent in ("expand", "reduce"), "recurrent", recurrent, "'expand' or 'reduce'")
        require(curvature in ("empirical", "ggn"), "curvature", curvature, "'empirical' or 'ggn'")
        defaults = {
            "lr": lr,
            "damping": damping,
            "ema": ema,
            "t_cov": t_cov,
            "t_inv": t_inv,
            "kl_clip": kl_clip,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__([p for p in model.parameters() if p.requires_grad] if params is None else params, defaults)
        self.curvature = curvature
        users: dict[Tensor, int] = {}
        for module in model.modules():
            for p in module.parameters(recurse=False):
                users[p] = users.get(p, 0) + 1
        self.records = {
            module.weight: LayerRecord(module, recurrent, curvature == "empirical")
            for module in model.modules()
            if has_factors(module) and all(users.get(p) == 1 for p in module.parameters(recurse=False))
        }
        self.handles = [record.layer.register_forward_hook(record) for record in self.records.values()]
        self._unhook_at_the_end()

    def _unhook_at_the_end(self) -> None:
        weakref.finalize(self, _remove, self.handles)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = self.defaults | param_group
        for name in ("lr", "weight_decay"):
            require(0 <= float(group[name]) < math.inf, name, group[name], "at least 0 and finite")
        require(0 < group["damping"] < math.inf, "damping", group["damping"], "above 0 and finite")
        for name in ("ema", "momentum"):
            require(0 <= group[name] < 1, name, group[name], "within [0, 1)")
        for name in ("t_cov", "t_inv"):
            require(
                isinstance(group[name], int) and group[name] >= 1, name, group[name], "a whole number of at least 1"
            )
        require(group["kl_clip"] > 0, "kl_clip", group["kl_clip"], "above 0")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("curvature", "records", "handles")}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        check_state(self, state, self._state_shapes)
        super().__setstate__(state)
        if "defaults" in state:  # a copy or a pickle: another optimizer than before
            self._unhook_at_the_end()
        else:
            self._clear()

    def _state_shapes(
        self, group: Mapping[str, Any], p: Tensor, saved: Mapping[str, Tensor]
    ) -> dict[str, Sequence[int]]:
        shapes: dict[str, Sequence[int]] = {"momentum_buffer": p.shape}
        if p in self.records and "A" in saved:
            out, inputs = p.shape[0], p[0].numel() + (self.records[p].layer.bias is not None)
            square = {"A": (inputs, inputs), "S": (out, out)}
            shapes |= {"step": (), "updates": (), **square, **{f"{name}_inv": square[name] for name in square}}
        return shapes

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and what backward passes have recorded."""
        super().zero_grad(set_to_none)
        self._clear()

    def _clear(self) -> None:
        for record in self.records.values():
            record.clear()

    def observe(self, output: Float[Tensor, " n"], losses: Float[Tensor, " n"]) -> None:
        """Record the Gauss-Newton curvature of the mean of losses ℓ_i(output_i), with g = √ℓ'' ∂output/∂s for ∂ℓ/∂s.

        To be called before `backward`, which it leaves the graph for; gradients stay as they are.

        Args:
            output: of the model, one number for each sample.
            losses: of each sample, a convex function of its own output. A mean over the batch in it has to be detached.
        """
        require(self.curvature == "ggn", "curvature", self.curvature, "'ggn', to observe anything")
        (slope,) = torch.autograd.grad(losses.sum(), output, create_graph=True)
        if slope.requires_grad:
            (bend,) = torch.autograd.grad(slope.sum(), output, retain_graph=True)
        else:
            bend = torch.zeros_like(output)
        params = [p for group in self.param_groups for p in group["params"]]
        for record in self.records.values():
            record.recording = True
        try:
            seed = bend.clamp(min=0.0).sqrt().detach() / len(output)
            torch.autograd.grad(output, params, seed, retain_graph=True, allow_unused=True)
        finally:
            for record in self.records.values():
                record.recording = False

    @_disable_dynamo
    def _gather(self) -> list[tuple[dict[str, Any], Tensor, tuple[list[Tensor], ...]]]:
        found = with_gradient(self)
        directions: dict[Tensor, Tensor] = {}
        for group, (params, grads) in zip(self.param_groups, found, strict=True):
            uphill = group["maximize"] and params
            directions |= zip(params, torch._foreach_neg(grads) if uphill else grads, strict=True)
        known = any(record.passing >= 0 or "A" in self.state.get(w, {}) for w, record in self.records.items())
        if self.curvature == "ggn" and not known:
            raise RuntimeError("KFAC with curvature='ggn' knows no curvature yet: call observe() before backward()")
        self._precondition(directions)
        self._clear()
        gathered = []
        for group, (params, _) in zip(self.param_groups, found, strict=True):
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            lr = float(group["lr"])
            rates = torch.tensor([lr, 1 - lr * group["weight_decay"]], dtype=torch.float64)
            moves = [directions[p] for p in params]
            gathered += [(group, rates, batch) for batch in batches(params, moves, buffers, foreach=True)]
        return gathered

    def _precondition(self, directions: dict[Tensor, Tensor]) -> None:
        """Put ν U for the gradients of all layers whose factors are known."""
        groups = {p: group for group in self.param_groups for p in group["params"]}
        moved: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for weight, record in self.records.items():
            if weight not in directions:
                continue
            inverses = self._inverses(weight, record, groups[weight])
            if inverses is None:
                continue
            gradient = directions[weight].flatten(1)
            bias = record.layer.bias
            if bias is not None:  # one that has no gradient counts as one whose gradient is 0
                slope = directions[bias] if bias in directions else gradient.new_zeros(len(gradient))
                gradient = torch.cat([gradient, slope[:, None]], 1)
            gradient = gradient.to(inverses.A.dtype)
            U = inverses.S @ gradient @ inverses.A
            of = [weight] if bias is None else [weight, bias]
            sizes = [weight[0].numel(), 1][: len(of)]
            for p, part, slope in zip(of, U.split(sizes, 1), gradient.split(sizes, 1), strict=True):
                if p in directions:
                    moved.setdefault(id(groups[p]), []).append((p, part.reshape(p.shape), (part * slope).sum()))
        for group in self.param_groups:
            if layers := moved.get(id(group)):
                products = torch.stack([product.to(layers[0][2]) for _, _, product in layers])
                # what is not finite spoils its own layer only
                product = torch.nan_to_num(products, nan=0.0, posinf=0.0, neginf=0.0).sum()
                nu = kl_clip_factor(product, float(group["lr"]), group["kl_clip"])
                for p, U, _ in layers:
                    directions[p] = (nu.to(U) * U).to(p.dtype)

    def _inverses(self, weight: Tensor, record: LayerRecord, group: Mapping[str, Any]) -> Factors | None:
        """Bring the running means up to date, and the inverses if it is their time."""
        state = self.state[weight]
        step = int(state["step"].item()) if "step" in state else 0
        found = averaged(record.factors()) if step % group["t_cov"] == 0 else None
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if found is not None:
            if "A" not in state:
                state |= {name: torch.zeros((), dtype=torch.float32) for name in ("step", "updates")}
                for name, factor in zip(("A", "S"), found, strict=True):
                    state[name], state[f"{name}_inv"] = (torch.zeros_like(factor, dtype=weight.dtype) for _ in range(2))
            state["updates"] += 1
            share = 1 - min(1 - 1 / state["updates"].item(), group["ema"])
            finite = torch.stack([factor.isfinite().all() for factor in found]).all()
            for name, factor in zip(("A", "S"), found, strict=True):
                mean = state[name].to(dtype)
                state[name].copy_(torch.where(finite, torch.lerp(mean, factor.to(dtype), share), mean))
        if "A" not in state:
            return None
        if step % group["t_inv"] == 0:
            inverses = damped_inverses(Factors(state["A"].to(dtype), state["S"].to(dtype)), group["damping"])
            for name, inverse in zip(("A_inv", "S_inv"), inverses, strict=True):
                state[name].copy_(inverse)
        state["step"] += 1
        return Factors(state["A_inv"].to(dtype), state["S_inv"].to(dtype))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters by their gradients; returns the loss of `closure`, called with gradients enabled."""
        loss = evaluate(closure)
        for group, rates, (params, moves, buffers) in self._gather():
            lr, keep = scalars(rates)
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, moves)
            torch._foreach_mul_(params, keep)
            descend_(params, buffers, lr)
        return loss


def _remove(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def averaged(factors: Factors | None) -> Factors | None:
    """The mean over the processes that train together, if there are several."""
    distributed = torch.distributed
    if factors is None or not (distributed.is_available() and distributed.is_initialized()):
        return factors
    for factor in factors:
        distributed.all_reduce(factor)
        factor /= distributed.get_world_size()
    return factors


class KFACLSTM(nn.Module):
    """An LSTM of linear maps, which K-FAC has factors for; batches come first. It computes what `nn.LSTM` does.

    For each of its layers there are two maps: from inputs (n, t, input_size) and from hidden states to the four gates,
    in torch's order. Initialised as `nn.LSTM`.

    Args:
        input_size, hidden_size, num_layers: as in `nn.LSTM`, at least 1.
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1) -> None:
        super().__init__()
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            require(size >= 1, name, size, "at least 1")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        sizes = [input_size, *[hidden_size] * (num_layers - 1)]
        self.input_maps = nn.ModuleList(nn.utils.skip_init(nn.Linear, size, 4 * hidden_size) for size in sizes)
        self.hidden_maps = nn.ModuleList(nn.utils.skip_init(nn.Linear, hidden_size, 4 * hidden_size) for _ in sizes)
        for p in self.parameters():
            nn.init.uniform_(p, -(hidden_size**-0.5), hidden_size**-0.5)

    @classmethod
    def from_lstm(cls, lstm: nn.LSTM) -> "KFACLSTM":
        """One with the weights of an `nn.LSTM` that has biases, goes forwards only, and neither projects nor drops."""
        plain = lstm.bias and not lstm.bidirectional and not lstm.proj_size and not lstm.dropout
        require(plain, "lstm", lstm, "with biases, without projection or dropout, and not bidirectional")
        made = cls(lstm.input_size, lstm.hidden_size, lstm.num_layers).to(next(lstm.parameters()))
        with torch.no_grad():
            for k in range(lstm.num_layers):
                for maps, kind in ((made.input_maps, "ih"), (made.hidden_maps, "hh")):
                    for name in ("weight", "bias"):
                        getattr(maps[k], name).copy_(getattr(lstm, f"{name}_{kind}_l{k}"))
        return made

    def forward(
        self, x: Float[Tensor, "n t i"], state: tuple[Float[Tensor, "l n h"], Float[Tensor, "l n h"]] | None = None
    ) -> tuple[Float[Tensor, "n t h"], tuple[Float[Tensor, "l n h"], Float[Tensor, "l n h"]]]:
        """The hidden states of the last layer at all times, and hidden and cell states of all layers at the end."""
        if state is None:
            zeros = x.new_zeros(self.num_layers, len(x), self.hidden_size)
            state = zeros, zeros
        ends = []
        for input_map, hidden_map, h, c in zip(self.input_maps, self.hidden_maps, *state, strict=True):
            outputs = []
            for gates in input_map(x).unbind(1):
                i, f, g, o = (gates + hidden_map(h)).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                outputs.append(h)
            x = torch.stack(outputs, 1)
            ends.append((h, c))
        hidden, cells = (torch.stack(kind) for kind in zip(*ends, strict=True))
        return x, (hidden, cells)
