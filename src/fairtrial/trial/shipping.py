"""A folder with a person's task, sent to machines that do not have it."""

import io
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fairtrial.contract import BadInput

LIMIT = 100 * 2**20  # bytes of files; what is larger is data, and belongs where every machine can read it


def pack(folder: Path) -> bytes:
    """All files of a folder, as a compressed tar archive; hidden ones, caches and virtual environments stay behind.

    Raises:
        BadInput: it has more than `LIMIT` bytes, or something in it cannot be read.
    """
    content = io.BytesIO()
    path = folder
    size = 0
    try:
        with tarfile.open(fileobj=content, mode="w:gz", compresslevel=1, dereference=True) as archive:
            for path in _files(folder, set()):
                size += path.stat().st_size
                if size > LIMIT:
                    raise BadInput(
                        f"the task's folder {folder} is sent to Ray's nodes, and has more than {LIMIT >> 20} MiB: give "
                        "the task a folder of its own, and keep large data where every node can read it"
                    )
                archive.add(path, path.relative_to(folder))
    except OSError as error:
        reason = f"{error.filename or path}: {error.strerror or error}"
        raise BadInput(f"the task's folder {folder} cannot be sent to Ray's nodes: {reason}") from error
    return content.getvalue()


def _files(folder: Path, above: set[Path]) -> Iterator[Path]:
    """Regular files, also behind links, but not round in circles."""
    place = folder.resolve()
    if place in above:
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        if path.is_file():
            yield path
        elif path.is_dir() and not (path / "pyvenv.cfg").exists():
            yield from _files(path, above | {place})


def unpack(content: bytes) -> Path:
    """Lay a packed folder out in a temporary one, which goes when this process does, however that ends."""
    folder = Path(tempfile.mkdtemp(prefix="fairtrial-task-"))
    _remove_after_this_process(folder)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        archive.extractall(folder, filter="data")
    return folder


_ends_with_this_process: list[subprocess.Popen[bytes]] = []


def _remove_after_this_process(folder: Path) -> None:
    """Its input closes when this process is gone, even if killed."""
    command = ["sh", "-c", 'cat; rm -rf -- "$0"', os.fspath(folder)]
    _ends_with_this_process.append(subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True))
