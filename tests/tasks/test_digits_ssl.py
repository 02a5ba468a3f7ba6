import pytest
import torch
from torch import Tensor

from fairtrial.tasks.digits_ssl import (
    AUGMENTATIONS,
    Encoder,
    TwoViews,
    digits_ssl,
    few_label_neighbours,
    few_label_probe,
    labelled_few,
    samples,
    turned,
)
from fairtrial.tasks.samples import divide
from fairtrial.tasks.streams import Streams


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def clusters(spread: float) -> tuple[Tensor, Tensor]:
    """Ten classes of ten, around orthogonal directions."""
    labels = torch.arange(100) % 10
    return torch.eye(10)[labels] + spread * torch.randn(100, 10, generator=generator()), labels


def test_nothing_is_turned_by_nothing() -> None:
    images = torch.rand(4, 8, 8, generator=generator())
    torch.testing.assert_close(turned(images, 0.0, 0.0, generator()), images)


def test_samples_are_digits_out_of_place() -> None:
    data = samples()
    assert data.x.shape == (1438, 64)
    assert data.num_classes == 10
    assert torch.equal(data.x, samples().x)
    assert 0 <= data.x.min() <= data.x.max() <= 16


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentations_disturb_each_image_on_its_own_and_keep_its_shape(name: str) -> None:
    images = torch.rand(1, 8, 8, generator=generator()).expand(50, 8, 8)
    found = AUGMENTATIONS[name](images, generator())
    assert found.shape == (50, 8, 8)
    assert not torch.allclose(found[0], images[0])
    assert len({tuple(image.flatten().tolist()) for image in found}) > 20
    assert torch.equal(found, AUGMENTATIONS[name](images, generator()))


def test_two_views_are_of_the_same_image_and_leave_the_background() -> None:
    x = torch.rand(6, 64, generator=generator()) * 3 - 1
    x[:, 0] = -1.0
    y = torch.arange(6)
    views, labels = TwoViews(())(x, y, generator())
    torch.testing.assert_close(views, x[:, None].expand(6, 2, 64))
    assert torch.equal(labels, y)
    erased, _ = TwoViews(("erase",))(x, y, generator())
    changed = erased != x[:, None]
    assert (erased[changed] == -1.0).all()
    assert 3 <= changed.flatten(1).sum(1).min() <= changed.flatten(1).sum(1).max() <= 8
    with pytest.raises(ValueError, match="augmentations must be among move, noise, scale, erase, smooth, got 'blur'"):
        TwoViews(("blur",))


def test_the_encoder_gives_features_of_images_and_embeddings_of_views() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = Encoder().eval()
    x = torch.rand(3, 64, generator=generator())
    assert encoder(x).shape == (3, 128)
    torch.testing.assert_close(encoder(torch.stack([x, x], 1))[:, 1], encoder.projector(encoder(x)))


def test_few_are_labelled_and_always_the_same() -> None:
    labels = torch.arange(100) % 10
    first, second = list(labelled_few(labels)), list(labelled_few(labels))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for few in first:
        assert torch.bincount(labels[few]).tolist() == [5] * 10
    assert not torch.equal(first[0], first[1])


def test_both_measures_are_one_where_classes_are_apart_and_chance_where_they_are_not() -> None:
    for measure in (few_label_neighbours, few_label_probe):
        assert measure(*clusters(0.01)) == 1.0
        assert 0.3 < measure(*clusters(0.5)) < 1.0
        assert measure(torch.randn(100, 10, generator=generator()), clusters(0.0)[1]) < 0.25


def test_training_beats_pixels_and_an_untrained_encoder() -> None:
    division = divide(samples(), digits_ssl.validation, "all", Streams(0))
    pixels = [measure(*division.test) for measure in (few_label_neighbours, few_label_probe)]
    outcome = digits_ssl.run({}, 0, split="test")
    assert pixels[0] + 0.03 < outcome.value < 0.95
    assert pixels[1] + 0.1 < next(iter(outcome.metrics.values())) < 0.95
