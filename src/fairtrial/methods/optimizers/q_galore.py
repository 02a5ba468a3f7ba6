"""Q-GaLore: GaLore with 4-bit bases, 8-bit weights and ever rarer subspaces (Zhang et al. 2024, arXiv:2407.08296).

To GaLore, as described there, it adds three savings. All quantise groups of consecutive entries of a flattened matrix,

    Δ = max(max w - min w, 1e-5) / (2ᵇ - 1),   z = clamp(-round(min w / Δ)),   q = clamp(round(w / Δ) + z)

to codes q within 0 … 2ᵇ - 1, which stand for Δ (q - z).

- Bases: stored with `proj_bits`, and used as stored both to project and to project back.
- Lazy subspaces: for each weight, at every new subspace the cosine between the leading singular vectors of the former
  and the new one joins a queue of the last `queue_size`. Once the queue is full, and as long as its mean is at least
  `cos_threshold`, the gap T grows to ⌊gamma_proj · T⌋. A subspace is new at the steps that T divides.
- Weights: those of an `Int8Linear` are codes of 8 bits. A step turns them into numbers, changes these, and rounds
  stochastically, up with a probability of the distance to the next lower code, so that steps far smaller than Δ act in
  the mean. Gradients are those with regard to the numbers that the codes stand for.

The paper speaks of the similarity of adjacent projections; the authors' code compares their leading vectors alone, and
is followed. It compares with the sign that the SVD happens to give: a vector that has only turned round counts as -1,
and `abs_cos` mends that. A group that does not contain 0 between its extremes cannot be represented, as z is clamped:
all its codes can be the same. `safe_zero` extends the range of such a group to 0, here and in the weights.

Differences from the authors' code: the moments are of the weights' own type, not of 8 bits, and eps is GaLore's;
arithmetic is in float32 at least; 4-bit codes are packed in pairs, where the authors give each a byte.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fairtrial.methods.arguments import require
from fairtrial.methods.optimizers.galore import (
    GaLoreAdamW,
    State,
    galore_param_groups,
    in_a_task,
    warn_of_no_rank,
)
from fairtrial.methods.optimizers.gradient_projection import Bases, basis_shapes, leading_subspace
from fairtrial.methods.registry import LogUniform, method

PACKED_BITS = 4  # codes of so many bits or fewer lie in a byte by twos


class Quantized(NamedTuple):
    """Codes by groups, and what they stand for: scale · (codes - zeros)."""

    codes: UInt8[Tensor, "groups size"]
    scales: Float[Tensor, "groups 1"]
    zeros: UInt8[Tensor, "groups 1"]


def quantize_affine(
    w: Float[Tensor, "*shape"],
    bits: int,
    group_size: int,
    stochastic: bool = False,
    generator: torch.Generator | None = None,
    *,
    safe_zero: bool = False,
) -> Quantized:
    """Quantise groups of consecutive entries, each with a scale and a zero of its own.

    Args:
        w: of any shape; a half type is calculated with as float32.
        bits: of a code, 2 to 8.
        group_size: entries of a group; it divides the number of entries.
        stochastic: round up with a probability of the distance to the lower code, not to the nearest.
        generator: what stochastic rounding draws from, on the device of w; torch's global one by default.
        safe_zero: extend the range of every group to contain 0; without, a group that does not cannot be represented.

    Raises:
        ValueError: an argument lies outside its range, or w has an entry that is not finite.
    """
    require(isinstance(bits, int) and 2 <= bits <= 8, "bits", bits, "a whole number from 2 to 8")
    check_group_size("group_size", group_size, w.numel())
    require(bool(w.isfinite().all()), "w", w, "finite")
    w = w.to(torch.promote_types(w.dtype, torch.float32)).reshape(-1, group_size)
    low, high, top = w.amin(1, keepdim=True), w.amax(1, keepdim=True), 2**bits - 1
    if safe_zero:
        low, high = low.clamp(max=0), high.clamp(min=0)
    scales = (high - low).clamp(min=1e-5) / top
    zeros = (-torch.round(low / scales)).clamp(0, top)
    codes = w / scales
    if stochastic:
        draws = torch.rand(codes.shape, generator=generator, dtype=codes.dtype, device=codes.device)
        codes = torch.floor(codes).add_(draws < codes - torch.floor(codes))
    else:
        codes = torch.round(codes)
    return Quantized((codes + zeros).clamp_(0, top).to(torch.uint8), scales, zeros.to(torch.uint8))


def dequantize_affine(
    codes: UInt8[Tensor, "groups size"],
    scales: Float[Tensor, "groups 1"],
    zeros: UInt8[Tensor, "groups 1"],
    shape: Sequence[int] | None = None,
) -> Float[Tensor, "*shape"]:
    """The numbers that codes stand for, in the type of the scales, in the given shape or by groups."""
    numbers = codes.to(scales.dtype).sub_(zeros).mul_(scales)
    return numbers if shape is None else numbers.view(tuple(shape))


def check_group_size(name: str, size: int, count: int) -> None:
    fits = isinstance(size, int) and size >= 1 and count % size == 0
    require(fits, name, size, f"a divisor of the number of entries, {count}")


def pack(codes: UInt8[Tensor, "groups size"]) -> UInt8[Tensor, " bytes"]:
    """Two codes of at most 4 bits in every byte; the last may have one."""
    flat = F.pad(codes.flatten(), (0, codes.numel() % 2))
    return flat[::2] | flat[1::2] << PACKED_BITS


def unpack(packed: UInt8[Tensor, " bytes"], count: int) -> UInt8[Tensor, " count"]:
    """The first `count` codes."""
    return torch.stack([packed & 15, packed >> PACKED_BITS], 1).flatten()[:count]


@dataclass
class Int8Codes:
    """A matrix as codes of 8 bits, kept in the buffers of a layer."""

    buffers: dict[str, Any]  # the layer's own, with qweight, scales and zeros
    shape: tuple[int, int]
    group_size: int
    stochastic_round: bool
    safe_zero: bool

    def dequantize(self) -> Float[Tensor, "o i"]:
        """The numbers that the codes stand for."""
        return dequantize_affine(*self._tensors(), shape=self.shape)

    @torch.no_grad()
    def requantize_(
        self, weight: Float[Tensor, "o i"], generator: torch.Generator | None = None, stochastic: bool | None = None
    ) -> None:
        """Take the codes of new numbers, rounded as the layer does, or as `stochastic` says."""
        stochastic = self.stochastic_round if stochastic is None else stochastic
        new = quantize_affine(weight, 8, self.group_size, stochastic, generator, safe_zero=self.safe_zero)
        for tensor, value in zip(self._tensors(), new, strict=True):
            tensor.copy_(value)

    def _tensors(self) -> Quantized:
        return Quantized(self.buffers["qweight"], self.buffers["scales"], self.buffers["zeros"])


class Int8Linear(nn.Module):
    """A linear layer whose weight is codes of 8 bits, a quarter of float32's memory; `QGaLoreAdamW` trains it.

    The codes are the buffers `qweight`, `scales` and `zeros`. `weight` is what an optimizer is given in their place: a
    tensor of the weight's shape with the memory of one number. Its `grad` is the gradient with regard to the numbers
    that the codes stand for. As it is no parameter of the module, `q_galore_param_groups` has to find it. Move the
    layer to its device before an optimizer is made.

    Args:
        in_features, out_features, bias: as in `nn.Linear`.
        group_size: entries that share a scale; it divides the number of weights. The default is the authors'.
        stochastic_round: round stochastically what a step has changed, not to the nearest.
        safe_zero: see `quantize_affine`.

    Raises:
        ValueError: the group size does not divide the number of weights.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        group_size: int = 256,
        stochastic_round: bool = True,
        safe_zero: bool = False,
    ) -> None:
        super().__init__()
        self._take(nn.Linear(in_features, out_features, bias), group_size, stochastic_round, safe_zero)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, group_size: int = 256, stochastic_round: bool = True, safe_zero: bool = False
    ) -> "Int8Linear":
        """The layer with the weights of a linear layer, rounded to the nearest, and its own bias.

        Raises:
            ValueError: the group size does not divide the number of weights, or a weight is not finite.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take(linear, group_size, stochastic_round, safe_zero)
        return layer

    def _take(self, linear: nn.Linear, group_size: int, stochastic_round: bool, safe_zero: bool) -> None:
        numbers = linear.weight.detach()
        for name, tensor in zip(
            ("qweight", "scales", "zeros"),
            quantize_affine(numbers, 8, group_size, safe_zero=safe_zero),
            strict=True,
        ):
            self.register_buffer(name, tensor)
        shape = (linear.out_features, linear.in_features)
        self.codes = Int8Codes(self._buffers, shape, group_size, stochastic_round, safe_zero)
        self.bias = linear.bias
        self._make_weight()

    def _make_weight(self) -> None:
        one = self.codes.buffers["scales"].new_zeros(())
        self.weight = one.expand(self.codes.shape).requires_grad_()
        self.weight.codes = self.codes

    def forward(self, input: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        weight = StraightThrough.apply(self.weight, self.dequantize())
        return F.linear(input, weight.to(input.dtype), self.bias)

    def dequantize(self) -> Float[Tensor, "o i"]:
        """The weight as numbers."""
        return self.codes.dequantize()

    def requantize_(self, weight: Float[Tensor, "o i"], generator: torch.Generator | None = None) -> None:
        """Take the codes of new weights, rounded stochastically if the layer does so."""
        self.codes.requantize_(weight, generator)

    def _apply(self, fn: Any, recurse: bool = True) -> "Int8Linear":
        super()._apply(fn, recurse)
        if (self.weight.device, self.weight.dtype) != (self.scales.device, self.scales.dtype):
            self._make_weight()
        return self

    def extra_repr(self) -> str:
        out_features, in_features = self.codes.shape
        return f"in_features={in_features}, out_features={out_features}, group_size={self.codes.group_size}"


class StraightThrough(torch.autograd.Function):
    """The second tensor, with its gradient handed on to the first."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, numbers: Tensor) -> Tensor:
        return numbers.view_as(numbers)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def in_a_task_quantized(setting: Any) -> dict[str, Any]:
    """As for GaLore, with groups of entries that divide the bases of a small model."""
    bound = in_a_task(setting)
    form = {"rank": bound["rank"], "proj_type": "std"}
    matrices = [p for group in bound["params"] if "rank" not in group for p in group["params"]]
    sizes = [math.prod(shape) for p in matrices for shape in basis_shapes(p.shape, form).values()]
    group_size = math.gcd(256, *sizes)
    return {**bound, "proj_group_size": group_size, "safe_zero": True, "generator": setting.generator}


