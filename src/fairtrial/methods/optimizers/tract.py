"""TrAct: first-layer weights follow a step on the pre-activations (Petersen et al. 2024, arXiv:2410.23970).

In the first layer `z = W x + b` of a vision model the weight gradient is proportional to the pixels, so that contrast
and brightness set the step size. TrAct hands the optimizer, in place of `∇W = Gᵀ X` (rows of X the b inputs, of G the
gradients in z), the weight direction that best carries out a gradient step on z itself, in the sense of ridge
regression:

    argmin_M Σ_i ‖b G_i - M x_i‖² + λ b ‖M‖² = Gᵀ X (Xᵀ X / b + λ I)⁻¹ = Gᵀ (X Xᵀ / b + λ I)⁻¹ X

The forward pass and the gradients in input and bias are the ordinary ones. A convolution is a linear layer on patches,
b then being the number of patches: images times output positions. With a batch of one the change in z is
`‖x‖² / (‖x‖² + λ)` of its gradient, whatever the contrast of x. Inputs are meant to be standardised; towards
λ = ∞, λ times the result is `∇W`.

The direction is that of the backward code in the paper (its figure 2) and of the authors' package. The second form,
whose b×b matrix is the smaller for b < n, is equal to the Woodbury expansion used there and loses nothing to
cancellation. The package's option `cholesky_inverse`, which gives another and wrong gradient, and its dropping of a
wrapped layer's dilation are not followed.

The matrix is of the batch at hand: results depend on how a batch is split over accumulation steps or devices. Weight
decay and gradient clipping act on the gradient so changed, and its scale differs from the plain one's: tune the
learning rate anew.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fairtrial.methods.arguments import require
from fairtrial.methods.registry import LogUniform, method


def _ridge_factor(rows: Float[Tensor, "k d"], count: int, lam: float) -> Float[Tensor, "k k"]:
    """Cholesky factor of `rows rowsᵀ / count + lam I`.

    Where round-off in the product swamps `lam` and the factorisation breaks down, NaN: that needs no wait for the
    device, and shows in the gradient.
    """
    matrix = torch.addmm(
        torch.eye(len(rows), dtype=rows.dtype, device=rows.device), rows, rows.T, beta=lam, alpha=1.0 / max(count, 1)
    )
    factor, info = torch.linalg.cholesky_ex(matrix)
    return torch.where(info == 0, factor, torch.nan)


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        input: Float[Tensor, "*batch n"], weight: Float[Tensor, "m n"], bias: Float[Tensor, " m"] | None, lam: float
    ) -> Float[Tensor, "*batch m"]:
        return F.linear(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _, ctx.lam = inputs
        ctx.save_for_backward(input, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "*batch m"]) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        dtype = torch.promote_types(weight.dtype, torch.float32)
        X, G, W = (tensor.reshape(-1, tensor.shape[-1]).to(dtype) for tensor in (input, grad, weight))
        grad_input = grad_weight = grad_bias = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_input = (G @ W).reshape(input.shape).to(input.dtype)
            if ctx.needs_input_grad[1]:
                b, n = X.shape
                if b < n:
                    grad_weight = torch.cholesky_solve(G, _ridge_factor(X, b, ctx.lam)).T @ X
                else:
                    grad_weight = torch.cholesky_solve(X.T @ G, _ridge_factor(X.T, b, ctx.lam)).T
                grad_weight = grad_weight.to(weight.dtype)
            if ctx.needs_input_grad[2]:
                grad_bias = G.sum(0).to(weight.dtype)
        return grad_input, grad_weight, grad_bias, None


def _patches(
    input: Float[Tensor, "B c h w"],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Float[Tensor, "n b"]:
    """Patches as columns, in the order of (image, row, column): views of the input, written out once."""
    rows, columns = (d * (k - 1) + 1 for k, d in zip(kernel_size, dilation, strict=True))
    padded = F.pad(input, (padding[1], padding[1], padding[0], padding[0]))
    windows = padded.unfold(2, rows, stride[0]).unfold(3, columns, stride[1])[..., :: dilation[0], :: dilation[1]]
    return windows.permute(1, 4, 5, 0, 2, 3).reshape(input.shape[1] * kernel_size[0] * kernel_size[1], -1)


class _Conv2dFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        input: Float[Tensor, "B c h w"],
        weight: Float[Tensor, "m c kh kw"],
        bias: Float[Tensor, " m"] | None,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        lam: float,
    ) -> Float[Tensor, "B m oh ow"]:
        return F.conv2d(input, weight, bias, stride, padding, dilation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _, ctx.stride, ctx.padding, ctx.dilation, ctx.lam = inputs
        ctx.save_for_backward(input, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "B m oh ow"]) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        dtype = torch.promote_types(weight.dtype, torch.float32)
        x, G, W = input.to(dtype), grad.to(dtype), weight.to(dtype)
        m, n, b = len(weight), weight[0].numel(), grad[:, 0].numel()
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        with torch.autocast(grad.device.type, enabled=False):
            wanted = [needs_input, needs_weight and b >= n, needs_bias]
            grad_input, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
                G, x, W, [m], ctx.stride, ctx.padding, ctx.dilation, False, [0, 0], 1, wanted
            )
            if needs_weight:
                columns = _patches(x, weight.shape[2:], ctx.stride, ctx.padding, ctx.dilation)
                if b < n:
                    G_rows = G.permute(0, 2, 3, 1).reshape(b, m)
                    flat = torch.cholesky_solve(G_rows, _ridge_factor(columns.T, b, ctx.lam)).T @ columns.T
                else:
                    flat = torch.cholesky_solve(grad_weight.reshape(m, n).T, _ridge_factor(columns, b, ctx.lam)).T
                grad_weight = flat.reshape(weight.shape)
        return (
            grad_input.to(input.dtype) if needs_input else None,
            grad_weight.to(weight.dtype) if needs_weight else None,
            grad_bias.to(weight.dtype) if needs_bias else None,
            *(None,) * 4,
        )


class TrActLinear(nn.Linear):
    """`nn.Linear` whose weight gets the TrAct direction as its gradient; for the first layer of a model.

    Inputs are of shape (*, in_features), leading dimensions (batch, tokens) counting as rows. The solve is in float32
    or better, under autocast too. Differentiable once.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        lam: λ, above 0; 0.1 in the paper, for standardised inputs. Where the inputs' second moments are so large that
            λ vanishes in their rounding error (raw pixels of 0 to 255, say), the gradient can be NaN.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        lam: float = 0.1,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        require(0 < lam < float("inf"), "lam", lam, "above 0 and finite")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.lam = lam

    def forward(self, input: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        output: Tensor = _LinearFunction.apply(input, self.weight, self.bias, self.lam)
        return output

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lam={self.lam}"


class TrActConv2d(nn.Conv2d):
    """`nn.Conv2d` whose weight gets the TrAct direction as its gradient; for the first layer of a model.

    Args:
        in_channels, …, padding_mode, device, dtype: as in `nn.Conv2d`.
        lam: as in `TrActLinear`.

    Raises:
        NotImplementedError: groups other than 1, padding modes other than zeros, or padding='same' where that is
            uneven.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        *,
        lam: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        require(0 < lam < float("inf"), "lam", lam, "above 0 and finite")
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        if groups != 1:
            raise NotImplementedError(f"TrAct covers groups=1, got groups={groups}")
        if padding_mode != "zeros":
            raise NotImplementedError(f"TrAct covers padding_mode='zeros', got {padding_mode!r}")
        self.lam = lam
        self._padding = self._padding_on_both_sides()

    def _padding_on_both_sides(self) -> tuple[int, ...]:
        if not isinstance(self.padding, str):
            return self.padding
        if self.padding == "valid":
            return 0, 0
        total = [d * (k - 1) for k, d in zip(self.kernel_size, self.dilation, strict=True)]
        if any(size % 2 for size in total):
            raise NotImplementedError(f"TrAct covers padding='same' where it is even, got kernel {self.kernel_size}")
        return total[0] // 2, total[1] // 2

    def forward(self, input: Float[Tensor, "*B c h w"]) -> Float[Tensor, "*B m oh ow"]:
        images = input if input.ndim == 4 else input[None]
        output: Tensor = _Conv2dFunction.apply(
            images, self.weight, self.bias, self.stride, self._padding, self.dilation, self.lam
        )
        return output if input.ndim == 4 else output[0]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lam={self.lam}"


def tract(layer: nn.Module, lam: float = 0.1) -> TrActLinear | TrActConv2d:
    """The TrAct twin of a layer, sharing its Parameters: optimizers and state dicts keep working.

    Hooks of the layer are not carried over.

    Args:
        layer: an `nn.Linear` or `nn.Conv2d`, no subclass: what that computes is not known.
        lam: as in `TrActLinear`.

    Raises:
        TypeError: any other layer, or one with parametrised weights.
        NotImplementedError: as `TrActConv2d`.
    """
    twin: TrActLinear | TrActConv2d
    if type(layer) is nn.Linear:
        twin = TrActLinear(layer.in_features, layer.out_features, lam, layer.bias is not None, device="meta")
    elif type(layer) is nn.Conv2d:
        names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        same: dict[str, Any] = {name: getattr(layer, name) for name in names}
        bias = layer.bias is not None
        twin = TrActConv2d(layer.in_channels, layer.out_channels, bias=bias, lam=lam, device="meta", **same)
    else:
        raise TypeError(f"layer must be an nn.Linear or nn.Conv2d itself, got {type(layer).__name__}")
    twin.weight, twin.bias = layer.weight, layer.bias
    return twin.train(layer.training)


@method(paper="tract", slot="layer", search={"lam": LogUniform(0.01, 1.0)})
def tract_first_layer(model: nn.Module, lam: float = 0.1) -> nn.Module:
    """Replace the first `nn.Linear` or `nn.Conv2d` of a model, in the order of `model.modules()`, by its TrAct twin.

    That order is of registration, not of use: where they differ, call `tract` on the layer that sees the data.

    Args:
        model: changed in place; its Parameters stay the same objects.
        lam: as in `TrActLinear`.

    Returns:
        The model, or the twin if the model is itself such a layer.

    Raises:
        ValueError: there is no such layer.
        TypeError, NotImplementedError: as `tract`, for the layer found.
    """
    named = list(model.named_modules(remove_duplicate=False))
    first = next((module for _, module in named if isinstance(module, nn.Linear | nn.Conv2d)), None)
    if first is None:
        raise ValueError(f"model must contain an nn.Linear or nn.Conv2d, got {type(model).__name__} without any")
    twin = tract(first, lam)
    if first is model:
        return twin
    for name, module in named:
        if module is first:
            model.set_submodule(name, twin)
    return model
