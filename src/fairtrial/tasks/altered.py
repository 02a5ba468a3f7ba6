"""Tasks whose training part is made worse than what judges it: thinned out, or mislabelled."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from fairtrial.tasks.samples import Division, Part
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.supervised import SupervisedTask


@dataclass
class AlteredTask(SupervisedTask):
    """A supervised task that alters its training part; validation and test part stay as they are.

    Attributes:
        alter: gives the training part to train on, by draws from a stream of its own. Inputs have been standardised
            before, by the whole training part.
    """

    alter: Callable[[Part, torch.Generator], Part] = field(kw_only=True)

    @property
    def source(self) -> str:
        function = self.alter.func if isinstance(self.alter, partial) else self.alter
        return function.__module__

    def _divide(self, streams: Streams) -> Division:
        division = super()._divide(streams)
        return division._replace(training=self.alter(division.training, streams("altering")))
