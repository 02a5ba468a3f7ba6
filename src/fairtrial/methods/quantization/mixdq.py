"""MixDQ: mixed precision after training for one-step text-to-image networks (Zhao et al. 2024, arXiv:2405.17873).

- The first token of a text begins every prompt alike and is orders of magnitude larger than the rest. Projections of
  cross-attention leave it in float, and ranges of activations are those of the tokens after it.
- How sensitive a layer is, is what the output loses when that layer alone has b bits. For layers that bear on quality
  it is told by the signal-to-noise ratio, 10 log₁₀(Σ y² / Σ (ŷ - y)²) in dB; for those that bear on content
  (cross-attention and feed-forward) by structural similarity, with one window over the whole image.
- Bits are allocated by a 0/1 programme for either group, since dB and similarity do not add up: maximise Σ_l S_l(b_l)
  with a mean over weights within 0.02 of the group's. With r content weights for each quality weight, and k bits in
  content for each in quality, a mean of a bits is a_q = a (1 + r) / (1 + k r) and a_c = k a_q. Of many k and a, the
  allocation of least squared error at the output is taken.

Weights are rounded symmetrically by output channel, Δ = max|w| / (2^(b-1) - 1); activations asymmetrically, as a whole
tensor, with 0 in their range, which is a running mean over calibration batches.

The authors' similarity has windows of 511 on 512 pixels, a single one in effect. Where a channel is almost constant
their code sets the steps of all channels to 1e-6; here that of a channel of zeros is 1. Their solver is SCIP, here it
is HiGHS, by way of SciPy. `MixDQ` treats models that give no images: all of their layers count as quality layers.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.methods.arguments import require
from fairtrial.methods.quantization.fake_quantization import straight_through
from fairtrial.methods.quantization.integer_programme import one_each
from fairtrial.methods.quantization.packing import PackedLinear, group_size
from fairtrial.methods.quantization.quantize import Batch, Found, RoundToNearest, Want, check_groups, run
from fairtrial.methods.registry import method

MOMENTUM = 0.95  # of running ranges
LEAST_NOISE = 200.0  # dB of a layer that loses nothing
BAND = 0.02  # bits that a mean may be off
CONTENT = "attn2", "ff"  # what names of content layers hold
Scores = Mapping[str, Mapping[int, float | int]]


# Rounding ----------------------------------------------------------------------------------------------------------


def fake_quantize(
    x: Float[Tensor, "*s"], bits: int, symmetric: bool = True, channel_axis: int | None = None
) -> Float[Tensor, "*s"]:
    """x rounded between its least and its largest entry, with the gradient of x.

    Args:
        x: of any shape.
        bits: from 2 to 16.
        symmetric: levels from -2^(b-1) to 2^(b-1) - 1 steps around 0; otherwise 2^b levels in a range that holds 0.
        channel_axis: of channels with a range each; None: one range for all.

    Raises:
        ValueError: `bits` is out of range.
    """
    require_bits(bits)
    with torch.no_grad():
        others = [axis for axis in range(x.ndim) if channel_axis is None or axis != channel_axis % x.ndim]
        low, high = (x.amin(others, keepdim=True), x.amax(others, keepdim=True)) if others else (x, x)
        value = round_within(x, low, high, bits, symmetric=symmetric)
    return straight_through(value, x)


def round_within(x: Tensor, low: Tensor, high: Tensor, bits: int, *, symmetric: bool) -> Tensor:
    """x rounded between two ends, which are moved so that 0 lies between them."""
    low, high = low.clamp_max(0), high.clamp_min(0)
    half = 2 ** (bits - 1)
    step = torch.maximum(-low, high) / (half - 1) if symmetric else (high - low) / (2 * half - 1)
    step = torch.where(step > 0, step, 1)
    if symmetric:
        return (x / step).round().clamp(-half, half - 1) * step
    zero = torch.round(-low / step)
    return ((x / step).round() + zero).clamp(0, 2 * half - 1).sub(zero) * step


def require_bits(bits: int) -> None:
    require(type(bits) is int and 2 <= bits <= 16, "bits", bits, "a whole number from 2 to 16")


class ActivationQuantizer(nn.Module):
    """Activations rounded asymmetrically, within a range that calibration has found.

    Args:
        bits: from 2 to 16; they may be set anew, the range does not depend on them.

    Raises:
        ValueError: `bits` is out of range.
    """

    low: Tensor
    high: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        require_bits(bits)
        self.bits = bits
        self.register_buffer("low", torch.tensor(math.nan))
        self.register_buffer("high", torch.tensor(math.nan))

    @torch.no_grad()
    def observe(self, x: Float[Tensor, "*s"]) -> None:
        """Take a calibration batch: m ← 0.95 m + 0.05 m_batch for either end, from the first batch's on.

        Raises:
            ValueError: the batch is not finite.
        """
        if x.numel() == 0:
            return
        low, high = x.amin().clamp_max(0), x.amax().clamp_min(0)
        require(bool(low.isfinite() & high.isfinite()), "x", "not finite", "finite")
        weight = torch.where(self.low.isnan(), 1.0, 1 - MOMENTUM)
        self.low.copy_(torch.lerp(self.low.nan_to_num(), low, weight))
        self.high.copy_(torch.lerp(self.high.nan_to_num(), high, weight))

    def forward(self, x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """x within the range; before any calibration, within its own."""
        if x.numel() == 0:
            return x
        with torch.no_grad():
            known = ~self.low.isnan()
            low, high = torch.where(known, self.low, x.amin()), torch.where(known, self.high, x.amax())
            value = round_within(x, low, high, self.bits, symmetric=False)
        return straight_through(value, x)


class BOSAwareProjection(nn.Module):
    """A projection of text for cross-attention that rounds weights and inputs for all tokens but the first.

    Args:
        linear: the projection in float; it becomes part of this one.
        weight_bits: of the weights, from 2 to 16.
        act_bits: of the inputs.

    Raises:
        ValueError: bits are out of range.
    """

    def __init__(self, linear: nn.Linear, weight_bits: int = 8, act_bits: int = 8) -> None:
        super().__init__()
        require_bits(weight_bits)
        self.linear, self.weight_bits = linear, weight_bits
        self.inputs = ActivationQuantizer(act_bits)

    def observe(self, x: Float[Tensor, "*b t i"]) -> None:
        """Take a calibration batch, whose first tokens do not count."""
        self.inputs.observe(x[..., 1:, :])

    def forward(self, x: Float[Tensor, "*b t i"]) -> Float[Tensor, "*b t o"]:
        first = self.linear(x[..., :1, :])
        weight = fake_quantize(self.linear.weight, self.weight_bits, channel_axis=0)
        return torch.cat([first, F.linear(self.inputs(x[..., 1:, :]), weight, self.linear.bias)], -2)


# Sensitivity -------------------------------------------------------------------------------------------------------


def sqnr_db(pred: Float[Tensor, "*s"], ref: Float[Tensor, "*s"]) -> float:
    """Signal-to-noise ratio of all entries together, in dB: 10 log₁₀(Σ ref² / Σ (pred - ref)²); infinite if equal."""
    signal, noise = ref.double().square().sum().item(), (pred.double() - ref.double()).square().sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def global_ssim(pred: Float[Tensor, "n *s"], ref: Float[Tensor, "n *s"], data_range: float | int) -> float:
    """Structural similarity with one window over each whole image, its mean over images.

    Args:
        pred, ref: images, each with all of its channels and pixels.
        data_range: the largest possible difference of pixels, more than 0.

    Raises:
        ValueError: `data_range` is not positive.
    """
    require(0 < data_range < math.inf, "data_range", data_range, "positive")
    x, y = pred.double().flatten(1), ref.double().flatten(1)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mx, my = x.mean(1), y.mean(1)
    covariance = ((x - mx[:, None]) * (y - my[:, None])).mean(1)
    variances = x.var(1, correction=0) + y.var(1, correction=0)
    likeness = (2 * mx * my + c1) * (2 * covariance + c2) / ((mx**2 + my**2 + c1) * (variances + c2))
    return likeness.mean().item()


def layer_sensitivity(
    model: nn.Module,
    layers: Sequence[str],
    bits: Sequence[int],
    run_fn: Callable[[nn.Module], Any],
    metric_fn: Callable[[Any, Any], float],
    kind: Literal["weight", "activation"] = "weight",
    *,
    grouped: int = -1,
) -> dict[str, dict[int, float]]:
    """What `metric_fn` says when one layer at a time has fewer bits.

    Args:
        model: left as it was.
        layers: names of modules with a `weight`, or, for activations, of any that take a tensor.
        bits: widths to try, each from 2 to 16.
        run_fn: what the model gives, always for the same data and randomness.
        metric_fn: of what the model gives with the layer rounded, and of what it gives in float.
        kind: round the layer's weights, or its input.
        grouped: weights that share a step; -1: those of an output channel.

    Returns:
        By layer, by bits.

    Raises:
        ValueError: bits out of range, or groups that do not divide a layer.
    """
    for b in bits:
        require_bits(b)
    with torch.no_grad():
        reference = run_fn(model)
        found: dict[str, dict[int, float]] = {name: {} for name in layers}
        for name in layers:
            for b in bits:
                rounded = _weight_at if kind == "weight" else _input_at
                with rounded(model.get_submodule(name), b, grouped):
                    found[name][b] = float(metric_fn(run_fn(model), reference))
    return found


@contextmanager
def _weight_at(layer: nn.Module, bits: int, grouped: int) -> Iterator[None]:
    weight: Tensor = layer.get_parameter("weight")
    kept = weight.detach().clone()
    rows = kept.flatten(1)
    rows = rows.view(-1, group_size(rows.shape[1], grouped))
    weight.copy_(fake_quantize(rows, bits, channel_axis=0).view_as(kept))
    try:
        yield
    finally:
        weight.copy_(kept)


@contextmanager
def _input_at(layer: nn.Module, bits: int, grouped: int) -> Iterator[None]:
    def rounded(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (fake_quantize(args[0], bits, symmetric=False), *args[1:])

    handle = layer.register_forward_pre_hook(rounded)
    try:
        yield
    finally:
        handle.remove()


# Allocation --------------------------------------------------------------------------------------------------------


class MixedGroup(NamedTuple):
    """Layers that are scored by one metric.

    Attributes:
        scores: by layer, by bits; the larger the better.
        sizes: what each layer counts.
        candidates: widths to choose among.
    """

    scores: Scores
    sizes: Mapping[str, int]
    candidates: Sequence[int]


def allocate_bits(
    scores: Scores,
    sizes: Mapping[str, int],
    mean_bits: float | int,
    candidates: Sequence[int],
    tol: float | int = BAND,
    sense: Literal["max", "min"] = "max",
) -> dict[str, int]:
    """A width for every layer: the best sum of scores with a mean width within `tol` of the one asked for.

    Args:
        scores: by layer, by bits; for all candidates.
        sizes: what each layer counts, such as its number of weights.
        mean_bits: over all that sizes count.
        candidates: widths to choose among.
        tol: how far the mean may be off, on either side.
        sense: whether large scores are good, or small ones.

    Raises:
        ValueError: a score is missing or not finite, a size is not positive, or no choice has such a mean.
    """
    require(sense in ("max", "min"), "sense", sense, "'max' or 'min'")
    found = _allocation(MixedGroup(scores, sizes, candidates), mean_bits, tol, sense)
    require(found is not None, "mean_bits", mean_bits, f"reachable within {tol} with {list(candidates)} bits")
    assert found is not None
    return found


def _allocation(group: MixedGroup, mean_bits: float | int, tol: float | int, sense: str) -> dict[str, int] | None:
    """None if no choice has such a mean."""
    scores, sizes, candidates = group
    require(bool(scores), "scores", scores, "of at least one layer")
    whole = bool(candidates) and all(type(b) is int for b in candidates)
    require(whole, "candidates", candidates, "at least one width, and whole numbers")
    require(tol >= 0, "tol", tol, "at least 0")
    for name, by_bits in scores.items():
        lacking = [b for b in candidates if not math.isfinite(by_bits.get(b, math.nan))]
        require(not lacking, "scores", f"{dict(by_bits)} of {name}", f"finite for {lacking} bits, too")
        require(sizes.get(name, 0) > 0, "sizes", sizes.get(name), f"positive for {name}")
    value = np.array([[by_bits[b] for b in candidates] for by_bits in scores.values()], dtype=np.float64)
    shares = np.array([sizes[name] for name in scores], dtype=np.float64)
    spent = np.outer(shares / shares.sum(), candidates)
    best = one_each(-value if sense == "max" else value, spent, mean_bits - tol, mean_bits + tol)
    if best is None:
        return None
    return {name: int(candidates[place]) for name, place in zip(scores, best, strict=True)}


def is_content(name: str) -> bool:
    """Whether a layer, by its name in the UNets of diffusers, is of cross-attention or feed-forward."""
    return any(part in name for part in CONTENT)


def split_mean_bits(mean_bits: float | int, r: float | int, k: float | int) -> tuple[float, float]:
    """Mean widths of quality and of content layers: a_q = a (1 + r) / (1 + k r) and a_c = k a_q.

    Args:
        mean_bits: a, of both together.
        r: content weights for each quality weight.
        k: mean width of content over that of quality.

    Raises:
        ValueError: an argument is not positive.
    """
    for name, x in (("mean_bits", mean_bits), ("r", r), ("k", k)):
        require(0 < x < math.inf, name, x, "positive")
    quality = mean_bits * (1 + r) / (1 + k * r)
    return quality, k * quality


def decoupled_allocate(
    quality: MixedGroup,
    content: MixedGroup,
    target: float | int,
    evaluate_fn: Callable[[dict[str, int]], float],
    *,
    k_grid: Sequence[float] = tuple(np.linspace(0.46, 1.36, 10).tolist()),
    tol: float | int = BAND,
) -> dict[str, int]:
    """Allocate bits in both groups for each k and for ten means up to the target; the one of least error.

    Args:
        quality, content: the groups.
        target: mean width; the means tried begin 0.3 below it.
        evaluate_fn: error of an allocation at the output, on calibration data; asked once for each.
        k_grid: of k; the authors' for weights, that for activations is from 0.94 to 1.09 in 20 steps.
        tol: see `allocate_bits`.

    Raises:
        ValueError: no k and mean can be met, or as `allocate_bits` otherwise.
    """
    r = sum(content.sizes[name] for name in content.scores) / sum(quality.sizes[name] for name in quality.scores)
    tried: list[dict[str, int]] = []
    for mean in np.linspace(target - 0.3, target, 10).tolist():
        for k in k_grid:
            means = split_mean_bits(mean, r, k)
            groups = tuple(zip((quality, content), means, strict=True))
            if not all(min(group.candidates) <= m <= max(group.candidates) for group, m in groups):
                continue
            found: dict[str, int] = {}
            for group, m in groups:
                found |= _allocation(group, m, tol, "max") or {}
            if len(found) == len(quality.scores) + len(content.scores) and found not in tried:
                tried.append(found)
    require(bool(tried), "target", target, "a mean that some k reaches with the candidates")
    return min(tried, key=evaluate_fn)


# Weights of any model ----------------------------------------------------------------------------------------------


@method(paper="mixdq", slot="quantizer", bind=lambda setting: {"bits": setting.bits, "group_size": setting.group_size})
@dataclass(frozen=True)
class MixDQ:
    """Symmetric rounding to widths that an integer programme chooses by the noise that they cause in the output.

    Args:
        bits: mean over all weights.
        group_size: weights along the input that share a step; -1, the authors', for those of an output channel.
        candidates: widths to choose among, from 2 to 8.
        tol: how far the mean may be off.

    Raises:
        ValueError: an argument lies outside its range; when quantising, the group size does not divide a layer, or no
            choice of widths has such a mean.
    """

    bits: float | int = 4
    group_size: int = -1
    candidates: tuple[int, ...] = (2, 4, 8)
    tol: float | int = BAND

    wants: ClassVar[frozenset[Want]] = frozenset()

    def __post_init__(self) -> None:
        fit = len(self.candidates) > 0 and all(type(b) is int and 2 <= b <= 8 for b in self.candidates)
        require(fit, "candidates", self.candidates, "whole numbers from 2 to 8")
        low, high = min(self.candidates), max(self.candidates)
        require(low <= self.bits <= high, "bits", self.bits, f"from {low} to {high}, as the candidates")
        require(self.tol >= 0, "tol", self.tol, "at least 0")
        RoundToNearest(low, self.group_size)

    def check(self, name: str, layer: nn.Linear) -> None:
        check_groups(name, layer, self.group_size)

    def prepare(self, model: nn.Module, calibration: Sequence[Batch], names: Sequence[str]) -> dict[str, int]:
        """The width of each layer."""

        def outputs(of: nn.Module) -> Tensor:
            given = [run(of, batch) for batch in calibration]
            return torch.cat([main(y).flatten() for y in given])

        def main(output: Any) -> Tensor:
            if isinstance(output, Tensor):
                return output
            logits: Tensor | None = getattr(output, "logits", None)  # stand behind the loss of a batch with labels
            return output[0] if logits is None else logits

        def ratio(pred: Tensor, ref: Tensor) -> float:
            return min(sqnr_db(pred, ref), LEAST_NOISE)

        scores = layer_sensitivity(model, names, self.candidates, outputs, ratio, grouped=self.group_size)
        sizes = {name: model.get_submodule(name).get_parameter("weight").numel() for name in names}
        return allocate_bits(scores, sizes, self.bits, self.candidates, self.tol)

    def quantize(self, name: str, layer: nn.Linear, found: Found) -> PackedLinear:
        return RoundToNearest(found.prepared, self.group_size, symmetric=True).quantize(name, layer, found)
