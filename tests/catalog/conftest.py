import pytest

from fairtrial.catalog import Catalogue


@pytest.fixture(scope="session")
def shipped() -> Catalogue:
    return Catalogue.load()
