from dataclasses import replace
from datetime import date

import calibration_tables
from fairtrial import tasks
from fairtrial.catalog import Machine
from fairtrial.report import recorded
from fairtrial.report.recorded import Recorded
from fairtrial.trial.figures import Calibration, Coverage, Detection, FalseVerdicts, Pool, Saving, Share

SHARE = Share(337, 10_000)
CELL = "3.4 % \\[3.0,\N{NO-BREAK SPACE}3.7\\]"
FIXED, STOPPED = ("as measured", "fixed", 10, SHARE), ("as measured", "until decided", 40, SHARE)
TAILS = ("heavy | tails", "fixed", 10, SHARE)
POOL = Pool("digits", 1, tasks.load("digits").metric, 8, 2_000_000, [0.95, 0.96, 0.96, 0.97], 0, 12.0)
FIGURES = Calibration(
    POOL,
    10_000,
    5000,
    3.0,
    [FalseVerdicts(*FIXED, 1), FalseVerdicts(*FIXED, 3), FalseVerdicts(*STOPPED, 1), FalseVerdicts(*TAILS, 3)],
    [Detection(*FIXED, 1, 0.5, 0.0412), Detection(*STOPPED, 1, 1.0, None), Detection(*TAILS, 3, 1.0, 0.3)],
    [Coverage(*FIXED, 1), Coverage(*STOPPED, 1), Coverage(*FIXED, 2)],
    [Saving(1.0, 40, 10.0, 10.0, 12.0, 25, SHARE)],
)
MACHINE = Machine("Linux x86_64", 2, 24.0)


def page(folder, **changed):
    record = Recorded(date(2026, 11, 22), "0" * 16, MACHINE, {"python": "3.11.7"}, replace(FIGURES, **changed))
    (folder / "digits-tuned.json").write_text(recorded.as_text(record), encoding="utf-8")
    return calibration_tables.with_figures(f"before {calibration_tables.MARK} after", folder)


def test_figures_stand_where_the_mark_was(tmp_path):
    made = page(tmp_path)
    assert made.startswith("before ### digits, tuned")
    assert made.endswith(" after")
    lines = made.splitlines()
    for line in (
        "| pool | seeds | 1 method | 3 methods |",
        f"| as measured | 10 | {CELL} | {CELL} |",
        f"| as measured | up to 40 | {CELL} |  |",
        f"| heavy \\| tails | 10 |  | {CELL} |",
        f"| as measured | 10 | 1 method | {CELL} (4) |  |",
        f"| as measured | up to 40 | 1 method |  | {CELL} |",
        f"| as measured, a method that spreads 2 × as far | {CELL} |  |",
        f"| 1 (clear) | 40 seeds | {CELL} | 10 seeds | 25 seeds | 40 % |",
    ):
        assert line in lines, line
    assert "4 runs of the baseline, each with a tuning of its own by 8 runs: accuracy" in made
    assert "NOT within bounds" in made  # coverage of 3.4 %
    assert made.count("- Not as it should be: intervals hold the truth in only 3.4 %") == 2
    assert "Stale" in made


def test_without_a_record_the_page_says_so(tmp_path):
    made = calibration_tables.with_figures(f"before {calibration_tables.MARK} after", tmp_path)
    assert made == "before No calibration is on record yet.\n after"


def test_other_pages_stay_as_they_are():
    assert calibration_tables.with_figures("nothing to fill in") == "nothing to fill in"
