"""A person's own task, from a Python file."""

import hashlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from fairtrial.contract import BadInput, Metric, Slot, Task

_reference = re.compile(r"(?P<path>.+\.py)(?::(?P<name>\w+))?")


def is_file(reference: str) -> bool:
    """Whether a reference names a Python file, and perhaps a task in it."""
    return _reference.fullmatch(reference) is not None


def load(reference: str) -> Task:
    """The task in a Python file, 'FILE.py' or 'FILE.py:NAME': an object, or a class to be made without arguments.

    A file that stays as it is is imported once.
    """
    found = _reference.fullmatch(reference)
    assert found is not None
    path = Path(found["path"]).expanduser().resolve()
    if not path.is_file():
        raise BadInput(f"there is no file {found['path']}; fairtrial new-task {found['path']} writes one to start from")
    return _load(path, found["name"], path.stat().st_mtime_ns)


@cache
def _load(path: Path, name: str | None, changed: int) -> Task:
    module = _import(path, changed)
    if name is None:
        name = _only_task(module, path.name)
    elif name not in vars(module):
        there = ", ".join(_tasks(module)) or "none"
        raise BadInput(f"{path.name} has no {name!r}; tasks in it: {there}")
    task = vars(module)[name]
    if isinstance(task, type):
        with _blaming(path, f"making {name}"):
            task = task()
    _check_members(task, f"{path.name}: {name}")
    checked: Task = task
    return checked


@cache
def _import(path: Path, changed: int) -> ModuleType:
    """Import a file under a name that no other file has; what stands beside it can be imported by it."""
    name = f"fairtrial_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look it up there
    sys.path.insert(0, str(path.parent))
    try:
        with _blaming(path, "importing it"):
            spec.loader.exec_module(module)
    except BadInput:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))
    return module


@contextmanager
def _blaming(path: Path, doing: str) -> Iterator[None]:
    """Say in one line which error a file raised, and where."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, SyntaxError) and error.filename == str(path):
            line, message = error.lineno, error.msg
        else:
            frames = traceback.extract_tb(error.__traceback__)
            line = next((frame.lineno for frame in reversed(frames) if frame.filename == str(path)), None)
            message = str(error)
        place = path.name if line is None else f"{path.name}, line {line}"
        reason = " ".join(f"{type(error).__name__}: {message}".split())  # on one line
        raise BadInput(f"{place}: {doing} failed with {reason}") from error


def _tasks(module: ModuleType) -> dict[str, Any]:
    """What a module has that can be run: objects, or else classes of its own."""
    public = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    runs = {name: value for name, value in public.items() if callable(getattr(value, "run", None))}
    objects = {name: value for name, value in runs.items() if not isinstance(value, type | ModuleType)}
    classes = {name: value for name, value in runs.items() if isinstance(value, type)}
    return objects or {name: value for name, value in classes.items() if value.__module__ == module.__name__}


def _only_task(module: ModuleType, file: str) -> str:
    tasks = _tasks(module)
    if not tasks:
        raise BadInput(f"{file} has no task: define an object with {', '.join(_accepted)}")
    first = next(iter(tasks))
    if any(task is not tasks[first] for task in tasks.values()):
        raise BadInput(f"{file} has several tasks, {', '.join(tasks)}: name one, as in {file}:{first}")
    return first


_accepted: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("a text", lambda value: isinstance(value, str) and bool(value)),
    "version": ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    "metric": ("a Metric", lambda value: isinstance(value, Metric)),
    "slots": (
        "a mapping from names to Slots",
        lambda value: isinstance(value, Mapping) and all(isinstance(slot, Slot) for slot in value.values()),
    ),
    "check": ("a method", callable),
    "run": ("a method", callable),
}


def _check_members(task: Any, where: str) -> None:
    missing = [name for name in _accepted if not hasattr(task, name)]
    if missing:
        raise BadInput(f"{where} is no task: it has no {', '.join(missing)}")
    for name, (expected, accepted) in _accepted.items():
        value = getattr(task, name)
        if not accepted(value):
            raise BadInput(f"{where} is no task: {name} must be {expected}, got {value!r}")


def new_task(path: str | Path) -> None:
    """Write a commented task that runs, to start one's own from. An existing file stays as it is."""
    path = Path(path)
    if path.suffix != ".py":
        raise BadInput(f"the name of a task's file must end in .py, got {path}")
    template = Path(__file__).with_name("template.py").read_text(encoding="utf-8")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(template)
    except FileExistsError:
        raise BadInput(f"{path} is there already; choose another name or remove it") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror}") from None
