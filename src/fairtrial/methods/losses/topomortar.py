"""Skeleton losses for thin structures, and Betti errors (TopoMortar, BMVC 2025, arXiv:2503.03365).

TopoMortar compares losses that are to keep a segmentation's topology: how many pieces it has and how many holes. What
helped was clDice (Shit et al. 2021, arXiv:2003.07311) and, with noisy labels, Skeleton Recall (Kirchhoff et al. 2024,
arXiv:2404.03010); here they are, with the baseline and a loss by distances (Valverde and Tohka 2023,
arXiv:2108.01405), as its authors ran them. With p the softmax of logits (b, c, h, w), t the target as one-hot maps,
class 1 the foreground, and sums over pixels:

    Dice             D = -mean_{b,c} (2 Σ p t + 1e-5) / (Σ p + Σ t + 1e-5)
    CEDice           cross entropy + D
    clDice           (1-α) D + α (1 - 2 P R / (P + R)),    sums over the batch
                     P = (Σ S(p₁) t₁ + s) / (Σ S(p₁) + s),    R = (Σ S(t₁) p₁ + s) / (Σ S(t₁) + s)
    Skeleton Recall  cross entropy - w mean_b (Σ p₁ t₁ M + 1e-5) / (Σ t₁ M + 1e-5)
    Region-wise      mean_{b,c,pixels} p z,    z = -(distance to the other classes) / (its maximum) inside the class,
                     1 outside

S is the soft skeleton: of an image I, eroded i = 0..n times, what an opening takes away, d_i = relu(I_i - open(I_i)),
collected by S ← S + relu(d_i - S d_i). M is the tube: the label's skeleton, dilated. The Dice term and that of Skeleton
Recall are negative, and so may the losses be.

The code (github.com/jmlipman/TopoMortar) is followed, except in this: it takes log(p + 1e-15), which bounds the loss of
a pixel at 34.5 and leaves hopeless ones without gradient, where the cross entropy here has no bound; it gives a class
that fills an image distances to a point outside, where z is -1 here; and it counts an empty prediction as one piece.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.methods.arguments import require
from fairtrial.methods.losses.classification import at_least_float32, check_reduction, reduce
from fairtrial.methods.registry import Integer, LogUniform, Uniform, method


def _check_maps(input: Float[Tensor, "..."], target: Int[Tensor, "..."], classes: int | None = None) -> None:
    """Refuse anything but logits (b, c, h, w) with class indices (b, 1, h, w); values are looked at on the CPU only."""
    require(input.ndim == 4, "input", tuple(input.shape), "logits of shape (b, c, h, w)")
    require(input.numel() > 0, "input", tuple(input.shape), "logits of at least one image")
    require(input.is_floating_point(), "input", input.dtype, "a floating-point tensor")
    accepted = input.shape[1] >= 2 if classes is None else input.shape[1] == classes
    require(accepted, "input", tuple(input.shape), f"logits of {classes or 'at least 2'} classes")
    wanted = input.shape[0], 1, *input.shape[2:]
    _check_labels(target)
    require(target.shape == wanted, "target", tuple(target.shape), f"of shape {wanted}")
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(target.min()), int(target.max())
        require(low >= 0 and high < input.shape[1], "target", f"{low}..{high}", f"within 0..{input.shape[1] - 1}")


def _check_labels(target: Int[Tensor, "..."]) -> None:
    integer = not target.is_floating_point() and not target.is_complex() and target.dtype != torch.bool
    require(integer, "target", target.dtype, "integer class indices")
    fits = target.ndim == 4 and target.shape[1] == 1 and target.numel() > 0
    require(fits, "target", tuple(target.shape), "of shape (b, 1, h, w) with at least one image")


def _one_hot(target: Int[Tensor, "b 1 h w"], probability: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    classes = torch.arange(probability.shape[1], device=target.device)[:, None, None]
    return (target == classes).to(probability.dtype)


def _cross_entropy(logits: Float[Tensor, "b c h w"], target: Int[Tensor, "b 1 h w"]) -> Float[Tensor, " b"]:
    return F.cross_entropy(logits, target[:, 0].long(), reduction="none").mean((1, 2))


def _dice(p: Float[Tensor, "b c h w"], t: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Minus the Dice coefficient of each image, the mean over its classes."""
    overlap = (2 * (p * t).sum((2, 3)) + 1e-5) / (p.sum((2, 3)) + t.sum((2, 3)) + 1e-5)
    return -overlap.mean(1)


