"""A calibration as tables, and on record."""

import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from fairtrial import tasks
from fairtrial.catalog import CatalogError
from fairtrial.contract import Metric
from fairtrial.report import recorded
from fairtrial.report.calibration import calibration_tables, conclusion
from fairtrial.trial.calibration import calibration_of
from fairtrial.trial.figures import Pool, Share

METRIC = Metric("accuracy", "maximize", "fraction", margin=0.005, worst=0.0)
VALUES = np.round(0.9 + 0.02 * np.random.default_rng(0).normal(size=400), 3).tolist()
SHIPPED = sorted(recorded.FOLDER.glob("*.json"))


@pytest.fixture(scope="module")
def found():
    return calibration_of(Pool("digits", 1, METRIC, 0, 2_000_000, VALUES, 3, 12.0), 60)


@pytest.fixture(scope="module")
def written(found):
    return recorded.as_text(recorded.recorded(found, tasks.load("digits"), "digits"))


def shown(found):
    stream = io.StringIO()
    Console(file=stream, width=160, highlight=False).print(calibration_tables(found))
    return stream.getvalue()


def test_every_table_shows_the_figures_with_their_intervals(found):
    text = shown(found)
    assert text.startswith("digits: 400 runs of the baseline\n")
    assert "3 of them failed" in text
    assert str(found.pool.distinct) + " different values" in text
    for case in (*found.false_verdicts, *found.coverage, *found.savings):
        assert str(case.share) in text
    for case in found.power:
        if case.pool == "as measured" or case.methods == 1:
            assert str(case.share) in text
            assert case.computed is None or f"({100 * case.computed:.0f})" in text
    assert all(len(line) <= 160 for line in text.splitlines())
    assert "0.75 (clear)" in text
    assert "a method that spreads 2 × as far" in text


def test_a_tuned_pool_is_said_to_be_so(found):
    assert shown(replace(found, pool=replace(found.pool, trials=8))).startswith(
        "digits: 400 runs of the baseline, each tuned for itself by 8 runs\n"
    )


def test_the_last_line_says_whether_every_figure_is_within_its_bounds(found):
    right = replace(found.false_verdicts[0], share=Share(0, 60))
    wrong = replace(right, share=Share(9, 60))
    sure = replace(found, false_verdicts=[right, right], power=[], coverage=[], savings=[])
    assert conclusion(sure).startswith("Every one of 2 figures is within its bounds: false verdicts at most 5 %")
    assert " ".join(shown(sure).split()).endswith(conclusion(sure))
    one = replace(sure, false_verdicts=[wrong, right])
    assert conclusion(one).startswith("1 of 2 figures is NOT within bounds")
    assert "Not as it should be: false verdicts in 15.0 % [7.1, 26.6], too many: pool as measured, 6 seeds" in shown(
        one
    )
    assert conclusion(replace(one, false_verdicts=[wrong, wrong])).startswith("2 of 2 figures are NOT within bounds")
    assert len(found.misses) > 2  # of sixty comparisons nobody can say that they are few enough
    assert conclusion(found).startswith(f"{len(found.misses)} of {found.judged} figures are NOT within bounds")


def test_what_is_written_is_read_back_whole(found, written):
    again = recorded.parse(written, "digits.json")
    assert again.calibration.misses == found.misses
    assert again.as_json() == json.loads(written)
    told = json.loads(written)
    assert set(told) >= {"task", "runs", "comparisons", "machine", "versions", "date", "fingerprint", "first_seed"}
    assert set(told["versions"]) == {"python", "fairtrial", "torch", "numpy", "scipy", "scikit-learn", "optuna"}
    for rows in (told["false_verdicts"], told["power"], told["coverage"], told["savings"]):
        assert all(not isinstance(value, dict | list) for row in rows for value in row.values())


def test_a_file_is_written_whole_and_beside_the_untuned_one(found, written, tmp_path, monkeypatch):
    monkeypatch.setattr(recorded, "FOLDER", tmp_path)
    tuned = replace(found, pool=replace(found.pool, trials=8))
    for calibration in (found, tuned):
        recorded.write(recorded.recorded(calibration, tasks.load("digits"), "digits"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits-tuned.json", "digits.json"]
    assert (tmp_path / "digits.json").read_text() == written
    assert recorded.read(tmp_path / "digits-tuned.json").calibration.pool.trials == 8


@pytest.mark.parametrize(
    ("pattern", "instead", "said"),
    [
        ('"schema": 1', '"schema": 2', "digits.json: schema must be 1"),
        ('"date": "[^"]*"', '"date": "2026-13-01"', "date must be a date"),
        ('"fingerprint": "....', '"fingerprint": "', "fingerprint must be 16 hexadecimal digits"),
        ('"task": "digits"', '"task": "text"', "task must be the file's, digits.json"),
        ('"runs": 400', '"runs": 401', "runs is not what"),
        ('"count": 2,', '"count": 3,', "is not what the counts and values in the file come to"),
        ('"count": [0-9]+,', '"count": -1,', "count must be a whole number from 0"),
        ('"of": 60', '"of": 0', "of must be a whole number from 1"),
        ('"design": "fixed"', '"design": "fixd"', "design must be one of 'fixed', 'until decided'"),
        ('"values": .0', '"values": [NaN, 0', "values.0. must be a finite number"),
        ('"values": .*]', '"values": []', "values must hold at least two"),
        ('"failed": 3', '"failed": 3, "more": 1', "unknown field 'more'"),
        ('"failed": 3,', "", "failed is missing"),
        ('"misses": .(.|\n)*?"false_verdicts"', '"misses": [], "false_verdicts"', "misses is not what"),
        ("{", "", "not valid JSON"),
    ],
)
def test_a_damaged_file_is_refused_with_one_sentence(written, pattern, instead, said):
    damaged, times = re.subn(pattern, instead, written, count=1)
    assert times == 1
    with pytest.raises(CatalogError, match=said) as refused:
        recorded.parse(damaged, "digits.json")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_calibrations_on_record_can_be_read_and_are_full(path):
    calibration = recorded.read(path).calibration
    pool = calibration.pool
    assert len(pool.values) >= 400
    assert calibration.comparisons >= 2000
    task = tasks.load(pool.task)
    assert (task.version, task.metric) == (pool.version, pool.metric)
    assert not [said for said in calibration.misses if "verdicts" in said or "truth in only" in said]


def test_calibrations_of_the_default_task_and_of_a_tuned_one_are_on_record():
    assert {"digits", "tabular", "tabular-diabetes", "tabular-wine-tuned"} <= {path.stem for path in SHIPPED}
