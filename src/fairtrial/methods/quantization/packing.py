"""Integers of 1 to 8 bits in bytes, and a linear layer that holds its weights so.

Codes are packed row by row, the first code in the lowest bits. Where 8 is a multiple of the bits, a byte holds whole
codes; else 8 codes lie in as many bytes as they have bits.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.methods.arguments import require


def packed_width(n: int, bits: int) -> int:
    """Bytes of a row of `n` codes."""
    return math.ceil(n * bits / 8) if 8 % bits == 0 else math.ceil(n / 8) * bits


def pack(codes: UInt8[Tensor, "rows n"], bits: int) -> UInt8[Tensor, "rows w"]:
    """The codes in as few bytes as hold them; rows that do not fill their bytes end in zeros.

    Args:
        codes: whole numbers below 2^bits.
        bits: of a code, from 1 to 8.

    Raises:
        ValueError: `bits` is out of range, or a code does not fit.
    """
    require(type(bits) is int and 1 <= bits <= 8, "bits", bits, "a whole number from 1 to 8")
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"codes of {bits} bits must be below {2**bits}, got {int(codes.max())}")
    if bits == 8:
        return codes.contiguous()
    per = 8 // bits if 8 % bits == 0 else 8
    rows, n = codes.shape
    together = F.pad(codes, (0, -n % per)).view(rows, -1, per)
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
        return torch.sum(together << shifts, -1, dtype=torch.uint8)
    shifts = torch.arange(per, device=codes.device) * bits
    words = (together.long() << shifts).sum(-1)
    places = 8 * torch.arange(bits, device=codes.device)
    return torch.bitwise_and(words[..., None] >> places, 255).to(torch.uint8).flatten(1)


def unpack(packed: UInt8[Tensor, "rows w"], bits: int, n: int) -> UInt8[Tensor, "rows n"]:
    """The first `n` codes of every row.

    Raises:
        ValueError: `bits` is out of range, or the rows are not as long as `n` codes are.
    """
    require(type(bits) is int and 1 <= bits <= 8, "bits", bits, "a whole number from 1 to 8")
    width = packed_width(n, bits)
    require(packed.shape[1] == width, "packed", tuple(packed.shape), f"of width {width}, for {n} codes of {bits} bits")
    if bits == 8:
        return packed
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return torch.bitwise_and(packed[..., None] >> shifts, 2**bits - 1).flatten(1)[:, :n].contiguous()
    bytes_ = packed.view(len(packed), -1, bits).long()
    words = (bytes_ << (8 * torch.arange(bits, device=packed.device))).sum(-1)
    places = bits * torch.arange(8, device=packed.device)
    codes = torch.bitwise_and(words[..., None] >> places, 2**bits - 1)
    return codes.to(torch.uint8).flatten(1)[:, :n].contiguous()


class PackedLinear(nn.Module):
    """A linear layer whose weights are packed codes: Ŵ = scale · code + offset, in groups along the input.

    Some weights may be kept as they are, by their place; they take the place of what their codes stand for.

    Args:
        codes: whole numbers below 2^bits.
        scale: one for each group of a row; negative ones are allowed.
        offset: what the code 0 stands for. With a zero point z it is -scale · z.
        bits: of a code, from 1 to 8.
        bias: of the layer.
        kept: flat places of the weights that are kept, in rising order, and their values.

    Raises:
        ValueError: shapes do not fit each other, or a code does not fit its bits.
    """

    bits: int
    bias: Tensor | None
    packed: Tensor
    scale: Tensor
    offset: Tensor
    kept_at: Tensor | None
    kept: Tensor | None

    def __init__(
        self,
        codes: UInt8[Tensor, "o i"],
        scale: Float[Tensor, "o g"],
        offset: Float[Tensor, "o g"],
        bits: int,
        bias: Float[Tensor, " o"] | None = None,
        *,
        kept: tuple[Int[Tensor, " k"], Float[Tensor, " k"]] | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.bits, self.groups = bits, scale.shape[1]
        group_size(self.in_features, self.in_features // self.groups if self.groups else 0)
        self.register_buffer("packed", pack(codes, bits))
        self.register_buffer("scale", scale.contiguous())
        self.register_buffer("offset", offset.contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        places, values = kept if kept is not None else (None, None)
        self.register_buffer("kept_at", None if places is None else places.to(torch.int32))
        self.register_buffer("kept", values)

    def codes(self) -> UInt8[Tensor, "o i"]:
        """The codes, a byte each."""
        return unpack(self.packed, self.bits, self.in_features)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "o i"]:
        """The weights that the codes stand for."""
        grouped = self.codes().view(self.out_features, self.groups, -1).to(dtype)
        weight = torch.addcmul(self.offset.to(dtype)[..., None], grouped, self.scale.to(dtype)[..., None])
        if self.kept_at is not None and self.kept is not None:
            weight.view(-1)[self.kept_at.long()] = self.kept.to(dtype)
        return weight.view(self.out_features, self.in_features)

    @property
    def weight(self) -> Float[Tensor, "o i"]:
        """The weights, for whoever reads them past `forward`; in the dtype of the bias, without one in float32."""
        return self.dequantize(torch.float32 if self.bias is None else self.bias.dtype)

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        return F.linear(x, self.dequantize(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def bits_per_weight(self) -> float:
        """All that is held beside the bias, scales, offsets and kept weights included."""
        return bits_held(self)

    def extra_repr(self) -> str:
        text = f"{self.in_features}, {self.out_features}, bits={self.bits}, groups={self.groups}"
        return text if self.kept is None else f"{text}, kept={len(self.kept)}"


class CPUInt4Linear(nn.Module):
    """A `PackedLinear` of 4 bits in the layout of PyTorch's CPU kernel, which never unpacks the weights to memory.

    It computes in bfloat16, for which alone the kernel is fast (several times as fast as float32 weights for a single
    row), whatever the dtype of input and output. The kernel has no derivative: for inputs that need a gradient the
    weights are unpacked, which is slow. It takes as many bytes as the packed layer and cannot be saved.

    Args:
        packed: a layer of 4 bits without kept weights, on the CPU, in groups of 32, 64, 128 or 256 and with a multiple
            of 16 outputs.

    Raises:
        ValueError: the layer is not like that.
    """

    packed: Tensor
    scale_and_zero: Tensor
    bias: Tensor | None

    def __init__(self, packed: PackedLinear) -> None:
        super().__init__()
        require(self.takes(packed), "packed", packed, "a layer that PyTorch's kernel for 4 bits on the CPU takes")
        self.in_features, self.out_features = packed.in_features, packed.out_features
        self.group_size = packed.in_features // packed.groups
        codes = torch._convert_weight_to_int4pack_for_cpu(packed.codes().int(), 1)
        self.register_buffer("packed", codes, persistent=False)
        # the kernel's own form is scale · (code - 8) + zero, groups first
        scale, offset = packed.scale.float(), packed.offset.float()
        both = torch.stack([scale.t(), (offset + 8 * scale).t()], -1)
        self.register_buffer("scale_and_zero", both.bfloat16().contiguous(), persistent=False)
        self.register_buffer("bias", packed.bias, persistent=False)

    @staticmethod
    def takes(layer: PackedLinear) -> bool:
        """Whether one can be made of a layer."""
        fits = layer.in_features // layer.groups in (32, 64, 128, 256) and layer.out_features % 16 == 0
        return layer.bits == 4 and fits and _all_codes_on_cpu(layer)

    @property
    def weight(self) -> Float[Tensor, "o i"]:
        """The weights, as exact as bfloat16, for whoever reads them past `forward`; in a packed layer's dtype."""
        unit = torch.eye(self.in_features, dtype=torch.bfloat16, device=self.packed.device)
        return self._product(unit).t().to(torch.float32 if self.bias is None else self.bias.dtype)

    def _product(self, rows: Tensor) -> Tensor:
        if _needs_gradient(rows):
            return F.linear(rows, self.weight.bfloat16())
        grid = self.scale_and_zero.bfloat16()
        return torch._weight_int4pack_mm_for_cpu(rows, self.packed, self.group_size, grid)

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        y = self._product(x.reshape(-1, self.in_features).bfloat16()).to(x.dtype)
        return (y if self.bias is None else y + self.bias.to(x.dtype)).view(*x.shape[:-1], self.out_features)

    def bits_per_weight(self) -> float:
        """All that is held beside the bias."""
        return bits_held(self)


