"""The test run checks the shapes and types of every method's tensors at every call."""

import signal
import threading

import pytest
from jaxtyping import install_import_hook

if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is started with Ctrl-C ignored

install_import_hook("fairtrial.methods", "beartype.beartype")


@pytest.fixture(scope="session")
def postgres():
    """A PostgreSQL server of this test run's own."""
    from tests.postgres import Server

    server = Server()
    server.start()
    yield server
    server.remove()
