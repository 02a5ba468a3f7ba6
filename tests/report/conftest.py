"""Comparisons made by hand, and the toy task of the bench's tests."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "trial")]
