"""decoupleQ: whole numbers and their scales solved for in turn (Guo et al. 2024, arXiv:2404.12759).

A row w0 of a layer's weights becomes ŵ = s ⊙ w + z with whole numbers w from -2^(b-1) to 2^(b-1) - 1 and a scale s and
an offset z for each group of columns. With H = E[x xᵀ] of the layer's inputs, to whose diagonal 1 % of its mean is
added, each row by itself minimises the layer's squared output error

    E(w, s, z) = (ŵ - w0)ᵀ H (ŵ - w0)

by turns over w for given s and z, approximately (by GPTQ, or by Adam on weights that are frozen column by column), and
over s and z for given w, exactly: weighted least squares on the columns w and 1 of each group. z is a real number that
is added, no whole zero point, and s may become negative.

1. s and z from least and largest weight, w by rounding to nearest.
2. w by GPTQ on that grid.
3. Up to `max_iter` - 1 times: w for the present s and z (the first time for those that the best of 160 narrower ranges
   gives, followed by an exact solve), then s and z for the present w.

Every row takes over what is better for it, and the whole stops when fewer than one row in 10,000 gains. Where the model
is a chain of blocks, a second stage then keeps the whole numbers and trains scales, offsets and norms of each block, so
that the block gives what it gave before on the same inputs, those that come out of the quantised blocks before it.

The authors' code differs in small things. It gives up on a grouped solve if that of any row is singular, and damps them
all; here each row is judged for itself, by the same route with and without groups. Its symmetric grid covers only half
the range of a row without negative weights, and the asymmetric one gives a row of zeros a level beside 0; here both
begin with the range that the other rows have, and zeros stay zeros. It quantises a block's layers in four steps, each
on inputs that the steps before have changed; `quantize_` takes all layers of a block at once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int, Int8, Num
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fairtrial.methods.arguments import require
from fairtrial.methods.quantization.gptq import divisor, error_feedback, gptq_round, round_half_up
from fairtrial.methods.quantization.packing import PackedLinear, packed_layers
from fairtrial.methods.quantization.packing import group_size as group_size_of
from fairtrial.methods.quantization.quantize import (
    Call,
    Found,
    Grid,
    Want,
    check_groups,
    check_rounding,
    round_to,
)
from fairtrial.methods.registry import LogUniform, method

SOLVERS = "gptq", "train"
RANGES, NARROWEST = 160, 0.2  # how many ranges are tried, from the whole one on, and what all of them are wider than
GAINING = 1e-4  # the share of rows that must gain for another turn
AT_ONCE = 2**22  # numbers in the largest tensor of the exact solve


class Decoupled(NamedTuple):
    """A quantised weight: level = scale · number + zero.

    Attributes:
        numbers: whole ones.
        scale: of each group.
        zero: offset of each group, a real number.
        row_error: E of each row, with the damped H.
    """

    numbers: Int8[Tensor, "o i"]
    scale: Float[Tensor, "o g"]
    zero: Float[Tensor, "o g"]
    row_error: Float[Tensor, " o"]


class Rows(NamedTuple):
    """The same on the way, with numbers in the weight's dtype."""

    numbers: Float[Tensor, "o i"]
    scale: Float[Tensor, "o g"]
    zero: Float[Tensor, "o g"]
    error: Float[Tensor, " o"]


