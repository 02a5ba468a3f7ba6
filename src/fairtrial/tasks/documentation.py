"""The documentation that Python brings along for its `help()`, as tokens, in parts that no run mixes up."""

from functools import cache
from pydoc_data.topics import topics
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from fairtrial.contract import BadInput

Part = Literal["calibration", "validation", "test"]
ENDS: dict[Part, tuple[float, float]] = {"calibration": (0.0, 0.3), "validation": (0.3, 0.5), "test": (0.5, 1.0)}


@cache
def text() -> str:
    """All topics in alphabetical order; paragraphs that several share are taken once."""
    return "\n\n".join(
        dict.fromkeys(paragraph for topic in sorted(topics) for paragraph in topics[topic].split("\n\n"))
    )


def tokens(tokenizer: Any, part: Part, words: str | None = None) -> Int[Tensor, " n"]:
    """The tokens of one part of the documentation, or of other words: neighbouring text, no sentence in two parts."""
    ids = torch.tensor(tokenizer(text() if words is None else words, add_special_tokens=False, verbose=False).input_ids)
    start, end = (round(share * len(ids)) for share in ENDS[part])
    return ids[start:end]


def windows(ids: Int[Tensor, " n"], count: int, length: int, generator: torch.Generator) -> Int[Tensor, "c l"]:
    """Passages that begin at random tokens; they may overlap."""
    if len(ids) < length:
        raise BadInput(f"passages of {length} tokens cannot be cut from {len(ids)}")
    starts = torch.randint(len(ids) - length + 1, (count,), generator=generator)
    return ids[starts[:, None] + torch.arange(length)]
