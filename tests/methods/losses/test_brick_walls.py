import numpy as np
import pytest
import torch

from fairtrial.methods.losses import betti_numbers, synthetic_brick_wall


def walls(labels: str = "accurate", n: int = 6, seed: int = 0, size: int = 64):
    return synthetic_brick_wall(n, size, np.random.default_rng(seed), labels)


def dice(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(2 * (a * b).sum() / (a.sum() + b.sum()))


def test_images_and_labels_are_of_the_asked_size_and_range():
    images, labels, accurate = walls(n=2)
    assert images.shape == (2, 3, 64, 64)
    assert images.dtype == torch.float32
    assert labels.shape == accurate.shape == (2, 1, 64, 64)
    assert labels.unique().tolist() == [0, 1]
    assert 0 <= images.min() < images.max() <= 1
    assert torch.equal(labels, accurate)


def test_the_generator_alone_decides_and_walls_are_the_same_for_all_labels():
    plain = walls()
    for kind in ("accurate", "noisy", "pseudo"):
        again, twin = walls(kind), walls(kind)
        assert all(torch.equal(a, b) for a, b in zip(again, twin, strict=True))
        assert torch.equal(again.images, plain.images)
        assert torch.equal(again.accurate, plain.accurate)
    assert not torch.equal(walls(seed=1).images, plain.images)


def test_mortar_is_a_net_around_the_bricks():
    for label in walls(n=100).accurate[:, 0]:
        components, holes = betti_numbers(label)
        assert components <= 2  # a piece may be cut off by a corner of the image
        assert holes >= 1
        assert 0.1 < label.double().mean() < 0.4


def test_the_wall_is_the_same_at_every_size():
    small, large = walls(n=20), walls(n=20, size=128)
    for few, many in zip(small.accurate[:, 0], large.accurate[:, 0], strict=True):
        assert dice(few, many[::2, ::2]) == 1
    light = torch.nn.functional.avg_pool2d(large.images, 16), torch.nn.functional.avg_pool2d(small.images, 8)
    assert (light[0] - light[1]).abs().mean() < 0.05


def test_noisy_labels_are_thin_torn_and_displaced():
    _, noisy, accurate = walls("noisy", n=20)
    assert noisy.sum() < 0.75 * accurate.sum()
    assert 0.5 < dice(noisy, accurate) < 0.8
    assert (noisy > accurate).sum() > 0.03 * noisy.sum()
    torn, whole = (np.mean([betti_numbers(label) for label in labels[:, 0]], axis=0) for labels in (noisy, accurate))
    assert torn[0] > whole[0] + 0.3  # pieces
    assert torn[1] < 0.75 * whole[1]  # holes


def test_pseudo_labels_are_better_than_chance_and_wrong_in_places():
    _, pseudo, accurate = walls("pseudo")
    chance = dice(torch.ones_like(accurate), accurate)
    assert chance + 0.1 < dice(pseudo, accurate) < 0.95


def test_misuse_is_refused_with_the_argument_named():
    rng = np.random.default_rng(0)
    for name, arguments in {"n": (0, 64, rng), "size": (1, 63, rng), "labels": (1, 64, rng, "soft")}.items():
        with pytest.raises(ValueError, match=f"^{name} must be"):
            synthetic_brick_wall(*arguments)
