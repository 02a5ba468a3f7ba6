import json
import os
from functools import cache
from pathlib import Path

import pytest

from fairtrial.trial import fingerprint as subject
from fairtrial.trial.fingerprint import fingerprint

CODE = '''"""A task."""
import helper


def run(x):
    """Run it."""
    return helper.double(x) + 1  # more


class Task:
    """A class."""

    size = 3
'''


def write(path: Path, text: str | bytes) -> str:
    """Write a file, with a time of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    write.clock += 1
    os.utime(path, ns=(write.clock, write.clock))
    return str(path)


write.clock = 10**18


@pytest.fixture
def task(tmp_path):
    write(tmp_path / "helper.py", "def double(x):\n    return 2 * x\n")
    return write(tmp_path / "task.py", CODE)


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small library in place of this one."""
    root = tmp_path / "src" / subject.LIBRARY
    write(root / "__init__.py", "")
    write(root / "task.py", f"from {subject.LIBRARY}.parts import wheel\nfrom . import other\nimport numpy\n")
    write(root / "other.py", "OTHER = 1\n")
    write(root / "unused.py", "UNUSED = 1\n")
    write(root / "parts" / "__init__.py", "")
    write(root / "parts" / "wheel.py", "from ..deep import well\nfrom .spoke import LENGTH\n")
    write(root / "parts" / "spoke.py", "LENGTH = 1\n")
    write(root / "deep.py", "def well():\n    from fairtrial.bottom import water\n")
    write(root / "bottom.py", "water = 1\n")
    monkeypatch.setattr(subject, "ROOT", root)
    monkeypatch.setattr(subject, "_memory", lambda: tmp_path / "cache" / "seen.json")
    monkeypatch.setattr(subject, "_seen", cache(subject._seen.__wrapped__))
    return root


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# more", "# or less"),
        ('"""Run it."""', '"""Run it, please."""'),
        ('    """Run it."""\n', ""),
        ('"""A task."""\n', ""),
        ('    """A class."""\n\n', ""),
        ("helper.double(x) + 1", "(helper.double( x )\n            + 1)"),
        ("\n\n\nclass", "\nclass"),
        ("\n", "\r\n"),
        ('"""A task."""', "'A task.'"),
    ],
)
def test_comments_docstrings_and_layout_do_not_count(task, old, new):
    before = fingerprint([task])
    assert old in CODE
    write(Path(task), CODE.replace(old, new))
    assert fingerprint([task]) == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("+ 1", "+ 2"),
        ("+ 1", "- 1"),
        ("def run(x)", "def run(x=0)"),
        ("size = 3", "size = 3.0"),
        ("size = 3", "size = '3'"),
        ("size = 3", "size = 3; 'not a docstring'"),
        ("class Task", "@property\nclass Task"),
        ("run(x)", "walk(x)"),
    ],
)
def test_code_counts(task, old, new):
    before = fingerprint([task])
    write(Path(task), CODE.replace(old, new))
    assert fingerprint([task]) != before


def test_the_same_code_in_another_folder_has_the_same_fingerprint(task, tmp_path):
    write(tmp_path / "elsewhere" / "helper.py", (tmp_path / "helper.py").read_text())
    assert fingerprint([write(tmp_path / "elsewhere" / "task.py", CODE)]) == fingerprint([task])


def test_what_a_users_file_imports_from_beside_it_counts(task, tmp_path):
    before = fingerprint([task])
    write(tmp_path / "stranger.py", "x = 1\n")
    assert fingerprint([task]) == before
    write(tmp_path / "helper.py", "def double(x):\n    return 3 * x\n")
    assert fingerprint([task]) != before


@pytest.mark.parametrize(
    ("statement", "inner"),
    [
        ("from package import part", ""),
        ("import package.part", ""),
        ("from package.part import x", ""),
        ("def later():\n    import package.part", ""),
        ("import package.first", "from . import part"),
        ("import package.first", "from .part import x"),
        ("import package.first", "import package.part"),
        ("import package.first", "from ..package.part import x"),
    ],
)
def test_imports_from_a_package_beside_a_users_file_are_followed(tmp_path, statement, inner):
    task = write(tmp_path / "task.py", statement)
    write(tmp_path / "package" / "__init__.py", "")
    write(tmp_path / "package" / "first.py", inner)
    write(tmp_path / "package" / "part.py", "x = 1\n")
    before = fingerprint([task])
    write(tmp_path / "package" / "part.py", "x = 2\n")
    assert fingerprint([task]) != before


def test_a_module_inside_a_package_finds_what_stands_beside_the_task(tmp_path):
    task = write(tmp_path / "task.py", "import package.part")
    write(tmp_path / "package" / "part.py", "import helper\n")
    write(tmp_path / "helper.py", "x = 1\n")
    before = fingerprint([task])
    write(tmp_path / "helper.py", "x = 2\n")
    assert fingerprint([task]) != before


