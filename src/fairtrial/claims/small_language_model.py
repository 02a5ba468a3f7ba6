"""The small language model of bytes after its weights have been quantised, on text that it was not trained on."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from fairtrial.contract import Split
from fairtrial.methods.quantization.packing import packed_layers
from fairtrial.methods.quantization.quantize import average_bits, quantize_
from fairtrial.tasks.post_training import bytes_of_text
from fairtrial.tasks.small_gpt import CONTEXT
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.trained import loaded

NAME = "small-gpt"
AT_ONCE = 16  # passages


@dataclass(frozen=True)
class Judged:
    """How well bytes are predicted, and what the quantised weights take.

    Attributes:
        perplexity: of a byte; infinite where scores are not finite.
        bits_per_weight: with scales, offsets and all else that belongs to them; 32 where nothing is quantised.
    """

    perplexity: float
    bits_per_weight: float


def judged(config: Any, seed: int, split: Split, *, sequences: int, batch: int, passages: int) -> Judged:
    """The model quantised with passages of its training text, and judged on a seed's own choice of others.

    Args:
        config: as `quantize_` takes it; None leaves the model as it is.
        seed, split: of the run.
        sequences: how many passages to calibrate with.
        batch: how many of them in a batch.
        passages: how many to judge by; validation and test have 108 each.
    """
    streams = Streams(seed)
    calibration = bytes_of_text(NAME, "calibration", sequences, CONTEXT, streams("calibration"))
    text = bytes_of_text(NAME, split, passages, CONTEXT, streams("passages"))
    model: Any = copy.deepcopy(loaded(NAME).model)
    if config is not None:
        quantize_(model, config, torch.split(calibration, batch))
    with torch.no_grad():
        losses = [
            F.cross_entropy(model(rows).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
            for rows in torch.split(text, AT_ONCE)
        ]
    nats = torch.stack(losses).sum().item() / text[:, 1:].numel()
    held = average_bits(model) if any(True for _ in packed_layers(model)) else 32.0
    return Judged(math.exp(min(nats, 100.0)) if math.isfinite(nats) else math.inf, held)
