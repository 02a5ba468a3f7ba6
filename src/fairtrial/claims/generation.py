"""Text that SmolLM2 writes on from Python's documentation, and what it is like: what claims on decoders share.

Surprise is -log2 p of a token under the model itself, at temperature 1 and with nothing removed, whatever the decoder
made of it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pydoc_data.topics import topics
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fairtrial.claims.smollm2 import smollm2
from fairtrial.methods.decoding.sampling import sample


@cache
def paragraphs(fewest_tokens: int = 60) -> list[list[int]]:
    """Token ids of the documentation's paragraphs of running text that are not shorter, each once."""
    tokenizer = smollm2().tokenizer
    texts = dict.fromkeys(" ".join(p.split()) for name in sorted(topics) for p in topics[name].split("\n\n"))
    running = [text for text in texts if text[:1].isupper() and text[-1:] in ".:"]
    return [ids for ids in tokenizer(running).input_ids if len(ids) >= fewest_tokens]


def openings(count: int, length: int, seed: int) -> Int[Tensor, "n t"]:
    """The first tokens of paragraphs drawn with a seed."""
    order = torch.randperm(len(paragraphs()), generator=torch.Generator().manual_seed(seed))
    return torch.tensor([paragraphs()[place][:length] for place in order[:count].tolist()])


@dataclass
class Listener:
    """A logits processor that changes nothing and notes each sampled token's surprise; to come first.

    Attributes:
        surprises: in bits, of each token so far.
    """

    surprises: list[Float[Tensor, " b"]] = field(default_factory=list)
    _waiting: Tensor | None = None

    def __call__(self, input_ids: Int[Tensor, "b t"], scores: Float[Tensor, "b v"]) -> Float[Tensor, "b v"]:
        self.hear(input_ids)
        self._waiting = scores.log_softmax(-1) / -math.log(2)
        return scores

    def hear(self, input_ids: Int[Tensor, "b t"]) -> None:
        """Note the last token, unless that has been done."""
        if self._waiting is not None:
            self.surprises.append(self._waiting.gather(1, input_ids[:, -1:])[:, 0])
            self._waiting = None


def write(
    prompts: Int[Tensor, "b t"], processors: Sequence[Any], *, tokens: int, seed: int, temperature: float = 1.0
) -> tuple[Int[Tensor, "b n"], Float[Tensor, "b n"]]:
    """What is sampled after the prompts, and its surprises; end tokens are tokens like others."""
    listener = Listener()
    sequences = sample(
        smollm2().model,
        prompts,
        max_new_tokens=tokens,
        processors=[listener, *processors],
        temperature=temperature,
        eos_token_id=(),
        generator=torch.Generator().manual_seed(seed),
    )
    listener.hear(sequences)
    return sequences[:, prompts.shape[1] :], torch.stack(listener.surprises, 1)


def n_grams(text: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """All runs of n tokens, in order."""
    return list(zip(*(text[start:] for start in range(n)), strict=False))


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """The share of different n-grams among all n-grams of some texts."""
    found = [gram for text in texts for gram in n_grams(text, n)]
    return len(set(found)) / len(found)


def repeated(text: Sequence[int], n: int = 4) -> float:
    """The share of a text's n-grams that it had before."""
    return 1 - distinct([text], n)