def test_imports_in_a_circle_come_to_an_end(tmp_path):
    write(tmp_path / "helper.py", "import task\n")
    assert fingerprint([write(tmp_path / "task.py", "import helper\nfrom . import helper\n")])


@pytest.mark.parametrize(
    "text", [b"\xef\xbb\xbfx = 1\n", b"# -*- coding: latin-1 -*-\nx = '\xe9'\n"], ids=["BOM", "latin-1"]
)
def test_a_users_file_may_have_any_encoding_that_python_reads(tmp_path, text):
    assert fingerprint([write(tmp_path / "task.py", text)])


@pytest.mark.parametrize("changed", ["task", "other", "parts/wheel", "parts/spoke", "deep", "bottom"])
def test_imports_inside_the_library_are_followed(library, changed):
    before = fingerprint(["fairtrial.task"])
    path = library / f"{changed}.py"
    write(path, path.read_text() + "\nchanged = 1\n")
    assert fingerprint(["fairtrial.task"]) != before


def test_what_the_task_does_not_import_does_not_count(library):
    before = fingerprint(["fairtrial.task"])
    write(library / "unused.py", "UNUSED = 2\n")
    write(library / "parts" / "extra.py", "x = 1\n")
    assert fingerprint(["fairtrial.task"]) == before


def test_a_users_file_counts_with_what_it_imports_of_the_library(library, tmp_path):
    task = write(tmp_path / "mine" / "task.py", "from fairtrial.parts.wheel import well\n")
    before = fingerprint([task])
    write(library / "bottom.py", "water = 2\n")
    assert fingerprint([task]) != before


def test_a_lazily_exported_name_counts_with_the_file_it_comes_from(library, tmp_path):
    write(library / "lazy" / "__init__.py", "import lazy_loader\n")
    write(
        library / "lazy" / "__init__.pyi", "from .first import First as First\nfrom .second import Second as Second\n"
    )
    write(library / "lazy" / "first.py", "First = 1\n")
    write(library / "lazy" / "second.py", "Second = 1\n")
    task = write(tmp_path / "mine" / "task.py", "from fairtrial.lazy import First\n")
    before = fingerprint([task])
    write(library / "lazy" / "second.py", "Second = 2\n")
    assert fingerprint([task]) == before
    write(library / "lazy" / "first.py", "First = 2\n")
    assert fingerprint([task]) != before


def test_other_libraries_do_not_count_and_order_does_not_matter(library):
    assert fingerprint(["fairtrial.task", "numpy", "torch.optim"]) == fingerprint(["fairtrial.task"])
    assert fingerprint(["fairtrial.deep", "fairtrial.other"]) == fingerprint(["fairtrial.other", "fairtrial.deep"])


def test_modules_may_be_left_out_with_what_only_they_import(library):
    before = fingerprint(["fairtrial.task"], without=["fairtrial.deep"])
    write(library / "bottom.py", "water = 2\n")
    assert fingerprint(["fairtrial.task"], without=["fairtrial.deep"]) == before
    write(library / "other.py", "OTHER = 2\n")
    assert fingerprint(["fairtrial.task"], without=["fairtrial.deep"]) != before


def forget():
    """As in a new process."""
    subject._seen.cache_clear()
    subject._code.cache_clear()


def test_a_file_of_the_library_is_read_once_and_remembered(library, monkeypatch):
    before = fingerprint(["fairtrial.task"])
    forget()
    with monkeypatch.context() as patched:
        patched.setattr(subject, "_code", lambda *_: pytest.fail("read again"))
        assert fingerprint(["fairtrial.task"]) == before
    write(library / "bottom.py", "water = 2\n")
    forget()
    changed = fingerprint(["fairtrial.task"])
    assert changed != before
    forget()
    assert fingerprint(["fairtrial.task"]) == changed


@pytest.mark.parametrize("memory", ["", "[1]", "3", "nonsense", "\x00", "wrong entries"])
def test_a_damaged_memory_is_made_anew(library, tmp_path, memory):
    before = fingerprint(["fairtrial.task"])
    place = tmp_path / "cache" / "seen.json"
    entries = json.loads(place.read_text())
    place.write_text(json.dumps({key: [1] for key in entries}) if memory == "wrong entries" else memory)
    forget()
    assert fingerprint(["fairtrial.task"]) == before


def test_without_a_folder_to_remember_in_nothing_is_lost(library, tmp_path):
    (tmp_path / "cache").write_text("a file in its place")
    assert fingerprint(["fairtrial.task"]) == fingerprint(["fairtrial.task"])
    assert (tmp_path / "cache").read_text() == "a file in its place"
