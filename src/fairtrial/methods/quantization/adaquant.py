"""AdaQuant: layers tuned one by one after rounding, and what goes with it (Hubara et al. 2020, arXiv:2006.10518).

Four tools that need a trained network and a few samples without labels.

AdaQuant moves the weights W, the bias and the ranges of both quantisers of a layer, until the rounded layer gives on
the calibration inputs X what the float layer gave, Y:

    min ‖f(Y) - f(Q_w(W + V) Q_x(X) + β)‖²

with f the identity, or ReLU where one follows. In parallel X is what the float network gives the layer; sequentially,
which is better, what the network gives it whose earlier layers are rounded already. The quantisers have a learned range
R and minimum m:

    Δ = clamp(R, 1e-6, 1e5) / (2^b - 1),    ẑ = clamp(round(-m / Δ), 0, 2^b - 1)
    Q(x) = Δ round(clamp(x / Δ + ẑ, 0, 2^b - 1)) - Δ ẑ

with gradients straight through both roundings and within both clamps. Zero is always a level.

The integer programme chooses bits for each layer: the least sum of losses that each layer causes on its own, at a
size of at most a share D of the float32 network's. Batch norms get the statistics of the rounded network, and biases
are tuned at the end, for the whole network.

Learning rates are the authors', set for 8 bits and activations of about unit size. Their code folds batch norms into
the layers first and attaches them again for the statistics; here they stay until `fold_batchnorm`, which gives the same
network, but AdaQuant compares outputs before the norm. Their bias is rounded to as many bits as weights and inputs
together; here it is not.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fairtrial.methods.arguments import require
from fairtrial.methods.evaluation import evaluating
from fairtrial.methods.quantization.fake_quantization import round_through
from fairtrial.methods.quantization.integer_programme import one_each
from fairtrial.methods.quantization.packing import PackedLinear, group_size
from fairtrial.methods.quantization.quantize import (
    Batch,
    Found,
    Grid,
    Want,
    check_finite_batches,
    check_finite_weights,
    check_groups,
    check_rounding,
    put_in_place_of,
    round_to,
    run,
    watching,
)
from fairtrial.methods.registry import LogUniform, method

FLOAT_BITS = 32
LEAST_LOSS = 1e-6  # the authors': a layer that loses nothing still costs something
Layer = nn.Linear | nn.Conv2d


# Fake quantisation -------------------------------------------------------------------------------------------------


class AffineFakeQuant(nn.Module):
    """Rounding to 2^bits even levels, 0 among them, with learned range and minimum.

    Args:
        bits: from 1 to 16.
        channel_axis: of channels with a range each; None has one for the tensor.
        channels: how many of them.

    Attributes:
        range, zero: R and m, one for each channel; 1 and 0 before they are set.

    Raises:
        ValueError: an argument lies outside its range.
    """

    def __init__(self, bits: int, channel_axis: int | None = None, channels: int = 1) -> None:
        super().__init__()
        check_bits("bits", bits)
        require(type(channels) is int and channels >= 1, "channels", channels, "a whole number of at least 1")
        require(channels == 1 or channel_axis is not None, "channels", channels, "1 without a channel_axis")
        self.bits, self.channel_axis = bits, channel_axis
        self.range, self.zero = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    @torch.no_grad()
    def set_extremes(self, x: Float[Tensor, "..."]) -> None:
        """Take the range from the least to the largest entry of each channel, and 0."""
        rows = x.reshape(1, -1) if self.channel_axis is None else x.transpose(0, self.channel_axis).flatten(1)
        self._set(rows.amin(1), rows.amax(1))

    @torch.no_grad()
    def set_sample_means(self, x: Float[Tensor, "n ..."]) -> None:
        """Take the range from the mean least to the mean largest entry of samples, and 0; the authors' for inputs."""
        rows = x.flatten(1)
        self._set(rows.amin(1).mean(0, keepdim=True), rows.amax(1).mean(0, keepdim=True))

    def _set(self, low: Tensor, high: Tensor) -> None:
        low, high = low.clamp_max(0), high.clamp_min(0)
        self.zero.copy_(low)
        self.range.copy_(torch.where(high > low, high - low, 1))

    def grid(self) -> Grid:
        """Scale Δ and offset -Δ ẑ, one row for each channel, with their gradients; of a range in float16 in float32."""
        top = 2**self.bits - 1
        wide = torch.float32 if self.range.dtype == torch.float16 else self.range.dtype  # 1e5 is none of float16
        step = self.range.to(wide).clamp(1e-6, 1e5) / top
        zero_point = round_through(-self.zero.to(wide) / step).clamp(0, top)
        return Grid(step[:, None], (-zero_point * step)[:, None])

    def forward(self, x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        shape = [1] * x.ndim
        if self.channel_axis is not None:
            shape[self.channel_axis] = -1
        grid = self.grid()
        step, offset = grid.scale.view(shape), grid.offset.view(shape)
        rounded = round_through(((x - offset) / step).clamp(0, 2**self.bits - 1)) * step + offset
        return rounded.to(x.dtype) if self.range.dtype == torch.float16 else rounded

    def extra_repr(self) -> str:
        return f"bits={self.bits}, channels={len(self.range)}"


def check_bits(name: str, bits: int | None) -> None:
    """Refuse bits that no quantiser could have."""
    require(type(bits) is int and 1 <= bits <= 16, name, bits, "a whole number from 1 to 16")


class FakeQuantLayer(nn.Module):
    """A linear layer or convolution with its own weights, which are rounded at every call, and so may be its inputs.

    Args:
        layer: copied.
        weight_bits: of the weights.
        act_bits: of the inputs; None leaves them as they are.
        size: of groups of weights with a range of their own; -1 for one range for each output channel.

    Raises:
        ValueError: bits are out of range, or the size does not divide the weights of an output.
    """

    def __init__(self, layer: Layer, weight_bits: int = 4, act_bits: int | None = 4, *, size: int = -1) -> None:
        super().__init__()
        self.layer = copy.deepcopy(layer)
        weights = self.layer.weight.flatten(1)
        rows = weights.numel() // group_size(weights.shape[1], size)
        self.weight_quantizer = AffineFakeQuant(weight_bits, 0, rows).to(weights)
        self.input_quantizer = None if act_bits is None else AffineFakeQuant(act_bits).to(weights)
        self.weight_quantizer.set_extremes(weights.reshape(rows, -1))

    @property
    def weight(self) -> Float[Tensor, "..."]:
        """The rounded weights, with which it computes."""
        weight = self.layer.weight
        rounded: Tensor = self.weight_quantizer(weight.reshape(len(self.weight_quantizer.range), -1))
        return rounded.view_as(weight)

    @property
    def bias(self) -> Tensor | None:
        """The layer's, for modules that read it with the weights."""
        return self.layer.bias

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        if isinstance(self.layer, nn.Conv2d):
            convolved: Tensor = self.layer._conv_forward(x, self.weight, self.layer.bias)
            return convolved
        return F.linear(x, self.weight, self.layer.bias)

    @torch.no_grad()
    def packed(self, scale_dtype: torch.dtype = torch.float16) -> PackedLinear:
        """The layer with packed weights and inputs as they are.

        Raises:
            ValueError: it is a convolution, or its inputs are rounded, which a packed layer cannot do.
        """
        weights_only = isinstance(self.layer, nn.Linear) and self.input_quantizer is None
        require(weights_only, "layer", self.layer, "linear, with inputs that are not rounded")
        weight, bits = self.layer.weight, self.weight_quantizer.bits
        found = self.weight_quantizer.grid()
        grid = Grid(found.scale.view(len(weight), -1), found.offset.view(len(weight), -1)).held_in(scale_dtype)
        codes = round_to(weight.view(*grid.scale.shape, -1), grid, bits).to(torch.uint8).flatten(1)
        return PackedLinear(codes, grid.scale.to(scale_dtype), grid.offset.to(scale_dtype), bits, self.layer.bias)


# Tuning a layer ----------------------------------------------------------------------------------------------------


class Rates(NamedTuple):
    """Adam's learning rates; the authors'. They differ by four orders of magnitude."""

    weight: float = 1e-5
    bias: float = 1e-3
    weight_range: float = 1e-3
    input_range: float = 1e-1


class Errors(NamedTuple):
    """Mean squared errors of a layer's outputs on all calibration samples."""

    before: float
    after: float


def rate_groups(layers: Iterable[FakeQuantLayer], rates: Rates) -> list[dict[str, Any]]:
    """Parameter groups of layers that are tuned."""
    groups = []
    for fake in layers:
        groups += [
            {"params": [fake.layer.weight], "lr": rates.weight},
            {"params": [*fake.weight_quantizer.parameters()], "lr": rates.weight_range},
        ]
        if fake.layer.bias is not None:
            groups.append({"params": [fake.layer.bias], "lr": rates.bias})
        if fake.input_quantizer is not None:
            groups.append({"params": [*fake.input_quantizer.parameters()], "lr": rates.input_range})
    return groups


def check_tuning(steps: int, batch: int, batch_name: str = "batch") -> None:
    """Refuse numbers of steps, and of samples in each, that no tuning could have."""
    require(type(steps) is int and steps >= 0, "steps", steps, "a whole number of at least 0")
    require(type(batch) is int and batch >= 1, batch_name, batch, "a whole number of at least 1")


def adaquant_layer(
    layer: Layer,
    x: Float[Tensor, "n ..."],
    y: Float[Tensor, "n ..."],
    steps: int = 1000,
    batch: int = 50,
    lrs: Rates | None = None,
    relu: bool = False,
    generator: torch.Generator | None = None,
    *,
    weight_bits: int = 4,
    act_bits: int | None = 4,
    input_range: Literal["sample means", "extremes"] = "sample means",
    size: int = -1,
) -> tuple[FakeQuantLayer, Errors]:
    """Round a layer and tune it until it gives y for x; one in float16 is tuned in float32.

    Args:
        layer: left as it is.
        x: calibration inputs, which may come from a network that is rounded already.
        y: what the float layer gives in the float network for the same samples.
        steps: of Adam, each on a batch of samples that are drawn anew.
        batch: samples in a step.
        lrs: learning rates; by default the authors'.
        relu: compare after ReLU, because one follows.
        generator: what batches are drawn from; by default a private one with seed 0.
        weight_bits, act_bits, size: as in `FakeQuantLayer`.
        input_range: what the range of inputs starts from: the mean over samples of their least and largest entries,
            as the authors do, or those of all.

    Returns:
        The rounded layer, and its errors before and after.

    Raises:
        ValueError: there are no samples, or not as many of x as of y; an argument lies outside its range; or the error
            is not finite.
    """
    require(len(x) > 0 and len(x) == len(y), "x", tuple(x.shape), f"one or more samples, as many as of y, {len(y)}")
    check_tuning(steps, batch)
    require(input_range in ("sample means", "extremes"), "input_range", input_range, "'sample means' or 'extremes'")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    dtype = layer.weight.dtype
    if dtype == torch.float16:
        layer, x, y = copy.deepcopy(layer).float(), x.float(), y.float()
    fake = FakeQuantLayer(layer, weight_bits, act_bits, size=size)
    fake.train(layer.training).requires_grad_(True)
    if fake.input_quantizer is not None:
        set_range = fake.input_quantizer.set_extremes if input_range == "extremes" else None
        (set_range or fake.input_quantizer.set_sample_means)(x)
    x, y = x.detach(), y.detach()
    target = F.relu(y) if relu else y

    def error(index: Tensor | slice) -> Tensor:
        output = fake(x[index])
        return F.mse_loss(F.relu(output) if relu else output, target[index])

    def overall() -> float:
        with torch.no_grad():
            sums = [error(slice(i, i + 1024)).item() * len(x[i : i + 1024]) for i in range(0, len(x), 1024)]
        return sum(sums) / len(x)

    before = overall()
    optimizer = torch.optim.Adam(rate_groups([fake], lrs or Rates()))
    with torch.enable_grad():
        for _ in range(steps):
            index = torch.randperm(len(x), generator=generator)[:batch].to(x.device)
            optimizer.zero_grad()
            error(index).backward()
            optimizer.step()
    after = overall()
    if not (math.isfinite(before) and math.isfinite(after)):
        raise ValueError(f"the layer's error must be finite, got {before} before and {after} after {steps} steps")
    return fake.requires_grad_(False).to(dtype), Errors(before, after)


@method(
    paper="adaquant",
    slot="quantizer",
    search={"weight_lr": LogUniform(1e-6, 1e-3)},
    bind=lambda setting: {
        "bits": setting.bits,
        "group_size": setting.group_size,
        "generator": setting.generator,
    },
)
@dataclass(frozen=True)
class AdaQuant:
    """AdaQuant of the weights and biases of linear layers, for `quantize_`; inputs stay as they are.

    Networks with rounded inputs, and with convolutions, take `adaquant_model`.

    Args:
        bits: of a weight, from 1 to 8.
        group_size: weights along the input that share a range; -1 for the whole row, as the authors have it.
        sequential: tune on the inputs that the rounded layers before give, and not on those of the float model.
        steps, batch_size: of the tuning of each layer; a sample is one row of the layer's input.
        weight_lr, bias_lr, range_lr: learning rates; the authors'.
        scale_dtype: what scales and offsets are held in.
        generator: what batches are drawn from; by default a private one with seed 0 for each layer.

    Raises:
        ValueError: an argument lies outside its range; when quantising, the group size does not divide a layer, or an
            error is not finite.
    """

    bits: int = 4
    group_size: int = -1
    sequential: bool = True
    steps: int = 1000
    batch_size: int = 50
    weight_lr: float = 1e-5
    bias_lr: float = 1e-3
    range_lr: float = 1e-3
    scale_dtype: torch.dtype = torch.float16
    generator: torch.Generator | None = None

    wants: ClassVar[frozenset[Want]] = frozenset({"inputs", "float inputs"})

    def __post_init__(self) -> None:
        check_rounding(self.bits, self.group_size)
        check_tuning(self.steps, self.batch_size, "batch_size")
        for name in ("weight_lr", "bias_lr", "range_lr"):
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "at least 0 and finite")

    def check(self, name: str, layer: nn.Linear) -> None:
        check_groups(name, layer, self.group_size)

    def quantize(self, name: str, layer: nn.Linear, found: Found) -> PackedLinear:
        if found.inputs is None or found.float_inputs is None:
            raise ValueError(f"{name}: AdaQuant needs the inputs of the layer")
        with torch.no_grad():
            y = layer(found.float_inputs)
        fake, _ = adaquant_layer(
            layer,
            found.inputs if self.sequential else found.float_inputs,
            y,
            self.steps,
            self.batch_size,
            Rates(self.weight_lr, self.bias_lr, self.range_lr),
            generator=self.generator,
            weight_bits=self.bits,
            act_bits=None,
            size=self.group_size,
        )
        return fake.packed(self.scale_dtype)


