"""Files that are written whole or not at all."""

import os
from pathlib import Path

from fairtrial.contract import BadInput


def check_output(path: str | Path) -> Path:
    """Refuse a file that could not be written, before anything long is begun; gives the file behind any links."""
    try:
        real = Path(path).expanduser().resolve()
        if real.is_dir():
            raise BadInput(f"{path} is a folder; name a file")
        if real.exists() and not real.is_file():
            raise BadInput(f"{path} is no ordinary file; name another")
        if not real.parent.is_dir():
            raise BadInput(f"{path} cannot be written: there is no folder {real.parent}")
        if not os.access(real if real.exists() else real.parent, os.W_OK):
            raise BadInput(f"{path} cannot be written: no permission")
    except (OSError, RuntimeError) as error:
        raise _refused(path, error) from None
    except ValueError as error:
        raise error if isinstance(error, BadInput) else _refused(path, error) from None
    return real


def write_output(path: str | Path, text: str) -> None:
    """Write so that a reader sees the old file or the new one, whole."""
    real = check_output(path)
    unfinished = real.with_name(f".{real.name[:200]}.{os.getpid()}")
    try:
        with unfinished.open("x", encoding="utf-8", errors="backslashreplace", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, real)
    except OSError as error:
        raise _refused(path, error) from None
    finally:
        unfinished.unlink(missing_ok=True)


def _refused(path: str | Path, error: Exception) -> BadInput:
    return BadInput(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}")