@method(
    paper="q_galore",
    slot="optimizer",
    search={"lr": LogUniform(4e-4, 4e-1)},
    bind=in_a_task_quantized,
)
class QGaLoreAdamW(GaLoreAdamW):
    """GaLore with bases of few bits, subspaces that become rarer, and weights of 8 bits where a layer has them.

    Beside `GaLoreAdamW`'s, the state of a projected weight has `svd_count`, the number of subspaces so far, and, if
    they are lazy, the present `gap`.

    Args:
        params, lr, betas, eps, weight_decay, correct_bias: as in `GaLoreAdamW`; the authors' lr are 0.015 for 60M and
            130M parameters and 0.004 for 7B. `q_galore_param_groups` makes the groups.
        rank, update_proj_gap, scale, proj_type, fix_signs, maximize, foreach: as in `GaLoreAdamW`; the gap is the first
            one.
        proj_bits: of a basis, 2 to 8; None keeps it as it is.
        proj_group_size: entries of a basis that share a scale; it divides their number.
        safe_zero: extend the range of every such group to contain 0.
        cos_threshold: τ within [-1, 1], the mean cosine from which on the gap grows; None leaves it as it is.
        gamma_proj: γ, at least 1, multiplies the gap.
        queue_size: cosines whose mean decides, at least 1.
        abs_cos: leave the cosines' signs out.
        generator: what the stochastic rounding of weights draws from, on their device; by default a private one with
            seed 0. Its state is part of the state dict, and loading one sets it.

    The defaults are the authors'.

    Raises:
        ValueError: an argument lies outside its range, a parameter of a group with a rank is not a matrix or its basis
            not divided by the group size, a weight of 8 bits is no longer finite, or a loaded state does not fit.
        RuntimeError: a gradient is sparse or complex.

    Warns:
        UserWarning: as `GaLoreAdamW`.
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
        proj_bits: int | None = 4,
        proj_group_size: int = 256,
        safe_zero: bool = False,
        cos_threshold: float | None = 0.4,
        gamma_proj: float = 2,
        queue_size: int = 5,
        abs_cos: bool = False,
        generator: torch.Generator | None = None,
        maximize: bool = False,
        foreach: bool = True,
    ) -> None:
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator
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
            "proj_bits": proj_bits,
            "proj_group_size": proj_group_size,
            "safe_zero": safe_zero,
            "cos_threshold": cos_threshold,
            "gamma_proj": gamma_proj,
            "queue_size": queue_size,
            "abs_cos": abs_cos,
            "maximize": maximize,
            "foreach": foreach,
        }
        Optimizer.__init__(self, params, defaults)
        warn_of_no_rank(self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        check_q_galore(self.defaults | param_group)
        super().add_param_group(param_group)

    def _check_shapes(self, group: Mapping[str, Any]) -> None:
        super()._check_shapes(group)
        if group["rank"] is not None and group["proj_bits"] is not None:
            for p in group["params"]:
                for shape in basis_shapes(p.shape, group).values():
                    check_group_size("proj_group_size", group["proj_group_size"], math.prod(shape))

    @staticmethod
    def state_shapes(group: Mapping[str, Any], p: Tensor, saved: Mapping[str, Tensor]) -> dict[str, Sequence[int]]:
        """GaLore's, with what is kept of the bases, and what decides on the gap."""
        shapes = GaLoreAdamW.state_shapes(group, p, saved)
        if group["rank"] is None:
            return shapes
        bases = basis_shapes(p.shape, group)
        if group["proj_bits"] is not None:
            for side, shape in bases.items():
                del shapes[side]
                shapes |= quantized_shapes(side, math.prod(shape), group)
        if group["cos_threshold"] is not None:
            side = next(iter(bases))
            shapes |= {"leading": (p.shape[side == "right"],), "cosines": (group["queue_size"],), "gap": ()}
        return {**shapes, "svd_count": ()}

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"generator": self.generator}

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict, and under 'generator' the state of the generator."""
        return super().state_dict() | {"generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state dict: with the same bases, gaps and roundings."""
        expected = "of QGaLoreAdamW, with the key 'generator'"
        require("generator" in state_dict, "state_dict", sorted(state_dict), expected)
        saved = [state_dict["state"].get(i, {}) for group in state_dict["param_groups"] for i in group["params"]]
        for name, value in (item for state in saved for item in state.items() if isinstance(item[1], Tensor)):
            kept = whole_type(name)
            require(kept in (None, value.dtype), "state_dict", f"{name} of {value.dtype}", f"{name} of {kept}")
        params = [p for group in self.param_groups for p in group["params"]]
        super().load_state_dict(state_dict)
        # torch has cast them all to the types of the parameters
        for p, state in zip(params, saved, strict=True):
            self.state[p] |= {name: state[name].to(p.device) for name in state if whole_type(name)}
        self.generator.set_state(state_dict["generator"].cpu())

    def _gap(self, group: Mapping[str, Any], state: State) -> int:
        return int(state["gap"]) if "gap" in state else super()._gap(group, state)

    def _renewed(self, group: Mapping[str, Any], p: Tensor, grad: Tensor, state: State) -> State:
        bases = leading_subspace(grad, group)
        new = {"svd_count": state.get("svd_count", torch.zeros((), dtype=torch.int64)) + 1}
        if group["cos_threshold"] is not None:
            side, basis = next(iter(bases.items()))
            new |= lazier(group, state, (basis[:, 0] if side == "left" else basis[0]).to(p.dtype, copy=True))
        for side, basis in bases.items():
            if group["proj_bits"] is None:
                new[side] = basis.to(p.dtype)
            else:
                new |= quantized_basis(side, basis, group, p.dtype)
        return state | new

    def _bases(self, group: Mapping[str, Any], state: State, p: Tensor) -> Bases:
        if group["proj_bits"] is None:
            return super()._bases(group, state, p)
        return {side: basis_of(side, state, shape) for side, shape in basis_shapes(p.shape, group).items()}

    def _update(
        self, group: dict[str, Any], rates: Tensor, params: list[Tensor], grads: list[Tensor], states: list[State]
    ) -> None:
        weights = numbers_of(params)
        super()._update(group, rates, weights, grads, states)
        self._write_back(params, weights)

    @_disable_dynamo
    def _write_back(self, params: list[Tensor], weights: list[Tensor]) -> None:
        for p, weight in zip(params, weights, strict=True):
            if weight is not p:
                p.codes.requantize_(weight, self.generator)  # type: ignore[attr-defined]


