"""A small language model of bytes, on the documentation that Python brings along for its `help()`."""

from dataclasses import replace
from pydoc_data.topics import topics

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.contract import Choice, Metric
from fairtrial.tasks.measures import accuracy, bits
from fairtrial.tasks.samples import Samples, hold_out
from fairtrial.tasks.slots import layer_slot, loss_slot, optimizer_slot, schedule_slot
from fairtrial.tasks.supervised import SupervisedTask

CONTEXT = 64  # bytes that the model sees at once
PASSAGE = 32  # windows that are in the same part, so that the parts are of different text, not of the same sentences


def samples() -> Samples:
    """Windows of the text, and the same windows one byte on; paragraphs that several topics share are taken once."""
    paragraphs = dict.fromkeys(paragraph for topic in sorted(topics) for paragraph in topics[topic].split("\n\n"))
    text = torch.tensor(list("\n\n".join(paragraphs).encode()))
    count = (len(text) - 1) // CONTEXT
    x, y = (text[start : start + count * CONTEXT].view(count, CONTEXT) for start in (0, 1))
    return replace(hold_out(x, y, 0.15, groups=torch.arange(count) // PASSAGE), num_classes=256)


class Block(nn.Module):
    """Causal self-attention and a two-layer network, each on normalised input and added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        n, t, d = x.shape
        qkv = self.query_key_value(self.attention_norm(x)).view(n, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(n, t, d))
        change: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return change + x


class ByteTransformer(nn.Module):
    """Scores of the next byte, one row for each byte of each window."""

    def __init__(self, width: int = 64, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        for name, weight in self.named_parameters():
            if name.endswith("out.weight"):  # branches that are added up start smaller, the more of them there are
                nn.init.normal_(weight, std=(2 * depth * weight.shape[1]) ** -0.5)
            elif weight.ndim == 2:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        for table in self.bytes, self.positions:
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, x: Int[Tensor, "n t"]) -> Float[Tensor, "nt c"]:
        hidden = self.bytes(x) + self.positions.weight[: x.shape[1]]
        scores: Tensor = self.head(self.norm(self.blocks(hidden)))
        return scores.flatten(0, 1)


text = SupervisedTask(
    name="text",
    version=1,
    metric=Metric("bits per byte", "minimize", "bits per byte", margin=0.01, worst=8.0),
    measure=bits,
    also={"accuracy": accuracy},
    samples=samples,
    model=ByteTransformer,
    total_steps=750,
    batch_size=8,
    slots={
        slot.name: slot
        for slot in (
            optimizer_slot(),
            loss_slot(),
            schedule_slot(Choice("OneCycleLR", {"pct_start": 0.2})),  # a transformer's rate has to rise slowly
            layer_slot(),
        )
    },
    validation=0.1,
)
