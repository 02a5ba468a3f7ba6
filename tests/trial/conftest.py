"""Worker processes import the toy task by its name: they inherit this path."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fairtrial.trial.store import Store


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "runs.db") as opened:
        yield opened


@pytest.fixture(params=["sqlite", "postgresql"])
def location(request, tmp_path):
    """Where a store can be, in either kind of database; nothing is there yet."""
    if request.param == "sqlite":
        return str(tmp_path / "runs.db")
    return request.getfixturevalue("postgres").new_database()


@pytest.fixture
def either(location):
    """A store in either kind of database."""
    with Store(location) as opened:
        yield opened
