"""Brick walls to be segmented into bricks and mortar, a small synthetic stand-in for TopoMortar's photographs.

Bricks lie in running bond, a little turned. Mortar is the foreground: one net with a hole for each whole brick, of
which every picture shows at least one, whatever its size: it shows the same stretch of wall, with more or fewer pixels.
What makes it hard is that the colours of bricks and mortar overlap under uneven light, stains, blur and noise. As in
the data set, training labels may be accurate, noisy (drawn quickly with a fixed pen: strokes beside their place, and
gaps) or pseudo-labels (found by a threshold).
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor

from fairtrial.methods.arguments import require

LABELS = ("accurate", "noisy", "pseudo")
SIDE, SMALLEST = 96, 64  # pixels of a picture's side: those that lengths below are given for, and the fewest
BRICK_HEIGHT, BRICK_WIDTH, MORTAR = (12.0, 18.0), (24.0, 36.0), (2.0, 4.0)
TURN, ROW_SHIFT = 0.05, 2.0  # radians and length, either way
BRICK, MORTARS = (0.56, 0.36, 0.30), (0.66, 0.60, 0.55)  # mean colours
OF_A_WALL, OF_A_BRICK, OF_A_PIXEL = 0.04, 0.10, 0.15  # standard deviations of colour
BLUR, CLOUD = (0.5, 1.2), 10.0
PEN, DISPLACED, GAPS = 1.8, 0.5, 0.05  # length, its standard deviation, and the share of strokes left out


class BrickWalls(NamedTuple):
    """Images with values from 0 to 1, labels as asked for, and the accurate labels of the same images; 1 is mortar."""

    images: Float[Tensor, "n 3 s s"]
    labels: Int[Tensor, "n 1 s s"]
    accurate: Int[Tensor, "n 1 s s"]


class _Bond(NamedTuple):
    """Where each pixel lies in a wall: joints nearest to it, and the distances to their middle lines."""

    row_joint: NDArray[np.int64]
    from_row_joint: NDArray[np.float64]
    row: NDArray[np.int64]
    end_joint: NDArray[np.int64]
    from_end_joint: NDArray[np.float64]
    brick: NDArray[np.int64]
    mortar: float


def synthetic_brick_wall(n: int, size: int, rng: Generator, labels: str = "accurate") -> BrickWalls:
    """`n` walls of `size` pixels squared. A generator in one state draws the same walls for all kinds of labels.

    Args:
        n: images, at least 1.
        size: height and width in pixels, at least 64; a joint would be thinner than a pixel in a smaller picture.
        rng: NumPy's generator; its children are drawn from, one for each wall.
        labels: 'accurate', 'noisy' or 'pseudo'.

    Raises:
        ValueError: an argument is outside its range.
    """
    require(n >= 1, "n", n, "at least 1")
    require(size >= SMALLEST, "size", size, f"at least {SMALLEST}")
    require(labels in LABELS, "labels", labels, f"one of {', '.join(LABELS)}")
    images = np.empty((n, 3, size, size), np.float32)
    found, accurate = np.empty((2, n, 1, size, size), np.int64)
    for i, child in enumerate(rng.spawn(n)):
        of_wall, of_label = child.spawn(2)
        bond = _bond(size, of_wall)
        accurate[i, 0] = _laid(bond)
        images[i] = _photograph(bond, accurate[i, 0], of_wall)
        if labels == "accurate":
            found[i] = accurate[i]
        elif labels == "noisy":
            found[i, 0] = _drawn(bond, of_label)
        else:
            found[i, 0] = _above_threshold(images[i])
    return BrickWalls(torch.from_numpy(images), torch.from_numpy(found), torch.from_numpy(accurate))


def _bond(size: int, rng: Generator) -> _Bond:
    height, width, mortar = rng.uniform(*BRICK_HEIGHT), rng.uniform(*BRICK_WIDTH), rng.uniform(*MORTAR)
    turn, (down, right) = rng.uniform(-TURN, TURN), rng.uniform(0, 100, 2)
    y, x = np.mgrid[:size, :size] * (SIDE / size)
    v, u = np.cos(turn) * y - np.sin(turn) * x + 100 + down, np.sin(turn) * y + np.cos(turn) * x + 100 + right
    row_joint, from_row_joint = _nearest_line(v, height + mortar)
    row = np.floor(v / (height + mortar)).astype(np.int64)
    u = u + (row % 2) * (width + mortar) / 2 + rng.uniform(-ROW_SHIFT, ROW_SHIFT, row.max() + 1)[row]
    end_joint, from_end_joint = _nearest_line(u, width + mortar)
    brick = np.floor(u / (width + mortar)).astype(np.int64)
    return _Bond(row_joint, from_row_joint, row, end_joint, from_end_joint, brick, mortar)


def _nearest_line(position: NDArray[np.float64], spacing: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    index = np.round(position / spacing)
    return index.astype(np.int64), position - index * spacing


def _laid(bond: _Bond) -> NDArray[np.bool_]:
    return (np.abs(bond.from_row_joint) <= bond.mortar / 2) | (np.abs(bond.from_end_joint) <= bond.mortar / 2)


def _drawn(bond: _Bond, rng: Generator) -> NDArray[np.bool_]:
    """Each joint between two bricks as a stroke of a thin pen, beside its place or left out."""

    def strokes(line: NDArray[np.int64], part: NDArray[np.int64], distance: NDArray[np.float64]) -> NDArray[np.bool_]:
        displacement = rng.normal(0, DISPLACED, (line.max() + 1, part.max() + 1))[line, part]
        kept = (rng.random((line.max() + 1, part.max() + 1)) >= GAPS)[line, part]
        return kept & (np.abs(distance - displacement) <= PEN / 2)

    return strokes(bond.row_joint, bond.brick, bond.from_row_joint) | strokes(
        bond.row, bond.end_joint, bond.from_end_joint
    )


def _photograph(bond: _Bond, mortar: NDArray[np.int64], rng: Generator) -> NDArray[np.float64]:
    size = mortar.shape[0]
    bricks = rng.normal(0, OF_A_BRICK, (bond.row.max() + 1, bond.brick.max() + 1, 3))[bond.row, bond.brick]
    of_brick = np.asarray(BRICK) + rng.normal(0, OF_A_WALL, 3) + bricks
    of_mortar = np.asarray(MORTARS) + rng.normal(0, OF_A_WALL, 3)
    colour = np.where(mortar[:, :, None] == 1, of_mortar, of_brick)
    y, x = np.mgrid[:size, :size] / size - 0.5
    slope_y, slope_x = rng.uniform(-0.4, 0.4, 2)
    light = 1 + slope_y * y + slope_x * x
    cloud = gaussian_filter(rng.standard_normal((size, size)), CLOUD * size / SIDE)
    light = light - 0.25 * (cloud > 1.2 * cloud.std())  # stains
    seen = colour * light[:, :, None] + rng.normal(0, OF_A_PIXEL, colour.shape)
    blur = rng.uniform(*BLUR) * size / SIDE
    return np.clip(gaussian_filter(seen, (blur, blur, 0)), 0, 1).transpose(2, 0, 1)


def _above_threshold(image: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Pixels brighter than the middle between the means of both sides."""
    grey = image.mean(0)
    threshold = grey.mean()
    for _ in range(20):
        threshold = (grey[grey > threshold].mean() + grey[grey <= threshold].mean()) / 2
    brighter: NDArray[np.bool_] = grey > threshold
    return brighter