@_disable_dynamo
def numbers_of(params: list[Tensor]) -> list[Tensor]:
    """The parameters themselves, and what the codes stand for in place of those that are codes."""
    return [p.codes.dequantize() if hasattr(p, "codes") else p for p in params]


def lazier(group: Mapping[str, Any], state: State, leading: Float[Tensor, " d"]) -> State:
    """The new leading vector, the queue of cosines with that of the former one in it, and the gap from now on."""
    if "leading" not in state:
        size, first = group["queue_size"], torch.tensor(group["update_proj_gap"])
        return {"leading": leading, "cosines": leading.new_zeros(size), "gap": first}
    wide = torch.promote_types(leading.dtype, torch.float32)
    cosine = F.cosine_similarity(state["leading"].to(wide), leading.to(wide), dim=0)
    cosines, seen = state["cosines"].clone(), int(state["svd_count"])
    cosines[(seen - 1) % len(cosines)] = cosine.abs() if group["abs_cos"] else cosine
    gap = state["gap"]
    if seen >= len(cosines) and cosines.to(wide).mean() >= group["cos_threshold"]:
        gap = torch.tensor(int(int(gap) * group["gamma_proj"]))
    return {"leading": leading, "cosines": cosines, "gap": gap}


def quantized_basis(side: str, basis: Float[Tensor, "a b"], group: Mapping[str, Any], dtype: torch.dtype) -> State:
    """What a state keeps of a basis."""
    bits, size = group["proj_bits"], group["proj_group_size"]
    codes, scales, zeros = quantize_affine(basis, bits, size, safe_zero=group["safe_zero"])
    kept = pack(codes) if bits <= PACKED_BITS else codes.flatten()
    return {f"{side}_codes": kept, f"{side}_scales": scales.to(dtype), f"{side}_zeros": zeros}


