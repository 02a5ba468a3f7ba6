"""LLM-QFA: fine-tune a quantised model once for all bit widths (Yi et al. 2024, arXiv:2405.20202).

Every linear layer holds its frozen weight at several widths b, each with a low-rank adapter of its own (Eq. 3),

    y = Ŵ_b x + s B_b A_b x̄,    s = alpha / rank,

where x̄ holds the means of groups of g neighbouring inputs, those groups that share a scale and an offset. So a trained
adapter goes into the offsets, β ← β + s B A / g, and the weight stays at b bits (QA-LoRA, arXiv:2309.14717).

In a step every layer draws a width, and only the adapters that were drawn learn. If all widths are drawn with equal
chances, the mean over L layers has the variance σ²/L (Eq. 4): all-low and all-high models are hardly ever trained.
Hence the mean to draw for follows a triangle wave of the step t with period SL (Eq. 5),

    μ(t) = b_min + (b_max - b_min) |2 (t mod SL) / SL - 1|,

where the printed formula leaves out the first b_min, without which μ would not lie between the widths. The paper fixes
the mean bit width over time, not the per-layer distribution; `sampler` is our choice. A search without training
picks widths for a budget afterwards: layers whose widths hardly bear on the score stay low. How many, and how low, are
our choices too.

No code was released. Pooling, scaling and merging are those of QA-LoRA's code, whose adapters are drawn by Xavier's
rule, as against Kaiming's here, as in peft. The paper quantises by GPTQ; any quantiser of evenly spaced levels will do.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.methods.arguments import require
from fairtrial.methods.quantization.gptq import GPTQ
from fairtrial.methods.quantization.packing import PackedLinear
from fairtrial.methods.quantization.packing import group_size as group_size_of
from fairtrial.methods.quantization.quantize import Config, Found, Want, check_groups

Quantizer = Callable[..., Any]  # gives a `Config` of `quantize_`
WIDTHS = 2, 3, 4


# Layers ------------------------------------------------------------------------------------------------------------


class GroupAdapter(nn.Module):
    """s B A x̄, with x̄ the mean of every `pool` neighbouring inputs.

    Args:
        in_features, out_features: of the layer that it belongs to.
        rank: of B A.
        alpha: s times the rank.
        pool: size of a group, which divides the inputs; 1 is a plain adapter, which cannot be merged into offsets.
        generator: what A is drawn from, as in peft; B is 0 at first.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: int | float,
        pool: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        require(rank >= 1, "rank", rank, "at least 1")
        require(-math.inf < alpha < math.inf, "alpha", alpha, "finite")
        self.pool, self.scale = group_size_of(in_features, pool), alpha / rank
        self.A = nn.Parameter(torch.empty(rank, in_features // self.pool))
        self.B = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5), generator=generator)

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        pooled = x if self.pool == 1 else x.unflatten(-1, (-1, self.pool)).mean(-1)
        return F.linear(F.linear(pooled, self.A), self.B) * self.scale


