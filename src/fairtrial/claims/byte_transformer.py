"""The bench's byte transformer, trained from scratch on Python's documentation text with an optimizer given to it."""

from collections.abc import Callable

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from fairtrial.claims.training import fit
from fairtrial.contract import Diverged, Split
from fairtrial.tasks.samples import divide
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.supervised import predict
from fairtrial.tasks.text import ByteTransformer, samples, text

BATCH = 8


def trained_bits(
    prepare: Callable[[nn.Module, Streams], tuple[nn.Module, Optimizer]],
    seed: int,
    split: Split,
    *,
    lr: float,
    steps: int,
) -> float:
    """Bits per byte after training, the rate rising over a fifth of the steps to lr; the worst value if it diverges.

    Args:
        prepare: makes of the fresh model what is trained, and its optimizer.
        seed, split: of the run.
        lr: the peak, as the optimizer has it.
        steps: how many.
    """
    streams = Streams(seed)
    division = divide(samples(), text.validation, text.scale, streams)
    with streams.globally("model"):
        model: nn.Module = ByteTransformer()
    with streams.globally("layer"):
        model, optimizer = prepare(model, streams)
    schedule = OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.2, cycle_momentum=False)
    try:
        fit(model, optimizer, division.training, streams, steps=steps, batch_size=BATCH, schedule=schedule)
        return text.measure(*predict(model, getattr(division, split)))
    except Diverged:
        return text.metric.worst