def quantized_shapes(side: str, count: int, group: Mapping[str, Any]) -> dict[str, Sequence[int]]:
    """The shapes of `quantized_basis` for so many entries."""
    size = (math.ceil(count / 2) if group["proj_bits"] <= PACKED_BITS else count,)
    groups = (count // group["proj_group_size"], 1)
    return {f"{side}_codes": size, f"{side}_scales": groups, f"{side}_zeros": groups}


def basis_of(side: str, state: State, shape: tuple[int, int]) -> Float[Tensor, "a b"]:
    """A basis as a state keeps it."""
    codes, scales, zeros = (state[f"{side}_{name}"] for name in ("codes", "scales", "zeros"))
    count = math.prod(shape)
    codes = codes if len(codes) == count else unpack(codes, count)
    return dequantize_affine(codes.view(len(scales), -1), scales, zeros, shape)


def whole_type(name: str) -> torch.dtype | None:
    """The type of a tensor of the state that is not to be cast to its parameter's."""
    if name.endswith(("codes", "zeros")):
        return torch.uint8
    return torch.int64 if name in ("gap", "svd_count") else None


def check_q_galore(group: Mapping[str, Any]) -> None:
    """Refuse a parameter group with a hyperparameter outside its range."""
    bits, size, threshold = group["proj_bits"], group["proj_group_size"], group["cos_threshold"]
    fits = bits is None or (isinstance(bits, int) and 2 <= bits <= 8)
    require(fits, "proj_bits", bits, "a whole number from 2 to 8, or None")
    require(isinstance(size, int) and size >= 1, "proj_group_size", size, "a whole number of at least 1")
    require(threshold is None or -1 <= threshold <= 1, "cos_threshold", threshold, "within [-1, 1], or None")
    require(1 <= group["gamma_proj"] < math.inf, "gamma_proj", group["gamma_proj"], "at least 1 and finite")
    queue = group["queue_size"]
    require(isinstance(queue, int) and queue >= 1, "queue_size", queue, "a whole number of at least 1")


def q_galore_param_groups(
    model: nn.Module,
    rank: int | float | None = None,
    targets: str | type[nn.Module] | Sequence[str | type[nn.Module]] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for `QGaLoreAdamW`: those of `galore_param_groups`, and the weights of `Int8Linear` projected.

    Args:
        model, rank, targets: as in `galore_param_groups`; the targets say nothing of `Int8Linear`.
    """
    int8 = [layer.weight for layer in model.modules() if isinstance(layer, Int8Linear)]
    groups = galore_param_groups(model, rank, targets)
    if int8 and (not groups or groups[-1].get("rank", ...) is None):
        groups.append({"params": []} if rank is None else {"params": [], "rank": rank})
    if int8:
        groups[-1]["params"] += int8
    return groups


def with_int8_weights(
    model: nn.Module, group_size: int = 256, stochastic_round: bool = True, safe_zero: bool = False
) -> nn.Module:
    """The model with an `Int8Linear` for every linear layer that `galore_param_groups` projects, changed in place.

    Raises:
        ValueError: the group size does not divide the number of a layer's weights, or a weight is not finite.
    """
    chosen = {id(p) for group in galore_param_groups(model) if "rank" not in group for p in group["params"]}
    layers = {
        name: Int8Linear.from_linear(module, group_size, stochastic_round, safe_zero)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module.weight) in chosen
    }
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return model