class CPUInt8Linear(nn.Module):
    """A `PackedLinear` of 8 bits for PyTorch's CPU kernel, which reads int8 weights where there are few rows.

    It computes in bfloat16, whatever the dtype of input and output, with scales in float32: several times as fast as
    float32 weights for a single row. From `FEW` rows on the weights are converted first, which is faster there, and for
    inputs that need a gradient, because the kernel has no derivative. It takes as many bytes as the packed layer, but
    for scales in float32, and cannot be saved.

    Args:
        packed: a layer of 8 bits without kept weights, on the CPU, with one scale for each row.

    Raises:
        ValueError: the layer is not like that.
    """

    FEW = 8
    codes: Tensor
    scale: Tensor
    shift: Tensor
    ones: Tensor
    bias: Tensor | None

    def __init__(self, packed: PackedLinear) -> None:
        super().__init__()
        require(self.takes(packed), "packed", packed, "a layer that PyTorch's kernel for 8 bits on the CPU takes")
        self.in_features, self.out_features = packed.in_features, packed.out_features
        scale, offset = packed.scale.float().flatten(), packed.offset.float().flatten()
        self.register_buffer("codes", (packed.codes().short() - 128).to(torch.int8), persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", offset + 128 * scale, persistent=False)  # what the code 128 stands for
        self.register_buffer("ones", torch.ones_like(scale, dtype=torch.bfloat16), persistent=False)
        self.register_buffer("bias", packed.bias, persistent=False)

    @staticmethod
    def takes(layer: PackedLinear) -> bool:
        """Whether one can be made of a layer."""
        return layer.bits == 8 and layer.groups == 1 and _all_codes_on_cpu(layer)

    @property
    def weight(self) -> Float[Tensor, "o i"]:
        """The weights, for whoever reads them past `forward`; in the dtype of a packed layer's."""
        weight = torch.addcmul(self.shift.float()[:, None], self.codes.float(), self.scale.float()[:, None])
        return weight.to(torch.float32 if self.bias is None else self.bias.dtype)

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        rows = x.reshape(-1, self.in_features).bfloat16()
        if len(rows) < self.FEW and not _needs_gradient(rows):
            y = torch._weight_int8pack_mm(rows, self.codes, self.ones.bfloat16())
        else:
            y = F.linear(rows, self.codes.bfloat16())
        shifted = rows.sum(1, keepdim=True, dtype=torch.float32) * self.shift.float()
        y = torch.addcmul(shifted, y.float(), self.scale.float()).to(x.dtype)
        return (y if self.bias is None else y + self.bias.to(x.dtype)).view(*x.shape[:-1], self.out_features)

    def bits_per_weight(self) -> float:
        """All that is held beside the bias."""
        return bits_held(self)


def _needs_gradient(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _all_codes_on_cpu(layer: PackedLinear) -> bool:
    return layer.kept is None and layer.packed.device.type == "cpu"


def bits_held(layer: Any) -> float:
    """Bits of a linear layer's buffers but the bias, for each weight."""
    held: list[Tensor] = [buffer for name, buffer in layer.named_buffers() if name != "bias"]
    weights: int = layer.out_features * layer.in_features
    return 8 * sum(b.numel() * b.element_size() for b in held) / weights


def packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    """The packed layers of a model, by name."""
    yield from ((name, module) for name, module in model.named_modules() if isinstance(module, PackedLinear))


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers of a model that say how many bits a weight takes in them, by name: packed, or in a fixed format."""
    yield from ((name, module) for name, module in model.named_modules() if hasattr(module, "bits_per_weight"))


def group_size(width: int, asked: int) -> int:
    """The size of groups along an input of that width; -1 asks for the whole row.

    Raises:
        ValueError: it is no whole number that divides the width.
    """
    size = width if asked == -1 else asked
    divides = type(asked) is int and size >= 1 and width % size == 0
    require(divides, "group_size", asked, f"-1 or a divisor of the layer's input width {width}, a whole number")
    return size