@torch.no_grad()
def decoupleq_quantize_linear(
    weight: Float[Tensor, "o i"],
    hessian: Float[Tensor, "i i"],
    bits: int = 2,
    group_size: int = -1,
    *,
    symmetric: bool = False,
    max_iter: int = 4,
    solver: str = "gptq",
    act_order: bool = True,
    percdamp: float = 0.01,
    iters_before_round: int = 200,
    inner_iters: int = 5,
) -> Decoupled:
    """The first stage for one weight, in its dtype but for the solves, which are in float64.

    Args:
        weight: of a linear layer, or that of a convolution flattened behind its outputs.
        hessian: mean of x xᵀ over the layer's inputs, or over a convolution's unfolded ones.
        bits: of a number, from 1 to 8.
        group_size: columns that share scale and offset; -1 for the whole row.
        symmetric: without offsets; not with groups.
        max_iter: 0 rounds to nearest, 1 takes the better of that and GPTQ for each row, n takes n - 1 turns more.
        solver: what finds the whole numbers in these turns, 'gptq' or 'train'.
        act_order: columns are rounded in falling order of their inputs' mean square.
        percdamp: added to the diagonal of the Hessian, as a part of its mean; more than 0.
        iters_before_round: steps of 'train' before the first column is frozen.
        inner_iters: steps of 'train' after each column that is.

    The defaults are those of the authors' run on LLaMA.

    Raises:
        ValueError: an argument lies outside its range, or shapes do not fit.
    """
    check_options(bits, group_size, symmetric, max_iter, solver, percdamp, iters_before_round, inner_iters)
    size = check_shapes(weight, hessian, group_size)
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    grouped = weight.view(len(weight), -1, size)
    damped = damp(hessian, percdamp)
    h = damped.to(weight.dtype)

    def rows(numbers: Tensor, scale: Tensor, zero: Tensor) -> Rows:
        return Rows(numbers, scale, zero, squared_error(levels(numbers, scale, zero), weight, h))

    def nearest(scale: Tensor, zero: Tensor) -> Rows:
        numbers = round_half_up((grouped - zero[..., None]) / scale[..., None]).clamp_(lowest, highest)
        return rows(numbers.flatten(1), scale, zero)

    scale, zero = whole_range(grouped, bits, symmetric=symmetric)
    found = narrowed = nearest(scale, zero)
    if max_iter > 0:
        feedback = error_feedback(damped, act_order=act_order)
        found, _ = better(found, rows(gptq_round(weight, scale, zero, feedback, lowest, highest), scale, zero))
    for turn in range(max_iter - 1):
        if turn == 0:
            for share in torch.linspace(1, NARROWEST, RANGES + 1, dtype=torch.float64)[1:-1].tolist():
                narrowed, _ = better(narrowed, nearest(share * scale, share * zero))
            at = fit_scale_zero(narrowed.numbers, weight, damped, group_size, symmetric=symmetric)
        else:
            at = found.scale, found.zero
        if solver == "gptq":
            numbers = gptq_round(weight, *at, feedback, lowest, highest)
        else:
            numbers = train_round(weight, *at, h, feedback.order, lowest, highest, iters_before_round, inner_iters)
        found, gaining = better(found, rows(numbers, *at))
        if gaining < GAINING:
            break
        at = fit_scale_zero(found.numbers, weight, damped, group_size, symmetric=symmetric)
        found, gaining = better(found, rows(found.numbers, *at))
        if gaining < GAINING:
            break
    return Decoupled(found.numbers.to(torch.int8), *found[1:])


def better(old: Rows, new: Rows) -> tuple[Rows, float]:
    """Of each row the one with the smaller error, and the share of rows that gain."""
    gains = new.error < old.error
    where = (gains[:, None], gains[:, None], gains[:, None], gains)
    chosen = Rows(*(torch.where(gain, n, o) for gain, n, o in zip(where, new, old, strict=True)))
    return chosen, gains.sum().item() / len(gains)


def damp(hessian: Float[Tensor, "i i"], percdamp: float) -> Float[Tensor, "i i"]:
    """Symmetric, in float64, with a part of its mean diagonal added to the diagonal; of inputs that are all 0, I."""
    h = hessian.double()
    mean = h.diagonal().mean()
    unit = torch.eye(len(h), dtype=h.dtype, device=h.device)
    return (h + h.t()) / 2 + torch.where(mean > 0, percdamp * mean, 1) * unit


