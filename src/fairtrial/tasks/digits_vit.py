"""A small vision transformer on handwritten digits: sixteen patches of 2 x 2 pixels, two blocks."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.contract import Choice
from fairtrial.tasks import digits
from fairtrial.tasks.samples import Samples
from fairtrial.tasks.slots import classification_slots, optimizer_slot

SIDE, PATCH = 8, 2  # pixels


class Attention(nn.Module):
    """Self-attention over patches, with a linear layer each for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        q, k, v = (f(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        attended: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return attended


class Block(nn.Module):
    """Attention and a two-layer network, each on normalised input and added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        x = x + self.attention(self.attention_norm(x))
        changed: Tensor = self.mlp(self.mlp_norm(x))
        return changed + x


class VisionTransformer(nn.Module):
    """Scores (n, 10) of pictures (n, 64): the mean of the patches' vectors after the last block is classified."""

    def __init__(self, width: int = 48, heads: int = 4, depth: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Linear(PATCH**2, width)
        self.positions = nn.Parameter(0.02 * torch.randn((SIDE // PATCH) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Float[Tensor, "n p"]) -> Float[Tensor, "n c"]:
        pictures = x.view(-1, 1, SIDE, SIDE)
        cut = F.unfold(pictures, PATCH, stride=PATCH).transpose(1, 2)
        scores: Tensor = self.head(self.norm(self.blocks(self.patches(cut) + self.positions)).mean(1))
        return scores


def samples() -> Samples:
    """The handwritten digits of the task `digits`."""
    return digits.samples()


digits_vit = replace(
    digits.digits,
    name="digits-vit",
    samples=samples,
    model=VisionTransformer,
    slots=classification_slots() | {"optimizer": optimizer_slot(Choice("AdamW", {"lr": 3e-3}))},
)
