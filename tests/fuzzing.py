"""Tests on input made at random: some hundred examples in every test run, as many as wanted with `make fuzz`."""

import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings


def fuzz(usual: int) -> Callable[[Any], Any]:
    """Mark a test, and set how many examples it tries."""
    examples = int(os.environ.get("FUZZ_EXAMPLES", usual))
    unhurried = settings(  # on a busy machine too
        max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
    )
    return lambda test: pytest.mark.fuzz(unhurried(test))
