"""Tagging of few tokens among many: which words of Python's documentation were marked up as literals or emphasised.

The marks themselves, double quotes and asterisks, are taken out of the text.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pydoc_data.topics import topics
from zlib import crc32

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fairtrial.contract import Metric
from fairtrial.tasks.measures import accuracy
from fairtrial.tasks.samples import Samples, hold_out
from fairtrial.tasks.slots import layer_slot, loss_slot, optimizer_slot, schedule_slot
from fairtrial.tasks.supervised import SupervisedTask

PLAIN, LITERAL, EMPHASIS = range(3)
WINDOW = 32  # tokens that the model sees at once
PASSAGE = 16  # windows that are in the same part
BUCKETS = 2048  # of words

_marked = re.compile(r'"(?P<literal>[^"\n]{1,60})"|(?<![\w*])\*(?P<emphasis>[^*\s][^*\n]{0,60})\*(?![\w*])')
_token = re.compile(r"\w+|[^\w\s]")


def samples() -> Samples:
    """Windows of hashed tokens, and the tag of each; paragraphs that several topics share are taken once."""
    paragraphs = dict.fromkeys(paragraph for topic in sorted(topics) for paragraph in topics[topic].split("\n\n"))
    tagged = [pair for paragraph in paragraphs for pair in tagged_tokens(paragraph)]
    count = len(tagged) // WINDOW
    words = torch.tensor([crc32(word.encode()) % BUCKETS for word, _ in tagged[: count * WINDOW]])
    tags = torch.tensor([tag for _, tag in tagged[: count * WINDOW]])
    groups = torch.arange(count) // PASSAGE
    return replace(hold_out(words.view(count, WINDOW), tags.view(count, WINDOW), groups=groups), num_classes=3)


def tagged_tokens(paragraph: str) -> Iterator[tuple[str, int]]:
    """Words and punctuation marks with their tags, without the marks that tell the tags."""
    end = 0
    for found in _marked.finditer(paragraph):
        for word in _token.findall(paragraph[end : found.start()]):
            yield word, PLAIN
        for word in _token.findall(found["literal"] or found["emphasis"]):
            yield word, LITERAL if found["literal"] else EMPHASIS
        end = found.end()
    for word in _token.findall(paragraph[end:]):
        yield word, PLAIN


class Tagger(nn.Module):
    """Scores of the three tags, one row for each token, from the token and the two on either side."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(BUCKETS, 32)
        self.context = nn.Conv1d(32, 64, 5, padding=2)
        self.head = nn.Linear(64, 3)

    def forward(self, x: Int[Tensor, "n t"]) -> Float[Tensor, "nt c"]:
        hidden = self.context(self.words(x).transpose(1, 2)).relu()
        scores: Tensor = self.head(hidden.transpose(1, 2))
        return scores.flatten(0, 1)


def f1(found: Bool[Tensor, " n"], there: Bool[Tensor, " n"]) -> float:
    """Harmonic mean of precision and recall; 0 if nothing is rightly found."""
    return 2 * int((found & there).sum()) / max(1, int(found.sum()) + int(there.sum()))


def f1_of_literals(output: Float[Tensor, "n c"], target: Int[Tensor, " n"]) -> float:
    """F1 of the tag `LITERAL`."""
    return f1(output.argmax(1) == LITERAL, target == LITERAL)


def f1_of_emphasis(output: Float[Tensor, "n c"], target: Int[Tensor, " n"]) -> float:
    """F1 of the tag `EMPHASIS`."""
    return f1(output.argmax(1) == EMPHASIS, target == EMPHASIS)


def f1_of_rare_tags(output: Float[Tensor, "n c"], target: Int[Tensor, " n"]) -> float:
    """Mean F1 of the two rare tags."""
    return (f1_of_literals(output, target) + f1_of_emphasis(output, target)) / 2


docs_tokens = SupervisedTask(
    name="docs-tokens",
    version=1,
    metric=Metric("F1 of rare tags", "maximize", "fraction", margin=0.01, worst=0.0),
    measure=f1_of_rare_tags,
    also={"F1 of literals": f1_of_literals, "F1 of emphasis": f1_of_emphasis, "accuracy": accuracy},
    samples=samples,
    model=Tagger,
    total_steps=300,
    batch_size=16,
    slots={slot.name: slot for slot in (optimizer_slot(), loss_slot(), schedule_slot(), layer_slot())},
)
