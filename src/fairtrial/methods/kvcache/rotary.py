"""Rotary position embeddings, put on keys and taken off again.

Channel i of a head turns together with channel i + d/2, by the angle p θ_i at position p. Caches receive keys that have
been turned; what has structure across tokens are the keys before that. A cache takes the positions to be the places in
it. Where a sequence is padded on the left they are off by one and the same number for all of its tokens, which is a
turn of the whole: taking off and putting on again still cancel, to the last position.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fairtrial.methods.arguments import require

KEPT = 2  # ranges of positions whose cosines are kept: new tokens and all tokens


def head_width(config: Any) -> int:
    """Channels of a head."""
    width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return width


class Rotary:
    """The angles of a model's rotary embeddings.

    Args:
        config: of a model of transformers.

    Raises:
        ValueError: the model has no rotary embeddings, or different ones in different layers.
    """

    def __init__(self, config: Any) -> None:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        config = config.get_text_config(decoder=True)
        given: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
        require(
            "rope_type" in given,
            "config",
            type(config).__name__,
            "of a model with the same rotary embeddings in all layers",
        )
        if given["rope_type"] == "default":
            width = int(head_width(config) * (given.get("partial_rotary_factor") or 1.0))
            frequencies = 1.0 / given["rope_theta"] ** (torch.arange(0, width, 2).double() / width)
        else:
            frequencies, _ = ROPE_INIT_FUNCTIONS[given["rope_type"]](config, torch.device("cpu"))
        self.frequencies: tuple[float, ...] = tuple(frequencies.tolist())
        self._known: dict[Any, tuple[Tensor, Tensor]] = {}

    def put_on(self, keys: Float[Tensor, "b h t d"], start: int = 0) -> Float[Tensor, "b h t d"]:
        """Turn the keys of the positions from `start` on."""
        cos, sin = self._at(start, keys)
        return turned(keys, cos, sin)

    def take_off(self, keys: Float[Tensor, "b h t d"], start: int = 0) -> Float[Tensor, "b h t d"]:
        """The keys before they were turned."""
        cos, sin = self._at(start, keys)
        return turned(keys, cos, -sin)

    def forget(self) -> None:
        """Drop the cosines that were needed last; they are kept for the other layers, which need the same."""
        self._known.clear()

    def _at(self, start: int, like: Tensor) -> tuple[Float[Tensor, "t r"], Float[Tensor, "t r"]]:
        wanted = (start, like.shape[-2], like.dtype, like.device)
        if wanted not in self._known:
            if len(self._known) == KEPT:
                del self._known[next(iter(self._known))]
            positions = torch.arange(start, start + like.shape[-2], device=like.device, dtype=torch.float32)
            frequencies = torch.tensor(self.frequencies, device=like.device, dtype=torch.float32)
            angles = (positions[:, None] * frequencies).repeat(1, 2)
            self._known[wanted] = angles.cos().to(like.dtype), angles.sin().to(like.dtype)
        return self._known[wanted]


def turned(
    x: Float[Tensor, "*b t d"], cos: Float[Tensor, "*#b t r"], sin: Float[Tensor, "*#b t r"]
) -> Float[Tensor, "*b t d"]:
    """x cos + (-x_2, x_1) sin, over the first r channels of each head, x_1 and x_2 being their halves."""
    r = cos.shape[-1]
    part = x[..., :r]
    half = torch.cat([-part[..., r // 2 :], part[..., : r // 2]], -1)
    result = part * cos + half * sin
    return result if r == x.shape[-1] else torch.cat([result, x[..., r:]], -1)
