"""Randomness split by purpose: recipes with one seed share every draw that they can share."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from numpy.random import SeedSequence

from fairtrial.methods.arguments import require


@dataclass(frozen=True)
class Streams:
    """Independent streams of random numbers, told apart by the run's seed and by what they are for.

    Attributes:
        seed: the run's seed.
        within: sets the streams of a run inside the run apart, as that of a pretrained model.
    """

    seed: int
    within: str = ""

    def __post_init__(self) -> None:
        require(isinstance(self.seed, int) and self.seed >= 0, "seed", self.seed, "a whole number of at least 0")

    def __call__(self, purpose: str) -> torch.Generator:
        """The stream for a purpose, from its beginning: 'split', 'model', 'order', 'training', 'batch', 'method'."""
        return torch.Generator().manual_seed(self._seed_of(purpose))

    @contextmanager
    def globally(self, purpose: str) -> Iterator[None]:
        """Make torch's global generator the stream for a purpose, and put it back afterwards.

        Initialisers and dropout draw from the global generator and take no other.
        """
        before = torch.get_rng_state()
        torch.default_generator.manual_seed(self._seed_of(purpose))  # the CPU's only: no others are drawn from here
        try:
            yield
        finally:
            torch.set_rng_state(before)

    def inside(self, name: str) -> "Streams":
        """Further streams, independent of these."""
        return replace(self, within=f"{self.within}{name}/")

    def _seed_of(self, purpose: str) -> int:
        sequence = SeedSequence(self.seed, spawn_key=tuple(f"{self.within}{purpose}".encode()))
        return int(sequence.generate_state(1)[0])
