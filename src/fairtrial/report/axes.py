"""Axes: where values fall on a picture, which of them are marked, and how far an axis reaches."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` fall between the pixels `start` and `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value; a value beyond an end is drawn at that end."""
        low, high, at = (
            _log(v) if self.log else v for v in (self.low, self.high, min(max(value, self.low), self.high))
        )
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def beyond(self, value: float) -> int:
        """-1 or +1 for a value below or above the axis, else 0."""
        return (value > self.high) - (value < self.low)

    def ticks(self, most: int, whole: bool = False) -> list[float]:
        """Round values to mark, about as many as asked for; `whole` leaves out all but whole numbers."""
        found = _log_ticks(self.low, self.high, most) if self.log else self._even_ticks(most)
        return [value for value in found if not whole or value == int(value)]

    def _even_ticks(self, most: int) -> list[float]:
        step = _round_step((self.high - self.low) / most)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(place * step, 12) + 0.0 for place in range(first, last + 1)]


def _log(value: float) -> float:
    return math.log10(value)


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10, 20) if power * factor >= least * (1 - 1e-9))


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
        found = [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if len(found) <= most:
            return found if len(found) > 1 else [low, high]
    stride = math.ceil(len(found) / most)
    return found[::stride]


def tick_text(value: float) -> str:
    """A tick's value in few characters."""
    for unit, letter in ((1e6, "M"), (1e3, "k")):
        if unit * 10 <= abs(value) < unit * 1e6:
            return f"{value / unit:.6g}{letter}"
    return f"{value:.6g}"


def padded(low: float, high: float, share: float = 0.06, log: bool = False) -> tuple[float, float]:
    """The ends moved outwards, so that nothing lies on the frame; apart even where all values are equal."""
    if log:
        inner = padded(math.log10(low), math.log10(high), share)
        return 10.0 ** inner[0], 10.0 ** inner[1]
    room = (high - low) * share or abs(high) * 0.05 or 0.5
    return low - room, high + room


def reach(core: Sequence[float], others: Iterable[float] = (), most: float = 2.0) -> tuple[float, float]:
    """Ends that hold the core, and of the others those within so many spans of it."""
    low, high = min(core), max(core)
    room = most * (high - low) or abs(high) * 0.05 or 0.5
    near = [value for value in others if low - room <= value <= high + room]
    return min([low, *near]), max([high, *near])


def better_on_log(values: Sequence[float]) -> bool:
    """Whether a logarithmic axis spreads the values more evenly: their median is then nearer to its middle."""
    low, middle, high = min(values), median(values), max(values)
    if low <= 0 or high / low < 10:
        return False
    on_log = math.log(middle / low) / math.log(high / low)
    return abs(on_log - 0.5) < abs((middle - low) / (high - low) - 0.5)
