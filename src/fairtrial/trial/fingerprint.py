"""A fingerprint of the code that a result depends on: it changes when the code does, not when its comments do."""

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

LIBRARY = __package__.partition(".")[0]
ROOT = Path(__file__).parents[1]  # the library's folder


def fingerprint(modules: Iterable[str], *, without: Iterable[str] = ()) -> str:
    """Hash of the named modules and of all of this library's modules that they import, directly or not.

    Comments, layout and docstrings do not count. A name that ends in '.py' is a file outside the library; what it
    imports from its own folder counts too. Other libraries do not count: their versions are stored with each run.
    Modules named in `without`, and what only they import, are left out.
    """
    digests: dict[Path, str] = {}
    left_out = {_file_of(name) for name in without}
    named = [(Path(name).resolve() if name.endswith(".py") else _file_of(name)) for name in set(modules)]
    waiting = [(path, path.parent) for path in named if path]
    while waiting:
        path, home = waiting.pop()
        if path in digests or path in left_out:
            continue
        digests[path], imported = _read(path, home, path.stat().st_mtime_ns)
        waiting += [(found, home) for found in imported]
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


@cache
def _read(path: Path, home: Path, mtime: int) -> tuple[str, list[Path]]:
    """Hash of a file's code, and the files that it imports from this library or, outside of it, from `home`."""
    tree = ast.parse(path.read_bytes())
    imported = [_locate(name, path, home) for name in _imports(tree, path, home)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            _drop_docstring(node)
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), [found for found in imported if found]


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


def _drop_docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        node.body = node.body[1:]
