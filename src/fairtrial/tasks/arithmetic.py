"""Sums that a small transformer answers by sampling: is one of 16 answers right?

A question is `47+85=`, its answer `132`. The model is trained on 320 sums. The chance that a sample of its answer is
right is known exactly, the product of its probabilities of the digits, so pass@n has no sampling error.
"""

from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.contract import Choice, Metric
from fairtrial.methods.registry import LogUniform, Method
from fairtrial.tasks.samples import Samples, hold_out
from fairtrial.tasks.slots import Options, layer_slot, optimizer_slot, schedule_slot
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.supervised import SupervisedTask
from fairtrial.tasks.text import Block
from fairtrial.tasks.unflattened import UnflattenedSlot

PLUS, EQUALS, VOCABULARY = 10, 11, 12  # beside the digits
LENGTH = 9  # 47+85=132
IGNORED = -100
SUMS = 1600  # of the 10,000 there are: half for the test, a fifth to train on
DRAWN = 16  # answers to a question


def samples() -> Samples:
    """Sums (n, 9) of two numbers of two digits, and the labels, the question's ignored."""
    pairs = torch.randperm(10_000, generator=Streams(0)("sums"))[:SUMS]
    a, b = pairs // 100, pairs % 100
    total = a + b
    digits = [a // 10, a % 10, None, b // 10, b % 10, None, total // 100, total // 10 % 10, total % 10]
    signs = iter((PLUS, EQUALS))
    x = torch.stack([torch.full((SUMS,), next(signs)) if digit is None else digit for digit in digits], 1)
    y = x.clone()
    y[:, :6] = IGNORED
    return replace(hold_out(x, y, 0.5), num_classes=VOCABULARY)


class Calculator(nn.Module):
    """Scores (n, t, 12) of the token after each of (n, t)."""

    def __init__(self, width: int = 32, heads: int = 4, depth: int = 1) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        for table in self.tokens, self.positions:
            nn.init.normal_(table.weight, std=0.3)

    def forward(self, x: Int[Tensor, "n t"]) -> Float[Tensor, "n t c"]:
        hidden = self.tokens(x) + self.positions.weight[: x.shape[1]]
        scores: Tensor = self.head(self.norm(self.blocks(hidden)))
        return scores


class NextTokenCrossEntropyLoss(nn.Module):
    """Mean cross entropy over tokens of logits (n, t, vocabulary) and labels (n, t), logits at t being scores of t + 1.

    Args:
        label_smoothing: as torch's.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.criterion = nn.CrossEntropyLoss(ignore_index=IGNORED, label_smoothing=label_smoothing)

    def forward(self, input: Float[Tensor, "n t c"], labels: Int[Tensor, "n t"]) -> Float[Tensor, ""]:
        loss: Tensor = self.criterion(input[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return loss


SEQUENCE_LOSSES = (
    Method(
        "NextTokenCrossEntropyLoss",
        "sequence_loss",
        NextTokenCrossEntropyLoss,
        {"label_smoothing": LogUniform(1e-3, 0.5)},
    ),
)


def passed(output: Float[Tensor, "n t c"], target: Int[Tensor, " nt"], n: int = DRAWN) -> float:
    """The chance that one of n samples of the answer is right, on average over questions."""
    logits, labels = output.double()[:, :-1].transpose(1, 2), target.view(len(output), -1)[:, 1:]
    p = (-F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none").sum(1)).exp()
    return (1 - (1 - p) ** n).mean().item()


def loss_slot() -> UnflattenedSlot:
    """Losses of logits (n, t, vocabulary) and labels (n, t), that of a question's tokens being -100."""
    return UnflattenedSlot("loss", Choice("NextTokenCrossEntropyLoss"), Options(SEQUENCE_LOSSES, "sequence_loss"))


arithmetic = SupervisedTask(
    name="arithmetic",
    version=1,
    metric=Metric(f"pass@{DRAWN}", "maximize", "fraction", margin=0.01, worst=0.0),
    measure=passed,
    also={"pass@1": partial(passed, n=1), "pass@64": partial(passed, n=64)},
    samples=samples,
    model=Calculator,
    total_steps=250,
    batch_size=32,
    slots={slot.name: slot for slot in (optimizer_slot(), loss_slot(), schedule_slot(), layer_slot())},
    validation=0.6,
)
