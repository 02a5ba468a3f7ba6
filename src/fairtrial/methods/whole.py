"""Whole numbers among arguments: Python's and NumPy's, but not True and False."""

from numbers import Integral
from typing import Any

from fairtrial.methods.arguments import require


def whole(value: Any, least: int | None = None, most: int | None = None) -> bool:
    """Whether it is a whole number within bounds."""
    if type(value) is bool or not isinstance(value, Integral):
        return False
    return (least is None or int(value) >= least) and (most is None or int(value) <= most)


def require_whole(name: str, value: Any, least: int = 1) -> None:
    """Refuse what is no whole number of at least `least`.

    Raises:
        ValueError: it is none.
    """
    require(whole(value), name, value, "a whole number")
    require(whole(value, least), name, value, f"at least {least}")
