"""A Ray cluster to carry runs out on: one that is there already, or one of our own on this machine."""

import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys

import ray

from fairtrial.contract import BadInput

PATIENCE = 60  # seconds within which a cluster must answer


class Cluster:
    """Joined, or started, when it is made; left, or stopped and its logs removed, when it is closed.

    Args:
        address: HOST:PORT of the cluster's head, or 'auto' for the one that this machine is a node of. None takes the
            cluster that this process is connected to, and leaves it so; if there is none, it starts one on this
            machine, as 'local' does.

    Raises:
        BadInput: it cannot be joined or started; the message says why.
    """

    def __init__(self, address: str | None) -> None:
        self.ours = address is not None or not ray.is_initialized()
        self.logs = ""
        if self.ours and address in (None, "local"):
            self.logs = _start()
        elif self.ours:
            _join(str(address))

    def close(self) -> None:
        if self.ours:
            ray.shutdown()
        if self.logs:
            shutil.rmtree(self.logs, ignore_errors=True)


def _start() -> str:
    """Start a cluster that nobody else can use; gives the folder with its logs."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        context = ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray's parts have errors of many kinds
        raise BadInput(f"no Ray cluster can be started here: {last_line(error)}") from error
    return str(context.address_info["session_dir"])


def _join(address: str) -> None:
    if address.startswith("ray://"):
        raise BadInput(
            f"{address} is for Ray's client, which hangs when it is interrupted: run this on a node of the cluster, as "
            "ray job submit does, with HOST:PORT or auto"
        )
    if address != "auto":
        _reach(address)
    _ask(address)
    if ray.is_initialized():
        raise BadInput(f"cannot join {address}: this process is connected to a Ray cluster; ray.shutdown() ends that")
    try:
        ray.init(address=address, logging_level=logging.ERROR)
    except Exception as error:
        raise BadInput(f"the Ray cluster at {address} cannot be joined: {last_line(error)}") from error


def _reach(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise BadInput(f"cannot read the Ray address {address!r}: write HOST:PORT or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
    except (OSError, ValueError, OverflowError) as error:
        raise BadInput(f"there is no Ray cluster at {address}: {error}") from error


def _ask(address: str) -> None:
    """Have another process ask whether a cluster answers: Ray itself waits for minutes, and talks at length."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired as error:
        raise BadInput(f"there is no Ray cluster at {address}: no answer within {PATIENCE} seconds") from error
    if asked.returncode != 0:
        raise BadInput(f"the Ray cluster at {address} cannot be joined: {last_line(asked.stderr or asked.stdout)}")


def last_line(said: object) -> str:
    """What Ray has to say comes last, after lines that tell where it was said."""
    lines = str(said).strip().splitlines() or [type(said).__name__]
    return lines[-1].strip()[:300]