class OnceForAllQuantLinear(nn.Module):
    """A linear layer at several bit widths, frozen, with an adapter for each.

    Only the adapter of `active_bits` takes part. The others' gradients stay None, so that optimizers leave them, their
    momentum and their weight decay alone, provided gradients are cleared to None between steps, as is the default.

    Args:
        linear: what is quantised; it is left as it was.
        bits: the widths, in rising order.
        group_size: weights that share scale and offset, and inputs that an adapter sees the mean of; -1 for all.
        rank: of the adapters.
        alpha: an adapter is multiplied by alpha / rank.
        quantizer: makes what quantises the layer from `bits` and `group_size`, such as `RoundToNearest`. It has to give
            a `PackedLinear` of such groups, without kept weights.
        pooled: whether adapters see means of groups; otherwise they see every input and cannot be merged.
        found: what the quantiser wants to know of the inputs, if anything.
        generator: what adapters are drawn from; torch's own by default, as for any layer.

    Attributes:
        active_bits: the width at which the layer computes; the highest at first. It is not in the state dict: after
            loading one, `set_config` says it again.

    Raises:
        ValueError: an argument lies outside its range, the group size does not divide the inputs, or the quantiser
            gives another kind of layer.
    """

    def __init__(
        self,
        linear: nn.Linear,
        bits: Sequence[int] = WIDTHS,
        group_size: int = 32,
        rank: int = 8,
        alpha: int | float = 16.0,
        *,
        quantizer: Quantizer = GPTQ,
        pooled: bool = True,
        found: Found | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.bits = check_widths(bits)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        size = group_size_of(linear.in_features, group_size)
        self.copies, self.adapters = nn.ModuleDict(), nn.ModuleDict()
        for b in self.bits:
            copy = _quantised(quantizer(bits=b, group_size=group_size), linear, found)
            is_such = isinstance(copy, PackedLinear) and copy.bits == b and copy.kept is None
            fits = bool(is_such and copy.groups == linear.in_features // size)
            require(fits, "quantizer", copy, f"one that gives a PackedLinear of {b} bits in groups of {size}")
            adapter = GroupAdapter(
                linear.in_features, linear.out_features, rank, alpha, size if pooled else 1, generator
            )
            self.copies[str(b)], self.adapters[str(b)] = copy, adapter.to(linear.weight.device, linear.weight.dtype)
        self.group_size = size
        self.active_bits = self.bits[-1]

    @property
    def active_bits(self) -> int:
        return self._active

    @active_bits.setter
    def active_bits(self, bits: int) -> None:
        self._active = self._known(bits)

    def _known(self, bits: int) -> int:
        require(bits in self.bits, "bits", bits, f"one of the layer's {', '.join(map(str, self.bits))}")
        return bits

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        chosen = str(self._active)
        result: Tensor = self.copies[chosen](x) + self.adapters[chosen](x)
        return result

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, active_bits={self.active_bits}"


def check_widths(bits: Sequence[int]) -> tuple[int, ...]:
    whole = len(bits) > 0 and all(isinstance(b, int) and 1 <= b <= 8 for b in bits)
    fits = whole and list(bits) == sorted(set(bits))
    require(fits, "bits", bits, "whole numbers from 1 to 8, in rising order")
    return tuple(bits)


@torch.no_grad()
def _quantised(config: Config, linear: nn.Linear, found: Found | None) -> nn.Module:
    require(not config.wants or found is not None, "found", found, f"given, as {type(config).__name__} wants data")
    return config.quantize("", linear, found if found is not None else Found())


@torch.no_grad()
def merge(layer: OnceForAllQuantLinear, bits: int, dtype: torch.dtype = torch.float32) -> PackedLinear:
    """The layer at one width, its adapter merged into the offsets.

    Args:
        layer: left as it is.
        bits: one of its widths.
        dtype: what scales and offsets are held in.

    Raises:
        ValueError: the layer has no such width, or its adapters are not pooled in its groups.
    """
    copy, adapter = layer.copies[str(layer._known(bits))], layer.adapters[str(bits)]
    assert isinstance(copy, PackedLinear)
    assert isinstance(adapter, GroupAdapter)
    pooled = adapter.pool == layer.group_size
    require(pooled, "layer", layer, f"one whose adapters see means of {layer.group_size} inputs, to be merged")
    change = adapter.scale / adapter.pool * (adapter.B.double() @ adapter.A.double())
    offset = (copy.offset.double() + change).to(dtype)
    return PackedLinear(copy.codes(), copy.scale.to(dtype), offset, bits, copy.bias)


# Models ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OnceForAll:
    """Every linear layer at all widths, with adapters: `quantize_(model, OnceForAll(), calibration)`.

    Args:
        bits, group_size, rank, alpha, quantizer, generator: as in `OnceForAllQuantLinear`.

    Raises:
        ValueError: an argument lies outside its range.
    """

    bits: Sequence[int] = WIDTHS
    group_size: int = 32
    rank: int = 8
    alpha: int | float = 16.0
    quantizer: Quantizer = GPTQ
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check_widths(self.bits)
        require(self.rank >= 1, "rank", self.rank, "at least 1")
        require(-math.inf < self.alpha < math.inf, "alpha", self.alpha, "finite")
        for b in self.bits:
            self.quantizer(bits=b, group_size=self.group_size)

    @property
    def wants(self) -> frozenset[Want]:
        wants: frozenset[Want] = self.quantizer(bits=self.bits[0], group_size=self.group_size).wants
        return wants

    def check(self, name: str, layer: nn.Linear) -> None:
        check_groups(name, layer, self.group_size)

    def quantize(self, name: str, layer: nn.Linear, found: Found) -> OnceForAllQuantLinear:
        return OnceForAllQuantLinear(
            layer,
            self.bits,
            self.group_size,
            self.rank,
            self.alpha,
            quantizer=self.quantizer,
            found=found,
            generator=self.generator,
        )


def once_for_all_layers(model: nn.Module) -> dict[str, OnceForAllQuantLinear]:
    """The layers of several widths, by name.

    Raises:
        ValueError: there are none, or they have different widths to choose among.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, OnceForAllQuantLinear)}
    require(bool(layers), "model", type(model).__name__, "one with OnceForAllQuantLinear layers")
    widths = {layer.bits for layer in layers.values()}
    require(len(widths) == 1, "model", sorted(widths), "of layers with the same widths")
    return layers


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """What fine-tuning trains: the adapters of all widths, and nothing else of the model."""
    adapters = nn.ModuleList(a for layer in once_for_all_layers(model).values() for a in layer.adapters.values())
    yield from adapters.parameters()


def set_config(model: nn.Module, config: Mapping[str, int]) -> None:
    """Let layers compute at the widths given by name.

    Raises:
        ValueError: a name is not that of such a layer, or a layer has no such width; nothing is changed then.
    """
    layers = once_for_all_layers(model)
    for name, bits in config.items():
        require(name in layers, "config", name, "names of OnceForAllQuantLinear layers")
        layers[name]._known(bits)
    for name, bits in config.items():
        layers[name].active_bits = bits


def merge_(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Put in the place of every layer what `merge` makes of it at its active width; returns the model.

    Raises:
        ValueError: there are no such layers, or one cannot be merged.
    """
    merged = {name: merge(layer, layer.active_bits, dtype) for name, layer in once_for_all_layers(model).items()}
    for name, layer in merged.items():
        if not name:
            return layer
        model.set_submodule(name, layer)
    return model


# What to train -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TriangularBitSchedule:
    """μ(t), the mean width to draw for at a step: from the highest to the lowest in half a period, and back.

    Args:
        b_min, b_max: the lowest and the highest width.
        period: steps; the paper's 8000 of 10,000. 1000 did harm there, 16,000 did not.

    Raises:
        ValueError: `b_max` is below `b_min`, or the period is not positive.
    """

    b_min: int | float
    b_max: int | float
    period: int = 8000

    def __post_init__(self) -> None:
        require(0 < self.b_min <= self.b_max < math.inf, "b_max", self.b_max, f"at least b_min {self.b_min}, finite")
        require(self.period >= 1, "period", self.period, "at least 1")

    def __call__(self, step: int) -> float:
        return self.b_min + (self.b_max - self.b_min) * abs(2 * (step % self.period) / self.period - 1)


def max_entropy_bit_probs(bits: Sequence[int], mean: int | float) -> Float[Tensor, " n"]:
    """P(b) ∝ exp(λ b), of all distributions with exactly that mean the one of largest entropy; float64.

    Equal chances where the mean is that of the widths, and a single width at either end.

    Raises:
        ValueError: the mean is not between the lowest and the highest width.
    """
    from scipy.optimize import brentq

    widths = _between(bits, mean)
    if mean in (bits[0], bits[-1]):
        return (widths == mean).double()

    def excess(tilt: float) -> float:
        return float(torch.softmax(tilt * widths, 0) @ widths) - mean

    reach = 1.0
    while excess(-reach) > 0 or excess(reach) < 0:
        reach *= 2
    return torch.softmax(brentq(excess, -reach, reach, xtol=1e-14) * widths, 0)


def gaussian_bit_probs(bits: Sequence[int], mean: int | float, deviation: float = 0.5) -> Float[Tensor, " n"]:
    """P(b) ∝ exp(-(b - mean)² / (2 deviation²)), whose mean is only about the one asked for; float64.

    Raises:
        ValueError: the mean is not between the lowest and the highest width, or the deviation is not positive.
    """
    require(0 < deviation < math.inf, "deviation", deviation, "positive")
    return torch.softmax(-(((_between(bits, mean) - mean) / deviation) ** 2) / 2, 0)


def neighbour_bit_probs(bits: Sequence[int], mean: int | float) -> Float[Tensor, " n"]:
    """Only the width below the mean and the one above it, by how near they are; float64.

    Raises:
        ValueError: the mean is not between the lowest and the highest width.
    """
    widths = _between(bits, mean)
    above = int(torch.searchsorted(widths, mean).clamp(1, max(1, len(widths) - 1)))
    probs = torch.zeros_like(widths)
    if len(widths) == 1:
        return probs + 1
    share = (mean - widths[above - 1]) / (widths[above] - widths[above - 1])
    probs[above - 1], probs[above] = 1 - share, share
    return probs


def _between(bits: Sequence[int], mean: int | float) -> Float[Tensor, " n"]:
    low, *_, high = (*check_widths(bits), bits[-1])
    require(low <= mean <= high, "mean", mean, f"from {low} to {high}")
    return torch.tensor(bits, dtype=torch.float64)


SAMPLERS: Mapping[str, Callable[[Sequence[int], float], Tensor]] = {
    "max_entropy": max_entropy_bit_probs,
    "gaussian": gaussian_bit_probs,
    "neighbours": neighbour_bit_probs,
}


def sample_config(
    model: nn.Module, mean_bits: int | float, generator: torch.Generator, sampler: str = "max_entropy"
) -> dict[str, int]:
    """A width for every layer, drawn independently, for `set_config`.

    Args:
        model: with `OnceForAllQuantLinear` layers.
        mean_bits: what the widths are to be on average; the mean of all widths gives each an equal chance under
            'max_entropy'.
        generator: what is drawn from.
        sampler: 'max_entropy', 'gaussian' or 'neighbours'; see the functions of these names.

    Raises:
        ValueError: there are no such layers, the mean is not between the widths, or the sampler is unknown.
    """
    require(sampler in SAMPLERS, "sampler", sampler, ", ".join(map(repr, SAMPLERS)))
    layers = once_for_all_layers(model)
    widths = next(iter(layers.values())).bits
    probs = SAMPLERS[sampler](widths, mean_bits)
    drawn = torch.multinomial(probs, len(layers), replacement=True, generator=generator).tolist()
    return {name: widths[place] for name, place in zip(layers, drawn, strict=True)}


# What to deploy ----------------------------------------------------------------------------------------------------


class Subnet(NamedTuple):
    """What a search found.

    Attributes:
        config: width of each layer, by name.
        score: its own.
        mean_bits: over all weights.
    """

    config: dict[str, int]
    score: float
    mean_bits: float


def search_subnet(
    model: nn.Module,
    score_fn: Callable[[nn.Module], float],
    budget_mean_bits: int | float,
    n_explore: int = 100,
    n_refine: int = 50,
    *,
    generator: torch.Generator,
) -> Subnet:
    """The best of some configurations within a budget, in two rounds without training.

    First, configurations with equal chances for each width tell how well each layer's width correlates with the score.
    The half of the layers with the lowest correlation may from then on have widths up to the budget only. Second, of
    configurations in what is left, with as many bits as the budget or a little less, the one with the highest score.

    Args:
        model: left at the widths that it has.
        score_fn: of the model at some configuration, the larger the better; on validation data.
        budget_mean_bits: most bits of a weight on average, each layer counting by its weights.
        n_explore: configurations of the first round; at least 2.
        n_refine: of the second; at least 1.
        generator: what configurations are drawn from.

    Raises:
        ValueError: an argument lies outside its range, or a score is NaN.
    """
    layers = once_for_all_layers(model)
    names, widths = list(layers), torch.tensor(next(iter(layers.values())).bits)
    low, high = int(widths[0]), int(widths[-1])
    require(low <= budget_mean_bits <= high, "budget_mean_bits", budget_mean_bits, f"from {low} to {high}")
    require(n_explore >= 2, "n_explore", n_explore, "at least 2")
    require(n_refine >= 1, "n_refine", n_refine, "at least 1")
    sizes = torch.tensor([layers[name].in_features * layers[name].out_features for name in names], dtype=torch.float64)
    before = {name: layer.active_bits for name, layer in layers.items()}

    def score(config: list[int]) -> float:
        set_config(model, dict(zip(names, config, strict=True)))
        found = float(score_fn(model))
        require(not math.isnan(found), "score_fn", found, "a function that gives numbers")
        return found

    try:
        explored = widths[torch.randint(len(widths), (n_explore, len(names)), generator=generator)]
        scores = torch.tensor([score(config) for config in explored.tolist()], dtype=torch.float64)
        narrow = torch.argsort(_correlation(explored.double(), scores), stable=True)[: len(names) // 2]
        refined = _within_budget(widths, sizes, budget_mean_bits, narrow, n_refine, generator)
        found = [score(config) for config in refined.tolist()]
    finally:
        set_config(model, before)
    best = max(range(n_refine), key=found.__getitem__)
    mean = float(refined[best].double() @ sizes / sizes.sum())
    return Subnet(dict(zip(names, refined[best].tolist(), strict=True)), found[best], mean)


def _correlation(bits: Float[Tensor, "n l"], scores: Float[Tensor, " n"]) -> Float[Tensor, " l"]:
    """Of each column with the scores; 0 where one of the two is constant."""
    columns, scores = bits - bits.mean(0), scores - scores.mean()
    lengths = columns.norm(dim=0) * scores.norm()
    return torch.where(lengths > 0, columns.t() @ scores / lengths, 0.0)


def _within_budget(
    widths: Tensor, sizes: Tensor, budget: int | float, narrow: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    """Configurations (count, layers): narrow layers up to the budget, the others so high that the mean is about it.

    Those above the budget are brought below it by lowering layers to the lowest width, in random order.
    """
    allowed = widths[widths <= budget].tolist()
    wide = torch.ones(len(sizes), dtype=torch.bool)
    wide[narrow] = False
    total, of_wide, of_narrow = (float(s) for s in (sizes.sum(), sizes[wide].sum(), sizes[narrow].sum()))
    # narrow layers have equal chances, unless the others, at an end of their range, leave them more or fewer bits
    mean = _clamp((budget * total - sum(allowed) / len(allowed) * of_narrow) / of_wide, widths.tolist())
    probs = max_entropy_bit_probs(widths.tolist(), mean).repeat(len(sizes), 1)
    if of_narrow:
        probs[narrow] = 0.0
        left = _clamp((budget * total - mean * of_wide) / of_narrow, allowed)
        probs[narrow, : len(allowed)] = max_entropy_bit_probs(allowed, left)
    drawn = widths[torch.multinomial(probs, count, replacement=True, generator=generator).t()]
    order = torch.rand(drawn.shape, generator=generator).argsort(1)
    saved = ((drawn - widths[0]) * sizes).gather(1, order)
    excess = (drawn * sizes).sum(1, keepdim=True) - budget * total
    lowered = torch.zeros_like(drawn, dtype=torch.bool).scatter(1, order, saved.cumsum(1) - saved < excess)
    return torch.where(lowered, widths[0], drawn)


def _clamp(mean: float, bits: Sequence[int]) -> float:
    return min(max(mean, float(bits[0])), float(bits[-1]))
