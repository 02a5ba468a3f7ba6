"""Pre-training on two views of digits, and what the frozen features are worth: what claims on contrastive losses share.

Data and encoder are those of the task `digits-ssl`. Labels of the training part serve k-NN and the linear probe.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import RandomSampler

from fairtrial.contract import Diverged, Split
from fairtrial.methods.losses.contrastive_temperature import tolerance, uniformity
from fairtrial.tasks.contrastive import OfViews
from fairtrial.tasks.digits_ssl import Encoder, TwoViews, digits_ssl, samples
from fairtrial.tasks.samples import Division, Part, divide
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.supervised import predict
from fairtrial.tasks.training import Parts, train

NEIGHBOURS = 20


@dataclass(frozen=True)
class Worth:
    """What features are worth: all of the worst if training diverged.

    Attributes:
        neighbours: accuracy of 20 nearest neighbours among the labelled training images.
        probe: accuracy of a linear probe on their features.
        uniformity, tolerance: of the embeddings that the loss sees.
    """

    neighbours: float = 0.0
    probe: float = 0.0
    uniformity: float = 0.0
    tolerance: float = 0.0


def images(seed: int) -> Division:
    """A seed's own division of the digits; those for the test are the same for every seed."""
    return divide(samples(), digits_ssl.validation, "all", Streams(seed))


def pretrain(
    model: nn.Module,
    loss: nn.Module,
    division: Division,
    streams: Streams,
    *,
    lr: float,
    steps: int,
    batch_size: int,
    optimizer: Literal["AdamW", "SGD"] = "AdamW",
    augmentations: Sequence[str] | None = None,
) -> None:
    """Train a model of two views, and the loss's own weights, with a rate that falls along a cosine.

    Raises:
        Diverged: the loss is no longer finite.
    """
    weights = [*model.parameters(), *loss.parameters()]
    descent = torch.optim.SGD(weights, lr, momentum=0.9) if optimizer == "SGD" else torch.optim.AdamW(weights, lr)
    parts = Parts(
        model=model,
        loss=OfViews(loss),
        optimizer=descent,
        schedule=CosineAnnealingLR(descent, steps),
        batch=TwoViews() if augmentations is None else TwoViews(augmentations),
        sampler=RandomSampler(range(len(division.training.x)), generator=streams("order")),
    )
    train(parts, *division.training, steps=steps, batch_size=batch_size, generator=streams("batch"))


def worth(model: Encoder, division: Division, split: Split) -> Worth:
    """Judge frozen features on a part, by the labelled training part.

    Raises:
        Diverged: features are no longer finite.
    """
    judged: Part = getattr(division, split)
    bank, labels = predict(model, division.training)
    features, truth = predict(model, judged)
    with torch.no_grad():
        embeddings = model.projector(features)
    return Worth(
        neighbours=accuracy_of(neighbours(bank, labels, features), truth),
        probe=accuracy_of(probe(bank, labels, features), truth),
        uniformity=uniformity(embeddings).item(),
        tolerance=tolerance(embeddings, truth).item(),
    )


def neighbours(bank: Float[Tensor, "n d"], labels: Tensor, features: Float[Tensor, "m d"]) -> Float[Tensor, "m c"]:
    """Votes of the nearest, each with the weight exp(cosine / 0.07)."""
    near, place = (F.normalize(features, dim=1) @ F.normalize(bank, dim=1).T).topk(NEIGHBOURS, dim=1)
    return (F.one_hot(labels[place]) * (near / 0.07).softmax(1)[..., None]).sum(1)


def probe(bank: Float[Tensor, "n d"], labels: Tensor, features: Float[Tensor, "m d"]) -> Float[Tensor, "m c"]:
    """Scores of a ridge regression of the classes on standardised features."""
    deviation, mean = torch.std_mean(bank.double(), 0)
    x, asked = ((part.double() - mean) / deviation.clamp(min=1e-6) for part in (bank, features))
    x, asked = (torch.cat([part, torch.ones(len(part), 1, dtype=part.dtype)], 1) for part in (x, asked))
    penalty = 1e-2 * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weights: Tensor = torch.linalg.solve(x.T @ x + penalty, x.T @ F.one_hot(labels).to(x.dtype))
    return asked @ weights


def accuracy_of(scores: Float[Tensor, "m c"], truth: Tensor) -> float:
    return (scores.argmax(1) == truth).double().mean().item()


def pretrained_worth(
    build: Callable[[], tuple[Encoder, nn.Module]],
    seed: int,
    split: Split,
    *,
    lr: float,
    steps: int,
    batch_size: int,
    optimizer: Literal["AdamW", "SGD"] = "AdamW",
    augmentations: Sequence[str] | None = None,
) -> Worth:
    """What an encoder is worth after pre-training with a loss.

    `build` makes both, in this order: the convolutions are drawn first, so that all recipes of a seed share them.
    """
    streams, division = Streams(seed), images(seed)
    with streams.globally("model"):
        model, loss = build()
    try:
        pretrain(
            model,
            loss,
            division,
            streams,
            lr=lr,
            steps=steps,
            batch_size=batch_size,
            optimizer=optimizer,
            augmentations=augmentations,
        )
        return worth(model, division, split)
    except Diverged:
        return Worth()
