"""Handwritten digits without labels: an encoder is trained on pairs of disturbed images, and judged by its features.

The digits of scikit-learn are upright and centred, so that pixels serve nearly as well as features: here each is turned
by up to 20 degrees and displaced by up to half a pixel. Two views of an image are turned and moved further, scaled in
brightness, overlaid with noise and partly erased, each on its own.

What is measured is how well a few labels suffice once the encoder is frozen: five labelled images of each class, drawn
from the part that is measured on, classify the rest of it.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int, Shaped
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.contract import Choice, Metric
from fairtrial.methods.arguments import require
from fairtrial.methods.registry import Method
from fairtrial.tasks.contrastive import contrastive_slots
from fairtrial.tasks.samples import Samples, hold_out
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.supervised import SupervisedTask

EMBEDDING = 32
LABELLED, DRAWS, NEIGHBOURS = 5, 20, 5

Images = Float[Tensor, "n 8 8"]
Augmentation = Callable[[Images, torch.Generator], Images]


def samples() -> Samples:
    """1797 images, each turned and displaced once and for all; a fifth of them held out."""
    x, y = load_digits(return_X_y=True)
    images = torch.from_numpy(x).float().view(-1, 8, 8)
    return hold_out(turned(images, 20.0, 0.5, Streams(0)("turned")).flatten(1), torch.from_numpy(y).long())


def uniform(n: int, low: float, high: float, generator: torch.Generator) -> Float[Tensor, " n"]:
    return low + (high - low) * torch.rand(n, generator=generator)


def turned(images: Images, degrees: float, pixels: float, generator: torch.Generator) -> Images:
    """Each turned by up to so many degrees, and displaced by up to so many pixels each way."""
    n = len(images)
    angle = torch.deg2rad(uniform(n, -degrees, degrees, generator))
    cos, sin = angle.cos(), angle.sin()
    right, down = (uniform(n, -pixels / 4, pixels / 4, generator) for _ in range(2))  # 8 pixels are 2 of the grid's
    affine = torch.stack([torch.stack([cos, -sin, right], 1), torch.stack([sin, cos, down], 1)], 1)
    grid = F.affine_grid(affine, [n, 1, 8, 8], align_corners=False)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def moved(images: Images, generator: torch.Generator) -> Images:
    """Turned by up to 15 degrees and displaced by up to a pixel each way."""
    return turned(images, 15.0, 1.0, generator)


def noisy(images: Images, generator: torch.Generator) -> Images:
    """Overlaid with white noise."""
    return images + 0.2 * torch.randn(images.shape, generator=generator)


def scaled(images: Images, generator: torch.Generator) -> Images:
    """Brighter or darker by up to two fifths."""
    return images * uniform(len(images), 0.6, 1.4, generator)[:, None, None]


def erased(images: Images, generator: torch.Generator) -> Images:
    """A square of 2×2 pixels becomes background."""
    corner = torch.randint(7, (2, len(images), 1), generator=generator)
    down, right = ((torch.arange(8) >= place) & (torch.arange(8) < place + 2) for place in corner)
    return images.masked_fill(down[:, :, None] & right[:, None], 0.0)


def smoothed(images: Images, generator: torch.Generator) -> Images:
    """Mixed with the means over 3×3 pixels, in any proportion."""
    means = F.avg_pool2d(images[:, None], 3, stride=1, padding=1)[:, 0]
    return images.lerp(means, uniform(len(images), 0.0, 1.0, generator)[:, None, None])


AUGMENTATIONS: dict[str, Augmentation] = {
    "move": moved,
    "noise": noisy,
    "scale": scaled,
    "erase": erased,
    "smooth": smoothed,
}


class TwoViews:
    """Two disturbed copies of each image.

    Args:
        augmentations: names in `AUGMENTATIONS`, applied one after the other.
    """

    def __init__(self, augmentations: Sequence[str] = ("move", "scale", "noise", "erase")) -> None:
        for name in augmentations:
            require(name in AUGMENTATIONS, "augmentations", name, f"among {', '.join(AUGMENTATIONS)}")
        self.augmentations = tuple(augmentations)

    def __call__(
        self, x: Float[Tensor, "n 64"], y: Shaped[Tensor, " n"], generator: torch.Generator
    ) -> tuple[Float[Tensor, "n 2 64"], Shaped[Tensor, " n"]]:
        background = x.min()
        images = (x - background).repeat_interleave(2, 0).view(-1, 8, 8)
        for name in self.augmentations:
            images = AUGMENTATIONS[name](images, generator)
        return images.reshape(-1, 2, 64) + background, y


class Encoder(nn.Module):
    """Two convolutions, each halving the image, to 128 features; of two views a projection of them.

    Images (n, 64) become features (n, 128), pairs of views (n, 2, 64) become embeddings (n, 2, 32).
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.projector: nn.Module = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, EMBEDDING))

    def forward(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        if x.ndim == 2:
            features: Tensor = self.features(x)
            return features
        embeddings: Tensor = self.projector(self.features(x.flatten(0, 1)))
        return embeddings.view(len(x), 2, -1)


def labelled_few(labels: Int[Tensor, " n"]) -> Iterator[Bool[Tensor, " n"]]:
    """Always the same draws of a few samples of each class."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(DRAWS):
        order = torch.randperm(len(labels), generator=generator)
        chosen = torch.zeros(len(labels), dtype=torch.bool)
        for label in range(int(labels.max()) + 1):
            chosen[order[labels[order] == label][:LABELLED]] = True
        yield chosen


def few_label_neighbours(features: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> float:
    """Accuracy of the nearest labelled samples' vote, each with the weight exp(cosine / 0.07); a mean over draws."""
    units = F.normalize(features, dim=1)
    right: list[float] = []
    for few in labelled_few(labels):
        near, place = (units[~few] @ units[few].T).topk(NEIGHBOURS, dim=1)
        votes = F.one_hot(labels[few][place], int(labels.max()) + 1) * (near / 0.07).softmax(1)[..., None]
        right.append((votes.sum(1).argmax(1) == labels[~few]).double().mean().item())
    return sum(right) / DRAWS


def few_label_probe(features: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> float:
    """Accuracy of a ridge regression of the classes on the labelled samples' features; a mean over draws."""
    units = F.normalize(features - features.mean(0), dim=1).double()
    right: list[float] = []
    for few in labelled_few(labels):
        x, targets = units[few], F.one_hot(labels[few]).double()
        weights = torch.linalg.solve(x @ x.T + 0.1 * torch.eye(len(x), dtype=torch.float64), targets)
        scores = units[~few] @ x.T @ weights
        right.append((scores.argmax(1) == labels[~few]).double().mean().item())
    return sum(right) / DRAWS


digits_ssl = SupervisedTask(
    name="digits-ssl",
    version=1,
    metric=Metric("k-NN accuracy with five labels a class", "maximize", "fraction", margin=0.01, worst=0.0),
    measure=few_label_neighbours,
    also={"linear probe accuracy with five labels a class": few_label_probe},
    samples=samples,
    model=Encoder,
    total_steps=200,
    batch_size=64,
    scale="all",
    slots=contrastive_slots(
        Choice("NTXentLoss"),
        EMBEDDING,
        [Method("TwoViews", "batch", TwoViews)],
        optimizer=Choice("AdamW", {"lr": 0.003}),
    ),
)
