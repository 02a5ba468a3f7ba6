"""Formats of 8 and 4 bits scaled by the largest magnitude: nf4 and fp4 in blocks, int8 in rows; layers that hold them.

A block is a run of consecutive weights of the flattened tensor, the last one shorter where the size does not divide; a
row is the last dimension. With A the largest magnitude in it,

    4 bits:  the code is the place of the entry of a table nearest to w/A, which stands for A · table[code]
    int8:    the code is round(127 w/A), which stands for A · code/127

nf4 has the quantiles of a normal distribution (Dettmers et al. 2023, arXiv:2305.14314, Appendix E), fp4 the values of
a number with sign, two bits of exponent and one of mantissa, as bitsandbytes has them: 15 of them, for nothing needs
-0. Codes are places in the sorted table. Midway between two entries the smaller is taken, as by bitsandbytes.

Double quantisation, "-dq", codes the A's of a tensor too: less their mean, in blocks of 256 with a float32 scale each,
in evenly spaced symmetric steps of 8 bits, where bitsandbytes has a floating-point code of 8 bits. The codes of the
weights are those of the exact A.

Int8 is that of LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339): activations are rounded to int8 too, row by row,
but for the columns in which one of them is above a threshold, which are multiplied in 16 bits. These columns are taken
out before the row's largest magnitude is (the paper's Equation 8). bitsandbytes takes out the large values alone for
that. Which columns they are depends on all rows of a batch.
"""

import math
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int8, Shaped, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.methods.arguments import require
from fairtrial.methods.quantization.fake_quantization import straight_through
from fairtrial.methods.quantization.packing import bits_held, pack, unpack
from fairtrial.methods.quantization.storage import FileFormat, Read

Method = Literal["int8", "nf4", "fp4"]
METHODS = ("int8", "nf4", "fp4")
FORMATS = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "bf16")
BLOCK_OF_SCALES = 256

POSITIVE_FP4 = (1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1.0)
TABLES = {
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    "fp4": (*(-value for value in reversed(POSITIVE_FP4)), 0.0, *POSITIVE_FP4),
}


