import os
import re

import pytest

from fairtrial.contract import BadInput
from fairtrial.report.output import check_output, write_output


def test_a_file_is_written_whole_and_replaced(tmp_path):
    path = tmp_path / "report.html"
    write_output(path, "first ü\r\n")
    assert path.read_bytes() == "first ü\r\n".encode()
    write_output(str(path), "second \ud800")
    assert path.read_text() == "second \\ud800"
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_link_stays_a_link(tmp_path):
    real, link = tmp_path / "real.html", tmp_path / "link.html"
    link.symlink_to(real)
    write_output(link, "text")
    assert link.is_symlink()
    assert real.read_text() == "text"


def test_what_cannot_be_written_is_refused_in_one_line(tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path, reason in (
        (tmp_path, "is a folder; name a file"),
        (tmp_path / "no" / "report.html", "there is no folder"),
        (file / "report.html", "there is no folder"),
        (pipe, "is no ordinary file"),
        (loop, "cannot be written"),
        (tmp_path / ("x" * 300), "cannot be written: File name too long"),
        ("a\0b", "cannot be written: embedded null"),
    ):
        for refuse in (check_output, lambda path: write_output(path, "text")):
            with pytest.raises(BadInput, match=re.escape(reason)) as refused:
                refuse(path)
            assert "\n" not in str(refused.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "loop", "pipe"]
    assert file.read_text() == "kept"


def test_no_permission_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(BadInput, match="report.html cannot be written: no permission"):
        check_output(tmp_path / "report.html")


def test_the_old_file_stays_if_the_new_one_does_not_get_there(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, step, full)
            with pytest.raises(BadInput, match=r"report\.html cannot be written: No space left on device"):
                write_output(path, "new")
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["report.html"]
