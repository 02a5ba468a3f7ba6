"""The shapes of the LLaMA models of GaLore's experiments, and what optimizers keep for them, without any weights."""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import nn

VOCABULARY = 32_000
SIZES = {  # width, inner width, layers
    "60M": (512, 1376, 8),
    "130M": (768, 2048, 12),
    "350M": (1024, 2736, 24),
    "1B": (2048, 5461, 24),
    "7B": (4096, 11008, 32),
}


def matrices(size: str) -> list[nn.Parameter]:
    """Query, key, value, output, gate, up and down of each layer, on the device meta."""
    width, inner, layers = SIZES[size]
    return _meta([*[(width, width)] * 4, (inner, width), (inner, width), (width, inner)] * layers)


def others(size: str) -> list[nn.Parameter]:
    """The embedding, the output layer and the norms."""
    width, _, layers = SIZES[size]
    return _meta([*[(VOCABULARY, width)] * 2, *[(width,)] * (2 * layers + 1)])


def _meta(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]


def saved(shapes: Callable[..., Any], form: dict[str, Any], size: str, *, width: int) -> float:
    """How much less an optimizer keeps for a model than AdamW does with 2 bytes for every number; a part of the latter.

    All parameters count, those outside the layers' matrices with AdamW's two moments; step counts do not.

    Args:
        shapes: gives the shapes of the state of a parameter of a group: `state_shapes` of an optimizer.
        form: the group of the layers' matrices.
        size: of the model.
        width: bytes of a number, of moments and of all else that is kept.
    """
    states = [shapes(form, p, {}) for p in matrices(size)]
    kept: int = sum(prod(shape) for state in states for name, shape in state.items() if name != "step")
    rest = sum(p.numel() for p in others(size))
    whole = 2 * (rest + sum(p.numel() for p in matrices(size)))
    return 1 - width * (kept + 2 * rest) / (2 * whole)
