"""Tasks from a person's own file."""

import sys
from pathlib import Path

import pytest

from fairtrial.contract import BadInput, Choice, Outcome
from fairtrial.tasks import load, names, new_task

MEMBERS = """
from fairtrial.contract import Choice, Metric, Outcome

class Toy:
    name, version, slots = "toy", 1, {}
    metric = Metric("score", "maximize", "points", margin=0.1, worst=0.0)

    def check(self, choices):
        pass

    def run(self, choices, seed, *, split, progress):
        return Outcome(float(seed))
"""


def write(folder: Path, text: str, name: str = "mine.py") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def value_of(reference: str) -> float:
    outcome = load(reference).run({}, 5, split="test", progress=lambda step, total, value: None)
    assert isinstance(outcome, Outcome)
    return outcome.value


def test_a_class_an_object_and_one_of_several(tmp_path: Path) -> None:
    assert value_of(write(tmp_path, MEMBERS)) == 5
    assert value_of(write(tmp_path, MEMBERS + "task = Toy()\n", "object.py")) == 5
    both = write(tmp_path, MEMBERS + "one = Toy()\ntwo = Toy()\ntwo.name = 'second'\n", "both.py")
    assert load(both + ":two").name == "second"
    assert load(both + ":one").name == "toy"


def test_the_template_is_a_task_that_runs(tmp_path: Path) -> None:
    path = tmp_path / "new.py"
    new_task(path)
    task = load(str(path))
    assert len(path.read_text().splitlines()) <= 90
    task.check({"optimizer": Choice("SGD"), "loss": Choice("ZLoss")})
    outcome = task.run({}, 0, split="test", progress=lambda step, total, value: None)
    assert outcome.value > 0.9
    text = path.read_text()
    with pytest.raises(BadInput, match="is there already; choose another name or remove it"):
        new_task(path)
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("name", "message"), [("task.txt", "must end in .py"), ("missing/task.py", "cannot be written: No such file")]
)
def test_where_a_new_task_cannot_be_written(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        new_task(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("x = 1\ny = 1 / 0\n", "", "mine.py, line 2: importing it failed with ZeroDivisionError: division by zero"),
        ("def f(:\n", "", "mine.py, line 1: importing it failed with SyntaxError: invalid syntax"),
        ("import nowhere_to_be_found\n", "", "line 1: importing it failed with ModuleNotFoundError: No module named"),
        ("raise SystemExit('no\\nmore')\n", "", "line 1: importing it failed with SystemExit: no more"),
        ("x = 1\n", "", "mine.py has no task: define an object with name, version, metric, slots, check, run"),
        (
            MEMBERS + "one = Toy()\ntwo = Toy()\n",
            "",
            "mine.py has several tasks, one, two: name one, as in mine.py:one",
        ),
        (MEMBERS, ":Other", "mine.py has no 'Other'; tasks in it: Toy"),
        ("x = 1\n", ":x", "mine.py: x is no task: it has no name, version, metric, slots, check, run"),
        (MEMBERS + "Toy.version = '1'\n", "", "mine.py: Toy is no task: version must be a whole number, got '1'"),
        (MEMBERS + "Toy.metric = 'accuracy'\n", "", "mine.py: Toy is no task: metric must be a Metric, got 'accuracy'"),
        (MEMBERS + "Toy.slots = {'loss': 1}\n", "", "slots must be a mapping from names to Slots"),
        (MEMBERS + "Toy.check = None\n", "", "mine.py: Toy is no task: check must be a method, got None"),
        (MEMBERS + "del Toy.name\n", "", "mine.py: Toy is no task: it has no name"),
        (
            "class Needy:\n    def __init__(self, size): pass\n    def run(self): pass\n",
            "",
            "mine.py: making Needy failed with TypeError: .*missing 1 required positional argument: 'size'",
        ),
    ],
)
def test_files_that_have_no_task_say_why_in_one_line(tmp_path: Path, text: str, name: str, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        load(write(tmp_path, text) + name)
    assert "\n" not in str(caught.value)


def test_names_that_nothing_has() -> None:
    with pytest.raises(BadInput, match="there is no file no/such.py; fairtrial new-task no/such.py writes one"):
        load("no/such.py")
    with pytest.raises(BadInput, match="no task 'digit'; did you mean digits"):
        load("digit")
    with pytest.raises(BadInput, match=f"no task ''; none of the {len(names())} known ones is near "):
        load("")


def test_a_file_sees_its_folder_during_import_and_no_other_file_of_its_name(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, f"NAME = '{folder}'\n", f"beside_{folder}.py")
    before = list(sys.path)
    one, two = (
        load(write(tmp_path / folder, f"from beside_{folder} import NAME\n{MEMBERS}Toy.name = NAME\n"))
        for folder in ("a", "b")
    )
    assert (one.name, two.name) == ("a", "b")
    assert sys.path == before
    assert type(one).__module__ != type(two).__module__
    assert sys.modules[type(one).__module__].__file__ == str(tmp_path / "a" / "mine.py")


def test_a_file_is_imported_once_and_again_when_it_changes(tmp_path: Path) -> None:
    reference = write(tmp_path, MEMBERS)
    first = load(reference)
    assert load(reference) is first
    write(tmp_path, MEMBERS + "Toy.name = 'changed'\n")
    assert load(reference).name == "changed"
