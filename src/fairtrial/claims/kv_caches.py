"""What claims on key-value caches are measured with: SmolLM2, Python's documentation, and plain rounding of a cache."""

from functools import cache
from pydoc_data.topics import topics
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from fairtrial.claims.smollm2 import smollm2
from fairtrial.methods.kvcache.held import apart, together
from fairtrial.methods.kvcache.rotary import Rotary
from fairtrial.methods.kvcache.rotatekv import quantize_per_token
from fairtrial.tasks.trained import prepared

Part = Literal["test", "validation", "training"]
SHARES = {"test": (0.0, 0.6), "validation": (0.6, 0.7), "training": (0.7, 1.0)}  # of the text


@cache
def passages(part: Part, tokens: int) -> Int[Tensor, "n t"]:
    """All windows of so many tokens in a part of the documentation; paragraphs of several topics are taken once."""
    paragraphs = dict.fromkeys(paragraph for topic in sorted(topics) for paragraph in topics[topic].split("\n\n"))
    text = "\n\n".join(paragraphs)
    start, stop = (int(share * len(text)) for share in SHARES[part])
    ids = smollm2().tokenizer(text[start:stop], return_tensors="pt", verbose=False).input_ids[0]
    windows: Tensor = ids[: len(ids) // tokens * tokens].view(-1, tokens)
    return windows


def part_of(split: str) -> Part:
    """The part that runs of a split are judged on."""
    return "test" if split == "test" else "validation"


@torch.no_grad()
def logits_of(ids: Int[Tensor, "b t"], kv_cache: Any) -> Float[Tensor, "b t v"]:
    with prepared(kv_cache, smollm2().model):
        found: Tensor = smollm2().model(ids, past_key_values=kv_cache).logits
        return found


def losses(logits: Float[Tensor, "b t v"], following: Int[Tensor, "b t"]) -> list[float]:
    """The mean loss of each sequence's following tokens, in nats."""
    found = F.cross_entropy(logits.transpose(1, 2), following, reduction="none").mean(1)
    return [float(loss) for loss in found]


Way = Literal["after rotary embeddings", "before rotary embeddings", "keys per channel"]


class RoundedCache(DynamicCache):
    """A plain cache of keys and values that have been rounded, per token in groups of neighbouring channels.

    Args:
        way: which keys are rounded: those with or without rotary embeddings; or those with, per channel in groups of
            neighbouring tokens.
        bits: of a code.
        group_size: entries that share a scale and an offset of 16 bits.
        clip: by how much a group's range is cut.
    """

    def __init__(self, way: Way, bits: int, group_size: int, clip: float) -> None:
        super().__init__(config=smollm2().model.config)
        self.way, self.bits, self.group_size, self.clip = way, bits, group_size, clip
        self.rotary = Rotary(smollm2().model.config)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        start, heads = self.get_seq_length(layer_idx), key_states.shape[1]
        values = apart(self._rounded(together(value_states)), heads)
        if self.way == "before rotary embeddings":
            bare = self.rotary.take_off(key_states, start)
            keys = self.rotary.put_on(apart(self._rounded(together(bare)), heads), start)
        elif self.way == "keys per channel":
            keys = self._rounded(key_states.mT.contiguous()).mT
        else:
            keys = apart(self._rounded(together(key_states)), heads)
        return super().update(keys, values, layer_idx, *args, **kwargs)

    def _rounded(self, x: Tensor) -> Tensor:
        return quantize_per_token(x, self.bits, self.group_size, self.clip, held_in=torch.float16).dequantize(x.dtype)