# Whole networks ----------------------------------------------------------------------------------------------------


def adaquant_model(
    model: nn.Module,
    calib_loader: Iterable[Batch],
    sequential: bool = True,
    *,
    weight_bits: int | Mapping[str, int] = 4,
    act_bits: int | Mapping[str, int] | None = 4,
    steps: int = 1000,
    batch: int = 50,
    lrs: Rates | None = None,
    relu: Sequence[str] = (),
    skip: Sequence[str] = (),
    generator: torch.Generator | None = None,
) -> dict[str, Errors]:
    """Put a tuned `FakeQuantLayer` in the place of every `nn.Linear` and `nn.Conv2d`, in the order of their calls.

    A layer in several places goes by the first of its names. The output projection of `nn.MultiheadAttention` is left
    alone: its weights are read without a call. Where a linear layer's calls differ in more than the number of samples,
    as on texts of different lengths, each row of its input is a sample.

    Args:
        model: changed in place; put into evaluation mode.
        calib_loader: batches to run the model on: tensors, mappings of keyword arguments, or sequences of arguments.
        sequential: tune on the inputs that the rounded layers before give, and not on those of the float model.
        weight_bits, act_bits: of all layers, or of each by its name.
        steps, batch, lrs, generator: as in `adaquant_layer`; no steps leave the rounding with the ranges of the start.
        relu: names of layers right before a ReLU.
        skip: names of layers that are left alone.

    Returns:
        The errors of each layer, by name.

    Raises:
        ValueError: there are no calibration data or not finite ones, no layers, the model is rounded already or is a
            layer itself, a layer has weights that are not finite or no bits, the data never reach it, or have several
            shapes at a convolution; nothing is changed then. Also if an error is not finite.
    """
    batches = list(calib_loader)
    require(bool(batches), "calib_loader", batches, "one or more batches")
    check_tuning(steps, batch)
    check_finite_batches(batches)
    done = next((n for n, m in model.named_modules() if isinstance(m, FakeQuantLayer)), None)
    require(done is None, "model", done, "without rounded layers")
    require(not isinstance(model, Layer), "model", type(model).__name__, "one with layers; for one, adaquant_layer")
    exact = copy.deepcopy(model).eval()
    layers = {n: m for n, m in exact.named_modules() if _can_be_rounded(m) and n not in skip}
    require(bool(layers), "model", type(model).__name__, "one with nn.Linear or nn.Conv2d layers")
    check_finite_weights(layers)
    for argument, bits in (("weight_bits", weight_bits), ("act_bits", act_bits)):
        lacking = [name for name in layers if isinstance(bits, Mapping) and name not in bits]
        require(not lacking, argument, bits, f"of all layers, {lacking} too")
        for width in [bits[name] for name in layers] if isinstance(bits, Mapping) else [bits]:
            if width is not None or argument == "weight_bits":
                check_bits(argument, width)
    shapes: dict[str, set[tuple[int, ...]]] = {}  # of samples, by layer, in the order of calls
    with watching(layers, lambda name, x, y: shapes.setdefault(name, set()).add(tuple(x.shape[1:]))):
        for each in batches:
            run(exact, each)
    missing = [name for name in layers if name not in shapes]
    require(not missing, "calib_loader", missing, "data that reach every layer")
    for name, found in shapes.items():
        fit = len(found) == 1 or isinstance(layers[name], nn.Linear)
        require(fit, "calib_loader", found, f"data that have one shape at the convolution {name}")
    model.eval()
    generator = torch.Generator().manual_seed(0) if generator is None else generator

    errors = {}
    for name in shapes:
        x, y = _seen(exact, name, batches)
        if sequential:
            x, _ = _seen(model, name, batches)
        fake, errors[name] = adaquant_layer(
            layers[name],
            x,
            y,
            steps,
            batch,
            lrs,
            name in relu,
            generator,
            weight_bits=weight_bits if isinstance(weight_bits, int) else weight_bits[name],
            act_bits=act_bits[name] if isinstance(act_bits, Mapping) else act_bits,
        )
        put_in_place_of(model, model.get_submodule(name), fake)
    return errors


