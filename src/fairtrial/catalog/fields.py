"""Reading a file's fields one by one: a refusal names file and field, what it was and what is accepted."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time
from numbers import Integral, Real
from typing import TypeVar

from fairtrial.spelling import nearest

Option = TypeVar("Option", bound=str)


class CatalogError(ValueError):
    """A record, an evidence file or a request to the catalogue is not as it must be; the message says what to do."""


def shown(value: object) -> str:
    """A value as a message shows it: short, and never failing, whatever a file holds."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list | tuple):
        return f"an array of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 64:  # Python refuses to print the hugest ones
        return "a huge number"
    text = str(value) if isinstance(value, date | time) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(frozen=True)
class Fields:
    """The fields of one table of a file.

    Attributes:
        table: what the file says.
        file: its name.
        place: where in the file the table stands, as a prefix of the names in messages: 'claims[1].'.
    """

    table: Mapping[str, object]
    file: str
    place: str = ""

    def error(self, name: str, problem: str) -> CatalogError:
        return CatalogError(f"{self.file}: {self.place}{name} {problem}")

    def refused(self, name: str, value: object, accepted: str) -> CatalogError:
        return self.error(name, f"must be {accepted}, got {shown(value)}")

    def allow(self, known: Collection[str]) -> None:
        """Refuse fields that nobody reads: they are misspelt ones."""
        for name in self.table:
            if name not in known:
                raise CatalogError(f"{self.file}: unknown field {self.place}{shown(name)}; {nearest(name, known)}")

    def value(self, name: str) -> object:
        if name not in self.table:
            raise self.error(name, "is missing")
        return self.table[name]

    def text(self, name: str, *, empty: bool = False) -> str:
        """A text for people, with every stretch of white space made one space."""
        value = self.value(name)
        accepted = "a text" if empty else "a text that is not empty"
        if not isinstance(value, str):
            raise self.refused(name, value, accepted)
        text = " ".join(value.split())
        if not (text or empty):
            raise self.refused(name, value, accepted)
        if not text.isprintable():
            raise self.refused(name, value, f"{accepted}, without control characters")
        return text

    def matching(self, name: str, pattern: re.Pattern[str], accepted: str) -> str:
        value = self.value(name)
        if not (isinstance(value, str) and pattern.fullmatch(value)):
            raise self.refused(name, value, accepted)
        return value

    def one_of(self, name: str, options: Sequence[Option]) -> Option:
        value = self.value(name)
        for option in options:
            if option == value:
                return option
        raise self.refused(name, value, f"one of {', '.join(map(repr, options))}")

    def whole(self, name: str, low: int, high: int) -> int:
        value = self.value(name)
        if not _is_bool(value) and isinstance(value, Integral) and low <= int(value) <= high:
            return int(value)
        raise self.refused(name, value, f"a whole number from {low} to {high}")

    def number(self, name: str, low: float = -math.inf) -> float:
        value = self.value(name)
        if not _is_bool(value) and isinstance(value, Real):
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
            if math.isfinite(number) and number >= low:
                return number
        raise self.refused(name, value, "a finite number" if low == -math.inf else f"a finite number, at least {low:g}")

    def number_or_null(self, name: str) -> float | None:
        return None if self.value(name) is None else self.number(name)

    def array(self, name: str) -> Sequence[object]:
        value = self.value(name)
        if not isinstance(value, list | tuple):
            raise self.refused(name, value, "an array")
        return value

    def inner(self, name: str) -> "Fields":
        """The fields of a table within this one."""
        return self._inner(name, self.value(name))

    def inner_array(self, name: str) -> list["Fields"]:
        """The fields of each table of an array within this one."""
        return [self._inner(f"{name}[{i}]", each) for i, each in enumerate(self.array(name))]

    def _inner(self, name: str, value: object) -> "Fields":
        if not isinstance(value, Mapping):
            raise self.refused(name, value, "a table")
        return Fields(value, self.file, f"{self.place}{name}.")


def _is_bool(value: object) -> bool:
    """Python's truth values are numbers; a file's are not."""
    return isinstance(value, bool)