def table(method: str, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Float[Tensor, " v"]:
    """The values of nf4 or fp4 in rising order, from -1 to 1: 16 and 15 of them."""
    return torch.tensor(TABLES[method], dtype=dtype, device=device)


@cache
def _pairs(method: str, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "256 2"]:
    """What the two codes in each byte stand for."""
    with torch.inference_mode(False):  # what is cached has to serve training too
        levels = F.pad(table(method, dtype, device), (0, 16 - len(TABLES[method])))
        byte = torch.arange(256, device=device)
        return levels[torch.stack([byte & 15, byte >> 4], 1)]


def in_blocks(flat: Shaped[Tensor, " n"], block_size: int) -> Shaped[Tensor, "b s"]:
    """Blocks of consecutive values, the last one filled up with zeros."""
    return F.pad(flat, (0, -len(flat) % block_size)).view(-1, block_size)


def check_weight(weight: Tensor) -> None:
    """Refuse weights that are not finite floating-point numbers."""
    require(weight.is_floating_point(), "weight", weight.dtype, "a floating-point tensor")
    require(weight.ndim >= 1 and weight.numel() > 0, "weight", tuple(weight.shape), "a tensor with weights")
    require(bool(weight.isfinite().all()), "weight", "values that are not finite", "finite")


def check_method(method: str, block_size: int) -> None:
    require(method in METHODS, "method", method, f"one of {', '.join(METHODS)}")
    require(isinstance(block_size, int) and block_size >= 1, "block_size", block_size, "at least 1")


class Codes(NamedTuple):
    """Codes of weights and what scales them.

    Attributes:
        codes: one for each weight; int8 from -127 to 127, or places in the table as uint8.
        scale: the largest magnitude of each row (int8: of the shape without the last dimension), or of each block.
    """

    codes: Int8[Tensor, "*s"] | UInt8[Tensor, "*s"]
    scale: Float[Tensor, "*r"]


@torch.no_grad()
def quantize_codes(weight: Float[Tensor, "*s"], method: Method, block_size: int = 64) -> Codes:
    """The code of every weight, and the scales, in the weight's dtype but at least float32.

    Args:
        weight: of any shape, with at least one dimension.
        method: 'int8' in rows, 'nf4' or 'fp4' in blocks.
        block_size: weights of a block.

    Raises:
        ValueError: the weights are no finite floating-point numbers, there is no such method, or the size is below 1.
    """
    check_method(method, block_size)
    check_weight(weight)
    w = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if method == "int8":
        scale = w.abs().amax(-1)
        return Codes(_int8_codes(w, scale), scale)
    blocks = in_blocks(w.flatten(), block_size)
    scale = blocks.abs().amax(1)
    levels = table(method, w.dtype, w.device)
    codes = torch.bucketize(blocks / _above_zero(scale)[:, None], (levels[:-1] + levels[1:]) / 2)
    return Codes(codes.to(torch.uint8).flatten()[: w.numel()].view(w.shape), scale)


def dequantize(codes: Codes, method: Method, block_size: int = 64) -> Float[Tensor, "*s"]:
    """What the codes stand for, in the scales' dtype.

    Raises:
        ValueError: there is no such method, or the scales are not as many as the codes need.
    """
    check_method(method, block_size)
    (code, scale), shape = codes, codes.codes.shape
    needed = shape[:-1] if method == "int8" else (math.ceil(code.numel() / block_size),)
    require(scale.shape == needed, "scale", tuple(scale.shape), f"of shape {tuple(needed)}")
    if method == "int8":
        return code * (scale / 127)[..., None]
    blocks = in_blocks(table(method, scale.dtype, scale.device)[code.flatten().int()], block_size) * scale[:, None]
    return blocks.flatten()[: code.numel()].view(shape)


def _int8_codes(x: Float[Tensor, "*r i"], largest: Float[Tensor, "*r"]) -> Int8[Tensor, "*r i"]:
    return torch.round(x * (127 / _above_zero(largest))[..., None]).to(torch.int8)


def _above_zero(scale: Float[Tensor, "*r"]) -> Float[Tensor, "*r"]:
    """Scales to divide by: zeros are divided by 1."""
    return torch.where(scale > 0, scale, 1)


# Layers --------------------------------------------------------------------------------------------------------------


class FormatLinear(nn.Module):
    """A linear layer whose weights are in one of the formats.

    Attributes:
        in_features, out_features: its sizes.
        bias: of the layer.
    """

    in_features: int
    out_features: int
    bias: Tensor | None

    @property
    def format(self) -> str:
        """One of `FORMATS`."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "o i"]:
        """The weights as numbers of a dtype."""
        raise NotImplementedError

    @property
    def weight(self) -> Float[Tensor, "o i"]:
        """For modules that read their layers' weights; in the dtype of the bias, without one in float32."""
        return self.dequantize(torch.float32 if self.bias is None else self.bias.dtype)

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        return F.linear(x, self.dequantize(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def bits_per_weight(self) -> float:
        """All that is held beside the bias, scales included."""
        return bits_held(self)


# Four bits ---------------------------------------------------------------------------------------------------------


class DoubleQuantized(NamedTuple):
    """Scales in 8 bits: mean + scale · code.

    Attributes:
        codes: one for each block of weights.
        scale: one for each 256 codes.
        mean: of all the scales.
    """

    codes: Int8[Tensor, " b"]
    scale: Float[Tensor, " g"]
    mean: Float[Tensor, ""]

    def dequantize(self) -> Float[Tensor, " b"]:
        groups = in_blocks(self.codes.to(self.scale.dtype), BLOCK_OF_SCALES) * self.scale[:, None]
        return groups.flatten()[: len(self.codes)] + self.mean


def double_quantize(absmax: Float[Tensor, " b"]) -> DoubleQuantized:
    """Scales in 8 bits, in symmetric even steps around their mean."""
    mean = absmax.mean()
    groups = in_blocks(absmax - mean, BLOCK_OF_SCALES)
    scale = groups.abs().amax(1) / 127
    codes = torch.round(groups / _above_zero(scale)[:, None]).to(torch.int8)
    return DoubleQuantized(codes.flatten()[: len(absmax)].clone(), scale, mean)


class Quantized4Bit(NamedTuple):
    """Weights in 4 bits: their codes, and the largest magnitude of each block as it is or in 8 bits."""

    codes: UInt8[Tensor, "*s"]
    absmax: Float[Tensor, " b"] | DoubleQuantized
    kind: Literal["nf4", "fp4"]
    block_size: int

    def dequantize(self) -> Float[Tensor, "*s"]:
        """What the codes stand for."""
        scale = self.absmax.dequantize() if isinstance(self.absmax, DoubleQuantized) else self.absmax
        return dequantize(Codes(self.codes, scale), self.kind, self.block_size)


def quantize_4bit(
    w: Float[Tensor, "*s"], kind: Literal["nf4", "fp4"] = "nf4", block_size: int = 64, double_quant: bool = False
) -> Quantized4Bit:
    """Weights in nf4 or fp4, in blocks of consecutive ones.

    Raises:
        ValueError: as `quantize_codes`, or the kind is another.
    """
    require(kind in TABLES, "kind", kind, "'nf4' or 'fp4'")
    codes, absmax = quantize_codes(w, kind, block_size)
    return Quantized4Bit(codes, double_quantize(absmax) if double_quant else absmax, kind, block_size)


class TableLinear(FormatLinear):
    """A linear layer with packed 4-bit codes of a table, two in a byte, the first in the lower bits.

    Args:
        weight: of the layer, quantised; in double quantisation its scales are too.
        bias: of the layer.
    """

    packed: Tensor
    scale: Tensor
    absmax_codes: Tensor | None
    mean: Tensor | None

    def __init__(self, weight: Quantized4Bit, bias: Float[Tensor, " o"] | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.codes.shape
        self.kind, self.block_size = weight.kind, weight.block_size
        absmax = weight.absmax
        double = absmax if isinstance(absmax, DoubleQuantized) else None
        self.register_buffer("packed", pack(weight.codes.view(1, -1), 4)[0])
        self.register_buffer("scale", absmax if isinstance(absmax, Tensor) else absmax.scale)
        self.register_buffer("absmax_codes", None if double is None else double.codes)
        self.register_buffer("mean", None if double is None else double.mean)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    def format(self) -> str:
        return self.kind if self.absmax_codes is None else f"{self.kind}-dq"

    def codes(self) -> UInt8[Tensor, "o i"]:
        """The codes, a byte each."""
        count = self.out_features * self.in_features
        return unpack(self.packed[None], 4, count).view(self.out_features, self.in_features)

    def absmax(self) -> Float[Tensor, " b"]:
        """The largest magnitude of each block, as it is kept."""
        if self.absmax_codes is None or self.mean is None:
            return self.scale
        return DoubleQuantized(self.absmax_codes, self.scale, self.mean).dequantize()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "o i"]:
        """The weights that the codes stand for."""
        count = self.out_features * self.in_features
        levels = F.embedding(self.packed.int(), _pairs(self.kind, dtype, self.packed.device)).flatten()[:count]
        blocks = in_blocks(levels, self.block_size) * self.absmax().to(dtype)[:, None]
        return blocks.flatten()[:count].view(self.out_features, self.in_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, format={self.format!r}, block_size={self.block_size}"


# Eight and sixteen bits --------------------------------------------------------------------------------------------


def quantize_int8_rowwise(w: Float[Tensor, "*r i"]) -> Codes:
    """Weights as int8, by the largest magnitude of each row.

    Raises:
        ValueError: as `quantize_codes`.
    """
    return quantize_codes(w, "int8")


def int8_linear_mixed(
    x: Float[Tensor, "*b i"], w: Codes, threshold: float = 6.0, bias: Float[Tensor, " o"] | None = None
) -> Float[Tensor, "*b o"]:
    """x Wᵀ in int8, but for the columns of x in which a magnitude is above the threshold: these in float16.

    Args:
        x: activations; all but the last dimension are rows.
        w: weights (o, i) as `quantize_int8_rowwise` gives them.
        threshold: at least 0; infinity leaves no column out. The default is LLM.int8()'s.
        bias: added to the result.

    Raises:
        ValueError: the threshold is negative, or the weights have another width than x.
    """
    require(threshold >= 0, "threshold", threshold, "at least 0")
    require(w.codes.shape[-1] == x.shape[-1], "w", tuple(w.codes.shape), f"of width {x.shape[-1]}, as x")
    rows = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
    large = (rows.abs() > threshold).any(0)
    rest = rows.masked_fill(large, 0.0)
    scale = rest.abs().amax(1)
    product = torch._int_mm(_int8_codes(rest, scale), w.codes.t())
    y = product.to(rows.dtype) * (scale / 127)[:, None] * (w.scale.to(rows.dtype) / 127)
    outliers = large.nonzero()[:, 0]
    if len(outliers):
        columns = (w.codes[:, outliers] * (w.scale / 127)[:, None]).half()
        y += rows[:, outliers].half().to(rows.dtype) @ columns.to(rows.dtype).t()  # products of 16-bit numbers
    if bias is not None:
        y += bias
    return y.to(x.dtype).view(*x.shape[:-1], len(w.codes))


class Int8Linear(FormatLinear):
    """A linear layer with int8 weights and activations, and outlying columns in float16: `int8_linear_mixed`.

    The gradient of its input is that of the product with what the codes stand for, past the rounding of activations.

    Args:
        weight: codes and the largest magnitude of each row.
        bias: of the layer.
        threshold: above which a column of activations is multiplied in float16.
    """

    codes: Tensor
    scale: Tensor
    format = "int8"

    def __init__(self, weight: Codes, bias: Float[Tensor, " o"] | None = None, threshold: float = 6.0) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.codes.shape
        self.threshold = threshold
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "o i"]:
        """The weights that the codes stand for."""
        return dequantize(Codes(self.codes, self.scale), "int8").to(dtype)

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        value = int8_linear_mixed(x.detach(), Codes(self.codes, self.scale), self.threshold, self.bias)
        if not (x.requires_grad and torch.is_grad_enabled()):
            return value
        return straight_through(value, F.linear(x, self.dequantize(x.dtype)))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, format='int8', threshold={self.threshold}"


class BFloat16Linear(FormatLinear):
    """A linear layer whose weights are held in bfloat16; it computes in the dtype of its input."""

    format = "bf16"

    def __init__(self, weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._buffers["weight"] = weight.detach().bfloat16()  # files know it by the name that the property has
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "o i"]:
        """The weights in a dtype to compute in."""
        held = self._buffers["weight"]
        assert held is not None
        return held.to(dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, format='bf16'"


def bits_per_weight(fmt: str, block_size: int = 64, row: int | None = None) -> float:
    """Bits of a weight in a format, scales included, in a tensor that fills its blocks.

    Args:
        fmt: 'nf4', 'nf4-dq', 'fp4', 'fp4-dq', 'int8' or 'bf16'.
        block_size: of the formats of 4 bits.
        row: weights of a row, for int8; without it the row's scale does not count.

    Raises:
        ValueError: there is no such format, or a size is below 1.
    """
    check_format(fmt, block_size)
    require(row is None or row >= 1, "row", row, "at least 1")
    match fmt:
        case "bf16":
            return 16.0
        case "int8":
            return 8.0 if row is None else 8 + 32 / row
        case "nf4-dq" | "fp4-dq":
            return 4 + 8 / block_size + 32 / (block_size * BLOCK_OF_SCALES)
        case _:
            return 4 + 32 / block_size


def check_format(fmt: str, block_size: int) -> None:
    require(fmt in FORMATS, "fmt", fmt, f"one of {', '.join(FORMATS)}")
    require(isinstance(block_size, int) and block_size >= 1, "block_size", block_size, "at least 1")


# Files -------------------------------------------------------------------------------------------------------------


def format_layers(model: nn.Module) -> Iterator[tuple[str, FormatLinear]]:
    """The layers of a model that are in one of the formats, by name."""
    yield from ((name, module) for name, module in model.named_modules() if isinstance(module, FormatLinear))


def save_formats(model: nn.Module, path: str | Path) -> None:
    """Write a model with layers in these formats into a safetensors file, with what each of them is.

    Raises:
        ValueError: the model has no such layer.
    """
    layers = {name: _about(layer) for name, layer in format_layers(model)}
    if not layers:
        raise ValueError("the model has no layer in one of the formats: quantise it first")
    FILES.save(model, path, layers)


def _about(layer: FormatLinear) -> dict[str, str | int | float]:
    held: dict[str, str | int | float] = {"fmt": layer.format}
    if isinstance(layer, TableLinear):
        held["block_size"] = layer.block_size
    if isinstance(layer, Int8Linear):
        held["threshold"] = layer.threshold
    return held


def load_formats_(model: nn.Module, path: str | Path) -> nn.Module:
    """Load such a file into a model of the same architecture that is not quantised, in place; returns the model.

    Raises:
        ValueError: the file is of another format or version, or does not fit the model, which is left as it was.
    """
    return FILES.load_(model, path)


def _empty(layer: nn.Linear, held: Mapping[str, Any], read: Read) -> FormatLinear:
    check_format(held["fmt"], held.get("block_size", 64))
    return in_format(torch.zeros_like(layer.weight), layer.bias, **held)


FILES = FileFormat("fairtrial-weight-format", 1, "model of fairtrial's weight formats", "the weight formats", _empty)


def in_format(
    weight: Float[Tensor, "o i"],
    bias: Float[Tensor, " o"] | None,
    fmt: str,
    block_size: int = 64,
    threshold: float = 6.0,
) -> FormatLinear:
    """A linear layer whose weights are in a format."""
    if fmt == "bf16":
        return BFloat16Linear(weight, bias)
    if fmt == "int8":
        return Int8Linear(quantize_int8_rowwise(weight), bias, threshold)
    kind: Literal["nf4", "fp4"] = "nf4" if fmt.startswith("nf4") else "fp4"
    return TableLinear(quantize_4bit(weight, kind, block_size, fmt.endswith("-dq")), bias)
