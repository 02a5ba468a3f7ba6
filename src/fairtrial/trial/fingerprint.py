"""A fingerprint of the code that a result depends on: it changes when the code does, not when its comments do."""

import ast
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

LIBRARY = __package__.partition(".")[0]
ROOT = Path(__file__).parents[1]  # the library's folder
SEEN = "fairtrial-code-1.json"  # in the user's cache; the number belongs to the way in which code is read


def fingerprint(modules: Iterable[str], *, without: Iterable[str] = ()) -> str:
    """Hash of the named modules and of all of this library's modules that they import, directly or not.

    Comments, layout and docstrings do not count. A name that ends in '.py' is a file outside the library; what it
    imports from its own folder counts too. Other libraries do not count: their versions are stored with each run.
    Modules named in `without`, and what only they import, are left out.
    """
    digests: dict[Path, str] = {}
    remembered = dict(_seen())
    left_out = {_file_of(name) for name in without}
    named = [(Path(name).resolve() if name.endswith(".py") else _file_of(name)) for name in set(modules)]
    waiting = [(path, path.parent) for path in named if path]
    while waiting:
        path, home = waiting.pop()
        if path in digests or path in left_out:
            continue
        digests[path], imported = _read(path, home, path.stat().st_mtime_ns)
        waiting += [(found, home) for found in imported]
    if _seen() != remembered:
        _remember()
    content = "\n".join(sorted(f"{path.name} {digest}" for path, digest in digests.items()))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _file_of(module: str) -> Path | None:
    """The file of one of this library's modules."""
    first, *rest = module.split(".")
    if first != LIBRARY:
        return None
    return _module_in(ROOT, rest) or _exporting(ROOT.joinpath(*rest[:-1]), rest[-1])


def _exporting(package: Path, name: str) -> Path | None:
    """The file from which a package exports a name lazily, as its stub says."""
    stub = package / "__init__.pyi"
    if not stub.is_file():
        return None
    for node in ast.parse(stub.read_bytes()).body:
        if isinstance(node, ast.ImportFrom) and node.module and any(alias.name == name for alias in node.names):
            return _module_in(package, node.module.split("."))
    return None


def _module_in(folder: Path, parts: list[str]) -> Path | None:
    place = folder.joinpath(*parts)
    candidates = (place.with_suffix(".py"), place / "__init__.py") if parts else (place / "__init__.py",)
    return next((path for path in candidates if path.is_file()), None)


def _read(path: Path, home: Path, mtime: int) -> tuple[str, list[Path]]:
    """Hash of a file's code, and the files that it imports from this library or, outside of it, from `home`."""
    within = path.is_relative_to(ROOT)
    digest, imports = _remembered(path, mtime) if within else _code(path, home, mtime)
    return digest, [found for name in imports if (found := _locate(name, path, home))]


def _remembered(path: Path, mtime: int) -> tuple[str, list[str]]:
    """A file of this library is read once, not in every process: looking a paper up must not wait for it."""
    state = [mtime, path.stat().st_size]
    match _seen().get(str(path)):
        case [known, str(digest), [*imports]] if known == state:
            return digest, imports
    digest, imports = _code(path, ROOT, mtime)
    _seen()[str(path)] = [state, digest, imports]
    return digest, imports


@cache
def _seen() -> dict[str, Any]:
    with suppress(OSError, ValueError, TypeError):
        return dict(json.loads(_memory().read_text(encoding="utf-8")))
    return {}


def _remember() -> None:
    place = _memory()
    unfinished = place.with_suffix(f".{os.getpid()}")
    with suppress(OSError):  # without a folder to write to, each process reads for itself
        place.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(_seen()), encoding="utf-8")
        unfinished.replace(place)


def _memory() -> Path:
    return user_cache_path("fairtrial", appauthor=False) / SEEN


@cache
def _code(path: Path, home: Path, mtime: int) -> tuple[str, list[str]]:
    """Hash of a file's code, and the modules that it imports."""
    tree = ast.parse(path.read_bytes())
    plain: list[str] = []
    _write(tree, plain)
    return hashlib.sha256("".join(plain).encode()).hexdigest(), list(dict.fromkeys(_imports(tree, path, home)))


def _write(node: object, plain: list[str]) -> None:
    """A syntax tree as text, the same under every Python: without docstrings and without what is empty."""
    if isinstance(node, list):
        plain.append("[")
        for item in node:
            _write(item, plain)
        plain.append("]")
    elif isinstance(node, ast.AST):
        plain.append(f"{type(node).__name__}(")
        for name in node._fields:
            value = getattr(node, name, None)
            if name == "body" and isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                value = _without_docstring(node.body)
            if value is not None and value != []:
                plain.append(f"{name}=")
                _write(value, plain)
        plain.append(")")
    else:
        plain.append(f"{node!r},")


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    match body:
        case [ast.Expr(ast.Constant(str())), *rest]:
            return rest
    return body


def _imports(tree: ast.AST, path: Path, home: Path) -> Iterator[str]:
    within = path.is_relative_to(ROOT)
    package = [LIBRARY, *path.parent.relative_to(ROOT).parts] if within else [*path.parent.relative_to(home).parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *(node.module or "").split(".")]).strip(".")
            yield origin
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def _locate(module: str, importer: Path, home: Path) -> Path | None:
    if module.partition(".")[0] == LIBRARY:
        return _file_of(module)
    return None if importer.is_relative_to(ROOT) else _module_in(home, module.strip(".").split(".") if module else [])
