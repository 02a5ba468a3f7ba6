import subprocess
import sys

import pytest

from fairtrial.contract import BadInput
from fairtrial.trial import shipping
from fairtrial.trial.shipping import pack, unpack


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "project"
    for name in ("task.py", "beside.py", "data/numbers.csv", "naïve \udcff.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name.encode(errors="replace").decode())
    return folder


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_folder_arrives_with_all_that_stands_in_it(folder):
    found = unpack(pack(folder))
    assert files_of(found) == files_of(folder)
    assert (found / "data" / "numbers.csv").read_text() == "data/numbers.csv"


def test_what_is_hidden_cached_or_installed_stays_behind(folder):
    before = files_of(folder)
    for name in (".git/config", ".env", "__pycache__/task.pyc", "data/__pycache__/x.pyc", "env/lib/torch.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("no")
    (folder / "env" / "pyvenv.cfg").write_text("")
    assert files_of(unpack(pack(folder))) == before


def test_links_are_followed_but_not_round_in_circles(folder, tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "more.csv").write_text("more")
    (folder / "linked").symlink_to(tmp_path / "large")
    (folder / "data" / "up").symlink_to(folder)
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    found = unpack(pack(folder))
    assert (found / "linked" / "more.csv").read_text() == "more"
    assert {path.name for path in (found / "data").iterdir()} == {"numbers.csv"}
    assert not (found / "gone").exists()


def test_a_folder_that_is_too_large_is_refused(folder, monkeypatch):
    monkeypatch.setattr(shipping, "LIMIT", 2**20)
    (folder / "data" / "weights").write_bytes(bytes(2**20))
    with pytest.raises(BadInput, match="has more than 1 MiB: give the task a folder of its own") as caught:
        pack(folder)
    assert str(folder) in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(folder):
    unreadable = "/sys/kernel/uevent_seqnum"  # claims to be longer than it is; permissions would not stop root
    (folder / "data" / "linked").symlink_to(unreadable)
    with pytest.raises(BadInput, match="cannot be sent to Ray's nodes: .*data/linked: unexpected end of data"):
        pack(folder)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path):
    with pytest.raises(BadInput, match="cannot be sent to Ray's nodes: .*nowhere: No such file or directory"):
        pack(tmp_path / "nowhere")


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), 9)"], ids=["well", "killed"])
def test_what_was_unpacked_goes_with_its_process(folder, end, tmp_path, monkeypatch):
    import children

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "packed").write_bytes(pack(folder))
    program = f"""
import os
from pathlib import Path
from fairtrial.trial.shipping import unpack
folder = unpack(Path({str(tmp_path / "packed")!r}).read_bytes())
assert (folder / "task.py").exists()
print(folder, flush=True)
{end}
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    left = tmp_path / told.stdout.strip()
    assert left.name.startswith("fairtrial-task-")
    children.wait_for(lambda: not left.exists())
