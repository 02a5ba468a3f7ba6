"""SC-MIL: supervised contrastive multiple-instance learning of imbalanced bags (Juyal et al. 2023, arXiv:2303.13405).

A bag is a set of instances with one label. Instances are encoded, h_r, and pooled by the gated attention of Ilse et al.
(2018, arXiv:1802.04712),

    a = softmax_r(wᵀ (tanh(V h_r) * sigmoid(U h_r))),    b = sum_r a_r h_r

A linear classifier takes b, and a projection head gives z = g(b) / |g(b)|, whose loss is the supervised contrastive one
of bags in a batch (Khosla et al. 2020, arXiv:2004.11362), P_i being the other bags of the label of i:

    L_SCL = mean_{i: P_i not empty} -(1/|P_i|) sum_{j in P_i} log(exp(z_i z_j / τ) / sum_{k ≠ i} exp(z_i z_k / τ))

Training moves from the representation to the classifier, in epoch t of T,

    L = β_t L_SCL + (1 - β_t) L_CE,    β_t from 1 down to β_end

The published work fixes the mixture and its direction, contrast first and classifier later; the curve of β and the
temperature are our documented choices. 'parabolic' is that of the hybrid training for long-tailed data which this
follows (Wang et al. 2021, arXiv:2103.14267). There is no code of the authors'. Biases in the attention are as in the
code of Ilse et al., https://github.com/AMLab-Amsterdam/AttentionDeepMIL; their equation has none.

Contrast needs bags of one label in the same batch. Of a class with share π, a bag in a batch of B drawn at random has
no partner with probability (1 - π)^(B - 1): draw batches that are balanced by class.
"""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from fairtrial.methods.arguments import require
from fairtrial.methods.losses.classification import at_least_float32, check_scores
from fairtrial.methods.losses.contrastive import check_temperature
from fairtrial.methods.losses.metric_learning import check_embeddings, cosine_similarities, log_sum_exp, pairs_of
from fairtrial.methods.registry import Categorical, LogUniform, method

Instances = Float[Tensor, "b r d"] | Sequence[Float[Tensor, "_ d"]]
Mask = Bool[Tensor, "b r"]
SCHEDULES = ("parabolic", "linear", "cosine")


def supervised_contrast(
    embeddings: Float[Tensor, "n d"], labels: Int[Tensor, " n"], temperature: float
) -> Float[Tensor, ""]:
    """L_SCL in float32 at least; 0 where no two embeddings are of one label."""
    logits, (positives, negatives) = cosine_similarities(embeddings) / temperature, pairs_of(labels)
    surprise = log_sum_exp(logits, positives | negatives)[:, None] - logits
    number = positives.sum(1)
    by_anchor = surprise.masked_fill(~positives, 0.0).sum(1) / number.clamp(min=1)
    return by_anchor.sum() / (number > 0).sum().clamp(min=1)