def _can_be_rounded(module: nn.Module) -> bool:
    return isinstance(module, Layer) and not isinstance(module, NonDynamicallyQuantizableLinear)


def _seen(model: nn.Module, name: str, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    calls: list[tuple[Tensor, Tensor]] = []
    with watching({name: model.get_submodule(name)}, lambda name, x, y: calls.append((x, y))):
        for batch in batches:
            run(model, batch)
    if len({x.shape[1:] for x, _ in calls}) > 1:
        calls = [(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])) for x, y in calls]
    inputs, outputs = (torch.cat(tensors) for tensors in zip(*calls, strict=True))
    return inputs, outputs


BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d


def retune_batchnorm(model: nn.Module, loader: Iterable[Batch], passes: int = 1) -> None:
    """Give batch norms the statistics of the network as it is now: the mean over all batches of all passes.

    Args:
        model: changed in place. While statistics are taken, batch norms normalise by the batch at hand.
        loader: calibration batches, as in `adaquant_model`, of more than one sample.
        passes: how often they are run through; the first norms decide what later ones see, but not in training mode.

    Raises:
        ValueError: there are no batches or no batch norms with statistics, or no passes. After this or any other
            exception the model is as it was.
    """
    norms = [m for m in model.modules() if isinstance(m, BatchNorm) and m.track_running_stats]
    require(bool(norms), "model", type(model).__name__, "one with batch norms")
    require(type(passes) is int and passes >= 1, "passes", passes, "a whole number of at least 1")
    batches = list(loader)
    require(bool(batches), "loader", batches, "one or more batches")
    before = [(norm, copy.deepcopy(norm.state_dict()), norm.momentum) for norm in norms]
    try:
        with evaluating(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the mean of all batches
                norm.train()
            for _ in range(passes):
                for each in batches:
                    run(model, each)
    except BaseException:
        for norm, state, _ in before:
            norm.load_state_dict(state)
        raise
    finally:
        for norm, _, momentum in before:
            norm.momentum = momentum


@torch.no_grad()
def fold_batchnorm(model: nn.Module) -> nn.Module:
    """Fold batch norms into the layers right before them in an `nn.Sequential`, in place; returns the model.

    Rounded layers keep their codes: the scales of their channels are multiplied, and where γ is negative code k becomes
    2^b - 1 - k. In evaluation mode the model gives what it gave.

    Raises:
        ValueError: no batch norm follows a layer.
    """
    folded = 0
    for sequence in [m for m in model.modules() if isinstance(m, nn.Sequential)]:
        for place in range(len(sequence) - 1):
            layer, norm = sequence[place], sequence[place + 1]
            if isinstance(norm, BatchNorm) and isinstance(layer, FakeQuantLayer | Layer) and norm.track_running_stats:
                _fold(layer, norm)
                sequence[place + 1] = nn.Identity()
                folded += 1
    require(folded > 0, "model", type(model).__name__, "one with batch norms after layers in an nn.Sequential")
    return model


def _fold(layer: FakeQuantLayer | Layer, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    gain = torch.rsqrt(variance + norm.eps) * (norm.weight if norm.affine else 1)
    shift = norm.bias if norm.affine else torch.zeros_like(mean)
    inner = layer.layer if isinstance(layer, FakeQuantLayer) else layer
    bias = torch.zeros_like(mean) if inner.bias is None else inner.bias
    inner.bias = nn.Parameter(shift + (bias - mean) * gain, requires_grad=inner.weight.requires_grad)
    inner.weight.mul_(gain.view(-1, *[1] * (inner.weight.ndim - 1)))
    if isinstance(layer, FakeQuantLayer):
        quantizer = layer.weight_quantizer
        factor = gain.repeat_interleave(len(quantizer.range) // len(gain))
        grid = quantizer.grid()
        step, low = grid.scale[:, 0], grid.offset[:, 0]
        top = 2**quantizer.bits - 1
        quantizer.range.copy_(step * top * factor.abs())
        quantizer.zero.copy_(torch.where(factor < 0, low + step * top, low) * factor)


def tune_bias(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
    epochs: int = 10,
    lr: float = 1e-3,
) -> list[float]:
    """Train the biases of a rounded network, and nothing else, by Adam.

    Args:
        model: changed in place; stays in evaluation mode. After any exception it is as it was.
        loader: pairs of inputs and targets: the float network's outputs, or labels where `loss` takes them.
        loss: of outputs and targets.
        epochs: how often all pairs are seen.
        lr: learning rate.

    Returns:
        The mean loss of each epoch.

    Raises:
        ValueError: there are no pairs, not finite ones or no biases, an argument lies outside its range, or losses or
            biases do not stay finite.
    """
    pairs = list(loader)
    require(bool(pairs), "loader", pairs, "one or more pairs")
    check_finite_batches(pairs)
    require(type(epochs) is int and epochs >= 1, "epochs", epochs, "a whole number of at least 1")
    require(0 < lr < math.inf, "lr", lr, "above 0 and finite")
    biases = [m.bias for m in model.modules() if isinstance(m, Layer) and m.bias is not None]
    require(bool(biases), "model", type(model).__name__, "one with layers that have biases")
    before = [(bias, bias.detach().clone(), bias.requires_grad, bias.grad) for bias in biases]
    modes = [(module, module.training) for module in model.modules()]
    try:
        return _tuned(model.eval(), biases, pairs, loss, epochs, lr)
    except BaseException:
        for bias, value, _, _ in before:
            bias.detach().copy_(value)
        for module, mode in modes:
            module.training = mode
        raise
    finally:
        for bias, _, trained, grad in before:
            bias.requires_grad_(trained).grad = grad


def _tuned(
    model: nn.Module,
    biases: Sequence[Tensor],
    pairs: Sequence[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    epochs: int,
    lr: float,
) -> list[float]:
    optimizer = torch.optim.Adam([bias.requires_grad_(True) for bias in biases], lr)
    means = []
    for _ in range(epochs):
        losses = []
        for x, target in pairs:
            value = loss(model(x), target)
            losses.append(value.detach())
            grads = torch.autograd.grad(value, biases)
            for bias, grad in zip(biases, grads, strict=True):
                bias.grad = grad
            optimizer.step()
        means.append(torch.stack(losses).mean().item())
        if not math.isfinite(means[-1]):
            raise ValueError(f"the loss must be finite, got {means[-1]} in epoch {len(means)}")
        if not all(bias.isfinite().all() for bias in biases):
            raise ValueError(f"the biases must stay finite, got others in epoch {len(means)}")
    return means


# Bits for each layer -----------------------------------------------------------------------------------------------


class Allocation(NamedTuple):
    """Bits for each layer, the sum of losses that they cause, and the size in bits."""

    bits: list[int]
    loss: float
    size: int


def allocate_bits_ip(
    delta_loss: Mapping[int, Sequence[float]], sizes: Sequence[int], base_bits: int, target_ratio: float
) -> Allocation:
    """The bits for each layer with the least sum of losses, at a size of at most a share of float32's.

    Args:
        delta_loss: for each width below the base, by how much the network's loss rises when only that layer has it;
            less than 1e-6 counts as 1e-6.
        sizes: numbers of weights of the layers.
        base_bits: what layers have that are not narrowed.
        target_ratio: D; relative to 32 bits, not to the base.

    Raises:
        ValueError: no choice is small enough, a loss is not finite, or lengths differ.
    """
    layers = len(sizes)
    whole = layers > 0 and all(type(size) is int and size > 0 for size in sizes)
    require(whole, "sizes", sizes, "one or more whole numbers above 0")
    require(type(base_bits) is int and base_bits >= 1, "base_bits", base_bits, "a whole number of at least 1")
    require(0 < target_ratio < math.inf, "target_ratio", target_ratio, "above 0")
    options = sorted(delta_loss)
    narrower = all(type(bits) is int and 1 <= bits < base_bits for bits in options)
    require(narrower, "delta_loss", options, f"of whole widths below {base_bits} bits")
    for bits, losses in delta_loss.items():
        whole = len(losses) == layers and all(math.isfinite(loss) for loss in losses)
        require(whole, f"delta_loss[{bits}]", losses, f"{layers} finite numbers")
    widths = [*options, base_bits]
    loss = np.array([*(np.maximum(delta_loss[bits], LEAST_LOSS) for bits in options), np.zeros(layers)])
    size = np.outer(widths, sizes).astype(float)
    limit = target_ratio * FLOAT_BITS * sum(sizes)
    smallest = widths[0] * sum(sizes)
    require(
        smallest <= limit * (1 + 1e-9), "target_ratio", target_ratio, f"{smallest / FLOAT_BITS / sum(sizes)} or more"
    )
    chosen = one_each(loss.T, size.T / limit, -np.inf, 1)
    if chosen is None:
        raise ValueError("the integer programme has no solution")
    given = [widths[place] for place in chosen]
    total = sum(width * count for width, count in zip(given, sizes, strict=True))
    return Allocation(given, float(loss[chosen, np.arange(layers)].sum()), total)
