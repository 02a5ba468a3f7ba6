"""GWQ: keep the weights with the largest loss gradients, and round the others (Shao et al. 2024, arXiv:2411.00850).

One backward pass of the loss L on one calibration sequence gives G = ∂L/∂W for every linear layer. The weights with the
largest |G|, one in a hundred, stay as they are, in 16 bits. The others are rounded in groups along the input: with the
least and the largest of those in a group,

    Δ = (max - min) / (2^b - 1),    z = round(-min / Δ),    q = clamp(round(w / Δ) + z, 0, 2^b - 1),    ŵ = (q - z) Δ.

Ranking scope, group size and whether outliers are excluded when scales are fitted are our choices; the publication
states only the gradient criterion, the 1 % ratio and group-wise rounding. There is no reference code. Other criteria,
to compare with, are magnitude |W|, |G ⊙ W|, W² times the mean square of the input, and chance.

A weight takes b + 32/g bits with scales and offsets of 16, and each outlier 16 more for its value and 32 for its place;
its code is stored nevertheless.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fairtrial.methods.arguments import require
from fairtrial.methods.quantization.packing import PackedLinear
from fairtrial.methods.quantization.packing import group_size as group_size_of
from fairtrial.methods.quantization.quantize import (
    Batch,
    Found,
    Grid,
    Want,
    check_finite_weights,
    check_groups,
    check_rounding,
    check_unshared_weights,
    linear_layers,
    put_in_place_of,
    round_to,
    run,
    watching,
)
from fairtrial.methods.registry import Categorical, method

SCOPES = "matrix", "row", "global"
SCORES = "grad", "grad_weight", "magnitude", "hessian_diag", "random"

Loss = Callable[[nn.Module, Any], Tensor]


def next_token_loss(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """Mean cross entropy of each token given those before it; what the attention mask hides does not count.

    Args:
        model: gives an object with `logits`, as causal language models of transformers do.
        batch: token ids (n, t), or a mapping with them as `input_ids`.

    Raises:
        ValueError: the batch has no token ids, or the model gives no logits.
    """
    given: Any = {"input_ids": batch} if isinstance(batch, Tensor) else batch
    fits = isinstance(given, Mapping) and "input_ids" in given
    require(fits, "batch", type(batch).__name__, "token ids, or a mapping with input_ids; or give a loss")
    logits = getattr(model(batch) if isinstance(batch, Tensor) else model(**given), "logits", None)
    if logits is None:
        raise ValueError(f"model must be one that gives logits of tokens, got {type(model).__name__}; or give a loss")
    target, mask = given["input_ids"][:, 1:], given.get("attention_mask")
    if mask is not None:
        target = target.masked_fill(mask[:, 1:] == 0, -100)
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), target.flatten(), ignore_index=-100)


def gradient_outlier_mask(
    model: nn.Module,
    batch: Batch,
    ratio: float = 0.01,
    scope: str = "matrix",
    score: str = "grad",
    *,
    loss: Loss = next_token_loss,
    skip: Sequence[str] = ("lm_head",),
    generator: torch.Generator | None = None,
) -> dict[str, Bool[Tensor, "_ _"]]:
    """Which weights of each linear layer are outliers: ⌊ratio · n⌋ of n, and of equal ones those that come first.

    Args:
        model: is put into evaluation mode and not changed; gradients are taken in float32.
        batch: of calibration data, as the loss takes it.
        ratio: of outliers, within [0, 1).
        scope: within what the ratio holds, 'matrix', 'row' of a matrix, or 'global', all matrices together.
        score: what makes an outlier, 'grad' for |G|, 'grad_weight' for |G ⊙ W|, 'magnitude', 'hessian_diag' for the
            weight's square times the mean square of its input, or 'random'.
        loss: of a model on the batch.
        skip: names of layers that are left alone, whole or their last part.
        generator: draws for 'random', on the CPU.

    Raises:
        ValueError: an argument lies outside its range, there is no linear layer, or the loss gives one no finite
            gradient.
    """
    names = [*linear_layers(model, skip)]
    require(bool(names), "model", type(model).__name__, "one with linear layers that are not skipped")
    check_ranking(ratio, scope, score, generator)
    return outliers(scores(model.eval(), [batch], names, score, loss, generator), ratio, scope)


# Scores ---------------------------------------------------------------------------------------------------------------


def scores(
    model: nn.Module,
    batches: Iterable[Batch],
    names: Sequence[str],
    score: str,
    loss: Loss,
    generator: torch.Generator | None,
) -> dict[str, Float[Tensor, "_ _"]]:
    """How much of an outlier every weight is; gradients are added up over the batches."""
    weights = {name: model.get_submodule(name).get_parameter("weight").detach().float() for name in names}
    if score == "magnitude":
        return {name: w.abs() for name, w in weights.items()}
    if score == "random":
        return {n: torch.rand(w.shape, generator=generator).to(w.device) for n, w in weights.items()}
    if score == "hessian_diag":
        squares = mean_squares(model, batches, names)
        return {name: w.square() * squares[name] for name, w in weights.items()}
    gradients = weight_gradients(model, batches, names, loss)
    if score == "grad_weight":
        return {name: (gradients[name] * w).abs() for name, w in weights.items()}
    return {name: gradient.abs() for name, gradient in gradients.items()}


class OnBatch(nn.Module):
    """A model's loss on a batch, as a module, so that its weights can be lent to it."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)