def levels(
    numbers: Float[Tensor, "o i"], scale: Float[Tensor, "o g"], zero: Float[Tensor, "o g"]
) -> Float[Tensor, "o i"]:
    """What the numbers stand for."""
    grouped = numbers.view(*scale.shape, -1)
    return torch.addcmul(zero[..., None], grouped, scale[..., None]).view(numbers.shape)


def squared_error(
    quantized: Float[Tensor, "o i"], weight: Float[Tensor, "o i"], hessian: Float[Tensor, "i i"]
) -> Float[Tensor, " o"]:
    """E of each row."""
    off = quantized - weight
    return ((off @ hessian) * off).sum(1)


def whole_range(
    grouped: Float[Tensor, "o g s"], bits: int, *, symmetric: bool
) -> tuple[Float[Tensor, "o g"], Float[Tensor, "o g"]]:
    """Scale and offset from the least to the largest weight, with 0 among them; scale 1 for a group of zeros."""
    low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, 1)
    return scale, torch.zeros_like(scale) if symmetric else low + scale * 2 ** (bits - 1)


# Scales and offsets for given numbers ---------------------------------------------------------------------------------


@torch.no_grad()
def fit_scale_zero(
    numbers: Num[Tensor, "o i"],
    weight: Float[Tensor, "o i"],
    hessian: Float[Tensor, "i i"],
    group_size: int = -1,
    *,
    symmetric: bool = False,
) -> tuple[Float[Tensor, "o g"], Float[Tensor, "o g"]]:
    """Scale and offset of each group with the least E for given numbers, solved in float64 and in the weight's dtype.

    Where the solution is not unique, 1 % of the mean of its diagonal is added to the normal equations' matrix.

    Args:
        numbers: whole ones.
        weight: what they stand for.
        hessian: mean of x xᵀ over the inputs, damped or not.
        group_size: columns that share scale and offset; -1 for the whole row.
        symmetric: scales alone, and offsets of 0; not with groups.

    Raises:
        ValueError: shapes do not fit, or groups are to be symmetric.
    """
    size = check_shapes(weight, hessian, group_size)
    require(numbers.shape == weight.shape, "numbers", tuple(numbers.shape), f"of the weight's shape {weight.shape}")
    w, w0, h = numbers.double(), weight.double(), hessian.double()
    if symmetric:
        require(size == weight.shape[1], "symmetric", symmetric, "False with groups")
        against = w @ h
        scale = ((against * w0).sum(1) / divisor((against * w).sum(1)))[:, None].to(weight.dtype)
        return scale, torch.zeros_like(scale)
    groups = weight.shape[1] // size
    of_groups = h.view(groups, size, groups, size)
    ones = of_groups.sum((1, 3))
    solutions = []
    rows_at_once = max(1, AT_ONCE // (groups * weight.shape[1]))
    for some, targets in zip(w.split(rows_at_once), w0.split(rows_at_once), strict=True):
        by_group = some.view(len(some), groups, size)
        against = torch.einsum("ogs,gsht->oght", by_group, of_groups)
        scales = torch.einsum("oght,oht->ogh", against, by_group)
        mixed = against.sum(3)
        wanted = (targets @ h).view(by_group.shape)
        matrix = torch.cat(
            [torch.cat([scales, mixed], 2), torch.cat([mixed.transpose(1, 2), ones.expand_as(scales)], 2)], 1
        )
        sides = torch.cat([(wanted * by_group).sum(2), wanted.sum(2)], 1)
        solutions.append(solve(matrix, sides))
    scale, zero = torch.cat(solutions).to(weight.dtype).split(groups, 1)
    return scale, zero


def solve(matrix: Float[Tensor, "o n n"], sides: Float[Tensor, "o n"]) -> Float[Tensor, "o n"]:
    """The solution of each system; of a singular one that with 1 % of the mean diagonal on its diagonal."""
    solution: Tensor
    solution, code = torch.linalg.solve_ex(matrix, sides)
    singular = (code != 0) | ~solution.isfinite().all(1)
    if singular.any():
        some = matrix[singular]
        mean = some.diagonal(dim1=1, dim2=2).mean(1)
        unit = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
        damped = some + (0.01 * mean)[:, None, None] * unit
        solution[singular] = torch.linalg.solve_ex(damped, sides[singular]).result
    return solution


# Numbers for given scales and offsets, by training --------------------------------------------------------------------


def train_round(
    weight: Float[Tensor, "o i"],
    scale: Float[Tensor, "o g"],
    zero: Float[Tensor, "o g"],
    hessian: Float[Tensor, "i i"],
    order: Int[Tensor, " i"],
    lowest: int,
    highest: int,
    iters_before_round: int,
    inner_iters: int,
    lr: float = 1e-3,
) -> Float[Tensor, "o i"]:
    """Numbers by Adam on E within the range of levels; then columns are rounded one by one, and the others follow.

    Args:
        weight, scale, zero: of the layer; a scale may be negative.
        hessian: damped.
        order: of the columns.
        lowest, highest: the range of the numbers.
        iters_before_round, inner_iters: steps before the first column and after each.
        lr: of Adam.
    """
    size = weight.shape[1] // scale.shape[1]
    s, z = (each.repeat_interleave(size, 1)[:, order] for each in (divisor(scale), zero))
    target, h = weight[:, order], hessian[order][:, order]
    least, most = torch.minimum(lowest * s + z, highest * s + z), torch.maximum(lowest * s + z, highest * s + z)
    w, mean, square = target.clone(), torch.zeros_like(target), torch.zeros_like(target)
    steps = 0

    def step(first: int, eps: float) -> None:
        nonlocal steps
        steps += 1
        free = slice(first, None)
        gradient = (w - target) @ h[:, free]
        mean[:, free].lerp_(gradient, 0.1)
        square[:, free].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        size_of_step = square[:, free].sqrt().div_(math.sqrt(1 - 0.999**steps)).add_(eps)
        w[:, free].addcdiv_(mean[:, free], size_of_step, value=-lr / (1 - 0.9**steps))
        w[:, free].clamp_(least[:, free], most[:, free])

    for _ in range(iters_before_round):
        step(0, 1e-5)
    for i in range(w.shape[1] - 1):
        number = round_half_up((w[:, i] - z[:, i]) / s[:, i]).clamp_(lowest, highest)
        w[:, i] = number * s[:, i] + z[:, i]
        for _ in range(inner_iters):
            step(i + 1, 1e-4)
    numbers = round_half_up((w - z) / s).clamp_(lowest, highest)
    return numbers[:, torch.argsort(order)]


# The second stage -----------------------------------------------------------------------------------------------------


@torch.enable_grad()
def minimize_block(
    block: nn.Module,
    inputs: Sequence[Call],
    targets: Sequence[Tensor],
    epochs: int = 4,
    lr: float = 1e-5,
    *,
    weight_decay: float = 1e-6,
    train_norms: bool = True,
    train_bias: bool = False,
    symmetric: bool = False,
) -> float:
    """Train what is not a whole number in a block with packed layers, in place, by Adam on its mean squared error.

    Args:
        block: a module whose linear layers are packed.
        inputs: the arguments (args, kwargs) of each call.
        targets: what the block gave for them before it was quantised.
        epochs: how often all of them are gone through, at least 1.
        lr: learning rate, more than 0.
        weight_decay: of Adam, added to the gradient; at least 0.
        train_norms: train weights and biases of the block's norms, too.
        train_bias: train the biases of packed layers, too.
        symmetric: levels stay symmetric, so that scales alone are trained.

    The defaults are those of the authors' run on LLaMA.

    Returns:
        The mean squared error over the last epoch, as training went.

    Raises:
        ValueError: an argument lies outside its range, no layer is packed, or the error is no longer finite; the block
            is as it was then.
    """
    check_stage(epochs, lr, weight_decay)
    require(len(inputs) == len(targets) > 0, "targets", len(targets), f"as many as inputs, {len(inputs)}, and some")
    packed = dict(packed_layers(block))
    require(bool(packed), "block", type(block).__name__, "a module with packed layers")
    scales = {name: leaf(layer.scale) for name, layer in packed.items()}
    zeros = {n: leaf(layer.offset.float() + 2 ** (layer.bits - 1) * layer.scale) for n, layer in packed.items()}
    others = {
        f"{name}.{part}": tensor
        for name, module in block.named_modules()
        for part, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if (train_norms and "Norm" in type(module).__name__ and isinstance(tensor, nn.Parameter))
        or (train_bias and name in packed and part == "bias")
    }
    trained = {name: leaf(tensor) for name, tensor in others.items()}

    def parts() -> dict[str, Tensor]:
        held = {name: trained[name].to(tensor.dtype) for name, tensor in others.items()}
        for name, layer in packed.items():
            held[f"{name}.scale"] = scales[name]
            held[f"{name}.offset"] = zeros[name] - 2 ** (layer.bits - 1) * scales[name]
        return held

    free = [*scales.values(), *([] if symmetric else zeros.values()), *trained.values()]
    optimizer = torch.optim.Adam(free, lr, betas=(0.9, 0.99), eps=2e-5, weight_decay=weight_decay)
    for _ in range(epochs):
        total = torch.zeros((), device=targets[0].device)
        for (args, kwargs), target in zip(inputs, targets, strict=True):
            output = functional_call(block, parts(), args, kwargs)
            loss = F.mse_loss(output[0] if isinstance(output, tuple) else output, target)
            for tensor, gradient in zip(free, torch.autograd.grad(loss, free), strict=True):
                tensor.grad = gradient
            optimizer.step()
            total += loss.detach()
    mean = total.item() / len(inputs)
    with torch.no_grad():
        held = parts()
        stored = [
            held[f"{name}.{part}"].to(getattr(layer, part).dtype)
            for name, layer in packed.items()
            for part in ("scale", "offset")
        ]
        finite = math.isfinite(mean) and all(tensor.isfinite().all() for tensor in [*free, *stored])
        require(finite, "lr", lr, "so small that the block's error stays finite")
        for name, layer in packed.items():
            layer.scale = held[f"{name}.scale"].detach().to(layer.scale.dtype)
            layer.offset = held[f"{name}.offset"].to(layer.offset.dtype)
        for name, tensor in others.items():
            tensor.copy_(held[name])
    return mean


def leaf(tensor: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """A copy in float32 that gradients end in."""
    return tensor.detach().float().clone().requires_grad_()


# The whole ------------------------------------------------------------------------------------------------------------


@method(
    paper="decoupleq",
    slot="quantizer",
    search={"lr": LogUniform(1e-6, 1e-3), "percdamp": LogUniform(1e-3, 1e-1)},
    bind=lambda setting: {"bits": setting.bits, "group_size": setting.group_size},
)
@dataclass(frozen=True)
class DecoupleQ:
    """Both stages, for `quantize_(model, DecoupleQ(bits=2), calibration)`.

    Args:
        bits: of a code, from 1 to 8.
        group_size: weights along the input that share scale and offset; -1 for the whole row.
        symmetric: without offsets; not with groups.
        max_iter, solver, act_order, percdamp, iters_before_round, inner_iters: as in `decoupleq_quantize_linear`.
        epochs, lr, weight_decay, train_norms, train_bias: as in `minimize_block`, which only models that are chains of
            blocks come to; 0 epochs leave it out.
        scale_dtype: what scales and offsets are held in.

    The defaults are those of the authors' run on LLaMA.

    Raises:
        ValueError: an argument lies outside its range; when quantising, the group size does not divide a layer.
    """

    bits: int = 2
    group_size: int = -1
    symmetric: bool = False
    max_iter: int = 4
    solver: str = "gptq"
    act_order: bool = True
    percdamp: float = 0.01
    iters_before_round: int = 200
    inner_iters: int = 5
    epochs: int = 4
    lr: float = 1e-5
    weight_decay: float = 1e-6
    train_norms: bool = True
    train_bias: bool = False
    scale_dtype: torch.dtype = torch.float16

    wants: ClassVar[frozenset[Want]] = frozenset({"hessian"})

    def __post_init__(self) -> None:
        check_options(
            self.bits,
            self.group_size,
            self.symmetric,
            self.max_iter,
            self.solver,
            self.percdamp,
            self.iters_before_round,
            self.inner_iters,
        )
        check_stage(self.epochs or 1, self.lr, self.weight_decay)

    def check(self, name: str, layer: nn.Linear) -> None:
        check_groups(name, layer, self.group_size)

    @torch.no_grad()
    def quantize(self, name: str, layer: nn.Linear, found: Found) -> PackedLinear:
        assert found.hessian is not None
        numbers, scale, zero, _ = decoupleq_quantize_linear(
            layer.weight.float(),
            found.hessian,
            self.bits,
            self.group_size,
            symmetric=self.symmetric,
            max_iter=self.max_iter,
            solver=self.solver,
            act_order=self.act_order,
            percdamp=self.percdamp,
            iters_before_round=self.iters_before_round,
            inner_iters=self.inner_iters,
        )
        lowest = -(2 ** (self.bits - 1))
        codes = (numbers.to(torch.int16) - lowest).to(torch.uint8)
        held = Grid(scale, zero).held_in(self.scale_dtype).scale
        moved = (held - scale).abs() > torch.finfo(self.scale_dtype).eps * scale.abs()  # too near to 0 to be held
        scale = torch.where(moved, held, scale)
        grid = Grid(scale, zero + lowest * scale).held_in(self.scale_dtype)
        if moved.any():
            anew = round_to(layer.weight.float().view(*scale.shape, -1), grid, self.bits).to(torch.uint8)
            codes = torch.where(moved[..., None], anew, codes.view(anew.shape)).flatten(1)
        return PackedLinear(
            codes, grid.scale.to(self.scale_dtype), grid.offset.to(self.scale_dtype), self.bits, layer.bias
        )

    def finish(self, block: nn.Module, inputs: Sequence[Call], targets: Sequence[Tensor]) -> None:
        if self.epochs:
            minimize_block(
                block,
                inputs,
                targets,
                self.epochs,
                self.lr,
                weight_decay=self.weight_decay,
                train_norms=self.train_norms,
                train_bias=self.train_bias,
                symmetric=self.symmetric,
            )


# Arguments ------------------------------------------------------------------------------------------------------------


def check_options(
    bits: int,
    group_size: int,
    symmetric: bool,
    max_iter: int,
    solver: str,
    percdamp: float,
    iters_before_round: int,
    inner_iters: int,
) -> None:
    check_rounding(bits, group_size)
    require(not symmetric or group_size == -1, "symmetric", symmetric, "False with groups")
    require(solver in SOLVERS, "solver", solver, " or ".join(map(repr, SOLVERS)))
    require(0 < percdamp < math.inf, "percdamp", percdamp, "positive")
    counts = {"max_iter": max_iter, "iters_before_round": iters_before_round, "inner_iters": inner_iters}
    for name, count in counts.items():
        require(isinstance(count, int) and count >= 0, name, count, "a whole number of at least 0")


def check_stage(epochs: int, lr: float, weight_decay: float) -> None:
    require(isinstance(epochs, int) and epochs >= 1, "epochs", epochs, "a whole number of at least 1")
    require(0 < lr < math.inf, "lr", lr, "positive")
    require(0 <= weight_decay < math.inf, "weight_decay", weight_decay, "at least 0")


def check_shapes(weight: Tensor, hessian: Tensor, asked: int) -> int:
    """The size of groups, of a weight and a Hessian that fit each other."""
    width = weight.shape[1]
    require(
        hessian.shape == (width, width), "hessian", tuple(hessian.shape), f"of shape {(width, width)}, as inputs are"
    )
    return group_size_of(width, asked)
