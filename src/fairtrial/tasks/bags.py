"""Tasks in which the label or the mean response of bags is known, but nothing of the single samples in them."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fairtrial.tasks.samples import Division
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.supervised import SupervisedTask


@dataclass
class BagTask(SupervisedTask):
    """A supervised task whose parts are laid into bags once the samples have been divided: none is in two parts.

    Inputs have been standardised before, by the samples of the training part.

    Attributes:
        bagged: gives the bags to train on, to validate with and for the test, by draws from a stream of its own.
    """

    bagged: Callable[[Division, torch.Generator], Division] = field(kw_only=True)

    @property
    def source(self) -> str:
        return self.bagged.__module__

    def _divide(self, streams: Streams) -> Division:
        return self.bagged(super()._divide(streams), streams("bags"))