@torch.enable_grad()
def weight_gradients(
    model: nn.Module, batches: Iterable[Batch], names: Sequence[str], loss: Loss
) -> dict[str, Float[Tensor, "_ _"]]:
    """Gradient of the loss, summed over the batches, for the weight of each named layer, in float32.

    Raises:
        ValueError: the loss does not depend on a layer, or a gradient is not finite.
    """
    held = {f"model.{name}": tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    held = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in held.items()}
    weights = [held[f"model.{name}.weight"].requires_grad_() for name in names]
    sums: list[Tensor] | None = None
    for batch in batches:
        value = functional_call(OnBatch(model, loss), held, (batch,))
        found = torch.autograd.grad(value, weights, allow_unused=True)
        for name, gradient in zip(names, found, strict=True):
            if gradient is None:
                raise ValueError(f"the loss gives the layer {name} no gradient: skip it, or give a loss it has part in")
            if not gradient.isfinite().all():
                raise ValueError(f"the loss gives the layer {name} a gradient that is not finite")
        sums = list(found) if sums is None else [total.add_(new) for total, new in zip(sums, found, strict=True)]
    require(sums is not None, "batches", 0, "at least one")
    return dict(zip(names, sums or (), strict=True))


def mean_squares(model: nn.Module, batches: Iterable[Batch], names: Sequence[str]) -> dict[str, Float[Tensor, " _"]]:
    """Mean square of each input of the named layers.

    Raises:
        ValueError: a layer is never called.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(name: str, x: Tensor, output: Any) -> None:
        rows = x.detach().float().flatten(0, -2)
        sums[name] = sums.get(name, 0) + rows.square().sum(0)
        counts[name] = counts.get(name, 0) + len(rows)

    with watching({name: model.get_submodule(name) for name in names}, see):
        for batch in batches:
            run(model, batch)
    for name in names:
        if name not in sums:
            raise ValueError(f"the calibration data never reach the layer {name}")
    return {name: sums[name] / counts[name] for name in names}


# Outliers -------------------------------------------------------------------------------------------------------------


def outliers(of_layers: Mapping[str, Float[Tensor, "_ _"]], ratio: float, scope: str) -> dict[str, Bool[Tensor, "_ _"]]:
    """The weights with the largest scores, in each row, each matrix, or all together."""
    if scope != "global":
        return {n: largest(s if scope == "row" else s.view(1, -1), ratio).view(s.shape) for n, s in of_layers.items()}
    chosen = largest(torch.cat([s.flatten() for s in of_layers.values()])[None], ratio)[0]
    parts = chosen.split([s.numel() for s in of_layers.values()])
    return {name: part.view(s.shape) for part, (name, s) in zip(parts, of_layers.items(), strict=True)}


def largest(score: Float[Tensor, "r n"], ratio: float) -> Bool[Tensor, "r n"]:
    """Of each row the ⌊ratio · n⌋ largest; of equal ones those that come first."""
    count = int(ratio * score.shape[1] + 1e-9)  # 0.29 · 100 is 28.999… in floating point
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    least = score.topk(count).values[:, -1:]
    above, equal = score > least, score == least
    places = count - above.sum(1, keepdim=True)
    return above | (equal & (equal.cumsum(1) <= places))


# Rounding -------------------------------------------------------------------------------------------------------------


def round_around(
    layer: nn.Linear,
    mask: Bool[Tensor, "o i"],
    bits: int,
    group_size: int,
    *,
    fit_without_outliers: bool = True,
    outlier_dtype: torch.dtype = torch.float16,
    scale_dtype: torch.dtype = torch.float16,
) -> PackedLinear:
    """The layer with every weight rounded that the mask does not name."""
    weight = layer.weight.detach().float()
    shape = len(weight), -1, group_size_of(layer.in_features, group_size)
    grouped = weight.view(shape)
    fitted = ~mask.view(shape) if fit_without_outliers else torch.ones_like(grouped, dtype=torch.bool)
    grid = fit_range_of(grouped, fitted, bits).held_in(scale_dtype)
    codes = round_to(grouped, grid, bits).to(torch.uint8).flatten(1)
    places = mask.flatten().nonzero().flatten()
    kept = (places, layer.weight.detach().flatten()[places].to(outlier_dtype)) if len(places) else None
    scale, offset = grid.scale.to(scale_dtype), grid.offset.to(scale_dtype)
    return PackedLinear(codes, scale, offset, bits, layer.bias, kept=kept)


def fit_range_of(grouped: Float[Tensor, "o g s"], fitted: Bool[Tensor, "o g s"], bits: int) -> Grid:
    """The grid from least to largest of those weights of each group that count, with a whole zero point.

    0 is a level, but need not be within the range. Weights that are all alike are one step from 0, and of a group of
    which none counts the scale is 1.
    """
    low = torch.where(fitted, grouped, torch.inf).amin(-1)
    high = torch.where(fitted, grouped, -torch.inf).amax(-1)
    some = low <= high
    low, high = torch.where(some, low, 0), torch.where(some, high, 0)
    step = (high - low) / (2**bits - 1)
    step = torch.where(step > 0, step, low.abs())
    step = torch.where(step > 0, step, 1)
    return Grid(step, step * torch.round(low / step))


def gwq_quantize(
    model: nn.Module,
    masks: Mapping[str, Bool[Tensor, "_ _"]],
    bits: int = 4,
    group_size: int = 64,
    *,
    fit_without_outliers: bool = True,
    outlier_dtype: torch.dtype = torch.float16,
    scale_dtype: torch.dtype = torch.float16,
) -> nn.Module:
    """Replace linear layers by packed ones that keep the weights which a mask names, in place; returns the model.

    Of a model that is a layer itself it returns the new layer. A layer in several places goes by the first of its
    names.

    Args:
        model: whatever has the layers.
        masks: of the layers to be quantised, by name, as `gradient_outlier_mask` gives them.
        bits, group_size, fit_without_outliers, outlier_dtype, scale_dtype: as in `GWQ`.

    Raises:
        ValueError: an argument lies outside its range, a mask has no linear layer that it fits, a group size does not
            divide a layer, a layer shares its weights with another module or has some that are not finite, or
            `scale_dtype` cannot hold its scales; nothing is changed then.
    """
    check_rounding(bits, group_size)
    linears = linear_layers(model, ())
    for name, mask in masks.items():
        require(name in linears, "masks", name, "of linear layers that are not quantised yet")
        shape = linears[name].weight.shape
        require(mask.shape == shape, f"masks[{name!r}]", tuple(mask.shape), f"of the weight's shape {tuple(shape)}")
        check_groups(name, linears[name], group_size)
    named = {name: linears[name] for name in masks}
    check_unshared_weights(model, named)
    check_finite_weights(named)
    made = {
        name: round_around(
            linears[name],
            mask,
            bits,
            group_size,
            fit_without_outliers=fit_without_outliers,
            outlier_dtype=outlier_dtype,
            scale_dtype=scale_dtype,
        )
        for name, mask in masks.items()
    }
    for name, layer in made.items():
        model = put_in_place_of(model, linears[name], layer)
    return model


@method(
    paper="gwq",
    slot="quantizer",
    search={"scope": Categorical(SCOPES)},
    bind=lambda setting: {"bits": setting.bits, "group_size": setting.group_size},
)
@dataclass(frozen=True)
class GWQ:
    """Masks and rounding, for `quantize_(model, GWQ(bits=4), calibration)`.

    The paper calibrates with a single sequence; over several batches gradients are added up.

    Args:
        bits: of a code, from 1 to 8.
        group_size: weights along the input that share scale and offset, our default; -1 for the whole row.
        ratio: of outliers, within [0, 1); 1 % in the paper.
        scope, score: as in `gradient_outlier_mask`; our default scope, the paper's score.
        fit_without_outliers: scales are made for the weights that are rounded; our default.
        loss: of a model on a batch.
        generator: draws for the score 'random', on the CPU.
        outlier_dtype: what outliers are held in; float16 in the paper.
        scale_dtype: what scales and offsets are held in.

    Raises:
        ValueError: an argument lies outside its range; when quantising, the group size does not divide a layer, or the
            loss gives one no finite gradient.
    """

    bits: int = 4
    group_size: int = 64
    ratio: float = 0.01
    scope: str = "matrix"
    score: str = "grad"
    fit_without_outliers: bool = True
    loss: Loss = next_token_loss
    generator: torch.Generator | None = None
    outlier_dtype: torch.dtype = torch.float16
    scale_dtype: torch.dtype = torch.float16

    wants: ClassVar[frozenset[Want]] = frozenset()

    def __post_init__(self) -> None:
        check_rounding(self.bits, self.group_size)
        check_ranking(self.ratio, self.scope, self.score, self.generator)

    def check(self, name: str, layer: nn.Linear) -> None:
        check_groups(name, layer, self.group_size)

    def prepare(
        self, model: nn.Module, calibration: Sequence[Batch], names: Sequence[str]
    ) -> dict[str, Bool[Tensor, "_ _"]]:
        found = scores(model, calibration, names, self.score, self.loss, self.generator)
        return outliers(found, self.ratio, self.scope)

    def quantize(self, name: str, layer: nn.Linear, found: Found) -> PackedLinear:
        return round_around(
            layer,
            found.prepared,
            self.bits,
            self.group_size,
            fit_without_outliers=self.fit_without_outliers,
            outlier_dtype=self.outlier_dtype,
            scale_dtype=self.scale_dtype,
        )


# Arguments ------------------------------------------------------------------------------------------------------------


def check_ranking(ratio: float, scope: str, score: str, generator: torch.Generator | None) -> None:
    require(0 <= ratio < 1, "ratio", ratio, "within [0, 1)")
    require(scope in SCOPES, "scope", scope, " or ".join(map(repr, SCOPES)))
    require(score in SCORES, "score", score, " or ".join(map(repr, SCORES)))
    require(score != "random" or generator is not None, "generator", generator, "given for the score 'random'")
