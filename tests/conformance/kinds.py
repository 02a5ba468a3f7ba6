"""What the kinds of losses are called with: batches, ordinary and extreme ones, and what each kind must refuse."""

import inspect
from abc import ABC, abstractmethod
from types import SimpleNamespace

import torch
from torch import Tensor

N, CLASSES, DIM, LABELS = 6, 5, 4, 7
SETTING = SimpleNamespace(
    num_samples=N, num_classes=CLASSES, embedding_dim=DIM, total_steps=100, steps_per_epoch=10, generator=None
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (2.0 * torch.randn(*shape, generator=generator(seed), dtype=torch.float64)).to(dtype)


def takes_index(loss) -> bool:
    """Whether the loss wants to know which samples of the training set it is shown."""
    return "index" in inspect.signature(loss.forward).parameters


class Kind(ABC):
    """Arguments that losses of one kind are called with.

    Attributes:
        scored: places of the arguments that the model made, in which the loss is differentiated.
        smaller: places of the arguments that may have a smaller integer type.
        fewest: samples that a batch needs at least.
    """

    scored: tuple[int, ...] = (0,)
    smaller: tuple[int, ...] = (1,)
    fewest = 1

    @abstractmethod
    def batch(self, n: int = N, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
        """An ordinary batch."""

    @abstractmethod
    def extremes(self) -> list[tuple[Tensor, ...]]:
        """Batches with the largest inputs, one class, ties and as few samples as may be."""

    @abstractmethod
    def misuses(self) -> list[tuple[str, tuple[Tensor, ...]]]:
        """Arguments that must be refused, and a word of the message: the argument's name."""

    def permuted(self, arguments: tuple[Tensor, ...], order: Tensor) -> tuple[Tensor, ...]:
        return tuple(argument[order] for argument in arguments)

    def same(self, arguments: tuple[Tensor, ...], seed: int) -> list[tuple[Tensor, ...]]:
        """Other arguments that every loss of the kind must value alike."""
        return []


class ClassScores(Kind):
    def batch(self, n=N, dtype=torch.float64, seed=0):
        return normal(n, CLASSES, seed=seed, dtype=dtype), torch.randint(CLASSES, (n,), generator=generator(seed + 1))

    def extremes(self):
        target = torch.arange(N) % CLASSES
        up = torch.full((N, CLASSES), 1e4)
        right = torch.where(torch.arange(CLASSES) == target[:, None], up, -up)
        mixed = torch.where(self.batch()[0] > 0, up, -up)
        tied = torch.tensor([1.0, 3, 3, 3, -2]).expand(N, CLASSES)
        scores, some = self.batch()
        return [
            *((extreme, target) for extreme in (up, -up, right, -right, mixed)),
            (scores[:1], some[:1]),
            (scores, torch.zeros(N, dtype=torch.long)),  # one class present
            (torch.zeros(N, CLASSES), some),  # nothing to tell the classes apart
            (torch.full((N, CLASSES), -3.0), some),
            (tied, torch.full((N,), 1)),
            (tied, torch.full((N,), 4)),
        ]

    def misuses(self):
        scores, target = self.batch()
        return [
            ("input", (scores[:0], target[:0])),
            ("input", (scores[0], target)),
            ("input", (scores[None], target)),
            ("input", (scores[:, :1], torch.zeros(N, dtype=torch.long))),
            ("input", (scores.long(), target)),
            ("target", (scores, target[:-1])),
            ("target", (scores, target[:, None])),
            ("target", (scores, target.double())),
            ("target", (scores, torch.full((N,), CLASSES))),
            ("target", (scores, torch.full((N,), -1))),
        ]

    def same(self, arguments, seed):
        """The classes in another order."""
        scores, target = arguments
        order = torch.randperm(CLASSES, generator=generator(seed))
        return [(scores[:, order], order.argsort()[target])]


class BinaryScores(Kind):
    def batch(self, n=N, dtype=torch.float64, seed=0):
        return normal(n, seed=seed, dtype=dtype), torch.arange(n) % 2

    def extremes(self):
        logits, target = self.batch()
        signs = 2.0 * target - 1
        return [
            (1e4 * signs, target),
            (-1e4 * signs, target),
            (torch.zeros(N), target),
            (logits, torch.zeros(N, dtype=torch.long)),
            (logits, torch.ones(N, dtype=torch.long)),
            (logits[:1], target[:1]),
        ]

    def misuses(self):
        logits, target = self.batch()
        return [
            ("input", (logits[:0], target[:0])),
            ("input", (logits.long(), target)),
            ("target", (logits, target[:-1])),
            ("target", (logits, target + 1)),
            ("target", (logits, -target)),
        ]


class LabelScores(Kind):
    def batch(self, n=N, dtype=torch.float64, seed=0):
        targets = torch.rand(n, LABELS, generator=generator(seed + 1)) < 0.4
        targets[:, 0], targets[:, 1] = True, False  # at least one label, and never all of them
        return normal(n, LABELS, seed=seed, dtype=dtype), targets.long()

    def extremes(self):
        scores, targets = self.batch()
        signs = 2.0 * targets - 1
        one = torch.zeros(N, LABELS, dtype=torch.long)
        one[:, 2] = 1
        return [
            (1e4 * signs, targets),
            (-1e4 * signs, targets),
            (torch.full((N, LABELS), 1e4), targets),
            (torch.full((N, LABELS), -1e4), targets),
            (torch.zeros(N, LABELS), targets),
            (scores, one),
            (scores[:1], targets[:1]),
        ]

    def misuses(self):
        scores, targets = self.batch()
        return [
            ("", (scores[:0], targets[:0])),
            ("", (scores, targets[:-1])),
            ("", (scores, targets[:, :-1])),
            ("", (scores, targets + 1)),
            ("", (scores.fill_(float("nan")), targets)),
        ]

    def same(self, arguments, seed):
        """The labels in another order."""
        order = torch.randperm(LABELS, generator=generator(seed))
        return [tuple(argument[:, order] for argument in arguments)]


class Embeddings(Kind):
    fewest = 2

    def batch(self, n=N, dtype=torch.float64, seed=0):
        return normal(n, DIM, seed=seed, dtype=dtype), torch.arange(n) % 3

    def extremes(self):
        embeddings, labels = self.batch()
        return [
            (1e4 * embeddings, labels),
            (1e-3 * embeddings, labels),
            (embeddings[:1].expand(N, DIM), labels),  # all alike
            (torch.cat([embeddings[:3], -embeddings[:3]]), labels),
            (embeddings, torch.zeros(N, dtype=torch.long)),  # no negatives
            (embeddings, torch.arange(N) % CLASSES),
            (embeddings[:3], torch.arange(3)),  # no positives
            (embeddings[:2], labels[:2]),
        ]

    def misuses(self):
        embeddings, labels = self.batch()
        return [
            ("", (embeddings[:0], labels[:0])),
            ("", (embeddings, labels[:-1])),
            ("", (embeddings[0], labels[:1])),
            ("", (embeddings.long(), labels)),
            ("", (embeddings.fill_(float("nan")), labels)),
        ]

    def same(self, arguments, seed):
        """Embeddings of other lengths."""
        embeddings, labels = arguments
        lengths = 0.5 + torch.rand(len(embeddings), 1, generator=generator(seed), dtype=embeddings.dtype)
        return [(lengths * embeddings, labels)]


class Views(Kind):
    scored = (0, 1)
    smaller = ()
    fewest = 2

    def batch(self, n=N, dtype=torch.float64, seed=0):
        a = normal(n, DIM, seed=seed)
        return a.to(dtype), (a + 0.5 * normal(n, DIM, seed=seed + 1)).to(dtype)

    def extremes(self):
        a, b = self.batch()
        return [
            (1e4 * a, 1e4 * b),
            (1e-3 * a, 1e4 * b),
            (a, a),
            (a, -a),
            (a[:1].expand(N, DIM), a[:1].expand(N, DIM)),
            (a[:2], b[:2]),
        ]

    def misuses(self):
        a, b = self.batch()
        return [
            ("", (a[:0], b[:0])),
            ("", (a[:1], b[:1])),
            ("", (a, b[:-1])),
            ("", (a, b[:, :-1])),
            ("", (a[0], b[0])),
            ("", (torch.full_like(a, float("nan")), b)),
        ]

    def same(self, arguments, seed):
        """Embeddings of other lengths, all turned alike."""
        a, b = arguments
        turn, _ = torch.linalg.qr(normal(DIM, DIM, seed=seed, dtype=a.dtype))
        return [(2 * a, 0.5 * b), (a @ turn, b @ turn)]


class Episodes(Kind):
    """Support (ways, shots, d) and queries (ways, queries, d) of a few classes, row i of both being class i."""

    scored = (0, 1)
    smaller = ()
    fewest = 2

    def batch(self, n=N, dtype=torch.float64, seed=0):
        embeddings = normal(n, 5, DIM, seed=seed) + normal(n, 1, DIM, seed=seed + 1)
        return embeddings[:, :2].to(dtype), embeddings[:, 2:].to(dtype)

    def extremes(self):
        support, queries = self.batch()
        far = 1e4 * torch.eye(DIM)[:, None]
        return [
            (far.expand(DIM, 2, DIM), (far + 1.0).expand(DIM, 3, DIM)),  # all of each class alike, and far from others
            (30 * support, 30 * queries),
            (1e-3 * support, 1e-3 * queries),
            (support[:1, :1].expand_as(support), support[:1, :1].expand_as(queries)),  # all alike
            (support[:, :1], queries),  # one shot
            (support[:2], queries[:2]),
        ]

    def permuted(self, arguments, order):
        support, queries = arguments
        return support[order], queries[order]

    def misuses(self):
        support, queries = self.batch()
        return [
            ("support", (support[:1], queries[:1])),
            ("support", (support[:, :0], queries)),
            ("support", (support[0], queries)),
            ("support", (support.long(), queries)),
            ("support", (torch.full_like(support, float("nan")), queries)),
            ("queries", (support, queries[:-1])),
            ("queries", (support, queries[:, :, :-1])),
        ]

    def same(self, arguments, seed):
        """The embeddings of each class in another order."""
        support, queries = arguments
        return [(support.flip(1), queries.roll(1, 1))]


class Bottlenecks(Kind):
    """Inputs (n, features), codes (n, d), targets (n,) and predictions (n,)."""

    scored = (1, 3)
    smaller = ()
    fewest = 2

    def batch(self, n=N, dtype=torch.float64, seed=0):
        x, t, y, y_pred = (normal(n, *shape, seed=seed + place) for place, shape in enumerate(((3,), (DIM,), (), ())))
        return tuple(argument.to(dtype) for argument in (x, t, y, y + 0.3 * y_pred))

    def extremes(self):
        x, t, y, y_pred = self.batch()
        return [
            (1e4 * x, 1e4 * t, y, 50 * y_pred),
            (x, 1e-4 * t, y, y_pred),
            (x, torch.zeros_like(t), y, torch.zeros_like(y)),  # nothing gets through
            (torch.zeros_like(x), t, torch.zeros_like(y), y_pred),
            (x, x, y, y),
            (x[:2], t[:2], y[:2], y_pred[:2]),
        ]

    def misuses(self):
        x, t, y, y_pred = self.batch()
        return [
            ("x", (x[:1], t[:1], y[:1], y_pred[:1])),
            ("x", (torch.full_like(x, float("nan")), t, y, y_pred)),
            ("t", (x, t[:-1], y, y_pred)),
            ("t", (x, torch.full_like(t, float("inf")), y, y_pred)),
            ("y", (x, t, y[:-1], y_pred)),
            ("y", (x, t, y.long(), y_pred)),
            ("y_pred", (x, t, y, y_pred[:-1])),
            ("y_pred", (x, t, y, torch.stack([y_pred, y_pred], 1))),
        ]

    def same(self, arguments, seed):
        """Targets and predictions moved alike, and codes turned and moved."""
        x, t, y, y_pred = arguments
        turn, _ = torch.linalg.qr(normal(DIM, DIM, seed=seed, dtype=t.dtype))
        return [(x + 1, t @ turn - 2, y + 0.7, y_pred + 0.7)]


class BagMeans(Kind):
    smaller = (2,)

    def batch(self, n=N, dtype=torch.float64, seed=0):
        index = torch.arange(n) % 3
        bags = int(index.max()) + 1
        return normal(n, seed=seed, dtype=dtype), normal(bags, seed=seed + 1, dtype=dtype), index

    def extremes(self):
        predictions, targets, index = self.batch()
        return [
            (30 * predictions, targets, index),  # whose squares float16 can still hold
            (torch.zeros(N), targets, index),
            (predictions, targets[:1], torch.zeros(N, dtype=torch.long)),
            (predictions[:1], targets[:1], torch.zeros(1, dtype=torch.long)),
        ]

    def permuted(self, arguments, order):
        predictions, targets, index = arguments
        return predictions[order], targets, index[order]

    def misuses(self):
        predictions, targets, index = self.batch()
        return [
            ("", (predictions[:0], targets[:0], index[:0])),
            ("", (predictions, targets, index[:-1])),
            ("", (predictions, torch.cat([targets, targets[:1]]), index)),  # a bag without members
            ("", (predictions, targets[:-1], index)),
            ("", (predictions, targets, index - 1)),
        ]

    def same(self, arguments, seed):
        """The bags in another order."""
        predictions, targets, index = arguments
        order = torch.randperm(len(targets), generator=generator(seed))
        return [(predictions, targets[order], order.argsort()[index])]


class ScoresAndEmbeddings(Kind):
    """Of each sample the classifier's scores and an embedding, and its class."""

    scored = (0, 1)
    smaller = (2,)

    def batch(self, n=N, dtype=torch.float64, seed=0):
        embeddings = normal(n, DIM, seed=seed + 1, dtype=dtype)
        return normal(n, CLASSES, seed=seed, dtype=dtype), embeddings, torch.arange(n) % 3

    def extremes(self):
        scores, embeddings, target = self.batch()
        up = torch.where(scores > 0, 1e4, -1e4)
        return [
            (up, 1e4 * embeddings, target),
            (-up, 1e-3 * embeddings, target),
            (torch.zeros(N, CLASSES), embeddings[:1].expand(N, DIM), target),  # all alike
            (scores, torch.zeros(N, DIM), target),
            (scores, embeddings, torch.zeros(N, dtype=torch.long)),  # one class present
            (scores[:3], embeddings[:3], target[:3]),  # no two of a class
            (scores[:1], embeddings[:1], target[:1]),
        ]

    def misuses(self):
        scores, embeddings, target = self.batch()
        return [
            ("", (scores[:0], embeddings[:0], target[:0])),
            ("", (scores[0], embeddings, target)),
            ("", (scores.long(), embeddings, target)),
            ("", (scores, embeddings[:-1], target)),
            ("", (scores, embeddings[0], target)),
            ("", (scores, torch.full_like(embeddings, float("nan")), target)),
            ("", (scores, embeddings, target[:-1])),
            ("", (scores, embeddings, target.double())),
            ("", (scores, embeddings, target + CLASSES)),
        ]

    def same(self, arguments, seed):
        """The classes in another order, and embeddings of other lengths."""
        scores, embeddings, target = arguments
        order = torch.randperm(CLASSES, generator=generator(seed))
        lengths = 0.5 + torch.rand(len(embeddings), 1, generator=generator(seed), dtype=embeddings.dtype)
        return [(scores[:, order], embeddings, order.argsort()[target]), (scores, lengths * embeddings, target)]


class Segmentations(Kind):
    SIZE = 8

    def batch(self, n=2, dtype=torch.float64, seed=0):
        target = torch.zeros(n, 1, self.SIZE, self.SIZE, dtype=torch.long)
        target[:, :, 2:4] = 1
        target[:, :, :, 5:7] = 1
        return normal(n, 2, self.SIZE, self.SIZE, seed=seed, dtype=dtype), target

    def extremes(self):
        logits, target = self.batch()
        signs = torch.cat([1.0 - 2 * target, 2.0 * target - 1], 1)
        return [
            (1e4 * signs, target),
            (-1e4 * signs, target),
            (torch.zeros_like(logits), target),
            (logits, torch.zeros_like(target)),
            (logits, torch.ones_like(target)),
            (logits[:1], target[:1]),
        ]

    def misuses(self):
        logits, target = self.batch()
        return [
            ("", (logits[:0], target[:0])),
            ("", (logits, target[:-1])),
            ("", (logits, target[:, 0])),
            ("", (logits, target.double())),
            ("", (logits, target + 2)),
            ("", (logits[:, :1], target)),
        ]


class Sequences(Kind):
    LENGTH = 5

    def batch(self, n=N, dtype=torch.float64, seed=0):
        labels = torch.randint(CLASSES, (n, self.LENGTH), generator=generator(seed + 1))
        labels[:, 0] = -100
        return normal(n, self.LENGTH, CLASSES, seed=seed, dtype=dtype), labels

    def extremes(self):
        logits, labels = self.batch()
        up = torch.where(logits > 0, 1e4, -1e4)
        return [(up, labels), (-up, labels), (torch.zeros_like(logits), labels), (logits[:1], labels[:1])]

    def misuses(self):
        logits, labels = self.batch()
        return [
            ("", (logits[:0], labels[:0])),
            ("", (logits, labels[:-1])),
            ("", (logits, labels[:, :-1])),
            ("", (logits, torch.full_like(labels, CLASSES))),
        ]


KINDS: dict[str, Kind] = {
    "loss": ClassScores(),
    "binary_loss": BinaryScores(),
    "multilabel_loss": LabelScores(),
    "embedding_loss": Embeddings(),
    "contrastive_loss": Views(),
    "episode_loss": Episodes(),
    "bottleneck_loss": Bottlenecks(),
    "bag_loss": BagMeans(),
    "joint_loss": ScoresAndEmbeddings(),
    "segmentation_loss": Segmentations(),
    "sequence_loss": Sequences(),
}
