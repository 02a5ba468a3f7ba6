"""The small language model of bytes after its weights have been quantised, on text that it was not trained on."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch

from fairtrial.contract import Split
from fairtrial.methods.quantization.quantize import average_bits, quantize_
from fairtrial.tasks.post_training import bytes_of_text, nats_per_byte
from fairtrial.tasks.small_gpt import CONTEXT
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.trained import loaded

NAME = "small-gpt"
PASSAGES = 64  # that a run is judged by, of the 108 that validation and test have each


@dataclass(frozen=True)
class Judged:
    """How well bytes are predicted, and what the quantised weights take.

    Attributes:
        perplexity: of a byte; infinite where scores are not finite.
        bits_per_weight: with scales, offsets and all else that belongs to them.
    """

    perplexity: float
    bits_per_weight: float


def judged(config: Any, seed: int, split: Split, *, sequences: int, batch: int) -> Judged:
    """The model quantised with passages of its training text, and judged on a seed's own choice of others.

    Args:
        config: as `quantize_` takes it.
        seed, split: of the run.
        sequences: how many passages to calibrate with.
        batch: how many of them in a batch.
    """
    model = copy.deepcopy(loaded(NAME).model)
    calibration = bytes_of_text(NAME, "calibration", sequences, CONTEXT, Streams(seed)("calibration"))
    quantize_(model, config, torch.split(calibration, batch))
    return Judged(perplexity(model, seed, split), average_bits(model))


def exact(seed: int) -> float:
    """The perplexity of a byte before anything is quantised, on a seed's test text."""
    return perplexity(loaded(NAME).model, seed, "test")


def perplexity(model: Any, seed: int, split: Split) -> float:
    """Of a byte, given those before it in its passage."""
    text = bytes_of_text(NAME, split, PASSAGES, CONTEXT, Streams(seed)("passages"))
    nats = nats_per_byte(model, text)
    return math.exp(min(nats, 100.0)) if math.isfinite(nats) else math.inf