def _erode(image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    rows, columns = F.max_pool2d(-image, (3, 1), 1, (1, 0)), F.max_pool2d(-image, (1, 3), 1, (0, 1))
    return -torch.maximum(rows, columns)


def _residue_of_opening(image: Float[Tensor, "b c h w"], eroded: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    return (image - F.max_pool2d(eroded, 3, 1, 1)).relu()


class SoftSkeletonize(nn.Module):
    """Soft skeleton of images (b, c, h, w) with values from 0 to 1, one channel at a time, differentiable.

    Args:
        iterations: erosions, at least 1: half the thickness of what is to be thinned, or more.
    """

    def __init__(self, iterations: int = 3) -> None:
        super().__init__()
        require(iterations >= 1, "iterations", iterations, "at least 1")
        self.iterations = iterations

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        eroded = _erode(image)
        skeleton = _residue_of_opening(image, eroded)
        for _ in range(self.iterations):
            image, eroded = eroded, _erode(eroded)
            found = _residue_of_opening(image, eroded)
            skeleton = skeleton + (found - skeleton * found).relu()
        return skeleton

    def extra_repr(self) -> str:
        return f"iterations={self.iterations}"


@method(paper="topomortar", slot="segmentation_loss", search={"alpha": Uniform(0.1, 0.9), "iterations": Integer(1, 10)})
class SoftCLDiceLoss(nn.Module):
    """Dice and clDice loss of logits (b, 2, h, w) and targets (b, 1, h, w) of 0 and 1, class 1 being the structure.

    It belongs to the batch as a whole, like the sums in it.

    Args:
        iterations: of `SoftSkeletonize`.
        alpha: α within 0..1, the share of clDice.
        smooth: s > 0.

    Raises:
        ValueError: shapes that do not fit, other than two classes, or targets that are not whole numbers 0 and 1.
    """

    def __init__(self, iterations: int = 3, alpha: float = 0.5, smooth: float = 1.0) -> None:
        super().__init__()
        require(0 <= alpha <= 1, "alpha", alpha, "within 0..1")
        require(0 < smooth < float("inf"), "smooth", smooth, "above 0 and finite")
        self.skeletonize = SoftSkeletonize(iterations)
        self.alpha, self.smooth = alpha, smooth

    def forward(self, input: Float[Tensor, "b c h w"], target: Int[Tensor, "b 1 h w"]) -> Float[Tensor, ""]:
        _check_maps(input, target, classes=2)
        p = at_least_float32(input).softmax(1)
        t = _one_hot(target, p)
        precision = self._share(self.skeletonize(p[:, 1:]), t[:, 1:])
        sensitivity = self._share(self.skeletonize(t[:, 1:]), p[:, 1:])
        cl_dice = 2 * precision * sensitivity / (precision + sensitivity)
        return ((1 - self.alpha) * _dice(p, t).mean() + self.alpha * (1 - cl_dice)).to(input.dtype)

    def _share(self, skeleton: Float[Tensor, "b 1 h w"], mask: Float[Tensor, "b 1 h w"]) -> Float[Tensor, ""]:
        """How much of a skeleton lies within a mask."""
        return ((skeleton * mask).sum() + self.smooth) / (skeleton.sum() + self.smooth)

    def extra_repr(self) -> str:
        return f"iterations={self.skeletonize.iterations}, alpha={self.alpha}, smooth={self.smooth}"


@method(paper="topomortar", slot="segmentation_loss")
class CEDiceLoss(nn.Module):
    """Cross entropy and Dice loss of logits (b, c, h, w) and class indices (b, 1, h, w), the usual baseline.

    Args:
        reduction: 'none' (one loss for each image), 'mean' or 'sum'.

    Raises:
        ValueError: shapes that do not fit, fewer than two classes, or targets that are not class indices.
    """

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction = reduction

    def forward(self, input: Float[Tensor, "b c h w"], target: Int[Tensor, "b 1 h w"]) -> Float[Tensor, "..."]:
        _check_maps(input, target)
        logits = at_least_float32(input)
        p = logits.softmax(1)
        loss = _cross_entropy(logits, target) + _dice(p, _one_hot(target, p))
        return reduce(loss, self.reduction).to(input.dtype)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


def skeleton_tube(target: Int[Tensor, "b 1 h w"], dilations: int = 2) -> Bool[Tensor, "b 1 h w"]:
    """Skeleton of each label's foreground, widened by so many pixels within the foreground.

    scikit-image thins on the CPU, of the extra `vision`. On another device that waits for it: tubes of labels that come
    up again are better made once.

    Raises:
        ValueError: the target is not of whole numbers and shape (b, 1, h, w), or `dilations` is negative.
        ImportError: scikit-image is not installed.
    """
    _check_labels(target)
    require(dilations >= 0, "dilations", dilations, "at least 0")
    tube: Tensor = _skeleton_tube(target, dilations)
    return tube


@torch.library.custom_op(
    "fairtrial::skeleton_tube", mutates_args=(), schema="(Tensor target, int dilations) -> Tensor"
)  # opaque to torch.compile, which cannot trace what is not torch's
def _skeleton_tube(target: Tensor, dilations: int) -> Tensor:
    try:
        from skimage.morphology import skeletonize
    except ImportError as error:
        raise ImportError(f"skeletons need an extra: pip install 'fairtrial[vision]' ({error})") from None
    masks = (target[:, 0] > 0).cpu().numpy()
    tubes = np.stack([skeletonize(mask) for mask in masks])
    cross = ndimage.generate_binary_structure(2, 1)[None]
    if dilations:
        tubes = ndimage.binary_dilation(tubes, cross, iterations=dilations) & masks
    return torch.from_numpy(tubes[:, None]).to(target.device)


@_skeleton_tube.register_fake
def _(target: Tensor, dilations: int) -> Tensor:
    return torch.empty_like(target, dtype=torch.bool)


@method(paper="topomortar", slot="segmentation_loss", search={"weight": LogUniform(0.1, 10.0)})
class SkeletonRecallLoss(nn.Module):
    """Cross entropy and Skeleton Recall of logits (b, 2, h, w) and targets (b, 1, h, w) of 0 and 1.

    The recall knows nothing of what is wrongly found; that is left to the cross entropy.

    Args:
        weight: w ≥ 0 of the recall.
        tube_dilations: pixels by which the skeleton is widened, at least 0.
        reduction: 'none' (one loss for each image), 'mean' or 'sum'.

    A call may bring its labels' tubes (b, 1, h, w) as `tube`; else `skeleton_tube` makes them.

    Raises:
        ValueError: shapes that do not fit, other than two classes, or targets that are not whole numbers 0 and 1.
        ImportError: no tube is given, and scikit-image is not installed.
    """

    def __init__(self, weight: float = 1.0, tube_dilations: int = 2, *, reduction: str = "mean") -> None:
        super().__init__()
        require(0 <= weight < float("inf"), "weight", weight, "at least 0 and finite")
        require(tube_dilations >= 0, "tube_dilations", tube_dilations, "at least 0")
        check_reduction(reduction)
        self.weight, self.tube_dilations, self.reduction = weight, tube_dilations, reduction

    def forward(
        self,
        input: Float[Tensor, "b c h w"],
        target: Int[Tensor, "b 1 h w"],
        tube: Shaped[Tensor, "b 1 h w"] | None = None,
    ) -> Float[Tensor, "..."]:
        _check_maps(input, target, classes=2)
        if tube is None:
            tube = skeleton_tube(target, self.tube_dilations)
        require(tube.shape == target.shape, "tube", tuple(tube.shape), f"of shape {tuple(target.shape)}, as target")
        logits = at_least_float32(input)
        wanted = ((tube != 0) & (target == 1))[:, 0]
        found = logits.softmax(1)[:, 1] * wanted
        recall = (found.sum((1, 2)) + 1e-5) / (wanted.sum((1, 2)) + 1e-5)
        loss = _cross_entropy(logits, target) - self.weight * recall
        return reduce(loss, self.reduction).to(input.dtype)

    def extra_repr(self) -> str:
        return f"weight={self.weight}, tube_dilations={self.tube_dilations}, reduction={self.reduction!r}"


@method(paper="topomortar", slot="segmentation_loss")
class RegionWiseLoss(nn.Module):
    """Region-wise loss of logits (b, c, h, w) and class indices (b, 1, h, w), with rectified maps.

    The distances are SciPy's, on the CPU: on another device a call waits for it.

    Args:
        reduction: 'none' (one loss for each image), 'mean' or 'sum'.

    Raises:
        ValueError: shapes that do not fit, fewer than two classes, or targets that are not class indices.
    """

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction = reduction

    def forward(self, input: Float[Tensor, "b c h w"], target: Int[Tensor, "b 1 h w"]) -> Float[Tensor, "..."]:
        _check_maps(input, target)
        p = at_least_float32(input).softmax(1)
        loss = (p * _rectified_maps(target, p.shape[1]).to(p.dtype)).mean((1, 2, 3))
        return reduce(loss, self.reduction).to(input.dtype)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


@torch.library.custom_op("fairtrial::rectified_maps", mutates_args=(), schema="(Tensor target, int classes) -> Tensor")
def _rectified_maps(target: Tensor, classes: int) -> Tensor:
    inside = target.cpu().numpy() == np.arange(classes)[:, None, None]
    maps = np.ones(inside.shape)
    for z, region in zip(maps.reshape(-1, *inside.shape[2:]), inside.reshape(-1, *inside.shape[2:]), strict=True):
        if region.all():
            z[:] = -1.0
        elif region.any():
            depth = ndimage.distance_transform_edt(region)
            z[region] = -depth[region] / depth.max()
    return torch.from_numpy(maps).to(target.device)


@_rectified_maps.register_fake
def _(target: Tensor, classes: int) -> Tensor:
    return target.new_empty(target.shape[0], classes, *target.shape[2:], dtype=torch.float64)


class BettiNumbers(NamedTuple):
    """Of a mask: pieces of the foreground, and holes in it."""

    components: int
    holes: int


def betti_numbers(mask: Shaped[Tensor, "h w"]) -> BettiNumbers:
    """Betti numbers of a mask (h, w), whose foreground is what is not 0; on the CPU.

    Pixels are closed squares: the foreground holds together by corners too, the background by edges only. Background
    that reaches the border is no hole, and an empty mask has no component.

    Raises:
        ValueError: the mask is not of two dimensions.
    """
    require(mask.ndim == 2, "mask", tuple(mask.shape), "of shape (h, w)")
    foreground = np.pad((mask != 0).cpu().numpy(), 1)
    components = ndimage.label(foreground, np.ones((3, 3)))[1]
    return BettiNumbers(components, ndimage.label(~foreground)[1] - 1)


def betti_error(prediction: Shaped[Tensor, "h w"], target: Shaped[Tensor, "h w"]) -> BettiNumbers:
    """By how much the Betti numbers of a predicted mask differ from the true ones, without sign.

    Raises:
        ValueError: the masks are not of two dimensions, or not of one shape.
    """
    require(prediction.shape == target.shape, "prediction", tuple(prediction.shape), f"of shape {tuple(target.shape)}")
    predicted, true = betti_numbers(prediction), betti_numbers(target)
    return BettiNumbers(abs(predicted.components - true.components), abs(predicted.holes - true.holes))
