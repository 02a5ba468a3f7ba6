"""The test run checks the shapes and types of every method's tensors at every call."""

import os
import signal
import threading

import hypothesis
import pytest
from jaxtyping import install_import_hook

if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is started with Ctrl-C ignored

install_import_hook("fairtrial.methods", "beartype.beartype")

hypothesis.settings.register_profile("fairtrial", derandomize=True)  # --hypothesis-profile=default draws anew
hypothesis.settings.load_profile("fairtrial")


@pytest.fixture(scope="session")
def postgres():
    """A PostgreSQL server of this test run's own."""
    from tests.postgres import Server

    server = Server()
    server.start()
    yield server
    server.remove()


def loaded(name):
    """A model that tasks start from; where it cannot be had its tests are skipped, unless REQUIRE_MODELS is set."""
    from fairtrial.tasks import models

    if not models.is_there(name):
        (pytest.fail if os.environ.get("REQUIRE_MODELS") else pytest.skip)(
            f"the model {name!r} is not on this machine: make models"
        )
    return models.load(name)


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2 and its tokenizer; not to be changed."""
    return loaded("smollm2")


@pytest.fixture(scope="session")
def small_gpt():
    """The small language model of bytes and its tokenizer; not to be changed."""
    return loaded("small-gpt")


@pytest.fixture(scope="session")
def minilm():
    """The encoder of sentences and its tokenizer; not to be changed."""
    return loaded("minilm")