class SupConLoss(nn.Module):
    """Supervised contrastive loss L_SCL of embeddings (n, d), which it normalises, and class labels (n,).

    One number for the batch. With no two embeddings of one label it is 0, with a gradient of 0, and warns on the CPU.
    With all of one label it is the mean surprise of all pairs, where pytorch-metric-learning's gives 0.

    Args:
        temperature: τ, above 0. Between 0.07 and 1 is usual; it is worth tuning.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature

    def forward(self, embeddings: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        check_embeddings(embeddings, labels, fewest=1)
        if labels.device.type == "cpu" and not torch.compiler.is_compiling() and len(labels.unique()) == len(labels):
            warnings.warn("no two embeddings are of one label, so there is nothing to contrast", stacklevel=2)
        return supervised_contrast(embeddings, labels, self.temperature).to(embeddings.dtype)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


def contrast_weight(progress: Float[Tensor, ""], schedule: str, beta_end: float) -> Float[Tensor, ""]:
    """β at a progress within 0..1."""
    if schedule == "parabolic":
        left = 1 - progress.square()
    elif schedule == "linear":
        left = 1 - progress
    else:
        left = (1 + (math.pi * progress).cos()) / 2
    return beta_end + (1 - beta_end) * left


class ProgressiveLoss(nn.Module):
    """Mixture β_t · scl + (1 - β_t) · ce of a contrastive and a classification loss in epoch t.

    Args:
        total_epochs: T ≥ 1.
        schedule: how β falls from 1: 'parabolic' 1 - (t/T)², 'linear' 1 - t/T, 'cosine' (1 + cos(π t/T)) / 2, each
            scaled to end at `beta_end`.
        beta_end: β in epoch T, within 0..1.
    """

    def __init__(self, total_epochs: int, schedule: str = "parabolic", beta_end: float = 0.0) -> None:
        super().__init__()
        require(total_epochs >= 1, "total_epochs", total_epochs, "at least 1")
        check_schedule(schedule, beta_end)
        self.total_epochs, self.schedule, self.beta_end = total_epochs, schedule, beta_end

    def beta(self, epoch: int | float) -> float:
        """β in an epoch within 0..T."""
        require(0 <= epoch <= self.total_epochs, "epoch", epoch, f"within 0..{self.total_epochs}")
        progress = torch.tensor(epoch / self.total_epochs, dtype=torch.float64)
        return float(contrast_weight(progress, self.schedule, self.beta_end))

    def forward(self, scl: Float[Tensor, ""], ce: Float[Tensor, ""], epoch: int | float) -> Float[Tensor, ""]:
        beta = self.beta(epoch)
        return beta * scl + (1 - beta) * ce

    def extra_repr(self) -> str:
        return f"total_epochs={self.total_epochs}, schedule={self.schedule!r}, beta_end={self.beta_end}"


def check_schedule(schedule: str, beta_end: float) -> None:
    require(schedule in SCHEDULES, "schedule", schedule, ", ".join(map(repr, SCHEDULES)))
    require(0 <= beta_end <= 1, "beta_end", beta_end, "within 0..1")


@method(
    paper="sc_mil",
    slot="joint_loss",
    search={"temperature": LogUniform(0.07, 1.0), "schedule": Categorical(SCHEDULES)},
    bind=lambda setting: {
        "total_epochs": -(-setting.total_steps // setting.steps_per_epoch),
        "steps_per_epoch": setting.steps_per_epoch,
    },
)
class SCMILLoss(nn.Module):
    """The joint objective of logits (n, classes), embeddings (n, d), which it normalises, and class indices (n,).

    One number for the batch. It counts its calls in training mode, `steps_per_epoch` of them an epoch; after the last
    epoch β stays where it is. The count is in the state_dict. In evaluation mode it takes the present β and does not
    count. A batch in which no two samples are of one class has contrast 0.

    Args:
        total_epochs: T ≥ 1.
        steps_per_epoch: calls that make an epoch.
        temperature: τ of the contrast, above 0.
        schedule, beta_end: as in `ProgressiveLoss`.
    """

    step: Int[Tensor, ""]

    def __init__(
        self,
        total_epochs: int,
        steps_per_epoch: int,
        *,
        temperature: float = 0.1,
        schedule: str = "parabolic",
        beta_end: float = 0.0,
    ) -> None:
        super().__init__()
        require(total_epochs >= 1, "total_epochs", total_epochs, "at least 1")
        require(steps_per_epoch >= 1, "steps_per_epoch", steps_per_epoch, "at least 1")
        check_temperature(temperature)
        check_schedule(schedule, beta_end)
        self.total_epochs, self.steps_per_epoch = total_epochs, steps_per_epoch
        self.temperature, self.schedule, self.beta_end = temperature, schedule, beta_end
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    @property
    def beta(self) -> Float[Tensor, ""]:
        """The present weight of the contrast."""
        epoch = (self.step // self.steps_per_epoch).clamp(max=self.total_epochs)
        return contrast_weight(epoch.double() / self.total_epochs, self.schedule, self.beta_end)

    def forward(
        self, logits: Float[Tensor, "n c"], embeddings: Float[Tensor, "n d"], target: Int[Tensor, " n"]
    ) -> Float[Tensor, ""]:
        check_joint(logits, embeddings, target)
        beta = self.beta
        if self.training:
            self.step += 1
        contrast = supervised_contrast(embeddings, target, self.temperature)
        classification = F.cross_entropy(at_least_float32(logits), target.long())
        return (beta.to(contrast) * contrast + (1 - beta).to(contrast) * classification).to(logits.dtype)

    def extra_repr(self) -> str:
        return (
            f"total_epochs={self.total_epochs}, steps_per_epoch={self.steps_per_epoch}, "
            f"temperature={self.temperature}, schedule={self.schedule!r}, beta_end={self.beta_end}"
        )


def check_joint(logits: Float[Tensor, "..."], embeddings: Float[Tensor, "..."], target: Int[Tensor, "..."]) -> None:
    """Refuse anything but logits (n, classes), finite embeddings (n, d) and class indices (n,), n ≥ 1."""
    fits = logits.ndim == 2 and logits.shape[0] >= 1 and logits.shape[1] >= 2
    require(fits, "logits", tuple(logits.shape), "of shape (n ≥ 1, classes ≥ 2)")
    require(logits.is_floating_point(), "logits", logits.dtype, "a floating-point tensor")
    check_scores(logits, target)
    shape = tuple(embeddings.shape)
    require(embeddings.shape[:1] == logits.shape[:1], "embeddings", shape, f"of shape ({len(logits)}, d), as logits")
    check_embeddings(embeddings, target, names=("embeddings", "target"), fewest=1)


class GatedAttentionPool(nn.Module):
    """Gated attention pooling of bags of instances.

    Args:
        in_dim: d, size of an instance.
        hidden: size of the attention's hidden layer.
    """

    def __init__(self, in_dim: int, hidden: int = 128) -> None:
        super().__init__()
        self.in_dim, self.hidden = in_dim, hidden
        self.V, self.U = nn.Linear(in_dim, hidden), nn.Linear(in_dim, hidden)
        self.w = nn.Linear(hidden, 1, bias=False)  # a bias would leave the softmax as it is

    def forward(self, h: Instances, mask: Mask | None = None) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b r"]]:
        """Bag embeddings, and the attention that each instance got: 0 where there is none.

        Args:
            h: instances (bags, instances, d), or for each bag a tensor (its instances, d).
            mask: which instances there are; all by default. Not with a list.

        Raises:
            ValueError: shapes that do not fit, or a bag without instances.
        """
        h, mask = as_batch(h, mask)
        require(h.shape[2] == self.in_dim, "h", tuple(h.shape), f"of shape (bags, instances, {self.in_dim})")
        if mask is not None:
            h = h.masked_fill(~mask[:, :, None], 0.0)
        scores = self.w(self.V(h).tanh() * self.U(h).sigmoid())[:, :, 0]
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        attention = scores.softmax(1)
        return (attention[:, None] @ h)[:, 0], attention


def as_batch(h: Instances, mask: Mask | None) -> tuple[Float[Tensor, "b r d"], Mask | None]:
    """A list of bags as one tensor, with the mask of what is there; no bag may be empty."""
    if not isinstance(h, Tensor):
        require(mask is None, "mask", "a tensor", "None where h is a list of bags")
        sizes = [len(bag) for bag in h]
        require(len(sizes) > 0 and min(sizes) > 0, "h", sizes, "bags of at least one instance")
        size = torch.tensor(sizes, device=h[0].device)
        return pad_sequence(list(h), batch_first=True), torch.arange(max(sizes), device=size.device) < size[:, None]
    require(h.ndim == 3 and h.shape[1] > 0, "h", tuple(h.shape), "of shape (bags, instances ≥ 1, d)")
    if mask is not None:
        require(mask.shape == h.shape[:2], "mask", tuple(mask.shape), f"of shape {tuple(h.shape[:2])}")
        if mask.device.type == "cpu" and not torch.compiler.is_compiling():
            empty = (~mask.any(1)).nonzero()[:, 0].tolist()
            require(not empty, "mask", f"none in bags {empty}", "true for an instance of every bag at least")
    return h, mask


class BagOutput(NamedTuple):
    """What a network says of bags."""

    logits: Float[Tensor, "b c"]
    z: Float[Tensor, "b p"]
    attention: Float[Tensor, "b r"]


class SCMIL(nn.Module):
    """Instance encoder, gated attention pooling, and on the pooled bag a linear classifier and a projection head.

    Classify by `logits`; `z`, of length 1, is for the contrast alone.

    Args:
        in_dim: size of an instance.
        num_classes: labels of bags.
        width: size of an encoded instance, and of the projection's hidden layer.
        hidden: size of the attention's hidden layer.
        embedding_dim: size of z.
        encoder: maps instances (n, in_dim) to (n, width); by default a linear layer and a ReLU.
    """

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        *,
        width: int = 64,
        hidden: int = 128,
        embedding_dim: int = 32,
        encoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(in_dim, width), nn.ReLU()) if encoder is None else encoder
        self.pool = GatedAttentionPool(width, hidden)
        self.classifier = nn.Linear(width, num_classes)
        self.projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, embedding_dim))

    def forward(self, bags: Instances, mask: Mask | None = None) -> BagOutput:
        """Logits, z and attention of bags; arguments are those of `GatedAttentionPool`."""
        bags, mask = as_batch(bags, mask)
        if mask is not None:
            bags = bags.masked_fill(~mask[:, :, None], 0.0)
        h = self.encoder(bags.flatten(0, 1)).unflatten(0, bags.shape[:2])
        pooled, attention = self.pool(h, mask)
        return BagOutput(self.classifier(pooled), F.normalize(self.projection(pooled), dim=1), attention)


def make_imbalanced_bags(
    x: Float[Tensor, "n ..."],
    y: Int[Tensor, " n"],
    sizes: Sequence[int],
    *,
    background: Sequence[int],
    keys: Sequence[int],
    instances: int,
    key_share: float,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "m r ..."], Int[Tensor, " m"]]:
    """Bags of labelled samples whose class shows in a few of their instances.

    Bags of class 0 hold samples of the background alone; of those of class c ≥ 1 the share `key_share` is samples of
    the key label `keys[c - 1]`, at random places. Samples are drawn with replacement, anew for each bag.

    Args:
        x, y: samples and their labels.
        sizes: number of bags of each class, as 200, 20, 10.
        background: labels of which background instances are.
        keys: the label that gives away each class but the first.
        instances: r, instances in a bag.
        key_share: share of key instances, rounded to at least one of them.
        generator: what is drawn from.

    Returns:
        Bags (m, r, ...) and their classes (m,), class by class.

    Raises:
        ValueError: numbers out of range, as many keys as there are not classes, a key in the background, or a label
            without samples.
    """
    require(len(keys) == len(sizes) - 1, "keys", keys, f"{len(sizes) - 1} labels, one for each class but the first")
    require(not set(keys) & set(background), "keys", keys, "none of the background's labels")
    require(len(background) > 0, "background", background, "at least one label")
    require(min(sizes) >= 0 and sum(sizes) > 0, "sizes", sizes, "numbers of bags, not all of them 0")
    require(instances >= 1, "instances", instances, "at least 1")
    require(0 < key_share <= 1, "key_share", key_share, "above 0 and at most 1")
    present = set(y.tolist())
    missing = [label for label in (*background, *keys) if label not in present]
    require(not missing, "y", f"no {missing}", "labels with a sample of each key and each background label")
    behind = torch.isin(y, torch.tensor(list(background), dtype=y.dtype)).nonzero()[:, 0]
    classes = torch.arange(len(sizes)).repeat_interleave(torch.tensor(list(sizes)))
    number = max(1, round(key_share * instances))

    def drawn(places: Int[Tensor, " p"], *shape: int) -> Int[Tensor, "..."]:
        return places[torch.randint(len(places), shape, generator=generator)]

    chosen = drawn(behind, len(classes), instances)
    for label, key in enumerate(keys, 1):
        chosen[classes == label, :number] = drawn((y == key).nonzero()[:, 0], sizes[label], number)
    order = torch.rand(chosen.shape, generator=generator).argsort(1)
    return x[chosen.gather(1, order)], classes
